//! The reader and the writer of a connection, as they move between the connection and a run.
//!
//! What moves is a pointer. A connection at rest has neither, which saves more than a quarter of
//! its memory: each thread keeps a few empty ones for the next runs that start on it.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use crate::buffer::{Chain, Staging};
use crate::config::SPARE_PARTS_MAX;

/// A reader or a writer that its holder uses until it goes back.
pub(super) struct Lent<T>(Option<Box<T>>);

impl<T> Lent<T> {
    pub(super) fn new(part: Box<T>) -> Lent<T> {
        Lent(Some(part))
    }

    /// Passes the part to another holder.
    pub(super) fn pass_on(&mut self) -> Lent<T> {
        Lent(self.0.take())
    }

    /// Takes the part; `None` if it was taken before. Nothing else may be called after this.
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
    /// Empty readers and writers. Gone while the thread ends: then parts are allocated and freed.
    static EMPTY: RefCell<Empty> =
        const { RefCell::new(Empty { readers: Vec::new(), writers: Vec::new() }) };
}

// Boxed, because what moves in and out of a connection is a pointer.
#[allow(clippy::vec_box)]
struct Empty {
    readers: Vec<Box<Chain>>,
    writers: Vec<Box<Staging>>,
}

/// An empty reader.
#[inline]
pub(super) fn reader() -> Box<Chain> {
    let kept = EMPTY.try_with(|empty| empty.borrow_mut().readers.pop());
    kept.ok().flatten().unwrap_or_default()
}

/// An empty writer.
#[inline]
pub(super) fn writer() -> Box<Staging> {
    let kept = EMPTY.try_with(|empty| empty.borrow_mut().writers.pop());
    kept.ok().flatten().unwrap_or_default()
}

/// Keeps an empty reader for another run. Returns one that is not empty.
#[inline]
pub(super) fn keep_reader(mut reader: Box<Chain>) -> Option<Box<Chain>> {
    if !reader.is_empty() {
        return Some(reader);
    }
    reader.release();
    let _ = EMPTY.try_with(|empty| push(&mut empty.borrow_mut().readers, reader));
    None
}

/// Keeps an empty writer for another run. Returns one that is not empty.
#[inline]
pub(super) fn keep_writer(mut writer: Box<Staging>) -> Option<Box<Staging>> {
    if !writer.is_empty() {
        return Some(writer);
    }
    writer.release();
    let _ = EMPTY.try_with(|empty| push(&mut empty.borrow_mut().writers, writer));
    None
}

#[allow(clippy::vec_box)]
fn push<T>(parts: &mut Vec<Box<T>>, part: Box<T>) {
    if parts.len() < SPARE_PARTS_MAX {
        parts.push(part);
    }
}
