//! Runs of handlers on the poller.
//!
//! A handler that waits for nothing but its own flush is parked with the connection's output, and
//! the poller goes on with it when the kernel has the bytes: no task, no waker, no queue. Any other
//! wait makes it a task.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use super::shared::Shared;
use crate::poller::Command;
use crate::sync::lock;
use crate::task::{self, Tried};

/// What is left of a handler's run.
pub(crate) type Run = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Stands for the connection in the trial of its run.
#[inline]
pub(super) fn owner(shared: &Arc<Shared>) -> usize {
    Arc::as_ptr(shared).addr()
}

/// Takes on a run that did not end in its trial.
pub(crate) fn take_on(shared: &Arc<Shared>, run: Run, tried: Tried) {
    let run = match tried {
        Tried::Done => return,
        Tried::Kept => run,
        Tried::Left => match lock(&shared.output).park(run) {
            Ok(()) => return,
            Err(run) => run,
        },
    };
    let remote = Arc::clone(&shared.remote);
    task::run(task::spawn(run, move |task| remote.send(Command::Run(task))));
}

/// Goes on with the run that waits for its flush, if there is one.
pub(super) fn go_on(shared: &Arc<Shared>) {
    let parked = lock(&shared.output).take_parked();
    if let Some(mut run) = parked {
        let tried = task::try_poll(run.as_mut(), owner(shared));
        take_on(shared, run, tried);
    }
}
