//! Times at which waits end: timeouts, deadlines, the idle timeout.
//!
//! The settings are atomics that any thread may change. A wait computes its end from them. The
//! poller's timer only wakes the wait, which then computes its end anew. So changing a deadline is
//! a store and a wake-up.

use std::time::{Duration, Instant};

use crate::config::{self, Limits};
use crate::poller::timers::{NEVER, ns_after, ns_at};
use crate::sync::atomic::{AtomicU64, Ordering};

/// The timeout and the deadline of reads, or of writes.
pub(super) struct Timeout {
    /// How many nanoseconds a wait may take; 0 is no limit.
    after_ns: AtomicU64,
    /// When every wait ends; 0 is no deadline.
    deadline_ns: AtomicU64,
}

impl Timeout {
    fn new(after: Option<Duration>) -> Timeout {
        Timeout { after_ns: AtomicU64::new(ns(after)), deadline_ns: AtomicU64::new(0) }
    }

    /// Sets the timeout and clears the deadline.
    pub(super) fn set_timeout(&self, after: Option<Duration>) {
        self.after_ns.store(ns(after), Ordering::SeqCst);
        self.deadline_ns.store(0, Ordering::SeqCst);
    }

    pub(super) fn set_deadline(&self, deadline: Option<Instant>) {
        self.deadline_ns.store(deadline.map_or(0, |at| ns_at(at).max(1)), Ordering::SeqCst);
    }

    /// When a wait that began at `started_ns` ends. A deadline overrides the timeout.
    pub(super) fn end_of_wait(&self, started_ns: impl FnOnce() -> u64) -> u64 {
        match self.deadline_ns.load(Ordering::SeqCst) {
            0 => match self.after_ns.load(Ordering::SeqCst) {
                0 => NEVER,
                after_ns => started_ns().saturating_add(after_ns),
            },
            deadline_ns => deadline_ns,
        }
    }
}

/// Ends the wait of a flush while the peer takes no byte. Guarded by the output lock.
///
/// The kernel is asked whether the peer has taken bytes only while a flush waits: at most
/// [`STALL_CHECKS`] times in the timeout. Bytes that were taken move the end of the wait. So a
/// flush that waits for less than a part of the timeout costs no system call.
pub(super) struct Stall {
    after_ns: u64,
    /// When the peer last took bytes, as far as is known.
    moved_ns: u64,
    asked_ns: u64,
    /// How many bytes were sent when the kernel was asked last, and the mark of `sys::progress`.
    seen: (u64, u64),
}

/// How often the kernel is asked within a stall timeout. More checks end a stalled wait closer to
/// its timeout, and wake its task more often.
const STALL_CHECKS: u64 = 4;

impl Stall {
    /// `None` without a timeout.
    pub(super) fn new(after: Option<Duration>) -> Option<Box<Stall>> {
        let after_ns = ns(after);
        (after_ns > 0).then(|| Box::new(Stall { after_ns, moved_ns: 0, asked_ns: 0, seen: (0, 0) }))
    }

    pub(super) fn after(&self) -> Duration {
        Duration::from_nanos(self.after_ns)
    }

    /// When a wait that began at `began_ns` ends, unless the peer takes bytes.
    pub(super) fn end_ns(&self, began_ns: u64) -> u64 {
        self.moved_ns.max(began_ns).saturating_add(self.after_ns)
    }

    /// When a wait that began at `began_ns` must ask the kernel.
    pub(super) fn next_ns(&self, began_ns: u64) -> u64 {
        let part_ns = self.after_ns / STALL_CHECKS;
        let next_ns = self.asked_ns.max(began_ns).saturating_add(part_ns);
        next_ns.min(self.end_ns(began_ns))
    }

    /// Notes what the kernel says at `now_ns`, when `sent` bytes are sent: the mark of
    /// `sys::progress`, and the time since the peer's last acknowledgement. `None`: it says
    /// nothing.
    pub(super) fn note(&mut self, now_ns: u64, sent: u64, taken: Option<(u64, Duration)>) {
        self.asked_ns = now_ns;
        let Some((mark, age)) = taken else { return };
        if self.seen != (sent, mark) {
            self.seen = (sent, mark);
            let age_ns = u64::try_from(age.as_nanos()).unwrap_or(NEVER);
            self.moved_ns = self.moved_ns.max(now_ns.saturating_sub(age_ns));
        }
    }
}

