//! How other threads, and handlers on the poller itself, talk to a poller.
//!
//! A queue and a flag under one lock, so no wake-up is lost: the sender that pushes to a sleeping
//! poller takes the flag and wakes it. While the poller is awake a command costs no system call.

use std::sync::Weak;
use std::thread::Thread;

use crate::address::PeerAddr;
use crate::buffer::Pool;
use crate::counters::Counters;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, lock};
use crate::sys::{Outlet, Socket, Wake};
use crate::task::{self, Runnable, Workers};

use super::alarm::Bell;
use super::ready::Ready;
use super::{Accept, Action, Endpoint, Watcher};

/// What a poller can be asked to do.
pub(crate) enum Command<E: Endpoint> {
    /// Take in a connected stream.
    Attach(Arc<E>, Arc<Socket>),
    /// Connect, then take in.
    Connect(Arc<E>, Arc<Socket>, PeerAddr),
    /// Accept on a listener.
    Listen(Arc<dyn Accept>, Arc<Socket>),
    /// Forget a listener.
    Unlisten(Arc<dyn Accept>),
    /// Run a task that was woken; workers, if there are any, may do it as well.
    Run(Runnable, Option<Workers>),
    /// Begin another run of a connection's handler.
    Again(Arc<E>, E::Handed),
    /// Go on with the run that waits for its flush.
    Continue(Arc<E>),
    /// Do that for the endpoint.
    Act(Arc<E>, Action),
    /// Send what the flusher could not.
    Send(Arc<E>),
    /// Receive again after a pause.
    Resume(Arc<E>),
    /// Look at the endpoint's timers at this time (see [`now_ns`](crate::clock::now_ns)).
    Timer(Arc<E>, u64),
    /// Ring at this time.
    WakeAt(u64, Bell),
    /// End all operations of the endpoint and give up its slot.
    Remove(Arc<E>),
    /// Call this for every endpoint.
    Visit(Visit<E>),
    /// Close everything, then end the thread.
    Stop,
}

/// Called for each endpoint in turn.
type Visit<E> = Box<dyn FnMut(&Arc<E>) + Send>;

impl<E: Endpoint> Command<E> {
    /// Nobody will obey it any more.
    pub(super) fn abandon(self) {
        match self {
            Command::Attach(endpoint, _)
            | Command::Connect(endpoint, ..)
            | Command::Remove(endpoint) => endpoint.on_removed(),
            Command::Listen(listener, _) => listener.on_removed(),
            Command::Again(endpoint, handed) => endpoint.give_up(handed),
            // A bell that is dropped rings.
            Command::WakeAt(_, bell) => drop(bell),
            // A task that is dropped ends its run.
            Command::Run(runnable, _) => task::give_up(runnable),
            Command::Visit(visit) => drop(visit),
            // The others are about endpoints and listeners that were removed when the poller ended.
            Command::Continue(_)
            | Command::Act(..)
            | Command::Send(_)
            | Command::Resume(_)
            | Command::Timer(..)
            | Command::Unlisten(_)
            | Command::Stop => {}
        }
    }
}

/// A poller, as everybody else sees it.
pub(crate) struct Remote<E: Endpoint> {
    inbox: Inbox<Command<E>>,
    pub(super) ready: Ready<E>,
    wake: Arc<Wake>,
    pub(crate) outlet: Outlet,
    pub(crate) counters: Arc<Counters>,
    pub(crate) pool: Pool,
    /// Connections given to the poller and not yet gone: what balancing looks at.
    pub(crate) load: AtomicUsize,
    pub(crate) listeners: AtomicUsize,
    /// Entries of its timers, those of [`dead_timers`](Self::dead_timers) included.
    pub(super) timers: AtomicUsize,
    /// Of these, how many nobody waits for any more.
    pub(super) dead_timers: Arc<AtomicUsize>,
    watchers: Mutex<Watchers>,
}

/// Those who are told if a poller fails.
#[derive(Default)]
struct Watchers {
    known: Vec<Weak<dyn Watcher>>,
    /// Why it has.
    failure: Option<String>,
}

impl<E: Endpoint> Remote<E> {
    pub(crate) fn new(
        wake: Wake,
        pool: Pool,
        outlet: Outlet,
        counters: Arc<Counters>,
    ) -> Remote<E> {
        Remote {
            inbox: Inbox::new(),
            ready: Ready::new(),
            wake: Arc::new(wake),
            outlet,
            counters,
            pool,
            load: AtomicUsize::new(0),
            listeners: AtomicUsize::new(0),
            timers: AtomicUsize::new(0),
            watchers: Mutex::new(Watchers::default()),
            dead_timers: Arc::new(AtomicUsize::new(0)),
        }
    }

