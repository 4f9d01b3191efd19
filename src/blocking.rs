//! Connections for plain threads: methods block instead of returning a future.

use std::fs::File;
use std::future::Future;
use std::ops::{Deref, Range};
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use crate::buffer::{Frames, LinkBuffer, Reader, ReservedBuf, Slice, Writer};
use crate::connection::{self, Detached, Handle, ReadPart, WritePart, current_poller};
use crate::dial::{self, Dialer};
use crate::error::{Error, Result};

/// A [`crate::Connection`] whose methods block the calling thread while they wait.
///
/// On a poller thread every method that may wait fails with an unsupported error: the blocked
/// poller could not serve the connection. Apart from that, each method does the same as the method
/// of that name on [`crate::Connection`]. The traits [`Reader`] and [`Writer`] have these methods
/// as well.
#[derive(Debug)]
pub struct Connection(connection::Connection);

/// Connects to `address`. See [`Dialer::connect`].
///
/// # Errors
/// See [`Dialer::connect`]; unsupported on a poller.
pub fn connect(address: &str) -> Result<Connection> {
    connect_with(&Dialer::new(), address)
}

/// Connects to `address` with the dialer's settings.
///
/// # Errors
/// See [`Dialer::connect`]; unsupported on a poller.
pub fn connect_with(dialer: &Dialer, address: &str) -> Result<Connection> {
    wait_off_poller("connect", dialer.connect(address)).map(Connection)
}

/// Makes a connection from a connected stream socket. See [`Dialer::adopt`].
///
/// # Errors
/// See [`Dialer::adopt`].
pub fn adopt(fd: OwnedFd) -> Result<Connection> {
    dial::adopt(fd).map(Connection)
}

/// Runs `future` on this thread and returns its output. The thread sleeps while the future waits.
///
/// Do not call this on a poller thread: a future that waits for a connection of that poller never
/// ends there. Use `await` instead.
pub fn wait<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut cx = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut cx) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

fn wait_off_poller<T>(operation: &str, future: impl Future<Output = Result<T>>) -> Result<T> {
    if current_poller().is_some() {
        return Err(Error::unsupported(format!("{operation}: a blocking call on a poller thread")));
    }
    wait(future)
}

macro_rules! blocking {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*) -> $output:ty;)+) => {
        /// Methods that may wait.
        impl Connection {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// See the method of that name on [`crate::Connection`]; unsupported on a poller.
                pub fn $name(&mut self, $($argument: $type),*) -> Result<$output> {
                    wait_off_poller(stringify!($name), self.0.$name($($argument),*))
                }
            )+
        }
    };
}

blocking! {
    /// Removes the next `bytes`.
    next(bytes: usize) -> Slice;
    /// Returns the next `bytes`, which stay unread.
    peek(bytes: usize) -> Slice;
    /// Drops the next `bytes`.
    skip(bytes: usize) -> ();
    /// Removes everything up to and including `delimiter`.
    until(delimiter: u8) -> Slice;
    /// Moves received bytes into `buffer`. Returns how many; 0 at the end of the stream.
    read(buffer: &mut [u8]) -> usize;
    /// Fills `buffer`.
    read_exact(buffer: &mut [u8]) -> ();
    /// Removes one byte.
    read_byte() -> u8;
    /// Removes the next `bytes` as a string. Bytes that are not UTF-8 are removed, too.
    read_string(bytes: usize) -> String;
    /// Removes the next `bytes` as a vector.
    read_to_vec(bytes: usize) -> Vec<u8>;
    /// Removes the next `bytes` as a buffer. Never copies.
    slice(bytes: usize) -> LinkBuffer;
    /// Waits for bytes to read. Returns how many are buffered; 0 at the end of the stream.
    readable() -> usize;
    /// Submits all written bytes, and waits until the kernel has them.
    flush() -> ();
    /// Flushes, then sends a range of a file.
    send_file(file: Arc<File>, range: Range<u64>) -> ();
    /// Flushes, then ends this side of the stream: the peer reads its end.
    shutdown_write() -> ();
}

impl Connection {
    /// The same connection, with methods that block.
    pub fn new(connection: connection::Connection) -> Connection {
        Connection(connection)
    }

    /// The same connection, with async methods.
    pub fn into_async(self) -> connection::Connection {
        self.0
    }

    /// See [`crate::Connection::try_next`].
    pub fn try_next(&mut self, bytes: usize) -> Option<Slice> {
        self.0.try_next(bytes)
    }

    /// See [`crate::Connection::try_peek`].
    pub fn try_peek(&mut self, bytes: usize) -> Option<Slice> {
        self.0.try_peek(bytes)
    }

    /// See [`crate::Connection::buffered`].
    pub fn buffered(&mut self) -> &[u8] {
        self.0.buffered()
    }

