//! The tokio peers: a task per connection, in two styles.
//!
//! `Batched` reads into a buffer of its own, answers every whole frame in it, and writes all
//! answers at once: the best way to serve both single and pipelined requests with tokio. `Framed`
//! is how such servers are usually written: `BufReader`, `read_exact`, `BufWriter`, and a flush
//! when nothing more is buffered.

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, BytesMut};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, BufWriter};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};

use crate::error::{Failure, Result};
use crate::wire::{HEADER_BYTES, append_replies, payload_bytes, whole_frames};

/// How a connection is served.
#[derive(Clone, Copy)]
pub(super) enum Style {
    Batched,
    Framed,
}

pub(super) fn serve_on_one_thread(
    listener: TcpListener,
    stop: UnixStream,
    frame_max: usize,
    style: Style,
) -> Result<Value> {
    let runtime = Builder::new_current_thread().enable_io().build();
    serve(&runtime.map_err(Failure::at("start tokio"))?, listener, stop, frame_max, style)
}

pub(super) fn serve_on_many(
    listener: TcpListener,
    stop: UnixStream,
    frame_max: usize,
    threads: usize,
) -> Result<Value> {
    let runtime = Builder::new_multi_thread().worker_threads(threads).enable_io().build();
    serve(&runtime.map_err(Failure::at("start tokio"))?, listener, stop, frame_max, Style::Batched)
}

fn serve(
    runtime: &Runtime,
    listener: TcpListener,
    stop: UnixStream,
    frame_max: usize,
    style: Style,
) -> Result<Value> {
    let accepted = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&accepted);
    runtime.block_on(async move {
        stop.set_nonblocking(true).map_err(Failure::at("signal socket"))?;
        let mut stop =
            tokio::net::UnixStream::from_std(stop).map_err(Failure::at("signal socket"))?;
        let listener =
            tokio::net::TcpListener::from_std(listener).map_err(Failure::at("listener"))?;
        // Accepting is a task like the others, so that work-stealing workers share it too.
        tokio::spawn(accept(listener, count, frame_max, style));
        let mut byte = [0];
        // However the read ends, somebody wants this server to stop.
        let _ = stop.read(&mut byte).await;
        Ok::<_, Failure>(())
    })?;
    Ok(super::counters(accepted.load(Ordering::Relaxed), None))
}

async fn accept(
    listener: tokio::net::TcpListener,
    accepted: Arc<AtomicU64>,
    frame_max: usize,
    style: Style,
) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                accepted.fetch_add(1, Ordering::Relaxed);
                // A failed connection is the client's to report.
                match style {
                    Style::Batched => {
                        tokio::spawn(async move { drop(echo(stream, frame_max).await) })
                    }
                    Style::Framed => {
                        tokio::spawn(async move { drop(echo_framed(stream, frame_max).await) })
                    }
                };
            }
            // Out of descriptors: the others go on, and the newcomer gets its turn when one is
            // free.
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

async fn echo(mut stream: TcpStream, frame_max: usize) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut input = BytesMut::new();
    let mut output = Vec::new();
    let mut read_bytes = READ_BYTES;
    loop {
        // Reclaims the front of the buffer; allocates only to grow.
        input.reserve(read_bytes);
        let room = input.capacity() - input.len();
        let bytes = stream.read_buf(&mut input).await?;
        if bytes == 0 {
            return Ok(());
        }
        // Small buffers keep a thousand connections in the cache; large ones are for those that
        // fill them.
        if bytes == room {
            read_bytes = (read_bytes * 2).min(READ_BYTES_MAX);
        }
        let whole = whole_frames(&input, frame_max).map_err(io::Error::other)?;
        append_replies(&input[..whole], &mut output);
        input.advance(whole);
        stream.write_all(&output).await?;
        output.clear();
    }
}

async fn echo_framed(mut stream: TcpStream, frame_max: usize) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (reader, writer) = stream.split();
    let (mut reader, mut writer) = (BufReader::new(reader), BufWriter::new(writer));
    let mut payload = Vec::new();
    loop {
        let mut header = [0; HEADER_BYTES];
        match reader.read_exact(&mut header).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            done => done?,
        };
        payload.resize(payload_bytes(header, frame_max).map_err(io::Error::other)?, 0);
        reader.read_exact(&mut payload).await?;
        writer.write_all(&header).await?;
        writer.write_all(&payload).await?;
        if reader.buffer().is_empty() {
            writer.flush().await?;
        }
    }
}

/// What a connection offers the kernel per read at first: that of tokio's own framed reader.
const READ_BYTES: usize = 8 << 10;
/// What the other servers offer.
const READ_BYTES_MAX: usize = 64 << 10;