/// How many nanoseconds may pass without a byte before the connection ends; 0 is no limit. Outside
/// of [`Timeouts`], because every request reads it.
pub(super) struct IdleTimeout(AtomicU64);

impl IdleTimeout {
    pub(super) fn new(after: Option<Duration>) -> IdleTimeout {
        IdleTimeout(AtomicU64::new(ns(after)))
    }

    pub(super) fn set(&self, after: Option<Duration>) {
        self.0.store(ns(after), Ordering::SeqCst);
    }

    #[inline]
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    /// Lowers the timeout to at most `most`.
    pub(super) fn cap(&self, most: Duration) {
        let most_ns = ns(Some(most));
        let capped =
            |after_ns: u64| Some(if after_ns == 0 { most_ns } else { after_ns.min(most_ns) });
        // The closure never refuses.
        let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, capped);
    }

    /// When the timeout is due, if no byte moves before.
    pub(super) fn end(&self, timeouts: &Timeouts) -> u64 {
        match self.0.load(Ordering::SeqCst) {
            0 => NEVER,
            _ => self.end_after(timeouts.last_active_ns.load(Ordering::Relaxed)),
        }
    }

    /// When the timeout is due, if the last byte moved at `active_ns`.
    pub(super) fn end_after(&self, active_ns: u64) -> u64 {
        active_ns.saturating_add(self.0.load(Ordering::SeqCst))
    }
}

/// The other timers of one connection.
pub(super) struct Timeouts {
    pub(super) read: Timeout,
    pub(super) write: Timeout,
    /// When reads of the active `on_request` run time out. Set only with a `request_timeout`.
    request_until_ns: AtomicU64,
    last_active_ns: AtomicU64,
    /// The mark of `sys::progress` when the idle timeout was last due. It changes when the peer
    /// takes bytes.
    taken_mark: AtomicU64,
    /// When the connection was closed with unsent output.
    closed_ns: AtomicU64,
    armed: Armed,
}

impl Timeouts {
    pub(super) fn new(limits: &Limits) -> Timeouts {
        Timeouts {
            read: Timeout::new(limits.read_timeout),
            write: Timeout::new(limits.write_timeout),
            request_until_ns: AtomicU64::new(NEVER),
            last_active_ns: AtomicU64::new(0),
            taken_mark: AtomicU64::new(0),
            closed_ns: AtomicU64::new(0),
            armed: Armed::new(),
        }
    }

    /// Notes that a byte has moved now.
    #[inline]
    pub(super) fn touch(&self, now_ns: u64) {
        self.last_active_ns.store(now_ns, Ordering::Relaxed);
    }

    /// Notes that a byte moved at `moved_ns`, unless one moved later.
    pub(super) fn touch_at(&self, moved_ns: u64) {
        self.last_active_ns.fetch_max(moved_ns, Ordering::Relaxed);
    }

    /// Notes that the connection is closed and has unsent output.
    pub(super) fn start_linger(&self, now_ns: u64) {
        self.touch(now_ns);
        self.closed_ns.store(now_ns, Ordering::Relaxed);
    }

    /// Whether `LINGER_MAX` has passed since the close.
    pub(super) fn lingers_too_long(&self, now_ns: u64) -> bool {
        let closed_ns = self.closed_ns.load(Ordering::Relaxed);
        now_ns.saturating_sub(closed_ns) >= config::LINGER_MAX.as_nanos() as u64
    }

    /// Stores `mark`. `true`: it has changed, so the peer has taken bytes since the last call.
    pub(super) fn note_taken(&self, mark: u64) -> bool {
        self.taken_mark.swap(mark, Ordering::Relaxed) != mark
    }

    /// Starts the time limit for reads of an `on_request` run: `after` from now.
    pub(super) fn start_request(&self, after: Duration) {
        self.request_until_ns.store(ns_after(after), Ordering::SeqCst);
    }

    /// When reads of the current `on_request` run time out.
    pub(super) fn end_of_request(&self) -> u64 {
        self.request_until_ns.load(Ordering::SeqCst)
    }

    pub(super) fn armed(&self) -> &Armed {
        &self.armed
    }
}

/// The earliest time at which the poller was asked to check the connection's timers.
///
/// No timer is lost. A waiter first publishes its time and then reads this value. The poller first
/// resets this value and then reads the waiters' times. So either the waiter asks the poller, or
/// the poller sees the waiter's time.
pub(super) struct Armed(AtomicU64);

