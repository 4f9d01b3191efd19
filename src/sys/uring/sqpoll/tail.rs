//! When a producer must wake the kernel thread that polls a submission queue.
//!
//! Before the kernel thread sleeps, it sets a flag and then looks at the queue once more. A
//! producer publishes its operation, and reads the flag after a full fence. So the thread sees the
//! operation, or the producer sees the flag.
//!
//! Only the producer of the operation that the thread takes next reads the flag. While an earlier
//! operation is in the queue, the thread has not looked yet, or the producer of that operation
//! wakes it. Otherwise every send would cost a system call until the thread gets a CPU. A producer
//! must find out *after* the publication which operation is next: before, the thread may take the
//! earlier operations, find an empty queue and sleep.

use crate::sync::atomic::{Ordering, fence};

/// A submission queue with one producer at a time.
pub(super) trait Submissions {
    /// Makes the pushed operation visible to the kernel thread.
    fn publish(&mut self);
    /// How many operations the kernel thread has not taken now.
    fn untaken(&mut self) -> usize;
    /// The kernel thread has set its flag: it sleeps, or is about to.
    fn is_asleep(&self) -> bool;
}

/// Publishes the pushed operation. Returns whether the caller must wake the kernel thread.
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

    /// The parts of a ring that waking needs.
    struct Ring {
        head: AtomicUsize,
        tail: AtomicUsize,
        need_wakeup: AtomicBool,
        queue: Mutex<()>,
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
            let locked = lock(&self.queue);
            let tail = self.tail.load(Ordering::Relaxed) + 1;
            let must_wake = publish(&mut Producer { ring: self, tail });
            drop(locked);
            if must_wake {
                *lock(&self.woken) = true;
                self.changed.notify_one();
            }
        }

        /// Does what the kernel's `io_sq_thread` does, until it has taken `count` operations.
        fn poll(&self, count: usize) {
            let mut head = 0;
            while head < count {
                let tail = self.tail.load(Ordering::Acquire);
                if tail != head {
                    head = tail;
                    self.head.store(head, Ordering::Release);
                    continue;
                }
                // The kernel thread is on its wait queue from here on, so no wake-up is lost.
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
        // Without a bound, the model takes minutes.
        builder.preemption_bound = Some(3);
        builder.check(move || {
            let ring = Arc::new(Ring {
                head: AtomicUsize::new(0),
                tail: AtomicUsize::new(0),
                need_wakeup: AtomicBool::new(false),
                queue: Mutex::new(()),
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
