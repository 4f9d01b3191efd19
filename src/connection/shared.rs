//! One connection, as its poller and its users share it.
//!
//! The poller calls it through `endpoint.rs`; users reach it through [`Handle`],
//! [`super::Connection`] and its halves. Locks are taken one at a time, never over user code or a
//! wake-up; but for a poller's queue, a leaf, which a flush looks into with its output locked.

use std::any::Any;
use std::sync::Arc;
use std::task::Waker;

use super::Service;
use super::handle::Handle;
use super::input::{Discarded, End, Filed, Input};
use super::output::{Flusher, Output};
use super::spare;
use super::state::{FUTURE, Found, Kind, Life, Next, READER, WRITER};
use super::timeout::{IdleTimeout, Timeouts};
use crate::address::PeerAddr;
use crate::buffer::{Chain, Staging};
use crate::config::Limits;
use crate::error::Error;
use crate::poller::timers::NEVER;
use crate::poller::{Action, Batch, Command, Flow, Socket, Token};
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, lock};
use crate::user_code;

pub(crate) type Remote = crate::poller::Remote<Shared>;

/// What the poller and the users of one connection share.
///
/// In this order, so that what every request needs lies in as few cache lines as it fits.
#[repr(C)]
pub(crate) struct Shared {
    pub(super) life: Life,
    /// Halves of a split connection that its user still holds.
    pub(super) halves: AtomicU8,
    /// The inbox has bytes: a look without the lock. Changed under the input lock.
    pub(super) has_arrivals: AtomicBool,
    /// Reception is paused until the reader has made room. Changed under the input lock.
    pub(super) paused: AtomicBool,
    pub(super) token: AtomicU64,
    pub(super) idle_timeout: IdleTimeout,
    pub(super) remote: Arc<Remote>,
    /// Set on connections that a server accepted.
    pub(super) service: Option<Arc<Service>>,
    pub(super) limits: Arc<Limits>,
    pub(super) input: Mutex<Input>,
    pub(super) output: Mutex<Output>,
    /// Bytes the kernel has: a look without the lock. Changed under the output lock.
    pub(super) sent: AtomicU64,
    pub(super) timeouts: Timeouts,
    pub(super) peer: PeerAddr,
    pub(super) extras: Mutex<Extras>,
}

/// With its slot and its socket, a connection at rest is to cost little more than half a KiB.
#[cfg(not(loom))]
const _: () = assert!(size_of::<Shared>() <= 448);

type Callback = Box<dyn FnOnce(&Handle) + Send>;

/// What few connections have.
#[derive(Default)]
pub(super) struct Extras {
    pub(super) callbacks: Vec<Callback>,
    pub(super) context: Option<Arc<dyn Any + Send + Sync>>,
    pub(super) finished: bool,
}

impl Shared {
    pub(crate) fn new(
        remote: &Arc<Remote>,
        limits: &Arc<Limits>,
        service: Option<Arc<Service>>,
        socket: Arc<Socket>,
        peer: PeerAddr,
    ) -> Arc<Shared> {
        remote.load.fetch_add(1, Ordering::Relaxed);
        let serves = service.as_ref().is_some_and(|service| service.request.is_some());
        Arc::new(Shared {
            remote: Arc::clone(remote),
            idle_timeout: IdleTimeout::new(limits.idle_timeout),
            timeouts: Timeouts::new(limits),
            limits: Arc::clone(limits),
            service,
            peer,
            token: AtomicU64::new(Token::NONE.bits()),
            halves: AtomicU8::new(0),
            life: Life::new(),
            has_arrivals: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            input: Mutex::new(Input::new(serves)),
            output: Mutex::new(Output::new(socket)),
            extras: Mutex::new(Extras::default()),
        })
    }

    pub(crate) fn belongs_to(&self, service: &Arc<Service>) -> bool {
        self.service.as_ref().is_some_and(|own| Arc::ptr_eq(own, service))
    }

    /// Wakes whoever waited here.
    pub(super) fn wake(self: &Arc<Self>, reader: Option<Waker>, flusher: Option<Flusher>) {
        if let Some(waker) = reader {
            user_code::wake(waker);
        }
        if let Some(flusher) = flusher {
            flusher.wake(self);
        }
    }

