//! The state of one connection that its poller and its users share.
//!
//! The poller calls it through `endpoint.rs`. Users reach it through [`Handle`],
//! [`super::Connection`] and its halves. A thread holds one lock at a time, and never while it runs
//! user code. Two exceptions: a flush takes the lock of the poller's mailbox while it holds the
//! output lock, and whoever changes who receives does so while it holds the input lock.

use std::any::Any;
use std::sync::Arc;
use std::task::Waker;

use super::Service;
use super::direct::Direct;
use super::handle::Handle;
use super::input::Input;
use super::output::{Flusher, Output};
use super::state::Life;
use super::timeout::{IdleTimeout, Timeouts};
use crate::address::PeerAddr;
use crate::buffer::Chain;
use crate::config::Limits;
use crate::poller::timers::NEVER;
use crate::poller::{Command, Socket, Token};
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, lock};
use crate::task;
use crate::user_code;

pub(crate) type Remote = crate::poller::Remote<Core>;

/// What the poller and the users of one connection share.
pub(crate) struct Core {
    pub(super) life: Life,
    /// How many halves of a split connection are not dropped.
    pub(super) halves: AtomicU8,
    /// Whether the inbox has bytes; read without the lock. Changed under the input lock.
    pub(super) has_arrivals: AtomicBool,
    /// Reception is paused until the reader has made room. Changed under the input lock.
    pub(super) paused: AtomicBool,
    /// The kernel held no received bytes when a timer was due. The timer fires after the next pass.
    pub(super) kernel_had_nothing: AtomicBool,
    /// A receive has found the end of the stream, and a send under way may say that it is a reset.
    pub(super) end_awaits_send: AtomicBool,
    pub(super) token: AtomicU64,
    pub(super) idle_timeout: IdleTimeout,
    pub(super) remote: Arc<Remote>,
    /// Set on connections that a server accepted.
    pub(super) service: Option<Arc<Service>>,
    pub(super) limits: Arc<Limits>,
    pub(super) input: Mutex<Input>,
    pub(super) output: Mutex<Output>,
    pub(super) timeouts: Timeouts,
    pub(super) peer: PeerAddr,
    pub(super) extras: Mutex<Extras>,
}

/// With its slot and its socket, a connection at rest is to cost little more than half a KiB.
#[cfg(not(loom))]
const _: () = assert!(size_of::<Core>() <= 464);

type Callback = Box<dyn FnOnce(&Handle) + Send>;

/// Data that few connections have.
#[derive(Default)]
pub(super) struct Extras {
    pub(super) callbacks: Vec<Callback>,
    pub(super) context: Option<Arc<dyn Any + Send + Sync>>,
    pub(super) finished: bool,
}

impl Core {
    pub(crate) fn new(
        remote: &Arc<Remote>,
        limits: &Arc<Limits>,
        service: Option<Arc<Service>>,
        socket: Arc<Socket>,
        peer: PeerAddr,
    ) -> Arc<Core> {
        remote.load.fetch_add(1, Ordering::Relaxed);
        let serves = service.as_ref().is_some_and(|service| service.request.is_some());
        Arc::new(Core {
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
            kernel_had_nothing: AtomicBool::new(false),
            end_awaits_send: AtomicBool::new(false),
            input: Mutex::new(Input::new(serves)),
            output: Mutex::new(Output::new(socket, limits)),
            extras: Mutex::new(Extras::default()),
        })
    }

    pub(crate) fn belongs_to(&self, service: &Arc<Service>) -> bool {
        self.service.as_ref().is_some_and(|own| Arc::ptr_eq(own, service))
    }

    /// Wakes a waiting reader and a waiting flush.
    pub(super) fn wake(self: &Arc<Self>, reader: Option<Waker>, flusher: Option<Flusher>) {
        if let Some(waker) = reader {
            user_code::wake(waker);
        }
        if let Some(flusher) = flusher {
            flusher.wake(self);
        }
    }

    pub(super) fn token(&self) -> Token {
        Token::from_bits(self.token.load(Ordering::Relaxed))
    }

