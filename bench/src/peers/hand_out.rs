//! Runtimes that share nothing, one for each CPU: who accepts for them, and how they get their
//! connections.
//!
//! One thread accepts and hands the sockets out in turn, so that each runtime gets as many as the
//! others; with a listener for each, the kernel spreads by hash. A runtime waits at its door, a
//! byte for each connection that lies in its queue. The thread sleeps when nobody comes.

use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use serde_json::Value;

use super::Service;
use crate::error::{Failure, Result};
use crate::host::cpu;

/// Where a runtime finds its connections.
pub(super) struct Inbox {
    /// A byte for each connection, and its end when the server stops.
    pub(super) door: UnixStream,
    /// In the order of the bytes, each there before its byte.
    pub(super) streams: Receiver<TcpStream>,
    /// Told once, when the runtime is up or why it is not.
    pub(super) ready: Sender<Result<()>>,
}

/// What runs on each CPU.
#[derive(Clone, Copy)]
pub(super) struct Runtime {
    /// Serves what comes in until its door closes.
    pub(super) life: fn(Inbox, Service) -> Result<()>,
    /// Whether its thread stays on its CPU.
    pub(super) pinned: bool,
}

/// Serves with one runtime for each CPU this process may use, until a signal.
pub(super) fn serve(
    listener: &TcpListener,
    stop: &UnixStream,
    service: Service,
    runtime: Runtime,
) -> Result<Value> {
    let cpus = cpu::allowed()?;
    let (ready, readiness) = channel();
    let mut boxes = Vec::new();
    for cpu in &cpus {
        boxes.push(start(*cpu, service, runtime, ready.clone())?);
    }
    // Only the runtimes hold one now, so that the wait ends if one of them ends without a word.
    drop(ready);
    for _ in &cpus {
        readiness.recv().map_err(|_| Failure::new("a runtime ended before it served"))??;
    }
    accept(listener, stop, &boxes)
}

/// The other side of an inbox.
struct Outbox {
    cpu: usize,
    door: UnixStream,
    streams: Sender<TcpStream>,
}

impl Outbox {
    fn hand_over(&self, stream: TcpStream) -> Result<()> {
        let gone = || Failure::new(format!("the runtime of CPU {} is gone", self.cpu));
        self.streams.send(stream).map_err(|_| gone())?;
        send(&self.door, &[1], SendFlags::NOSIGNAL).map(drop).map_err(|_| gone())
    }
}

fn start(
    cpu: usize,
    service: Service,
    runtime: Runtime,
    ready: Sender<Result<()>>,
) -> Result<Outbox> {
    let (ours, door) = UnixStream::pair().map_err(Failure::at("socket pair"))?;
    let (sender, streams) = channel();
    let name = format!("runtime-{cpu}");
    let run = move || {
        let placed = if runtime.pinned { cpu::pin(&[cpu]) } else { Ok(()) };
        let told = ready.clone();
        let inbox = Inbox { door, streams, ready };
        let lived = placed.and_then(|()| (runtime.life)(inbox, service));
        if let Err(failure) = lived {
            // Nobody listens any more once all runtimes are up.
            let _ = told.send(Err(failure));
        }
    };
    std::thread::Builder::new().name(name).spawn(run).map_err(Failure::at("start a thread"))?;
    Ok(Outbox { cpu, door: ours, streams: sender })
}

fn accept(listener: &TcpListener, stop: &UnixStream, boxes: &[Outbox]) -> Result<Value> {
    let mut accepted = 0;
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Failure::at("wait")(std::io::Error::from(error))),
        }
        if !fds[1].revents().is_empty() {
            // The runtimes end with this process; what they hold is the kernel's to take back.
            return Ok(super::counters(accepted, None));
        }
        // Out of descriptors, or a client that left: the listener stays watched either way.
        while let Ok((stream, _)) = listener.accept() {
            boxes[accepted as usize % boxes.len()].hand_over(stream)?;
            accepted += 1;
        }
    }
}
