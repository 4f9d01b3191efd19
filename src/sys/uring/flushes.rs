//! The poller's side of sends that any thread starts: taking their completions, pushing what found
//! no room, sleeping without missing one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::entry::Entry;
use super::in_flight::Progress;
use super::polled::{Collector, Wait};
use super::raw::Until;
use super::ring::{Done, Ring};
use super::send_rings::{Flushed, SendRings, reclaim};
use super::{Engine, Uring};
use crate::buffer::Chain;
use crate::config::uring::COMPLETIONS_PER_ROUND;
use crate::counters::Counters;
use crate::sync::lock;
use crate::sys::{Completion, Sink, Socket, Token, Wake};

pub(super) struct Flushes {
    pub(super) rings: Arc<SendRings>,
    /// Of the send rings; none where sends go through the receive ring.
    collectors: Vec<Collector>,
    /// Sends that found their ring full: the poller's own, or the rest of others. Boxed, as the
    /// kernel will know their addresses.
    #[allow(clippy::vec_box)]
    waiting: Vec<Box<Flushed>>,
    /// Completions ring the poller's bell.
    listens: bool,
}

impl Flushes {
    pub(super) fn open(engine: &Engine, receive: &Ring, wake: &Wake) -> io::Result<Flushes> {
        Ok(Flushes {
            rings: Arc::clone(engine.rings()),
            collectors: engine.open_send_rings(receive, wake)?,
            waiting: Vec::new(),
            listens: false,
        })
    }

    /// Sends all of `bytes`, as soon as there is room.
    pub(super) fn send(
        &mut self,
        token: Token,
        socket: &Arc<Socket>,
        bytes: Chain,
        counters: &Counters,
    ) {
        counters.sends_in_flight.add_owned(1);
        self.push(Flushed::new(token, socket, bytes));
    }

    fn push(&mut self, flushed: Box<Flushed>) {
        if let Err(flushed) = self.rings.push(flushed) {
            self.waiting.push(flushed);
        }
    }

    /// Pushes what found no room; for connections that are gone there is no need to.
    pub(super) fn retry(&mut self, entries: &[Option<Entry>], counters: &Counters) {
        for flushed in std::mem::take(&mut self.waiting) {
            if is_wanted(entries, flushed.token) {
                self.push(flushed);
            } else {
                counters.sends_in_flight.add_owned(1u64.wrapping_neg());
            }
        }
    }

    pub(super) fn has_completions(&self) -> bool {
        self.collectors.iter().any(|ring| ring.has_completions() || ring.has_overflowed())
    }

    /// Fetches completions that found no room; see [`Ring::has_overflowed`].
    fn fetch_overflow(&self, index: usize, counters: &Counters) -> io::Result<()> {
        let collector = &self.collectors[index];
        if collector.has_overflowed() {
            counters.completion_overflows.add_owned(1);
            collector.enter(Wait::Completion(Until::Now), counters)?;
        }
        Ok(())
    }

    /// Before the poller sleeps: completions are to wake it. Says how long it may sleep.
    pub(super) fn prepare_sleep(
        &mut self,
        until: Until,
        receive: &Ring,
        counters: &Counters,
    ) -> io::Result<Until> {
        if let Some(flushed) = self.waiting.first() {
            // The kernel thread takes some soon.
            let index = self.rings.index(flushed.token);
            if let Some(collector) = self.collectors.get(index).or(receive.collector()) {
                collector.enter(Wait::Room, counters)?;
            }
            return Ok(Until::Now);
        }
        self.listens = true;
        for collector in &self.collectors {
            collector.ring_bell(true);
        }
        // The kernel posts a completion and then looks whether to ring; we look after we have said
        // so.
        fence(Ordering::SeqCst);
        Ok(if self.has_completions() { Until::Now } else { until })
    }

    pub(super) fn end_sleep(&mut self) {
        if std::mem::take(&mut self.listens) {
            for collector in &self.collectors {
                collector.ring_bell(false);
            }
        }
    }

    /// Ends what is in flight in the send rings, and waits until the kernel is through with it.
    pub(super) fn close(&mut self, counters: &Counters) {
        for lane in self.rings.lanes() {
            lane.close();
        }
        self.waiting.clear();
        let mut completions = Vec::new();
        for (collector, lane) in self.collectors.iter_mut().zip(self.rings.lanes()) {
            collector.cancel_all(lane);
            collector.drain(&mut completions, counters);
            for done in completions.drain(..).filter(Done::ends_flush) {
                // SAFETY: as in `on_flushed`.
                drop(unsafe { reclaim(done.user_data) });
                counters.sends_in_flight.add_owned(1u64.wrapping_neg());
            }
        }
        lock(self.rings.threads()).end();
    }
}

impl Uring {
    /// Takes a round's completions from the send rings.
    pub(super) fn collect_sends(
        &mut self,
        completions: &mut Vec<Done>,
        sink: &mut impl Sink,
    ) -> io::Result<()> {
        let count = self.flushes.as_ref().map_or(0, |flushes| flushes.collectors.len());
        for index in 0..count {
            let Some(flushes) = &mut self.flushes else { break };
            let fetched = flushes.fetch_overflow(index, &self.counters);
            let collector = &mut flushes.collectors[index];
            if !collector.has_completions() {
                self.survive(fetched, sink)?;
                continue;
            }
            collector.collect(completions, COMPLETIONS_PER_ROUND);
            collector.count_reaped(completions);
            self.counters.ring_completions.add_owned(completions.len() as u64);
            for done in completions.drain(..) {
                self.handle(done, sink);
            }
            self.survive(fetched, sink)?;
        }
        Ok(())
    }

    /// A send completed that any thread may have started.
    pub(super) fn on_flushed(&mut self, done: Done, is_last: bool, sink: &mut impl Sink) {
        // SAFETY: the completion is of a flush, and is handled once.
        let mut flushed = unsafe { reclaim(done.user_data) };
        let progress = flushed.complete(done, &self.counters);
        if !is_last {
            // The kernel still has the memory, and its next completion brings the record again.
            let _ = Box::into_raw(flushed);
            return;
        }
        let token = flushed.token;
        let is_wanted = is_wanted(&self.entries, token);
        match (progress, &mut self.flushes) {
            (Progress::Unfinished, Some(flushes)) if is_wanted => return flushes.push(flushed),
            (Progress::Done(result), _) if is_wanted => {
                sink.complete(token, Completion::Sent(result));
            }
            _ => {}
        }
        self.counters.sends_in_flight.add_owned(1u64.wrapping_neg());
    }
}

/// Somebody is to hear what becomes of the token's send.
fn is_wanted(entries: &[Option<Entry>], token: Token) -> bool {
    let entry = entries.get(token.index()).and_then(Option::as_ref);
    entry.is_some_and(|entry| entry.token == token && !entry.removing)
}
