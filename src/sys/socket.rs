//! Socket calls on owned descriptors.
//!
//! Backends and connections share a [`Socket`] by `Arc`. The last `Arc` closes the descriptor, so
//! the kernel does not reuse a descriptor's number while an operation names it. Any thread may
//! call.

mod file;
mod listen;
mod name;
mod setup;

use std::fs::File;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::BufMut;
use rustix::fs::sendfile;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, SocketFlags, SocketType,
    connect_unspec, recv, send, sendmsg, shutdown, socket_with, sockopt,
};

use crate::address::PeerAddr;
use crate::buffer::{Chain, Spent};
use crate::clock::now_ns;
use crate::config::{self, SocketOptions, ZeroCopyRule};
use crate::counters::Counters;

pub(crate) use super::progress::Taken;
pub(crate) use file::SocketFile;
pub(crate) use listen::{ListenOptions, Listener, listen};
pub(crate) use setup::{DialOptions, SocketError, SocketHook};

const SEND_FLAGS: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

/// A stream socket or a listener, non-blocking and close-on-exec.
pub(crate) struct Socket {
    fd: OwnedFd,
    is_tcp: bool,
    /// From when on zero-copy sends may be made, on the clock of [`now_ns`].
    zero_copy_from_ns: AtomicU64,
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

