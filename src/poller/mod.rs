//! A poller: one thread, one backend, the connections in its slots.
//!
//! Each round collects everything that has arrived into the connections, and only then runs what
//! they asked for: so a handler sees all its bytes, and its output leaves as one gathered send.
//! Nothing here blocks but the backend's wait.
//!
//! ```text
//! wait: completions → endpoints → batch → timers → batch: wake-ups, handlers
//!       → commands, if there are any, and what they ask to run → wait …
//! ```

mod alarm;
pub(crate) mod commands;
mod endpoint;
pub(crate) mod group;
mod inner;
mod memory;
mod ready;
mod slots;
mod spin;
pub(crate) mod timers;

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use crate::buffer::Chain;
use crate::clock::now_ns;
use crate::config;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::sys::{Backend, time_slice};
use crate::user_code;

pub(crate) use crate::sys::socket::{Side, Socket};
pub(crate) use crate::sys::{Flow, Outlet, Received, Token};
pub(crate) use alarm::Alarm;
pub(crate) use commands::{Command, Remote};
pub(crate) use endpoint::{Accept, Action, Batch, Endpoint, Watcher};
use inner::{Core, Held, Slot};
use memory::Budget;
use ready::{Flushed, Job};
use slots::Slots;
use spin::Spin;
use timers::{NEVER, Timers, Whom};

