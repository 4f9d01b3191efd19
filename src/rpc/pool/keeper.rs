//! The keeper: a future on a poller that closes idle connections which are dead or expired, and
//! dials for the warm minimum.
//!
//! A pool has a keeper only while a connection is idle or an address is kept warm. The keeper looks
//! at every such address once in a second, and whenever a connection expires. It ends with the
//! pool, or when there is nothing to keep; the next connection that becomes idle starts another
//! one. So an unused pool has no timer.

use std::future::pending;
use std::time::Duration;

use super::limit::{Limited, limited};
use super::shared::{Member, Place, Shared};
use super::state::Held;
use crate::clock::now_ns;
use crate::config;
use crate::connection::Remote;
use crate::poller::timers::{NEVER, ns_after};
use crate::random::{scramble, seed};
use crate::sync::Arc;
use crate::user_code;

/// Starts the keeper. The state says already that it runs.
pub(super) fn start(shared: &Arc<Shared>) {
    let running = Running { shared: Arc::clone(shared), has_ended: false };
    match shared.settings.dialer.lasting_home() {
        Ok(home) => {
            let keeper = keep(running, Arc::clone(&home));
            home.spawn(keeper);
        }
        // Without pollers there is no connection to keep.
        Err(error) => user_code::log(|| tracing::debug!(%error, "start the keeper of a pool")),
    }
}

/// Tells the state when the keeper ends before its time, for example with its poller.
struct Running {
    shared: Arc<Shared>,
    has_ended: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended {
            self.shared.state().lose_keeper();
        }
    }
}

async fn keep(mut running: Running, home: Arc<Remote>) {
    let shared = Arc::clone(&running.shared);
    loop {
        let addresses = shared.state().kept_addresses();
        let mut is_done = true;
        for address in &addresses {
            is_done &= visit(&shared, address, &home);
        }
        let pause = if is_done { config::POOL_VISIT_INTERVAL } else { config::POOL_VISIT_PAUSE };
        let latest_ns = ns_after(pause);
        let next_ns = shared.state().next_visit(latest_ns, Member::expires_ns);
        let Some(next_ns) = next_ns else { break };
        let next_ns = next_ns.max(ns_after(config::POOL_VISIT_PAUSE));
        // The end of the poller drops this future.
        if let Limited::Closed = limited(&shared, &home, next_ns, pending::<()>()).await {
            return;
        }
    }
    running.has_ended = true;
}

/// `false`: there may be more connections to close.
fn visit(shared: &Arc<Shared>, address: &Arc<str>, home: &Arc<Remote>) -> bool {
    let now_ns = now_ns();
    let most = config::POOL_CLOSES_PER_VISIT;
    let (unfit, dials) = {
        let mut state = shared.state();
        let unfit = state.take_unfit(address, most, |member: &Member| member.fitness(now_ns));
        (unfit, state.start_warming(&shared.settings, address, now_ns))
    };
    for _ in 0..dials {
        let place = shared.place(Arc::clone(address), Held::Warming);
        home.spawn(dial(Arc::clone(shared), Arc::clone(home), place));
    }
    let is_done = unfit.len() < most;
    shared.close_members(address, unfit);
    is_done
}

/// Dials for the warm minimum.
async fn dial(shared: Arc<Shared>, home: Arc<Remote>, place: Place) {
    let until_ns = shared.settings.checkout_timeout.map_or(NEVER, ns_after);
    let dial = shared.settings.dialer.connect_guarded(&place.address);
    match limited(&shared, &home, until_ns, dial).await {
        Limited::Done(Ok(connection)) => {
            shared.state().warmed(&place.address);
            place.give_back(Member::new(connection, &shared.settings));
        }
        Limited::Done(Err(error)) => {
            let address = &*place.address;
            user_code::log(|| tracing::debug!(address, %error, "a pool dials in the background"));
            let failures_max = if error.is_invalid() { 1 } else { config::WARM_FAILURES_MAX };
            failed(&shared, &place.address, failures_max);
        }
        Limited::TimedOut => failed(&shared, &place.address, config::WARM_FAILURES_MAX),
        Limited::Closed => {}
    }
}

fn failed(shared: &Shared, address: &str, failures_max: u32) {
    shared.state().warming_failed(address, failures_max, |failures| {
        let doubled = config::WARM_PAUSE.saturating_mul(1 << failures.min(16).saturating_sub(1));
        let pause_ns = doubled.min(config::WARM_PAUSE_MAX).as_nanos() as u64;
        // At least half of the pause, so that pools of many clients do not dial in step.
        let now_ns = now_ns();
        let random_ns = scramble(seed(), now_ns) % (pause_ns / 2);
        ns_after(Duration::from_nanos(pause_ns / 2 + random_ns))
    });
}
