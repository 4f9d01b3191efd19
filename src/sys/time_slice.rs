//! The scheduler's time slice of a thread: `sched_setattr(2)`.

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
    let mut attributes = Attributes::default();
    let size = size_of::<Attributes>() as u32;
    // SAFETY: the kernel writes at most `size` bytes, the size of `attributes`, and every value of
    // its integers is valid.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if got != 0 || attributes.policy != libc::SCHED_OTHER as u32 {
        return;
    }
    attributes.size = size;
    attributes.runtime = slice.as_nanos() as u64;
    // A refusal changes nothing, so the result is not needed.
    // SAFETY: the kernel reads `attributes.size` bytes, the size of `attributes`.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

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
