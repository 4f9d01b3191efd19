//! Receive buffers in two sizes, and who waits for one.
//!
//! Small ones for requests, large ones for streams: small buffers cut pipelined traffic into many
//! completions, large ones wear out the cache. A connection starts with the small ones and moves
//! when it keeps filling them.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use super::buffer_ring::{BufferRing, Shape};
use super::ring::Ring;
use crate::buffer::Pool;
use crate::config::UringOptions;
use crate::config::uring as config;
use crate::sys::Token;

/// Of receive buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    Small,
    Large,
}

/// The buffers of one size.
pub(super) struct Class {
    pub(super) ring: BufferRing,
    /// Those that found none, and since when: the longest first.
    pub(super) starved: VecDeque<(Token, Instant)>,
}

pub(super) struct Buffers {
    /// The size everybody starts with.
    first: Class,
    first_size: Size,
    /// The large ones, where the first are not; made when a connection needs them.
    second: Option<Class>,
    large: Shape,
    pool: Pool,
}

impl Buffers {
    pub(super) fn new(ring: &Ring, options: &UringOptions, pool: &Pool) -> io::Result<Buffers> {
        let is_incremental = options.incremental_buffers;
        let small = Shape {
            group: 0,
            count: options.small_buffers,
            bytes: crate::config::SMALL_BUFFER_BYTES,
            lent_part_min: crate::config::LENT_PART_MIN,
            is_incremental,
            is_elastic: false,
        };
        let large = Shape {
            group: 1,
            count: options.large_buffers,
            bytes: config::LARGE_BUFFER_BYTES,
            lent_part_min: config::LARGE_LENT_PART_MIN,
            is_incremental,
            is_elastic: true,
        };
        // Where receives share a buffer, the large ones suit everybody.
        let (first_size, shape) =
            if is_incremental { (Size::Large, large) } else { (Size::Small, small) };
        let first = Class::new(ring, shape, pool)?;
        Ok(Buffers { first, first_size, second: None, large, pool: pool.clone() })
    }

    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(super) fn first_size(&self) -> Size {
        self.first_size
    }

    /// Sees to it that there are buffers of that size. Where the kernel refuses them, the first
    /// size has to do.
    pub(super) fn provide(&mut self, size: Size, ring: &Ring) -> Size {
        if size == self.first_size || self.second.is_some() {
            return size;
        }
        if self.first_size == Size::Large {
            return self.first_size;
        }
        match Class::new(ring, self.large, &self.pool) {
            Ok(class) => {
                self.second = Some(class);
                size
            }
            Err(error) => {
                tracing::warn!(%error, "large receive buffers: doing without");
                self.first_size
            }
        }
    }

    /// What the ring knows the buffers of a provided size by.
    pub(super) fn group(&self, size: Size) -> u16 {
        if size == self.first_size { self.first.ring.group() } else { self.large.group }
    }

    /// The class of a provided size.
    ///
    /// # Panics
    /// When it was not provided.
    pub(super) fn class(&mut self, size: Size) -> &mut Class {
        if size == self.first_size {
            return &mut self.first;
        }
        self.second.as_mut().expect("a receive was armed with buffers of this size")
    }

    /// Gives the kernel a block for each that was lent.
    pub(super) fn refill(&mut self) {
        self.first.ring.refill(&self.pool);
        if let Some(second) = &mut self.second {
            second.ring.refill(&self.pool);
        }
    }

    /// Buffers of that size that the kernel may fill.
    pub(super) fn ready(&self, size: Size) -> usize {
        let class = if size == self.first_size { Some(&self.first) } else { self.second.as_ref() };
        class.map_or(0, |class| class.ring.ready())
    }

    /// Whose turn it is.
    pub(super) fn next_starved(&mut self, size: Size) -> Option<Token> {
        let class =
            if size == self.first_size { Some(&mut self.first) } else { self.second.as_mut() };
        class?.starved.pop_front().map(|(token, _)| token)
    }

    pub(super) fn unregister(&mut self, ring: &Ring) {
        for class in [Some(&mut self.first), self.second.as_mut()].into_iter().flatten() {
            class.ring.unregister(ring, &self.pool);
        }
    }

    /// The kernel may still write to the blocks: they stay for ever.
    pub(super) fn leak(&mut self) {
        for class in [Some(&mut self.first), self.second.as_mut()].into_iter().flatten() {
            class.ring.leak();
        }
    }
}

impl Class {
    /// Queues a connection that has found no buffer since then. One that was given its turn, and
    /// came too late for a buffer all the same, keeps its place.
    pub(super) fn starve(&mut self, token: Token, since: Instant) {
        self.ring.ran_dry();
        let place = self.starved.partition_point(|(_, other)| *other <= since);
        self.starved.insert(place, (token, since));
    }

    fn new(ring: &Ring, shape: Shape, pool: &Pool) -> io::Result<Class> {
        Ok(Class { ring: BufferRing::new(ring, shape, pool)?, starved: VecDeque::new() })
    }
}
