//! Locks and atomics: `std`, or `loom` under `--cfg loom`. The only file that knows which.

// Not loom's: it cannot point to a trait object, nor be a method's receiver, and reference counts
// are not what the models are about.
pub(crate) use std::sync::Arc;

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard, atomic};
#[cfg(not(loom))]
pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic;

/// Locks `mutex`. One whose holder has panicked is taken all the same: no code of ours panics while
/// it holds one and leaves the data half-changed.
#[cfg(not(loom))]
#[inline]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}

/// Locks `mutex` if nobody else has.
#[cfg(not(loom))]
#[inline]
pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    mutex.try_lock()
}

/// Waits for `changed`, or for nothing, with the lock released meanwhile.
#[cfg(not(loom))]
pub(crate) fn wait<'a, T>(changed: &Condvar, mut guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait(&mut guard);
    guard
}

#[cfg(loom)]
pub(crate) use modelled::{lock, try_lock, wait};

/// The same for the models, whose locks are like `std`'s.
#[cfg(loom)]
mod modelled {
    use std::sync::{PoisonError, TryLockError};

    use super::{Condvar, Mutex, MutexGuard};

    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
        match mutex.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    pub(crate) fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }
}
