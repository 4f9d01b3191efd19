//! Reference-counted memory: blocks that are being filled, and the slices cut from them.
//!
//! The only file of this module with `unsafe`. The life of a block:
//!
//! ```text
//! FreeBlock ──lend──▶ Block, which fills its spare ──last reference dropped──▶ its Home
//!                       └─take─▶ Slices, which read the taken bytes
//! ```
//!
//! A block has two parts. The *spare* is unused: only the `Block` itself may write it. The *taken*
//! part is immutable: any number of `Slice`s read it. `Block::take` moves bytes from the spare to
//! the taken part. No byte becomes spare again before the last reference is dropped. Memory is
//! zeroed when it is allocated, and keeps its old bytes when it is recycled, so it is always
//! initialised.
//!
//! Any thread may hold, clone or drop a slice. A block is used by one thread at a time.

use std::fmt;
use std::ops::{Deref, RangeBounds};
use std::ptr::NonNull;
// The standard `Arc`, because loom's cannot point to a trait object. Loom checks the reference
// count in `Header`.
use std::sync::Arc;

use bytes::buf::UninitSlice;
use bytes::{BufMut, Bytes};

use super::memory::Memory;
use super::pool::FreeLists;
use crate::sync::atomic::{AtomicUsize, Ordering, fence};
use crate::user_code;

/// Immutable bytes that share their memory.
///
/// Cloning or cutting a slice adds a reference and copies no bytes. A slice keeps its whole block
/// in memory. To keep a few bytes for a long time, copy them out ([`to_vec`](slice::to_vec)).
pub struct Slice {
    start: NonNull<u8>,
    len: usize,
    /// The owner of the memory; `None` for static bytes.
    owner: Option<NonNull<Header>>,
}

// SAFETY: the bytes of a `Slice` do not change while the slice exists (module docs). Its reference
// count is in a `Header`, which is `Send` and `Sync` (asserted below its definition).
unsafe impl Send for Slice {}
// SAFETY: as above; `&Slice` gives access to the bytes and to the reference count only.
unsafe impl Sync for Slice {}

impl Slice {
    /// An empty slice. Allocates nothing.
    #[inline]
    pub const fn new() -> Slice {
        Slice { start: NonNull::dangling(), len: 0, owner: None }
    }

    /// Refers to static bytes, which need no owner.
    #[inline]
    pub(super) fn from_static(bytes: &'static [u8]) -> Slice {
        Slice { start: NonNull::from(bytes).cast(), len: bytes.len(), owner: None }
    }

    /// A slice of all bytes of `foreign` or, without it, of `memory`.
    pub(super) fn from_owner(memory: Vec<u8>, foreign: Option<Bytes>) -> Slice {
        let header = Box::leak(Box::new(Header::new(Memory::from_vec(memory), foreign)));
        header.refs.store(1, Ordering::Relaxed);
        let bytes: &[u8] = match &header.foreign {
            Some(foreign) => foreign,
            None => header.memory.bytes(),
        };
        let (start, len) = (NonNull::from(bytes).cast(), bytes.len());
        Slice { start, len, owner: Some(NonNull::from(header)) }
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether dropping the last reference runs a destructor of the user.
    #[inline]
    pub(super) fn is_foreign(&self) -> bool {
        let Some(header) = self.owner else { return false };
        // SAFETY: `self` holds a reference, so the header is alive; the field is written only after
        // the last reference is dropped.
        unsafe { &header.as_ref().foreign }.is_some()
    }

    /// A part of the slice, which shares its memory.
    ///
    /// # Panics
    /// When the range starts after its end or ends beyond the slice, like indexing `[u8]`.
    #[inline]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Slice {
        let part = &self[(range.start_bound().cloned(), range.end_bound().cloned())];
        if part.is_empty() {
            return Slice::new();
        }
        let mut slice = self.clone();
        slice.advance(part.as_ptr().addr() - self.start.addr().get());
        slice.truncate(part.len());
        slice
    }

    /// Removes and returns the first `bytes`.
    ///
    /// # Panics
    /// When `bytes` is more than the length.
    #[inline]
    pub fn split_to(&mut self, bytes: usize) -> Slice {
        if bytes == self.len {
            return std::mem::take(self);
        }
        let front = self.slice(..bytes);
        self.advance(bytes);
        front
    }

