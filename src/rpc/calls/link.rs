//! Links: the places of the connections of a client.
//!
//! ```text
//!  Down ──► Dialing ──► Up
//!   ▲          │        │
//!   └──────────┴────────┘
//! ```
//!
//! A link that is `Dialing` has one task that dials, and a link that is `Up` has one task that
//! sends and receives. So there is one dial at a time for each link.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use super::entries::State;
use super::list::List;
use super::{Calls, Life, Work};
use crate::clock::now_ns;
use crate::connection::Handle;
use crate::error::Error;
use crate::poller::timers::ns_after;
use crate::random;
use crate::rpc::call_error::{CallError, CallErrorKind};
use crate::rpc::codec::Codec;
use crate::task::waiters::Number;

pub(super) struct Link {
    pub(super) state: LinkState,
    /// The waker of the task of this link. It is called for a queued call, and for the end of the
    /// client.
    pub(super) waker: Option<Waker>,
    pub(super) queue: List,
    /// The sent calls by their numbers.
    pub(super) numbers: HashMap<u32, u32, BuildHasherDefault<NumberHasher>>,
    pub(super) next_number: u32,
    /// Whether the connection has answered a call.
    has_answered: bool,
    /// How many dials and connections have failed since the last answer.
    failures: u32,
    /// The next dial begins no earlier.
    retry_ns: u64,
}

pub(super) enum LinkState {
    Down,
    Dialing,
    Up(Handle),
}

impl Link {
    pub(super) fn new() -> Link {
        Link {
            state: LinkState::Down,
            waker: None,
            queue: List::new(),
            numbers: HashMap::default(),
            next_number: 1,
            has_answered: false,
            failures: 0,
            retry_ns: 0,
        }
    }

    fn is_up(&self) -> bool {
        matches!(self.state, LinkState::Up(_))
    }

    /// Whether a call would wait for a dial that has begun, or for a pause before one.
    fn is_slow(&self) -> bool {
        match self.state {
            LinkState::Up(_) => false,
            LinkState::Dialing => true,
            LinkState::Down => self.failures > 0 && self.retry_ns > now_ns(),
        }
    }

    /// A number that no sent call has. Numbers repeat after 2^32 calls of a connection.
    pub(super) fn number(&mut self) -> u32 {
        loop {
            let number = self.next_number;
            self.next_number = number.wrapping_add(1);
            if !self.numbers.contains_key(&number) {
                return number;
            }
        }
    }

    /// Counts a failure, and chooses when the next dial begins: after a random part of a time that
    /// doubles with each failure.
    fn failed(&mut self, first: Duration, max: Duration) {
        let doubled = first.saturating_mul(1 << self.failures.min(BACKOFF_DOUBLINGS_MAX));
        self.failures = self.failures.saturating_add(1);
        let longest_ns = doubled.min(max).as_nanos() as u64;
        let random = random::scramble(random::seed(), now_ns());
        let pause_ns = random % longest_ns.saturating_add(1);
        self.retry_ns = ns_after(Duration::from_nanos(pause_ns));
    }
}

impl<C: Codec> Calls<C> {
    /// Queues a call that is in no queue and counts as outstanding.
    pub(super) fn enqueue(&mut self, index: u32, work: &mut Work<C>) {
        let link = self.pick();
        let entry = self.entries.at(index);
        entry.state = match std::mem::replace(&mut entry.state, State::Free) {
            State::InLine(message) | State::Queued(message, _) => State::Queued(message, link),
            _ => unreachable!("call {index} was sent"),
        };
        self.links[link as usize].queue.push(index, self.entries.links());
        self.rouse(link, work);
    }

    /// The link for a call: the one with the fewest calls. Links that dial, and links whose next
    /// dial must wait, come last. Among equal ones, links with a connection come first.
    fn pick(&self) -> u32 {
        let cost =
            |link: &Link| (link.is_slow(), link.queue.count() + link.numbers.len(), !link.is_up());
        let costs = self.links.iter().enumerate().map(|(index, link)| (cost(link), index));
        costs.min().map_or(0, |(_, index)| index as u32)
    }

    /// Lets a link work for its queue.
    fn rouse(&mut self, link: u32, work: &mut Work<C>) {
        let place = &mut self.links[link as usize];
        match place.state {
            LinkState::Up(_) => work.wakers.extend(place.waker.take()),
            LinkState::Dialing => {}
            LinkState::Down => {
                place.state = LinkState::Dialing;
                work.dials.push(link);
            }
        }
    }

