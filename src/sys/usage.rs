//! What the kernel knows about threads of this process.

use std::fs::File;
use std::mem::MaybeUninit;
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

    /// The CPU time it has used, up to now. `None` where the kernel does not tell.
    pub(crate) fn cpu_time(self) -> Option<Duration> {
        // As `pthread_getcpuclockid` makes it: the thread's number, inverted, and a kind of clock.
        let clock = (!self.0 << 3) | CLOCK_OF_THREAD;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a `timespec` to write to, and it is not kept.
        match unsafe { libc::clock_gettime(clock, &raw mut time) } {
            0 => Some(Duration::new(time.tv_sec.try_into().ok()?, time.tv_nsec.try_into().ok()?)),
            _ => None,
        }
    }

    /// It runs, or waits for a CPU, and for nothing else.
    pub(crate) fn is_runnable(self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{}/stat", self.0));
        // Behind the name, which may hold anything.
        stat.is_ok_and(|stat| {
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('R'))
        })
    }
}

/// The CPU time that this process has used; zero where the kernel does not tell. A system call.
pub(crate) fn used_by_process() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Per thread, and by the scheduler's count.
const CLOCK_OF_THREAD: libc::clockid_t = 4 | 2;

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

/// For how long this thread has had a CPU, in all: [`ThreadId::cpu_time`] with one system call,
/// which needs no number of the thread. What a host takes from a virtual machine is not in it where
/// the kernel is told of that (`CONFIG_PARAVIRT_TIME_ACCOUNTING`).
pub(crate) fn ran_of_this_thread() -> Option<Duration> {
    rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime).try_into().ok()
}

/// How often this thread has given its CPU up, to wait for something. A system call.
pub(crate) fn waits_of_this_thread() -> Option<u64> {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: `usage` is an `rusage` to write to, and it is not kept.
    let told = unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
    // SAFETY: The call has written it.
    let usage = (told == 0).then(|| unsafe { usage.assume_init() });
    usage.and_then(|usage| usage.ru_nvcsw.try_into().ok())
}

/// From what `schedstat` tells: time on a CPU, time waiting for one, turns.
fn starved(told: &str) -> Option<Duration> {
    told.split_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_thread_that_shares_its_cpu_is_counted_as_starved() {
        let limit = Instant::now() + Duration::from_secs(10);
        let spin = move || {
            let before = starved_of_this_thread();
            while starved_of_this_thread() == before && Instant::now() < limit {
                std::hint::spin_loop();
            }
            assert!(starved_of_this_thread() > before);
        };
        let threads = 2 * std::thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..threads).map(|_| std::thread::spawn(spin)).collect();
        threads.into_iter().for_each(|thread| thread.join().expect("starves"));
    }

    #[test]
    fn a_thread_that_waits_does_not_run_and_one_that_computes_does_not_wait() {
        let now =
            || (ran_of_this_thread().expect("it tells"), waits_of_this_thread().expect("it tells"));
        let limit = Instant::now() + Duration::from_secs(10);
        let computes_without_a_wait = || {
            let (ran, waits) = now();
            while ran_of_this_thread() < Some(ran + Duration::from_millis(1)) {
                std::hint::spin_loop();
            }
            now().1 == waits
        };
        // A page that is not there may be something to wait for.
        while !computes_without_a_wait() {
            assert!(Instant::now() < limit, "it always waits");
        }
        let (ran, waits) = now();
        std::thread::sleep(Duration::from_millis(100));
        let (ran_then, waits_then) = now();
        assert!(waits_then > waits);
        assert!(ran_then - ran < Duration::from_millis(50), "{:?} of a sleep", ran_then - ran);
    }

    #[test]
    fn a_thread_that_computes_is_told_from_one_that_waits() {
        let id = ThreadId::current();
        let before = id.cpu_time().expect("the kernel tells");
        assert!(id.is_runnable());
        while id.cpu_time() == Some(before) {
            std::hint::spin_loop();
        }
        let (say, hear) = std::sync::mpsc::channel();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let waits = std::thread::spawn(move || {
            say.send(ThreadId::current()).expect("is heard");
            // An error is the end as well.
            let _ = wait.recv();
        });
        let other = hear.recv().expect("is said");
        let limit = Instant::now() + Duration::from_secs(10);
        while other.is_runnable() && Instant::now() < limit {
            std::thread::yield_now();
        }
        assert!(!other.is_runnable());
        drop(go);
        waits.join().expect("only waits");
    }
}
