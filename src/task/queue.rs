//! Work-stealing worker threads.
//!
//! Each worker owns a queue, and all workers of a set share another queue. A task that is woken on
//! a worker goes to the queue of this worker; every other task, and every run that begins, goes to
//! the shared queue. A worker whose queue is empty takes work from the shared queue, then from the
//! queues of other workers. [`Parking`] decides which workers sleep and which are woken.
//!
//! No task waits for ever. All queues are first in, first out. After every
//! [`config::RUNS_PER_LOOK`] runs a worker looks at another queue before its own: in turn at the
//! shared queue and at the queue of another worker. So a task that wakes itself again and again
//! does not starve other tasks, and tasks behind a handler that blocks its worker are taken over by
//! other workers, half of them at a time, even while the shared queue is never empty.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};

use crossbeam_deque::{Injector, Steal, Stealer, Worker};

use super::parking::{Parking, Woken};
use super::placement::{Policy, Timed};
use super::{Run, Runnable, TaskSet};
use crate::clock::now_ns;
use crate::config;
use crate::error::{Error, Result};
use crate::spin::Spin;
use crate::sync::{Mutex, lock};
use crate::threads;
use crate::user_code;

/// A set of worker threads. Clones are handles to the same set.
#[derive(Clone)]
pub(crate) struct Workers(Arc<Shared>);

struct Shared {
    injector: Injector<Work>,
    stealers: Vec<Stealer<Work>>,
    parking: Parking,
    /// The tasks that the workers make.
    tasks: TaskSet,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

thread_local! {
    /// On a worker: its queue, and the set that the worker belongs to.
    static LOCAL: RefCell<Option<(Arc<Shared>, Worker<Work>)>> = const { RefCell::new(None) };
}

/// What a worker does next.
enum Work {
    /// Begin a run. The policy, if there is one, records how long its polls take.
    Begin(Queued, Option<Arc<Policy>>),
    /// Poll a task.
    Poll(Runnable),
}

/// Begins a run that waits in a queue. Implemented by a connection.
pub(crate) trait Start: Send + Sync {
    /// Calls the handler, and polls its future once. Returns the run if it waits.
    fn begin(self: Arc<Self>, cx: &mut Context<'_>) -> Option<Run>;

    /// Ends the run, which no thread will begin.
    fn give_up(self: Arc<Self>);
}

/// A run that waits in a queue. The handler is called in the first poll, so the thread that takes
/// the run from the queue allocates and frees the memory of the run. Dropping this ends the run.
pub(crate) struct Queued(Stage);

enum Stage {
    InQueue(Arc<dyn Start>),
    Begun(Run),
    Over,
}

impl Queued {
    pub(crate) fn new(run: Arc<dyn Start>) -> Queued {
        Queued(Stage::InQueue(run))
    }
}

impl Future for Queued {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let run = match std::mem::replace(&mut self.0, Stage::Over) {
            Stage::InQueue(queued) => queued.begin(cx),
            Stage::Begun(run) => super::poll_again(run, cx),
            Stage::Over => None,
        };
        let Some(run) = run else { return Poll::Ready(()) };
        self.0 = Stage::Begun(run);
        Poll::Pending
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        if let Stage::InQueue(queued) = std::mem::replace(&mut self.0, Stage::Over) {
            user_code::call("handler", || queued.give_up());
        }
    }
}

impl Workers {
    /// Starts `count` threads. Each thread calls `begin` first, and spins as `spin` says before it
    /// sleeps. The threads are pinned to `cpus`, unless that is empty. The tasks that they make
    /// belong to `tasks`.
    ///
    /// # Errors
    /// Invalid: `count` is more than [`config::THREADS_MAX`], or the process may not use one of
    /// `cpus`. Also the kernel's error if a thread cannot be started.
    pub(crate) fn start(
        count: usize,
        cpus: &[usize],
        spin: Spin,
        tasks: TaskSet,
        begin: fn(),
    ) -> Result<Workers> {
        if count > config::THREADS_MAX {
            return Err(Error::invalid(format!(
                "workers: {count} are more than {}",
                config::THREADS_MAX
            )));
        }
        let queues: Vec<_> = (0..count).map(|_| Worker::new_fifo()).collect();
        let shared = Arc::new(Shared {
            injector: Injector::new(),
            stealers: queues.iter().map(Worker::stealer).collect(),
            parking: Parking::new(count),
            tasks,
            threads: Mutex::new(Vec::with_capacity(count)),
        });
        let workers = Workers(Arc::clone(&shared));
        for (index, queue) in queues.into_iter().enumerate() {
            let shared = Arc::clone(&shared);
            let started = threads::spawn(&format!("ringpoll-w{index}"), cpus.to_vec(), move || {
                begin();
                work(&shared, queue, index, spin);
            });
            match started {
                Ok(thread) => lock(&workers.0.threads).push(thread),
                Err(error) => {
                    workers.stop(true);
                    return Err(error);
                }
            }
        }
        Ok(workers)
    }

