//! Wakes a poller that sleeps in the kernel.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

/// An eventfd. Any thread may call `wake`. The poller watches the eventfd edge-triggered and never
/// reads it: each write is an edge, and the counter has room for 2^64 writes.
pub(crate) struct Wake(OwnedFd);

impl Wake {
    pub(crate) fn new() -> io::Result<Wake> {
        Ok(Wake(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Makes the current or the next wait of the poller return.
    pub(crate) fn wake(&self) {
        // Fails only when the counter is full. The earlier writes then wake the poller.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
