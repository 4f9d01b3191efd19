//! HTTP clients of hyper over sockets of tokio.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::harness::Check;

/// One connection.
pub(crate) struct Client {
    sender: Sender,
    /// Ends with the connection.
    pub(crate) driver: JoinHandle<hyper::Result<()>>,
}

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Client {
    pub(crate) async fn http1(addr: SocketAddr) -> Check<Client> {
        Client::http1_on(TcpStream::connect(addr).await?).await
    }

    pub(crate) async fn http2(addr: SocketAddr) -> Check<Client> {
        Client::http2_on(TcpStream::connect(addr).await?).await
    }

    pub(crate) async fn http1_on<T>(stream: T) -> Check<Client>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        Ok(Client { sender: Sender::Http1(sender), driver: tokio::spawn(connection) })
    }

    pub(crate) async fn http2_on<T>(stream: T) -> Check<Client>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (sender, connection) = handshake.await?;
        Ok(Client { sender: Sender::Http2(sender), driver: tokio::spawn(connection) })
    }

    /// Both kinds of clients of `addr`.
    pub(crate) async fn of_each_version(addr: SocketAddr) -> Check<[Client; 2]> {
        Ok([Client::http1(addr).await?, Client::http2(addr).await?])
    }

    pub(crate) async fn send(
        &mut self,
        method: &str,
        path: &str,
        body: Vec<u8>,
    ) -> hyper::Result<Response<hyper::body::Incoming>> {
        let request = Request::builder().method(method).header("host", "localhost");
        let path = match self.sender {
            Sender::Http1(_) => path.to_owned(),
            Sender::Http2(_) => format!("http://localhost{path}"),
        };
        let request = request.uri(path).body(Full::from(body)).expect("a valid request");
        match &mut self.sender {
            Sender::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Sender::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        }
    }

    pub(crate) async fn post(&mut self, path: &str, body: Vec<u8>) -> Check<Bytes> {
        let response = self.send("POST", path, body).await?;
        assert_eq!(response.status(), StatusCode::OK);
        Ok(response.into_body().collect().await?.to_bytes())
    }

    pub(crate) async fn get(&mut self, path: &str) -> Check<Bytes> {
        let response = self.send("GET", path, Vec::new()).await?;
        assert_eq!(response.status(), StatusCode::OK);
        Ok(response.into_body().collect().await?.to_bytes())
    }
}

/// A TLS client of `localhost` over a socket of tokio.
pub(crate) async fn tls(
    addr: SocketAddr,
    config: &Arc<ClientConfig>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(addr).await?;
    let name = "localhost".try_into().expect("a valid name");
    TlsConnector::from(Arc::clone(config)).connect(name, stream).await
}
