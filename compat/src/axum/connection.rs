//! One connection of a served application, from its first byte to its last.
//!
//! [`serve`] is the handler of the connection. It runs where the server's placement says.

use std::convert::Infallible;
use std::error::Error as _;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper_util::service::TowerToHyperService;
use ringpoll::{Connection, Error, Handle, Result};
use tower::{Service, ServiceExt};

use super::head::{Counted, HeadLimit, Requests};
use super::peer::Peer;
use crate::accepted::Accepted;
#[cfg(feature = "rustls")]
use crate::rustls::{Acceptor, TLS_OUTPUT_BYTES_MAX};
use crate::{HyperExecutor, HyperTimer, TokioStream};

/// How connections are served.
pub(super) struct Http {
    pub(super) versions: Versions,
    pub(super) header_timeout: Option<Duration>,
    /// `None`: the default, which is lower with TLS.
    pub(super) output_bytes_max: Option<usize>,
    pub(super) http1: Option<Change<http1::Builder>>,
    pub(super) http2: Option<Change<http2::Builder<HyperExecutor>>>,
    #[cfg(feature = "rustls")]
    pub(super) tls: Option<Acceptor>,
}

/// What the user changes in hyper's settings.
type Change<B> = Box<dyn Fn(&mut B) + Send + Sync>;

/// The versions of HTTP that are served.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Versions {
    Both,
    Http1,
    Http2,
}

/// Serves the requests of `conn` with the service that `make_service` makes for it.
pub(super) async fn serve<M, S>(
    mut conn: Connection,
    mut make_service: M,
    http: Arc<Http>,
) -> Result<()>
where
    M: Service<Peer, Response = S, Error = Infallible>,
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let handle = conn.handle();
    #[cfg(feature = "rustls")]
    if let Some(acceptor) = &http.tls {
        let Some(accepted) =
            before_shutdown(&handle, acceptor.accept(http.stream(conn, TLS_OUTPUT_BYTES_MAX)))
                .await
        else {
            return Ok(());
        };
        let stream = accepted?;
        let version = http.version_of_alpn(stream.get_ref().1.alpn_protocol());
        let mut stream = Accepted::over_tls(stream);
        if let Version::Http2 = version {
            let began = http.await_preface(&mut stream);
            match before_shutdown(&handle, began).await {
                None => return Ok(()),
                Some(Err(error)) if error.kind() == io::ErrorKind::TimedOut => return Ok(()),
                // hyper reads the same bytes, and meets the same error.
                Some(_) => {}
            }
        }
        let service = make(&mut make_service, &handle).await;
        return http.serve(stream, version, service).await;
    }
    let Some(version) = before_shutdown(&handle, http.version_of(&mut conn)).await else {
        return Ok(());
    };
    let version = match version {
        // The peer has sent no request in time.
        Err(error) if error.is_read_timeout() => return Ok(()),
        version => version?,
    };
    let service = make(&mut make_service, &handle).await;
    http.serve(Accepted::plain(http.stream(conn, TokioStream::OUTPUT_BYTES_MAX)), version, service)
        .await
}

async fn make<M, S>(make_service: &mut M, connection: &Handle) -> S
where
    M: Service<Peer, Response = S, Error = Infallible>,
{
    let Ok(ready) = make_service.ready().await;
    let Ok(service) = ready.call(Peer::new(connection)).await;
    service
}

/// The result of `future`, or `None` if the shutdown of the server begins first.
async fn before_shutdown<T>(handle: &Handle, future: impl Future<Output = T>) -> Option<T> {
    let (mut future, mut begun) = (pin!(future), handle.shutdown_begun());
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending => Pin::new(&mut begun).poll(cx).map(|()| None),
    })
    .await
}

enum Version {
    Http1,
    Http2,
}

impl Http {
    /// Offers the protocols that are served, unless the configuration of the user names some.
    #[cfg(feature = "rustls")]
    pub(super) fn offer_alpn(&mut self) {
        let protocols: &[&[u8]] = match self.versions {
            Versions::Both => &[b"h2", b"http/1.1"],
            Versions::Http1 => &[b"http/1.1"],
            Versions::Http2 => &[b"h2"],
        };
        self.tls = self.tls.take().map(|acceptor| acceptor.with_default_alpn(protocols));
    }

    #[cfg(feature = "rustls")]
    fn version_of_alpn(&self, protocol: Option<&[u8]>) -> Version {
        match (self.versions, protocol) {
            (Versions::Both, Some(b"h2")) | (Versions::Http2, _) => Version::Http2,
            _ => Version::Http1,
        }
    }

    /// Waits for the preface of HTTP/2, or for other bytes, within the limit for heads.
    #[cfg(feature = "rustls")]
    async fn await_preface(&self, stream: &mut Accepted) -> io::Result<()> {
        let handle = stream.handle().clone();
        if let Some(timeout) = self.header_timeout {
            handle.set_read_deadline(Instant::now().checked_add(timeout));
        }
        let read = stream.read_ahead(HTTP2_PREFACE).await;
        if self.header_timeout.is_some() {
            handle.set_read_deadline(None);
        }
        read
    }

