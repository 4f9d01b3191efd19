//! Puts a [`Placement`] into effect: holds the threads or the runtime that run the handlers of a
//! server.
//!
//! A poller asks [`Executor::here`] before each run whether the run begins on the poller's own
//! thread. If not, it passes the run to [`Executor::begin_elsewhere`].

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use super::measurement::{Host, wake_cost_ns};
use super::policy::{PlacementStats, Places, Policy, Timed};
use super::relief::{Watch, Watched};
use crate::config::{self, Placement};
use crate::error::{Error, Result};
use crate::spin::Spin;
use crate::task::queue::{Queued, Workers};
use crate::task::{self, Run, Runnable, TaskSet};
use crate::threads;

/// A [`Placement`] in effect.
#[derive(Clone)]
pub(crate) struct Executor {
    /// The placement, with the number of workers that were started for it.
    placement: Placement,
    target: Target,
    /// The runs and spawned futures that became tasks, other than those on a tokio runtime.
    tasks: TaskSet,
    context: RuntimeContext,
}

/// Where a run begins.
#[derive(Clone)]
enum Target {
    /// On the poller that owns the connection.
    Inline,
    /// On worker threads that never sleep.
    Spinning(Workers),
    /// On worker threads. The policy decides how they share a CPU.
    Pool(Workers, Arc<Policy>),
    /// On the poller or on worker threads, as the policy decides.
    Either(Workers, Arc<Policy>, Arc<Watch>),
    /// On the tokio runtime of the context.
    Tokio,
}

impl Target {
    /// # Errors
    /// A thread cannot be started. The workers are stopped then.
    fn either(
        workers: Workers,
        policy: Arc<Policy>,
        pollers: &[Arc<dyn Watched>],
    ) -> Result<Target> {
        match Watch::start(pollers.to_vec(), &policy) {
            Ok(watch) => Ok(Target::Either(workers, policy, Arc::new(watch))),
            Err(error) => {
                workers.stop(true);
                Err(error)
            }
        }
    }
}

/// Permission to begin a run on the calling thread, its poller.
pub(crate) struct Here<'a> {
    policy: Option<&'a Policy>,
}

impl Here<'_> {
    /// Runs `code`, the first poll of the handler, and records how long it takes if a policy
    /// decides where handlers run.
    #[inline(always)]
    pub(crate) fn time<T>(&self, code: impl FnOnce() -> T) -> T {
        let began_ns = self.policy.map(Policy::begin_poll);
        let done = code();
        if let (Some(policy), Some(began_ns)) = (self.policy, began_ns) {
            policy.end_poll(began_ns);
        }
        done
    }
}

impl Executor {
    /// Starts the threads that `placement` needs besides `pollers`. The workers are pinned to
    /// `worker_cpus`, unless that is empty, and spin as `spin` says. Handlers run inside `context`
    /// on every placement; a context without a runtime stands for the runtime that the caller is
    /// in, if any.
    ///
    /// # Errors
    /// Invalid: too many workers, or CPUs that the process may not use; `placement` is a tokio
    /// runtime, and there is none. Also the kernel's error if a thread cannot be started.
    pub(crate) fn start(
        placement: Placement,
        worker_cpus: &[usize],
        spin: Spin,
        pollers: Vec<Arc<dyn Watched>>,
        host: Host,
        context: RuntimeContext,
    ) -> Result<Executor> {
        let context = context.or_current();
        let cpus = threads::cpu_count(worker_cpus);
        let cpus_of_process = threads::cpus_of_process();
        let policy = |places| {
            Arc::new(Policy::new(places, pollers.len(), cpus_of_process, wake_cost_ns(), host))
        };
        let tasks = TaskSet::new();
        let start =
            |count: usize| Workers::start(count, worker_cpus, spin, tasks.clone(), host.begin);
        let (placement, target) = match placement {
            Placement::Inline => (placement, Target::Inline),
            Placement::Auto => {
                let workers =
                    start((WORKERS_PER_CPU * cpus + WORKERS_MORE).min(config::THREADS_MAX))?;
                (placement, Target::either(workers, policy(Places::PollersFirst), &pollers)?)
            }
            Placement::Pool { workers } => {
                let count = match workers {
                    0 if spin.is_endless() => cpus.saturating_sub(pollers.len()).max(1),
                    0 => (WORKERS_PER_CPU * cpus).min(config::THREADS_MAX),
                    count => count,
                };
                let workers = start(count)?;
                let target = if spin.is_endless() {
                    Target::Spinning(workers)
                } else if cpus_of_process == 1 {
                    Target::either(workers, policy(Places::WorkersFirst), &pollers)?
                } else {
                    Target::Pool(workers, policy(Places::Workers))
                };
                (Placement::Pool { workers: count }, target)
            }
            Placement::Tokio => {
                context.check()?;
                (placement, Target::Tokio)
            }
        };
        Ok(Executor { placement, target, tasks, context })
    }

