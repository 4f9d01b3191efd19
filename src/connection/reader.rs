//! The reader's methods, once for every type that has a reader.

/// Implements the reader for `$type`, which has the fields `handle`, `reader` and `read_began`.
macro_rules! impl_reader {
    ($type:ident $(<$life:lifetime>)?) => {
        /// Reading. A method waits until it has all the bytes that it was asked for. It fails if
        /// they will never come; the bytes that have come stay buffered. Buffered bytes are
        /// returned also after a close, and after a deadline.
        ///
        /// Every read that waits has these errors: closed; end of stream; read timeout; an error of
        /// the kernel; limit, if more than `read_bytes_max` bytes are asked for.
        ///
        /// An end of stream means that the peer has ended its stream in order. A connection that
        /// has failed is an error of the kernel, also where a write has met the failure first.
        impl $type $(<$life>)? {
            /// Takes the next `bytes`. Bytes that lie in one block are not copied: the slice refers
            /// to that block. Bytes that lie in several blocks are copied once.
            ///
            /// # Errors
            /// As for every read that waits, see above.
            #[inline]
            pub async fn next(&mut self, bytes: usize) -> Result<Slice> {
                loop {
                    if let Some(slice) = self.try_next(bytes) {
                        return Ok(slice);
                    }
                    self.fill("next", bytes).await?;
                }
            }

            /// Like [`next`](Self::next), but does not consume the bytes.
            ///
            /// # Errors
            /// As for every read that waits, see above.
            #[inline]
            pub async fn peek(&mut self, bytes: usize) -> Result<Slice> {
                loop {
                    if let Some(slice) = self.try_peek(bytes) {
                        return Ok(slice);
                    }
                    self.fill("peek", bytes).await?;
                }
            }

            /// Takes the next `bytes` if so many are buffered. Never waits.
            #[inline]
            pub fn try_next(&mut self, bytes: usize) -> Option<Slice> {
                self.refill_below(bytes);
                let core = &self.handle.0;
                let slice = self.reader.next(bytes, &core.remote.pool)?;
                core.consumed(self.reader.len());
                Some(slice)
            }

            /// Returns the next `bytes` if so many are buffered, and does not consume them. Never
            /// waits.
            #[inline]
            pub fn try_peek(&mut self, bytes: usize) -> Option<Slice> {
                self.refill_below(bytes);
                self.reader.peek(bytes, &self.handle.0.remote.pool)
            }

            /// Returns the first buffered bytes that lie in one block, and does not consume them.
            /// The result is empty only if nothing is buffered. Never waits and never copies.
            #[inline]
            pub fn buffered(&mut self) -> &[u8] {
                self.refill_below(1);
                self.reader.front_slice()
            }

            /// Consumes the next `bytes`, which can be read without waiting: at most
            /// [`len`](Self::len). Never waits, and makes no slice.
            ///
            /// # Panics
            /// When fewer bytes can be read without waiting.
            #[inline]
            pub fn advance(&mut self, bytes: usize) {
                self.refill_below(bytes);
                self.consume(bytes);
            }

            /// The frames that the peer sends, one after the other, each of at most `bytes_max`.
            /// `length_of` tells the length of the first frame in a slice; see [`Frames`].
            #[inline]
            pub fn frames<F>(&mut self, bytes_max: usize, length_of: F) -> Frames<'_, Self, F>
            where
                F: FnMut(&[u8]) -> Result<Option<usize>>,
            {
                Frames::new(self, bytes_max, length_of)
            }

            /// Consumes the next `bytes` without returning them.
            ///
            /// # Errors
            /// As for every read that waits, see above.
            pub async fn skip(&mut self, bytes: usize) -> Result<()> {
                while !self.reader.skip(bytes) {
                    self.fill("skip", bytes).await?;
                }
                self.handle.0.consumed(self.reader.len());
                Ok(())
            }

            /// Takes all bytes up to the next `delimiter`, and the delimiter.
            ///
            /// The read timeout bounds the wait for each next byte, and not the whole call. So a
            /// peer that sends one byte at a time keeps this call waiting. A read deadline bounds
            /// the whole call, and so does
            /// [`request_timeout`](crate::ServerBuilder::request_timeout).
            ///
            /// # Errors
            /// As for every read that waits. At the end of the stream, [`Error::partial`] holds the
            /// bytes before the end. Limit, if `read_bytes_max` bytes hold no delimiter.
            pub async fn until(&mut self, delimiter: u8) -> Result<Slice> {
                let mut searched = 0;
                loop {
                    if let Some(index) = self.reader.find(delimiter, searched) {
                        return self.next(index + 1).await;
                    }
                    searched = self.reader.len();
                    if let Err(error) = self.fill("until", searched + 1).await {
                        if !error.is_eof() {
                            return Err(error);
                        }
                        let partial = self.try_next(searched).unwrap_or_default();
                        return Err(error.with_partial(partial.into()));
                    }
                }
            }

            /// Waits for at least one byte, then copies buffered bytes into `buffer`. Returns the
            /// number of bytes copied. Returns 0 at the end of the stream, or if `buffer` is empty.
            ///
            /// # Errors
            /// As for every read that waits, except the end of the stream.
            pub async fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
                if !buffer.is_empty() {
                    self.readable().await?;
                }
                Ok(self.read_into(buffer))
            }

            /// Waits for at least one byte, then fills the next chunk of `buffer` (see
            /// [`BufMut::chunk_mut`]) as far as bytes have come. Returns the number of bytes, 0 at
            /// the end of the stream or if `buffer` has no room.
            ///
            /// A stream of many bytes goes straight from the kernel into a chunk of 8 KiB or more,
            /// where [`read`](Self::read) copies them once more. Offer 64 KiB or more. With
            /// [`Backend::Sqpoll`](crate::Backend::Sqpoll) bytes are always copied.
            ///
            /// While a stream goes this way, its bytes come only to a reader that waits. Methods
            /// that never wait, such as [`try_next`](Self::try_next), find none.
            ///
            /// # Examples
            /// ```
            /// use ringpoll::{Connection, Result};
            ///
            /// /// Counts the bytes of a stream.
            /// async fn count(mut conn: Connection) -> Result<u64> {
            ///     let (mut count, mut buffer) = (0, Vec::with_capacity(128 << 10));
            ///     while conn.read_buf(&mut buffer).await? > 0 {
            ///         count += buffer.len() as u64;
            ///         buffer.clear();
            ///     }
            ///     Ok(count)
            /// }
            /// ```
            ///
            /// # Errors
            /// As for every read that waits, except the end of the stream.
            pub async fn read_buf(&mut self, buffer: &mut impl BufMut) -> Result<usize> {
                self.read_began.forget();
                let mut withdraw = None;
                let read = poll_fn(|cx| {
                    let polled = self.poll_read_buf(cx, buffer);
                    if polled.is_pending() && withdraw.is_none() {
                        withdraw = Some(Withdraw(Arc::clone(&self.handle.0)));
                    }
                    polled
                });
                read.await
            }

            /// [`read_buf`](Self::read_buf) as a poll method. What
            /// [`poll_readable`](Self::poll_readable) says of waits holds here as well.
            ///
            /// # Errors
            /// As for every read that waits, except the end of the stream.
            pub fn poll_read_buf(
                &mut self,
                cx: &mut Context<'_>,
                buffer: &mut impl BufMut,
            ) -> Poll<Result<usize>> {
                if buffer.chunk_mut().len() == 0 {
                    return Poll::Ready(Ok(0));
                }
                if !self.reader.is_empty() {
                    if !self.handle.0.paused.load(Ordering::Relaxed) {
                        self.refill_below(buffer.chunk_mut().len());
                    }
                    return Poll::Ready(Ok(direct::take(&self.handle.0, &mut self.reader, buffer)));
                }
                ready!(self.poll_output_first(cx))?;
                let core = &self.handle.0;
                let began = &mut self.read_began;
                match ready!(direct::poll_read(core, &mut self.reader, buffer, began, cx)) {
                    Err(error) if error.is_eof() => Poll::Ready(Ok(0)),
                    polled => Poll::Ready(polled),
                }
            }

            /// Fills all of `buffer`.
            ///
            /// # Errors
            /// As for every read that waits, see above.
            pub async fn read_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
                while self.reader.len() < buffer.len() {
                    self.fill("read_exact", buffer.len()).await?;
                }
                self.read_into(buffer);
                Ok(())
            }

            /// Takes one byte.
            ///
            /// # Errors
            /// As for every read that waits, see above.
            pub async fn read_byte(&mut self) -> Result<u8> {
                Ok(self.next(1).await?[0])
            }

            /// Takes the next `bytes` as UTF-8 text.
            ///
            /// # Errors
            /// As for every read that waits. Invalid, if the bytes are not UTF-8; they are consumed
            /// then.
            pub async fn read_string(&mut self, bytes: usize) -> Result<String> {
                String::from_utf8(self.read_to_vec(bytes).await?)
                    .map_err(|error| Error::invalid(format!("read_string: {error}")))
            }

            /// Takes the next `bytes` as a copy.
            ///
            /// # Errors
            /// As for every read that waits, see above.
            pub async fn read_to_vec(&mut self, bytes: usize) -> Result<Vec<u8>> {
                while self.reader.len() < bytes {
                    self.fill("read_to_vec", bytes).await?;
                }
                let mut copy = vec![0; bytes];
                self.read_into(&mut copy);
                Ok(copy)
            }

            /// Takes the next `bytes` without copying, also where they lie in several blocks.
            ///
            /// # Errors
            /// As for every read that waits, see above.
            pub async fn slice(&mut self, bytes: usize) -> Result<LinkBuffer> {
                loop {
                    if let Some(chain) = self.reader.split(bytes) {
                        self.handle.0.consumed(self.reader.len());
                        return Ok(LinkBuffer::from_chain(chain));
                    }
                    self.fill("slice", bytes).await?;
                }
            }

            /// Waits until at least one byte is buffered. Returns the number of buffered bytes, 0
            /// at the end of the stream.
            ///
            /// # Errors
            /// As for every read that waits, except the end of the stream.
            pub async fn readable(&mut self) -> Result<usize> {
                if self.reader.is_empty() {
                    match self.fill("readable", 1).await {
                        Err(error) if !error.is_eof() => return Err(error),
                        _ => {}
                    }
                }
                Ok(self.reader.len())
            }

            /// [`readable`](Self::readable) as a poll method. [`buffered`](Self::buffered) and
            /// [`try_next`](Self::try_next) return the bytes.
            ///
            /// Timeouts and deadlines hold. A wait begins with the first poll that returns
            /// `Pending`. It ends with a poll that returns `Ready`, or when another method finds
            /// bytes that have come since.
            ///
            /// A caller may stop polling at any time, and no byte is lost. Its task may still be
            /// woken once. For the idle timeout, the connection counts as waiting for the peer
            /// until the next wait begins, or until the reader is given back.
            ///
            /// # Errors
            /// As for every read that waits, except the end of the stream.
            #[inline]
            pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize>> {
                if self.reader.is_empty() {
                    ready!(self.poll_output_first(cx))?;
                    let core = &self.handle.0;
                    let began = &mut self.read_began;
                    match ready!(wait::poll_readable(core, &mut self.reader, began, cx)) {
                        Err(error) if !error.is_eof() => return Poll::Ready(Err(error)),
                        _ => {}
                    }
                }
                Poll::Ready(Ok(self.reader.len()))
            }

            /// The number of bytes that can be read without waiting.
            pub fn len(&self) -> usize {
                let arrived = match self.handle.0.has_arrivals() {
                    true => lock(&self.handle.0.input).inbox_len(),
                    false => 0,
                };
                self.reader.len() + arrived
            }

            /// Whether no byte can be read without waiting.
            #[inline]
            pub fn is_empty(&self) -> bool {
                self.reader.is_empty() && !self.handle.0.has_arrivals()
            }

            /// What a poll that has to wait for a byte does first.
            fn poll_output_first(&mut self, cx: &Context<'_>) -> Poll<Result<()>> {
                let kept: &Began = &self.read_began;
                let mut began = *kept;
                let submitted = self.poll_output(1, &mut began, cx);
                let kept: &mut Began = &mut self.read_began;
                *kept = began;
                submitted
            }

            #[inline]
            fn refill_below(&mut self, bytes: usize) {
                if self.reader.len() < bytes && self.handle.0.has_arrivals() {
                    self.read_began.forget();
                    self.handle.0.begins_part();
                    self.handle.0.refill(&mut self.reader, bytes);
                }
            }

            fn read_into(&mut self, buffer: &mut [u8]) -> usize {
                let bytes = self.reader.read_into(buffer);
                self.handle.0.consumed(self.reader.len());
                bytes
            }

            async fn fill(&mut self, operation: &'static str, bytes: usize) -> Result<()> {
                self.read_began.forget();
                let mut began = Began::default();
                poll_fn(|cx| self.poll_output(bytes, &mut began, cx)).await?;
                wait::fill(&self.handle.0, &mut self.reader, operation, bytes).await
            }
        }

        impl Source for $type $(<$life>)? {
            #[inline]
            fn front(&self) -> &[u8] {
                self.reader.front_slice()
            }

            #[inline]
            fn join(&mut self, bytes_min: usize, bytes_max: usize) -> bool {
                self.refill_below(bytes_min);
                let bytes = bytes_max.min(self.reader.len());
                bytes >= bytes_min && self.reader.join(bytes, &self.handle.0.remote.pool)
            }

            #[inline]
            fn consume(&mut self, bytes: usize) {
                self.reader.advance(bytes);
                self.handle.0.consumed(self.reader.len());
            }
        }

        impl<F: FnMut(&[u8]) -> Result<Option<usize>>> Frames<'_, $type $(<$life>)?, F> {
            /// The next frame. Waits until all of it has arrived. `None` if the peer has ended its
            /// stream after a whole frame.
            ///
            /// # Errors
            /// As for [`try_next`](Self::try_next), and as for every read that waits. A frame that
            /// the end of the stream cuts off is an end-of-stream error. Its bytes stay.
            pub async fn next(&mut self) -> Result<Option<&[u8]>> {
                while let Found::Missing(bytes) = self.find()? {
                    let source = self.source();
                    if let Err(error) = source.fill("frames", bytes).await {
                        let is_end = error.is_eof() && source.reader.is_empty();
                        return if is_end { Ok(None) } else { Err(error) };
                    }
                }
                Ok(Some(self.lent()))
            }

            /// [`next`](Self::next) as a poll method. What
            /// [`poll_readable`](Connection::poll_readable) says of timeouts and of callers that
            /// stop polling holds here as well: the wait for one frame is one wait, also if the
            /// [`Frames`] are dropped and made again between two polls.
            ///
            /// # Errors
            /// As for [`next`](Self::next).
            pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<&[u8]>>> {
                // Looking for a frame takes bytes that have come. That ends no wait for a frame.
                let kept: &Began = &self.source().read_began;
                let mut began = *kept;
                let found = loop {
                    let bytes = match self.find() {
                        Ok(Found::Missing(bytes)) => bytes,
                        found => break found.map(|_| true),
                    };
                    let source = self.source();
                    let mut polled = source.poll_output(bytes, &mut began, cx);
                    if let Poll::Ready(Ok(())) = polled {
                        let core = &source.handle.0;
                        polled = wait::poll_frame(core, &mut source.reader, bytes, &mut began, cx);
                    }
                    let kept: &mut Began = &mut source.read_began;
                    *kept = began;
                    if let Err(error) = ready!(polled) {
                        let is_end = error.is_eof() && source.reader.is_empty();
                        break if is_end { Ok(false) } else { Err(error) };
                    }
                };
                let kept: &mut Began = &mut self.source().read_began;
                kept.forget();
                Poll::Ready(match found {
                    Ok(true) => Ok(Some(self.lent())),
                    Ok(false) => Ok(None),
                    Err(error) => Err(error),
                })
            }
        }
    };
}

pub(super) use impl_reader;
