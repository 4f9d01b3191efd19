//! A connection to one peer, and the types that users hold.
//!
//! A [`Connection`] owns the reader and the writer. The reader reads its bytes without a lock, and
//! takes the input lock of [`core`](self::core) only to get more. The writer writes without a lock,
//! and takes the output lock only to submit. A server gives the connection to a run of a handler.
//! Dropping the connection gives the reader and the writer back.

mod core;
mod direct;
mod end;
mod endpoint;
mod file;
mod flush;
mod handle;
mod handout;
mod input;
mod output;
mod parts;
mod reader;
mod reuse;
mod run;
mod service;
mod sleep;
mod span;
mod state;
mod timeout;
mod wait;
mod writer;

use std::fmt;
use std::fs::File;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::ops::{Deref, Range};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};

use bytes::BufMut;

use crate::address::PeerAddr;
use crate::buffer::{Chain, Found, Frames, LinkBuffer, Pool, ReservedBuf, Slice, Source, Staging};
use crate::error::{Error, Result};
use crate::poller::{Command, Socket};
use crate::sync::atomic::Ordering;
use crate::sync::lock;
use crate::user_code;

pub use handle::{ConnectionStats, Handle};
use parts::Lent;
use reader::impl_reader;
pub use service::ShutdownBegun;
pub use sleep::Sleep;
use state::{READER, WRITER};
use wait::{Began, Withdraw};
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
///
/// # Pipelining
/// A client may send many requests before it reads. One flush for all answers costs less than a
/// flush for each. With [`ServerBuilder::submit_before_read`](crate::ServerBuilder), or the setting
/// of that name of a [`Dialer`](crate::Dialer), a handler needs no flush between requests:
///
/// ```
/// use ringpoll::{Connection, Result, Server};
///
/// /// Sends every line back.
/// async fn answer(mut conn: Connection) -> Result<()> {
///     while conn.readable().await? > 0 {
///         let line = conn.until(b'\n').await?; // submits the answers, if it has to wait
///         conn.write(line)?;
///     }
///     conn.flush().await
/// }
/// # fn main() -> Result<()> {
/// let server = Server::builder().submit_before_read(true).on_connect(answer);
/// # let _ = server.bind("127.0.0.1:0")?;
/// # Ok(())
/// # }
/// ```
///
/// A read that finds fewer bytes buffered than it needs submits the written bytes. It does not wait
/// until the kernel has them. If `output_bytes_max` submitted bytes are not in the kernel, the read
/// first waits for room, within the write timeout. So such a read can fail with the errors of a
/// [`flush`](Self::flush).
///
/// A handler that returns must flush or submit before: only reads submit. A [`ReadHalf`] and a
/// [`ReadPart`] have no writer and submit nothing; the example of [`parts`](Self::parts) answers
/// all buffered requests with one flush.
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

/// The reader of a [`Connection`] that [`parts`](Connection::parts) has borrowed.
pub struct ReadPart<'a> {
    handle: &'a Handle,
    reader: &'a mut Chain,
    read_began: &'a mut Began,
}

