//! The connection as an [`Endpoint`]: the poller calls it for completions, timers and runs.
//!
//! All methods run on the poller's thread, except `give_up`, `run_elsewhere` and `send_off_poller`,
//! which any thread may call.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::core::Core;
use super::direct::Direct;
use super::handle::Handle;
use super::input::{Dial, End, Filed, Started};
use super::output::{Ending, Output};
use super::state::Kind;
use crate::buffer::{Chain, Spent};
use crate::clock::now_ns;
use crate::config;
use crate::poller::timers::NEVER;
use crate::poller::{
    Action, Attached, Command, Completion, Endpoint, Flow, Job, Reaction, Receipt, Received, Side,
    Token,
};
use crate::sync::atomic::Ordering;
use crate::sync::lock;
use crate::task::{self, Polled, Run};
use crate::user_code;

type Wanted = Reaction<Started>;

impl Endpoint for Core {
    type Started = Started;

    fn token(&self) -> Token {
        Core::token(self)
    }

    fn on_attached(self: &Arc<Self>, token: Token) -> Option<Attached<Started>> {
        // In one step, under the lock that flushes hold. A flush that finds the token leaves its
        // bytes to the poller, and the next flush queues behind them. The poller must not take
        // that queue here, because it would have two sends then.
        let output = {
            let mut output = lock(&self.output);
            self.token.store(token.bits(), Ordering::Relaxed);
            output.take_queue()
        };
        // With half the mark, buffered input stays below one and a half times the mark.
        let at_once_bytes = self.limits.input_high_bytes / 2;
        if self.life.is_closed() {
            // The connection was closed. Submitted bytes must still be sent. If another thread is
            // closing now, that thread makes the connection linger, or sends `Command::Remove`.
            if lock(&self.output).ending == Ending::Ended {
                user_code::discard(output);
                return None;
            }
            return Some(Attached { at_once_bytes, output, start: None });
        }
        let start = match &self.service {
            Some(service) => {
                // The connection was accepted while the server began to shut down.
                if service.shutdown.is_raised() {
                    return None;
                }
                let handle = Handle::of(self);
                let prepare = || service.hooks.prepare(&handle).is_ok();
                let is_accepted = user_code::call("on_prepare", prepare).unwrap_or(false);
                if !is_accepted || self.life.is_closed() {
                    return None;
                }
                service.connect.is_some().then(|| lock(&self.input).start(Kind::Connect))
            }
            None => None,
        };
        if self.idle_timeout.is_set() {
            self.timeouts.touch(now_ns());
            self.arm(self.idle_at());
        }
        Some(Attached { at_once_bytes, output, start })
    }

    #[inline]
    fn on_received(
        self: &Arc<Self>,
        bytes: Received<'_>,
        share_bytes: Option<usize>,
    ) -> Receipt<Started> {
        let mut input = lock(&self.input);
        // Check under the lock: a close sets the bit first, and then discards the input under the
        // lock.
        if self.life.drops_input() {
            return Receipt::Filed(Wanted::default());
        }
        if self.idle_timeout.is_set() {
            // The round's clock is too old: it was read before the wait that received these bytes.
            self.timeouts.touch(now_ns());
        }
        if !input.may_start() {
            let filed = input.file(bytes, &self.remote.pool, &self.limits, share_bytes);
            self.has_arrivals.store(true, Ordering::Release);
            if filed.pause {
                self.paused.store(true, Ordering::Relaxed);
            }
            drop(input);
            return Receipt::Filed(self.follow(filed));
        }
        let started = input.start_with(bytes, &self.remote.pool);
        self.took_arrivals();
        let is_full = started.reader.len() >= self.limits.input_bytes_max(share_bytes);
        if is_full {
            self.paused.store(true, Ordering::Relaxed);
        }
        Receipt::Starts(started, if is_full { Flow::Pause } else { Flow::Continue })
    }

