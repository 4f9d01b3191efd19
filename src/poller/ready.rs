//! What a poller is about to run, where others can take it.
//!
//! Usually a poller runs what a round has collected from memory of its own. While somebody watches
//! it ([`Watched`]) it puts the jobs of a round into a queue first that can be stolen from, and
//! takes them one by one: then a handler that holds it up holds up nobody else for long.

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::thread::Thread;

use crossbeam_deque::{Steal, Stealer, Worker};

use super::{Action, Command, Endpoint, Remote};
use crate::buffer::Chain;
use crate::config;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, lock};
use crate::sys::usage::ThreadId;
use crate::task::{self, Runnable, Used, Watched, Workers};

/// Something to run.
pub(crate) enum Job<E: Endpoint> {
    /// A run that has started.
    Begin(Arc<E>, E::Handed),
    /// Another action of an endpoint.
    Act(Arc<E>, Action),
    /// A task that was woken, and the workers that may run it as well, if there are any.
    Poll(Runnable, Option<Workers>),
}

impl<E: Endpoint> Job<E> {
    /// Whether workers may run it.
    fn is_movable(&self) -> bool {
        match self {
            Job::Begin(endpoint, _) => endpoint.is_movable(),
            Job::Act(..) => false,
            Job::Poll(_, workers) => workers.is_some(),
        }
    }

    /// Nobody will run it any more.
    pub(super) fn abandon(self) {
        match self {
            Job::Begin(endpoint, handed) => endpoint.give_up(handed),
            // A task that is dropped ends its run.
            Job::Poll(runnable, _) => task::give_up(runnable),
            // About an endpoint that the end of the poller removes.
            Job::Act(..) => {}
        }
    }

    /// Leaves it to its poller after all.
    fn into_command(self) -> Command<E> {
        match self {
            Job::Begin(endpoint, handed) => Command::Again(endpoint, handed),
            Job::Act(endpoint, action) => Command::Act(endpoint, action),
            Job::Poll(runnable, workers) => Command::Run(runnable, workers),
        }
    }

    /// Has workers run it.
    fn hand_over(self) {
        match self {
            Job::Begin(endpoint, handed) => endpoint.run_elsewhere(handed),
            Job::Act(_, action) => unreachable!("{action:?} is the poller's"),
            Job::Poll(runnable, Some(workers)) => workers.schedule(runnable),
            Job::Poll(_, None) => unreachable!("no workers may run it"),
        }
    }
}

/// Bytes to be sent.
pub(super) type Flushed<E> = Vec<(Arc<E>, Chain)>;

/// What one poller has before it.
pub(super) struct Ready<E: Endpoint> {
    /// Jobs of a round that is too long for the poller's queue, behind those in it.
    behind: Mutex<VecDeque<Job<E>>>,
    /// What handlers on the poller have flushed while it was watched, and it has not sent yet.
    flushed: Mutex<Flushed<E>>,
    watchers: AtomicUsize,
    /// Counts what the poller does: as long as it stands still, the poller is asleep or held up.
    turns: AtomicU64,
    /// Somebody has found the poller held up in its present turn.
    held_up: AtomicBool,
    /// The poller, once it runs.
    poller: OnceLock<Running<E>>,
}

struct Running<E: Endpoint> {
    thread: ThreadId,
    jobs: Stealer<Job<E>>,
}

impl<E: Endpoint> Ready<E> {
    pub(super) fn new() -> Ready<E> {
        Ready {
            behind: Mutex::new(VecDeque::new()),
            flushed: Mutex::new(Vec::new()),
            watchers: AtomicUsize::new(0),
            turns: AtomicU64::new(0),
            held_up: AtomicBool::new(false),
            poller: OnceLock::new(),
        }
    }

    /// The calling thread is the poller, and runs what is in `jobs`.
    pub(super) fn own(&self, jobs: &Worker<Job<E>>) {
        self.poller.get_or_init(|| Running { thread: ThreadId::current(), jobs: jobs.stealer() });
    }

    #[inline]
    pub(super) fn is_watched(&self) -> bool {
        self.watchers.load(Ordering::Relaxed) > 0
    }

    /// Puts jobs behind those in the poller's queue.
    pub(super) fn put_behind(&self, jobs: impl Iterator<Item = Job<E>>) {
        lock(&self.behind).extend(jobs);
    }

