//! The tokio peers: a task per connection, in three styles, on three kinds of runtime.
//!
//! `Batched` reads into a buffer of its own, answers every whole frame in it, and writes all
//! answers at once: the best way to serve both single and pipelined requests with tokio. `Framed`
//! is how such servers are usually written: `BufReader`, `read_exact`, `BufWriter`, and a flush
//! when nothing more is buffered. `Multiplexed` has a task for each request and one more that
//! writes: it takes every reply that is there from a channel, and sends them with one write.
//!
//! The runtime is one thread, or workers that steal from each other, or a thread for each CPU that
//! shares nothing with the others (see `hand_out.rs`).

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, BytesMut};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, BufWriter};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

use super::hand_out::Inbox;
use super::{READ_BYTES, READ_BYTES_MAX, Service};
use crate::error::{Failure, Result};
use crate::wire::{HEADER_BYTES, REQUESTS_MAX, payload_bytes};

/// How a connection is served.
#[derive(Clone, Copy)]
pub(super) enum Style {
    Batched,
    Framed,
    Multiplexed,
}

pub(super) fn serve_on_one_thread(
    listener: TcpListener,
    stop: UnixStream,
    service: Service,
    style: Style,
) -> Result<Value> {
    let runtime = Builder::new_current_thread().enable_io().build();
    serve(&runtime.map_err(Failure::at("start tokio"))?, listener, stop, service, style)
}

pub(super) fn serve_on_many(
    listener: TcpListener,
    stop: UnixStream,
    service: Service,
    style: Style,
    threads: usize,
) -> Result<Value> {
    let runtime = Builder::new_multi_thread().worker_threads(threads).enable_io().build();
    serve(&runtime.map_err(Failure::at("start tokio"))?, listener, stop, service, style)
}

/// The life of one runtime of those that share nothing.
pub(super) fn live(inbox: Inbox, service: Service) -> Result<()> {
    let runtime = Builder::new_current_thread().enable_io().build();
    let runtime = runtime.map_err(Failure::at("start tokio"))?;
    runtime.block_on(take_in(inbox, service)).map_err(Failure::at("tokio"))
}

async fn take_in(inbox: Inbox, service: Service) -> io::Result<()> {
    inbox.door.set_nonblocking(true)?;
    let mut door = tokio::net::UnixStream::from_std(inbox.door)?;
    // Whoever started this runtime may have given up already.
    let _ = inbox.ready.send(Ok(()));
    let mut bytes = [0; DOOR_BYTES];
    loop {
        let count = door.read(&mut bytes).await?;
        if count == 0 {
            return Ok(());
        }
        for stream in inbox.streams.try_iter().take(count) {
            stream.set_nonblocking(true)?;
            let stream = TcpStream::from_std(stream)?;
            // A failed connection is the client's to report.
            tokio::spawn(async move { drop(echo(stream, service).await) });
        }
    }
}

fn serve(
    runtime: &Runtime,
    listener: TcpListener,
    stop: UnixStream,
    service: Service,
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
        tokio::spawn(accept(listener, count, service, style));
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
    service: Service,
    style: Style,
) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                accepted.fetch_add(1, Ordering::Relaxed);
                // A failed connection is the client's to report.
                match style {
                    Style::Batched => {
                        tokio::spawn(async move { drop(echo(stream, service).await) })
                    }
                    Style::Framed => {
                        tokio::spawn(async move { drop(echo_framed(stream, service).await) })
                    }
                    Style::Multiplexed => {
                        tokio::spawn(async move { drop(multiplex(stream, service).await) })
                    }
                };
            }
            // Out of descriptors: the others go on, and the newcomer gets its turn when one is
            // free.
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

async fn echo(mut stream: TcpStream, service: Service) -> io::Result<()> {
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
        let whole = service.answer(&input, &mut output).map_err(io::Error::other)?;
        input.advance(whole);
        stream.write_all(&output).await?;
        output.clear();
    }
}

async fn echo_framed(mut stream: TcpStream, service: Service) -> io::Result<()> {
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
        payload.resize(payload_bytes(header, service.frame_max).map_err(io::Error::other)?, 0);
        reader.read_exact(&mut payload).await?;
        service.work_for(&payload);
        writer.write_all(&header).await?;
        writer.write_all(&payload).await?;
        if reader.buffer().is_empty() {
            writer.flush().await?;
        }
    }
}

/// Reads requests and starts a task for each.
async fn multiplex(stream: TcpStream, service: Service) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut reader, writer) = stream.into_split();
    // A place in the channel is taken before the request is served, so there are no more of them.
    let (replies, queued) = mpsc::channel(REQUESTS_MAX);
    // A failed connection is the client's to report.
    tokio::spawn(async move { drop(write_replies(writer, queued).await) });
    let mut input = BytesMut::new();
    let mut read_bytes = READ_BYTES;
    loop {
        input.reserve(read_bytes);
        let room = input.capacity() - input.len();
        let bytes = reader.read_buf(&mut input).await?;
        if bytes == 0 {
            return Ok(());
        }
        if bytes == room {
            read_bytes = (read_bytes * 2).min(READ_BYTES_MAX);
        }
        while let Some(header) = input.first_chunk::<HEADER_BYTES>() {
            let payload = payload_bytes(*header, service.frame_max).map_err(io::Error::other)?;
            if input.len() < HEADER_BYTES + payload {
                break;
            }
            let frame = input.split_to(HEADER_BYTES + payload).freeze();
            let place = replies.clone().reserve_owned().await.map_err(io::Error::other)?;
            tokio::spawn(async move {
                // Composed in a buffer of its own, as a server does that computes it.
                let reply = frame.to_vec();
                drop(frame);
                place.send(reply);
            });
        }
    }
}

/// Writes replies until the last request is answered: what is there, at once.
async fn write_replies(
    mut writer: OwnedWriteHalf,
    mut queued: mpsc::Receiver<Vec<u8>>,
) -> io::Result<()> {
    let (mut batch, mut output) = (Vec::new(), Vec::new());
    while queued.recv_many(&mut batch, REQUESTS_MAX).await > 0 {
        match &batch[..] {
            // Alone it needs no copy.
            [reply] => writer.write_all(reply).await?,
            replies => {
                replies.iter().for_each(|reply| output.extend_from_slice(reply));
                writer.write_all(&output).await?;
                output.clear();
            }
        }
        batch.clear();
    }
    Ok(())
}

/// Connections that come at once.
const DOOR_BYTES: usize = 64;
