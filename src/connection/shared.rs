//! One connection, as its poller and its users share it.
//!
//! The poller calls the [`Endpoint`] methods; users reach the rest through [`Handle`], [`super::Connection`] and its
//! halves. Locks are taken one at a time, never over user code or a wake-up.

use std::any::Any;
use std::cell::OnceCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Waker;

use super::handle::Handle;
use super::input::{End, Filed, Input};
use super::output::Output;
use super::state::{FUTURE, Found, Kind, Life, Next, READER, Runs, WRITER};
use super::timeout::Timeouts;
use super::{Connection, RunEnd, Service};
use crate::address::PeerAddr;
use crate::buffer::{Chain, Staging};
use crate::config::{self, Limits};
use crate::poller::timers::{NEVER, now_ns};
use crate::poller::{Action, Batch, Command, Endpoint, Flow, Received, Socket, Token};
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, lock};

pub(crate) type Remote = crate::poller::Remote<Shared>;

/// What the poller and the users of one connection share.
pub(crate) struct Shared {
    pub(super) remote: Arc<Remote>,
    pub(super) limits: Arc<Limits>,
    /// Set on connections that a server accepted.
    service: Option<Arc<dyn Service>>,
    pub(super) peer: PeerAddr,
    token: AtomicU64,
    /// Halves of a split connection that its user still holds.
    halves: AtomicU8,
    pub(super) life: Life,
    pub(super) timeouts: Timeouts,
    /// The inbox has bytes: a look without the lock. Changed under the input lock.
    has_arrivals: AtomicBool,
    /// Reception is paused until the reader has made room. Changed under the input lock.
    paused: AtomicBool,
    pub(super) input: Mutex<Input>,
    pub(super) output: Mutex<Output>,
    pub(super) extras: Mutex<Extras>,
}

type Callback = Box<dyn FnOnce(&Handle) + Send>;

/// What few connections have.
#[derive(Default)]
pub(super) struct Extras {
    pub(super) callbacks: Vec<Callback>,
    pub(super) context: Option<Arc<dyn Any + Send + Sync>>,
    pub(super) finished: bool,
}

thread_local! {
    /// The poller that this thread is.
    static POLLER: OnceCell<Arc<Remote>> = const { OnceCell::new() };
}

/// The poller that runs this code, if one does.
pub(crate) fn current_poller() -> Option<Arc<Remote>> {
    POLLER.with(|poller| poller.get().cloned())
}

impl Shared {
    pub(crate) fn new(
        remote: &Arc<Remote>,
        limits: &Arc<Limits>,
        service: Option<Arc<dyn Service>>,
        socket: Arc<Socket>,
        peer: PeerAddr,
    ) -> Arc<Shared> {
        remote.load.fetch_add(1, Ordering::Relaxed);
        let serves = service.as_ref().is_some_and(|service| service.serves_requests());
        Arc::new(Shared {
            remote: Arc::clone(remote),
            timeouts: Timeouts::new(limits),
            limits: Arc::clone(limits),
            service,
            peer,
            token: AtomicU64::new(Token::NONE.bits()),
            halves: AtomicU8::new(0),
            life: Life::new(),
            has_arrivals: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            input: Mutex::new(Input::new(serves)),
            output: Mutex::new(Output::new(socket)),
            extras: Mutex::new(Extras::default()),
        })
    }

    pub(crate) fn close(self: &Arc<Self>) {
        if !self.life.close() {
            return;
        }
        let flusher = {
            let mut output = lock(&self.output);
            output.discard();
            if let Some(socket) = &output.socket {
                self.remote.counters.add(|counters| &counters.setup_calls, 1);
                // Fails where the peer is gone already. The peer hears of the close now, however long a handler keeps
                // the connection.
                let _ = socket.shutdown(crate::poller::Side::Both);
            }
            output.take_waker()
        };
        let reader = {
            let mut input = lock(&self.input);
            input.discard();
            input.take_waker()
        };
        wake([flusher, reader]);
        self.remote.send(Command::Remove(Arc::clone(self)));
    }

