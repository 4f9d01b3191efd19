//! What the poller calls: completions, timers, and what it runs for the connection.
//!
//! On the poller's thread, but for what a poller that is held up is relieved of: `run_elsewhere`
//! and `send_here`; and for the runs that tasks begin or give up. User code runs in `on_attached`,
//! `begin`, `begin_in_task`, `give_up`, `act` and `go_on`, and in what `send_here` wakes.

use std::io;
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use super::Connection;
use super::handle::Handle;
use super::here;
use super::input::{End, Handed, Input};
use super::output::{Ending, Output};
use super::run::{self, InTask, Polling, RunEnd, take_on};
use super::shared::{BOTH, Remote, Shared};
use super::spare;
use super::state::Kind;
use crate::buffer::{Chain, Spent};
use crate::clock::now_ns;
use crate::config;
use crate::poller::timers::NEVER;
use crate::poller::{Action, Batch, Command, Endpoint, Flow, Received, Side, Token};
use crate::sync::atomic::Ordering;
use crate::sync::{MutexGuard, lock};
use crate::task::{self, Run, Tried};
use crate::user_code;

impl Endpoint for Shared {
    type Handed = Handed;

    fn enter_poller(remote: &Arc<Remote>) {
        here::enter(remote);
    }

    fn token(&self) -> Token {
        Token::from_bits(self.token.load(Ordering::Relaxed))
    }

    fn receives_at_once(&self) -> usize {
        // So that the input ends up at less than half above its mark.
        self.limits.input_high_bytes / 2
    }

    fn on_attached(self: &Arc<Self>, token: Token, batch: &mut Batch<Shared>) -> bool {
        self.token.store(token.bits(), Ordering::Relaxed);
        if self.life.is_closed() {
            // Bytes submitted before the close are still to be sent. A close that is under way on
            // another thread will linger, or will send `Command::Remove`.
            return lock(&self.output).ending != Ending::Ended;
        }
        if let Some(service) = &self.service {
            if service.hooks.is_draining() {
                // Accepted while the server began to shut down, and too late to be looked at by it.
                return false;
            }
            let handle = Handle::of(self);
            let accepted = user_code::call("on_prepare", || service.hooks.prepare(&handle).is_ok());
            if !accepted.unwrap_or(false) || self.life.is_closed() {
                return false;
            }
            if service.connect.is_some() {
                let handed = lock(&self.input).start(Kind::Connect);
                batch.start(self, handed);
            }
        }
        if self.idle_timeout.is_set() {
            self.timeouts.touch(batch.now_ns.max(now_ns()));
            self.arm(self.idle_at());
        }
        true
    }

    fn on_connected(self: &Arc<Self>, result: io::Result<()>, batch: &mut Batch<Shared>) {
        let mut input = lock(&self.input);
        input.connected = Some(result);
        batch.wakers.extend(input.take_waker());
    }

    #[inline(always)]
    fn on_received(self: &Arc<Self>, bytes: Received<'_>, batch: &mut Batch<Shared>) -> Flow {
        let mut input = lock(&self.input);
        // With the lock held: a close discards the input under it, after it has set the bit.
        if self.life.drops_input() {
            return Flow::Continue;
        }
        if self.idle_timeout.is_set() {
            // The round's clock is older: it was read before the wait that these bytes have ended.
            self.timeouts.touch(now_ns());
        }
        if !input.may_start() {
            return self.file(input, bytes, batch);
        }
        let handed = input.start_with(bytes, &self.remote.pool);
        self.took_arrivals();
        let is_full = handed.reader.len() >= self.limits.input_bytes_max(batch.share_bytes);
        if is_full {
            self.paused.store(true, Ordering::Relaxed);
        }
        drop(input);
        batch.start(self, handed);
        if is_full { Flow::Pause } else { Flow::Continue }
    }

    fn on_hung_up(self: &Arc<Self>, batch: &mut Batch<Shared>) {
        self.note_peer_gone(batch);
        let started = lock(&self.input).hang_up();
        if let Some(handed) = started {
            batch.start(self, handed);
        }
    }

    fn on_ended(self: &Arc<Self>, result: io::Result<()>, batch: &mut Batch<Shared>) {
        let end = match result {
            Ok(()) => End::Eof,
            Err(error) => {
                // A reset ends both directions.
                let mut spent = Spent::default();
                let mut output = lock(&self.output);
                output.fail(&error, &mut spent);
                if let Some(flusher) = output.take_flusher() {
                    flusher.file(self, batch);
                }
                if output.ending == Ending::Lingers {
                    batch.act(self, Action::End);
                }
                End::Failed(error.kind(), error.raw_os_error())
            }
        };
        self.note_end(end, batch);
    }

    fn take_output(&self) -> Option<Chain> {
        lock(&self.output).take_queue()
    }

