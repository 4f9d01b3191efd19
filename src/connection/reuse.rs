//! What a pool of connections asks a connection, and does to it, between two callers.
//!
//! Only connections without a server are pooled. The pool owns the whole connection, so no other
//! thread reads or writes it.

use super::Connection;
use super::timeout::Stall;
use crate::sync::atomic::Ordering;
use crate::sync::lock;
use crate::user_code;

impl Connection {
    /// Whether the next caller would find the connection as if it was new: both sides are open,
    /// nothing has failed, and no byte is unread, unsubmitted or unsent.
    pub(crate) fn is_reusable(&self) -> bool {
        if !self.is_quiet() || !self.reader.is_empty() || self.pending_len() > 0 {
            return false;
        }
        let core = &self.handle.0;
        if lock(&core.input).end.is_some()
            || core.paused.load(Ordering::Relaxed) && core.has_unreceived()
        {
            return false;
        }
        let output = lock(&core.output);
        output.unsent() == 0 && !output.ended && output.failure().is_none()
    }

    /// Whether both sides are open and no byte has arrived since the last read. Takes no lock and
    /// makes no system call.
    pub(crate) fn is_quiet(&self) -> bool {
        let core = &self.handle.0;
        core.life.is_undisturbed() && !core.has_arrivals()
    }

    /// Restores the timeouts that the connection was made with, and clears its deadlines. Withdraws
    /// the registrations that poll methods have left. Frees the memory that no byte needs.
    pub(crate) fn renew(&mut self) {
        (self.read_began, self.write_began) = Default::default();
        self.reader.release();
        self.writer.release();
        let core = &self.handle.0;
        core.timeouts.read.set_timeout(core.limits.read_timeout);
        core.timeouts.write.set_timeout(core.limits.write_timeout);
        if core.idle_timeout.is_set() || core.limits.idle_timeout.is_some() {
            self.set_idle_timeout(core.limits.idle_timeout);
        }
        let reader = {
            let mut input = lock(&core.input);
            let reader = input.take_waker();
            // The poller receives, so that it notices what comes between two callers.
            core.resume_if_room(input, 0);
            reader
        };
        let flusher = {
            let mut output = lock(&core.output);
            output.stall = Stall::new(core.limits.write_stall_timeout);
            output.take_flusher()
        };
        user_code::discard((reader, flusher));
    }

    /// Closes the connection. If output is unsent, resets it, so that the peer cannot mistake a
    /// part of a message for the whole. In both cases the socket has ended when this returns.
    pub(crate) fn cut(&self) {
        self.handle.0.cut();
    }
}
