//! Parts of a connection that travel.
//!
//! The reader and the writer move between the connection's home and its holder with every run; what
//! moves is a pointer.

use std::ops::{Deref, DerefMut};

/// A reader or a writer in its holder's hands, until it is taken back.
pub(super) struct Lent<T>(Option<Box<T>>);

impl<T> Lent<T> {
    pub(super) fn new(part: Box<T>) -> Lent<T> {
        Lent(Some(part))
    }

    /// Hands the part on to another holder.
    pub(super) fn hand_on(&mut self) -> Lent<T> {
        Lent(self.0.take())
    }

    /// Takes the part; `None` if that was done before. Nothing else may be called after this.
    pub(super) fn take(&mut self) -> Option<Box<T>> {
        self.0.take()
    }
}

impl<T> Deref for Lent<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        self.0.as_deref().expect("taken only when its holder goes")
    }
}

impl<T> DerefMut for Lent<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_deref_mut().expect("taken only when its holder goes")
    }
}
