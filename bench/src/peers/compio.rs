//! compio on io_uring, one runtime for each CPU; a task per connection that reads into its own
//! buffer, answers every whole frame in it and writes all answers at once.

use std::io;

use compio::buf::{BufResult, IntoInner, IoBuf};
use compio::driver::ProactorBuilder;
use compio::io::{AsyncRead, AsyncWriteExt};
use compio::net::{TcpStream, UnixStream};
use compio::runtime::RuntimeBuilder;

use super::hand_out::Inbox;
use super::{READ_BYTES, READ_BYTES_MAX, Service};
use crate::error::{Failure, Result};

/// How it is set up, for the report. The versions that offer `DEFER_TASKRUN` and multishot receives
/// need Rust 1.95, this program 1.88.
pub(super) const SETTINGS: &str = "io_uring with COOP_TASKRUN and TASKRUN_FLAG, 4096 entries, \
    single receives; a pinned thread for each CPU, connections handed out in turn";

/// The life of one runtime.
pub(super) fn live(inbox: Inbox, service: Service) -> Result<()> {
    // What its documentation advises for a ring without kernel threads that poll; with more entries
    // than there are connections, so that a pass submits once.
    let mut proactor = ProactorBuilder::new();
    proactor.capacity(ENTRIES).coop_taskrun(true).taskrun_flag(true);
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

async fn echo(mut stream: TcpStream, service: Service) -> io::Result<()> {
    let mut input: Vec<u8> = Vec::new();
    let mut output = Vec::new();
    let mut read_bytes = READ_BYTES;
    loop {
        input.reserve(read_bytes);
        let (kept, room) = (input.len(), input.capacity() - input.len());
        // What is kept of a frame stays in front.
        let BufResult(read, slice) = stream.read(input.slice(kept..)).await;
        input = slice.into_inner();
        let bytes = read?;
        if bytes == 0 {
            return Ok(());
        }
        if bytes == room {
            read_bytes = (read_bytes * 2).min(READ_BYTES_MAX);
        }
        let whole = service.answer(&input, &mut output).map_err(io::Error::other)?;
        input.drain(..whole);
        if output.is_empty() {
            continue;
        }
        let BufResult(written, buffer) = stream.write_all(output).await;
        output = buffer;
        written?;
        output.clear();
    }
}

const ENTRIES: u32 = 4096;
/// Connections that come at once.
const DOOR_BYTES: usize = 64;