    fn on_completion(self: &Arc<Self>, completion: Completion<'_>) -> Wanted {
        match completion {
            Completion::Sent(result) => self.on_sent(result),
            Completion::Connected(result) => {
                if self.idle_timeout.is_set() {
                    self.timeouts.touch(now_ns());
                }
                let mut input = lock(&self.input);
                input.dial = Dial::Ended(result);
                Wanted { reader: input.take_waker(), ..Wanted::default() }
            }
            Completion::Readable(number, is_urgent) => {
                let reader = lock(&self.input).on_readable(number, is_urgent);
                Wanted { reader, ..Wanted::default() }
            }
            Completion::HungUp => {
                let mut wanted = self.on_peer_gone();
                let mut input = lock(&self.input);
                wanted.start = input.hang_up();
                wanted.reader = input.end_is_readable();
                drop(input);
                wanted
            }
            Completion::Ended(result) => self.on_ended(result),
            Completion::Received(_)
            | Completion::Accepted(..)
            | Completion::AcceptFailed(_)
            | Completion::Removed => Wanted::default(),
        }
    }

    fn on_timer(self: &Arc<Self>, at_ns: u64, now_ns: u64) -> Wanted {
        let mut wanted = Wanted::default();
        if !self.timeouts.armed().came_up(at_ns) || self.life.is_closed() && !self.lingers() {
            return wanted;
        }
        if self.end_awaits_send.load(Ordering::Relaxed) {
            // The timer that this sets fires for everything else.
            return self.on_end_of_stream();
        }
        if let Some(again_ns) = self.looks_again_at(now_ns) {
            wanted.timer_ns = self.timeouts.armed().ask(again_ns).then_some(again_ns);
            return wanted;
        }
        let (reader, read_at) = lock(&self.input).timer(now_ns);
        let (flusher, write_at) = lock(&self.output).timer(now_ns);
        wanted.reader = reader;
        if let Some(flusher) = flusher {
            flusher.collect(&mut wanted);
        }
        if self.idle_at() <= now_ns {
            match self.last_moved(now_ns) {
                Some(moved_ns) => self.timeouts.touch_at(moved_ns),
                None => {
                    wanted.act(Action::Cut);
                    return wanted;
                }
            }
        }
        let next_ns = read_at.min(write_at).min(self.idle_at());
        let is_earlier = next_ns != NEVER && self.timeouts.armed().ask(next_ns);
        wanted.timer_ns = is_earlier.then_some(next_ns);
        wanted
    }

    fn is_armed(&self, at_ns: u64) -> bool {
        self.timeouts.armed().is_for(at_ns)
    }

    fn on_removed(self: &Arc<Self>) {
        // A poller that ends removes open connections. Their waits must end.
        self.life.close();
        let (unread, reader, finished) = {
            let mut input = lock(&self.input);
            input.removed = true;
            // These bytes were filed while another thread closed the connection.
            let unread = self.life.drops_input().then(|| input.discard());
            let finished = !input.runs.is_active() && !self.life.is_detached();
            (unread, input.take_waker(), finished)
        };
        let flusher = lock(&self.output).take_flusher();
        self.wake(reader, flusher);
        drop(unread);
        if finished {
            self.finish();
        }
    }

    #[inline(always)]
    fn begin(self: &Arc<Self>, started: Started) -> Polled {
        let Some(service) = &self.service else { return Polled::Done };
        self.count_run();
        let Some(here) = service.executor.here() else {
            self.begin_elsewhere(started);
            return Polled::Done;
        };
        here.time(|| task::poll_run(|cx| self.begin_run(started, cx)))
    }

    fn make_task(self: &Arc<Self>, run: Run) {
        self.spawn_near(run);
    }

    fn give_up(self: &Arc<Self>, started: Started) {
        user_code::call("handler", || self.give_up_run(started));
    }

    fn act(self: &Arc<Self>, action: Action) {
        match action {
            Action::Disconnected => self.tell_disconnected(),
            Action::Close => self.close(),
            Action::CloseIfIdle => self.close_if_idle(),
            Action::End => self.end_socket(|socket| socket.shutdown(Side::Both)),
            Action::Cut => self.cut(),
        }
    }

