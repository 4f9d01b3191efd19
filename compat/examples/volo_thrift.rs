// cargo run --release -p ringpoll-compat --example volo_thrift
//! A Thrift service and its client, with volo-thrift over ringpoll connections. The program ends by
//! itself.
//!
//! `RingpollTransport` gives a client of volo its connections. `serve` is the server's loop for one
//! connection: volo decodes, calls the service and encodes, on the bytes that ringpoll receives and
//! sends. Messages are `Bytes`, the encoded structs as they are; programs have generated types in
//! their place.

use std::error::Error as StdError;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use ringpoll::{Connection, Dialer, Handle, Result, Server};
use ringpoll_compat::{TokioReadHalf, TokioStream, TokioWriteHalf};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};
use tokio::sync::Notify;
use volo::client::MkClient;
use volo::net::Address;
use volo::net::dial::MakeTransport;
use volo::net::ext::AsyncExt;
use volo::service::Service;
use volo_thrift::client::{Client, ClientBuilder};
use volo_thrift::codec::{DefaultMakeCodec, MakeCodec};
use volo_thrift::context::ServerContext;
use volo_thrift::tracing::DefaultProvider;
use volo_thrift::transport::pingpong;
use volo_thrift::{ApplicationException, ApplicationExceptionKind, ServerError};

const CALLS: u32 = 1000;

#[tokio::main]
async fn main() -> std::result::Result<(), Box<dyn StdError>> {
    let server = Server::builder().on_connect(serve).bind("127.0.0.1:0")?.spawn()?;
    let addr = server.local_addr().as_inet().expect("it was bound to one");

    let client = ClientBuilder::new("greeter", Plain)
        .make_transport(RingpollTransport::default())
        .address(Address::from(addr))
        .build();
    for number in 0..CALLS {
        let name = format!("caller {number}");
        // Code that volo generates does these three lines.
        let mut context = client.make_cx("greet", false);
        let answer: Option<Bytes> = client.call(&mut context, arguments(&name)).await?;
        let greeting = answer.as_deref().and_then(text).ok_or("an answer of another form")?;
        assert_eq!(greeting, format!("hello, {name}"));
    }
    println!("{CALLS} calls over {} connections", server.stats().accepted);
    drop(client);
    server.shutdown_async(Duration::from_secs(5)).await?;
    Ok(())
}

// ---- server ----

/// Serves the calls of a connection, one after the other, until the client closes it or the
/// shutdown of the server begins.
async fn serve(conn: Connection) -> Result<()> {
    let begun = conn.handle().shutdown_begun();
    let peer = conn.peer_addr().as_inet().map(Address::from);
    let (reader, writer) = halves(conn);
    let (encoder, decoder) = DefaultMakeCodec::default().make_codec(reader, writer);

    // volo ends a connection at a notification, between two calls.
    let ends = Notify::new();
    let calls = pingpong::serve(
        encoder,
        decoder,
        ends.notified(),
        Arc::new(AtomicBool::new(false)),
        &Greeter,
        Arc::from([]),
        peer,
        DefaultProvider,
    );
    let told = async {
        begun.await;
        ends.notify_waiters();
        std::future::pending().await
    };
    tokio::select! {
        () = calls => Ok(()),
        never = told => never,
    }
}

/// Answers a name with a greeting.
struct Greeter;

impl Service<ServerContext, Bytes> for Greeter {
    type Response = Bytes;
    type Error = ServerError;

    async fn call(
        &self,
        _context: &mut ServerContext,
        request: Bytes,
    ) -> std::result::Result<Bytes, ServerError> {
        let Some(name) = text(&request) else {
            let kind = ApplicationExceptionKind::PROTOCOL_ERROR;
            return Err(ApplicationException::new(kind, "the argument is no string").into());
        };
        Ok(reply(&format!("hello, {name}")))
    }
}

// ---- client ----

/// Connections of ringpoll for clients of volo, which keep them in a pool of their own.
#[derive(Clone, Default)]
struct RingpollTransport {
    dialer: Dialer,
}

impl MakeTransport for RingpollTransport {
    type ReadHalf = Half<TokioReadHalf>;
    type WriteHalf = Half<TokioWriteHalf>;

    async fn make_transport(&self, addr: Address) -> io::Result<(Self::ReadHalf, Self::WriteHalf)> {
        Ok(halves(self.dialer.connect(&addr.to_string()).await?))
    }

    fn set_connect_timeout(&mut self, timeout: Option<Duration>) {
        self.dialer = self.dialer.clone().timeout(timeout.unwrap_or_default());
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.dialer = self.dialer.clone().read_timeout(timeout.unwrap_or_default());
    }

    fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.dialer = self.dialer.clone().write_timeout(timeout.unwrap_or_default());
    }
}

/// The client as it is. Generated code makes a client with the methods of its service.
struct Plain;

impl<S> MkClient<Client<S>> for Plain {
    type Target = Client<S>;

    fn mk_client(&self, service: Client<S>) -> Client<S> {
        service
    }
}

// ---- connections ----

/// Half of a connection, with the trait by which volo asks whether a kept connection is alive.
struct Half<T> {
    io: T,
    handle: Handle,
}

fn halves(conn: Connection) -> (Half<TokioReadHalf>, Half<TokioWriteHalf>) {
    let handle = conn.handle();
    let (reader, writer) = TokioStream::new(conn).into_split();
    (Half { io: reader, handle: handle.clone() }, Half { io: writer, handle })
}

impl<T: Sync> AsyncExt for Half<T> {
    async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        Ok(match self.handle.is_active() {
            true if interest.is_writable() => Ready::READABLE | Ready::WRITABLE,
            true => Ready::READABLE,
            false => Ready::READ_CLOSED,
        })
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Half<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Half<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

// ---- messages: what is generated from `service Greeter { string greet(1: string name) }` ----

/// The struct of the arguments, whose field 1 is the name.
fn arguments(name: &str) -> Bytes {
    with_text(1, name)
}

/// The struct of the result, whose field 0 is the returned value.
fn reply(greeting: &str) -> Bytes {
    with_text(0, greeting)
}

/// A struct with one field, a string, in the binary protocol.
fn with_text(field: u16, text: &str) -> Bytes {
    let length = u32::try_from(text.len()).expect("a short text");
    let mut message = vec![STRING];
    message.extend_from_slice(&field.to_be_bytes());
    message.extend_from_slice(&length.to_be_bytes());
    message.extend_from_slice(text.as_bytes());
    message.push(STOP);
    message.into()
}

/// The text of a struct that [`with_text`] has made.
fn text(message: &[u8]) -> Option<&str> {
    let (head, rest) = message.split_at_checked(7)?;
    let (&end, text) = rest.split_last()?;
    let length = u32::from_be_bytes(head[3..].try_into().ok()?) as usize;
    let is_whole = head[0] == STRING && length == text.len() && end == STOP;
    std::str::from_utf8(text).ok().filter(|_| is_whole)
}

const STRING: u8 = 11;
const STOP: u8 = 0;
