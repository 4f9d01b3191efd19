//! Network I/O for RPC servers, clients and proxies on Linux.
//!
//! Poller threads receive into pooled blocks and pass the bytes on as reference-counted [`Slice`]s.
//! A [`Connection`] reads and writes them without copying, on any executor or thread. A [`Server`]
//! runs its handlers on the pollers, on worker threads or on a tokio runtime: see [`Placement`].
//!
//! ```no_run
//! use ringpoll::{Connection, Result, Server};
//!
//! fn main() -> Result<()> {
//!     Server::builder()
//!         .on_request(|mut conn: Connection| async move {
//!             let head = conn.peek(4).await?;
//!             let body = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
//!             let frame = conn.next(4 + body).await?; // a Slice: no copy
//!             conn.write(frame)?; // more than 4 KiB: by reference
//!             conn.flush().await // Ok: every byte is in the kernel
//!         })
//!         .bind("127.0.0.1:8972")?
//!         .serve() // until the process ends or a `ServerHandle` shuts it down
//! }
//! ```
//!
//! Frames that are small and many are cheaper to read as [`buffer::Frames`], which lend each frame
//! as `&[u8]`; [`Connection::parts`] has an example.
//!
//! # The flow
//! ```text
//! socket → sys/{epoll,uring} → buffer/block → poller → connection/input → task → handler
//! socket ← sys/{epoll,uring} ← buffer/chain ← connection/output ← handler's writer
//! ```
//!
//! # Backends
//! [`Backend::Auto`] selects io_uring where [`capabilities`] reports that it works, and epoll
//! elsewhere. Two environment variables override the choice of the program: `RINGPOLL_BACKEND`
//! (`epoll`, `uring`, `hybrid`, `sqpoll` or one of its presets, `auto`) and `RINGPOLL_URING_TIER`
//! (`defer`, `coop`, `plain`).
//!
//! # Logs
//! The library logs with [`tracing`]. Each run of a handler is polled inside a span `handler` of
//! the level debug, with the fields `peer` and `id` ([`Handle::id`]), so the events of a handler
//! tell their connection. If no subscriber wants this level, no span is made.
//!
//! # Fork
//! All descriptors are close-on-exec, and the memory of the rings is not inherited by a forked
//! child. The child shares the descriptors until it calls `exec` or ends. It must not use any
//! object of this crate that it inherited.

#![deny(unsafe_code)]

#[forbid(unsafe_code)]
mod address;
#[forbid(unsafe_code)]
pub mod blocking;
pub mod buffer;
#[forbid(unsafe_code)]
mod clock;
#[forbid(unsafe_code)]
mod config;
#[forbid(unsafe_code)]
mod connection;
#[forbid(unsafe_code)]
mod copy;
#[forbid(unsafe_code)]
mod counters;
#[forbid(unsafe_code)]
mod dial;
#[forbid(unsafe_code)]
mod error;
#[forbid(unsafe_code)]
mod mux;
#[forbid(unsafe_code)]
mod poller;
#[forbid(unsafe_code)]
mod pollers;
#[forbid(unsafe_code)]
mod random;
#[forbid(unsafe_code)]
pub mod rpc;
#[forbid(unsafe_code)]
mod server;
#[forbid(unsafe_code)]
mod spin;
#[forbid(unsafe_code)]
mod sync;
#[allow(unsafe_code)]
mod sys;
#[forbid(unsafe_code)]
mod task;
#[forbid(unsafe_code)]
mod threads;
#[forbid(unsafe_code)]
mod user_code;

pub use address::{Address, Family, PeerAddr};
pub use buffer::{LinkBuffer, Slice};
pub use config::{
    Backend, Balance, Capabilities, Placement, PollMode, RingTier, SocketOptions, SqpollOptions,
    SqpollPreset, UringOptions, ZeroCopySend,
};
pub use connection::{
    Connection, ConnectionStats, Detached, Handle, ReadHalf, ReadPart, ShutdownBegun, Sleep,
    WriteHalf, WritePart,
};
pub use copy::{Copied, CopyError, CopySide, copy_bidirectional};
pub use counters::PollerStats;
pub use dial::{Dialer, Resolve, adopt, connect};
pub use error::{Error, Result, any_error};
pub use mux::{Mux, MuxDriver, TrySendError};
pub use pollers::{Pollers, PollersBuilder, capabilities};
pub use server::{Server, ServerBuilder, ServerHandle, ServerStats};
pub use task::{PlacementStats, unblock};
