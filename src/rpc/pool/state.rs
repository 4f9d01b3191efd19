//! What a pool knows, as pure transitions under the pool's lock.
//!
//! Each address has a *site*: its idle connections, the callers that wait, and its *places*. A
//! caller needs a place before it takes an idle connection or dials, and keeps the place until the
//! connection is given back or closed. A site has `connections_max` places, which callers get in
//! the order of their requests. A dial begins only at a place, and only if no connection is idle.
//! So at most `connections_max` connections are open.
//!
//! ```text
//!   free, or Granted to a caller that waited ──► Out, with an idle connection ──► free
//!        └──► Dialing ──► Out ──► free
//!   free ──► Warming ──► free
//!   free ──► Closing an idle connection ──► free
//! ```
//!
//! A place that becomes free is granted to the caller that has waited longest. So callers wait only
//! while all places are taken, and no later caller overtakes them.
//!
//! No user code runs here. Wakers to call and connections to close are returned in an [`After`],
//! for the time after unlocking.

use std::collections::{BTreeMap, HashMap};
use std::task::Waker;

use super::PoolStats;
use super::builder::Settings;
use crate::sync::Arc;

/// What the holder of a place does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// Has waited for the place, and has not been polled since it was granted.
    Granted,
    Dialing,
    /// Dials in the background, for the warm minimum.
    Warming,
    /// Uses a connection.
    Out,
    /// Closes a connection that was idle.
    Closing,
}

/// Whether an idle connection can be handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fitness {
    Fit,
    /// Idle for too long, or too old.
    Expired,
    /// The peer has closed it, or has sent bytes that nobody asked for.
    Dead,
}

pub(super) struct State<C> {
    sites: HashMap<Arc<str>, Site<C>>,
    last_ticket: u64,
    is_closed: bool,
    keeper_runs: bool,
    pub(super) counts: PoolStats,
}

struct Site<C> {
    /// The connection that was given back last is the last.
    idle: Vec<C>,
    /// Callers by their ticket. A caller that is granted a place leaves this map.
    waiting: BTreeMap<u64, Waker>,
    /// How many places are held, by [`Held`].
    held: [usize; 5],
    /// Set while connections are kept warm.
    warm: Option<Warm>,
}

/// How the background dials of an address have gone.
#[derive(Clone, Copy, Default)]
struct Warm {
    failures: u32,
    retry_ns: u64,
}

/// What must be done after unlocking.
#[must_use]
pub(super) struct After<C> {
    pub(super) wakes: Vec<Waker>,
    /// Connections of one address, each with a [`Held::Closing`] place.
    pub(super) closes: Vec<C>,
    pub(super) starts_keeper: bool,
    /// The pool is closed, and no connection of it is open.
    pub(super) is_emptied: bool,
}

/// The answer to a caller that asks for a connection.
pub(super) enum Entered<C> {
    /// The pool is closed.
    Closed,
    /// A connection, and an [`Out`](Held::Out) place.
    Idle(Arc<str>, C),
    /// A [`Dialing`](Held::Dialing) place.
    Dial(Arc<str>),
    /// The waker is registered, if there was one.
    Waits,
}

impl<C> State<C> {
    pub(super) fn new() -> State<C> {
        State {
            sites: HashMap::new(),
            last_ticket: 0,
            is_closed: false,
            keeper_runs: false,
            counts: PoolStats::default(),
        }
    }

    /// Asks for a connection. A caller without a `ticket` that has to wait gets one, if it brings a
    /// `waker`. Returns the waker that is not needed any more as well.
    pub(super) fn enter(
        &mut self,
        settings: &Settings,
        address: &str,
        ticket: &mut Option<u64>,
        waker: Option<Waker>,
        fitness: impl Fn(&C) -> Fitness,
    ) -> (Entered<C>, After<C>, Option<Waker>) {
        let mut after = After::nothing();
        if self.is_closed {
            return (Entered::Closed, after, waker);
        }
        let (address, site) = Self::site(&mut self.sites, address);
        if settings.idle_min > 0 && site.warm.is_none() {
            site.warm = Some(Warm::default());
            after.starts_keeper = !std::mem::replace(&mut self.keeper_runs, true);
        }
        let is_free = match ticket {
            Some(ticket) => !site.waiting.contains_key(ticket),
            None => site.taken() < settings.connections_max,
        };
        if !is_free {
            let Some(waker) = waker else { return (Entered::Waits, after, None) };
            let ticket = *ticket.get_or_insert_with(|| {
                self.last_ticket += 1;
                self.last_ticket
            });
            let replaced = site.waiting.insert(ticket, waker);
            return (Entered::Waits, after, replaced);
        }
        if ticket.take().is_some() {
            *site.held(Held::Granted) -= 1;
        }
        while let Some(connection) = site.idle.pop() {
            match fitness(&connection) {
                Fitness::Fit => {
                    *site.held(Held::Out) += 1;
                    self.counts.reused += 1;
                    return (Entered::Idle(address, connection), after, waker);
                }
                Fitness::Expired => self.counts.expired += 1,
                Fitness::Dead => self.counts.dead += 1,
            }
            *site.held(Held::Closing) += 1;
            after.closes.push(connection);
        }
        *site.held(Held::Dialing) += 1;
        (Entered::Dial(address), after, waker)
    }

