//! Framed messages over a connection, for services of `tower`.
//!
//! [`serve_tower`] makes a handler of a [`tower::Service`], and [`FramedClient`] is a service that
//! sends its requests over one connection. A [`Codec`] says how messages become bytes;
//! [`LengthPrefixed`] is one.
//!
//! Answers come in the order of the requests, so a frame needs no number. A client whose answers
//! come in any order, a *multiplexed* client, is another thing: its frames carry numbers.
//! [`ringpoll::rpc::Client`] is one, and [`CallService`] makes it a service. [`EjectLayer`] keeps a
//! balancer from servers that fail.
//!
//! ```
//! use bytes::Bytes;
//! use ringpoll::{Server, blocking};
//! use ringpoll_compat::tower::{FramedClient, LengthPrefixed, serve_tower};
//! use tower::{Service, ServiceExt, service_fn};
//!
//! let shout = service_fn(|text: Bytes| async move {
//!     Ok::<_, std::io::Error>(Bytes::from(text.to_ascii_uppercase()))
//! });
//! let server = Server::builder()
//!     .on_connect(serve_tower(shout, LengthPrefixed::new()))
//!     .bind("127.0.0.1:0")?
//!     .spawn()?;
//!
//! let conn = blocking::wait(ringpoll::connect(&server.local_addr().to_string()))?;
//! let (mut client, driver) = FramedClient::new(conn, LengthPrefixed::new());
//! let driver = std::thread::spawn(|| blocking::wait(driver)); // or a task of your executor
//! let answer = blocking::wait(async { client.ready().await?.call(Bytes::from("hello")).await });
//! assert_eq!(answer.expect("the server answers"), "HELLO");
//! drop(client); // the driver ends when the last clone is gone
//! driver.join().expect("does not panic").expect("the connection was good");
//! # Ok::<(), ringpoll::Error>(())
//! ```

mod calls;
mod client;
mod eject;
mod serve;

use bytes::Bytes;
use ringpoll::buffer::u32_be_length;
use ringpoll::{Error, Result, WritePart};

pub use calls::CallService;
pub use client::{ClientDriver, ClientError, ClientResponse, FramedClient};
pub use eject::{Eject, EjectLayer, Ejecting};
pub use serve::{Serving, serve_tower};

/// How messages become frames, and frames become messages.
///
/// All connections of a server share one codec, so it has no state of a stream. A server decodes
/// requests and encodes answers; a client decodes answers and encodes requests.
///
/// ```
/// use ringpoll::{Error, Result, WritePart};
/// use ringpoll_compat::tower::Codec;
///
/// /// A message is a line with a decimal number.
/// struct Numbers;
///
/// impl Codec for Numbers {
///     type In = u64;
///     type Out = u64;
///
///     fn frame_bytes_max(&self) -> usize {
///         21
///     }
///
///     fn frame_bytes(&self, front: &[u8]) -> Result<Option<usize>> {
///         Ok(front.iter().position(|&byte| byte == b'\n').map(|index| index + 1))
///     }
///
///     fn decode(&self, frame: &[u8]) -> Result<u64> {
///         std::str::from_utf8(frame)
///             .map_err(Error::other)?
///             .trim_end()
///             .parse()
///             .map_err(|error| Error::other(format!("not a number: {error}")))
///     }
///
///     fn encode(&self, message: u64, writer: &mut WritePart<'_>) -> Result<()> {
///         writer.write_copy(format!("{message}\n").as_bytes())
///     }
/// }
/// # drop(Numbers);
/// ```
pub trait Codec: Send + Sync + 'static {
    /// A received message.
    type In: Send + 'static;
    /// A message to send.
    type Out: Send + 'static;

    /// The largest length of a received frame, with its header, in bytes. A longer frame ends its
    /// connection with a limit error.
    fn frame_bytes_max(&self) -> usize;

    /// The length of the first frame in `front`, with its header, in bytes; `None` if more bytes
    /// are needed to tell. See [`Frames`](ringpoll::buffer::Frames) for what `front` is.
    ///
    /// # Errors
    /// `front` does not begin with a frame. The error ends the connection.
    fn frame_bytes(&self, front: &[u8]) -> Result<Option<usize>>;

    /// Makes a message of a whole frame, which is lent where it was received.
    ///
    /// # Errors
    /// The frame is not a message. The error ends the connection.
    fn decode(&self, frame: &[u8]) -> Result<Self::In>;

    /// Writes the frame of `message`. Does not flush.
    ///
    /// # Errors
    /// The message cannot be sent, or the connection is closed. On a server the error ends the
    /// connection, and answers that were not submitted are lost. On a client it ends the call if
    /// nothing was written, and the connection otherwise.
    fn encode(&self, message: Self::Out, writer: &mut WritePart<'_>) -> Result<()>;
}

/// Frames that begin with the length of the message: four bytes, big-endian, not counting
/// themselves. A message is [`Bytes`].
///
/// A received message is a copy. A sent message of more than 4096 bytes goes by reference.
///
/// ```
/// use ringpoll_compat::tower::LengthPrefixed;
///
/// let codec = LengthPrefixed::new().with_message_bytes_max(64 * 1024);
/// # drop(codec);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct LengthPrefixed {
    message_bytes_max: usize,
}

impl LengthPrefixed {
    /// The default limit of a message in bytes.
    pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

    const HEADER_BYTES: usize = size_of::<u32>();

    /// The codec with the default limit.
    pub fn new() -> LengthPrefixed {
        LengthPrefixed { message_bytes_max: Self::MESSAGE_BYTES_MAX }
    }

    /// Sets the largest length of a message in bytes, received and sent. The `read_bytes_max` of
    /// the connection limits received frames as well.
    #[must_use]
    pub fn with_message_bytes_max(mut self, bytes: usize) -> LengthPrefixed {
        self.message_bytes_max = bytes.min(u32::MAX as usize);
        self
    }
}

impl Default for LengthPrefixed {
    fn default() -> LengthPrefixed {
        LengthPrefixed::new()
    }
}

impl Codec for LengthPrefixed {
    type In = Bytes;
    type Out = Bytes;

    fn frame_bytes_max(&self) -> usize {
        self.message_bytes_max.saturating_add(Self::HEADER_BYTES)
    }

    fn frame_bytes(&self, front: &[u8]) -> Result<Option<usize>> {
        u32_be_length(front)
    }

    fn decode(&self, frame: &[u8]) -> Result<Bytes> {
        Ok(Bytes::copy_from_slice(&frame[Self::HEADER_BYTES..]))
    }

    fn encode(&self, message: Bytes, writer: &mut WritePart<'_>) -> Result<()> {
        let (bytes, bytes_max) = (message.len(), self.message_bytes_max);
        let length = u32::try_from(bytes).ok().filter(|_| bytes <= bytes_max);
        let Some(length) = length else {
            let message = format!("send: a message of {bytes} bytes: limit is {bytes_max}");
            return Err(Error::other(message));
        };
        writer.write_copy(&length.to_be_bytes())?;
        writer.write(message)
    }
}

/// The largest number of requests of one connection that are sent, or begun, and not answered. It
/// bounds the memory of a connection, and how many polls a wake-up causes: a server polls each of
/// its unfinished calls.
const PIPELINED_REQUESTS_MAX: usize = 64;

/// No message is added while this many bytes of a connection are not in the kernel. The same bound
/// as for `TokioStream`.
const OUTPUT_BYTES_MAX: usize = 256 * 1024;
