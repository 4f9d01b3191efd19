//! The shutdown of a server.
//!
//! It stops accepting, serves requests that have already arrived, closes idle connections, then
//! waits for the busy ones. The methods that block run on the thread that calls them; the futures
//! run on any executor. Pollers report progress through [`Progress`].

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex as StdMutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::{Inner, ServerHandle};
use crate::config;
use crate::connection::{Core, ShutdownBegun, current_poller};
use crate::error::{Error, Result};
use crate::poller::timers::ns_at;
use crate::poller::{Accept, Alarm, Command, Visit};
use crate::sync::lock;
use crate::task;
use crate::task::waiters::{Number, Waiters};
use crate::user_code::{discard, wake_all};

/// How far a server is between its start and its end. Threads and futures wait for changes of it.
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
    /// Futures that wait for a change. No waker is cloned, called or dropped with the lock held.
    waiters: Waiters,
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
        self.change(|state| {
            state.failure.get_or_insert(error);
        });
    }

    pub(super) fn listener_gone(&self) {
        self.change(|state| {
            state.listeners = state.listeners.saturating_sub(1);
            if !state.ending && state.listeners == 0 {
                let error = || Error::closed("serve: the pollers were shut down");
                state.failure.get_or_insert_with(error);
            }
        });
    }

    /// Wakes the waiting threads and futures, which check their conditions again.
    pub(super) fn check(&self) {
        // This locks, so that the notification does not come between a waiter's check and its wait,
        // where it would be lost.
        self.change(|_| {});
    }

    /// Changes the state, then wakes the threads and futures that wait for a change.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let waiting = state.waiters.take();
        drop(state);
        self.changed.notify_all();
        wake_all(waiting);
    }

    /// Whether the shutdown has begun.
    pub(super) fn is_ending(&self) -> bool {
        self.lock().ending
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

    /// Polls until `done` returns `true`.
    fn poll_until(
        &self,
        place: &mut Place<'_>,
        mut done: impl FnMut(&mut State) -> bool,
        cx: &Context<'_>,
    ) -> Poll<()> {
        if done(&mut self.lock()) {
            return Poll::Ready(());
        }
        let waker = cx.waker().clone();
        let mut state = self.lock();
        let (polled, unneeded) = match done(&mut state) {
            true => (Poll::Ready(()), Some(waker)),
            false => (Poll::Pending, state.waiters.wait(&mut place.number, waker)),
        };
        drop(state);
        discard(unneeded);
        polled
    }
}

