//! What a poller is but for its backend: its slots, timers, and what a round has collected.
//!
//! Apart from the backend, so that the backend can report into it. On the poller's thread.

use std::collections::HashMap;
use std::time::Duration;

use super::memory::Budget;
use super::ready::Job;
use super::slots::Slots;
use super::timers::{self, Timers, Whom};
use super::{Accept, Batch, Endpoint, Remote};
use crate::clock::now_ns;
use crate::config;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::sys::{Backend, Completion, Flow, Received, Sink, Token};
use crate::task::{self, Run};
use crate::user_code;

/// See the module's documentation.
pub(super) struct Core<E: Endpoint> {
    pub(super) remote: Arc<Remote<E>>,
    pub(super) slots: Slots<Slot<E>>,
    /// Kept runs of endpoints that have lost their slot.
    pub(super) leaving: HashMap<Token, Run>,
    pub(super) timers: Timers,
    pub(super) batch: Batch<E>,
    /// Backlog of connections whose send just ended.
    pub(super) resend: Vec<Token>,
    pub(super) completions: usize,
    /// The clock when the pass that is under way began.
    pub(super) pass_began_ns: Option<u64>,
    /// The clock when the last complete pass over the kernel's events began.
    pub(super) looked_ns: u64,
    pub(super) budget: Budget,
}

pub(super) enum Slot<E> {
    Endpoint(Held<E>),
    Listener(Arc<dyn Accept>),
}

/// An endpoint, and its run that waits for a flush.
pub(super) struct Held<E> {
    pub(super) endpoint: Arc<E>,
    pub(super) kept: Option<Run>,
}

impl<E: Endpoint> Core<E> {
    /// Runs what was collected: first the wake-ups of other threads' tasks, so that these run
    /// beside our handlers; then runs that are kept here, and the jobs, which others can steal.
    pub(super) fn run_batch(&mut self) {
        // Before anything that may hold the poller up.
        let has_more = !self.batch.jobs.is_empty() && self.remote.ready.is_watched();
        if has_more {
            self.remote.ready.put_behind(self.batch.jobs.drain(..));
        }
        if !self.batch.wakers.is_empty() {
            user_code::wake_all(self.batch.wakers.drain(..));
        }
        if !self.batch.go_ons.is_empty() {
            let mut go_ons = std::mem::take(&mut self.batch.go_ons);
            for endpoint in go_ons.drain(..) {
                self.go_on(&endpoint);
            }
            self.batch.go_ons = go_ons;
        }
        let is_open = std::mem::take(&mut self.batch.is_open);
        if is_open || has_more {
            self.run_open(has_more);
        }
        let mut jobs = std::mem::take(&mut self.batch.jobs);
        for job in jobs.drain(..) {
            self.run(job);
        }
        self.batch.jobs = jobs;
        let is_watched = self.remote.ready.is_watched();
        self.batch.open_left = if is_watched { config::OPEN_JOBS_MAX } else { 0 };
    }

    /// Runs what others can steal, with what is behind it, if anything is.
    #[inline(never)]
    fn run_open(&mut self, has_more: bool) {
        loop {
            while let Some(job) = self.batch.open.pop() {
                self.run(job);
            }
            if !has_more || !self.remote.ready.take_up(&self.batch.open) {
                return;
            }
        }
    }

    // Part of its loop, as `Epoll::handle` is, and for the same reason.
    #[inline(always)]
    pub(super) fn run(&mut self, job: Job<E>) {
        self.remote.ready.turn();
        match job {
            Job::Begin(endpoint, handed) => {
                if let Some(run) = endpoint.begin(handed) {
                    self.keep(endpoint.token(), run);
                }
            }
            Job::Act(endpoint, action) => endpoint.act(action),
            Job::Poll(runnable, _) => task::run(runnable),
        }
    }

    /// Goes on with the run that is kept for the endpoint.
    fn go_on(&mut self, endpoint: &Arc<E>) {
        self.remote.ready.turn();
        let token = endpoint.token();
        if let Some(run) = self.kept(token)
            && let Some(run) = endpoint.go_on(run)
        {
            self.keep(token, run);
        }
    }

    /// Keeps a run until its flush is through.
    #[inline(never)]
    fn keep(&mut self, token: Token, run: Run) {
        match self.slots.get_mut(token) {
            Some(Slot::Endpoint(held)) => held.kept = Some(run),
            _ => {
                self.leaving.insert(token, run);
            }
        }
    }

    /// The run that waits for its flush.
    fn kept(&mut self, token: Token) -> Option<Run> {
        match self.slots.get_mut(token) {
            Some(Slot::Endpoint(held)) => held.kept.take(),
            _ => self.leaving.remove(&token),
        }
    }

