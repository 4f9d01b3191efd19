//! Conversions and comparisons of [`Slice`]. Any thread calls them.

#![forbid(unsafe_code)]

use std::fmt;
use std::hash::{Hash, Hasher};
use std::panic::{RefUnwindSafe, UnwindSafe};

use bytes::Bytes;

use super::block::Slice;

// The bytes never change, so a panic cannot leave them in an inconsistent state.
impl UnwindSafe for Slice {}
impl RefUnwindSafe for Slice {}

impl Default for Slice {
    #[inline]
    fn default() -> Slice {
        Slice::new()
    }
}

impl From<Vec<u8>> for Slice {
    /// Takes over the memory of the vector. Copies nothing.
    fn from(vec: Vec<u8>) -> Slice {
        if vec.is_empty() { Slice::new() } else { Slice::from_owner(vec, None) }
    }
}

impl From<Box<[u8]>> for Slice {
    /// Takes over the memory of the box. Copies nothing.
    fn from(bytes: Box<[u8]>) -> Slice {
        Slice::from(bytes.into_vec())
    }
}

impl From<String> for Slice {
    /// Takes over the memory of the string. Copies nothing.
    fn from(string: String) -> Slice {
        Slice::from(string.into_bytes())
    }
}

impl From<Bytes> for Slice {
    /// Refers to the `Bytes`. Copies nothing.
    fn from(bytes: Bytes) -> Slice {
        if bytes.is_empty() { Slice::new() } else { Slice::from_owner(Vec::new(), Some(bytes)) }
    }
}

impl From<&'static [u8]> for Slice {
    /// Refers to the static bytes. Allocates nothing.
    #[inline]
    fn from(bytes: &'static [u8]) -> Slice {
        Slice::from_static(bytes)
    }
}

impl<const LEN: usize> From<&'static [u8; LEN]> for Slice {
    /// Refers to the static bytes. Allocates nothing.
    #[inline]
    fn from(bytes: &'static [u8; LEN]) -> Slice {
        Slice::from(bytes.as_slice())
    }
}

impl From<&'static str> for Slice {
    /// Refers to the static bytes. Allocates nothing.
    #[inline]
    fn from(string: &'static str) -> Slice {
        Slice::from(string.as_bytes())
    }
}

impl From<Slice> for Bytes {
    /// Refers to the slice. Copies nothing.
    fn from(slice: Slice) -> Bytes {
        Bytes::from_owner(slice)
    }
}

impl AsRef<[u8]> for Slice {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl<Other: AsRef<[u8]> + ?Sized> PartialEq<Other> for Slice {
    #[inline]
    fn eq(&self, other: &Other) -> bool {
        **self == *other.as_ref()
    }
}

impl Eq for Slice {}

impl Hash for Slice {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

impl fmt::Debug for Slice {
    /// The bytes as in a byte string literal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.escape_ascii())
    }
}