    /// Makes a task of `future` and queues it.
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.schedule(self.task(future));
    }

    /// Makes a task of `future`. Its wake-ups queue it.
    fn task(&self, future: impl Future<Output = ()> + Send + 'static) -> Runnable {
        let again = self.clone();
        self.0.tasks.spawn(future, move |task| again.schedule(task))
    }

    /// Queues a run that begins. `policy` records how long its polls take.
    pub(super) fn begin(&self, run: Queued, policy: Option<&Arc<Policy>>) {
        self.0.injector.push(Work::Begin(run, policy.cloned()));
        self.notify();
    }

    /// Queues a task.
    pub(crate) fn schedule(&self, runnable: Runnable) {
        let mut work = Some(Work::Poll(runnable));
        // A destructor of a user's thread-local may wake a task when `LOCAL` has gone.
        let _ = LOCAL.try_with(|local| {
            if let Some((shared, queue)) = &*local.borrow()
                && Arc::ptr_eq(shared, &self.0)
                && let Some(work) = work.take()
            {
                queue.push(work);
            }
        });
        if let Some(work) = work {
            self.0.injector.push(work);
        }
        self.notify();
    }

    /// Wakes a worker if none is searching for work. After [`stop`](Self::stop) no worker may be
    /// there to do the queued work: then it is dropped, which ends its runs.
    fn notify(&self) {
        if !self.0.parking.notify() {
            self.0.drop_shared();
        }
    }

    /// Does the work, on a worker.
    fn run(&self, work: Work) {
        super::run(match work {
            Work::Poll(task) => task,
            Work::Begin(run, None) => self.task(run),
            Work::Begin(run, Some(policy)) => self.task(Timed::new(run, &policy)),
        });
    }

    /// Ends each thread when it finds no work. With `join` this waits for all threads but the
    /// calling one. Then all work in the queues is dropped.
    pub(crate) fn stop(&self, join: bool) {
        self.0.parking.stop();
        let threads = std::mem::take(&mut *lock(&self.0.threads));
        for thread in threads {
            if join && thread.thread().id() != thread::current().id() {
                // A panic of the thread was reported when it happened. Panics of tasks are caught.
                let _ = thread.join();
            }
        }
        self.0.drop_shared();
        for stealer in &self.0.stealers {
            drop_all(|| stealer.steal());
        }
    }
}

/// Whether the calling thread is a worker.
pub(crate) fn is_worker() -> bool {
    LOCAL.try_with(|local| local.borrow().is_some()).unwrap_or(false)
}

impl Shared {
    /// Takes tasks from the shared queue, or else from another worker. All but the first go to
    /// `queue`, which is that of worker `index`.
    fn find(&self, queue: &Worker<Work>, index: usize) -> Option<Work> {
        loop {
            let batch = self.batch();
            let mut steal = self.injector.steal_batch_with_limit_and_pop(queue, batch);
            for offset in 1..self.stealers.len() {
                if steal.is_success() {
                    break;
                }
                let victim = self.neighbour(index, offset);
                steal = steal.or_else(|| victim.steal_batch_and_pop(queue));
            }
            if !steal.is_retry() {
                return steal.success();
            }
        }
    }

    /// How many tasks a worker takes from the shared queue at once: a few, or a quarter of its
    /// share where there are many. Tasks that a worker has taken wait for this worker, which may
    /// get less CPU time than the others.
    fn batch(&self) -> usize {
        let share = self.injector.len() / (4 * self.stealers.len());
        share.clamp(config::BATCH_MIN, config::BATCH_MAX)
    }

    /// The worker `offset` places after worker `index`.
    fn neighbour(&self, index: usize, offset: usize) -> &Stealer<Work> {
        &self.stealers[(index + offset) % self.stealers.len()]
    }

    fn has_work(&self) -> bool {
        !self.injector.is_empty() || self.stealers.iter().any(|stealer| !stealer.is_empty())
    }

    fn drop_shared(&self) {
        drop_all(|| self.injector.steal());
    }

    /// Takes a task from another queue than that of worker `index`; which one depends on how often
    /// the worker has looked.
    fn look_elsewhere(&self, index: usize, look: usize) -> Option<Work> {
        match (look % 2, self.stealers.len() - 1) {
            (0, _) | (_, 0) => self.injector.steal().success(),
            (_, others) => {
                let victim = self.neighbour(index, 1 + look / 2 % others);
                with_queue(|queue| victim.steal_batch_and_pop(queue).success())
            }
        }
    }
}

fn drop_all(steal: impl Fn() -> Steal<Work>) {
    loop {
        match steal() {
            Steal::Success(work) => user_code::discard(work),
            Steal::Retry => {}
            Steal::Empty => return,
        }
    }
}

