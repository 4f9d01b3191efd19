//! Servers to compare with: the same wire format, the same work per request, the same line when
//! ready.

#[forbid(unsafe_code)]
mod bare_epoll;
#[forbid(unsafe_code)]
mod bare_proxy;
#[forbid(unsafe_code)]
mod bare_ring;
#[forbid(unsafe_code)]
mod compio;
#[forbid(unsafe_code)]
mod hand_out;
#[forbid(unsafe_code)]
mod monoio;
#[allow(unsafe_code)]
mod ring;
#[forbid(unsafe_code)]
mod tokio;
#[forbid(unsafe_code)]
mod tonic;
#[forbid(unsafe_code)]
mod volo;

use std::fmt;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::str::FromStr;

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use serde_json::{Value, json};

use self::bare_ring::Shape;
use self::hand_out::Runtime;
use self::tokio::Style;
use crate::cli::{Bytes, PeerArgs, Scenario, resolve};
use crate::error::{Failure, Result};
use crate::rpc::Protocol;
use crate::service::Service;
use crate::{host, signals, work};

/// A server that is not ringpoll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// tokio on one thread.
    Tokio,
    /// tokio on one thread, with its buffered reader and writer.
    TokioFramed,
    /// tokio's work-stealing runtime, one worker per CPU it may use.
    TokioWs,
    /// A tokio runtime of one thread for each CPU it may use, which share nothing.
    TokioPerCpu,
    /// monoio, likewise.
    Monoio,
    /// compio, likewise.
    Compio,
    /// tonic: gRPC on tokio's work-stealing runtime.
    Tonic,
    /// volo-thrift: Thrift on tokio's work-stealing runtime.
    VoloThrift,
    /// No library: what epoll and TCP cost by themselves. The limit.
    BareEpoll,
    /// The same with io_uring, and receive buffers for single requests.
    BareRing,
    /// The same with io_uring, and receive buffers for pipelined requests.
    BareRing64k,
}

impl Peer {
    const ALL: [(&'static str, Peer); 11] = [
        ("tokio", Peer::Tokio),
        ("tokio-framed", Peer::TokioFramed),
        ("tokio-ws", Peer::TokioWs),
        ("tokio-per-cpu", Peer::TokioPerCpu),
        ("monoio", Peer::Monoio),
        ("compio", Peer::Compio),
        ("tonic", Peer::Tonic),
        ("volo-thrift", Peer::VoloThrift),
        ("bare-epoll", Peer::BareEpoll),
        ("bare-ring", Peer::BareRing),
        ("bare-ring-64k", Peer::BareRing64k),
    ];

    /// The library and its version.
    pub(crate) fn version(self) -> String {
        let library = match self {
            Peer::Tokio | Peer::TokioFramed | Peer::TokioWs | Peer::TokioPerCpu => "tokio",
            Peer::Monoio => "monoio",
            Peer::Compio => "compio",
            Peer::Tonic => "tonic",
            Peer::VoloThrift => "volo-thrift",
            Peer::BareEpoll | Peer::BareRing | Peer::BareRing64k => return "no library".to_owned(),
        };
        format!("{library} {}", locked_version(library))
    }

    /// How it is set up, for a reader of its figures.
    pub(crate) fn settings(self) -> &'static str {
        match self {
            Peer::Tokio => "one thread, reads and writes batched",
            Peer::TokioFramed => "one thread, BufReader and BufWriter",
            Peer::TokioWs => "work-stealing, a worker for each CPU",
            Peer::TokioPerCpu => {
                "a pinned thread with a runtime of its own for each CPU, connections handed out in \
                 turn"
            }
            Peer::Monoio => monoio::SETTINGS,
            Peer::Compio => compio::SETTINGS,
            Peer::Tonic => tonic::SETTINGS,
            Peer::VoloThrift => volo::SETTINGS,
            Peer::BareEpoll => "one thread on epoll",
            Peer::BareRing => "one thread on io_uring, 256 receive buffers of 4 KiB",
            Peer::BareRing64k => "one thread on io_uring, 16 receive buffers of 64 KiB",
        }
    }

    /// What its clients must speak.
    pub(crate) fn protocol(self) -> Protocol {
        match self {
            Peer::Tonic => Protocol::Grpc,
            Peer::VoloThrift => Protocol::Thrift,
            _ => Protocol::Frames,
        }
    }

    /// How many threads serve.
    fn thread_count(self) -> Result<usize> {
        match self {
            Peer::TokioWs | Peer::Tonic | Peer::VoloThrift => {
                Ok(std::thread::available_parallelism().map_or(1, usize::from))
            }
            Peer::TokioPerCpu | Peer::Monoio | Peer::Compio => Ok(host::cpu::allowed()?.len()),
            _ => Ok(1),
        }
    }

