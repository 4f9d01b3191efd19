//! What io_uring of this host supports, found out by trying.
//!
//! A kernel's version says little: distributions patch kernels, containers filter system calls, and
//! sandboxes imitate kernels. So the probe makes a ring with the best flags that the kernel takes,
//! and receives one byte through it with a multishot receive. Where a seccomp filter is active, a
//! child process makes the system calls first, because a filter may kill the caller.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::Fd;
use io_uring::{Probe, cqueue, opcode};
use rustix::net::{AddressFamily, SocketType};

use super::buffer_ring::{self, BufferRing};
use super::raw::{SEND_ZC_REPORT_USAGE, Until};
use super::ring::{Cqe, Receive, Ring, fd_of};
use super::sqpoll::polled::{Polled, Shape, SharedQueue};
use crate::buffer::Pool;
use crate::config::{Capabilities, RingTier, SMALL_BUFFER_BYTES, UringOptions};
use crate::counters::Counters;
use crate::sys::Received;

/// Probes, which takes about a millisecond. Call this on a thread that ends afterwards: the kernel
/// interrupts the calling thread some milliseconds later.
pub(crate) fn probe() -> Capabilities {
    let mut found = Capabilities::without_rings(String::new());
    match try_all(&mut found) {
        Ok(tier) => {
            found.tier = Some(tier);
            found.reason = match tier {
                RingTier::Defer => "every check passed".to_owned(),
                RingTier::Coop => "the kernel refuses DEFER_TASKRUN (Linux 6.1 has it)".to_owned(),
                RingTier::Plain => "the kernel refuses COOP_TASKRUN (Linux 5.19 has it)".to_owned(),
            };
        }
        Err(reason) => found.reason = reason,
    }
    found.sqpoll_reason = match try_sqpoll(&found) {
        Ok(()) => {
            found.sqpoll = true;
            "every check passed".to_owned()
        }
        Err(reason) => reason,
    };
    found
}

fn try_all(found: &mut Capabilities) -> Result<RingTier, String> {
    if is_filtered() {
        try_in_child()?;
    }
    let options = UringOptions::new().queue_entries(8, 16);
    let mut ring = Ring::new(&options).map_err(at("io_uring_setup"))?;
    ring.enable().map_err(at("io_uring_register: enable the ring"))?;
    receive_a_byte(&mut ring, 0)?;

    found.no_sq_array = ring.is_without_array();
    found.no_iowait = ring.io().params().is_feature_no_iowait();
    found.receive_budget = receive_a_byte(&mut ring, 1).is_ok();
    found.receive_bundles = ring.io().params().is_feature_recvsend_bundle();
    found.incremental_buffers = buffers(&ring, true).is_ok();
    let mut operations = Probe::new();
    // A kernel without this register operation has none of the newer operations.
    let is_listed = ring.io().submitter().register_probe(&mut operations).is_ok();
    found.zero_copy_send = is_listed
        && operations.is_supported(opcode::SendZc::CODE)
        && operations.is_supported(opcode::SendMsgZc::CODE);
    found.zero_copy_reports = found.zero_copy_send && try_zero_copy(&mut ring).is_ok();
    found.napi_busy_poll = ring.poll_cards(Duration::from_micros(1)).is_ok();
    Ok(ring.tier())
}

/// Receives one byte through a ring that a kernel thread polls.
fn try_sqpoll(found: &Capabilities) -> Result<(), String> {
    if found.tier.is_none() {
        return Err(found.reason.clone());
    }
    let shape = Shape { submissions: 8, completions: 16, idle_ms: 1, cpu: None };
    let collector = Polled::create(shape, None).map_err(at("io_uring_setup: SQPOLL"))?;
    let mut ring = Ring::polled(collector, &Arc::new(SharedQueue::new(&Arc::default())));
    ring.enable().map_err(at("io_uring_register"))?;
    receive_a_byte(&mut ring, 0)
}

/// Receives one byte from a socket pair with a multishot receive.
fn receive_a_byte(ring: &mut Ring, budget_bytes: u32) -> Result<(), String> {
    let counters = Counters::default();
    let mut buffers = buffers(ring, false).map_err(at("io_uring_register: receive buffers"))?;
    let (mut here, there) = UnixStream::pair().map_err(at("socketpair"))?;
    there.set_nonblocking(true).map_err(at("socketpair"))?;
    let receive = Receive { group: buffers.ring.group(), bundle: false, budget_bytes };
    ring.receive(Fd(there.as_raw_fd()), receive, RECEIVE);
    ring.enter(Until::Now, &counters).map_err(at("io_uring_enter"))?;
    here.write_all(&[42]).map_err(at("socketpair"))?;
    let first = next(ring, &counters, RECEIVE)?;
    let number = cqueue::buffer_select(first.flags);
    let continues = !first.is_last();
    let (Some(number), 1, true) = (number, first.result, continues || budget_bytes > 0) else {
        let error = io::Error::from_raw_os_error(-first.result.min(0));
        buffers.ring.unregister(ring, &buffers.pool);
        return Err(format!("multishot receive: result {}, {error}", first.result));
    };
    let mut received = 0;
    buffers.ring.take_filled(number, 1, false, |bytes| {
        received = match bytes {
            Received::Copied(copied) => copied[0],
            Received::Lent(lent) => lent[0],
        };
    });
    if continues {
        ring.cancel(RECEIVE, CANCEL);
        while !next(ring, &counters, RECEIVE)?.is_last() {}
    }
    buffers.ring.unregister(ring, &buffers.pool);
    if received != 42 {
        return Err(format!("multishot receive: byte {received}, where 42 was sent"));
    }
    if continues && budget_bytes > 0 {
        return Err("multishot receive: continues beyond its budget".to_owned());
    }
    Ok(())
}

