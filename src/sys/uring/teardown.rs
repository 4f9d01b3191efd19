//! The end of a ring: on purpose, or because the kernel lost track.

use std::io;
use std::time::Instant;

use io_uring::cqueue;

use super::entry::{self, Role};
use super::raw::Until;
use super::send_rings::reclaim;
use super::tag::{Op, user_data};
use super::{RingOptions, Uring, find};
use crate::config::uring::TEARDOWN;
use crate::sys::{Completion, Sink, Token};

impl Uring {
    /// The kernel has lost completions, for lack of memory, and nobody knows whose: so every
    /// connection fails, and the listeners go on with another ring.
    pub(super) fn rebuild(&mut self, sink: &mut impl Sink) -> io::Result<()> {
        tracing::error!("io_uring: completions were lost; a new ring, without its connections");
        let pool = self.buffers.pool().clone();
        let options = RingOptions { uring: self.options.clone(), engine: self.engine.clone() };
        let mut fresh = Uring::over(&self.wake, &pool, &self.counters, &options)?;
        // Send rings stay: what they have lost of their sends is given up, with its connection.
        // Where there are none, sends go through the new ring from here on.
        fresh.flushes = self.flushes.take();
        let mut old = std::mem::replace(self, fresh);
        // The old ring may still name their descriptors, until it is gone.
        let mut removed = Vec::new();
        for entry in std::mem::take(&mut old.entries).into_iter().flatten() {
            let (token, role) = (entry.token, entry.role);
            let was_sending = entry.sending.is_some();
            // The same goes for the memory that it may be sending.
            std::mem::forget(entry.sending);
            if entry.removing {
                removed.push(entry.socket);
                self.done.push((token, Completion::Removed));
                continue;
            }
            self.insert(token, entry.socket, role, entry.budget_bytes as usize);
            if role == Role::Listener {
                self.follow(token);
                continue;
            }
            let Some(failed) = find(&mut self.entries, token) else { continue };
            failed.ended = true;
            failed.role = Role::Stream;
            let lost = || io::Error::from_raw_os_error(libc::EBADR);
            if was_sending {
                self.counters.sends_in_flight.add_owned(1u64.wrapping_neg());
                sink.complete(token, Completion::Sent(Err(lost())));
            }
            if role == Role::Connecting {
                sink.complete(token, Completion::Connected(Err(lost())));
            } else if !entry.ended {
                sink.complete(token, Completion::Ended(Err(lost())));
            }
        }
        self.done.append(&mut old.done);
        drop(old);
        drop(removed);
        Ok(())
    }
}

impl Drop for Uring {
    /// Ends every operation, and waits until the kernel is through with our memory: the ring itself
    /// is taken down in the background, after its descriptor is closed.
    fn drop(&mut self) {
        if let Some(mut flushes) = self.flushes.take() {
            flushes.close(&self.counters);
        }
        self.ring.cancel_all(user_data(Op::Cancel, Token::NONE));
        let begun = Instant::now();
        while (self.outstanding > 0 || self.ring.sends_in_flight() > 0)
            && begun.elapsed() < TEARDOWN
        {
            let turn = Until::Timeout(TEARDOWN / 20);
            if self.ring.enter(turn, &self.counters).is_err() {
                break;
            }
            self.ring.collect(&mut self.completions, usize::MAX);
            for done in self.completions.drain(..) {
                let op = Op::of(done.user_data);
                if op == Op::Flush {
                    if done.ends_flush() {
                        // SAFETY: the completion is of a flush, and is handled once.
                        drop(unsafe { reclaim(done.user_data) });
                        self.counters.sends_in_flight.add_owned(1u64.wrapping_neg());
                    }
                    continue;
                }
                if op != Op::Cancel && !cqueue::more(done.flags) {
                    self.outstanding -= 1;
                }
                if op == Op::Accept {
                    // Installed before we heard of it: close it.
                    drop(entry::adopt(done.result));
                }
            }
        }
        if self.outstanding == 0 {
            self.buffers.unregister(&self.ring);
            return;
        }
        tracing::error!(operations = self.outstanding, "ring taken down with operations in flight");
        self.buffers.leak();
        for entry in self.entries.drain(..).flatten() {
            std::mem::forget(entry.sending);
        }
    }
}
