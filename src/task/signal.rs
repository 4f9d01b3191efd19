//! A signal that is raised once, and futures that wait for it.
//!
//! Any thread may raise the signal, and any executor may poll the futures. The flag is set before
//! the wakers are taken, and a future checks the flag again under the lock that guards the wakers.
//! So a future either sees the flag or is woken.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::waiters::{Number, Waiters};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, Mutex, lock};
use crate::user_code::{discard, wake_all};

pub(crate) struct Signal {
    is_raised: AtomicBool,
    waiters: Mutex<Waiters>,
}

impl Signal {
    pub(crate) fn new() -> Arc<Signal> {
        Arc::new(Signal {
            is_raised: AtomicBool::new(false),
            waiters: Mutex::new(Waiters::default()),
        })
    }

    /// Raises the signal, and wakes every future that waits for it.
    pub(crate) fn raise(&self) {
        self.set();
        self.wake();
    }

    /// Raises the signal. The caller then calls [`wake`](Self::wake).
    pub(crate) fn set(&self) {
        self.is_raised.store(true, Ordering::SeqCst);
    }

    /// Wakes every future that waits for the signal, which is raised. Wakers may block.
    pub(crate) fn wake(&self) {
        let waiting = lock(&self.waiters).take();
        wake_all(waiting);
    }

    pub(crate) fn is_raised(&self) -> bool {
        self.is_raised.load(Ordering::SeqCst)
    }

    pub(crate) fn wait(self: &Arc<Self>) -> WaitSignal {
        WaitSignal { signal: Arc::clone(self), number: None }
    }
}

/// Waits until the signal is raised. Dropping this removes its waker.
pub(crate) struct WaitSignal {
    signal: Arc<Signal>,
    number: Number,
}

impl Future for WaitSignal {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let WaitSignal { signal, number } = self.get_mut();
        if signal.is_raised() {
            return Poll::Ready(());
        }
        if lock(&signal.waiters).wakes(*number, cx.waker()) {
            return Poll::Pending;
        }
        let waker = cx.waker().clone();
        let mut waiters = lock(&signal.waiters);
        let (polled, unneeded) = match signal.is_raised() {
            true => (Poll::Ready(()), Some(waker)),
            false => (Poll::Pending, waiters.wait(number, waker)),
        };
        drop(waiters);
        discard(unneeded);
        polled
    }
}

impl Drop for WaitSignal {
    fn drop(&mut self) {
        // All waiters share the lock, so a future that has never waited does not take it.
        if self.number.is_some() {
            let waker = lock(&self.signal.waiters).withdraw(self.number);
            discard(waker);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sync::try_lock;
    use crate::task::tests::{CountsWakes, Panics, locks_nothing};
    use std::task::Waker;

    fn poll(wait: &mut WaitSignal, waker: &Waker) -> Poll<()> {
        Pin::new(wait).poll(&mut Context::from_waker(waker))
    }

    #[test]
    fn every_waiting_future_is_woken_and_later_ones_do_not_wait() {
        let (signal, counts) = (Signal::new(), CountsWakes::new());
        let mut waits = [signal.wait(), signal.wait(), signal.wait()];
        for (wait, waker) in waits.iter_mut().zip([counts.waker(), Panics::waker(), counts.waker()])
        {
            assert!(poll(wait, &waker).is_pending());
        }
        assert!(!signal.is_raised());
        signal.raise();
        assert_eq!(counts.count(), 2, "a waker that panics takes no wake-up from others");
        for wait in waits.iter_mut().chain([&mut signal.wait()]) {
            assert!(poll(wait, Waker::noop()).is_ready());
            assert!(poll(wait, Waker::noop()).is_ready(), "ready stays ready");
        }
        signal.raise();
        assert_eq!(counts.count(), 2);
    }

    #[test]
    fn the_newest_waker_of_a_future_is_called_and_a_dropped_future_leaves_none() {
        let (signal, old, new) = (Signal::new(), CountsWakes::new(), CountsWakes::new());
        let (mut stays, mut goes) = (signal.wait(), signal.wait());
        for waker in [old.waker(), new.waker(), new.waker()] {
            assert!(poll(&mut stays, &waker).is_pending());
            assert!(poll(&mut goes, &old.waker()).is_pending());
        }
        drop(goes);
        signal.raise();
        assert_eq!((old.count(), new.count()), (0, 1));
        drop(stays);
        assert!(lock(&signal.waiters).is_empty());
    }

    #[test]
    fn wakers_are_called_and_dropped_without_the_lock() {
        let signal = Signal::new();
        let demands = || {
            let signal = Arc::downgrade(&signal);
            locks_nothing(move || {
                signal.upgrade().is_none_or(|signal| try_lock(&signal.waiters).is_some())
            })
        };
        let (mut woken, mut dropped) = (signal.wait(), signal.wait());
        for _ in 0..3 {
            assert!(poll(&mut woken, &demands()).is_pending());
            assert!(poll(&mut dropped, &demands()).is_pending());
        }
        drop(dropped);
        signal.raise();
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::task::{Wake, Waker};

    struct Counts(AtomicUsize);

    impl Wake for Counts {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn loom_a_future_sees_the_signal_or_is_woken() {
        loom::model(|| {
            let signal = Signal::new();
            let raises = {
                let signal = Arc::clone(&signal);
                loom::thread::spawn(move || signal.raise())
            };
            let counts = Arc::new(Counts(AtomicUsize::new(0)));
            let waker = Waker::from(Arc::clone(&counts));
            let mut wait = signal.wait();
            let polled = Pin::new(&mut wait).poll(&mut Context::from_waker(&waker));
            raises.join().expect("does not panic");
            assert!(polled.is_ready() || counts.0.load(Ordering::Relaxed) == 1);
        });
    }
}
