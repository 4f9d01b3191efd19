//! A poller: one thread, one backend, the connections in its slots.
//!
//! Each round first files everything that has arrived into the connections, and then runs the work
//! that the connections ask for. So a handler sees all bytes that have arrived, and its output is
//! sent with one call. Only the backend's wait blocks.
//!
//! ```text
//! outbox → backend; wait: completions → endpoints; timers → endpoints
//!        → run the round: wake-ups, freed slots, kept runs, jobs
//!        → commands, and the jobs they add → outbox …
//! ```

mod alarm;
mod command;
mod dispatch;
mod endpoint;
pub(crate) mod group;
mod job;
mod mailbox;
mod memory;
mod relief;
mod remote;
mod slots;
pub(crate) mod timers;

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use crate::clock::now_ns;
use crate::config;
use crate::spin::Spin;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::sys::{Backend, time_slice};
use crate::user_code;

pub(crate) use crate::sys::socket::{Side, Socket};
pub(crate) use crate::sys::{Completion, Flow, Outlet, Received, Token};
pub(crate) use alarm::Alarm;
pub(crate) use command::{Command, Visit};
use dispatch::{Dispatcher, Owner, Slot};
pub(crate) use endpoint::{Accept, Action, Attached, Endpoint, Reaction, Receipt, Watcher};
pub(crate) use job::Job;
use memory::Budget;
use remote::Parcel;
pub(crate) use remote::Remote;
use timers::{NEVER, Whom};

/// The data of one poller thread.
pub(crate) struct Poller<B, E: Endpoint> {
    backend: B,
    dispatcher: Dispatcher<E>,
    spin: Spin,
    /// Empty between rounds, as is `outbox`.
    commands: Vec<Command<E>>,
    outbox: Vec<Parcel<E>>,
    /// When the current pass over the kernel's events began. `None`: no pass is under way.
    pass_began_ns: Option<u64>,
    /// How many passes are complete.
    passes: u64,
    /// Visits, each with the value of `passes` at which it is due.
    visits: VecDeque<(u64, Visit<E>)>,
    is_stopping: bool,
}

impl<B: Backend, E: Endpoint> Poller<B, E> {
    fn new(
        remote: Arc<Remote<E>>,
        spin: Spin,
        budget: Budget,
        options: &B::Options,
    ) -> io::Result<Poller<B, E>> {
        let backend = B::new(remote.wake_handle(), &remote.pool, &remote.counters, options)?;
        Ok(Poller {
            backend,
            dispatcher: Dispatcher::new(remote, budget),
            spin,
            commands: Vec::new(),
            outbox: Vec::new(),
            pass_began_ns: None,
            passes: 0,
            visits: VecDeque::new(),
            is_stopping: false,
        })
    }

    /// Runs the loop. The loop ends when `Command::Stop` was obeyed and all slots are free, or when
    /// the poller fails. The poller's watchers are told of a failure.
    pub(crate) fn run(mut self) {
        time_slice::ask_for_time_slice(config::TIME_SLICE);
        let remote = Arc::clone(&self.dispatcher.remote);
        remote.enter();
        remote.relief.enter();
        remote.counters.own();
        // On this thread, taking and returning a block needs no atomic operation.
        let _attached = remote.pool.clone().attach();
        match user_code::call("poller", || self.rounds()) {
            Some(Ok(())) => {}
            // EBADF or EINVAL: the backend itself is broken, and waiting again would spin.
            Some(Err(error)) => remote.fail(&format!("its backend cannot wait: {error}")),
            None => remote.fail("it panicked"),
        }
        self.end();
    }

    fn rounds(&mut self) -> io::Result<()> {
        while !self.is_stopping || self.dispatcher.slots.count() > 0 {
            self.wait()?;
            self.dispatcher.remote.relief.count_progress();
            self.dispatcher.fire_timers(&mut self.backend);
            let has_woken = !self.dispatcher.round.wakers.is_empty();
            self.dispatcher.run_round();
            self.make_visits();
            // Commands come last, so they do not delay the wake-ups and handlers of received bytes.
            for _ in 0..config::COMMAND_PASSES_MAX {
                if has_woken && self.commands.is_empty() {
                    // Tasks of this poller that the round has woken run before the next wait.
                    self.dispatcher.remote.mailbox().take_commands(&mut self.commands);
                }
                if self.commands.is_empty() {
                    break;
                }
                self.obey_all();
                self.dispatcher.run_round();
            }
        }
        Ok(())
    }