    /// Removes and returns everything after the first `bytes`.
    ///
    /// # Panics
    /// When `bytes` is more than the length.
    #[inline]
    pub fn split_off(&mut self, bytes: usize) -> Slice {
        if bytes == 0 {
            return std::mem::take(self);
        }
        let back = self.slice(bytes..);
        self.truncate(bytes);
        back
    }

    /// Drops the first `bytes`.
    ///
    /// # Panics
    /// When `bytes` is more than the length.
    #[inline]
    pub fn advance(&mut self, bytes: usize) {
        assert!(bytes <= self.len, "advance {bytes} of {} bytes", self.len);
        // SAFETY: by the assertion, the pointer stays inside, or at the end of, the memory of this
        // slice.
        self.start = unsafe { self.start.add(bytes) };
        self.len -= bytes;
    }

    /// Drops everything after the first `bytes`. Does nothing when the slice is not longer.
    #[inline]
    pub fn truncate(&mut self, bytes: usize) {
        self.len = self.len.min(bytes);
    }

    /// Appends `next` if it begins in the same memory exactly where `self` ends.
    ///
    /// # Errors
    /// Returns `next` if it does not.
    #[inline]
    pub(crate) fn try_merge(&mut self, next: Slice) -> Result<(), Slice> {
        if self.owner.is_none() || self.owner != next.owner || self.end() != next.start {
            return Err(next);
        }
        self.len += next.len;
        Ok(())
    }

    #[inline]
    fn end(&self) -> NonNull<u8> {
        // SAFETY: `len` bytes from `start` lie in one allocation; every constructor and `advance`
        // keep that true.
        unsafe { self.start.add(self.len) }
    }
}

impl Deref for Slice {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes from `start` lie in one allocation. `owner` keeps it
        // alive while `self` holds its reference, and the bytes do not change (module docs).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Clone for Slice {
    #[inline]
    fn clone(&self) -> Slice {
        if let Some(header) = self.owner {
            // SAFETY: `self` holds a reference, so the header is alive.
            let header = unsafe { header.as_ref() };
            // Relaxed: this thread already holds a reference. An overflow would need more slices
            // than fit into memory.
            header.refs.fetch_add(1, Ordering::Relaxed);
        }
        Slice { start: self.start, len: self.len, owner: self.owner }
    }
}

impl Drop for Slice {
    #[inline]
    fn drop(&mut self) {
        if let Some(header) = self.owner {
            // SAFETY: `self` holds one reference and is not used after this.
            unsafe { release(header, 1) }
        }
    }
}

/// The exclusive owner of a block's spare.
pub(crate) struct Block {
    start: NonNull<u8>,
    capacity_left: usize,
    header: NonNull<Header>,
    /// References that this block holds: one for each slice that can still be taken, and one for
    /// the block itself. They are counted in advance, so taking a slice needs no atomic operation.
    refs: usize,
}

// SAFETY: only this `Block` accesses its spare (module docs), and `Header` is `Send` and `Sync`
// (asserted below its definition).
unsafe impl Send for Block {}
// SAFETY: `&Block` gives access to the capacity only.
unsafe impl Sync for Block {}

impl Block {
    /// Length of the spare in bytes.
    #[inline]
    pub(crate) fn capacity_left(&self) -> usize {
        self.capacity_left
    }

    /// The unused rest of the block. Its bytes are initialised, but have no meaning.
    #[inline]
    pub(crate) fn spare(&mut self) -> &mut [u8] {
        // SAFETY: `capacity_left` initialised bytes from `start` lie in memory that `header` keeps
        // alive. No slice covers them: bytes are taken only by `advance`, which moves `start`
        // beyond them.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.capacity_left) }
    }

    /// Takes the first `bytes` of the spare as a slice.
    ///
    /// # Panics
    /// When `bytes` is more than the spare.
    #[inline]
    pub(crate) fn take(&mut self, bytes: usize) -> Slice {
        if bytes == 0 {
            return Slice::new();
        }
        let start = self.advance(bytes);
        // The block keeps at least one reference: it had one more than bytes, and each slice takes
        // at least one byte.
        self.refs -= 1;
        Slice { start, len: bytes, owner: Some(self.header) }
    }

