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
    /// Begins a run of `core`: calls the handler inside `context`, and polls its future once. Later
    /// polls are inside `context` as well. Returns the run if it waits; `None` if it is over.
    fn begin(
        &self,
        core: &Arc<Core>,
        connection: Connection,
        context: &RuntimeContext,
        cx: &mut Context<'_>,
    ) -> Option<Run>;
}

impl<H, F> Handler for H
where
    H: Fn(Connection) -> F + Send + Sync,
    F: Future<Output = Result<()>> + Send + 'static,
{
    fn begin(
        &self,
        core: &Arc<Core>,
        connection: Connection,
        context: &RuntimeContext,
        cx: &mut Context<'_>,
    ) -> Option<Run> {
        let mut run = Box::pin(Running { future: Guarded::none(), end: None });
        let mut this = run.as_mut().project();
        let begin = |mut future: Pin<&mut Guarded<F>>| {
            future.as_mut().set(self(connection));
            future.poll(cx)
        };
        let (outcome, has_returned) =
            poll_user(this.future.as_mut(), core.owner(), Kind::Handler, context, begin);
        if let Some(outcome) = outcome {
            core.end_run(has_returned, outcome.err());
            return None;
        }
        if has_returned {
            core.release(BOTH, None, None);
        }
        *this.end = Some(RunEnd::new(Arc::clone(core), Kind::Handler, context.clone()));
        Some(run)
    }
}

/// Polls a future of the user with `poll`: a handler's future, or a spawned one. `owner` identifies
/// the run, see [`task::poll_for`]. Returns the outcome if the future is over, and whether the run
/// has dropped its connection in this poll. A future that is over is dropped.
#[inline(always)]
fn poll_user<F>(
    mut future: Pin<&mut Guarded<F>>,
    owner: usize,
    kind: Kind,
    context: &RuntimeContext,
    poll: impl FnOnce(Pin<&mut Guarded<F>>) -> Poll<Result<()>>,
) -> (Option<Result<()>>, bool) {
    task::poll_for(owner, || {
        // Not inside of the closure: if a destructor panics, the outcome stays.
        let mut outcome = None;
        let polled = user_code::attempt(kind.what(), || {
            context.run(|| {
                if let Poll::Ready(ready) = poll(future.as_mut()) {
                    outcome = Some(ready);
                    future.as_mut().finish();
                }
            })
        });
        if let Err(message) = polled {
            future.as_mut().clear();
            outcome.get_or_insert_with(|| {
                Err(Error::panicked(format!("{} panicked: {message}", kind.what())))
            });
        }
        outcome
    })
}

pin_project_lite::pin_project! {
    /// A future of a handler, or a spawned future, and its end.
    struct Running<F> {
        #[pin]
        future: Guarded<F>,
        // `None` during the first poll of a run. Declared after `future`, so `end` is dropped when
        // everything in the future has been dropped.
        end: Option<RunEnd>,
    }
}

impl<F: Future<Output = Result<()>>> Future for Running<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        let Some(end) = this.end else { return Poll::Ready(()) };
        let poll = |future: Pin<&mut Guarded<F>>| future.poll(cx);
        let (outcome, has_returned) =
            poll_user(this.future, end.owner(), end.kind, &end.context, poll);
        let is_over = outcome.is_some();
        end.outcome = outcome;
        if is_over {
            end.has_returned = has_returned;
            return Poll::Ready(());
        }
        if has_returned {
            end.core.release(BOTH, None, None);
        }
        Poll::Pending
    }
}

/// The end of a run that has waited, or of a spawned future. Dropping this ends the run: when the
/// future is over, or is given up. A future that is given up has no outcome.
struct RunEnd {
    core: Arc<Core>,
    kind: Kind,
    context: RuntimeContext,
    outcome: Option<Result<()>>,
    /// The run has dropped its connection in its last poll.
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
    fn new(core: Arc<Core>, kind: Kind, context: RuntimeContext) -> RunEnd {
        RunEnd { core, kind, context, outcome: None, has_returned: false }
    }

    /// Identifies the run to the thread that polls it; 0 for a future that has no parts.
    fn owner(&self) -> usize {
        match self.kind {
            Kind::Handler => self.core.owner(),
            Kind::Spawned => 0,
        }
    }
}

impl Drop for RunEnd {
    fn drop(&mut self) {
        let failure = match self.outcome.take() {
            Some(outcome) => outcome.err(),
            // The threads that would poll the future have ended.
            None => Some(Error::closed(&format!("{} given up", self.kind.what()))),
        };
        match self.kind {
            Kind::Handler => self.core.end_run(self.has_returned, failure),
            Kind::Spawned => self.core.end_spawned(failure),
        }
    }
}

impl Start for Core {
    fn begin(self: Arc<Self>, cx: &mut Context<'_>) -> Option<Run> {
        let started = lock(&self.input).take_started()?;
        self.begin_run(started, cx)
    }

    fn give_up(self: Arc<Self>) {
        let started = lock(&self.input).take_started();
        if let Some(started) = started {
            self.give_up_run(started);
        }
    }
}

impl Core {
    /// Begins a run that has started: calls the handler, and polls its future once. Returns the run
    /// if it waits.
    #[inline(always)]
    pub(super) fn begin_run(
        self: &Arc<Self>,
        started: Started,
        cx: &mut Context<'_>,
    ) -> Option<Run> {
        let service = self.service.as_ref()?;
        let handler = service.handler(started.kind);
        let connection = self.hand_out(started);
        let context = service.executor.context();
        span::begin(self, || handler.begin(self, connection, context, cx))
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
        let context = executor.context().clone();
        let end = Some(RunEnd::new(Arc::clone(self), Kind::Spawned, context));
        let running = Running { future: Guarded::new(future), end };
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
        self.end_run(false, Some(Error::closed("handler given up")));
    }

    /// The future of a run is over. `has_returned`: the run has dropped its connection in its last
    /// poll, see [`task::returns_parts`].
    fn end_run(self: &Arc<Self>, has_returned: bool, failure: Option<Error>) {
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
        self.release(if has_returned { ALL } else { FUTURE }, None, None);
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
