//! The wire format: a 4-byte big-endian length, then as many bytes of payload. A reply repeats its
//! request. `rpc` has the protocols that put more around a payload.
//!
//! The first bit of a payload is the mark of a heavy request: servers of the scenario heavy compute
//! before they answer it, and before no other.
//!
//! The bytes a client sends are a pure function of (sequence number, mark, payload length), so it
//! checks every byte of every reply without keeping what it sent.

use std::fmt;

use crate::rpc::{Protocol, thrift};

/// The length field.
pub(crate) const HEADER_BYTES: usize = 4;

/// Longest payload a server takes unless told otherwise.
pub(crate) const FRAME_BYTES_MAX: u32 = 16 << 20;

/// The most requests of one connection that a server of the scenario mux serves at a time; it reads
/// no further until one is done.
pub(crate) const REQUESTS_MAX: usize = 1024;

/// The payload length a header announces, refused above `bytes_max`.
pub(crate) fn payload_bytes(
    header: [u8; HEADER_BYTES],
    bytes_max: usize,
) -> Result<usize, TooLong> {
    let bytes = u32::from_be_bytes(header) as usize;
    if bytes > bytes_max { Err(TooLong { bytes, bytes_max }) } else { Ok(bytes) }
}

/// A frame above the limit. The connection is closed: what follows cannot be trusted to be a
/// header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLong {
    bytes: usize,
    bytes_max: usize,
}

impl fmt::Display for TooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "frame of {} bytes: limit is {}", self.bytes, self.bytes_max)
    }
}

impl std::error::Error for TooLong {}

/// The whole frames at the front of `input`: how many bytes they take together.
pub(crate) fn whole_frames(input: &[u8], bytes_max: usize) -> Result<usize, TooLong> {
    let mut end = 0;
    while let Some(header) = input[end..].first_chunk() {
        let next = end + HEADER_BYTES + payload_bytes(*header, bytes_max)?;
        if next > input.len() {
            break;
        }
        end = next;
    }
    Ok(end)
}

/// Appends the reply to every frame of `frames`, which must be whole frames, after `work` has seen
/// its payload.
pub(crate) fn append_replies(mut frames: &[u8], out: &mut Vec<u8>, work: impl Fn(&[u8])) {
    while let Some((header, rest)) = frames.split_first_chunk::<HEADER_BYTES>() {
        let (payload, rest) = rest.split_at(u32::from_be_bytes(*header) as usize);
        work(payload);
        // Header and payload apart, as a server does that composes its answer.
        out.extend_from_slice(header);
        out.extend_from_slice(payload);
        frames = rest;
    }
}

/// Whether a request asks for work.
pub(crate) fn is_heavy(payload: &[u8]) -> bool {
    payload.first().is_some_and(|byte| byte & HEAVY_BIT != 0)
}

/// What one request differs in from the others of its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Below 2^63: the mark stands in its first bit.
    pub(crate) sequence: u64,
    pub(crate) heavy: bool,
}

impl Request {
    /// One that asks for nothing but its reply.
    pub(crate) fn cheap(sequence: u64) -> Request {
        Request { sequence, heavy: false }
    }

    /// The one that a frame with this front says it is. Payloads of less than 8 bytes do not say.
    pub(crate) fn of_front(front: &[u8; FRONT_BYTES]) -> Request {
        let (_, number) = front.split_last_chunk().expect("the number ends the front");
        let number = u64::from_be_bytes(*number);
        let mark = u64::from(HEAVY_BIT) << 56;
        Request { sequence: number & !mark, heavy: number & mark != 0 }
    }
}

/// What a client sends and expects, but for a request's sequence number and its mark.
pub(crate) struct Template {
    payload: Vec<u8>,
    request: Envelope,
    reply: Envelope,
}

/// What stands around a payload.
#[derive(Default)]
pub(crate) struct Envelope {
    pub(crate) head: Vec<u8>,
    /// Where the head repeats the sequence number, as four bytes.
    pub(crate) number_at: Option<usize>,
    pub(crate) tail: Vec<u8>,
}

impl Template {
    /// Of frames.
    pub(crate) fn new(payload_bytes: u32) -> Template {
        Template::of(Protocol::Frames, payload_bytes)
    }

    pub(crate) fn of(protocol: Protocol, payload_bytes: u32) -> Template {
        // Not periodic, so that a reply shifted by any distance differs.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let payload = (0..payload_bytes).map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        });
        let frame =
            || Envelope { head: payload_bytes.to_be_bytes().to_vec(), ..Envelope::default() };
        let (request, reply) = match protocol {
            Protocol::Frames => (frame(), frame()),
            Protocol::Thrift => (thrift::call(payload_bytes), thrift::reply(payload_bytes)),
            // Everything around the payload is the client library's.
            Protocol::Grpc => Default::default(),
        };
        for envelope in [&request, &reply] {
            assert!(envelope.head.len() <= HEAD_BYTES_MAX, "a head of {}", envelope.head.len());
        }
        Template { payload: payload.collect(), request, reply }
    }

    /// The bytes that all payloads of this size have in common but for their front.
    pub(crate) fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// What a reply takes.
    pub(crate) fn reply_bytes(&self) -> usize {
        self.reply.head.len() + self.payload.len() + self.reply.tail.len()
    }

    /// Appends a request.
    pub(crate) fn append(&self, request: Request, out: &mut Vec<u8>) {
        let (front, front_bytes) = self.front(&self.request, request);
        out.extend_from_slice(&front[..front_bytes]);
        out.extend_from_slice(&self.payload[front_bytes - self.request.head.len()..]);
        out.extend_from_slice(&self.request.tail);
    }

