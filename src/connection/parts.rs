//! Memory of readers and writers.
//!
//! A reader and a writer move between a connection and its runs as pointers. A connection at rest
//! has neither, which saves more than a quarter of its memory. Each thread keeps a few empty ones
//! for the next runs that start on it.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::LazyLock;

use crossbeam_queue::ArrayQueue;

use crate::buffer::{Chain, Staging};
use crate::config::SPARE_PARTS_MAX;

/// A reader or a writer, until its holder gives it back.
pub(super) struct Lent<T>(Option<Box<T>>);

impl<T> Lent<T> {
    pub(super) fn new(part: Box<T>) -> Lent<T> {
        Lent(Some(part))
    }

    /// Passes the part to another `Lent`.
    pub(super) fn pass_on(&mut self) -> Lent<T> {
        Lent(self.0.take())
    }

    /// Takes the part; `None` if it was taken before. No other method may be called after this.
    pub(super) fn take(&mut self) -> Option<Box<T>> {
        self.0.take()
    }
}

impl<T> Deref for Lent<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        self.0.as_deref().expect("a part is taken only when its holder is dropped")
    }
}

impl<T> DerefMut for Lent<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_deref_mut().expect("a part is taken only when its holder is dropped")
    }
}

thread_local! {
    /// Empty readers and writers. A thread that ends frees this first; then parts are allocated and
    /// freed.
    static EMPTY: RefCell<Empty> =
        const { RefCell::new(Empty { readers: Vec::new(), writers: Vec::new() }) };
}

// Boxed, because the pointers move to connections.
#[allow(clippy::vec_box)]
struct Empty {
    readers: Vec<Box<Chain>>,
    writers: Vec<Box<Staging>>,
}

/// Empty readers of all threads. A poller takes a reader for a run, and a worker gives it back: the
/// worker's list is full soon, and the poller's is empty.
static READERS: LazyLock<ArrayQueue<Box<Chain>>> =
    LazyLock::new(|| ArrayQueue::new(SHARED_PARTS_MAX));

/// Enough for the runs that wait in the queues of workers.
const SHARED_PARTS_MAX: usize = 1024;

/// An empty reader.
#[inline]
pub(super) fn reader() -> Box<Chain> {
    let kept = EMPTY.try_with(|empty| empty.borrow_mut().readers.pop());
    kept.ok().flatten().or_else(|| READERS.pop()).unwrap_or_default()
}

/// An empty writer.
#[inline]
pub(super) fn writer() -> Box<Staging> {
    let kept = EMPTY.try_with(|empty| empty.borrow_mut().writers.pop());
    kept.ok().flatten().unwrap_or_default()
}

/// Keeps `reader` for another run if it is empty. Otherwise returns it.
#[inline]
pub(super) fn keep_reader(mut reader: Box<Chain>) -> Option<Box<Chain>> {
    if !reader.is_empty() {
        return Some(reader);
    }
    reader.release();
    let left = EMPTY.try_with(|empty| push(&mut empty.borrow_mut().readers, reader));
    if let Ok(Some(reader)) = left {
        // A full list leaves the reader to be freed.
        let _ = READERS.push(reader);
    }
    None
}

/// Keeps `writer` for another run if it is empty. Otherwise returns it.
#[inline]
pub(super) fn keep_writer(mut writer: Box<Staging>) -> Option<Box<Staging>> {
    if !writer.is_empty() {
        return Some(writer);
    }
    writer.release();
    let _ = EMPTY.try_with(|empty| push(&mut empty.borrow_mut().writers, writer));
    None
}

/// Returns `part` if the list is full.
#[allow(clippy::vec_box)]
fn push<T>(parts: &mut Vec<Box<T>>, part: Box<T>) -> Option<Box<T>> {
    if parts.len() >= SPARE_PARTS_MAX {
        return Some(part);
    }
    parts.push(part);
    None
}
