//! Copies between two connections, in both directions at the same time.
//!
//! The code runs on the thread that polls the future of [`copy_bidirectional`]. Received bytes stay
//! in their blocks: only references move from one connection to the other.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use crate::connection::{Connection, Handle, ReadPart, WritePart};
use crate::error::Error;

/// How many bytes [`copy_bidirectional`] has moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Copied {
    /// Bytes taken from `a` and given to `b`.
    pub a_to_b_bytes: u64,
    /// Bytes taken from `b` and given to `a`.
    pub b_to_a_bytes: u64,
}

/// A connection of [`copy_bidirectional`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopySide {
    /// The first argument.
    A,
    /// The second argument.
    B,
}

/// Why [`copy_bidirectional`] has failed. Converts into its [`error`](Self::error).
#[derive(Debug)]
#[non_exhaustive]
pub struct CopyError {
    /// The connection that failed.
    pub side: CopySide,
    /// What that connection returned.
    pub error: Error,
    /// The bytes moved before. The kernel may have dropped some of them unsent.
    pub copied: Copied,
}

/// Moves bytes between `a` and `b`, in both directions at the same time, until both streams have
/// ended. Bytes are not copied. Returns how many bytes moved when the kernel has every byte.
///
/// The end of one stream is passed on as the end of one direction
/// ([`shutdown_write`](Connection::shutdown_write)), and the other direction continues. Bytes that
/// are buffered in `a` or `b` before the call are moved as well, and bytes that are written and not
/// submitted are sent first.
///
/// A direction moves up to 256 KiB, then waits until the kernel has them, and only then takes more
/// from its sender. Then the sender's input watermarks stop its peer. So a receiver that does not
/// read costs bounded memory.
///
/// Read and write timeouts of `a` and `b` hold: a read timeout fails the call when the peer of that
/// connection sends nothing for so long, even if the other direction is busy.
///
/// # Cancelling
/// If the future fails or is dropped before its end, it aborts both connections
/// ([`Handle::abort`]). So no peer mistakes a part of a stream for the whole stream.
///
/// # Errors
/// A [`CopyError`] with any error of a read of one side, or of a flush to one side.
///
/// ```
/// use ringpoll::{Connection, Dialer, Result, copy_bidirectional};
///
/// /// A handler for `on_connect`: a proxy.
/// async fn relay(mut client: Connection) -> Result<()> {
///     let mut upstream = Dialer::new().connect("127.0.0.1:8972").await?;
///     let copied = copy_bidirectional(&mut client, &mut upstream).await?;
///     println!("{} bytes out, {} back", copied.a_to_b_bytes, copied.b_to_a_bytes);
///     Ok(())
/// }
/// ```
pub async fn copy_bidirectional(
    a: &mut Connection,
    b: &mut Connection,
) -> Result<Copied, CopyError> {
    let mut unfinished = Unfinished(Some([a.handle(), b.handle()]));
    let mut copied = Copied::default();
    let ended = {
        let ((from_a, to_a), (from_b, to_b)) = (a.parts(), b.parts());
        let there = forward((CopySide::A, from_a), (CopySide::B, to_b), &mut copied.a_to_b_bytes);
        let back = forward((CopySide::B, from_b), (CopySide::A, to_a), &mut copied.b_to_a_bytes);
        both(there, back).await
    };
    match ended {
        Ok(()) => {
            unfinished.0 = None;
            Ok(copied)
        }
        Err((side, error)) => Err(CopyError { side, error, copied }),
    }
}

type Failure = (CopySide, Error);

/// Moves bytes in one direction until the sender's stream has ended, then ends the stream to the
/// receiver.
async fn forward(
    (from_side, mut from): (CopySide, ReadPart<'_>),
    (to_side, mut to): (CopySide, WritePart<'_>),
    moved_bytes: &mut u64,
) -> Result<(), Failure> {
    let read_failed = |error| (from_side, error);
    let write_failed = |error| (to_side, error);
    if to.pending_len() > 0 {
        to.flush().await.map_err(write_failed)?;
    }
    loop {
        // 0 bytes are readable only at the end of the stream.
        let readable = from.readable().await.map_err(read_failed)?;
        if readable == 0 {
            return to.shutdown_write().await.map_err(write_failed);
        }
        let bytes = readable.min(STEP_BYTES_MAX);
        to.append(from.slice(bytes).await.map_err(read_failed)?).map_err(write_failed)?;
        *moved_bytes += bytes as u64;
        // Without this wait memory grows with a slow receiver. It also lets bytes gather, which are
        // then moved together.
        to.flush().await.map_err(write_failed)?;
    }
}

/// Runs two futures concurrently, until both have ended or one has failed.
async fn both(
    one: impl Future<Output = Result<(), Failure>>,
    other: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    let (mut one, mut other) = (pin!(one), pin!(other));
    let (mut one_ended, mut other_ended) = (false, false);
    poll_fn(|cx| {
        if !one_ended && let Poll::Ready(result) = one.as_mut().poll(cx) {
            result?;
            one_ended = true;
        }
        if !other_ended && let Poll::Ready(result) = other.as_mut().poll(cx) {
            result?;
            other_ended = true;
        }
        if one_ended && other_ended { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
}

/// Aborts both connections when it is dropped, unless the copy has succeeded.
struct Unfinished(Option<[Handle; 2]>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        for handle in self.0.iter().flatten() {
            handle.abort();
        }
    }
}

impl fmt::Display for CopyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Copied { a_to_b_bytes, b_to_a_bytes } = self.copied;
        let side = match self.side {
            CopySide::A => "a",
            CopySide::B => "b",
        };
        write!(f, "copy: connection {side}: {}", self.error)?;
        write!(f, " (after {a_to_b_bytes} bytes to b and {b_to_a_bytes} bytes to a)")
    }
}

impl std::error::Error for CopyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl From<CopyError> for Error {
    fn from(failed: CopyError) -> Error {
        failed.error
    }
}

/// The largest number of bytes that one direction moves at a time.
const STEP_BYTES_MAX: usize = 256 << 10;
