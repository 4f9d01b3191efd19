//! Load whose bytes identify their connection, and a gate that blocks a poller.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use ringpoll::{Connection, Error, Handle, Result, ServerBuilder, ServerHandle};

use super::{
    Check, DEADLINE, Failure, Fixture, assert_pattern, dial, holds_within, pattern, read_exactly,
};

/// The offset in the test stream where the bytes of connection `tag` begin. The parts of two tags
/// do not overlap.
pub(crate) fn own(tag: usize, at: usize) -> usize {
    // Next to each other, two tags are out of step by 26 of the stream's 251.
    tag * 65_537 + at
}

/// `count` bytes of a stream. Every eight bytes of it contain `id` and their offset.
pub(crate) fn marked(id: u32, at: usize, count: usize) -> Vec<u8> {
    let (first, end) = (at / 8, (at + count).div_ceil(8));
    let mut bytes = Vec::with_capacity(8 * (end - first));
    for index in first..end {
        bytes.extend_from_slice(&mark(id, index));
    }
    bytes.truncate(at % 8 + count);
    bytes.drain(..at % 8);
    bytes
}

/// Fails unless `bytes` are the stream of `id` from offset `at` on.
#[track_caller]
pub(crate) fn assert_marked(bytes: &[u8], id: u32, at: usize) {
    let wanted = marked(id, at, bytes.len());
    let Some(wrong) = bytes.iter().zip(&wanted).position(|(byte, wanted)| byte != wanted) else {
        return;
    };
    // Compares a whole word, if `bytes` contain one.
    let word = wrong.saturating_sub((at + wrong) % 8);
    let found = &bytes[word..(word + 8).min(bytes.len())];
    panic!("byte {} of stream {id:#x} is wrong, in {found:02x?}", at + wrong);
}

fn mark(id: u32, index: usize) -> [u8; 8] {
    (u64::from(id) << 32 | index as u64).to_be_bytes()
}

/// A frame of connection `tag`: four bytes of length, then `size` bytes.
pub(crate) fn frame(tag: usize, size: usize) -> Vec<u8> {
    let mut bytes = (size as u32).to_be_bytes().to_vec();
    bytes.extend(pattern(own(tag, 0), size));
    bytes
}

/// Reads a frame of `size` bytes, and fails unless it is that of `tag`.
#[track_caller]
pub(crate) fn expect_frame(stream: impl Read, tag: usize, size: usize) -> Check {
    let got = read_exactly(stream, 4 + size)?;
    assert_eq!(got[..4], (size as u32).to_be_bytes(), "connection {tag}: a frame of another");
    assert_pattern(&got[4..], own(tag, 0));
    Ok(())
}

/// Sends a frame and gets it back.
#[track_caller]
pub(crate) fn exchange_frame(mut stream: &TcpStream, tag: usize, size: usize) -> Check {
    stream.write_all(&frame(tag, size))?;
    expect_frame(stream, tag, size)
}

/// A handler that answers a frame with the same frame.
pub(crate) async fn echo_frame(mut conn: Connection) -> Result<()> {
    let head = conn.peek(4).await?;
    let size = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let frame = conn.next(4 + size).await?;
    conn.write(frame)?;
    conn.flush().await
}

/// Whether a poller of such a server receives while its thread runs a handler, as a ring without
/// `DEFER_TASKRUN` does.
pub(crate) fn receives_behind_a_handler(builder: ServerBuilder) -> Check<bool> {
    /// Enough time for the kernel to receive bytes that have arrived.
    const MOMENT: Duration = Duration::from_millis(100);
    let gate = Gate::new();
    let halts = Arc::clone(&gate);
    let (prepared, handles) = channel();
    let builder = builder
        .pollers(1)
        .on_prepare(move |handle| prepared.send(handle.clone()).map_err(Error::other))
        .on_request(move |conn| Arc::clone(&halts).echo_frame(conn));
    let server = builder.bind("127.0.0.1:0")?.spawn()?;
    let mut peer = dial(&server)?;
    exchange_frame(&peer, 0, 10)?;
    let handle: Handle = handles.recv_timeout(DEADLINE)?;
    let unread = || handle.with_fd(|fd| rustix::io::ioctl_fionread(fd) == Ok(104)).unwrap_or(false);
    let is_received = gate.hold(&server, || {
        peer.write_all(&frame(1, 100))?;
        // On loopback the bytes arrive before the write returns.
        Ok(holds_within(MOMENT, || !unread()))
    })?;
    expect_frame(&peer, 1, 100)?;
    server.shutdown(DEADLINE)?;
    Ok(is_received)
}

