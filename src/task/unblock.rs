//! Runs synchronous code of handlers, which may block, on threads of its own.
//!
//! The process has one set of these threads. They are started when calls come, and end when no call
//! has come for a while. A caller first awaits a place in the queue ([`Line`]), then the result. If
//! the caller's future is dropped before the call has begun, the call never runs.
//!
//! ```text
//! caller:  place ──► push ──► Queued ──────► Running ──────► Done ──► result
//! thread:                       │    take       │    finish
//! dropped:  (withdrawn)       Gone (withdrawn)  Gone (the result is dropped)
//! ```
//!
//! A thread holds one lock at a time, and no lock while it runs code of the user or wakes a task.

use std::collections::VecDeque;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
// Not `crate::sync::Mutex`: a static needs a `const` constructor, and loom's Mutex has none.
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use super::RuntimeContext;
use super::line::{Line, Place};
use crate::config;
use crate::error::{Error, Result};
use crate::threads;
use crate::user_code;
use crate::user_code::{discard, message_of, wake_all};

/// Runs `work` on a thread where it may block, and returns its result.
///
/// This is for synchronous code in a handler: a database driver, a compressor, a file. A handler
/// that blocks its own thread delays all connections of its poller, or occupies one of a few
/// workers. A handler that awaits `unblock` delays its own connection alone. Works on every
/// [`Placement`](crate::Placement) and on any executor, with or without a server. If the caller is
/// inside the context of a tokio runtime, `work` runs inside this context as well.
///
/// ```
/// # fn main() -> ringpoll::Result<()> {
/// use ringpoll::{Connection, Server};
///
/// let server = Server::builder().on_request(|mut conn: Connection| async move {
///     let name = conn.until(b'\n').await?;
///     let path = String::from_utf8_lossy(name[..name.len() - 1].as_ref()).into_owned();
///     let content = ringpoll::unblock(move || std::fs::read(path)).await??;
///     conn.write(content)?;
///     conn.flush().await
/// });
/// # let _ = server.bind("127.0.0.1:0")?;
/// # Ok(())
/// # }
/// ```
///
/// # Bounds
/// The process has at most 256 of these threads, named `ringpoll-b`. They are started when they are
/// needed, and a thread that has had nothing to do for a second ends. Up to 1024 calls are queued
/// for a thread, first in, first out; further calls wait, without blocking a thread, for a place in
/// the queue. Calls that wait for each other deadlock if there are more of them than threads. Dials
/// look up names on these threads, on 64 of them at most.
///
/// # Cancelling
/// Nothing happens before the future is polled. If the future is dropped before `work` has begun,
/// `work` never runs. If it is dropped later, `work` runs to its end, and the result is dropped.
///
/// # Errors
/// Panicked, if `work` panics. The kernel's error, if there is no thread and none can be started.
pub async fn unblock<F, T>(work: F) -> Result<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    THREADS.call(work).await
}

/// Runs a name look-up like [`unblock`], but at most [`config::LOOKUPS_MAX`] at a time: a look-up
/// takes seconds when a name server does not answer. Further callers wait, first in, first out.
pub(crate) async fn look_up<F, T>(work: F) -> Result<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    static NAMES: Line = Line::new(config::LOOKUPS_MAX);
    let place = NAMES.place().await;
    THREADS
        .call(move || {
            // Held until the look-up returns, even if the caller is dropped before that.
            let _place = place;
            work()
        })
        .await
}

static THREADS: Threads = Threads::new(Bounds {
    threads_max: config::UNBLOCK_THREADS_MAX,
    queue_max: config::UNBLOCK_QUEUE_MAX,
    idle: config::UNBLOCK_IDLE,
});

struct Bounds {
    threads_max: usize,
    queue_max: usize,
    idle: Duration,
}

/// The threads, and the calls that wait for a thread.
struct Threads {
    bounds: Bounds,
    /// The places of the queue.
    line: Line,
    state: Mutex<State>,
    pushed: Condvar,
}

struct State {
    queue: VecDeque<Queued>,
    threads: usize,
    /// How many of the threads wait for a call.
    idle: usize,
}

/// A call that has not begun, and its place in the queue.
struct Queued {
    job: Arc<dyn Job>,
    place: Place,
}

trait Job: Send + Sync {
    fn run(&self);
}

impl Threads {
    const fn new(bounds: Bounds) -> Threads {
        let state = State { queue: VecDeque::new(), threads: 0, idle: 0 };
        let line = Line::new(bounds.queue_max);
        Threads { bounds, line, state: Mutex::new(state), pushed: Condvar::new() }
    }

