//! User data: the 64 bits by which a completion names its operation.
//!
//! The top byte is the kind of operation. The other 56 bits are 24 bits of a token's generation and
//! 32 bits of its index; for [`Op::SendRecord`] they are the address of the record.

use crate::sys::Token;

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Op {
    Receive = 1,
    Send = 2,
    /// A poll of the socket: for the end of connecting, or for the peer's end.
    Watch = 3,
    Cancel = 4,
    /// The poll of the eventfd that wakes the poller.
    Wake = 5,
    /// Its result is a descriptor, which must be closed.
    Accept = 6,
    /// A send of a record: a send of `sqpoll`, which any thread may have started, or a zero-copy
    /// send.
    SendRecord = 7,
    /// A multishot poll of the socket for something to receive.
    Readable = 8,
}

impl Op {
    /// # Panics
    /// When no [`Op`] made the user data.
    pub(super) fn of(user_data: u64) -> Op {
        match user_data >> PAYLOAD_BITS {
            1 => Op::Receive,
            2 => Op::Send,
            3 => Op::Watch,
            4 => Op::Cancel,
            5 => Op::Wake,
            6 => Op::Accept,
            7 => Op::SendRecord,
            8 => Op::Readable,
            other => unreachable!("completion of operation {other}"),
        }
    }

    /// The user data is of this kind of operation.
    pub(super) fn is_of(self, user_data: u64) -> bool {
        user_data >> PAYLOAD_BITS == self as u64
    }

    /// User data of this kind of operation with 56 bits of payload.
    pub(super) fn with_payload(self, payload: u64) -> u64 {
        debug_assert_eq!(payload & !PAYLOAD_MASK, 0, "a payload has 56 bits");
        (self as u64) << PAYLOAD_BITS | payload
    }

    /// User data of this kind of operation for `token`.
    pub(super) fn with_token(self, token: Token) -> u64 {
        self.with_payload(token_payload(token))
    }
}

/// The user data without the kind of operation.
pub(super) fn payload(user_data: u64) -> u64 {
    user_data & PAYLOAD_MASK
}

/// The index of the token in the user data.
pub(super) fn index(user_data: u64) -> usize {
    (user_data & u64::from(u32::MAX)) as usize
}

/// The payload of an operation for `token`.
pub(super) fn token_payload(token: Token) -> u64 {
    u64::from(token.generation() & GENERATION_MASK) << 32 | token.index() as u64
}

const PAYLOAD_BITS: u32 = 56;
const PAYLOAD_MASK: u64 = (1 << PAYLOAD_BITS) - 1;
const GENERATION_MASK: u32 = 0xFF_FFFF;
