//! The engine of `sqpoll`: which rings each poller has, and which kernel threads poll them.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Weak};

use super::polled::{Collector, Polled, Shape, SharedQueue};
use super::send_rings::SendRings;
use crate::config::UringOptions;
use crate::config::sqpoll::{Receiver, SEND_COMPLETIONS, SqpollPlan};
use crate::counters::Counters;
use crate::sync::{Mutex, lock};
use crate::sys::Wake;
use crate::sys::uring::ring::Ring;
use crate::user_code;

/// The engine, as one poller sees it.
#[derive(Clone)]
pub(crate) struct Engine {
    plan: Arc<SqpollPlan>,
    rings: Arc<SendRings>,
    shared: Arc<SharedThread>,
}

/// The last ring on the kernel thread that polls the rings of all pollers. The first ring makes the
/// thread, and the next rings attach to it.
#[derive(Default)]
pub(crate) struct SharedThread(Mutex<Weak<Polled>>);

impl Engine {
    pub(crate) fn new(
        plan: SqpollPlan,
        rings: &Arc<SendRings>,
        shared: &Arc<SharedThread>,
    ) -> Engine {
        Engine { plan: Arc::new(plan), rings: Arc::clone(rings), shared: Arc::clone(shared) }
    }

    pub(super) fn rings(&self) -> &Arc<SendRings> {
        &self.rings
    }

    /// Makes the receive ring. Opens its queue for sends where there are no send rings.
    pub(in crate::sys::uring) fn receive_ring(
        &self,
        options: &UringOptions,
        counters: &Arc<Counters>,
    ) -> io::Result<Ring> {
        let plan = &self.plan;
        let takes_sends = plan.send_rings == 0;
        let sends = if takes_sends { plan.send_entries } else { 0 };
        let submissions = options.submission_entries.max(sends);
        let completions = options.completion_entries;
        let shape = Shape { submissions, completions, idle_ms: plan.idle_ms, cpu: self.cpu(0) };
        let collector = match plan.receiver {
            Receiver::Poller => return Ring::new(options),
            Receiver::OwnThread => self.with_new_thread(shape)?,
            Receiver::SharedThread => {
                let mut shared = lock(&self.shared.0);
                let collector = match shared.upgrade() {
                    Some(other) => {
                        let collector = Polled::create(shape, Some(&other))?;
                        // This poller may have made the thread, with a ring that was replaced.
                        lock(self.rings.threads()).follow(&collector);
                        collector
                    }
                    None => self.with_new_thread(shape)?,
                };
                *shared = Arc::downgrade(collector.ring());
                collector
            }
        };
        if takes_sends {
            let queue = &self.rings.queues()[0];
            queue.open(&collector);
            return Ok(Ring::polled(collector, queue));
        }
        Ok(Ring::polled(collector, &Arc::new(SharedQueue::new(counters))))
    }

    /// Makes the send rings, and opens their queues. Their completions can wake the poller.
    pub(super) fn open_send_rings(
        &self,
        receive: &Ring,
        wake: &Wake,
    ) -> io::Result<Vec<Collector>> {
        let plan = &self.plan;
        let threads = usize::from(plan.send_threads);
        let receivers = usize::from(plan.receiver == Receiver::OwnThread);
        let mut collectors: Vec<Collector> = Vec::with_capacity(plan.send_rings.into());
        for index in 0..usize::from(plan.send_rings) {
            let shape = Shape {
                submissions: plan.send_entries,
                completions: SEND_COMPLETIONS.max(plan.send_entries),
                idle_ms: plan.idle_ms,
                cpu: self.cpu(receivers + index),
            };
            let shared = receive.collector().filter(|_| threads == 0);
            let collector = match (shared, index) {
                (Some(receiver), _) => Polled::create(shape, Some(receiver.ring()))?,
                (None, index) if index < threads => self.with_new_thread(shape)?,
                (None, index) => Polled::create(shape, Some(collectors[index % threads].ring()))?,
            };
            collector.register_wake(wake.as_fd().as_raw_fd())?;
            self.rings.queues()[index].open(&collector);
            collectors.push(collector);
        }
        Ok(collectors)
    }

    fn with_new_thread(&self, shape: Shape) -> io::Result<Collector> {
        lock(self.rings.threads()).start(shape, self.plan.nice)
    }

    /// Logs that a kernel thread could not be given its niceness. A subscriber is code of the user,
    /// so the caller holds no lock.
    pub(in crate::sys::uring) fn tell_unranked(&self) {
        let unranked = lock(self.rings.threads()).take_unranked();
        if let (Some(error), Some(nice)) = (unranked, self.plan.nice) {
            user_code::log(|| {
                tracing::warn!(%error, nice, "a kernel thread that polls keeps its niceness");
            });
        }
    }

    /// The CPU of the poller's kernel thread of that number. `None`: any CPU.
    fn cpu(&self, thread: usize) -> Option<usize> {
        let cpus = &self.plan.cpus;
        (!cpus.is_empty()).then(|| cpus[thread % cpus.len()])
    }
}
