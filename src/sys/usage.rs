//! What the kernel knows about threads of this process.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Names a thread of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadId(i32);

impl ThreadId {
    /// The calling thread.
    pub(crate) fn current() -> ThreadId {
        ThreadId(rustix::thread::gettid().as_raw_nonzero().get())
    }

    /// For how long it has been ready to run, in all, and others had the CPU. `None` where the
    /// kernel does not tell.
    pub(crate) fn starved(self) -> Option<Duration> {
        let path = format!("/proc/self/task/{}/schedstat", self.0);
        starved(&std::fs::read_to_string(path).ok()?)
    }
}

/// For how long this thread has been ready to run, in all, and others had the CPU; zero where the
/// kernel does not tell. A system call; the file stays open for as long as the thread lives.
pub(crate) fn starved_of_this_thread() -> Duration {
    thread_local! {
        static FILE: Option<File> = File::open("/proc/thread-self/schedstat").ok();
    }
    let mut told = [0; 96];
    let bytes =
        FILE.try_with(|file| file.as_ref().and_then(|file| file.read_at(&mut told, 0).ok()));
    let bytes = bytes.ok().flatten().unwrap_or(0);
    std::str::from_utf8(&told[..bytes]).ok().and_then(starved).unwrap_or_default()
}

/// From what `schedstat` tells: time on a CPU, time waiting for one, turns.
fn starved(told: &str) -> Option<Duration> {
    told.split_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_shares_its_cpu_is_counted_as_starved() {
        let id = ThreadId::current();
        let before = id.starved().expect("the kernel tells");
        assert!(starved_of_this_thread() >= before);
        let others: Vec<_> = (0..2 * std::thread::available_parallelism().map_or(1, usize::from))
            .map(|_| {
                std::thread::spawn(move || {
                    let begun = std::time::Instant::now();
                    while id.starved() == Some(before) && begun.elapsed() < Duration::from_secs(10)
                    {
                        std::hint::spin_loop();
                    }
                })
            })
            .collect();
        let begun = std::time::Instant::now();
        while id.starved() == Some(before) && begun.elapsed() < Duration::from_secs(10) {
            std::hint::spin_loop();
        }
        others.into_iter().for_each(|other| other.join().expect("only spins"));
        assert!(id.starved() > Some(before));
    }
}