    /// Closes if nobody has anything left to do here.
    pub(crate) fn close_if_idle(self: &Arc<Self>) {
        let idle = {
            let input = lock(&self.input);
            input.runs == Runs::Home && input.buffered_bytes() == 0
        };
        if idle && lock(&self.output).is_settled() {
            self.close();
        }
    }

    pub(crate) fn belongs_to(&self, service: &Arc<dyn Service>) -> bool {
        self.service.as_ref().is_some_and(|own| Arc::ptr_eq(own, service))
    }

    pub(super) fn is_serving(&self) -> bool {
        self.service.is_some()
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

    /// The reader has consumed some: lets reception go on where it was paused and there is room now.
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
        let mut input = lock(&self.input);
        input.bring_home(reader, writer);
        let over = input.runs.give_back(parts);
        let next = if over { self.next_after_run(&mut input) } else { Next::Rest };
        let disconnected = over && input.take_disconnect_owed();
        self.resume_if_room(input, 0);
        if disconnected {
            self.tell_disconnected();
        }
        match next {
            Next::Again => self.remote.send(Command::Again(Arc::clone(self))),
            Next::Close => self.close_when_sent(),
            Next::Finish => self.finish(),
            Next::Rest => {}
        }
    }

    /// Everything of a run is back: what now?
    fn next_after_run(&self, input: &mut Input) -> Next {
        let found = Found {
            unread: input.buffered_bytes() > 0,
            consumed: input.consumed(),
            peer_gone: input.end.is_some(),
            closed: self.life.is_closed(),
            removed: input.removed,
            draining: self.service.as_ref().is_some_and(|service| service.is_draining()),
            serves_requests: input.serves,
        };
        let next = input.runs.end(found);
        if next == Next::Again {
            input.runs.start(Kind::Request, found.consumed);
        }
        next
    }

    /// Closes once the peer has what was submitted, or has had time enough.
    fn close_when_sent(self: &Arc<Self>) {
        {
            let mut output = lock(&self.output);
            if !output.is_settled() {
                output.close_when_sent = true;
                drop(output);
                self.timeouts.set_idle(Some(config::LINGER));
                self.timeouts.touch(now_ns());
                self.arm(self.timeouts.idle_at());
                return;
            }
        }
        self.close();
    }

    fn tell_disconnected(self: &Arc<Self>) {
        if let Some(service) = &self.service {
            let handle = Handle::of(self);
            guard("on_disconnect", || service.disconnected(&handle));
        }
    }

    /// A run's future is done.
    pub(super) fn end_run(self: &Arc<Self>, failure: Option<crate::Error>) {
        if let (Some(error), Some(service)) = (failure, &self.service) {
            let handle = Handle::of(self);
            guard("on_error", || service.failed(&handle, &error));
            self.close();
        }
        self.release(FUTURE, None, None);
    }

    /// The end: callbacks, the last hold on the socket, the server's books.
    fn finish(self: &Arc<Self>) {
        if !lock(&self.input).runs.finish() {
            return;
        }
        let handle = Handle::of(self);
        loop {
            let callback = {
                let mut extras = lock(&self.extras);
                extras.finished = extras.callbacks.is_empty();
                extras.callbacks.pop()
            };
            match callback {
                Some(callback) => guard("close callback", || callback(&handle)),
                None => break,
            }
        }
        {
            let mut output = lock(&self.output);
            if !output.detaching {
                output.socket = None;
            }
        }
        self.settle_accounts();
    }

    /// A connection that its user owns was split.
    pub(super) fn count_halves(&self) {
        self.halves.store(2, Ordering::Relaxed);
    }

