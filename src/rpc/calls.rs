//! The table of the calls of a client, and what its connections do for them.
//!
//! Everything here runs under the one lock of the client, takes no system call, and calls no code
//! of the user. What must follow is collected in [`Work`], and [`Shared`](super::shared::Shared)
//! does it without the lock: waking tasks, starting dials, dropping messages.
//!
//! A call is *outstanding* while it is queued or sent. Up to `outstanding_max` calls are
//! outstanding; further ones wait in line. A *link* is the place of one connection: down, dialing
//! or up. Each queued call belongs to a link, and stays intact until the connection of the link
//! takes it. So a call that was not sent can move to another link.

mod deadlines;
mod entries;
mod link;
mod list;

use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use super::call_error::{CallError, CallErrorKind};
use super::codec::Codec;
use crate::connection::Handle;
use crate::error::Error;
use crate::poller::timers::NEVER;
use crate::task::waiters::{Number, Waiters};
use crate::user_code;

use deadlines::Deadlines;
use entries::{Entries, State};
use link::{Link, LinkState};
use list::List;

pub(super) struct Calls<C: Codec> {
    entries: Entries<C>,
    /// Calls that wait until fewer are outstanding.
    line: List,
    outstanding: usize,
    links: Vec<Link>,
    rules: Rules,
    life: Life,
    deadlines: Deadlines,
    timer: Timer,
    /// Futures that wait for a connection.
    ready: Waiters,
    /// Futures that wait for the end of the client.
    closers: Waiters,
    last_failure: Option<Arc<Error>>,
    counts: Counts,
}

/// The settings of a client that its table needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) connections: usize,
    pub(super) outstanding_max: usize,
    pub(super) waits_for_server: bool,
    pub(super) backoff_first: Duration,
    pub(super) backoff_max: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Open,
    /// No new calls. The client ends with its last outstanding call.
    Draining,
    Ended,
}

/// The task that ends calls at their deadlines.
enum Timer {
    Off,
    /// Looks at the deadlines at this time. The waker wakes it earlier.
    On(u64, Option<Waker>),
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) calls: u64,
    pub(super) answers: u64,
    pub(super) discarded: u64,
    pub(super) expired: u64,
    pub(super) dials: u64,
    pub(super) failed_dials: u64,
    pub(super) lost_connections: u64,
}

/// What a change of the table leaves to be done after the lock is released.
pub(super) struct Work<C: Codec> {
    pub(super) wakers: Vec<Waker>,
    /// Links that begin to dial.
    pub(super) dials: Vec<u32>,
    pub(super) starts_timer: bool,
    /// Connections to close. `true`: with a reset.
    pub(super) closes: Vec<(Handle, bool)>,
    /// Messages and wakers that nobody needs. Dropping them may run code of the user.
    unused: Vec<State<C>>,
    unused_wakers: Vec<Waker>,
    /// References to errors. The source of an error may be a value of the user.
    unused_errors: Vec<Arc<Error>>,
}

impl<C: Codec> Work<C> {
    pub(super) fn new() -> Work<C> {
        Work {
            wakers: Vec::new(),
            dials: Vec::new(),
            starts_timer: false,
            closes: Vec::new(),
            unused: Vec::new(),
            unused_wakers: Vec::new(),
            unused_errors: Vec::new(),
        }
    }

    fn discard(&mut self, waker: Option<Waker>) {
        self.unused_wakers.extend(waker);
    }

    /// Shares an error. The error outlives the lock, also if no call keeps it.
    fn share(&mut self, error: Error) -> Arc<Error> {
        let error = Arc::new(error);
        self.unused_errors.push(Arc::clone(&error));
        error
    }

    /// Drops what nobody needs.
    pub(super) fn drop_unused(&mut self) {
        self.unused.drain(..).for_each(user_code::discard);
        self.unused_wakers.drain(..).for_each(user_code::discard);
        self.unused_errors.drain(..).for_each(user_code::discard);
    }
}

/// A poll of a call.
pub(super) enum Polled<T> {
    Done(Result<T, CallError>),
    /// The waker is registered.
    Waits,
    /// The caller must clone its waker without the lock, and poll again.
    NeedsWaker,
}

impl<C: Codec> Calls<C> {
    pub(super) fn new(rules: Rules) -> Calls<C> {
        Calls {
            entries: Entries::new(),
            line: List::new(),
            outstanding: 0,
            links: (0..rules.connections).map(|_| Link::new()).collect(),
            rules,
            life: Life::Open,
            deadlines: Deadlines::new(),
            timer: Timer::Off,
            ready: Waiters::default(),
            closers: Waiters::default(),
            last_failure: None,
            counts: Counts::default(),
        }
    }

