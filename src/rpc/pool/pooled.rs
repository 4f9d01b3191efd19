//! A connection that is checked out of a pool.

use std::fmt;
use std::ops::{Deref, DerefMut};

use super::shared::{Member, Place};
use crate::connection::Connection;

/// A connection that is checked out of a [`Pool`](super::Pool). It dereferences to its
/// [`Connection`].
///
/// [`give_back`](Self::give_back) returns it to the pool, for the next caller. **Dropping it closes
/// it.** So a call that fails, panics or is cancelled between its request and the end of its answer
/// cannot leave a part of its answer to the next caller. The pool cannot guess this: a connection
/// on which an answer is about to arrive looks like an unused one. If output is unsent, the
/// connection is reset, so that the server cannot mistake a part of a request for the whole.
#[must_use = "dropping it closes the connection"]
pub struct Pooled {
    /// `None` only while this is consumed.
    member: Option<Member>,
    place: Option<Place>,
    is_reused: bool,
}

impl Pooled {
    pub(super) fn new(place: Place, member: Member, is_reused: bool) -> Pooled {
        Pooled { member: Some(member), place: Some(place), is_reused }
    }

    /// Returns the connection to the pool. Call it when the answer is read to its end.
    ///
    /// The connection is closed instead if the next caller could not use it: a side has closed or
    /// shut down its direction; a flush has failed; bytes are unread, or written and not in the
    /// kernel; its [lifetime](super::PoolBuilder::lifetime) is over; enough connections are idle;
    /// the pool is closed; or it is not the connection that was checked out.
    ///
    /// Its timeouts are reset to those of the dialer, and its deadlines are cleared. Its
    /// [context](crate::Handle::set_context) and its close callbacks stay.
    pub fn give_back(mut self) {
        if let (Some(place), Some(member)) = (self.place.take(), self.member.take()) {
            place.give_back(member);
        }
    }

    /// Takes the connection out of the pool for ever. It no longer counts for
    /// [`connections_max`](super::PoolBuilder::connections_max), and the pool's shutdown does not
    /// wait for it.
    pub fn take(mut self) -> Connection {
        let member = self.member.take().expect("only consuming methods take the member");
        member.connection
    }

    /// Whether the connection was idle in the pool. `false`: it was dialled for this checkout.
    ///
    /// The server may close a connection that has been idle just when the next request is sent. So
    /// a call on a reused connection that ends with a closed error before the first byte of its
    /// answer may be repeated on another connection, if the request may be executed twice.
    pub fn is_reused(&self) -> bool {
        self.is_reused
    }

    fn member(&self) -> &Member {
        self.member.as_ref().expect("only consuming methods take the member")
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        // First the connection, then its place: the pool never has more connections than places.
        if let Some(member) = self.member.take() {
            member.close();
        }
        drop(self.place.take());
    }
}

impl Deref for Pooled {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.member().connection
    }
}

impl DerefMut for Pooled {
    fn deref_mut(&mut self) -> &mut Connection {
        let member = self.member.as_mut().expect("only consuming methods take the member");
        &mut member.connection
    }
}

impl fmt::Debug for Pooled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pooled").field(&self.member().connection).finish()
    }
}

const _: () = {
    const fn goes_anywhere<T: Send + Sync + Unpin + 'static>() {}
    goes_anywhere::<Pooled>();
};