/// One poller thread's own data.
pub(crate) struct Poller<B, E: Endpoint> {
    backend: B,
    core: Core<E>,
    spin: Spin,
    commands: Vec<Command<E>>,
    /// Flushed by the handlers of a batch; empty between batches.
    flushed: Vec<(Token, Chain)>,
    /// The same, where others could have taken it.
    taken_over: Flushed<E>,
    stopping: bool,
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
            core: Core {
                remote,
                slots: Slots::new(),
                leaving: HashMap::new(),
                timers: Timers::new(),
                batch: Batch::new(),
                resend: Vec::new(),
                completions: 0,
                pass_began_ns: None,
                looked_ns: 0,
                budget,
            },
            spin,
            commands: Vec::new(),
            flushed: Vec::new(),
            taken_over: Vec::new(),
            stopping: false,
        })
    }

    /// Runs until told to stop and everything is closed, or until it fails: then those who depend
    /// on it are told why.
    pub(crate) fn run(mut self) {
        time_slice::ask_for_time_slice(config::TURN);
        E::enter_poller(&self.core.remote);
        self.core.remote.counters.own();
        self.core.remote.ready.own(&self.core.batch.open);
        // Blocks that come and go on this thread, the usual case, do so without an atomic
        // operation.
        let _attached = self.core.remote.pool.clone().attach();
        match user_code::call("poller", || self.rounds()) {
            Some(Ok(())) => {}
            // EBADF or EINVAL: the backend itself is broken, and waiting again would spin.
            Some(Err(error)) => self.core.remote.fail(&format!("its backend cannot wait: {error}")),
            None => self.core.remote.fail("it panicked"),
        }
        self.end();
    }

    fn rounds(&mut self) -> io::Result<()> {
        while !self.stopping || self.core.slots.count() > 0 {
            self.wait()?;
            self.core.remote.ready.turn();
            self.core.fire_timers(&mut self.backend);
            self.resend();
            self.run_batch();
            // After what has arrived, whose wake-ups and handlers may wait for nothing else.
            if !self.commands.is_empty() {
                self.obey_all();
                self.run_batch();
            }
        }
        Ok(())
    }

    /// Abandons what the poller still holds: collected wakers and runs, commands, and all slots.
    /// After an orderly stop, only late commands are left; after a failure, any of these.
    fn end(self) {
        let Core { remote, mut slots, leaving, mut batch, .. } = self.core;
        user_code::wake_all(batch.wakers.drain(..));
        remote.ready.steal().into_iter().chain(batch.jobs.drain(..)).for_each(Job::abandon);
        let rest = remote.inbox().close();
        for command in self.commands.into_iter().chain(rest) {
            command.abandon();
        }
        for slot in slots.drain() {
            match slot {
                Slot::Endpoint(held) => {
                    held.endpoint.on_removed();
                    user_code::discard(held.kept);
                }
                Slot::Listener(listener) => listener.on_removed(),
            }
        }
        leaving.into_values().for_each(user_code::discard);
    }

    /// Waits for events: spinning first where that pays, then asleep. Leaves the commands that came
    /// meanwhile in `commands`.
    fn wait(&mut self) -> io::Result<()> {
        self.core.completions = 0;
        self.core.tidy_memory();
        if self.spin.is_enabled() && self.spin()? {
            self.core.remote.inbox().take(&mut self.commands);
            self.core.read_clock();
            return Ok(());
        }
        let began_ns = self.spin.is_enabled().then(now_ns);
        let sleep = self.core.remote.inbox().prepare_sleep(&mut self.commands);
        let timeout = if sleep { self.core.due_in() } else { Some(Duration::ZERO) };
        let waited = self.poll_backend(timeout);
        if sleep {
            self.core.remote.inbox().take(&mut self.commands);
        }
        if let Some(began_ns) = began_ns {
            self.spin.record_sleep(now_ns() - began_ns);
        }
        self.core.read_clock();
        waited
    }

    /// Calls the backend's `wait` once. A pass covers every event that was ready when the pass
    /// began, and may take several calls. After a complete pass, timers that were due when the
    /// pass began may fire: input that arrived before them has been received.
    fn poll_backend(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let core = &mut self.core;
        let began_ns = *core.pass_began_ns.get_or_insert(core.batch.now_ns);
        if self.backend.wait(timeout, core)? {
            self.core.looked_ns = began_ns;
            self.core.pass_began_ns = None;
        }
        Ok(())
    }

    /// Looks for work without sleeping, as long as it pays. `true`: there is some.
    fn spin(&mut self) -> io::Result<bool> {
        let due_ns = self.core.due_in().map_or(NEVER, |due| due.as_nanos() as u64);
        let budget_ns = self.spin.budget_ns();
        if budget_ns == 0 {
            return Ok(false);
        }
        let began_ns = now_ns();
        loop {
            self.core.remote.ready.turn();
            self.poll_backend(Some(Duration::ZERO))?;
            let spun_ns = now_ns() - began_ns;
            let counters = &self.core.remote.counters;
            if self.core.completions > 0 || !self.core.remote.inbox().is_empty() {
                counters.spins_won.add_owned(1);
                self.spin.record(true, spun_ns);
                return Ok(true);
            }
            if spun_ns >= due_ns {
                return Ok(true);
            }
            if spun_ns >= budget_ns {
                counters.spins_lost.add_owned(1);
                self.spin.record(false, spun_ns);
                return Ok(false);
            }
        }
    }

    /// Runs what was collected, and passes on what that has flushed.
    fn run_batch(&mut self) {
        self.core.run_batch();
        if let Outlet::Poller = self.core.remote.outlet {
            E::take_flushed(&mut self.flushed);
            for (token, gather) in self.flushed.drain(..) {
                self.backend.send(token, gather);
            }
            // Also where nobody watches any more: somebody may have when they were flushed.
            self.core.remote.ready.take_flushed(&mut self.taken_over);
            for (endpoint, gather) in self.taken_over.drain(..) {
                self.backend.send(endpoint.token(), gather);
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
        let core = &mut self.core;
        match command {
            Command::Run(runnable, workers) => core.batch.push(Job::Poll(runnable, workers)),
            Command::Again(endpoint, handed) => core.batch.push(Job::Begin(endpoint, handed)),
            Command::Continue(endpoint) => core.batch.go_ons.push(endpoint),
            Command::Act(endpoint, action) => core.batch.push(Job::Act(endpoint, action)),
            Command::Attach(endpoint, socket) => {
                let at_once = endpoint.receives_at_once();
                if let Some(token) = self.insert(endpoint)
                    && let Err(error) = self.backend.attach(token, socket, at_once)
                {
                    tracing::warn!(%error, "attach connection");
                    self.refuse(token);
                }
            }
            Command::Connect(endpoint, socket, peer) => {
                let at_once = endpoint.receives_at_once();
                if let Some(token) = self.insert(endpoint) {
                    self.backend.connect(token, socket, &peer, at_once);
                }
            }
            Command::Listen(listener, socket) => self.listen(listener, socket),
            Command::Unlisten(listener) => {
                let found = core.slots.iter().find_map(|(token, slot)| match slot {
                    Slot::Listener(other) if Arc::ptr_eq(other, &listener) => Some(token),
                    _ => None,
                });
                if let Some(token) = found {
                    self.backend.remove(token);
                }
            }
            Command::Send(endpoint) => self.send(&endpoint),
            Command::Resume(endpoint) => self.backend.resume(endpoint.token()),
            Command::Timer(endpoint, at_ns) => {
                core.timers.arm(at_ns, Whom::Slot(endpoint.token()));
                core.sweep_timers();
                core.count_timers();
            }
            Command::WakeAt(at_ns, bell) => {
                if !bell.is_dead() {
                    core.timers.arm(at_ns, Whom::Bell(bell));
                }
                core.sweep_timers();
                core.count_timers();
            }
            Command::Remove(endpoint) => {
                let token = endpoint.token();
                match core.slots.get(token) {
                    Some(Slot::Endpoint(held)) if Arc::ptr_eq(&held.endpoint, &endpoint) => {
                        self.backend.remove(token)
                    }
                    _ => endpoint.on_removed(),
                }
            }
            Command::Visit(mut visit) => {
                for (_, slot) in core.slots.iter() {
                    if let Slot::Endpoint(held) = slot {
                        visit(&held.endpoint);
                    }
                }
            }
            Command::Stop => self.stop(),
        }
    }

    /// Gives the endpoint a slot, unless it or the poller's end refuses.
    fn insert(&mut self, endpoint: Arc<E>) -> Option<Token> {
        let held = Held { endpoint: Arc::clone(&endpoint), kept: None };
        let token = self.core.slots.insert(Slot::Endpoint(held));
        if self.stopping || !endpoint.on_attached(token, &mut self.core.batch) {
            self.refuse(token);
            return None;
        }
        Some(token)
    }

    fn refuse(&mut self, token: Token) {
        if let Some(Slot::Endpoint(held)) = self.core.slots.get(token) {
            held.endpoint.close();
            self.core.removed(token);
        }
    }

    fn listen(&mut self, listener: Arc<dyn Accept>, socket: Arc<Socket>) {
        if self.stopping {
            return listener.on_removed();
        }
        let token = self.core.slots.insert(Slot::Listener(Arc::clone(&listener)));
        self.core.remote.listeners.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self.backend.listen(token, socket) {
            listener.on_failed(&error);
            self.backend.remove(token);
        }
    }

    fn send(&mut self, endpoint: &Arc<E>) {
        if let Some(gather) = endpoint.take_output() {
            self.backend.send(endpoint.token(), gather);
        }
    }

    fn resend(&mut self) {
        for index in 0..self.core.resend.len() {
            if let Some(Slot::Endpoint(held)) = self.core.slots.get(self.core.resend[index]) {
                let endpoint = Arc::clone(&held.endpoint);
                self.send(&endpoint);
            }
        }
        self.core.resend.clear();
    }

    fn stop(&mut self) {
        self.stopping = true;
        for (token, slot) in self.core.slots.iter() {
            match slot {
                Slot::Endpoint(held) => held.endpoint.cut(),
                Slot::Listener(_) => self.backend.remove(token),
            }
        }
    }
}
