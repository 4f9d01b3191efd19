//! Relief of a poller that a handler holds up.
//!
//! While a poller is [watched](Watched), it puts the jobs of a round into a queue, and takes them
//! out one by one. Other threads may take jobs from that queue. If the poller makes no progress,
//! its watcher moves these jobs to the workers, and sends the bytes in the poller's outbox.

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::thread::Thread;

use super::job::Job;
use super::{Command, Endpoint, Remote};
use crate::config;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Mutex, lock};
use crate::sys::usage::ThreadId;
use crate::task::{Used, Watched};

pub(super) struct Relief<E: Endpoint> {
    /// The jobs of the current round that the poller has not begun.
    jobs: Mutex<VecDeque<Job<E>>>,
    watchers: AtomicUsize,
    /// Counts what the poller begins. While the count does not change, the poller sleeps or is held
    /// up.
    progress: AtomicU64,
    /// A watcher has found the poller held up, and the poller has made no progress since.
    is_held_up: AtomicBool,
    /// The poller's thread, once it runs.
    thread: OnceLock<ThreadId>,
}

impl<E: Endpoint> Relief<E> {
    pub(super) fn new() -> Relief<E> {
        Relief {
            jobs: Mutex::new(VecDeque::new()),
            watchers: AtomicUsize::new(0),
            progress: AtomicU64::new(0),
            is_held_up: AtomicBool::new(false),
            thread: OnceLock::new(),
        }
    }

    /// Notes that the calling thread is the poller.
    pub(super) fn enter(&self) {
        self.thread.get_or_init(ThreadId::current);
    }

    #[inline]
    pub(super) fn is_watched(&self) -> bool {
        self.watchers.load(Ordering::Relaxed) > 0
    }

    #[inline]
    pub(super) fn is_held_up(&self) -> bool {
        self.is_held_up.load(Ordering::Relaxed)
    }

    /// Notes that the poller begins something. On the poller.
    #[inline]
    pub(super) fn count_progress(&self) {
        // No other thread writes the count.
        let count = self.progress.load(Ordering::Relaxed) + 1;
        self.progress.store(count, Ordering::Relaxed);
        if self.is_held_up() {
            self.is_held_up.store(false, Ordering::Relaxed);
        }
    }

    /// Puts jobs where other threads may take them.
    pub(super) fn offer(&self, jobs: impl Iterator<Item = Job<E>>) {
        lock(&self.jobs).extend(jobs);
    }

    /// Takes back the oldest job that no other thread has taken.
    pub(super) fn next(&self) -> Option<Job<E>> {
        lock(&self.jobs).pop_front()
    }

    /// Takes all jobs that the poller has not begun, in order.
    pub(super) fn take_jobs(&self) -> VecDeque<Job<E>> {
        std::mem::take(&mut lock(&self.jobs))
    }
}

impl<E: Endpoint> Watched for Remote<E> {
    fn watch(&self, on: bool) {
        match on {
            true => self.relief.watchers.fetch_add(1, Ordering::SeqCst),
            false => self.relief.watchers.fetch_sub(1, Ordering::SeqCst),
        };
    }

    fn progress(&self) -> u64 {
        self.relief.progress.load(Ordering::Relaxed)
    }

    fn is_asleep(&self) -> bool {
        self.mailbox().is_asleep()
    }

    fn call_when_awake(&self, watcher: &Thread) -> bool {
        self.mailbox().call_when_awake(watcher)
    }

    fn used(&self) -> Used {
        let thread = self.relief.thread.get();
        Used {
            cpu: thread.and_then(|thread| thread.cpu_time()).unwrap_or_default(),
            is_runnable: thread.is_some_and(|thread| thread.is_runnable()),
        }
    }

    fn relieve(&self) {
        self.relief.is_held_up.store(true, Ordering::Relaxed);
        let (movable, rest): (Vec<_>, Vec<_>) =
            self.relief.take_jobs().into_iter().partition(Job::is_movable);
        let is_movable = |command: &Command<E>| match command {
            Command::Run(job) => job.is_movable(),
            _ => false,
        };
        let commands = self.mailbox().take_if(config::RELIEF_COMMANDS_MAX, is_movable);
        let waiting = commands.into_iter().filter_map(|command| match command {
            Command::Run(job) => Some(job),
            _ => None,
        });
        // Move jobs before sending: sending may wake tasks, and wakers are user code, which may
        // block.
        movable.into_iter().chain(waiting).for_each(|job| {
            self.counters.add(|counters| &counters.moved_runs, 1);
            job.move_to_workers();
        });
        rest.into_iter().for_each(|job| self.send(Command::Run(job)));
        let mut outbox = Vec::new();
        self.mailbox().take_outbox(&mut outbox);
        for (endpoint, bytes) in outbox {
            endpoint.send_off_poller(bytes);
        }
    }
}
