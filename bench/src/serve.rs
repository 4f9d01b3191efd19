//! `serve`: a ringpoll server for the load generator.

mod calls;
mod mux;
mod proxy;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ringpoll::buffer::{Reader, u32_be_length};
use ringpoll::{
    Backend, Connection, Error, PlacementStats, PollMode, PollerStats, Server, ServerBuilder,
    ServerHandle, ServerStats, Slice,
};
use serde_json::{Value, json};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use self::proxy::Upstream;
use crate::cli::{Bytes, Scenario, ServeArgs};
use crate::error::{Failure, Result};
use crate::host::Host;
use crate::host::cpu::{self, Ticks};
use crate::host::process::{CpuUse, resident_bytes};
use crate::rpc::Protocol;
use crate::rpc::on_ringpoll::{serve_grpc, serve_thrift};
use crate::service::Service;
use crate::signals::{self, Ask};
use crate::stats::{self, About, Stats};
use crate::wire::{HEADER_BYTES, is_heavy, payload_bytes};
use crate::work;

/// The subcommand: serves until a signal, then prints its counters. SIGUSR1 has it print them at
/// once and go on.
pub(crate) fn run(args: ServeArgs) -> Result<()> {
    refuse_missing(&args)?;
    args.die_with.map_or(Ok(()), signals::die_with)?;
    let mut asks = signals::Asks::listen()?;
    log_warnings();
    let (addr, stats_addr, poll) = (args.addr.clone(), args.stats.clone(), args.poll);
    let upstream = args.upstream()?.map(|to| Upstream::new(to, args.placement));
    let server = builder(args, upstream.clone()).bind(&addr).map_err(Failure::at("serve"))?;
    let handle = server.handle();
    if let Some(upstream) = upstream {
        upstream.use_pollers(handle.pollers());
    }
    let stats = handle.stats();
    let told = stats_addr.map(|addr| tell(&addr, &handle, poll)).transpose()?;
    println!(
        "listening on {} backend={} placement={} pollers={}{}",
        server.local_addr(),
        stats.backend,
        stats.placement,
        stats.poller_count,
        told.map_or(String::new(), |addr| format!(" stats={addr}"))
    );
    let stopping = Arc::new(AtomicBool::new(false));
    let stopper = {
        let (handle, stopping) = (handle.clone(), Arc::clone(&stopping));
        std::thread::spawn(move || {
            while let Ask::Report = asks.next() {
                println!("{}", counters(&handle.stats(), 0));
            }
            stopping.store(true, Ordering::Release);
            shut_down(&handle)
        })
    };
    // Returns when the stopper has shut the server down, or when the listener died.
    match server.serve() {
        // The signal came between the ready line and this call.
        Err(error) if error.is_closed() && stopping.load(Ordering::Acquire) => {}
        served => served.map_err(Failure::at("serve"))?,
    }
    let cut =
        stopper.join().map_err(|_| Failure::new("shutdown: the stopping thread panicked"))??;
    println!("{}", counters(&handle.stats(), cut));
    Ok(())
}

/// Tells a client on another host what the client would look up itself on its own.
fn tell(addr: &str, handle: &ServerHandle, poll: PollMode) -> Result<SocketAddr> {
    let (handle, pid) = (handle.clone(), std::process::id());
    let stats = handle.stats();
    let cpus = cpu::allowed()?;
    let about = About {
        program_version: env!("CARGO_PKG_VERSION").to_owned(),
        addr: handle.local_addr().to_string().parse().map_err(Failure::at("--stats"))?,
        backend: stats.backend.to_string(),
        placement: stats.placement.to_string(),
        poll: poll.to_string(),
        kernel: Host::read()?.kernel,
        cpus_allowed: cpus.clone(),
    };
    stats::listen(addr, move || {
        Ok(Stats {
            about: about.clone(),
            cpu: CpuUse::read(pid)?,
            rss_bytes: resident_bytes(pid)?,
            ticks: Ticks::read(&cpus),
            counters: counters(&handle.stats(), 0),
        })
    })
}

/// What the library warns of goes to standard error, a line each. Not what others do: volo-thrift
/// has a line for every client that goes away.
fn log_warnings() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .finish()
        .with(Targets::new().with_target("ringpoll", LevelFilter::WARN))
        .init();
}

/// Flags that the backend has no use for.
pub(crate) fn refuse_missing(args: &ServeArgs) -> Result<()> {
    let no_such_setting = |flag: &str| {
        Err(Failure::new(format!("{flag}: backend {} has no such setting", args.backend)))
    };
    // Not with `auto` either, which never takes a backend that has them.
    let is_sqpoll = matches!(args.backend, Backend::Sqpoll(_));
    if let Some(flag) = args.sqpoll.first().filter(|_| !is_sqpoll) {
        return no_such_setting(flag);
    }
    // With `auto` they count where the host offers a ring.
    if let Some(flag) = args.ring.first().filter(|_| args.backend == Backend::Epoll) {
        return no_such_setting(flag);
    }
    if args.hold.is_some() && args.scenario != Scenario::Calls {
        return Err(Failure::new("--hold: only the scenario calls has it"));
    }
    if args.scenario != Scenario::Echo
        && args.scenario != Scenario::Heavy
        && args.protocol != Protocol::Frames
    {
        let message = format!("--protocol {}: it has the scenarios echo and heavy", args.protocol);
        return Err(Failure::new(message));
    }
    Ok(())
}

