//! A run of a server's handler, and what it has spawned: where they are polled, and their ends.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::Connection;
use super::input::Handed;
use super::shared::{BOTH, Remote, Shared};
use super::spare;
use crate::buffer::{Chain, Staging};
use crate::error::{Error, Result};
use crate::poller::{Command, Endpoint};
use crate::task::{self, Executor, Here, Run, RuntimeContext, Tried};

pin_project_lite::pin_project! {
    /// A handler's future with its end, polled inside its context. An async block would hold the
    /// future twice.
    pub(crate) struct Running<F> {
        #[pin]
        future: F,
        context: RuntimeContext,
        // `None` in the first poll of a run on its poller, which then sees to its end itself.
        end: Option<RunEnd>,
    }
}

impl<F: Future<Output = Result<()>>> Running<F> {
    pub(crate) fn new(future: F, context: RuntimeContext, end: RunEnd) -> Running<F> {
        Running { future, context, end: Some(end) }
    }
}

/// A handler, whatever the type of its futures.
pub(crate) trait Handler: Send + Sync {
    /// Runs it on the calling thread, its connection's poller, up to its first wait.
    fn begin(
        &self,
        connection: Connection,
        context: &RuntimeContext,
        shared: &Arc<Shared>,
        here: Here<'_>,
    ) -> Begun;
    /// Runs it in a task, up to its first wait. What is left of it is returned.
    fn begin_in_task(
        &self,
        connection: Connection,
        context: &RuntimeContext,
        end: RunEnd,
        task: &mut Context<'_>,
    ) -> Option<Run>;
}

impl<H, F> Handler for H
where
    H: Fn(Connection) -> F + Send + Sync,
    F: Future<Output = Result<()>> + Send + 'static,
{
    fn begin(
        &self,
        connection: Connection,
        context: &RuntimeContext,
        shared: &Arc<Shared>,
        here: Here<'_>,
    ) -> Begun {
        let future = context.run(|| self(connection));
        let running = Running { future, context: context.clone(), end: None };
        task::poll_first(running, |running| {
            let this = running.project();
            let context = &*this.context;
            let poll = |cx: &mut Context<'_>| context.run(|| this.future.poll(cx));
            let tried = here.time(|| task::try_poll(shared.owner(), poll));
            if let Tried::Waits(_) = tried {
                *this.end = Some(RunEnd::new(Arc::clone(shared)));
            }
            tried
        })
    }

    fn begin_in_task(
        &self,
        connection: Connection,
        context: &RuntimeContext,
        end: RunEnd,
        task: &mut Context<'_>,
    ) -> Option<Run> {
        let future = context.run(|| self(connection));
        let running = Running::new(future, context.clone(), end);
        let begun = task::poll_first(running, |running| match running.poll(task) {
            Poll::Ready(()) => Tried::Done(()),
            Poll::Pending => Tried::Waits(task::Wait::Open),
        });
        begun.err().map(|(run, _)| run)
    }
}

/// A run that begins in a task, on a worker or a runtime. Only there is its connection handed out
/// and its handler called: so its future is allocated and freed on one thread, and what waits in a
/// queue is small.
pub(super) struct InTask(Progress);

enum Progress {
    Queued(Arc<Shared>, Handed),
    Begun(Run),
    Over,
}

impl InTask {
    pub(super) fn new(shared: Arc<Shared>, handed: Handed) -> InTask {
        InTask(Progress::Queued(shared, handed))
    }
}

impl Future for InTask {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // A run that panics is over.
        let left = match std::mem::replace(&mut self.0, Progress::Over) {
            Progress::Queued(shared, handed) => shared.begin_in_task(handed, cx),
            Progress::Begun(mut run) => run.as_mut().poll(cx).is_pending().then_some(run),
            Progress::Over => None,
        };
        match left {
            Some(run) => {
                self.0 = Progress::Begun(run);
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }
}

impl Drop for InTask {
    fn drop(&mut self) {
        if let Progress::Queued(shared, handed) = std::mem::replace(&mut self.0, Progress::Over) {
            shared.give_up(handed);
        }
    }
}

/// How a run's first poll ended: with its outcome, or with what is left of it.
pub(crate) type Begun = std::result::Result<Result<()>, (Run, task::Wait)>;

impl<F: Future<Output = Result<()>>> Future for Running<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        let end = this.end.as_mut().expect("set before anybody else polls it");
        // What was spawned holds none of the parts, unless a run has handed them to it: then their
        // way home has nothing to do with its end.
        let owner = if end.is_spawned { 0 } else { end.shared.owner() };
        let polling = Polling::begin(&end.shared, owner);
        let Poll::Ready(outcome) = this.context.run(|| this.future.poll(cx)) else {
            return Poll::Pending;
        };
        let has_returned = polling.end();
        end.set(outcome, has_returned);
        Poll::Ready(())
    }
}

thread_local! {
    /// The connection whose run is polled on this thread, by its address; 0 is none.
    static POLLED: Cell<usize> = const { Cell::new(0) };
    /// The one that such a run has given back in this poll, with nothing left in it.
    static RETURNED: Cell<usize> = const { Cell::new(0) };
}

