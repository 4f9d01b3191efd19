//! Socket calls on owned descriptors.
//!
//! A [`Socket`] closes its descriptor when the last `Arc` to it drops: backends and connections
//! share it that way, so a number is never reused while an operation still names it.

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
    /// The kernel may be asked to send from our memory, without a copy.
    takes_zero_copy: AtomicBool,
}

/// Which sides of a stream to end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Side {
    Write,
    Both,
}

impl Socket {
    /// Adopts a stream socket or a listener of the caller's.
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

    /// Starts connecting. `WouldBlock` from TCP means it is under way; from a unix socket, that the
    /// backlog is full.
    pub(crate) fn connect(&self, peer: &PeerAddr) -> io::Result<()> {
        name::connect(self.as_fd(), peer)
    }

    /// Why connecting failed, if it did.
    pub(crate) fn take_error(&self) -> io::Result<()> {
        sockopt::socket_error(&self.fd)?.map_err(io::Error::from)
    }

    pub(crate) fn accept(&self) -> io::Result<(Socket, PeerAddr)> {
        let (fd, peer) = name::accept(self.as_fd())?;
        Ok((Socket::of_kind(fd, self.is_tcp), peer))
    }

    /// A connection that the kernel accepted for us on this listener, and its peer, as
    /// [`accept`](Self::accept) tells it: a peer that is gone already has a name as well.
    pub(crate) fn accepted(&self, fd: OwnedFd) -> io::Result<(Socket, PeerAddr)> {
        let peer = name::peer_even_if_reset(fd.as_fd())?;
        Ok((Socket::of_kind(fd, self.is_tcp), peer))
    }

    /// Errors that accept(2) passes on from the new connection; they say nothing of the listener.
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

    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (received, _) = retry_on_intr(|| recv(&self.fd, &mut *buffer, RecvFlags::empty()))?;
        Ok(received)
    }

    /// Sends from the front of `bytes` what the kernel takes now, in one call, and drops it; memory
    /// of the user's goes to `spent`. Returns how much was asked for and how much was taken, which
    /// may be nothing.
    #[inline(always)]
    pub(crate) fn send_chain(
        &self,
        bytes: &mut Chain,
        spent: &mut Spent,
        counters: &Counters,
    ) -> io::Result<(usize, usize)> {
        counters.add(|counters| &counters.send_calls, 1);
        let (asked, done) = if bytes.front_slice().len() == bytes.len() {
            // One area needs no message header, which the kernel would have to copy in first.
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

    /// Out of the way of those that have one area: the message takes a large stack.
    #[inline(never)]
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

    /// Ends the connection at once: what the kernel has not sent is dropped. The peer of a TCP
    /// connection sees a reset; a Unix socket has none.
    pub(crate) fn reset(&self) -> io::Result<()> {
        if !self.is_tcp {
            return self.shutdown(Side::Both);
        }
        // The kernel's way to abort: see connect(2) on AF_UNSPEC, and `tcp_disconnect`.
        connect_unspec(&self.fd).or_else(|_| shutdown(&self.fd, Shutdown::Both))?;
        Ok(())
    }

    /// How far the peer has got in taking what was sent.
    pub(crate) fn taken_by_peer(&self) -> io::Result<Taken> {
        super::progress::taken_by_peer(self.fd.as_fd(), self.is_tcp)
    }

    /// Bytes that have arrived in the kernel and were not received.
    pub(crate) fn arrived_bytes(&self) -> io::Result<u64> {
        Ok(rustix::io::ioctl_fionread(&self.fd)?)
    }

    /// Receives and drops the urgent byte, so that later receives do not stop at its mark.
    pub(crate) fn discard_urgent(&self) {
        // Fails if the mark arrived before its byte; that byte is then received as ordinary data.
        let _ = recv(&self.fd, &mut [0u8; 1][..], RecvFlags::OOB | RecvFlags::DONTWAIT);
    }

    pub(crate) fn local_addr(&self) -> io::Result<PeerAddr> {
        name::local(self.as_fd())
    }

    pub(crate) fn peer_addr(&self) -> io::Result<PeerAddr> {
        name::peer(self.as_fd())
    }

    /// Turns TCP_NODELAY on where there is one.
    pub(crate) fn set_nodelay(&self) -> io::Result<()> {
        if self.is_tcp {
            sockopt::set_tcp_nodelay(&self.fd, true)?;
        }
        Ok(())
    }

    #[inline]
    pub(crate) fn is_tcp(&self) -> bool {
        self.is_tcp
    }

    /// Whether to ask for sends without a copy: over TCP, until the kernel has refused one.
    pub(crate) fn takes_zero_copy(&self) -> bool {
        self.takes_zero_copy.load(Ordering::Relaxed)
    }

    /// The kernel has refused to send without a copy.
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

    /// A socket that was made for `addr`.
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

/// Before connecting or listening: the window that TCP offers depends on the buffers.
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
