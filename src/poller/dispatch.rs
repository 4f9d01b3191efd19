//! Passes completions and timers to endpoints, and runs what the endpoints ask for.
//!
//! A dispatcher is a poller without its backend. The backend calls the dispatcher as its [`Sink`].
//! Everything here runs on the poller's thread.

use std::collections::{HashMap, VecDeque};
use std::task::Waker;
use std::time::Duration;

use super::endpoint::Attached;
use super::job::Job;
use super::memory::Budget;
use super::slots::Slots;
use super::timers::{self, Timers, Whom};
use super::{Accept, Endpoint, Reaction, Receipt, Remote, Visit};
use crate::clock::now_ns;
use crate::config;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::sys::{Backend, Completion, Flow, Sink, Token};
use crate::task::{self, Polled, Run};
use crate::user_code;

pub(super) struct Dispatcher<E: Endpoint> {
    pub(super) remote: Arc<Remote<E>>,
    pub(super) slots: Slots<Slot<E>>,
    /// Kept runs of endpoints that have no slot any more.
    pub(super) leaving: HashMap<Token, Held<E>>,
    pub(super) timers: Timers,
    pub(super) round: Round<E>,
    pub(super) budget: Budget,
    /// Set while the poller is short of memory: how many unread bytes each endpoint may hold.
    share_bytes: Option<usize>,
    /// When `tidy_memory` frees memory next. `None`: there is nothing to free.
    decay_at_ns: Option<u64>,
    /// The time after the last wait that ended while a timer was set.
    pub(super) now_ns: u64,
    /// When the last complete pass over the kernel's events began.
    pub(super) looked_ns: u64,
}

/// Work that a round has collected. It runs in the order of the fields.
pub(super) struct Round<E: Endpoint> {
    pub(super) wakers: Vec<Waker>,
    /// Owners of slots that are free now. They are told in the round and not while completions are
    /// filed: close callbacks and wakers are user code, and may block.
    pub(super) removed: VecDeque<Owner<E>>,
    /// Endpoints whose kept runs continue.
    pub(super) continues: Vec<Token>,
    pub(super) jobs: Vec<Job<E>>,
    pub(super) completions: usize,
}

pub(super) enum Slot<E> {
    Endpoint(Held<E>),
    Listener(Arc<dyn Accept>),
}

/// The owner of a slot.
pub(super) enum Owner<E> {
    Endpoint(Arc<E>),
    Listener(Arc<dyn Accept>),
}

impl<E: Endpoint> Owner<E> {
    /// Tells the owner that its slot is free.
    pub(super) fn tell_removed(self) {
        match self {
            Owner::Endpoint(endpoint) => endpoint.on_removed(),
            Owner::Listener(listener) => listener.on_removed(),
        }
    }
}

/// An endpoint, and its run if that waits for a flush.
pub(super) struct Held<E> {
    pub(super) endpoint: Arc<E>,
    pub(super) kept: Option<Run>,
}

impl<E: Endpoint> Dispatcher<E> {
    pub(super) fn new(remote: Arc<Remote<E>>, budget: Budget) -> Dispatcher<E> {
        Dispatcher {
            remote,
            slots: Slots::new(),
            leaving: HashMap::new(),
            timers: Timers::new(),
            round: Round {
                wakers: Vec::new(),
                removed: VecDeque::new(),
                continues: Vec::new(),
                jobs: Vec::new(),
                completions: 0,
            },
            budget,
            share_bytes: None,
            decay_at_ns: None,
            now_ns: now_ns(),
            looked_ns: 0,
        }
    }

    /// Runs everything that the round has collected. Wake-ups come first, so that other threads
    /// work at the same time as this thread's handlers.
    pub(super) fn run_round(&mut self) {
        let is_watched = self.remote.relief.is_watched();
        if is_watched {
            // Offer the jobs before any user code runs, because user code may hold up the poller.
            self.remote.relief.offer(self.round.jobs.drain(..));
        }
        user_code::wake_all(self.round.wakers.drain(..));
        while let Some(owner) = self.round.removed.pop_front() {
            owner.tell_removed();
        }
        let mut continues = std::mem::take(&mut self.round.continues);
        for token in continues.drain(..) {
            self.continue_run(token);
        }
        self.round.continues = continues;
        if is_watched {
            while let Some(job) = self.remote.relief.next() {
                self.run(job);
            }
        }
        let mut jobs = std::mem::take(&mut self.round.jobs);
        for job in jobs.drain(..) {
            self.run(job);
        }
        self.round.jobs = jobs;
    }

