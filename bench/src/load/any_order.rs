//! Replies of one connection in any order, each found by the number in its payload.
//!
//! Owns the requests that are not answered. Like the rest of the client it keeps no reply bytes,
//! but for the front of the one that is arriving, which says whose it is.

use std::collections::VecDeque;
use std::io;

use crate::load::client::{Asked, OnReply, Reply, wrong};
use crate::wire::{FRONT_BYTES, Request, Template};

pub(super) struct AnyOrder {
    /// By number, from that of the first one on; `None` is answered.
    requests: VecDeque<Option<Asked>>,
    first: u64,
    open_count: usize,
    /// The reply that is arriving: its front, whose it is once that is whole, and how much of it
    /// has arrived.
    front: [u8; FRONT_BYTES],
    found: Option<(Request, Asked)>,
    offset: usize,
}

impl AnyOrder {
    /// `first` is the number of the first request.
    pub(super) fn new(first: u64) -> AnyOrder {
        AnyOrder {
            requests: VecDeque::new(),
            first,
            open_count: 0,
            front: [0; FRONT_BYTES],
            found: None,
            offset: 0,
        }
    }

    /// A request with the next number is sent.
    pub(super) fn push(&mut self, asked: Asked) {
        self.requests.push_back(Some(asked));
        self.open_count += 1;
    }

    pub(super) fn open_count(&self) -> usize {
        self.open_count
    }

    pub(super) fn oldest_ns(&self) -> Option<u64> {
        let arriving = self.found.map(|(_, asked)| asked);
        let waiting = self.requests.front().copied().flatten();
        arriving.into_iter().chain(waiting).map(|asked| asked.since_ns).min()
    }

    /// Checks what came.
    pub(super) fn take(
        &mut self,
        mut chunk: &[u8],
        template: &Template,
        now_ns: u64,
        seen: &mut impl OnReply,
    ) -> io::Result<()> {
        while !chunk.is_empty() {
            if self.open_count == 0 {
                return Err(wrong("bytes that nobody asked for"));
            }
            let (request, asked) = match self.found {
                Some(found) => found,
                None => {
                    let missing = FRONT_BYTES - self.offset;
                    let (part, rest) = chunk.split_at(missing.min(chunk.len()));
                    self.front[self.offset..][..part.len()].copy_from_slice(part);
                    self.offset += part.len();
                    chunk = rest;
                    if part.len() < missing {
                        return Ok(());
                    }
                    let found = self.find(template)?;
                    *self.found.insert(found)
                }
            };
            let wanted = template.reply_bytes() - self.offset;
            let (part, rest) = chunk.split_at(wanted.min(chunk.len()));
            if !template.matches(request, self.offset, part) {
                return Err(wrong("wrong reply"));
            }
            self.offset += part.len();
            chunk = rest;
            if part.len() == wanted {
                (self.found, self.offset) = (None, 0);
                self.open_count -= 1;
                seen.on_reply(Reply { since_ns: asked.since_ns, now_ns, heavy: asked.heavy });
            }
        }
        Ok(())
    }

    /// Whose reply has this front.
    fn find(&mut self, template: &Template) -> io::Result<(Request, Asked)> {
        let request = Request::of_front(&self.front);
        if !template.matches(request, 0, &self.front) {
            return Err(wrong("wrong reply"));
        }
        let index = request.sequence.checked_sub(self.first).map(|index| index as usize);
        let place = index.and_then(|index| self.requests.get_mut(index));
        let Some(asked) = place.and_then(Option::take) else {
            let number = request.sequence;
            return Err(wrong(&format!("reply number {number}: sent twice, or never asked for")));
        };
        if asked.heavy != request.heavy {
            return Err(wrong("wrong reply"));
        }
        while let Some(None) = self.requests.front() {
            self.requests.pop_front();
            self.first += 1;
        }
        Ok((request, asked))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Seen(Vec<u64>);

    impl OnReply for Seen {
        fn on_reply(&mut self, reply: Reply) {
            self.0.push(reply.since_ns);
        }
    }

    const FIRST: u64 = 3 << 40;

    /// So many requests, every third of them heavy; the times they were sent are 0, 1, 2…
    fn asked(count: u64) -> AnyOrder {
        let mut replies = AnyOrder::new(FIRST);
        for index in 0..count {
            replies.push(Asked { since_ns: index, heavy: index % 3 == 0 });
        }
        replies
    }

    fn reply(template: &Template, index: u64) -> Vec<u8> {
        let mut frame = Vec::new();
        let request = Request { sequence: FIRST + index, heavy: index.is_multiple_of(3) };
        template.append(request, &mut frame);
        frame
    }

    fn take(replies: &mut AnyOrder, template: &Template, bytes: &[u8]) -> Result<Seen, String> {
        let mut seen = Seen::default();
        let taken = replies.take(bytes, template, 100, &mut seen);
        taken.map(|()| seen).map_err(|error| error.to_string())
    }

    #[test]
    fn replies_in_any_order_are_checked_however_they_are_cut() {
        for payload in [8, 9, 20] {
            let template = Template::new(payload);
            let mut replies = asked(5);
            let mut seen = Vec::new();
            for index in [3, 1, 0, 4, 2] {
                for byte in reply(&template, index) {
                    seen.extend(take(&mut replies, &template, &[byte]).unwrap().0);
                }
            }
            assert_eq!(seen, [3, 1, 0, 4, 2]);
            assert_eq!((replies.open_count(), replies.oldest_ns()), (0, None));
            let mut replies = asked(5);
            let all: Vec<u8> =
                [4, 3, 2, 1, 0].iter().flat_map(|index| reply(&template, *index)).collect();
            assert_eq!(take(&mut replies, &template, &all).unwrap().0, [4, 3, 2, 1, 0]);
            assert!(take(&mut replies, &template, &[0]).is_err_and(|why| why.contains("nobody")));
        }
    }

    #[test]
    fn the_oldest_one_is_known_while_later_ones_are_answered() {
        let template = Template::new(20);
        let mut replies = asked(3);
        take(&mut replies, &template, &reply(&template, 2)).unwrap();
        assert_eq!((replies.open_count(), replies.oldest_ns()), (2, Some(0)));
        take(&mut replies, &template, &reply(&template, 0)[..15]).unwrap();
        assert_eq!((replies.open_count(), replies.oldest_ns()), (2, Some(0)));
        take(&mut replies, &template, &reply(&template, 0)[15..]).unwrap();
        assert_eq!((replies.open_count(), replies.oldest_ns()), (1, Some(1)));
    }

    #[test]
    fn a_number_that_is_not_open_is_an_error() {
        let template = Template::new(20);
        for (first, then) in [(1, 1), (0, 0), (2, 3), (1, 1 << 30)] {
            let mut replies = asked(3);
            take(&mut replies, &template, &reply(&template, first)).unwrap();
            let error = take(&mut replies, &template, &reply(&template, then)).unwrap_err();
            assert!(error.starts_with("reply number"), "{error}");
        }
        let mut frame = Vec::new();
        template.append(Request::cheap(FIRST - 1), &mut frame);
        assert!(take(&mut asked(3), &template, &frame).is_err());
    }

    #[test]
    fn one_wrong_byte_anywhere_is_seen() {
        let template = Template::new(20);
        for index in 0..template.reply_bytes() {
            for bit in [0x01, 0x80] {
                let mut frame = reply(&template, 1);
                frame[index] ^= bit;
                assert!(take(&mut asked(2), &template, &frame).is_err(), "byte {index}, {bit:#x}");
            }
        }
    }
}
