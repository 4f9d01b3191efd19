//! Where a server's handlers run.

use crate::config::Placement;
use crate::error::Result;

use super::queue::Workers;

/// A [`Placement`] put into effect.
#[derive(Clone)]
pub(crate) enum Executor {
    /// On the poller that owns the connection.
    Inline,
    /// On worker threads.
    Pool(Workers),
}

impl Executor {
    /// Starts the threads that `placement` calls for, pinned to `worker_cpus` unless that is empty.
    pub(crate) fn start(placement: Placement, worker_cpus: &[usize]) -> Result<Executor> {
        match placement {
            Placement::Auto | Placement::Inline => Ok(Executor::Inline),
            Placement::Pool { workers } => {
                Ok(Executor::Pool(Workers::start(workers, worker_cpus)?))
            }
        }
    }

    /// What was put into effect, with its numbers.
    pub(crate) fn placement(&self) -> Placement {
        match self {
            Executor::Inline => Placement::Inline,
            Executor::Pool(workers) => Placement::Pool { workers: workers.count() },
        }
    }

    /// Ends the threads; see [`Workers::stop`].
    pub(crate) fn stop(&self, join: bool) {
        if let Executor::Pool(workers) = self {
            workers.stop(join);
        }
    }
}
