//! One connection of the load generator.
//!
//! Owns its socket and what it still has to send and to see. It keeps no reply bytes: what must
//! arrive is known, so each chunk is compared as it comes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::wire::Template;

pub(crate) struct Client {
    pub(crate) fd: OwnedFd,
    /// When each unanswered request was sent, or was due, in nanoseconds of the engine's clock.
    unanswered: VecDeque<u64>,
    /// Open loop: when the requests that are not sent yet are due.
    scheduled: VecDeque<u64>,
    /// Number of the next request to send.
    next_sent: u64,
    /// Number of the reply that is arriving, and how much of it has arrived.
    next_reply: u64,
    reply_offset: usize,
    /// What the socket did not take.
    unsent: Vec<u8>,
    unsent_from: usize,
}

/// What one chunk of input completed: how many replies, and how old each request was.
pub(crate) trait OnReply {
    fn on_reply(&mut self, since_ns: u64);
}

impl Client {
    /// `number` keeps the sequence numbers of connections apart, so that a reply to another one is
    /// a wrong reply.
    pub(crate) fn new(fd: OwnedFd, number: u32) -> Client {
        let first = u64::from(number) << 40;
        Client {
            fd,
            unanswered: VecDeque::new(),
            scheduled: VecDeque::new(),
            next_sent: first,
            next_reply: first,
            reply_offset: 0,
            unsent: Vec::new(),
            unsent_from: 0,
        }
    }

    pub(crate) fn unanswered(&self) -> usize {
        self.unanswered.len()
    }

    /// When the oldest unanswered request was sent, or was due.
    pub(crate) fn oldest_ns(&self) -> Option<u64> {
        self.unanswered.front().copied()
    }

    /// Whether the socket must become writable before more can be sent.
    pub(crate) fn is_blocked(&self) -> bool {
        !self.unsent.is_empty()
    }

    pub(crate) fn schedule(&mut self, due_ns: u64) {
        self.scheduled.push_back(due_ns);
    }

    pub(crate) fn forget_scheduled(&mut self) {
        self.scheduled.clear();
    }

    /// Closed loop: sends until `depth` requests are in flight.
    pub(crate) fn fill(
        &mut self,
        depth: usize,
        now_ns: u64,
        template: &Template,
        out: &mut Vec<u8>,
    ) -> io::Result<()> {
        self.send_while(template, out, |client| {
            let room = client.unanswered.len() < depth;
            if room {
                client.unanswered.push_back(now_ns);
            }
            room
        })
    }

    /// Open loop: sends what is due, at most `depth` in flight.
    pub(crate) fn send_scheduled(
        &mut self,
        depth: usize,
        template: &Template,
        out: &mut Vec<u8>,
    ) -> io::Result<()> {
        self.send_while(template, out, |client| {
            let due =
                if client.unanswered.len() < depth { client.scheduled.pop_front() } else { None };
            client.unanswered.extend(due);
            due.is_some()
        })
    }

    /// Reads once and checks what came. `Ok(false)`: nothing was there.
    pub(crate) fn receive(
        &mut self,
        input: &mut [u8],
        template: &Template,
        now_ns: impl FnOnce() -> u64,
        seen: &mut impl OnReply,
    ) -> io::Result<bool> {
        let bytes = match recv(&self.fd, &mut *input, RecvFlags::empty()) {
            Ok((0, _)) => return Err(lost("closed by the server")),
            Ok((bytes, _)) => bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let now_ns = now_ns();
        let mut chunk = &input[..bytes];
        while !chunk.is_empty() {
            let Some(&sent_ns) = self.unanswered.front() else {
                return Err(wrong("bytes that nobody asked for"));
            };
            let wanted = template.frame_bytes() - self.reply_offset;
            let (part, rest) = chunk.split_at(wanted.min(chunk.len()));
            if !template.matches(self.next_reply, self.reply_offset, part) {
                return Err(wrong("wrong reply"));
            }
            if part.len() == wanted {
                self.unanswered.pop_front();
                self.next_reply += 1;
                self.reply_offset = 0;
                seen.on_reply(now_ns.saturating_sub(sent_ns));
            } else {
                self.reply_offset += part.len();
            }
            chunk = rest;
        }
        Ok(true)
    }

    /// Builds requests while `more` says so and the socket takes them.
    fn send_while(
        &mut self,
        template: &Template,
        out: &mut Vec<u8>,
        mut more: impl FnMut(&mut Client) -> bool,
    ) -> io::Result<()> {
        if !self.send_unsent()? {
            return Ok(());
        }
        loop {
            out.clear();
            while out.len() < SEND_BYTES && more(self) {
                template.append(self.next_sent, out);
                self.next_sent += 1;
            }
            if out.is_empty() {
                return Ok(());
            }
            let sent = send_some(&self.fd, out)?;
            if sent < out.len() {
                self.unsent.extend_from_slice(&out[sent..]);
                return Ok(());
            }
        }
    }

    /// Whether nothing is left unsent.
    fn send_unsent(&mut self) -> io::Result<bool> {
        if self.unsent.is_empty() {
            return Ok(true);
        }
        self.unsent_from += send_some(&self.fd, &self.unsent[self.unsent_from..])?;
        if self.unsent_from < self.unsent.len() {
            return Ok(false);
        }
        self.unsent = Vec::new();
        self.unsent_from = 0;
        Ok(true)
    }
}

fn send_some(fd: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
    match send(fd, bytes, SendFlags::NOSIGNAL) {
        Ok(sent) => Ok(sent),
        Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

fn lost(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, why)
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// One send at depth; larger gains nothing and delays the first request of it.
const SEND_BYTES: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    struct Count(usize);

    impl OnReply for Count {
        fn on_reply(&mut self, _since_ns: u64) {
            self.0 += 1;
        }
    }

    fn pair() -> (Client, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Client::new(ours.into(), 3), theirs)
    }

    #[test]
    fn replies_are_checked_however_they_are_cut() {
        let (mut client, mut server) = pair();
        let (template, mut out, mut input, mut count) =
            (Template::new(20), Vec::new(), [0; 64], Count(0));
        client.fill(4, 0, &template, &mut out).unwrap();
        let mut requests = vec![0; 4 * template.frame_bytes()];
        server.read_exact(&mut requests).unwrap();
        for byte in requests {
            server.write_all(&[byte]).unwrap();
            assert!(client.receive(&mut input, &template, || 1, &mut count).unwrap());
        }
        assert_eq!((count.0, client.unanswered()), (4, 0));
    }

    #[test]
    fn a_reply_to_another_request_is_wrong() {
        let (mut client, mut server) = pair();
        let (template, mut out, mut input) = (Template::new(20), Vec::new(), [0; 64]);
        client.fill(2, 0, &template, &mut out).unwrap();
        let mut requests = vec![0; 2 * template.frame_bytes()];
        server.read_exact(&mut requests).unwrap();
        server.write_all(&requests[template.frame_bytes()..]).unwrap();
        let error = client.receive(&mut input, &template, || 1, &mut Count(0)).unwrap_err();
        assert_eq!(error.to_string(), "wrong reply");
    }

    #[test]
    fn bytes_nobody_asked_for_are_an_error() {
        let (mut client, mut server) = pair();
        server.write_all(b"hello").unwrap();
        let error =
            client.receive(&mut [0; 64], &Template::new(1), || 1, &mut Count(0)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