    /// An unconnected stream for `peer`. Calls the user's hook: hold no lock.
    pub(crate) fn for_peer(peer: &PeerAddr, options: &DialOptions) -> Result<Socket, SocketError> {
        let fd = new_stream(peer)?;
        setup::set_options(fd.as_fd(), peer, &options.socket)?;
        if options.fast_open && is_inet(peer) {
            setup::set_int(fd.as_fd(), setup::option!(SOL_TCP, TCP_FASTOPEN_CONNECT), 1)?;
        }
        if let Some(hook) = &options.before_connect {
            hook.call("before_connect", fd.as_fd())?;
        }
        if let Some(local) = options.local_addr.filter(|_| is_inet(peer)) {
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

    /// Receives at most `bytes_max` into the next chunk of `buffer`, which has room. `Ok(0)`: the
    /// end of the stream, or `keeps` is `false` after the receive, and the bytes are dropped.
    pub(crate) fn receive_into(
        &self,
        buffer: &mut impl BufMut,
        bytes_max: usize,
        keeps: impl FnOnce() -> bool,
    ) -> io::Result<usize> {
        let bytes = retry_on_intr(|| {
            let chunk = buffer.chunk_mut();
            let bytes_max = bytes_max.min(chunk.len());
            // SAFETY: the kernel writes only initialized bytes to this memory.
            let chunk = unsafe { &mut chunk.as_uninit_slice_mut()[..bytes_max] };
            recv(&self.fd, chunk, RecvFlags::DONTWAIT).map(|(_, bytes)| bytes)
        })?;
        if !keeps() {
            return Ok(0);
        }
        // SAFETY: the kernel has written so many bytes to the chunk.
        unsafe { buffer.advance_mut(bytes) };
        Ok(bytes)
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
            // TCP fast open: the kernel connects without bytes, because it has no cookie any more.
            Err(Errno::AGAIN | Errno::INPROGRESS) => Ok((asked, 0)),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends from the front of `pieces` in one call. Returns how many bytes the kernel took, which
    /// may be none. Sends at most [`GATHER_SLICES_MAX`](config::GATHER_SLICES_MAX) pieces.
    pub(crate) fn send_pieces(
        &self,
        pieces: &[IoSlice<'_>],
        counters: &Counters,
    ) -> io::Result<usize> {
        counters.add(|counters| &counters.send_calls, 1);
        let pieces = &pieces[..pieces.len().min(config::GATHER_SLICES_MAX)];
        let control = &mut SendAncillaryBuffer::default();
        match retry_on_intr(|| sendmsg(&self.fd, pieces, control, SEND_FLAGS)) {
            Ok(sent) => {
                counters.add(|counters| &counters.sent_bytes, sent as u64);
                Ok(sent)
            }
            // TCP fast open, without a cookie.
            Err(Errno::AGAIN | Errno::INPROGRESS) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    fn send_gathered(&self, bytes: &Chain) -> (usize, rustix::io::Result<usize>) {
        let mut iovs = [IoSlice::new(&[]); config::GATHER_SLICES_MAX];
        let (count, asked) = bytes.fill_iovs(&mut iovs);
        let control = &mut SendAncillaryBuffer::default();
        (asked, retry_on_intr(|| sendmsg(&self.fd, &iovs[..count], control, SEND_FLAGS)))
    }

    /// Sends bytes of `range` of `file` in one call, which may wait for the disk and never waits
    /// for the peer. Returns how many the kernel took, 0 at the end of the file; `None` if the
    /// socket is full, or if sendfile(2) does not work with this file.
    pub(crate) fn send_file(
        &self,
        file: &File,
        range: Range<u64>,
        counters: &Counters,
    ) -> io::Result<Option<usize>> {
        counters.add(|counters| &counters.send_calls, 1);
        let bytes = (range.end - range.start).min(config::SEND_TURN_BYTES as u64) as usize;
        let mut from = range.start;
        match retry_on_intr(|| sendfile(&self.fd, file, Some(&mut from), bytes)) {
            Ok(sent) => {
                counters.add(|counters| &counters.sent_bytes, sent as u64);
                Ok(Some(sent))
            }
            Err(Errno::AGAIN | Errno::INPROGRESS | Errno::INVAL | Errno::NOSYS | Errno::SPIPE) => {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
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

    /// Whether a TCP connection was reset, or has ended on both sides.
    pub(crate) fn is_over(&self) -> io::Result<bool> {
        Ok(self.is_tcp && super::progress::is_over(self.fd.as_fd())?)
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

    /// Sets TCP_NODELAY on an adopted TCP socket, if `options` have it.
    pub(crate) fn adopt_nodelay(&self, options: &SocketOptions) -> io::Result<()> {
        if self.is_tcp && !options.nagle {
            sockopt::set_tcp_nodelay(&self.fd, true)?;
        }
        Ok(())
    }

    pub(crate) fn is_tcp(&self) -> bool {
        self.is_tcp
    }

    /// Whether a send of `bytes` is to be zero-copy. Never on a Unix socket.
    #[inline]
    pub(crate) fn suits_zero_copy(
        &self,
        bytes: usize,
        rule: &ZeroCopyRule,
        counters: &Counters,
    ) -> bool {
        bytes >= rule.bytes_min
            && counters.zero_copy_held_bytes.read() < config::uring::ZERO_COPY_HELD_BYTES_MAX
            && match self.zero_copy_from_ns.load(Ordering::Relaxed) {
                0 => true,
                u64::MAX => false,
                from_ns => from_ns <= now_ns(),
            }
    }

    /// Allows zero-copy sends: the kernel has made one without a copy.
    pub(crate) fn allow_zero_copy(&self) {
        self.zero_copy_from_ns.store(0, Ordering::Relaxed);
    }

    /// Makes no zero-copy send for [`ZERO_COPY_RETRY`](config::uring::ZERO_COPY_RETRY). `false`:
    /// it made none before.
    pub(crate) fn pause_zero_copy(&self) -> bool {
        let now_ns = now_ns();
        let from_ns = now_ns + config::uring::ZERO_COPY_RETRY.as_nanos() as u64;
        self.zero_copy_from_ns.swap(from_ns, Ordering::Relaxed) <= now_ns
    }

    /// Makes no zero-copy send any more: the kernel refuses them on this socket.
    pub(crate) fn refuse_zero_copy(&self) {
        self.zero_copy_from_ns.store(u64::MAX, Ordering::Relaxed);
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
        let zero_copy_from_ns = AtomicU64::new(if is_tcp { 0 } else { u64::MAX });
        Socket { fd, is_tcp, zero_copy_from_ns }
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
        PeerAddr::Unix(_) | PeerAddr::Abstract(_) => AddressFamily::UNIX,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(socket_with(family, SocketType::STREAM, flags, None)?)
}
