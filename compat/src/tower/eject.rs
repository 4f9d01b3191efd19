//! Ejection: a service that has failed often in a row gets no calls for a time.
//!
//! [`Health`] is the one state of a service and all its clones. One call at a time probes an
//! ejected service: the holder of the [`Probe`] makes it, and dropping an unused probe gives the
//! turn to the next.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};
use tower::{Layer, Service};

/// Makes services that eject themselves: see [`Eject`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EjectLayer {
    failures_max: u32,
    first: Duration,
    longest: Duration,
}

impl EjectLayer {
    /// Ejects a service for `first` after `failures_max` failures in a row; 0 counts as 1.
    pub fn new(failures_max: u32, first: Duration) -> EjectLayer {
        EjectLayer { failures_max: failures_max.max(1), first, longest: LONGEST.max(first) }
    }

    /// The longest ejection, at least the first. The default is a minute.
    #[must_use]
    pub fn longest(mut self, longest: Duration) -> EjectLayer {
        self.longest = longest.max(self.first);
        self
    }
}

impl<S> Layer<S> for EjectLayer {
    type Service = Eject<S>;

    fn layer(&self, inner: S) -> Eject<S> {
        let health = Health::Good { failures: 0 };
        let state = State { health, waiting: Vec::new(), last_id: 0 };
        let shared = Arc::new(Shared { rules: *self, state: Mutex::new(state) });
        Eject { inner, shared, probe: None, sleep: None, waiting: None }
    }
}

/// A [`Service`] that is not ready for a time after failures in a row, so a balancer sends its
/// requests to other servers. Clones share their health.
///
/// A call that returns an error is a failure, and a call that returns an answer ends the row of
/// failures. So layers whose errors are failures of the server, such as a timeout, belong inside,
/// and layers with errors of their own, such as load shedding, outside. A dropped call counts as
/// neither.
///
/// When the time of the ejection is over, one request probes the service. If it fails, the service
/// is ejected again, for twice as long.
///
/// A server that is only slow does not fail. A timeout inside makes it fail: choose one that is a
/// few times the usual latency, and repeat the call on another server. A balancer by latency alone
/// would still send it calls, because a slow server without calls costs no more than a fast server
/// with many.
///
/// The waiting takes the timer of a tokio runtime.
///
/// ```
/// use std::time::Duration;
/// use ringpoll_compat::tower::EjectLayer;
/// use tower::{Layer, Service, ServiceExt, service_fn};
///
/// # #[tokio::main]
/// # async fn main() {
/// let broken = service_fn(|(): ()| async { Err::<(), _>("broken") });
/// let mut service = EjectLayer::new(2, Duration::from_secs(60)).layer(broken);
/// for _ in 0..2 {
///     let failed = service.ready().await.expect("it is not ejected").call(()).await;
///     assert_eq!(failed, Err("broken"));
/// }
/// assert!(service.is_ejected());
/// # }
/// ```
#[derive(Debug)]
pub struct Eject<S> {
    inner: S,
    shared: Arc<Shared>,
    /// The right to make the next call of an ejected service.
    probe: Option<Probe>,
    /// Ends with the ejection.
    sleep: Option<Pin<Box<Sleep>>>,
    /// The wait for the result of a probe of another clone.
    waiting: Option<Waiting>,
}

#[derive(Debug)]
struct Shared {
    rules: EjectLayer,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    health: Health,
    /// Clones that wait for the result of a probe: at most one entry of each, by the id of its
    /// [`Waiting`].
    waiting: Vec<(u64, Waker)>,
    /// The id that was given last.
    last_id: u64,
}

#[derive(Clone, Copy, Debug)]
enum Health {
    Good {
        /// In a row.
        failures: u32,
    },
    Ejected {
        until: Instant,
        length: Duration,
    },
    Probed {
        /// The length of the ejection that is over.
        length: Duration,
    },
}

/// The only call of an ejected service. Dropping it lets another call probe.
#[derive(Debug)]
struct Probe {
    /// `None` once the result of the call is noted.
    shared: Option<Arc<Shared>>,
}

/// The wait of one clone. Dropping it removes its entry.
#[derive(Debug)]
struct Waiting {
    shared: Arc<Shared>,
    id: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the health, and wakes the clones that wait for that.
    fn set(&self, mut state: MutexGuard<'_, State>, health: Health) {
        state.health = health;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        for (_, waker) in waiting {
            // A waker is user code. One that panics takes no wake-up from the others.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| waker.wake())) {
                // The panic hook has reported it, and its destructor may panic as well.
                std::mem::forget(panic);
            }
        }
    }

    /// Notes the result of a call. `probe` is that of the call.
    fn note(&self, succeeded: bool, probe: Option<Probe>) {
        let is_probe = probe.is_some();
        if let Some(mut probe) = probe {
            probe.shared = None;
        }
        let state = self.lock();
        match state.health {
            Health::Good { failures } => {
                let failures = if succeeded { 0 } else { failures + 1 };
                match failures < self.rules.failures_max {
                    true => self.set(state, Health::Good { failures }),
                    false => self.eject(state, self.rules.first),
                }
            }
            Health::Probed { .. } if is_probe && succeeded => {
                self.set(state, Health::Good { failures: 0 });
            }
            Health::Probed { length } if is_probe => {
                self.eject(state, length.saturating_mul(2).min(self.rules.longest));
            }
            // The result of a call that began before the ejection.
            Health::Ejected { .. } | Health::Probed { .. } => {}
        }
    }

    fn eject(&self, state: MutexGuard<'_, State>, length: Duration) {
        let until = Instant::now() + length.min(NEARLY_FOREVER);
        self.set(state, Health::Ejected { until, length });
    }
}