    /// Withdraws a caller that waits, or that was granted a place and has not taken it.
    pub(super) fn leave(
        &mut self,
        settings: &Settings,
        address: &str,
        ticket: u64,
    ) -> (After<C>, Option<Waker>) {
        let Some(site) = self.sites.get_mut(address) else { return (After::nothing(), None) };
        match site.waiting.remove(&ticket) {
            Some(waker) => {
                self.forget_if_vacant(address);
                (After::nothing(), Some(waker))
            }
            None => (self.release(settings, address, Held::Granted, 1), None),
        }
    }

    /// The dial of this place has made a connection, which its caller gets. `false`: the pool is
    /// closed.
    pub(super) fn dialed(&mut self, address: &str) -> bool {
        let Some(site) = self.sites.get_mut(address) else { return false };
        *site.held(Held::Dialing) -= 1;
        *site.held(Held::Out) += 1;
        site.warm = site.warm.map(|_| Warm::default());
        !self.is_closed
    }

    /// Frees `count` places, and grants free places to the callers that have waited longest.
    pub(super) fn release(
        &mut self,
        settings: &Settings,
        address: &str,
        held: Held,
        count: usize,
    ) -> After<C> {
        let mut after = After::nothing();
        let Some(site) = self.sites.get_mut(address) else { return after };
        *site.held(held) -= count;
        if !self.is_closed {
            while site.taken() < settings.connections_max
                && let Some((_, waker)) = site.waiting.pop_first()
            {
                *site.held(Held::Granted) += 1;
                after.wakes.push(waker);
            }
            // A connection that waits for a caller does not count as idle.
            let kept = settings.idle_max.saturating_add(*site.held(Held::Granted));
            let surplus = site.idle.len().saturating_sub(kept);
            *site.held(Held::Closing) += surplus;
            after.closes.extend(site.idle.drain(..surplus));
        }
        self.forget_if_vacant(address);
        after.is_emptied = self.is_emptied();
        after
    }

    /// Makes a connection idle and frees its place. The connection comes back, and keeps its place,
    /// if the pool is closed or has enough idle ones.
    pub(super) fn give_back(
        &mut self,
        settings: &Settings,
        address: &str,
        held: Held,
        connection: C,
    ) -> Result<After<C>, C> {
        let Some(site) = self.sites.get_mut(address) else { return Err(connection) };
        let awaited = *site.held(Held::Granted) + usize::from(!site.waiting.is_empty());
        if self.is_closed || site.idle.len() >= settings.idle_max.saturating_add(awaited) {
            return Err(connection);
        }
        site.idle.push(connection);
        let starts_keeper = !std::mem::replace(&mut self.keeper_runs, true);
        Ok(After { starts_keeper, ..self.release(settings, address, held, 1) })
    }

    /// Closes the pool. Returns all idle connections, for each address.
    pub(super) fn close(&mut self) -> Vec<(Arc<str>, Vec<C>)> {
        self.is_closed = true;
        let mut closes = Vec::new();
        self.sites.retain(|address, site| {
            site.warm = None;
            if !site.idle.is_empty() {
                *site.held(Held::Closing) += site.idle.len();
                closes.push((Arc::clone(address), std::mem::take(&mut site.idle)));
            }
            !site.is_vacant()
        });
        closes
    }

    /// Whether the pool is closed and no connection of it is open.
    pub(super) fn is_emptied(&self) -> bool {
        self.is_closed && self.sites.values().all(|site| site.open() == 0)
    }

    /// How many connections are open, or being dialled.
    pub(super) fn open(&self) -> usize {
        self.sites.values().map(Site::open).sum()
    }

    pub(super) fn stats(&self) -> PoolStats {
        let mut stats = self.counts;
        stats.addresses = self.sites.len();
        for site in self.sites.values() {
            stats.idle += site.idle.len();
            stats.waiting += site.waiting.len() + site.held[Held::Granted as usize];
            stats.dialing += site.held[Held::Dialing as usize] + site.held[Held::Warming as usize];
            stats.checked_out += site.held[Held::Out as usize];
        }
        stats
    }

    fn site<'a>(
        sites: &'a mut HashMap<Arc<str>, Site<C>>,
        address: &str,
    ) -> (Arc<str>, &'a mut Site<C>) {
        let known = sites.get_key_value(address).map(|(address, _)| Arc::clone(address));
        let address = known.unwrap_or_else(|| Arc::from(address));
        let site = sites.entry(Arc::clone(&address)).or_insert_with(Site::new);
        (address, site)
    }

    fn forget_if_vacant(&mut self, address: &str) {
        if self.sites.get(address).is_some_and(Site::is_vacant) {
            self.sites.remove(address);
        }
    }
}

