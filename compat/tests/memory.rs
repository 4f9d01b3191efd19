//! Memory of a served application while many clients read nothing, and after they have left.
//!
//! Its cases run one after the other in a process of their own, because they look at the resident
//! memory of the process. `RINGPOLL_CLIENTS` sets how many clients there are; each takes two file
//! descriptors. On a host without io_uring its cases are skipped with a printed reason; with
//! `REQUIRE_ALL_BACKENDS=1` they fail.

use std::convert::Infallible;
use std::error::Error;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::routing::get;
use futures_util::StreamExt;
use ringpoll::{Backend, Handle, ServerHandle};
use ringpoll_compat::axum::serve;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

type Check<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

const BODY_BYTES: usize = 64 << 20;
const PIECE_BYTES: usize = 32 << 10;

/// A bound on what one client may cost: the bytes that its stream keeps, its request, its tasks
/// and the buffers of hyper.
const CLIENT_BYTES_MAX: usize = 300 << 10;

/// What may stay resident after the default number of clients: arenas of the allocator, and buffers
/// that are kept for reuse.
const KEPT_BYTES_MAX: usize = 16 << 20;

/// Reached only by a case that fails.
const DEADLINE: Duration = Duration::from_secs(120);

/// How long memory may take to come back.
const RETURN_DEADLINE: Duration = Duration::from_secs(10);

#[test]
fn epoll_answers_from_one_body_cost_a_bounded_amount() {
    run(Backend::Epoll, "/whole");
}

#[test]
fn epoll_streamed_answers_cost_a_bounded_amount() {
    run(Backend::Epoll, "/streamed");
}

#[test]
fn uring_answers_from_one_body_cost_a_bounded_amount() {
    run(Backend::Uring, "/whole");
}

#[test]
fn uring_streamed_answers_cost_a_bounded_amount() {
    run(Backend::Uring, "/streamed");
}

fn run(backend: Backend, path: &'static str) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let capabilities = ringpoll::capabilities();
    if backend == Backend::Uring && capabilities.backend() != Backend::Uring {
        let must = std::env::var_os("REQUIRE_ALL_BACKENDS").is_some_and(|value| value == "1");
        let reason = format!("{path}: no {backend}: {}", capabilities.reason);
        assert!(!must, "required: {reason}");
        // Written past the capture of output, so it is visible for a passing test as well.
        return writeln!(std::io::stderr(), "skipped {reason}").expect("there is an error stream");
    }
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().expect("threads can be started");
    let done = runtime.block_on(async {
        tokio::time::timeout(DEADLINE, stalls(backend, path)).await.expect("ends in time")
    });
    if let Err(error) = done {
        panic!("{error}");
    }
}

async fn stalls(backend: Backend, path: &str) -> Check {
    let count = std::env::var("RINGPOLL_CLIENTS").map_or(Ok(200), |text| text.parse::<usize>())?;
    let known = Arc::new(Mutex::new(Vec::<Handle>::new()));
    let knows = Arc::clone(&known);
    let bound = serve("127.0.0.1:0", app())
        .backend(backend)
        .server(|server| {
            server.pollers(1).on_prepare(move |conn| {
                knows.lock().expect("no panic").push(conn.clone());
                Ok(())
            })
        })
        .bind()?;
    let addr = bound.local_addr().as_inet().expect("a TCP address");
    let server = bound.handle();
    let served = tokio::spawn(bound.into_future());

    // A first client pays for what every program has once.
    drop(stalled(addr, path).await?);
    wait_until(|| is_empty(&server)).await;
    known.lock().expect("no panic").clear();
    let before = resident_bytes()?;

    let mut clients = Vec::with_capacity(count);
    for _ in 0..count {
        clients.push(stalled(addr, path).await?);
    }
    settle(&known, count).await;
    let stats = server.stats();
    assert_eq!(stats.open, count as u64, "{stats:?}");
    let blocks = stats.pollers.block_bytes as usize / count;
    let resident = resident_bytes()?.saturating_sub(before);
    let of_each = resident / count;
    assert!(blocks <= CLIENT_BYTES_MAX, "{blocks} bytes of blocks for each client");
    assert!(of_each <= CLIENT_BYTES_MAX, "{of_each} bytes resident for each client");

    drop(clients);
    known.lock().expect("no panic").clear();
    wait_until(|| is_empty(&server)).await;
    let begun = Instant::now();
    let kept = loop {
        let kept = resident_bytes()?.saturating_sub(before);
        if kept <= KEPT_BYTES_MAX || begun.elapsed() > RETURN_DEADLINE {
            break kept;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    println!(
        "{backend} {path}: {count} clients, each {} KiB of blocks, {} KiB resident; \
         {} KiB in all stay resident of {}",
        blocks >> 10,
        of_each >> 10,
        kept >> 10,
        resident >> 10,
    );
    assert!(kept <= KEPT_BYTES_MAX, "{kept} bytes stay resident of {resident}");
    tokio::task::spawn_blocking(move || server.shutdown(DEADLINE)).await??;
    Ok(served.await??)
}

fn app() -> Router {
    static PIECE: [u8; PIECE_BYTES] = [b'x'; PIECE_BYTES];
    let body = Bytes::from(vec![b'x'; BODY_BYTES]);
    let streamed = || async {
        let pieces = futures_util::stream::iter(0..BODY_BYTES / PIECE_BYTES);
        // hyper queues up to 408 KiB of pieces. Their memory is that of the application, which here
        // has one piece for all.
        Body::from_stream(pieces.map(|_| Ok::<_, Infallible>(Bytes::from_static(&PIECE))))
    };
    Router::new()
        .route("/whole", get(move || std::future::ready(body.clone())))
        .route("/streamed", get(streamed))
}

/// A client with a small receive buffer that has sent its request, has seen the answer begin, and
/// reads nothing more.
async fn stalled(addr: SocketAddr, path: &str) -> Check<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4 << 10)?;
    let mut stream = socket.connect(addr).await?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await?;
    let mut begin = [0; 15];
    stream.read_exact(&mut begin).await?;
    assert_eq!(&begin, b"HTTP/1.1 200 OK");
    Ok(stream)
}

/// Returns once no byte has moved between many looks, and every connection has bytes unsent.
async fn settle(known: &Mutex<Vec<Handle>>, count: usize) {
    let (mut last, mut same) = (0, 0);
    while same < 20 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        let known = known.lock().expect("no panic");
        assert_eq!(known.len(), count);
        let all_wait = known.iter().all(|conn| conn.stats().unsent_bytes > 0);
        let sent = known.iter().map(|conn| conn.stats().sent_bytes).sum::<u64>();
        same = if all_wait && sent == last { same + 1 } else { 0 };
        last = sent;
    }
}

fn is_empty(server: &ServerHandle) -> bool {
    let stats = server.stats();
    (stats.open, stats.pollers.blocks) == (0, 0)
}

async fn wait_until(mut is_so: impl FnMut() -> bool) {
    while !is_so() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// The resident memory of this process.
fn resident_bytes() -> Check<usize> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS")?;
    let kib = line.split_whitespace().nth(1).ok_or("no value")?;
    Ok(kib.parse::<usize>()? << 10)
}
