//! Why a call has ended without an answer.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use crate::error::Error;

/// Why a call has ended without an answer, and whether its request may have been executed.
///
/// It converts into an [`Error`]: a deadline becomes a read timeout, a lost connection and a closed
/// client become closed errors, [`Full`](CallErrorKind::Full) a limit error; the others keep the
/// kind of their cause.
#[derive(Clone)]
pub struct CallError {
    kind: CallErrorKind,
    may_have_been_executed: bool,
    cause: Option<Arc<Error>>,
}

/// What has ended a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CallErrorKind {
    /// No answer has come before the deadline of the call.
    Deadline,
    /// The connection has failed, the server has closed it, or the server has sent bytes that are
    /// no answer.
    ConnectionLost,
    /// No connection could be made.
    CannotConnect,
    /// As many calls are outstanding as the client allows, and the call was not to wait.
    Full,
    /// The client is closed, or its pollers have ended.
    Closed,
    /// The codec could not encode the request.
    Codec,
}

impl CallError {
    /// An error of a request of which not one byte was sent.
    pub(super) fn unsent(kind: CallErrorKind, cause: Option<Arc<Error>>) -> CallError {
        CallError { kind, may_have_been_executed: false, cause }
    }

    /// An error of a request that was passed to a connection.
    pub(super) fn sent(kind: CallErrorKind, cause: Option<Arc<Error>>) -> CallError {
        CallError { kind, may_have_been_executed: true, cause }
    }

    /// What has ended the call.
    pub fn kind(&self) -> CallErrorKind {
        self.kind
    }

    /// Whether the server may have executed the request. `false` only if not one byte of the
    /// request has left this process, so that the call can be repeated in any case.
    pub fn may_have_been_executed(&self) -> bool {
        self.may_have_been_executed
    }

    /// The error that caused this one, if there is one: of the connection, of a dial, of the codec.
    pub fn cause(&self) -> Option<&Error> {
        self.cause.as_deref()
    }
}

impl From<CallError> for Error {
    fn from(error: CallError) -> Error {
        let text = error.to_string();
        match (error.kind, error.cause) {
            (CallErrorKind::Deadline, _) => Error::read_timeout_of(text),
            (CallErrorKind::Full, _) => Error::limit(text),
            (CallErrorKind::ConnectionLost | CallErrorKind::Closed, _) | (_, None) => {
                Error::gone(text)
            }
            (_, Some(cause)) => Arc::try_unwrap(cause).unwrap_or_else(|cause| cause.copy()),
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            CallErrorKind::Deadline => "no answer before the deadline",
            CallErrorKind::ConnectionLost => "the connection was lost",
            CallErrorKind::CannotConnect => "cannot connect",
            CallErrorKind::Full => "too many calls are outstanding",
            CallErrorKind::Closed => "the client is closed",
            CallErrorKind::Codec => "the request cannot be encoded",
        };
        write!(f, "call: {what}")?;
        match &self.cause {
            Some(cause) => write!(f, ": {cause}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallError")
            .field("kind", &self.kind)
            .field("may_have_been_executed", &self.may_have_been_executed)
            .field("cause", &self.cause)
            .finish()
    }
}

impl StdError for CallError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause.as_deref().map(|cause| cause as &(dyn StdError + 'static))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_call_error_becomes_an_error_of_the_same_kind() {
        let of =
            |kind, cause: Option<Error>| Error::from(CallError::unsent(kind, cause.map(Arc::new)));
        let deadline = of(CallErrorKind::Deadline, None);
        assert!(deadline.is_timeout() && deadline.is_read_timeout(), "{deadline:?}");
        assert!(of(CallErrorKind::Full, None).is_limit());
        assert!(of(CallErrorKind::Closed, None).is_closed());
        let lost = of(CallErrorKind::ConnectionLost, Some(Error::invalid("frame: no frame")));
        assert!(lost.is_closed() && lost.to_string().ends_with("frame: no frame"), "{lost:?}");
        let dial = Error::dial_timeout("10.0.0.7:80", Duration::from_millis(50));
        assert!(of(CallErrorKind::CannotConnect, Some(dial)).is_dial_timeout());
        assert!(of(CallErrorKind::Codec, Some(Error::limit("send: long"))).is_limit());
    }
}
