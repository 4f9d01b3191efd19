//! What the kernel knows about the calling thread.

/// How often this thread has given up its CPU by itself: because it waited for a lock, a disk or a
/// timer, and not because others wanted to run. 0 where the kernel does not tell.
pub(crate) fn waits_of_this_thread() -> u64 {
    // SAFETY: a struct of plain numbers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a `rusage` to write to, and it is not kept.
    match unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) } {
        0 => u64::try_from(usage.ru_nvcsw).unwrap_or(0),
        _ => 0,
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_thread_that_sleeps_is_counted_as_waiting() {
        let before = waits_of_this_thread();
        std::thread::sleep(Duration::from_millis(1));
        assert!(waits_of_this_thread() > before);
    }
}