impl<S> Eject<S> {
    /// Whether the service is ejected: it gets no calls but a probe.
    pub fn is_ejected(&self) -> bool {
        !matches!(self.shared.lock().health, Health::Good { .. })
    }

    /// The wrapped service.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// Waits until the service may get a call.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.probe.is_none() {
            let mut state = self.shared.lock();
            let until = match state.health {
                Health::Good { .. } => break,
                Health::Ejected { until, length } if Instant::now() >= until => {
                    state.health = Health::Probed { length };
                    drop(state);
                    self.probe = Some(Probe { shared: Some(Arc::clone(&self.shared)) });
                    break;
                }
                Health::Ejected { until, .. } => until,
                Health::Probed { .. } => {
                    drop(state);
                    // Cloning a waker is user code, so the lock is not held.
                    if self.wait(cx.waker().clone()) {
                        return Poll::Pending;
                    }
                    continue;
                }
            };
            drop(state);
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(until)));
            if sleep.deadline() != until {
                sleep.as_mut().reset(until);
            }
            ready!(sleep.as_mut().poll(cx));
        }
        self.sleep = None;
        self.waiting = None;
        Poll::Ready(())
    }

    /// Has `waker` woken when the health changes. `false`: there is no probe any more.
    fn wait(&mut self, waker: Waker) -> bool {
        let mut state = self.shared.lock();
        if !matches!(state.health, Health::Probed { .. }) {
            return false;
        }
        let known = self.waiting.as_ref().map(|waiting| waiting.id);
        if let Some(entry) = state.waiting.iter_mut().find(|entry| Some(entry.0) == known) {
            let old = std::mem::replace(&mut entry.1, waker);
            drop(state);
            // Its destructor is user code, so the lock is not held.
            drop(old);
            return true;
        }
        state.last_id += 1;
        let id = state.last_id;
        state.waiting.push((id, waker));
        drop(state);
        self.waiting = Some(Waiting { shared: Arc::clone(&self.shared), id });
        true
    }
}

