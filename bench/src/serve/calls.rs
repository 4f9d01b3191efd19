//! The scenario calls: `serve_calls`, which copies each request into its answer.

use std::sync::{Arc, Mutex, PoisonError};

use ringpoll::rpc::{CallLimits, LengthPrefixed, serve_calls, serve_calls_within};
use ringpoll::{Handle, Result, ServerBuilder, Slice};
use tokio::sync::oneshot;

/// What a frame has before its body: the length, and the number of the call.
const HEADER_BYTES: usize = 8;

/// A server of calls. `hold`: it answers when so many requests are there, in reverse order.
pub(super) fn serve(server: ServerBuilder, frame_max: usize, hold: Option<u32>) -> ServerBuilder {
    let server = server.read_bytes_max(frame_max + HEADER_BYTES);
    let codec = LengthPrefixed::new().with_message_bytes_max(frame_max);
    match hold {
        None => server.on_connect(serve_calls(codec, echo)),
        Some(count) => {
            let limits = CallLimits::new().per_connection(count as usize);
            let held = Arc::new(Held::new(count as usize));
            let echo_later = move |request: Slice, handle| {
                let turn = held.wait();
                async move {
                    // Without a sender no request comes any more, and any order will do.
                    let _ = turn.await;
                    echo(request, handle).await
                }
            };
            server.on_connect(serve_calls_within(limits, codec, echo_later))
        }
    }
}

/// Composes the answer in a buffer of its own, as a server does that computes it.
async fn echo(request: Slice, _: Handle) -> Result<Slice> {
    Ok(Slice::from(request.to_vec()))
}

/// Requests that wait until there are enough of them.
struct Held {
    count: usize,
    waiting: Mutex<Vec<oneshot::Sender<()>>>,
}

impl Held {
    fn new(count: usize) -> Held {
        Held { count, waiting: Mutex::new(Vec::new()) }
    }

    /// Ready when the other requests are there.
    fn wait(&self) -> oneshot::Receiver<()> {
        let (sender, turn) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push(sender);
        if waiting.len() < self.count {
            return turn;
        }
        let all = std::mem::take(&mut *waiting);
        drop(waiting);
        // A request whose connection is gone has dropped its receiver.
        for sender in all.into_iter().rev() {
            let _ = sender.send(());
        }
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_held_until_the_last_one_comes() {
        let held = Held::new(3);
        let (mut first, mut second) = (held.wait(), held.wait());
        assert!(first.try_recv().is_err() && second.try_recv().is_err());
        let mut third = held.wait();
        assert!(
            [&mut first, &mut second, &mut third].map(|turn| turn.try_recv().is_ok()) == [true; 3]
        );
        assert!(held.wait().try_recv().is_err());
    }
}
