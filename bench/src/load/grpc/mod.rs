//! The engine for gRPC: HTTP/2 compresses headers, grants windows and answers in any order, so a
//! library speaks it, and what is compared is the payload of each reply.
//!
//! One thread: a tokio runtime drives hyper's connections (`channel`) and the tasks that call
//! (`lanes`). The loop here does what that of `engine` does, at the same moments.

mod alarm;
mod channel;
mod lanes;

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tokio::runtime::Builder;
use tokio::task::{JoinHandle, LocalSet};

use self::alarm::Alarm;
use self::channel::Channel;
use self::lanes::Lanes;
use crate::error::{Failure, Result};
use crate::host::steal::StealWatch;
use crate::load::tally::{DRAIN_MAX, DRAIN_PATIENCE, Pace, no_reply_in, still_open};
use crate::load::windows::Windows;
use crate::load::{Observer, Outcome, Plan, dial};
use crate::signals;

/// Opens the connections, sends, measures, and closes.
pub(super) fn run(plan: &Plan, observer: &mut dyn Observer) -> Result<Outcome> {
    let (active, idle) = dial::open_all(plan)?;
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(Failure::at("start tokio"))?;
    LocalSet::new().block_on(&runtime, drive(plan, observer, active, idle))
}

async fn drive(
    plan: &Plan,
    observer: &mut dyn Observer,
    active: Vec<OwnedFd>,
    idle: Vec<OwnedFd>,
) -> Result<Outcome> {
    let mut drivers = Vec::new();
    let active = greet_all(active, &mut drivers).await?;
    let idle = greet_all(idle, &mut drivers).await?;
    let mut engine = Engine::new(plan, active)?;
    let watch = StealWatch::start(&plan.watched_cpus, engine.lanes.started)?;
    engine.lanes.start();
    engine.run_until(plan.warmup, &watch).await?;
    observer.on_window_open();
    let opened = engine.elapsed();
    engine.lanes.state().tally.open_window(opened.as_nanos() as u64);
    engine.run_until(opened + plan.duration, &watch).await?;
    engine.run_until_some_reply().await?;
    let elapsed = engine.elapsed() - opened;
    let windows = engine.close_window()?;
    observer.on_window_close();
    engine.drain().await?;
    engine.lanes.state().check_idle(&idle);
    let (reply_bytes, tally) = engine.lanes.end()?;
    drop((engine, idle));
    hang_up(drivers).await;
    tally.outcome(elapsed, reply_bytes, windows.finish(watch.finish()))
}

/// HTTP/2 on each connection.
async fn greet_all(fds: Vec<OwnedFd>, drivers: &mut Vec<JoinHandle<()>>) -> Result<Vec<Channel>> {
    let mut channels = Vec::with_capacity(fds.len());
    for fd in fds {
        let stream = tokio::net::TcpStream::from_std(TcpStream::from(fd));
        let stream = TokioIo::new(stream.map_err(Failure::at("watch a connection"))?);
        let (channel, driver) =
            Channel::begin(stream).await.map_err(Failure::at("begin HTTP/2"))?;
        drivers.push(tokio::spawn(driver));
        channels.push(channel);
    }
    Ok(channels)
}

/// Lets the connections end as HTTP/2 does, so that the server sees a close and not a reset.
async fn hang_up(drivers: Vec<JoinHandle<()>>) {
    let ends = async {
        for driver in drivers {
            // However it ended.
            let _ = driver.await;
        }
    };
    // A server that does not take the end of a connection is left with it.
    let _ = tokio::time::timeout(DRAIN_PATIENCE, ends).await;
}

struct Engine<'a> {
    plan: &'a Plan,
    lanes: Rc<Lanes>,
    pace: Option<Pace>,
    alarm: Alarm,
}

impl<'a> Engine<'a> {
    fn new(plan: &'a Plan, channels: Vec<Channel>) -> Result<Engine<'a>> {
        Ok(Engine {
            plan,
            lanes: Lanes::new(plan, channels)?,
            pace: plan.rate.map(Pace::new),
            alarm: Alarm::new()?,
        })
    }

    fn elapsed(&self) -> Duration {
        self.lanes.started.elapsed()
    }

    fn close_window(&mut self) -> Result<Windows> {
        let mut state = self.lanes.state();
        state.stop();
        state.tally.close_window(self.elapsed().as_nanos() as u64)
    }

    /// Runs until that much time has passed since the start, or the window has all its replies.
    async fn run_until(&mut self, end: Duration, watch: &StealWatch) -> Result<()> {
        loop {
            let now = self.elapsed();
            self.lanes.state().tally.turn_window(now.as_nanos() as u64, watch);
            if now >= end || self.lanes.state().tally.has_all(self.plan.requests_max) {
                return Ok(());
            }
            let due = self.send_due(now);
            self.check_alive()?;
            self.wait(due.map_or(end, |due| due.min(end)).saturating_sub(now)).await?;
        }
    }

    /// A window in which the server or the client got no CPU is no measurement: it stays open until
    /// one reply is in it. An open loop may have had nothing to ask for.
    async fn run_until_some_reply(&mut self) -> Result<()> {
        while self.lanes.state().tally.is_empty() {
            self.send_due(self.elapsed());
            if self.pace.is_some() && self.lanes.state().waited().0 == 0 {
                return Ok(());
            }
            self.check_alive()?;
            self.wait(WAIT_MAX).await?;
        }
        Ok(())
    }

    /// Lets the requests in flight come home.
    async fn drain(&mut self) -> Result<()> {
        let begun = Instant::now();
        let patience = self.plan.timeout.min(DRAIN_PATIENCE);
        loop {
            let (in_flight, waited) = self.lanes.state().waited();
            if in_flight == 0 {
                return Ok(());
            }
            self.check_alive()?;
            if waited.min(begun.elapsed()) >= patience || begun.elapsed() >= DRAIN_MAX {
                return Err(still_open(in_flight, begun.elapsed()));
            }
            self.wait(WAIT_MAX).await?;
        }
    }

    /// Until then, or until there are news from the lanes.
    async fn wait(&mut self, wait_max: Duration) -> Result<()> {
        tokio::select! {
            rung = self.alarm.ring_in(wait_max.min(WAIT_MAX)) => {
                rung.map_err(Failure::at("wait for replies"))
            }
            () = self.lanes.news.notified() => Ok(()),
        }
    }

    /// Open loop: hands out what is due by `now`; when the next one is.
    fn send_due(&mut self, now: Duration) -> Option<Duration> {
        let pace = self.pace.as_mut()?;
        while let Some((request, due_ns)) = pace.next_due_by(now.as_nanos() as u64) {
            self.lanes.schedule(request, due_ns);
        }
        Some(Duration::from_nanos(pace.due_ns()))
    }

    fn check_alive(&self) -> Result<()> {
        signals::check()?;
        let state = self.lanes.state();
        if state.open_count() == 0 {
            return Err(state.tally.all_lost());
        }
        let (in_flight, waited) = state.waited();
        if in_flight > 0 && waited >= self.plan.timeout {
            return Err(no_reply_in(self.plan.timeout));
        }
        Ok(())
    }
}

/// How often the loop looks at its deadlines, and at the windows, when nothing happens.
const WAIT_MAX: Duration = Duration::from_millis(5);
