//! Runs of handlers, and futures that handlers spawn: how they are made, polled and ended.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::Connection;
use super::core::Core;
use super::handle::Handle;
use super::handout::{ALL, BOTH};
use super::input::Started;
use super::span;
use super::state::FUTURE;
use crate::error::{Error, Result};
use crate::poller::{Command, Job};
use crate::sync::lock;
use crate::task::{self, Guarded, Queued, Run, Runnable, RuntimeContext, Start, Workers};
use crate::user_code;

impl Handle {
    /// Runs `future` as a task on the poller of the connection. Drops it where the poller has
    /// ended.
    pub(crate) fn spawn_on_poller<F>(&self, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.0.remote.spawn(future);
    }
}

/// A handler, whatever the type of its futures.
pub(crate) trait Handler: Send + Sync {
    /// Makes a run: calls the handler inside `context`. The run is polled inside `context` as well.
    /// `None`: the handler panicked, and the run has ended.
    fn start(&self, connection: Connection, context: &RuntimeContext, end: RunEnd) -> Option<Run>;
}

impl<H, F> Handler for H
where
    H: Fn(Connection) -> F + Send + Sync,
    F: Future<Output = Result<()>> + Send + 'static,
{
    #[inline]
    fn start(&self, connection: Connection, context: &RuntimeContext, end: RunEnd) -> Option<Run> {
        let mut run = Box::pin(Running { future: Guarded::none(), context: context.clone(), end });
        let called = user_code::attempt(Kind::Handler.what(), || {
            let future = context.run(|| self(connection));
            run.as_mut().project().future.set(future);
        });
        match called {
            Ok(()) => Some(run),
            Err(message) => {
                // The unwinding has dropped the connection.
                run.as_mut().project().end.panicked(&message);
                None
            }
        }
    }
}

pin_project_lite::pin_project! {
    /// A future of a handler, or a spawned future, with its context and its end.
    struct Running<F> {
        #[pin]
        future: Guarded<F>,
        context: RuntimeContext,
        // Declared after `future`, so `end` is dropped when everything in the future has been
        // dropped.
        end: RunEnd,
    }
}

impl<F: Future<Output = Result<()>>> Future for Running<F> {
    type Output = ();

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let what = this.end.kind.what();
        let poll = || {
            let polled = this.future.as_mut().poll(cx);
            if polled.is_ready() {
                this.future.finish();
            }
            polled
        };
        let poll = || user_code::attempt(what, || this.context.run(poll));
        let (polled, has_returned) = task::poll_for(this.end.owner(), poll);
        this.end.has_returned = has_returned;
        match polled {
            Ok(Poll::Ready(outcome)) => this.end.outcome = Some(outcome),
            Ok(Poll::Pending) => {
                this.end.return_parts();
                return Poll::Pending;
            }
            Err(message) => this.end.panicked(&message),
        }
        Poll::Ready(())
    }
}

/// The end of a run or of a spawned future. Dropping this ends the run: when the future is done,
/// has panicked, or is given up. A future that is given up has no outcome.
pub(crate) struct RunEnd {
    core: Arc<Core>,
    kind: Kind,
    outcome: Option<Result<()>>,
    /// The run has dropped its connection in its last poll. See [`task::returns_parts`].
    has_returned: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Handler,
    /// A spawned future, which has neither the reader nor the writer.
    Spawned,
}

impl Kind {
    fn what(self) -> &'static str {
        match self {
            Kind::Handler => "handler",
            Kind::Spawned => "spawned future",
        }
    }
}

impl RunEnd {
    fn new(core: Arc<Core>, kind: Kind) -> RunEnd {
        RunEnd { core, kind, outcome: None, has_returned: false }
    }

    /// Identifies the run to the thread that polls it; 0 for a future that has no parts.
    fn owner(&self) -> usize {
        match self.kind {
            Kind::Handler => self.core.owner(),
            Kind::Spawned => 0,
        }
    }

    /// The run goes on without its connection.
    fn return_parts(&mut self) {
        if std::mem::take(&mut self.has_returned) {
            self.core.release(BOTH, None, None);
        }
    }

    fn panicked(&mut self, message: &str) {
        let error = Error::panicked(format!("{} panicked: {message}", self.kind.what()));
        self.outcome = Some(Err(error));
    }
}

