//! The io_uring backend: completions from `io_uring(7)`, one ring for each poller.
//!
//! One poller thread owns the backend. Accepts and receives are multishot: one submission completes
//! many times, and the kernel takes the receive buffers from a buffer ring. A connection has at
//! most one send in flight. One system call submits all queued operations and waits.
//!
//! The files, in reading order:
//! - this file: [`Uring`], the backend;
//! - `operations.rs`: starts an entry's operations and takes their completions;
//! - `entry.rs`: the state of one token; `entries.rs`: the table of entries;
//! - `sending.rs`: a send in the kernel and its memory; `send_record.rs`: a send that outlives its
//!   connection;
//! - `buffers.rs`, `buffer_ring.rs`: receive buffers;
//! - `ring.rs`: the ring; `tag.rs`: user data; `raw.rs`, `mapping.rs`: system calls and memory;
//! - `probe.rs`: what this kernel supports;
//! - `sqpoll/`: only for [`Backend::Sqpoll`](crate::config::Backend::Sqpoll).

mod buffer_ring;
mod buffers;
mod entries;
mod entry;
mod mapping;
mod operations;
pub(crate) mod probe;
mod raw;
mod ring;
mod send_record;
mod sending;
mod sqpoll;
mod tag;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::buffer_size::Size;
use super::{Backend, Completion, Sink, Socket, Token, Wake};
use crate::address::PeerAddr;
use crate::buffer::{Chain, Pool};
use crate::config::UringOptions;
use crate::config::uring::COMPLETIONS_PER_ROUND;
use crate::counters::Counters;
use crate::user_code;

use entries::Entries;
use entry::{Entry, Reception, Role};
use operations::Operations;
use raw::Until;
use ring::{Cqe, Ring};
use sqpoll::SharedSends;
use tag::Op;

pub(crate) use sqpoll::{Engine, SendRings};

pub(crate) struct Uring {
    entries: Entries,
    operations: Operations,
    /// Sends of `sqpoll`. `None` without an engine: then entries hold their sends.
    shared_sends: Option<SharedSends>,
    engine: Option<Engine>,
    wake: Arc<Wake>,
    counters: Arc<Counters>,
    /// Completions that needed no wait. The next `wait` reports them.
    completed: Vec<(Token, Completion<'static>)>,
    /// Completions of a round. Empty between waits; kept for its memory.
    cqes: Vec<Cqe>,
    /// Completions of the current pass that are not collected.
    pass_left: usize,
}

/// Settings of the backend.
#[derive(Clone)]
pub(crate) struct RingOptions {
    pub(crate) uring: UringOptions,
    /// The engine of `sqpoll`.
    pub(crate) engine: Option<Engine>,
}

impl Backend for Uring {
    type Options = RingOptions;

    fn new(
        wake: &Arc<Wake>,
        pool: &Pool,
        counters: &Arc<Counters>,
        options: &RingOptions,
    ) -> io::Result<Uring> {
        let mut uring = Uring::without_send_rings(wake, pool, counters, options)?;
        if let Some(engine) = &options.engine {
            uring.shared_sends = Some(SharedSends::open(engine, &uring.operations.ring, wake)?);
            engine.tell_unranked();
        }
        Ok(uring)
    }

    fn listen(&mut self, token: Token, listener: Arc<Socket>) -> io::Result<()> {
        self.insert(token, listener, Role::Listener, 0);
        Ok(())
    }

    fn attach(&mut self, token: Token, socket: Arc<Socket>, at_once: usize) -> io::Result<()> {
        self.insert(token, socket, Role::Stream, at_once);
        Ok(())
    }

    // A connect(2) call never blocks on these sockets. A connect operation of the ring would occupy
    // a kernel worker while the backlog of a Unix socket is full.
    fn connect(&mut self, token: Token, socket: Arc<Socket>, peer: &PeerAddr, at_once: usize) {
        self.counters.setup_calls.add_owned(1);
        match socket.connect(peer) {
            Ok(()) => {
                self.insert(token, socket, Role::Stream, at_once);
                self.completed.push((token, Completion::Connected(Ok(()))));
            }
            Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => {
                self.insert(token, socket, Role::Connecting, at_once);
            }
            failed => self.completed.push((token, Completion::Connected(failed))),
        }
    }

    fn resume(&mut self, token: Token) {
        if let Some(entry) = self.entries.find(token) {
            entry.paused = false;
            if entry.direct.take().is_some() {
                self.operations.forget_readable(entry);
            }
            self.operations.follow(entry);
        }
    }

    fn watch_readable(&mut self, token: Token, number: u32) {
        if let Some(entry) = self.entries.find(token) {
            entry.paused = true;
            entry.direct = Some(number);
            if entry.reception == Reception::Starved {
                entry.reception = Reception::Off;
            }
            self.operations.follow(entry);
        }
    }

    fn send(&mut self, token: Token, gather: Chain) {
        let Some(entry) = self.entries.find(token) else { return };
        if entry.removing {
            return;
        }
        match &mut self.shared_sends {
            Some(sends) => sends.send(token, &entry.socket, gather, &self.counters),
            None => self.operations.send(entry, gather),
        }
    }