    /// See [`crate::Connection::advance`].
    ///
    /// # Panics
    /// When fewer bytes can be read without waiting.
    pub fn advance(&mut self, bytes: usize) {
        self.0.advance(bytes);
    }

    /// See [`crate::Connection::frames`]. [`wait`] waits for `next` of the frames.
    pub fn frames<F>(
        &mut self,
        bytes_max: usize,
        length_of: F,
    ) -> Frames<'_, connection::Connection, F>
    where
        F: FnMut(&[u8]) -> Result<Option<usize>>,
    {
        self.0.frames(bytes_max, length_of)
    }

    /// See [`crate::Connection::parts`]. [`wait`] waits for the futures of the parts.
    pub fn parts(&mut self) -> (ReadPart<'_>, WritePart<'_>) {
        self.0.parts()
    }

    /// How many bytes can be read without waiting.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the next read has to wait.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// See [`crate::Connection::reserve`].
    ///
    /// # Errors
    /// Closed.
    pub fn reserve(&mut self, bytes: usize) -> Result<&mut [u8]> {
        self.0.reserve(bytes)
    }

    /// See [`crate::Connection::reserve_buf`].
    ///
    /// # Errors
    /// Closed.
    pub fn reserve_buf(&mut self, bytes: usize) -> Result<ReservedBuf<'_>> {
        self.0.reserve_buf(bytes)
    }

    /// See [`crate::Connection::commit`].
    ///
    /// # Errors
    /// Closed; invalid, if less was reserved.
    pub fn commit(&mut self, bytes: usize) -> Result<()> {
        self.0.commit(bytes)
    }

    /// See [`crate::Connection::write`].
    ///
    /// # Errors
    /// Closed.
    pub fn write(&mut self, data: impl Into<Slice>) -> Result<()> {
        self.0.write(data)
    }

    /// See [`crate::Connection::write_copy`].
    ///
    /// # Errors
    /// Closed.
    pub fn write_copy(&mut self, data: &[u8]) -> Result<()> {
        self.0.write_copy(data)
    }

    /// See [`crate::Connection::insert`].
    ///
    /// # Errors
    /// Closed; invalid, if less is reserved.
    pub fn insert(&mut self, data: impl Into<Slice>, remaining: usize) -> Result<()> {
        self.0.insert(data, remaining)
    }

    /// See [`crate::Connection::append`].
    ///
    /// # Errors
    /// Closed.
    pub fn append(&mut self, buffer: LinkBuffer) -> Result<()> {
        self.0.append(buffer)
    }

    /// How many bytes are written and not submitted.
    pub fn pending_len(&self) -> usize {
        self.0.pending_len()
    }

    /// See [`crate::Connection::submit`].
    ///
    /// # Errors
    /// See [`crate::Connection::submit`].
    pub fn submit(&mut self) -> Result<()> {
        self.0.submit()
    }

    /// See [`crate::Connection::detach`].
    ///
    /// # Errors
    /// See [`crate::Connection::detach`]; unsupported on a poller.
    pub fn detach(self) -> Result<Detached> {
        wait_off_poller("detach", self.0.detach())
    }
}

impl Reader for Connection {
    fn next(&mut self, bytes: usize) -> Result<Slice> {
        Connection::next(self, bytes)
    }

    fn peek(&mut self, bytes: usize) -> Result<Slice> {
        Connection::peek(self, bytes)
    }

    fn skip(&mut self, bytes: usize) -> Result<()> {
        Connection::skip(self, bytes)
    }

    fn until(&mut self, delimiter: u8) -> Result<Slice> {
        Connection::until(self, delimiter)
    }

    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        Connection::read(self, into)
    }

    fn slice(&mut self, bytes: usize) -> Result<LinkBuffer> {
        Connection::slice(self, bytes)
    }

    fn len(&self) -> usize {
        Connection::len(self)
    }
}

impl Writer for Connection {
    fn reserve(&mut self, bytes: usize) -> Result<&mut [u8]> {
        Connection::reserve(self, bytes)
    }

    fn reserve_buf(&mut self, bytes: usize) -> Result<ReservedBuf<'_>> {
        Connection::reserve_buf(self, bytes)
    }

    fn commit(&mut self, bytes: usize) -> Result<()> {
        Connection::commit(self, bytes)
    }

    fn write(&mut self, data: impl Into<Slice>) -> Result<()> {
        Connection::write(self, data)
    }

    fn write_copy(&mut self, data: &[u8]) -> Result<()> {
        Connection::write_copy(self, data)
    }

    fn insert(&mut self, data: impl Into<Slice>, remaining: usize) -> Result<()> {
        Connection::insert(self, data, remaining)
    }

    fn append(&mut self, other: LinkBuffer) -> Result<()> {
        Connection::append(self, other)
    }

    fn flush(&mut self) -> Result<()> {
        Connection::flush(self)
    }

    fn pending_len(&self) -> usize {
        Connection::pending_len(self)
    }
}

impl Deref for Connection {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.0
    }
}
