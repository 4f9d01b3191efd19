//! monoio on io_uring, one runtime for each CPU; a task per connection that reads into its own
//! buffer, answers every whole frame in it and writes all answers at once.

use std::io;

use io_uring_06::IoUring;
use monoio::buf::IoBufMut;
use monoio::io::{AsyncReadRent, AsyncWriteRentExt};
use monoio::net::{TcpStream, UnixStream};
use monoio::{IoUringDriver, RuntimeBuilder};

use super::hand_out::Inbox;
use super::{READ_BYTES, READ_BYTES_MAX, Service};
use crate::error::{Failure, Result};

/// How it is set up, for the report.
pub(super) const SETTINGS: &str = "io_uring with SINGLE_ISSUER and DEFER_TASKRUN, 4096 entries; \
    a pinned thread for each CPU, connections handed out in turn";

/// The life of one runtime.
pub(super) fn live(inbox: Inbox, service: Service) -> Result<()> {
    // The ring is used by the thread that builds it, and monoio enters the kernel to wait: what
    // both flags ask for. It has more entries than there are connections, so that a pass submits
    // once.
    let mut ring = IoUring::builder();
    ring.setup_single_issuer().setup_defer_taskrun();
    let builder = RuntimeBuilder::<IoUringDriver>::new().with_entries(ENTRIES).uring_builder(ring);
    let mut runtime = builder.build().map_err(Failure::at("start monoio"))?;
    runtime.block_on(take_in(inbox, service)).map_err(Failure::at("monoio"))
}

async fn take_in(inbox: Inbox, service: Service) -> io::Result<()> {
    let mut door = UnixStream::from_std(inbox.door)?;
    // Whoever started this runtime may have given up already.
    let _ = inbox.ready.send(Ok(()));
    let mut bytes = vec![0; DOOR_BYTES];
    loop {
        let (read, buffer) = door.read(bytes).await;
        bytes = buffer;
        let count = read?;
        if count == 0 {
            return Ok(());
        }
        for stream in inbox.streams.try_iter().take(count) {
            let stream = TcpStream::from_std(stream)?;
            // A failed connection is the client's to report.
            monoio::spawn(async move { drop(echo(stream, service).await) });
        }
    }
}

async fn echo(mut stream: TcpStream, service: Service) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut input: Vec<u8> = Vec::new();
    let mut output = Vec::new();
    let mut read_bytes = READ_BYTES;
    loop {
        input.reserve(read_bytes);
        let (kept, room) = (input.len(), input.capacity() - input.len());
        // What is kept of a frame stays in front.
        let (read, slice) = stream.read(input.slice_mut(kept..)).await;
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
        let (written, buffer) = stream.write_all(output).await;
        output = buffer;
        written?;
        output.clear();
    }
}

const ENTRIES: u32 = 4096;
/// Connections that come at once.
const DOOR_BYTES: usize = 64;