/// What the keeper asks for; see [`keeper`](super::keeper).
impl<C> State<C> {
    /// Keeps connections to `address` warm. `true`: the caller must start the keeper.
    pub(super) fn warm(&mut self, address: &str) -> bool {
        if self.is_closed {
            return false;
        }
        Self::site(&mut self.sites, address).1.warm.get_or_insert_default();
        !std::mem::replace(&mut self.keeper_runs, true)
    }

    /// Keeps connections to `address` warm no longer. Returns the idle ones, to be closed.
    pub(super) fn cool(&mut self, address: &str) -> Vec<C> {
        let Some(site) = self.sites.get_mut(address) else { return Vec::new() };
        site.warm = None;
        let closes = std::mem::take(&mut site.idle);
        *site.held(Held::Closing) += closes.len();
        self.forget_if_vacant(address);
        closes
    }

    /// The addresses that the keeper must visit.
    pub(super) fn kept_addresses(&self) -> Vec<Arc<str>> {
        let kept = self.sites.iter().filter(|(_, site)| site.is_kept());
        kept.map(|(address, _)| Arc::clone(address)).collect()
    }

    /// Takes out at most `most` idle connections that cannot be handed out. They must be closed.
    pub(super) fn take_unfit(
        &mut self,
        address: &str,
        most: usize,
        fitness: impl Fn(&C) -> Fitness,
    ) -> Vec<C> {
        let Some(site) = self.sites.get_mut(address) else { return Vec::new() };
        let mut unfit = Vec::new();
        let mut index = 0;
        while index < site.idle.len() && unfit.len() < most {
            match fitness(&site.idle[index]) {
                Fitness::Fit => {
                    index += 1;
                    continue;
                }
                Fitness::Expired => self.counts.expired += 1,
                Fitness::Dead => self.counts.dead += 1,
            }
            unfit.push(site.idle.remove(index));
        }
        *site.held(Held::Closing) += unfit.len();
        unfit
    }

    /// Takes places for the background dials that the warm minimum of `address` needs.
    pub(super) fn start_warming(
        &mut self,
        settings: &Settings,
        address: &str,
        now_ns: u64,
    ) -> usize {
        let Some(site) = self.sites.get_mut(address) else { return 0 };
        let Some(warm) = site.warm else { return 0 };
        if warm.retry_ns > now_ns {
            return 0;
        }
        let ready = site.idle.len() + *site.held(Held::Warming);
        let room = settings.connections_max.saturating_sub(site.open().max(site.taken()));
        let count = settings.idle_min.saturating_sub(ready).min(room);
        *site.held(Held::Warming) += count;
        self.counts.dials += count as u64;
        count
    }

    /// A background dial has succeeded.
    pub(super) fn warmed(&mut self, address: &str) {
        if let Some(site) = self.sites.get_mut(address) {
            site.warm = site.warm.map(|_| Warm::default());
        }
    }

    /// A background dial has failed. The next ones wait until `retry_ns` of the number of failures
    /// in a row. After `failures_max` of them there are no more until the address is used again.
    pub(super) fn warming_failed(
        &mut self,
        address: &str,
        failures_max: u32,
        retry_ns: impl Fn(u32) -> u64,
    ) {
        self.counts.dial_failures += 1;
        let Some(site) = self.sites.get_mut(address) else { return };
        let Some(warm) = &mut site.warm else { return };
        warm.failures += 1;
        warm.retry_ns = retry_ns(warm.failures);
        if warm.failures >= failures_max {
            site.warm = None;
        }
    }

    /// When the keeper must visit next: when the first connection expires, by `ends_ns`, or at
    /// `latest_ns`. `None`: there is nothing to keep, and the keeper must end.
    pub(super) fn next_visit(
        &mut self,
        latest_ns: u64,
        ends_ns: impl Fn(&C) -> u64,
    ) -> Option<u64> {
        if self.is_closed || !self.sites.values().any(Site::is_kept) {
            self.keeper_runs = false;
            return None;
        }
        let idle = self.sites.values().flat_map(|site| &site.idle);
        Some(idle.map(ends_ns).fold(latest_ns, u64::min))
    }

    /// The keeper has ended before its time.
    pub(super) fn lose_keeper(&mut self) {
        self.keeper_runs = false;
    }
}

impl<C> Site<C> {
    fn new() -> Site<C> {
        Site { idle: Vec::new(), waiting: BTreeMap::new(), held: [0; 5], warm: None }
    }

    fn held(&mut self, held: Held) -> &mut usize {
        &mut self.held[held as usize]
    }

    /// How many places are taken.
    fn taken(&self) -> usize {
        self.held.iter().sum()
    }

    /// How many connections are open, or being dialled.
    fn open(&self) -> usize {
        self.idle.len() + self.taken() - self.held[Held::Granted as usize]
    }

    fn is_kept(&self) -> bool {
        !self.idle.is_empty() || self.warm.is_some()
    }

    fn is_vacant(&self) -> bool {
        !self.is_kept() && self.waiting.is_empty() && self.taken() == 0
    }
}

impl<C> After<C> {
    pub(super) fn nothing() -> After<C> {
        After { wakes: Vec::new(), closes: Vec::new(), starts_keeper: false, is_emptied: false }
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
