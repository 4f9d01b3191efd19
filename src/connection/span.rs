//! The `tracing` span of a run.
//!
//! Each run of a handler is polled inside a span of the level debug, with the peer's address and
//! the connection's [`Handle::id`](super::Handle::id). If no subscriber of the process wants this
//! level, a run costs one load and one comparison more, and stays the same object.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tracing::Span;
use tracing::level_filters::LevelFilter;

use super::Handle;
use super::core::Core;
use crate::task::Run;
use crate::user_code;

/// Puts a run of a handler of `core` into a span of its own, if a subscriber wants it.
#[inline]
pub(super) fn spanned(run: Run, core: &Arc<Core>) -> Run {
    if LevelFilter::current() < LevelFilter::DEBUG {
        return run;
    }
    with_span(run, core)
}

#[cold]
fn with_span(run: Run, core: &Arc<Core>) -> Run {
    let id = Handle::of(core).id();
    let span = tracing::debug_span!("handler", peer = %core.peer, id);
    if span.is_disabled() { run } else { Box::pin(Spanned { run, span }) }
}

struct Spanned {
    run: Run,
    span: Span,
}

impl Future for Spanned {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Spanned { run, span } = &mut *self;
        // The subscriber is user code. If it panics, the run is given up.
        let poll = || span.in_scope(|| run.as_mut().poll(cx));
        user_code::call("subscriber", poll).unwrap_or(Poll::Ready(()))
    }
}
