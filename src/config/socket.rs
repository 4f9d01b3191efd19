//! Options of TCP and Unix sockets.

use std::time::Duration;

use super::some;

/// Options of the sockets of a server or of a dialer: see
/// [`ServerBuilder::socket_options`](crate::ServerBuilder::socket_options) and
/// [`Dialer::socket_options`](crate::Dialer::socket_options).
///
/// A listener is given the options before it is bound, and the kernel copies all of them to each
/// accepted connection. So an option costs no system call for each connection. A dialled connection
/// is given the options before it connects.
///
/// Unix sockets ignore all options except the sizes of [`buffers`](Self::buffers).
///
/// # Errors
/// If the kernel refuses a value, `listen`, `bind` or `connect` fails. The error has the kernel's
/// number, and its message has the kernel's name of the option and the value, for example
/// `listen 127.0.0.1:80: TCP_KEEPCNT 500: Invalid argument (os error 22)`.
///
/// # Examples
/// ```no_run
/// use std::time::Duration;
/// # use ringpoll::{Connection, Dialer, Result, Server, SocketOptions};
/// # fn main() -> Result<()> {
/// let seconds = Duration::from_secs;
/// let options = SocketOptions::new()
///     .keepalive(seconds(60), seconds(10), 3) // a dead peer is found after 90 s
///     .user_timeout(seconds(90)); // also while bytes are not acknowledged
/// let dialer = Dialer::new().socket_options(options.clone());
/// let server = Server::builder()
///     .socket_options(options)
///     .on_request(|mut conn: Connection| async move { conn.next(1).await.map(drop) })
///     .bind("127.0.0.1:8972")?;
/// # drop((dialer, server));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketOptions {
    /// `TCP_NODELAY` is off.
    pub(crate) nagle: bool,
    pub(crate) keepalive: Option<Keepalive>,
    pub(crate) user_timeout: Option<Duration>,
    pub(crate) zero_linger: bool,
    pub(crate) device: Option<String>,
    pub(crate) tos: Option<u8>,
    /// `None` keeps the default of the host.
    pub(crate) congestion_control: Option<String>,
    /// With 0 the kernel adapts the size.
    pub(crate) receive_buffer_bytes: usize,
    /// With 0 the kernel adapts the size.
    pub(crate) send_buffer_bytes: usize,
}

/// When TCP probes a silent peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Keepalive {
    pub(crate) idle: Duration,
    pub(crate) interval: Duration,
    pub(crate) probes: u32,
}

impl SocketOptions {
    /// The defaults: `TCP_NODELAY` is on, everything else is as the host has it.
    #[must_use]
    pub fn new() -> SocketOptions {
        SocketOptions::default()
    }

    /// `TCP_NODELAY`: each flush is sent at once. On by default. When it is off, TCP holds back
    /// bytes that do not fill a segment while earlier bytes are not acknowledged.
    #[must_use]
    pub fn nodelay(mut self, on: bool) -> Self {
        self.nagle = !on;
        self
    }

    /// `SO_KEEPALIVE`: when nothing has arrived for `idle`, TCP probes the peer every `interval`.
    /// After `probes` probes without an answer the connection fails with `ETIMEDOUT`. Off by
    /// default.
    ///
    /// Times are rounded up to whole seconds. The kernel takes 1 to 32767 seconds, and 1 to 127
    /// probes (`TCP_KEEPIDLE`, `TCP_KEEPINTVL`, `TCP_KEEPCNT`). Probes do not count as activity for
    /// the idle timeout of a connection.
    #[must_use]
    pub fn keepalive(mut self, idle: Duration, interval: Duration, probes: u32) -> Self {
        self.keepalive = Some(Keepalive { idle, interval, probes });
        self
    }

    /// `TCP_USER_TIMEOUT`: the connection fails with `ETIMEDOUT` when sent bytes, or probes of
    /// [`keepalive`](Self::keepalive), are not acknowledged for `timeout`. Zero, the default, lets
    /// TCP send lost bytes again for about 15 minutes (`net.ipv4.tcp_retries2`).
    ///
    /// The time is rounded up to whole milliseconds. It is at most 24 days; a longer time counts as
    /// 24 days. When it is set, the kernel ignores the number of probes of `keepalive`.
    #[must_use]
    pub fn user_timeout(mut self, timeout: Duration) -> Self {
        self.user_timeout = some(timeout);
        self
    }

    /// Makes a connection fail when the peer's host has been silent for `timeout`, whether the
    /// connection is idle or sending. Zero changes nothing, and neither do options that have a
    /// keepalive or a user timeout.
    pub(crate) fn or_lost_after(self, timeout: Duration) -> Self {
        if timeout.is_zero() || self.keepalive.is_some() || self.user_timeout.is_some() {
            return self;
        }
        let in_range = |time: Duration| time.clamp(KEEPALIVE_MIN, KEEPALIVE_MAX);
        let (idle, interval) = (in_range(timeout / 2), in_range(timeout / 4));
        self.keepalive(idle, interval, 2).user_timeout(timeout)
    }

    /// `SO_LINGER` with a time of zero: the close of a connection sends a reset. So no connection
    /// waits in the state `TIME_WAIT`, and **bytes that the peer has not acknowledged are lost**,
    /// even if a flush has returned. Off by default.
    ///
    /// There is no setting for a longer time. With such a time, close(2) blocks its thread until
    /// the peer has acknowledged all bytes, and this thread is a poller.
    #[must_use]
    pub fn zero_linger(mut self, on: bool) -> Self {
        self.zero_linger = on;
        self
    }

    /// `SO_BINDTODEVICE`: the socket sends and receives only through the network interface `name`,
    /// for example `eth0`. By default the kernel's routes decide. A name without an interface is
    /// `ENODEV`. Before Linux 5.7 this needs `CAP_NET_RAW`, and is `EPERM` without it.
    #[must_use]
    pub fn device(mut self, name: &str) -> Self {
        self.device = Some(name.to_owned());
        self
    }

    /// The type of service of sent packets: `IP_TOS`, and on IPv6 sockets also `IPV6_TCLASS`. The
    /// default is 0. The upper six bits are the DSCP: 0xb8 is expedited forwarding. TCP uses the
    /// lower two bits itself, for ECN.
    ///
    /// Accepted connections have this value, unless `net.ipv4.tcp_reflect_tos` is set: then they
    /// have that of the peer.
    #[must_use]
    pub fn tos(mut self, tos: u8) -> Self {
        self.tos = Some(tos);
        self
    }

    /// `TCP_CONGESTION`: the congestion control, by its name in the kernel, such as `reno` or
    /// `cubic`. The default is that of the host. A name that the kernel does not know is `ENOENT`.
    #[must_use]
    pub fn congestion_control(mut self, name: &str) -> Self {
        self.congestion_control = Some(name.to_owned());
        self
    }

    /// `SO_RCVBUF` and `SO_SNDBUF`: the sizes in bytes of the socket's buffers. With 0, the
    /// default, the kernel adapts the size to the traffic. The kernel doubles the given size, and
    /// limits it by `net.core.rmem_max` and `wmem_max`. Unix sockets have these options too.
    #[must_use]
    pub fn buffers(mut self, receive_bytes: usize, send_bytes: usize) -> Self {
        self.receive_buffer_bytes = receive_bytes;
        self.send_buffer_bytes = send_bytes;
        self
    }
}

/// The times that the kernel takes for keepalive.
const KEEPALIVE_MIN: Duration = Duration::from_secs(1);
const KEEPALIVE_MAX: Duration = Duration::from_secs(32_767);
