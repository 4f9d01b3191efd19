//! One connection of the load generator.
//!
//! Owns its socket and what it still has to send and to see. It keeps no reply bytes: what must
//! arrive is known, so each chunk is compared as it comes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::load::any_order::AnyOrder;
use crate::load::dice::Dice;
use crate::wire::{Request, Template};

pub(crate) struct Client {
    pub(crate) fd: OwnedFd,
    /// The requests that are sent and not answered.
    unanswered: VecDeque<Asked>,
    /// In place of those, where replies may come in any order.
    any_order: Option<Box<AnyOrder>>,
    /// Open loop: the requests that are not sent yet.
    scheduled: VecDeque<Asked>,
    /// Number of the next request to send.
    next_sent: u64,
    /// Number of the reply that is arriving, and how much of it has arrived.
    next_reply: u64,
    reply_offset: usize,
    /// What the socket did not take.
    unsent: Vec<u8>,
    unsent_from: usize,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    /// When it was sent, or was due, in nanoseconds of the engine's clock.
    pub(super) since_ns: u64,
    pub(super) heavy: bool,
}

/// A request that was answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reply {
    /// When the request was sent, or was due, in nanoseconds of the engine's clock.
    pub(crate) since_ns: u64,
    /// When the last byte of the reply was read.
    pub(crate) now_ns: u64,
    /// Whether it asked for work.
    pub(crate) heavy: bool,
}

impl Reply {
    pub(crate) fn latency_ns(&self) -> u64 {
        self.now_ns.saturating_sub(self.since_ns).max(1)
    }
}

/// Told of every reply that a chunk of input completed.
pub(crate) trait OnReply {
    fn on_reply(&mut self, reply: Reply);
}

impl Client {
    /// `number` keeps the sequence numbers of connections apart, so that a reply to another one is
    /// a wrong reply. Replies have to be in order, unless they are `unordered`.
    pub(crate) fn new(fd: OwnedFd, number: u32, unordered: bool) -> Client {
        let first = u64::from(number) << 40;
        Client {
            fd,
            unanswered: VecDeque::new(),
            any_order: unordered.then(|| Box::new(AnyOrder::new(first))),
            scheduled: VecDeque::new(),
            next_sent: first,
            next_reply: first,
            reply_offset: 0,
            unsent: Vec::new(),
            unsent_from: 0,
        }
    }

    pub(crate) fn unanswered(&self) -> usize {
        self.any_order.as_ref().map_or(self.unanswered.len(), |replies| replies.open_count())
    }

    /// When the oldest unanswered request was sent, or was due.
    pub(crate) fn oldest_ns(&self) -> Option<u64> {
        match &self.any_order {
            Some(replies) => replies.oldest_ns(),
            None => self.unanswered.front().map(|asked| asked.since_ns),
        }
    }

    /// Whether the socket must become writable before more can be sent.
    pub(crate) fn is_blocked(&self) -> bool {
        !self.unsent.is_empty()
    }

    pub(crate) fn schedule(&mut self, due_ns: u64, heavy: bool) {
        self.scheduled.push_back(Asked { since_ns: due_ns, heavy });
    }

    pub(crate) fn forget_scheduled(&mut self) {
        self.scheduled.clear();
    }