    /// Begins a call. `may_wait`: it waits in line while too many calls are outstanding.
    pub(super) fn begin(
        &mut self,
        message: C::Out,
        deadline_ns: u64,
        waker: Option<Waker>,
        may_wait: bool,
        work: &mut Work<C>,
    ) -> Result<u32, CallError> {
        let is_full = self.outstanding >= self.rules.outstanding_max;
        let refusal = match self.life {
            Life::Draining | Life::Ended => Some(CallErrorKind::Closed),
            Life::Open => (is_full && !may_wait).then_some(CallErrorKind::Full),
        };
        if let Some(kind) = refusal {
            work.unused.push(State::InLine(message));
            work.discard(waker);
            return Err(CallError::unsent(kind, None));
        }
        self.counts.calls += 1;
        let index = self.entries.insert(State::InLine(message), deadline_ns, waker);
        if deadline_ns != NEVER {
            let entries = &mut self.entries;
            self.deadlines
                .insert(deadline_ns, index, |at_ns, call| entries.has_deadline(call, at_ns));
            self.set_timer(deadline_ns, work);
        }
        if is_full {
            self.line.push(index, self.entries.links());
        } else {
            self.outstanding += 1;
            self.enqueue(index, work);
        }
        Ok(index)
    }

    /// Polls a call. A call that has ended is removed.
    pub(super) fn poll(
        &mut self,
        index: u32,
        waker: &Waker,
        clone: &mut Option<Waker>,
        work: &mut Work<C>,
    ) -> Polled<C::In> {
        let entry = self.entries.at(index);
        if let State::Done(_) = entry.state {
            let entry = self.entries.remove(index);
            work.discard(entry.waker);
            return match entry.state {
                State::Done(result) => Polled::Done(result),
                _ => unreachable!("checked above"),
            };
        }
        if entry.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
            return Polled::Waits;
        }
        match clone.take() {
            Some(clone) => {
                work.discard(entry.waker.replace(clone));
                Polled::Waits
            }
            None => Polled::NeedsWaker,
        }
    }

    /// Removes a call whose future is dropped.
    pub(super) fn cancel(&mut self, index: u32, work: &mut Work<C>) {
        let entry = self.entries.at(index);
        work.discard(entry.waker.take());
        if !matches!(entry.state, State::Done(_)) {
            self.finish(index, Err(CallError::unsent(CallErrorKind::Closed, None)), work);
        }
        let entry = self.entries.remove(index);
        work.unused.push(entry.state);
        self.admit(work);
    }

    /// Ends the calls whose deadline has come. Returns the next deadline, at which the timer calls
    /// this again; `None` ends the timer.
    pub(super) fn expire(&mut self, now_ns: u64, waker: Waker, work: &mut Work<C>) -> Option<u64> {
        while let Some((deadline_ns, index)) = self.first_deadline()
            && deadline_ns <= now_ns
        {
            self.counts.expired += 1;
            let error = match self.entries.at(index).state {
                State::Sent { .. } => CallError::sent(CallErrorKind::Deadline, None),
                _ => {
                    let cause = (!self.is_up()).then(|| self.last_failure.clone()).flatten();
                    CallError::unsent(CallErrorKind::Deadline, cause)
                }
            };
            self.finish(index, Err(error), work);
        }
        self.admit(work);
        let Some((next_ns, _)) = self.first_deadline() else {
            self.timer = Timer::Off;
            work.discard(Some(waker));
            return None;
        };
        if let Timer::On(_, old) =
            std::mem::replace(&mut self.timer, Timer::On(next_ns, Some(waker)))
        {
            work.discard(old);
        }
        Some(next_ns)
    }

    fn first_deadline(&mut self) -> Option<(u64, u32)> {
        let entries = &mut self.entries;
        self.deadlines.first(|at_ns, call| entries.has_deadline(call, at_ns))
    }

    /// Lets the timer look at this time at the latest.
    fn set_timer(&mut self, at_ns: u64, work: &mut Work<C>) {
        match &mut self.timer {
            Timer::Off => {
                self.timer = Timer::On(at_ns, None);
                work.starts_timer = true;
            }
            Timer::On(planned_ns, waker) if at_ns < *planned_ns => {
                *planned_ns = at_ns;
                work.wakers.extend(waker.take());
            }
            Timer::On(..) => {}
        }
    }

    /// The client's poller has ended, and with it the timer, or the dial of a link. No deadline
    /// would hold, and no connection would be made. So the client ends.
    pub(super) fn poller_ended(&mut self, link: Option<u32>, work: &mut Work<C>) {
        match link {
            Some(link) => self.set_down(link, work),
            None => self.timer = Timer::Off,
        }
        self.abort(work);
    }

    /// Takes no more calls. The client ends with its last outstanding call.
    pub(super) fn drain(&mut self, work: &mut Work<C>) {
        if self.life != Life::Open {
            return;
        }
        self.life = Life::Draining;
        while let Some(index) = self.line.pop(self.entries.links()) {
            self.set_done(index, Err(CallError::unsent(CallErrorKind::Closed, None)), work);
        }
        work.wakers.extend(self.ready.take());
        self.admit(work);
    }

    /// Ends every call and every connection now.
    pub(super) fn abort(&mut self, work: &mut Work<C>) {
        let had_ended = self.life == Life::Ended;
        self.life = Life::Ended;
        for index in self.entries.indices() {
            let closed = CallErrorKind::Closed;
            let error = match self.entries.at(index).state {
                State::Done(_) => continue,
                State::Sent { .. } => CallError::sent(closed, None),
                _ => CallError::unsent(closed, None),
            };
            self.finish(index, Err(error), work);
        }
        if !had_ended {
            self.end(true, work);
        }
    }

    /// Whether every connection and every task of an ended client is gone. Otherwise registers
    /// `waker` for that.
    pub(super) fn poll_gone(
        &mut self,
        number: &mut Number,
        waker: Waker,
        work: &mut Work<C>,
    ) -> bool {
        if self.is_gone() {
            work.discard(Some(waker));
            return true;
        }
        let replaced = self.closers.wait(number, waker);
        work.discard(replaced);
        false
    }

    pub(super) fn forget_closer(&mut self, number: Number, work: &mut Work<C>) {
        let waker = self.closers.withdraw(number);
        work.discard(waker);
    }

    fn is_gone(&self) -> bool {
        self.life == Life::Ended
            && self.links.iter().all(|link| matches!(link.state, LinkState::Down))
    }

    pub(super) fn has_ended(&self) -> bool {
        self.life == Life::Ended
    }

    pub(super) fn is_open(&self) -> bool {
        self.life == Life::Open
    }

    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// How many calls are outstanding, and how many wait in line.
    pub(super) fn loads(&self) -> (usize, usize) {
        (self.outstanding, self.line.count())
    }

    /// How many connections are up.
    pub(super) fn up_count(&self) -> usize {
        self.links.iter().filter(|link| matches!(link.state, LinkState::Up(_))).count()
    }

    fn is_up(&self) -> bool {
        self.links.iter().any(|link| matches!(link.state, LinkState::Up(_)))
    }

    /// Ends a call that has not ended. The caller calls [`admit`](Self::admit) after the last one.
    fn finish(&mut self, index: u32, result: Result<C::In, CallError>, work: &mut Work<C>) {
        self.outstanding -= match &self.entries.at(index).state {
            State::InLine(_) => {
                self.line.remove(index, self.entries.links());
                0
            }
            &State::Queued(_, link) => {
                self.links[link as usize].queue.remove(index, self.entries.links());
                1
            }
            State::Sent { link, number } => {
                self.links[*link as usize].numbers.remove(number);
                1
            }
            State::Done(_) | State::Free => unreachable!("call {index} has ended"),
        };
        self.set_done(index, result, work);
    }

    /// Gives a call its result. The call is in no queue.
    fn set_done(&mut self, index: u32, result: Result<C::In, CallError>, work: &mut Work<C>) {
        let entry = self.entries.at(index);
        let state = std::mem::replace(&mut entry.state, State::Done(result));
        entry.deadline_ns = NEVER;
        work.wakers.extend(entry.waker.take());
        if !matches!(state, State::Sent { .. }) {
            work.unused.push(state);
        }
    }

    /// Queues calls of the line while there is room. Ends a draining client that has no call left.
    fn admit(&mut self, work: &mut Work<C>) {
        while self.life == Life::Open
            && self.outstanding < self.rules.outstanding_max
            && let Some(index) = self.line.pop(self.entries.links())
        {
            self.outstanding += 1;
            self.enqueue(index, work);
        }
        if self.life == Life::Draining && self.outstanding == 0 {
            self.life = Life::Ended;
            self.end(false, work);
        }
    }

    /// Lets everything that works for the client end.
    fn end(&mut self, with_reset: bool, work: &mut Work<C>) {
        for link in &mut self.links {
            if let LinkState::Up(handle) = &link.state {
                work.closes.push((handle.clone(), with_reset));
            }
            work.wakers.extend(link.waker.take());
        }
        if let Timer::On(_, waker) = &mut self.timer {
            work.wakers.extend(waker.take());
        }
        work.wakers.extend(self.ready.take());
        if self.is_gone() {
            work.wakers.extend(self.closers.take());
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