impl Armed {
    pub(super) fn new() -> Armed {
        Armed(AtomicU64::new(NEVER))
    }

    /// Notes `at_ns`. `true`: the caller must ask the poller for a timer at `at_ns`.
    #[inline]
    pub(super) fn ask(&self, at_ns: u64) -> bool {
        at_ns < self.0.load(Ordering::SeqCst) && at_ns < self.0.fetch_min(at_ns, Ordering::SeqCst)
    }

    pub(super) fn is_for(&self, at_ns: u64) -> bool {
        self.0.load(Ordering::SeqCst) == at_ns
    }

    /// Resets this value when the timer for `at_ns` fires. `false`: an earlier timer has replaced
    /// it.
    pub(super) fn came_up(&self, at_ns: u64) -> bool {
        self.0.compare_exchange(at_ns, NEVER, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

fn ns(after: Option<Duration>) -> u64 {
    after.map_or(0, |after| u64::try_from(after.as_nanos()).unwrap_or(NEVER))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_overrides_the_timeout_and_a_new_timeout_clears_it() {
        let timeout = Timeout::new(Some(Duration::from_nanos(5)));
        assert_eq!(timeout.end_of_wait(|| 100), 105);
        timeout.set_deadline(Some(Instant::now()));
        assert_ne!(timeout.end_of_wait(|| 100), 105);
        timeout.set_timeout(Some(Duration::from_nanos(7)));
        assert_eq!(timeout.end_of_wait(|| 100), 107);
        timeout.set_timeout(None);
        assert_eq!(timeout.end_of_wait(|| 100), NEVER);
    }

    #[test]
    fn a_stall_ends_a_wait_unless_the_peer_takes_bytes() {
        let taken = |mark, age_ns| Some((mark, Duration::from_nanos(age_ns)));
        let mut stall = Stall::new(Some(Duration::from_nanos(100))).expect("a timeout");
        // A wait asks the kernel only after a part of the timeout.
        assert_eq!((stall.next_ns(1000), stall.end_ns(1000)), (1025, 1100));
        stall.note(1025, 5, taken(7, 20));
        assert_eq!((stall.next_ns(1000), stall.end_ns(1000)), (1050, 1105));
        stall.note(1050, 5, taken(7, 45));
        assert_eq!((stall.next_ns(1000), stall.end_ns(1000)), (1075, 1105));
        // The last byte was acknowledged 3 ns ago.
        stall.note(1075, 5, taken(8, 3));
        assert_eq!(stall.end_ns(1000), 1172);
        stall.note(1100, 5, taken(8, 28));
        stall.note(1150, 5, None);
        assert_eq!((stall.next_ns(1000), stall.end_ns(1000)), (1172, 1172));
        // Bytes that the kernel has taken count as well.
        stall.note(1172, 6, taken(8, 0));
        assert_eq!(stall.end_ns(1000), 1272);
        // A later wait has the whole timeout.
        assert_eq!((stall.next_ns(2000), stall.end_ns(2000)), (2025, 2100));
        assert!(Stall::new(Some(Duration::ZERO)).is_none() && Stall::new(None).is_none());
    }

    #[test]
    fn only_an_earlier_time_asks_the_poller() {
        let armed = Armed::new();
        assert!(armed.ask(50));
        assert!(!armed.ask(50));
        assert!(!armed.ask(60));
        assert!(armed.ask(40));
        assert!(!armed.came_up(50));
        assert!(armed.came_up(40));
        assert!(armed.ask(60));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::sync::{Arc, Mutex, lock};

    #[test]
    fn loom_a_waiter_s_time_is_seen_by_the_poller_or_asked_for() {
        loom::model(|| {
            let armed = Arc::new(Armed::new());
            let wanted = Arc::new(Mutex::new(NEVER));
            assert!(armed.ask(10));
            let waiter = {
                let (armed, wanted) = (Arc::clone(&armed), Arc::clone(&wanted));
                loom::thread::spawn(move || {
                    *lock(&wanted) = 20;
                    armed.ask(20)
                })
            };
            let came_up = armed.came_up(10);
            let seen = *lock(&wanted) == 20;
            let asked = waiter.join().expect("waiter");
            assert!(came_up && (seen || asked));
        });
    }
}