/// The next completion with this user data.
fn next(ring: &mut Ring, counters: &Counters, user_data: u64) -> Result<Cqe, String> {
    let mut completions = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        ring.collect(&mut completions, 1);
        match completions.pop() {
            Some(cqe) if cqe.user_data == user_data => return Ok(cqe),
            Some(_) => {}
            None => {
                ring.enter(Until::Timeout(PATIENCE / 10), counters).map_err(at("io_uring_enter"))?
            }
        }
    }
    Err(format!("no completion in {PATIENCE:?}"))
}

/// Asks for a zero-copy send and a report whether it was copied, on a socket that is not connected.
/// A kernel without such reports refuses the operation and posts no notification.
fn try_zero_copy(ring: &mut Ring) -> Result<(), String> {
    let counters = Counters::default();
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)
        .map_err(|errno| format!("socket: {errno}"))?;
    let send = opcode::SendZc::new(fd_of(&socket), BYTE.as_ptr(), 1);
    let sqe = send.flags(libc::MSG_NOSIGNAL).zc_flags(SEND_ZC_REPORT_USAGE).build();
    // SAFETY: the operation names a static byte.
    unsafe { ring.push(sqe.user_data(SEND)) }
    ring.enter(Until::Now, &counters).map_err(at("io_uring_enter"))?;
    let result = next(ring, &counters, SEND)?;
    if result.is_last() {
        let error = io::Error::from_raw_os_error(-result.result.min(0));
        return Err(format!("zero-copy send: no notification, {error}"));
    }
    next(ring, &counters, SEND).map(|_| ())
}

/// A buffer ring with one buffer, and the buffer's pool.
struct OneBuffer {
    ring: BufferRing,
    pool: Pool,
}

fn buffers(ring: &Ring, is_incremental: bool) -> io::Result<OneBuffer> {
    let pool = Pool::new();
    let group = u16::from(is_incremental);
    let shape = buffer_ring::Shape {
        group,
        count: 1,
        first_count: 1,
        bytes: SMALL_BUFFER_BYTES,
        is_incremental,
        is_elastic: false,
    };
    let mut one = OneBuffer { ring: BufferRing::new(ring, shape, &pool)?, pool };
    if is_incremental {
        one.ring.unregister(ring, &one.pool);
    }
    Ok(one)
}

/// Whether a seccomp filter may be active on this thread. Also `true` where /proc does not tell.
fn is_filtered() -> bool {
    let status = std::fs::read_to_string("/proc/thread-self/status");
    !status.is_ok_and(|status| status.lines().any(|line| line.trim() == "Seccomp:\t0"))
}

/// Makes the system calls in a child process. An error: a filter killed the child.
fn try_in_child() -> Result<(), String> {
    // A clone(2) without an exit signal: the program's handler of SIGCHLD must not see this child.
    // SAFETY: the child has a copy of the calling thread only. It makes system calls with plain
    // values and ends by `_exit`, without a lock, an allocation or a destructor.
    let child = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
    if child == 0 {
        try_calls();
    }
    if child < 0 {
        return Err(at("clone")(io::Error::last_os_error()));
    }
    let mut status = 0;
    // SAFETY: the call waits for the child from above, and writes only to `status`.
    while unsafe { libc::waitpid(child as libc::pid_t, &raw mut status, libc::__WALL) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(at("waitpid")(error));
        }
    }
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        return Err(format!("io_uring: a system call filter kills who uses it (signal {signal})"));
    }
    Ok(())
}

/// Makes each system call once. Their results do not matter.
fn try_calls() -> ! {
    let mut params = [0u8; 120];
    // SAFETY: `params` has the size of `io_uring_params`, and all zeroes are valid parameters.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    for operation in [REGISTER_PBUF_RING, REGISTER_ENABLE_RINGS] {
        // SAFETY: the kernel refuses the call, because it passes no argument.
        unsafe { libc::syscall(libc::SYS_io_uring_register, fd, operation, 0, 0) };
    }
    // SAFETY: the call submits nothing and waits for nothing.
    unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, 0, 0, 0, 0, 0) };
    // SAFETY: `_exit` ends the child and runs no code of the parent.
    unsafe { libc::_exit(0) }
}

fn at(call: &'static str) -> impl Fn(io::Error) -> String {
    move |error| format!("{call}: {error}")
}

const RECEIVE: u64 = 1;
const CANCEL: u64 = 2;
const SEND: u64 = 3;

static BYTE: [u8; 1] = [0];

/// The longest wait for a byte through a socket pair. A busy host needs milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);

// uapi/linux/io_uring.h.
const REGISTER_ENABLE_RINGS: u32 = 12;
const REGISTER_PBUF_RING: u32 = 22;
