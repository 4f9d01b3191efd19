//! Jobs: the runs, actions and woken tasks that a poller runs after it has collected.

use super::{Action, Endpoint};
use crate::sync::Arc;
use crate::task::{self, Runnable, Workers};

/// One piece of work. Every job is user code.
pub(crate) enum Job<E: Endpoint> {
    /// Begin a run that has started.
    Begin(Arc<E>, E::Started),
    /// Carry out an action of an endpoint.
    Act(Arc<E>, Action),
    /// Poll a task that was woken. If there are workers, they may poll it instead.
    Poll(Runnable, Option<Workers>),
}

impl<E: Endpoint> Job<E> {
    /// Whether workers may do the job.
    pub(super) fn is_movable(&self) -> bool {
        match self {
            Job::Begin(endpoint, _) => endpoint.is_movable(),
            Job::Act(..) => false,
            Job::Poll(_, workers) => workers.is_some(),
        }
    }

    /// Gives the job to the workers. Only for a [movable](Self::is_movable) job.
    pub(super) fn move_to_workers(self) {
        match self {
            Job::Begin(endpoint, started) => endpoint.run_elsewhere(started),
            Job::Poll(runnable, Some(workers)) => workers.schedule(runnable),
            Job::Poll(_, None) | Job::Act(..) => unreachable!("only the poller may do this job"),
        }
    }

    /// Drops a job that no thread will do.
    pub(super) fn abandon(self) {
        match self {
            Job::Begin(endpoint, started) => endpoint.give_up(started),
            // Dropping a task ends its run.
            Job::Poll(runnable, _) => task::give_up(runnable),
            // The end of the poller removes the endpoint.
            Job::Act(..) => {}
        }
    }
}