    /// Whether the run that the calling poller has before it begins on the poller.
    #[inline]
    pub(crate) fn here(&self) -> Option<Here<'_>> {
        match &self.target {
            Target::Inline => Some(Here { policy: None }),
            Target::Either(_, policy, _) if policy.is_inline() => {
                Some(Here { policy: Some(policy) })
            }
            _ => None,
        }
    }

    pub(crate) fn context(&self) -> &RuntimeContext {
        &self.context
    }

    /// The placement, with the number of workers that were started for it.
    pub(crate) fn placement(&self) -> Placement {
        self.placement
    }

    /// Drops the futures that wait. A future that is polled at present is dropped when its poll
    /// returns.
    pub(crate) fn cancel(&self) {
        self.tasks.end();
    }

    /// Ends the threads; see [`Workers::stop`].
    pub(crate) fn stop(&self, join: bool) {
        if let Target::Either(_, _, watch) = &self.target {
            watch.stop(join);
        }
        if let Target::Spinning(workers) | Target::Pool(workers, _) | Target::Either(workers, ..) =
            &self.target
        {
            workers.stop(join);
        }
    }

    /// Workers that may take over work of a poller.
    pub(crate) fn workers(&self) -> Option<&Workers> {
        match &self.target {
            Target::Either(workers, ..) => Some(workers),
            _ => None,
        }
    }

    /// Makes a task of a run that began on the calling poller and has to wait, and polls it. A
    /// wake-up calls `near`, which takes the task back to that poller; the workers that it is
    /// called with may run the task as well. While handlers run on workers, a wake-up passes the
    /// task to a worker instead.
    pub(crate) fn spawn_near(
        &self,
        future: Run,
        near: impl Fn(Runnable, Option<Workers>) + Send + Sync + 'static,
    ) {
        task::run(self.task_near(future, near));
    }

    /// Queues a run that begins on a worker or on the runtime.
    ///
    /// # Panics
    /// The placement is `Inline`.
    pub(crate) fn begin_elsewhere(&self, run: Queued) {
        match &self.target {
            Target::Inline => unreachable!("the poller polls it"),
            Target::Spinning(workers) => workers.begin(run, None),
            Target::Pool(workers, policy) | Target::Either(workers, policy, _) => {
                policy.follow();
                workers.begin(run, Some(policy));
            }
            Target::Tokio => self.context.spawn(run),
        }
    }

    /// Queues `future` as a task where runs begin at present. `near` is as for
    /// [`spawn_near`](Self::spawn_near).
    pub(crate) fn spawn<F>(
        &self,
        future: F,
        near: impl Fn(Runnable, Option<Workers>) + Send + Sync + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        match &self.target {
            Target::Inline => {
                self.tasks.spawn(future, move |task| near(task, None)).schedule();
            }
            Target::Either(..) => self.task_near(Box::pin(future), near).schedule(),
            Target::Spinning(workers) => workers.spawn(future),
            Target::Pool(workers, policy) => workers.spawn(Timed::new(future, policy)),
            Target::Tokio => self.context.spawn(future),
        }
    }

    fn task_near(
        &self,
        future: Run,
        near: impl Fn(Runnable, Option<Workers>) + Send + Sync + 'static,
    ) -> Runnable {
        let Target::Either(workers, policy, _) = &self.target else {
            return self.tasks.spawn(future, move |task| near(task, None));
        };
        let (workers, decides) = (workers.clone(), Arc::clone(policy));
        let schedule = move |task| match decides.is_inline() {
            true => near(task, Some(workers.clone())),
            false => workers.schedule(task),
        };
        self.tasks.spawn(Timed::new(future, policy), schedule)
    }

    /// The figures of the policy; `None` where no policy decides.
    pub(crate) fn stats(&self) -> Option<PlacementStats> {
        match &self.target {
            Target::Either(_, policy, _) => Some(policy.stats()),
            _ => None,
        }
    }
}

/// The context of a tokio runtime, in which handlers run so that tokio's timers, tasks and clients
/// work there; or no context.
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

    /// This context, or [`current`](Self::current) if this one has no runtime.
    fn or_current(self) -> RuntimeContext {
        match self.runtime {
            Some(_) => self,
            None => RuntimeContext::current(),
        }
    }

    /// # Errors
    /// Invalid: the context has no runtime that could run handlers.
    fn check(&self) -> Result<()> {
        match self.runtime {
            Some(_) => Ok(()),
            None => {
                Err(Error::invalid("placement tokio: no runtime; give one to ServerBuilder::tokio"))
            }
        }
    }

    /// The context of the runtime that the caller is in, if any.
    pub(in crate::task) fn current() -> RuntimeContext {
        RuntimeContext { runtime: tokio::runtime::Handle::try_current().ok() }
    }

    /// Runs `code` inside the context.
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

    pub(in crate::task) fn current() -> RuntimeContext {
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
        unreachable!("`check` has refused the placement")
    }
}

impl fmt::Debug for RuntimeContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuntimeContext").finish_non_exhaustive()
    }
}

/// With two workers for a CPU, the scheduler shares the CPU between a handler that computes and the
/// next one. On two CPUs, with 14,000 requests a second of which 1 % take a millisecond, the P99 of
/// the others was 1.5 ms with two workers on a pool, and 0.7 ms with four.
const WORKERS_PER_CPU: usize = 2;

/// Further workers of [`Placement::Auto`], which only takes long runs to them. Few CPUs need them:
/// there it is no rare chance that as many long runs are under way as there are workers.
///
/// On two CPUs, with 33,000 requests a second of which 1 % take a millisecond, the P99 of the
/// others was 2.3 ms with four workers, 2.0 ms with six, 1.7 ms with eight, 1.8 ms with twelve.
const WORKERS_MORE: usize = 4;
