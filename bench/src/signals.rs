//! How a server of this program is told to stop, or asked what it has counted.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use signal_hook::low_level::pipe;

use crate::error::{Failure, Result};

/// A stream that gets a byte when SIGINT or SIGTERM arrives: a thread can block on it, a poller can
/// watch it.
pub(crate) fn stop_stream() -> Result<UnixStream> {
    let (reader, writer) = UnixStream::pair().map_err(Failure::at("socket pair"))?;
    for signal in [SIGINT, SIGTERM] {
        let writer = writer.try_clone().map_err(Failure::at("duplicate a socket"))?;
        pipe::register(signal, writer).map_err(Failure::at("handle signals"))?;
    }
    Ok(reader)
}

/// What a signal asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// To stop: SIGINT, SIGTERM.
    Stop,
    /// To print the counters: SIGUSR1.
    Report,
}

/// The signals of this process. One that arrives again before it was seen counts once.
pub(crate) struct Asks(Signals);

impl Asks {
    /// From here on signals are seen; before, they end the process.
    pub(crate) fn listen() -> Result<Asks> {
        let signals = Signals::new([SIGINT, SIGTERM, SIGUSR1]);
        signals.map(Asks).map_err(Failure::at("handle signals"))
    }

    /// Blocks until a signal arrives.
    pub(crate) fn next(&mut self) -> Ask {
        match self.0.forever().next() {
            Some(SIGUSR1) => Ask::Report,
            // Without a signal it could not be told to stop any more: it must not go on.
            _ => Ask::Stop,
        }
    }
}

/// From here on SIGINT and SIGTERM have what runs stop early and keep what it has. The second one
/// ends the process at once.
pub(crate) fn keep_going() -> Result<()> {
    for signal in [SIGINT, SIGTERM] {
        let flag = || Arc::clone(INTERRUPTED.get_or_init(Arc::default));
        // In this order: the first signal finds the flag unset.
        flag::register_conditional_shutdown(signal, EXIT_INTERRUPTED.into(), flag())
            .and_then(|_| flag::register(signal, flag()))
            .map_err(Failure::at("handle signals"))?;
    }
    Ok(())
}

/// Whether this process was told to stop since [`keep_going`].
pub(crate) fn is_interrupted() -> bool {
    INTERRUPTED.get().is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// A failure once this process was told to stop.
pub(crate) fn check() -> Result<()> {
    if is_interrupted() { Err(Failure::new("interrupted")) } else { Ok(()) }
}

/// Ends this process with its parent, so that a comparison that is killed leaves no servers behind.
pub(crate) fn die_with(parent_pid: u32) -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(Failure::at("parent death signal"))?;
    // The parent may have died before the call.
    let parent = getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    if parent == Some(parent_pid) {
        return Ok(());
    }
    Err(Failure::new(format!("parent process {parent_pid}: gone")))
}

/// Signals concern the process.
static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// What a shell reports of a process that an interrupt ended.
pub(crate) const EXIT_INTERRUPTED: u8 = 130;
