//! Messages that the producers of a mux have sent and its driver has not taken.
//!
//! One lock protects all state, wakers included. A future checks the state and registers its waker
//! under the same lock, so no wake-up is lost. Producers and the driver may be on any threads. No
//! waker is cloned, called or dropped while the lock is held.
//!
//! ```text
//!           begin_close            end
//!   Open ──────────────► Closing ───────► Ended
//!    │                                      ▲
//!    └──────────────────────────────────────┘
//! ```
//!
//! * `Open`: messages are accepted.
//! * `Closing`: no message is accepted; the driver flushes the accepted ones.
//! * `Ended`: the driver has ended, and every call returns its result.

use std::task::{Context, Poll, Waker, ready};

use crate::buffer::{Chain, Pool, Staging};
use crate::config;
use crate::error::{Error, Result};
use crate::sync::{Mutex, lock};
use crate::task::waiters::{Number, Waiters};
use crate::user_code::{discard, wake_all};

pub(super) struct Queue {
    state: Mutex<State>,
    /// The pool of the connection, for copies of short messages.
    pool: Pool,
}

struct State {
    /// Whole messages that are accepted and not taken by the driver.
    staged: Staging,
    /// How many bytes were accepted since the start.
    accepted: u64,
    /// How many of these are in the kernel.
    flushed: u64,
    life: Life,
    /// The waker of the driver while it waits for messages.
    driver: Option<Waker>,
    /// Producers that wait for room.
    senders: Waiters,
    /// Futures that wait for a flush, or for the end of the driver.
    flushers: Waiters,
}

enum Life {
    Open,
    Closing,
    /// `None`: all accepted messages were flushed.
    Ended(Option<Error>),
}

/// Messages that the driver has taken.
pub(super) struct Batch {
    pub(super) bytes: Chain,
    /// How many bytes had been accepted when the batch was taken.
    pub(super) end: u64,
}

impl Queue {
    pub(super) fn new(pool: Pool) -> Queue {
        let state = State {
            staged: Staging::default(),
            accepted: 0,
            flushed: 0,
            life: Life::Open,
            driver: None,
            senders: Waiters::default(),
            flushers: Waiters::default(),
        };
        Queue { state: Mutex::new(state), pool }
    }

    /// Calls `put` to write a message as soon as there is room. Calls it once at most.
    pub(super) fn poll_accept(
        &self,
        mut put: impl FnMut(&mut Staging, &Pool),
        place: &mut Place<'_>,
        cx: &Context<'_>,
    ) -> Poll<Result<()>> {
        let accept = |state: &mut State| state.accept(&mut put, &self.pool);
        let register = |state: &mut State, waker| state.senders.wait(&mut place.number, waker);
        wake_all(ready!(self.poll_state(cx, accept, register))?);
        Poll::Ready(Ok(()))
    }

    /// Calls `put` to write a message if there is room now. `false`: there is none.
    pub(super) fn try_accept(&self, mut put: impl FnMut(&mut Staging, &Pool)) -> Result<bool> {
        let accepted = lock(&self.state).accept(&mut put, &self.pool);
        let Some(driver) = accepted else { return Ok(false) };
        wake_all(driver?);
        Ok(true)
    }

    /// Takes all messages that wait; is pending while there are none. `None` means that no more
    /// messages can come. The driver calls this.
    pub(super) fn poll_batch(&self, cx: &Context<'_>) -> Poll<Option<Batch>> {
        let take = |state: &mut State| {
            if state.staged.is_empty() {
                return matches!(state.life, Life::Closing).then_some(None);
            }
            let batch = Batch { bytes: state.staged.sealed().take(), end: state.accepted };
            Some(Some((batch, state.senders.take())))
        };
        let taken = ready!(self.poll_state(cx, take, |state, waker| state.driver.replace(waker)));
        Poll::Ready(taken.map(|(batch, senders)| {
            wake_all(senders);
            batch
        }))
    }

    /// Polls `look`. While `look` finds nothing, `register` stores the waker that the next change
    /// of the state calls. `register` returns the waker that the new one replaces.
    fn poll_state<T>(
        &self,
        cx: &Context<'_>,
        mut look: impl FnMut(&mut State) -> Option<T>,
        register: impl FnOnce(&mut State, Waker) -> Option<Waker>,
    ) -> Poll<T> {
        if let Some(found) = look(&mut lock(&self.state)) {
            return Poll::Ready(found);
        }
        // Cloning a waker runs user code, so the lock is released for it, and the state may change.
        let waker = cx.waker().clone();
        let mut state = lock(&self.state);
        let (polled, unused) = match look(&mut state) {
            Some(found) => (Poll::Ready(found), Some(waker)),
            None => (Poll::Pending, register(&mut state, waker)),
        };
        drop(state);
        drop(unused);
        polled
    }

