//! The answers of requests that run as tasks, on their way to the task of their connection.
//!
//! The tasks of requests add answers, on any thread. The task of the connection takes them. Nothing
//! of the user runs under the lock.

use std::sync::Arc;
use std::task::Waker;

use super::codec::Codec;
use crate::buffer::Slice;
use crate::error::{Error, Result};
use crate::sync::{Mutex, lock};
use crate::task::line::{Line, Place};
use crate::user_code;

/// What the answer of a request needs.
pub(super) struct Receipt {
    pub(super) number: u32,
    pub(super) front: Slice,
}

/// The end of a request.
pub(super) struct Answer<C: Codec> {
    pub(super) receipt: Receipt,
    pub(super) outcome: Result<C::Out>,
}

/// The answers of requests that ran as tasks.
pub(super) struct Done<C: Codec>(Mutex<Answers<C>>);

struct Answers<C: Codec> {
    added: Vec<Answer<C>>,
    /// Wakes the task of the connection.
    waker: Option<Waker>,
    /// The task of the connection has ended.
    is_closed: bool,
}

impl<C: Codec> Done<C> {
    pub(super) fn new() -> Done<C> {
        Done(Mutex::new(Answers { added: Vec::new(), waker: None, is_closed: false }))
    }

    fn add(&self, answer: Answer<C>) {
        let (waker, unneeded) = {
            let mut done = lock(&self.0);
            if done.is_closed {
                (None, Some(answer))
            } else {
                done.added.push(answer);
                (done.waker.take(), None)
            }
        };
        user_code::wake_all(waker);
        user_code::discard(unneeded);
    }

    /// Moves the answers to `answers`, which is empty. Registers `waker` for the next one.
    pub(super) fn take(&self, answers: &mut Vec<Answer<C>>, waker: Waker) {
        let replaced = {
            let mut done = lock(&self.0);
            std::mem::swap(&mut done.added, answers);
            done.waker.replace(waker)
        };
        user_code::discard(replaced);
    }

    /// Drops the answers, and those that come later.
    pub(super) fn close(&self) {
        let (answers, waker) = {
            let mut done = lock(&self.0);
            done.is_closed = true;
            (std::mem::take(&mut done.added), done.waker.take())
        };
        answers.into_iter().for_each(user_code::discard);
        user_code::discard(waker);
    }
}

/// Leaves the answer of a request that runs as a task, also if the task is dropped.
pub(super) struct Finish<C: Codec> {
    done: Arc<Done<C>>,
    receipt: Option<Receipt>,
    /// The place in total. It is given back when the request ends: the answer may have to wait for
    /// its client.
    place: Option<Place<Arc<Line>>>,
}

impl<C: Codec> Finish<C> {
    pub(super) fn new(
        done: Arc<Done<C>>,
        receipt: Receipt,
        place: Option<Place<Arc<Line>>>,
    ) -> Finish<C> {
        Finish { done, receipt: Some(receipt), place }
    }

    pub(super) fn finish(&mut self, outcome: Result<C::Out>) {
        self.place = None;
        if let Some(receipt) = self.receipt.take() {
            self.done.add(Answer { receipt, outcome });
        }
    }
}

impl<C: Codec> Drop for Finish<C> {
    fn drop(&mut self) {
        self.finish(Err(Error::closed("handler given up")));
    }
}
