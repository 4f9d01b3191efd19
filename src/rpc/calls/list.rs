//! A queue of calls that takes no memory of its own: each call holds the indices of its neighbours.
//!
//! So a call that ends while it waits leaves its queue in constant time.

/// The neighbours of a call in its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Neighbours {
    previous: u32,
    next: u32,
}

impl Neighbours {
    pub(super) const NONE: Neighbours = Neighbours { previous: NOBODY, next: NOBODY };
}

/// Finds the neighbours of the call with an index.
pub(super) trait Links {
    fn neighbours(&mut self, index: u32) -> &mut Neighbours;
}

/// The two ends of a queue, and its length.
#[derive(Debug)]
pub(super) struct List {
    first: u32,
    last: u32,
    count: usize,
}

impl List {
    pub(super) const fn new() -> List {
        List { first: NOBODY, last: NOBODY, count: 0 }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Adds a call, which is in no queue, at the end.
    pub(super) fn push(&mut self, index: u32, links: &mut impl Links) {
        *links.neighbours(index) = Neighbours { previous: self.last, next: NOBODY };
        match self.last {
            NOBODY => self.first = index,
            last => links.neighbours(last).next = index,
        }
        self.last = index;
        self.count += 1;
    }

    /// Removes the first call.
    pub(super) fn pop(&mut self, links: &mut impl Links) -> Option<u32> {
        let first = self.first;
        if first == NOBODY {
            return None;
        }
        self.remove(first, links);
        Some(first)
    }

    /// Removes a call, which is in this queue.
    pub(super) fn remove(&mut self, index: u32, links: &mut impl Links) {
        let neighbours = std::mem::replace(links.neighbours(index), Neighbours::NONE);
        let Neighbours { previous, next } = neighbours;
        match previous {
            NOBODY => self.first = next,
            previous => links.neighbours(previous).next = next,
        }
        match next {
            NOBODY => self.last = previous,
            next => links.neighbours(next).previous = previous,
        }
        self.count -= 1;
    }
}

/// The index of no call.
pub(super) const NOBODY: u32 = u32::MAX;

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    impl Links for Vec<Neighbours> {
        fn neighbours(&mut self, index: u32) -> &mut Neighbours {
            &mut self[index as usize]
        }
    }

    proptest! {
        #[test]
        fn it_behaves_like_a_queue(steps in prop::collection::vec((0_u8..3, 0_u32..16), 0..200)) {
            let mut links = vec![Neighbours::NONE; 16];
            let (mut list, mut model) = (List::new(), VecDeque::new());
            for (step, index) in steps {
                match step {
                    0 if !model.contains(&index) => {
                        list.push(index, &mut links);
                        model.push_back(index);
                    }
                    1 => prop_assert_eq!(list.pop(&mut links), model.pop_front()),
                    2 if model.contains(&index) => {
                        list.remove(index, &mut links);
                        model.retain(|&other| other != index);
                    }
                    _ => {}
                }
                prop_assert_eq!(list.count(), model.len());
            }
            let left: Vec<u32> = std::iter::from_fn(|| list.pop(&mut links)).collect();
            prop_assert_eq!(left, Vec::from(model));
        }
    }
}
