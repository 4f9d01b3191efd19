//! One peer: what users hold.
//!
//! A [`Connection`] owns its peer's reader and writer. Both work without a lock on what they have;
//! only to get more, or to hand bytes over, do they meet the poller, under the input or the output
//! lock of [`core`](self::core). In a server a connection is handed out to a run of a handler and comes home
//! when it is dropped.

mod core;
mod end;
mod endpoint;
mod flush;
mod handle;
mod handout;
mod input;
mod output;
mod parts;
mod reader;
mod run;
mod service;
mod state;
mod timeout;
mod wait;
mod writer;

use std::fmt;
use std::future::Future;
use std::io;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use crate::address::PeerAddr;
use crate::buffer::{Chain, LinkBuffer, Pool, Slice, Staging};
use crate::error::{Error, Result};
use crate::poller::{Command, Socket};
use crate::sync::lock;
use crate::user_code;

pub use handle::{ConnectionStats, Handle};
use parts::Lent;
use reader::impl_reader;
use wait::Began;
use writer::impl_writer;

pub(crate) use self::core::{Core, Remote};
pub(crate) use run::Handler;
pub(crate) use service::{Hooks, Service};

/// The poller that the calling thread is.
pub(crate) fn current_poller() -> Option<Arc<Remote>> {
    Remote::current()
}
use state::{READER, WRITER};

/// A stream to one peer, and the only owner of its reader and writer.
///
/// `Send + Sync`, and usable from any executor or thread. It dereferences to its [`Handle`].
///
/// Dropping one that was dialled or adopted closes it. Dropping one that a server handed to a
/// handler gives it back: the next run starts when the handler's future is done *and* its
/// connection is back. What is buffered, unread or written, is there again in the next run.
pub struct Connection {
    handle: Handle,
    reader: Lent<Chain>,
    read_began: Began,
    writer: Lent<Staging>,
    write_began: WriteBegan,
}

/// The reading half of a [`Connection`].
pub struct ReadHalf {
    handle: Handle,
    reader: Lent<Chain>,
    read_began: Began,
}

/// The writing half of a [`Connection`].
pub struct WriteHalf {
    handle: Handle,
    writer: Lent<Staging>,
    write_began: WriteBegan,
}

/// The waits of a writer's poll methods.
#[derive(Clone, Copy, Default)]
struct WriteBegan {
    room: Began,
    flush: Began,
}

/// A connection that has left its poller.
#[derive(Debug)]
#[non_exhaustive]
pub struct Detached {
    /// The socket, open and non-blocking.
    pub fd: OwnedFd,
    /// What was received and not read.
    pub unread: LinkBuffer,
}

impl_reader!(Connection);
impl_reader!(ReadHalf);
impl_writer!(Connection);
impl_writer!(WriteHalf);

impl Connection {
    /// A connection that its user owns for good.
    pub(crate) fn owned(core: &Arc<Core>) -> Connection {
        Connection::with_parts(Arc::clone(core), Box::default(), Box::default())
    }

    fn with_parts(core: Arc<Core>, reader: Box<Chain>, writer: Box<Staging>) -> Connection {
        Connection {
            handle: Handle(core),
            reader: Lent::new(reader),
            read_began: Began::default(),
            writer: Lent::new(writer),
            write_began: WriteBegan::default(),
        }
    }

    /// A handle to keep elsewhere.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Parts reading from writing, so that two tasks can do both at once. The connection closes, or
    /// goes home, when both halves are dropped.
    pub fn split(mut self) -> (ReadHalf, WriteHalf) {
        self.handle.0.count_halves();
        (
            ReadHalf {
                handle: self.handle.clone(),
                reader: self.reader.pass_on(),
                read_began: self.read_began,
            },
            WriteHalf {
                handle: self.handle.clone(),
                writer: self.writer.pass_on(),
                write_began: self.write_began,
            },
        )
    }

