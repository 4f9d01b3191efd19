//! A connection to one peer, and the types that users hold.
//!
//! A [`Connection`] owns the reader and the writer. The reader reads its bytes without a lock, and
//! takes the input lock of [`core`](self::core) only to get more. The writer writes without a lock,
//! and takes the output lock only to submit. A server gives the connection to a run of a handler.
//! Dropping the connection gives the reader and the writer back.

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
use state::{READER, WRITER};
use wait::Began;
use writer::impl_writer;

pub(crate) use self::core::{Core, Remote};
pub(crate) use run::Handler;
pub(crate) use service::{Hooks, Service};

/// The poller of the calling thread, if that thread is a poller.
pub(crate) fn current_poller() -> Option<Arc<Remote>> {
    Remote::current()
}

/// A stream to one peer, and the only owner of its reader and writer.
///
/// It is `Send + Sync`, and any executor or thread may use it. It dereferences to its [`Handle`].
///
/// Dropping a connection that was dialled or adopted closes it. Dropping a connection that a server
/// gave to a handler gives it back to the server. The next run starts when the handler's future is
/// done *and* its connection is back. Bytes that are unread, or written and not submitted, are kept
/// for the next run.
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

/// When the waits of a writer's poll methods began.
#[derive(Clone, Copy, Default)]
struct WriteBegan {
    room: Began,
    flush: Began,
}

/// A connection that was taken away from its poller.
#[derive(Debug)]
#[non_exhaustive]
pub struct Detached {
    /// The socket, open and non-blocking.
    pub fd: OwnedFd,
    /// Bytes received and not read.
    pub unread: LinkBuffer,
}

impl_reader!(Connection);
impl_reader!(ReadHalf);
impl_writer!(Connection);
impl_writer!(WriteHalf);

impl Connection {
    /// A connection without a server: its user closes it.
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

    /// A new handle of this connection.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Splits the connection into a reading and a writing half, so that two tasks can use it at the
    /// same time. Dropping both halves has the same effect as dropping the connection.
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

    /// Flushes, then takes the socket away from its poller. Returns the socket and all bytes
    /// received and not read. The close callbacks run before this returns; the descriptor stays
    /// open.
    ///
    /// Dropping the future before its end closes the connection.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush), and an error of the kernel if `with_fd` runs and the
    /// descriptor cannot be duplicated. The connection closes then.
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
            // Another thread is inside `with_fd` and uses this descriptor, so duplicate it.
            Err(socket) => socket.duplicate().map_err(|error| Error::io("detach", error))?,
        };
        lock(&core.input).refill(&mut self.reader);
        let unread = LinkBuffer::from_chain(std::mem::take(&mut *self.reader));
        // Completes detaching. The socket was taken, so this does not close it.
        drop(detaching);
        Ok(Detached { fd, unread })
    }
}

/// Ends detaching. If `detach` has not taken the socket, this closes the connection.
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

/// Methods for the driver of a mux.
impl WriteHalf {
    /// The pool that the connection's blocks come from.
    pub(crate) fn pool(&self) -> &Pool {
        &self.handle.0.remote.pool
    }

    /// Waits until nothing more can be written: this side has closed, or the connection has failed.
    /// A writer calls this while it has nothing to flush.
    pub(crate) fn poll_end(&self, cx: &Context<'_>) -> Poll<Error> {
        flush::poll_end(&self.handle.0, cx)
    }

    /// Withdraws the registration of the last poll.
    pub(crate) fn forget_wait(&self) {
        let flusher = lock(&self.handle.0.output).take_flusher();
        user_code::discard(flusher);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A connection that was split has no parts: its halves have them.
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

/// Starts to connect. [`wait_connected`] returns the result.
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
