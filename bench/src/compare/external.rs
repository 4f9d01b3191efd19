//! Servers that are not started here: in another language, or on another host.

use std::net::SocketAddr;

use crate::cli::PeerAddr;
use crate::error::{Failure, Result};
use crate::host::process::CpuUse;
use crate::load::dial;

/// A server that somebody else started, with the wire format of this program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct External {
    pub(crate) name: String,
    pub(crate) addr: SocketAddr,
    /// Its process, where it is on this host and known.
    pub(crate) pid: Option<u32>,
}

/// Finds the servers that were named, each with its process where one was given, in the same order.
pub(crate) fn find(peers: &[PeerAddr], pids: &[u32]) -> Result<Vec<External>> {
    if pids.len() > peers.len() {
        let (pids, peers) = (pids.len(), peers.len());
        return Err(Failure::new(format!("--peer-pid: {pids} for {peers} servers by --peer")));
    }
    let mut found: Vec<External> = Vec::new();
    for (index, peer) in peers.iter().enumerate() {
        let PeerAddr { name, addrs } = peer;
        if found.iter().any(|one| one.name == *name) {
            return Err(Failure::new(format!("--peer {name}: named twice")));
        }
        let addr = dial::reachable(addrs).map_err(Failure::at(format!("--peer {name}")))?;
        let pid = pids.get(index).copied();
        if let Some(pid) = pid {
            CpuUse::read(pid).map_err(Failure::at(format!("--peer-pid {pid}")))?;
        }
        found.push(External { name: name.clone(), addr, pid });
    }
    Ok(found)
}
