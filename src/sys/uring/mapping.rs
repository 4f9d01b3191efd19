//! Memory that the kernel holds on to, or shares.

use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;

use libc::c_void;

/// Pages that a forked child does not get: its copies would no longer be what the kernel sees.
pub(super) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory; what is in it is shared, or not, by whoever looks into it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Fresh zeroed pages.
    pub(super) fn memory(bytes: usize) -> io::Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        Mapping::new(bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
    }

    /// The beginning of what `fd` offers, to be read.
    pub(super) fn view(fd: RawFd, bytes: usize) -> io::Result<Mapping> {
        Mapping::new(bytes, libc::PROT_READ, libc::MAP_SHARED, fd)
    }

    fn new(bytes: usize, protection: i32, flags: i32, fd: RawFd) -> io::Result<Mapping> {
        // SAFETY: asks for pages at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = Mapping { start, bytes };
        // SAFETY: covers exactly the mapping above.
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
        // SAFETY: the mapping that `new` made; nobody uses it after this.
        let unmapped = unsafe { libc::munmap(self.address(), self.bytes) };
        debug_assert_eq!(unmapped, 0, "unmap {} bytes", self.bytes);
    }
}