    /// Records that the batch with this `end` is in the kernel.
    pub(super) fn flushed(&self, end: u64) {
        let mut state = lock(&self.state);
        state.flushed = end;
        let flushers = state.flushers.take();
        drop(state);
        wake_all(flushers);
    }

    /// How many bytes were accepted so far.
    pub(super) fn accepted(&self) -> u64 {
        lock(&self.state).accepted
    }

    /// Waits until `bytes` of the accepted bytes are in the kernel.
    pub(super) fn poll_flushed(
        &self,
        bytes: u64,
        place: &mut Place<'_>,
        cx: &Context<'_>,
    ) -> Poll<Result<()>> {
        let look = |state: &mut State| match &state.life {
            _ if state.flushed >= bytes => Some(Ok(())),
            Life::Ended(failure) => Some(outcome(failure)),
            Life::Open | Life::Closing => None,
        };
        self.poll_state(cx, look, |state, waker| state.flushers.wait(&mut place.number, waker))
    }

    /// Stops accepting messages.
    ///
    /// # Errors
    /// The mux was closed before, or its driver has ended.
    pub(super) fn begin_close(&self) -> Result<()> {
        let mut state = lock(&self.state);
        if let Some(error) = state.refusal("close") {
            return Err(error);
        }
        state.life = Life::Closing;
        let (driver, senders) = (state.driver.take(), state.senders.take());
        drop(state);
        wake_all(senders.chain(driver));
        Ok(())
    }

    /// Waits for the end of the driver, and returns its result.
    pub(super) fn poll_ended(&self, place: &mut Place<'_>, cx: &Context<'_>) -> Poll<Result<()>> {
        let look = |state: &mut State| match &state.life {
            Life::Ended(failure) => Some(outcome(failure)),
            Life::Open | Life::Closing => None,
        };
        self.poll_state(cx, look, |state, waker| state.flushers.wait(&mut place.number, waker))
    }

    /// Records the end of the driver: with `failure`, or because all messages are flushed. Returns
    /// the messages that the driver has not taken.
    pub(super) fn end(&self, failure: Option<Error>) -> Chain {
        let mut state = lock(&self.state);
        state.life = Life::Ended(failure);
        let left = state.staged.sealed().take();
        let driver = state.driver.take();
        let waiting = state.senders.take().chain(state.flushers.take());
        drop(state);
        discard(driver);
        wake_all(waiting);
        left
    }
}

impl State {
    /// Accepts the message that `put` writes, and returns the waker of the driver, which the caller
    /// calls without the lock. `None`: there is no room.
    fn accept(
        &mut self,
        put: &mut impl FnMut(&mut Staging, &Pool),
        pool: &Pool,
    ) -> Option<Result<Option<Waker>>> {
        if let Some(error) = self.refusal("send") {
            return Some(Err(error));
        }
        let queued_bytes = self.staged.len();
        if queued_bytes >= config::MUX_BYTES_MAX {
            return None;
        }
        put(&mut self.staged, pool);
        let bytes = self.staged.len() - queued_bytes;
        self.accepted += bytes as u64;
        Some(Ok(if bytes > 0 { self.driver.take() } else { None }))
    }

    /// The error for a message or a close, unless the mux is open.
    fn refusal(&self, operation: &str) -> Option<Error> {
        match &self.life {
            Life::Open => None,
            Life::Ended(Some(failure)) => Some(failure.copy()),
            Life::Closing | Life::Ended(None) => {
                Some(Error::gone(format!("{operation}: the mux is closed")))
            }
        }
    }
}

/// The registration of a future among the waiters. Dropping it removes the waker.
pub(super) struct Place<'a> {
    queue: &'a Queue,
    waiters: fn(&mut State) -> &mut Waiters,
    number: Number,
}