    fn remove(&mut self, token: Token) {
        if let Some(entry) = self.entries.find(token) {
            if std::mem::replace(&mut entry.removing, true) {
                return;
            }
            self.operations.remove(entry);
            if !entry.is_gone() {
                return;
            }
            self.entries.forget(token);
        }
        self.completed.push((token, Completion::Removed));
    }

    fn wait(&mut self, timeout: Option<Duration>, sink: &mut impl Sink) -> io::Result<bool> {
        let has_sends = self.shared_sends.as_mut().is_some_and(|sends| {
            sends.retry(&self.entries, &self.counters);
            sends.has_completions()
        });
        let is_ready = has_sends
            || !self.completed.is_empty()
            || !self.operations.draining.is_empty()
            || self.operations.ring.completion_count() > 0;
        for (token, completion) in std::mem::take(&mut self.completed) {
            sink.complete(token, completion);
        }
        let until = match timeout {
            _ if is_ready => Until::Now,
            Some(Duration::ZERO) => Until::Now,
            Some(timeout) => Until::Timeout(timeout),
            None => Until::Completion,
        };
        let entered = self.enter(until);
        self.survive(entered, sink)?;
        if self.pass_left == 0 {
            self.pass_left = self.operations.ring.completion_count();
        }
        self.pass_left = self.pass_left.saturating_sub(COMPLETIONS_PER_ROUND);
        let collected = self.collect(sink);
        self.survive(collected, sink)?;
        // The kernel keeps further completions of this pass in a list while the queue is full.
        Ok(self.pass_left == 0 && !self.operations.ring.has_overflowed())
    }

    fn has_grown(&self) -> bool {
        self.operations.buffers.have_grown()
    }

    fn shrink(&mut self) {
        let ring = &mut self.operations.ring;
        // A completion that is not taken yet, or was lost, may name any buffer.
        let has_all =
            ring.completion_count() == 0 && !ring.has_overflowed() && !ring.has_lost_completions();
        self.operations.buffers.shrink(ring, has_all);
    }
}

impl Uring {
    /// The backend without the rings that are only for sends.
    fn without_send_rings(
        wake: &Arc<Wake>,
        pool: &Pool,
        counters: &Arc<Counters>,
        RingOptions { uring: options, engine }: &RingOptions,
    ) -> io::Result<Uring> {
        let ring = match engine {
            Some(engine) => {
                let ring = engine.receive_ring(options, counters)?;
                engine.tell_unranked();
                ring
            }
            None => Ring::new(options)?,
        };
        let mut operations = Operations::new(ring, options, pool, counters)?;
        operations.watch_wake(wake);
        Ok(Uring {
            entries: Entries::default(),
            operations,
            shared_sends: None,
            engine: engine.clone(),
            wake: Arc::clone(wake),
            counters: Arc::clone(counters),
            completed: Vec::new(),
            cqes: Vec::new(),
            pass_left: 0,
        })
    }

    /// Adds an entry, and starts its first operations.
    fn insert(&mut self, token: Token, socket: Arc<Socket>, role: Role, budget_bytes: usize) {
        let size = self.operations.buffers.first_size();
        let entry = self.entries.insert(Entry::new(token, socket, role, size, budget_bytes));
        if role == Role::Connecting {
            self.operations.watch(entry, libc::POLLOUT);
        } else {
            self.operations.follow(entry);
        }
    }

    /// Enters the kernel where that is needed: to wait, to submit, or to get completions that the
    /// kernel holds back.
    fn enter(&mut self, until: Until) -> io::Result<()> {
        let mut until = until;
        let ring = &mut self.operations.ring;
        if let Some(sends) = self.shared_sends.as_mut().filter(|_| until != Until::Now) {
            until = sends.prepare_sleep(until, ring, &self.counters)?;
        }
        let mut entered = Ok(());
        if until != Until::Now || ring.has_submissions() || ring.wants_enter() {
            entered = ring.enter(until, &self.counters);
        }
        if let Some(sends) = &mut self.shared_sends {
            sends.end_sleep();
        }
        entered
    }

    /// Takes the completions of a round, and gives the kernel new buffers.
    fn collect(&mut self, sink: &mut impl Sink) -> io::Result<()> {
        let ring = &mut self.operations.ring;
        if ring.has_overflowed() {
            self.counters.completion_overflows.add_owned(1);
        }
        let mut cqes = std::mem::take(&mut self.cqes);
        ring.collect(&mut cqes, COMPLETIONS_PER_ROUND);
        // The kernel reports a loss only to a thread that waits. A poller may spin for ever.
        let mut collected = match ring.has_lost_completions() {
            true => Err(io::Error::from_raw_os_error(libc::EBADR)),
            false => Ok(()),
        };
        if let Some(sends) = &mut self.shared_sends {
            collected = collected.and(sends.collect(&mut cqes, &self.counters));
        }
        self.counters.ring_completions.add_owned(cqes.len() as u64);
        for cqe in cqes.drain(..) {
            self.handle(cqe, sink);
        }
        self.cqes = cqes;
        self.operations.buffers.refill();
        self.feed_starved();
        for token in std::mem::take(&mut self.operations.draining) {
            if let Some(entry) = self.entries.find(token) {
                self.operations.drain(entry, sink);
            }
        }
        collected
    }