    /// When the dial of a link begins. `None`: nobody waits for a connection any more, and the link
    /// is down.
    pub(in crate::rpc) fn next_dial(&mut self, link: u32, work: &mut Work<C>) -> Option<u64> {
        let place = &self.links[link as usize];
        let is_wanted = place.queue.count() > 0 || !self.ready.is_empty();
        if self.life == Life::Ended || !is_wanted {
            self.set_down(link, work);
            return None;
        }
        Some(place.retry_ns)
    }

    pub(in crate::rpc) fn count_dial(&mut self) {
        self.counts.dials += 1;
    }

    /// Whether the client has ended. Otherwise registers the waker of the task of `link` for that.
    pub(in crate::rpc) fn poll_ended(
        &mut self,
        link: u32,
        waker: Waker,
        work: &mut Work<C>,
    ) -> bool {
        let replaced = self.links[link as usize].waker.replace(waker);
        work.discard(replaced);
        self.life == Life::Ended
    }

    /// A dial has failed. `true`: the same task dials again.
    pub(in crate::rpc) fn dial_failed(
        &mut self,
        link: u32,
        error: Error,
        work: &mut Work<C>,
    ) -> bool {
        let may_succeed = !error.is_invalid();
        let error = work.share(error);
        work.unused_errors.extend(self.last_failure.replace(Arc::clone(&error)));
        self.counts.failed_dials += 1;
        let (first, max) = (self.rules.backoff_first, self.rules.backoff_max);
        let place = &mut self.links[link as usize];
        place.failed(first, max);
        let waiting = place.queue.count();
        work.wakers.extend(self.ready.take());
        let is_wanted = waiting > 0 && !self.is_up() && self.life != Life::Ended;
        if self.rules.waits_for_server && may_succeed && is_wanted {
            return true;
        }
        self.set_down(link, work);
        if self.is_up() {
            self.rehome(link, work);
            return false;
        }
        for _ in 0..waiting {
            let Some(index) = self.links[link as usize].queue.pop(self.entries.links()) else {
                break;
            };
            let cause = Some(Arc::clone(&error));
            self.set_done(index, Err(CallError::unsent(CallErrorKind::CannotConnect, cause)), work);
            self.outstanding -= 1;
        }
        self.admit(work);
        false
    }

    /// A dial has succeeded. `false`: the client has ended, so the connection is not needed.
    pub(in crate::rpc) fn connected(
        &mut self,
        link: u32,
        handle: Handle,
        work: &mut Work<C>,
    ) -> bool {
        if self.life == Life::Ended {
            self.set_down(link, work);
            return false;
        }
        let place = &mut self.links[link as usize];
        place.state = LinkState::Up(handle);
        place.next_number = 1;
        place.has_answered = false;
        work.discard(place.waker.take());
        work.wakers.extend(self.ready.take());
        true
    }

    /// Moves up to `count_max` queued calls to `messages`, with their numbers. Registers `waker`
    /// for further ones if there are none.
    pub(in crate::rpc) fn take_queued(
        &mut self,
        link: u32,
        count_max: usize,
        messages: &mut Vec<(u32, C::Out)>,
        waker: &mut Option<Waker>,
        work: &mut Work<C>,
    ) {
        let place = &mut self.links[link as usize];
        if place.queue.count() == 0 {
            let replaced = std::mem::replace(&mut place.waker, waker.take());
            work.discard(replaced);
            return;
        }
        for _ in 0..count_max {
            let Some(index) = place.queue.pop(self.entries.links()) else { return };
            let number = place.number();
            let sent = State::Sent { link, number };
            match std::mem::replace(&mut self.entries.at(index).state, sent) {
                State::Queued(message, _) => messages.push((number, message)),
                _ => unreachable!("call {index} is in a queue"),
            }
            place.numbers.insert(number, index);
        }
    }

    /// The codec could not encode the request with this number.
    pub(in crate::rpc) fn encode_failed(
        &mut self,
        link: u32,
        number: u32,
        error: Error,
        work: &mut Work<C>,
    ) {
        let error = work.share(error);
        if let Some(&index) = self.links[link as usize].numbers.get(&number) {
            let error = CallError::unsent(CallErrorKind::Codec, Some(error));
            self.finish(index, Err(error), work);
            self.admit(work);
        }
    }

