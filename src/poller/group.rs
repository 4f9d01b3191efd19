//! Several pollers: starts their threads, picks a poller for each connection, chooses the backend.

use std::io;
use std::sync::{OnceLock, mpsc};
use std::thread::{self, JoinHandle};

use super::memory::Budget;
use super::{Command, Endpoint, Poller, Remote};
use crate::buffer::Pool;
use crate::config::{
    self, Backend as Choice, Balance, Capabilities, PollMode, SqpollOptions, UringOptions,
};
use crate::counters::{Counters, PollerStats};
use crate::error::{Error, Result};
use crate::random;
use crate::spin::Spin;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, lock};
use crate::sys::epoll::Epoll;
use crate::sys::uring::{self, Engine, RingOptions, Uring};
use crate::sys::{Backend, Outlet, SendRings, Wake};
use crate::threads;
use crate::user_code;

/// The settings of a group.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) backend: Choice,
    /// How many pollers; 0 is one for every [`cpus_per_poller`](Self::cpus_per_poller) CPUs.
    pub(crate) count: usize,
    pub(crate) cpus_per_poller: usize,
    /// How many worker threads run handlers.
    pub(crate) workers: usize,
    pub(crate) balance: Balance,
    pub(crate) poll_mode: PollMode,
    pub(crate) cpus: Vec<usize>,
    pub(crate) sqpoll_cpus: Vec<usize>,
    pub(crate) name: String,
    /// How many received bytes may lie unread at each poller.
    pub(crate) unread_bytes_max: usize,
    pub(crate) uring: UringOptions,
}

impl Plan {
    /// How many pollers to start, if each serves `cpus_per_poller` CPUs.
    fn poller_count(&self, cpus_per_poller: usize) -> Result<usize> {
        let count = match self.count {
            0 => threads::cpu_count(&self.cpus).div_ceil(cpus_per_poller),
            count => count,
        };
        if count > config::THREADS_MAX {
            return Err(Error::invalid(format!(
                "pollers: {count} are more than {}",
                config::THREADS_MAX
            )));
        }
        Ok(count)
    }

    /// The CPUs for kernel threads; empty is all CPUs that the pollers may use. If pollers are
    /// pinned, kernel threads get the other CPUs.
    fn thread_cpus(&self) -> Result<Vec<usize>> {
        if !self.sqpoll_cpus.is_empty() || self.cpus.is_empty() {
            return Ok(self.sqpoll_cpus.clone());
        }
        let allowed = threads::allowed_cpus()?;
        let left: Vec<usize> =
            allowed.iter().copied().filter(|cpu| !self.cpus.contains(cpu)).collect();
        Ok(if left.is_empty() { allowed } else { left })
    }
}

impl Default for Plan {
    fn default() -> Plan {
        Plan {
            backend: Choice::Auto,
            count: 0,
            cpus_per_poller: 1,
            workers: 0,
            balance: Balance::RoundRobin,
            poll_mode: PollMode::Adaptive,
            cpus: Vec::new(),
            sqpoll_cpus: Vec::new(),
            name: "ringpoll".to_owned(),
            unread_bytes_max: config::UNREAD_BYTES_MAX,
            uring: UringOptions::default(),
        }
    }
}