    /// A half is dropped: it goes home, or the last one closes.
    pub(super) fn drop_half(
        self: &Arc<Self>,
        part: u8,
        reader: Option<Box<Chain>>,
        writer: Option<Box<Staging>>,
    ) {
        if self.is_serving() {
            self.release(part, reader, writer);
        } else if self.halves.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.close();
        }
    }

    fn settle_accounts(&self) {
        self.remote.load.fetch_sub(1, Ordering::Relaxed);
        if let Some(service) = &self.service {
            service.gone();
        }
    }

    /// The peer has gone: tell the user, once, after `on_connect`.
    fn note_peer_gone(self: &Arc<Self>, batch: &mut Batch<Shared>) {
        if !self.life.peer_gone() || self.service.is_none() || self.life.is_closed() {
            return;
        }
        if !lock(&self.input).owe_disconnect_if_connecting() {
            batch.actions.push((Arc::clone(self), Action::Disconnected));
        }
    }

    fn note_end(self: &Arc<Self>, end: End, batch: &mut Batch<Shared>) {
        self.note_peer_gone(batch);
        let filed = lock(&self.input).end(end);
        if filed.close {
            batch.actions.push((Arc::clone(self), Action::Close));
        }
        self.follow(filed, batch);
    }

    fn follow(self: &Arc<Self>, filed: Filed, batch: &mut Batch<Shared>) -> Flow {
        batch.wakers.extend(filed.wake);
        if filed.start_run {
            batch.actions.push((Arc::clone(self), Action::Run));
        }
        if filed.over_share {
            self.note_end(End::Memory, batch);
        }
        if filed.pause { Flow::Pause } else { Flow::Continue }
    }

    /// A handler that computes, as opposed to one that waits for the peer.
    fn is_occupied(&self) -> bool {
        let computing = {
            let input = lock(&self.input);
            self.service.is_some() && input.runs.is_held() && !input.is_waited_for()
        };
        computing && !lock(&self.output).is_waited_for()
    }
}

impl Endpoint for Shared {
    fn enter_poller(remote: &Arc<Remote>) {
        POLLER.with(|poller| {
            // A thread is one poller for its whole life.
            let _ = poller.set(Arc::clone(remote));
        });
    }

    fn token(&self) -> Token {
        Token::from_bits(self.token.load(Ordering::Relaxed))
    }

    fn on_attached(self: &Arc<Self>, token: Token, batch: &mut Batch<Self>) -> bool {
        self.token.store(token.bits(), Ordering::Relaxed);
        if self.life.is_closed() {
            return false;
        }
        if let Some(service) = &self.service {
            let handle = Handle::of(self);
            let accepted = catch_unwind(AssertUnwindSafe(|| service.prepare(&handle).is_ok()));
            if !accepted.unwrap_or(false) || self.life.is_closed() {
                return false;
            }
            if service.serves_connect() {
                lock(&self.input).runs.start(Kind::Connect, 0);
                batch.actions.push((Arc::clone(self), Action::Run));
            }
        }
        if self.timeouts.watches_idle() {
            self.timeouts.touch(batch.now_ns.max(now_ns()));
            self.arm(self.timeouts.idle_at());
        }
        true
    }

    fn on_connected(self: &Arc<Self>, result: io::Result<()>, batch: &mut Batch<Self>) {
        let mut input = lock(&self.input);
        input.connected = Some(result);
        batch.wakers.extend(input.take_waker());
    }

    #[inline]
    fn on_received(self: &Arc<Self>, bytes: Received<'_>, batch: &mut Batch<Self>) -> Flow {
        if self.life.is_closed() {
            return Flow::Pause;
        }
        if self.timeouts.watches_idle() {
            self.timeouts.touch(batch.now_ns);
        }
        let filed = {
            let mut input = lock(&self.input);
            let filed = input.file(bytes, &self.remote.pool, &self.limits, batch.share_bytes);
            self.has_arrivals.store(true, Ordering::Release);
            if filed.pause {
                self.paused.store(true, Ordering::Relaxed);
            }
            filed
        };
        self.follow(filed, batch)
    }