    /// Takes the first `bytes` of the spare and drops the block, so the rest stays unused.
    ///
    /// # Panics
    /// When `bytes` is more than the spare.
    #[inline]
    pub(crate) fn finish(mut self, bytes: usize) -> Slice {
        let mut slice = self.take(bytes);
        self.leave_to(&mut slice);
        slice
    }

    /// Drops the block. Needs no locked instruction if `slice` has the only other reference.
    #[inline]
    pub(crate) fn leave_to(self, slice: &mut Slice) {
        // SAFETY: `self` holds references, which keep the header alive.
        let refs = unsafe { &self.header.as_ref().refs };
        // If these two hold all references, no other thread changes them. Acquire as in `release`.
        if slice.owner == Some(self.header) && refs.load(Ordering::Acquire) == self.refs + 1 {
            refs.store(1, Ordering::Relaxed);
            std::mem::forget(self);
        }
    }

    /// Appends the first `bytes` of the spare to `slice`, if `slice` ends where the spare begins.
    /// Returns whether it does.
    ///
    /// # Panics
    /// When `bytes` is more than the spare.
    #[inline]
    pub(crate) fn extend(&mut self, slice: &mut Slice, bytes: usize) -> bool {
        let follows = slice.owner == Some(self.header) && slice.end() == self.start;
        if follows {
            self.advance(bytes);
            slice.len += bytes;
        }
        follows
    }

    /// Moves `bytes` from the spare to the taken part, and returns where they begin.
    #[inline]
    fn advance(&mut self, bytes: usize) -> NonNull<u8> {
        assert!(bytes <= self.capacity_left, "take {bytes} of {} bytes", self.capacity_left);
        let start = self.start;
        // SAFETY: by the assertion, the pointer stays inside, or at the end of, the block's memory.
        self.start = unsafe { start.add(bytes) };
        self.capacity_left -= bytes;
        start
    }
}

impl Drop for Block {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: `self` holds `refs` references and is not used after this.
        unsafe { release(self.header, self.refs) }
    }
}

/// Reserved room of a writer, filled with the methods of [`BufMut`].
///
/// The bytes that are put into it are written; the rest of the room is not. Like every [`BufMut`],
/// it panics when more is put than there is room for.
///
/// ```
/// use bytes::BufMut;
/// use ringpoll::buffer::{LinkBuffer, Reader, Writer};
///
/// let mut buffer = LinkBuffer::new();
/// let mut room = buffer.reserve_buf(1024)?;
/// room.put_u32(5);
/// room.put_slice(b"hello");
/// buffer.flush()?;
/// assert_eq!(buffer.next(9)?, b"\0\0\0\x05hello");
/// # Ok::<(), ringpoll::Error>(())
/// ```
#[must_use]
pub struct ReservedBuf<'a> {
    left: &'a mut [u8],
    /// The writer's count of bytes in front of `left`.
    filled: &'a mut usize,
}

impl<'a> ReservedBuf<'a> {
    /// Adds to `filled` what is put into `room`.
    #[inline]
    pub(super) fn new(room: &'a mut [u8], filled: &'a mut usize) -> ReservedBuf<'a> {
        ReservedBuf { left: room, filled }
    }
}

// SAFETY: `chunk_mut` always returns `left`, which nothing else can write while `self` exists.
// `advance_mut` removes the first bytes of `left`, so later chunks follow them. It panics when
// `left` is shorter.
unsafe impl BufMut for ReservedBuf<'_> {
    #[inline]
    fn remaining_mut(&self) -> usize {
        self.left.len()
    }

    #[inline]
    unsafe fn advance_mut(&mut self, bytes: usize) {
        let (_, left) = std::mem::take(&mut self.left).split_at_mut(bytes);
        self.left = left;
        *self.filled += bytes;
    }

    #[inline]
    fn chunk_mut(&mut self) -> &mut UninitSlice {
        UninitSlice::new(self.left)
    }
}

impl fmt::Debug for ReservedBuf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReservedBuf").field("left", &self.left.len()).finish_non_exhaustive()
    }
}