pub(crate) struct Group<E: Endpoint> {
    remotes: Vec<Arc<Remote<E>>>,
    backend: Choice,
    balance: Balance,
    spin: Spin,
    turn: AtomicUsize,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl<E: Endpoint> Group<E> {
    /// Starts the threads. All pollers are ready when this returns.
    pub(crate) fn start(plan: &Plan) -> Result<Group<E>> {
        let (asked, options) = config::by_environment(plan.backend, &plan.uring)?;
        options.check()?;
        threads::check_cpus("poller CPUs", &plan.cpus)?;
        threads::check_cpus("SQPOLL CPUs", &plan.sqpoll_cpus)?;
        match asked {
            Choice::Epoll => Group::start_epoll(plan),
            Choice::Uring | Choice::Hybrid => {
                if let (None, reason) = (capabilities().tier, &capabilities().reason) {
                    return Err(Error::unsupported(format!("backend {asked}: {reason}")));
                }
                Group::start_ring(plan, asked, &options)
            }
            Choice::Sqpoll(sqpoll) => {
                if let (false, reason) = (capabilities().sqpoll, &capabilities().sqpoll_reason) {
                    return Err(Error::unsupported(format!("backend {asked}: {reason}")));
                }
                Group::start_sqpoll(plan, sqpoll, &options)
            }
            Choice::Auto if capabilities().tier.is_none() => Group::start_epoll(plan),
            // The probe has passed, so this fails for lack of memory or descriptors. Epoll needs
            // less of both.
            Choice::Auto => Group::start_ring(plan, Choice::Uring, &options).or_else(|error| {
                if error.is_invalid() {
                    return Err(error);
                }
                tracing::warn!(%error, "io_uring: epoll takes over");
                Group::start_epoll(plan)
            }),
        }
    }

    fn start_epoll(plan: &Plan) -> Result<Group<E>> {
        let count = plan.poller_count(plan.cpus_per_poller)?;
        Group::start_on::<Epoll>(plan, Choice::Epoll, count, 0, |_, _| (Outlet::Flusher, ()))
    }

    fn start_ring(plan: &Plan, backend: Choice, options: &UringOptions) -> Result<Group<E>> {
        let count = plan.poller_count(plan.cpus_per_poller)?;
        let uring = options.supported(capabilities());
        Group::start_on::<Uring>(plan, backend, count, 0, |_, _| {
            let outlet = match backend {
                Choice::Hybrid => Outlet::Flusher,
                _ => Outlet::Poller(uring.zero_copy_rule()),
            };
            (outlet, RingOptions { uring: uring.clone(), engine: None })
        })
    }

    fn start_sqpoll(
        plan: &Plan,
        sqpoll: SqpollOptions,
        options: &UringOptions,
    ) -> Result<Group<E>> {
        // These pollers have little work, so each serves many CPUs.
        let count = plan.poller_count(config::CPUS_PER_POLLER)?;
        let cpus = threads::cpu_count(&[]);
        let never_sleeps = plan.poll_mode == PollMode::Always;
        let mut engine = sqpoll.plan(cpus, count, never_sleeps)?;
        engine.cpus = plan.thread_cpus()?;
        let has_quota = cpus < threads::allowed_cpus()?.len();
        if let Some(warning) = engine.warning(cpus, count, has_quota) {
            tracing::warn!("{warning}");
        }
        tracing::info!(preset = %engine.preset, rings = engine.send_rings, "sqpoll");
        let backend = Choice::Sqpoll(sqpoll.preset(engine.preset));
        let uring = options.supported(capabilities());
        let shared = Arc::default();
        let kernel_threads = engine.threads(count);
        Group::start_on::<Uring>(plan, backend, count, kernel_threads, |index, counters| {
            let own = engine.of_poller(index);
            let rings = Arc::new(SendRings::new(&own, counters));
            let engine = Engine::new(own, &rings, &shared);
            (Outlet::Rings(rings), RingOptions { uring: uring.clone(), engine: Some(engine) })
        })
    }

    fn start_on<B: Backend>(
        plan: &Plan,
        backend: Choice,
        count: usize,
        kernel_threads: usize,
        parts: impl Fn(usize, &Arc<Counters>) -> (Outlet, B::Options),
    ) -> Result<Group<E>> {
        // Spinning needs a spare CPU: more CPUs than pollers, polling kernel threads and workers.
        let affordable = threads::cpu_count(&plan.cpus) > count + kernel_threads + plan.workers;
        let spin = Spin::new(plan.poll_mode, affordable);
        let mut group = Group {
            remotes: Vec::with_capacity(count),
            backend,
            balance: plan.balance,
            spin,
            turn: AtomicUsize::new(0),
            threads: Mutex::new(Vec::with_capacity(count)),
        };
        for index in 0..count {
            let wake = Wake::new().map_err(|error| Error::io("eventfd", error))?;
            let counters = Arc::default();
            let (outlet, options) = parts(index, &counters);
            let remote = Arc::new(Remote::new(wake, Pool::new(), outlet, counters));
            let name = format!("{}-p{index}", plan.name);
            let thread = start::<B, E>(&name, plan, &remote, spin, options)?;
            group.remotes.push(remote);
            lock(&group.threads).push(thread);
        }
        Ok(group)
    }

    /// The poller for the next connection.
    pub(crate) fn pick(&self) -> &Arc<Remote<E>> {
        let count = self.remotes.len();
        let index = match self.balance {
            _ if count == 1 => 0,
            Balance::RoundRobin => return self.next(),
            Balance::Random => {
                let turn = self.turn.fetch_add(1, Ordering::Relaxed) as u64;
                random::scramble(random::seed(), turn) as usize % count
            }
            Balance::LeastConnections => {
                let load = |index: &usize| self.remotes[*index].load.load(Ordering::Relaxed);
                (0..count).min_by_key(load).unwrap_or(0)
            }
        };
        &self.remotes[index]
    }

    /// The pollers in turn.
    pub(crate) fn next(&self) -> &Arc<Remote<E>> {
        &self.remotes[self.turn.fetch_add(1, Ordering::Relaxed) % self.remotes.len()]
    }

    pub(crate) fn remotes(&self) -> &[Arc<Remote<E>>] {
        &self.remotes
    }

    /// How a thread that works for these pollers spins.
    pub(crate) fn spin(&self) -> Spin {
        self.spin
    }

    /// The backend that was chosen.
    pub(crate) fn backend(&self) -> Choice {
        self.backend
    }

    pub(crate) fn stats(&self) -> PollerStats {
        let mut stats = PollerStats::default();
        for remote in &self.remotes {
            remote.counters.add_to(&mut stats);
            stats.connections += remote.load.load(Ordering::Relaxed) as u64;
            stats.listeners += remote.listeners.load(Ordering::Relaxed) as u64;
            stats.timers += remote.timer_count() as u64;
            let pool = remote.pool.stats();
            stats.blocks += pool.blocks;
            stats.block_bytes += pool.block_bytes;
            stats.free_block_bytes += pool.free_bytes;
            if let Outlet::Rings(rings) = &remote.outlet {
                let (threads, used) = rings.usage();
                stats.sqpoll_threads += threads;
                stats.sqpoll_cpu_us += used.cpu_us;
                stats.sqpoll_work_us += used.work_us;
            }
        }
        stats
    }

    /// Closes everything. With `join`, waits for the threads to end, but not for the calling
    /// thread.
    pub(crate) fn stop(&self, join: bool) {
        for remote in &self.remotes {
            remote.send(Command::Stop);
        }
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            if join && thread.thread().id() != thread::current().id() {
                // A poller's panic was reported when it happened.
                let _ = thread.join();
            }
        }
    }
}