fn builder(args: ServeArgs, upstream: Option<Upstream>) -> ServerBuilder {
    let frame_max = args.frame_max.0 as usize;
    let backend = match args.backend {
        Backend::Sqpoll(preset) => Backend::Sqpoll(args.sqpoll.options(preset)),
        other => other,
    };
    let mut server = Server::builder()
        .backend(backend)
        .placement(args.placement)
        .poll_mode(args.poll)
        .uring(args.ring.options())
        .read_bytes_max(frame_max + HEADER_BYTES);
    let bytes = |size: Option<Bytes>| size.map_or(0, |bytes| bytes.0 as usize);
    server = server.socket_buffers(bytes(args.rcvbuf), bytes(args.sndbuf));
    if let Some(name) = &args.congestion {
        server = server.congestion_control(name);
    }
    if let Some(count) = args.pollers {
        server = server.pollers(count.into());
    }
    if let Some(cpus) = args.poller_cpus {
        server = server.poller_cpus(cpus.0);
    }
    if let Some(cpus) = args.sqpoll.sqpoll_cpus {
        server = server.sqpoll_cpus(cpus.0);
    }
    if let Some(cpus) = args.worker_cpus {
        server = server.worker_cpus(cpus.0);
    }
    if let Some(upstream) = upstream {
        return server.on_connect(move |connection| upstream.clone().relay(connection));
    }
    if args.protocol != Protocol::Frames {
        let work = (args.scenario == Scenario::Heavy).then(|| args.work.work());
        let service = Service { frame_max, work };
        // A connection is one handler's from its first byte to its last.
        return match args.protocol {
            Protocol::Thrift => {
                server.on_connect(move |connection| serve_thrift(connection, service))
            }
            _ => server.on_connect(move |connection| serve_grpc(connection, service)),
        };
    }
    match args.scenario {
        Scenario::Echo => {
            server.on_request(move |connection| answer_all(connection, frame_max, |_| {}))
        }
        Scenario::Heavy => {
            let work = args.work.work();
            server.on_request(move |connection| {
                answer_all(connection, frame_max, move |payload| {
                    if is_heavy(payload) {
                        work.run();
                    }
                })
            })
        }
        Scenario::Calls => calls::serve(server, frame_max, args.hold),
        Scenario::Mux => mux::serve(server, frame_max),
        Scenario::Proxy => server.on_request(move |connection| return_all(connection, frame_max)),
    }
}

/// Answers every frame that is there, then sends all answers at once. The reply is composed in a
/// buffer of its own, as a server does that computes it. `work` sees the front of each payload, its
/// first byte at least.
async fn answer_all(
    mut connection: Connection,
    frame_max: usize,
    work: impl Fn(&[u8]),
) -> ringpoll::Result<()> {
    let (mut reader, mut writer) = connection.parts();
    loop {
        let mut frames = reader.frames(HEADER_BYTES + frame_max, u32_be_length);
        while let Some(frame) = frames.try_next()? {
            work(&frame[HEADER_BYTES..]);
            writer.write_copy(frame)?;
        }
        drop(frames);
        writer.flush().await?;
        if reader.is_empty() {
            return Ok(());
        }
        // A frame has begun: wait for the rest of it, and take it as it lies. Joined into one piece
        // it would be copied once more.
        let header = reader.peek(HEADER_BYTES).await?;
        let bytes = frame_bytes(&header, frame_max)?;
        let mut frame = reader.slice(bytes).await?;
        work(&frame.peek(bytes.min(HEADER_BYTES + 1))?[HEADER_BYTES..]);
        for piece in frame.slices() {
            writer.write_copy(piece)?;
        }
    }
}

/// Sends every frame back by reference: the received bytes go out again.
async fn return_all(mut connection: Connection, frame_max: usize) -> ringpoll::Result<()> {
    loop {
        while let Some(frame) = buffered_frame(&mut connection, frame_max)? {
            connection.write(frame)?;
        }
        connection.flush().await?;
        if connection.is_empty() {
            return Ok(());
        }
        let header = connection.peek(HEADER_BYTES).await?;
        let frame = connection.slice(frame_bytes(&header, frame_max)?).await?;
        for piece in frame.slices() {
            connection.write(piece.clone())?;
        }
    }
}