    /// Looks at the first bytes, which stay unread. With HTTP/2 only, this limits the time of the
    /// preface, for which hyper has no limit.
    async fn version_of(&self, conn: &mut Connection) -> Result<Version> {
        if self.versions == Versions::Http1 {
            return Ok(Version::Http1);
        }
        if let Some(timeout) = self.header_timeout {
            conn.set_read_deadline(Instant::now().checked_add(timeout));
        }
        let mut seen = 0;
        while seen < HTTP2_PREFACE.len() {
            match conn.peek(seen + 1).await {
                Err(error) if error.is_eof() => break,
                peeked => peeked?,
            };
            seen = conn.len().min(HTTP2_PREFACE.len());
            let head = conn.try_peek(seen).expect("these bytes are buffered");
            if head != HTTP2_PREFACE[..seen] {
                seen = 0;
                break;
            }
        }
        conn.set_read_deadline(None);
        let is_http2 = self.versions == Versions::Http2 || seen == HTTP2_PREFACE.len();
        Ok(if is_http2 { Version::Http2 } else { Version::Http1 })
    }

    fn stream(&self, conn: Connection, default_output_bytes_max: usize) -> TokioStream {
        let output_bytes_max = self.output_bytes_max.unwrap_or(default_output_bytes_max);
        TokioStream::new(conn).with_output_bytes_max(output_bytes_max)
    }

    async fn serve<S>(&self, stream: Accepted, version: Version, service: S) -> Result<()>
    where
        S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        let handle = stream.handle().clone();
        let timer = HyperTimer::new(handle.clone());
        let served = match version {
            Version::Http1 => {
                let mut builder = http1::Builder::new();
                // Instead of its limit for heads there is a cheaper one. A user may set both.
                builder.timer(timer).header_read_timeout(None);
                if let Some(change) = &self.http1 {
                    change(&mut builder);
                }
                let requests = Arc::<Requests>::default();
                let limit = |timeout| HeadLimit::new(timeout, Arc::clone(&requests), &stream);
                let limit = self.header_timeout.map(limit);
                let service = Counted { service: TowerToHyperService::new(service), requests };
                let connection = builder.serve_connection(stream, service).with_upgrades();
                let shut_down = http1::UpgradeableConnection::graceful_shutdown;
                drive(connection, &handle, shut_down, limit).await
            }
            Version::Http2 => {
                let mut builder = http2::Builder::new(HyperExecutor::new(handle.clone()));
                // A WebSocket over HTTP/2 begins with an extended CONNECT (RFC 8441).
                builder.timer(timer).enable_connect_protocol();
                if let Some(change) = &self.http2 {
                    change(&mut builder);
                }
                let service = TowerToHyperService::new(
                    service.map_request(|request: hyper::Request<Incoming>| request.map(Body::new)),
                );
                let connection = builder.serve_connection(stream, service);
                drive(connection, &handle, http2::Connection::graceful_shutdown, None).await
            }
        };
        match served {
            // So end kept connections without a further request, and peers that leave.
            Err(error) if error.is_timeout() || has_left(&error) => Ok(()),
            served => served.map_err(Error::other),
        }
    }
}

/// Polls `connection` to its end or to that of `limit`, and calls `shut_down` when the shutdown of
/// the server begins.
async fn drive<C>(
    connection: C,
    handle: &Handle,
    shut_down: fn(Pin<&mut C>),
    mut limit: Option<HeadLimit>,
) -> hyper::Result<()>
where
    C: Future<Output = hyper::Result<()>>,
{
    let (mut connection, mut begun) = (pin!(connection), handle.shutdown_begun());
    let mut registered: Option<Waker> = None;
    let mut told = false;
    poll_fn(|cx| {
        // All connections share the signal, so it is polled only where its waker changes.
        let waits = registered.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        if !told && (!waits || handle.is_shutting_down()) {
            registered = Some(cx.waker().clone());
            told = Pin::new(&mut begun).poll(cx).is_ready();
            if told {
                shut_down(connection.as_mut());
            }
        }
        match (connection.as_mut().poll(cx), &mut limit) {
            // The peer has sent no request in time.
            (Poll::Pending, Some(limit)) => limit.poll(cx).map(Ok),
            (polled, _) => polled,
        }
    })
    .await
}

/// Whether the peer has closed or reset the connection before its end.
fn has_left(error: &hyper::Error) -> bool {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<io::Error>() {
            return matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::NotConnected
                    // A TLS stream that ends without notice.
                    | io::ErrorKind::UnexpectedEof
            );
        }
        source = cause.source();
    }
    error.is_incomplete_message()
}

impl Default for Http {
    fn default() -> Http {
        Http {
            versions: Versions::Both,
            header_timeout: Some(HEADER_TIMEOUT),
            output_bytes_max: None,
            http1: None,
            http2: None,
            #[cfg(feature = "rustls")]
            tls: None,
        }
    }
}

/// The first bytes of every HTTP/2 connection (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// As hyper's own default.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