    #[inline(always)]
    fn run(&mut self, job: Job<E>) {
        self.remote.relief.count_progress();
        match job {
            Job::Begin(endpoint, started) => {
                let polled = endpoint.begin(started);
                self.follow_run(&endpoint, polled);
            }
            Job::Act(endpoint, action) => endpoint.act(action),
            Job::Poll(runnable, _) => task::run(runnable),
        }
    }

    /// Continues the run that is kept for the endpoint.
    fn continue_run(&mut self, token: Token) {
        let held = match self.slots.get_mut(token) {
            Some(Slot::Endpoint(held)) => Some(held),
            _ => self.leaving.get_mut(&token),
        };
        let Some(held) = held else { return };
        let Some(run) = held.kept.take() else { return };
        let endpoint = Arc::clone(&held.endpoint);
        self.remote.relief.count_progress();
        let polled = task::poll_run(|cx| task::poll_again(run, cx));
        self.follow_run(&endpoint, polled);
        // `follow_run` has put a run that waits again into `kept`.
        if self.leaving.get(&token).is_some_and(|held| held.kept.is_none()) {
            self.leaving.remove(&token);
        }
    }

    #[inline]
    fn follow_run(&mut self, endpoint: &Arc<E>, polled: Polled) {
        match polled {
            Polled::Done => {}
            Polled::WaitsForFlush(run) => self.keep(endpoint, run),
            Polled::Waits(run) => endpoint.make_task(run),
        }
    }

    /// Keeps a run until its flush is done.
    fn keep(&mut self, endpoint: &Arc<E>, run: Run) {
        let token = endpoint.token();
        match self.slots.get_mut(token) {
            Some(Slot::Endpoint(held)) => held.kept = Some(run),
            _ => {
                let held = Held { endpoint: Arc::clone(endpoint), kept: Some(run) };
                self.leaving.insert(token, held);
            }
        }
    }

    /// Collects the work of a reaction.
    #[inline]
    fn follow(&mut self, token: Token, reaction: Reaction<E::Started>) -> Flow {
        let round = &mut self.round;
        round.wakers.extend(reaction.flusher);
        round.wakers.extend(reaction.reader);
        if reaction.continues {
            round.continues.push(token);
        }
        let Some(Slot::Endpoint(Held { endpoint, .. })) = self.slots.get(token) else {
            return reaction.flow;
        };
        for action in reaction.actions.into_iter().flatten() {
            round.jobs.push(Job::Act(Arc::clone(endpoint), action));
        }
        if let Some(started) = reaction.start {
            round.jobs.push(Job::Begin(Arc::clone(endpoint), started));
        }
        if let Some(bytes) = reaction.output {
            // This poller has not ended, so it takes the bytes.
            let _ = self.remote.leave(endpoint, *bytes);
        }
        if let Some(at_ns) = reaction.timer_ns {
            self.timers.arm(at_ns, Whom::Slot(token));
        }
        reaction.flow
    }

    pub(super) fn visit(&self, mut visit: Visit<E>) {
        for (_, slot) in self.slots.iter() {
            if let Slot::Endpoint(held) = slot {
                visit(&held.endpoint);
            }
        }
    }

    /// Gives the endpoint a slot. `None`: the endpoint refuses.
    pub(super) fn attach(&mut self, endpoint: &Arc<E>) -> Option<(Token, usize)> {
        let held = Held { endpoint: Arc::clone(endpoint), kept: None };
        let token = self.slots.insert(Slot::Endpoint(held));
        let Some(Attached { at_once_bytes, output, start }) = endpoint.on_attached(token) else {
            self.refuse(token);
            return None;
        };
        self.follow(token, Reaction { start, output, ..Reaction::default() });
        Some((token, at_once_bytes))
    }

    pub(super) fn refuse(&mut self, token: Token) {
        if let Some(Slot::Endpoint(held)) = self.slots.get(token) {
            held.endpoint.act(super::Action::Close);
            self.removed(token);
        }
    }

