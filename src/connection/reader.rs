//! The reader's methods, once for every type that has a reader.

/// Implements the reader for `$type`, which has the fields `handle`, `reader` and `read_began`.
macro_rules! impl_reader {
    ($type:ident) => {
        /// Reading. Every method waits until it has what it was asked for, and fails if that will
        /// never come; bytes that have come stay buffered then. The errors of all of them: closed,
        /// end of stream, read timeout, the kernel's, and a limit if more is asked for than
        /// `read_bytes_max`. Bytes that are buffered are returned whatever the state
        /// and the deadlines.
        impl $type {
            /// Takes the next `bytes`: a reference to where they were received, or, if they lie in
            /// several blocks, one copy.
            ///
            /// # Errors
            /// As for all reads, see above.
            #[inline]
            pub async fn next(&mut self, bytes: usize) -> Result<Slice> {
                loop {
                    if let Some(slice) = self.try_next(bytes) {
                        return Ok(slice);
                    }
                    self.fill("next", bytes).await?;
                }
            }

            /// Like [`next`](Self::next), but the bytes stay to be read.
            ///
            /// # Errors
            /// As for all reads, see above.
            #[inline]
            pub async fn peek(&mut self, bytes: usize) -> Result<Slice> {
                loop {
                    if let Some(slice) = self.try_peek(bytes) {
                        return Ok(slice);
                    }
                    self.fill("peek", bytes).await?;
                }
            }

            /// Takes the next `bytes` if they are here.
            #[inline]
            pub fn try_next(&mut self, bytes: usize) -> Option<Slice> {
                self.refill_below(bytes);
                let core = &self.handle.0;
                let slice = self.reader.next(bytes, &core.remote.pool)?;
                core.consumed(self.reader.len());
                Some(slice)
            }

            /// The next `bytes` if they are here; they stay to be read.
            #[inline]
            pub fn try_peek(&mut self, bytes: usize) -> Option<Slice> {
                self.refill_below(bytes);
                self.reader.peek(bytes, &self.handle.0.remote.pool)
            }

            /// The bytes that are here and lie in one piece, without counting a reference; empty
            /// only if none are here. They stay to be read.
            #[inline]
            pub fn buffered(&mut self) -> &[u8] {
                self.refill_below(1);
                self.reader.front_slice()
            }

            /// Drops the next `bytes`.
            ///
            /// # Errors
            /// As for all reads, see above.
            pub async fn skip(&mut self, bytes: usize) -> Result<()> {
                while !self.reader.skip(bytes) {
                    self.fill("skip", bytes).await?;
                }
                self.handle.0.consumed(self.reader.len());
                Ok(())
            }

            /// Takes everything up to and including the next `delimiter`.
            ///
            /// The read timeout bounds the wait for each next byte, not for the delimiter: a peer
            /// that sends a byte at a time keeps this waiting. A read deadline bounds all of it, as
            /// [`request_timeout`](crate::ServerBuilder::request_timeout) does for each request.
            ///
            /// # Errors
            /// As for all reads. At the end of the stream [`Error::partial`] has what came before
            /// it. A limit, when `read_bytes_max` bytes hold no delimiter.
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

            /// Copies what is here into `buffer`, waiting for at least one byte. Returns how many;
            /// 0 at the end of the stream, or for an empty buffer.
            ///
            /// # Errors
            /// As for all reads, but for the end of the stream.
            pub async fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
                if !buffer.is_empty() {
                    self.readable().await?;
                }
                Ok(self.read_into(buffer))
            }

            /// Fills `buffer`.
            ///
            /// # Errors
            /// As for all reads, see above.
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
            /// As for all reads, see above.
            pub async fn read_byte(&mut self) -> Result<u8> {
                Ok(self.next(1).await?[0])
            }

            /// Takes `bytes` as text.
            ///
            /// # Errors
            /// As for all reads; invalid, if they are not UTF-8: then they are consumed.
            pub async fn read_string(&mut self, bytes: usize) -> Result<String> {
                String::from_utf8(self.read_to_vec(bytes).await?)
                    .map_err(|error| Error::invalid(format!("read_string: {error}")))
            }

            /// Takes a copy of the next `bytes`.
            ///
            /// # Errors
            /// As for all reads, see above.
            pub async fn read_to_vec(&mut self, bytes: usize) -> Result<Vec<u8>> {
                while self.reader.len() < bytes {
                    self.fill("read_to_vec", bytes).await?;
                }
                let mut copy = vec![0; bytes];
                self.read_into(&mut copy);
                Ok(copy)
            }

            /// Takes the next `bytes` as they lie, never copying.
            ///
            /// # Errors
            /// As for all reads, see above.
            pub async fn slice(&mut self, bytes: usize) -> Result<LinkBuffer> {
                loop {
                    if let Some(chain) = self.reader.split(bytes) {
                        self.handle.0.consumed(self.reader.len());
                        return Ok(LinkBuffer::from_chain(chain));
                    }
                    self.fill("slice", bytes).await?;
                }
            }

            /// Waits for bytes to read; returns how many are buffered, 0 at the end of the stream.
            ///
            /// # Errors
            /// As for all reads, but for the end of the stream.
            pub async fn readable(&mut self) -> Result<usize> {
                if self.reader.is_empty() {
                    match self.fill("readable", 1).await {
                        Err(error) if !error.is_eof() => return Err(error),
                        _ => {}
                    }
                }
                Ok(self.reader.len())
            }

            /// [`readable`](Self::readable) as a poll, for code that is written as one: bytes to
            /// read, 0 at the end of the stream, or a wake-up when there is news. Take them with
            /// [`buffered`](Self::buffered) and [`try_next`](Self::try_next).
            ///
            /// Timeouts and deadlines hold: a wait begins with the first poll that is pending, and
            /// ends with one that is ready, or when bytes that have come since are looked at by any
            /// other method. One that is given up costs nothing and loses nothing: its task may
            /// still be woken, once, and it counts as waiting for the peer, where the idle timeout
            /// asks for that, until the connection is next waited for or given back.
            ///
            /// # Errors
            /// As for all reads, but for the end of the stream.
            #[inline]
            pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize>> {
                if self.reader.is_empty() {
                    let core = &self.handle.0;
                    let began = &mut self.read_began;
                    match ready!(wait::poll_readable(core, &mut self.reader, began, cx)) {
                        Err(error) if !error.is_eof() => return Poll::Ready(Err(error)),
                        _ => {}
                    }
                }
                Poll::Ready(Ok(self.reader.len()))
            }

            /// Bytes that can be read without waiting.
            pub fn len(&self) -> usize {
                let arrived = match self.handle.0.has_arrivals() {
                    true => lock(&self.handle.0.input).inbox_len(),
                    false => 0,
                };
                self.reader.len() + arrived
            }

            /// Whether the next read has to wait.
            #[inline]
            pub fn is_empty(&self) -> bool {
                self.reader.is_empty() && !self.handle.0.has_arrivals()
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
                wait::fill(&self.handle.0, &mut self.reader, operation, bytes).await
            }
        }
    };
}

pub(super) use impl_reader;
