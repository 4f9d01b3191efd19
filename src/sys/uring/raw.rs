//! `io_uring_enter(2)` and `io_uring_register(2)`, where the `io-uring` crate does not offer them
//! as needed. Constants and structures are those of uapi/linux/io_uring.h.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::opcode;
use io_uring::squeue::Entry;
use io_uring::types::CancelBuilder;
use libc::{c_int, c_long, c_void};

/// How long a call waits in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Do not wait.
    Now,
    /// Wait for a completion.
    Completion,
    /// Wait for a completion, at most this long.
    Timeout(Duration),
}

/// Submits `queued` submissions and waits as `until` says. `flags` are those of the call. Returns
/// how many submissions the kernel took.
pub(super) fn enter(fd: RawFd, queued: u32, until: Until, flags: u32) -> io::Result<u32> {
    let timeout = match until {
        Until::Timeout(timeout) => Some(libc::timespec {
            tv_sec: timeout.as_secs().min(i64::MAX as u64) as _,
            tv_nsec: timeout.subsec_nanos() as _,
        }),
        Until::Now | Until::Completion => None,
    };
    let wait_for = c_int::from(until != Until::Now);
    let arg = WaitArg {
        sigmask: 0,
        sigmask_bytes: 0,
        min_wait_us: 0,
        timeout: timeout.as_ref().map_or(0, |timeout| (&raw const *timeout).addr() as u64),
    };
    let (more_flags, arg, arg_bytes): (u32, *const c_void, usize) = match timeout {
        Some(_) => (ENTER_EXT_ARG, (&raw const arg).cast(), size_of::<WaitArg>()),
        None => (0, std::ptr::null(), 0),
    };
    let flags = flags | more_flags;
    // SAFETY: the callers of `Ring::push` and `SharedQueue::push` promise that the queued entries
    // are valid. `arg` and its timeout live until the call returns, and the kernel keeps no
    // address.
    let taken: c_long = unsafe {
        libc::syscall(libc::SYS_io_uring_enter, fd, queued, wait_for, flags, arg, arg_bytes)
    };
    u32::try_from(taken).map_err(|_| io::Error::last_os_error())
}

/// Errors of `enter` after which the ring works: a signal, a timeout, a short lack of memory, a
/// completion queue that is full for now.
pub(super) fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY))
}

/// Cancels every operation of a ring. The cancellation's own completion has `user_data`.
pub(super) fn cancel_all(user_data: u64) -> Entry {
    opcode::AsyncCancel2::new(CancelBuilder::any().all()).build().user_data(user_data)
}

/// Makes waits on the ring first poll the network cards of its sockets, at most `micros` long.
pub(super) fn poll_cards(fd: RawFd, micros: u32) -> io::Result<()> {
    let mut napi = Napi { busy_poll_us: micros, ..Napi::default() };
    let arg = &raw mut napi;
    // SAFETY: `Napi` has the layout of the one `io_uring_napi` that the kernel reads and writes.
    // The kernel keeps no address.
    let done = unsafe { libc::syscall(libc::SYS_io_uring_register, fd, REGISTER_NAPI, arg, 1) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub(super) const ENTER_GETEVENTS: u32 = 1 << 0;
pub(super) const ENTER_SQ_WAKEUP: u32 = 1 << 1;
pub(super) const ENTER_SQ_WAIT: u32 = 1 << 2;
const ENTER_EXT_ARG: u32 = 1 << 3;
pub(super) const ENTER_NO_IOWAIT: u32 = 1 << 7;
const REGISTER_NAPI: u32 = 27;
pub(super) const RECVSEND_POLL_FIRST: u16 = 1 << 0;
pub(super) const SEND_ZC_REPORT_USAGE: u16 = 1 << 3;
/// In the result of a notification.
pub(super) const NOTIF_USAGE_ZC_COPIED: u32 = 1 << 31;

/// `struct io_uring_getevents_arg`.
#[repr(C)]
struct WaitArg {
    sigmask: u64,
    sigmask_bytes: u32,
    min_wait_us: u32,
    timeout: u64,
}

/// `struct io_uring_napi`.
#[derive(Default)]
#[repr(C)]
struct Napi {
    busy_poll_us: u32,
    prefer_busy_poll: u8,
    operation: u8,
    padding: [u8; 2],
    operation_arg: u32,
    reserved: u32,
}
