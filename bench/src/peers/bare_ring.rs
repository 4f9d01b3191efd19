//! An io_uring loop without a library: what the ring and TCP cost by themselves, and so the limit
//! of any library on io_uring.
//!
//! One thread, one ring: a multishot accept, a multishot receive per connection into shared
//! buffers, and one send in flight per connection. A pass handles every completion that is there,
//! gives each buffer back at once, gathers a connection's replies into one send, and hands the
//! sends over with the call that waits for the next completions.
//!
//! A connection is freed when no operation names it any more, so a completion always finds the one
//! it was meant for:
//!
//! ```text
//! Open --(end of stream)--> Ended   sends what it owes
//!   |                         |
//!   +----(error)---> Broken <-+     cancels what is under way
//! ```

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use serde_json::Value;

use super::Service;
use super::ring::{Completion, File, Filled, Ring};
use crate::error::{Failure, Result};
use crate::wire::{HEADER_BYTES, TooLong, payload_bytes};

/// The receive buffers of a ring. Pipelined requests want large ones, single ones want those that
/// fit the cache together.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) buffer_count: u16,
    pub(super) buffer_bytes: usize,
    /// Descriptors in the ring's own table; 0 for those of the process.
    pub(super) direct_files: u32,
}

pub(super) fn serve(
    listener: &TcpListener,
    stop: &UnixStream,
    service: Service,
    shape: Shape,
) -> Result<Value> {
    // The ring gives up on a descriptor that does not block, instead of waiting for it.
    listener.set_nonblocking(false).map_err(Failure::at("listener"))?;
    let ring = Ring::new(shape.buffer_count, shape.buffer_bytes, shape.direct_files);
    let mut server = Server {
        ring: ring.map_err(Failure::at("set up a ring"))?,
        connections: Vec::new(),
        free: Vec::new(),
        touched: Vec::new(),
        spare: Vec::new(),
        service,
        accepted: 0,
    };
    server.run(listener, stop).map_err(Failure::at("ring"))?;
    Ok(super::counters(server.accepted, Some(server.ring.system_calls)))
}

struct Server {
    ring: Ring,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    /// Connections that this pass has something to do for, when its completions are handled.
    touched: Vec<usize>,
    /// Buffers for replies. The last one used is the next one taken, while the cache has it.
    spare: Vec<Vec<u8>>,
    service: Service,
    accepted: u64,
}

struct Connection {
    file: File,
    life: Life,
    receiving: bool,
    /// The receive was told to end.
    cancelled: bool,
    sending: bool,
    touched: bool,
    /// How much of what is being sent the kernel had taken before.
    sent: usize,
    /// The front of a frame that is not whole yet.
    partial: Vec<u8>,
    /// Replies that wait for the send in flight, or for the end of the pass.
    queued: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Open,
    /// The peer has said its last word.
    Ended,
    Broken,
}

impl Server {
    fn run(&mut self, listener: &TcpListener, stop: &UnixStream) -> io::Result<()> {
        self.ring.watch(stop)?;
        self.ring.accept(listener)?;
        loop {
            self.ring.wait()?;
            while let Some(completion) = self.ring.next() {
                match completion {
                    Completion::Stopped => return Ok(()),
                    Completion::Accepted { outcome, more } => {
                        // Out of descriptors, or a client that left: the next one may do better.
                        if let Ok(file) = outcome {
                            self.take_in(file)?;
                        }
                        if !more {
                            self.ring.accept(listener)?;
                        }
                    }
                    Completion::Received { slot, outcome, more } => {
                        self.on_received(slot, outcome, more);
                    }
                    Completion::Sent { slot, outcome, bytes } => {
                        self.on_sent(slot, outcome, bytes)?;
                    }
                    Completion::Nothing => {}
                }
            }
            for index in 0..self.touched.len() {
                self.settle(self.touched[index])?;
            }
            self.touched.clear();
        }
    }

    fn take_in(&mut self, file: File) -> io::Result<()> {
        self.accepted += 1;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        self.ring.receive(slot, &file)?;
        self.connections[slot] = Some(Connection::new(file));
        Ok(())
    }