/// Whoever runs on this thread takes in what has arrived for that connection.
#[inline]
pub(super) fn takes_in(shared: &Shared) {
    if POLLED.get() == shared.owner() {
        task::next_part();
    }
}

/// Most runs drop their connection as they end, with nothing left in it. Then it goes home with the
/// end of the run, at once. Gives back what is to go home now.
#[inline]
pub(super) fn leave_to_end(
    shared: &Shared,
    reader: Box<Chain>,
    writer: Box<Staging>,
) -> Option<(Box<Chain>, Box<Staging>)> {
    let owner = shared.owner();
    let is_left =
        POLLED.get() == owner && RETURNED.get() == 0 && reader.is_empty() && writer.is_empty();
    if !is_left {
        return Some((reader, writer));
    }
    spare::keep(reader, writer);
    RETURNED.set(owner);
    None
}

/// One poll of a run. A connection that was given back, and is not taken home, goes there when this
/// is dropped: the run goes on without it, or has panicked.
pub(super) struct Polling<'a> {
    shared: &'a Arc<Shared>,
    owner: usize,
    /// The poll that this one is inside of.
    outer: usize,
}

impl<'a> Polling<'a> {
    /// `owner` is the connection's; 0 leaves nothing to the end.
    #[inline]
    pub(super) fn begin(shared: &'a Arc<Shared>, owner: usize) -> Polling<'a> {
        Polling { shared, owner, outer: POLLED.replace(owner) }
    }

    /// Ends the poll. `true`: it has given its connection back, which goes home with the run.
    #[inline(always)]
    pub(super) fn end(self) -> bool {
        POLLED.set(self.outer);
        let has_returned = self.take();
        std::mem::forget(self);
        has_returned
    }

    #[inline]
    fn take(&self) -> bool {
        let has_returned = self.owner != 0 && RETURNED.get() == self.owner;
        if has_returned {
            RETURNED.set(0);
        }
        has_returned
    }
}

impl Drop for Polling<'_> {
    #[inline]
    fn drop(&mut self) {
        POLLED.set(self.outer);
        if self.take() {
            self.shared.release_empty(BOTH);
        }
    }
}

/// The end of a run that outlives its first poll on the poller or begins elsewhere, or of what was
/// spawned: dropped when its future is done, has panicked, or was given up.
pub(crate) struct RunEnd {
    shared: Arc<Shared>,
    outcome: Option<Result<()>>,
    /// Its connection goes home with it.
    has_returned: bool,
    /// It is beside the runs of the connection, and holds none of its parts.
    is_spawned: bool,
}

impl RunEnd {
    pub(super) fn new(shared: Arc<Shared>) -> RunEnd {
        RunEnd { shared, outcome: None, has_returned: false, is_spawned: false }
    }

    fn set(&mut self, outcome: Result<()>, has_returned: bool) {
        self.outcome = Some(outcome);
        self.has_returned = has_returned;
    }

    #[cold]
    fn unfinished(&self) -> Error {
        let what = if self.is_spawned { "spawned future" } else { HANDLER };
        if std::thread::panicking() {
            return panicked(what);
        }
        // Its threads have ended, and the connection with them.
        given_up(what)
    }
}

/// What a run is called where it fails.
pub(super) const HANDLER: &str = "handler";

#[cold]
pub(super) fn panicked(what: &str) -> Error {
    Error::panicked(format!("{what} panicked"))
}

/// Nobody will begin it, or go on with it.
#[cold]
pub(super) fn given_up(what: &str) -> Error {
    Error::closed(&format!("{what} given up"))
}

impl Drop for RunEnd {
    fn drop(&mut self) {
        let failure = match self.outcome.take() {
            Some(outcome) => outcome.err(),
            None => Some(self.unfinished()),
        };
        match self.is_spawned {
            true => self.shared.end_spawned(failure),
            false if self.has_returned && failure.is_none() && self.shared.rest() => {}
            false => self.shared.end_run(failure, self.has_returned),
        }
    }
}

/// Runs `future` where the handlers of the connection's server run, beside them.
///
/// # Errors
/// Unsupported: the connection has no server.
pub(super) fn spawn<F>(shared: &Arc<Shared>, future: F) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let Some(service) = &shared.service else {
        return Err(Error::unsupported(
            "spawn: not a server's connection; spawn on an executor of your own",
        ));
    };
    service.hooks.spawned();
    let end =
        RunEnd { shared: Arc::clone(shared), outcome: None, has_returned: false, is_spawned: true };
    let executor = &service.executor;
    let running = Running::new(future, executor.context().clone(), end);
    let remote = Arc::clone(&shared.remote);
    executor.spawn(running, move |task, workers| remote.send(Command::Run(task, workers)));
    Ok(())
}

/// Takes on a run on the poller after a trial: gives it back, to be kept, if it waits for nothing
/// but its flush; makes it a task if it waits for anything else.
pub(super) fn take_on(
    remote: &Arc<Remote>,
    executor: &Executor,
    run: Run,
    wait: task::Wait,
) -> Option<Run> {
    match wait {
        task::Wait::Marked => Some(run),
        task::Wait::Open => {
            let remote = Arc::clone(remote);
            executor.spawn_near(run, move |task, workers| remote.send(Command::Run(task, workers)));
            None
        }
    }
}