fn work(shared: &Arc<Shared>, queue: Worker<Work>, index: usize, mut spin: Spin) {
    let workers = Workers(Arc::clone(shared));
    LOCAL.with(|local| *local.borrow_mut() = Some((Arc::clone(shared), queue)));
    let mut runs = 0_u32;
    loop {
        runs = runs.wrapping_add(1);
        let is_due = runs.is_multiple_of(config::RUNS_PER_LOOK);
        let look = (runs / config::RUNS_PER_LOOK) as usize;
        let elsewhere = is_due.then(|| shared.look_elsewhere(index, look)).flatten();
        let task = match elsewhere.or_else(|| with_queue(Worker::pop)) {
            Some(task) => task,
            None => match search(shared, index, &mut spin) {
                Some(task) => task,
                None => break,
            },
        };
        workers.run(task);
    }
    // Dropped outside the borrow: dropping the tasks in the queue may wake tasks of this worker.
    let left = LOCAL.with(|local| local.borrow_mut().take());
    drop(left);
}

/// Waits for a task. `None`: the set was stopped, and there is no task.
fn search(shared: &Shared, index: usize, spin: &mut Spin) -> Option<Work> {
    shared.parking.begin_search();
    loop {
        let found = look(shared, index).or_else(|| spin_for_task(shared, index, spin));
        if found.is_some() {
            shared.parking.found(|| shared.has_work());
            return found;
        }
        let began_ns = spin.is_enabled().then(now_ns);
        let woken = shared.parking.sleep(index, || shared.has_work());
        if let Some(began_ns) = began_ns {
            spin.record_sleep(now_ns() - began_ns);
        }
        match woken {
            Woken::Search => {}
            Woken::End => return None,
        }
    }
}

/// Looks for a task a few times.
fn look(shared: &Shared, index: usize) -> Option<Work> {
    (0..config::WORKER_LOOKS_MAX).find_map(|_| {
        let task = with_queue(|queue| shared.find(queue, index));
        if task.is_none() {
            std::hint::spin_loop();
        }
        task
    })
}

/// Looks for a task without sleeping while that pays. The worker counts as searching, so a push
/// meanwhile makes no system call.
fn spin_for_task(shared: &Shared, index: usize, spin: &mut Spin) -> Option<Work> {
    let budget_ns = spin.budget_ns();
    if budget_ns == 0 {
        return None;
    }
    shared.parking.forget_wake();
    let began_ns = now_ns();
    loop {
        // Usually this only reads memory that the other spinning workers read as well.
        let found =
            if shared.has_work() { with_queue(|queue| shared.find(queue, index)) } else { None };
        let spun_ns = now_ns() - began_ns;
        if found.is_some() {
            spin.record(true, spun_ns);
            return found;
        }
        if spun_ns >= budget_ns || shared.parking.is_stopped() {
            spin.record(false, spun_ns);
            return None;
        }
        std::hint::spin_loop();
    }
}

