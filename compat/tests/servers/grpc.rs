//! Services of tonic, called through channels of tonic.

use std::net::SocketAddr;
use std::time::Duration;

use ringpoll::{Backend, Dialer, Pollers};
use ringpoll_compat::rustls::Connector as TlsConnector;
use ringpoll_compat::tonic::{Connector, Incoming, serve};
use tokio::sync::oneshot;
use tokio_stream::{Stream, StreamExt, iter};
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::apps::ANY;
use crate::greeter::{Greeter, GreeterClient, GreeterServer, Greeting, Greetings, Hello};
use crate::harness::{Check, Identity, Served, wait_until};

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, grpc:
            all_kinds_of_calls_work_with_channels_over_tokio_and_ringpoll
            the_server_of_tonic_takes_incoming_connections
            calls_work_over_tls
            a_graceful_end_completes_streams_that_have_begun
            a_method_that_panics_fails_its_own_call
        }
    };
}
pub(crate) use cases;

struct Polite;

fn greeting(name: &str) -> Greeting {
    Greeting { text: format!("hello, {name}") }
}

fn greetings(stream: impl Stream<Item = Result<Greeting, Status>> + Send + 'static) -> Greetings {
    Box::pin(stream)
}

#[tonic::async_trait]
impl Greeter for Polite {
    async fn greet(&self, request: Request<Hello>) -> Result<Response<Greeting>, Status> {
        let name = &request.get_ref().name;
        match name.as_str() {
            "" => Err(Status::invalid_argument("no name")),
            "me" => {
                let peer = request.remote_addr().expect("a TCP peer");
                Ok(Response::new(Greeting { text: peer.to_string() }))
            }
            "panic" => panic!("this method panics"),
            name => {
                tokio::time::sleep(Duration::from_millis(1)).await;
                Ok(Response::new(greeting(name)))
            }
        }
    }

    async fn greet_often(&self, request: Request<Hello>) -> Result<Response<Greetings>, Status> {
        let greeting = greeting(&request.get_ref().name);
        Ok(Response::new(greetings(iter(vec![Ok(greeting); 100]))))
    }

    async fn greet_all(
        &self,
        request: Request<Streaming<Hello>>,
    ) -> Result<Response<Greeting>, Status> {
        let mut hellos = request.into_inner();
        let mut count = 0;
        while let Some(_hello) = hellos.message().await? {
            count += 1;
        }
        Ok(Response::new(greeting(&format!("{count} of you"))))
    }

    async fn greet_each(
        &self,
        request: Request<Streaming<Hello>>,
    ) -> Result<Response<Greetings>, Status> {
        let stream = request.into_inner().map(|hello| hello.map(|hello| greeting(&hello.name)));
        Ok(Response::new(greetings(stream)))
    }
}

fn routes() -> Routes {
    Routes::new(GreeterServer::new(Polite))
}

fn endpoint(scheme: &str, addr: SocketAddr) -> Check<Endpoint> {
    Ok(Endpoint::from_shared(format!("{scheme}://localhost:{}", addr.port()))?)
}

fn hello(name: &str) -> Hello {
    Hello { name: name.to_owned() }
}

async fn makes_all_kinds_of_calls(channel: Channel) -> Check {
    let mut client = GreeterClient::new(channel);
    assert_eq!(client.greet(hello("you")).await?.into_inner().text, "hello, you");
    let large = "x".repeat(1 << 20);
    let text = client.greet(hello(&large)).await?.into_inner().text;
    assert!(text.ends_with(&large), "{} bytes", text.len());
    let refused = client.greet(hello("")).await.expect_err("refused");
    assert_eq!((refused.code(), refused.message()), (Code::InvalidArgument, "no name"));

    let mut stream = client.greet_often(hello("you")).await?.into_inner();
    let mut count = 0;
    while let Some(greeting) = stream.message().await? {
        assert_eq!(greeting.text, "hello, you");
        count += 1;
    }
    assert_eq!(count, 100);

    let hellos = iter((0..1000).map(|index| hello(&index.to_string())));
    assert_eq!(client.greet_all(hellos).await?.into_inner().text, "hello, 1000 of you");

    let (send, receive) = tokio::sync::mpsc::channel::<Hello>(1);
    let hellos = Box::pin(futures_util::stream::unfold(receive, |mut receive| async move {
        Some((receive.recv().await?, receive))
    }));
    let mut stream = client.greet_each(hellos).await?.into_inner();
    for index in 0..100 {
        send.send(hello(&index.to_string())).await?;
        let answer = stream.message().await?.ok_or("the stream has ended")?;
        assert_eq!(answer.text, format!("hello, {index}"));
    }
    drop(send);
    assert_eq!(stream.message().await?, None);
    Ok(())
}

/// A channel on pollers of its own, which end with the case.
async fn channel(backend: Backend, addr: SocketAddr) -> Check<(Channel, Pollers)> {
    let pollers = Pollers::builder().backend(backend).count(1).build()?;
    let connector = Connector::new(Dialer::new().pollers(pollers.clone()));
    Ok((endpoint("http", addr)?.connect_with_connector(connector).await?, pollers))
}

