//! What users hold of a client: the client itself, its builder, and its calls.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::call_error::CallError;
use super::calls::{Polled, Rules};
use super::codec::Codec;
use super::shared::Shared;
use crate::address::Address;
use crate::clock::now_ns;
use crate::config::{calls, some};
use crate::dial::Dialer;
use crate::error::{Error, Result};
use crate::poller::timers::{NEVER, ns_after};
use crate::rpc::call_error::CallErrorKind;
use crate::task::waiters::Number;

/// Many callers, few connections to one server: a multiplexed client. Clones are the same client.
///
/// A call sends a request, and waits for the answer with the same number. Calls of any number of
/// tasks and threads share the connections. The requests that wait leave with one flush, and
/// answers may come in any order. The [module](super) has an example.
///
/// The work of the connections is done on their pollers. So the client needs no executor, and any
/// executor or thread may await a call.
///
/// # Connections
/// The client dials when the first call needs a connection, and a further connection, up to
/// [`connections`](ClientBuilder::connections), when all others have calls. A call goes to the
/// connection with the fewest calls.
///
/// A connection that fails, or that the server closes, ends the calls that were sent on it, at
/// once. Calls that were not sent move to another connection. Where there is none, the client dials
/// again. If the dial fails, these calls fail, unless
/// [`waits_for_server`](ClientBuilder::waits_for_server) is set. After a failed dial, and after a
/// connection that has answered no call, the next dial of this connection waits: see
/// [`backoff`](ClientBuilder::backoff). Calls that come meanwhile use another connection. Where
/// there is none, they wait for this dial.
///
/// A client without calls dials nothing.
///
/// # Bounds
/// [`outstanding_max`](ClientBuilder::outstanding_max) calls are outstanding: queued, or sent and
/// not answered. Further ones wait in line. Each outstanding call takes about 120 bytes, measured
/// with 100,000 calls. Its request takes memory until it is sent, and its answer until the caller
/// takes it. Answers without a call, such as late or repeated ones, are dropped and
/// [counted](ClientStats::discarded_answers). So a server cannot make the client use more memory
/// than its calls allow. A received answer that is a [`Slice`](crate::Slice) keeps the block in
/// which it was received.
///
/// # End
/// The client ends when its last clone and its last [`Call`] are dropped, as after
/// [`close`](Self::close).
pub struct Client<C: Codec>(Arc<Clones<C>>);

/// The clones and the calls of a client share this. It is dropped with the last of them.
struct Clones<C: Codec> {
    shared: Arc<Shared<C>>,
    call_timeout: Option<Duration>,
}

/// The settings of a [`Client`].
#[derive(Debug)]
#[must_use]
pub struct ClientBuilder<C> {
    codec: C,
    dialer: Dialer,
    call_timeout: Option<Duration>,
    lost_peer_timeout: Duration,
    rules: Rules,
}

/// Counts of a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientStats {
    /// Calls that are queued, or sent and not answered.
    pub outstanding: usize,
    /// Calls that wait until fewer are outstanding.
    pub waiting: usize,
    /// Connections at present.
    pub connections: usize,
    /// Calls that were begun.
    pub calls: u64,
    /// Answers that were passed to their calls.
    pub answers: u64,
    /// Answers without a call: late, repeated, or with an unknown number.
    pub discarded_answers: u64,
    /// Calls that have ended at their deadline.
    pub expired_calls: u64,
    /// Dials that were begun.
    pub dials: u64,
    /// Dials that have failed.
    pub failed_dials: u64,
    /// Connections that have ended before the client.
    pub lost_connections: u64,
}

impl<C: Codec> Client<C> {
    /// A builder with default settings.
    pub fn builder(codec: C) -> ClientBuilder<C> {
        ClientBuilder {
            codec,
            dialer: Dialer::new(),
            call_timeout: Some(calls::TIMEOUT),
            lost_peer_timeout: calls::LOST_PEER_TIMEOUT,
            rules: Rules {
                connections: 1,
                outstanding_max: calls::OUTSTANDING_MAX,
                waits_for_server: false,
                backoff_first: calls::BACKOFF_FIRST,
                backoff_max: calls::BACKOFF_MAX,
            },
        }
    }

    /// Sends `request` and waits for its answer, within the
    /// [call timeout](ClientBuilder::call_timeout) of the client. The time runs from now, also
    /// while the call waits in line. The call begins with the first poll.
    ///
    /// A call that is dropped ends at once. If its request was not sent, it is not sent. Otherwise
    /// the answer is dropped when it comes.
    ///
    /// # Errors
    /// See [`CallErrorKind`].
    pub fn call(&self, request: C::Out) -> Call<C> {
        self.call_until(request, self.0.call_timeout)
    }

    /// [`call`](Self::call) with a timeout of its own; zero means no limit.
    ///
    /// # Errors
    /// As for [`call`](Self::call).
    pub fn call_within(&self, request: C::Out, timeout: Duration) -> Call<C> {
        self.call_until(request, some(timeout))
    }

