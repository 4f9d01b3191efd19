//! What a stream of this crate writes to. Its drop submits the gathered bytes.

use std::ops::{Deref, DerefMut};

use ringpoll::{Connection, Result, WriteHalf};

/// A connection or its writing half, inside a stream.
///
/// Its drop submits what was written. A write to a socket of tokio that has returned is in the
/// kernel, and code for such sockets drops them without a flush. tungstenite, for example, writes
/// its answer to the close of a WebSocket and then drops the stream.
#[derive(Debug)]
pub(crate) struct SubmitOnDrop<W: Submit>(Option<W>);

pub(crate) trait Submit {
    fn submit(&mut self) -> Result<()>;
}

impl<W: Submit> SubmitOnDrop<W> {
    pub(crate) fn new(writer: W) -> SubmitOnDrop<W> {
        SubmitOnDrop(Some(writer))
    }

    /// The writer, with its gathered bytes, which stay gathered.
    pub(crate) fn into_inner(mut self) -> W {
        self.0.take().expect(UNTAKEN)
    }
}

impl<W: Submit> Drop for SubmitOnDrop<W> {
    fn drop(&mut self) {
        if let Some(writer) = &mut self.0 {
            // Fails if the connection has ended; the bytes have no receiver then.
            let _ = writer.submit();
        }
    }
}

impl<W: Submit> Deref for SubmitOnDrop<W> {
    type Target = W;

    fn deref(&self) -> &W {
        self.0.as_ref().expect(UNTAKEN)
    }
}

impl<W: Submit> DerefMut for SubmitOnDrop<W> {
    fn deref_mut(&mut self) -> &mut W {
        self.0.as_mut().expect(UNTAKEN)
    }
}

impl Submit for Connection {
    fn submit(&mut self) -> Result<()> {
        Connection::submit(self)
    }
}

impl Submit for WriteHalf {
    fn submit(&mut self) -> Result<()> {
        WriteHalf::submit(self)
    }
}

const UNTAKEN: &str = "only `into_inner` takes the writer, and it takes `self`";