impl Drop for RunEnd {
    fn drop(&mut self) {
        let failure = match self.outcome.take() {
            Some(outcome) => outcome.err(),
            // The threads that would poll the future have ended.
            None => Some(Error::closed(&format!("{} given up", self.kind.what()))),
        };
        let parts = if self.has_returned { ALL } else { FUTURE };
        match self.kind {
            Kind::Handler => self.core.end_run(parts, failure),
            Kind::Spawned => self.core.end_spawned(failure),
        }
    }
}

impl Start for Core {
    fn start(self: Arc<Self>) -> Option<Run> {
        let started = lock(&self.input).take_started()?;
        self.start_run(started)
    }

    fn give_up(self: Arc<Self>) {
        let started = lock(&self.input).take_started();
        if let Some(started) = started {
            self.give_up_run(started);
        }
    }
}

impl Core {
    /// Calls the handler for a run that has started. `None`: the handler panicked, or the
    /// connection has no server.
    #[inline]
    pub(super) fn start_run(self: &Arc<Self>, started: Started) -> Option<Run> {
        let service = self.service.as_ref()?;
        let handler = service.handler(started.kind);
        let end = RunEnd::new(Arc::clone(self), Kind::Handler);
        let connection = self.hand_out(started);
        let run = handler.start(connection, service.executor.context(), end)?;
        Some(span::spanned(run, self))
    }

    /// Queues a run that has started, for a worker or a runtime.
    pub(super) fn begin_elsewhere(self: &Arc<Self>, started: Started) {
        let Some(service) = &self.service else { return };
        lock(&self.input).keep_started(started);
        service.executor.begin_elsewhere(Queued::new(Arc::clone(self) as _));
    }

    /// Makes a task of a run that the poller has polled once.
    pub(super) fn spawn_near(self: &Arc<Self>, run: Run) {
        if let Some(service) = &self.service {
            service.executor.spawn_near(run, self.schedule_on_poller());
        }
    }

    /// Runs `future` where the handlers of the connection's server run, at the same time as they
    /// do.
    ///
    /// # Errors
    /// Unsupported, if the connection has no server.
    pub(super) fn spawn<F>(self: &Arc<Self>, future: F) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let Some(service) = &self.service else {
            return Err(Error::unsupported(
                "spawn: not a server's connection; spawn on an executor of your own",
            ));
        };
        service.hooks.spawned();
        let executor = &service.executor;
        let end = RunEnd::new(Arc::clone(self), Kind::Spawned);
        let context = executor.context().clone();
        let running = Running { future: Guarded::new(future), context, end };
        executor.spawn(running, self.schedule_on_poller());
        Ok(())
    }

    /// What a task calls when it is woken. The poller polls the task, or workers take it from
    /// there.
    fn schedule_on_poller(&self) -> impl Fn(Runnable, Option<Workers>) + Send + Sync + 'static {
        let remote = Arc::clone(&self.remote);
        move |task, workers| remote.send(Command::Run(Job::Poll(task, workers)))
    }

    /// Ends a run that has started and that no thread will begin.
    pub(super) fn give_up_run(self: &Arc<Self>, started: Started) {
        let Started { reader, writer, .. } = started;
        self.release(BOTH, Some(reader), writer);
        self.end_run(FUTURE, Some(Error::closed("handler given up")));
    }

    /// The future of a run is done. `parts` come back with it.
    fn end_run(self: &Arc<Self>, parts: u8, failure: Option<Error>) {
        if let Some(error) = failure {
            self.report(&error);
            // A write timeout says that the peer was too slow, so unsent output is dropped now.
            if error.is_write_timeout() {
                self.cut()
            } else {
                self.close()
            }
            user_code::discard(error);
        }
        self.release(parts, None, None);
    }

    /// A spawned future is done.
    fn end_spawned(self: &Arc<Self>, failure: Option<Error>) {
        if let Some(error) = failure {
            self.report(&error);
            user_code::discard(error);
        }
        if let Some(service) = &self.service {
            service.hooks.spawn_ended();
        }
    }

    fn report(self: &Arc<Self>, error: &Error) {
        if let Some(service) = &self.service {
            let handle = Handle::of(self);
            user_code::call("on_error", || service.hooks.failed(&handle, error));
        }
    }
}
