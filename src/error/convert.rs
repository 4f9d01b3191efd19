//! Errors of other libraries as errors of this crate.

use std::array::TryFromSliceError;
use std::char::ParseCharError;
use std::env::VarError;
use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::AddrParseError;
use std::num::{ParseFloatError, ParseIntError, TryFromIntError};
use std::str::{ParseBoolError, Utf8Error};
use std::string::FromUtf8Error;
use std::sync::mpsc::{RecvError, RecvTimeoutError};
use std::time::SystemTimeError;

use super::{Error, Kind, Result};

/// Lets a handler, or a future of [`Handle::spawn`](crate::Handle::spawn), return any error: its
/// own type, `Box<dyn Error + Send + Sync>`, or an error type such as that of `anyhow`.
///
/// The error is converted by [`Error::other`]. So an [`Error`] stays what it was, and
/// [`on_error`](crate::ServerBuilder::on_error) finds any other error with
/// [`source`](StdError::source).
///
/// Handlers themselves return [`Error`], because Rust infers the type of `Ok(())` at the end of a
/// closure only where a handler has one error type.
///
/// ```
/// use ringpoll::{Connection, Server, any_error};
///
/// #[derive(Debug)]
/// enum Refusal {
///     Network(ringpoll::Error),
///     NoNumber(std::num::ParseIntError),
/// }
/// # impl std::fmt::Display for Refusal {
/// #     fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
/// #         write!(f, "{self:?}")
/// #     }
/// # }
/// # impl std::error::Error for Refusal {}
///
/// async fn double(mut conn: Connection) -> Result<(), Refusal> {
///     let line = conn.until(b'\n').await.map_err(Refusal::Network)?;
///     let text = String::from_utf8_lossy(line.as_ref());
///     let number: u32 = text.trim().parse().map_err(Refusal::NoNumber)?;
///     let answer = format!("{}\n", u64::from(number) * 2);
///     conn.write(answer).map_err(Refusal::Network)?;
///     conn.flush().await.map_err(Refusal::Network)
/// }
///
/// let server = Server::builder().on_request(|conn| any_error(double(conn)));
/// # let _ = server.bind("127.0.0.1:0");
/// ```
///
/// # Errors
/// The error of `future`.
pub async fn any_error<F, T, E>(future: F) -> Result<T>
where
    F: Future<Output = Result<T, E>>,
    E: Into<Box<dyn StdError + Send + Sync>>,
{
    future.await.map_err(Error::other)
}

impl From<Box<dyn StdError + Send + Sync>> for Error {
    /// An [`Error`] in the box stays what it was. An [`io::Error`] keeps its kind. Any other error
    /// becomes the [`source`](StdError::source).
    fn from(boxed: Box<dyn StdError + Send + Sync>) -> Error {
        let boxed = match boxed.downcast::<Error>() {
            Ok(own) => return *own,
            Err(other) => other,
        };
        match boxed.downcast::<io::Error>() {
            Ok(error) => Error::from(*error),
            Err(source) => {
                let mut error = Error::new(Kind::Other, source.to_string());
                error.0.source = Some(source);
                error
            }
        }
    }
}

impl From<io::Error> for Error {
    /// An [`Error`] that was converted to an [`io::Error`] becomes what it was.
    fn from(source: io::Error) -> Error {
        match source.downcast::<Error>() {
            Ok(own) => own,
            Err(source) => {
                let mut error = Error::new(Kind::Io, source.to_string());
                error.0.source = Some(Box::new(source));
                error
            }
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        io::Error::new(error.io_kind(), error)
    }
}

/// Errors of the standard library, so that `?` works for them in a handler.
macro_rules! from_std {
    ($($error:ty),+ $(,)?) => {$(
        impl From<$error> for Error {
            fn from(source: $error) -> Error {
                Error::other(source)
            }
        }
    )+};
}

from_std!(
    fmt::Error,
    AddrParseError,
    FromUtf8Error,
    ParseBoolError,
    ParseCharError,
    ParseFloatError,
    ParseIntError,
    RecvError,
    RecvTimeoutError,
    SystemTimeError,
    TryFromIntError,
    TryFromSliceError,
    Utf8Error,
    VarError,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_this_crate_stays_what_it_was() {
        let boxed: Box<dyn StdError + Send + Sync> = Box::new(Error::eof("next", 4, 1));
        let error = Error::from(boxed);
        assert!(error.is_eof(), "{error:?}");
        assert!(error.source().is_none());
        let error = Error::other(error);
        assert!(error.is_eof(), "{error:?}");
        let error = Error::from(io::Error::from(error));
        assert!(error.is_eof(), "{error:?}");
        assert_eq!(error.to_string(), Error::eof("next", 4, 1).to_string());
    }

    #[test]
    fn an_error_of_the_kernel_keeps_its_number_in_a_box() {
        let error = Error::other(io::Error::from_raw_os_error(32));
        assert_eq!(error.raw_os_error(), Some(32));
        assert!(error.is_closed());
    }

    #[test]
    fn any_other_error_is_the_source() {
        fn parse(text: &str) -> Result<u32> {
            Ok(text.parse()?)
        }
        let error = parse("x").expect_err("no number");
        assert!(error.source().is_some_and(|source| source.is::<ParseIntError>()), "{error:?}");
        assert!(!error.is_closed());
    }
}
