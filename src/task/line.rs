//! An asynchronous semaphore: a bounded number of places, given out in the order of the requests.
//!
//! A caller awaits a place, on any thread. A future that is dropped while it waits leaves the line;
//! if it was promised a place already, it passes the place on. No waker is cloned, called or
//! dropped with the lock held.

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
// Not `crate::sync::Mutex`: a static needs a `const` constructor, and loom's Mutex has none.
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::user_code::wake_all;

pub(crate) struct Line {
    places_max: usize,
    state: Mutex<State>,
}

struct State {
    /// Places that are taken, or promised to a caller.
    taken: usize,
    /// Wakers of waiting callers, by ticket number. A caller that is promised a place leaves this
    /// map. While the map is not empty, no place is free.
    waiting: BTreeMap<u64, Waker>,
    next_ticket: u64,
}

impl Line {
    pub(crate) const fn new(places_max: usize) -> Line {
        let state = State { taken: 0, waiting: BTreeMap::new(), next_ticket: 0 };
        Line { places_max, state: Mutex::new(state) }
    }

    /// Waits for a place.
    pub(super) fn place(&'static self) -> WaitPlace {
        WaitPlace::new(self)
    }

    /// The number of places that are taken, and of callers that wait.
    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize) {
        let state = self.lock();
        (state.taken, state.waiting.len())
    }

    /// Takes a place, or puts `waker` in line for one. Returns whether it took one. Also returns a
    /// waker that is no longer needed: the caller drops it without the lock.
    fn take_or_wait(
        &self,
        ticket: &mut Option<u64>,
        waker: Option<Waker>,
    ) -> (bool, Option<Waker>) {
        let mut state = self.lock();
        let is_free = match *ticket {
            // A ticket leaves the map when a place is promised to it.
            Some(number) => !state.waiting.contains_key(&number),
            None => state.taken < self.places_max,
        };
        if is_free {
            state.taken += usize::from(ticket.take().is_none());
            return (true, waker);
        }
        let Some(waker) = waker else { return (false, None) };
        let number = *ticket.get_or_insert_with(|| {
            state.next_ticket += 1;
            state.next_ticket
        });
        (false, state.waiting.insert(number, waker))
    }

    /// Gives back a place that was taken or promised. It is promised to the caller that has waited
    /// longest, if any.
    fn give_back(&self) {
        let next = {
            let mut state = self.lock();
            let next = state.waiting.pop_first();
            if next.is_none() {
                state.taken -= 1;
            }
            next
        };
        wake_all(next.map(|(_, waker)| waker));
    }

    /// Nothing panics while it holds the lock, so a poisoned lock guards valid data.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A reference to a line: a static one, or one that its users share.
pub(crate) trait LineRef: Deref<Target = Line> + Clone + Unpin {}

impl<L: Deref<Target = Line> + Clone + Unpin> LineRef for L {}

/// Waits for a place in line.
pub(crate) struct WaitPlace<L: LineRef = &'static Line> {
    line: L,
    /// The number in line, once this has been polled and found no free place.
    ticket: Option<u64>,
}

impl<L: LineRef> WaitPlace<L> {
    pub(crate) fn new(line: L) -> WaitPlace<L> {
        WaitPlace { line, ticket: None }
    }
}

impl<L: LineRef> Future for WaitPlace<L> {
    type Output = Place<L>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Place<L>> {
        let WaitPlace { line, ticket } = self.get_mut();
        if let (true, _) = line.take_or_wait(ticket, None) {
            return Poll::Ready(Place { line: line.clone() });
        }
        // The waker is cloned only for a caller that has to wait, and without the lock.
        match line.take_or_wait(ticket, Some(cx.waker().clone())) {
            (true, _) => Poll::Ready(Place { line: line.clone() }),
            (false, _) => Poll::Pending,
        }
    }
}

impl<L: LineRef> Drop for WaitPlace<L> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let waker = self.line.lock().waiting.remove(&ticket);
        if waker.is_none() {
            self.line.give_back();
        }
    }
}

/// A place, which is given back when this is dropped.
pub(crate) struct Place<L: LineRef = &'static Line> {
    line: L,
}

impl<L: LineRef> Drop for Place<L> {
    fn drop(&mut self) {
        self.line.give_back();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::task::tests::{CountsWakes, Panics, locks_nothing};

    fn line(places_max: usize) -> &'static Line {
        Box::leak(Box::new(Line::new(places_max)))
    }

    fn poll(wait: &mut WaitPlace, waker: &Waker) -> Poll<Place> {
        Pin::new(wait).poll(&mut Context::from_waker(waker))
    }

    fn taken(line: &'static Line) -> Place {
        match poll(&mut line.place(), Waker::noop()) {
            Poll::Ready(place) => place,
            Poll::Pending => panic!("there is a free place"),
        }
    }

    #[test]
    fn places_are_given_out_in_order_and_no_more_than_there_are() {
        let line = line(2);
        let (one, other) = (taken(line), taken(line));
        let mut waiting = [line.place(), line.place()];
        for wait in &mut waiting {
            assert!(poll(wait, Waker::noop()).is_pending());
        }
        assert_eq!(line.counts(), (2, 2));
        drop(one);
        assert!(poll(&mut waiting[1], Waker::noop()).is_pending(), "out of turn");
        assert!(poll(&mut line.place(), Waker::noop()).is_pending(), "out of turn");
        let Poll::Ready(first) = poll(&mut waiting[0], Waker::noop()) else { panic!("its turn") };
        drop((first, other));
        drop(waiting);
        assert_eq!(line.counts(), (0, 0));
    }

    #[test]
    fn a_place_that_was_promised_and_never_taken_is_passed_on() {
        let line = line(1);
        let place = taken(line);
        let (mut first, mut second) = (line.place(), line.place());
        assert!(poll(&mut first, Waker::noop()).is_pending());
        assert!(poll(&mut second, Waker::noop()).is_pending());
        drop(place);
        drop(first);
        assert!(poll(&mut second, Waker::noop()).is_ready());
        assert_eq!(line.counts(), (0, 0));
    }

    #[test]
    fn the_newest_waker_is_called_and_one_that_panics_harms_nobody() {
        let line = line(1);
        let place = taken(line);
        let (mut first, mut second) = (line.place(), line.place());
        assert!(poll(&mut first, &Panics::waker()).is_pending());
        let (old, new) = (CountsWakes::new(), CountsWakes::new());
        assert!(poll(&mut second, &old.waker()).is_pending());
        assert!(poll(&mut second, &new.waker()).is_pending());
        drop(place);
        drop(first);
        assert_eq!((old.count(), new.count()), (0, 1));
        assert!(poll(&mut second, Waker::noop()).is_ready());
    }

    #[test]
    fn a_waker_is_dropped_without_the_lock() {
        let line = line(1);
        let _place = taken(line);
        let mut wait = line.place();
        let waker = locks_nothing(|| line.state.try_lock().is_ok());
        assert!(poll(&mut wait, &waker).is_pending());
        drop(waker);
        assert!(poll(&mut wait, Waker::noop()).is_pending());
        assert!(poll(&mut wait, &locks_nothing(|| line.state.try_lock().is_ok())).is_pending());
    }
}
