//! Socket calls on owned descriptors.
//!
//! Backends and connections share a [`Socket`] by `Arc`. The last `Arc` closes the descriptor, so
//! the kernel does not reuse a descriptor's number while an operation names it. Any thread may
//! call.

mod file;
mod listen;
mod name;

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, SocketFlags, SocketType,
    connect_unspec, recv, send, sendmsg, shutdown, socket_with, sockopt,
};

use crate::address::PeerAddr;
use crate::buffer::{Chain, Spent};
use crate::config::{self, SocketOptions};
use crate::counters::Counters;

pub(crate) use super::progress::Taken;
pub(crate) use file::SocketFile;
pub(crate) use listen::{ListenOptions, Listener, listen};

const SEND_FLAGS: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

/// A stream socket or a listener, non-blocking and close-on-exec.
pub(crate) struct Socket {
    fd: OwnedFd,
    is_tcp: bool,
    /// The kernel has not refused a zero-copy send on this socket.
    takes_zero_copy: AtomicBool,
}

/// Which sides of a stream to end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Side {
    Write,
    Both,
}

/// One turn of sending: see [`Socket::send_turn`].
pub(crate) struct SendTurn {
    /// Bytes that the kernel took, also where the turn ended with an error.
    pub(crate) bytes: usize,
    pub(crate) end: io::Result<TurnEnd>,
}

/// Why a turn of sending ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TurnEnd {
    /// Every byte is sent.
    Done,
    /// The socket took fewer bytes than asked.
    Full,
    /// The turn's bytes are sent. The socket may take more.
    Unfinished,
}

impl Socket {
    /// Takes over a stream socket or a listener, and makes it non-blocking.
    pub(crate) fn adopt(fd: OwnedFd) -> io::Result<Socket> {
        if sockopt::socket_type(&fd)? != SocketType::STREAM {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a stream socket"));
        }
        rustix::io::ioctl_fionbio(&fd, true)?;
        let domain = sockopt::socket_domain(&fd)?;
        let is_tcp = matches!(domain, AddressFamily::INET | AddressFamily::INET6);
        Ok(Socket::of_kind(fd, is_tcp))
    }

    /// An unconnected stream for `peer`, bound to `local` if given.
    pub(crate) fn for_peer(
        peer: &PeerAddr,
        local: Option<SocketAddr>,
        options: &SocketOptions,
    ) -> io::Result<Socket> {
        let fd = new_stream(peer)?;
        set_options(&fd, peer, options)?;
        if is_inet(peer) {
            sockopt::set_tcp_nodelay(&fd, true)?;
        }
        if let Some(local) = local {
            sockopt::set_socket_reuseaddr(&fd, true)?;
            name::bind(fd.as_fd(), &PeerAddr::Inet(local))?;
        }
        Ok(Socket::new(fd, peer))
    }

    /// Starts connecting. TCP returns `EINPROGRESS` while connecting is in progress. A Unix socket
    /// returns `WouldBlock` when the listener's backlog is full.
    pub(crate) fn connect(&self, peer: &PeerAddr) -> io::Result<()> {
        name::connect(self.as_fd(), peer)
    }

    /// The pending error of the socket (`SO_ERROR`): after connecting, the reason of a failure.
    pub(crate) fn take_error(&self) -> io::Result<()> {
        sockopt::socket_error(&self.fd)?.map_err(io::Error::from)
    }

    pub(crate) fn accept(&self) -> io::Result<(Socket, PeerAddr)> {
        let (fd, peer) = name::accept(self.as_fd())?;
        Ok((Socket::of_kind(fd, self.is_tcp), peer))
    }

    /// The connection `fd`, which io_uring accepted on this listener, and its peer, as
    /// [`accept`](Self::accept) returns them. A peer that has already reset has an address too.
    pub(crate) fn accepted(&self, fd: OwnedFd) -> io::Result<(Socket, PeerAddr)> {
        let peer = name::peer_even_if_reset(fd.as_fd())?;
        Ok((Socket::of_kind(fd, self.is_tcp), peer))
    }

