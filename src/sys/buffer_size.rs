//! The sizes of receive buffers, and which of them a connection's next receive uses.
//!
//! A message that does not fit its buffer costs a further receive. A buffer that is much larger
//! than the message pushes other memory out of the CPU cache, and its bytes are copied (see
//! `lending.rs`). So a connection's buffers follow the sizes of its receives.

use crate::config::{
    FIT_SMALLER_TO_SHRINK, LARGE_BUFFER_BYTES, MEDIUM_BUFFER_BYTES, SMALL_BUFFER_BYTES,
};

/// The size of a receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Size {
    Small,
    Medium,
    Large,
}

impl Size {
    pub(super) const ALL: [Size; 3] = [Size::Small, Size::Medium, Size::Large];

    pub(super) fn bytes(self) -> usize {
        match self {
            Size::Small => SMALL_BUFFER_BYTES,
            Size::Medium => MEDIUM_BUFFER_BYTES,
            Size::Large => LARGE_BUFFER_BYTES,
        }
    }

    /// The smallest buffer with room for more than `bytes`, or the largest. A receive that fills
    /// its buffer may have left bytes in the socket.
    fn beyond(bytes: usize) -> Size {
        Size::ALL.into_iter().find(|size| bytes < size.bytes()).unwrap_or(Size::Large)
    }
}

/// Chooses the buffer size of a connection.
pub(super) struct SizeChoice {
    size: Size,
    /// Bytes of the last receives, at most a large buffer's, if these filled their buffers;
    /// otherwise 0.
    filled_bytes: usize,
    /// How many receives in a row suited another size: positive for a larger one, negative for a
    /// smaller one.
    streak: i8,
}

impl SizeChoice {
    pub(super) fn new(size: Size) -> SizeChoice {
        SizeChoice { size, filled_bytes: 0, streak: 0 }
    }

    /// The size of the next receive.
    #[inline]
    pub(super) fn size(&self) -> Size {
        self.size
    }

    /// Uses `size` from now on.
    pub(super) fn set(&mut self, size: Size) {
        *self = SizeChoice::new(size);
    }

    /// Notes a receive of `bytes` into a buffer of the chosen size. After `to_grow` receives in a
    /// row that suit a larger buffer, the last of them decides the new size. After
    /// [`FIT_SMALLER_TO_SHRINK`] receives in a row that suit a smaller one, the last decides too.
    #[inline]
    pub(super) fn note(&mut self, bytes: usize, to_grow: i8) {
        let total_bytes = self.filled_bytes + bytes;
        let is_full = bytes >= self.size.bytes();
        self.filled_bytes = if is_full { total_bytes.min(LARGE_BUFFER_BYTES) } else { 0 };
        let fitting = Size::beyond(total_bytes);
        if fitting == self.size {
            self.streak = 0;
            return;
        }
        let step = if fitting > self.size { 1 } else { -1 };
        self.streak = if self.streak.signum() == -step { step } else { self.streak + step };
        if self.streak >= to_grow || self.streak <= -FIT_SMALLER_TO_SHRINK {
            self.size = fitting;
            self.streak = 0;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn note_all(choice: &mut SizeChoice, receives: &[usize], to_grow: i8) {
        receives.iter().for_each(|bytes| choice.note(*bytes, to_grow));
    }

    #[test]
    fn a_message_just_beyond_a_buffer_moves_to_the_next_size() {
        for to_grow in [1, 2] {
            let mut choice = SizeChoice::new(Size::Small);
            note_all(&mut choice, &[SMALL_BUFFER_BYTES, 4], to_grow);
            assert_eq!(choice.size(), Size::Medium);
            note_all(&mut choice, &[SMALL_BUFFER_BYTES + 4; 100], to_grow);
            assert_eq!(choice.size(), Size::Medium);
        }
    }

    #[test]
    fn a_stream_moves_to_the_largest_size() {
        let mut choice = SizeChoice::new(Size::Small);
        for _ in 0..10 {
            choice.note(choice.size().bytes(), 2);
        }
        assert_eq!(choice.size(), Size::Large);
        // One receive into several small buffers tells its size at once.
        choice.set(Size::Small);
        note_all(&mut choice, &[60 << 10; 2], 2);
        assert_eq!(choice.size(), Size::Large);
    }

    #[test]
    fn only_many_small_receives_in_a_row_shrink_the_size() {
        let to_shrink = FIT_SMALLER_TO_SHRINK as usize;
        let mut choice = SizeChoice::new(Size::Large);
        for _ in 0..3 {
            note_all(&mut choice, &vec![100; to_shrink - 1], 1);
            note_all(&mut choice, &[100 << 10], 1);
        }
        assert_eq!(choice.size(), Size::Large);
        note_all(&mut choice, &vec![100; to_shrink], 1);
        assert_eq!(choice.size(), Size::Small);
    }
}
