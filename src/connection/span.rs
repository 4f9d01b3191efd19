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

/// Begins a run of a handler of `core` with `begin`, in a span of its own if a subscriber wants it.
#[inline(always)]
pub(super) fn begin(core: &Arc<Core>, begin: impl FnOnce() -> Option<Run>) -> Option<Run> {
    if LevelFilter::current() < LevelFilter::DEBUG {
        return begin();
    }
    begin_in_span(core, begin)
}

#[cold]
fn begin_in_span(core: &Arc<Core>, begin: impl FnOnce() -> Option<Run>) -> Option<Run> {
    let id = Handle::of(core).id();
    let make = || tracing::debug_span!("handler", peer = %core.peer, id);
    let span = user_code::call(SUBSCRIBER, make).unwrap_or_else(Span::none);
    if span.is_disabled() {
        return begin();
    }
    let run = in_scope(&span, begin);
    let span = Some(span);
    match run {
        Some(run) => Some(Box::pin(Spanned { run, span })),
        None => {
            user_code::discard(span);
            None
        }
    }
}

/// Runs `code` inside of `span`.
fn in_scope<T>(span: &Span, code: impl FnOnce() -> T) -> T {
    let entered = user_code::call(SUBSCRIBER, || span.enter());
    let done = code();
    user_code::discard(entered);
    done
}

/// The subscriber of the process is user code, and may panic.
const SUBSCRIBER: &str = "subscriber";

struct Spanned {
    run: Run,
    span: Option<Span>,
}

impl Future for Spanned {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Spanned { run, span } = &mut *self;
        let mut poll = || run.as_mut().poll(cx);
        match span {
            Some(span) => in_scope(span, poll),
            None => poll(),
        }
    }
}

impl Drop for Spanned {
    fn drop(&mut self) {
        user_code::discard(self.span.take());
    }
}
