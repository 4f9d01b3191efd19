//! How the scheduler treats a thread: `sched_setattr(2)`.

use std::mem::size_of;
use std::time::Duration;

/// `struct sched_attr` of the kernel, up to where its first version ends.
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

/// Asks for turns of `turn` for the calling thread, and those it starts from now on. A thread with
/// short turns gets its share of the CPU in smaller pieces, and so, when it wakes, sooner than one
/// that has been computing in longer ones. Needs no privilege; kernels before 6.12 take no notice,
/// and neither does a thread under another policy than the usual one.
pub(crate) fn ask_for_turns(turn: Duration) {
    let mut attributes = Attributes::default();
    let size = size_of::<Attributes>() as u32;
    // SAFETY: the kernel writes at most `size` bytes to `attributes`, which has as many; all of
    // them are plain numbers.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if got != 0 || attributes.policy != libc::SCHED_OTHER as u32 {
        return;
    }
    attributes.size = size;
    attributes.runtime = turn.as_nanos() as u64;
    // SAFETY: the kernel reads `attributes.size` bytes from `attributes`, which has as many.
    // Nothing else can be done where it refuses.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn turns_change_and_nothing_else_does() {
        let read = || {
            let mut attributes = Attributes::default();
            let size = size_of::<Attributes>() as u32;
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
            attributes
        };
        std::thread::spawn(move || {
            let before = read();
            ask_for_turns(Duration::from_micros(150));
            let after = read();
            assert_eq!((before.policy, before.nice), (after.policy, after.nice));
            // A kernel that knows no turns tells of none, before as after.
            assert!([before.runtime, 150_000].contains(&after.runtime), "{after:?}");
        })
        .join()
        .expect("does not panic");
    }
}
