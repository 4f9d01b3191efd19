//! The error type of the crate.
//!
//! Every message names the operation and its value. The kind is private; users ask with methods. A
//! leaf: imports no other module of this crate. `convert.rs` has the conversions.

mod convert;

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::time::Duration;

use bytes::Bytes;

pub use convert::any_error;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate. Its message names the failed operation and the value that it failed on.
///
/// The `is_…` methods tell the kind. An `Error` converts into an [`io::Error`] with the matching
/// [`io::ErrorKind`]. It is one pointer wide.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
    partial: Option<Bytes>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Closed,
    Eof,
    ReadTimeout,
    WriteTimeout,
    DialTimeout,
    CheckoutTimeout,
    ShutdownTimeout,
    Limit,
    Unsupported,
    Invalid,
    Panicked,
    Io,
    Other,
}

impl Error {
    /// Makes an error of any error of the user, for example to return it from a handler. The error
    /// of the user is the [`source`](StdError::source).
    ///
    /// An `Error` of this crate stays what it was, also in a box or inside of an [`io::Error`]. An
    /// [`io::Error`] keeps its kind.
    pub fn other(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        Error::from(source.into())
    }

    /// A timeout: read, write, dial, checkout or shutdown.
    pub fn is_timeout(&self) -> bool {
        matches!(
            self.0.kind,
            Kind::ReadTimeout
                | Kind::WriteTimeout
                | Kind::DialTimeout
                | Kind::CheckoutTimeout
                | Kind::ShutdownTimeout
        )
    }

    /// A read did not receive its bytes in time.
    pub fn is_read_timeout(&self) -> bool {
        self.0.kind == Kind::ReadTimeout
    }

    /// The kernel did not accept the bytes of a flush in time, or the peer took none of them for
    /// the write stall timeout.
    pub fn is_write_timeout(&self) -> bool {
        self.0.kind == Kind::WriteTimeout
    }

    /// A dial did not succeed in time.
    pub fn is_dial_timeout(&self) -> bool {
        self.0.kind == Kind::DialTimeout
    }

    /// A [pool](crate::rpc::Pool) had no connection in time. Nothing was sent.
    pub fn is_checkout_timeout(&self) -> bool {
        self.0.kind == Kind::CheckoutTimeout
    }

    /// The connection is closed: by this side, by a reset, or by the end of the peer's stream
    /// (which is also [`is_eof`](Self::is_eof)).
    pub fn is_closed(&self) -> bool {
        match self.0.kind {
            Kind::Closed | Kind::Eof => true,
            Kind::Io => matches!(
                self.io_kind(),
                io::ErrorKind::NotConnected
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::BrokenPipe
            ),
            _ => false,
        }
    }

    /// The peer has ended its stream, and fewer bytes are left than the read asked for.
    pub fn is_eof(&self) -> bool {
        self.0.kind == Kind::Eof
    }

    /// A configured bound was reached: frame length, output bytes, connections.
    pub fn is_limit(&self) -> bool {
        self.0.kind == Kind::Limit
    }

    /// The operation is not possible in this place, for example a blocking call on a poller thread,
    /// or not on this host.
    pub fn is_unsupported(&self) -> bool {
        self.0.kind == Kind::Unsupported
    }

    /// An argument or a setting is not valid, or bytes are not valid UTF-8.
    pub fn is_invalid(&self) -> bool {
        self.0.kind == Kind::Invalid
    }

    /// Code of the user panicked: a handler, a closure of [`unblock`](crate::unblock), a codec, a
    /// [resolver](crate::Resolve), a hook of a dialer. The error's message ends with that of the
    /// panic; a panic that carries no text is "a value that is no text".
    pub fn is_panicked(&self) -> bool {
        self.0.kind == Kind::Panicked
    }

