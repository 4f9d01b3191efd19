//! Sending a range of a file.
//!
//! `sendfile(2)` moves bytes from the page cache to the socket. It may wait for the disk, so it
//! runs on a thread of `unblock`. It runs only while the kernel has all earlier output, and its
//! caller borrows the writer, so bytes never reorder. When the socket is full, the next bytes of
//! the file are read into memory and flushed like other output: this flush ends when the peer has
//! made room.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::core::Core;
use super::flush::Flushing;
use crate::buffer::{Slice, Spent, Staging};
use crate::error::{Error, Result};
use crate::poller::Socket;
use crate::sync::lock;
use crate::task::unblock;

/// Sends written bytes, then `range` of `file`. Ends when the kernel has every byte.
pub(super) async fn send_file(
    core: &Arc<Core>,
    staging: &mut Staging,
    file: Arc<File>,
    range: Range<u64>,
) -> Result<()> {
    if range.start > range.end {
        return Err(Error::invalid(format!(
            "send_file: the range {range:?} ends before its start"
        )));
    }
    let small = {
        let (file, range) = (Arc::clone(&file), range.clone());
        unblock(move || read_if_small(&file, range)).await??
    };
    if let Some(copy) = small {
        staging.write(Slice::from(copy), &core.remote.pool);
        return Flushing::new(core, staging).await;
    }
    Flushing::new(core, staging).await?;
    let mut unfinished = Unfinished(Some(core));
    let mut left = range;
    while !left.is_empty() {
        let socket = core.socket_for_file()?;
        let turn = {
            let (core, file, left) = (Arc::clone(core), Arc::clone(&file), left.clone());
            unblock(move || Turn::run(&core, &socket, &file, left)).await?
        };
        core.sent_from_file(&turn)?;
        left.start += turn.sent_bytes;
        if let Ok(TurnEnd::Full(copy)) = turn.end {
            left.start += copy.len() as u64;
            staging.write(Slice::from(copy), &core.remote.pool);
            Flushing::new(core, staging).await?;
        }
    }
    unfinished.0 = None;
    Ok(())
}

/// Reads a range that is small enough to be copied. A range beyond the end of a regular file is
/// refused before any byte is sent.
fn read_if_small(file: &File, range: Range<u64>) -> Result<Option<Vec<u8>>> {
    let known = file.metadata().map_err(|error| Error::io("send_file", error))?;
    if known.is_file() && known.len() < range.end {
        let (end, bytes) = (range.end, known.len());
        return Err(Error::invalid(format!("send_file: up to byte {end} of a file of {bytes}")));
    }
    if range.end - range.start > COPY_BYTES {
        return Ok(None);
    }
    read(file, range).map(Some).map_err(|error| Error::io("send_file", error))
}

impl Core {
    /// The socket, if bytes can still be sent. `sent_from_file` follows.
    fn socket_for_file(&self) -> Result<Arc<Socket>> {
        let mut output = lock(&self.output);
        if let Some(error) = output.failure() {
            return Err(Error::io("send", error));
        }
        let socket = match &output.socket {
            Some(socket) if !self.life.is_closed() && !output.ended => Arc::clone(socket),
            _ => return Err(Error::closed("send_file")),
        };
        output.sends_file = true;
        Ok(socket)
    }

    /// Counts the bytes that a turn has sent past the output, and keeps an error of the socket.
    fn sent_from_file(&self, turn: &Turn) -> Result<()> {
        let mut spent = Spent::default();
        let mut output = lock(&self.output);
        output.sends_file = false;
        output.sent_directly(self, turn.sent_bytes);
        let Err(failed) = &turn.end else { return Ok(()) };
        if self.life.is_closed() {
            return Err(Error::closed("send_file"));
        }
        if let TurnError::Send(error) = failed {
            output.fail(error, &mut spent);
        }
        let (TurnError::Send(error) | TurnError::File(error)) = failed;
        let copy =
            error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error);
        Err(Error::io("send_file", copy))
    }
}

/// One stay on a thread that may block.
struct Turn {
    sent_bytes: u64,
    end: Result<TurnEnd, TurnError>,
}

enum TurnEnd {
    /// The turn's bytes are sent. The socket may take more.
    Unfinished,
    /// The socket takes no more, or the kernel cannot send this file. These are the next bytes.
    Full(Vec<u8>),
}

enum TurnError {
    /// The socket failed.
    Send(io::Error),
    /// The file failed, or ends too early.
    File(io::Error),
}

impl Turn {
    /// Sends from the start of `range`.
    fn run(core: &Core, socket: &Socket, file: &File, range: Range<u64>) -> Turn {
        let mut sent_bytes = 0;
        let end = loop {
            let left = range.start + sent_bytes..range.end;
            if left.is_empty() || sent_bytes >= TURN_BYTES {
                break Ok(TurnEnd::Unfinished);
            }
            match socket.send_file(file, left.clone(), &core.remote.counters) {
                Ok(Some(0)) => break Err(TurnError::File(io::ErrorKind::UnexpectedEof.into())),
                Ok(Some(bytes)) => sent_bytes += bytes as u64,
                Ok(None) => break read(file, left).map(TurnEnd::Full).map_err(TurnError::File),
                Err(error) => break Err(TurnError::Send(error)),
            }
        };
        Turn { sent_bytes, end }
    }
}

/// Reads the first bytes of `range`.
fn read(file: &File, range: Range<u64>) -> io::Result<Vec<u8>> {
    let bytes = (range.end - range.start).min(COPY_BYTES);
    let mut copy = vec![0; bytes as usize];
    file.read_exact_at(&mut copy, range.start)?;
    Ok(copy)
}

/// Aborts the connection when it is dropped, unless the whole range was sent: the peer must not
/// mistake a part for the whole. The abort also stops a turn that runs on.
struct Unfinished<'a>(Option<&'a Arc<Core>>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(core) = self.0 {
            core.abort();
        }
    }
}

/// Bytes that one turn may send before other calls get the thread.
const TURN_BYTES: u64 = 4 << 20;

/// Bytes that are copied each time that the socket is full. A range of as many is copied whole: it
/// is sent together with the bytes that were written before.
const COPY_BYTES: u64 = 64 << 10;
