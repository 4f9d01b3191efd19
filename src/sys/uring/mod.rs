//! Completions from `io_uring(7)`: one ring for each poller.
//!
//! Owned by one poller thread, which is also the ring's only issuer. Accepts and receives are
//! multishot: armed once, they complete again and again, into buffers that the kernel takes from a
//! buffer ring. Sends are single operations, one in flight for each connection. Everything is
//! submitted together with the next wait, in one system call.
//!
//! With an engine ([`Engine`]) kernel threads poll the ring, or others beside it that sends go
//! through, and flushers push those from any thread: then there is nothing to submit, and no system
//! call but to sleep.
//!
//! The life of a token is in `entry.rs`; what the kernel is sending, in `in_flight.rs`, and, where
//! any thread may have started it, in `send_rings.rs`; receive buffers, in `buffers.rs` and
//! `buffer_ring.rs`; the ring itself, in `ring.rs` and `polled.rs`.

mod buffer_ring;
mod buffers;
mod engine;
mod entry;
mod flushes;
mod in_flight;
mod kernel_threads;
mod mapping;
mod polled;
pub(crate) mod probe;
mod raw;
mod ring;
mod send_rings;
mod tag;
mod tail;
mod teardown;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::cqueue;
use io_uring::types::Fd;
use rustix::io::Errno;

use super::{Backend, Completion, Sink, Socket, Token, Wake};
use crate::address::PeerAddr;
use crate::buffer::{Chain, Pool};
use crate::config::UringOptions;
use crate::config::uring::{COMPLETIONS_PER_ROUND, SPARE_SENDINGS_MAX};
use crate::counters::Counters;

use buffers::{Buffers, Size};
use entry::{Entry, Reception, Role};
use flushes::Flushes;
use in_flight::{Progress, Sending, zero_copy_bytes_min};
use raw::Until;
use ring::{Done, Receive, Ring};
use tag::{Op, token_of, user_data};

pub(crate) use engine::{Engine, RingOptions};
pub(crate) use send_rings::SendRings;

pub(crate) struct Uring {
    ring: Ring,
    entries: Vec<Option<Entry>>,
    buffers: Buffers,
    /// What others have started; none without an engine.
    flushes: Option<Flushes>,
    options: UringOptions,
    engine: Option<Engine>,
    wake: Arc<Wake>,
    counters: Arc<Counters>,
    /// Done without waiting; reported by the next `wait`.
    done: Vec<(Token, Completion<'static>)>,
    /// Their peers have ended, and there may be bytes left.
    draining: Vec<Token>,
    /// Empty between waits, but for its memory.
    completions: Vec<Done>,
    /// For the next sends. Boxed, as they must not move while the kernel knows their address.
    #[allow(clippy::vec_box)]
    spare_sendings: Vec<Box<Sending>>,
    /// Operations in flight, cancellations not counted.
    outstanding: usize,
    /// Completions of the pass that is under way, and not collected yet.
    pass_left: usize,
}

impl Backend for Uring {
    type Options = RingOptions;

    fn new(
        wake: &Arc<Wake>,
        pool: &Pool,
        counters: &Arc<Counters>,
        options: &RingOptions,
    ) -> io::Result<Uring> {
        let mut uring = Uring::over(wake, pool, counters, options)?;
        if let Some(engine) = &options.engine {
            uring.flushes = Some(Flushes::open(engine, &uring.ring, wake)?);
        }
        Ok(uring)
    }

    fn listen(&mut self, token: Token, listener: Arc<Socket>) -> io::Result<()> {
        self.insert(token, listener, Role::Listener, 0);
        self.follow(token);
        Ok(())
    }

    fn attach(&mut self, token: Token, socket: Arc<Socket>, at_once: usize) -> io::Result<()> {
        self.insert(token, socket, Role::Stream, at_once);
        self.follow(token);
        Ok(())
    }

    // A plain connect(2), which never blocks on these sockets: as an operation of the ring it would
    // occupy a kernel worker while a unix socket's backlog is full.
    fn connect(&mut self, token: Token, socket: Arc<Socket>, peer: &PeerAddr, at_once: usize) {
        self.counters.setup_calls.add_owned(1);
        match socket.connect(peer) {
            Ok(()) => {
                self.insert(token, socket, Role::Stream, at_once);
                self.follow(token);
                self.done.push((token, Completion::Connected(Ok(()))));
            }
            Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => {
                self.insert(token, socket, Role::Connecting, at_once);
                self.watch(token, libc::POLLOUT);
            }
            failed => self.done.push((token, Completion::Connected(failed))),
        }
    }

