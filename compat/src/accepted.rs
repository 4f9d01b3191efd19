//! An accepted connection, with TLS or without, as one type for servers of other crates.

#[cfg(feature = "rustls")]
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
#[cfg(feature = "rustls")]
use std::task::ready;
use std::task::{Context, Poll};

use hyper::rt::{Read, ReadBufCursor, Write};
#[cfg(feature = "rustls")]
use hyper_util::rt::TokioIo;
use ringpoll::{Handle, PeerAddr};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::TokioStream;
#[cfg(feature = "rustls")]
use crate::rustls::ServerStream;

/// A connection of a server, with TLS or without.
///
/// Dropping it submits what was written, as dropping a [`TokioStream`] does, so these bytes are
/// sent before the connection closes. With TLS, this holds for what was flushed: the TLS session
/// may keep records that were only written, and these are dropped.
#[derive(Debug)]
pub struct Accepted {
    handle: Handle,
    io: Io,
    /// Bytes that were read ahead. Reads return them first.
    front: Vec<u8>,
    writing: Arc<Writing>,
}

/// Whether the owner of an [`Accepted`] waits to write.
#[derive(Debug, Default)]
pub(crate) struct Writing(AtomicBool);

impl Writing {
    /// Whether the last write or flush through the traits of hyper was pending. The task that
    /// writes asks as well, so the flag needs no order.
    pub(crate) fn waits(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn note<T>(&self, polled: Poll<T>) -> Poll<T> {
        self.0.store(polled.is_pending(), Ordering::Relaxed);
        polled
    }
}

#[derive(Debug)]
enum Io {
    Plain(TokioStream),
    #[cfg(feature = "rustls")]
    Tls(Box<TokioIo<ServerStream>>),
}

impl Accepted {
    pub(crate) fn plain(stream: TokioStream) -> Accepted {
        Accepted::new(stream.get_ref().handle(), Io::Plain(stream))
    }

    #[cfg(feature = "rustls")]
    pub(crate) fn over_tls(stream: ServerStream) -> Accepted {
        let handle = stream.get_ref().0.get_ref().handle();
        Accepted::new(handle, Io::Tls(Box::new(TokioIo::new(stream))))
    }

    fn new(handle: Handle, io: Io) -> Accepted {
        Accepted { handle, io, front: Vec::new(), writing: Arc::default() }
    }

    pub(crate) fn writing(&self) -> Arc<Writing> {
        Arc::clone(&self.writing)
    }

    /// Reads ahead while the bytes from the peer begin as `expected` does, until they are all of it
    /// or the stream ends. Nothing may be read ahead yet.
    #[cfg(feature = "rustls")]
    pub(crate) async fn read_ahead(&mut self, expected: &[u8]) -> io::Result<()> {
        let mut front = vec![0; expected.len()];
        let mut buffer = ReadBuf::new(&mut front);
        let read = poll_fn(|cx| {
            while buffer.remaining() > 0 && expected.starts_with(buffer.filled()) {
                let before = buffer.filled().len();
                ready!(AsyncRead::poll_read(Pin::new(&mut *self), cx, &mut buffer))?;
                if buffer.filled().len() == before {
                    break;
                }
            }
            Poll::Ready(Ok(()))
        });
        let read = read.await;
        let filled = buffer.filled().len();
        front.truncate(filled);
        self.front = front;
        read
    }

    /// Passes at most `room` bytes that were read ahead to `put`. `false`: there are none.
    fn take_front(&mut self, room: usize, put: impl FnOnce(&[u8])) -> bool {
        if self.front.is_empty() {
            return false;
        }
        let count = room.min(self.front.len());
        put(&self.front[..count]);
        self.front.drain(..count);
        true
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> PeerAddr {
        self.handle.peer_addr()
    }

    /// The connection, for its counts, its context, and its end.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The TLS stream; `None` without TLS.
    #[cfg(feature = "rustls")]
    pub fn tls(&self) -> Option<&ServerStream> {
        match &self.io {
            Io::Plain(_) => None,
            Io::Tls(stream) => Some(stream.inner()),
        }
    }
}

/// Calls a method of the stream. `$tls` gives the TLS stream with hyper's traits (`as_mut`), or
/// with tokio's (`inner_mut`).
macro_rules! delegate {
    ($self:ident, $tls:ident, $io:ident => $call:expr) => {
        match &mut $self.io {
            Io::Plain($io) => {
                let $io = Pin::new($io);
                $call
            }
            #[cfg(feature = "rustls")]
            Io::Tls($io) => {
                let $io = Pin::new($io.$tls());
                $call
            }
        }
    };
}

impl Read for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if self.take_front(buffer.remaining(), |bytes| buffer.put_slice(bytes)) {
            return Poll::Ready(Ok(()));
        }
        delegate!(self, as_mut, io => Read::poll_read(io, cx, buffer))
    }
}

impl Write for Accepted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = delegate!(self, as_mut, io => Write::poll_write(io, cx, bytes));
        self.writing.note(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = delegate!(self, as_mut, io => Write::poll_write_vectored(io, cx, pieces));
        self.writing.note(polled)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = delegate!(self, as_mut, io => Write::poll_flush(io, cx));
        self.writing.note(polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, as_mut, io => Write::poll_shutdown(io, cx))
    }
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.take_front(buffer.remaining(), |bytes| buffer.put_slice(bytes)) {
            return Poll::Ready(Ok(()));
        }
        delegate!(self, inner_mut, io => AsyncRead::poll_read(io, cx, buffer))
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, inner_mut, io => AsyncWrite::poll_write(io, cx, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, inner_mut, io => AsyncWrite::poll_write_vectored(io, cx, pieces))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, inner_mut, io => AsyncWrite::poll_flush(io, cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, inner_mut, io => AsyncWrite::poll_shutdown(io, cx))
    }
}
