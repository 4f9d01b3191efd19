//! What completions are known by.
//!
//! User data is an operation in the top byte, 24 bits of the token's generation, and the 32 of its
//! index. A completion that comes late names a generation that is over, and so nobody.

use super::entry::Entry;
use crate::sys::Token;

/// What a completion is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Op {
    Receive = 1,
    Send = 2,
    /// A poll of the socket: connecting has ended, or the peer its side.
    Watch = 3,
    Cancel = 4,
    /// A poll of the eventfd.
    Wake = 5,
    /// Apart from `Receive`: its result is a descriptor, which must not get lost.
    Accept = 6,
    /// A send that any thread started. The rest of the user data is the address of its record.
    Flush = 7,
}

impl Op {
    pub(super) fn is_of(self, user_data: u64) -> bool {
        user_data >> 56 == self as u64
    }

    /// # Panics
    /// When we did not make the user data.
    pub(super) fn of(user_data: u64) -> Op {
        match user_data >> 56 {
            1 => Op::Receive,
            2 => Op::Send,
            3 => Op::Watch,
            4 => Op::Cancel,
            5 => Op::Wake,
            6 => Op::Accept,
            7 => Op::Flush,
            other => unreachable!("completion of operation {other}"),
        }
    }
}

pub(super) fn user_data(op: Op, token: Token) -> u64 {
    let generation = u64::from(token.generation() & GENERATION_MASK);
    (op as u64) << 56 | generation << 32 | token.index() as u64
}

/// The token that the user data names, with all of its generation; `NONE`, if that is over.
pub(super) fn token_of(entries: &[Option<Entry>], user_data: u64) -> Token {
    let index = (user_data & u64::from(u32::MAX)) as usize;
    let generation = (user_data >> 32) as u32 & GENERATION_MASK;
    let token = entries.get(index).and_then(Option::as_ref).map(|entry| entry.token);
    token.filter(|token| token.generation() & GENERATION_MASK == generation).unwrap_or(Token::NONE)
}

const GENERATION_MASK: u32 = 0xFF_FFFF;