    fn resume(&mut self, token: Token) {
        if let Some(entry) = find(&mut self.entries, token) {
            entry.paused = false;
            self.follow(token);
        }
    }

    fn send(&mut self, token: Token, gather: Chain) {
        let Some(entry) = find(&mut self.entries, token) else { return };
        if entry.removing {
            return;
        }
        if let Some(flushes) = &mut self.flushes {
            return flushes.send(token, &entry.socket, gather, &self.counters);
        }
        assert!(entry.sending.is_none(), "one send in flight for each token");
        let mut sending = self.spare_sendings.pop().unwrap_or_else(|| Box::new(Sending::new()));
        sending.begin(gather);
        entry.sending = Some(sending);
        self.counters.sends_in_flight.add_owned(1);
        self.submit_send(token);
    }

    fn remove(&mut self, token: Token) {
        let Some(entry) = find(&mut self.entries, token) else {
            self.done.push((token, Completion::Removed));
            return;
        };
        if std::mem::replace(&mut entry.removing, true) {
            return;
        }
        if matches!(entry.reception, Reception::Starved | Reception::Draining) {
            entry.reception = Reception::Off;
        }
        let in_flight = [(Op::Watch, entry.watching), (Op::Send, entry.sending.is_some())];
        for (op, _) in in_flight.into_iter().filter(|(_, is_in_flight)| *is_in_flight) {
            self.ring.cancel(user_data(op, token), user_data(Op::Cancel, token));
        }
        self.follow(token);
        if self.forget_if_gone(token) {
            self.done.push((token, Completion::Removed));
        }
    }

    fn wait(&mut self, timeout: Option<Duration>, sink: &mut impl Sink) -> io::Result<bool> {
        let has_sends = self.flushes.as_mut().is_some_and(|flushes| {
            flushes.retry(&self.entries, &self.counters);
            flushes.has_completions()
        });
        let is_ready = has_sends
            || !self.done.is_empty()
            || !self.draining.is_empty()
            || self.ring.has_completions();
        for (token, completion) in std::mem::take(&mut self.done) {
            sink.complete(token, completion);
        }
        let until = match timeout {
            _ if is_ready => Until::Now,
            Some(Duration::ZERO) => Until::Now,
            Some(timeout) => Until::Timeout(timeout),
            None => Until::Completion,
        };
        self.enter(until, sink)?;
        if self.pass_left == 0 {
            self.pass_left = self.ring.completion_count();
        }
        self.pass_left = self.pass_left.saturating_sub(COMPLETIONS_PER_ROUND);
        self.collect(sink)?;
        Ok(self.pass_left == 0)
    }
}

impl Uring {
    /// All but the rings that are for sends alone.
    fn over(
        wake: &Arc<Wake>,
        pool: &Pool,
        counters: &Arc<Counters>,
        RingOptions { uring: options, engine }: &RingOptions,
    ) -> io::Result<Uring> {
        let mut ring = match engine {
            Some(engine) => engine.receive_ring(options, counters)?,
            None => Ring::new(options)?,
        };
        ring.enable()?;
        if let Some(time) = options.napi_busy_poll {
            ring.poll_cards(time)?;
        }
        let buffers = Buffers::new(&ring, options, pool)?;
        let mut uring = Uring {
            ring,
            entries: Vec::new(),
            buffers,
            flushes: None,
            options: options.clone(),
            engine: engine.clone(),
            wake: Arc::clone(wake),
            counters: Arc::clone(counters),
            done: Vec::new(),
            draining: Vec::new(),
            completions: Vec::new(),
            spare_sendings: Vec::new(),
            outstanding: 0,
            pass_left: 0,
        };
        uring.watch_wake();
        Ok(uring)
    }

    /// Goes to the kernel, if there is a reason to.
    fn enter(&mut self, until: Until, sink: &mut impl Sink) -> io::Result<()> {
        let mut until = until;
        if let Some(flushes) = self.flushes.as_mut().filter(|_| until != Until::Now) {
            until = flushes.prepare_sleep(until, &self.ring, &self.counters)?;
        }
        // With nothing to submit and nothing that the kernel holds back, a look at the queue will
        // do.
        let mut entered = Ok(());
        if until != Until::Now || self.ring.has_submissions() || self.ring.wants_enter() {
            entered = self.ring.enter(until, &self.counters);
        }
        if let Some(flushes) = &mut self.flushes {
            flushes.end_sleep();
        }
        self.survive(entered, sink)
    }

