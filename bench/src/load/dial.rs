//! Opening many connections: some at a time, all under one deadline.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType, connect, getsockname, send, socket_with,
    sockopt,
};

use crate::error::{Failure, Result};
use crate::load::Plan;
use crate::wire::{Request, Template};

/// The server's address, found by trying each, and connections to it.
pub(crate) fn open_all(plan: &Plan) -> Result<(Vec<OwnedFd>, Vec<OwnedFd>)> {
    super::reserve_fds(plan.connections, plan.idle)?;
    let deadline = Instant::now() + plan.timeout;
    let (first, addr) = open_first(&plan.addrs, deadline, plan.timeout)?;
    let mut active = vec![first];
    open(addr, plan.connections as usize - 1, plan.timeout, &mut active)?;
    let mut idle = Vec::new();
    open(addr, plan.idle as usize, plan.timeout, &mut idle)?;
    Ok((active, idle))
}

/// Opens `count` connections to `addr` into `fds`.
///
/// `timeout` bounds how long none of them comes to be, not the whole: ten thousand take a while on
/// a slow host.
pub(crate) fn open(
    addr: SocketAddr,
    count: usize,
    timeout: Duration,
    fds: &mut Vec<OwnedFd>,
) -> Result<()> {
    let mut left = count;
    while left > 0 {
        // No more at a time than any accept queue holds: a full one makes the kernel retry after a
        // second.
        let batch = left.min(BATCH);
        let started = (0..batch).map(|_| start(addr)).collect::<Result<Vec<_>>>()?;
        let deadline = Instant::now() + timeout;
        for fd in started {
            finish(&fd, addr, deadline, timeout)?;
            fds.push(fd);
        }
        left -= batch;
    }
    Ok(())
}

/// Sends one request on each connection and checks the reply, so that the server has done with it
/// what it ever does.
pub(crate) fn ping_each(fds: &[OwnedFd], template: &Template, timeout: Duration) -> Result<()> {
    let mut request = Vec::new();
    let mut reply = vec![0; template.reply_bytes()];
    for (sequence, fd) in fds.iter().enumerate() {
        let asked = Request::cheap(sequence as u64);
        request.clear();
        template.append(asked, &mut request);
        send(fd, &request, SendFlags::NOSIGNAL)
            .map_err(Failure::at("send to an idle connection"))?;
        let deadline = Instant::now() + timeout;
        let mut read = 0;
        while read < reply.len() {
            wait(fd, PollFlags::IN, deadline)?
                .then_some(())
                .ok_or_else(|| Failure::new(format!("idle connection: no reply in {timeout:?}")))?;
            match rustix::io::read(fd, &mut reply[read..]) {
                Ok(0) => return Err(Failure::new("idle connection: closed by the server")),
                Ok(bytes) => read += bytes,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => {
                    return Err(Failure::new(format!(
                        "idle connection: {}",
                        io::Error::from(error)
                    )));
                }
            }
        }
        if !template.matches(asked, 0, &reply) {
            return Err(Failure::new(format!("idle connection {sequence}: wrong reply")));
        }
    }
    Ok(())
}

/// The first of some addresses at which somebody listens.
pub(crate) fn reachable(addrs: &[SocketAddr]) -> Result<SocketAddr> {
    let deadline = Instant::now() + REACH_PATIENCE;
    open_first(addrs, deadline, REACH_PATIENCE).map(|(_, addr)| addr)
}

fn open_first(
    addrs: &[SocketAddr],
    deadline: Instant,
    timeout: Duration,
) -> Result<(OwnedFd, SocketAddr)> {
    let mut failure = Failure::new("no address");
    for addr in addrs {
        let opened = start(*addr).and_then(|fd| finish(&fd, *addr, deadline, timeout).map(|()| fd));
        match opened {
            // Without a listener the kernel may pick the port we dial as our own, and connect us to
            // ourselves.
            Ok(fd) if getsockname(&fd).is_ok_and(|own| own == (*addr).into()) => {
                failure = Failure::new(format!("connect {addr}: connection refused"));
            }
            Ok(fd) => return Ok((fd, *addr)),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn start(addr: SocketAddr) -> Result<OwnedFd> {
    let failed = |error: Errno| Failure::new(format!("connect {addr}: {}", io::Error::from(error)));
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = socket_with(family, SocketType::STREAM, flags, None).map_err(failed)?;
    sockopt::set_tcp_nodelay(&fd, true).map_err(failed)?;
    match connect(&fd, &addr) {
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(fd),
        Err(error) => Err(failed(error)),
    }
}

fn finish(fd: &OwnedFd, addr: SocketAddr, deadline: Instant, timeout: Duration) -> Result<()> {
    if !wait(fd, PollFlags::OUT, deadline)? {
        return Err(Failure::new(format!("connect {addr}: no reply in {timeout:?}")));
    }
    let state = sockopt::socket_error(fd).and_then(|state| state);
    state.map_err(|error| Failure::new(format!("connect {addr}: {}", io::Error::from(error))))
}

/// Whether `fd` became ready before the deadline.
fn wait(fd: &OwnedFd, flags: PollFlags, deadline: Instant) -> Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(Failure::at("timeout"))?;
        match poll(&mut [PollFd::new(fd, flags)], Some(&left)) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(Failure::new(format!("poll: {}", io::Error::from(error)))),
        }
    }
}

const BATCH: usize = 64;
/// How long a server that is said to run may take to accept a connection.
const REACH_PATIENCE: Duration = Duration::from_secs(3);