/// The next frame if all of it is there.
#[inline(always)]
fn buffered_frame(
    connection: &mut Connection,
    frame_max: usize,
) -> ringpoll::Result<Option<Slice>> {
    // Nearly every header lies in one piece, and is read there without counting a reference.
    let buffered = connection.buffered();
    let bytes = match buffered.first_chunk::<HEADER_BYTES>() {
        Some(header) => frame_bytes(header, frame_max)?,
        None if buffered.is_empty() => return Ok(None),
        None => match connection.try_peek(HEADER_BYTES) {
            Some(header) => frame_bytes(&header, frame_max)?,
            None => return Ok(None),
        },
    };
    Ok(connection.try_next(bytes))
}

/// How long a frame is, header included.
#[inline(always)]
fn frame_bytes(header: &[u8], frame_max: usize) -> ringpoll::Result<usize> {
    let header = *header.first_chunk().expect("four bytes were asked for");
    let bytes = payload_bytes(header, frame_max).map_err(Error::other)?;
    Ok(HEADER_BYTES + bytes)
}

/// Waits for what is running, up to a deadline; how many connections had to be cut then.
fn shut_down(handle: &ServerHandle) -> Result<usize> {
    match handle.shutdown(GRACE) {
        Ok(()) => Ok(0),
        Err(error) if error.is_timeout() => {
            eprintln!("ringpoll-bench: {error}: cutting them");
            handle.shutdown_forced(Duration::ZERO).map_err(Failure::at("shutdown"))
        }
        Err(error) => Err(Failure::new(format!("shutdown: {error}"))),
    }
}

fn counters(stats: &ServerStats, cut: usize) -> Value {
    let mut counters = json!({
        "accepted": stats.accepted,
        "refused": stats.refused,
        "open": stats.open,
        "handler_runs": stats.handler_runs,
        "handler_errors": stats.handler_errors,
        "handler_panics": stats.handler_panics,
        "accept_pauses": stats.accept_pauses,
        "work_runs": work::runs(),
        "cut": cut,
    });
    let Some(all) = counters.as_object_mut() else { return counters };
    all.extend(poller_counters(&stats.pollers));
    if let Some(auto) = &stats.auto {
        all.insert("auto".to_owned(), auto_counters(auto));
    }
    counters
}

/// Where handlers run, and why.
fn auto_counters(auto: &PlacementStats) -> Value {
    json!({
        "is_inline": auto.is_inline,
        "delay_ns": auto.delay_ns,
        "held_up_ppm": auto.held_up_ppm,
        "used_ppm": auto.used_ppm,
        "is_crowded": auto.is_crowded,
        "wake_ns": auto.wake_ns,
        "flips": auto.flips,
    })
}

/// What the pollers counted: system calls apart and in all, bytes, memory, and what the ring did.
fn poller_counters(stats: &PollerStats) -> Vec<(String, Value)> {
    let waits = stats.wait_calls;
    let per_wait = (waits > 0).then(|| stats.ring_completions as f64 / waits as f64);
    let counts = [
        ("connections", stats.connections),
        ("listeners", stats.listeners),
        ("timers", stats.timers),
        ("blocks", stats.blocks),
        ("block_bytes", stats.block_bytes),
        ("moved_runs", stats.moved_runs),
        ("accepts", stats.accepts),
        ("received_bytes", stats.received_bytes),
        ("sent_bytes", stats.sent_bytes),
        ("sends_in_flight", stats.sends_in_flight),
        ("spins_won", stats.spins_won),
        ("spins_lost", stats.spins_lost),
        ("sqpoll_threads", stats.sqpoll_threads),
        ("sqpoll_cpu_us", stats.sqpoll_cpu_us),
        ("sqpoll_work_us", stats.sqpoll_work_us),
        ("send_contentions", stats.send_contentions),
        ("full_send_rings", stats.full_send_rings),
        ("zero_copy_sends", stats.zero_copy_sends),
        ("zero_copy_copied", stats.zero_copy_copied),
        ("zero_copy_stops", stats.zero_copy_stops),
        ("zero_copy_held_bytes", stats.zero_copy_held_bytes),
        ("ring_submissions", stats.ring_submissions),
        ("ring_completions", stats.ring_completions),
        ("completion_overflows", stats.completion_overflows),
        ("rearms", stats.rearms),
        ("starvations", stats.starvations),
        ("starved_ns", stats.starved_ns),
        ("lent_receives", stats.lent_receives),
        ("buffer_moves", stats.buffer_moves),
        ("wait_calls", stats.wait_calls),
        ("submit_calls", stats.submit_calls),
        ("receive_calls", stats.receive_calls),
        ("direct_receives", stats.direct_receives),
        ("send_calls", stats.send_calls),
        ("accept_calls", stats.accept_calls),
        ("control_calls", stats.control_calls),
        ("wake_calls", stats.wake_calls),
        ("sqpoll_wake_calls", stats.sqpoll_wake_calls),
        ("setup_calls", stats.setup_calls),
        ("system_calls", stats.system_calls()),
    ];
    let counts = counts.map(|(name, count)| (name.to_owned(), count.into()));
    counts.into_iter().chain([("completions_per_wait".to_owned(), per_wait.into())]).collect()
}

/// How long requests may still run after a signal.
const GRACE: Duration = Duration::from_secs(5);