    /// Hands over a command. Where the poller has ended, whoever depends on it is told so.
    pub(crate) fn send(&self, command: Command<E>) {
        match self.inbox.push(command) {
            Ok(false) => {}
            Ok(true) => {
                self.counters.add(|counters| &counters.wake_calls, 1);
                self.wake.wake();
            }
            Err(command) => command.abandon(),
        }
    }

    /// Hands over a command if that takes no system call: the poller is awake, and will find it
    /// before it sleeps. `false`: it was not handed over.
    pub(crate) fn send_if_awake(&self, command: Command<E>) -> bool {
        self.inbox.push_if_awake(command).is_ok()
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

    /// The poller has failed.
    #[cold]
    pub(super) fn fail(&self, why: &str) {
        tracing::error!("a poller has ended: {why}");
        let known = {
            let mut watchers = lock(&self.watchers);
            watchers.failure = Some(why.to_owned());
            std::mem::take(&mut watchers.known)
        };
        known.iter().filter_map(Weak::upgrade).for_each(|watcher| watcher.poller_failed(why));
    }

    /// How many timers somebody waits for.
    pub(super) fn timer_count(&self) -> usize {
        let count = self.timers.load(Ordering::Relaxed);
        // One may be dead before its command has reached the poller.
        count.saturating_sub(self.dead_timers.load(Ordering::Relaxed))
    }

    pub(super) fn inbox(&self) -> &Inbox<Command<E>> {
        &self.inbox
    }

    pub(super) fn wake_handle(&self) -> &Arc<Wake> {
        &self.wake
    }
}

/// Many senders, one receiver that may sleep.
pub(super) struct Inbox<T>(Mutex<Queue<T>>);

struct Queue<T> {
    items: Vec<T>,
    /// The receiver sleeps, or is about to, and must be woken.
    sleeping: bool,
    closed: bool,
    /// To be called when the receiver is awake again.
    watchers: Vec<Thread>,
}

impl<T> Inbox<T> {
    pub(super) fn new() -> Inbox<T> {
        Inbox(Mutex::new(Queue {
            items: Vec::new(),
            sleeping: false,
            closed: false,
            watchers: Vec::new(),
        }))
    }

    /// Says whether the receiver must be woken; gives the item back if it has ended.
    pub(super) fn push(&self, item: T) -> Result<bool, T> {
        let mut queue = lock(&self.0);
        if queue.closed {
            return Err(item);
        }
        queue.items.push(item);
        Ok(std::mem::take(&mut queue.sleeping))
    }

    /// Gives the item back if the receiver sleeps, or has ended.
    pub(super) fn push_if_awake(&self, item: T) -> Result<(), T> {
        let mut queue = lock(&self.0);
        if queue.sleeping || queue.closed {
            return Err(item);
        }
        queue.items.push(item);
        Ok(())
    }

    /// Swaps the queued items into `into`, which must be empty. The receiver is awake: senders need
    /// not wake it.
    pub(super) fn take(&self, into: &mut Vec<T>) {
        debug_assert!(into.is_empty());
        let watchers = {
            let mut queue = lock(&self.0);
            queue.sleeping = false;
            std::mem::swap(&mut queue.items, into);
            match queue.watchers.is_empty() {
                true => return,
                false => std::mem::take(&mut queue.watchers),
            }
        };
        watchers.iter().for_each(Thread::unpark);
    }

    /// Takes, from the oldest on, at most `count_max` of the items that `wanted` picks; the others
    /// stay as they are.
    pub(super) fn take_if(&self, count_max: usize, wanted: impl Fn(&T) -> bool) -> Vec<T> {
        let mut taken = 0;
        lock(&self.0)
            .items
            .extract_if(.., |item| {
                let take = taken < count_max && wanted(item);
                taken += usize::from(take);
                take
            })
            .collect()
    }

    /// The receiver sleeps, or has ended.
    pub(super) fn is_asleep(&self) -> bool {
        let queue = lock(&self.0);
        queue.sleeping || queue.closed
    }

