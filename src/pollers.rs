//! The public type of poller groups.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, OnceLock};

use crate::config::{Backend, Balance, Capabilities, PollMode, UringOptions};
use crate::connection::{Core, Remote, current_poller};
use crate::counters::PollerStats;
use crate::error::{Error, Result};
use crate::poller::group::{Group, Plan};
use crate::spin::Spin;

/// A group of poller threads. Clones are the same group. When the last clone is dropped, the
/// connections are closed and the threads end.
#[derive(Clone)]
pub struct Pollers(Arc<Group<Core>>);

/// The settings of a group of pollers; made by [`Pollers::builder`].
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct PollersBuilder {
    plan: Plan,
}

impl Pollers {
    /// A builder with default settings: one poller for each CPU.
    pub fn builder() -> PollersBuilder {
        PollersBuilder::default()
    }

    /// The group of all connections that have no group of their own. It has one poller, which is
    /// started by the first such connection.
    pub(crate) fn shared() -> Result<Pollers> {
        static SHARED: OnceLock<Pollers> = OnceLock::new();
        if let Some(pollers) = SHARED.get() {
            return Ok(pollers.clone());
        }
        let started = Pollers::builder().count(1).name("ringpoll-c").build()?;
        Ok(SHARED.get_or_init(|| started).clone())
    }

    /// Runs `future` as a task on one of the pollers, which take turns. So a program whose work is
    /// calls and connections needs no other executor.
    ///
    /// The task shares the thread with the poller's connections: while it computes or blocks, they
    /// wait. See [`unblock`](crate::unblock). A panic ends the task alone. If the group ends, or
    /// has ended, `future` is dropped. A task that owns a clone of its group keeps the group alive
    /// until the task ends, or [`shutdown`](Self::shutdown) is called. No context of tokio is
    /// entered.
    ///
    /// ```
    /// use std::sync::mpsc;
    /// use std::time::Duration;
    ///
    /// let pollers = ringpoll::Pollers::builder().count(1).build()?;
    /// let (sender, receiver) = mpsc::channel();
    /// pollers.spawn(async move {
    ///     let _ = sender.send(std::thread::current().name().map(str::to_owned));
    /// });
    /// let name = receiver.recv_timeout(Duration::from_secs(10)).expect("the task runs");
    /// assert_eq!(name.as_deref(), Some("ringpoll-p0"));
    /// # Ok::<(), ringpoll::Error>(())
    /// ```
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.0.next().spawn(future);
    }

    /// The sums of the counts of all pollers.
    pub fn stats(&self) -> PollerStats {
        self.0.stats()
    }

    /// The number of threads.
    pub fn count(&self) -> usize {
        self.0.remotes().len()
    }

    /// The backend in use.
    pub fn backend(&self) -> Backend {
        self.0.backend()
    }

    /// Closes all connections and listeners and ends the threads. Handlers see their connections
    /// as closed.
    ///
    /// # Errors
    /// Unsupported on one of these pollers, because the thread would wait for itself.
    pub fn shutdown(&self) -> Result<()> {
        if current_poller()
            .is_some_and(|current| self.0.remotes().iter().any(|own| Arc::ptr_eq(own, &current)))
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

    /// How workers of these pollers spin.
    pub(crate) fn spin(&self) -> Spin {
        self.0.spin()
    }

    pub(crate) fn remotes(&self) -> &[Arc<Remote>] {
        self.0.remotes()
    }
}

impl PollersBuilder {
    /// The kernel interface of the pollers.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.plan.backend = backend;
        self
    }

    /// The number of threads. With 0, there is one for each CPU or, with kernel threads that poll,
    /// one for 20 CPUs.
    pub fn count(mut self, count: usize) -> Self {
        self.plan.count = count;
        self
    }

    /// How connections are distributed over the pollers.
    pub fn balance(mut self, balance: Balance) -> Self {
        self.plan.balance = balance;
        self
    }

    /// Whether pollers spin before they sleep.
    pub fn poll_mode(mut self, poll_mode: PollMode) -> Self {
        self.plan.poll_mode = poll_mode;
        self
    }

    /// The CPUs that the threads may run on. Empty means all CPUs.
    pub fn cpus(mut self, cpus: Vec<usize>) -> Self {
        self.plan.cpus = cpus;
        self
    }

    /// The CPUs of the kernel threads of [`Backend::Sqpoll`]. The first thread runs on the first
    /// CPU of the list, and so on, from the start again after the last CPU. Empty means all CPUs
    /// that this process may use.
    pub fn sqpoll_cpus(mut self, cpus: Vec<usize>) -> Self {
        self.plan.sqpoll_cpus = cpus;
        self
    }

    /// The name of the threads. A number is appended. The kernel shows the first 15 bytes.
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.plan.name);
        self
    }

    /// The budget of received, unread bytes for each poller; 1 GiB by default. While a poller
    /// exceeds it, each connection above an equal share is paused; a read that the pause would keep
    /// from ever completing fails with a limit error. Memory that the application keeps does not
    /// count.
    pub fn unread_bytes_max(mut self, bytes: usize) -> Self {
        self.plan.unread_bytes_max = bytes;
        self
    }

    /// Settings of the io_uring backends. The epoll backend ignores them.
    pub fn uring(mut self, options: UringOptions) -> Self {
        self.plan.uring = options;
        self
    }

    /// Starts the threads.
    ///
    /// # Errors
    /// Invalid CPUs, count or settings; unsupported, for a backend that this host does not offer;
    /// an error of the kernel, for lack of descriptors or threads.
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

/// The io_uring features of this host. A thread probes them once for the process, on the first call
/// or at the first start of a poller; it has ended when this returns. See [`Capabilities::reason`].
pub fn capabilities() -> &'static Capabilities {
    crate::poller::group::capabilities()
}
