//! A poller, as all other threads see it.

use std::any::Any;
use std::cell::OnceCell;
use std::sync::Weak;

use super::mailbox::Mailbox;
use super::relief::Relief;
use super::{Command, Endpoint, Job, Watcher};
use crate::buffer::{Chain, Pool};
use crate::counters::Counters;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, lock};
use crate::sys::{Outlet, Wake};
use crate::task::TaskSet;
use crate::user_code;

/// Bytes that a poller is to send, and their endpoint.
pub(super) type Parcel<E> = (Arc<E>, Chain);

pub(crate) struct Remote<E: Endpoint> {
    mailbox: Mailbox<Command<E>, Parcel<E>>,
    pub(super) relief: Relief<E>,
    wake: Arc<Wake>,
    pub(crate) outlet: Outlet,
    pub(crate) counters: Arc<Counters>,
    pub(crate) pool: Pool,
    /// How many connections the poller has or was given. Balancing compares pollers by it.
    pub(crate) load: AtomicUsize,
    pub(crate) listeners: AtomicUsize,
    /// How many timers the poller has, [`dead_timers`](Self::dead_timers) included.
    pub(super) timers: AtomicUsize,
    /// How many of these belong to a future that was dropped.
    pub(super) dead_timers: Arc<AtomicUsize>,
    watchers: Mutex<Watchers>,
    /// The tasks that run on the poller and belong to no server.
    pub(super) tasks: TaskSet,
}

/// Objects that are told if a poller fails.
#[derive(Default)]
struct Watchers {
    known: Vec<Weak<dyn Watcher>>,
    /// Why the poller has failed.
    failure: Option<String>,
}

thread_local! {
    /// The poller of this thread, if the thread is a poller.
    static CURRENT: OnceCell<Arc<dyn Any + Send + Sync>> = const { OnceCell::new() };
}

impl<E: Endpoint> Remote<E> {
    pub(crate) fn new(
        wake: Wake,
        pool: Pool,
        outlet: Outlet,
        counters: Arc<Counters>,
    ) -> Remote<E> {
        Remote {
            mailbox: Mailbox::new(),
            relief: Relief::new(),
            wake: Arc::new(wake),
            outlet,
            counters,
            pool,
            load: AtomicUsize::new(0),
            listeners: AtomicUsize::new(0),
            timers: AtomicUsize::new(0),
            watchers: Mutex::new(Watchers::default()),
            dead_timers: Arc::new(AtomicUsize::new(0)),
            tasks: TaskSet::new(),
        }
    }

    /// Makes the calling thread this poller, for the thread's whole life.
    pub(super) fn enter(self: &Arc<Self>) {
        CURRENT.with(|current| {
            let _ = current.set(Arc::clone(self) as _);
        });
    }

    /// The poller of the calling thread, if that thread is a poller.
    pub(crate) fn current() -> Option<Arc<Remote<E>>> {
        let current = CURRENT.try_with(|current| current.get().cloned());
        current.ok().flatten().and_then(|current| current.downcast().ok())
    }

    /// Leaves a command to the poller. If the poller has ended, the command is abandoned.
    pub(crate) fn send(&self, command: Command<E>) {
        match self.mailbox.push(command) {
            Ok(must_wake) => self.wake_if(must_wake),
            Err(command) => command.abandon(),
        }
    }

    /// Runs `future` on the poller, from now on. Drops `future` if the poller has ended, or ends
    /// before `future` does.
    pub(crate) fn spawn(self: &Arc<Self>, future: impl Future<Output = ()> + Send + 'static) {
        let poller = Arc::clone(self);
        let schedule = move |task| poller.send(Command::Run(Job::Poll(task, None)));
        self.tasks.spawn(future, schedule).schedule();
    }

    /// Leaves bytes for the poller to send. Gives them back if the poller has ended: the caller may
    /// hold a lock, and memory of the user must not be dropped under it.
    pub(crate) fn leave(&self, endpoint: &Arc<E>, bytes: Chain) -> Result<(), Chain> {
        match self.mailbox.leave((Arc::clone(endpoint), bytes)) {
            Ok(must_wake) => {
                self.wake_if(must_wake);
                Ok(())
            }
            Err((_, bytes)) => Err(bytes),
        }
    }

    /// Leaves `bytes` for the poller to send, if the poller is awake and has made progress lately.
    /// Takes no system call. `false`: the bytes stay where they are.
    #[inline]
    pub(crate) fn leave_if_awake(&self, endpoint: &Arc<E>, bytes: &mut Chain) -> bool {
        !self.relief.is_held_up()
            && self.mailbox.leave_if_awake(|| (Arc::clone(endpoint), bytes.take()))
    }

    fn wake_if(&self, must_wake: bool) {
        if must_wake {
            self.counters.add(|counters| &counters.wake_calls, 1);
            self.wake.wake();
        }
    }

    /// Tells `watcher` if the poller fails, or has failed.
    pub(crate) fn tell_of_failure(&self, watcher: &Arc<dyn Watcher>) {
        let failure = {
            let mut watchers = lock(&self.watchers);
            watchers.known.retain(|known| known.strong_count() > 0);
            watchers.known.push(Arc::downgrade(watcher));
            watchers.failure.clone()
        };
        if let Some(why) = failure {
            watcher.poller_failed(&why);
        }
    }

    /// Tells the watchers that the poller has failed.
    pub(super) fn fail(&self, why: &str) {
        user_code::log(|| tracing::error!("a poller has ended: {why}"));
        let known = {
            let mut watchers = lock(&self.watchers);
            watchers.failure = Some(why.to_owned());
            std::mem::take(&mut watchers.known)
        };
        known.iter().filter_map(Weak::upgrade).for_each(|watcher| watcher.poller_failed(why));
    }

    /// How many timers have a future that still waits.
    pub(super) fn timer_count(&self) -> usize {
        let count = self.timers.load(Ordering::Relaxed);
        // A timer may be dead before its command has reached the poller.
        count.saturating_sub(self.dead_timers.load(Ordering::Relaxed))
    }

    pub(super) fn mailbox(&self) -> &Mailbox<Command<E>, Parcel<E>> {
        &self.mailbox
    }

    pub(super) fn wake_handle(&self) -> &Arc<Wake> {
        &self.wake
    }
}
