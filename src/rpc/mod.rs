//! The two ends of an RPC: calls over connections that many callers share, and pooled connections.
//!
//! [`Client`] and [`serve_calls`] are for protocols whose messages have numbers. [`Pool`] is for
//! protocols that have one request at a time on a connection.
//!
//! A message has a number, and the answer of a request has the number of the request. So a
//! connection carries many calls at a time, whose answers come in any order. A [`Codec`] says how
//! numbered messages become bytes: [`LengthPrefixed`] and [`FramedThrift`] are two. [`Client`]
//! makes calls, and [`serve_calls`] answers them.
//!
//! ```
//! use ringpoll::rpc::{Client, LengthPrefixed, serve_calls};
//! use ringpoll::{Handle, Result, Server, Slice, blocking};
//!
//! async fn shout(request: Slice, _: Handle) -> Result<Slice> {
//!     Ok(Slice::from(request.to_ascii_uppercase()))
//! }
//!
//! let server = Server::builder()
//!     .on_connect(serve_calls(LengthPrefixed::new(), shout))
//!     .bind("127.0.0.1:0")?
//!     .spawn()?;
//!
//! let client = Client::builder(LengthPrefixed::new())
//!     .connections(2)
//!     .connect(&server.local_addr().to_string())?;
//! // Any executor can await calls. A plain thread uses `blocking::wait`.
//! let answer = blocking::wait(client.call(Slice::from("hello")))?;
//! assert_eq!(answer, "HELLO");
//! # Ok::<(), ringpoll::Error>(())
//! ```

mod call_error;
mod calls;
mod client;
mod codec;
mod dialing;
mod done;
mod incoming;
mod outgoing;
mod pool;
mod serve;
mod session;
mod shared;
mod thrift;

pub use call_error::{CallError, CallErrorKind};
pub use client::{Call, Client, ClientBuilder, ClientStats};
pub use codec::{Codec, LengthPrefixed};
pub use pool::{Pool, PoolBuilder, PoolStats, Pooled};
pub use serve::{CallLimits, ServingCalls, serve_calls, serve_calls_within};
pub use thrift::FramedThrift;