/// A block that is not in use: it has no spare and no slices. It keeps its home only in the lists
/// of a thread: a pool whose own lists refer to it would never be freed.
pub(crate) struct FreeBlock(Box<Header>);

impl FreeBlock {
    /// Allocates `capacity` zeroed bytes. `class` is the index of its size class in its pool.
    pub(super) fn new(capacity: usize, class: usize) -> FreeBlock {
        let mut header = Header::new(Memory::new(capacity), None);
        header.class = class;
        FreeBlock(Box::new(header))
    }

    #[inline]
    pub(super) fn class(&self) -> usize {
        self.0.class
    }

    /// Size in bytes.
    #[inline]
    pub(crate) fn capacity(&self) -> usize {
        self.0.memory.len()
    }

    #[inline]
    pub(super) fn take_home(&mut self) -> Option<Home> {
        self.0.home.take()
    }

    /// Makes the block return to `home`, when it and all its slices are dropped.
    #[inline]
    pub(super) fn set_home(&mut self, home: Home) {
        self.0.home = Some(home);
    }

    /// Puts the block to use.
    #[inline]
    pub(super) fn lend(self) -> Block {
        let header = Box::leak(self.0);
        let bytes = header.memory.bytes();
        let (start, capacity_left) = (NonNull::from(&mut *bytes).cast(), bytes.len());
        let refs = capacity_left + 1;
        header.refs.store(refs, Ordering::Relaxed);
        Block { start, capacity_left, header: NonNull::from(header), refs }
    }
}

/// Where a block returns to. The thread that drops the last reference returns it.
pub(super) enum Home {
    /// The free lists of a pool.
    Lists(Arc<FreeLists>),
    /// A function of a loom model, which observes the return.
    #[cfg(loom)]
    Model(Arc<dyn Fn() + Send + Sync>),
}

/// The memory of a block or of user data. While slices exist, only `refs` changes.
struct Header {
    refs: AtomicUsize,
    memory: Memory,
    /// Index of its size class in its pool.
    class: usize,
    /// User data that came as `Bytes`. `memory` is empty then.
    foreign: Option<Bytes>,
    /// Where the memory returns to; without a home it is freed.
    home: Option<Home>,
}

/// `Send` and `Sync` of slices and blocks are sound because of this.
const _: () = {
    const fn is_send_and_sync<T: Send + Sync>() {}
    is_send_and_sync::<Header>();
};

impl Header {
    fn new(memory: Memory, foreign: Option<Bytes>) -> Header {
        Header { refs: AtomicUsize::new(0), memory, class: 0, foreign, home: None }
    }
}

/// Drops `count` references. If they are the last ones, the memory is freed or returns home.
///
/// # Safety
/// The caller holds `count` references and uses neither them nor the header afterwards.
#[inline]
unsafe fn release(header: NonNull<Header>, count: usize) {
    // SAFETY: the caller's references keep the header alive until they are dropped below.
    let refs = unsafe { &header.as_ref().refs };
    // If the caller holds all references, no other thread can add one, so the usual case needs no
    // locked instruction. Acquire, and Release below: all reads by other threads happen before the
    // memory is reused.
    if refs.load(Ordering::Acquire) != count {
        if refs.fetch_sub(count, Ordering::Release) != count {
            return;
        }
        fence(Ordering::Acquire);
    }
    // SAFETY: those were the last references.
    unsafe { retire(header) }
}

/// Frees the memory or returns it home.
///
/// # Safety
/// No reference to the header exists, and it is retired only once.
unsafe fn retire(header: NonNull<Header>) {
    // SAFETY: every header comes from `Box::leak`, and no reference to this one exists.
    let mut header = unsafe { Box::from_raw(header.as_ptr()) };
    match &header.home {
        Some(Home::Lists(lists)) => FreeLists::give_back(Arc::as_ptr(lists), FreeBlock(header)),
        #[cfg(loom)]
        Some(Home::Model(given_back)) => given_back(),
        None => {
            if let Some(foreign) = header.foreign.take() {
                // Its owner may be a user type with a destructor.
                user_code::discard(foreign);
            }
        }
    }
}
