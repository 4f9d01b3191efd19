//! How the scheduler treats a thread: its time slice, and whether it preempts other threads when
//! it wakes up. See `sched_setattr(2)` and `sched(7)`.

use std::mem::size_of;
use std::time::Duration;

/// The first version of `struct sched_attr` (uapi/linux/sched/types.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Asks for a time slice of `slice` for the calling thread and for the threads that it starts
/// later. A thread with a shorter slice than the running thread preempts it sooner after a wake-up.
/// The thread's share of the CPU stays the same. Needs no privilege. Kernels before 6.12 ignore the
/// request. Threads under another policy than `SCHED_OTHER` are left alone.
pub(crate) fn ask_for_time_slice(slice: Duration) {
    change(|attributes| {
        if attributes.policy == libc::SCHED_OTHER as u32 {
            attributes.runtime = slice.as_nanos() as u64;
        }
    });
}

/// Decides whether the calling thread, when it wakes up, lets the running thread finish its time
/// slice (`SCHED_BATCH`), or may preempt it (`SCHED_OTHER`). The thread's share of the CPU stays
/// the same. Needs no privilege. Threads under another policy are left alone.
pub(crate) fn wait_for_the_running_thread(waits: bool) {
    const POLICIES: [u32; 2] = [libc::SCHED_OTHER as u32, libc::SCHED_BATCH as u32];
    change(|attributes| {
        if POLICIES.contains(&attributes.policy) {
            attributes.policy = POLICIES[usize::from(waits)];
        }
    });
}

/// Changes the attributes of the calling thread.
fn change(edit: impl FnOnce(&mut Attributes)) {
    let mut attributes = Attributes::default();
    let size = size_of::<Attributes>() as u32;
    // SAFETY: the kernel writes at most `size` bytes, the size of `attributes`, and every value of
    // its integers is valid.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if got != 0 {
        return;
    }
    attributes.size = size;
    edit(&mut attributes);
    // A refusal changes nothing, so the result is not needed.
    // SAFETY: the kernel reads `attributes.size` bytes, the size of `attributes`.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_thread_waits_and_waits_no_longer_with_the_same_time_slice() {
        // SAFETY: no pointer is passed.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        std::thread::spawn(move || {
            let before = policy();
            for (waits, expected) in [(true, libc::SCHED_BATCH), (false, libc::SCHED_OTHER)] {
                wait_for_the_running_thread(waits);
                let is_changed = before == libc::SCHED_OTHER || before == libc::SCHED_BATCH;
                assert_eq!(policy(), if is_changed { expected } else { before });
            }
        })
        .join()
        .expect("does not panic");
    }

    #[test]
    fn the_time_slice_changes_and_nothing_else_does() {
        let read = || {
            let mut attributes = Attributes::default();
            let size = size_of::<Attributes>() as u32;
            // SAFETY: the kernel writes at most `size` bytes, the size of `attributes`.
            unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
            attributes
        };
        std::thread::spawn(move || {
            let before = read();
            ask_for_time_slice(Duration::from_micros(150));
            let after = read();
            assert_eq!((before.policy, before.nice), (after.policy, after.nice));
            // A kernel without time slices reports the same value before and after.
            assert!([before.runtime, 150_000].contains(&after.runtime), "{after:?}");
        })
        .join()
        .expect("does not panic");
    }
}
