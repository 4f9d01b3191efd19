//! compio on io_uring, one runtime for each CPU; a task per connection with a receive that goes on
//! into buffers of the ring, which answers every whole frame and writes all answers at once.

use std::io;
use std::num::NonZero;
use std::pin::pin;

use compio::buf::BufResult;
use compio::driver::ProactorBuilder;
use compio::io::{AsyncRead, AsyncReadMulti, AsyncWriteExt};
use compio::net::{TcpStream, UnixStream};
use compio::runtime::RuntimeBuilder;
use futures_util::StreamExt;
use rustix::io::Errno;

use super::Service;
use super::hand_out::Inbox;
use crate::error::{Failure, Result};

/// How it is set up, for the report.
pub(super) const SETTINGS: &str = "io_uring with SINGLE_ISSUER and DEFER_TASKRUN, 4096 entries, \
    multishot receives into 1024 buffers of 16 KiB; a pinned thread for each CPU, connections \
    handed out in turn";

/// The life of one runtime.
pub(super) fn live(inbox: Inbox, service: Service) -> Result<()> {
    // With more entries than there are connections, so that a pass submits once, and as many
    // buffers as connections, so that none has to wait for one.
    let mut proactor = ProactorBuilder::new();
    proactor.capacity(ENTRIES).single_issuer(true).defer_taskrun(true);
    proactor.buffer_pool_size(BUFFERS).buffer_pool_buffer_len(BUFFER_BYTES);
    let runtime = RuntimeBuilder::new().with_proactor(proactor).build();
    let runtime = runtime.map_err(Failure::at("start compio"))?;
    runtime.block_on(take_in(inbox, service)).map_err(Failure::at("compio"))
}

async fn take_in(inbox: Inbox, service: Service) -> io::Result<()> {
    let mut door = UnixStream::from_std(inbox.door)?;
    // Whoever started this runtime may have given up already.
    let _ = inbox.ready.send(Ok(()));
    let mut bytes = Vec::with_capacity(DOOR_BYTES);
    loop {
        bytes.clear();
        let BufResult(read, buffer) = door.read(bytes).await;
        bytes = buffer;
        let count = read?;
        if count == 0 {
            return Ok(());
        }
        for stream in inbox.streams.try_iter().take(count) {
            let stream = TcpStream::from_std(stream)?;
            // A failed connection is the client's to report.
            compio::runtime::spawn(async move { drop(echo(stream, service).await) }).detach();
        }
    }
}

async fn echo(stream: TcpStream, service: Service) -> io::Result<()> {
    let mut frames = Frames { stream: &stream, service, kept: Vec::new(), output: Vec::new() };
    loop {
        let (mut reader, mut came) = (&stream, false);
        let mut chunks = pin!(reader.read_multi(0));
        while let Some(chunk) = chunks.next().await {
            match chunk {
                Ok(chunk) => frames.take(&chunk).await?,
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => {
                    // All buffers are in use: one of its own, once.
                    let BufResult(read, own) =
                        (&stream).read(Vec::with_capacity(BUFFER_BYTES)).await;
                    if read? == 0 {
                        return Ok(());
                    }
                    frames.take(&own).await?;
                }
                Err(error) => return Err(error),
            }
            came = true;
        }
        // A receive that goes on ends when the kernel says so; one that brings nothing, at the end.
        if !came {
            return Ok(());
        }
    }
}

/// What one connection is asked and answers.
struct Frames<'a> {
    stream: &'a TcpStream,
    service: Service,
    /// Of a frame that is not whole yet.
    kept: Vec<u8>,
    output: Vec<u8>,
}

impl Frames<'_> {
    async fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.kept.is_empty() {
            let whole = self.answer(bytes)?;
            self.kept.extend_from_slice(&bytes[whole..]);
        } else {
            self.kept.extend_from_slice(bytes);
            let kept = std::mem::take(&mut self.kept);
            let whole = self.answer(&kept)?;
            self.kept = kept;
            self.kept.drain(..whole);
        }
        if self.output.is_empty() {
            return Ok(());
        }
        let output = std::mem::take(&mut self.output);
        let BufResult(written, buffer) = self.stream.write_all(output).await;
        self.output = buffer;
        self.output.clear();
        written
    }

    fn answer(&mut self, input: &[u8]) -> io::Result<usize> {
        self.service.answer(input, &mut self.output).map_err(io::Error::other)
    }
}

const ENTRIES: u32 = 4096;
const BUFFERS: NonZero<u16> = NonZero::new(1024).expect("more than none");
const BUFFER_BYTES: usize = 16 << 10;
/// Connections that come at once.
const DOOR_BYTES: usize = 64;
