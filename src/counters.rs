//! What a poller did, counted at each system call site.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// Counts kept while the poller runs; any thread may read them.
        #[derive(Default)]
        #[repr(C)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: Count,)+
        }

        /// One reading of the counters of a group of pollers, summed.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct PollerStats {
            /// Connections the pollers hold now.
            pub connections: u64,
            /// Listeners the pollers hold now.
            pub listeners: u64,
            /// Timers armed now.
            pub timers: u64,
            /// Blocks of buffer memory in use now, wherever they are held.
            pub blocks: u64,
            /// Bytes of those blocks.
            pub block_bytes: u64,
            /// Kernel threads that poll the rings now.
            pub sqpoll_threads: u64,
            /// CPU time that such threads have taken, in microseconds. It is part of the process's.
            pub sqpoll_cpu_us: u64,
            /// Of that, the part in which they worked; in the rest they looked for work.
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
    /// Where the counters are that this thread, a poller, owns.
    static OWNED: Cell<usize> = const { Cell::new(0) };
}

impl Counters {
    /// The calling thread is the poller whose counters these are.
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
    // First what every request counts, so that it lies together.
    /// Waits for events, or looks for them; with io_uring, what is to be sent goes along.
    wait_calls,
    /// Receive calls, empty ones included.
    receive_calls,
    /// Bytes received.
    received_bytes,
    /// Runs of handlers that were begun, or handed to whoever begins them.
    handler_runs,
    /// Send calls, on whichever thread.
    send_calls,
    /// Bytes the kernel took.
    sent_bytes,
    /// Sends the kernel has not taken whole yet.
    sends_in_flight,
    /// Visits to the kernel only to hand over submissions, because their queue was full.
    submit_calls,
    /// Accept calls, empty ones included.
    accept_calls,
    /// Calls that change what is watched.
    control_calls,
    /// Wake-ups of a sleeping poller.
    wake_calls,
    /// Wake-ups of a kernel thread that had ceased to poll, on whichever thread.
    sqpoll_wake_calls,
    /// Calls made once per connection or ring: connect, shutdown, register.
    setup_calls,
    /// Connections accepted.
    accepts,
    /// Runs of handlers that workers took from a poller that was held up.
    moved_runs,
    /// Completions taken from a ring.
    ring_completions,
    /// Operations handed to a ring.
    ring_submissions,
    /// Times a connection found no receive buffer and had to wait for one.
    starvations,
    /// Time that connections waited for a receive buffer, in nanoseconds, all together.
    starved_ns,
    /// Multishot operations that the kernel ended and that were armed again.
    rearms,
    /// Receives handed over in the buffer they came in; the others were copied out of it.
    lent_receives,
    /// Connections moved to larger receive buffers, or back.
    buffer_moves,
    /// Flushes that found their send ring locked, and waited.
    send_contentions,
    /// Flushes that found their send ring full; they sent by themselves, or the poller waited.
    full_send_rings,
    /// Times the completion queue was found to have overflowed.
    completion_overflows,
    /// Spins that found work before they gave up.
    spins_won,
    /// Spins that found none.
    spins_lost,
}

impl PollerStats {
    /// System calls made by the data path, all kinds.
    pub fn system_calls(&self) -> u64 {
        self.wait_calls
            + self.submit_calls
            + self.receive_calls
            + self.send_calls
            + self.accept_calls
            + self.control_calls
            + self.wake_calls
            + self.sqpoll_wake_calls
            + self.setup_calls
    }
}

/// A statistic: it orders nothing.
///
/// The poller's own thread, which counts most, does so without a locked instruction.
#[derive(Default)]
pub(crate) struct Count {
    by_owner: AtomicU64,
    by_others: AtomicU64,
}

impl Count {
    /// Adds on the poller's thread. Wraps, so that what one thread adds another may take back.
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