impl<S, R> Service<R> for Eject<S>
where
    S: Service<R>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Ejecting<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        ready!(self.poll_turn(cx));
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> Ejecting<S::Future> {
        Ejecting {
            call: self.inner.call(request),
            probe: self.probe.take(),
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<S: Clone> Clone for Eject<S> {
    /// The clone has no turn to probe.
    fn clone(&self) -> Eject<S> {
        Eject {
            inner: self.inner.clone(),
            shared: Arc::clone(&self.shared),
            probe: None,
            sleep: None,
            waiting: None,
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let index = state.waiting.iter().position(|entry| entry.0 == self.id);
        let entry = index.map(|index| state.waiting.swap_remove(index));
        drop(state);
        // The destructor of a waker is user code, so the lock is not held.
        drop(entry);
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let Some(shared) = self.shared.take() else { return };
        let state = shared.lock();
        if let Health::Probed { length } = state.health {
            shared.set(state, Health::Ejected { until: Instant::now(), length });
        }
    }
}

pin_project! {
    /// A call of an [`Eject`].
    #[derive(Debug)]
    pub struct Ejecting<F> {
        #[pin]
        call: F,
        probe: Option<Probe>,
        shared: Arc<Shared>,
    }
}

impl<F, T, E> Future for Ejecting<F>
where
    F: Future<Output = Result<T, E>>,
{
    type Output = Result<T, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T, E>> {
        let this = self.project();
        let result = ready!(this.call.poll(cx));
        this.shared.note(result.is_ok(), this.probe.take());
        Poll::Ready(result)
    }
}

/// A server that is down for hours is probed about once a minute.
const LONGEST: Duration = Duration::from_secs(60);

/// 30 years. A longer ejection could overflow the clock.
const NEARLY_FOREVER: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::task::Wake;
    use tower::{ServiceExt, service_fn};

    const FIRST: Duration = Duration::from_secs(1);

    thread_local! {
        static FAILS: Cell<bool> = const { Cell::new(false) };
    }

    /// A service that answers or fails as the test has said.
    fn service() -> Eject<impl Service<(), Response = (), Error = (), Future: Send> + Clone> {
        let inner = service_fn(|()| {
            let fails = FAILS.get();
            async move { if fails { Err(()) } else { Ok(()) } }
        });
        EjectLayer::new(3, FIRST).longest(3 * FIRST).layer(inner)
    }

    async fn call<S>(service: &mut S, fails: bool)
    where
        S: Service<(), Response = (), Error = ()>,
    {
        FAILS.set(fails);
        let result = service.ready().await.expect("it becomes ready").call(()).await;
        assert_eq!(result.is_err(), fails);
    }

    async fn is_ready<S: Service<(), Error = ()>>(service: &mut S) -> bool {
        std::future::poll_fn(|cx| Poll::Ready(service.poll_ready(cx).is_ready())).await
    }

    #[tokio::test(start_paused = true)]
    async fn only_failures_in_a_row_eject() {
        let mut service = service();
        for fails in [true, true, false, true, true] {
            call(&mut service, fails).await;
            assert!(!service.is_ejected());
        }
        call(&mut service, true).await;
        assert!(service.is_ejected() && !is_ready(&mut service).await);
    }

    #[tokio::test(start_paused = true)]
    async fn each_failed_probe_doubles_the_ejection_up_to_its_bound() {
        let mut service = service();
        for _ in 0..3 {
            call(&mut service, true).await;
        }
        for length in [1, 2, 3, 3] {
            let begun = Instant::now();
            call(&mut service, true).await;
            let waited = begun.elapsed();
            // The timer of tokio counts milliseconds.
            assert!(waited.abs_diff(length * FIRST) <= Duration::from_millis(2), "{waited:?}");
        }
        call(&mut service, false).await;
        assert!(!service.is_ejected());
        call(&mut service, true).await;
        assert!(!service.is_ejected(), "the row begins anew");
    }

    #[tokio::test(start_paused = true)]
    async fn one_clone_probes_and_its_answer_readies_the_others() {
        let mut service = service();
        for _ in 0..3 {
            call(&mut service, true).await;
        }
        tokio::time::sleep(FIRST).await;
        let mut other = service.clone();
        assert!(is_ready(&mut service).await && !is_ready(&mut other).await);
        FAILS.set(false);
        let probe = service.call(());
        let waits = async { other.ready().await.expect("it becomes ready").call(()).await };
        let (probed, answered) = tokio::join!(probe, waits);
        assert_eq!((probed, answered), (Ok(()), Ok(())));
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_is_given_up_passes_its_turn_on() {
        let mut service = service();
        for _ in 0..3 {
            call(&mut service, true).await;
        }
        tokio::time::sleep(FIRST).await;
        let mut other = service.clone();
        // Before its call, and during it.
        assert!(is_ready(&mut other).await);
        drop(other);
        let mut other = service.clone();
        assert!(is_ready(&mut other).await);
        drop(other.call(()));
        assert!(is_ready(&mut service).await);
    }

    /// A service whose probe has begun.
    async fn probed() -> Eject<impl Service<(), Response = (), Error = (), Future: Send> + Clone> {
        let mut service = service();
        for _ in 0..3 {
            call(&mut service, true).await;
        }
        tokio::time::sleep(FIRST).await;
        assert!(is_ready(&mut service).await);
        service
    }

    struct Silent;

    impl Wake for Silent {
        fn wake(self: Arc<Silent>) {}
    }

    #[tokio::test(start_paused = true)]
    async fn a_clone_that_waits_has_one_entry_until_it_is_dropped_or_ready() {
        let service = probed().await;
        let entries = || service.shared.lock().waiting.len();
        let mut others = [service.clone(), service.clone()];
        for _ in 0..10 {
            let waker = Waker::from(Arc::new(Silent));
            for other in &mut others {
                assert!(other.poll_ready(&mut Context::from_waker(&waker)).is_pending());
            }
        }
        assert_eq!(entries(), 2);
        let [mut other, dropped] = others;
        drop(dropped);
        assert_eq!(entries(), 1);
        let shared = Arc::clone(&service.shared);
        drop(service);
        assert!(is_ready(&mut other).await, "the turn is passed on");
        assert!(shared.lock().waiting.is_empty() && other.waiting.is_none());
    }

    struct Panicking;

    impl Wake for Panicking {
        fn wake(self: Arc<Panicking>) {
            panic!("this waker panics")
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_waker_that_panics_takes_no_wake_up_from_the_others() {
        let service = probed().await;
        let (mut first, mut second) = (service.clone(), service.clone());
        let waker = Waker::from(Arc::new(Panicking));
        assert!(first.poll_ready(&mut Context::from_waker(&waker)).is_pending());
        let waits = tokio::spawn(async move { second.ready().await.map(|_| ()) });
        while service.shared.lock().waiting.len() < 2 {
            tokio::task::yield_now().await;
        }
        drop(service);
        assert_eq!(waits.await.expect("no panic"), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_ejection_may_have_no_end() {
        let inner = service_fn(|()| async { Err::<(), ()>(()) });
        let mut service = EjectLayer::new(1, Duration::MAX).layer(inner);
        assert_eq!(service.ready().await.expect("it is not ejected").call(()).await, Err(()));
        assert!(service.is_ejected() && !is_ready(&mut service).await);
    }
}
