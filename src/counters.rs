//! Counts of pollers: system calls, bytes, connections. Each call site counts its own calls.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// The counts of one poller. Any thread may read them.
        #[derive(Default)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: Count,)+
        }

        /// The counts of a group of pollers, summed.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct PollerStats {
            /// Connections the pollers hold now.
            pub connections: u64,
            /// Listeners the pollers hold now.
            pub listeners: u64,
            /// Timers armed now.
            pub timers: u64,
            /// Blocks of buffer memory in use now: by pollers, connections, or slices of the user.
            pub blocks: u64,
            /// Bytes of those blocks.
            pub block_bytes: u64,
            /// Bytes of free blocks that the pollers keep for the next messages. While a poller has
            /// no traffic, it frees those of 32 KiB and more within a few seconds.
            pub free_block_bytes: u64,
            /// Kernel threads that poll the rings now.
            pub sqpoll_threads: u64,
            /// CPU time of these kernel threads, in microseconds. It counts as CPU time of the
            /// process.
            pub sqpoll_cpu_us: u64,
            /// The part of `sqpoll_cpu_us` in which the threads processed requests, in
            /// microseconds. During the rest they polled without finding any.
            pub sqpoll_work_us: u64,
            $($(#[$doc])* pub $name: u64,)+
        }

        impl Counters {
            pub(crate) fn add_to(&self, stats: &mut PollerStats) {
                $(stats.$name += self.$name.read();)+
            }
        }
    };
}

thread_local! {
    /// The address of the counters that this thread owns, if it is a poller.
    static OWNED: Cell<usize> = const { Cell::new(0) };
}

impl Counters {
    /// Makes the calling thread, a poller, the owner of these counters.
    pub(crate) fn own(&self) {
        OWNED.set(ptr::from_ref(self).addr());
    }

    /// Adds to one of the counts from any thread.
    #[inline]
    pub(crate) fn add(&self, count: impl FnOnce(&Counters) -> &Count, amount: u64) {
        let count = count(self);
        if OWNED.get() == ptr::from_ref(self).addr() {
            count.add_owned(amount);
        } else {
            count.by_others.fetch_add(amount, Ordering::Relaxed);
        }
    }
}

counters! {
    /// Calls that wait for events, or check for them. With io_uring they also submit operations.
    wait_calls,
    /// Receive calls of the poller, including those that found no bytes.
    receive_calls,
    /// Receive calls that readers made, into the memory of their users.
    direct_receives,
    /// Bytes received.
    received_bytes,
    /// Runs of handlers that were begun, or queued for a worker or a runtime.
    handler_runs,
    /// Send calls, on all threads.
    send_calls,
    /// Bytes that the kernel has accepted for sending.
    sent_bytes,
    /// Sends that are not complete now.
    sends_in_flight,
    /// Calls that only submit operations, because the submission queue was full.
    submit_calls,
    /// Accept calls, including those that found no connection.
    accept_calls,
    /// Calls that change which events are watched.
    control_calls,
    /// Wake-ups of a sleeping poller.
    wake_calls,
    /// Wake-ups of a sleeping kernel thread, on all threads.
    sqpoll_wake_calls,
    /// Calls that occur once for a connection or ring: connect, shutdown, register.
    setup_calls,
    /// Connections accepted.
    accepts,
    /// Runs of handlers that workers took from a blocked poller.
    moved_runs,
    /// Completions taken from a ring.
    ring_completions,
    /// Operations submitted to a ring.
    ring_submissions,
    /// How often a connection had to wait for a free receive buffer.
    starvations,
    /// Time that connections waited for a free receive buffer, in nanoseconds, summed.
    starved_ns,
    /// Multishot operations that were armed again after the kernel had ended them.
    rearms,
    /// Receives whose bytes stayed in the buffer of the receive. Other receives were copied.
    lent_receives,
    /// How often a connection changed between small and large receive buffers.
    buffer_moves,
    /// Flushes that waited because another thread had locked their send ring.
    send_contentions,
    /// Flushes that found their send ring full. They sent on their own thread, or the poller
    /// waited.
    full_send_rings,
    /// Zero-copy sends that have ended, with and without a copy by the kernel.
    zero_copy_sends,
    /// Of these, the sends whose bytes the kernel has reported as copied.
    zero_copy_copied,
    /// How often a connection got ordinary sends because a zero-copy send was copied or refused.
    zero_copy_stops,
    /// Bytes in memory that the kernel still uses after a zero-copy send, now.
    zero_copy_held_bytes,
    /// How often an overflow of the completion queue was found.
    completion_overflows,
    /// Spins of a poller that found work.
    spins_won,
    /// Spins of a poller that found no work.
    spins_lost,
}

impl PollerStats {
    /// The number of all system calls that are counted here.
    pub fn system_calls(&self) -> u64 {
        self.wait_calls
            + self.submit_calls
            + self.receive_calls
            + self.direct_receives
            + self.send_calls
            + self.accept_calls
            + self.control_calls
            + self.wake_calls
            + self.sqpoll_wake_calls
            + self.setup_calls
    }
}

/// A count of one kind. Reading or changing it synchronizes no other memory.
///
/// The poller thread counts most often, so it has a number of its own and needs no locked
/// instruction.
#[derive(Default)]
pub(crate) struct Count {
    by_owner: AtomicU64,
    by_others: AtomicU64,
}

impl Count {
    /// Adds on the poller thread. The sum wraps, so one thread can subtract what another has added.
    #[inline]
    pub(crate) fn add_owned(&self, amount: u64) {
        let sum = self.by_owner.load(Ordering::Relaxed).wrapping_add(amount);
        self.by_owner.store(sum, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> u64 {
        let by_owner = self.by_owner.load(Ordering::Relaxed);
        by_owner.wrapping_add(self.by_others.load(Ordering::Relaxed))
    }
}