    pub(super) fn removed(&mut self, token: Token) {
        match self.slots.remove(token) {
            Some(Slot::Endpoint(held)) => {
                self.round.removed.push_back(Owner::Endpoint(Arc::clone(&held.endpoint)));
                if held.kept.is_some() {
                    self.leaving.insert(token, held);
                }
            }
            Some(Slot::Listener(listener)) => {
                self.remote.listeners.fetch_sub(1, Ordering::Relaxed);
                self.round.removed.push_back(Owner::Listener(listener));
            }
            None => {}
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
                    self.round.wakers.extend(bell.ring());
                    continue;
                }
                Whom::Slot(token) => token,
            };
            match self.slots.get(token) {
                Some(Slot::Endpoint(held)) => {
                    let reaction = held.endpoint.on_timer(entry.at_ns, self.now_ns);
                    self.follow(token, reaction);
                }
                Some(Slot::Listener(_)) => backend.resume(token),
                None => {}
            }
        }
        self.publish_timer_count();
    }

    /// Sets a timer. If there are many timers, first drops those of connections and futures that
    /// are gone. Otherwise long timeouts of short connections would fill the memory.
    pub(super) fn arm(&mut self, at_ns: u64, whom: Whom) {
        self.timers.arm(at_ns, whom);
        if self.timers.is_sweep_due() {
            let slots = &self.slots;
            self.timers.sweep(|token, at_ns| match slots.get(token) {
                Some(Slot::Endpoint(held)) => held.endpoint.is_armed(at_ns),
                Some(Slot::Listener(_)) => true,
                None => false,
            });
        }
        self.publish_timer_count();
    }

    /// The longest time that the next wait may take.
    pub(super) fn due_in(&self) -> Option<Duration> {
        let timer_in = match self.timers.count() {
            0 => None,
            _ => self.timers.next_in(now_ns()).map(|due| due.min(config::WAIT_MAX)),
        };
        let decay_in = self.decay_at_ns.map(|_| Duration::from_nanos(config::DECAY_INTERVAL_NS));
        timer_in.into_iter().chain(decay_in).min()
    }

    /// Reads the clock for this round if a timer is set.
    pub(super) fn read_clock(&mut self) {
        if self.timers.count() > 0 {
            self.now_ns = now_ns();
        }
    }

    fn publish_timer_count(&self) {
        self.remote.timers.store(self.timers.count(), Ordering::Relaxed);
    }

    /// Decides how many unread bytes each connection may hold. Frees blocks that will not be used
    /// soon. While there are large blocks, or the backend has grown, the poller comes here at least
    /// in every decay interval.
    pub(super) fn tidy_memory<B: Backend>(&mut self, backend: &mut B) {
        let pool = &self.remote.pool;
        let slots = &self.slots;
        self.share_bytes = self.budget.share_bytes(pool.memory_bytes(), slots.count(), || {
            let unread = |slot: &Slot<E>| match slot {
                Slot::Endpoint(held) => held.endpoint.unread_bytes(),
                Slot::Listener(_) => 0,
            };
            slots.iter().map(|(_, slot)| unread(slot)).sum()
        });
        self.decay_at_ns = (pool.has_large_blocks() || backend.has_grown()).then(|| {
            let (now_ns, due_ns) = (now_ns(), self.decay_at_ns.unwrap_or(0));
            if now_ns < due_ns {
                return due_ns;
            }
            backend.shrink();
            pool.decay();
            now_ns.saturating_add(config::DECAY_INTERVAL_NS)
        });
        // After the backend has given buffers back.
        if self.slots.count() == self.remote.listeners.load(Ordering::Relaxed) {
            pool.trim();
        }
    }
}

impl<E: Endpoint> Sink for Dispatcher<E> {
    #[inline]
    fn complete(&mut self, token: Token, completion: Completion<'_>) -> Flow {
        self.round.completions += 1;
        match (self.slots.get(token), completion) {
            (Some(Slot::Endpoint(held)), Completion::Received(bytes)) => {
                return match held.endpoint.on_received(bytes, self.share_bytes) {
                    Receipt::Starts(started, flow) => {
                        self.round.jobs.push(Job::Begin(Arc::clone(&held.endpoint), started));
                        flow
                    }
                    Receipt::Filed(reaction) => self.follow(token, reaction),
                };
            }
            (_, Completion::Removed) => self.removed(token),
            (Some(Slot::Endpoint(held)), completion) => {
                let reaction = held.endpoint.on_completion(completion);
                return self.follow(token, reaction);
            }
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
        Flow::Continue
    }
}
