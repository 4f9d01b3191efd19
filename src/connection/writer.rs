//! The writer's methods, once for every type that has a writer.

/// Implements the writer for `$type`, which has the fields `handle`, `writer` and `write_began`.
macro_rules! impl_writer {
    ($type:ident) => {
        /// Writing. What is written stays here until [`submit`](Self::submit) or
        /// [`flush`](Self::flush). After a close every method fails with a closed error.
        impl $type {
            /// Adds `bytes` zeroes and returns them to be filled. They count as written.
            ///
            /// # Errors
            /// Closed.
            #[inline]
            pub fn reserve(&mut self, bytes: usize) -> Result<&mut [u8]> {
                self.check("reserve")?;
                Ok(self.writer.reserve(bytes, &self.handle.0.remote.pool))
            }

            /// Keeps only the first `bytes` of all that was reserved since the last commit, write
            /// or flush.
            ///
            /// # Errors
            /// Closed; invalid, if less was reserved: then nothing changes.
            #[inline]
            pub fn commit(&mut self, bytes: usize) -> Result<()> {
                self.check("commit")?;
                self.writer.commit(bytes)
            }

            /// Adds `data`: a copy up to 4096 bytes, a reference above.
            ///
            /// # Errors
            /// Closed.
            #[inline]
            pub fn write(&mut self, data: impl Into<Slice>) -> Result<()> {
                self.check("write")?;
                self.writer.write(data.into(), &self.handle.0.remote.pool);
                Ok(())
            }

            /// Adds a copy of `data`.
            ///
            /// # Errors
            /// Closed.
            #[inline]
            pub fn write_copy(&mut self, data: &[u8]) -> Result<()> {
                self.check("write_copy")?;
                self.writer.write_copy(data, &self.handle.0.remote.pool);
                Ok(())
            }

            /// Puts `data` before the last `remaining` bytes of what is reserved and not committed,
            /// by reference. `data` counts as reserved for the next commit.
            ///
            /// # Errors
            /// Closed; invalid, if less is reserved: then nothing changes.
            pub fn insert(&mut self, data: impl Into<Slice>, remaining: usize) -> Result<()> {
                self.check("insert")?;
                self.writer.insert(data.into(), remaining)
            }

            /// Moves everything from `buffer` to the end, without copying.
            ///
            /// # Errors
            /// Closed.
            pub fn append(&mut self, buffer: LinkBuffer) -> Result<()> {
                self.check("append")?;
                self.writer.append(&mut buffer.into_chain());
                Ok(())
            }

            /// Bytes written and not submitted.
            pub fn pending_len(&self) -> usize {
                self.writer.len()
            }

            /// Hands over what is written, without waiting for the peer to make room.
            ///
            /// # Errors
            /// Closed; a limit, if `output_bytes_max` bytes are waiting for the peer: then
            /// everything stays as it is; the kernel's.
            pub fn submit(&mut self) -> Result<()> {
                flush::submit(&self.handle.0, &mut self.writer)
            }

            /// Hands over what is written, and waits until the kernel has every byte submitted so
            /// far; before that, if `output_bytes_max` bytes are waiting for the peer, until
            /// there is room.
            ///
            /// # Errors
            /// Closed, write timeout (submitted bytes are still on their way then), the kernel's.
            #[inline]
            pub fn flush(&mut self) -> impl Future<Output = Result<()>> + Send {
                flush::Flushing::new(&self.handle.0, &mut self.writer)
            }

            /// Flushes, then ends this side of the stream: the peer reads its end, and can still
            /// send.
            ///
            /// # Errors
            /// As for [`flush`](Self::flush).
            pub async fn shutdown_write(&mut self) -> Result<()> {
                self.flush().await?;
                self.handle.end_output()
            }

            /// Waits until there is room for more output, for code that is written as a poll:
            /// returns how many bytes may be written until `output_bytes_max` are on their way to
            /// the peer, those not submitted included; at least one. Where there is no room, hands
            /// over what is written.
            ///
            /// Write timeout and deadline hold for this wait, which begins with the first poll that
            /// is pending and ends with one that is ready. One that is given up costs at most a
            /// wake-up.
            ///
            /// # Errors
            /// Closed, also when this side of the stream has ended; write timeout; the kernel's.
            pub fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize>> {
                self.poll_writable_within(cx, usize::MAX)
            }

            /// [`poll_writable`](Self::poll_writable) with a lower bound: waits while
            /// `unsent_bytes_max` or more bytes are not yet in the kernel. `output_bytes_max` holds
            /// as well, so a larger value has no effect. 0 counts as 1.
            ///
            /// # Errors
            /// As for [`poll_writable`](Self::poll_writable).
            pub fn poll_writable_within(
                &mut self,
                cx: &mut Context<'_>,
                unsent_bytes_max: usize,
            ) -> Poll<Result<usize>> {
                let began = &mut self.write_began.room;
                flush::poll_room(&self.handle.0, &mut self.writer, unsent_bytes_max, began, cx)
            }

            /// [`flush`](Self::flush) as a poll. Covers all that was written before the last poll;
            /// what is written between two of them is handed over by the second.
            ///
            /// Write timeout and deadline hold for the wait, which begins with the first poll that
            /// is pending and ends with one that is ready. One that is given up costs at most a
            /// wake-up: what it has handed over is on its way.
            ///
            /// # Errors
            /// As for [`flush`](Self::flush).
            pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
                self.poll_flush_within(cx, 0)
            }

            /// [`poll_flush`](Self::poll_flush) that may leave bytes unsent: hands over everything
            /// written, then waits until at most `unsent_bytes_max` submitted bytes are not in the
            /// kernel. The poller sends these; a later poll reports their errors.
            ///
            /// # Errors
            /// As for [`flush`](Self::flush).
            pub fn poll_flush_within(
                &mut self,
                cx: &mut Context<'_>,
                unsent_bytes_max: usize,
            ) -> Poll<Result<()>> {
                let began = &mut self.write_began.flush;
                flush::poll_flush(&self.handle.0, &mut self.writer, unsent_bytes_max, began, cx)
            }

            /// [`shutdown_write`](Self::shutdown_write) as a poll. Once it has succeeded it does
            /// so again.
            ///
            /// # Errors
            /// As for [`flush`](Self::flush).
            pub fn poll_shutdown_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
                ready!(self.poll_flush(cx))?;
                Poll::Ready(self.handle.end_output())
            }

            #[inline]
            fn check(&self, operation: &'static str) -> Result<()> {
                if self.handle.0.life.is_closed() {
                    return Err(Error::closed(operation));
                }
                Ok(())
            }
        }
    };
}

pub(super) use impl_writer;
