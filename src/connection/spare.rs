//! Readers and writers that hold nothing.
//!
//! A connection at rest has neither, which saves more than a quarter of its memory. Each thread
//! keeps a few for the next runs that start on it.

use std::cell::RefCell;
use std::thread::LocalKey;

use crate::buffer::{Chain, Staging};
use crate::config::SPARE_PARTS_MAX;

// Boxed, because what moves in and out of a connection is a pointer.
#[allow(clippy::vec_box)]
type Spare<T> = RefCell<Vec<Box<T>>>;

thread_local! {
    static READERS: Spare<Chain> = const { RefCell::new(Vec::new()) };
    static WRITERS: Spare<Staging> = const { RefCell::new(Vec::new()) };
}

/// An empty reader.
#[inline]
pub(super) fn reader() -> Box<Chain> {
    READERS.with_borrow_mut(Vec::pop).unwrap_or_default()
}

/// An empty writer.
#[inline]
pub(super) fn writer() -> Box<Staging> {
    WRITERS.with_borrow_mut(Vec::pop).unwrap_or_default()
}

/// Takes a reader that nobody needs; gives it back if there is something in it.
#[inline]
pub(super) fn keep_reader(mut reader: Box<Chain>) -> Option<Box<Chain>> {
    if !reader.is_empty() {
        return Some(reader);
    }
    reader.release();
    keep(&READERS, reader);
    None
}

/// Takes a writer that nobody needs; gives it back if there is something in it.
#[inline]
pub(super) fn keep_writer(mut writer: Box<Staging>) -> Option<Box<Staging>> {
    if !writer.is_empty() {
        return Some(writer);
    }
    writer.release();
    keep(&WRITERS, writer);
    None
}

fn keep<T>(spare: &'static LocalKey<Spare<T>>, part: Box<T>) {
    // Where the thread ends, it is simply dropped.
    let _ = spare.try_with(|parts| {
        let mut parts = parts.borrow_mut();
        if parts.len() < SPARE_PARTS_MAX {
            parts.push(part);
        }
    });
}
