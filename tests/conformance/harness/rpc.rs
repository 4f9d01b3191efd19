//! A server of numbered messages that a test plays itself, byte by byte.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use ringpoll::rpc::{Client, ClientBuilder, LengthPrefixed};
use ringpoll::{Result, Slice};

use super::{Check, DEADLINE, Failure, Fixture, bound};

/// Listens for the connections of a client.
pub(crate) struct Played {
    listener: TcpListener,
    pub(crate) addr: SocketAddr,
}

/// One connection of a client.
pub(crate) struct Line(pub(crate) TcpStream);

impl Played {
    pub(crate) fn new() -> io::Result<Played> {
        Played::at((Ipv4Addr::LOCALHOST, 0).into())
    }

    pub(crate) fn at(addr: SocketAddr) -> io::Result<Played> {
        let listener = TcpListener::bind(addr)?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        Ok(Played { listener, addr })
    }

    /// The next connection.
    pub(crate) fn accept(&self) -> Check<Line> {
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            if let Some(line) = self.try_accept()? {
                return Ok(line);
            }
            thread::park_timeout(Duration::from_millis(1));
        }
        Err(Failure::new("no connection"))
    }

    /// The next connection, if there is one.
    pub(crate) fn try_accept(&self) -> io::Result<Option<Line>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                bound(&stream)?;
                Ok(Some(Line(stream)))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Line {
    /// The next request: its number and its body.
    pub(crate) fn request(&mut self) -> io::Result<(u32, Vec<u8>)> {
        let mut header = [0; 8];
        self.0.read_exact(&mut header)?;
        let [a, b, c, d, number @ ..] = header;
        let mut body = vec![0; u32::from_be_bytes([a, b, c, d]) as usize - 4];
        self.0.read_exact(&mut body)?;
        Ok((u32::from_be_bytes(number), body))
    }

    /// The next request. `None`: none has begun within `limit`.
    pub(crate) fn request_within(&mut self, limit: Duration) -> io::Result<Option<(u32, Vec<u8>)>> {
        self.0.set_read_timeout(Some(limit))?;
        let peeked = self.0.peek(&mut [0]);
        self.0.set_read_timeout(Some(DEADLINE))?;
        match peeked {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            peeked => peeked.and_then(|_| self.request()).map(Some),
        }
    }

    pub(crate) fn answer(&mut self, number: u32, body: &[u8]) -> io::Result<()> {
        let length = (body.len() as u32 + 4).to_be_bytes();
        self.0.write_all(&[&length, &number.to_be_bytes(), body].concat())
    }

    /// Answers the next request with its own body.
    pub(crate) fn echo(&mut self) -> io::Result<u32> {
        let (number, body) = self.request()?;
        self.answer(number, &body)?;
        Ok(number)
    }
}

/// A builder of clients on the pollers of the test.
pub(crate) fn client_builder(t: &Fixture) -> ClientBuilder<LengthPrefixed> {
    Client::builder(LengthPrefixed::new()).dialer(t.dialer())
}

/// A client of `addr` with the default settings.
pub(crate) fn client_of(t: &Fixture, addr: SocketAddr) -> Result<Client<LengthPrefixed>> {
    client_builder(t).connect(&addr.to_string())
}

pub(crate) fn body(text: &str) -> Slice {
    Slice::from(text.to_owned())
}