    /// `true`: the receiver sleeps, and will unpark `watcher` when it has woken; or it has ended.
    /// `false`: it is awake.
    pub(super) fn call_when_awake(&self, watcher: &Thread) -> bool {
        let mut queue = lock(&self.0);
        let is_known = queue.watchers.iter().any(|known| known.id() == watcher.id());
        if queue.sleeping && !is_known {
            queue.watchers.push(watcher.clone());
        }
        queue.sleeping || queue.closed
    }

    /// Announces a sleep, unless there is work: then swaps it into `into`, and returns `false`.
    pub(super) fn prepare_sleep(&self, into: &mut Vec<T>) -> bool {
        debug_assert!(into.is_empty());
        let mut queue = lock(&self.0);
        queue.sleeping = queue.items.is_empty();
        std::mem::swap(&mut queue.items, into);
        queue.sleeping
    }

    pub(super) fn is_empty(&self) -> bool {
        lock(&self.0).items.is_empty()
    }

    /// Refuses all further items; returns the ones nobody will take any more.
    pub(super) fn close(&self) -> Vec<T> {
        let mut queue = lock(&self.0);
        queue.closed = true;
        std::mem::take(&mut queue.items)
    }
}

#[cfg(all(test, not(loom)))]
mod inbox_tests {
    use super::*;

    #[test]
    fn one_that_has_ended_is_as_good_as_asleep_and_calls_nobody() {
        let inbox = Inbox::<()>::new();
        assert!(!inbox.is_asleep() && !inbox.call_when_awake(&std::thread::current()));
        inbox.close();
        assert!(inbox.is_asleep() && inbox.call_when_awake(&std::thread::current()));
        assert!(lock(&inbox.0).watchers.is_empty());
    }

    #[test]
    fn what_is_taken_out_of_turn_leaves_the_rest_in_order() {
        let inbox = Inbox::new();
        (0..10).for_each(|item| assert_eq!(inbox.push(item), Ok(false)));
        assert_eq!(inbox.take_if(3, |item| item % 2 == 0), [0, 2, 4]);
        let mut rest = Vec::new();
        inbox.take(&mut rest);
        assert_eq!(rest, [1, 3, 5, 6, 7, 8, 9]);
    }
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use loom::sync::Condvar;
    use loom::thread;

    /// What an eventfd is to a poller: a ring that comes early is remembered.
    struct Bell {
        rung: Mutex<bool>,
        changed: Condvar,
    }

    impl Bell {
        fn ring(&self) {
            *lock(&self.rung) = true;
            self.changed.notify_one();
        }

        fn wait(&self) {
            let mut rung = lock(&self.rung);
            while !*rung {
                rung = self.changed.wait(rung).expect("not poisoned");
            }
            *rung = false;
        }
    }

    #[test]
    fn loom_no_command_waits_for_a_sleeping_poller() {
        loom::model(|| {
            let inbox = Arc::new(Inbox::new());
            let bell = Arc::new(Bell { rung: Mutex::new(false), changed: Condvar::new() });
            for item in 0..2 {
                let (inbox, bell) = (Arc::clone(&inbox), Arc::clone(&bell));
                thread::spawn(move || {
                    if inbox.push(item).expect("open") {
                        bell.ring();
                    }
                });
            }
            let (mut taken, mut batch) = (0, Vec::new());
            while taken < 2 {
                inbox.take(&mut batch);
                taken += batch.len();
                batch.clear();
                if taken < 2 && inbox.prepare_sleep(&mut batch) {
                    bell.wait();
                }
                taken += batch.len();
                batch.clear();
            }
        });
    }

    /// A flush elsewhere leaves its bytes to a poller that is awake, and sends them itself where it
    /// sleeps: nobody does both, and nothing stays behind.
    #[test]
    fn loom_what_is_left_to_an_awake_poller_is_found_before_it_sleeps() {
        loom::model(|| {
            let inbox = Arc::new(Inbox::new());
            let flusher = thread::spawn({
                let inbox = Arc::clone(&inbox);
                move || inbox.push_if_awake(()).is_ok()
            });
            let (mut found, mut batch) = (0, Vec::new());
            // It sleeps for good as soon as there is nothing to do.
            while !inbox.prepare_sleep(&mut batch) {
                found += batch.len();
                batch.clear();
                inbox.take(&mut batch);
                found += batch.len();
                batch.clear();
            }
            let left = flusher.join().expect("does not panic");
            assert_eq!(found, usize::from(left));
        });
    }
}
