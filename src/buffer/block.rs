//! Ref-counted memory: blocks being filled and the slices cut from them.
//!
//! The only file of this module with `unsafe`. The life of a block:
//!
//! ```text
//! FreeBlock ──lend──▶ Block, which fills the spare ──last drop of all──▶ its Home
//!                       └─take─▶ Slices, which read what was taken
//! ```
//!
//! Every byte of a block belongs to exactly one side: the spare, which only the one `Block` may
//! write, or the taken part, which any number of `Slice`s read and nobody writes. `Block::take`
//! moves bytes from the first to the second and nothing moves them back before the last reference
//! is gone. Memory is zeroed when it is allocated and keeps old bytes when it is recycled, so it is
//! always initialised.
//!
//! Any thread may hold, clone or drop a slice; a block is used by one thread at a time.

use std::ops::{Deref, RangeBounds};
use std::ptr::NonNull;
// Not loom's: it cannot point to a trait object. What loom must see is the reference count, which
// is in `Header`.
use std::sync::Arc;

use bytes::Bytes;

use super::pool::FreeLists;
use crate::sync::atomic::{AtomicUsize, Ordering, fence};
use crate::user_code;

/// Immutable bytes that share their memory.
///
/// Cloning and cutting count a reference and copy nothing. A slice keeps the whole block that it is
/// a part of: copy the bytes out ([`to_vec`](slice::to_vec)) to keep a few of them for long.
pub struct Slice {
    start: NonNull<u8>,
    len: usize,
    /// What keeps the bytes alive; `None` for static bytes.
    owner: Option<NonNull<Header>>,
}

// SAFETY: a `Slice` only reads bytes that nobody writes while it lives (module docs), and counts in
// a `Header`, which is `Send` and `Sync` (asserted below its definition).
unsafe impl Send for Slice {}
// SAFETY: as above; `&Slice` allows no more than reading and counting.
unsafe impl Sync for Slice {}

impl Slice {
    /// An empty slice. Allocates nothing.
    #[inline]
    pub const fn new() -> Slice {
        Slice { start: NonNull::dangling(), len: 0, owner: None }
    }

    /// Static bytes, which nobody has to keep alive.
    #[inline]
    pub(super) fn from_static(bytes: &'static [u8]) -> Slice {
        Slice { start: NonNull::from(bytes).cast(), len: bytes.len(), owner: None }
    }

    /// All of `memory`, or of `foreign` if there is one.
    pub(super) fn from_owner(memory: Vec<u8>, foreign: Option<Bytes>) -> Slice {
        let header = Box::leak(Box::new(Header::new(memory, foreign)));
        header.refs.store(1, Ordering::Relaxed);
        let bytes: &[u8] = header.foreign.as_deref().unwrap_or(&header.memory);
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

    /// Whether the drop of the last reference runs a destructor of the user's.
    #[inline]
    pub(super) fn is_foreign(&self) -> bool {
        let Some(header) = self.owner else { return false };
        // SAFETY: `self` holds a reference, so the header is alive; the field is not written before
        // the last reference is gone.
        unsafe { &header.as_ref().foreign }.is_some()
    }

    /// A part of the slice, sharing its memory.
    ///
    /// # Panics
    /// When the range starts after its end or ends beyond the slice, like indexing `[u8]`.
    #[inline]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Slice {
        let part = &self[(range.start_bound().cloned(), range.end_bound().cloned())];
        let (start, len) = (part.as_ptr().addr() - self.start.addr().get(), part.len());
        if len == 0 {
            return Slice::new();
        }
        self.clone().cut(start, len)
    }

    /// Cuts off and returns the first `bytes`; `self` keeps the rest.
    ///
    /// # Panics
    /// When `bytes` is more than the length.
    #[inline]
    pub fn split_to(&mut self, bytes: usize) -> Slice {
        if bytes == self.len {
            return std::mem::take(self);
        }
        let front = self.share_front(bytes);
        self.advance(bytes);
        front
    }

    /// Cuts off and returns everything after the first `bytes`, which `self` keeps.
    ///
    /// # Panics
    /// When `bytes` is more than the length.
    #[inline]
    pub fn split_off(&mut self, bytes: usize) -> Slice {
        if bytes == 0 {
            return std::mem::take(self);
        }
        assert!(bytes <= self.len, "split off at {bytes} of {} bytes", self.len);
        let back = self.share().cut(bytes, self.len - bytes);
        self.len = bytes;
        back
    }

    /// Drops the first `bytes`.
    ///
    /// # Panics
    /// When `bytes` is more than the length.
    #[inline]
    pub fn advance(&mut self, bytes: usize) {
        assert!(bytes <= self.len, "advance {bytes} of {} bytes", self.len);
        // SAFETY: the assertion keeps the pointer inside, or at the end of, the memory of this
        // slice.
        self.start = unsafe { self.start.add(bytes) };
        self.len -= bytes;
    }

