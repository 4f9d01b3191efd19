//! Decides which workers sleep, and which one is woken when there is work.
//!
//! A worker without work *searches* for a while, then sleeps. One atomic word counts the searching
//! and the sleeping workers, so all threads see its changes in the same order. Sleeping workers are
//! also in a list. A worker falls asleep and is woken with the lock of the list held.
//!
//! ```text
//!            begin_search              sleep
//!   working ─────────────► searching ─────────► asleep
//!      ▲         found         │ ▲                │
//!      └───────────────────────┘ └────────────────┘
//!                                 notify: done by the thread that wakes the worker
//! ```
//!
//! No wake-up is lost:
//!
//! 1. A thread that pushes work looks at the word after the push. It wakes a sleeping worker,
//!    unless a worker is searching: then that worker has to see to the new work.
//! 2. A worker that ends its search changes the word first. Then it looks at the queues, if it was
//!    the last one that searched or if it goes to sleep. If it finds work, it takes the work or
//!    wakes another worker.
//!
//! Between the two steps of either side stands a `SeqCst` fence, so at least one side sees what the
//! other has done.
//!
//! A burst of pushes does not wake all workers: a worker that is woken counts as searching from
//! that moment, so the burst wakes one worker. This worker wakes the next one if it finds more work
//! than it takes. But where another worker computes on its CPU, a woken worker may not get to run.
//! So if it has found nothing after [`config::SEARCH_LATE`], the next push wakes one more worker,
//! which may get an idle CPU.

use std::time::Instant;

use crate::config;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use crate::sync::{Condvar, Mutex, lock, wait};

/// Which workers of a set search, sleep and work. Workers are known by their index.
pub(super) struct Parking {
    /// The searching workers, in units of [`SEARCHER`], the sleeping workers, in units of
    /// [`SLEEPER`], and the bit [`STOPPED`].
    word: AtomicUsize,
    /// The sleeping workers. The last one is woken first: its caches are the warmest.
    sleepers: Mutex<Vec<usize>>,
    /// For each worker: notified when the worker has left the list.
    woken: Box<[Condvar]>,
    started: Instant,
    /// When a worker was last woken, in nanoseconds since the start; 0 while no worker searches. A
    /// wrong value costs at most one needless wake-up.
    woken_ns: AtomicU64,
}

/// What a worker has to do after [`Parking::sleep`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woken {
    /// Search: the worker counts as searching.
    Search,
    /// End its thread: the set was stopped, and there is no work.
    End,
}

const STOPPED: usize = 1;
const SLEEPER: usize = 2;
const SEARCHER: usize = 1 << 16;
const _: () = assert!(crate::config::THREADS_MAX * SLEEPER < SEARCHER, "sleepers have 15 bits");

impl Parking {
    /// For `count` workers, which all count as working.
    pub(super) fn new(count: usize) -> Parking {
        Parking {
            word: AtomicUsize::new(0),
            sleepers: Mutex::new(Vec::with_capacity(count)),
            woken: (0..count).map(|_| Condvar::new()).collect(),
            started: Instant::now(),
            woken_ns: AtomicU64::new(0),
        }
    }

    /// To be called after work was pushed: wakes a worker, unless a worker searches and is not
    /// late. `false`: the set was stopped, so it may be that no worker takes the work.
    #[inline]
    pub(super) fn notify(&self) -> bool {
        fence(Ordering::SeqCst);
        let word = self.word.load(Ordering::Relaxed);
        if sleepers(word) > 0 && (searchers(word) == 0 || self.is_late()) {
            self.wake_one();
        }
        word & STOPPED == 0
    }

    fn wake_one(&self) {
        let mut sleepers = lock(&self.sleepers);
        let word = self.word.load(Ordering::Relaxed);
        if searchers(word) > 0 && !self.is_late() {
            return;
        }
        let Some(index) = sleepers.pop() else { return };
        self.woken_ns.store(self.now_ns(), Ordering::Relaxed);
        // The worker counts as searching from now on, so the next push does not wake another one.
        self.word.fetch_add(SEARCHER - SLEEPER, Ordering::Relaxed);
        drop(sleepers);
        self.woken[index].notify_one();
    }

    /// The calling worker has no work, and searches for some.
    pub(super) fn begin_search(&self) {
        self.word.fetch_add(SEARCHER, Ordering::Relaxed);
    }

    /// The calling worker has found work. If no other worker searches, or the others are late, it
    /// wakes a worker for more work in the queues.
    pub(super) fn found(&self, has_work: impl Fn() -> bool) {
        let before = self.word.fetch_sub(SEARCHER, Ordering::Relaxed);
        let is_last = searchers(before) == 1;
        if is_last {
            self.forget_wake();
        }
        if sleepers(before) > 0 && (is_last || self.is_late()) {
            // Work that was pushed during the search has woken no worker.
            fence(Ordering::SeqCst);
            if has_work() {
                self.notify();
            }
        }
    }

