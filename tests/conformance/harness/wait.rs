//! Waiting for events with a deadline, and reporting where a wait or a call failed.

use std::fmt::Display;
use std::future::{Future, poll_fn};
use std::panic::Location;
use std::pin::pin;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use super::host;

/// How long any single event may take on a busy host. Reached only by a failing test.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// How long one whole test may take before the process is aborted.
const WATCHDOG: Duration = Duration::from_secs(100);

/// Why a test failed: the message of an error and the line that met it.
///
/// `?` makes one out of any error, so that test bodies need no `expect` on every call.
#[derive(Debug)]
pub(crate) struct Failure(String);

/// What a test body returns.
pub(crate) type Check<T = ()> = Result<T, Failure>;

impl Failure {
    #[track_caller]
    pub(crate) fn new(message: impl Display) -> Failure {
        Failure(format!("{}: {message}", Location::caller()))
    }

    pub(crate) fn message(&self) -> &str {
        &self.0
    }
}

impl<E: Display> From<E> for Failure {
    #[track_caller]
    fn from(error: E) -> Failure {
        Failure::new(error)
    }
}

/// Polls `condition` until it holds; panics at the caller when it does not within [`DEADLINE`].
#[track_caller]
pub(crate) fn eventually(what: &str, condition: impl FnMut() -> bool) {
    assert!(holds_within(DEADLINE, condition), "not within {DEADLINE:?}: {what}");
}

/// Polls `condition` until it holds or `limit` has passed; tells whether it held.
pub(crate) fn holds_within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > limit {
            return false;
        }
        thread::park_timeout(Duration::from_millis(1));
    }
    true
}

/// [`eventually`] for code that runs on the test's tokio runtime.
pub(crate) async fn eventually_async(what: &str, mut condition: impl FnMut() -> bool) -> Check {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > DEADLINE {
            return Err(Failure::new(format_args!("not within {DEADLINE:?}: {what}")));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Polls `future` once and drops it, with the waker of the running task.
pub(crate) async fn poll_once<F: Future>(future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// The result of code that runs elsewhere: in a handler, on a task, on a thread.
pub(crate) struct Outcome<T> {
    receiver: Receiver<Check<T>>,
}

/// The other end of an [`Outcome`]. Dropped without a result (by a panic), the wait fails.
pub(crate) type Report<T> = SyncSender<Check<T>>;

/// A connected report and outcome.
pub(crate) fn outcome<T>() -> (Report<T>, Outcome<T>) {
    let (sender, receiver) = mpsc::sync_channel(1);
    (sender, Outcome { receiver })
}

/// Sends a result to its outcome.
pub(crate) fn tell<T>(report: Report<T>, result: Check<T>) {
    // The test may have stopped waiting: nobody is left to tell.
    let _ = report.send(result);
}

impl<T> Outcome<T> {
    /// Waits for the result, which a single event brings.
    #[track_caller]
    pub(crate) fn wait(&self) -> T {
        self.wait_within(DEADLINE)
    }

    /// Waits for the result of a load: of many events, each of which has its own deadline.
    #[track_caller]
    pub(crate) fn wait_for_all(&self) -> T {
        self.wait_within(WATCHDOG)
    }

    #[track_caller]
    fn wait_within(&self, limit: Duration) -> T {
        match self.receiver.recv_timeout(limit) {
            Ok(Ok(value)) => value,
            Ok(Err(failure)) => panic!("failed elsewhere: {}", failure.message()),
            Err(RecvTimeoutError::Timeout) => panic!("no result within {limit:?}"),
            Err(RecvTimeoutError::Disconnected) => panic!("ended without a result (panicked?)"),
        }
    }

    /// Fails if the result is there already.
    #[track_caller]
    pub(crate) fn assert_pending(&self) {
        match self.receiver.try_recv() {
            Err(mpsc::TryRecvError::Empty) => {}
            Ok(Ok(_)) => panic!("already done, should still wait"),
            Ok(Err(failure)) => panic!("already failed: {}", failure.message()),
            Err(mpsc::TryRecvError::Disconnected) => panic!("ended without a result (panicked?)"),
        }
    }
}

/// Runs `body` on a thread of its own.
pub(crate) fn on_thread<T: Send + 'static>(
    body: impl FnOnce() -> Check<T> + Send + 'static,
) -> Outcome<T> {
    let (report, outcome) = outcome();
    thread::spawn(move || tell(report, body()));
    outcome
}

/// Blocks the threads that come to it until it is opened.
#[derive(Default)]
pub(crate) struct Latch {
    /// How many have come, and whether it is open.
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Latch {
    pub(crate) fn new() -> Arc<Latch> {
        Arc::default()
    }

    /// Blocks this thread.
    pub(crate) fn pass(&self) {
        let mut state = self.state.lock().expect("nobody panics here");
        state.0 += 1;
        // A test that fails meanwhile never opens it.
        let waited = self.changed.wait_timeout_while(state, WATCHDOG / 2, |(_, open)| !*open);
        drop(waited.expect("nobody panics here"));
    }

    /// How many threads have come.
    pub(crate) fn count(&self) -> usize {
        self.state.lock().expect("nobody panics here").0
    }

    /// Lets everybody pass from now on.
    pub(crate) fn open(&self) {
        self.state.lock().expect("nobody panics here").1 = true;
        self.changed.notify_all();
    }
}

static RUNNING: Mutex<Option<(String, Instant)>> = Mutex::new(None);

/// Aborts the process when the test it was armed for does not end.
pub(crate) struct Watchdog;

impl Watchdog {
    pub(crate) fn arm(test: &str) -> Watchdog {
        static THREAD: OnceLock<()> = OnceLock::new();
        THREAD.get_or_init(|| {
            thread::Builder::new()
                .name("watchdog".into())
                .spawn(watch)
                .expect("a thread can be started");
        });
        set_running(Some((test.to_owned(), Instant::now())));
        Watchdog
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        set_running(None);
    }
}

/// Gives the test that runs its time anew: one that takes longer by intention, and gets on.
pub(crate) fn still_runs() {
    if let Some((_, start)) = &mut *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) {
        *start = Instant::now();
    }
}

fn set_running(test: Option<(String, Instant)>) {
    *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = test;
}

fn watch() {
    loop {
        thread::park_timeout(Duration::from_millis(500));
        let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((test, start)) = running
            && start.elapsed() > WATCHDOG
        {
            host::say(&format!("{test}: hangs for {WATCHDOG:?}, threads:\n{}", host::threads()));
            std::process::abort();
        }
    }
}