    /// Whether `chunk` is what the reply to `request` has at `offset`.
    pub(crate) fn matches(&self, request: Request, mut offset: usize, mut chunk: &[u8]) -> bool {
        let (front, front_bytes) = self.front(&self.reply, request);
        let rest = &self.payload[front_bytes - self.reply.head.len()..];
        for piece in [&front[..front_bytes], rest, &self.reply.tail] {
            let (before, wanted) = piece.split_at(offset.min(piece.len()));
            offset -= before.len();
            let (part, others) = chunk.split_at(wanted.len().min(chunk.len()));
            if part != &wanted[..part.len()] {
                return false;
            }
            chunk = others;
        }
        chunk.is_empty()
    }

    /// All in which requests of one size differ: the head, and the front of the payload.
    fn front(&self, envelope: &Envelope, request: Request) -> ([u8; FRONT_BYTES_MAX], usize) {
        assert!(request.sequence >> 63 == 0, "sequence {}: no room for the mark", request.sequence);
        let mut front = [0; FRONT_BYTES_MAX];
        let number = request.sequence.to_be_bytes();
        let head_bytes = envelope.head.len();
        front[..head_bytes].copy_from_slice(&envelope.head);
        if let Some(at) = envelope.number_at {
            front[at..at + 4].copy_from_slice(&number[4..]);
        }
        let numbered = self.payload.len().min(number.len());
        let payload_front = &mut front[head_bytes..head_bytes + numbered];
        // A payload that is too short for its number is the same in every request.
        let whole = numbered == number.len();
        payload_front.copy_from_slice(if whole { &number } else { &self.payload });
        // One of no bytes has no room for the mark either.
        if let Some(first) = payload_front.first_mut() {
            let mark = if request.heavy { HEAVY_BIT } else { 0 };
            *first = *first & !HEAVY_BIT | mark;
        }
        (front, head_bytes + numbered)
    }
}

/// Where the sequence number ends in a frame.
pub(crate) const FRONT_BYTES: usize = HEADER_BYTES + size_of::<u64>();
/// Of the envelopes there are.
const HEAD_BYTES_MAX: usize = 40;
const FRONT_BYTES_MAX: usize = HEAD_BYTES_MAX + size_of::<u64>();
/// In the first byte of a payload.
const HEAVY_BIT: u8 = 0x80;

#[cfg(test)]
mod tests {
    use super::*;

    /// Those whose replies repeat their requests.
    const MIRRORS: [(Protocol, usize); 2] = [(Protocol::Frames, HEADER_BYTES), (Protocol::Grpc, 0)];

    #[test]
    fn a_frame_matches_itself_however_it_is_cut() {
        for (payload, (protocol, head)) in
            [0, 1, 7, 8, 9, 300].into_iter().flat_map(|payload| MIRRORS.map(|one| (payload, one)))
        {
            let template = Template::of(protocol, payload);
            for heavy in [false, true] {
                let request = Request { sequence: 77, heavy };
                let mut frame = Vec::new();
                template.append(request, &mut frame);
                assert_eq!(frame.len(), head + payload as usize);
                assert_eq!(frame.len(), template.reply_bytes());
                assert_eq!(is_heavy(&frame[head..]), heavy && payload > 0);
                if protocol == Protocol::Frames
                    && let Some(front) = frame.first_chunk()
                {
                    assert_eq!(Request::of_front(front), request, "payload {payload}");
                }
                for cut in 0..=frame.len() {
                    let [front, back] = [(0, &frame[..cut]), (cut, &frame[cut..])]
                        .map(|(offset, chunk)| template.matches(request, offset, chunk));
                    assert!(front && back, "payload {payload}, cut {cut}");
                }
            }
        }
    }

    #[test]
    fn one_wrong_byte_anywhere_is_seen() {
        for (payload, (protocol, _)) in
            [1, 7, 64].into_iter().flat_map(|payload| MIRRORS.map(|one| (payload, one)))
        {
            let template = Template::of(protocol, payload);
            let request = Request::cheap(5);
            let mut frame = Vec::new();
            template.append(request, &mut frame);
            for index in 0..frame.len() {
                frame[index] ^= 1;
                assert!(!template.matches(request, 0, &frame), "payload {payload}, byte {index}");
                frame[index] ^= 1;
            }
            assert!(!template.matches(Request { heavy: true, ..request }, 0, &frame), "{payload}");
            frame.push(0);
            assert!(!template.matches(request, 0, &frame), "payload {payload}, one byte more");
        }
        let mut frame = Vec::new();
        Template::new(64).append(Request::cheap(5), &mut frame);
        assert!(!Template::new(64).matches(Request::cheap(6), 0, &frame));
    }

    #[test]
    fn only_whole_frames_are_taken_and_long_ones_refused() {
        let template = Template::new(10);
        let mut input = Vec::new();
        template.append(Request::cheap(0), &mut input);
        template.append(Request { sequence: 1, heavy: true }, &mut input);
        assert_eq!(whole_frames(&input, 10), Ok(28));
        assert_eq!(whole_frames(&input[..27], 10), Ok(14));
        assert_eq!(whole_frames(&input[..3], 10), Ok(0));
        assert_eq!(whole_frames(&input, 9), Err(TooLong { bytes: 10, bytes_max: 9 }));
        let (mut out, marks) = (Vec::new(), std::cell::RefCell::new(Vec::new()));
        append_replies(&input, &mut out, |payload| marks.borrow_mut().push(is_heavy(payload)));
        assert_eq!(out, input);
        assert_eq!(*marks.borrow(), [false, true]);
    }
}