    /// Abandons everything that the poller still holds: collected wakers and jobs, commands, all
    /// slots, and the tasks that wait. After an orderly stop, the slots are free.
    fn end(self) {
        let Dispatcher { remote, mut slots, leaving, mut round, .. } = self.dispatcher;
        user_code::wake_all(round.wakers.drain(..));
        round.removed.drain(..).for_each(Owner::tell_removed);
        remote.relief.take_jobs().into_iter().chain(round.jobs.drain(..)).for_each(Job::abandon);
        // A task that is dropped may wake another one. The mailbox is open, so that one is dropped
        // after the first, and not inside its drop: a chain of them would take all of the stack.
        remote.tasks.end();
        let mut commands = self.commands;
        loop {
            commands.drain(..).for_each(Command::abandon);
            remote.mailbox().take_commands(&mut commands);
            if commands.is_empty() {
                break;
            }
        }
        let (rest, outbox) = remote.mailbox().close();
        rest.into_iter().for_each(Command::abandon);
        user_code::discard(outbox);
        for slot in slots.drain() {
            match slot {
                Slot::Endpoint(held) => {
                    held.endpoint.on_removed();
                    user_code::discard(held.kept);
                }
                Slot::Listener(listener) => listener.on_removed(),
            }
        }
        leaving.into_values().for_each(|held| user_code::discard(held.kept));
    }

    /// Sends the bytes of the outbox, then waits for completions: first by spinning if that pays,
    /// then asleep. Puts commands that came meanwhile into `commands`.
    fn wait(&mut self) -> io::Result<()> {
        self.dispatcher.round.completions = 0;
        self.dispatcher.tidy_memory(&mut self.backend);
        self.send_outbox();
        // A visit waits for the end of a pass, not for an event.
        let may_rest = self.visits.is_empty();
        if may_rest && self.spin.is_enabled() && self.spin()? {
            self.dispatcher.remote.mailbox().take_commands(&mut self.commands);
            self.dispatcher.read_clock();
            return Ok(());
        }
        let began_ns = self.spin.is_enabled().then(now_ns);
        let mailbox = self.dispatcher.remote.mailbox();
        let sleeps = may_rest && mailbox.prepare_sleep(&mut self.commands);
        if !may_rest {
            mailbox.take_commands(&mut self.commands);
        }
        let timeout = if sleeps { self.dispatcher.due_in() } else { Some(Duration::ZERO) };
        let waited = self.poll_backend(timeout);
        if sleeps {
            self.dispatcher.remote.mailbox().take_commands(&mut self.commands);
        }
        if let Some(began_ns) = began_ns {
            self.spin.record_sleep(now_ns() - began_ns);
        }
        self.dispatcher.read_clock();
        waited
    }

    fn send_outbox(&mut self) {
        self.dispatcher.remote.mailbox().take_outbox(&mut self.outbox);
        for (endpoint, bytes) in self.outbox.drain(..) {
            self.backend.send(endpoint.token(), bytes);
        }
    }

    /// Calls the backend's `wait` once. A pass covers every event that was ready when the pass
    /// began, and may take several calls. After a complete pass, timers that were due when the
    /// pass began may fire: input that arrived before them has been received.
    fn poll_backend(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let began_ns = *self.pass_began_ns.get_or_insert(self.dispatcher.now_ns);
        if self.backend.wait(timeout, &mut self.dispatcher)? {
            self.dispatcher.looked_ns = began_ns;
            self.pass_began_ns = None;
            self.passes += 1;
        }
        Ok(())
    }

    /// Polls for work without sleeping while that pays. `true`: the poller must not sleep now.
    fn spin(&mut self) -> io::Result<bool> {
        let due_ns = self.dispatcher.due_in().map_or(NEVER, |due| due.as_nanos() as u64);
        let budget_ns = self.spin.budget_ns();
        if budget_ns == 0 {
            return Ok(false);
        }
        let began_ns = now_ns();
        loop {
            self.dispatcher.remote.relief.count_progress();
            self.poll_backend(Some(Duration::ZERO))?;
            let spun_ns = now_ns() - began_ns;
            let remote = &self.dispatcher.remote;
            if self.dispatcher.round.completions > 0 || !remote.mailbox().is_empty() {
                remote.counters.spins_won.add_owned(1);
                self.spin.record(true, spun_ns);
                return Ok(true);
            }
            if spun_ns >= due_ns {
                return Ok(true);
            }
            if spun_ns >= budget_ns {
                remote.counters.spins_lost.add_owned(1);
                self.spin.record(false, spun_ns);
                return Ok(false);
            }
        }
    }

