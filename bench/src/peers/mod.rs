//! Servers to compare with: the same wire format, the same work per request, the same line when
//! ready.

mod bare_epoll;
mod tokio;

use std::fmt;
use std::net::TcpListener;
use std::str::FromStr;

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use serde_json::{Value, json};

use self::tokio::Style;
use crate::cli::{PeerArgs, resolve};
use crate::error::{Failure, Result};
use crate::signals;

/// A server that is not ringpoll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// tokio on one thread.
    Tokio,
    /// tokio on one thread, with its buffered reader and writer.
    TokioFramed,
    /// tokio's work-stealing runtime, one worker per CPU it may use.
    TokioMt,
    /// No library: what epoll and TCP cost by themselves. The limit.
    BareEpoll,
}

impl Peer {
    const ALL: [(&'static str, Peer); 4] = [
        ("tokio", Peer::Tokio),
        ("tokio-framed", Peer::TokioFramed),
        ("tokio-mt", Peer::TokioMt),
        ("bare-epoll", Peer::BareEpoll),
    ];
}

impl FromStr for Peer {
    type Err = Failure;

    fn from_str(name: &str) -> Result<Peer> {
        let known = Peer::ALL.map(|(name, _)| name).join(", ");
        let found = Peer::ALL.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, peer)| *peer)
            .ok_or_else(|| Failure::new(format!("unknown peer {name:?}: choose one of {known}")))
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Peer::ALL.iter().find(|(_, peer)| peer == self).map_or("?", |(name, _)| name);
        f.pad(name)
    }
}

/// The subcommand: serves until a signal.
pub(crate) fn run(args: &PeerArgs) -> Result<()> {
    args.die_with.map_or(Ok(()), signals::die_with)?;
    let stop = signals::stop_stream()?;
    let listener = listen_on(&args.addr)?;
    listener.set_nonblocking(true).map_err(Failure::at("listener"))?;
    let addr = listener.local_addr().map_err(Failure::at("listener"))?;
    let threads = match args.peer {
        Peer::TokioMt => std::thread::available_parallelism().map_or(1, usize::from),
        Peer::Tokio | Peer::TokioFramed | Peer::BareEpoll => 1,
    };
    let placement = if args.peer == Peer::TokioMt { "work-stealing" } else { "one-thread" };
    // Connections that arrive from here on wait in the accept queue: the line tells no lie.
    println!("listening on {addr} backend={} placement={placement} pollers={threads}", args.peer);
    let frame_max = args.frame_max.0 as usize;
    let counters = match args.peer {
        Peer::BareEpoll => bare_epoll::serve(&listener, &stop, frame_max)?,
        Peer::Tokio => tokio::serve_on_one_thread(listener, stop, frame_max, Style::Batched)?,
        Peer::TokioFramed => tokio::serve_on_one_thread(listener, stop, frame_max, Style::Framed)?,
        Peer::TokioMt => tokio::serve_on_many(listener, stop, frame_max, threads)?,
    };
    println!("{counters}");
    Ok(())
}

/// With the backlog ringpoll has: 1000 connections at once must not depend on who accepts faster.
fn listen_on(addr: &str) -> Result<TcpListener> {
    let failed = |error: rustix::io::Errno| {
        Failure::new(format!("listen {addr}: {}", std::io::Error::from(error)))
    };
    let found = resolve(addr)?[0];
    let family = if found.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed)?;
    sockopt::set_socket_reuseaddr(&fd, true).map_err(failed)?;
    bind(&fd, &found).map_err(failed)?;
    listen(&fd, BACKLOG).map_err(failed)?;
    Ok(fd.into())
}

/// What a server tells at its end; `None` where it does not count.
fn counters(accepted: u64, system_calls: Option<u64>) -> Value {
    json!({ "accepted": accepted, "system_calls": system_calls })
}

const BACKLOG: i32 = 4096;
