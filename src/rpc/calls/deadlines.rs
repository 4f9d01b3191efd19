//! The deadlines of the calls that have not ended, earliest first.
//!
//! A call that ends leaves its deadline in the heap, where it is *stale*. So the end of a call
//! costs nothing here. Stale deadlines are dropped when they come up, and by sweeps: a sweep visits
//! the whole heap, and the next one is due only after as many new deadlines.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

pub(super) struct Deadlines {
    /// Times, and the indices of their calls.
    heap: BinaryHeap<Reverse<(u64, u32)>>,
    /// How many deadlines the last sweep kept, as far as they may still be in the heap.
    swept: usize,
}

impl Deadlines {
    pub(super) const fn new() -> Deadlines {
        Deadlines { heap: BinaryHeap::new(), swept: 0 }
    }

    /// Adds the deadline of a call. `is_live` tells whether a call has not ended, and has this
    /// deadline.
    pub(super) fn insert(
        &mut self,
        at_ns: u64,
        index: u32,
        mut is_live: impl FnMut(u64, u32) -> bool,
    ) {
        if self.heap.len() >= 2 * self.swept + STALE_MAX {
            self.heap.retain(|&Reverse((at_ns, index))| is_live(at_ns, index));
            self.swept = self.heap.len();
            self.heap.shrink_to(2 * self.swept + STALE_MAX);
        }
        self.heap.push(Reverse((at_ns, index)));
    }

    /// The earliest deadline that is live, and its call. Drops the stale ones before it.
    pub(super) fn first(
        &mut self,
        mut is_live: impl FnMut(u64, u32) -> bool,
    ) -> Option<(u64, u32)> {
        while let Some(&Reverse((at_ns, index))) = self.heap.peek() {
            if is_live(at_ns, index) {
                return Some((at_ns, index));
            }
            self.heap.pop();
            self.swept = self.swept.min(self.heap.len());
        }
        *self = Deadlines::new();
        None
    }
}

/// Stale deadlines that are kept beside as many as are live: 64 KiB of them.
const STALE_MAX: usize = 4096;

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_first_is_the_earliest_of_the_live_ones(
            steps in prop::collection::vec((0_u8..3, 0_u32..16, 0_u64..100), 0..200)
        ) {
            let (mut deadlines, mut live) = (Deadlines::new(), BTreeMap::new());
            for (step, index, at_ns) in steps {
                match step {
                    0 if !live.contains_key(&index) => {
                        live.insert(index, at_ns);
                        deadlines.insert(at_ns, index, |at, call| live.get(&call) == Some(&at));
                    }
                    1 => {
                        live.remove(&index);
                    }
                    _ => {}
                }
                let first = deadlines.first(|at, call| live.get(&call) == Some(&at));
                let earliest = live.values().min().copied();
                prop_assert_eq!(first.map(|(at_ns, _)| at_ns), earliest);
            }
        }
    }

    #[test]
    fn ended_calls_leave_a_bounded_number_of_deadlines() {
        let mut deadlines = Deadlines::new();
        deadlines.insert(1, u32::MAX, |_, _| true);
        for at_ns in 2..1_000_000 {
            deadlines.insert(at_ns, 0, |at, index| index == u32::MAX || at == at_ns);
            assert!(deadlines.heap.len() <= STALE_MAX + 3);
        }
        assert_eq!(deadlines.first(|_, index| index == u32::MAX), Some((1, u32::MAX)));
        assert_eq!(deadlines.first(|_, _| false), None);
        assert_eq!(deadlines.heap.capacity(), 0, "memory of a client without calls");
    }
}
