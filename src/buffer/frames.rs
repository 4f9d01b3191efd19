//! Frames at the front of a stream, lent where they lie.
//!
//! Used by the thread that reads. A lent frame is *passed* when the next one is looked for. Passed
//! frames are *consumed* at the end of their piece, or when the [`Frames`] are dropped. Until then
//! their bytes stay in the reader, so lending takes no reference to a block.

#![forbid(unsafe_code)]

use std::fmt;

use crate::error::{Error, Result};

/// The frames at the front of a stream, one after the other.
///
/// The `frames` methods of [`Connection`](crate::Connection::frames), of its parts and halves, of
/// [`LinkBuffer`](crate::LinkBuffer::frames) and of
/// [`blocking::Connection`](crate::blocking::Connection::frames) make it. Each frame is lent as
/// `&[u8]`. A frame that lies in one block is not copied. A frame that spans blocks is copied once
/// into a block of its own. To keep the memory of a frame, use `next` of the stream instead.
///
/// A function tells the length of the first frame in a slice of bytes; [`u32_be_length`] is one. It
/// gets at least one byte, and perhaps more bytes than the frame has. It returns `None` if it needs
/// more bytes to tell the length, and may be called more than once for one frame. A frame includes
/// everything that the function counts, for example the frame's header.
///
/// When the `Frames` are dropped, every frame that was lent is consumed, the last one as well. All
/// other bytes stay in the stream. So `Frames` can be dropped at any time and made again.
///
/// ```
/// use ringpoll::buffer::{LinkBuffer, Reader, Writer, u32_be_length};
///
/// let mut buffer = LinkBuffer::new();
/// buffer.write("\0\0\0\x05hello\0\0\0\x02hi\0\0\0\x09half")?;
/// buffer.flush()?;
///
/// let mut frames = buffer.frames(1024, u32_be_length);
/// assert_eq!(frames.try_next()?, Some(&b"\0\0\0\x05hello"[..]));
/// assert_eq!(frames.try_next()?, Some(&b"\0\0\0\x02hi"[..]));
/// assert_eq!(frames.try_next()?, None);
/// drop(frames);
/// assert_eq!(buffer.len(), 8, "the third frame is not whole");
/// # Ok::<(), ringpoll::Error>(())
/// ```
pub struct Frames<'a, S: Source, F> {
    source: &'a mut S,
    bytes_max: usize,
    length_of: F,
    /// Length of the frames at the front that are passed and not consumed yet. They lie in one
    /// piece.
    passed_bytes: usize,
    /// Length of the frame behind them that is lent.
    lent_bytes: usize,
}

/// The length of a frame that begins with the number of the bytes that follow this number: four
/// bytes, big-endian. `None` if `front` has fewer than four bytes. The length includes the number.
///
/// # Errors
/// None. The type is that of the functions which [`Frames`] calls.
#[inline]
pub fn u32_be_length(front: &[u8]) -> Result<Option<usize>> {
    let Some(number) = front.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
    Ok(Some(LENGTH_BYTES.saturating_add(u32::from_be_bytes(*number) as usize)))
}

/// A stream that lends frames. Only types of this crate implement it.
pub trait Source {
    /// The first bytes that lie in one piece. Empty only if nothing is buffered.
    fn front(&self) -> &[u8];

    /// Takes what has arrived if fewer than `bytes_min` are buffered. Then joins the first pieces:
    /// to `bytes_max`, or to as many as are buffered. Returns `false`, and joins nothing, if fewer
    /// than `bytes_min` are buffered.
    fn join(&mut self, bytes_min: usize, bytes_max: usize) -> bool;

    /// Consumes the first `bytes`, which are buffered.
    fn consume(&mut self, bytes: usize);
}

/// The result of looking for a frame.
pub(crate) enum Found {
    /// A whole frame, which is now lent.
    Frame,
    /// No frame is whole before this many bytes are buffered.
    Missing(usize),
}

