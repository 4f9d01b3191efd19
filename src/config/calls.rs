//! Defaults and limits of clients and servers of calls.

use std::time::Duration;

/// The longest time of a call of a client that sets no other. It is longer than servers take, so it
/// ends only calls that would hang.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

/// How long the host of a server may be silent, by default, until the connections of a client or a
/// pool fail. It is shorter than the timeout of calls, so calls find a lost host before their
/// deadlines.
pub(crate) const LOST_PEER_TIMEOUT: Duration = Duration::from_secs(20);

/// How many calls of a client may be outstanding by default. They take about 8 MB, without their
/// messages.
pub(crate) const OUTSTANDING_MAX: usize = 64 << 10;

/// The largest number of connections of a client. Each call looks at all of them, and a few carry
/// as many calls as a thread can make.
pub(crate) const CONNECTIONS_MAX: usize = 256;

/// The longest pause before the second dial of a client, by default. A server that restarts takes
/// longer, but a connection that was lost by chance is soon made again.
pub(crate) const BACKOFF_FIRST: Duration = Duration::from_millis(20);

/// The longest pause before any dial of a client, by default. Calls that come while the server is
/// away wait for the next dial, so it is short.
pub(crate) const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Requests of a connection that a server runs at a time, by default. It bounds the memory that one
/// client can use.
pub(crate) const PER_CONNECTION_MAX: usize = 256;
