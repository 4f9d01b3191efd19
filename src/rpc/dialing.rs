//! The task that makes a connection for a link.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use super::codec::Codec;
use super::session::Session;
use super::shared::Shared;
use crate::clock::now_ns;
use crate::connection::Connection;
use crate::poller::Alarm;

/// Dials until a connection is made, or nobody waits for one. Runs on the home poller of the
/// client.
pub(super) fn dial<C: Codec>(shared: Arc<Shared<C>>, link: u32) -> impl Future<Output = ()> + Send {
    // Made here: a future that is dropped before its first poll must also tell.
    let dialing = Dialing { shared, link, is_done: false };
    async move { dialing.run().await }
}

/// Dropped before its end, where the poller has ended, this ends the client.
struct Dialing<C: Codec> {
    shared: Arc<Shared<C>>,
    link: u32,
    is_done: bool,
}

impl<C: Codec> Dialing<C> {
    async fn run(mut self) {
        let (shared, link) = (Arc::clone(&self.shared), self.link);
        while let Some(retry_ns) = shared.with(|calls, work| calls.next_dial(link, work)) {
            if retry_ns > now_ns() {
                let mut alarm = Alarm::new(&shared.home, retry_ns);
                until_ended(&shared, link, poll_fn(|cx| alarm.poll(cx))).await;
                // Calls that waited may have ended meanwhile.
                if now_ns() >= retry_ns || shared.read(|calls| calls.has_ended()) {
                    continue;
                }
                // The poller has ended.
                return;
            }
            shared.with(|calls, _| calls.count_dial());
            let dial = shared.dialer.connect_guarded(&shared.address);
            let again = match until_ended(&shared, link, dial).await {
                None => true, // `next_dial` finds that the client has ended
                Some(Err(error)) => shared.with(|calls, work| calls.dial_failed(link, error, work)),
                Some(Ok(connection)) => {
                    start(&shared, link, connection);
                    false
                }
            };
            if !again {
                break;
            }
        }
        self.is_done = true;
    }
}

impl<C: Codec> Drop for Dialing<C> {
    fn drop(&mut self) {
        if !self.is_done {
            self.shared.with(|calls, work| calls.poller_ended(Some(self.link), work));
        }
    }
}

/// Lets the connection work for its link, on its own poller.
fn start<C: Codec>(shared: &Arc<Shared<C>>, link: u32, connection: Connection) {
    let handle = connection.handle();
    // Calls have deadlines of their own, and an idle connection is no failure.
    handle.set_read_timeout(None);
    if shared.with(|calls, work| calls.connected(link, handle.clone(), work)) {
        handle.spawn_on_poller(Session::new(Arc::clone(shared), link, connection));
    }
}

/// Waits for `future`. `None`: the client has ended before.
async fn until_ended<C: Codec, T>(
    shared: &Arc<Shared<C>>,
    link: u32,
    future: impl Future<Output = T>,
) -> Option<T> {
    let mut future = pin!(future);
    poll_fn(|cx| {
        let waker = cx.waker().clone();
        if shared.with(|calls, work| calls.poll_ended(link, waker, work)) {
            return Poll::Ready(None);
        }
        future.as_mut().poll(cx).map(Some)
    })
    .await
}
