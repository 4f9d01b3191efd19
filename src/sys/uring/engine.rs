//! The engine whose kernel threads poll: which rings there are, and on whose threads.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Weak};

use super::polled::{Collector, Lane, Polled, Shape};
use super::ring::Ring;
use super::send_rings::SendRings;
use crate::config::UringOptions;
use crate::config::sqpoll::{Receiver, SEND_COMPLETIONS, SqpollPlan};
use crate::counters::Counters;
use crate::sync::{Mutex, lock};
use crate::sys::Wake;

/// What a backend on io_uring is made from.
#[derive(Clone)]
pub(crate) struct RingOptions {
    pub(crate) uring: UringOptions,
    /// With kernel threads that poll.
    pub(crate) engine: Option<Engine>,
}

/// One poller's part of the engine.
#[derive(Clone)]
pub(crate) struct Engine {
    plan: Arc<SqpollPlan>,
    rings: Arc<SendRings>,
    shared: Arc<SharedThread>,
}

/// A kernel thread for the rings of all pollers: the first ring makes it, the others join.
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

    /// The receive ring; sends go through it as well from now on, where they have no ring of their
    /// own.
    pub(super) fn receive_ring(
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
                        // The thread may be ours, and the ring before have lost completions.
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
            let lane = &self.rings.lanes()[0];
            lane.open(&collector);
            return Ok(Ring::polled(collector, lane));
        }
        Ok(Ring::polled(collector, &Arc::new(Lane::new(counters))))
    }

    /// Opens the send rings. Their completions can wake the poller.
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
            collector.set_bell(wake.as_fd().as_raw_fd())?;
            self.rings.lanes()[index].open(&collector);
            collectors.push(collector);
        }
        Ok(collectors)
    }

    fn with_new_thread(&self, shape: Shape) -> io::Result<Collector> {
        lock(self.rings.threads()).start(shape, self.plan.nice)
    }

    /// Where the poller's kernel thread of that number is to run.
    fn cpu(&self, thread: usize) -> Option<usize> {
        let cpus = &self.plan.cpus;
        (!cpus.is_empty()).then(|| cpus[thread % cpus.len()])
    }
}
