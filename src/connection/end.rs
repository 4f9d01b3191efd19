//! The end of a connection: closing, sending the last output, the close callbacks, the counts.
//!
//! Any thread may close. Bytes submitted before the close are still sent. The thread that sends the
//! last byte ends the socket. Then the poller removes the connection. After the removal, and when
//! no run holds the connection, the close callbacks run and the descriptor is closed.

use std::io;
use std::sync::Arc;
use std::task::Waker;

use super::core::Core;
use super::direct::Direct;
use super::handle::Handle;
use super::input::Discarded;
use super::output::Ending;
use crate::buffer::Spent;
use crate::clock::now_ns;
use crate::config;
use crate::poller::{Command, Side, Socket};
use crate::sync::atomic::Ordering;
use crate::sync::lock;
use crate::user_code;

impl Core {
    /// Closes: nothing more is read or written. Submitted bytes are still sent while the peer takes
    /// them.
    pub(crate) fn close(self: &Arc<Self>) {
        if !self.life.close() {
            return;
        }
        let (unread, reader) = self.stop_reading();
        let (flusher, lingers) = {
            let mut output = lock(&self.output);
            let lingers = !output.is_settled();
            if lingers {
                // Before the state can be seen: a timer that fires now must find the new time.
                self.timeouts.start_linger(now_ns());
                output.ending = Ending::Lingers;
            }
            (output.take_flusher(), lingers)
        };
        if lingers {
            // Resets the mark: only bytes that the peer takes from now on extend the linger time.
            let _ = self.taken_ago();
            self.idle_timeout.cap(config::LINGER);
            self.arm(self.idle_at());
            // Receive and drop what the peer still sends. Unread bytes in the kernel would make the
            // kernel reset the connection and drop output.
            self.resume();
        } else {
            self.end_socket(|socket| socket.shutdown(Side::Both));
        }
        self.wake(reader, flusher);
        drop(unread);
    }

    /// Closes, and drops all bytes that the kernel has not sent. A TCP peer sees a reset, so the
    /// peer cannot mistake the bytes that it has received for the whole stream.
    pub(crate) fn abort(self: &Arc<Self>) {
        self.life.close();
        if self.life.is_detached() {
            return;
        }
        let (unread, reader) = self.stop_reading();
        let mut spent = Spent::default();
        let flusher = {
            let mut output = lock(&self.output);
            output.fail(&io::ErrorKind::ConnectionAborted.into(), &mut spent);
            if let (Ending::Ended, Some(socket)) = (output.ending, &output.socket) {
                // The connection was closed before, and a run still holds it. The reset makes the
                // kernel drop the bytes that the peer has not taken. It fails if the peer is gone
                // already.
                let _ = socket.reset();
            }
            output.take_flusher()
        };
        self.end_socket(Socket::reset);
        self.wake(reader, flusher);
        drop((unread, spent));
    }

    /// Takes out all input, and the waker of a reader that waits for more.
    fn stop_reading(&self) -> (Discarded, Option<Waker>) {
        let mut input = lock(&self.input);
        (input.discard(), input.take_waker())
    }

    /// Ends the socket by calling `end`, once, and asks the poller to remove the connection. The
    /// peer sees the end now, also if a handler keeps the connection for long.
    pub(super) fn end_socket(self: &Arc<Self>, end: fn(&Socket) -> io::Result<()>) {
        {
            let mut output = lock(&self.output);
            if output.ending == Ending::Ended {
                return;
            }
            output.ending = Ending::Ended;
            if let Some(socket) = &output.socket {
                self.remote.counters.add(|counters| &counters.setup_calls, 1);
                // Fails where the peer is gone already.
                let _ = end(socket);
            }
        }
        self.remote.send(Command::Remove(Arc::clone(self)));
    }