impl<'a> Place<'a> {
    pub(super) fn of_sender(queue: &'a Queue) -> Place<'a> {
        Place { queue, waiters: |state| &mut state.senders, number: None }
    }

    pub(super) fn of_flusher(queue: &'a Queue) -> Place<'a> {
        Place { queue, waiters: |state| &mut state.flushers, number: None }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        // Most futures never wait, and take no lock here.
        if self.number.is_some() {
            let waker = (self.waiters)(&mut lock(&self.queue.state)).withdraw(self.number);
            drop(waker);
        }
    }
}

fn outcome(failure: &Option<Error>) -> Result<()> {
    match failure {
        None => Ok(()),
        Some(error) => Err(error.copy()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Slice;

    /// Too long to be copied, so no pool is used.
    const MESSAGE: &[u8] = &[7; 5000];
    /// Fills the queue.
    const FULL: &[u8] = &[7; config::MUX_BYTES_MAX];

    fn put(message: &'static [u8]) -> impl FnMut(&mut Staging, &Pool) {
        move |staged, pool| staged.write(Slice::from(message), pool)
    }

    #[cfg(not(loom))]
    mod alone {
        use super::*;
        use crate::sync::{Arc, try_lock};
        use crate::task::tests::{CountsWakes, Panics, locks_nothing};

        fn queue() -> Queue {
            Queue::new(Pool::shared().clone())
        }

        fn accept(queue: &Queue, message: &'static [u8]) -> Poll<Result<()>> {
            let mut place = Place::of_sender(queue);
            queue.poll_accept(put(message), &mut place, &Context::from_waker(Waker::noop()))
        }

        #[test]
        fn a_producer_that_gives_up_leaves_nothing_behind() {
            let queue = queue();
            assert!(matches!(accept(&queue, FULL), Poll::Ready(Ok(()))));
            for _ in 0..3 {
                assert!(accept(&queue, MESSAGE).is_pending());
            }
            assert!(lock(&queue.state).senders.is_empty());
            assert_eq!(queue.accepted(), FULL.len() as u64);
        }

        #[test]
        fn a_message_that_does_not_wait_is_accepted_while_there_is_room() {
            let queue = queue();
            let counts = CountsWakes::new();
            let waker = counts.waker();
            assert!(queue.poll_batch(&Context::from_waker(&waker)).is_pending());
            assert!(matches!(queue.try_accept(put(FULL)), Ok(true)));
            assert_eq!(counts.count(), 1, "the driver is woken");
            assert!(matches!(queue.try_accept(put(MESSAGE)), Ok(false)));
            assert!(lock(&queue.state).senders.is_empty());
            assert_eq!(queue.accepted(), FULL.len() as u64);
            queue.end(Some(Error::gone("on purpose")));
            assert!(queue.try_accept(put(MESSAGE)).is_err_and(|error| error.is_closed()));
        }

        #[test]
        fn a_waker_that_panics_takes_no_wake_up_from_others() {
            let queue = queue();
            assert!(matches!(accept(&queue, FULL), Poll::Ready(Ok(()))));
            let counts = CountsWakes::new();
            let wakers = [counts.waker(), Panics::waker(), counts.waker()];
            let mut places = wakers.each_ref().map(|_| Place::of_sender(&queue));
            for (place, waker) in places.iter_mut().zip(&wakers) {
                let polled = queue.poll_accept(put(MESSAGE), place, &Context::from_waker(waker));
                assert!(polled.is_pending());
            }
            assert!(queue.poll_batch(&Context::from_waker(Waker::noop())).is_ready());
            assert_eq!(counts.count(), 2);
        }

        #[test]
        fn wakers_are_called_and_dropped_without_the_lock() {
            let queue = Arc::new(queue());
            let demands = || {
                let queue = Arc::downgrade(&queue);
                locks_nothing(move || {
                    queue.upgrade().is_none_or(|queue| try_lock(&queue.state).is_some())
                })
            };
            let mut place = Place::of_flusher(&queue);
            for _ in 0..3 {
                let waker = demands();
                let cx = Context::from_waker(&waker);
                assert!(queue.poll_batch(&cx).is_pending());
                assert!(queue.poll_flushed(1, &mut place, &cx).is_pending());
            }
            queue.flushed(1);
            queue.end(None);
        }

        #[test]
        fn a_full_queue_takes_messages_again_when_its_batch_is_taken() {
            let (queue, cx) = (queue(), Context::from_waker(Waker::noop()));
            assert!(matches!(accept(&queue, FULL), Poll::Ready(Ok(()))));
            assert!(accept(&queue, MESSAGE).is_pending());
            let Poll::Ready(Some(batch)) = queue.poll_batch(&cx) else { panic!("a batch waits") };
            assert_eq!((batch.bytes.len(), batch.end), (FULL.len(), FULL.len() as u64));
            assert!(matches!(accept(&queue, MESSAGE), Poll::Ready(Ok(()))));
        }

        #[test]
        fn what_is_left_at_the_end_is_given_back_and_everybody_is_told() {
            let (queue, cx) = (queue(), Context::from_waker(Waker::noop()));
            assert!(matches!(accept(&queue, MESSAGE), Poll::Ready(Ok(()))));
            assert_eq!(queue.end(Some(Error::gone("on purpose"))).len(), MESSAGE.len());
            let is_told = |polled: Poll<Result<()>>| match polled {
                Poll::Ready(Err(error)) => error.to_string() == "on purpose",
                _ => false,
            };
            assert!(is_told(accept(&queue, MESSAGE)));
            let mut place = Place::of_flusher(&queue);
            assert!(is_told(queue.poll_flushed(1, &mut place, &cx)));
            assert!(is_told(queue.poll_ended(&mut place, &cx)));
            assert!(is_told(Poll::Ready(queue.begin_close())));
        }
    }

    #[cfg(loom)]
    mod together {
        use super::*;
        use crate::sync::{Arc, Condvar, wait};
        use loom::thread;
        use std::task::Wake;

        /// The waker of a blocked thread. A wake-up that comes before the wait is remembered.
        struct Bell {
            rung: Mutex<bool>,
            changed: Condvar,
        }

        impl Wake for Bell {
            fn wake(self: Arc<Self>) {
                *lock(&self.rung) = true;
                self.changed.notify_one();
            }
        }

        fn block_on<T>(mut poll: impl FnMut(&Context<'_>) -> Poll<T>) -> T {
            let bell = Arc::new(Bell { rung: Mutex::new(false), changed: Condvar::new() });
            let waker = Waker::from(Arc::clone(&bell));
            loop {
                if let Poll::Ready(done) = poll(&Context::from_waker(&waker)) {
                    return done;
                }
                let mut rung = lock(&bell.rung);
                while !*rung {
                    rung = wait(&bell.changed, rung);
                }
                *rung = false;
            }
        }

        fn send(queue: &Queue, message: &'static [u8]) -> Result<()> {
            let mut place = Place::of_sender(queue);
            block_on(|cx| queue.poll_accept(put(message), &mut place, cx))
        }

        /// Runs a driver whose flushes complete at once. Returns how many bytes it flushed.
        fn drive(queue: &Queue) -> usize {
            let mut bytes = 0;
            while let Some(batch) = block_on(|cx| queue.poll_batch(cx)) {
                bytes += batch.bytes.len();
                queue.flushed(batch.end);
            }
            assert!(queue.end(None).is_empty());
            bytes
        }

        #[test]
        fn loom_no_message_waits_for_a_sleeping_driver() {
            loom::model(|| {
                let queue = Arc::new(Queue::new(Pool::new()));
                let producers = [0, 1].map(|_| {
                    let queue = Arc::clone(&queue);
                    thread::spawn(move || send(&queue, MESSAGE).expect("it is open"))
                });
                let driver = thread::spawn({
                    let queue = Arc::clone(&queue);
                    move || drive(&queue)
                });
                for producer in producers {
                    producer.join().expect("does not panic");
                }
                queue.begin_close().expect("once");
                assert_eq!(driver.join().expect("does not panic"), 2 * MESSAGE.len());
            });
        }

        #[test]
        fn loom_a_producer_that_waits_for_room_goes_on_or_is_told() {
            loom::model(|| {
                let queue = Arc::new(Queue::new(Pool::new()));
                send(&queue, FULL).expect("there is room");
                let producer = thread::spawn({
                    let queue = Arc::clone(&queue);
                    move || send(&queue, MESSAGE).is_ok()
                });
                let closer = thread::spawn({
                    let queue = Arc::clone(&queue);
                    move || queue.begin_close().expect("once")
                });
                let flushed = drive(&queue);
                let is_sent = producer.join().expect("does not panic");
                closer.join().expect("does not panic");
                assert_eq!(flushed, FULL.len() + usize::from(is_sent) * MESSAGE.len());
            });
        }

        #[test]
        fn loom_a_close_returns_after_the_last_flush() {
            loom::model(|| {
                let queue = Arc::new(Queue::new(Pool::new()));
                let driver = thread::spawn({
                    let queue = Arc::clone(&queue);
                    move || drive(&queue)
                });
                send(&queue, MESSAGE).expect("it is open");
                queue.begin_close().expect("once");
                let mut place = Place::of_flusher(&queue);
                block_on(|cx| queue.poll_ended(&mut place, cx)).expect("flushed");
                let mut place = Place::of_flusher(&queue);
                let all = MESSAGE.len() as u64;
                block_on(|cx| queue.poll_flushed(all, &mut place, cx)).expect("flushed");
                assert_eq!(driver.join().expect("does not panic"), MESSAGE.len());
            });
        }
    }
}
