//! Receive buffers of each size, and the connections that wait for a buffer.
//!
//! Owned by the poller's thread. Small buffers suit requests: large ones would not stay in the CPU
//! cache. Medium buffers suit longer messages. Large buffers suit streams: small ones would cut a
//! stream into many completions. A connection starts with small buffers, and moves as
//! `sys/buffer_size.rs` says.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use super::buffer_ring::{BufferRing, Shape};
use super::ring::Ring;
use crate::buffer::Pool;
use crate::config::uring::{BUFFERS_MAX, BUFFERS_RETRY};
use crate::config::{self, RingTier, UringOptions};
use crate::sys::Token;
use crate::sys::buffer_size::Size;
use crate::user_code;

/// The buffers of one size.
pub(super) struct SizeClass {
    pub(super) ring: BufferRing,
    /// Connections that found no buffer, and since when. The longest wait comes first.
    pub(super) starved: VecDeque<(Token, Instant)>,
    /// Receives in flight that use these buffers.
    receives: usize,
    /// A receive was started since the last [`Buffers::shrink`].
    was_used: bool,
}

pub(super) struct Buffers {
    /// The size of a connection's first receive.
    first_size: Size,
    /// By [`Size`]. The class of the first size exists from the start.
    classes: [Option<SizeClass>; Size::ALL.len()],
    shapes: [Shape; Size::ALL.len()],
    /// When buffers of a size could not be made. By [`Size`].
    failed_at: [Option<Instant>; Size::ALL.len()],
    /// The kernel takes buffers only while the poller's thread is in an `enter` of the ring.
    can_shrink: bool,
    pool: Pool,
}

impl Buffers {
    pub(super) fn new(ring: &Ring, options: &UringOptions, pool: &Pool) -> io::Result<Buffers> {
        let is_incremental = options.incremental_buffers;
        let shapes = Size::ALL.map(|size| {
            let (count, few) = match size {
                Size::Small => (options.small_buffers, config::uring::FIRST_SMALL_BUFFERS),
                // As much memory as the large buffers have.
                Size::Medium | Size::Large => {
                    let times = (Size::Large.bytes() / size.bytes()) as u16;
                    let count = options.large_buffers.saturating_mul(times).min(BUFFERS_MAX);
                    (count, config::uring::FIRST_LARGE_BUFFERS * times)
                }
            };
            // A kernel thread receives also while the poller is held up. It then needs all buffers.
            let has_thread = ring.collector().is_some();
            let first_count = if has_thread { count } else { few };
            Shape {
                group: group(size),
                count,
                first_count,
                bytes: size.bytes(),
                is_incremental,
                is_elastic: size == Size::Large || size == Size::Medium && !has_thread,
            }
        });
        // Where several receives share a buffer, large buffers suit every connection.
        let first_size = if is_incremental { Size::Large } else { Size::Small };
        let classes = Size::ALL.map(|_| None);
        let can_shrink = ring.collector().is_none() && ring.tier() == RingTier::Defer;
        let failed_at = [None; Size::ALL.len()];
        let pool = pool.clone();
        let mut buffers = Buffers { first_size, classes, shapes, failed_at, can_shrink, pool };
        let first = SizeClass::new(ring, shapes[first_size as usize], &buffers.pool)?;
        buffers.classes[first_size as usize] = Some(first);
        Ok(buffers)
    }

    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(super) fn first_size(&self) -> Size {
        self.first_size
    }

    /// Makes sure that there are buffers of a size, and returns that size. Returns the first size
    /// where there can be no others.
    pub(super) fn provide(&mut self, size: Size, ring: &Ring) -> Size {
        if self.classes[size as usize].is_some() {
            return size;
        }
        let failed_at = &mut self.failed_at[size as usize];
        let fails_still = failed_at.is_some_and(|at| at.elapsed() < BUFFERS_RETRY);
        if size < self.first_size || fails_still {
            return self.first_size;
        }
        match SizeClass::new(ring, self.shapes[size as usize], &self.pool) {
            Ok(class) => {
                self.classes[size as usize] = Some(class);
                size
            }
            Err(error) => {
                *failed_at = Some(Instant::now());
                user_code::log(|| tracing::warn!(%error, ?size, "receive buffers: doing without"));
                self.first_size
            }
        }
    }

