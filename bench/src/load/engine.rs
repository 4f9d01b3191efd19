//! The loop that drives all connections: warm-up, the measured window, drain.
//!
//! One thread owns everything. Every wait has an end: the phase's, or that of the server's
//! patience.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use crate::error::{Failure, Result};
use crate::host::steal::StealWatch;
use crate::load::client::Client;
use crate::load::dice::Dice;
use crate::load::tally::{DRAIN_MAX, DRAIN_PATIENCE, Pace, Tally, no_reply_in, still_open};
use crate::load::windows::Windows;
use crate::load::{Observer, Outcome, Plan, dial, grpc};
use crate::rpc::Protocol;
use crate::signals;
use crate::wire::Template;

/// Opens the connections, sends, measures, and closes.
pub(crate) fn run(plan: &Plan, observer: &mut dyn Observer) -> Result<Outcome> {
    if plan.protocol == Protocol::Grpc {
        return grpc::run(plan, observer);
    }
    let (active, idle) = dial::open_all(plan)?;
    let mut engine = Engine::new(plan, active)?;
    let watch = engine.start()?;
    engine.run_until(plan.warmup, &watch)?;
    observer.on_window_open();
    engine.open_window();
    let opened = engine.started.elapsed();
    engine.run_until(opened + plan.duration, &watch)?;
    engine.run_until_some_reply()?;
    let elapsed = engine.started.elapsed() - opened;
    let windows = engine.close_window()?;
    observer.on_window_close();
    engine.drain()?;
    engine.check_idle(&idle);
    let reply_bytes = engine.template.reply_bytes() as u64;
    engine.tally.outcome(elapsed, reply_bytes, windows.finish(watch.finish()))
}

struct Engine<'a> {
    plan: &'a Plan,
    template: Template,
    epoll: OwnedFd,
    /// `None`: lost.
    clients: Vec<Option<Client>>,
    open_count: usize,
    blocked: Vec<bool>,
    started: Instant,
    pace: Option<Pace>,
    dice: Dice,
    stopping: bool,
    events: Vec<Event>,
    input: Vec<u8>,
    output: Vec<u8>,
    tally: Tally,
    last_reply: Instant,
}

impl<'a> Engine<'a> {
    fn new(plan: &'a Plan, fds: Vec<OwnedFd>) -> Result<Engine<'a>> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(failed("create an epoll"))?;
        for (index, fd) in fds.iter().enumerate() {
            epoll::add(&epoll, fd, EventData::new_u64(index as u64), EventFlags::IN)
                .map_err(failed("watch a connection"))?;
        }
        let client = |(fd, number)| Some(Client::new(fd, number, plan.unordered));
        let clients: Vec<_> = fds.into_iter().zip(0..).map(client).collect();
        if plan.rate.is_some() {
            // Waits for the next due request shall end when they end, not 50 µs later. Without it
            // they are late.
            let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        }
        Ok(Engine {
            plan,
            template: Template::of(plan.protocol, plan.payload_bytes),
            epoll,
            open_count: clients.len(),
            blocked: vec![false; clients.len()],
            clients,
            started: Instant::now(),
            pace: plan.rate.map(Pace::new),
            dice: Dice::new(plan.heavy_percent, plan.seed),
            stopping: false,
            events: Vec::with_capacity(EVENTS_MAX),
            input: vec![0; INPUT_BYTES],
            output: Vec::with_capacity(INPUT_BYTES),
            tally: Tally::new()?,
            last_reply: Instant::now(),
        })
    }

    /// Sends the first requests. The watch has the engine's clock.
    fn start(&mut self) -> Result<StealWatch> {
        self.started = Instant::now();
        self.last_reply = self.started;
        let watch = StealWatch::start(&self.plan.watched_cpus, self.started)?;
        if self.pace.is_none() {
            (0..self.clients.len()).for_each(|index| self.pump(index));
        }
        Ok(watch)
    }

    fn open_window(&mut self) {
        self.tally.open_window(self.started.elapsed().as_nanos() as u64);
    }

    fn close_window(&mut self) -> Result<Windows> {
        self.stopping = true;
        self.clients.iter_mut().flatten().for_each(Client::forget_scheduled);
        self.tally.close_window(self.started.elapsed().as_nanos() as u64)
    }

    /// Runs until that much time has passed since the start, or the window has all its replies.
    fn run_until(&mut self, end: Duration, watch: &StealWatch) -> Result<()> {
        loop {
            let now = self.started.elapsed();
            let now_ns = now.as_nanos() as u64;
            self.tally.turn_window(now_ns, watch);
            if now >= end || self.tally.has_all(self.plan.requests_max) {
                return Ok(());
            }
            let due = self.send_due(now);
            self.check_alive()?;
            self.turn(due.map_or(end, |due| due.min(end)) - now)?;
        }
    }

    /// A window in which the server or the client got no CPU is no measurement: it stays open until
    /// one reply is in it. An open loop may have had nothing to ask for.
    fn run_until_some_reply(&mut self) -> Result<()> {
        while self.tally.is_empty() {
            self.send_due(self.started.elapsed());
            let mut open = self.clients.iter().flatten();
            if self.pace.is_some() && open.all(|client| client.unanswered() == 0) {
                return Ok(());
            }
            self.check_alive()?;
            self.turn(WAIT_MAX)?;
        }
        Ok(())
    }

    /// Lets the requests in flight come home, so that the server sees a close and not a reset.
    fn drain(&mut self) -> Result<()> {
        let begun = Instant::now();
        self.last_reply = begun;
        let patience = self.plan.timeout.min(DRAIN_PATIENCE);
        loop {
            let unanswered: usize = self.clients.iter().flatten().map(Client::unanswered).sum();
            if unanswered == 0 {
                return Ok(());
            }
            self.check_alive()?;
            if self.last_reply.elapsed() >= patience || begun.elapsed() >= DRAIN_MAX {
                return Err(still_open(unanswered, begun.elapsed()));
            }
            self.turn(WAIT_MAX)?;
        }
    }

