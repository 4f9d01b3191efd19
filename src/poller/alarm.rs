//! Alarms: a poller wakes a future at a time.

use std::task::{Context, Poll, Waker};

use super::{Command, Endpoint, Remote};
use crate::clock::now_ns;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, lock};
use crate::user_code;

/// Ends a wait at a time. Asks its poller for that when it first has to wait.
pub(crate) struct Alarm<E: Endpoint> {
    remote: Arc<Remote<E>>,
    at_ns: u64,
    bell: Option<Hung>,
}

/// The bell at the poller. It may ring before the alarm's time, which was moved.
struct Hung {
    rings_at_ns: u64,
    shared: Arc<Mutex<State>>,
}

enum State {
    Set(Waker),
    Rung,
    Dead,
}

impl<E: Endpoint> Alarm<E> {
    /// For this time on the clock of [`now_ns`].
    pub(crate) fn new(remote: &Arc<Remote<E>>, at_ns: u64) -> Alarm<E> {
        Alarm { remote: Arc::clone(remote), at_ns, bell: None }
    }

    /// Moves the alarm to another time. To a later one, this only stores the time: the bell that
    /// rings too early makes the next poll hang another one.
    pub(crate) fn reset(&mut self, at_ns: u64) {
        self.at_ns = at_ns;
        if self.bell.as_ref().is_some_and(|bell| at_ns < bell.rings_at_ns) {
            self.take_down();
        }
    }

    /// Ready when the time has come, or earlier if the poller ends before.
    pub(crate) fn poll(&mut self, cx: &Context<'_>) -> Poll<()> {
        if now_ns() >= self.at_ns {
            return Poll::Ready(());
        }
        let Some(bell) = &self.bell else { return self.hang(cx) };
        let state = lock(&bell.shared);
        match &*state {
            State::Set(registered) if registered.will_wake(cx.waker()) => return Poll::Pending,
            State::Set(_) => {}
            State::Rung | State::Dead if bell.rings_at_ns < self.at_ns => {
                drop(state);
                return self.hang(cx);
            }
            State::Rung | State::Dead => return Poll::Ready(()),
        }
        drop(state);
        // Wakers are user code, so they are cloned and dropped without the lock.
        let waker = cx.waker().clone();
        let mut state = lock(&bell.shared);
        let State::Set(registered) = &mut *state else {
            drop(state);
            return self.poll(cx);
        };
        let replaced = std::mem::replace(registered, waker);
        drop(state);
        user_code::discard(replaced);
        Poll::Pending
    }

    /// Asks the poller to wake this task.
    fn hang(&mut self, cx: &Context<'_>) -> Poll<()> {
        let shared = Arc::new(Mutex::new(State::Set(cx.waker().clone())));
        self.bell = Some(Hung { rings_at_ns: self.at_ns, shared: Arc::clone(&shared) });
        let bell = Bell { shared, dead: Arc::clone(&self.remote.dead_timers) };
        self.remote.send(Command::WakeAt(self.at_ns, bell));
        // Where the poller has ended, the bell has rung by now, and woken this future.
        Poll::Pending
    }

    /// Ends the wait at the poller.
    fn take_down(&mut self) {
        let Some(bell) = self.bell.take() else { return };
        let mut state = lock(&bell.shared);
        if let State::Set(_) = *state {
            // Count under the lock: `Bell::ring` subtracts this 1 as soon as it sees `Dead`.
            self.remote.dead_timers.fetch_add(1, Ordering::Relaxed);
            let set = std::mem::replace(&mut *state, State::Dead);
            drop(state);
            user_code::discard(set);
        }
    }
}

impl<E: Endpoint> Drop for Alarm<E> {
    fn drop(&mut self) {
        self.take_down();
    }
}

/// The poller's side of an alarm. Dropping a bell rings it, so the end of a poller wakes every
/// future that waits for one of its alarms.
pub(crate) struct Bell {
    shared: Arc<Mutex<State>>,
    /// How many bells of the poller are dead.
    dead: Arc<AtomicUsize>,
}

impl Bell {
    /// Whether the alarm was dropped.
    pub(super) fn is_dead(&self) -> bool {
        matches!(*lock(&self.shared), State::Dead)
    }

    /// Rings the bell. Returns the waker to call; `None` if the alarm was dropped or has rung.
    pub(super) fn ring(&self) -> Option<Waker> {
        let mut state = lock(&self.shared);
        match std::mem::replace(&mut *state, State::Rung) {
            State::Set(waker) => Some(waker),
            State::Rung => None,
            State::Dead => {
                self.dead.fetch_sub(1, Ordering::Relaxed);
                None
            }
        }
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        user_code::wake_all(self.ring());
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::timers::{Timers, Whom};
    use super::*;
    use crate::config;
    use crate::task::tests::{CountsWakes, locks_nothing};

    fn bell(state: State) -> (Bell, Arc<Mutex<State>>) {
        let shared = Arc::new(Mutex::new(state));
        (Bell { shared: Arc::clone(&shared), dead: Arc::new(AtomicUsize::new(1)) }, shared)
    }

    #[test]
    fn bells_that_nobody_listens_to_are_swept_out_and_the_others_stay() {
        let mut timers = Timers::new();
        let counts = CountsWakes::new();
        timers.arm(1, Whom::Bell(bell(State::Set(counts.waker())).0));
        for at_ns in 0..config::STALE_TIMERS_MAX as u64 {
            assert_eq!(timers.is_sweep_due(), at_ns + 1 >= config::STALE_TIMERS_MAX as u64);
            let (bell, _) = bell(State::Dead);
            assert!(bell.is_dead());
            timers.arm(at_ns, Whom::Bell(bell));
        }
        timers.sweep(|_, _| false);
        assert_eq!((timers.count(), counts.count()), (1, 0));
        assert!(!timers.is_sweep_due());
    }

    #[test]
    fn a_bell_rings_once_and_when_its_poller_drops_it() {
        let counts = CountsWakes::new();
        let (rung, _) = bell(State::Set(counts.waker()));
        assert!(rung.ring().is_some_and(|waker| waker.will_wake(&counts.waker())));
        drop(rung);
        assert_eq!(counts.count(), 0);
        drop(bell(State::Set(counts.waker())).0);
        assert_eq!(counts.count(), 1);
    }

    #[test]
    fn a_dead_bell_is_taken_off_the_count_once() {
        let (bell, _) = bell(State::Dead);
        let dead = Arc::clone(&bell.dead);
        assert!(bell.ring().is_none());
        drop(bell);
        assert_eq!(dead.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_bell_rings_without_the_lock() {
        let (bell, shared) = bell(State::Rung);
        let waker = locks_nothing(move || crate::sync::try_lock(&shared).is_some());
        *lock(&bell.shared) = State::Set(waker);
        drop(bell);
    }
}
