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
use crate::task::{self, Run};
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
    let mut span = Span::none();
    user_code::log(|| span = make());
    if span.is_disabled() {
        return begin();
    }
    match in_scope(&span, begin) {
        Some(run) => Some(Box::pin(Spanned { run: Some(run), span: Some(span) })),
        None => {
            user_code::discard(span);
            None
        }
    }
}

/// Runs `code` inside of `span`. The subscriber of the process is user code, and may panic.
fn in_scope<T>(span: &Span, code: impl FnOnce() -> T) -> T {
    let mut entered = None;
    user_code::log(|| entered = Some(span.enter()));
    let done = code();
    user_code::log(|| drop(entered));
    done
}

/// A run with its span. The end of the run is inside of the span as well.
struct Spanned {
    run: Option<Run>,
    span: Option<Span>,
}

impl Spanned {
    /// Passes the run to `code`, inside of the span.
    fn enter<T>(&mut self, code: impl FnOnce(&mut Option<Run>) -> T) -> Option<T> {
        let Spanned { run, span } = self;
        span.as_ref().map(|span| in_scope(span, || code(run)))
    }
}

impl Future for Spanned {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let polled = self.enter(|run| {
            *run = run.take().and_then(|run| task::poll_again(run, cx));
            if run.is_some() { Poll::Pending } else { Poll::Ready(()) }
        });
        polled.unwrap_or(Poll::Ready(()))
    }
}

impl Drop for Spanned {
    fn drop(&mut self) {
        self.enter(|run| drop(run.take()));
        let span = self.span.take();
        user_code::log(|| drop(span));
    }
}
