//! The spans of runs. They have a file of their own, because the subscriber is for the whole
//! process.

use std::cell::Cell;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ringpoll::{Backend, Placement, Server};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Reached only by a test that fails.
const DEADLINE: Duration = Duration::from_secs(60);

static BEGUN: Mutex<Vec<Text>> = Mutex::new(Vec::new());
static CLOSED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// How many spans this thread is in.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Keeps the name and the fields of each span.
struct Keeps;

/// A span as text.
#[derive(Clone)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.push_str(&format!(" {field}={value:?}"));
    }
}

impl Subscriber for Keeps {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span()
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let mut text = Text(attributes.metadata().name().to_owned());
        attributes.record(&mut text);
        let mut begun = BEGUN.lock().expect("no panic");
        begun.push(text);
        Id::from_u64(begun.len() as u64)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, _: &Id) {
        DEPTH.set(DEPTH.get() + 1);
    }

    fn exit(&self, _: &Id) {
        DEPTH.set(DEPTH.get() - 1);
    }

    fn try_close(&self, _: Id) -> bool {
        CLOSED.fetch_add(1, Ordering::SeqCst);
        true
    }
}

#[test]
fn every_poll_of_a_run_is_inside_the_span_of_its_connection() {
    tracing::subscriber::set_global_default(Keeps).expect("the first subscriber");
    let uring = ringpoll::capabilities().backend() == Backend::Uring;
    let backends = [Backend::Epoll].into_iter().chain(uring.then_some(Backend::Uring));
    for backend in backends {
        for placement in [Placement::Inline, Placement::Pool { workers: 2 }] {
            one_run(backend, placement);
        }
    }
}

fn one_run(backend: Backend, placement: Placement) {
    let before = BEGUN.lock().expect("no panic").len();
    let server = Server::builder()
        .backend(backend)
        .placement(placement)
        .pollers(1)
        .on_connect(|mut conn| async move {
            let at_first = DEPTH.get() as u8;
            let mut depths = conn.next(2).await?.to_vec();
            depths.extend([at_first, DEPTH.get() as u8]);
            conn.write_copy(&depths)?;
            conn.flush().await?;
            conn.write_copy(&[DEPTH.get() as u8])?;
            conn.flush().await?;
            // The span of a run is closed when the run has panicked as well.
            panic!("expected");
        })
        .bind("127.0.0.1:0")
        .and_then(Server::spawn)
        .expect("a server");
    let addr = server.local_addr().to_string();
    let mut conn = ringpoll::blocking::connect(&addr).expect("a connection");
    let local = conn.local_addr().expect("open").to_string();
    conn.write(b"hi").expect("open");
    conn.flush().expect("open");
    assert_eq!(conn.next(5).expect("an answer"), b"hi\x01\x01\x01", "a poll was not in one span");
    assert_eq!(conn.readable().expect("the end"), 0);
    wait_until(|| server.stats().open == 0);
    let begun = BEGUN.lock().expect("no panic")[before..].to_vec();
    assert_eq!(begun.len(), 1, "one run");
    let span = &begun[0].0;
    assert!(span.starts_with("handler") && span.contains(&format!("peer={local}")), "{span}");
    assert!(span.contains("id="), "{span}");
    wait_until(|| CLOSED.load(Ordering::SeqCst) == before as u64 + 1);
    assert_eq!(server.stats().handler_panics, 1);
    assert_eq!(DEPTH.get(), 0);
    server.shutdown(DEADLINE).expect("nothing is busy");
}

fn wait_until(mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < DEADLINE, "in time");
        std::thread::yield_now();
    }
}