    /// [`call`](Self::call) that never waits in line. The call has begun when this returns.
    ///
    /// # Errors
    /// [`Full`](CallErrorKind::Full) and [`Closed`](CallErrorKind::Closed) at once; the others by
    /// the call.
    pub fn try_call(&self, request: C::Out) -> Result<Call<C>, CallError> {
        let deadline_ns = self.0.call_timeout.map_or(NEVER, ns_after);
        let begun = self
            .0
            .shared
            .with(|calls, work| calls.begin(request, deadline_ns, None, false, work))?;
        Ok(Call { client: Arc::clone(&self.0), state: CallState::Begun(begun) })
    }

    fn call_until(&self, request: C::Out, timeout: Option<Duration>) -> Call<C> {
        let deadline_ns = timeout.map_or(NEVER, ns_after);
        let state = CallState::New { request, deadline_ns };
        Call { client: Arc::clone(&self.0), state }
    }

    /// Waits until a connection is up. Dials if there is none.
    ///
    /// # Errors
    /// [`CannotConnect`](CallErrorKind::CannotConnect), with the first dial that fails meanwhile;
    /// [`Closed`](CallErrorKind::Closed).
    pub async fn ready(&self) -> Result<(), CallError> {
        let shared = &self.0.shared;
        let mut wait = Wait { shared, number: None, is_for_ready: true };
        let mut failed = None;
        poll_fn(|cx| {
            let waker = cx.waker().clone();
            let look = shared
                .with(|calls, work| calls.poll_ready(&mut wait.number, &mut failed, waker, work));
            look.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// Takes no more calls. Waits until the outstanding calls have ended, and the connections are
    /// closed. Calls that wait in line fail as [`Closed`](CallErrorKind::Closed) at once.
    ///
    /// The client stays closed if this future is dropped after its first poll.
    pub async fn close(&self) {
        let shared = &self.0.shared;
        shared.with(|calls, work| calls.drain(work));
        let mut wait = Wait { shared, number: None, is_for_ready: false };
        poll_fn(|cx| {
            let waker = cx.waker().clone();
            match shared.with(|calls, work| calls.poll_gone(&mut wait.number, waker, work)) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
    }

    /// Ends all calls as [`Closed`](CallErrorKind::Closed) and resets the connections. Does not
    /// wait.
    pub fn abort(&self) {
        self.0.shared.with(|calls, work| calls.abort(work));
    }

    /// Whether the client takes calls: neither [`close`](Self::close) nor [`abort`](Self::abort)
    /// was called, and its poller runs.
    pub fn is_open(&self) -> bool {
        self.0.shared.read(|calls| calls.is_open())
    }

    /// The counts of the client.
    pub fn stats(&self) -> ClientStats {
        self.0.shared.read(|calls| {
            let (counts, (outstanding, waiting)) = (calls.counts(), calls.loads());
            ClientStats {
                outstanding,
                waiting,
                connections: calls.up_count(),
                calls: counts.calls,
                answers: counts.answers,
                discarded_answers: counts.discarded,
                expired_calls: counts.expired,
                dials: counts.dials,
                failed_dials: counts.failed_dials,
                lost_connections: counts.lost_connections,
            }
        })
    }
}

impl<C: Codec> ClientBuilder<C> {
    /// Makes the connections. Its read timeout has no effect: calls have deadlines. Its other
    /// timeouts hold: a dial, and a server that takes no bytes, should have a limit.
    pub fn dialer(mut self, dialer: Dialer) -> Self {
        self.dialer = dialer;
        self
    }

    /// The largest number of connections at a time. The default is 1.
    pub fn connections(mut self, count: usize) -> Self {
        self.rules.connections = count;
        self
    }

    /// How many calls may be outstanding; 65,536 by default. Beyond it, calls wait in line, in
    /// their order, and [`try_call`](Client::try_call) fails.
    pub fn outstanding_max(mut self, count: usize) -> Self {
        self.rules.outstanding_max = count;
        self
    }

    /// The longest time of a call that has no timeout of its own; 30 s by default. Zero means no
    /// limit.
    pub fn call_timeout(mut self, timeout: Duration) -> Self {
        self.call_timeout = some(timeout);
        self
    }

    /// How long the host of the server may be silent until a connection fails, mostly as
    /// `ETIMEDOUT`; 20 s by default. A host that has lost its power or its network ends no
    /// connection. With this timeout, the calls on its connection fail, and the client dials
    /// again.
    ///
    /// The time starts when bytes are sent that the host does not acknowledge. TCP probes an idle
    /// connection after half of the time, and every quarter after that, in whole seconds. A server
    /// that is alive, and slow to answer, is not silent. A server that reads nothing for this time,
    /// while bytes wait for it, is treated as silent. A dial ends after this time as well.
    ///
    /// Zero leaves it to the kernel: about 15 minutes while bytes are sent, and no limit for an
    /// idle connection. The setting has no effect if the socket options of the dialer have a
    /// [`keepalive`](crate::SocketOptions::keepalive) or a
    /// [`user_timeout`](crate::SocketOptions::user_timeout).
    pub fn lost_peer_timeout(mut self, timeout: Duration) -> Self {
        self.lost_peer_timeout = timeout;
        self
    }

    /// Lets calls that were not sent wait until a connection is made, or their deadline comes. A
    /// dial that fails because its settings are invalid ends them. The default is `false`: every
    /// dial that fails ends the calls that wait for it.
    pub fn waits_for_server(mut self, wait: bool) -> Self {
        self.rules.waits_for_server = wait;
        self
    }

    /// The pause before a dial that follows a failed one is a random part of `first`. The time
    /// doubles with each failure, up to `max`. The defaults are 20 ms and 1 s.
    pub fn backoff(mut self, first: Duration, max: Duration) -> Self {
        (self.rules.backoff_first, self.rules.backoff_max) = (first, max);
        self
    }

    /// Makes a client of the server at `address` (see [`Address`]). Does not dial: the first call
    /// does, or [`Client::ready`].
    ///
    /// # Errors
    /// Invalid address or settings. An error of the kernel, if no poller can be started.
    pub fn connect(self, address: &str) -> Result<Client<C>> {
        let _: Address = address.parse()?;
        let rules = self.rules;
        if !(1..=calls::CONNECTIONS_MAX).contains(&rules.connections) {
            return Err(Error::invalid(format!(
                "connections: {} are not between 1 and {}",
                rules.connections,
                calls::CONNECTIONS_MAX
            )));
        }
        if rules.outstanding_max == 0 {
            return Err(Error::invalid("outstanding_max must not be 0"));
        }
        let dialer = self.dialer.or_lost_after(self.lost_peer_timeout);
        let home = dialer.remote()?;
        let shared = Shared::new(self.codec, dialer, address.to_owned(), home, rules);
        let clones = Clones { shared: Arc::new(shared), call_timeout: self.call_timeout };
        Ok(Client(Arc::new(clones)))
    }
}

/// A call, made by [`Client::call`]. Dropping it ends the call.
#[must_use = "a call begins when it is polled"]
pub struct Call<C: Codec> {
    /// Keeps the client open: a call may begin after its client was dropped.
    client: Arc<Clones<C>>,
    state: CallState<C>,
}

enum CallState<C: Codec> {
    New {
        request: C::Out,
        deadline_ns: u64,
    },
    /// The index in the table of calls.
    Begun(u32),
    Ended,
}

// Nothing in it is pinned.
impl<C: Codec> Unpin for Call<C> {}

impl<C: Codec> Future for Call<C> {
    type Output = Result<C::In, CallError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let index = match std::mem::replace(&mut this.state, CallState::Ended) {
            CallState::New { request, deadline_ns } => {
                return this.begin(request, deadline_ns, cx);
            }
            CallState::Begun(index) => index,
            CallState::Ended => panic!("a call was polled after it was ready"),
        };
        let (waker, mut clone) = (cx.waker(), None);
        loop {
            let shared = &this.client.shared;
            match shared.with(|calls, work| calls.poll(index, waker, &mut clone, work)) {
                Polled::Done(result) => return Poll::Ready(result),
                Polled::Waits => {
                    this.state = CallState::Begun(index);
                    return Poll::Pending;
                }
                Polled::NeedsWaker => {
                    // A clone that panics must find the call begun.
                    this.state = CallState::Begun(index);
                    clone = Some(waker.clone());
                }
            }
        }
    }
}

impl<C: Codec> Call<C> {
    fn begin(
        &mut self,
        request: C::Out,
        deadline_ns: u64,
        cx: &Context<'_>,
    ) -> Poll<Result<C::In, CallError>> {
        if deadline_ns != NEVER && now_ns() >= deadline_ns {
            return Poll::Ready(Err(CallError::unsent(CallErrorKind::Deadline, None)));
        }
        let waker = Some(cx.waker().clone());
        let shared = &self.client.shared;
        let begun = shared.with(|calls, work| calls.begin(request, deadline_ns, waker, true, work));
        match begun {
            Ok(index) => {
                self.state = CallState::Begun(index);
                Poll::Pending
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}

impl<C: Codec> Drop for Call<C> {
    fn drop(&mut self) {
        if let CallState::Begun(index) = self.state {
            self.client.shared.with(|calls, work| calls.cancel(index, work));
        }
    }
}

/// A registered waker of [`Client::ready`] or [`Client::close`]. Dropping this removes it.
struct Wait<'a, C: Codec> {
    shared: &'a Arc<Shared<C>>,
    number: Number,
    is_for_ready: bool,
}

impl<C: Codec> Drop for Wait<'_, C> {
    fn drop(&mut self) {
        let number = self.number;
        self.shared.with(|calls, work| match self.is_for_ready {
            true => calls.forget_ready(number, work),
            false => calls.forget_closer(number, work),
        });
    }
}

impl<C: Codec> Clone for Client<C> {
    fn clone(&self) -> Client<C> {
        Client(Arc::clone(&self.0))
    }
}

impl<C: Codec> Drop for Clones<C> {
    fn drop(&mut self) {
        self.shared.with(|calls, work| calls.drain(work));
    }
}

impl<C: Codec> fmt::Debug for Client<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("address", &self.0.shared.address)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl<C: Codec> fmt::Debug for Call<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").finish_non_exhaustive()
    }
}
