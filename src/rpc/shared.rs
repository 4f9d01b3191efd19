//! What the clones, the calls and the tasks of a client share.
//!
//! One lock guards the table of calls. [`Shared::with`] changes the table under the lock, and then
//! does what follows from the change without the lock. Any thread calls it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::calls::{Calls, Rules, Work};
use super::codec::Codec;
use super::dialing;
use crate::clock::now_ns;
use crate::connection::{Core, Remote};
use crate::dial::Dialer;
use crate::poller::Alarm;
use crate::sync::{Mutex, lock};
use crate::user_code;

pub(super) struct Shared<C: Codec> {
    pub(super) codec: C,
    pub(super) dialer: Dialer,
    pub(super) address: String,
    /// The poller of the tasks that have no connection: dials and the timer.
    pub(super) home: Arc<Remote>,
    calls: Mutex<Calls<C>>,
}

impl<C: Codec> Shared<C> {
    pub(super) fn new(
        codec: C,
        dialer: Dialer,
        address: String,
        home: Arc<Remote>,
        rules: Rules,
    ) -> Shared<C> {
        Shared { codec, dialer, address, home, calls: Mutex::new(Calls::new(rules)) }
    }

    /// Changes the table of calls, then does what follows.
    pub(super) fn with<T>(
        self: &Arc<Self>,
        change: impl FnOnce(&mut Calls<C>, &mut Work<C>) -> T,
    ) -> T {
        let mut work = Work::new();
        let changed = change(&mut lock(&self.calls), &mut work);
        self.follow(&mut work);
        changed
    }

    /// [`with`](Self::with), for a change from which nothing follows.
    pub(super) fn read<T>(&self, look: impl FnOnce(&Calls<C>) -> T) -> T {
        look(&lock(&self.calls))
    }

    fn follow(self: &Arc<Self>, work: &mut Work<C>) {
        // A waker may block, so the tasks of the client come first.
        for link in work.dials.drain(..) {
            self.home.spawn(dialing::dial(Arc::clone(self), link));
        }
        if work.starts_timer {
            self.home.spawn(Timer { shared: Arc::clone(self), alarm: None, is_done: false });
        }
        user_code::wake_all(work.wakers.drain(..));
        for (handle, with_reset) in work.closes.drain(..) {
            match with_reset {
                true => handle.abort(),
                false => handle.close(),
            }
        }
        work.drop_unused();
    }
}

/// Ends calls at their deadlines. Runs while there are calls with a deadline, with one alarm.
struct Timer<C: Codec> {
    shared: Arc<Shared<C>>,
    /// The alarm, and its time.
    alarm: Option<(u64, Alarm<Core>)>,
    is_done: bool,
}

impl<C: Codec> Unpin for Timer<C> {}

impl<C: Codec> Future for Timer<C> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        loop {
            let (now_ns, waker) = (now_ns(), cx.waker().clone());
            let next = this.shared.with(|calls, work| calls.expire(now_ns, waker, work));
            let Some(next_ns) = next else {
                this.is_done = true;
                return Poll::Ready(());
            };
            if this.alarm.as_ref().is_none_or(|(at_ns, _)| *at_ns != next_ns) {
                this.alarm = Some((next_ns, Alarm::new(&this.shared.home, next_ns)));
            }
            if this.alarm.as_mut().is_some_and(|(_, alarm)| alarm.poll(cx).is_pending()) {
                return Poll::Pending;
            }
            this.alarm = None;
        }
    }
}

impl<C: Codec> Drop for Timer<C> {
    fn drop(&mut self) {
        if !self.is_done {
            self.shared.with(|calls, work| calls.poller_ended(None, work));
        }
    }
}
