//! How many sent bytes the peer has taken, as the kernel reports it.
//!
//! Any thread may ask. Idle timeouts need the answer: a send that the kernel took says nothing
//! about the peer.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// How much of the sent bytes the peer has taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// Changes when the peer takes bytes. The mark of a Unix socket changes also when bytes are
    /// sent.
    pub(crate) mark: u64,
    /// Time since the last acknowledgement of the peer. Zero for Unix sockets, because the kernel
    /// does not report it.
    pub(crate) age: Duration,
}

/// Asks the kernel. The mark of TCP is the number of acknowledged bytes. The mark of a Unix socket
/// is the memory of the bytes that the peer has not received.
pub(super) fn taken_by_peer(fd: BorrowedFd<'_>, is_tcp: bool) -> io::Result<Taken> {
    if !is_tcp {
        return Ok(Taken { mark: queued_bytes(fd)?, age: Duration::ZERO });
    }
    let info = tcp_info(fd)?;
    // A kernel before 4.1 writes a shorter structure. The mark then stays zero.
    Ok(Taken {
        mark: u64::from_ne_bytes(field(&info, BYTES_ACKED_AT)),
        age: Duration::from_millis(u32::from_ne_bytes(field(&info, LAST_ACK_RECV_AT)).into()),
    })
}

/// Whether a TCP connection has no state any more: it was reset, or both sides have ended.
pub(super) fn is_over(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(tcp_info(fd)?[STATE_AT] == TCP_CLOSE)
}

fn tcp_info(fd: BorrowedFd<'_>) -> io::Result<[u8; INFO_BYTES]> {
    let mut info = [0u8; INFO_BYTES];
    let mut info_bytes = INFO_BYTES as libc::socklen_t;
    // SAFETY: the kernel writes at most `info_bytes` bytes to `info`, which is the size of `info`.
    let done = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut info_bytes,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info)
}

fn queued_bytes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one `int` to `bytes`.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes.max(0) as u64)
}

fn field<const BYTES: usize>(info: &[u8; INFO_BYTES], at: usize) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes.copy_from_slice(&info[at..at + BYTES]);
    bytes
}

// struct tcp_info in uapi/linux/tcp.h, and its states in net/tcp_states.h.
const STATE_AT: usize = 0;
const TCP_CLOSE: u8 = 7;
const LAST_ACK_RECV_AT: usize = 56;
const BYTES_ACKED_AT: usize = 120;
const INFO_BYTES: usize = 128;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    fn mark(stream: &impl AsFd, is_tcp: bool) -> u64 {
        taken_by_peer(stream.as_fd(), is_tcp).expect("a stream").mark
    }

    #[test]
    fn bytes_that_a_tcp_peer_takes_change_the_mark() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
        let addr = listener.local_addr().expect("bound");
        let mut sender = TcpStream::connect(addr).expect("it listens");
        let (mut receiver, _) = listener.accept().expect("it connects");
        let before = mark(&sender, true);
        assert_eq!(mark(&sender, true), before);
        sender.write_all(&[7; 1000]).expect("room");
        receiver.read_exact(&mut [0; 1000]).expect("all of it");
        let begun = Instant::now();
        while mark(&sender, true) != before + 1000 {
            assert!(begun.elapsed() < Duration::from_secs(10), "not acknowledged");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_reset_ends_a_connection_and_the_end_of_one_side_does_not() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
        let addr = listener.local_addr().expect("bound");
        let mut stays = TcpStream::connect(addr).expect("it listens");
        let (resets, _) = listener.accept().expect("it connects");
        resets.shutdown(Shutdown::Write).expect("connected");
        assert_eq!(stays.read(&mut [0]).expect("the end"), 0);
        assert!(!is_over(stays.as_fd()).expect("a tcp socket"));
        // Bytes that nobody has received make the close a reset.
        stays.write_all(&[7; 10]).expect("room");
        resets.peek(&mut [0]).expect("they have come");
        drop(resets);
        let begun = Instant::now();
        while !is_over(stays.as_fd()).expect("a tcp socket") {
            assert!(begun.elapsed() < Duration::from_secs(10), "not reset");
            std::thread::yield_now();
        }
    }

    #[test]
    fn bytes_that_a_unix_peer_takes_change_the_mark() {
        let (mut sender, mut receiver) = UnixStream::pair().expect("a pair");
        sender.write_all(&[7; 1000]).expect("room");
        let before = mark(&sender, false);
        assert_eq!(mark(&sender, false), before);
        receiver.read_exact(&mut [0; 1000]).expect("all of it");
        assert_ne!(mark(&sender, false), before);
        assert_eq!(mark(&sender, false), 0);
    }
}