    /// Closed loop: sends until `depth` requests are in flight.
    pub(crate) fn fill(
        &mut self,
        depth: usize,
        now_ns: u64,
        dice: &mut Dice,
        template: &Template,
        out: &mut Vec<u8>,
    ) -> io::Result<()> {
        self.send_while(template, out, |client| {
            let room = client.unanswered() < depth;
            room.then(|| Asked { since_ns: now_ns, heavy: dice.is_heavy() })
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
            if client.unanswered() < depth { client.scheduled.pop_front() } else { None }
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
        if let Some(replies) = &mut self.any_order {
            return replies.take(chunk, template, now_ns, seen).map(|()| true);
        }
        while !chunk.is_empty() {
            let Some(&Asked { since_ns, heavy }) = self.unanswered.front() else {
                return Err(wrong("bytes that nobody asked for"));
            };
            let wanted = template.reply_bytes() - self.reply_offset;
            let (part, rest) = chunk.split_at(wanted.min(chunk.len()));
            let request = Request { sequence: self.next_reply, heavy };
            if !template.matches(request, self.reply_offset, part) {
                return Err(wrong("wrong reply"));
            }
            if part.len() == wanted {
                self.unanswered.pop_front();
                self.next_reply += 1;
                self.reply_offset = 0;
                seen.on_reply(Reply { since_ns, now_ns, heavy });
            } else {
                self.reply_offset += part.len();
            }
            chunk = rest;
        }
        Ok(true)
    }

    /// Builds requests while `next` has one and the socket takes them.
    fn send_while(
        &mut self,
        template: &Template,
        out: &mut Vec<u8>,
        mut next: impl FnMut(&mut Client) -> Option<Asked>,
    ) -> io::Result<()> {
        if !self.send_unsent()? {
            return Ok(());
        }
        loop {
            out.clear();
            while out.len() < SEND_BYTES
                && let Some(asked) = next(self)
            {
                let request = Request { sequence: self.next_sent, heavy: asked.heavy };
                template.append(request, out);
                match &mut self.any_order {
                    Some(replies) => replies.push(asked),
                    None => self.unanswered.push_back(asked),
                }
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

pub(super) fn wrong(what: &str) -> io::Error {
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
        fn on_reply(&mut self, _reply: Reply) {
            self.0 += 1;
        }
    }

    fn pair() -> (Client, UnixStream) {
        pair_with(false)
    }

    fn pair_with(unordered: bool) -> (Client, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Client::new(ours.into(), 3, unordered), theirs)
    }

    #[test]
    fn replies_are_checked_however_they_are_cut() {
        let (mut client, mut server) = pair();
        let (template, mut out, mut input, mut count) =
            (Template::new(20), Vec::new(), [0; 64], Count(0));
        client.fill(4, 0, &mut Dice::new(50.0, 1), &template, &mut out).unwrap();
        let mut requests = vec![0; 4 * template.reply_bytes()];
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
        client.fill(2, 0, &mut Dice::new(0.0, 1), &template, &mut out).unwrap();
        let mut requests = vec![0; 2 * template.reply_bytes()];
        server.read_exact(&mut requests).unwrap();
        server.write_all(&requests[template.reply_bytes()..]).unwrap();
        let error = client.receive(&mut input, &template, || 1, &mut Count(0)).unwrap_err();
        assert_eq!(error.to_string(), "wrong reply");
    }

    #[test]
    fn in_any_order_it_is_right_and_makes_room_for_the_next_request() {
        let (mut client, mut server) = pair_with(true);
        let (template, mut out, mut input, mut count) =
            (Template::new(20), Vec::new(), [0; 64], Count(0));
        let mut dice = Dice::new(50.0, 1);
        client.fill(2, 0, &mut dice, &template, &mut out).unwrap();
        let mut requests = vec![0; 2 * template.reply_bytes()];
        server.read_exact(&mut requests).unwrap();
        server.write_all(&requests[template.reply_bytes()..]).unwrap();
        assert!(client.receive(&mut input, &template, || 1, &mut count).unwrap());
        assert_eq!((count.0, client.unanswered(), client.oldest_ns()), (1, 1, Some(0)));
        client.fill(2, 5, &mut dice, &template, &mut out).unwrap();
        assert_eq!((client.unanswered(), client.oldest_ns()), (2, Some(0)));
        server.write_all(&requests[template.reply_bytes()..]).unwrap();
        let error = client.receive(&mut input, &template, || 1, &mut count).unwrap_err();
        assert!(error.to_string().contains("sent twice"), "{error}");
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
