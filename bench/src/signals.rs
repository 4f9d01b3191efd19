//! How a server of this program is told to stop.

use std::io::Read;
use std::os::unix::net::UnixStream;

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use signal_hook::consts::{SIGINT, SIGTERM};
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

/// Blocks until a signal arrives.
pub(crate) fn wait(mut stop: UnixStream) {
    let mut byte = [0];
    // A failed read is taken for a signal: a server that cannot be told to stop must not go on.
    let _ = stop.read_exact(&mut byte);
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
