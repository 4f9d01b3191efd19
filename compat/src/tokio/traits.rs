//! Macros that implement tokio's traits for the stream and its halves.
//!
//! Each poll that makes progress counts against the budget of its tokio task, so the task yields
//! even if a peer always has bytes or room. Outside a tokio task there is no budget.

/// Implements reading for `$type`, which has a field `inner` that reads, and a method
/// `note_input`, which is told whether a read waits.
macro_rules! impl_async_read {
    ($type:ident) => {
        impl AsyncRead for $type {
            fn poll_read(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buffer: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                let this = self.get_mut();
                let budget = ready!(coop::poll_proceed(cx));
                let polled = this.inner.poll_read_buf(cx, buffer);
                this.note_input(polled.is_pending());
                ready!(polled)?;
                budget.made_progress();
                Poll::Ready(Ok(()))
            }
        }

        impl AsyncBufRead for $type {
            fn poll_fill_buf(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
            ) -> Poll<io::Result<&[u8]>> {
                let this = self.get_mut();
                let budget = ready!(coop::poll_proceed(cx));
                let polled = this.inner.poll_readable(cx);
                this.note_input(polled.is_pending());
                ready!(polled)?;
                budget.made_progress();
                Poll::Ready(Ok(this.inner.buffered()))
            }

            /// # Panics
            /// If `count` is more than `fill_buf` has returned.
            fn consume(self: Pin<&mut Self>, count: usize) {
                let this = self.get_mut();
                let shown = this.inner.buffered().len();
                assert!(count <= shown, "consume {count} bytes of {shown} shown");
                this.inner.advance(count);
            }
        }
    };
}

/// Implements writing for `$type`, which has a field `inner` that writes, and the bound
/// `output_bytes_max`.
macro_rules! impl_async_write {
    ($type:ident) => {
        impl AsyncWrite for $type {
            fn poll_write(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
            }

            /// Writes as many bytes of the pieces as there is room for.
            fn poll_write_vectored(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                pieces: &[IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                if pieces.iter().all(|piece| piece.is_empty()) {
                    return Poll::Ready(Ok(0));
                }
                let this = self.get_mut();
                let writer = &mut this.inner;
                let budget = ready!(coop::poll_proceed(cx));
                let within = this.output_bytes_max;
                let taken = ready!(writer.poll_write_vectored_within(cx, pieces, within))?;
                budget.made_progress();
                if writer.pending_len() >= TokioStream::GATHERED_BYTES_MAX {
                    writer.submit()?;
                }
                Poll::Ready(Ok(taken))
            }

            fn is_write_vectored(&self) -> bool {
                true
            }

            // Does not wait for the kernel to take the last bytes. Otherwise the peer could receive
            // them and close before this flush returns, and hyper would see a truncated response.
            fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                let this = self.get_mut();
                this.inner.poll_flush_within(cx, this.output_bytes_max).map_err(io::Error::from)
            }

            fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                self.get_mut().inner.poll_shutdown_write(cx).map_err(io::Error::from)
            }
        }
    };
}

pub(super) use {impl_async_read, impl_async_write};
