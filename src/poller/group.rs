//! Several pollers: their threads, which one gets a connection, and the one place that knows all
//! backends.

use std::io;
use std::sync::{OnceLock, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::spin::Spin;
use super::{Command, Endpoint, Poller, Remote};
use crate::buffer::Pool;
use crate::config::{self, Backend as Choice, Balance, Capabilities, PollMode, UringOptions};
use crate::counters::PollerStats;
use crate::error::{Error, Result};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, lock};
use crate::sys::epoll::Epoll;
use crate::sys::uring::{self, Uring};
use crate::sys::{Backend, Outlet, Wake};
use crate::threads;

/// What a group is made from.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) backend: Choice,
    /// 0 is one for each CPU.
    pub(crate) count: usize,
    pub(crate) balance: Balance,
    pub(crate) poll_mode: PollMode,
    pub(crate) cpus: Vec<usize>,
    pub(crate) name: String,
    pub(crate) uring: UringOptions,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan {
            backend: Choice::Auto,
            count: 0,
            balance: Balance::RoundRobin,
            poll_mode: PollMode::Adaptive,
            cpus: Vec::new(),
            name: "ringpoll".to_owned(),
            uring: UringOptions::default(),
        }
    }
}

pub(crate) struct Group<E: Endpoint> {
    remotes: Vec<Arc<Remote<E>>>,
    backend: Choice,
    balance: Balance,
    turn: AtomicUsize,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl<E: Endpoint> Group<E> {
    /// Starts the threads; all are ready when this returns.
    pub(crate) fn start(plan: &Plan) -> Result<Group<E>> {
        let (asked, options) = config::by_environment(plan.backend, &plan.uring)?;
        options.check()?;
        match asked {
            Choice::Epoll => Group::start_on::<Epoll>(plan, asked, Outlet::Flusher, &()),
            Choice::Uring | Choice::Hybrid => {
                if let (None, reason) = (capabilities().tier, &capabilities().reason) {
                    return Err(Error::unsupported(format!("backend {asked}: {reason}")));
                }
                Group::start_ring(plan, asked, &options)
            }
            Choice::Auto if capabilities().tier.is_none() => {
                Group::start_on::<Epoll>(plan, Choice::Epoll, Outlet::Flusher, &())
            }
            // The probe has passed; what fails now is for lack of memory or descriptors, of which
            // epoll needs less.
            Choice::Auto => Group::start_ring(plan, Choice::Uring, &options).or_else(|error| {
                if error.is_invalid() {
                    return Err(error);
                }
                tracing::warn!(%error, "io_uring: epoll takes over");
                Group::start_on::<Epoll>(plan, Choice::Epoll, Outlet::Flusher, &())
            }),
        }
    }

    fn start_ring(plan: &Plan, backend: Choice, options: &UringOptions) -> Result<Group<E>> {
        let outlet = if backend == Choice::Hybrid { Outlet::Flusher } else { Outlet::Poller };
        Group::start_on::<Uring>(plan, backend, outlet, &options.supported(capabilities()))
    }

    fn start_on<B: Backend>(
        plan: &Plan,
        backend: Choice,
        outlet: Outlet,
        options: &B::Options,
    ) -> Result<Group<E>> {
        let count = if plan.count == 0 { threads::cpu_count(&plan.cpus) } else { plan.count };
        if count > config::THREADS_MAX {
            return Err(Error::invalid(format!(
                "pollers: {count} are more than {}",
                config::THREADS_MAX
            )));
        }
        let mut group = Group {
            remotes: Vec::with_capacity(count),
            backend,
            balance: plan.balance,
            turn: AtomicUsize::new(0),
            threads: Mutex::new(Vec::with_capacity(count)),
        };
        // Spinning takes a CPU that nobody else needs: one more than there are pollers.
        let affordable = threads::cpu_count(&plan.cpus) > count;
        for index in 0..count {
            let wake = Wake::new().map_err(|error| Error::io("eventfd", error))?;
            let remote = Arc::new(Remote::new(wake, Pool::new(), outlet));
            let spin = Spin::new(plan.poll_mode, affordable);
            let name = format!("{}-p{index}", plan.name);
            let thread = start::<B, E>(&name, &plan.cpus, &remote, spin, options)?;
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
            Balance::RoundRobin => self.turn.fetch_add(1, Ordering::Relaxed) % count,
            Balance::Random => scramble(self.turn.fetch_add(1, Ordering::Relaxed)) % count,
            Balance::LeastConnections => {
                let load = |index: &usize| self.remotes[*index].load.load(Ordering::Relaxed);
                (0..count).min_by_key(load).unwrap_or(0)
            }
        };
        &self.remotes[index]
    }

    pub(crate) fn remotes(&self) -> &[Arc<Remote<E>>] {
        &self.remotes
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
            stats.timers += remote.timers.load(Ordering::Relaxed) as u64;
            let pool = remote.pool.stats();
            stats.blocks += pool.blocks;
            stats.block_bytes += pool.block_bytes;
        }
        stats
    }

    /// Closes everything; joins the threads, if `join`, but for the one this is called on.
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
    cpus: &[usize],
    remote: &Arc<Remote<E>>,
    spin: Spin,
    options: &B::Options,
) -> Result<JoinHandle<()>> {
    let (ready, wait) = mpsc::sync_channel::<io::Result<()>>(1);
    let remote = Arc::clone(remote);
    let options = options.clone();
    let thread = threads::spawn(name, cpus.to_vec(), move || {
        let poller = Poller::<B, E>::new(remote, spin, &options);
        let (poller, started) = match poller {
            Ok(poller) => (Some(poller), Ok(())),
            Err(error) => (None, Err(error)),
        };
        // The starter waits for it.
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

/// Spreads consecutive numbers over all of them (the finaliser of SplitMix64), seeded by the clock
/// of the first use.
fn scramble(turn: usize) -> usize {
    static SEED: OnceLock<u64> = OnceLock::new();
    let seed = SEED.get_or_init(|| {
        let start = Instant::now();
        std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), start)
    });
    let mut z = seed.wrapping_add((turn as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z ^ (z >> 31)) as usize
}

/// See [`crate::capabilities`].
pub(crate) fn capabilities() -> &'static Capabilities {
    static FOUND: OnceLock<Capabilities> = OnceLock::new();
    FOUND.get_or_init(uring::probe::probe)
}
