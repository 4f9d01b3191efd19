//! When the kernel thread that polls a ring has to be woken.
//!
//! The thread says that it ceases to look, by a flag, and then looks once more. So who publishes an
//! operation looks at the flag after that, with a full fence between the two: one sees what the
//! other did.
//!
//! That look falls to one producer alone, the one whose operation is the next that the thread has
//! to take. As long as one before it is there, the thread has yet to look, or whoever published
//! that one wakes it; to wake it once more until it gets a CPU would cost a system call for each
//! flush. Which operation is the next counts *after* the publication: until then the thread may
//! take what is there, find nothing more and cease to look.

use crate::sync::atomic::{Ordering, fence};

/// A submission queue, seen by a producer that no other one interferes with.
pub(super) trait Submissions {
    /// Shows the kernel thread what was put in.
    fn publish(&mut self);
    /// How many operations the kernel thread has not taken, as of now.
    fn untaken(&mut self) -> usize;
    /// The kernel thread has ceased to look.
    fn is_asleep(&self) -> bool;
}

/// Publishes the one operation that was put in; says whether the caller has to wake the thread.
#[inline]
pub(super) fn publish(queue: &mut impl Submissions) -> bool {
    queue.publish();
    fence(Ordering::SeqCst);
    queue.untaken() == 1 && queue.is_asleep()
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use crate::sync::atomic::{AtomicBool, AtomicUsize};
    use crate::sync::{Arc, Condvar, Mutex, lock, wait};
    use loom::thread;

    /// A ring, as far as waking goes.
    struct Ring {
        head: AtomicUsize,
        tail: AtomicUsize,
        need_wakeup: AtomicBool,
        lane: Mutex<()>,
        woken: Mutex<bool>,
        changed: Condvar,
    }

    struct Producer<'a> {
        ring: &'a Ring,
        tail: usize,
    }

    impl Submissions for Producer<'_> {
        fn publish(&mut self) {
            self.ring.tail.store(self.tail, Ordering::Release);
        }

        fn untaken(&mut self) -> usize {
            self.tail - self.ring.head.load(Ordering::Acquire)
        }

        fn is_asleep(&self) -> bool {
            self.ring.need_wakeup.load(Ordering::Acquire)
        }
    }

    impl Ring {
        fn push(&self) {
            let locked = lock(&self.lane);
            let tail = self.tail.load(Ordering::Relaxed) + 1;
            let must_wake = publish(&mut Producer { ring: self, tail });
            drop(locked);
            if must_wake {
                *lock(&self.woken) = true;
                self.changed.notify_one();
            }
        }

        /// What the kernel's `io_sq_thread` does, until it has taken `count`.
        fn poll(&self, count: usize) {
            let mut head = 0;
            while head < count {
                let tail = self.tail.load(Ordering::Acquire);
                if tail != head {
                    head = tail;
                    self.head.store(head, Ordering::Release);
                    continue;
                }
                // It is on the wait queue from here on, so a wake-up is not lost.
                *lock(&self.woken) = false;
                self.need_wakeup.store(true, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if self.tail.load(Ordering::Acquire) == head {
                    let mut woken = lock(&self.woken);
                    while !*woken {
                        woken = wait(&self.changed, woken);
                    }
                }
                self.need_wakeup.store(false, Ordering::Relaxed);
            }
        }
    }

    fn model(producers: usize, pushes_each: usize) {
        let mut builder = loom::model::Builder::new();
        // All of it takes minutes.
        builder.preemption_bound = Some(3);
        builder.check(move || {
            let ring = Arc::new(Ring {
                head: AtomicUsize::new(0),
                tail: AtomicUsize::new(0),
                need_wakeup: AtomicBool::new(false),
                lane: Mutex::new(()),
                woken: Mutex::new(false),
                changed: Condvar::new(),
            });
            let threads: Vec<_> = (0..producers)
                .map(|_| {
                    let ring = Arc::clone(&ring);
                    thread::spawn(move || (0..pushes_each).for_each(|_| ring.push()))
                })
                .collect();
            ring.poll(producers * pushes_each);
            for thread in threads {
                thread.join().expect("pushes only");
            }
        });
    }

    #[test]
    fn loom_no_operation_waits_for_a_kernel_thread_that_sleeps() {
        model(1, 2);
    }

    #[test]
    fn loom_two_producers_do_not_leave_the_wake_up_to_each_other() {
        model(2, 1);
    }
}