    async fn call<F, T>(&'static self, work: F) -> Result<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let place = self.line.place().await;
        let call = Arc::new(Call {
            context: RuntimeContext::current(),
            stage: Mutex::new(Stage::Queued(work, None)),
        });
        self.push(Queued { job: Arc::clone(&call) as Arc<dyn Job>, place })?;
        Answer { threads: self, call }.await
    }

    /// Queues a call, and starts a thread if there is none to take it and the bound allows one.
    fn push(&'static self, queued: Queued) -> Result<()> {
        let mut failed = None;
        let mut state = lock(&self.state);
        if state.idle <= state.queue.len() && state.threads < self.bounds.threads_max {
            // With the lock held, so that every thread in the count has been started.
            match self.start_thread() {
                Ok(()) => state.threads += 1,
                Err(error) if state.threads == 0 => {
                    drop(state);
                    return Err(Error::io("start thread ringpoll-b", error));
                }
                Err(error) => failed = Some(error),
            }
        }
        state.queue.push_back(queued);
        drop(state);
        self.pushed.notify_one();
        if let Some(error) = failed {
            user_code::log(|| tracing::debug!(%error, "start thread ringpoll-b"));
        }
        Ok(())
    }

    fn start_thread(&'static self) -> std::io::Result<()> {
        let named = thread::Builder::new().name("ringpoll-b".to_owned());
        named.spawn(|| self.serve()).map(drop)
    }

    /// Body of a thread: runs one call after the other, until none has come for a while.
    fn serve(&'static self) {
        threads::unpin();
        let mut state = lock(&self.state);
        loop {
            if let Some(Queued { job, place }) = state.queue.pop_front() {
                drop(state);
                drop(place);
                job.run();
                discard(job);
                state = lock(&self.state);
                continue;
            }
            state.idle += 1;
            let is_empty = |state: &mut State| state.queue.is_empty();
            let waited = self.pushed.wait_timeout_while(state, self.bounds.idle, is_empty);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
            if state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }

    /// Removes a job from the queue, if no thread has taken it yet.
    fn withdraw(&self, job: &Arc<dyn Job>) {
        let taken = {
            let mut state = lock(&self.state);
            let index = state.queue.iter().position(|other| Arc::ptr_eq(&other.job, job));
            index.and_then(|index| state.queue.remove(index))
        };
        drop(taken);
    }
}

/// One call, shared by its caller and the thread that runs it.
struct Call<F, T> {
    context: RuntimeContext,
    stage: Mutex<Stage<F, T>>,
}

enum Stage<F, T> {
    Queued(F, Option<Waker>),
    Running(Option<Waker>),
    Done(Result<T>),
    /// The caller was dropped, or has taken the result.
    Gone,
}

impl<F, T> Job for Call<F, T>
where
    F: FnOnce() -> T + Send,
    T: Send,
{
    fn run(&self) {
        let work = {
            let mut stage = lock(&self.stage);
            match std::mem::replace(&mut *stage, Stage::Gone) {
                Stage::Queued(work, waker) => {
                    *stage = Stage::Running(waker);
                    work
                }
                _ => return,
            }
        };
        let done = catch_unwind(AssertUnwindSafe(|| self.context.run(work)));
        let done = done.map_err(|panic| {
            let error = Error::panicked(format!("unblock panicked: {}", message_of(&*panic)));
            discard(panic);
            error
        });
        let mut stage = lock(&self.stage);
        let Stage::Running(waker) = &mut *stage else {
            drop(stage);
            // The caller was dropped.
            return discard(done);
        };
        let waker = waker.take();
        *stage = Stage::Done(done);
        drop(stage);
        wake_all(waker);
    }
}

/// Waits for the result of a call.
struct Answer<F, T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    threads: &'static Threads,
    call: Arc<Call<F, T>>,
}

impl<F, T> Future for Answer<F, T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    type Output = Result<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        if let Some(done) = self.call.take_done() {
            return Poll::Ready(done);
        }
        // Cloning a waker runs code of the user, so it is done without the lock. It is done only
        // for a caller that has to wait.
        let waker = cx.waker().clone();
        let mut stage = lock(&self.call.stage);
        if let Stage::Queued(_, registered) | Stage::Running(registered) = &mut *stage {
            let replaced = registered.replace(waker);
            drop(stage);
            drop(replaced);
            return Poll::Pending;
        }
        drop(stage);
        Poll::Ready(self.call.take_done().expect("the call is neither queued nor running"))
    }
}