    /// Drops everything after the first `bytes`; does nothing when there are no more than that.
    #[inline]
    pub fn truncate(&mut self, bytes: usize) {
        self.len = self.len.min(bytes);
    }

    /// The first `bytes`, sharing their memory.
    ///
    /// # Panics
    /// When `bytes` is more than the length.
    #[inline]
    pub(crate) fn share_front(&mut self, bytes: usize) -> Slice {
        assert!(bytes <= self.len, "share {bytes} of {} bytes", self.len);
        if bytes == 0 { Slice::new() } else { self.share().cut(0, bytes) }
    }

    /// A clone. Cheaper, because an exclusive borrow shows that no other thread clones it
    /// meanwhile.
    #[inline]
    fn share(&mut self) -> Slice {
        let Some(header) = self.owner else { return self.clone() };
        // SAFETY: `self` holds a reference, so the header is alive.
        let refs = unsafe { &header.as_ref().refs };
        // The only reference is the one borrowed here, so nobody else can count: a plain store will
        // do. Acquire: the store hides the releases of the threads that dropped theirs before from
        // the thread that drops the last one, so they must happen before it.
        if refs.load(Ordering::Acquire) != 1 {
            return self.clone();
        }
        refs.store(2, Ordering::Relaxed);
        Slice { start: self.start, len: self.len, owner: self.owner }
    }

    /// The `len` bytes from index `start`.
    #[inline]
    fn cut(mut self, start: usize, len: usize) -> Slice {
        self.advance(start);
        self.truncate(len);
        self
    }

    /// Joins `next` onto the end of `self` when it directly follows in the same memory.
    ///
    /// # Errors
    /// Gives `next` back when it does not.
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
        // SAFETY: `len` bytes from `start` lie in one allocation (every constructor and `advance`
        // see to it).
        unsafe { self.start.add(self.len) }
    }
}

impl Deref for Slice {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes from `start` lie in one allocation that `owner` keeps
        // alive as long as `self` holds its reference, and nobody writes them (module docs).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Clone for Slice {
    #[inline]
    fn clone(&self) -> Slice {
        if let Some(header) = self.owner {
            // SAFETY: `self` holds a reference, so the header is alive.
            let header = unsafe { header.as_ref() };
            // Relaxed: the new reference is made from one that this thread already holds. Overflow
            // would take more slices than memory can hold.
            header.refs.fetch_add(1, Ordering::Relaxed);
        }
        Slice { start: self.start, len: self.len, owner: self.owner }
    }
}

impl Drop for Slice {
    #[inline]
    fn drop(&mut self) {
        if let Some(header) = self.owner {
            // SAFETY: `self` holds one reference and is gone after this.
            unsafe { release(header, 1) }
        }
    }
}

/// Exclusive owner of the unused rest of a block.
pub(crate) struct Block {
    start: NonNull<u8>,
    capacity_left: usize,
    header: NonNull<Header>,
    /// References held in advance, one for every slice that can still be taken and one for the
    /// block itself, so that taking a slice costs no atomic operation.
    refs: usize,
}

// SAFETY: the spare belongs to this `Block` alone (module docs), and `Header` is `Send` and `Sync`
// (asserted below its definition).
unsafe impl Send for Block {}
// SAFETY: `&Block` allows nothing but asking for the capacity.
unsafe impl Sync for Block {}

impl Block {
    /// Length of the spare in bytes.
    #[inline]
    pub(crate) fn capacity_left(&self) -> usize {
        self.capacity_left
    }

    /// The unused rest: initialised, but with bytes of no meaning.
    #[inline]
    pub(crate) fn spare(&mut self) -> &mut [u8] {
        // SAFETY: `capacity_left` initialised bytes from `start` lie in memory that `header` keeps
        // alive, and no slice covers them: `advance` is the only code that hands bytes out, and it
        // moves `start` past them.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.capacity_left) }
    }

    /// Splits off the first `bytes` of the spare.
    ///
    /// # Panics
    /// When `bytes` is more than the spare.
    #[inline]
    pub(crate) fn take(&mut self, bytes: usize) -> Slice {
        if bytes == 0 {
            return Slice::new();
        }
        let start = self.advance(bytes);
        // Never the last one: there was one reference more than bytes, and each slice takes at
        // least one byte.
        self.refs -= 1;
        Slice { start, len: bytes, owner: Some(self.header) }
    }

    /// The first `bytes` of the spare, from a block that nobody fills any further.
    ///
    /// # Panics
    /// When `bytes` is more than the spare.
    #[inline(always)]
    pub(crate) fn finish(mut self, bytes: usize) -> Slice {
        let slice = self.take(bytes);
        // SAFETY: `self` holds references, so the header is alive.
        let refs = unsafe { &self.header.as_ref().refs };
        // All references are the block's and the new slice's, so nobody else can count: a plain
        // store will do, as in `Slice::share`.
        if slice.owner.is_some() && refs.load(Ordering::Acquire) == self.refs + 1 {
            refs.store(1, Ordering::Relaxed);
            std::mem::forget(self);
        }
        slice
    }