    /// How its handlers come to a thread.
    fn placement(self) -> &'static str {
        match self {
            Peer::TokioWs | Peer::Tonic | Peer::VoloThrift => "work-stealing",
            Peer::TokioPerCpu | Peer::Monoio | Peer::Compio => PER_CPU,
            _ => "one-thread",
        }
    }

    /// The ring of a peer that has one.
    fn ring_shape(self) -> Option<Shape> {
        let (buffer_count, buffer_bytes) = match self {
            Peer::BareRing => (256, 4 << 10),
            Peer::BareRing64k => (16, 64 << 10),
            _ => return None,
        };
        Some(Shape { buffer_count, buffer_bytes, direct_files: 0 })
    }
}

impl FromStr for Peer {
    type Err = Failure;

    fn from_str(name: &str) -> Result<Peer> {
        let known = Peer::ALL.map(|(name, _)| name).join(", ");
        // Its name in earlier scripts.
        let name = if name == "tokio-mt" { "tokio-ws" } else { name };
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
    refuse_misplaced(args)?;
    let shape = ring_shape(args)?;
    let service = service(args)?;
    let upstream = args.upstream.addr(args.scenario)?;
    args.die_with.map_or(Ok(()), signals::die_with)?;
    let stop = signals::stop_stream()?;
    let listener = listen_on(args)?;
    listener.set_nonblocking(true).map_err(Failure::at("listener"))?;
    let addr = listener.local_addr().map_err(Failure::at("listener"))?;
    let (threads, placement) = (args.peer.thread_count()?, args.peer.placement());
    // Connections that arrive from here on wait in the accept queue: the line tells no lie.
    println!("listening on {addr} backend={} placement={placement} pollers={threads}", args.peer);
    let per_cpu = |life| {
        let runtime = Runtime { life, pinned: !args.unpinned };
        hand_out::serve(&listener, &stop, service, runtime)
    };
    let style = match (args.scenario, upstream) {
        (_, Some(upstream)) => Style::Forwarding(upstream),
        (Scenario::Mux, None) => Style::Multiplexed,
        _ => Style::Batched,
    };
    let counters = match (args.peer, shape) {
        (_, Some(shape)) => bare_ring::serve(&listener, &stop, service, shape)?,
        (Peer::Tokio, _) => tokio::serve_on_one_thread(listener, stop, service, style)?,
        (Peer::TokioFramed, _) => {
            tokio::serve_on_one_thread(listener, stop, service, Style::Framed)?
        }
        (Peer::TokioWs, _) => tokio::serve_on_many(listener, stop, service, style, threads)?,
        (Peer::Tonic, _) => tonic::serve(listener, stop, service, threads)?,
        (Peer::VoloThrift, _) => volo::serve(listener, stop, service, threads)?,
        (Peer::TokioPerCpu, _) => per_cpu(tokio::live)?,
        (Peer::Monoio, _) => per_cpu(monoio::live)?,
        (Peer::Compio, _) => per_cpu(compio::live)?,
        _ => match upstream {
            Some(upstream) => bare_proxy::serve(&listener, &stop, upstream)?,
            None => bare_epoll::serve(&listener, &stop, service)?,
        },
    };
    println!("{counters}");
    Ok(())
}

/// Flags of some peers, given to one that has no use for them.
fn refuse_misplaced(args: &PeerArgs) -> Result<()> {
    if args.unpinned && args.peer.placement() != PER_CPU {
        let message = format!("--unpinned: peer {} has no thread for each CPU", args.peer);
        return Err(Failure::new(message));
    }
    Ok(())
}

/// What it does with a request.
fn service(args: &PeerArgs) -> Result<Service> {
    let work = match args.scenario {
        Scenario::Echo => None,
        Scenario::Heavy => Some(args.work.work()),
        Scenario::Mux if matches!(args.peer, Peer::Tokio | Peer::TokioWs) => None,
        Scenario::Mux => {
            return Err(Failure::new(format!(
                "--scenario mux: peer {} has no task for each request, choose tokio or tokio-ws",
                args.peer
            )));
        }
        Scenario::Calls => {
            let message =
                "--scenario calls: no peer has it, use serve; for client tonic, peer tonic";
            return Err(Failure::new(message));
        }
        Scenario::Proxy if !forwards(args.peer) => {
            return Err(Failure::new(format!(
                "--scenario proxy: peer {} does not forward, choose tokio, tokio-ws or bare-epoll",
                args.peer
            )));
        }
        Scenario::Proxy if args.upstream.addr(args.scenario)?.is_none() => {
            return Err(Failure::new("--scenario proxy: a peer needs an --upstream"));
        }
        Scenario::Proxy => None,
    };
    Ok(Service { frame_max: args.frame_max.0 as usize, work })
}

/// Whether a peer has the scenario proxy.
fn forwards(peer: Peer) -> bool {
    matches!(peer, Peer::Tokio | Peer::TokioWs | Peer::BareEpoll)
}

/// The ring of the peer, with the descriptors that were asked for.
fn ring_shape(args: &PeerArgs) -> Result<Option<Shape>> {
    let shape = args.peer.ring_shape();
    if !args.direct_fds {
        return Ok(shape);
    }
    let Some(shape) = shape else {
        return Err(Failure::new(format!("--direct-fds: peer {} has no ring", args.peer)));
    };
    // The kernel allows a table as large as the process' own.
    let files = host::fds_up_to(DIRECT_FILES_MAX).min(DIRECT_FILES_MAX);
    Ok(Some(Shape { direct_files: files as u32, ..shape }))
}

/// With the backlog ringpoll has: 1000 connections at once must not depend on who accepts faster.
fn listen_on(args: &PeerArgs) -> Result<TcpListener> {
    let failed = |error: rustix::io::Errno| {
        Failure::new(format!("listen {}: {}", args.addr, std::io::Error::from(error)))
    };
    let found = resolve(&args.addr)?[0];
    let family = if found.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed)?;
    set_options(&fd, args)?;
    sockopt::set_socket_reuseaddr(&fd, true).map_err(failed)?;
    bind(&fd, &found).map_err(failed)?;
    listen(&fd, BACKLOG).map_err(failed)?;
    Ok(fd.into())
}