    /// Flushes, then takes the socket away from its poller, with everything received and not read.
    /// The close callbacks run before this returns; the descriptor stays open.
    ///
    /// A call that is given up before its end closes the connection.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush); the connection closes then.
    pub async fn detach(mut self) -> Result<Detached> {
        let core = Arc::clone(&self.handle.0);
        let detaching = Detaching(&core);
        self.flush().await?;
        if !core.life.detach() {
            return Err(Error::closed("detach"));
        }
        lock(&core.output).detaching = true;
        self.handle.request_removal();
        wait::removed(&core).await;
        core.call_back();
        let socket = lock(&core.output).socket.take();
        let socket = socket.ok_or_else(|| Error::closed("detach"))?;
        let fd = match Arc::try_unwrap(socket) {
            Ok(socket) => socket.into_fd(),
            // Somebody is inside `with_fd`: another number for the same socket does as well.
            Err(socket) => socket.duplicate().map_err(|error| Error::io("detach", error))?,
        };
        lock(&core.input).refill(&mut self.reader);
        let unread = LinkBuffer::from_chain(std::mem::take(&mut *self.reader));
        // The socket is its user's from here on: there is nothing left to close.
        drop(detaching);
        Ok(Detached { fd, unread })
    }
}

/// Closes a connection whose detaching ends halfway, and finishes one that is detached.
struct Detaching<'a>(&'a Arc<Core>);

impl Drop for Detaching<'_> {
    fn drop(&mut self) {
        let core = self.0;
        core.close();
        if core.life.is_detached() {
            core.end_detaching();
        }
    }
}

/// For the driver of a mux.
impl WriteHalf {
    /// Where the connection's blocks come from.
    pub(crate) fn pool(&self) -> &Pool {
        &self.handle.0.remote.pool
    }

    /// Waits until nothing more can be written: this side is closed, or the connection has failed.
    /// For a writer that has nothing to flush.
    pub(crate) fn poll_end(&self, cx: &Context<'_>) -> Poll<Error> {
        flush::poll_end(&self.handle.0, cx)
    }

    /// Withdraws what the last poll has registered.
    pub(crate) fn forget_wait(&self) {
        let flusher = lock(&self.handle.0.output).take_flusher();
        user_code::discard(flusher);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Nothing, where it was split: the halves have them.
        let (Some(reader), Some(writer)) = (self.reader.take(), self.writer.take()) else { return };
        let core = &self.handle.0;
        if !core.is_serving() {
            core.close();
        } else {
            core.release(handout::BOTH, Some(reader), Some(writer));
        }
    }
}

impl Drop for ReadHalf {
    fn drop(&mut self) {
        self.handle.0.drop_half(READER, self.reader.take(), None);
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        self.handle.0.drop_half(WRITER, None, self.writer.take());
    }
}

impl Deref for Connection {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.handle
    }
}

impl Deref for ReadHalf {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.handle
    }
}

impl Deref for WriteHalf {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.handle
    }
}

macro_rules! impl_debug {
    ($($type:ident),+) => {$(
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_tuple(stringify!($type)).field(&self.handle).finish()
            }
        }
    )+};
}

impl_debug!(Connection, ReadHalf, WriteHalf);

const _: () = {
    const fn goes_anywhere<T: Send + Sync + Unpin + 'static>() {}
    goes_anywhere::<Connection>();
    goes_anywhere::<ReadHalf>();
    goes_anywhere::<WriteHalf>();
    goes_anywhere::<Handle>();
};

/// Starts to connect; [`wait_connected`] tells how it ended.
pub(crate) fn start_connect(core: &Arc<Core>, socket: Arc<Socket>, peer: PeerAddr) {
    core.remote.send(Command::Connect(Arc::clone(core), socket, peer));
}

/// Registers a connected stream with its poller.
pub(crate) fn attach(core: &Arc<Core>, socket: Arc<Socket>) {
    core.remote.send(Command::Attach(Arc::clone(core), socket));
}

/// Waits for the end of [`start_connect`]; `None` is a timeout.
pub(crate) async fn wait_connected(core: &Arc<Core>, until_ns: u64) -> Option<io::Result<()>> {
    wait::connected(core, until_ns).await
}
