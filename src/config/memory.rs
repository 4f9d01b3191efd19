//! Bounds of memory: the budget of pollers, and the free memory that pools and threads keep.

/// The default budget of received, unread bytes for one poller. While it is exceeded, each
/// connection above its share is paused, or fails if the pause would keep a read from completing.
pub(crate) const UNREAD_BYTES_MAX: usize = 1 << 30;

/// While the block memory of a poller exceeds its budget, unread bytes are counted again each time
/// the memory has grown by the budget divided by this.
pub(crate) const BUDGET_LOOKS: usize = 16;

/// While the block memory of a poller exceeds its budget, unread bytes are counted again after this
/// time. Counting takes a lock for each connection.
pub(crate) const BUDGET_LOOK_NS: u64 = 100_000_000;

/// The smallest share of a connection.
pub(crate) const SHARE_BYTES_MIN: usize = 16 << 10;

/// The size of a block for messages of `bytes`, a power of two. Messages are often as long as a
/// power of two, and have a header of a few bytes.
pub(crate) const fn with_header_room(bytes: usize) -> usize {
    bytes + bytes / 32
}

/// The smallest block of a pool, without its header room. Smaller blocks would save less memory
/// than their headers need.
pub(crate) const BLOCK_BYTES_MIN: usize = 512;

/// The number of size classes of a pool. Each class has twice the size of the one before: 512 B to
/// 8 MiB, and header room. A larger block is freed after its use, and its memory comes new from the
/// system.
pub(crate) const BLOCK_CLASSES: usize = 15;

/// The largest block that is allocated in advance while a chain grows by small writes.
pub(crate) const BLOCK_GROWTH_BYTES_MAX: usize = 64 << 10;
const _: () = assert!(BLOCK_GROWTH_BYTES_MAX <= BLOCK_BYTES_MIN << (BLOCK_CLASSES - 1));

/// Blocks from this size on are large.
pub(crate) const LARGE_BLOCK_BYTES_MIN: usize = 32 << 10;

/// Large blocks of a process that are mappings of their own. Further ones are on the heap.
pub(crate) const MAPPINGS_MAX: usize = 16 << 10;

/// Free memory that the pool of a poller keeps in large blocks, of all sizes together. It was in
/// use before, so a pool takes no more memory than it once needed. Echoes of 1 MiB on 100
/// connections take 116 MB; with a bound of 32 MiB, epoll served half as many requests.
pub(crate) const FREE_LARGE_BYTES_MAX: usize = 256 << 20;
const _: () =
    assert!(with_header_room(BLOCK_BYTES_MIN << (BLOCK_CLASSES - 1)) <= FREE_LARGE_BYTES_MAX);

/// The same for the pool that the process shares.
pub(crate) const SHARED_LARGE_BYTES_MAX: usize = with_header_room(4 << 20);

/// How often a poller frees large blocks that were not needed. A poller without traffic has freed
/// all of them after twice this time, and sleeps without a timeout then.
pub(crate) const DECAY_INTERVAL_NS: u64 = 1_000_000_000;

/// While messages need blocks of a size, their demand is observed over so many decay intervals.
/// With one interval, echoes of 1 MiB on 4 connections cost 0.01 page faults a request.
pub(crate) const DECAYS_OBSERVED: u32 = 8;

/// Free memory that a pool keeps in each size class below the large blocks: at least one block, and
/// at most [`FREE_BLOCKS_MAX`] blocks. Less than 3 MiB in all.
pub(crate) const FREE_BYTES_MAX: usize = 512 << 10;

/// Free blocks that a pool keeps in each size class.
pub(crate) const FREE_BLOCKS_MAX: usize = 256;

/// Free memory that the attached thread keeps in each size class: at least one block, and at most
/// [`LOCAL_BLOCKS_MAX`] blocks.
pub(crate) const LOCAL_BYTES_MAX: usize = 256 << 10;

/// Free blocks that the attached thread keeps in each size class.
pub(crate) const LOCAL_BLOCKS_MAX: usize = 64;

/// Writes up to this length are copied. A copy is cheaper than sending one more piece.
pub(crate) const COPY_BYTES_MAX: usize = 4096;

/// A vectored write of at least so many bytes is passed to the kernel from the caller's memory, if
/// no other byte is unsent. A smaller one is gathered with the writes that follow it. HTTP/2 writes
/// each frame apart, of 16 KiB by default; gathering several costs a copy and saves system calls.
pub(crate) const DIRECT_SEND_BYTES_MIN: usize = 32 << 10;

/// How many bytes of such a write are copied when the kernel does not take all of them. The poller
/// sends them, and wakes the writer, when a third of the socket's buffer is free, so a few suffice.
pub(crate) const KEPT_OF_DIRECT_SEND_BYTES: usize = 16 << 10;

/// An appended chain up to this length is copied, if the spare has room for it.
pub(crate) const APPEND_COPY_BYTES_MAX: usize = 256;

/// Empty readers, and empty writers, that each thread keeps for later runs: enough for one round of
/// a busy poller.
pub(crate) const SPARE_PARTS_MAX: usize = 256;

/// The queue of an empty chain keeps its memory up to this many pieces.
pub(crate) const CHAIN_PIECES_KEPT: usize = 16;

/// A reader receives into the memory of its user if there is room for so many bytes. hyper's
/// smallest buffer has so much room.
pub(crate) const DIRECT_ROOM_MIN: usize = 8 << 10;

/// A reader begins to receive into the memory of its user after so many bytes have come at once.
/// For fewer bytes, a system call for each receive costs more than the copy that it saves.
pub(crate) const DIRECT_BYTES_MIN: u32 = 16 << 10;

/// Bytes that one such receive takes at most. More of them would not stay in the CPU cache until
/// they are used.
pub(crate) const DIRECT_BYTES_MAX: usize = 128 << 10;

/// After so many waits in sequence that brought fewer bytes than [`DIRECT_BYTES_MIN`], the poller
/// receives again.
pub(crate) const DIRECT_SLOW_MAX: u8 = 8;

/// Bytes that one reader may receive into the memory of its user before other tasks of its poller
/// run. The poller checks for events after [`COMMAND_PASSES_MAX`](super::COMMAND_PASSES_MAX) such
/// turns at most.
pub(crate) const DIRECT_TURN_BYTES: u32 = 256 << 10;
