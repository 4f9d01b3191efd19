//! The shutdown of a server.
//!
//! It stops accepting, closes idle connections, then waits for the busy ones. It runs on the thread
//! that calls it; pollers report progress through [`Progress`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex as StdMutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Inner, ServerHandle};
use crate::config;
use crate::connection::{Core, Hooks, current_poller};
use crate::error::{Error, Result};
use crate::poller::Command;
use crate::sync::lock;
use crate::task;

/// How far a server is between its start and its end. Threads wait for changes of it.
pub(super) struct Progress {
    state: StdMutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    started: bool,
    /// The shutdown has begun.
    ending: bool,
    /// The shutdown is complete, and the threads have ended.
    ended: bool,
    listeners: usize,
    failure: Option<Error>,
}

impl Progress {
    pub(super) fn new() -> Progress {
        Progress { state: StdMutex::new(State::default()), changed: Condvar::new() }
    }

    pub(super) fn start(&self, listeners: usize) -> Result<()> {
        let mut state = self.lock();
        if state.ending {
            return Err(Error::closed("serve"));
        }
        state.started = true;
        state.listeners = listeners;
        Ok(())
    }

    /// A listener or a poller has failed. The first error is kept.
    pub(super) fn fail(&self, error: Error) {
        self.lock().failure.get_or_insert(error);
        self.changed.notify_all();
    }

    pub(super) fn listener_gone(&self) {
        let mut state = self.lock();
        state.listeners = state.listeners.saturating_sub(1);
        if !state.ending && state.listeners == 0 {
            state.failure.get_or_insert_with(|| Error::closed("serve: the pollers were shut down"));
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Wakes the waiting threads, which check their conditions again.
    pub(super) fn check(&self) {
        // Locked once, so that the notification does not come between a waiter's check and its
        // wait, where it would be lost.
        drop(self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` returns `true`. Returns `false` if the deadline comes first.
    fn wait_until(
        &self,
        deadline: Option<Instant>,
        mut done: impl FnMut(&mut State) -> bool,
    ) -> bool {
        let mut state = self.lock();
        loop {
            if done(&mut state) {
                return true;
            }
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl ServerHandle {
    /// Waits until the server has ended.
    ///
    /// # Errors
    /// The error of a listener that failed, or of a poller that ended. Before returning it, this
    /// shuts the server down and closes its connections.
    pub fn wait(&self) -> Result<()> {
        let progress = &self.0.state.progress;
        progress.wait_until(None, |state| state.ended || state.failure.is_some());
        let failure = progress.lock().failure.take();
        match failure {
            None => Ok(()),
            Some(error) => {
                self.shutdown_forced(Duration::ZERO)?;
                Err(error)
            }
        }
    }

    /// Stops accepting and closes idle connections. Then waits, for `deadline` at most, until the
    /// busy connections and the futures of [`Handle::spawn`](crate::Handle::spawn) have ended.
    /// Blocks the calling thread.
    ///
    /// After `Ok` the threads that the server started have ended, and its addresses can be bound
    /// again.
    ///
    /// # Errors
    /// Timeout, with the number of connections that are still busy. They continue, and close when
    /// their handlers return; this method may be called again. Unsupported on a poller or a worker,
    /// thus in most handlers: the thread would wait for itself.
    pub fn shutdown(&self, deadline: Duration) -> Result<()> {
        let started = Instant::now();
        self.drain("shutdown")?;
        if !self.wait_empty(started.checked_add(deadline)) {
            let (open, spawned) = (self.open_count(), self.spawned_count());
            return Err(Error::shutdown_timeout(open, spawned, deadline));
        }
        self.end();
        Ok(())
    }

    /// Like [`shutdown`](Self::shutdown), but cuts the connections that are still busy at
    /// `deadline`. Returns how many were cut.
    ///
    /// Handlers see a cut connection as closed. A handler that does not return within a second
    /// after that is abandoned, together with the thread that it blocks. Spawned futures that do
    /// not end are abandoned as well.
    ///
    /// # Errors
    /// Unsupported on a poller or a worker, thus in most handlers: the thread would wait for
    /// itself.
    pub fn shutdown_forced(&self, deadline: Duration) -> Result<usize> {
        let started = Instant::now();
        self.drain("shutdown_forced")?;
        if self.wait_empty(started.checked_add(deadline)) {
            self.end();
            return Ok(0);
        }
        let cut = self.open_count();
        self.0.state.counts.cut.fetch_add(cut as u64, Ordering::Relaxed);
        self.0.visit(Core::cut);
        self.wait_empty(Instant::now().checked_add(config::CUT_GRACE));
        self.end();
        Ok(cut)
    }

    /// Whether a shutdown has begun: the server refuses connections and waits for its handlers.
    /// Handlers that run for long should check this and return.
    pub fn is_shutting_down(&self) -> bool {
        self.0.state.is_draining()
    }

    fn open_count(&self) -> usize {
        self.0.state.counts.open.load(Ordering::Acquire)
    }

    fn spawned_count(&self) -> usize {
        self.0.state.counts.spawned.load(Ordering::SeqCst)
    }

    /// Whether no connection is open and no spawned future is running.
    fn is_empty(&self) -> bool {
        self.open_count() == 0 && self.spawned_count() == 0
    }

    fn drain(&self, operation: &str) -> Result<()> {
        if current_poller().is_some() || task::is_worker() {
            return Err(Error::unsupported(format!(
                "{operation}: called on a poller or a worker, which cannot wait for itself"
            )));
        }
        self.0.state.draining.store(true, Ordering::SeqCst);
        self.0.state.progress.lock().ending = true;
        for acceptor in std::mem::take(&mut *lock(&self.0.acceptors)) {
            for remote in self.0.pollers.remotes() {
                remote.send(Command::Unlisten(Arc::clone(&acceptor)));
            }
        }
        self.0.visit(|connection| connection.end_when_idle());
        Ok(())
    }

    /// Waits until the server has no listeners, connections or spawned futures. `None` waits
    /// without a limit.
    fn wait_empty(&self, deadline: Option<Instant>) -> bool {
        self.0
            .state
            .progress
            .wait_until(deadline, |state| state.ended || state.listeners == 0 && self.is_empty())
    }

    /// Ends the threads. Joins them, except while a handler still runs and may block one.
    fn end(&self) {
        let join = self.is_empty();
        if self.0.owns_pollers {
            self.0.pollers.stop(join);
        }
        self.0.service.executor.stop(join);
        let progress = &self.0.state.progress;
        progress.lock().ended = true;
        progress.changed.notify_all();
    }
}

impl Inner {
    /// Lets every poller call `visit` for each connection of this server.
    fn visit(&self, visit: impl Fn(&Arc<Core>) + Clone + Send + 'static) {
        for remote in self.pollers.remotes() {
            let (service, visit) = (Arc::clone(&self.service), visit.clone());
            remote.send(Command::Visit(Box::new(move |connection| {
                if connection.belongs_to(&service) {
                    visit(connection);
                }
            })));
        }
    }
}
