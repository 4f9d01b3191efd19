//! Bounds of memory: what pollers may hold, and what pools and threads keep for later.

/// Received bytes that may lie unread at one poller, unless told otherwise, before the connections
/// that hold more than their share of it are paused, or, where their reader can never be satisfied,
/// fail.
pub(crate) const UNREAD_BYTES_MAX: usize = 1 << 30;

/// While a poller's block memory is above its budget, unread bytes are counted again each time that
/// memory has grown by the budget divided by this.
pub(crate) const BUDGET_LOOKS: usize = 16;

/// While a poller's block memory is above its budget, unread bytes are counted again after this
/// time. A count takes a lock for each connection.
pub(crate) const BUDGET_LOOK_NS: u64 = 100_000_000;

/// No connection is throttled below this share.
pub(crate) const SHARE_BYTES_MIN: usize = 16 << 10;

/// The smallest block of a pool: below this the bookkeeping costs more than the memory.
pub(crate) const BLOCK_BYTES_MIN: usize = 512;

/// Sizes that a pool recycles, each twice the one before: 512 B to 1 MiB.
pub(crate) const BLOCK_CLASSES: usize = 12;

/// The largest block allocated ahead of need when a chain grows by small writes.
pub(crate) const BLOCK_GROWTH_BYTES_MAX: usize = 64 << 10;
const _: () = assert!(BLOCK_GROWTH_BYTES_MAX <= BLOCK_BYTES_MIN << (BLOCK_CLASSES - 1));

/// Free memory that a pool keeps of each size, but one block at least and [`FREE_BLOCKS_MAX`] at
/// most: less than 6 MiB in all.
pub(crate) const FREE_BYTES_MAX: usize = 512 << 10;

/// Free blocks that a pool keeps of each size.
pub(crate) const FREE_BLOCKS_MAX: usize = 256;

/// Free memory of each size that the attached thread keeps for itself, but one block at least and
/// [`LOCAL_BLOCKS_MAX`] at most.
pub(crate) const LOCAL_BYTES_MAX: usize = 256 << 10;

/// Free blocks of each size that the attached thread keeps for itself.
pub(crate) const LOCAL_BLOCKS_MAX: usize = 64;

/// Writes up to this length are copied: that is cheaper than a send of one more piece.
pub(crate) const COPY_BYTES_MAX: usize = 4096;

/// An appended chain up to this length is copied where the spare has room for it.
pub(crate) const APPEND_COPY_BYTES_MAX: usize = 256;

/// Readers, and writers, that each thread keeps for its next runs: a busy round's worth.
pub(crate) const SPARE_PARTS_MAX: usize = 256;

/// The queue of an empty chain keeps room for this many pieces.
pub(crate) const CHAIN_PIECES_KEPT: usize = 16;