    /// Takes some of those into the queue, which is empty; `false`: there are none.
    pub(super) fn take_up(&self, queue: &Worker<Job<E>>) -> bool {
        let mut behind = lock(&self.behind);
        let count = behind.len().min(config::OPEN_JOBS_MAX);
        behind.drain(..count).for_each(|job| queue.push(job));
        count > 0
    }

    /// Swaps what was flushed into `into`, which is empty.
    pub(super) fn take_flushed(&self, into: &mut Flushed<E>) {
        std::mem::swap(&mut *lock(&self.flushed), into);
    }

    /// On the poller: it begins something.
    #[inline]
    pub(super) fn turn(&self) {
        // Only the poller counts.
        self.turns.store(self.turns.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        if self.held_up.load(Ordering::Relaxed) {
            self.held_up.store(false, Ordering::Relaxed);
        }
    }

    /// Takes what the poller has not begun, in order.
    pub(super) fn steal(&self) -> Vec<Job<E>> {
        let Some(poller) = self.poller.get() else { return Vec::new() };
        let mut stolen = Vec::new();
        loop {
            match poller.jobs.steal() {
                Steal::Success(job) => stolen.push(job),
                Steal::Retry => {}
                Steal::Empty => break,
            }
        }
        stolen.extend(lock(&self.behind).drain(..));
        stolen
    }
}

impl<E: Endpoint> Watched for Remote<E> {
    fn watch(&self, on: bool) {
        match on {
            true => self.ready.watchers.fetch_add(1, Ordering::SeqCst),
            false => self.ready.watchers.fetch_sub(1, Ordering::SeqCst),
        };
    }

    fn progress(&self) -> u64 {
        self.ready.turns.load(Ordering::Relaxed)
    }

    fn is_asleep(&self) -> bool {
        self.inbox().is_asleep()
    }

    fn call_when_awake(&self, watcher: &Thread) -> bool {
        self.inbox().call_when_awake(watcher)
    }

    fn used(&self) -> Used {
        let thread = self.ready.poller.get().map(|poller| &poller.thread);
        Used {
            cpu: thread.and_then(|thread| thread.cpu_time()).unwrap_or_default(),
            is_runnable: thread.is_some_and(|thread| thread.is_runnable()),
        }
    }

    fn relieve(&self) {
        self.ready.held_up.store(true, Ordering::Relaxed);
        let mut flushed = Vec::new();
        self.ready.take_flushed(&mut flushed);
        for (endpoint, bytes) in flushed {
            endpoint.send_here(bytes);
        }
        let (movable, rest): (Vec<_>, Vec<_>) =
            self.ready.steal().into_iter().partition(Job::is_movable);
        let hand_over = |job: Job<E>| {
            self.counters.add(|counters| &counters.moved_runs, 1);
            job.hand_over();
        };
        // At once: what is sent below may wake anybody, who may panic.
        movable.into_iter().for_each(hand_over);
        rest.into_iter().for_each(|job| self.send(job.into_command()));
        let commands = self.inbox().take_if(config::RELIEF_COMMANDS_MAX, |command| match command {
            Command::Again(endpoint, _) => endpoint.is_movable(),
            Command::Run(_, workers) => workers.is_some(),
            Command::Send(_) => true,
            _ => false,
        });
        let mut sends = Vec::new();
        for command in commands {
            match command {
                Command::Again(endpoint, handed) => hand_over(Job::Begin(endpoint, handed)),
                Command::Run(runnable, workers) => hand_over(Job::Poll(runnable, workers)),
                Command::Send(endpoint) => sends.push(endpoint),
                _ => unreachable!("the others were left"),
            }
        }
        sends.into_iter().for_each(|endpoint| endpoint.send_here(Chain::new()));
    }
}

impl<E: Endpoint> Remote<E> {
    /// Takes over what a handler on the poller has flushed, if somebody watches the poller: should
    /// the next handler hold it up, these bytes are sent without it. Otherwise they are left.
    #[inline]
    pub(crate) fn take_over(&self, endpoint: &Arc<E>, bytes: &mut Chain) -> bool {
        let is_watched = self.ready.is_watched();
        if is_watched {
            lock(&self.ready.flushed).push((Arc::clone(endpoint), bytes.take()));
        }
        is_watched
    }

    /// It has stood still for a while, and will not soon come to what is left to it.
    #[inline]
    pub(crate) fn is_held_up(&self) -> bool {
        self.ready.held_up.load(Ordering::Relaxed)
    }
}
