//! The end of a server, in three steps: no newcomers, no idle connections, no busy ones.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex as StdMutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Inner, ServerHandle};
use crate::config;
use crate::connection::{Hooks, Shared, current_poller};
use crate::error::{Error, Result};
use crate::poller::Command;
use crate::sync::lock;
use crate::task;

/// Where the server is between start and end; those who wait for it wait here.
pub(super) struct Progress {
    state: StdMutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    started: bool,
    /// Shutting down, or done.
    ending: bool,
    /// Nothing is left, and the threads are gone.
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

    /// A listener died.
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

    /// Something changed that a waiter may wait for.
    pub(super) fn check(&self) {
        // Under the lock, so that it does not fall between a waiter's look and its wait.
        drop(self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`; `false` is a timeout.
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
    /// What a listener died of; the server is shut down then, connections included.
    pub fn wait(&self) -> Result<()> {
        let progress = &self.0.books.progress;
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

    /// Stops accepting, closes idle connections, and waits for the busy ones, and for what
    /// [`Handle::spawn`](crate::Handle::spawn) has started, at most for `deadline`. Blocks.
    ///
    /// After `Ok` the threads that the server started have ended, and its addresses can be bound
    /// again.
    ///
    /// # Errors
    /// Timeout, with the number of connections that are still busy: they go on, close when their
    /// handlers return, and this may be called again. Unsupported on a poller or a worker, thus
    /// in most handlers: it would wait for itself.
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

    /// Like [`shutdown`](Self::shutdown), but cuts what is still busy at `deadline`. Returns how
    /// many were cut.
    ///
    /// Handlers of cut connections see them closed. One that does not even return then is
    /// abandoned, and so is the thread it blocks, and what was spawned and does not end.
    ///
    /// # Errors
    /// Unsupported on a poller or a worker, thus in most handlers: it would wait for itself.
    pub fn shutdown_forced(&self, deadline: Duration) -> Result<usize> {
        let started = Instant::now();
        self.drain("shutdown_forced")?;
        if self.wait_empty(started.checked_add(deadline)) {
            self.end();
            return Ok(0);
        }
        let cut = self.open_count();
        self.0.books.counts.cut.fetch_add(cut as u64, Ordering::Relaxed);
        self.0.visit(Shared::cut);
        self.wait_empty(Instant::now().checked_add(config::CUT_GRACE));
        self.end();
        Ok(cut)
    }

    /// Whether the server takes no more connections and waits for its handlers to end. Long-lived
    /// handlers may ask.
    pub fn is_shutting_down(&self) -> bool {
        self.0.books.is_draining()
    }

    fn open_count(&self) -> usize {
        self.0.books.counts.open.load(Ordering::Acquire)
    }

    fn spawned_count(&self) -> usize {
        self.0.books.counts.spawned.load(Ordering::SeqCst)
    }

    /// Nobody has anything left to do.
    fn is_empty(&self) -> bool {
        self.open_count() == 0 && self.spawned_count() == 0
    }

    fn drain(&self, operation: &str) -> Result<()> {
        if current_poller().is_some() || task::is_worker() {
            return Err(Error::unsupported(format!(
                "{operation}: called on a poller or a worker, which cannot wait for itself"
            )));
        }
        self.0.books.draining.store(true, Ordering::SeqCst);
        self.0.books.progress.lock().ending = true;
        for acceptor in std::mem::take(&mut *lock(&self.0.acceptors)) {
            for remote in self.0.pollers.remotes() {
                remote.send(Command::Unlisten(Arc::clone(&acceptor)));
            }
        }
        self.0.visit(|connection| connection.end_when_idle());
        Ok(())
    }

    /// Waits until nothing is open; for ever, if the deadline is beyond the end of time.
    fn wait_empty(&self, deadline: Option<Instant>) -> bool {
        self.0
            .books
            .progress
            .wait_until(deadline, |state| state.ended || state.listeners == 0 && self.is_empty())
    }

    /// Ends the threads, and joins them unless a handler is stuck on one.
    fn end(&self) {
        let join = self.is_empty();
        if self.0.owns_pollers {
            self.0.pollers.stop(join);
        }
        self.0.service.executor.stop(join);
        let progress = &self.0.books.progress;
        progress.lock().ended = true;
        progress.changed.notify_all();
    }
}

impl Inner {
    /// Has every poller call `visit` for each of the server's connections.
    fn visit(&self, visit: impl Fn(&Arc<Shared>) + Clone + Send + 'static) {
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