/// The writer of a [`Connection`] that [`parts`](Connection::parts) has borrowed.
pub struct WritePart<'a> {
    handle: &'a Handle,
    writer: &'a mut Staging,
    write_began: &'a mut WriteBegan,
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
impl_reader!(ReadPart<'_>);
impl_writer!(Connection);
impl_writer!(WriteHalf);
impl_writer!(WritePart<'_>);

impl ReadHalf {
    /// Ends the wait of the poll methods. The next poll begins another wait.
    pub(crate) fn end_wait(&mut self) {
        self.read_began.forget();
    }
}

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

    /// Borrows the reader and the writer apart. So a handler can write while it holds a frame that
    /// the reader lends:
    ///
    /// ```
    /// use ringpoll::buffer::u32_be_length;
    /// use ringpoll::{Connection, Result};
    ///
    /// /// Sends every frame back. One flush sends the answers to all frames that have arrived.
    /// async fn answer(mut conn: Connection) -> Result<()> {
    ///     let (mut reader, mut writer) = conn.parts();
    ///     let mut frames = reader.frames(1 << 20, u32_be_length);
    ///     let mut next = frames.next().await?; // waits for the first frame
    ///     while let Some(frame) = next {
    ///         writer.write_copy(frame)?;
    ///         next = frames.try_next()?; // never waits
    ///     }
    ///     writer.flush().await
    /// }
    /// ```
    #[inline]
    pub fn parts(&mut self) -> (ReadPart<'_>, WritePart<'_>) {
        let Connection { handle, reader, read_began, writer, write_began } = self;
        (ReadPart { handle, reader, read_began }, WritePart { handle, writer, write_began })
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

/// What a read that has to wait for `bytes` does first.
impl Connection {
    /// Submits written bytes, if the settings ask for it.
    #[inline]
    fn poll_output(
        &mut self,
        bytes: usize,
        began: &mut Began,
        cx: &Context<'_>,
    ) -> Poll<Result<()>> {
        let core = &self.handle.0;
        if !core.limits.submit_before_read || self.writer.is_empty() || self.len() >= bytes {
            return Poll::Ready(Ok(()));
        }
        flush::poll_submit(core, &mut self.writer, began, cx)
    }
}

/// A reader without its writer submits nothing.
macro_rules! impl_no_output {
    ($type:ident $(<$life:lifetime>)?) => {
        impl $type $(<$life>)? {
            #[inline]
            fn poll_output(&self, _: usize, _: &mut Began, _: &Context<'_>) -> Poll<Result<()>> {
                Poll::Ready(Ok(()))
            }
        }
    };
}

impl_no_output!(ReadHalf);
impl_no_output!(ReadPart<'_>);

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
    pub(crate) fn downgrade(&self) -> Weak<Core> {
        Arc::downgrade(&self.handle.0)
    }

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
    #[inline]
    fn drop(&mut self) {
        // A connection that was split has no parts: its halves have them.
        let (Some(reader), Some(writer)) = (self.reader.take(), self.writer.take()) else { return };
        let core = &self.handle.0;
        if !core.is_serving() {
            core.close();
        } else {
            core.take_home(reader, writer);
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

impl Deref for ReadPart<'_> {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        self.handle
    }
}

impl Deref for WritePart<'_> {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        self.handle
    }
}

macro_rules! impl_debug {
    ($($type:ident $(<$life:lifetime>)?),+) => {$(
        impl fmt::Debug for $type $(<$life>)? {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_tuple(stringify!($type)).field(&self.handle).finish()
            }
        }
    )+};
}

impl_debug!(Connection, ReadHalf, WriteHalf, ReadPart<'_>, WritePart<'_>);

const _: () = {
    const fn goes_anywhere<T: Send + Sync + Unpin + 'static>() {}
    goes_anywhere::<Connection>();
    goes_anywhere::<ReadHalf>();
    goes_anywhere::<WriteHalf>();
    goes_anywhere::<ReadPart<'static>>();
    goes_anywhere::<WritePart<'static>>();
    goes_anywhere::<Handle>();
    goes_anywhere::<Sleep>();
};

/// Starts to connect. [`wait_connected`] returns the result.
pub(crate) fn start_connect(core: &Arc<Core>, socket: Arc<Socket>, peer: PeerAddr) {
    lock(&core.input).dial = input::Dial::Begun;
    core.remote.send(Command::Connect(Arc::clone(core), socket, peer));
}

/// Registers a connected stream with its poller.
pub(crate) fn attach(core: &Arc<Core>, socket: Arc<Socket>) {
    core.remote.send(Command::Attach(Arc::clone(core), socket));
}

/// Waits for the end of [`start_connect`].
pub(crate) async fn wait_connected(core: &Arc<Core>) -> io::Result<()> {
    wait::connected(core).await
}
