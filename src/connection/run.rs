//! A run of a server's handler, and what it has spawned: where they are polled, and their ends.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::shared::{Remote, Shared};
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
        let polled = this.context.run(|| this.future.poll(cx));
        polled.map(|outcome| this.end.set(outcome))
    }
}

/// The end of a run, or of what was spawned: made when it starts, dropped when its future is done,
/// has panicked, or was given up.
pub(crate) struct RunEnd {
    shared: Arc<Shared>,
    outcome: Option<Result<()>>,
    /// It is beside the runs of the connection, and holds none of its parts.
    is_spawned: bool,
}

impl RunEnd {
    pub(super) fn new(shared: Arc<Shared>) -> RunEnd {
        RunEnd { shared, outcome: None, is_spawned: false }
    }

    fn set(&mut self, outcome: Result<()>) {
        self.outcome = Some(outcome);
    }

    pub(crate) fn remote(&self) -> &Arc<Remote> {
        &self.shared.remote
    }

    /// Stands for the run in its trial.
    pub(crate) fn owner(&self) -> usize {
        self.shared.owner()
    }
}

impl Drop for RunEnd {
    fn drop(&mut self) {
        let what = if self.is_spawned { "spawned future" } else { "handler" };
        let failure = match self.outcome.take() {
            Some(outcome) => outcome.err(),
            None if std::thread::panicking() => Some(Error::panicked(format!("{what} panicked"))),
            // Its threads have ended, and the connection with them.
            None => Some(Error::closed(&format!("{what} given up"))),
        };
        match self.is_spawned {
            true => self.shared.end_spawned(failure),
            false => self.shared.end_run(failure),
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
    let end = RunEnd { shared: Arc::clone(shared), outcome: None, is_spawned: true };
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
