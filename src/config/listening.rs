//! Bounds of making and serving listeners.

use std::time::Duration;

/// How long accepting pauses when the process or the host is out of descriptors or memory.
pub(crate) const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// The kernel's queue of connections nobody accepted yet; `net.core.somaxconn` caps it.
pub(crate) const LISTEN_BACKLOG: i32 = 4096;

/// Tries to bind to an address in use, after the first: 50 ms in all. A ring that a killed process
/// leaves behind holds its listeners for 4 to 12 ms.
pub(crate) const BIND_RETRIES_MAX: usize = 25;

/// Pause before an address in use is tried again.
pub(crate) const BIND_RETRY_PAUSE: Duration = Duration::from_millis(2);

/// How long a server that starts on a socket file waits for others that start in its directory.
/// Each needs less than a millisecond; a program that locks the directory for its own reasons may
/// keep the lock for ever.
pub(crate) const DIR_LOCK_WAIT_MAX: Duration = Duration::from_millis(500);

/// Pause before a locked directory is tried again.
pub(crate) const DIR_LOCK_PAUSE: Duration = Duration::from_millis(1);