    /// Stands for the connection in the trial of its run.
    #[inline]
    pub(super) fn owner(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    pub(super) fn is_serving(&self) -> bool {
        self.service.is_some()
    }

    /// When the connection has been idle for too long, unless something happens before.
    pub(super) fn idle_at(&self) -> u64 {
        self.idle_timeout.end(&self.timeouts)
    }

    /// Asks the poller to look at the timers at `at_ns`, unless it will anyway.
    #[inline]
    pub(super) fn arm(self: &Arc<Self>, at_ns: u64) {
        if at_ns != NEVER && self.timeouts.armed().ask(at_ns) {
            self.remote.send(Command::Timer(Arc::clone(self), at_ns));
        }
    }

    /// Gives the reader what has arrived.
    pub(super) fn refill(self: &Arc<Self>, reader: &mut Chain, wanted_bytes: usize) {
        let mut input = lock(&self.input);
        input.refill(reader);
        self.took_arrivals();
        self.resume_if_room(input, wanted_bytes);
    }

    /// The inbox was taken, under the input lock.
    pub(super) fn took_arrivals(&self) {
        self.has_arrivals.store(false, Ordering::Relaxed);
    }

    /// Whether [`refill`](Self::refill) would find bytes.
    #[inline]
    pub(super) fn has_arrivals(&self) -> bool {
        self.has_arrivals.load(Ordering::Acquire)
    }

    /// The reader has consumed some: lets reception go on where it was paused and there is room
    /// now.
    #[inline]
    pub(super) fn consumed(self: &Arc<Self>, left_bytes: usize) {
        if self.paused.load(Ordering::Relaxed) && left_bytes <= self.limits.input_low_bytes {
            let mut input = lock(&self.input);
            input.set_held_bytes(left_bytes);
            self.resume_if_room(input, 0);
        }
    }

    /// Ends a pause, unless there is too much buffered for a reader that wants `wanted_bytes`.
    pub(super) fn resume_if_room(
        self: &Arc<Self>,
        input: MutexGuard<'_, Input>,
        wanted_bytes: usize,
    ) {
        if !self.paused.load(Ordering::Relaxed) {
            return;
        }
        let buffered = input.buffered_bytes();
        if buffered <= self.limits.input_low_bytes || wanted_bytes > buffered {
            self.paused.store(false, Ordering::Relaxed);
            drop(input);
            self.remote.send(Command::Resume(Arc::clone(self)));
        }
    }

    /// Takes parts of a run back, and does what follows.
    pub(super) fn release(
        self: &Arc<Self>,
        parts: u8,
        reader: Option<Box<Chain>>,
        writer: Option<Box<Staging>>,
    ) {
        let mut unread = Discarded::default();
        let mut input = lock(&self.input);
        let stale = input.bring_home(reader, writer);
        if self.life.drops_input() {
            // A handle may keep the rest of the connection for long.
            unread = input.discard();
        }
        let over = input.runs.give_back(parts);
        let next = if over { self.next_after_run(&mut input) } else { Next::Rest };
        let again = (next == Next::Again).then(|| {
            self.took_arrivals();
            input.start(Kind::Request)
        });
        let disconnected = over && input.take_disconnect_owed();
        self.resume_if_room(input, 0);
        user_code::discard(stale);
        drop(unread);
        if disconnected {
            self.tell_disconnected();
        }
        match next {
            Next::Close => self.close(),
            Next::Finish => self.finish(),
            Next::Again | Next::Rest => {}
        }
        if let Some(handed) = again {
            self.remote.send(Command::Again(Arc::clone(self), handed));
        }
    }

    /// Everything of a run is back: what now?
    fn next_after_run(&self, input: &mut Input) -> Next {
        input.settle_home();
        let found = Found {
            unread: input.buffered_bytes() > 0,
            consumed: input.consumed(),
            peer_gone: input.end.is_some(),
            hung_up: input.has_hung_up(),
            closed: self.life.is_closed(),
            removed: input.removed,
            ends_when_idle: self.life.ends_when_idle(),
            serves_requests: input.serves,
        };
        input.runs.end(found)
    }

    pub(super) fn tell_disconnected(self: &Arc<Self>) {
        if let Some(service) = &self.service {
            let handle = Handle::of(self);
            user_code::call("on_disconnect", || service.hooks.disconnected(&handle));
        }
    }

    /// A run's future is done, and its connection goes home with it if `has_returned`.
    pub(super) fn end_run(self: &Arc<Self>, failure: Option<Error>, has_returned: bool) {
        if let Some(error) = failure {
            self.report(&error);
            // The peer was too slow to take the output, so the rest is dropped now.
            if error.is_write_timeout() {
                self.cut()
            } else {
                self.close()
            }
            user_code::discard(error);
        }
        match has_returned {
            true => self.release_empty(FUTURE | BOTH),
            false => self.release(FUTURE, None, None),
        }
    }

    /// Takes back a connection with nothing left in it, whose reader and writer are not with it any
    /// more.
    pub(super) fn release_empty(self: &Arc<Self>, parts: u8) {
        self.release(parts, Some(spare::reader()), None);
    }

    /// Ends a run that has left nothing, and after which there is nothing to do. `false`: there is,
    /// and the run has not ended. What [`release`](Self::release) does in the usual case.
    #[inline]
    pub(super) fn rest(&self) -> bool {
        let mut input = lock(&self.input);
        let is_at_rest = self.life.is_undisturbed() && !self.paused.load(Ordering::Relaxed);
        is_at_rest && input.rest()
    }

    /// A spawned future is done.
    pub(super) fn end_spawned(self: &Arc<Self>, failure: Option<Error>) {
        if let Some(error) = failure {
            self.report(&error);
            user_code::discard(error);
        }
        if let Some(service) = &self.service {
            service.hooks.spawn_ended();
        }
    }

    fn report(self: &Arc<Self>, error: &Error) {
        if let Some(service) = &self.service {
            let handle = Handle::of(self);
            user_code::call("on_error", || service.hooks.failed(&handle, error));
        }
    }

    /// A connection that its user owns was split.
    pub(super) fn count_halves(&self) {
        self.halves.store(2, Ordering::Relaxed);
    }

    /// The peer has gone: tell the user, once, after `on_connect`.
    pub(super) fn note_peer_gone(self: &Arc<Self>, batch: &mut Batch<Shared>) {
        if !self.life.peer_gone() || self.service.is_none() || self.life.is_closed() {
            return;
        }
        if !lock(&self.input).owe_disconnect_if_connecting() {
            batch.act(self, Action::Disconnected);
        }
    }

    pub(super) fn note_end(self: &Arc<Self>, end: End, batch: &mut Batch<Shared>) {
        // Out of memory here says nothing about the peer, which may be alive.
        if !matches!(end, End::Memory) {
            self.note_peer_gone(batch);
        }
        let filed = {
            let mut input = lock(&self.input);
            let filed = input.end(end);
            if filed.run.is_some() {
                self.took_arrivals();
            }
            filed
        };
        if filed.close {
            batch.act(self, Action::Close);
        }
        self.follow(filed, batch);
    }

    #[inline(always)]
    pub(super) fn follow(self: &Arc<Self>, filed: Filed, batch: &mut Batch<Shared>) -> Flow {
        batch.wakers.extend(filed.wake);
        if let Some(handed) = filed.run {
            batch.start(self, handed);
        }
        if filed.over_share {
            self.note_end(End::Memory, batch);
        }
        if filed.pause { Flow::Pause } else { Flow::Continue }
    }

    /// A handler that computes, as opposed to one that waits for the peer.
    pub(super) fn is_occupied(&self) -> bool {
        let computing = {
            let input = lock(&self.input);
            self.service.is_some() && input.runs.is_held() && !input.is_waited_for()
        };
        computing && !lock(&self.output).is_waited_for()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let Extras { callbacks, context, .. } = std::mem::take(&mut *lock(&self.extras));
        callbacks.into_iter().for_each(user_code::discard);
        user_code::discard(context);
        // A connection that never reached its poller, or whose poller is gone.
        if lock(&self.input).runs.finish() {
            self.settle_accounts();
        }
    }
}

/// Both halves of a run, taken back at once.
pub(super) const BOTH: u8 = READER | WRITER;