    fn on_received(&mut self, slot: usize, outcome: io::Result<Option<Filled>>, more: bool) {
        let connection = live(&mut self.connections, slot);
        connection.receiving = more;
        connection.cancelled &= more;
        match outcome {
            Ok(Some(filled)) => {
                if connection.queued.capacity() == 0 {
                    connection.queued = self.spare.pop().unwrap_or_default();
                }
                // What a broken connection says is not answered.
                if connection.life != Life::Broken
                    && connection.answer(self.ring.bytes(&filled), self.service).is_err()
                {
                    connection.life = Life::Broken;
                }
                self.ring.give_back(filled);
            }
            Ok(None) if connection.life == Life::Open => connection.life = Life::Ended,
            Ok(None) => {}
            // No buffer was left, or nothing at all is wrong: the receive is armed again when this
            // pass has given all buffers back.
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::NOBUFS | Errno::CANCELED | Errno::AGAIN | Errno::INTR) => {}
                _ => connection.life = Life::Broken,
            },
        }
        if !connection.touched {
            connection.touched = true;
            self.touched.push(slot);
        }
    }

    fn on_sent(
        &mut self,
        slot: usize,
        outcome: io::Result<usize>,
        mut bytes: Vec<u8>,
    ) -> io::Result<()> {
        let connection = live(&mut self.connections, slot);
        match outcome {
            Ok(count @ 1..) => connection.sent += count,
            Ok(0) => connection.life = Life::Broken,
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::AGAIN | Errno::INTR) => {}
                _ => connection.life = Life::Broken,
            },
        }
        if connection.life != Life::Broken && connection.sent < bytes.len() {
            return self.ring.send(slot, &connection.file, bytes, connection.sent);
        }
        connection.sending = false;
        let has_more_to_do = connection.queued.capacity() > 0
            || !connection.receiving
            || connection.life != Life::Open;
        if has_more_to_do && !connection.touched {
            connection.touched = true;
            self.touched.push(slot);
        }
        bytes.clear();
        keep(&mut self.spare, bytes);
        Ok(())
    }

    /// Decides what becomes of a connection after a pass that touched it.
    fn settle(&mut self, slot: usize) -> io::Result<()> {
        let connection = live(&mut self.connections, slot);
        connection.touched = false;
        if connection.life == Life::Broken {
            connection.queued = Vec::new();
            if connection.sending {
                self.ring.cancel_send(slot)?;
            }
        }
        if !connection.sending {
            let replies = std::mem::take(&mut connection.queued);
            if replies.is_empty() {
                keep(&mut self.spare, replies);
            } else {
                connection.sending = true;
                connection.sent = 0;
                self.ring.send(slot, &connection.file, replies, 0)?;
            }
        }
        // A peer that does not read its replies is not read either.
        let wanted = connection.life == Life::Open && connection.queued.len() < QUEUED_BYTES_MAX;
        if wanted && !connection.receiving {
            connection.receiving = true;
            self.ring.receive(slot, &connection.file)?;
        } else if !wanted && connection.receiving && !connection.cancelled {
            connection.cancelled = true;
            self.ring.cancel_receive(slot)?;
        }
        if connection.life != Life::Open && !connection.receiving && !connection.sending {
            let gone = self.connections[slot].take().expect("it was there a line ago");
            self.free.push(slot);
            self.ring.close(gone.file)?;
        }
        Ok(())
    }
}

impl Connection {
    /// Just accepted, and receiving.
    fn new(file: File) -> Connection {
        Connection {
            file,
            life: Life::Open,
            receiving: true,
            cancelled: false,
            sending: false,
            touched: false,
            sent: 0,
            partial: Vec::new(),
            queued: Vec::new(),
        }
    }

    /// Appends the reply to every frame that `chunk` makes whole.
    fn answer(&mut self, mut chunk: &[u8], service: Service) -> Result<(), TooLong> {
        if !self.partial.is_empty() {
            let wanted = HEADER_BYTES.saturating_sub(self.partial.len());
            chunk = move_bytes(&mut self.partial, chunk, wanted);
            let Some(header) = self.partial.first_chunk() else { return Ok(()) };
            let frame_bytes = HEADER_BYTES + payload_bytes(*header, service.frame_max)?;
            let missing = frame_bytes - self.partial.len();
            chunk = move_bytes(&mut self.partial, chunk, missing);
            if self.partial.len() < frame_bytes {
                return Ok(());
            }
            service.answer_whole(&self.partial, &mut self.queued);
            self.partial.clear();
        }
        let whole = service.answer(chunk, &mut self.queued)?;
        self.partial.extend_from_slice(&chunk[whole..]);
        Ok(())
    }
}

fn live(connections: &mut [Option<Connection>], slot: usize) -> &mut Connection {
    connections[slot].as_mut().expect("a slot is free only when no operation names it")
}

/// Keeps an empty buffer for the next replies.
fn keep(spare: &mut Vec<Vec<u8>>, bytes: Vec<u8>) {
    if (1..=SPARE_BYTES_MAX).contains(&bytes.capacity()) && spare.len() < SPARES_MAX {
        spare.push(bytes);
    }
}

/// Moves up to `wanted` bytes; what is left of them.
fn move_bytes<'a>(to: &mut Vec<u8>, from: &'a [u8], wanted: usize) -> &'a [u8] {
    let (moved, rest) = from.split_at(wanted.min(from.len()));
    to.extend_from_slice(moved);
    rest
}

/// Replies that may wait behind a send before their connection is no longer read.
const QUEUED_BYTES_MAX: usize = 1 << 20;
/// Reply buffers kept for the next replies, and the largest of them.
const SPARES_MAX: usize = 1024;
const SPARE_BYTES_MAX: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Request, Template};

    #[test]
    fn frames_cut_anywhere_are_answered_whole() {
        let mut frames = Vec::new();
        Template::new(10).append(Request::cheap(1), &mut frames);
        Template::new(0).append(Request::cheap(2), &mut frames);
        Template::new(300).append(Request::cheap(3), &mut frames);
        for piece_bytes in 1..=frames.len() {
            let mut connection = connection();
            for piece in frames.chunks(piece_bytes) {
                connection.answer(piece, echo(300)).unwrap();
            }
            assert!(connection.queued == frames, "pieces of {piece_bytes}");
            assert!(connection.partial.is_empty(), "pieces of {piece_bytes}");
        }
    }

    #[test]
    fn a_long_frame_is_refused_however_its_header_arrives() {
        let mut frame = Vec::new();
        Template::new(11).append(Request::cheap(0), &mut frame);
        assert!(connection().answer(&frame, echo(10)).is_err());
        let mut connection = connection();
        connection.answer(&frame[..3], echo(10)).unwrap();
        assert!(connection.answer(&frame[3..], echo(10)).is_err());
    }

    fn echo(frame_max: usize) -> Service {
        Service { frame_max, work: None }
    }

    fn connection() -> Connection {
        Connection::new(File::Direct(0))
    }
}
