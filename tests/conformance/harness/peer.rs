//! The other side of a connection under test: plain std sockets, and plain words for what they do.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ringpoll::{Error, Handle};
use rustix::net::sockopt;

use super::{DEADLINE, eventually};

/// Connects to `addr`; no call on the stream waits longer than [`DEADLINE`].
pub(crate) fn connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&addr, DEADLINE)?;
    stream.set_nodelay(true)?;
    bound(&stream)?;
    Ok(stream)
}

/// Lets no call on the stream wait longer than [`DEADLINE`].
pub(crate) fn bound(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))
}

/// [`bound`] for a unix socket.
pub(crate) fn bound_unix(stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))
}

/// Two ends of one loopback TCP connection.
pub(crate) fn tcp_pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let one = connect(listener.local_addr()?)?;
    let (other, _) = listener.accept()?;
    bound(&other)?;
    Ok((one, other))
}

/// Reads exactly `count` bytes.
pub(crate) fn read_exactly(mut stream: impl Read, count: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Reads until the end of the stream.
pub(crate) fn read_all(mut stream: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Fails unless the stream has ended: EOF or a reset, and no byte before it.
#[track_caller]
pub(crate) fn assert_ended(mut stream: impl Read) {
    match stream.read(&mut [0]) {
        Ok(0) => {}
        Ok(_) => panic!("got a byte, wanted the end of the stream"),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("wanted the end of the stream, got {error}"),
    }
}

/// Fails unless the stream has ended the polite way: EOF, no reset.
#[track_caller]
pub(crate) fn assert_eof(mut stream: impl Read) {
    match stream.read(&mut [0]) {
        Ok(0) => {}
        Ok(_) => panic!("got a byte, wanted EOF"),
        Err(error) => panic!("wanted EOF, got {error}"),
    }
}

/// Sends `bytes` and reads the same number back.
pub(crate) fn exchange(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(bytes)?;
    read_exactly(stream, bytes.len())
}

/// Closes with a reset instead of a FIN.
pub(crate) fn reset(stream: TcpStream) -> io::Result<()> {
    // Linger of zero makes close() drop what is unsent and send RST (tcp(7), SO_LINGER).
    sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
    Ok(())
}

/// Makes the kernel hold little for this stream, so that its peer's sends soon have to wait.
pub(crate) fn shrink_receive_buffer(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_socket_recv_buffer_size(stream, 4096)?;
    Ok(())
}

/// Makes the kernel take little at once from this connection of ours.
pub(crate) fn shrink_send_buffer(conn: &Handle) -> ringpoll::Result<()> {
    conn.with_fd(|fd| sockopt::set_socket_send_buffer_size(fd, 4096))?.map_err(Error::other)
}

/// Waits until the other side's kernel has all bytes.
pub(crate) fn until_arrived(stream: &TcpStream) {
    eventually("the bytes arrive", || {
        let mut unacknowledged: libc::c_int = 0;
        // SAFETY: the request writes one integer (tcp(7), SIOCOUTQ).
        let done = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &mut unacknowledged) };
        done == 0 && unacknowledged == 0
    });
}

/// A listener whose accept queue is full: a connect to it gets no answer.
///
/// The kernel drops SYNs for a listener with more than `backlog` connections waiting.
pub(crate) struct DeafListener {
    pub(crate) addr: SocketAddr,
    _listener: TcpListener,
    _fillers: Vec<TcpStream>,
}

impl DeafListener {
    pub(crate) fn new() -> io::Result<DeafListener> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        // A second listen() only changes the backlog (listen(2)).
        rustix::net::listen(&listener, 0)?;
        let addr = listener.local_addr()?;
        let mut fillers = Vec::new();
        for _ in 0..16 {
            match TcpStream::connect_timeout(&addr, Duration::from_millis(100)) {
                Ok(stream) => fillers.push(stream),
                Err(error) if error.kind() == ErrorKind::TimedOut => {
                    return Ok(DeafListener { addr, _listener: listener, _fillers: fillers });
                }
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("this kernel answers although the backlog is full"))
    }
}