    fn on_hung_up(self: &Arc<Self>, batch: &mut Batch<Self>) {
        self.note_peer_gone(batch);
    }

    fn on_ended(self: &Arc<Self>, result: io::Result<()>, batch: &mut Batch<Self>) {
        let end = match result {
            Ok(()) => End::Eof,
            Err(error) => {
                // A reset ends both directions.
                let mut output = lock(&self.output);
                output.fail(&error);
                batch.wakers.extend(output.take_waker());
                End::Failed(error.kind(), error.raw_os_error())
            }
        };
        self.note_end(end, batch);
    }

    fn take_output(&self) -> Option<Chain> {
        lock(&self.output).take_queue()
    }

    fn on_sent(self: &Arc<Self>, result: io::Result<usize>, batch: &mut Batch<Self>) {
        if self.timeouts.watches_idle() {
            self.timeouts.touch(batch.now_ns);
        }
        let mut output = lock(&self.output);
        batch.wakers.extend(output.on_sent(result));
        if output.close_when_sent && output.is_settled() {
            batch.actions.push((Arc::clone(self), Action::Close));
        }
    }

    fn on_timer(self: &Arc<Self>, at_ns: u64, batch: &mut Batch<Self>) -> Option<u64> {
        if !self.timeouts.armed().came_up(at_ns) || self.life.is_closed() {
            return None;
        }
        let now_ns = batch.now_ns;
        let (reader, read_at) = lock(&self.input).timer(now_ns);
        let (flusher, write_at) = lock(&self.output).timer(now_ns);
        batch.wakers.extend(reader);
        batch.wakers.extend(flusher);
        if self.timeouts.idle_at() <= now_ns {
            if !self.is_occupied() {
                self.close();
                return None;
            }
            self.timeouts.touch(now_ns);
        }
        let next_ns = read_at.min(write_at).min(self.timeouts.idle_at());
        (next_ns != NEVER && self.timeouts.armed().ask(next_ns)).then_some(next_ns)
    }

    fn is_armed(&self, at_ns: u64) -> bool {
        self.timeouts.armed().is_for(at_ns)
    }

    fn on_removed(self: &Arc<Self>) {
        // Also where the poller ends by itself: whoever waits must learn of it.
        self.life.close();
        let (reader, finished) = {
            let mut input = lock(&self.input);
            input.removed = true;
            (input.take_waker(), !input.runs.is_held())
        };
        let flusher = lock(&self.output).take_waker();
        wake([reader, flusher]);
        if finished {
            self.finish();
        }
    }

    fn act(self: Arc<Self>, action: Action) {
        match action {
            Action::Disconnected => self.tell_disconnected(),
            Action::Close => self.close_when_sent(),
            Action::Run => {
                let Some(service) = self.service.clone() else { return };
                self.remote.counters.handler_runs.add_owned(1);
                let end = RunEnd::new(&self);
                let (kind, reader, writer) = {
                    let mut input = lock(&self.input);
                    self.took_arrivals();
                    input.hand_out()
                };
                let connection = Connection::handed_out(self, reader, writer);
                // A handler that panics before its first await: its end is reported like any other.
                guard("handler", || service.run(kind, connection, end));
            }
        }
    }

    fn close(self: &Arc<Self>) {
        Shared::close(self);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A connection that never reached its poller, or whose poller is gone.
        if lock(&self.input).runs.finish() {
            self.settle_accounts();
        }
    }
}

/// Both halves of a run, taken back at once.
pub(super) const BOTH: u8 = READER | WRITER;

fn wake(wakers: [Option<Waker>; 2]) {
    for waker in wakers.into_iter().flatten() {
        waker.wake();
    }
}

/// Runs user code that has no result to fail with: a panic is reported by the panic hook and goes no further.
fn guard(what: &str, code: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(code)).is_err() {
        tracing::error!("{what} panicked");
    }
}
