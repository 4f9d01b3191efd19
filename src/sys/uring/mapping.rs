//! Pages of memory that this process shares with the kernel.

use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;

use libc::c_void;

/// Pages that a forked child does not get: the kernel would not see the child's copies.
pub(super) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a `Mapping` is an address and a length. Its owners synchronise their accesses to the
// memory, which they make through raw pointers.
unsafe impl Send for Mapping {}
// SAFETY: `&Mapping` only gives the address.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// New zeroed pages.
    pub(super) fn memory(bytes: usize) -> io::Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        Mapping::new(bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
    }

    /// The first `bytes` of the memory of `fd`, read-only.
    pub(super) fn view(fd: RawFd, bytes: usize) -> io::Result<Mapping> {
        Mapping::new(bytes, libc::PROT_READ, libc::MAP_SHARED, fd)
    }

    fn new(bytes: usize, protection: i32, flags: i32, fd: RawFd) -> io::Result<Mapping> {
        // SAFETY: the kernel chooses the address, so no existing mapping changes.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = Mapping { start, bytes };
        // SAFETY: address and length are those of the mapping that `mmap` returned.
        if unsafe { libc::madvise(mapping.address(), bytes, libc::MADV_DONTFORK) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(mapping)
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    fn address(&self) -> *mut c_void {
        self.start.as_ptr().cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` made the mapping, and its one owner drops it here.
        let unmapped = unsafe { libc::munmap(self.address(), self.bytes) };
        debug_assert_eq!(unmapped, 0, "unmap {} bytes", self.bytes);
    }
}