/// The registration of a future that waits for progress. Dropping it removes the waker.
struct Place<'a> {
    progress: &'a Progress,
    number: Number,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let waker = self.progress.lock().waiters.withdraw(self.number);
        discard(waker);
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

    /// Stops accepting, serves requests that have already arrived, and closes idle connections.
    /// Then waits, for `deadline` at most, until the busy connections and the futures of
    /// [`Handle::spawn`](crate::Handle::spawn) have ended. Blocks the calling thread.
    ///
    /// After `Ok` the threads that the server started have ended, and its addresses can be bound
    /// again.
    ///
    /// # Errors
    /// Timeout, with the number of connections that are still busy. They continue, and close when
    /// their handlers return; this method may be called again. Unsupported on a poller or a worker,
    /// thus in most handlers: the thread would wait for itself.
    pub fn shutdown(&self, deadline: Duration) -> Result<()> {
        refuse_on_own_threads("shutdown")?;
        let started = Instant::now();
        self.drain();
        if !self.wait_empty(started.checked_add(deadline)) {
            return Err(self.busy(deadline));
        }
        self.end();
        Ok(())
    }

    /// [`shutdown`](Self::shutdown) as a future, for any executor. It blocks no thread that polls
    /// it. A thread of [`unblock`](crate::unblock) joins the ended threads.
    ///
    /// The shutdown begins with the first poll. If the future is dropped later, only the waiting
    /// ends: the server accepts no connections, and its connections close when their handlers
    /// return. Its threads end with the next shutdown, or when the server is dropped.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// /// Serves until `stop` is ready: for example until the process gets a signal.
    /// async fn serve(server: ringpoll::Server, stop: impl Future) -> ringpoll::Result<()> {
    ///     let server = server.spawn()?;
    ///     stop.await;
    ///     server.shutdown_async(Duration::from_secs(10)).await
    /// }
    /// ```
    ///
    /// # Errors
    /// Timeout, as for [`shutdown`](Self::shutdown). A handler of this server that awaits this
    /// future gets it at the deadline, because the shutdown waits for that handler. The kernel's
    /// error, if no thread can be started to join the others.
    pub async fn shutdown_async(&self, deadline: Duration) -> Result<()> {
        let started = Instant::now();
        self.drain();
        if !self.become_empty(started.checked_add(deadline)).await? {
            return Err(self.busy(deadline));
        }
        self.end_elsewhere().await
    }

    /// Like [`shutdown`](Self::shutdown), but cuts the connections that are still busy at
    /// `deadline`. Returns how many were cut.
    ///
    /// Handlers see a cut connection as closed. A handler or a spawned future then has one second
    /// to end. After that it is dropped the next time it waits. A handler that blocks its thread
    /// cannot be dropped: the shutdown leaves both behind. A handler on a tokio runtime continues
    /// to run.
    ///
    /// # Errors
    /// Unsupported on a poller or a worker, thus in most handlers: the thread would wait for
    /// itself.
    pub fn shutdown_forced(&self, deadline: Duration) -> Result<usize> {
        refuse_on_own_threads("shutdown_forced")?;
        let started = Instant::now();
        self.drain();
        if self.wait_empty(started.checked_add(deadline)) {
            self.end();
            return Ok(0);
        }
        let cut = self.cut();
        self.wait_empty(Instant::now().checked_add(config::CUT_GRACE));
        self.cancel_and_end();
        Ok(cut)
    }

    /// [`shutdown_forced`](Self::shutdown_forced) as a future, for any executor. What
    /// [`shutdown_async`](Self::shutdown_async) says of polling and dropping holds here as well. If
    /// the future is dropped after the deadline, connections may have been cut.
    ///
    /// # Errors
    /// The kernel's error, if no thread can be started to join the others.
    pub async fn shutdown_forced_async(&self, deadline: Duration) -> Result<usize> {
        let started = Instant::now();
        self.drain();
        if self.become_empty(started.checked_add(deadline)).await? {
            self.end_elsewhere().await?;
            return Ok(0);
        }
        let cut = self.cut();
        self.become_empty(Instant::now().checked_add(config::CUT_GRACE)).await?;
        // One closure does all of it: this future may be in a handler, which is cancelled as well.
        let server = self.clone();
        task::unblock(move || server.cancel_and_end()).await?;
        Ok(cut)
    }

    /// Whether a shutdown has begun: the server refuses connections and waits for its handlers.
    /// Handlers that run for long should check this and return.
    pub fn is_shutting_down(&self) -> bool {
        self.0.state.shutdown.is_raised()
    }

    /// Ready when a shutdown has begun. [`Handle::shutdown_begun`](crate::Handle::shutdown_begun)
    /// is the same for handlers, and has an example.
    pub fn shutdown_begun(&self) -> ShutdownBegun {
        ShutdownBegun::new(Some(&self.0.state.shutdown))
    }

    /// Whether the server has ended: a shutdown is complete, or a listener or a poller has failed.
    /// [`wait`](Self::wait) does not wait then, and returns the failure.
    pub fn has_ended(&self) -> bool {
        let state = self.0.state.progress.lock();
        state.ended || state.failure.is_some()
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

    fn busy(&self, deadline: Duration) -> Error {
        Error::shutdown_timeout(self.open_count(), self.spawned_count(), deadline)
    }

    /// Begins the shutdown.
    fn drain(&self) {
        self.0.state.progress.lock().ending = true;
        let acceptors = std::mem::take(&mut *lock(&self.0.acceptors));
        self.0.unlisten(acceptors);
        self.0.state.shutdown.set();
        self.0.visit(Command::Visit, Core::look_for_request);
        self.0.visit(Command::VisitLater, Core::end_when_idle);
        // The wakers come last. They are user code, and may block this thread.
        self.0.state.shutdown.wake();
    }

    /// Cuts all connections. Returns their number.
    fn cut(&self) -> usize {
        let cut = self.open_count();
        self.0.state.counts.cut.fetch_add(cut as u64, Ordering::Relaxed);
        self.0.visit(Command::Visit, Core::cut);
        cut
    }

    /// Whether the server has no listeners, connections or spawned futures.
    fn is_done(&self, state: &State) -> bool {
        state.ended || state.listeners == 0 && self.is_empty()
    }

    /// Waits until the server has no listeners, connections or spawned futures. `None` waits
    /// without a limit.
    fn wait_empty(&self, deadline: Option<Instant>) -> bool {
        self.0.state.progress.wait_until(deadline, |state| self.is_done(state))
    }

    /// [`wait_empty`](Self::wait_empty) as a future.
    async fn become_empty(&self, deadline: Option<Instant>) -> Result<bool> {
        let progress = &self.0.state.progress;
        let mut place = Place { progress, number: None };
        let remote = &self.0.pollers.remotes()[0];
        let mut alarm = deadline.map(|deadline| Alarm::new(remote, ns_at(deadline)));
        let is_done = poll_fn(|cx| {
            if progress.poll_until(&mut place, |state| self.is_done(state), cx).is_ready() {
                return Poll::Ready(true);
            }
            alarm.as_mut().map_or(Poll::Pending, |alarm| alarm.poll(cx)).map(|()| false)
        })
        .await;
        if is_done || deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            return Ok(is_done);
        }
        // The poller has ended, and its alarms have rung early.
        let server = self.clone();
        task::unblock(move || server.wait_empty(deadline)).await
    }

    /// [`end`](Self::end) on a thread that may block.
    async fn end_elsewhere(&self) -> Result<()> {
        let server = self.clone();
        task::unblock(move || server.end()).await
    }

    /// Drops the futures that have not ended, and ends the threads.
    fn cancel_and_end(&self) {
        if !self.is_empty() {
            self.0.service.executor.cancel();
            self.wait_empty(Instant::now().checked_add(config::CANCEL_GRACE));
        }
        self.end();
    }

    /// Ends the threads. Joins them, except while a handler still runs and may block one.
    fn end(&self) {
        let join = self.is_empty();
        if self.0.owns_pollers {
            self.0.pollers.stop(join);
        }
        self.0.service.executor.stop(join);
        self.0.state.progress.change(|state| state.ended = true);
    }
}

/// # Errors
/// Unsupported on a poller or a worker.
fn refuse_on_own_threads(operation: &str) -> Result<()> {
    if current_poller().is_some() || task::is_worker() {
        return Err(Error::unsupported(format!(
            "{operation}: called on a poller or a worker, which cannot wait for itself"
        )));
    }
    Ok(())
}

impl Inner {
    /// Closes listeners, whichever pollers have them.
    pub(super) fn unlisten(&self, acceptors: Vec<Arc<dyn Accept>>) {
        for acceptor in acceptors {
            for remote in self.pollers.remotes() {
                remote.send(Command::Unlisten(Arc::clone(&acceptor)));
            }
        }
    }

    /// Lets every poller call `visit` for each connection of this server. `command` says when.
    fn visit(
        &self,
        command: fn(Visit<Core>) -> Command<Core>,
        visit: impl Fn(&Arc<Core>) + Clone + Send + 'static,
    ) {
        for remote in self.pollers.remotes() {
            let (service, visit) = (Arc::clone(&self.service), visit.clone());
            remote.send(command(Box::new(move |connection| {
                if connection.belongs_to(&service) {
                    visit(connection);
                }
            })));
        }
    }
}