impl<'a, S: Source, F: FnMut(&[u8]) -> Result<Option<usize>>> Frames<'a, S, F> {
    pub(crate) fn new(source: &'a mut S, bytes_max: usize, length_of: F) -> Frames<'a, S, F> {
        Frames { source, bytes_max, length_of, passed_bytes: 0, lent_bytes: 0 }
    }

    /// The next frame if all of it has arrived. Never waits.
    ///
    /// # Errors
    /// Limit, if the frame is longer than allowed. Invalid, if its length is 0. Any error of the
    /// function that tells the length. The bytes stay, so the next call fails in the same way.
    #[inline]
    pub fn try_next(&mut self) -> Result<Option<&[u8]>> {
        Ok(match self.find()? {
            Found::Frame => Some(self.lent()),
            Found::Missing(_) => None,
        })
    }

    /// Passes the lent frame, and looks for the next one.
    #[inline]
    pub(crate) fn find(&mut self) -> Result<Found> {
        self.passed_bytes += std::mem::take(&mut self.lent_bytes);
        let front = &self.source.front()[self.passed_bytes..];
        if !front.is_empty()
            && let Some(bytes) = (self.length_of)(front)?
            && (1..=self.bytes_max.min(front.len())).contains(&bytes)
        {
            self.lent_bytes = bytes;
            return Ok(Found::Frame);
        }
        self.find_further()
    }

    /// Looks for a frame that does not lie in the first piece.
    fn find_further(&mut self) -> Result<Found> {
        self.consume();
        if !self.source.join(1, 1) {
            return Ok(Found::Missing(1));
        }
        loop {
            let front = self.source.front();
            let front_bytes = front.len();
            if let Some(bytes) = (self.length_of)(front)? {
                if bytes == 0 {
                    return Err(Error::invalid("frames: a frame of 0 bytes"));
                }
                if bytes > self.bytes_max {
                    return Err(self.too_long(bytes));
                }
                if !self.source.join(bytes, bytes) {
                    return Ok(Found::Missing(bytes));
                }
                self.lent_bytes = bytes;
                return Ok(Found::Frame);
            }
            if front_bytes >= self.bytes_max {
                return Err(self.too_long(front_bytes + 1));
            }
            // Twice as many, so that a function which looks far into a frame copies few bytes.
            let wanted = front_bytes.saturating_mul(2).max(JOINED_BYTES_MIN);
            if !self.source.join(front_bytes + 1, wanted) {
                return Ok(Found::Missing(front_bytes + 1));
            }
        }
    }

    /// The frame that is lent.
    #[inline]
    pub(crate) fn lent(&self) -> &[u8] {
        &self.source.front()[self.passed_bytes..][..self.lent_bytes]
    }

    /// Passes the frames before the lent one, and consumes them. The lent frame is the first of the
    /// source then, and no longer lent. Returns its length.
    pub(crate) fn give_back(&mut self) -> usize {
        self.consume();
        std::mem::take(&mut self.lent_bytes)
    }

    #[cold]
    fn too_long(&self, bytes: usize) -> Error {
        let bytes_max = self.bytes_max;
        Error::limit(format!("frames: a frame of at least {bytes} bytes: limit is {bytes_max}"))
    }

    #[inline]
    pub(crate) fn source(&mut self) -> &mut S {
        self.source
    }
}

impl<S: Source, F> Frames<'_, S, F> {
    /// Consumes the passed frames.
    #[inline]
    fn consume(&mut self) {
        let bytes = std::mem::take(&mut self.passed_bytes);
        if bytes > 0 {
            self.source.consume(bytes);
        }
    }
}

impl<S: Source, F> Drop for Frames<'_, S, F> {
    #[inline]
    fn drop(&mut self) {
        self.passed_bytes += self.lent_bytes;
        self.consume();
    }
}

impl<S: Source, F> fmt::Debug for Frames<'_, S, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frames")
            .field("bytes_max", &self.bytes_max)
            .field("lent_bytes", &self.lent_bytes)
            .finish_non_exhaustive()
    }
}

const LENGTH_BYTES: usize = size_of::<u32>();

