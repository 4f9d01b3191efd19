//! The calls of a client, in one vector. A call that ends leaves its place to a later one.

use std::task::Waker;

use super::list::{Links, List, NOBODY, Neighbours};
use crate::poller::timers::NEVER;
use crate::rpc::call_error::CallError;
use crate::rpc::codec::Codec;

/// One call.
pub(super) struct Entry<C: Codec> {
    pub(super) state: State<C>,
    neighbours: Neighbours,
    pub(super) deadline_ns: u64,
    /// The task that waits for the call. It is called once.
    pub(super) waker: Option<Waker>,
}

/// ```text
/// InLine ──► Queued ──► Sent ──► Done
///    └─────────┴──────────────────▲
/// ```
pub(super) enum State<C: Codec> {
    Free,
    /// Waits until fewer calls are outstanding.
    InLine(C::Out),
    /// Waits in the queue of this link.
    Queued(C::Out, u32),
    /// Was passed to the connection of this link, with this number.
    Sent {
        link: u32,
        number: u32,
    },
    /// Has ended. The future of the call takes the result.
    Done(Result<C::In, CallError>),
}

pub(super) struct Entries<C: Codec> {
    entries: Vec<Entry<C>>,
    /// The unused places of `entries`.
    free: List,
}

impl<C: Codec> Entries<C> {
    pub(super) fn new() -> Entries<C> {
        Entries { entries: Vec::new(), free: List::new() }
    }

    /// How many calls there are.
    pub(super) fn count(&self) -> usize {
        self.entries.len() - self.free.count()
    }

    /// Adds a call, which is in no queue.
    pub(super) fn insert(
        &mut self,
        state: State<C>,
        deadline_ns: u64,
        waker: Option<Waker>,
    ) -> u32 {
        let entry = Entry { state, neighbours: Neighbours::NONE, deadline_ns, waker };
        if let Some(index) = self.free.pop(&mut self.entries) {
            self.entries[index as usize] = entry;
            return index;
        }
        let index = self.entries.len() as u32;
        assert!(index < NOBODY, "2^32 calls at a time");
        self.entries.push(entry);
        index
    }

    /// Removes a call, which is in no queue.
    pub(super) fn remove(&mut self, index: u32) -> Entry<C> {
        let unused = Entry {
            state: State::Free,
            neighbours: Neighbours::NONE,
            deadline_ns: NEVER,
            waker: None,
        };
        let entry = std::mem::replace(self.at(index), unused);
        self.free.push(index, &mut self.entries);
        if self.count() == 0 && self.entries.capacity() > ENTRIES_KEPT_MAX {
            *self = Entries::new();
        }
        entry
    }

    pub(super) fn at(&mut self, index: u32) -> &mut Entry<C> {
        &mut self.entries[index as usize]
    }

    /// Whether a call has not ended, and has this deadline.
    pub(super) fn has_deadline(&self, index: u32, at_ns: u64) -> bool {
        self.entries.get(index as usize).is_some_and(|entry| entry.deadline_ns == at_ns)
    }

    /// The indices of all calls.
    pub(super) fn indices(&self) -> Vec<u32> {
        let is_used = |entry: &Entry<C>| !matches!(entry.state, State::Free);
        let used = self.entries.iter().enumerate().filter(|(_, entry)| is_used(entry));
        used.map(|(index, _)| index as u32).collect()
    }

    pub(super) fn links(&mut self) -> &mut Vec<Entry<C>> {
        &mut self.entries
    }
}

impl<C: Codec> Links for Vec<Entry<C>> {
    fn neighbours(&mut self, index: u32) -> &mut Neighbours {
        &mut self[index as usize].neighbours
    }
}

/// A longer vector is freed when its last call ends, so a burst of calls leaves no memory behind.
const ENTRIES_KEPT_MAX: usize = 1024;
