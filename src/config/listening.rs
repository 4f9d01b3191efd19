//! Bounds of listeners.

use std::time::Duration;

/// How long accepting pauses when the process or the host has no free descriptors or memory.
pub(crate) const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// The length of the kernel's queue of connections that are not accepted yet. The kernel limits it
/// by `net.core.somaxconn`.
pub(crate) const LISTEN_BACKLOG: i32 = 4096;

/// How often binding to an address in use is tried again: for 50 ms in all. After a process is
/// killed, its rings keep its listeners open for 4 to 12 ms.
pub(crate) const BIND_RETRIES_MAX: usize = 25;

/// The pause before an address in use is tried again.
pub(crate) const BIND_RETRY_PAUSE: Duration = Duration::from_millis(2);

/// How long `listen` waits for the lock of the directory of a socket file. Another server that
/// starts there holds it for less than a millisecond. Another program may hold it for ever.
pub(crate) const DIR_LOCK_WAIT_MAX: Duration = Duration::from_millis(500);

/// The pause before a locked directory is tried again.
pub(crate) const DIR_LOCK_PAUSE: Duration = Duration::from_millis(1);
