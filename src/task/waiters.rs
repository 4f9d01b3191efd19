//! Wakers of futures that wait for the same condition, kept under the lock that guards the
//! condition.
//!
//! All of them are woken together and check the condition again, so a future that is dropped after
//! its wake-up does not delay another one. Calling and dropping a waker is user code, so the
//! methods return the wakers, and the caller calls or drops them after unlocking.

use std::collections::BTreeMap;
use std::task::Waker;

#[derive(Default)]
pub(crate) struct Waiters {
    last: u64,
    wakers: BTreeMap<u64, Waker>,
}

/// The number of a future among the waiters. `None` until it first waits.
pub(crate) type Number = Option<u64>;

impl Waiters {
    /// Registers `waker` for the future with this number. Returns the waker that it replaces.
    #[must_use]
    pub(crate) fn wait(&mut self, number: &mut Number, waker: Waker) -> Option<Waker> {
        let number = *number.get_or_insert_with(|| {
            self.last += 1;
            self.last
        });
        self.wakers.insert(number, waker)
    }

    /// Whether a waker of the same task is registered for this number.
    pub(crate) fn wakes(&self, number: Number, waker: &Waker) -> bool {
        let known = number.and_then(|number| self.wakers.get(&number));
        known.is_some_and(|known| known.will_wake(waker))
    }

    /// Removes the registration of a future. Returns its waker, unless it was taken.
    #[must_use]
    pub(crate) fn withdraw(&mut self, number: Number) -> Option<Waker> {
        self.wakers.remove(&number?)
    }

    /// Takes the wakers of all futures.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = Waker> + use<> {
        std::mem::take(&mut self.wakers).into_values()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.wakers.is_empty()
    }
}
