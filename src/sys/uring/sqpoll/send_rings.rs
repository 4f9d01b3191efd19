//! Sends that any thread may start: the queues for them, and the record of a send.
//!
//! A connection always uses the same queue. A thread makes a [`SharedSend`], which owns everything
//! that its operation names: bytes, addresses and socket. Then the thread pushes the operation.
//! From then on the kernel has the record, and a completion brings the record to the poller. So no
//! descriptor is closed and no byte is freed while an operation names it, even when the connection
//! is gone.

use std::sync::Arc;

use super::kernel_threads::{KernelThreads, ThreadUse};
use super::polled::{Refused, SharedQueue};
use crate::buffer::Chain;
use crate::config::sqpoll::SqpollPlan;
use crate::counters::Counters;
use crate::random;
use crate::sync::{Mutex, lock};
use crate::sys::uring::ring::Cqe;
use crate::sys::uring::sending::{Progress, Sending};
use crate::sys::uring::tag::{self, Op};
use crate::sys::{Socket, Token};

/// The queues for sends of one poller. They refuse every send until the poller opens them.
pub(crate) struct SendRings {
    queues: Box<[Arc<SharedQueue>]>,
    seed: u64,
    zero_copy_bytes_min: Option<usize>,
    counters: Arc<Counters>,
    threads: Mutex<KernelThreads>,
}

impl SendRings {
    pub(crate) fn new(
        plan: &SqpollPlan,
        zero_copy_bytes_min: Option<usize>,
        counters: &Arc<Counters>,
    ) -> SendRings {
        let queue = |_| Arc::new(SharedQueue::new(counters));
        SendRings {
            // Without send rings, there is one queue: that of the receive ring.
            queues: (0..plan.send_rings.max(1)).map(queue).collect(),
            seed: plan.seed.unwrap_or_else(random::seed),
            zero_copy_bytes_min,
            counters: Arc::clone(counters),
            threads: Mutex::default(),
        }
    }

    /// Takes all of `bytes` and starts to send them, on any thread. Makes no system call but the
    /// wake-up of a kernel thread. `false`: the queue took nothing. The token must have no other
    /// send in flight. The poller gets the completion.
    pub(crate) fn send(&self, token: Token, socket: &Arc<Socket>, bytes: &mut Chain) -> bool {
        self.counters.add(|counters| &counters.sends_in_flight, 1);
        match self.push(SharedSend::new(token, socket, bytes.take())) {
            Ok(()) => true,
            Err(send) => {
                self.counters.add(|counters| &counters.sends_in_flight, 1u64.wrapping_neg());
                *bytes = send.sending.into_rest();
                false
            }
        }
    }

    /// Pushes the next operation of a send.
    pub(super) fn push(&self, mut send: Box<SharedSend>) -> Result<(), Box<SharedSend>> {
        let queue = &self.queues[self.index(send.token)];
        let user_data = send.user_data();
        let sqe = send.sending.prepare(&send.socket, user_data, self.zero_copy_bytes_min);
        let record = Box::into_raw(send);
        // SAFETY: `sqe` names memory that the record owns. Nothing uses the record until `reclaim`
        // takes it from a completion of the operation.
        match unsafe { queue.push_send(&sqe) } {
            Ok(()) => {
                self.counters.add(|counters| &counters.ring_submissions, 1);
                Ok(())
            }
            Err(refused) => {
                if refused == Refused::Full {
                    self.counters.add(|counters| &counters.full_send_rings, 1);
                }
                // SAFETY: `into_raw` made the pointer above, and the kernel does not know it.
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

/// The record of a send: in flight, or about to be pushed.
pub(in crate::sys::uring) struct SharedSend {
    pub(super) token: Token,
    socket: Arc<Socket>,
    sending: Sending,
}

impl SharedSend {
    pub(super) fn new(token: Token, socket: &Arc<Socket>, bytes: Chain) -> Box<SharedSend> {
        Box::new(SharedSend { token, socket: Arc::clone(socket), sending: Sending::new(bytes) })
    }

    /// Takes one completion of the operation.
    pub(super) fn complete(&mut self, cqe: Cqe, counters: &Counters) -> Progress {
        self.sending.complete(cqe, &self.socket, counters)
    }

    /// User data with the address of the record. An address of user space has at most 56 bits.
    fn user_data(&self) -> u64 {
        Op::SharedSend.with_payload(std::ptr::from_ref(self).expose_provenance() as u64)
    }
}

/// The record of the send that a completion names.
///
/// # Safety
/// A completion of an [`Op::SharedSend`] has `user_data`. The caller calls this once for each
/// completion. Before a further completion of the same operation, the caller makes the box raw
/// again.
pub(in crate::sys::uring) unsafe fn reclaim(user_data: u64) -> Box<SharedSend> {
    let record = std::ptr::with_exposed_provenance_mut(tag::payload(user_data) as usize);
    // SAFETY: `push` made the box raw and gave its address only to the operation that completed.
    unsafe { Box::from_raw(record) }
}