    /// Goes on after completions were lost.
    fn survive(&mut self, entered: io::Result<()>, sink: &mut impl Sink) -> io::Result<()> {
        match entered {
            Err(error) if error.raw_os_error() == Some(libc::EBADR) => self.rebuild(sink),
            done => done,
        }
    }

    fn insert(&mut self, token: Token, socket: Arc<Socket>, role: Role, budget_bytes: usize) {
        let index = token.index();
        if index >= self.entries.len() {
            self.entries.resize_with(index + 1, || None);
        }
        assert!(self.entries[index].is_none(), "slot {index} is in use");
        let size = self.buffers.first_size();
        self.entries[index] = Some(Entry::new(token, socket, role, size, budget_bytes));
    }

    /// Brings what is under way in line with what the entry wants.
    fn follow(&mut self, token: Token) {
        let Some(entry) = find(&mut self.entries, token) else { return };
        let must_watch = entry.is_to_watch();
        if entry.is_to_drain() {
            entry.reception = Reception::Draining;
            self.draining.push(token);
        } else if entry.is_to_arm() {
            self.arm(token);
        } else if entry.is_to_end() {
            entry.reception = Reception::Ending;
            let target = user_data(entry.reception_op(), token);
            self.ring.cancel(target, user_data(Op::Cancel, token));
        }
        if must_watch {
            self.watch(token, libc::POLLRDHUP);
        }
    }

    /// Receives what is left of those whose peers have ended.
    fn drain(&mut self, sink: &mut impl Sink) {
        for token in std::mem::take(&mut self.draining) {
            if let Some(entry) = find(&mut self.entries, token)
                && entry.reception == Reception::Draining
            {
                entry.reception = Reception::Off;
                entry.drain(self.buffers.pool(), &self.counters, sink);
                self.follow(token);
            }
        }
    }

    fn arm(&mut self, token: Token) {
        let Some(entry) = find(&mut self.entries, token) else { return };
        let user_data = user_data(entry.reception_op(), token);
        if entry.role == Role::Listener {
            self.ring.accept(entry.fd(), user_data);
        } else {
            entry.wanted_size = self.buffers.provide(entry.wanted_size, &self.ring);
            entry.armed_size = entry.wanted_size;
            let group = self.buffers.group(entry.armed_size);
            // Otherwise one socket may fill every buffer, far above any watermark, before we hear
            // of the first.
            let budget_bytes = if self.options.has_budget { entry.budget_bytes } else { 0 };
            let receive = Receive { group, bundle: self.options.receive_bundles, budget_bytes };
            self.ring.receive(entry.fd(), receive, user_data);
        }
        entry.reception = Reception::Armed;
        self.outstanding += 1;
    }

    /// Polls the socket once.
    fn watch(&mut self, token: Token, events: i16) {
        let Some(entry) = find(&mut self.entries, token) else { return };
        entry.watching = true;
        self.outstanding += 1;
        self.ring.poll(entry.fd(), events, false, user_data(Op::Watch, token));
    }

    /// Lets other threads interrupt a wait. The eventfd is never read: each write is an event.
    fn watch_wake(&mut self) {
        self.outstanding += 1;
        self.ring.poll(
            Fd(self.wake.as_fd().as_raw_fd()),
            libc::POLLIN,
            true,
            user_data(Op::Wake, Token::NONE),
        );
    }

    fn submit_send(&mut self, token: Token) {
        let Some(entry) = find(&mut self.entries, token) else { return };
        let fd = entry.fd();
        let Some(sending) = &mut entry.sending else { return };
        self.outstanding += 1;
        let bytes_min = zero_copy_bytes_min(self.options.zero_copy_bytes_min, &entry.socket);
        let user_data = user_data(Op::Send, token);
        // SAFETY: the entry keeps the box until `on_send` has seen the operation end; an entry that
        // has one is not forgotten, and our drop leaks those whose operation does not end.
        unsafe { self.ring.push(sending.prepare(fd, user_data, bytes_min)) }
    }

    /// Takes a round's completions, and gives the kernel buffers for those it has filled.
    fn collect(&mut self, sink: &mut impl Sink) -> io::Result<()> {
        if self.ring.has_overflowed() {
            self.counters.completion_overflows.add_owned(1);
        }
        let mut completions = std::mem::take(&mut self.completions);
        self.ring.collect(&mut completions, COMPLETIONS_PER_ROUND);
        self.counters.ring_completions.add_owned(completions.len() as u64);
        for done in completions.drain(..) {
            self.handle(done, sink);
        }
        let collected = self.collect_sends(&mut completions, sink);
        self.completions = completions;
        self.buffers.refill();
        self.feed_starved();
        self.drain(sink);
        collected
    }