    fn on_sent(self: &Arc<Self>, result: io::Result<usize>, batch: &mut Batch<Shared>) -> bool {
        if self.idle_timeout.is_set() {
            self.timeouts.touch(now_ns());
        }
        let mut spent = Spent::default();
        let mut output = lock(&self.output);
        if let Some(flusher) = output.on_sent(result, &mut spent) {
            flusher.file(self, batch);
        }
        self.sent.store(output.sent(), Ordering::Release);
        let has_more = output.has_queue();
        let end = self.after_sending(&output);
        drop(output);
        if let Some(end) = end {
            batch.act(self, end);
        }
        has_more
    }

    fn on_timer(self: &Arc<Self>, at_ns: u64, batch: &mut Batch<Shared>) -> Option<u64> {
        if !self.timeouts.armed().came_up(at_ns) || self.life.is_closed() && !self.lingers() {
            return None;
        }
        let now_ns = batch.now_ns;
        if self.has_unseen_input(now_ns) {
            let again_ns = now_ns.saturating_add(config::UNSEEN_INPUT_NS);
            return self.timeouts.armed().ask(again_ns).then_some(again_ns);
        }
        let (reader, read_at) = lock(&self.input).timer(now_ns);
        let (flusher, write_at) = lock(&self.output).timer(now_ns);
        batch.wakers.extend(reader);
        if let Some(flusher) = flusher {
            flusher.file(self, batch);
        }
        if self.idle_at() <= now_ns {
            match self.last_moved(now_ns) {
                Some(moved_ns) => self.timeouts.touch_at(moved_ns),
                None => {
                    batch.act(self, Action::Cut);
                    return None;
                }
            }
        }
        let next_ns = read_at.min(write_at).min(self.idle_at());
        (next_ns != NEVER && self.timeouts.armed().ask(next_ns)).then_some(next_ns)
    }

    fn is_armed(&self, at_ns: u64) -> bool {
        self.timeouts.armed().is_for(at_ns)
    }

