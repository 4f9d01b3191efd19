//! What a poller can be asked to do.

use super::alarm::Bell;
use super::job::Job;
use super::{Accept, Endpoint};
use crate::address::PeerAddr;
use crate::sync::Arc;
use crate::sys::Socket;

pub(crate) enum Command<E: Endpoint> {
    /// Do this job.
    Run(Job<E>),
    /// Continue the run that the poller keeps for the endpoint until its flush is done.
    Continue(Arc<E>),
    /// Take in a connected stream.
    Attach(Arc<E>, Arc<Socket>),
    /// Connect, then take in the stream.
    Connect(Arc<E>, Arc<Socket>, PeerAddr),
    /// Accept on a listener.
    Listen(Arc<dyn Accept>, Arc<Socket>),
    /// Forget a listener.
    Unlisten(Arc<dyn Accept>),
    /// Receive again after a pause.
    Resume(Arc<E>),
    /// Stop receiving, and report when there is something to receive. The reports have this number.
    WatchReadable(Arc<E>, u32),
    /// Set the endpoint's timer to this time (see [`now_ns`](crate::clock::now_ns)).
    Timer(Arc<E>, u64),
    /// Ring at this time.
    WakeAt(u64, Bell),
    /// End all operations of the endpoint and give up its slot.
    Remove(Arc<E>),
    /// Call this for every endpoint.
    Visit(Visit<E>),
    /// Call this for every endpoint, after the poller has passed on everything that had arrived
    /// when it took this command.
    VisitLater(Visit<E>),
    /// Close everything, then end the thread.
    Stop,
}

/// Called for each endpoint.
pub(crate) type Visit<E> = Box<dyn FnMut(&Arc<E>) + Send>;

impl<E: Endpoint> Command<E> {
    /// Drops a command that no poller will obey.
    pub(super) fn abandon(self) {
        match self {
            Command::Run(job) => job.abandon(),
            Command::Attach(endpoint, _)
            | Command::Connect(endpoint, ..)
            | Command::Remove(endpoint) => endpoint.on_removed(),
            Command::Listen(listener, _) => listener.on_removed(),
            // A bell that is dropped rings.
            Command::WakeAt(_, bell) => drop(bell),
            Command::Visit(visit) | Command::VisitLater(visit) => drop(visit),
            // The end of the poller has removed these endpoints and listeners.
            Command::Continue(_)
            | Command::Resume(_)
            | Command::WatchReadable(..)
            | Command::Timer(..)
            | Command::Unlisten(_)
            | Command::Stop => {}
        }
    }
}