    fn is_movable(&self) -> bool {
        self.service.as_ref().is_some_and(|service| service.executor.workers().is_some())
    }

    fn run_elsewhere(self: Arc<Self>, started: Started) {
        self.count_run();
        self.begin_elsewhere(started);
    }

    fn send_off_poller(self: &Arc<Self>, bytes: Chain) {
        if self.idle_timeout.is_set() {
            self.timeouts.touch(now_ns());
        }
        let mut spent = Spent::default();
        let (flusher, end) = {
            let mut output = lock(&self.output);
            let flusher = output.send_left(self, bytes, &mut spent);
            (flusher, self.after_sending(&output))
        };
        if let Some(flusher) = flusher {
            flusher.wake(self);
        }
        match end {
            Some(Action::End) => self.act(Action::End),
            // Only the thread that files bytes can tell that none have arrived.
            Some(other) => self.remote.send(Command::Run(Job::Act(Arc::clone(self), other))),
            None => {}
        }
    }

    fn unread_bytes(&self) -> usize {
        lock(&self.input).buffered_bytes()
    }
}

impl Core {
    fn on_sent(self: &Arc<Self>, result: io::Result<usize>) -> Wanted {
        if self.idle_timeout.is_set() {
            self.timeouts.touch(now_ns());
        }
        let mut wanted = Wanted::default();
        let mut spent = Spent::default();
        let mut output = lock(&self.output);
        let (flusher, next) = output.on_sent(result, &mut spent);
        if let Some(flusher) = flusher {
            flusher.collect(&mut wanted);
        }
        wanted.output = next;
        if let Some(end) = self.after_sending(&output) {
            wanted.act(end);
        }
        drop(output);
        wanted
    }

    fn on_ended(self: &Arc<Self>, result: io::Result<()>) -> Wanted {
        let Err(error) = result else { return self.on_end_of_stream() };
        // A reset ends both directions.
        let mut spent = Spent::default();
        let (flusher, lingers) = {
            let mut output = lock(&self.output);
            output.fail(&error, &mut spent);
            (output.take_flusher(), output.ending == Ending::Lingers)
        };
        let mut wanted = self.on_end(End::Failed(error.kind(), error.raw_os_error()));
        if let Some(flusher) = flusher {
            flusher.collect(&mut wanted);
        }
        if lingers {
            wanted.act(Action::End);
        }
        wanted
    }

    /// A receive has found the end of the peer's stream. The kernel reports a reset once: if a send
    /// has got it, a receive finds an end. So while a send of a dead connection is under way, this
    /// waits for its result.
    fn on_end_of_stream(self: &Arc<Self>) -> Wanted {
        let end = lock(&self.output).end_of_stream();
        let mut wanted = end.map_or_else(Wanted::default, |end| self.on_end(end));
        let awaits_send = end.is_none();
        let was_awaiting = self.end_awaits_send.swap(awaits_send, Ordering::Relaxed);
        if awaits_send || was_awaiting {
            let again_ns = now_ns().saturating_add(config::SEND_RESULT_NS);
            wanted.timer_ns = self.timeouts.armed().ask(again_ns).then_some(again_ns);
        }
        wanted
    }

    /// Nothing more will be received.
    fn on_end(self: &Arc<Self>, end: End) -> Wanted {
        let mut wanted = match end {
            // A lack of memory says nothing about the peer, which may be alive.
            End::Memory => Wanted::default(),
            End::Eof | End::Failed(..) => self.on_peer_gone(),
        };
        let filed = {
            let mut input = lock(&self.input);
            let filed = input.end(end);
            if filed.run.is_some() {
                self.took_arrivals();
            }
            filed
        };
        wanted.reader = filed.wake;
        wanted.start = filed.run;
        if filed.close {
            wanted.act(Action::Close);
        }
        wanted
    }