impl<E: Endpoint> Drop for Group<E> {
    fn drop(&mut self) {
        self.stop(true);
    }
}

fn start<B: Backend, E: Endpoint>(
    name: &str,
    plan: &Plan,
    remote: &Arc<Remote<E>>,
    spin: Spin,
    options: B::Options,
) -> Result<JoinHandle<()>> {
    let (ready, wait) = mpsc::sync_channel::<io::Result<()>>(1);
    let remote = Arc::clone(remote);
    let budget = Budget::new(plan.unread_bytes_max);
    let thread = threads::spawn(name, plan.cpus.clone(), move || {
        let poller = Poller::<B, E>::new(remote, spin, budget, &options);
        let (poller, started) = match poller {
            Ok(poller) => (Some(poller), Ok(())),
            Err(error) => (None, Err(error)),
        };
        // `start` waits for this message.
        let _ = ready.send(started);
        if let Some(poller) = poller {
            poller.run();
        }
    })?;
    match wait.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(Error::io(format_args!("start poller {name}"), error)),
        Err(_) => Err(Error::panicked(format!("poller {name} ended at its start"))),
    }
}

/// See [`crate::capabilities`].
pub(crate) fn capabilities() -> &'static Capabilities {
    static FOUND: OnceLock<Capabilities> = OnceLock::new();
    let mut is_first = false;
    let found = FOUND.get_or_init(|| {
        is_first = true;
        probe_apart()
    });
    if is_first {
        // Not inside: a subscriber may ask for the capabilities as well.
        let (backend, reason) = (found.backend(), &found.reason);
        user_code::log(|| {
            tracing::info!(%backend, tier = ?found.tier, reason, "probed io_uring");
        });
    }
    found
}

/// Probes on a thread of its own. The kernel frees a ring some milliseconds after its close. A
/// system call of the thread that created the ring can fail with EINTR then.
fn probe_apart() -> Capabilities {
    let (tells, told) = mpsc::sync_channel(1);
    let thread = threads::spawn("ringpoll-probe", Vec::new(), move || {
        // The caller waits for this message, so it is there to receive it.
        let _ = tells.send(uring::probe::probe());
    });
    let ended = thread.map(JoinHandle::join);
    match (told.try_recv(), ended) {
        (Ok(found), _) => found,
        (Err(_), Err(error)) => Capabilities::without_rings(error.to_string()),
        (Err(_), Ok(_)) => Capabilities::without_rings("the probe panicked".to_owned()),
    }
}