    pub(super) fn fire_timers<B: Backend>(&mut self, backend: &mut B) {
        if self.timers.count() == 0 {
            return;
        }
        // A timer that became due after the pass began must wait for the next pass: unreceived
        // input may satisfy the wait that this timer would end.
        while let Some(entry) = self.timers.pop_due(self.looked_ns) {
            let token = match entry.whom {
                Whom::Bell(bell) => {
                    self.batch.wakers.extend(bell.ring());
                    continue;
                }
                Whom::Slot(token) => token,
            };
            match self.slots.get(token) {
                Some(Slot::Endpoint(held)) => {
                    if let Some(at_ns) = held.endpoint.on_timer(entry.at_ns, &mut self.batch) {
                        self.timers.arm(at_ns, Whom::Slot(token));
                    }
                }
                Some(Slot::Listener(_)) => backend.resume(token),
                None => {}
            }
        }
        self.count_timers();
    }

    /// Drops the timers of connections and futures that are gone, so that a long timeout on short
    /// ones does not pile them up.
    pub(super) fn sweep_timers(&mut self) {
        if !self.timers.is_sweep_due() {
            return;
        }
        let slots = &self.slots;
        self.timers.sweep(|token, at_ns| match slots.get(token) {
            Some(Slot::Endpoint(held)) => held.endpoint.is_armed(at_ns),
            Some(Slot::Listener(_)) => true,
            None => false,
        });
    }

    /// How long a wait may take at most.
    pub(super) fn due_in(&self) -> Option<Duration> {
        match self.timers.count() {
            0 => None,
            _ => self.timers.next_in(now_ns()).map(|due| due.min(config::WAIT_MAX)),
        }
    }

    /// Sets the round's clock, if anybody will look at it.
    pub(super) fn read_clock(&mut self) {
        if self.timers.count() > 0 {
            self.batch.now_ns = now_ns();
        }
    }

    pub(super) fn count_timers(&self) {
        self.remote.timers.store(self.timers.count(), Ordering::Relaxed);
    }

    /// Decides what each connection may hold, and lets go of memory that nobody will use soon.
    pub(super) fn tidy_memory(&mut self) {
        let pool = &self.remote.pool;
        let slots = &self.slots;
        self.batch.share_bytes =
            self.budget.share_bytes(pool.memory_bytes(), slots.count(), || {
                let unread = |slot: &Slot<E>| match slot {
                    Slot::Endpoint(held) => held.endpoint.unread_bytes(),
                    Slot::Listener(_) => 0,
                };
                slots.iter().map(|(_, slot)| unread(slot)).sum()
            });
        if self.slots.count() == 0 {
            pool.trim();
        }
    }

    pub(super) fn removed(&mut self, token: Token) {
        match self.slots.remove(token) {
            Some(Slot::Endpoint(held)) => {
                held.endpoint.on_removed();
                if let Some(run) = held.kept {
                    self.leaving.insert(token, run);
                }
            }
            Some(Slot::Listener(listener)) => {
                self.remote.listeners.fetch_sub(1, Ordering::Relaxed);
                listener.on_removed();
            }
            None => {}
        }
    }
}

impl<E: Endpoint> Sink for Core<E> {
    #[inline(always)]
    fn complete(&mut self, token: Token, completion: Completion<'_>) -> Flow {
        self.completions += 1;
        match completion {
            Completion::Received(bytes) => self.received(token, bytes),
            completion => {
                self.follow(token, completion);
                Flow::Continue
            }
        }
    }
}

impl<E: Endpoint> Core<E> {
    #[inline(always)]
    fn received(&mut self, token: Token, bytes: Received<'_>) -> Flow {
        match self.slots.get(token) {
            Some(Slot::Endpoint(held)) => held.endpoint.on_received(bytes, &mut self.batch),
            _ => Flow::Continue,
        }
    }

    /// Passes on everything but bytes.
    #[inline(never)]
    fn follow(&mut self, token: Token, completion: Completion<'_>) {
        if matches!(completion, Completion::Removed) {
            return self.removed(token);
        }
        let batch = &mut self.batch;
        match (self.slots.get(token), completion) {
            (Some(Slot::Endpoint(Held { endpoint, .. })), completion) => match completion {
                Completion::Connected(result) => endpoint.on_connected(result, batch),
                Completion::HungUp => endpoint.on_hung_up(batch),
                Completion::Ended(result) => endpoint.on_ended(result, batch),
                Completion::Sent(result) => {
                    if endpoint.on_sent(result, batch) {
                        self.resend.push(token);
                    }
                }
                Completion::Received(_)
                | Completion::Accepted(..)
                | Completion::AcceptFailed(_)
                | Completion::Removed => {}
            },
            (Some(Slot::Listener(listener)), Completion::Accepted(socket, peer)) => {
                listener.on_accepted(socket, peer);
            }
            (Some(Slot::Listener(listener)), Completion::AcceptFailed(error))
                if listener.on_failed(&error) =>
            {
                let at_ns = timers::ns_after(config::ACCEPT_RETRY);
                self.timers.arm(at_ns, Whom::Slot(token));
            }
            _ => {}
        }
    }
}
