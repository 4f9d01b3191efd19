//! Commands and bytes that other threads, and handlers on the poller itself, leave to a poller.
//!
//! A mailbox holds commands and an outbox: bytes that the poller is to send. One lock guards both,
//! and the flag that says whether the poller sleeps. So no wake-up is lost: a sender that leaves
//! something to a sleeping poller clears the flag and must wake the poller. While the poller is
//! awake, leaving something takes no system call.

use std::thread::Thread;

use crate::sync::{Mutex, lock};

/// Many senders, and one receiver that may sleep. `C` is a command, `B` are bytes to send.
pub(super) struct Mailbox<C, B>(Mutex<Contents<C, B>>);

struct Contents<C, B> {
    commands: Vec<C>,
    outbox: Vec<B>,
    /// The receiver sleeps, or is about to, and must be woken.
    is_asleep: bool,
    is_closed: bool,
    /// Threads to unpark when the receiver is awake again.
    watchers: Vec<Thread>,
}

impl<C, B> Contents<C, B> {
    /// Marks the receiver as awake. `true`: the caller must wake it.
    fn must_wake(&mut self) -> bool {
        std::mem::take(&mut self.is_asleep)
    }
}

impl<C, B> Mailbox<C, B> {
    pub(super) fn new() -> Mailbox<C, B> {
        Mailbox(Mutex::new(Contents {
            commands: Vec::new(),
            outbox: Vec::new(),
            is_asleep: false,
            is_closed: false,
            watchers: Vec::new(),
        }))
    }

    /// Leaves a command. Returns whether the receiver must be woken; gives the command back if the
    /// receiver has ended.
    pub(super) fn push(&self, command: C) -> Result<bool, C> {
        let mut contents = lock(&self.0);
        if contents.is_closed {
            return Err(command);
        }
        contents.commands.push(command);
        Ok(contents.must_wake())
    }

    /// Leaves bytes to send. Otherwise like [`push`](Self::push).
    pub(super) fn leave(&self, bytes: B) -> Result<bool, B> {
        let mut contents = lock(&self.0);
        if contents.is_closed {
            return Err(bytes);
        }
        contents.outbox.push(bytes);
        Ok(contents.must_wake())
    }

    /// Leaves bytes to a receiver that is awake. `false`: the receiver sleeps or has ended, and
    /// `bytes` was not called.
    #[inline]
    pub(super) fn leave_if_awake(&self, bytes: impl FnOnce() -> B) -> bool {
        let mut contents = lock(&self.0);
        let takes = !contents.is_asleep && !contents.is_closed;
        if takes {
            contents.outbox.push(bytes());
        }
        takes
    }

    /// Swaps the outbox into `into`, which must be empty.
    #[inline]
    pub(super) fn take_outbox(&self, into: &mut Vec<B>) {
        debug_assert!(into.is_empty());
        std::mem::swap(&mut lock(&self.0).outbox, into);
    }

    /// Swaps the commands into `into`, which must be empty. The receiver is awake from now on.
    pub(super) fn take_commands(&self, into: &mut Vec<C>) {
        debug_assert!(into.is_empty());
        let watchers = {
            let mut contents = lock(&self.0);
            contents.is_asleep = false;
            std::mem::swap(&mut contents.commands, into);
            if contents.watchers.is_empty() {
                return;
            }
            std::mem::take(&mut contents.watchers)
        };
        watchers.iter().for_each(Thread::unpark);
    }

    /// Marks the receiver as asleep, if there is nothing to do. `false`: there is something to do.
    /// Swaps the commands into `into`, which must be empty.
    pub(super) fn prepare_sleep(&self, into: &mut Vec<C>) -> bool {
        debug_assert!(into.is_empty());
        let mut contents = lock(&self.0);
        contents.is_asleep = contents.commands.is_empty() && contents.outbox.is_empty();
        std::mem::swap(&mut contents.commands, into);
        contents.is_asleep
    }

    /// Takes the first `count_max` commands for which `wanted` holds. The others stay in order.
    pub(super) fn take_if(&self, count_max: usize, wanted: impl Fn(&C) -> bool) -> Vec<C> {
        let mut taken = 0;
        lock(&self.0)
            .commands
            .extract_if(.., |command| {
                let take = taken < count_max && wanted(command);
                taken += usize::from(take);
                take
            })
            .collect()
    }

    /// Whether the receiver sleeps or has ended.
    pub(super) fn is_asleep(&self) -> bool {
        let contents = lock(&self.0);
        contents.is_asleep || contents.is_closed
    }

    /// `true`: the receiver sleeps or has ended. A sleeping receiver will unpark `watcher` when it
    /// wakes. `false`: the receiver is awake.
    pub(super) fn call_when_awake(&self, watcher: &Thread) -> bool {
        let mut contents = lock(&self.0);
        let is_known = contents.watchers.iter().any(|known| known.id() == watcher.id());
        if contents.is_asleep && !is_known {
            contents.watchers.push(watcher.clone());
        }
        contents.is_asleep || contents.is_closed
    }