    /// Closes without delay. If output is unsent or a handler is running, this aborts the
    /// connection, so a TCP peer cannot mistake a part of the output for the whole.
    pub(crate) fn cut(self: &Arc<Self>) {
        let is_cut_short =
            !lock(&self.output).is_settled() || !self.life.is_closed() && self.is_occupied();
        if !is_cut_short {
            self.close();
        }
        // A submit between the check and the close also leaves output.
        if is_cut_short || self.lingers() {
            self.abort();
        }
    }

    pub(super) fn lingers(&self) -> bool {
        self.life.is_closed() && lock(&self.output).ending == Ending::Lingers
    }

    fn resume(self: &Arc<Self>) {
        // Under the lock, so that the poller obeys such commands in their order.
        let _input = lock(&self.input);
        if self.paused.swap(false, Ordering::Relaxed) {
            self.remote.send(Command::Resume(Arc::clone(self)));
        }
    }

    /// The server begins to shut down: notes whether the kernel has bytes for this connection. The
    /// poller calls [`end_when_idle`](Self::end_when_idle) after it has filed all completions of
    /// the current pass. On the poller.
    pub(crate) fn look_for_request(self: &Arc<Self>) {
        let Some(socket) = lock(&self.output).socket.clone() else { return };
        // Under the lock: no reader begins to receive by itself meanwhile.
        let mut input = lock(&self.input);
        let is_received_here = input.serves && input.direct == Direct::Off;
        input.expects_request =
            is_received_here && socket.arrived_bytes().is_ok_and(|bytes| bytes > 0);
    }

    /// Closes as soon as no run is active, none will start for bytes that have arrived, and no
    /// bytes are left to read or to send.
    pub(crate) fn end_when_idle(self: &Arc<Self>) {
        // Set the bit before the check: a run that the check still finds busy will see the bit.
        self.life.end_when_idle();
        self.close_if_idle();
    }

    /// Closes if no run is active, none will start for bytes that have arrived, and no bytes are
    /// left to read or to send.
    pub(crate) fn close_if_idle(self: &Arc<Self>) {
        if lock(&self.input).is_idle() && lock(&self.output).is_settled() {
            self.close();
        }
    }

    /// Finishes the connection: close callbacks, the last reference to the socket, the counts.
    pub(super) fn finish(self: &Arc<Self>) {
        if !lock(&self.input).runs.finish() {
            return;
        }
        self.call_back();
        let socket = {
            let mut output = lock(&self.output);
            output.finished = true;
            if output.detaching { None } else { output.socket.take() }
        };
        drop(socket);
        self.settle_accounts();
    }

    /// Runs each close callback once, last added first. Callbacks that are added later run at once.
    pub(super) fn call_back(self: &Arc<Self>) {
        let handle = Handle::of(self);
        loop {
            let callback = {
                let mut extras = lock(&self.extras);
                extras.finished = extras.callbacks.is_empty();
                extras.callbacks.pop()
            };
            match callback {
                Some(callback) => {
                    user_code::call("close callback", || callback(&handle));
                }
                None => break,
            }
        }
    }

    /// Ends `detach`. If `detach` has taken the socket, nothing is left to close. If `detach`
    /// failed or was dropped early, the socket closes now, or when the poller has removed it.
    pub(super) fn end_detaching(self: &Arc<Self>) {
        self.life.end_detaching();
        let (unread, is_over) = {
            let mut input = lock(&self.input);
            (input.discard(), input.removed && !input.runs.is_active())
        };
        let socket = {
            let mut output = lock(&self.output);
            output.detaching = false;
            if let Some(socket) = &output.socket {
                // Fails where the peer is gone already.
                let _ = socket.shutdown(Side::Both);
            }
            if output.finished { output.socket.take() } else { None }
        };
        drop((unread, socket));
        if is_over {
            self.finish();
        }
    }

    pub(super) fn settle_accounts(&self) {
        self.remote.load.fetch_sub(1, Ordering::Relaxed);
        if let Some(service) = &self.service {
            service.hooks.gone();
        }
    }
}