    /// The calling worker, `index`, has found no work: sleeps until there is work, or until the set
    /// is stopped.
    pub(super) fn sleep(&self, index: usize, has_work: impl Fn() -> bool) -> Woken {
        let mut sleepers = lock(&self.sleepers);
        sleepers.push(index);
        let before = self.word.fetch_sub(SEARCHER - SLEEPER, Ordering::Relaxed);
        if searchers(before) == 1 {
            self.forget_wake();
        }
        // Work that was pushed during the search has woken no worker.
        fence(Ordering::SeqCst);
        let stopped = self.is_stopped();
        let found = has_work();
        if found || stopped {
            let own = sleepers.pop();
            assert_eq!(own, Some(index), "the lock was held");
            self.word.fetch_add(SEARCHER - SLEEPER, Ordering::Relaxed);
            return if found { Woken::Search } else { Woken::End };
        }
        while sleepers.contains(&index) {
            sleepers = wait(&self.woken[index], sleepers);
        }
        Woken::Search
    }

    /// Wakes all workers. From now on a worker that finds no work ends instead of sleeping.
    pub(super) fn stop(&self) {
        let mut sleepers = lock(&self.sleepers);
        let woken = std::mem::take(&mut *sleepers);
        self.word.fetch_or(STOPPED, Ordering::Relaxed);
        self.word.fetch_add(woken.len() * (SEARCHER - SLEEPER), Ordering::Relaxed);
        drop(sleepers);
        for index in woken {
            self.woken[index].notify_one();
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.word.load(Ordering::Relaxed) & STOPPED != 0
    }

    #[cfg(all(test, not(loom)))]
    pub(super) fn has_no_sleeper(&self) -> bool {
        sleepers(self.word.load(Ordering::Relaxed)) == 0
    }

    /// No worker is late any more: no worker searches, or the calling worker does and will see new
    /// work.
    pub(super) fn forget_wake(&self) {
        if self.woken_ns.load(Ordering::Relaxed) != 0 {
            self.woken_ns.store(0, Ordering::Relaxed);
        }
    }

    /// The worker that was woken last has not found work in time, or has not begun to search.
    #[inline]
    fn is_late(&self) -> bool {
        let woken_ns = self.woken_ns.load(Ordering::Relaxed);
        let late_ns = config::SEARCH_LATE.as_nanos() as u64;
        // A loom model has no clock.
        !cfg!(loom) && woken_ns != 0 && self.now_ns().saturating_sub(woken_ns) >= late_ns
    }

    fn now_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }
}

fn searchers(word: usize) -> usize {
    word / SEARCHER
}

fn sleepers(word: usize) -> usize {
    word % SEARCHER / SLEEPER
}

#[cfg(all(test, not(loom)))]
mod lateness {
    use super::*;
    use std::sync::{Arc, mpsc};
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_worker_that_was_woken_and_finds_nothing_is_not_relied_on() {
        let parking = Arc::new(Parking::new(2));
        let (woken, who) = mpsc::channel();
        let sleepers: Vec<_> = (0..2)
            .map(|index| {
                let (parking, woken) = (Arc::clone(&parking), woken.clone());
                thread::spawn(move || {
                    parking.begin_search();
                    parking.sleep(index, || false);
                    // It never calls `found`, like a worker that gets no CPU.
                    woken.send(index).unwrap();
                })
            })
            .collect();
        while sleepers_of(&parking) < 2 {
            thread::yield_now();
        }
        parking.notify();
        let first = who.recv_timeout(Duration::from_secs(10)).unwrap();
        // While work is pushed, the other one is woken sooner or later.
        let other = (0..10_000).find_map(|_| {
            parking.notify();
            who.recv_timeout(Duration::from_millis(1)).ok()
        });
        assert_eq!(other, Some(1 - first));
        sleepers.into_iter().for_each(|thread| thread.join().unwrap());
    }

    fn sleepers_of(parking: &Parking) -> usize {
        sleepers(parking.word.load(Ordering::Relaxed))
    }
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use crate::sync::Arc;
    use loom::thread::{self, JoinHandle};

    /// Workers without queues. The work is a number, with the weakest ordering that a queue may
    /// have.
    struct Set {
        parking: Parking,
        work: AtomicUsize,
        done: Mutex<usize>,
        changed: Condvar,
    }

    impl Set {
        fn start(workers: usize) -> (Arc<Set>, Vec<JoinHandle<()>>) {
            let set = Arc::new(Set {
                parking: Parking::new(workers.max(1)),
                work: AtomicUsize::new(0),
                done: Mutex::new(0),
                changed: Condvar::new(),
            });
            let start = |index| {
                let set = Arc::clone(&set);
                thread::spawn(move || set.serve(index))
            };
            let workers = (0..workers).map(start).collect();
            (set, workers)
        }

        fn push(&self) -> bool {
            self.work.fetch_add(1, Ordering::Release);
            self.parking.notify()
        }

        fn has_work(&self) -> bool {
            self.work.load(Ordering::Relaxed) > 0
        }

