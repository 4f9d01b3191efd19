//! What a poller did, counted at each system call site.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// Counts kept while the poller runs; any thread may read them.
        #[derive(Default)]
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
            $($(#[$doc])* pub $name: u64,)+
        }

        impl Counters {
            pub(crate) fn add_to(&self, stats: &mut PollerStats) {
                $(stats.$name += self.$name.read();)+
            }
        }
    };
}

counters! {
    /// Sends the kernel has not taken whole yet.
    sends_in_flight,
    /// Waits for events.
    wait_calls,
    /// Receive calls, empty ones included.
    receive_calls,
    /// Send calls, on whichever thread.
    send_calls,
    /// Accept calls, empty ones included.
    accept_calls,
    /// Calls that change what is watched.
    control_calls,
    /// Wake-ups of a sleeping poller.
    wake_calls,
    /// Calls made once per connection: connect, shutdown.
    setup_calls,
    /// Bytes received.
    received_bytes,
    /// Bytes the kernel took.
    sent_bytes,
    /// Connections accepted.
    accepts,
    /// Spins that found work before they gave up.
    spins_won,
    /// Spins that found none.
    spins_lost,
}

impl PollerStats {
    /// System calls made by the data path, all kinds.
    pub fn system_calls(&self) -> u64 {
        self.wait_calls
            + self.receive_calls
            + self.send_calls
            + self.accept_calls
            + self.control_calls
            + self.wake_calls
            + self.setup_calls
    }
}

/// A statistic: it orders nothing.
#[derive(Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    /// Adds from any thread.
    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Takes back from any thread.
    pub(crate) fn subtract(&self, amount: u64) {
        self.0.fetch_sub(amount, Ordering::Relaxed);
    }

    /// Adds without a locked instruction. Only for counts that one thread alone changes: the poller.
    pub(crate) fn add_owned(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
