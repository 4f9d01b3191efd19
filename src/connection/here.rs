//! The thread that runs this code, where it is a poller.

use std::cell::{OnceCell, RefCell};
use std::sync::Arc;

use super::shared::{Remote, Shared};
use crate::buffer::Chain;
use crate::poller::Token;

thread_local! {
    /// The poller that this thread is.
    static POLLER: OnceCell<Arc<Remote>> = const { OnceCell::new() };
    /// What handlers on this thread, a poller, have flushed and it has not sent yet.
    static FLUSHED: RefCell<Vec<(Token, Chain)>> = const { RefCell::new(Vec::new()) };
}

/// Makes this thread a poller, for its whole life.
pub(super) fn enter(remote: &Arc<Remote>) {
    POLLER.with(|poller| {
        let _ = poller.set(Arc::clone(remote));
    });
}

/// Whether this thread is the connection's poller.
#[inline]
pub(super) fn is_poller_of(shared: &Shared) -> bool {
    POLLER.with(|poller| poller.get().is_some_and(|here| Arc::ptr_eq(here, &shared.remote)))
}

/// Leaves bytes to the poller that this thread is.
#[inline]
pub(super) fn flush_here(token: Token, bytes: Chain) {
    FLUSHED.with_borrow_mut(|flushed| flushed.push((token, bytes)));
}

/// Swaps what was left into `into`.
pub(super) fn take_flushed(into: &mut Vec<(Token, Chain)>) {
    FLUSHED.with_borrow_mut(|flushed| std::mem::swap(flushed, into));
}

/// The poller that runs this code, if one does.
pub(crate) fn current_poller() -> Option<Arc<Remote>> {
    POLLER.with(|poller| poller.get().cloned())
}
