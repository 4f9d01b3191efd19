//! The budget of unread bytes of one poller.
//!
//! The poller thread owns it. Only unread bytes count; memory that the application keeps does not.
//! Counting unread bytes visits every connection, and reading the total of block memory is cheap.
//! So the poller counts unread bytes only while its block memory is above the budget. The poller
//! counts again when that memory has grown by a part of the budget, or after `BUDGET_LOOK_NS`.

use crate::clock::now_ns;
use crate::config;

pub(super) struct Budget {
    bytes_max: usize,
    /// Unread bytes at the last count.
    unread_bytes: usize,
    /// Block memory at the last count.
    memory_bytes: usize,
    next_look_ns: u64,
}

impl Budget {
    pub(super) fn new(bytes_max: usize) -> Budget {
        Budget { bytes_max, unread_bytes: 0, memory_bytes: 0, next_look_ns: 0 }
    }

    /// How many bytes each connection may hold. `None`: unread bytes are within the budget.
    #[inline]
    pub(super) fn share_bytes(
        &mut self,
        memory_bytes: usize,
        connections: usize,
        count_unread: impl FnOnce() -> usize,
    ) -> Option<usize> {
        if memory_bytes <= self.bytes_max {
            return None;
        }
        self.look(memory_bytes, now_ns(), count_unread);
        let share = self.bytes_max / connections.max(1);
        (self.unread_bytes > self.bytes_max).then_some(share.max(config::SHARE_BYTES_MIN))
    }

    fn look(&mut self, memory_bytes: usize, now_ns: u64, count_unread: impl FnOnce() -> usize) {
        let grown = memory_bytes.saturating_sub(self.memory_bytes);
        if now_ns < self.next_look_ns && grown < self.bytes_max / config::BUDGET_LOOKS {
            return;
        }
        self.unread_bytes = count_unread();
        self.memory_bytes = memory_bytes;
        self.next_look_ns = now_ns.saturating_add(config::BUDGET_LOOK_NS);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn only_what_is_unread_counts() {
        let mut budget = Budget::new(16 * MIB);
        assert_eq!(budget.share_bytes(16 * MIB, 4, || unreachable!("below the budget")), None);
        assert_eq!(budget.share_bytes(17 * MIB, 4, || MIB), None, "the application keeps the rest");
        assert_eq!(budget.share_bytes(40 * MIB, 4, || 17 * MIB), Some(4 * MIB));
    }

    #[test]
    fn connections_are_looked_at_again_when_memory_has_grown() {
        let mut budget = Budget::new(16 * MIB);
        assert_eq!(budget.share_bytes(17 * MIB, 4, || MIB), None);
        let part = 16 * MIB / config::BUDGET_LOOKS;
        assert_eq!(budget.share_bytes(17 * MIB + part - 1, 4, || 20 * MIB), None);
        assert_eq!(budget.share_bytes(17 * MIB + part, 4, || 20 * MIB), Some(4 * MIB));
    }

    #[test]
    fn nobody_is_throttled_below_the_least_share() {
        let mut budget = Budget::new(MIB);
        let share = budget.share_bytes(2 * MIB, 1 << 20, || 2 * MIB);
        assert_eq!(share, Some(config::SHARE_BYTES_MIN));
    }
}