    /// One wait, and everything it reported.
    fn turn(&mut self, wait_max: Duration) -> Result<()> {
        self.wait(wait_max)?;
        let replies_before = self.tally.replies();
        for index in 0..self.events.len() {
            let client = self.events[index].data.u64() as usize;
            self.receive(client);
            self.pump(client);
        }
        if self.tally.replies() > replies_before {
            self.last_reply = Instant::now();
        }
        Ok(())
    }

    fn wait(&mut self, wait_max: Duration) -> Result<()> {
        let mut wait = wait_max.min(WAIT_MAX);
        if self.pace.is_some() && wait < WAIT_MAX {
            // epoll waits in milliseconds on older kernels; ppoll has always known nanoseconds.
            let timeout = Timespec::try_from(wait).map_err(Failure::at("timeout"))?;
            match poll(&mut [PollFd::new(&self.epoll, PollFlags::IN)], Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => wait = Duration::ZERO,
                Err(error) => return Err(failed("poll")(error)),
            }
        }
        let timeout = Timespec::try_from(wait).map_err(Failure::at("timeout"))?;
        self.events.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(failed("wait for replies")(error)),
        }
    }

    fn receive(&mut self, index: usize) {
        let Some(client) = self.clients[index].as_mut() else { return };
        let started = self.started;
        let now_ns = || started.elapsed().as_nanos() as u64;
        if let Err(error) = client.receive(&mut self.input, &self.template, now_ns, &mut self.tally)
        {
            self.lose(index, &error);
        }
    }

    /// Sends what this connection may send now, and watches for room when the socket is full.
    fn pump(&mut self, index: usize) {
        let Some(client) = self.clients[index].as_mut() else { return };
        let depth = if self.stopping { 0 } else { self.plan.depth as usize };
        let sent = if self.pace.is_some() {
            client.send_scheduled(depth, &self.template, &mut self.output)
        } else {
            let now_ns = self.started.elapsed().as_nanos() as u64;
            client.fill(depth, now_ns, &mut self.dice, &self.template, &mut self.output)
        };
        let blocked = client.is_blocked();
        let watched = if blocked == self.blocked[index] {
            Ok(())
        } else {
            self.blocked[index] = blocked;
            let flags = if blocked { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            epoll::modify(&self.epoll, &client.fd, EventData::new_u64(index as u64), flags)
        };
        if let Err(error) = sent.and(watched.map_err(io::Error::from)) {
            self.lose(index, &error);
        }
    }

    /// Open loop: hands out what is due by `now`; when the next one is.
    fn send_due(&mut self, now: Duration) -> Option<Duration> {
        let now_ns = now.as_nanos() as u64;
        let count = self.clients.len();
        let pace = self.pace.as_mut()?;
        let first = pace.scheduled();
        while let Some((request, due_ns)) = pace.next_due_by(now_ns) {
            // Chosen when it is due, and for lost connections too: so every server is asked for the
            // same at the same time.
            let heavy = self.dice.is_heavy();
            // A lost connection's requests are not sent: its loss is the error that says so.
            if let Some(client) = &mut self.clients[(request % count as u64) as usize] {
                client.schedule(due_ns, heavy);
            }
        }
        let (due_ns, touched) = (pace.due_ns(), (pace.scheduled() - first).min(count as u64));
        (first..first + touched).for_each(|request| self.pump((request % count as u64) as usize));
        Some(Duration::from_nanos(due_ns))
    }

    fn check_alive(&self) -> Result<()> {
        signals::check()?;
        if self.open_count == 0 {
            return Err(self.tally.all_lost());
        }
        if self.last_reply.elapsed() < self.plan.timeout {
            return Ok(());
        }
        // A slow open loop may have had nothing to ask for all that time.
        let oldest_ns = self.clients.iter().flatten().filter_map(Client::oldest_ns).min();
        let waited = oldest_ns
            .map(|sent_ns| self.started.elapsed().saturating_sub(Duration::from_nanos(sent_ns)));
        if waited.is_none_or(|waited| waited < self.plan.timeout) {
            return Ok(());
        }
        Err(no_reply_in(self.plan.timeout))
    }

    fn lose(&mut self, index: usize, error: &io::Error) {
        self.clients[index] = None;
        self.open_count -= 1;
        self.tally.count_error(|| format!("connection {index}: {error}"));
    }

    /// A silent connection that the server closed, or spoke on, is an error.
    fn check_idle(&mut self, idle: &[OwnedFd]) {
        for (index, fd) in idle.iter().enumerate() {
            match recv(fd, &mut [0; 1], RecvFlags::DONTWAIT) {
                Err(Errno::AGAIN) => {}
                Err(error) => {
                    self.tally.count_error(|| {
                        format!("idle connection {index}: {}", io::Error::from(error))
                    });
                }
                Ok((0, _)) => self
                    .tally
                    .count_error(|| format!("idle connection {index}: closed by the server")),
                Ok(_) => {
                    self.tally.count_error(|| format!("idle connection {index}: unexpected bytes"))
                }
            }
        }
    }
}

fn failed(operation: &str) -> impl FnOnce(Errno) -> Failure {
    move |error| Failure::new(format!("{operation}: {}", io::Error::from(error)))
}

/// Events per wait.
const EVENTS_MAX: usize = 512;
/// One receive: several frames of pipelined traffic.
const INPUT_BYTES: usize = 256 << 10;
/// How often the loop looks at its deadlines when nothing happens.
const WAIT_MAX: Duration = Duration::from_millis(20);