    /// Passes answers to their calls. Answers without a call are counted and dropped.
    pub(in crate::rpc) fn deliver(
        &mut self,
        link: u32,
        answers: &mut Vec<(u32, C::In)>,
        work: &mut Work<C>,
    ) {
        for (number, answer) in answers.drain(..) {
            let place = &mut self.links[link as usize];
            let Some(index) = place.numbers.remove(&number) else {
                self.counts.discarded += 1;
                work.unused.push(State::Done(Ok(answer)));
                continue;
            };
            place.has_answered = true;
            place.failures = 0;
            self.counts.answers += 1;
            self.set_done(index, Ok(answer), work);
            self.outstanding -= 1;
        }
        self.admit(work);
    }

    /// The connection of a link has ended. Calls that were sent fail, and the others move to
    /// another connection.
    pub(in crate::rpc) fn disconnected(&mut self, link: u32, error: Error, work: &mut Work<C>) {
        let error = work.share(error);
        let (first, max) = (self.rules.backoff_first, self.rules.backoff_max);
        let place = &mut self.links[link as usize];
        match place.has_answered {
            true => place.failures = 0,
            false => place.failed(first, max),
        }
        if self.life != Life::Ended {
            self.counts.lost_connections += 1;
        }
        let sent = std::mem::take(&mut place.numbers);
        for index in sent.into_values() {
            let cause = Some(Arc::clone(&error));
            self.set_done(index, Err(CallError::sent(CallErrorKind::ConnectionLost, cause)), work);
            self.outstanding -= 1;
        }
        self.set_down(link, work);
        self.rehome(link, work);
        self.admit(work);
    }

    /// Moves the queue of a link that is down to links that are up. Where there are none, the link
    /// dials.
    fn rehome(&mut self, link: u32, work: &mut Work<C>) {
        if self.is_up() {
            for _ in 0..self.links[link as usize].queue.count() {
                if let Some(index) = self.links[link as usize].queue.pop(self.entries.links()) {
                    self.enqueue(index, work);
                }
            }
        } else if self.links[link as usize].queue.count() > 0 {
            self.rouse(link, work);
        }
    }

    pub(super) fn set_down(&mut self, link: u32, work: &mut Work<C>) {
        let place = &mut self.links[link as usize];
        place.state = LinkState::Down;
        work.discard(place.waker.take());
        if self.is_gone() {
            work.wakers.extend(self.closers.take());
        }
    }

    /// Whether a connection is up. Otherwise lets a link dial, and registers `waker`. `failed` is
    /// the count of failed dials at the begin of the wait; one more ends the wait with an error.
    pub(in crate::rpc) fn poll_ready(
        &mut self,
        number: &mut Number,
        failed: &mut Option<u64>,
        waker: Waker,
        work: &mut Work<C>,
    ) -> Option<Result<(), CallError>> {
        let failed_before = *failed.get_or_insert(self.counts.failed_dials);
        let done = if self.life != Life::Open {
            Some(Err(CallError::unsent(CallErrorKind::Closed, None)))
        } else if self.is_up() {
            Some(Ok(()))
        } else if self.counts.failed_dials > failed_before {
            let cause = self.last_failure.clone();
            Some(Err(CallError::unsent(CallErrorKind::CannotConnect, cause)))
        } else {
            None
        };
        if done.is_some() {
            work.discard(Some(waker));
            return done;
        }
        let replaced = self.ready.wait(number, waker);
        work.discard(replaced);
        if !self.links.iter().any(|link| matches!(link.state, LinkState::Dialing)) {
            let link = self.pick();
            self.rouse(link, work);
        }
        None
    }

    pub(in crate::rpc) fn forget_ready(&mut self, number: Number, work: &mut Work<C>) {
        let waker = self.ready.withdraw(number);
        work.discard(waker);
    }
}

/// Spreads numbers over the buckets of a map. The client chooses the numbers, so no peer can make
/// them collide.
#[derive(Default)]
pub(super) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(u32::from(byte));
        }
    }

    fn write_u32(&mut self, number: u32) {
        // The fraction of the golden ratio: its multiples differ in their upper and lower bits.
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

/// After so many doublings, every first pause has reached any sensible longest one.
const BACKOFF_DOUBLINGS_MAX: u32 = 20;
