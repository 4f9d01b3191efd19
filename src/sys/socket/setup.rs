//! Setting the options of a socket that is neither bound nor connected.
//!
//! Runs on the thread that starts a server, or that polls a dial. An option that the kernel refuses
//! is an error with the option's name.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use crate::address::PeerAddr;
use crate::config::SocketOptions;
use crate::error::Error;

/// How to make the socket of an outgoing connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct DialOptions {
    pub(crate) socket: SocketOptions,
    /// Ignored for Unix sockets.
    pub(crate) local_addr: Option<SocketAddr>,
    /// Ignored for Unix sockets.
    pub(crate) fast_open: bool,
    pub(crate) before_connect: Option<SocketHook>,
}

/// Why there is no socket for an address.
#[derive(Debug)]
pub(crate) enum SocketError {
    /// The kernel refused an option, or the user's hook failed. Both fail for other addresses too.
    Setup {
        /// The option and its value, or the hook.
        what: String,
        error: io::Error,
    },
    /// The kernel refused the address, or had no socket.
    Address(io::Error),
}

impl SocketError {
    /// The error of `operation`.
    pub(crate) fn of(self, operation: impl fmt::Display) -> Error {
        match self {
            SocketError::Setup { what, error } => {
                Error::io(format_args!("{operation}: {what}"), error)
            }
            SocketError::Address(error) => Error::io(operation, error),
        }
    }

    pub(crate) fn is_in_use(&self) -> bool {
        matches!(self, SocketError::Address(error) if error.kind() == io::ErrorKind::AddrInUse)
    }
}

impl From<io::Error> for SocketError {
    fn from(error: io::Error) -> SocketError {
        SocketError::Address(error)
    }
}

impl From<rustix::io::Errno> for SocketError {
    fn from(errno: rustix::io::Errno) -> SocketError {
        SocketError::Address(errno.into())
    }
}

/// The user's code that sets further options.
#[derive(Clone)]
pub(crate) struct SocketHook(Arc<dyn Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync>);

impl SocketHook {
    pub(crate) fn new(
        code: impl Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync + 'static,
    ) -> SocketHook {
        SocketHook(Arc::new(code))
    }

    /// Call this without a lock. A panic unwinds into the caller, which is a call of the user.
    pub(super) fn call(&self, what: &str, fd: BorrowedFd<'_>) -> Result<(), SocketError> {
        (self.0)(fd).map_err(|error| SocketError::Setup { what: what.to_owned(), error })
    }
}

impl fmt::Debug for SocketHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SocketHook")
    }
}

/// A socket option: its name in the kernel's headers, its level and its number.
#[derive(Clone, Copy)]
pub(super) struct Name {
    pub(super) text: &'static str,
    pub(super) level: libc::c_int,
    pub(super) number: libc::c_int,
}

macro_rules! option {
    ($level:ident, $name:ident) => {
        $crate::sys::socket::setup::Name {
            text: stringify!($name),
            level: libc::$level,
            number: libc::$name,
        }
    };
}
pub(super) use option;

/// Sets `options` on a socket for `addr`. Call this before connecting or listening: TCP chooses its
/// window scale from the buffer sizes.
pub(super) fn set_options(
    fd: BorrowedFd<'_>,
    addr: &PeerAddr,
    options: &SocketOptions,
) -> Result<(), SocketError> {
    if options.receive_buffer_bytes > 0 {
        set_int(fd, option!(SOL_SOCKET, SO_RCVBUF), int(options.receive_buffer_bytes))?;
    }
    if options.send_buffer_bytes > 0 {
        set_int(fd, option!(SOL_SOCKET, SO_SNDBUF), int(options.send_buffer_bytes))?;
    }
    let PeerAddr::Inet(inet) = addr else { return Ok(()) };
    if let Some(name) = &options.device {
        set_device(fd, name)?;
    }
    if let Some(tos) = options.tos {
        // An IPv6 socket sends to IPv4 addresses with IP_TOS.
        set_int(fd, option!(SOL_IP, IP_TOS), tos.into())?;
        if inet.is_ipv6() {
            set_int(fd, option!(SOL_IPV6, IPV6_TCLASS), tos.into())?;
        }
    }
    if options.zero_linger {
        let [on, seconds] = [1, 0].map(libc::c_int::to_ne_bytes);
        set(fd, option!(SOL_SOCKET, SO_LINGER), &[on, seconds].concat(), "0 s")?;
    }
    set_tcp_options(fd, options)
}