/// Bytes joined at first if a header spans blocks: the headers of most protocols fit.
const JOINED_BYTES_MIN: usize = 64;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::{LinkBuffer, Reader, Writer};
    use super::*;

    /// A buffer with blocks of 8 bytes, in which the frames of `payloads` are readable.
    fn buffer_of(payloads: &[&str]) -> LinkBuffer {
        let mut buffer = LinkBuffer::with_block_bytes(8);
        for payload in payloads {
            buffer.write_copy(&(payload.len() as u32).to_be_bytes()).expect("write");
            buffer.write_copy(payload.as_bytes()).expect("write");
        }
        buffer.flush().expect("flush");
        buffer
    }

    #[test]
    fn frames_over_block_borders_come_out_whole() {
        let payloads = ["", "a", "abcd", "over the border of a block", "", "xyz"];
        let mut buffer = buffer_of(&payloads);
        let mut frames = buffer.frames(64, u32_be_length);
        for payload in payloads {
            let frame = frames.try_next().expect("valid").expect("whole");
            assert_eq!(frame[LENGTH_BYTES..], *payload.as_bytes());
        }
        assert_eq!(frames.try_next().expect("valid"), None);
        drop(frames);
        assert!(buffer.is_empty());
    }

    #[test]
    fn a_frame_in_one_block_is_lent_where_it_lies() {
        let mut buffer = LinkBuffer::new();
        buffer.write_copy(b"\0\0\0\x02hi\0\0\0\x01!").expect("write");
        buffer.flush().expect("flush");
        let start = buffer.slices().next().expect("one piece").as_ptr();
        let mut frames = buffer.frames(64, u32_be_length);
        assert_eq!(frames.try_next().expect("valid").expect("whole").as_ptr(), start);
        let second = frames.try_next().expect("valid").expect("whole").as_ptr();
        assert_eq!(second.addr() - start.addr(), 6);
    }

    #[test]
    fn frames_that_were_not_lent_stay() {
        let mut buffer = buffer_of(&["one", "two", "three"]);
        let mut frames = buffer.frames(64, u32_be_length);
        assert!(frames.try_next().expect("valid").is_some());
        drop(frames);
        assert_eq!(buffer.peek(7).expect("buffered")[LENGTH_BYTES..], *b"two");
        drop(buffer.frames(64, u32_be_length));
        assert_eq!(buffer.len(), 7 + 9);
    }

    #[test]
    fn bad_lengths_are_one_error_and_consume_nothing() {
        let mut buffer = buffer_of(&["one", "too long"]);
        let mut frames = buffer.frames(11, u32_be_length);
        assert!(frames.try_next().expect("valid").is_some());
        for _ in 0..2 {
            let error = frames.try_next().expect_err("12 bytes");
            assert!(error.is_limit() && error.to_string().contains("12 bytes: limit is 11"));
        }
        drop(frames);
        assert_eq!(buffer.len(), 12);
        let mut frames = buffer.frames(64, |_: &[u8]| Ok(Some(0)));
        assert!(frames.try_next().expect_err("no progress").is_invalid());
        drop(frames);
        let mut frames = buffer.frames(64, |_: &[u8]| Err(Error::other("garbage")));
        assert_eq!(frames.try_next().expect_err("refused").to_string(), "garbage");
        drop(frames);
        assert_eq!(buffer.len(), 12);
    }

    /// The function sees more and more of the frame, in one piece.
    #[test]
    fn a_function_may_look_far_into_a_frame_up_to_the_limit() {
        let line = |front: &[u8]| Ok(front.iter().position(|&byte| byte == b'\n').map(|at| at + 1));
        let mut buffer = LinkBuffer::with_block_bytes(8);
        let first = "x".repeat(200) + "\n";
        buffer.write_copy(first.as_bytes()).expect("write");
        buffer.write_copy("y".repeat(300).as_bytes()).expect("write");
        buffer.flush().expect("flush");
        let mut frames = buffer.frames(201, line);
        assert_eq!(frames.try_next().expect("valid"), Some(first.as_bytes()));
        assert!(frames.try_next().expect_err("no end in 201 bytes").is_limit());
        drop(frames);
        assert_eq!(buffer.frames(301, line).try_next().expect("valid"), None);
        assert_eq!(buffer.len(), 300);
    }

    #[test]
    fn the_longest_length_does_not_overflow() {
        let length = u32_be_length(&[0xff; 4]).expect("valid").expect("four bytes");
        assert_eq!(length, u32::MAX as usize + LENGTH_BYTES);
        assert_eq!(u32_be_length(&[0; 3]).expect("valid"), None);
    }
}
