//! Work-stealing worker threads.
//!
//! Tasks woken on a worker go to that worker's own queue, all others to a shared one; a worker
//! without work takes from the shared queue, then from its neighbours. At most one worker is woken
//! ahead of need: the one that finds work wakes the next, so a burst neither waits nor wakes a
//! herd.
//!
//! No lost wake-up: a producer pushes, then looks for sleepers; a worker announces its sleep, then
//! looks for work. Both put a `SeqCst` fence between the two steps, so at least one of them sees
//! the other.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::thread::{self, JoinHandle, Thread};

use crossbeam_deque::{Injector, Stealer, Worker};

use super::Runnable;
use crate::config;
use crate::error::{Error, Result};
use crate::sync::{Mutex, lock};
use crate::threads;

/// A set of worker threads. Clones share it.
#[derive(Clone)]
pub(crate) struct Workers(Arc<Shared>);

struct Shared {
    injector: Injector<Runnable>,
    stealers: Vec<Stealer<Runnable>>,
    sleepers: Mutex<Vec<Thread>>,
    sleeper_count: AtomicUsize,
    /// Workers looking for work; while there is one, nobody else needs waking.
    searching: AtomicUsize,
    stopping: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

thread_local! {
    /// The queue of the worker that this thread is, with the set it belongs to.
    static LOCAL: RefCell<Option<(Arc<Shared>, Worker<Runnable>)>> = const { RefCell::new(None) };
}

impl Workers {
    /// Starts `count` threads, or one per CPU for 0.
    pub(crate) fn start(count: usize, cpus: &[usize]) -> Result<Workers> {
        let count = if count == 0 { threads::cpu_count(cpus) } else { count };
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
            sleepers: Mutex::new(Vec::with_capacity(count)),
            sleeper_count: AtomicUsize::new(0),
            searching: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            threads: Mutex::new(Vec::with_capacity(count)),
        });
        let workers = Workers(Arc::clone(&shared));
        for (index, queue) in queues.into_iter().enumerate() {
            let shared = Arc::clone(&shared);
            let started = threads::spawn(&format!("ringpoll-w{index}"), cpus.to_vec(), move || {
                work(&shared, queue, index);
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

    pub(crate) fn count(&self) -> usize {
        self.0.stealers.len()
    }

    /// Makes a task of `future`, which runs here.
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        let again = self.clone();
        self.schedule(super::spawn(future, move |task| again.schedule(task)));
    }

    /// Queues a task, and wakes a worker if none is looking for work.
    pub(crate) fn schedule(&self, runnable: Runnable) {
        let rest = LOCAL.with(|local| match &*local.borrow() {
            Some((shared, queue)) if Arc::ptr_eq(shared, &self.0) => {
                queue.push(runnable);
                None
            }
            _ => Some(runnable),
        });
        if let Some(runnable) = rest {
            self.0.injector.push(runnable);
        }
        self.0.wake_one();
    }

    /// Ends the threads when they have run out of tasks; joins them, if `join`, but for the one
    /// this is called on.
    pub(crate) fn stop(&self, join: bool) {
        self.0.stopping.store(true, Ordering::SeqCst);
        for sleeper in lock(&self.0.sleepers).iter() {
            sleeper.unpark();
        }
        let threads = std::mem::take(&mut *lock(&self.0.threads));
        for thread in threads {
            if join && thread.thread().id() != thread::current().id() {
                // A worker's panic was reported when it happened; the tasks' own are caught.
                let _ = thread.join();
            }
        }
        // What was queued meanwhile is dropped: its guards report it as ended.
        while let crossbeam_deque::Steal::Success(_) | crossbeam_deque::Steal::Retry =
            self.0.injector.steal()
        {}
    }
}

impl Shared {
    fn wake_one(&self) {
        fence(Ordering::SeqCst);
        if self.searching.load(Ordering::SeqCst) > 0
            || self.sleeper_count.load(Ordering::SeqCst) == 0
        {
            return;
        }
        let sleeper = {
            let mut sleepers = lock(&self.sleepers);
            let sleeper = sleepers.pop();
            self.sleeper_count.store(sleepers.len(), Ordering::SeqCst);
            if sleeper.is_some() {
                // On the sleeper's behalf, so that the next producer does not wake another.
                self.searching.fetch_add(1, Ordering::SeqCst);
            }
            sleeper
        };
        if let Some(sleeper) = sleeper {
            sleeper.unpark();
        }
    }

    fn find(&self, queue: &Worker<Runnable>, index: usize) -> Option<Runnable> {
        loop {
            let mut steal = self.injector.steal_batch_and_pop(queue);
            for offset in 1..self.stealers.len() {
                if steal.is_success() {
                    break;
                }
                let victim = &self.stealers[(index + offset) % self.stealers.len()];
                steal = steal.or_else(|| victim.steal_batch_and_pop(queue));
            }
            if !steal.is_retry() {
                return steal.success();
            }
        }
    }

    fn has_work(&self) -> bool {
        !self.injector.is_empty() || self.stealers.iter().any(|stealer| !stealer.is_empty())
    }

    /// Sleeps until woken; whoever wakes a worker counts it as searching.
    fn sleep(&self) {
        let me = thread::current();
        {
            let mut sleepers = lock(&self.sleepers);
            sleepers.push(me.clone());
            self.sleeper_count.store(sleepers.len(), Ordering::SeqCst);
        }
        self.searching.fetch_sub(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        loop {
            if self.has_work() || self.stopping.load(Ordering::SeqCst) {
                let mut sleepers = lock(&self.sleepers);
                if let Some(index) = sleepers.iter().position(|sleeper| sleeper.id() == me.id()) {
                    sleepers.swap_remove(index);
                    self.sleeper_count.store(sleepers.len(), Ordering::SeqCst);
                    self.searching.fetch_add(1, Ordering::SeqCst);
                }
                return;
            }
            if !lock(&self.sleepers).iter().any(|sleeper| sleeper.id() == me.id()) {
                return;
            }
            thread::park();
        }
    }
}

fn work(shared: &Arc<Shared>, queue: Worker<Runnable>, index: usize) {
    LOCAL.with(|local| *local.borrow_mut() = Some((Arc::clone(shared), queue)));
    loop {
        // Every few tasks from the shared queue first: a task that always wakes itself must not
        // shut out the others.
        let mut fair = 0_u32;
        while let Some(task) = take_local(shared, &mut fair) {
            super::run(task);
        }
        shared.searching.fetch_add(1, Ordering::SeqCst);
        let Some(task) = search(shared, index) else { break };
        let last = shared.searching.fetch_sub(1, Ordering::SeqCst) == 1;
        if last && shared.has_work() {
            shared.wake_one();
        }
        super::run(task);
    }
    // Dropped outside the borrow: the tasks left in the queue may wake others.
    let left = LOCAL.with(|local| local.borrow_mut().take());
    drop(left);
}

fn take_local(shared: &Shared, fair: &mut u32) -> Option<Runnable> {
    *fair = fair.wrapping_add(1);
    if fair.is_multiple_of(61)
        && let crossbeam_deque::Steal::Success(task) = shared.injector.steal()
    {
        return Some(task);
    }
    with_queue(Worker::pop)
}

/// Looks for work, sleeping in between. Entered and left as one that counts as searching, but for
/// `None`: stopping.
fn search(shared: &Shared, index: usize) -> Option<Runnable> {
    loop {
        for _ in 0..config::WORKER_SPINS_MAX {
            if let Some(task) = with_queue(|queue| shared.find(queue, index)) {
                return Some(task);
            }
            std::hint::spin_loop();
        }
        if shared.stopping.load(Ordering::SeqCst) {
            shared.searching.fetch_sub(1, Ordering::SeqCst);
            return None;
        }
        shared.sleep();
    }
}

fn with_queue<T>(f: impl FnOnce(&Worker<Runnable>) -> Option<T>) -> Option<T> {
    LOCAL.with(|local| local.borrow().as_ref().and_then(|(_, queue)| f(queue)))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn every_task_runs_once_although_workers_sleep_in_between() {
        let workers = Workers::start(3, &[]).unwrap();
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
    fn a_panicking_task_leaves_its_worker_alive() {
        let workers = Workers::start(1, &[]).unwrap();
        let (sender, receiver) = mpsc::channel();
        workers.spawn(async { panic!("on purpose") });
        workers.spawn(async move { sender.send(()).unwrap() });
        assert!(receiver.recv_timeout(Duration::from_secs(10)).is_ok());
        workers.stop(true);
    }

    #[test]
    fn a_task_that_wakes_itself_for_ever_shuts_nobody_out() {
        let workers = Workers::start(1, &[]).unwrap();
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
