//! What the clones of a pool, its callers and its keeper share: the state under its lock, and what
//! follows a change of the state.
//!
//! Any thread may call it. Wakers are called, and connections are closed, without the lock.

use std::task::Waker;

use super::builder::Settings;
use super::keeper;
use super::state::{After, Entered, Fitness, Held, State};
use crate::clock::now_ns;
use crate::config;
use crate::connection::{Connection, Handle};
use crate::poller::timers::{NEVER, ns_after};
use crate::random::{scramble, seed};
use crate::sync::{Arc, Mutex, MutexGuard, lock};
use crate::task::Signal;
use crate::user_code;

pub(super) struct Shared {
    pub(super) settings: Settings,
    state: Mutex<State<Member>>,
    /// Raised when the pool is closed.
    pub(super) closed: Arc<Signal>,
    /// Raised when the pool is closed and none of its connections is open.
    pub(super) emptied: Arc<Signal>,
}

/// A connection of the pool.
pub(super) struct Member {
    pub(super) connection: Connection,
    /// Identifies the connection, for as long as it is a member.
    handle: Handle,
    /// When the connection is too old.
    ends_ns: u64,
    /// When the connection has been idle for too long. Set while it is idle.
    idle_until_ns: u64,
}

/// A place of an address. Dropping it frees the place.
pub(super) struct Place {
    shared: Arc<Shared>,
    pub(super) address: Arc<str>,
    /// `None` after the state has freed the place.
    held: Option<Held>,
}

/// What a caller gets that need not wait.
pub(super) enum Got {
    Idle(Place, Member),
    /// A place to dial at.
    Dial(Place),
    Closed,
}

impl Shared {
    pub(super) fn new(settings: Settings) -> Arc<Shared> {
        Arc::new(Shared {
            settings,
            state: Mutex::new(State::new()),
            closed: Signal::new(),
            emptied: Signal::new(),
        })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State<Member>> {
        lock(&self.state)
    }

    /// Asks for a connection; see [`State::enter`]. `None`: the caller has to wait.
    pub(super) fn enter(
        self: &Arc<Self>,
        address: &str,
        ticket: &mut Option<u64>,
        waker: Option<Waker>,
    ) -> Option<Got> {
        let now_ns = now_ns();
        let (entered, after, unneeded) =
            self.state().enter(&self.settings, address, ticket, waker, |member: &Member| {
                member.fitness(now_ns)
            });
        user_code::discard(unneeded);
        self.follow(address, after);
        Some(match entered {
            Entered::Waits => return None,
            Entered::Closed => Got::Closed,
            Entered::Idle(address, member) => Got::Idle(self.place(address, Held::Out), member),
            Entered::Dial(address) => Got::Dial(self.place(address, Held::Dialing)),
        })
    }

    /// Withdraws a caller that waited.
    pub(super) fn leave(self: &Arc<Self>, address: &str, ticket: u64) {
        let (after, unneeded) = self.state().leave(&self.settings, address, ticket);
        user_code::discard(unneeded);
        self.follow(address, after);
    }

    pub(super) fn place(self: &Arc<Self>, address: Arc<str>, held: Held) -> Place {
        Place { shared: Arc::clone(self), address, held: Some(held) }
    }

    /// Does what a change of the state asks for.
    pub(super) fn follow(self: &Arc<Self>, address: &str, after: After<Member>) {
        let After { wakes, closes, starts_keeper, is_emptied } = after;
        if is_emptied {
            self.emptied.raise();
        }
        user_code::wake_all(wakes);
        if starts_keeper {
            keeper::start(self);
        }
        self.close_members(address, closes);
    }

    /// Closes connections that hold a [`Closing`](Held::Closing) place each, and frees the places.
    pub(super) fn close_members(self: &Arc<Self>, address: &str, mut closes: Vec<Member>) {
        while !closes.is_empty() {
            let count = closes.len();
            closes.into_iter().for_each(Member::close);
            let after = self.state().release(&self.settings, address, Held::Closing, count);
            if after.is_emptied {
                self.emptied.raise();
            }
            user_code::wake_all(after.wakes);
            closes = after.closes;
        }
    }

    /// Closes the pool; see [`super::Pool::close`].
    pub(super) fn close(self: &Arc<Self>) {
        let closes = self.state().close();
        self.closed.raise();
        for (address, members) in closes {
            self.close_members(&address, members);
        }
        let is_emptied = self.state().is_emptied();
        if is_emptied {
            self.emptied.raise();
        }
    }
}

impl Place {
    /// The dial at this place has succeeded. `None`: the pool is closed.
    pub(super) fn dialed(mut self, connection: Connection) -> Option<(Place, Member)> {
        let member = Member::new(connection, &self.shared.settings);
        let is_open = self.shared.state().dialed(&self.address);
        self.held = Some(Held::Out);
        if !is_open {
            member.close();
            return None;
        }
        Some((self, member))
    }