    /// Identifies the connection to the thread that polls its run.
    #[inline]
    pub(super) fn owner(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    pub(super) fn is_serving(&self) -> bool {
        self.service.is_some()
    }

    /// When the idle timeout is due, if no byte moves before.
    pub(super) fn idle_at(&self) -> u64 {
        self.idle_timeout.end(&self.timeouts)
    }

    /// Asks the poller to call `on_timer` at `at_ns`, unless an earlier call is due already.
    #[inline]
    pub(super) fn arm(self: &Arc<Self>, at_ns: u64) {
        if at_ns != NEVER && self.timeouts.armed().ask(at_ns) {
            self.remote.send(Command::Timer(Arc::clone(self), at_ns));
        }
    }

    /// Moves the bytes of the inbox to the reader.
    pub(super) fn refill(self: &Arc<Self>, reader: &mut Chain, wanted_bytes: usize) {
        let mut input = lock(&self.input);
        input.refill(reader);
        self.took_arrivals();
        self.resume_if_room(input, wanted_bytes);
    }

    /// Notes that the inbox is empty. Called under the input lock.
    pub(super) fn took_arrivals(&self) {
        self.has_arrivals.store(false, Ordering::Relaxed);
    }

    /// Whether [`refill`](Self::refill) would find bytes.
    #[inline]
    pub(super) fn has_arrivals(&self) -> bool {
        self.has_arrivals.load(Ordering::Acquire)
    }

    /// The reader takes bytes that came after its run began. On a poller these bytes would start a
    /// new run. So a worker that measures the run measures a new part from here.
    pub(super) fn begins_part(&self) {
        if task::is_polled(self.owner()) {
            task::next_part();
        }
    }

    /// Notes that the reader has consumed bytes and has `left_bytes`. Resumes a paused reception if
    /// there is room.
    #[inline]
    pub(super) fn consumed(self: &Arc<Self>, left_bytes: usize) {
        if self.paused.load(Ordering::Relaxed) && left_bytes <= self.limits.input_low_bytes {
            let mut input = lock(&self.input);
            input.set_held_bytes(left_bytes);
            self.resume_if_room(input, 0);
        }
    }

    /// Resumes a paused reception, unless too many bytes are buffered for a reader that wants
    /// `wanted_bytes`.
    pub(super) fn resume_if_room(
        self: &Arc<Self>,
        mut input: MutexGuard<'_, Input>,
        wanted_bytes: usize,
    ) {
        if !self.paused.load(Ordering::Relaxed) {
            return;
        }
        let buffered = input.buffered_bytes();
        // A reader that received by itself was not paused because of the high watermark.
        let has_room = input.direct != Direct::Off && buffered < self.limits.input_high_bytes;
        if has_room || buffered <= self.limits.input_low_bytes || wanted_bytes > buffered {
            self.paused.store(false, Ordering::Relaxed);
            input.end_direct();
            // Under the lock, so that the poller obeys such commands in their order.
            self.remote.send(Command::Resume(Arc::clone(self)));
        }
    }

    pub(super) fn tell_disconnected(self: &Arc<Self>) {
        if let Some(service) = &self.service {
            let handle = Handle::of(self);
            user_code::call("on_disconnect", || service.hooks.disconnected(&handle));
        }
    }

    /// Whether a handler runs and does not wait for the peer.
    pub(super) fn is_occupied(&self) -> bool {
        let computing = {
            let input = lock(&self.input);
            self.service.is_some() && input.runs.is_active() && !input.is_waited_for()
        };
        computing && !lock(&self.output).is_waited_for()
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        let Extras { callbacks, context, .. } = std::mem::take(&mut *lock(&self.extras));
        callbacks.into_iter().for_each(user_code::discard);
        user_code::discard(context);
        // The connection is not counted as finished yet if it never reached its poller, or if the
        // poller has ended.
        if lock(&self.input).runs.finish() {
            self.settle_accounts();
        }
    }
}