    fn handle(&mut self, cqe: Cqe, sink: &mut impl Sink) {
        let op = Op::of(cqe.user_data);
        if op == Op::SendRecord {
            return self.on_record(cqe, sink);
        }
        if op != Op::Cancel && cqe.is_last() {
            self.operations.in_flight -= 1;
        }
        if op == Op::Wake && cqe.is_last() {
            self.operations.watch_wake(&self.wake);
        }
        let Some(entry) = self.entries.find_by_user_data(cqe.user_data) else { return };
        match op {
            Op::Receive | Op::Accept => self.operations.on_received(entry, cqe, sink),
            Op::Send => self.operations.on_send(entry, cqe, sink),
            Op::Watch => self.operations.on_watched(entry, cqe, sink),
            Op::Readable => self.operations.on_readable(entry, cqe, sink),
            Op::Wake | Op::Cancel | Op::SendRecord => {}
        }
        if entry.is_gone() {
            let token = entry.token;
            self.entries.forget(token);
            sink.complete(token, Completion::Removed);
        }
    }

    fn on_record(&mut self, cqe: Cqe, sink: &mut impl Sink) {
        let done = match &mut self.shared_sends {
            Some(sends) => sends.complete(cqe, &self.entries, &self.counters),
            None => self.operations.on_zero_copy(cqe, &self.entries),
        };
        if let Some((token, result)) = done {
            sink.complete(token, Completion::Sent(result));
        }
    }

    /// Arms receives of starved connections, the longest wait first. Arms only as many as there are
    /// buffers, because further connections would find no buffer again.
    fn feed_starved(&mut self) {
        for size in Size::ALL {
            let mut buffers_left = self.operations.buffers.ready(size);
            while buffers_left > 0
                && let Some(token) = self.operations.buffers.next_starved(size)
            {
                // A connection that was removed meanwhile takes no buffer.
                if let Some(entry) = self.entries.find(token)
                    && entry.reception == Reception::Starved
                {
                    entry.reception = Reception::Off;
                    self.operations.follow(entry);
                    let takes_one = entry.reception == Reception::Armed && entry.armed_size == size;
                    buffers_left -= usize::from(takes_one);
                }
            }
        }
    }

    /// Continues after the kernel lost completions.
    fn survive(&mut self, result: io::Result<()>, sink: &mut impl Sink) -> io::Result<()> {
        match result {
            Err(error) if error.raw_os_error() == Some(libc::EBADR) => self.rebuild(sink),
            result => result,
        }
    }

    /// Starts again with a new ring. The kernel had no memory for completions and lost some of
    /// them, and nothing tells whose. So every connection fails. The listeners continue.
    fn rebuild(&mut self, sink: &mut impl Sink) -> io::Result<()> {
        user_code::log(|| {
            tracing::error!("io_uring: completions were lost; a new ring, without its connections")
        });
        let options =
            RingOptions { uring: self.operations.options.clone(), engine: self.engine.clone() };
        let pool = self.operations.buffers.pool();
        let mut new = Uring::without_send_rings(&self.wake, pool, &self.counters, &options)?;
        // The send rings continue; a send that they lost is given up with its connection. Without
        // send rings, later sends go through the new receive ring.
        new.shared_sends = self.shared_sends.take();
        if let Some(sends) = &mut new.shared_sends {
            sends.forget_losses();
        }
        let mut old = std::mem::replace(self, new);
        self.completed.append(&mut old.completed);
        // The old ring may use the sockets until it is dropped.
        let mut removed = Vec::new();
        for entry in old.entries.drain() {
            let (token, role) = (entry.token, entry.role);
            let was_sending = entry.sending.is_some();
            // The old ring may use this memory for ever.
            std::mem::forget(entry.sending);
            if entry.removing {
                removed.push(entry.socket);
                self.completed.push((token, Completion::Removed));
                continue;
            }
            if role == Role::Listener {
                self.insert(token, entry.socket, role, 0);
                continue;
            }
            let size = self.operations.buffers.first_size();
            let failed = Entry::new(token, entry.socket, Role::Stream, size, 0);
            self.entries.insert(failed).ended = true;
            let lost = || io::Error::from_raw_os_error(libc::EBADR);
            if was_sending {
                self.counters.sends_in_flight.add_owned(1u64.wrapping_neg());
                sink.complete(token, Completion::Sent(Err(lost())));
            }
            if role == Role::Connecting {
                sink.complete(token, Completion::Connected(Err(lost())));
            } else {
                // Also where the peer has ended: a zero-copy send that was under way has failed.
                sink.complete(token, Completion::Ended(Err(lost())));
            }
        }
        drop(old);
        drop(removed);
        Ok(())
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if let Some(mut sends) = self.shared_sends.take() {
            sends.close(&self.counters);
        }
        if !self.operations.end() {
            for entry in self.entries.drain() {
                std::mem::forget(entry.sending);
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