impl<F, T> Call<F, T> {
    /// The result of the call, if it has ended.
    fn take_done(&self) -> Option<Result<T>> {
        let mut stage = lock(&self.stage);
        if matches!(*stage, Stage::Queued(..) | Stage::Running(_)) {
            return None;
        }
        match std::mem::replace(&mut *stage, Stage::Gone) {
            Stage::Done(done) => Some(done),
            _ => unreachable!("polled after its end"),
        }
    }
}

impl<F, T> Drop for Answer<F, T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    fn drop(&mut self) {
        let left = std::mem::replace(&mut *lock(&self.call.stage), Stage::Gone);
        if let Stage::Queued(..) = left {
            let job: Arc<dyn Job> = Arc::clone(&self.call) as Arc<dyn Job>;
            self.threads.withdraw(&job);
        }
        drop(left);
    }
}

/// Locks a mutex of this module. Nothing panics while it holds one, so a poisoned mutex guards
/// valid data.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::task::tests::{Panics, locks_nothing};
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::task::Wake;
    use std::time::Instant;

    const DEADLINE: Duration = Duration::from_secs(10);
    /// The idle time in tests that do not test idling.
    const LONG: Duration = Duration::from_secs(100);

    fn threads(threads_max: usize, queue_max: usize, idle: Duration) -> &'static Threads {
        Box::leak(Box::new(Threads::new(Bounds { threads_max, queue_max, idle })))
    }

    type Boxed<T> = Pin<Box<dyn Future<Output = Result<T>> + Send>>;

    fn call<T: Send + 'static>(
        threads: &'static Threads,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Boxed<T> {
        Box::pin(threads.call(work))
    }

    fn poll<T>(call: &mut Boxed<T>) -> Poll<Result<T>> {
        call.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }

    /// Waits for the answer.
    fn finish<T>(mut call: Boxed<T>) -> Result<T> {
        struct Told(Sender<()>);

        impl Wake for Told {
            fn wake(self: Arc<Self>) {
                // The test may be over.
                let _ = self.0.send(());
            }
        }

        let (tell, told) = channel();
        let waker = Waker::from(Arc::new(Told(tell)));
        loop {
            match call.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(done) => return done,
                Poll::Pending => told.recv_timeout(DEADLINE).expect("it is woken"),
            }
        }
    }

    fn eventually(what: &str, condition: impl Fn() -> bool) {
        let begun = Instant::now();
        while !condition() {
            assert!(begun.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
            thread::park_timeout(Duration::from_millis(1));
        }
    }

    /// A call that has begun. It ends when the sender is used or dropped.
    fn blocked(threads: &'static Threads) -> (Boxed<()>, Sender<()>) {
        let (open, gate): (_, Receiver<()>) = channel();
        let (tell, begun) = channel();
        let mut call = call(threads, move || {
            tell.send(()).expect("the test waits");
            let _ = gate.recv();
        });
        assert!(poll(&mut call).is_pending());
        begun.recv_timeout(DEADLINE).expect("it begins");
        (call, open)
    }

    /// Calls that send their numbers, polled once each.
    fn numbered(
        threads: &'static Threads,
        count: usize,
    ) -> (Vec<Option<Boxed<usize>>>, Receiver<usize>) {
        let (tell, told) = channel();
        let call = |number| {
            let tell = tell.clone();
            let mut call = call(threads, move || {
                tell.send(number).expect("the test listens");
                number
            });
            assert!(poll(&mut call).is_pending());
            Some(call)
        };
        ((0..count).map(call).collect(), told)
    }

    #[test]
    fn beyond_the_bounds_calls_wait_and_all_are_run_in_order() {
        let threads = threads(1, 2, LONG);
        let (first, open) = blocked(threads);
        let (calls, told) = numbered(threads, 10);
        {
            let state = lock(&threads.state);
            assert_eq!((state.threads, state.queue.len()), (1, 2));
            assert_eq!(threads.line.counts(), (2, 8));
        }
        drop(open);
        finish(first).unwrap();
        for (number, call) in calls.into_iter().enumerate() {
            assert_eq!(finish(call.expect("not dropped")).unwrap(), number);
        }
        assert_eq!(told.try_iter().collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
        assert_eq!(threads.line.counts(), (0, 0));
    }

    #[test]
    fn there_are_as_many_threads_as_calls_up_to_the_bound() {
        let threads = threads(3, 100, LONG);
        let blocked: Vec<_> = (0..3).map(|_| blocked(threads)).collect();
        let (calls, told) = numbered(threads, 5);
        assert_eq!(lock(&threads.state).threads, 3);
        assert!(told.try_recv().is_err(), "more threads than there may be");
        drop(blocked);
        for call in calls.into_iter().flatten() {
            finish(call).unwrap();
        }
        eventually("all idle", || lock(&threads.state).idle == 3);
        // An idle thread takes it, and no other is started.
        assert_eq!(finish(call(threads, || 7)).unwrap(), 7);
        assert_eq!(lock(&threads.state).threads, 3);
    }

    #[test]
    fn a_call_that_is_dropped_before_it_began_never_runs() {
        let threads = threads(1, 2, LONG);
        let (first, open) = blocked(threads);
        let (mut calls, told) = numbered(threads, 6);
        // One that is in the queue, whose place goes to the first that waits; and one that waits.
        calls[1] = None;
        calls[4] = None;
        assert_eq!((lock(&threads.state).queue.len(), threads.line.counts()), (1, (2, 2)));
        // The one that was promised this place.
        calls[2] = None;
        assert_eq!(threads.line.counts(), (2, 1));
        drop(open);
        finish(first).unwrap();
        for call in calls.into_iter().flatten() {
            finish(call).unwrap();
        }
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [0, 3, 5]);
        assert_eq!((lock(&threads.state).queue.len(), threads.line.counts()), (0, (0, 0)));
    }

    #[test]
    fn a_call_that_is_dropped_while_it_runs_runs_to_its_end() {
        let threads = threads(1, 2, LONG);
        let (tell, told) = channel();
        let (open, gate): (Sender<()>, _) = channel();
        let result = Arc::new(());
        let kept = Arc::clone(&result);
        let mut call = call(threads, move || {
            tell.send("begun").expect("the test waits");
            let _ = gate.recv();
            tell.send("done").expect("the test waits");
            kept
        });
        assert!(poll(&mut call).is_pending());
        assert_eq!(told.recv_timeout(DEADLINE), Ok("begun"));
        drop(call);
        drop(open);
        assert_eq!(told.recv_timeout(DEADLINE), Ok("done"));
        eventually("its result is dropped", || Arc::strong_count(&result) == 1);
    }

    #[test]
    fn a_panic_is_an_error_with_its_message_and_the_thread_goes_on() {
        let threads = threads(1, 2, LONG);
        let own = || thread::current().id();
        let id = finish(call(threads, own)).unwrap();
        let error = finish(call(threads, || panic!("on purpose, {}", 42))).unwrap_err();
        assert!(error.is_panicked(), "{error:?}");
        assert_eq!(error.to_string(), "unblock panicked: on purpose, 42");
        assert_eq!(finish(call(threads, own)).unwrap(), id);
    }

    #[test]
    fn a_waker_that_panics_loses_no_call_of_others() {
        let threads = threads(1, 1, LONG);
        let (first, open) = blocked(threads);
        let (mut calls, told) = numbered(threads, 1);
        // It waits for a place in the queue. The thread gives it one before it begins the next
        // call.
        let mut panics = call(threads, || ());
        let waker = Panics::waker();
        assert!(panics.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        drop(open);
        finish(first).unwrap();
        assert_eq!(finish(calls[0].take().expect("not dropped")).unwrap(), 0);
        assert_eq!(told.recv_timeout(DEADLINE), Ok(0));
        finish(panics).unwrap();
    }

    #[test]
    fn wakers_are_dropped_without_a_lock() {
        let threads = threads(1, 1, LONG);
        let call = Arc::new(Call {
            context: RuntimeContext::current(),
            stage: Mutex::new(Stage::Queued(|| (), None)),
        });
        let mut answer = Answer { threads, call: Arc::clone(&call) };
        for waker in [locks_nothing(move || call.stage.try_lock().is_ok()), Waker::noop().clone()] {
            let polled = Pin::new(&mut answer).poll(&mut Context::from_waker(&waker));
            assert!(polled.is_pending());
        }
    }

    #[test]
    fn threads_end_when_they_idle_and_others_are_started_later() {
        let threads = threads(2, 2, Duration::from_millis(1));
        for _ in 0..3 {
            assert_eq!(finish(call(threads, || 1)).unwrap(), 1);
            eventually("no thread is left", || lock(&threads.state).threads == 0);
        }
    }
}
