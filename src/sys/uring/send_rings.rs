//! Sends that any thread starts: the rings they go through, and what is in flight there.
//!
//! A connection is pinned to one ring. The flusher makes a [`Flushed`], which owns all that its
//! operation names, the socket included, and pushes it; from then on it belongs to the kernel,
//! whose completion brings it back to the poller. So no descriptor is closed, and no byte freed,
//! while an operation names it, whatever became of the connection.

use std::sync::Arc;

use io_uring::types::Fd;
use std::os::fd::{AsFd, AsRawFd};

use super::in_flight::{Progress, Sending, zero_copy_bytes_min};
use super::kernel_threads::{KernelThreads, ThreadUse};
use super::polled::{Lane, Refused};
use super::ring::Done;
use super::tag::Op;
use crate::buffer::Chain;
use crate::config::sqpoll::SqpollPlan;
use crate::counters::Counters;
use crate::random;
use crate::sync::{Mutex, lock};
use crate::sys::{Socket, Token};

/// One poller's send rings, as everybody who flushes shares them. They lead nowhere until the
/// poller has opened them.
pub(crate) struct SendRings {
    lanes: Box<[Arc<Lane>]>,
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
        let lane = |_| Arc::new(Lane::new(counters));
        SendRings {
            // Without send rings there is one lane: into the receive ring.
            lanes: (0..plan.send_rings.max(1)).map(lane).collect(),
            seed: plan.seed.unwrap_or_else(random::seed),
            zero_copy_bytes_min,
            counters: Arc::clone(counters),
            threads: Mutex::default(),
        }
    }

    /// Takes all of `bytes` and sends it, from any thread, with no system call but for the wake-up
    /// of a kernel thread. `false`: nothing was taken. Nothing else may be in flight for the token;
    /// its poller hears when it is through.
    pub(crate) fn send(&self, token: Token, socket: &Arc<Socket>, bytes: &mut Chain) -> bool {
        self.counters.add(|counters| &counters.sends_in_flight, 1);
        match self.push(Flushed::new(token, socket, bytes.take())) {
            Ok(()) => true,
            Err(flushed) => {
                self.counters.add(|counters| &counters.sends_in_flight, 1u64.wrapping_neg());
                *bytes = flushed.sending.into_rest();
                false
            }
        }
    }

    /// Pushes a send, or what is left of one.
    pub(super) fn push(&self, mut flushed: Box<Flushed>) -> Result<(), Box<Flushed>> {
        let lane = self.lane(flushed.token);
        let fd = Fd(flushed.socket.as_fd().as_raw_fd());
        let user_data = flushed.user_data();
        let bytes_min = zero_copy_bytes_min(self.zero_copy_bytes_min, &flushed.socket);
        let sqe = flushed.sending.prepare(fd, user_data, bytes_min);
        let record = Box::into_raw(flushed);
        // SAFETY: the operation names memory that the record owns. It is nobody's until the
        // operation's last completion, from which `reclaim` takes it.
        match unsafe { lane.push_send(&sqe) } {
            Ok(()) => {
                self.counters.add(|counters| &counters.ring_submissions, 1);
                Ok(())
            }
            Err(refused) => {
                if refused == Refused::Full {
                    self.counters.add(|counters| &counters.full_send_rings, 1);
                }
                // SAFETY: made by `into_raw` above, and not pushed.
                Err(unsafe { Box::from_raw(record) })
            }
        }
    }

    /// What the kernel threads have used; how many there are.
    pub(crate) fn usage(&self) -> (u64, ThreadUse) {
        lock(&self.threads).usage()
    }

    pub(super) fn threads(&self) -> &Mutex<KernelThreads> {
        &self.threads
    }

    pub(super) fn lanes(&self) -> &[Arc<Lane>] {
        &self.lanes
    }

    /// Which of the lanes the token is pinned to.
    pub(super) fn index(&self, token: Token) -> usize {
        (random::scramble(self.seed, token.bits()) % self.lanes.len() as u64) as usize
    }

    fn lane(&self, token: Token) -> &Lane {
        &self.lanes[self.index(token)]
    }
}

/// A send that is with the kernel, or about to be.
pub(super) struct Flushed {
    pub(super) token: Token,
    socket: Arc<Socket>,
    pub(super) sending: Sending,
}

impl Flushed {
    pub(super) fn new(token: Token, socket: &Arc<Socket>, bytes: Chain) -> Box<Flushed> {
        let mut sending = Sending::new();
        sending.begin(bytes);
        Box::new(Flushed { token, socket: Arc::clone(socket), sending })
    }

    /// Takes one completion of its operation.
    pub(super) fn complete(&mut self, done: Done, counters: &Counters) -> Progress {
        self.sending.complete(done, &self.socket, counters)
    }

    /// Where the record is, and that it is one.
    fn user_data(&self) -> u64 {
        let address = std::ptr::from_ref(self).expose_provenance() as u64;
        debug_assert_eq!(address & !ADDRESS_MASK, 0, "user addresses have 56 bits at most");
        (Op::Flush as u64) << 56 | address
    }
}

/// The record that a completion is of.
///
/// # Safety
/// A completion of `Op::Flush` brought `user_data`, and each is reclaimed once; where others follow
/// it, the box is made raw again.
pub(super) unsafe fn reclaim(user_data: u64) -> Box<Flushed> {
    let record = std::ptr::with_exposed_provenance_mut((user_data & ADDRESS_MASK) as usize);
    // SAFETY: `push` made it raw, and its operation, which was the only one to know it, brings it
    // back.
    unsafe { Box::from_raw(record) }
}

const ADDRESS_MASK: u64 = (1 << 56) - 1;