    /// Makes the connection idle and frees the place. Closes a connection that cannot be used again
    /// or that the pool does not need.
    pub(super) fn give_back(mut self, mut member: Member) {
        let now_ns = now_ns();
        match member.fitness_to_return(now_ns) {
            Fitness::Fit => {}
            Fitness::Dead => return member.close(),
            Fitness::Expired => {
                self.shared.state().counts.expired += 1;
                return member.close();
            }
        }
        let Some(held) = self.held else { return member.close() };
        member.connection.renew();
        member.idle_until_ns = self.shared.settings.idle_lifetime.map_or(NEVER, ns_after);
        let given = {
            let mut state = self.shared.state();
            state.give_back(&self.shared.settings, &self.address, held, member)
        };
        match given {
            Ok(after) => {
                self.held = None;
                self.shared.follow(&self.address, after);
            }
            Err(member) => member.close(),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(held) = self.held else { return };
        let after = self.shared.state().release(&self.shared.settings, &self.address, held, 1);
        self.shared.follow(&self.address, after);
    }
}

impl Member {
    pub(super) fn new(connection: Connection, settings: &Settings) -> Member {
        let handle = connection.handle();
        let ends_ns =
            settings.lifetime.map_or(NEVER, |lifetime| spread(ns_after(lifetime), handle.id()));
        Member { connection, handle, ends_ns, idle_until_ns: NEVER }
    }

    /// Closes the connection. Its socket has ended when this returns.
    pub(super) fn close(self) {
        self.connection.cut();
        // Dropping a connection runs its close callbacks if its poller has ended.
        user_code::discard(self);
    }

    pub(super) fn fitness(&self, now_ns: u64) -> Fitness {
        if !self.connection.is_quiet() {
            Fitness::Dead
        } else if self.expires_ns() <= now_ns {
            Fitness::Expired
        } else {
            Fitness::Fit
        }
    }

    /// When the idle connection must be closed.
    pub(super) fn expires_ns(&self) -> u64 {
        self.idle_until_ns.min(self.ends_ns)
    }

    fn fitness_to_return(&self, now_ns: u64) -> Fitness {
        // The caller may have put another connection in the place of this one.
        let is_own = self.connection.id() == self.handle.id();
        if !is_own || !self.connection.is_reusable() {
            Fitness::Dead
        } else if self.ends_ns <= now_ns {
            Fitness::Expired
        } else {
            Fitness::Fit
        }
    }
}

/// A random time before `ends_ns`, so that connections of the same age do not all end at a time.
fn spread(ends_ns: u64, id: u64) -> u64 {
    let spread_ns = ends_ns.saturating_sub(now_ns()) / config::POOL_LIFETIME_SPREAD;
    ends_ns - scramble(seed(), id ^ ends_ns) % spread_ns.max(1)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_lifetime_may_be_over_at_once() {
        let before_ns = now_ns().saturating_sub(1);
        assert_eq!(spread(before_ns, 7), before_ns);
    }
}
