//! CPU use and state of threads of this process, as the kernel reports them.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// A thread of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadId(i32);

impl ThreadId {
    /// The calling thread.
    pub(crate) fn current() -> ThreadId {
        ThreadId(rustix::thread::gettid().as_raw_nonzero().get())
    }

    /// The CPU time that the thread has used. `None` where the kernel does not report it.
    pub(crate) fn cpu_time(self) -> Option<Duration> {
        // The clock's number as `pthread_getcpuclockid` makes it: the inverted thread number and
        // the kind of clock.
        let clock = (!self.0 << 3) | CLOCK_OF_THREAD;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes one `timespec` to `time` and keeps no address.
        match unsafe { libc::clock_gettime(clock, &raw mut time) } {
            0 => Some(Duration::new(time.tv_sec.try_into().ok()?, time.tv_nsec.try_into().ok()?)),
            _ => None,
        }
    }

    /// The thread runs, or waits only for a CPU.
    pub(crate) fn is_runnable(self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{}/stat", self.0));
        // The state comes after the name in parentheses, and the name may hold any character.
        stat.is_ok_and(|stat| {
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('R'))
        })
    }
}

/// The CPU time that this process has used. Zero where the kernel does not report it. A system
/// call.
pub(crate) fn used_by_process() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// `CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED` of the kernel.
const CLOCK_OF_THREAD: libc::clockid_t = 4 | 2;

/// Total time that this thread was ready to run and waited for a CPU. Zero where the kernel does
/// not report it. A system call. The file stays open as long as the thread lives.
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

/// CPU time of this thread: [`ThreadId::cpu_time`] without the thread's number. Excludes time that
/// a hypervisor took, where the kernel knows that time (`CONFIG_PARAVIRT_TIME_ACCOUNTING`).
pub(crate) fn ran_of_this_thread() -> Option<Duration> {
    rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime).try_into().ok()
}

/// The number of voluntary context switches of this thread. A system call.
pub(crate) fn waits_of_this_thread() -> Option<u64> {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the kernel writes one `rusage` to `usage` and keeps no address.
    let told = unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
    // SAFETY: a call that returned 0 has written `usage`.
    let usage = (told == 0).then(|| unsafe { usage.assume_init() });
    usage.and_then(|usage| usage.ru_nvcsw.try_into().ok())
}

/// The waiting time from `schedstat`, which holds the time on a CPU, the time waiting for a CPU,
/// and the number of time slices.
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
        // A page fault may wait.
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
            // An error ends the wait too.
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
