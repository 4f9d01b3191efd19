//! Poller groups as users hold them.

use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::config::{Backend, Balance, Capabilities, PollMode, UringOptions};
use crate::connection::{Remote, Shared, current_poller};
use crate::counters::PollerStats;
use crate::error::{Error, Result};
use crate::poller::group::{Group, Plan};

/// A group of poller threads. Clones are the same group; when the last one is dropped, its
/// connections are closed and its threads end.
#[derive(Clone)]
pub struct Pollers(Arc<Group<Shared>>);

/// Says what a group of pollers is to be; made by [`Pollers::builder`].
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct PollersBuilder {
    plan: Plan,
}

impl Pollers {
    /// One poller for each CPU, unless told otherwise.
    pub fn builder() -> PollersBuilder {
        PollersBuilder::default()
    }

    /// The group of connections that were not given one: a single poller, started by the first of
    /// them.
    pub(crate) fn shared() -> Result<Pollers> {
        static SHARED: OnceLock<Pollers> = OnceLock::new();
        if let Some(pollers) = SHARED.get() {
            return Ok(pollers.clone());
        }
        let started = Pollers::builder().count(1).name("ringpoll-c").build()?;
        Ok(SHARED.get_or_init(|| started).clone())
    }

    /// What the pollers did and hold, summed.
    pub fn stats(&self) -> PollerStats {
        self.0.stats()
    }

    /// How many threads.
    pub fn count(&self) -> usize {
        self.0.remotes().len()
    }

    /// The backend that was chosen.
    pub fn backend(&self) -> Backend {
        self.0.backend()
    }

    /// Closes every connection and listener and ends the threads; handlers see their connections
    /// closed.
    ///
    /// # Errors
    /// Unsupported on one of these pollers: it cannot wait for itself.
    pub fn shutdown(&self) -> Result<()> {
        if current_poller()
            .is_some_and(|here| self.0.remotes().iter().any(|own| Arc::ptr_eq(own, &here)))
        {
            return Err(Error::unsupported(
                "shutdown: called on a poller, which cannot wait for itself",
            ));
        }
        self.0.stop(true);
        Ok(())
    }

    pub(crate) fn start(plan: &Plan) -> Result<Pollers> {
        Ok(Pollers(Arc::new(Group::start(plan)?)))
    }

    /// Ends the threads; see [`Group::stop`].
    pub(crate) fn stop(&self, join: bool) {
        self.0.stop(join);
    }

    pub(crate) fn pick(&self) -> &Arc<Remote> {
        self.0.pick()
    }

    pub(crate) fn remotes(&self) -> &[Arc<Remote>] {
        self.0.remotes()
    }
}

impl PollersBuilder {
    /// Who talks to the kernel.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.plan.backend = backend;
        self
    }

    /// How many threads; 0 is one for each CPU, or, with kernel threads that poll, for 20 CPUs.
    pub fn count(mut self, count: usize) -> Self {
        self.plan.count = count;
        self
    }

    /// How connections spread.
    pub fn balance(mut self, balance: Balance) -> Self {
        self.plan.balance = balance;
        self
    }

    /// Whether pollers spin before they sleep.
    pub fn poll_mode(mut self, poll_mode: PollMode) -> Self {
        self.plan.poll_mode = poll_mode;
        self
    }

    /// The CPUs the threads may run on; empty is all.
    pub fn cpus(mut self, cpus: Vec<usize>) -> Self {
        self.plan.cpus = cpus;
        self
    }

    /// The CPUs that the kernel threads of [`Backend::Sqpoll`] run on, one each, in turn; empty is
    /// those this process may use.
    pub fn sqpoll_cpus(mut self, cpus: Vec<usize>) -> Self {
        self.plan.sqpoll_cpus = cpus;
        self
    }

    /// What the threads are called; a number is added, and the kernel shows 15 bytes.
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.plan.name);
        self
    }

    /// Received bytes that may lie unread at each poller: 1 GiB unless told otherwise. While there
    /// are more, a connection that holds more than an equal share is paused; a read that can then
    /// never be satisfied fails with a limit error. Memory that the application keeps does not
    /// count.
    pub fn unread_bytes_max(mut self, bytes: usize) -> Self {
        self.plan.unread_bytes_max = bytes;
        self
    }

    /// Settings of the io_uring backends; the others have none.
    pub fn uring(mut self, options: UringOptions) -> Self {
        self.plan.uring = options;
        self
    }

    /// Starts the threads.
    ///
    /// # Errors
    /// Invalid CPUs, count or settings; unsupported, for a backend that this host does not offer;
    /// the kernel's, for lack of descriptors or threads.
    pub fn build(self) -> Result<Pollers> {
        Pollers::start(&self.plan)
    }
}

impl fmt::Debug for Pollers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pollers")
            .field("backend", &self.backend())
            .field("count", &self.count())
            .finish()
    }
}

/// What this host offers. Probed once per process, on the first call or the first start of a
/// poller, by a thread that has ended when this returns; see [`Capabilities::reason`].
pub fn capabilities() -> &'static Capabilities {
    crate::poller::group::capabilities()
}
