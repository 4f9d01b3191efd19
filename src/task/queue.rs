//! Work-stealing worker threads.
//!
//! Each worker owns a queue, and all workers of a set share another queue. A task that is woken on
//! a worker goes to the queue of this worker; every other task goes to the shared queue. A worker
//! whose queue is empty takes tasks from the shared queue, then from the queues of other workers.
//! [`Parking`] decides which workers sleep and which are woken.
//!
//! No task waits for ever. All queues are first in, first out. After every
//! [`config::RUNS_PER_LOOK`] runs a worker looks at another queue before its own: in turn at the
//! shared queue and at the queue of another worker. So a task that wakes itself again and again
//! does not starve other tasks, and tasks behind a handler that blocks its worker are taken over by
//! other workers, half of them at a time, even while the shared queue is never empty.

use std::cell::RefCell;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crossbeam_deque::{Injector, Steal, Stealer, Worker};

use super::Runnable;
use super::parking::{Parking, Woken};
use crate::config;
use crate::error::{Error, Result};
use crate::sync::{Mutex, lock};
use crate::threads;

/// A set of worker threads. Clones are handles to the same set.
#[derive(Clone)]
pub(crate) struct Workers(Arc<Shared>);

struct Shared {
    injector: Injector<Runnable>,
    stealers: Vec<Stealer<Runnable>>,
    parking: Parking,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

thread_local! {
    /// On a worker: its queue, and the set that the worker belongs to.
    static LOCAL: RefCell<Option<(Arc<Shared>, Worker<Runnable>)>> = const { RefCell::new(None) };
}

impl Workers {
    /// Starts `count` threads, or one per CPU for 0. Each thread calls `begin` first. The threads
    /// are pinned to `cpus`, unless that is empty.
    ///
    /// # Errors
    /// Invalid: `count` is more than [`config::THREADS_MAX`], or the process may not use one of
    /// `cpus`. Also the kernel's error if a thread cannot be started.
    pub(crate) fn start(count: usize, cpus: &[usize], begin: fn()) -> Result<Workers> {
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
            parking: Parking::new(count),
            threads: Mutex::new(Vec::with_capacity(count)),
        });
        let workers = Workers(Arc::clone(&shared));
        for (index, queue) in queues.into_iter().enumerate() {
            let shared = Arc::clone(&shared);
            let started = threads::spawn(&format!("ringpoll-w{index}"), cpus.to_vec(), move || {
                begin();
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

    /// Makes a task of `future` and queues it.
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        let again = self.clone();
        self.schedule(super::spawn(future, move |task| again.schedule(task)));
    }

    /// Queues a task, and wakes a worker if none is searching for work. After [`stop`](Self::stop)
    /// no worker may be there to run the task: then it is dropped, which ends its run.
    pub(crate) fn schedule(&self, runnable: Runnable) {
        let for_shared_queue = LOCAL.with(|local| match &*local.borrow() {
            Some((shared, queue)) if Arc::ptr_eq(shared, &self.0) => {
                queue.push(runnable);
                None
            }
            _ => Some(runnable),
        });
        if let Some(runnable) = for_shared_queue {
            self.0.injector.push(runnable);
        }
        if !self.0.parking.notify() {
            self.0.drop_shared();
        }
    }

    /// Ends each thread when it finds no task. With `join` this waits for all threads but the
    /// calling one. Then all tasks in the queues are dropped.
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
    LOCAL.with(|local| local.borrow().is_some())
}

impl Shared {
    /// Takes tasks from the shared queue, or else from another worker. All but the first go to
    /// `queue`, which is that of worker `index`.
    fn find(&self, queue: &Worker<Runnable>, index: usize) -> Option<Runnable> {
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
    fn neighbour(&self, index: usize, offset: usize) -> &Stealer<Runnable> {
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
    fn look_elsewhere(&self, index: usize, look: usize) -> Option<Runnable> {
        match (look % 2, self.stealers.len() - 1) {
            (0, _) | (_, 0) => self.injector.steal().success(),
            (_, others) => {
                let victim = self.neighbour(index, 1 + look / 2 % others);
                with_queue(|queue| victim.steal_batch_and_pop(queue).success())
            }
        }
    }
}

fn drop_all(steal: impl Fn() -> Steal<Runnable>) {
    loop {
        match steal() {
            Steal::Success(task) => super::give_up(task),
            Steal::Retry => {}
            Steal::Empty => return,
        }
    }
}

fn work(shared: &Arc<Shared>, queue: Worker<Runnable>, index: usize) {
    LOCAL.with(|local| *local.borrow_mut() = Some((Arc::clone(shared), queue)));
    let mut runs = 0_u32;
    loop {
        runs = runs.wrapping_add(1);
        let is_due = runs.is_multiple_of(config::RUNS_PER_LOOK);
        let look = (runs / config::RUNS_PER_LOOK) as usize;
        let elsewhere = is_due.then(|| shared.look_elsewhere(index, look)).flatten();
        let task = match elsewhere.or_else(|| with_queue(Worker::pop)) {
            Some(task) => task,
            None => match search(shared, index) {
                Some(task) => task,
                None => break,
            },
        };
        super::run(task);
    }
    // Dropped outside the borrow: dropping the tasks in the queue may wake tasks of this worker.
    let left = LOCAL.with(|local| local.borrow_mut().take());
    drop(left);
}

/// Waits for a task. `None`: the set was stopped, and there is no task.
fn search(shared: &Shared, index: usize) -> Option<Runnable> {
    shared.parking.begin_search();
    loop {
        for _ in 0..config::WORKER_SPINS_MAX {
            if let Some(task) = with_queue(|queue| shared.find(queue, index)) {
                shared.parking.found(|| shared.has_work());
                return Some(task);
            }
            std::hint::spin_loop();
        }
        match shared.parking.sleep(index, || shared.has_work()) {
            Woken::Search => {}
            Woken::End => return None,
        }
    }
}

/// Calls `f` with the queue of the calling worker.
fn with_queue<T>(f: impl FnOnce(&Worker<Runnable>) -> Option<T>) -> Option<T> {
    LOCAL.with(|local| local.borrow().as_ref().and_then(|(_, queue)| f(queue)))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn every_task_runs_once_although_workers_sleep_in_between() {
        let workers = Workers::start(3, &[], || {}).unwrap();
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
            threads: Mutex::new(Vec::new()),
        };
        for (queued, taken) in [(1, 1), (20, config::BATCH_MIN), (2000, config::BATCH_MAX)] {
            (0..queued).for_each(|_| shared.injector.push(crate::task::spawn(async {}, |_| {})));
            assert!(shared.find(&queue, 0).is_some());
            // The shared queue may hand out fewer tasks than it is asked for.
            let rest = queued - shared.injector.len();
            assert!((1..=taken).contains(&rest) && queue.len() == rest - 1, "{rest} of {queued}");
            drop_all(|| shared.injector.steal());
            drop_all(|| queue.stealer().steal());
        }
    }

    #[test]
    fn a_panicking_task_leaves_its_worker_alive() {
        let workers = Workers::start(1, &[], || {}).unwrap();
        let (sender, receiver) = mpsc::channel();
        workers.spawn(async { panic!("on purpose") });
        workers.spawn(async move { sender.send(()).unwrap() });
        assert!(receiver.recv_timeout(Duration::from_secs(10)).is_ok());
        workers.stop(true);
    }

    #[test]
    fn a_task_that_wakes_itself_for_ever_shuts_nobody_out() {
        let workers = Workers::start(1, &[], || {}).unwrap();
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
