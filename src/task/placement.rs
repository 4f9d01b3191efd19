//! Where a server's handlers run.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use crate::config::{self, Placement};
use crate::error::{Error, Result};
use crate::threads;

use super::policy::{Host, PlacementStats, Policy, Timed, pause_timing};
use super::queue::Workers;
use super::stall::{Watch, Watched};
use super::{Run, Runnable};

/// A [`Placement`] put into effect.
#[derive(Clone)]
pub(crate) struct Executor {
    seat: Seat,
    context: RuntimeContext,
}

/// A run begins on its poller.
pub(crate) struct Here<'a> {
    policy: Option<&'a Policy>,
}

impl Here<'_> {
    pub(crate) fn time<T>(&self, code: impl FnOnce() -> T) -> T {
        pause_timing();
        let timing = self.policy.map(Policy::time_next);
        let done = code();
        if let Some(timing) = timing {
            timing.end();
        }
        done
    }
}

/// Where a run begins.
#[derive(Clone)]
enum Seat {
    /// On the poller that owns the connection.
    Inline,
    /// On worker threads.
    Pool(Workers),
    /// On the poller or on worker threads, as the policy says.
    Auto(Workers, Arc<Policy>, Arc<Watch>),
    /// On the runtime of the context.
    Tokio,
}

impl Executor {
    /// Starts the threads that `placement` calls for beside these pollers, pinned to
    /// `worker_cpus` unless that is empty. Wherever handlers run, they run inside `context`, or
    /// where that is none inside the context of the runtime that the caller is in. `host` is what
    /// the operating system does for their threads.
    ///
    /// # Errors
    /// Invalid: workers that cannot be; a tokio runtime is called for, and none is there.
    pub(crate) fn start(
        placement: Placement,
        worker_cpus: &[usize],
        pollers: Vec<Arc<dyn Watched>>,
        host: Host,
        context: RuntimeContext,
    ) -> Result<Executor> {
        let context = context.or_current();
        let seat = match placement {
            Placement::Inline => Seat::Inline,
            Placement::Auto => {
                let policy = Arc::new(Policy::new(pollers.len(), threads::cpus_of_process(), host));
                let count = config::auto_workers(threads::cpu_count(worker_cpus));
                let workers = Workers::start(count, worker_cpus, host.begin)?;
                match Watch::start(pollers, &policy) {
                    Ok(watch) => Seat::Auto(workers, policy, Arc::new(watch)),
                    Err(error) => {
                        workers.stop(true);
                        return Err(error);
                    }
                }
            }
            Placement::Pool { workers } => {
                Seat::Pool(Workers::start(workers, worker_cpus, host.begin)?)
            }
            Placement::Tokio => {
                context.check()?;
                Seat::Tokio
            }
        };
        Ok(Executor { seat, context })
    }

