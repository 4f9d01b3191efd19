//! Readers and writers that hold nothing.
//!
//! A connection at rest has neither. Each thread keeps a few for the next run that starts on it,
//! still in its cache; a thousand connections would need a thousand of their own.

use std::cell::RefCell;

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
    // Where the thread ends, it is simply dropped.
    let _ = READERS.try_with(|readers| {
        let mut readers = readers.borrow_mut();
        if readers.len() < SPARE_PARTS_MAX {
            readers.push(reader);
        }
    });
    None
}

/// Takes a writer that nobody needs; gives it back if there is something in it.
#[inline]
pub(super) fn keep_writer(mut writer: Box<Staging>) -> Option<Box<Staging>> {
    if !writer.is_empty() {
        return Some(writer);
    }
    writer.release();
    // Where the thread ends, it is simply dropped.
    let _ = WRITERS.try_with(|writers| {
        let mut writers = writers.borrow_mut();
        if writers.len() < SPARE_PARTS_MAX {
            writers.push(writer);
        }
    });
    None
}
