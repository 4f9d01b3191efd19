//! A run of a server's handler, and what it has spawned: where they are polled, and their ends.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::shared::{BOTH, Remote, Shared};
use crate::buffer::{Chain, Staging};
use crate::error::{Error, Result};
use crate::poller::Command;
use crate::task::{Executor, Run, RuntimeContext, Tried};

pin_project_lite::pin_project! {
    /// A handler's future with its end, polled inside its context. An async block would hold the
    /// future twice.
    pub(crate) struct Running<F> {
        #[pin]
        future: F,
        context: RuntimeContext,
        end: RunEnd,
    }
}

impl<F> Running<F> {
    pub(crate) fn new(future: F, context: RuntimeContext, end: RunEnd) -> Running<F> {
        Running { future, context, end }
    }

    pub(crate) fn end(&self) -> &RunEnd {
        &self.end
    }
}

impl<F: Future<Output = Result<()>>> Future for Running<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        let polling = Polling::begin(this.end);
        let polled = this.context.run(|| this.future.poll(cx));
        let returned = if polled.is_ready() { polling.take() } else { None };
        drop(polling);
        polled.map(|outcome| this.end.set(outcome, returned))
    }
}

/// The reader and the writer of a connection.
pub(super) type Parts = (Box<Chain>, Box<Staging>);

thread_local! {
    /// The connection whose run is polled on this thread, by its address; 0 is none.
    static POLLED: Cell<usize> = const { Cell::new(0) };
    /// What a run has given back in this poll, and whose it is.
    static RETURNED: Cell<Option<(usize, Parts)>> = const { Cell::new(None) };
}

/// Most runs drop their connection as they end. What it had is kept here then, and goes home with
/// the end of the run, at once. Gives back what is not kept.
#[inline]
pub(super) fn keep_for_end(shared: &Shared, parts: Parts) -> Option<Parts> {
    let owner = shared.owner();
    if POLLED.get() != owner {
        return Some(parts);
    }
    RETURNED.with(|returned| match returned.take() {
        None => {
            returned.set(Some((owner, parts)));
            None
        }
        others => {
            returned.set(others);
            Some(parts)
        }
    })
}

/// One poll of a run. What was given back and is not taken goes home when this is dropped: the run
/// goes on without its connection, or has panicked.
struct Polling<'a> {
    shared: &'a Arc<Shared>,
    owner: usize,
    /// The poll that this one is inside of.
    outer: usize,
}

impl<'a> Polling<'a> {
    #[inline]
    fn begin(end: &'a RunEnd) -> Polling<'a> {
        // What was spawned holds none of the parts, unless a run has handed them to it: then their
        // way home has nothing to do with its end.
        let owner = if end.is_spawned { 0 } else { end.owner() };
        Polling { shared: &end.shared, owner, outer: POLLED.replace(owner) }
    }

    #[inline]
    fn take(&self) -> Option<Parts> {
        RETURNED.with(|returned| match returned.take() {
            Some((owner, parts)) if owner == self.owner => Some(parts),
            others => {
                returned.set(others);
                None
            }
        })
    }
}

impl Drop for Polling<'_> {
    #[inline]
    fn drop(&mut self) {
        POLLED.set(self.outer);
        if let Some((reader, writer)) = self.take() {
            self.shared.release(BOTH, Some(reader), Some(writer));
        }
    }
}

/// The end of a run, or of what was spawned: made when it starts, dropped when its future is done,
/// has panicked, or was given up.
pub(crate) struct RunEnd {
    shared: Arc<Shared>,
    outcome: Option<Result<()>>,
    /// What goes home with it.
    returned: Option<Parts>,
    /// It is beside the runs of the connection, and holds none of its parts.
    is_spawned: bool,
}

impl RunEnd {
    pub(super) fn new(shared: Arc<Shared>) -> RunEnd {
        RunEnd { shared, outcome: None, returned: None, is_spawned: false }
    }

    fn set(&mut self, outcome: Result<()>, returned: Option<Parts>) {
        self.outcome = Some(outcome);
        self.returned = returned;
    }

    pub(crate) fn remote(&self) -> &Arc<Remote> {
        &self.shared.remote
    }

    /// Stands for the run in its trial.
    pub(crate) fn owner(&self) -> usize {
        self.shared.owner()
    }

    #[cold]
    fn unfinished(&self) -> Error {
        let what = if self.is_spawned { "spawned future" } else { "handler" };
        if std::thread::panicking() {
            return Error::panicked(format!("{what} panicked"));
        }
        // Its threads have ended, and the connection with them.
        Error::closed(&format!("{what} given up"))
    }
}

impl Drop for RunEnd {
    fn drop(&mut self) {
        let failure = match self.outcome.take() {
            Some(outcome) => outcome.err(),
            None => Some(self.unfinished()),
        };
        match self.is_spawned {
            true => self.shared.end_spawned(failure),
            false => self.shared.end_run(failure, self.returned.take()),
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
    service.spawned();
    let end =
        RunEnd { shared: Arc::clone(shared), outcome: None, returned: None, is_spawned: true };
    let executor = service.executor();
    let running = Running::new(future, executor.context().clone(), end);
    let remote = Arc::clone(&shared.remote);
    executor.spawn(running, move |task, workers| remote.send(Command::Run(task, workers)));
    Ok(())
}

/// Takes on a run on the poller after its trial: gives it back, to be kept, if it waits for nothing
/// but its flush; makes it a task if it waits for anything else.
pub(crate) fn take_on(
    remote: &Arc<Remote>,
    executor: &Executor,
    run: Run,
    tried: Tried,
) -> Option<Run> {
    match tried {
        Tried::Done => None,
        Tried::Marked => Some(run),
        Tried::Open => {
            let remote = Arc::clone(remote);
            executor.spawn_near(run, move |task, workers| remote.send(Command::Run(task, workers)));
            None
        }
    }
}