    /// The error number, if this is an error of the kernel.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.0.source.as_ref()?.downcast_ref::<io::Error>()?.raw_os_error()
    }

    /// The matching [`io::ErrorKind`].
    pub fn io_kind(&self) -> io::ErrorKind {
        match self.0.kind {
            Kind::Closed => io::ErrorKind::NotConnected,
            Kind::Eof => io::ErrorKind::UnexpectedEof,
            Kind::ReadTimeout
            | Kind::WriteTimeout
            | Kind::DialTimeout
            | Kind::CheckoutTimeout
            | Kind::ShutdownTimeout => io::ErrorKind::TimedOut,
            Kind::Limit => io::ErrorKind::QuotaExceeded,
            Kind::Unsupported => io::ErrorKind::Unsupported,
            Kind::Invalid => io::ErrorKind::InvalidInput,
            Kind::Panicked | Kind::Other => io::ErrorKind::Other,
            Kind::Io => self
                .0
                .source
                .as_ref()
                .and_then(|source| source.downcast_ref::<io::Error>())
                .map_or(io::ErrorKind::Other, io::Error::kind),
        }
    }

    /// The bytes before the end of the stream, if a search for a delimiter reached it. These bytes
    /// are consumed.
    pub fn partial(&self) -> Option<&Bytes> {
        self.0.partial.as_ref()
    }

    pub(crate) fn closed(operation: &str) -> Error {
        Error::new(Kind::Closed, format!("{operation}: connection closed"))
    }

    /// A closed error with a message of its own, for example of a mux.
    pub(crate) fn gone(message: impl Into<String>) -> Error {
        Error::new(Kind::Closed, message.into())
    }

    /// A copy of this error, for a second receiver. The copy of a kernel error keeps its number or,
    /// without one, its kind. Other sources are not copied.
    pub(crate) fn copy(&self) -> Error {
        let mut copy = Error::new(self.0.kind, self.0.message.clone());
        copy.0.partial = self.0.partial.clone();
        let source = self.0.source.as_ref().and_then(|source| source.downcast_ref::<io::Error>());
        if let Some(source) = source {
            let errno = source.raw_os_error();
            let source = errno.map_or_else(|| source.kind().into(), io::Error::from_raw_os_error);
            copy.0.source = Some(Box::new(source));
        }
        copy
    }

    pub(crate) fn eof(operation: &str, wanted_bytes: usize, left_bytes: usize) -> Error {
        Error::new(
            Kind::Eof,
            format!("{operation}: end of stream, wanted {wanted_bytes} bytes, {left_bytes} left"),
        )
    }

    pub(crate) fn read_timeout(operation: &str, after: Duration) -> Error {
        Error::new(Kind::ReadTimeout, format!("{operation}: no data in {after:?}"))
    }

    /// A read timeout with a message of its own, for example of a call.
    pub(crate) fn read_timeout_of(message: impl Into<String>) -> Error {
        Error::new(Kind::ReadTimeout, message.into())
    }

    pub(crate) fn write_timeout(operation: &str, after: Duration) -> Error {
        Error::new(
            Kind::WriteTimeout,
            format!("{operation}: peer does not read, gave up after {after:?}"),
        )
    }

    pub(crate) fn write_stall(operation: &str, after: Duration) -> Error {
        Error::new(
            Kind::WriteTimeout,
            format!("{operation}: peer does not read, took no byte for {after:?}"),
        )
    }

    pub(crate) fn dial_timeout(address: &str, after: Duration) -> Error {
        Error::new(Kind::DialTimeout, format!("connect {address}: no reply in {after:?}"))
    }

    pub(crate) fn checkout_timeout(address: &str, after: Duration) -> Error {
        Error::new(Kind::CheckoutTimeout, format!("checkout {address}: no connection in {after:?}"))
    }

    pub(crate) fn shutdown_timeout(
        busy_count: usize,
        spawned_count: usize,
        after: Duration,
    ) -> Error {
        let spawned = match spawned_count {
            0 => String::new(),
            count => format!(" and {count} spawned futures"),
        };
        Error::new(
            Kind::ShutdownTimeout,
            format!("shutdown: {busy_count} connections{spawned} still busy after {after:?}"),
        )
    }

    pub(crate) fn limit(message: impl Into<String>) -> Error {
        Error::new(Kind::Limit, message.into())
    }

    pub(crate) fn unsupported(message: impl Into<String>) -> Error {
        Error::new(Kind::Unsupported, message.into())
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Error {
        Error::new(Kind::Invalid, message.into())
    }

    pub(crate) fn panicked(message: impl Into<String>) -> Error {
        Error::new(Kind::Panicked, message.into())
    }

    /// A kernel error of an operation: `io("bind 127.0.0.1:80", error)`.
    pub(crate) fn io(operation: impl fmt::Display, source: impl Into<io::Error>) -> Error {
        let source = source.into();
        let mut error = Error::new(Kind::Io, format!("{operation}: {source}"));
        error.0.source = Some(Box::new(source));
        error
    }

    pub(crate) fn with_partial(mut self, partial: Bytes) -> Error {
        self.0.partial = Some(partial);
        self
    }

    fn new(kind: Kind, message: String) -> Error {
        Error(Box::new(Inner { kind, message, source: None, partial: None }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}: {})", self.0.kind, self.0.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eof_is_also_closed_but_closed_is_not_eof() {
        assert!(Error::eof("next", 4, 1).is_closed());
        assert!(Error::eof("next", 4, 1).is_eof());
        assert!(!Error::closed("next").is_eof());
    }

    #[test]
    fn a_kernel_error_keeps_its_number_through_io_error() {
        let error = Error::io("send", io::Error::from_raw_os_error(32));
        assert_eq!(error.raw_os_error(), Some(32));
        assert!(error.is_closed());
        assert_eq!(io::Error::from(error).kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_copy_answers_every_question_alike() {
        let refused = Error::io("send", io::Error::from_raw_os_error(32));
        let late = Error::write_timeout("flush", Duration::from_millis(5));
        for error in [refused, late, Error::gone("send: the mux is closed")] {
            let copy = error.copy();
            assert_eq!(format!("{copy:?}"), format!("{error:?}"));
            assert_eq!(copy.raw_os_error(), error.raw_os_error());
            assert_eq!(copy.is_closed(), error.is_closed());
        }
    }

    #[test]
    fn an_error_is_one_pointer_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }
}
