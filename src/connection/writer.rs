//! The writer's methods, once for every type that has a writer.

/// Implements the writer for `$type`, which has the fields `handle`, `writer` and `write_began`.
macro_rules! impl_writer {
    ($type:ident $(<$life:lifetime>)?) => {
        /// Writing. Written bytes stay in the writer until [`submit`](Self::submit) or
        /// [`flush`](Self::flush). After a close every method that returns a `Result` fails with a
        /// closed error.
        impl $type $(<$life>)? {
            /// Writes `bytes` zeroes, and returns them for the caller to fill.
            ///
            /// # Errors
            /// Closed.
            #[inline]
            pub fn reserve(&mut self, bytes: usize) -> Result<&mut [u8]> {
                self.check("reserve")?;
                Ok(self.writer.reserve(bytes, &self.handle.0.remote.pool))
            }

            /// Returns room for `bytes`, to be filled with the methods of
            /// [`BufMut`](bytes::BufMut). Unlike [`reserve`](Self::reserve), this writes no zeroes:
            /// only the bytes that are put into the room are written. Earlier reserved bytes can no
            /// longer be dropped by a commit.
            ///
            /// # Errors
            /// Closed.
            #[inline]
            pub fn reserve_buf(&mut self, bytes: usize) -> Result<ReservedBuf<'_>> {
                self.check("reserve_buf")?;
                Ok(self.writer.reserve_buf(bytes, &self.handle.0.remote.pool))
            }

            /// Keeps the first `bytes` of the bytes reserved since the last commit, write or flush,
            /// and drops the rest.
            ///
            /// # Errors
            /// Closed. Invalid, if fewer bytes are reserved; nothing changes then.
            #[inline]
            pub fn commit(&mut self, bytes: usize) -> Result<()> {
                self.check("commit")?;
                self.writer.commit(bytes)
            }

            /// Writes `data`: as a copy up to 4096 bytes, by reference above.
            ///
            /// # Errors
            /// Closed.
            #[inline]
            pub fn write(&mut self, data: impl Into<Slice>) -> Result<()> {
                self.check("write")?;
                self.writer.write(data.into(), &self.handle.0.remote.pool);
                Ok(())
            }

            /// Writes a copy of `data`.
            ///
            /// # Errors
            /// Closed.
            #[inline]
            pub fn write_copy(&mut self, data: &[u8]) -> Result<()> {
                self.check("write_copy")?;
                self.writer.write_copy(data, &self.handle.0.remote.pool);
                Ok(())
            }

            /// Inserts `data`, by reference, before the last `remaining` reserved bytes that are
            /// not committed. `data` counts as reserved for the next commit.
            ///
            /// # Errors
            /// Closed. Invalid, if fewer than `remaining` bytes are reserved; nothing changes then.
            pub fn insert(&mut self, data: impl Into<Slice>, remaining: usize) -> Result<()> {
                self.check("insert")?;
                self.writer.insert(data.into(), remaining)
            }

            /// Writes all bytes of `buffer` without copying.
            ///
            /// # Errors
            /// Closed.
            pub fn append(&mut self, buffer: LinkBuffer) -> Result<()> {
                self.check("append")?;
                self.writer.append(&mut buffer.into_chain());
                Ok(())
            }

            /// The number of bytes written and not submitted.
            pub fn pending_len(&self) -> usize {
                self.writer.len()
            }

            /// Submits all written bytes: the connection will send them, and this method does not
            /// wait for it.
            ///
            /// # Errors
            /// Closed. Limit, if `output_bytes_max` submitted bytes are not in the kernel; the
            /// written bytes stay in the writer then. An error of the kernel.
            pub fn submit(&mut self) -> Result<()> {
                flush::submit(&self.handle.0, &mut self.writer)
            }

            /// Submits all written bytes, then waits until the kernel has taken every submitted
            /// byte. If `output_bytes_max` submitted bytes are not in the kernel, this method first
            /// waits for room.
            ///
            /// # Errors
            /// Closed. Write timeout; submitted bytes are still sent then. An error of the kernel.
            #[inline]
            pub fn flush(&mut self) -> impl Future<Output = Result<()>> + Send {
                flush::Flushing::new(&self.handle.0, &mut self.writer)
            }

            /// Sends the written bytes, then the bytes of `range` of `file`, counted from its
            /// start. Returns when the kernel has every byte. Later written bytes follow them.
            ///
            /// `sendfile(2)` moves the bytes from the page cache to the socket, so they do not pass
            /// through memory of the process. There are three exceptions, in which up to 64 KiB at
            /// a time are read into memory and sent like other bytes: a range of up to 64 KiB; the
            /// next bytes each time that the socket is full, because their flush waits for the
            /// peer; and files that the kernel cannot send from.
            ///
            /// Reading a file may wait for the disk, so all of this happens on threads of
            /// [`unblock`](crate::unblock). A small file that is often sent is cheaper to keep in
            /// memory and to [`write`](Self::write).
            ///
            /// The process must ignore `SIGPIPE`, as programs in Rust do by default:
            /// `sendfile(2)` raises it when the peer has gone.
            ///
            /// # Cancelling
            /// If the future fails or is dropped after it has begun to send, it aborts the
            /// connection ([`Handle::abort`]). So the peer does not mistake a part of the file for
            /// the whole.
            ///
            /// # Errors
            /// As for [`flush`](Self::flush). Invalid, if a regular file ends before the range
            /// does, or the range before its start; nothing of the file is sent then. An error of
            /// the kernel on reading the file; its kind is `UnexpectedEof` if the file has become
            /// shorter.
            pub fn send_file(
                &mut self,
                file: impl Into<Arc<File>>,
                range: Range<u64>,
            ) -> impl Future<Output = Result<()>> + Send {
                file::send_file(&self.handle.0, &mut self.writer, file.into(), range)
            }

            /// Flushes, then ends this side of the stream. The peer reads the end of the stream,
            /// and can still send.
            ///
            /// # Errors
            /// As for [`flush`](Self::flush).
            pub async fn shutdown_write(&mut self) -> Result<()> {
                self.flush().await?;
                self.handle.end_output()
            }

            /// Waits for room for more output, as a poll method. Returns how many more bytes may be
            /// written until `output_bytes_max` bytes are unsent; at least 1. Unsent bytes are
            /// those written or submitted that the kernel has not taken. If there is no room, this
            /// method submits the written bytes.
            ///
            /// Write timeout and deadline hold. A wait begins with the first poll that returns
            /// `Pending` and ends with a poll that returns `Ready`. A caller may stop polling at
            /// any time; its task may still be woken once.
            ///
            /// # Errors
            /// Closed, also after this side of the stream has ended. Write timeout. An error of the
            /// kernel.
            pub fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize>> {
                self.poll_writable_within(cx, usize::MAX)
            }

            /// [`poll_writable`](Self::poll_writable) with a lower limit: waits while
            /// `unsent_bytes_max` or more bytes are unsent. The limit `output_bytes_max` holds as
            /// well. 0 counts as 1.
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

            /// Waits for room as [`poll_writable_within`](Self::poll_writable_within) does, then
            /// writes the bytes of `pieces`, in order. Returns how many bytes it has written: at
            /// least one, unless all pieces are empty.
            ///
            /// 32 KiB or more, in at most 64 pieces, are passed to the kernel without a copy, once
            /// no other byte is unsent; of the bytes that the kernel does not take, at most 16 KiB
            /// are copied and submitted. Other writes are copied, as far as there is room, as by
            /// [`write_copy`](Self::write_copy), and sent by the next flush. A backend whose sends
            /// a kernel thread makes copies in both cases.
            ///
            /// # Errors
            /// As for [`poll_writable`](Self::poll_writable).
            pub fn poll_write_vectored_within(
                &mut self,
                cx: &mut Context<'_>,
                pieces: &[IoSlice<'_>],
                unsent_bytes_max: usize,
            ) -> Poll<Result<usize>> {
                let began = &mut self.write_began.room;
                let (core, writer) = (&self.handle.0, &mut self.writer);
                flush::poll_write(core, writer, pieces, unsent_bytes_max, began, cx)
            }

            /// [`flush`](Self::flush) as a poll method. Each poll submits the bytes that were
            /// written before it.
            ///
            /// Write timeout and deadline hold. A wait begins with the first poll that returns
            /// `Pending` and ends with a poll that returns `Ready`. A caller may stop polling at
            /// any time: submitted bytes are still sent, and its task may still be woken once.
            ///
            /// # Errors
            /// As for [`flush`](Self::flush).
            pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
                self.poll_flush_within(cx, 0)
            }

            /// [`poll_flush`](Self::poll_flush) that may leave bytes unsent. Submits all written
            /// bytes, then waits until at most `unsent_bytes_max` submitted bytes are not in the
            /// kernel. The poller sends these; a later poll reports an error of that send.
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

            /// [`shutdown_write`](Self::shutdown_write) as a poll method. A poll after success
            /// succeeds again.
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