/// Options of the connections: each inherits them from the listener that accepts it.
fn set_options(fd: &OwnedFd, args: &PeerArgs) -> Result<()> {
    let failed = |what: String| {
        move |error| Failure::new(format!("{what}: {}", std::io::Error::from(error)))
    };
    sockopt::set_tcp_nodelay(fd, true).map_err(failed("no delay".into()))?;
    if let Some(name) = &args.congestion {
        let set = sockopt::set_tcp_congestion(fd, name);
        set.map_err(failed(format!("--congestion {name}")))?;
    }
    if let Some(Bytes(bytes)) = args.rcvbuf {
        let set = sockopt::set_socket_recv_buffer_size(fd, bytes as usize);
        set.map_err(failed(format!("--rcvbuf {bytes}")))?;
    }
    if let Some(Bytes(bytes)) = args.sndbuf {
        let set = sockopt::set_socket_send_buffer_size(fd, bytes as usize);
        set.map_err(failed(format!("--sndbuf {bytes}")))?;
    }
    Ok(())
}

/// Runs a server until a byte comes.
async fn until_stopped<E: fmt::Display + Send + 'static>(
    stop: UnixStream,
    server: impl Future<Output = std::result::Result<(), E>> + Send + 'static,
) -> Result<()> {
    stop.set_nonblocking(true).map_err(Failure::at("signal socket"))?;
    let stop = ::tokio::net::UnixStream::from_std(stop).map_err(Failure::at("signal socket"))?;
    // A task of its own, so that the workers share it.
    let server = ::tokio::spawn(server);
    ::tokio::select! {
        // However the wait ends, somebody wants this server to stop.
        _ = stop.readable() => Ok(()),
        ended = server => match ended {
            // It listens for the same signals, and may be first.
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Failure::new(format!("serve: {error}"))),
            Err(error) => Err(Failure::new(format!("serve: {error}"))),
        },
    }
}

/// What a server tells at its end; `None` where it does not count.
fn counters(accepted: u64, system_calls: Option<u64>) -> Value {
    json!({ "accepted": accepted, "system_calls": system_calls, "work_runs": work::runs() })
}

/// The version of a library this program was built with.
fn locked_version(library: &str) -> &'static str {
    let (_, entry) = LOCK_FILE
        .split_once(&format!("\nname = \"{library}\"\nversion = \""))
        .expect("it is a dependency of this program");
    entry.split('"').next().unwrap_or_default()
}

/// The placement of those that have a runtime for each CPU.
const PER_CPU: &str = "per-cpu";
/// Written by the build that this program comes from.
const LOCK_FILE: &str = include_str!("../../../Cargo.lock");
/// What a connection offers the kernel per read at first: that of tokio's own framed reader.
const READ_BYTES: usize = 8 << 10;
/// What the other servers offer.
const READ_BYTES_MAX: usize = 64 << 10;
const BACKLOG: i32 = 4096;
/// Entries of a ring's own table of descriptors.
const DIRECT_FILES_MAX: u64 = 32 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_peer_has_its_name_and_says_what_it_is() {
        for (name, peer) in Peer::ALL {
            assert_eq!(name.parse::<Peer>().unwrap(), peer);
            assert_eq!(peer.to_string(), name);
            assert!(!peer.version().is_empty() && !peer.settings().is_empty());
        }
        assert_eq!("tokio-mt".parse::<Peer>().unwrap(), Peer::TokioWs);
        let version = locked_version("monoio");
        assert!(version.split('.').all(|part| part.parse::<u32>().is_ok()), "{version}");
        assert_eq!(Peer::Monoio.version(), format!("monoio {version}"));
    }
}
