//! The tasks of one owner: a server, or a poller.
//!
//! A task is kept alive by its wakers, and by its set. So a task that waits for something that
//! never happens, and whose waker nobody has, stays as it is. A forced shutdown of its server, or
//! the end of its poller, ends the set: then all tasks that have not ended are cancelled, and their
//! futures are dropped.
//!
//! Wakers are not enough. If the last reference to a waiting task is not a waker, `async_task`
//! frees the task's memory and does not drop its future.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_task::{Runnable, Task};
use slab::Slab;

use super::run::Guarded;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, lock};
use crate::user_code;

#[derive(Clone)]
pub(crate) struct TaskSet(Arc<Shared>);

struct Shared {
    /// Tasks take turns at the shards, so threads rarely meet at a lock.
    turn: AtomicUsize,
    shards: [Shard; SHARDS],
}

/// `None`: the set has ended.
type Shard = Mutex<Option<Slab<Task<()>>>>;

impl TaskSet {
    pub(crate) fn new() -> TaskSet {
        let shards = std::array::from_fn(|_| Mutex::new(Some(Slab::new())));
        TaskSet(Arc::new(Shared { turn: AtomicUsize::new(0), shards }))
    }

    /// Makes a task of `future`. `schedule` is called with the task on each wake-up. The caller
    /// must run the returned task for the first time. If the set has ended, `future` is dropped
    /// instead of polled.
    pub(crate) fn spawn<F, S>(&self, future: F, schedule: S) -> Runnable
    where
        F: Future<Output = ()> + Send + 'static,
        S: Fn(Runnable) + Send + Sync + 'static,
    {
        let shard = self.0.turn.fetch_add(1, Ordering::Relaxed) % SHARDS;
        let mut tasks = lock(&self.0.shards[shard]);
        let place = tasks.as_mut().map(Slab::vacant_entry);
        let key = place.as_ref().map(|place| Key { shard, index: place.key() });
        let owned =
            Owned { future: Guarded::new(future), ticket: Ticket { set: self.clone(), key } };
        let (runnable, task) = async_task::spawn(owned, schedule);
        match place {
            Some(place) => drop(place.insert(task)),
            None => {
                drop(tasks);
                user_code::discard(task);
            }
        }
        runnable
    }

    /// Cancels all tasks. Each is scheduled once more, which drops its future.
    pub(crate) fn end(&self) {
        for shard in &self.0.shards {
            let tasks = lock(shard).take();
            tasks.into_iter().flatten().for_each(|(_, task)| user_code::discard(task));
        }
    }
}

/// The place of a task in its set.
struct Key {
    shard: usize,
    index: usize,
}

pin_project_lite::pin_project! {
    /// The future of a task.
    struct Owned<F> {
        // Dropped before `ticket`: the task is in its set until its future has been dropped.
        #[pin]
        future: Guarded<F>,
        ticket: Ticket,
    }
}

impl<F: Future<Output = ()>> Future for Owned<F> {
    type Output = ();

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.project().future.poll(cx)
    }
}

/// Takes a task out of its set when dropped.
struct Ticket {
    set: TaskSet,
    key: Option<Key>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let Some(Key { shard, index }) = self.key else { return };
        let task = lock(&self.set.0.shards[shard]).as_mut().map(|tasks| tasks.remove(index));
        // Outside the lock.
        if let Some(task) = task {
            task.detach();
        }
    }
}

/// More than the threads that make tasks at the same time, as a rule.
const SHARDS: usize = 16;

#[cfg(all(test, not(loom)))]
mod tests {
    use std::future::{pending, poll_fn, ready};
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    struct Tells(Sender<&'static str>);

    impl Drop for Tells {
        fn drop(&mut self) {
            let _ = self.0.send("dropped");
        }
    }

    #[test]
    fn a_task_that_nobody_can_wake_lives_as_long_as_its_set() {
        let set = TaskSet::new();
        let (sender, told) = channel();
        let tells = Tells(sender);
        let waiting = async move {
            let _tells = tells;
            pending().await
        };
        set.spawn(waiting, Runnable::schedule_now).run();
        assert!(told.try_recv().is_err());
        set.end();
        assert_eq!(told.recv(), Ok("dropped"));
        assert!(told.recv().is_err());
    }

    #[test]
    fn a_task_that_has_ended_is_in_its_set_no_more() {
        let set = TaskSet::new();
        for _ in 0..3 * SHARDS {
            let mut waits = true;
            let future = poll_fn(move |cx| match std::mem::replace(&mut waits, false) {
                true => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                false => Poll::Ready(()),
            });
            set.spawn(future, Runnable::schedule_now).run();
        }
        drop(set.spawn(ready(()), |_| {}));
        let count = |shard: &Shard| lock(shard).as_ref().map_or(0, Slab::len);
        assert_eq!(set.0.shards.iter().map(count).sum::<usize>(), 0);
    }

    #[test]
    fn a_set_that_has_ended_drops_what_it_is_given() {
        let set = TaskSet::new();
        set.end();
        let (sender, told) = channel();
        let tells = Tells(sender);
        let runnable = set.spawn(
            async move {
                let _tells = tells;
                panic!("it was polled");
            },
            |_| {},
        );
        super::super::run(runnable);
        assert_eq!(told.recv(), Ok("dropped"));
    }

    /// A schedule for tests: the thread that wakes a task runs it.
    trait ScheduleNow {
        fn schedule_now(self);
    }

    impl ScheduleNow for Runnable {
        fn schedule_now(self) {
            super::super::run(self);
        }
    }
}