    fn on_removed(self: &Arc<Self>) {
        // Also where the poller ends by itself: whoever waits must learn of it.
        self.life.close();
        let (unread, reader, finished) = {
            let mut input = lock(&self.input);
            input.removed = true;
            // What came in while somebody closed.
            let unread = self.life.drops_input().then(|| input.discard());
            let finished = !input.runs.is_held() && !self.life.is_detached();
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
    fn begin(self: &Arc<Self>, handed: Handed) -> Option<Run> {
        let service = self.service.as_ref()?;
        self.count_run();
        let (handler, executor) = (service.handler(handed.kind), &service.executor);
        let Some(here) = executor.here() else {
            executor.spawn_elsewhere(InTask::new(Arc::clone(self), handed));
            return None;
        };
        let connection = self.hand_out(handed);
        let polling = Polling::begin(self, self.owner());
        let began = user_code::call("handler", || {
            handler.begin(connection, executor.context(), self, here)
        });
        let outcome = match began {
            Some(Ok(outcome)) => outcome,
            Some(Err((run, wait))) => {
                user_code::call("handler", || drop(polling));
                return take_on(&self.remote, executor, run, wait);
            }
            None => Err(run::panicked(run::HANDLER)),
        };
        let has_returned = polling.end();
        if has_returned && outcome.is_ok() && self.rest() {
            return None;
        }
        user_code::call("handler", || self.end_run(outcome.err(), has_returned));
        None
    }

    #[cold]
    fn give_up(self: &Arc<Self>, handed: Handed) {
        let Handed { reader, writer, .. } = handed;
        user_code::call("handler", || {
            self.release(BOTH, Some(reader), writer);
            self.end_run(Some(run::given_up(run::HANDLER)), false);
        });
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

    fn go_on(self: &Arc<Self>, mut run: Run) -> Option<Run> {
        let service = self.service.as_ref()?;
        let kept = user_code::call("handler", || {
            match task::try_poll(self.owner(), |cx| run.as_mut().poll(cx)) {
                Tried::Done(()) => None,
                Tried::Waits(wait) => take_on(&self.remote, &service.executor, run, wait),
            }
        });
        kept.flatten()
    }

    fn is_movable(&self) -> bool {
        self.service.as_ref().is_some_and(|service| service.executor.workers().is_some())
    }

    fn run_elsewhere(self: Arc<Self>, handed: Handed) {
        let Some(service) = self.service.clone() else { return };
        self.count_run();
        service.executor.spawn_elsewhere(InTask::new(self, handed));
    }

    fn send_here(self: &Arc<Self>, first: Chain) {
        if self.idle_timeout.is_set() {
            self.timeouts.touch(now_ns());
        }
        let mut spent = Spent::default();
        let (flusher, ask, end) = {
            let mut output = lock(&self.output);
            let (flusher, ask) = output.send_queue(first, &mut spent, &self.remote.counters);
            self.sent.store(output.sent(), Ordering::Release);
            (flusher, ask, self.after_sending(&output))
        };
        if let Some(flusher) = flusher {
            flusher.wake(self);
        }
        match end {
            Some(Action::End) => self.act(Action::End),
            // Only the thread that files bytes can tell that there are none.
            Some(other) => self.remote.send(Command::Act(Arc::clone(self), other)),
            None => {}
        }
        if ask {
            self.remote.send(Command::Send(Arc::clone(self)));
        }
    }

    fn close(self: &Arc<Self>) {
        Shared::close(self);
    }

    fn cut(self: &Arc<Self>) {
        Shared::cut(self);
    }

    fn unread_bytes(&self) -> usize {
        lock(&self.input).buffered_bytes()
    }

    fn take_flushed(into: &mut Vec<(Token, Chain)>) {
        here::take_flushed(into);
    }
}

impl Shared {
    /// What is to happen once these bytes are sent, if that is all.
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

    /// Whether a timer is due although the kernel holds bytes that would satisfy its wait. This
    /// happens after the poller was held up, or when the ring has no free receive buffer.
    fn has_unseen_input(&self, now_ns: u64) -> bool {
        let (read_ns, has_ended) = {
            let input = lock(&self.input);
            (input.until_ns(), input.end.is_some())
        };
        let due_ns = read_ns.min(self.idle_at());
        let is_due = due_ns <= now_ns && now_ns - due_ns < config::UNSEEN_INPUT_MAX_NS;
        let receives = !self.paused.load(Ordering::Relaxed) && !self.life.is_closed();
        if !is_due || !receives || has_ended {
            return false;
        }
        let socket = lock(&self.output).socket.clone();
        socket.is_some_and(|socket| socket.arrived_bytes().is_ok_and(|bytes| bytes > 0))
    }

    /// The last activity, where the idle timeout is due although no activity was recorded: a
    /// handler is running, or the peer has taken bytes that the kernel accepted earlier. `None`:
    /// idle.
    fn last_moved(self: &Arc<Self>, now_ns: u64) -> Option<u64> {
        if self.life.is_closed() {
            if self.timeouts.lingers_too_long(now_ns) {
                return None;
            }
        } else if self.is_occupied() {
            return Some(now_ns);
        }
        let moved_ns = now_ns.saturating_sub(self.taken_ago()?.as_nanos() as u64);
        (self.idle_timeout.end_after(moved_ns) > now_ns).then_some(moved_ns)
    }

    /// How long ago the peer has taken bytes, if it has since this was last asked.
    pub(super) fn taken_ago(&self) -> Option<Duration> {
        let socket = lock(&self.output).socket.clone()?;
        let taken = socket.taken_by_peer().ok()?;
        self.timeouts.note_taken(taken.mark).then_some(taken.age)
    }

    /// Takes in bytes for a reader that is out.
    #[inline(never)]
    fn file(
        self: &Arc<Self>,
        mut input: MutexGuard<'_, Input>,
        bytes: Received<'_>,
        batch: &mut Batch<Shared>,
    ) -> Flow {
        let filed = input.file(bytes, &self.remote.pool, &self.limits, batch.share_bytes);
        self.has_arrivals.store(true, Ordering::Release);
        if filed.pause {
            self.paused.store(true, Ordering::Relaxed);
        }
        drop(input);
        self.follow(filed, batch)
    }

    #[inline]
    fn count_run(&self) {
        self.remote.counters.add(|counters| &counters.handler_runs, 1);
    }

    /// Begins a run inside of a task. What is left of it is returned.
    pub(super) fn begin_in_task(
        self: Arc<Self>,
        handed: Handed,
        task: &mut Context<'_>,
    ) -> Option<Run> {
        let service = self.service.clone()?;
        let (handler, executor) = (service.handler(handed.kind), &service.executor);
        let connection = self.hand_out(handed);
        handler.begin_in_task(connection, executor.context(), RunEnd::new(self), task)
    }

    /// The connection, as a run has it: with all that came since it started.
    #[inline(always)]
    fn hand_out(self: &Arc<Self>, handed: Handed) -> Connection {
        let Handed { mut reader, writer, kind } = handed;
        if let Some(after) = self.limits.request_timeout
            && kind == Kind::Request
        {
            self.timeouts.start_request(after);
        }
        let mut writer = writer.unwrap_or_else(spare::writer);
        if self.life.drops_input() {
            // Closed since the run started: its handler is to find that, and not to serve a request
            // that cannot be answered any more.
            (reader, writer) = (spare::reader(), spare::writer());
        } else if self.has_arrivals() {
            self.refill(&mut reader, 0);
        }
        Connection::handed_out(Arc::clone(self), reader, writer)
    }
}
