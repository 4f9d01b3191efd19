//! Servers of this program that run on another host, where somebody has started them.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use ringpoll::{Backend, Placement};

use crate::error::Result;
use crate::stats::{self, Stats};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Remote {
    pub(crate) backend: Backend,
    pub(crate) placement: Placement,
    /// Whether its pollers were told never to sleep.
    pub(crate) never_sleeps: bool,
    pub(crate) addr: SocketAddr,
    /// Where it tells of itself; `None`: nowhere.
    pub(crate) stats: Option<SocketAddr>,
}

impl Remote {
    /// What it has used and counted until now; `None` of one that does not tell.
    pub(crate) fn told(&self) -> Result<Option<Stats>> {
        let asked = self.stats.map(|addr| stats::ask(&[addr], ASK_PATIENCE));
        Ok(asked.transpose()?.map(|(_, stats)| stats))
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Remote { backend, placement, never_sleeps, addr, .. } = self;
        let polls = if *never_sleeps { " --poll=always" } else { "" };
        write!(f, "ringpoll {backend} {placement}{polls} at {addr}")
    }
}

/// While a client waits for the answer it sends no requests.
pub(crate) const ASK_PATIENCE: Duration = Duration::from_secs(3);
