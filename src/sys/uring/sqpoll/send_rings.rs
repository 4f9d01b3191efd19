//! Sends that any thread may start: the queues for them.
//!
//! A connection always uses the same queue. A thread makes a [`SendRecord`], which owns everything
//! that its operation names, and pushes the operation. A completion brings the record to the
//! poller.

use std::sync::Arc;

use super::kernel_threads::{KernelThreads, ThreadUse};
use super::polled::{Refused, SharedQueue};
use crate::buffer::Chain;
use crate::config::ZeroCopyRule;
use crate::config::sqpoll::SqpollPlan;
use crate::counters::Counters;
use crate::random;
use crate::sync::{Mutex, lock};
use crate::sys::uring::send_record::SendRecord;
use crate::sys::{Socket, Token};

/// The queues for sends of one poller. They refuse every send until the poller opens them.
pub(crate) struct SendRings {
    queues: Box<[Arc<SharedQueue>]>,
    seed: u64,
    counters: Arc<Counters>,
    threads: Mutex<KernelThreads>,
}

impl SendRings {
    pub(crate) fn new(plan: &SqpollPlan, counters: &Arc<Counters>) -> SendRings {
        let queue = |_| Arc::new(SharedQueue::new(counters));
        SendRings {
            // Without send rings, there is one queue: that of the receive ring.
            queues: (0..plan.send_rings.max(1)).map(queue).collect(),
            seed: plan.seed.unwrap_or_else(random::seed),
            counters: Arc::clone(counters),
            threads: Mutex::default(),
        }
    }

    /// Takes all of `bytes` and starts to send them, on any thread. Makes no system call but the
    /// wake-up of a kernel thread. `false`: the queue took nothing. The token must have no other
    /// send in flight. The poller gets the completion.
    pub(crate) fn send(&self, token: Token, socket: &Arc<Socket>, bytes: &mut Chain) -> bool {
        self.counters.add(|counters| &counters.sends_in_flight, 1);
        match self.push(SendRecord::new(token, socket, bytes.take())) {
            Ok(()) => true,
            Err(send) => {
                self.counters.add(|counters| &counters.sends_in_flight, 1u64.wrapping_neg());
                *bytes = send.into_rest();
                false
            }
        }
    }

    /// Pushes the next operation of a send.
    pub(super) fn push(&self, send: Box<SendRecord>) -> Result<(), Box<SendRecord>> {
        let queue = &self.queues[self.index(send.token())];
        let (sqe, record) = send.into_operation(ZeroCopyRule::NEVER, &self.counters);
        // SAFETY: `sqe` names memory that the record owns. Nothing uses the record until
        // `send_record::complete` takes it from a completion of the operation.
        match unsafe { queue.push_send(&sqe) } {
            Ok(()) => {
                self.counters.add(|counters| &counters.ring_submissions, 1);
                Ok(())
            }
            Err(refused) => {
                if refused == Refused::Full {
                    self.counters.add(|counters| &counters.full_send_rings, 1);
                }
                // SAFETY: `into_operation` made the box raw, and the kernel does not know it.
                Err(unsafe { Box::from_raw(record) })
            }
        }
    }

    /// How many kernel threads there are, and the CPU time that they have used.
    pub(crate) fn usage(&self) -> (u64, ThreadUse) {
        lock(&self.threads).usage()
    }

    pub(super) fn threads(&self) -> &Mutex<KernelThreads> {
        &self.threads
    }

    pub(super) fn queues(&self) -> &[Arc<SharedQueue>] {
        &self.queues
    }

    /// The index of the queue that the token always uses.
    pub(in crate::sys::uring) fn index(&self, token: Token) -> usize {
        (random::scramble(self.seed, token.bits()) % self.queues.len() as u64) as usize
    }
}