pub(crate) async fn all_kinds_of_calls_work_with_channels_over_tokio_and_ringpoll(
    backend: Backend,
) -> Check {
    let served = Served::new(backend, serve(ANY, routes()))?;
    let over_tokio = endpoint("http", served.addr)?.connect().await?;
    makes_all_kinds_of_calls(over_tokio.clone()).await?;
    let peer = GreeterClient::new(over_tokio).greet(hello("me")).await?.into_inner().text;
    assert!(peer.starts_with("127.0.0.1:"), "{peer}");

    let (over_ringpoll, pollers) = channel(backend, served.addr).await?;
    makes_all_kinds_of_calls(over_ringpoll).await?;
    served.end().await?;
    Ok(tokio::task::spawn_blocking(move || pollers.shutdown()).await??)
}

pub(crate) async fn the_server_of_tonic_takes_incoming_connections(backend: Backend) -> Check {
    let incoming = Incoming::builder().server(|server| server.backend(backend).pollers(1));
    let incoming = incoming.bind(ANY)?;
    let (addr, handle) = (incoming.local_addr().as_inet().expect("TCP"), incoming.handle());
    let (stop, stopped) = oneshot::channel::<()>();
    let server = Server::builder().add_routes(routes());
    let server = server.serve_with_incoming_shutdown(incoming, async { drop(stopped.await) });
    let server = tokio::spawn(server);
    let over_tokio = endpoint("http", addr)?.connect().await?;
    makes_all_kinds_of_calls(over_tokio.clone()).await?;
    let peer = GreeterClient::new(over_tokio).greet(hello("me")).await?.into_inner().text;
    assert!(peer.starts_with("127.0.0.1:"), "{peer}");
    let (over_ringpoll, pollers) = channel(backend, addr).await?;
    makes_all_kinds_of_calls(over_ringpoll).await?;
    drop(stop);
    server.await??;
    wait_until(|| handle.stats().open == 0).await;
    Ok(tokio::task::spawn_blocking(move || pollers.shutdown()).await??)
}

pub(crate) async fn calls_work_over_tls(backend: Backend) -> Check {
    let identity = Identity::new()?;
    let served = Served::new(backend, serve(ANY, routes()).rustls(identity.server()?))?;
    let connector = TlsConnector::new(identity.client(&["h2"])?);
    let endpoint = endpoint("https", served.addr)?;
    makes_all_kinds_of_calls(endpoint.connect_with_connector(connector).await?).await?;
    served.end().await?;

    let incoming = Incoming::builder().server(|server| server.backend(backend).pollers(1));
    let mut config = identity.server()?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let incoming = incoming.rustls(config).bind(ANY)?;
    let addr = incoming.local_addr().as_inet().expect("TCP");
    let server = Server::builder().add_routes(routes()).serve_with_incoming(incoming);
    let server = tokio::spawn(server);
    let connector = TlsConnector::new(identity.client(&["h2"])?);
    let endpoint = self::endpoint("https", addr)?;
    makes_all_kinds_of_calls(endpoint.connect_with_connector(connector).await?).await?;
    server.abort();
    Ok(())
}

pub(crate) async fn a_graceful_end_completes_streams_that_have_begun(backend: Backend) -> Check {
    let served = Served::new(backend, serve(ANY, routes()))?;
    let server = served.server.clone();
    let mut client = GreeterClient::new(endpoint("http", served.addr)?.connect().await?);
    let (send, receive) = tokio::sync::mpsc::channel::<Hello>(1);
    let hellos = Box::pin(futures_util::stream::unfold(receive, |mut receive| async move {
        Some((receive.recv().await?, receive))
    }));
    let mut stream = client.greet_each(hellos).await?.into_inner();
    send.send(hello("first")).await?;
    assert_eq!(stream.message().await?, Some(greeting("first")));

    let ended = served.stop();
    wait_until(|| server.is_shutting_down()).await;
    for _ in 0..10 {
        send.send(hello("last")).await?;
        assert_eq!(stream.message().await?, Some(greeting("last")));
    }
    assert!(!ended.is_finished(), "it waits for the stream");
    drop(send);
    assert_eq!(stream.message().await?, None);
    ended.await??;
    assert_eq!(server.stats().cut, 0);
    Ok(())
}

pub(crate) async fn a_method_that_panics_fails_its_own_call(backend: Backend) -> Check {
    let served = Served::new(backend, serve(ANY, routes()))?;
    let mut client = GreeterClient::new(endpoint("http", served.addr)?.connect().await?);
    client.greet(hello("panic")).await.expect_err("its stream was reset");
    assert_eq!(client.greet(hello("you")).await?.into_inner(), greeting("you"));
    assert_eq!(served.server.stats().accepted, 1, "on the same connection");
    wait_until(|| served.server.stats().handler_panics == 1).await;
    drop(client);
    served.stop().await??;
    Ok(())
}