    fn obey_all(&mut self) {
        let mut commands = std::mem::take(&mut self.commands);
        for command in commands.drain(..) {
            self.obey(command);
        }
        self.commands = commands;
    }

    fn obey(&mut self, command: Command<E>) {
        let dispatcher = &mut self.dispatcher;
        match command {
            Command::Run(job) => dispatcher.round.jobs.push(job),
            Command::Continue(endpoint) => dispatcher.round.continues.push(endpoint.token()),
            Command::Attach(endpoint, socket) => {
                if let Some((token, at_once_bytes)) = self.attach(&endpoint)
                    && let Err(error) = self.backend.attach(token, socket, at_once_bytes)
                {
                    user_code::log(|| tracing::warn!(%error, "attach connection"));
                    self.dispatcher.refuse(token);
                }
            }
            Command::Connect(endpoint, socket, peer) => {
                if let Some((token, at_once_bytes)) = self.attach(&endpoint) {
                    self.backend.connect(token, socket, &peer, at_once_bytes);
                }
            }
            Command::Listen(listener, socket) => self.listen(listener, socket),
            Command::Unlisten(listener) => {
                let found = dispatcher.slots.iter().find_map(|(token, slot)| match slot {
                    Slot::Listener(other) if Arc::ptr_eq(other, &listener) => Some(token),
                    _ => None,
                });
                if let Some(token) = found {
                    self.backend.remove(token);
                }
            }
            Command::Resume(endpoint) => self.backend.resume(endpoint.token()),
            Command::WatchReadable(endpoint, number) => {
                self.backend.watch_readable(endpoint.token(), number);
            }
            Command::Timer(endpoint, at_ns) => {
                dispatcher.arm(at_ns, Whom::Slot(endpoint.token()));
            }
            Command::WakeAt(_, bell) if bell.is_dead() => drop(bell),
            Command::WakeAt(at_ns, bell) => dispatcher.arm(at_ns, Whom::Bell(bell)),
            Command::Remove(endpoint) => {
                let token = endpoint.token();
                match dispatcher.slots.get(token) {
                    Some(Slot::Endpoint(held)) if Arc::ptr_eq(&held.endpoint, &endpoint) => {
                        self.backend.remove(token)
                    }
                    _ => endpoint.on_removed(),
                }
            }
            Command::Visit(visit) => dispatcher.visit(visit),
            Command::VisitLater(visit) => {
                // A pass that is under way has looked at some events already.
                let passes = if self.pass_began_ns.is_some() { 2 } else { 1 };
                self.visits.push_back((self.passes + passes, visit));
            }
            Command::Stop => self.stop(),
        }
    }

    /// Makes the visits that are due. Called after the round, so every run that their passes began
    /// is active or over.
    fn make_visits(&mut self) {
        let is_due = |(passes, _): &(u64, Visit<E>)| *passes <= self.passes;
        while self.visits.front().is_some_and(is_due)
            && let Some((_, visit)) = self.visits.pop_front()
        {
            self.dispatcher.visit(visit);
        }
    }

    /// Gives the endpoint a slot, unless the poller is stopping or the endpoint refuses.
    fn attach(&mut self, endpoint: &Arc<E>) -> Option<(Token, usize)> {
        if self.is_stopping {
            endpoint.act(Action::Close);
            endpoint.on_removed();
            return None;
        }
        self.dispatcher.attach(endpoint)
    }

    fn listen(&mut self, listener: Arc<dyn Accept>, socket: Arc<Socket>) {
        if self.is_stopping {
            return listener.on_removed();
        }
        let token = self.dispatcher.slots.insert(Slot::Listener(Arc::clone(&listener)));
        self.dispatcher.remote.listeners.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self.backend.listen(token, socket) {
            listener.on_failed(&error);
            self.backend.remove(token);
        }
    }

    fn stop(&mut self) {
        self.is_stopping = true;
        for (token, slot) in self.dispatcher.slots.iter() {
            match slot {
                Slot::Endpoint(held) => held.endpoint.act(Action::Cut),
                Slot::Listener(_) => self.backend.remove(token),
            }
        }
    }
}