/// Calls `f` with the queue of the calling worker.
fn with_queue<T>(f: impl FnOnce(&Worker<Work>) -> Option<T>) -> Option<T> {
    LOCAL.with(|local| local.borrow().as_ref().and_then(|(_, queue)| f(queue)))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::task::Waker;
    use std::time::Duration;

    #[test]
    fn the_destructor_of_a_thread_local_may_wake_a_task() {
        struct WakesLate(Waker);
        impl Drop for WakesLate {
            fn drop(&mut self) {
                self.0.wake_by_ref();
            }
        }
        thread_local!(static LATE: Cell<Option<WakesLate>> = const { Cell::new(None) });
        let workers = Workers::start(1, &[], Spin::NEVER, TaskSet::new(), || {}).unwrap();
        let ((tells, told), (polls, polled)) = (mpsc::channel(), mpsc::channel());
        workers.spawn(std::future::poll_fn(move |cx| {
            let _ = (tells.send(cx.waker().clone()), polls.send(()));
            Poll::Pending
        }));
        let waker: Waker = told.recv_timeout(Duration::from_secs(10)).unwrap();
        thread::spawn(move || {
            // Destructors run in the reverse order of these first uses.
            LATE.set(Some(WakesLate(waker.clone())));
            waker.wake();
        })
        .join()
        .expect("a destructor that panics would abort the process");
        for _ in 0..2 {
            polled.recv_timeout(Duration::from_secs(10)).expect("each wake-up polls the task");
        }
        workers.stop(true);
    }

    #[test]
    fn every_task_runs_once_although_workers_sleep_in_between() {
        let workers = Workers::start(3, &[], Spin::NEVER, TaskSet::new(), || {}).unwrap();
        let (sender, receiver) = mpsc::channel();
        for round in 0..2000_usize {
            let sender = sender.clone();
            workers.spawn(async move { sender.send(round).unwrap() });
            if round % 7 == 0 {
                assert!(receiver.recv_timeout(Duration::from_secs(10)).is_ok(), "lost at {round}");
            }
        }
        drop(sender);
        let rest = receiver.iter().count();
        assert_eq!(rest, 2000 - 2000_usize.div_ceil(7));
        workers.stop(true);
    }

    #[test]
    fn what_a_worker_takes_at_once_leaves_the_others_their_share() {
        let queue = Worker::new_fifo();
        let shared = Shared {
            injector: Injector::new(),
            stealers: vec![queue.stealer(), Worker::new_fifo().stealer()],
            parking: Parking::new(2),
            tasks: TaskSet::new(),
            threads: Mutex::new(Vec::new()),
        };
        for (queued, taken) in [(1, 1), (20, config::BATCH_MIN), (2000, config::BATCH_MAX)] {
            let work = || Work::Poll(shared.tasks.spawn(async {}, |_| {}));
            (0..queued).for_each(|_| shared.injector.push(work()));
            assert!(shared.find(&queue, 0).is_some());
            // The shared queue may hand out fewer tasks than it is asked for.
            let rest = queued - shared.injector.len();
            assert!((1..=taken).contains(&rest) && queue.len() == rest - 1, "{rest} of {queued}");
            drop_all(|| shared.injector.steal());
            drop_all(|| queue.stealer().steal());
        }
    }

    #[test]
    fn workers_that_never_sleep_run_everything_and_end() {
        let always = Spin::new(crate::config::PollMode::Always, false);
        let workers = Workers::start(2, &[], always, TaskSet::new(), || {}).unwrap();
        let (sender, receiver) = mpsc::channel();
        for round in 0..100_usize {
            let sender = sender.clone();
            workers.spawn(async move { sender.send(round).unwrap() });
            assert_eq!(receiver.recv_timeout(Duration::from_secs(10)), Ok(round));
            assert!(workers.0.parking.has_no_sleeper());
        }
        workers.stop(true);
    }

    #[test]
    fn a_run_in_a_queue_is_started_or_given_up_once() {
        struct Counts {
            started: AtomicUsize,
            given_up: AtomicUsize,
        }
        impl Start for Counts {
            fn begin(self: Arc<Self>, _: &mut Context<'_>) -> Option<Run> {
                self.started.fetch_add(1, Ordering::Relaxed);
                None
            }
            fn give_up(self: Arc<Self>) {
                self.given_up.fetch_add(1, Ordering::Relaxed);
                panic!("on purpose");
            }
        }
        let run = Arc::new(Counts { started: AtomicUsize::new(0), given_up: AtomicUsize::new(0) });
        let workers = Workers::start(1, &[], Spin::NEVER, TaskSet::new(), || {}).unwrap();
        for _ in 0..10 {
            workers.begin(Queued::new(Arc::clone(&run) as _), None);
        }
        workers.stop(true);
        let counts = || {
            let (started, given_up) = (&run.started, &run.given_up);
            (started.load(Ordering::Relaxed), given_up.load(Ordering::Relaxed))
        };
        assert_eq!(counts(), (10, 0));
        // No worker is left.
        workers.begin(Queued::new(Arc::clone(&run) as _), None);
        assert_eq!(counts(), (10, 1));
        drop(Queued::new(Arc::clone(&run) as _));
        assert_eq!(counts(), (10, 2));
    }

    #[test]
    fn a_panicking_task_leaves_its_worker_alive() {
        let workers = Workers::start(1, &[], Spin::NEVER, TaskSet::new(), || {}).unwrap();
        let (sender, receiver) = mpsc::channel();
        workers.spawn(async { panic!("on purpose") });
        workers.spawn(async move { sender.send(()).unwrap() });
        assert!(receiver.recv_timeout(Duration::from_secs(10)).is_ok());
        workers.stop(true);
    }

    #[test]
    fn a_task_that_wakes_itself_for_ever_shuts_nobody_out() {
        let workers = Workers::start(1, &[], Spin::NEVER, TaskSet::new(), || {}).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let turns = Arc::new(AtomicUsize::new(0));
        let (until, count) = (Arc::clone(&stop), Arc::clone(&turns));
        workers.spawn(std::future::poll_fn(move |cx| {
            count.fetch_add(1, Ordering::Relaxed);
            if until.load(Ordering::Relaxed) {
                return std::task::Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            std::task::Poll::Pending
        }));
        let (sender, receiver) = mpsc::channel();
        workers.spawn(async move { sender.send(()).unwrap() });
        assert!(receiver.recv_timeout(Duration::from_secs(10)).is_ok());
        stop.store(true, Ordering::Relaxed);
        workers.stop(true);
        assert!(turns.load(Ordering::Relaxed) > 0);
    }
}
