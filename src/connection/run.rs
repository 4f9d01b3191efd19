//! Runs of handlers, and futures that handlers spawn: how they are made, polled and ended.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use super::Connection;
use super::core::Core;
use super::input::Started;
use super::state::FUTURE;
use crate::error::{Error, Result};
use crate::poller::{Command, Job};
use crate::task::{self, Guarded, Run, Runnable, RuntimeContext, Workers};
use crate::user_code;

/// A handler, whatever the type of its futures.
pub(crate) trait Handler: Send + Sync {
    /// Makes a run: calls the handler inside `context`. The run is polled inside `context` as well.
    fn start(&self, connection: Connection, context: &RuntimeContext, end: RunEnd) -> Run;
}

impl<H, F> Handler for H
where
    H: Fn(Connection) -> F + Send + Sync,
    F: Future<Output = Result<()>> + Send + 'static,
{
    #[inline]
    fn start(&self, connection: Connection, context: &RuntimeContext, end: RunEnd) -> Run {
        let future = context.run(|| self(connection));
        Box::pin(Running::new(future, context, end))
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

impl<F: Future<Output = Result<()>>> Running<F> {
    fn new(future: F, context: &RuntimeContext, end: RunEnd) -> Running<F> {
        Running { future: Guarded::new(future), context: context.clone(), end }
    }
}

impl<F: Future<Output = Result<()>>> Future for Running<F> {
    type Output = ();

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        let owner = match this.end.kind {
            Kind::Handler => this.end.core.owner(),
            Kind::Spawned => 0,
        };
        let poll = || task::poll_for(owner, || this.future.poll(cx));
        let outcome = ready!(this.context.run(poll));
        this.end.outcome = Some(outcome);
        Poll::Ready(())
    }
}

/// The end of a run or of a spawned future. Dropping this ends the run: when the future is done,
/// has panicked, or is given up.
pub(crate) struct RunEnd {
    core: Arc<Core>,
    kind: Kind,
    outcome: Option<Result<()>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Handler,
    /// A spawned future, which has neither the reader nor the writer.
    Spawned,
}

impl RunEnd {
    fn new(core: Arc<Core>, kind: Kind) -> RunEnd {
        RunEnd { core, kind, outcome: None }
    }

    fn unfinished(&self) -> Error {
        let what = match self.kind {
            Kind::Handler => "handler",
            Kind::Spawned => "spawned future",
        };
        if std::thread::panicking() {
            return Error::panicked(format!("{what} panicked"));
        }
        // The threads that would poll the future have ended.
        Error::closed(&format!("{what} given up"))
    }
}

impl Drop for RunEnd {
    fn drop(&mut self) {
        let failure = match self.outcome.take() {
            Some(outcome) => outcome.err(),
            None => Some(self.unfinished()),
        };
        match self.kind {
            Kind::Handler => self.core.end_run(failure),
            Kind::Spawned => self.core.end_spawned(failure),
        }
    }
}

/// A run that begins in a task, on a worker or a runtime. The handler is called there, not on the
/// poller. So its future is allocated and freed on one thread, and the queue holds little memory.
pub(super) struct QueuedRun(Stage);

enum Stage {
    Queued(Arc<Core>, Started),
    Begun(Run),
    Over,
}

impl QueuedRun {
    pub(super) fn new(core: Arc<Core>, started: Started) -> QueuedRun {
        QueuedRun(Stage::Queued(core, started))
    }

    fn take(&mut self) -> Stage {
        std::mem::replace(&mut self.0, Stage::Over)
    }
}

impl Future for QueuedRun {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // `Over` stays if the poll panics.
        let run = match self.take() {
            Stage::Queued(core, started) => core.start_run(started),
            Stage::Begun(run) => Some(run),
            Stage::Over => None,
        };
        let Some(mut run) = run else { return Poll::Ready(()) };
        let polled = run.as_mut().poll(cx);
        if polled.is_pending() {
            self.0 = Stage::Begun(run);
        }
        polled
    }
}

impl Drop for QueuedRun {
    fn drop(&mut self) {
        if let Stage::Queued(core, started) = self.take() {
            core.give_up_run(started);
        }
    }
}

impl Core {
    /// Calls the handler for a run that has started. `None`: the connection has no server.
    #[inline]
    pub(super) fn start_run(self: &Arc<Self>, started: Started) -> Option<Run> {
        let service = self.service.as_ref()?;
        let handler = service.handler(started.kind);
        // Declared before the connection: if the handler panics, the connection is given back
        // first.
        let end = RunEnd::new(Arc::clone(self), Kind::Handler);
        let connection = self.hand_out(started);
        Some(handler.start(connection, service.executor.context(), end))
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
        let running = Running::new(future, executor.context(), end);
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
        self.release(super::handout::BOTH, Some(reader), writer);
        self.end_run(Some(Error::closed("handler given up")));
    }

    /// The future of a run is done.
    fn end_run(self: &Arc<Self>, failure: Option<Error>) {
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
        self.release(FUTURE, None, None);
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
            let handle = super::Handle::of(self);
            user_code::call("on_error", || service.hooks.failed(&handle, error));
        }
    }
}