fn set_tcp_options(fd: BorrowedFd<'_>, options: &SocketOptions) -> Result<(), SocketError> {
    if !options.nagle {
        set_int(fd, option!(SOL_TCP, TCP_NODELAY), 1)?;
    }
    if let Some(name) = &options.congestion_control {
        set(fd, option!(SOL_TCP, TCP_CONGESTION), name.as_bytes(), format_args!("{name:?}"))?;
    }
    if let Some(keepalive) = &options.keepalive {
        set_int(fd, option!(SOL_SOCKET, SO_KEEPALIVE), 1)?;
        set_int(fd, option!(SOL_TCP, TCP_KEEPIDLE), seconds(keepalive.idle))?;
        set_int(fd, option!(SOL_TCP, TCP_KEEPINTVL), seconds(keepalive.interval))?;
        set_int(fd, option!(SOL_TCP, TCP_KEEPCNT), int(keepalive.probes))?;
    }
    if let Some(timeout) = options.user_timeout {
        let timeout_ms = int(timeout.as_nanos().div_ceil(1_000_000));
        set_int(fd, option!(SOL_TCP, TCP_USER_TIMEOUT), timeout_ms)?;
    }
    Ok(())
}

fn set_device(fd: BorrowedFd<'_>, name: &str) -> Result<(), SocketError> {
    let option = option!(SOL_SOCKET, SO_BINDTODEVICE);
    // The kernel would cut a longer name, and would take an empty name for no interface at all.
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        let error = io::Error::from_raw_os_error(libc::ENODEV);
        return Err(refused(option, format_args!("{name:?}"), error));
    }
    set(fd, option, name.as_bytes(), format_args!("{name:?}"))
}

pub(super) fn set_int(
    fd: BorrowedFd<'_>,
    option: Name,
    value: libc::c_int,
) -> Result<(), SocketError> {
    set(fd, option, &value.to_ne_bytes(), value)
}

/// Sets `option` to the bytes `value`. An error shows the value as `shown`.
fn set(
    fd: BorrowedFd<'_>,
    option: Name,
    value: &[u8],
    shown: impl fmt::Display,
) -> Result<(), SocketError> {
    let (start, bytes) = (value.as_ptr().cast(), value.len() as libc::socklen_t);
    // SAFETY: the kernel reads `bytes` bytes at `start`, which are those of `value`.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), option.level, option.number, start, bytes) };
    match result {
        0 => Ok(()),
        _ => Err(refused(option, shown, io::Error::last_os_error())),
    }
}

fn refused(option: Name, shown: impl fmt::Display, error: io::Error) -> SocketError {
    SocketError::Setup { what: format!("{} {shown}", option.text), error }
}

/// `time` in seconds, rounded up.
pub(super) fn seconds(time: Duration) -> libc::c_int {
    int(time.as_nanos().div_ceil(1_000_000_000))
}

/// The largest number that fits stands for a larger one. Where it is too large for an option, the
/// kernel refuses it.
pub(super) fn int(value: impl TryInto<libc::c_int>) -> libc::c_int {
    value.try_into().unwrap_or(libc::c_int::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rounded_up_and_bounded() {
        for (time, rounded) in [
            (Duration::ZERO, 0),
            (Duration::from_nanos(1), 1),
            (Duration::from_secs(1), 1),
            (Duration::from_millis(1001), 2),
            (Duration::MAX, i32::MAX),
        ] {
            assert_eq!(seconds(time), rounded, "{time:?}");
        }
        assert_eq!(int(7u32), 7);
        assert_eq!(int(u32::MAX), i32::MAX);
    }

    #[test]
    fn an_error_names_what_was_refused_and_keeps_the_kernels_number() {
        let error = refused(option!(SOL_TCP, TCP_KEEPCNT), 500, io::Error::from_raw_os_error(22));
        assert!(!error.is_in_use());
        let error = error.of("listen :80");
        assert!(error.to_string().starts_with("listen :80: TCP_KEEPCNT 500: "), "{error}");
        assert_eq!(error.raw_os_error(), Some(22));
    }

    /// `EADDRINUSE` of a hook is no reason to bind again.
    #[test]
    fn only_an_address_is_in_use() {
        let in_use = || io::Error::from_raw_os_error(libc::EADDRINUSE);
        assert!(SocketError::from(in_use()).is_in_use());
        let hook = SocketHook::new(move |_| Err(in_use()));
        let file = std::fs::File::open("/dev/null").expect("every Linux has it");
        let error =
            hook.call("before_bind", std::os::fd::AsFd::as_fd(&file)).expect_err("it fails");
        assert!(!error.is_in_use());
        let error = error.of("listen :80");
        assert!(error.to_string().starts_with("listen :80: before_bind: "), "{error}");
        assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE));
    }
}
