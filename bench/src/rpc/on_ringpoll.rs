//! The same services on connections of ringpoll: the frameworks are those of the peers `tonic` and
//! `volo-thrift`, what carries them is `ringpoll_compat::TokioStream`. Each handler serves its
//! connection to its end, wherever it is placed; no runtime of tokio's takes part.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use futures_util::stream::{FuturesUnordered, Stream};
use hyper::rt::Executor;
use hyper::server::conn::http2::Builder;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use ringpoll::{Connection, Error, Result};
use ringpoll_compat::{TokioReadHalf, TokioStream, TokioWriteHalf};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};
use tokio::sync::Notify;
use volo::net::ext::AsyncExt;
use volo_thrift::codec::MakeCodec;
use volo_thrift::tracing::DefaultProvider;
use volo_thrift::transport::pingpong;

use super::grpc::{self, CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES, STREAMS_MAX};
use super::thrift;
use crate::service::Service;

/// gRPC: the service of tonic on hyper's HTTP/2.
pub(crate) async fn serve_grpc(connection: Connection, service: Service) -> Result<()> {
    let streams = Streams::default();
    let stream = TokioIo::new(TokioStream::from(connection));
    let mut served = pin!(
        Builder::new(streams.clone())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_concurrent_streams(STREAMS_MAX)
            .serve_connection(stream, TowerToHyperService::new(grpc::EchoServer::new(service)))
    );
    let mut running = FuturesUnordered::new();
    poll_fn(|cx| {
        loop {
            if let Poll::Ready(ended) = served.as_mut().poll(cx) {
                return Poll::Ready(ended.map_err(Error::other));
            }
            running.extend(streams.take());
            let mut is_progress = false;
            while let Poll::Ready(Some(())) = Pin::new(&mut running).poll_next(cx) {
                is_progress = true;
            }
            // What the requests have answered leaves together, before this task waits.
            if !is_progress {
                return Poll::Pending;
            }
        }
    })
    .await
}

type BoxFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The requests of one connection: hyper wants them run, and the handler does.
#[derive(Clone, Default)]
struct Streams(Arc<Mutex<Vec<BoxFuture>>>);

impl Streams {
    fn take(&self) -> Vec<BoxFuture> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, request: F) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Box::pin(request));
    }
}

/// Thrift: the loop, the codec and the service of volo-thrift.
pub(crate) async fn serve_thrift(connection: Connection, service: Service) -> Result<()> {
    let (reader, writer) = TokioStream::from(connection).into_split();
    let (encoder, decoder) =
        thrift::codec(service.frame_max).make_codec(Reader(reader), Writer(writer));
    // Nobody tells it to stop: a server that ends waits for its handlers, then cuts them.
    let stop = Notify::new();
    pingpong::serve(
        encoder,
        decoder,
        stop.notified(),
        Arc::new(AtomicBool::new(false)),
        &thrift::EchoServer(service),
        Arc::new([]),
        None,
        DefaultProvider,
    )
    .await;
    Ok(())
}

/// The halves, as volo wants them.
struct Reader(TokioReadHalf);

struct Writer(TokioWriteHalf);

impl AsyncRead for Reader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Writer {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// What volo's pool of client connections asks; a server's are in no pool.
impl AsyncExt for Reader {
    async fn ready(&self, _interest: Interest) -> io::Result<Ready> {
        Ok(Ready::READABLE)
    }
}

impl AsyncExt for Writer {
    async fn ready(&self, _interest: Interest) -> io::Result<Ready> {
        Ok(Ready::WRITABLE)
    }
}
