//! A timer that is as exact as the kernel's: tokio's own counts milliseconds, and a request of an
//! open loop is due at a nanosecond.

use std::fs::File;
use std::io;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::net::unix::pipe::Receiver;

use crate::error::{Failure, Result};

/// What it holds is no pipe but is read like one, and needs no unsafe code to wait for.
pub(super) struct Alarm(Receiver);

impl Alarm {
    /// Must be called within a runtime.
    pub(super) fn new() -> Result<Alarm> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let fd = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(io::Error::from);
        let watched = fd.and_then(|fd| Receiver::from_file_unchecked(File::from(fd)));
        watched.map(Alarm).map_err(Failure::at("create a timer"))
    }

    /// Returns when so much time has passed.
    pub(super) async fn ring_in(&self, wait: Duration) -> io::Result<()> {
        // Nothing disarms it.
        let wait = wait.max(Duration::from_nanos(1));
        let timer = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec::try_from(wait).map_err(io::Error::other)?,
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &timer)?;
        loop {
            self.0.readable().await?;
            match self.0.try_read(&mut [0; 8]) {
                // Setting the timer took back what an earlier one had left to read.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read.map(drop),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;
    use tokio::runtime::Builder;

    #[test]
    fn it_rings_when_it_shall_however_often_it_is_set() {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let alarm = Alarm::new().unwrap();
            for wait in [Duration::ZERO, Duration::from_micros(300), Duration::from_millis(3)] {
                let begun = Instant::now();
                // Set, rung perhaps, and not waited for.
                let other = alarm.ring_in(Duration::from_nanos(1));
                let _ = tokio::time::timeout(Duration::ZERO, other).await;
                alarm.ring_in(wait).await.unwrap();
                assert!(begun.elapsed() >= wait, "{wait:?}");
            }
        });
    }
}
