//! The wire format: a 4-byte big-endian length, then as many bytes of payload. A reply repeats its
//! request.
//!
//! The bytes a client sends are a pure function of (sequence number, payload length), so it checks
//! every byte of every reply without keeping what it sent.

use std::fmt;

/// The length field.
pub(crate) const HEADER_BYTES: usize = 4;

/// Longest payload a server takes unless told otherwise.
pub(crate) const FRAME_BYTES_MAX: u32 = 16 << 20;

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

/// Appends the reply to every frame of `frames`, which must be whole frames.
pub(crate) fn append_replies(mut frames: &[u8], out: &mut Vec<u8>) {
    while let Some((header, rest)) = frames.split_first_chunk::<HEADER_BYTES>() {
        let bytes = u32::from_be_bytes(*header) as usize;
        // Header and payload apart, as a server does that composes its answer.
        out.extend_from_slice(header);
        out.extend_from_slice(&rest[..bytes]);
        frames = &rest[bytes..];
    }
}

/// The frame a client sends, but for its sequence number.
pub(crate) struct Template {
    frame: Vec<u8>,
    numbered: bool,
}

impl Template {
    pub(crate) fn new(payload_bytes: u32) -> Template {
        let mut frame = payload_bytes.to_be_bytes().to_vec();
        // Not periodic, so that a reply shifted by any distance differs.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        frame.extend((0..payload_bytes).map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        }));
        Template { frame, numbered: payload_bytes as usize >= size_of::<u64>() }
    }

    pub(crate) fn frame_bytes(&self) -> usize {
        self.frame.len()
    }

    /// Appends the frame numbered `sequence`.
    pub(crate) fn append(&self, sequence: u64, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.frame);
        if self.numbered {
            out[start + HEADER_BYTES..start + NUMBER_END].copy_from_slice(&sequence.to_be_bytes());
        }
    }

    /// Whether `chunk` is what frame `sequence` has at `offset`. The chunk ends within the frame.
    pub(crate) fn matches(&self, sequence: u64, offset: usize, chunk: &[u8]) -> bool {
        let end = offset + chunk.len();
        if !self.numbered || offset >= NUMBER_END {
            return chunk == &self.frame[offset..end];
        }
        let mut front = [0; NUMBER_END];
        front[..HEADER_BYTES].copy_from_slice(&self.frame[..HEADER_BYTES]);
        front[HEADER_BYTES..].copy_from_slice(&sequence.to_be_bytes());
        let split = end.min(NUMBER_END);
        let (head, tail) = chunk.split_at(split - offset);
        head == &front[offset..split] && tail == &self.frame[split..end]
    }
}

/// Where the sequence number ends in a frame.
const NUMBER_END: usize = HEADER_BYTES + size_of::<u64>();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_matches_itself_however_it_is_cut() {
        for payload in [0, 1, 7, 8, 9, 300] {
            let template = Template::new(payload);
            let mut frame = Vec::new();
            template.append(77, &mut frame);
            for cut in 0..=frame.len() {
                assert!(template.matches(77, 0, &frame[..cut]), "payload {payload}, cut {cut}");
                assert!(template.matches(77, cut, &frame[cut..]), "payload {payload}, cut {cut}");
            }
        }
    }

    #[test]
    fn one_wrong_byte_anywhere_is_seen() {
        let template = Template::new(64);
        let mut frame = Vec::new();
        template.append(5, &mut frame);
        for index in 0..frame.len() {
            frame[index] ^= 1;
            assert!(!template.matches(5, 0, &frame), "byte {index}");
            frame[index] ^= 1;
        }
        assert!(!template.matches(6, 0, &frame));
    }

    #[test]
    fn only_whole_frames_are_taken_and_long_ones_refused() {
        let template = Template::new(10);
        let mut input = Vec::new();
        template.append(0, &mut input);
        template.append(1, &mut input);
        assert_eq!(whole_frames(&input, 10), Ok(28));
        assert_eq!(whole_frames(&input[..27], 10), Ok(14));
        assert_eq!(whole_frames(&input[..3], 10), Ok(0));
        assert_eq!(whole_frames(&input, 9), Err(TooLong { bytes: 10, bytes_max: 9 }));
        let mut out = Vec::new();
        append_replies(&input, &mut out);
        assert_eq!(out, input);
    }
}