    pub(super) fn is_empty(&self) -> bool {
        let contents = lock(&self.0);
        contents.commands.is_empty() && contents.outbox.is_empty()
    }

    /// Refuses everything from now on. Returns all commands and bytes that the receiver has not
    /// taken.
    pub(super) fn close(&self) -> (Vec<C>, Vec<B>) {
        let mut contents = lock(&self.0);
        contents.is_closed = true;
        (std::mem::take(&mut contents.commands), std::mem::take(&mut contents.outbox))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    type OnlyCommands<C> = Mailbox<C, ()>;

    #[test]
    fn one_that_has_ended_is_as_good_as_asleep_and_calls_nobody() {
        let mailbox = OnlyCommands::<()>::new();
        assert!(!mailbox.is_asleep() && !mailbox.call_when_awake(&std::thread::current()));
        mailbox.close();
        assert!(mailbox.is_asleep() && mailbox.call_when_awake(&std::thread::current()));
        assert!(lock(&mailbox.0).watchers.is_empty());
    }

    #[test]
    fn commands_that_are_picked_out_leave_the_rest_in_order() {
        let mailbox = OnlyCommands::new();
        (0..10).for_each(|command| assert_eq!(mailbox.push(command), Ok(false)));
        assert_eq!(mailbox.take_if(3, |command| command % 2 == 0), [0, 2, 4]);
        let mut rest = Vec::new();
        mailbox.take_commands(&mut rest);
        assert_eq!(rest, [1, 3, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn a_receiver_does_not_sleep_over_bytes_and_is_woken_for_them_once() {
        let mailbox = Mailbox::<(), u32>::new();
        let mut commands = Vec::new();
        assert!(mailbox.leave_if_awake(|| 1));
        assert!(!mailbox.prepare_sleep(&mut commands), "there are bytes to send");
        let mut outbox = Vec::new();
        mailbox.take_outbox(&mut outbox);
        assert_eq!(outbox, [1]);
        assert!(mailbox.prepare_sleep(&mut commands));
        assert!(!mailbox.leave_if_awake(|| unreachable!("the receiver sleeps")));
        assert_eq!(mailbox.leave(2), Ok(true));
        assert_eq!(mailbox.leave(3), Ok(false), "the first sender wakes the receiver");
        assert!(mailbox.leave_if_awake(|| 4));
        assert_eq!(mailbox.close(), (vec![], vec![2, 3, 4]));
        assert_eq!(mailbox.leave(5), Err(5));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::sync::Arc;
    use loom::sync::Condvar;
    use loom::thread;

    /// Stands for the eventfd of a poller. A ring that comes before the wait is kept.
    struct Bell {
        rung: Mutex<bool>,
        changed: Condvar,
    }

    impl Bell {
        fn new() -> Arc<Bell> {
            Arc::new(Bell { rung: Mutex::new(false), changed: Condvar::new() })
        }

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
    fn loom_nothing_waits_for_a_sleeping_poller() {
        loom::model(|| {
            let mailbox = Arc::new(Mailbox::<(), ()>::new());
            let bell = Bell::new();
            for is_command in [true, false] {
                let (mailbox, bell) = (Arc::clone(&mailbox), Arc::clone(&bell));
                thread::spawn(move || {
                    let left = if is_command { mailbox.push(()) } else { mailbox.leave(()) };
                    if left.expect("open") {
                        bell.ring();
                    }
                });
            }
            let (mut taken, mut commands, mut outbox) = (0, Vec::new(), Vec::new());
            while taken < 2 {
                mailbox.take_outbox(&mut outbox);
                if taken + outbox.len() < 2 && mailbox.prepare_sleep(&mut commands) {
                    bell.wait();
                    mailbox.take_commands(&mut commands);
                }
                taken += commands.drain(..).count() + outbox.drain(..).count();
            }
        });
    }

    /// A flush on another thread leaves its bytes to a poller that is awake, and sends them itself
    /// to spare a sleeping one the wake-up: exactly one of both happens.
    #[test]
    fn loom_bytes_left_to_an_awake_poller_are_found_before_it_sleeps() {
        loom::model(|| {
            let mailbox = Arc::new(Mailbox::<(), ()>::new());
            let flusher = thread::spawn({
                let mailbox = Arc::clone(&mailbox);
                move || mailbox.leave_if_awake(|| ())
            });
            let (mut found, mut commands, mut outbox) = (0, Vec::new(), Vec::new());
            // The poller sleeps for good as soon as there is nothing to do.
            loop {
                mailbox.take_outbox(&mut outbox);
                found += outbox.drain(..).count();
                if mailbox.prepare_sleep(&mut commands) {
                    break;
                }
                mailbox.take_commands(&mut commands);
            }
            let left = flusher.join().expect("does not panic");
            assert_eq!(found, usize::from(left));
        });
    }
}