    /// Whether the run that a poller is about to begin belongs there.
    #[inline]
    pub(crate) fn here(&self) -> Option<Here<'_>> {
        match &self.seat {
            Seat::Inline => Some(Here { policy: None }),
            Seat::Auto(_, policy, _) if policy.is_inline() => Some(Here { policy: Some(policy) }),
            _ => None,
        }
    }

    pub(crate) fn context(&self) -> &RuntimeContext {
        &self.context
    }

    /// What was put into effect, with its numbers.
    pub(crate) fn placement(&self) -> Placement {
        match &self.seat {
            Seat::Inline => Placement::Inline,
            Seat::Auto(..) => Placement::Auto,
            Seat::Pool(workers) => Placement::Pool { workers: workers.count() },
            Seat::Tokio => Placement::Tokio,
        }
    }

    /// Ends the threads; see [`Workers::stop`].
    pub(crate) fn stop(&self, join: bool) {
        if let Seat::Auto(_, _, watch) = &self.seat {
            watch.stop(join);
        }
        if let Seat::Pool(workers) | Seat::Auto(workers, ..) = &self.seat {
            workers.stop(join);
        }
    }

    /// Workers that may do what a poller has begun, or does not come to.
    pub(crate) fn workers(&self) -> Option<&Workers> {
        match &self.seat {
            Seat::Auto(workers, ..) => Some(workers),
            _ => None,
        }
    }

    /// Makes a task of a run that a poller has begun, and runs it. `near` takes it back to that
    /// poller on each wake-up, with the workers that may run it as well; but while the policy says
    /// that handlers do not belong there, it goes to those.
    pub(crate) fn spawn_near(
        &self,
        run: Run,
        near: impl Fn(Runnable, Option<Workers>) + Send + Sync + 'static,
    ) {
        super::run(self.task_near(run, near));
    }

    /// Runs `future` as a task of its own, not on the poller.
    ///
    /// # Panics
    /// When all runs begin on the poller.
    pub(crate) fn spawn_elsewhere<F>(&self, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        match &self.seat {
            Seat::Inline => unreachable!("the poller polls it"),
            Seat::Pool(workers) => workers.spawn(future),
            Seat::Auto(workers, policy, _) => {
                workers.spawn(Timed::new(future, policy));
            }
            Seat::Tokio => self.context.spawn(future),
        }
    }

    /// Makes a task of `future`, which begins where runs do: in its turn, even on the poller that
    /// this is called on. `near` as for [`spawn_near`](Self::spawn_near).
    pub(crate) fn spawn<F>(
        &self,
        future: F,
        near: impl Fn(Runnable, Option<Workers>) + Send + Sync + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        match &self.seat {
            Seat::Inline => super::spawn(future, move |task| near(task, None)).schedule(),
            Seat::Auto(..) => self.task_near(Box::pin(future), near).schedule(),
            _ => self.spawn_elsewhere(future),
        }
    }

    fn task_near(
        &self,
        run: Run,
        near: impl Fn(Runnable, Option<Workers>) + Send + Sync + 'static,
    ) -> Runnable {
        let Seat::Auto(workers, policy, _) = &self.seat else {
            return super::spawn(run, move |task| near(task, None));
        };
        let (workers, decides) = (workers.clone(), Arc::clone(policy));
        let again = move |task| match decides.is_inline() {
            true => near(task, Some(workers.clone())),
            false => workers.schedule(task),
        };
        super::spawn(Timed::new(run, policy), again)
    }

    /// What the policy goes by, where there is one.
    pub(crate) fn stats(&self) -> Option<PlacementStats> {
        match &self.seat {
            Seat::Auto(_, policy, _) => Some(policy.stats()),
            _ => None,
        }
    }
}

/// What handlers run inside: a tokio runtime's context, so that its timers, tasks and clients work
/// there; or nothing.
#[derive(Clone, Default)]
pub(crate) struct RuntimeContext {
    #[cfg(feature = "tokio")]
    runtime: Option<tokio::runtime::Handle>,
}

#[cfg(feature = "tokio")]
impl RuntimeContext {
    pub(crate) fn of(runtime: tokio::runtime::Handle) -> RuntimeContext {
        RuntimeContext { runtime: Some(runtime) }
    }

    /// That of the runtime that the caller is in, if it is in one, where none was given.
    fn or_current(self) -> RuntimeContext {
        match self.runtime {
            Some(_) => self,
            None => RuntimeContext::current(),
        }
    }

    /// Whether handlers can run on the runtime.
    fn check(&self) -> Result<()> {
        match self.runtime {
            Some(_) => Ok(()),
            None => {
                Err(Error::invalid("placement tokio: no runtime; give one to ServerBuilder::tokio"))
            }
        }
    }

    /// That of the runtime that the caller is in, if it is in one.
    pub(super) fn current() -> RuntimeContext {
        RuntimeContext { runtime: tokio::runtime::Handle::try_current().ok() }
    }

    /// Runs `code` inside.
    #[inline]
    pub(crate) fn run<T>(&self, code: impl FnOnce() -> T) -> T {
        let _inside = self.runtime.as_ref().map(tokio::runtime::Handle::enter);
        code()
    }

    fn spawn<F>(&self, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if let Some(runtime) = &self.runtime {
            runtime.spawn(future);
        }
    }
}

#[cfg(not(feature = "tokio"))]
impl RuntimeContext {
    fn or_current(self) -> RuntimeContext {
        self
    }

    fn check(&self) -> Result<()> {
        Err(Error::unsupported("placement tokio: ringpoll was built without the feature `tokio`"))
    }

    pub(super) fn current() -> RuntimeContext {
        RuntimeContext::default()
    }

    #[inline]
    pub(crate) fn run<T>(&self, code: impl FnOnce() -> T) -> T {
        code()
    }

    fn spawn<F>(&self, _future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        unreachable!("refused at the start")
    }
}

impl fmt::Debug for RuntimeContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuntimeContext").finish_non_exhaustive()
    }
}
