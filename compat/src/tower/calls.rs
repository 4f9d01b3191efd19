//! A multiplexed client as a service.

use std::fmt;
use std::task::{Context, Poll};

use ringpoll::rpc::{Call, CallError, Client, Codec};
use tower::Service;

/// A [`rpc::Client`](Client) as a [`Service`] from request to answer. Clones are the same client.
///
/// It is always ready: a call over the
/// [bound](ringpoll::rpc::ClientBuilder::outstanding_max) of the client waits in line. A layer that
/// limits concurrency makes it wait before it is called.
///
/// [`CallError::may_have_been_executed`] tells a policy of `tower::retry` whether a failed request
/// may be repeated.
///
/// ```
/// use ringpoll::rpc::{Client, LengthPrefixed, serve_calls};
/// use ringpoll::{Handle, Result, Server, Slice};
/// use ringpoll_compat::tower::CallService;
/// use tower::{ServiceBuilder, ServiceExt};
///
/// async fn shout(request: Slice, _: Handle) -> Result<Slice> {
///     Ok(Slice::from(request.to_ascii_uppercase()))
/// }
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
/// let server = Server::builder()
///     .on_connect(serve_calls(LengthPrefixed::new(), shout))
///     .bind("127.0.0.1:0")?
///     .spawn()?;
/// let client =
///     Client::builder(LengthPrefixed::new()).connect(&server.local_addr().to_string())?;
///
/// let service = ServiceBuilder::new().concurrency_limit(100).service(CallService::new(client));
/// assert_eq!(service.oneshot(Slice::from("hello")).await?, "HELLO");
/// # Ok(())
/// # }
/// ```
pub struct CallService<C: Codec>(Client<C>);

impl<C: Codec> CallService<C> {
    /// The service that calls with `client`.
    pub fn new(client: Client<C>) -> CallService<C> {
        CallService(client)
    }

    /// The client, for its counts and its end.
    pub fn client(&self) -> &Client<C> {
        &self.0
    }
}

impl<C: Codec> Service<C::Out> for CallService<C> {
    type Response = C::In;
    type Error = CallError;
    type Future = Call<C>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), CallError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: C::Out) -> Call<C> {
        self.0.call(request)
    }
}

impl<C: Codec> Clone for CallService<C> {
    fn clone(&self) -> CallService<C> {
        CallService(self.0.clone())
    }
}

impl<C: Codec> fmt::Debug for CallService<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CallService").field(&self.0).finish()
    }
}
