//! Readers and writers that hold nothing.
//!
//! A connection at rest has neither, which saves more than a quarter of its memory. Each thread
//! keeps a few for the next runs that start on it.

use std::cell::RefCell;

use crate::buffer::{Chain, Staging};
use crate::config::SPARE_PARTS_MAX;

thread_local! {
    static SPARE: RefCell<Spare> =
        const { RefCell::new(Spare { readers: Vec::new(), writers: Vec::new() }) };
}

// Boxed, because what moves in and out of a connection is a pointer.
#[allow(clippy::vec_box)]
struct Spare {
    readers: Vec<Box<Chain>>,
    writers: Vec<Box<Staging>>,
}

/// An empty reader. Where the thread ends there are no spare ones; so below.
#[inline]
pub(super) fn reader() -> Box<Chain> {
    let kept = SPARE.try_with(|spare| spare.borrow_mut().readers.pop());
    kept.ok().flatten().unwrap_or_default()
}

/// An empty writer.
#[inline]
pub(super) fn writer() -> Box<Staging> {
    let kept = SPARE.try_with(|spare| spare.borrow_mut().writers.pop());
    kept.ok().flatten().unwrap_or_default()
}

/// Takes a reader that nobody needs; gives it back if there is something in it.
pub(super) fn keep_reader(mut reader: Box<Chain>) -> Option<Box<Chain>> {
    if !reader.is_empty() {
        return Some(reader);
    }
    reader.release();
    // There it is simply dropped.
    let _ = SPARE.try_with(|spare| push(&mut spare.borrow_mut().readers, reader));
    None
}

/// Takes a writer that nobody needs; gives it back if there is something in it.
pub(super) fn keep_writer(mut writer: Box<Staging>) -> Option<Box<Staging>> {
    if !writer.is_empty() {
        return Some(writer);
    }
    writer.release();
    let _ = SPARE.try_with(|spare| push(&mut spare.borrow_mut().writers, writer));
    None
}

/// Takes both, with nothing in them.
#[inline]
pub(super) fn keep(mut reader: Box<Chain>, mut writer: Box<Staging>) {
    reader.release();
    writer.release();
    let _ = SPARE.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        push(&mut spare.readers, reader);
        push(&mut spare.writers, writer);
    });
}

#[inline]
#[allow(clippy::vec_box)]
fn push<T>(parts: &mut Vec<Box<T>>, part: Box<T>) {
    if parts.len() < SPARE_PARTS_MAX {
        parts.push(part);
    }
}