    /// Makes the first `bytes` of the spare part of `slice`, if `slice` ends where the spare
    /// begins.
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

    /// Drops `slice`. If it is of this block, its reference is kept and dropped with the others,
    /// which saves an atomic operation.
    #[inline]
    pub(crate) fn reclaim(&mut self, slice: Slice) {
        if slice.owner == Some(self.header) {
            self.refs += 1;
            std::mem::forget(slice);
        }
    }

    /// Gives `bytes` of the spare away and returns where they begin.
    #[inline]
    fn advance(&mut self, bytes: usize) -> NonNull<u8> {
        assert!(bytes <= self.capacity_left, "take {bytes} of {} bytes", self.capacity_left);
        let start = self.start;
        // SAFETY: the assertion keeps the pointer inside, or at the end of, the block's memory.
        self.start = unsafe { start.add(bytes) };
        self.capacity_left -= bytes;
        start
    }
}

impl Drop for Block {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: `self` holds `refs` references and is gone after this.
        unsafe { release(self.header, self.refs) }
    }
}

/// A block that nobody uses: no spare, no slice, no home.
pub(crate) struct FreeBlock(Box<Header>);

impl FreeBlock {
    /// Allocates `capacity` zeroed bytes. Its home looks for it in `class`.
    pub(super) fn new(capacity: usize, class: usize) -> FreeBlock {
        let mut header = Header::new(vec![0; capacity], None);
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

    /// Puts the block to use. It goes to `home` when the block and its last slice are dropped.
    #[inline]
    pub(super) fn lend(self, home: Home) -> Block {
        let header = Box::leak(self.0);
        header.home = Some(home);
        let start = NonNull::from(header.memory.as_mut_slice()).cast();
        let capacity_left = header.memory.len();
        let refs = capacity_left + 1;
        header.refs.store(refs, Ordering::Relaxed);
        Block { start, capacity_left, header: NonNull::from(header), refs }
    }
}

/// Where a block goes after use, on the thread that dropped the last reference to it.
pub(super) enum Home {
    /// A pool's lists.
    Lists(Arc<FreeLists>),
    /// What the models see it with.
    #[cfg(loom)]
    Model(Arc<dyn Fn() + Send + Sync>),
}

/// The memory behind slices. Only `refs` is touched between the making of the first slice and the
/// drop of the last.
struct Header {
    refs: AtomicUsize,
    memory: Vec<u8>,
    /// Among what its home has.
    class: usize,
    /// Holds the bytes when they came as `Bytes`; `memory` is empty then.
    foreign: Option<Bytes>,
    /// Where the memory goes in the end; it is freed if there is none.
    home: Option<Home>,
}

/// What the `Send` and `Sync` of slices and blocks rest on.
const _: () = {
    const fn is_send_and_sync<T: Send + Sync>() {}
    is_send_and_sync::<Header>();
};

impl Header {
    fn new(memory: Vec<u8>, foreign: Option<Bytes>) -> Header {
        Header { refs: AtomicUsize::new(0), memory, class: 0, foreign, home: None }
    }
}

/// Gives up `count` references; the last ones free the memory or send it home.
///
/// # Safety
/// The caller holds `count` references and does not use them, or what they keep alive, afterwards.
#[inline]
unsafe fn release(header: NonNull<Header>, count: usize) {
    // SAFETY: the caller's references keep the header alive until they are given up below.
    let refs = unsafe { &header.as_ref().refs };
    // When all references are ours nobody can make another one, so the common case needs no locked
    // instruction. Acquire, and Release below: what other threads did with their slices happens
    // before the memory is reused.
    if refs.load(Ordering::Acquire) != count {
        if refs.fetch_sub(count, Ordering::Release) != count {
            return;
        }
        fence(Ordering::Acquire);
    }
    // SAFETY: those were the last references.
    unsafe { retire(header) }
}

/// Frees the memory or sends it home.
///
/// # Safety
/// No reference to the header is left, and no other thread is in here for the same one.
unsafe fn retire(header: NonNull<Header>) {
    // SAFETY: every header comes from `Box::leak`, and nobody else can reach this one any more.
    let mut header = unsafe { Box::from_raw(header.as_ptr()) };
    match header.home.take() {
        Some(Home::Lists(lists)) => lists.give_back(FreeBlock(header)),
        #[cfg(loom)]
        Some(Home::Model(given_back)) => given_back(),
        None => {
            if let Some(foreign) = header.foreign.take() {
                // Its owner may be a type of the user's, with a destructor.
                user_code::discard(foreign);
            }
        }
    }
}