    /// The buffers of a provided size.
    ///
    /// # Panics
    /// When the size was not provided.
    pub(super) fn class(&mut self, size: Size) -> &mut SizeClass {
        let class = self.classes[size as usize].as_mut();
        class.expect("a receive was armed with buffers of this size")
    }

    /// Gives the kernel a new block for each lent block.
    pub(super) fn refill(&mut self) {
        for class in self.classes.iter_mut().flatten() {
            class.ring.refill(&self.pool);
        }
    }

    /// Whether the kernel has more buffers than it needs without traffic, and
    /// [`shrink`](Self::shrink) can take them back.
    pub(super) fn have_grown(&self) -> bool {
        self.classes.iter().enumerate().any(|(size, class)| {
            class.as_ref().is_some_and(|class| {
                let is_unneeded = size != self.first_size as usize && !class.is_in_use();
                is_unneeded || self.can_shrink && class.ring.has_grown()
            })
        })
    }

    /// Takes buffers back that were not needed since the last call: all buffers of a size that no
    /// receive used, and some buffers of the other sizes if `has_all` completions were taken.
    pub(super) fn shrink(&mut self, ring: &Ring, has_all: bool) {
        for (size, place) in self.classes.iter_mut().enumerate() {
            let Some(class) = place else { continue };
            let was_used = std::mem::take(&mut class.was_used) || class.is_in_use();
            if !was_used && size != self.first_size as usize {
                class.ring.unregister(ring, &self.pool);
                *place = None;
            } else if self.can_shrink && has_all {
                class.ring.shrink(&self.pool);
            }
        }
    }

    /// How many buffers of a size the kernel may fill.
    pub(super) fn ready(&self, size: Size) -> usize {
        self.classes[size as usize].as_ref().map_or(0, |class| class.ring.ready())
    }

    /// Removes the connection that has waited longest for a buffer of a size.
    pub(super) fn next_starved(&mut self, size: Size) -> Option<Token> {
        self.classes[size as usize].as_mut()?.starved.pop_front().map(|(token, _)| token)
    }

    pub(super) fn unregister(&mut self, ring: &Ring) {
        for class in self.classes.iter_mut().flatten() {
            class.ring.unregister(ring, &self.pool);
        }
    }

    /// Never frees the blocks: the kernel may still write to them.
    pub(super) fn leak(&mut self) {
        for class in self.classes.iter_mut().flatten() {
            class.ring.leak();
        }
    }
}

impl SizeClass {
    fn new(ring: &Ring, shape: Shape, pool: &Pool) -> io::Result<SizeClass> {
        Ok(SizeClass {
            ring: BufferRing::new(ring, shape, pool)?,
            starved: VecDeque::new(),
            receives: 0,
            was_used: true,
        })
    }

    /// Notes that a receive is started that uses these buffers.
    pub(super) fn start_receive(&mut self) {
        self.receives += 1;
        self.was_used = true;
    }

    /// Notes the last completion of such a receive.
    pub(super) fn end_receive(&mut self) {
        self.receives -= 1;
    }

    /// Whether the kernel may fill these buffers, or connections wait for one.
    fn is_in_use(&self) -> bool {
        self.receives > 0 || !self.starved.is_empty()
    }

    /// Queues a connection that has found no buffer since then. A connection that was served and
    /// found no buffer again keeps its place in the queue.
    pub(super) fn starve(&mut self, token: Token, since: Instant) {
        self.ring.ran_dry();
        let place = self.starved.partition_point(|(_, other)| *other <= since);
        self.starved.insert(place, (token, since));
    }
}

/// The number by which receives name the buffers of a size.
pub(super) fn group(size: Size) -> u16 {
    size as u16
}