        fn take(&self) -> bool {
            let mut left = self.work.load(Ordering::Relaxed);
            while left > 0 {
                let (taken, not) = (Ordering::Acquire, Ordering::Relaxed);
                match self.work.compare_exchange(left, left - 1, taken, not) {
                    Ok(_) => return true,
                    Err(now) => left = now,
                }
            }
            false
        }

        fn serve(&self, index: usize) {
            loop {
                self.parking.begin_search();
                while !self.take() {
                    match self.parking.sleep(index, || self.has_work()) {
                        Woken::Search => {}
                        Woken::End => return,
                    }
                }
                self.parking.found(|| self.has_work());
                *lock(&self.done) += 1;
                self.changed.notify_one();
            }
        }

        /// Waits until so much is done. A lost wake-up would make this wait for ever.
        fn await_done(&self, count: usize) {
            let mut done = lock(&self.done);
            while *done < count {
                done = wait(&self.changed, done);
            }
        }
    }

    /// Checks all interleavings with two preemptions. With any number of preemptions, three threads
    /// would take hours.
    fn model(run: impl Fn() + Send + Sync + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = model.preemption_bound.or(Some(2));
        model.check(run);
    }

    /// Each producer pushes once. All work is done before the set is stopped.
    fn nobody_sleeps_on(producers: usize, workers: usize) {
        model(move || {
            let (set, working) = Set::start(workers);
            let others: Vec<_> = (1..producers)
                .map(|_| {
                    let set = Arc::clone(&set);
                    // The work may be done, and the set stopped, before `notify` looks at the word.
                    thread::spawn(move || {
                        set.push();
                    })
                })
                .collect();
            set.push();
            set.await_done(producers);
            set.parking.stop();
            for thread in others.into_iter().chain(working) {
                thread.join().expect("does not panic");
            }
        });
    }

    #[test]
    fn loom_a_worker_that_falls_asleep_misses_no_push() {
        nobody_sleeps_on(1, 1);
    }

    #[test]
    fn loom_two_producers_and_a_worker_miss_nothing() {
        nobody_sleeps_on(2, 1);
    }

    #[test]
    fn loom_two_workers_do_not_leave_a_push_to_each_other() {
        nobody_sleeps_on(1, 2);
    }

    /// One worker searches, and what it finds will block it; the other worker sleeps. Whether the
    /// producer sees the searching worker or not, one of them wakes the sleeping one.
    #[test]
    fn loom_who_is_held_up_by_what_it_found_has_woken_another_for_the_rest() {
        loom::model(|| {
            let (set, _) = Set::start(0);
            lock(&set.parking.sleepers).push(0);
            set.parking.word.fetch_add(SLEEPER + SEARCHER, Ordering::Relaxed);
            set.work.store(1, Ordering::Relaxed);
            let pushes = {
                let set = Arc::clone(&set);
                thread::spawn(move || {
                    set.push();
                })
            };
            assert!(set.take());
            set.parking.found(|| set.has_work());
            pushes.join().expect("does not panic");
            assert!(set.has_work() && lock(&set.parking.sleepers).is_empty(), "sleeps on");
        });
    }

    #[test]
    fn loom_a_stop_ends_workers_asleep_or_about_to_be() {
        model(|| {
            let (set, working) = Set::start(2);
            set.parking.stop();
            for thread in working {
                thread.join().expect("does not panic");
            }
        });
    }

    #[test]
    fn loom_what_is_pushed_while_the_set_stops_is_done_or_known_to_be_left() {
        model(|| {
            let (set, working) = Set::start(1);
            let stops = {
                let set = Arc::clone(&set);
                thread::spawn(move || set.parking.stop())
            };
            let is_taken_on = set.push();
            for thread in working.into_iter().chain([stops]) {
                thread.join().expect("does not panic");
            }
            assert!(*lock(&set.done) == 1 || !is_taken_on, "left behind");
        });
    }

    /// Two producers push a burst each, while two workers sleep.
    #[test]
    fn loom_a_burst_wakes_one_and_that_one_the_next() {
        model(|| {
            let parking = Arc::new(Parking::new(2));
            lock(&parking.sleepers).extend([0, 1]);
            parking.word.fetch_add(2 * SLEEPER, Ordering::Relaxed);
            let burst = |parking: &Parking| assert!(parking.notify() && parking.notify());
            let other = thread::spawn({
                let parking = Arc::clone(&parking);
                move || burst(&parking)
            });
            burst(&parking);
            other.join().expect("does not panic");
            assert_eq!(*lock(&parking.sleepers), [0]);
            assert_eq!(parking.word.load(Ordering::Relaxed), SEARCHER + SLEEPER);
            parking.found(|| false);
            assert_eq!(parking.word.load(Ordering::Relaxed), SLEEPER);
            parking.begin_search();
            parking.found(|| true);
            assert_eq!(parking.word.load(Ordering::Relaxed), SEARCHER);
            assert!(lock(&parking.sleepers).is_empty());
        });
    }
}