    fn handle(&mut self, done: Done, sink: &mut impl Sink) {
        let is_last = !cqueue::more(done.flags);
        let op = Op::of(done.user_data);
        if op == Op::Flush {
            return self.on_flushed(done, is_last, sink);
        }
        if is_last && op != Op::Cancel {
            self.outstanding -= 1;
        }
        let token = token_of(&self.entries, done.user_data);
        match op {
            Op::Accept | Op::Receive => self.on_received(token, done, is_last, sink),
            Op::Send => self.on_send(token, done, is_last, sink),
            Op::Watch => self.on_watched(token, done.result, sink),
            Op::Wake if is_last => self.watch_wake(),
            Op::Wake | Op::Cancel | Op::Flush => {}
        }
        if is_last && self.forget_if_gone(token) {
            sink.complete(token, Completion::Removed);
        }
    }

    /// A receive or an accept completed. Whether it goes on is told by the flags alone, whatever
    /// the result.
    fn on_received(&mut self, token: Token, done: Done, is_last: bool, sink: &mut impl Sink) {
        let Some(entry) = find(&mut self.entries, token) else { return };
        let was_armed = entry.reception == Reception::Armed;
        if is_last {
            entry.reception = Reception::Off;
        }
        if entry.role == Role::Listener {
            entry.accepted(done.result, &self.counters, sink);
        } else {
            let class = self.buffers.class(entry.armed_size);
            let size = entry.wanted_size;
            entry.received(done, &mut class.ring, &self.counters, sink);
            if entry.wanted_size != size {
                self.counters.buffer_moves.add_owned(1);
            }
            if done.result == -libc::ENOBUFS && entry.is_to_arm() {
                self.counters.starvations.add_owned(1);
                entry.reception = Reception::Starved;
                let since = **entry.starved_since.get_or_insert_with(|| Box::new(Instant::now()));
                class.starve(token, since);
            }
        }
        // A receive that nobody re-arms looks exactly like an idle peer.
        if is_last && was_armed && entry.is_to_arm() {
            self.counters.rearms.add_owned(1);
        }
        self.follow(token);
    }

    fn on_watched(&mut self, token: Token, result: i32, sink: &mut impl Sink) {
        if let Some(entry) = find(&mut self.entries, token) {
            entry.watched(result, sink);
            self.follow(token);
        }
    }

    fn on_send(&mut self, token: Token, done: Done, is_last: bool, sink: &mut impl Sink) {
        let Some(entry) = find(&mut self.entries, token) else { return };
        let Some(sending) = &mut entry.sending else { return };
        let progress = sending.complete(done, &entry.socket, &self.counters);
        if !is_last {
            return;
        }
        if matches!(progress, Progress::Unfinished) && !entry.removing {
            return self.submit_send(token);
        }
        if let Some(mut sending) = entry.sending.take()
            && self.spare_sendings.len() < SPARE_SENDINGS_MAX
        {
            sending.end();
            self.spare_sendings.push(sending);
        }
        self.counters.sends_in_flight.add_owned(1u64.wrapping_neg());
        if let Progress::Done(result) = progress
            && !entry.removing
        {
            sink.complete(token, Completion::Sent(result));
        }
    }

    /// Gives those that found no buffer their turn, first come, first served; as many as there are
    /// buffers, since more would find none again.
    fn feed_starved(&mut self) {
        for size in [Size::Small, Size::Large] {
            let mut turns = self.buffers.ready(size);
            while turns > 0
                && let Some(token) = self.buffers.next_starved(size)
            {
                // It may have been removed meanwhile: that was nobody's turn.
                if let Some(entry) = find(&mut self.entries, token)
                    && entry.reception == Reception::Starved
                {
                    entry.reception = Reception::Off;
                    self.follow(token);
                    turns -= 1;
                }
            }
        }
    }

    /// `true`: the entry was removed and had nothing in flight; the slot is free now.
    fn forget_if_gone(&mut self, token: Token) -> bool {
        let is_gone = find(&mut self.entries, token).is_some_and(|entry| entry.is_gone());
        if is_gone {
            self.entries[token.index()] = None;
        }
        is_gone
    }
}

fn find(entries: &mut [Option<Entry>], token: Token) -> Option<&mut Entry> {
    entries.get_mut(token.index())?.as_mut().filter(|entry| entry.token == token)
}

#[cfg(all(test, not(loom)))]
mod tests;