    /// Whether accept(2) failed because of the new connection. The listener works in that case.
    pub(crate) fn is_error_of_the_newcomer(error: &io::Error) -> bool {
        const OF_THE_NEWCOMER: [Errno; 10] = [
            Errno::CONNABORTED,
            Errno::CONNRESET,
            Errno::PROTO,
            Errno::PERM,
            Errno::NETDOWN,
            Errno::NOPROTOOPT,
            Errno::HOSTDOWN,
            Errno::NONET,
            Errno::HOSTUNREACH,
            Errno::NETUNREACH,
        ];
        OF_THE_NEWCOMER.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
    }

    #[inline(always)]
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (received, _) = retry_on_intr(|| recv(&self.fd, &mut *buffer, RecvFlags::empty()))?;
        Ok(received)
    }

    /// Sends from the front of `bytes` until all are sent, the socket is full, or one turn's
    /// [`SEND_TURN_BYTES`](config::SEND_TURN_BYTES) are sent. Drops sent bytes; the user's memory
    /// goes to `spent`.
    #[inline(always)]
    pub(crate) fn send_turn(
        &self,
        bytes: &mut Chain,
        spent: &mut Spent,
        counters: &Counters,
    ) -> SendTurn {
        let mut sent_bytes = 0;
        let end = loop {
            if bytes.is_empty() {
                break Ok(TurnEnd::Done);
            }
            if sent_bytes >= config::SEND_TURN_BYTES {
                break Ok(TurnEnd::Unfinished);
            }
            match self.send_chain(bytes, spent, counters) {
                Ok((asked, sent)) => {
                    sent_bytes += sent;
                    if sent < asked {
                        break Ok(TurnEnd::Full);
                    }
                }
                Err(error) => break Err(error),
            }
        };
        SendTurn { bytes: sent_bytes, end }
    }

    /// Sends from the front of `bytes` in one call, and drops the sent bytes; the user's memory
    /// goes to `spent`. Returns how many bytes the call asked for, and how many the kernel took,
    /// which may be none.
    #[inline(always)]
    fn send_chain(
        &self,
        bytes: &mut Chain,
        spent: &mut Spent,
        counters: &Counters,
    ) -> io::Result<(usize, usize)> {
        counters.add(|counters| &counters.send_calls, 1);
        let (asked, done) = if bytes.front_slice().len() == bytes.len() {
            // A single slice needs no message header, which the kernel would copy in first.
            (bytes.len(), retry_on_intr(|| send(&self.fd, bytes.front_slice(), SEND_FLAGS)))
        } else {
            self.send_gathered(bytes)
        };
        match done {
            Ok(sent) => {
                counters.add(|counters| &counters.sent_bytes, sent as u64);
                bytes.spend(sent, spent);
                Ok((asked, sent))
            }
            Err(Errno::AGAIN) => Ok((asked, 0)),
            Err(error) => Err(error.into()),
        }
    }

    fn send_gathered(&self, bytes: &Chain) -> (usize, rustix::io::Result<usize>) {
        let mut iovs = [IoSlice::new(&[]); config::GATHER_SLICES_MAX];
        let (count, asked) = bytes.fill_iovs(&mut iovs);
        let control = &mut SendAncillaryBuffer::default();
        (asked, retry_on_intr(|| sendmsg(&self.fd, &iovs[..count], control, SEND_FLAGS)))
    }

    pub(crate) fn shutdown(&self, side: Side) -> io::Result<()> {
        let how = match side {
            Side::Write => Shutdown::Write,
            Side::Both => Shutdown::Both,
        };
        shutdown(&self.fd, how).map_err(io::Error::from)
    }

    /// Ends the connection at once. The kernel drops unsent bytes. The peer of a TCP connection
    /// sees a reset; the peer of a Unix socket sees the end of the stream.
    pub(crate) fn reset(&self) -> io::Result<()> {
        if !self.is_tcp {
            return self.shutdown(Side::Both);
        }
        // Connecting to AF_UNSPEC resets a TCP connection: connect(2), `tcp_disconnect`.
        connect_unspec(&self.fd).or_else(|_| shutdown(&self.fd, Shutdown::Both))?;
        Ok(())
    }

    /// How much of the sent bytes the peer has taken.
    pub(crate) fn taken_by_peer(&self) -> io::Result<Taken> {
        super::progress::taken_by_peer(self.fd.as_fd(), self.is_tcp)
    }

    /// Bytes in the kernel's receive buffer.
    pub(crate) fn arrived_bytes(&self) -> io::Result<u64> {
        Ok(rustix::io::ioctl_fionread(&self.fd)?)
    }

    /// Receives and drops the urgent byte, so that later receives do not stop at its mark.
    pub(crate) fn discard_urgent(&self) {
        // The call fails while the urgent byte has not arrived. A later receive then returns that
        // byte as ordinary data.
        let _ = recv(&self.fd, &mut [0u8; 1][..], RecvFlags::OOB | RecvFlags::DONTWAIT);
    }

    pub(crate) fn local_addr(&self) -> io::Result<PeerAddr> {
        name::local(self.as_fd())
    }

    pub(crate) fn peer_addr(&self) -> io::Result<PeerAddr> {
        name::peer(self.as_fd())
    }

    /// Sets TCP_NODELAY on a TCP socket.
    pub(crate) fn set_nodelay(&self) -> io::Result<()> {
        if self.is_tcp {
            sockopt::set_tcp_nodelay(&self.fd, true)?;
        }
        Ok(())
    }

    pub(crate) fn is_tcp(&self) -> bool {
        self.is_tcp
    }

    /// Whether to ask for zero-copy sends: on TCP, until the kernel has refused one.
    pub(crate) fn takes_zero_copy(&self) -> bool {
        self.takes_zero_copy.load(Ordering::Relaxed)
    }

    /// Notes that the kernel refused a zero-copy send.
    pub(crate) fn refuse_zero_copy(&self) {
        self.takes_zero_copy.store(false, Ordering::Relaxed);
    }

    /// Another descriptor of the same socket.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    pub(crate) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// A socket of the family of `addr`.
    fn new(fd: OwnedFd, addr: &PeerAddr) -> Socket {
        Socket::of_kind(fd, is_inet(addr))
    }

    fn of_kind(fd: OwnedFd, is_tcp: bool) -> Socket {
        Socket { fd, is_tcp, takes_zero_copy: AtomicBool::new(is_tcp) }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn is_inet(addr: &PeerAddr) -> bool {
    matches!(addr, PeerAddr::Inet(_))
}

fn new_stream(addr: &PeerAddr) -> io::Result<OwnedFd> {
    let family = match addr {
        PeerAddr::Inet(SocketAddr::V4(_)) => AddressFamily::INET,
        PeerAddr::Inet(SocketAddr::V6(_)) => AddressFamily::INET6,
        PeerAddr::Unix(_) => AddressFamily::UNIX,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(socket_with(family, SocketType::STREAM, flags, None)?)
}

/// Call this before connecting or listening: TCP chooses its window scale from the buffer sizes.
fn set_options(fd: &OwnedFd, addr: &PeerAddr, options: &SocketOptions) -> io::Result<()> {
    if let Some(name) = options.congestion_control.as_ref().filter(|_| is_inet(addr)) {
        sockopt::set_tcp_congestion(fd, name).map_err(|errno| {
            let message = format!("congestion control {name:?}: {errno}");
            io::Error::new(io::ErrorKind::InvalidInput, message)
        })?;
    }
    if options.receive_buffer_bytes > 0 {
        sockopt::set_socket_recv_buffer_size(fd, options.receive_buffer_bytes)?;
    }
    if options.send_buffer_bytes > 0 {
        sockopt::set_socket_send_buffer_size(fd, options.send_buffer_bytes)?;
    }
    Ok(())
}