/// Waits until `server` has this many connections, and neither memory nor sends of the closed ones.
#[track_caller]
pub(crate) fn left_with(server: &ServerHandle, open: u64) {
    let is_left = || {
        let stats = server.stats();
        let pollers = &stats.pollers;
        stats.open == open && pollers.connections == open && pollers.sends_in_flight == 0
    };
    assert!(holds_within(DEADLINE, is_left), "not {open} left: {:?}", server.stats());
    let no_blocks = holds_within(DEADLINE, || server.stats().pollers.blocks == 0);
    assert!(no_blocks, "blocks are left: {:?}", server.stats());
}

/// Blocks a thread that arrives at it. When the gate opens, a blocked poller finds all events of
/// the meantime together.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    is_occupied: bool,
    is_open: bool,
}

/// The first byte of the request of [`Gate::hold`]. No frame of less than 16 MiB begins with it.
pub(crate) const HALT: u8 = b'!';

impl Gate {
    pub(crate) fn new() -> Arc<Gate> {
        Arc::default()
    }

    /// A handler of frames. A frame that begins with [`HALT`] blocks it at this gate.
    pub(crate) async fn echo_frame(self: Arc<Gate>, mut conn: Connection) -> Result<()> {
        if conn.peek(1).await?[0] != HALT {
            return echo_frame(conn).await;
        }
        let halt = conn.next(1).await?;
        self.pass();
        conn.write(halt)?;
        conn.flush().await
    }

    /// Blocks this thread until the gate opens.
    fn pass(&self) {
        let mut state = self.state.lock().expect("nobody panics here");
        state.is_occupied = true;
        self.changed.notify_all();
        // A test that fails never opens the gate.
        let waited = self.changed.wait_timeout_while(state, DEADLINE, |state| !state.is_open);
        let (mut state, _) = waited.expect("nobody panics here");
        *state = GateState::default();
    }

    /// Runs `meanwhile` while the only poller of `server` is blocked at this gate, in its handler.
    pub(crate) fn hold<T>(
        &self,
        server: &ServerHandle,
        meanwhile: impl FnOnce() -> Check<T>,
    ) -> Check<T> {
        let halts = dial(server)?;
        Gate::halt(&halts)?;
        let result = self.held(meanwhile)?;
        assert_eq!(read_exactly(&halts, 1)?, [HALT]);
        Ok(result)
    }

    /// Asks the handler of this connection to block its poller at the gate.
    pub(crate) fn halt(mut peer: &TcpStream) -> Check {
        Ok(peer.write_all(&[HALT])?)
    }

    /// Waits until a poller is blocked at the gate, runs `meanwhile`, then opens the gate.
    pub(crate) fn held<T>(&self, meanwhile: impl FnOnce() -> Check<T>) -> Check<T> {
        let state = self.state.lock().expect("nobody panics here");
        let waited = self.changed.wait_timeout_while(state, DEADLINE, |state| !state.is_occupied);
        let (state, timeout) = waited.expect("nobody panics here");
        if timeout.timed_out() {
            return Err(Failure::new("no poller came to the gate"));
        }
        drop(state);
        let result = meanwhile()?;
        let mut state = self.state.lock().expect("nobody panics here");
        assert!(state.is_occupied, "the poller was held up for too long");
        state.is_open = true;
        drop(state);
        self.changed.notify_all();
        Ok(result)
    }
}

/// Fails unless a connection had to wait for a receive buffer. With a kernel thread that receives,
/// this depends on timing, so it is not checked.
#[track_caller]
pub(crate) fn assert_starved(t: &Fixture, server: &ServerHandle) {
    let stats = server.stats().pollers;
    let starved = stats.starvations > 0;
    assert!(starved || t.mount().receives_behind_pollers(), "nobody found no buffer: {stats:?}");
}
