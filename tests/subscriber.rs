//! A `tracing` subscriber that panics ends no thread and no connection. The test has a file of its
//! own, because the subscriber is for the whole process.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use ringpoll::{Backend, Placement, Server};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Reached only by a test that fails.
const DEADLINE: Duration = Duration::from_secs(60);

/// The method that panics.
static PANICS: AtomicU8 = AtomicU8::new(0);

const NEW_SPAN: u8 = 1;
const ENTER: u8 = 2;
const EXIT: u8 = 3;
const CLOSE: u8 = 4;
const EVENT: u8 = 5;

struct Panicking;

impl Panicking {
    fn called(method: u8) {
        assert_ne!(PANICS.load(Ordering::SeqCst), method, "on purpose");
    }
}

impl Subscriber for Panicking {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Panicking::called(NEW_SPAN);
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        // A subscriber may call the library.
        ringpoll::capabilities();
        Panicking::called(EVENT);
    }

    fn enter(&self, _: &Id) {
        Panicking::called(ENTER);
    }

    fn exit(&self, _: &Id) {
        Panicking::called(EXIT);
    }

    fn try_close(&self, _: Id) -> bool {
        Panicking::called(CLOSE);
        true
    }
}

#[test]
fn a_subscriber_that_panics_ends_no_thread_and_no_connection() {
    tracing::subscriber::set_global_default(Panicking).expect("the first subscriber");
    let uring = ringpoll::capabilities().backend() == Backend::Uring;
    for backend in [Backend::Epoll].into_iter().chain(uring.then_some(Backend::Uring)) {
        for placement in [Placement::Inline, Placement::Auto, Placement::Pool { workers: 2 }] {
            for method in [NEW_SPAN, ENTER, EXIT, CLOSE, EVENT] {
                serves(backend, placement, method);
            }
        }
    }
}

fn serves(backend: Backend, placement: Placement, panics: u8) {
    let server = Server::builder()
        .backend(backend)
        .placement(placement)
        .pollers(1)
        .on_request(|mut conn| async move {
            // One byte is there, and the run waits for the other one.
            let order = conn.next(2).await?;
            assert_ne!(*order, *b"!!", "on purpose");
            conn.write(order)?;
            conn.flush().await
        })
        .bind("127.0.0.1:0")
        .and_then(Server::spawn)
        .expect("a server");
    let addr = server.local_addr().to_string();
    PANICS.store(panics, Ordering::SeqCst);
    let mut stays = ringpoll::blocking::connect(&addr).expect("a connection");
    for _ in 0..3 {
        let mut ends = ringpoll::blocking::connect(&addr).expect("a connection");
        ends.write(b"!!").expect("open");
        ends.flush().expect("open");
        assert_eq!(ends.readable().expect("the end"), 0);
        for byte in [b"o", b"k"] {
            stays.write(byte).expect("open");
            stays.flush().expect("open");
        }
        assert_eq!(stays.next(2).expect("an answer"), b"ok");
    }
    drop(stays);
    server.shutdown(DEADLINE).expect("nothing is busy");
    PANICS.store(0, Ordering::SeqCst);
    assert_eq!(server.stats().handler_panics, 3);
}
