//! The poller's part of sends that any thread may start: taking completions, pushing sends that
//! found their queue full, and sleeping without missing a completion.
//!
//! Owned by the poller's thread.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::engine::Engine;
use super::polled::{Collector, WaitFor};
use super::send_rings::SendRings;
use crate::buffer::Chain;
use crate::config::ZeroCopyRule;
use crate::config::uring::COMPLETIONS_PER_ROUND;
use crate::counters::Counters;
use crate::sync::lock;
use crate::sys::uring::entries::Entries;
use crate::sys::uring::raw::Until;
use crate::sys::uring::ring::{Cqe, Ring};
use crate::sys::uring::send_record::{self, Outcome, SendRecord};
use crate::sys::uring::tag::Op;
use crate::sys::{Socket, Token, Wake};

pub(in crate::sys::uring) struct SharedSends {
    rings: Arc<SendRings>,
    /// The completion queues of the send rings. Empty where sends go through the receive ring.
    collectors: Vec<Collector>,
    /// Sends that found their queue full. Boxed, because the kernel will know their addresses.
    #[allow(clippy::vec_box)]
    waiting: Vec<Box<SendRecord>>,
    /// Completions of the send rings wake the poller.
    wakes: bool,
}

impl SharedSends {
    /// Opens the send rings.
    pub(in crate::sys::uring) fn open(
        engine: &Engine,
        receive: &Ring,
        wake: &Wake,
    ) -> io::Result<SharedSends> {
        Ok(SharedSends {
            rings: Arc::clone(engine.rings()),
            collectors: engine.open_send_rings(receive, wake)?,
            waiting: Vec::new(),
            wakes: false,
        })
    }

    /// Sends all of `bytes`. A send that finds its queue full waits for room.
    pub(in crate::sys::uring) fn send(
        &mut self,
        token: Token,
        socket: &Arc<Socket>,
        bytes: Chain,
        counters: &Counters,
    ) {
        counters.sends_in_flight.add_owned(1);
        self.push(SendRecord::new(token, socket, bytes));
    }

    fn push(&mut self, send: Box<SendRecord>) {
        if let Err(send) = self.rings.push(send) {
            self.waiting.push(send);
        }
    }

    /// Pushes again the sends that found their queue full. Drops sends of removed connections.
    pub(in crate::sys::uring) fn retry(&mut self, entries: &Entries, counters: &Counters) {
        for send in std::mem::take(&mut self.waiting) {
            if entries.is_live(send.token()) {
                self.push(send);
            } else {
                counters.sends_in_flight.add_owned(1u64.wrapping_neg());
            }
        }
    }

    pub(in crate::sys::uring) fn has_completions(&self) -> bool {
        let has = |ring: &Collector| ring.completion_count() > 0 || ring.ring().has_overflowed();
        self.collectors.iter().any(has)
    }

    /// Moves a round's completions of each send ring to `cqes`. Returns the first error, after all
    /// rings.
    pub(in crate::sys::uring) fn collect(
        &mut self,
        cqes: &mut Vec<Cqe>,
        counters: &Counters,
    ) -> io::Result<()> {
        let mut fetched = Ok(());
        for collector in &mut self.collectors {
            if collector.ring().has_overflowed() {
                counters.completion_overflows.add_owned(1);
                fetched = fetched.and(collector.enter(WaitFor::Completion(Until::Now), counters));
            }
            collector.collect(cqes, COMPLETIONS_PER_ROUND);
            // The kernel reports a loss only to a thread that waits, and none waits on these rings.
            if collector.has_lost_more() {
                fetched = fetched.and(Err(io::Error::from_raw_os_error(libc::EBADR)));
            }
        }
        fetched
    }

    /// Forgets the losses so far: a new receive ring takes over.
    pub(in crate::sys::uring) fn forget_losses(&mut self) {
        for collector in &mut self.collectors {
            collector.has_lost_more();
        }
    }

    /// Takes a completion of a send. Returns the token and the result when the send is over and its
    /// connection is not removed.
    pub(in crate::sys::uring) fn complete(
        &mut self,
        cqe: Cqe,
        entries: &Entries,
        counters: &Counters,
    ) -> Option<(Token, io::Result<usize>)> {
        // SAFETY: the completion is of a record's send, and each completion is handled once.
        match unsafe {
            send_record::complete(cqe, ZeroCopyRule::NEVER, counters, |token| {
                entries.is_live(token)
            })
        } {
            Outcome::Nothing => None,
            Outcome::Unfinished(send) => {
                self.push(send);
                None
            }
            Outcome::Done(token, result) => Some((token, result)),
        }
    }

    /// Prepares the poller's sleep: completions of the send rings will wake it. Returns how long
    /// the poller may sleep.
    pub(in crate::sys::uring) fn prepare_sleep(
        &mut self,
        until: Until,
        receive: &Ring,
        counters: &Counters,
    ) -> io::Result<Until> {
        if let Some(send) = self.waiting.first() {
            let index = self.rings.index(send.token());
            if let Some(collector) = self.collectors.get(index).or(receive.collector()) {
                collector.enter(WaitFor::QueueRoom, counters)?;
            }
            return Ok(Until::Now);
        }
        self.wakes = true;
        for collector in &self.collectors {
            collector.wake_on_completion(true);
        }
        // The kernel posts a completion and then reads the flag. This thread sets the flag, and
        // looks for completions after the fence. So one of them sees what the other one did.
        fence(Ordering::SeqCst);
        Ok(if self.has_completions() { Until::Now } else { until })
    }

    pub(in crate::sys::uring) fn end_sleep(&mut self) {
        if std::mem::take(&mut self.wakes) {
            for collector in &self.collectors {
                collector.wake_on_completion(false);
            }
        }
    }

    /// Refuses new sends, cancels the sends in the send rings, and waits until the kernel no longer
    /// uses their memory.
    pub(in crate::sys::uring) fn close(&mut self, counters: &Counters) {
        for queue in self.rings.queues() {
            queue.close();
        }
        let given_up = std::mem::take(&mut self.waiting).len() as u64;
        counters.sends_in_flight.add_owned(given_up.wrapping_neg());
        let mut cqes = Vec::new();
        for (collector, queue) in self.collectors.iter_mut().zip(self.rings.queues()) {
            collector.cancel_all(queue);
            collector.drain(&mut cqes, counters);
            for cqe in cqes.drain(..).filter(|cqe| Op::SendRecord.is_of(cqe.user_data)) {
                // SAFETY: the completion is of a record's send, and each is handled once.
                unsafe { send_record::discard(cqe, ZeroCopyRule::NEVER, counters) }
            }
        }
        lock(self.rings.threads()).end();
    }
}