    /// The peer has gone. `on_disconnect` is called once, and not before `on_connect` has ended.
    fn on_peer_gone(self: &Arc<Self>) -> Wanted {
        let mut wanted = Wanted::default();
        if self.life.peer_gone()
            && self.service.is_some()
            && !self.life.is_closed()
            && !lock(&self.input).owe_disconnect_if_connecting()
        {
            wanted.act(Action::Disconnected);
        }
        wanted
    }

    fn follow(self: &Arc<Self>, filed: Filed) -> Wanted {
        let mut wanted =
            if filed.over_share { self.on_end(End::Memory) } else { Wanted::default() };
        // Filing may have taken the waker; `on_end` finds none then.
        wanted.reader = filed.wake.or(wanted.reader);
        if filed.pause {
            wanted.flow = Flow::Pause;
        }
        wanted
    }

    /// What must happen when the last submitted byte is sent.
    fn after_sending(&self, output: &Output) -> Option<Action> {
        if !output.is_settled() {
            return None;
        }
        match output.ending {
            Ending::Lingers => Some(Action::End),
            Ending::Ended => None,
            // A server shutdown keeps a connection open only until its output is sent.
            Ending::No => self.life.ends_when_idle().then_some(Action::CloseIfIdle),
        }
    }

    /// When a timer that is due is looked at again, because input that the poller has not seen may
    /// satisfy its wait. `None`: the timer fires.
    ///
    /// The kernel may hold bytes after the poller was held up, or when the ring has no free receive
    /// buffer. If it holds none, a thread of the kernel may have received them since the last pass.
    /// So such a timer fires only after one more pass.
    fn looks_again_at(&self, now_ns: u64) -> Option<u64> {
        let (read_ns, has_ended, is_direct) = {
            let input = lock(&self.input);
            (input.until_ns(), input.end.is_some(), input.direct != Direct::Off)
        };
        let due_ns = read_ns.min(self.idle_at());
        let is_due = due_ns <= now_ns && now_ns - due_ns < config::UNSEEN_INPUT_MAX_NS;
        let is_paused = self.paused.load(Ordering::Relaxed) && !is_direct;
        let receives = !is_paused && !self.life.is_closed();
        let had_nothing = self.kernel_had_nothing.swap(false, Ordering::Relaxed);
        if !is_due || !receives || has_ended {
            return None;
        }
        let socket = lock(&self.output).socket.clone()?;
        if socket.arrived_bytes().is_ok_and(|bytes| bytes > 0) {
            return Some(now_ns.saturating_add(config::UNSEEN_INPUT_NS));
        }
        if had_nothing {
            return None;
        }
        self.kernel_had_nothing.store(true, Ordering::Relaxed);
        // Only a pass that begins after now lets a timer of this time fire.
        Some(now_ns + 1)
    }

    /// The time of the last activity, when the idle timeout is due. `None`: the connection is idle.
    /// Some activity is not recorded as it happens: a handler that computes, and a peer that takes
    /// bytes which the kernel accepted earlier.
    fn last_moved(self: &Arc<Self>, now_ns: u64) -> Option<u64> {
        if self.life.is_closed() {
            if self.timeouts.lingers_too_long(now_ns) {
                return None;
            }
        } else if self.is_occupied() || matches!(lock(&self.input).dial, Dial::Begun) {
            return Some(now_ns);
        }
        let moved_ns = now_ns.saturating_sub(self.taken_ago()?.as_nanos() as u64);
        (self.idle_timeout.end_after(moved_ns) > now_ns).then_some(moved_ns)
    }

    /// How long ago the peer took bytes. `None`: the peer has taken none since the last call.
    pub(super) fn taken_ago(&self) -> Option<Duration> {
        let socket = lock(&self.output).socket.clone()?;
        let taken = socket.taken_by_peer().ok()?;
        self.timeouts.note_taken(taken.mark).then_some(taken.age)
    }

    fn count_run(&self) {
        self.remote.counters.add(|counters| &counters.handler_runs, 1);
    }
}
