//! The server of calls, with the client of calls: every call has its own answer, limits hold, and
//! nothing that a handler does reaches another connection.

use std::collections::BTreeSet;
use std::io::Write;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use ringpoll::rpc::{
    CallErrorKind, CallLimits, Client, FramedThrift, LengthPrefixed, serve_calls,
    serve_calls_within,
};
use ringpoll::{Error, Handle, Result, ServerHandle, Slice};
use tokio::sync::Semaphore;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, rpc_serving:
            ten_thousand_calls_in_any_order_have_their_own_answers
            a_request_that_waits_does_not_hold_up_others
            long_messages_are_whole
            a_connection_and_a_server_run_no_more_requests_than_allowed
            a_client_that_does_not_read_begins_no_more_requests
            an_error_of_a_handler_is_reported_and_closes_its_connection
            a_panic_of_a_handler_closes_its_connection_alone
            thrift_clients_get_failures_as_exceptions
            a_shutdown_answers_the_running_requests
            the_end_of_the_stream_leaves_no_request_without_an_answer
            a_bad_frame_closes_the_connection_after_the_answers
            a_read_deadline_that_has_passed_does_not_stop_a_running_request
            the_read_timeout_begins_anew_when_no_request_runs
            a_client_that_does_not_read_holds_no_place_in_total
            a_client_that_does_not_read_leaves_the_line_for_a_place
            a_client_that_has_gone_holds_no_place_in_total
            a_future_whose_destructor_panics_is_answered
        }
    };
}
pub(crate) use cases;

type Plain = Client<LengthPrefixed>;

/// What a server has reported.
type Reported = Arc<Mutex<Vec<String>>>;

/// A server of calls, and what it reports.
fn serving<F>(
    t: &Fixture,
    handler: impl Fn(Slice, Handle) -> F + Send + Sync + 'static,
) -> (ServerHandle, Reported)
where
    F: Future<Output = Result<Slice>> + Send + 'static,
{
    let reported = Reported::default();
    let reports = Arc::clone(&reported);
    let builder = t.server().on_error(move |_, error| {
        reports.lock().expect("nobody panics here").push(error.to_string());
    });
    (t.spawn(builder.on_connect(serve_calls(LengthPrefixed::new(), handler))), reported)
}

fn close(client: &Plain) -> Check {
    block_on(async {
        client.close().await;
        Ok(())
    })?;
    let stats = client.stats();
    assert_eq!((stats.outstanding, stats.connections), (0, 0));
    Ok(())
}

pub(crate) fn ten_thousand_calls_in_any_order_have_their_own_answers(t: &Fixture) -> Check {
    const CALLS: usize = 10_000;
    let handled = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&handled);
    let (server, _) = serving(t, move |request: Slice, _| {
        let index = counts.fetch_add(1, Ordering::Relaxed);
        async move {
            // Some answers come at once, others after different numbers of turns.
            for _ in 0..index % 7 {
                tokio::task::yield_now().await;
            }
            Ok(request)
        }
    });
    let client = client_builder(t).connections(4).outstanding_max(1000);
    let client = client.connect(&addr_of(&server).to_string())?;
    let calls: Vec<_> = (0..CALLS)
        .map(|index| {
            let call = client.call(body(&format!("call {index}")));
            on_task(async move {
                let answer = call.await?;
                assert_eq!(answer, format!("call {index}"));
                Ok(())
            })
        })
        .collect();
    calls.iter().for_each(Outcome::wait_for_all);
    let stats = client.stats();
    assert_eq!((stats.calls, stats.answers), (CALLS as u64, CALLS as u64));
    assert_eq!((stats.discarded_answers, stats.dials), (0, 4));
    assert_eq!(handled.load(Ordering::Relaxed), CALLS);
    close(&client)
}

pub(crate) fn a_request_that_waits_does_not_hold_up_others(t: &Fixture) -> Check {
    let permits = Arc::new(Semaphore::new(0));
    let gate = Arc::clone(&permits);
    let (server, _) = serving(t, move |request: Slice, _| {
        let gate = Arc::clone(&gate);
        async move {
            if request == "wait" {
                gate.acquire().await.map_err(Error::other)?.forget();
            }
            Ok(request)
        }
    });
    let client = client_of(t, addr_of(&server))?;
    block_on(async {
        let mut waits = client.call(body("wait"));
        assert!(poll_once(&mut waits).await.is_none());
        for _ in 0..100 {
            assert_eq!(client.call(body("pass")).await?, "pass");
        }
        assert!(poll_once(&mut waits).await.is_none());
        permits.add_permits(1);
        assert_eq!(waits.await?, "wait");
        Ok(())
    })?;
    close(&client)
}

pub(crate) fn long_messages_are_whole(t: &Fixture) -> Check {
    let (server, _) = serving(t, |request: Slice, _| async { Ok(request) });
    let client = client_of(t, addr_of(&server))?;
    let lengths = [0, 1, 4096, 4097, 70_000, 1 << 20, 4 << 20];
    let calls = lengths.map(|bytes| {
        let call = client.call(Slice::from(pattern(bytes, bytes)));
        on_task(async move {
            let answer = call.await?;
            assert_eq!(answer.len(), bytes);
            assert_pattern(&answer, bytes);
            Ok(())
        })
    });
    calls.iter().for_each(Outcome::wait);
    close(&client)
}

/// Counts how many run at a time.
#[derive(Default)]
struct Running {
    now: AtomicUsize,
    peak: AtomicUsize,
}

impl Running {
    fn begin(&self) {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(now, Ordering::SeqCst);
    }

    fn end(&self) {
        self.now.fetch_sub(1, Ordering::SeqCst);
    }
}

pub(crate) fn a_connection_and_a_server_run_no_more_requests_than_allowed(t: &Fixture) -> Check {
    let running = Arc::<Running>::default();
    let permits = Arc::new(Semaphore::new(0));
    let (runs, gate) = (Arc::clone(&running), Arc::clone(&permits));
    let handler = move |request: Slice, _: Handle| {
        let (runs, gate) = (Arc::clone(&runs), Arc::clone(&gate));
        async move {
            runs.begin();
            gate.acquire().await.map_err(Error::other)?.forget();
            runs.end();
            Ok(request)
        }
    };
    let limits = CallLimits::new().per_connection(2).in_total(3);
    let handler = serve_calls_within(limits, LengthPrefixed::new(), handler);
    let server = t.spawn(t.server().on_connect(handler));
    let one = client_of(t, addr_of(&server))?;
    let call = |client: &Plain| {
        let call = client.call(body("?"));
        on_task(async { Ok(call.await?) })
    };
    let mut calls: Vec<_> = (0..10).map(|_| call(&one)).collect();
    eventually("as many as its connection may", || running.now.load(Ordering::SeqCst) == 2);
    permits.add_permits(10);
    calls.drain(..).for_each(|call| assert_eq!(call.wait(), "?"));
    assert_eq!(running.peak.load(Ordering::SeqCst), 2);

    let two = client_of(t, addr_of(&server))?;
    let both = [&one, &two];
    calls.extend((0..20).map(|index| call(both[index % 2])));
    eventually("as many as the server may", || running.now.load(Ordering::SeqCst) == 3);
    permits.add_permits(20);
    calls.into_iter().for_each(|call| assert_eq!(call.wait(), "?"));
    assert_eq!(running.peak.load(Ordering::SeqCst), 3);
    close(&one)?;
    close(&two)
}

pub(crate) fn a_client_that_does_not_read_begins_no_more_requests(t: &Fixture) -> Check {
    const REQUESTS: usize = 200;
    const ANSWER_BYTES: usize = 1 << 20;
    // What both kernels hold, what one batch and the limit of unsent bytes allow, and some more.
    const AHEAD_MAX: usize = 40;
    let begun = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&begun);
    let handler = move |_, _: Handle| {
        counts.fetch_add(1, Ordering::SeqCst);
        async { Ok(Slice::from(vec![7; ANSWER_BYTES])) }
    };
    // Handlers that take long run side by side, and count for this limit.
    let limits = CallLimits::new().per_connection(4);
    let handler = serve_calls_within(limits, LengthPrefixed::new(), handler);
    let server = t.spawn(t.server().on_connect(handler));
    let mut line = Line(dial(&server)?);
    for number in 0..REQUESTS {
        line.answer(number as u32, b"")?;
    }
    let mut numbers = BTreeSet::new();
    for read in 0..REQUESTS {
        let ahead = begun.load(Ordering::SeqCst) - read;
        assert!(ahead <= AHEAD_MAX, "{ahead} answers of which none is read");
        let (number, answer) = line.request()?;
        assert_eq!(answer.len(), ANSWER_BYTES);
        numbers.insert(number);
    }
    assert_eq!(numbers.len(), REQUESTS);
    Ok(())
}

/// Fails for `fail`, panics for `panic`, both at once or after a wait.
async fn moody(request: Slice) -> Result<Slice> {
    if request.ends_with(b"later") {
        tokio::task::yield_now().await;
    }
    if request.starts_with(b"fail") {
        return Err(Error::other("fails on purpose"));
    }
    assert!(!request.starts_with(b"panic"), "{ON_PURPOSE}");
    Ok(request)
}

fn ends_its_connection(t: &Fixture, requests: [&str; 2], text: &str) -> Check {
    let (server, reported) = serving(t, |request, _| moody(request));
    let (client, other) = (client_of(t, addr_of(&server))?, client_of(t, addr_of(&server))?);
    for (index, request) in requests.into_iter().enumerate() {
        block_on(async {
            assert_eq!(other.call(body("fine")).await?, "fine");
            assert_eq!(client.call(body("fine")).await?, "fine");
            let error = client.call(body(request)).await.expect_err("no answer");
            assert_eq!(error.kind(), CallErrorKind::ConnectionLost);
            assert_eq!(other.call(body("fine")).await?, "fine");
            Ok(())
        })?;
        let reports = || reported.lock().expect("nobody panics here").len();
        eventually("it is reported", || reports() == index + 1);
    }
    for report in reported.lock().expect("nobody panics here").iter() {
        assert!(report.contains(text), "{report}");
    }
    assert_eq!((client.stats().lost_connections, other.stats().lost_connections), (2, 0));
    close(&client)?;
    close(&other)
}

pub(crate) fn an_error_of_a_handler_is_reported_and_closes_its_connection(t: &Fixture) -> Check {
    ends_its_connection(t, ["fail", "fail later"], "fails on purpose")
}

pub(crate) fn a_panic_of_a_handler_closes_its_connection_alone(t: &Fixture) -> Check {
    ends_its_connection(t, ["panic", "panic later"], ON_PURPOSE)
}

/// A message of the strict binary protocol, as a Thrift library makes it.
fn thrift(name: &str, text: &str) -> Slice {
    let length = (name.len() as u32).to_be_bytes();
    let front = [&[0x80, 1, 0, 1][..], &length, name.as_bytes(), &[0; 4]].concat();
    Slice::from([front, text.as_bytes().to_vec()].concat())
}

pub(crate) fn thrift_clients_get_failures_as_exceptions(t: &Fixture) -> Check {
    let handler = |request: Slice, _: Handle| async move {
        // The header of a call of `run` has 15 bytes.
        moody(request.slice(15..)).await?;
        Ok(request)
    };
    let server = t.spawn(t.server().on_connect(serve_calls(FramedThrift::new(), handler)));
    let client = Client::builder(FramedThrift::new()).dialer(t.dialer());
    let client = client.connect(&addr_of(&server).to_string())?;
    block_on(async {
        for request in ["fail", "fine", "panic", "fail later", "fine", "panic later"] {
            let answer = client.call(thrift("run", request)).await?;
            let is_exception = answer[3] == 3;
            assert_eq!(is_exception, request != "fine", "{answer:?}");
            assert_eq!(answer[8..11], *b"run");
        }
        let error = client.call(body("no message")).await.expect_err("it has no header");
        assert_eq!(error.kind(), CallErrorKind::Codec);
        client.close().await;
        Ok(())
    })?;
    assert_eq!((client.stats().dials, client.stats().connections), (1, 0));
    Ok(())
}

/// A server whose requests wait for permits.
fn gated(t: &Fixture) -> (ServerHandle, Arc<Semaphore>, Arc<Running>) {
    let (running, permits) = (Arc::<Running>::default(), Arc::new(Semaphore::new(0)));
    let (runs, gate) = (Arc::clone(&running), Arc::clone(&permits));
    let (server, _) = serving(t, move |request: Slice, _| {
        let (runs, gate) = (Arc::clone(&runs), Arc::clone(&gate));
        async move {
            runs.begin();
            gate.acquire().await.map_err(Error::other)?.forget();
            Ok(request)
        }
    });
    (server, permits, running)
}

pub(crate) fn a_shutdown_answers_the_running_requests(t: &Fixture) -> Check {
    let (server, permits, running) = gated(t);
    let client = client_of(t, addr_of(&server))?;
    let calls = [1, 2, 3].map(|_| {
        let call = client.call(body("?"));
        on_task(async { Ok(call.await?) })
    });
    eventually("they run", || running.now.load(Ordering::SeqCst) == 3);
    let ended = on_thread({
        let server = server.clone();
        move || Ok(server.shutdown(DEADLINE)?)
    });
    block_on(async {
        server.shutdown_begun().await;
        Ok(())
    })?;
    permits.add_permits(3);
    calls.iter().for_each(|call| assert_eq!(call.wait(), "?"));
    ended.wait();
    eventually("its connection is closed", || client.stats().connections == 0);
    close(&client)
}

pub(crate) fn the_end_of_the_stream_leaves_no_request_without_an_answer(t: &Fixture) -> Check {
    let (server, permits, running) = gated(t);
    let mut line = Line(dial(&server)?);
    for number in 0..3 {
        line.answer(number, b"?")?;
    }
    line.0.shutdown(std::net::Shutdown::Write)?;
    eventually("they run", || running.now.load(Ordering::SeqCst) == 3);
    permits.add_permits(3);
    let mut numbers = BTreeSet::new();
    for _ in 0..3 {
        numbers.insert(line.request()?.0);
    }
    assert_eq!(numbers, BTreeSet::from([0, 1, 2]));
    assert_eof(&line.0);
    Ok(())
}

pub(crate) fn a_bad_frame_closes_the_connection_after_the_answers(t: &Fixture) -> Check {
    let (server, reported) = serving(t, |request, _| moody(request));
    let mut line = Line(dial(&server)?);
    line.0.write_all(b"\0\0\0\x09\0\0\0\x07later\0\0\0\x01")?;
    assert_eq!(line.request()?, (7, b"later".to_vec()));
    assert_ended(&line.0);
    let is_reported = || reported.lock().expect("nobody panics here").len() == 1;
    eventually("it is reported", is_reported);
    // A client that goes away with a part of a frame does no harm either.
    let mut cut = Line(dial(&server)?);
    cut.0.write_all(b"\0\0\0\x09\0\0")?;
    drop(cut);
    eventually("all are gone", || server.stats().open == 0);
    Ok(())
}

pub(crate) fn a_read_deadline_that_has_passed_does_not_stop_a_running_request(
    t: &Fixture,
) -> Check {
    let (begun, permits) = (Arc::<AtomicUsize>::default(), Arc::new(Semaphore::new(0)));
    let (begins, gate) = (Arc::clone(&begun), Arc::clone(&permits));
    let (server, _) = serving(t, move |request: Slice, handle: Handle| {
        let (begins, gate) = (Arc::clone(&begins), Arc::clone(&gate));
        async move {
            if request == "late" {
                handle.set_read_deadline(Some(Instant::now()));
                begins.fetch_add(1, Ordering::SeqCst);
                gate.acquire().await.map_err(Error::other)?.forget();
            }
            Ok(request)
        }
    });
    let mut late = Line(dial(&server)?);
    late.answer(1, b"late")?;
    eventually("it runs", || begun.load(Ordering::SeqCst) == 1);
    let other = client_of(t, addr_of(&server))?;
    block_on(async {
        assert_eq!(other.call(body("fine")).await?, "fine");
        Ok(())
    })?;
    permits.add_permits(1);
    assert_eq!(late.request()?, (1, b"late".to_vec()));
    // The deadline holds for the wait for another request.
    assert_ended(&late.0);
    close(&other)
}

pub(crate) fn the_read_timeout_begins_anew_when_no_request_runs(t: &Fixture) -> Check {
    const TIMEOUT: Duration = Duration::from_millis(300);
    let permits = Arc::new(Semaphore::new(0));
    let gate = Arc::clone(&permits);
    let handler = move |request: Slice, _: Handle| {
        let gate = Arc::clone(&gate);
        async move {
            gate.acquire().await.map_err(Error::other)?.forget();
            Ok(request)
        }
    };
    let builder = t.server().read_timeout(TIMEOUT);
    let server = t.spawn(builder.on_connect(serve_calls(LengthPrefixed::new(), handler)));
    let mut line = Line(dial(&server)?);
    line.answer(1, b"?")?;
    // Most of the first wait passes while the request runs.
    assert!(line.request_within(TIMEOUT / 2)?.is_none());
    let ends = Instant::now();
    permits.add_permits(1);
    assert_eq!(line.request()?.0, 1);
    assert_ended(&line.0);
    assert!(ends.elapsed() >= TIMEOUT, "closed early, after {:?}", ends.elapsed());
    Ok(())
}

/// Requests that wait until they are let through. A request is a digit.
struct Gates {
    begun: [AtomicBool; 10],
    open: [Semaphore; 10],
}

impl Gates {
    fn new() -> Arc<Gates> {
        let open = std::array::from_fn(|_| Semaphore::new(0));
        Arc::new(Gates { begun: Default::default(), open })
    }

    async fn run(&self, request: &Slice) -> Result<()> {
        let digit = usize::from(request[0] - b'0');
        self.begun[digit].store(true, Ordering::SeqCst);
        self.open[digit].acquire().await.map_err(Error::other)?.forget();
        Ok(())
    }

    #[track_caller]
    fn wait_for(&self, digit: usize) {
        eventually("the request begins", || self.begun[digit].load(Ordering::SeqCst));
    }

    fn open(&self, digit: usize) {
        self.open[digit].add_permits(1);
    }

    fn open_all(&self) -> Check {
        self.open.iter().for_each(|gate| gate.add_permits(10));
        Ok(())
    }

    /// A server with `places` in total. It answers `2` with more bytes than the kernel takes,
    /// and the others with nothing.
    fn server(self: &Arc<Self>, t: &Fixture, places: usize) -> ServerHandle {
        let gates = Arc::clone(self);
        let handler = move |request: Slice, _: Handle| {
            let gates = Arc::clone(&gates);
            async move {
                gates.run(&request).await?;
                let bytes = if request == "2" { HUGE_BYTES } else { 0 };
                Ok(Slice::from(vec![7; bytes]))
            }
        };
        let codec = LengthPrefixed::new().with_message_bytes_max(HUGE_BYTES);
        let limits = CallLimits::new().in_total(places);
        t.spawn(t.server().on_connect(serve_calls_within(limits, codec, handler)))
    }

    #[track_caller]
    fn begin(&self, line: &mut Line, digit: u32) -> Check {
        call(line, digit)?;
        self.wait_for(digit as usize);
        Ok(())
    }
}

fn call(line: &mut Line, digit: u32) -> Check {
    Ok(line.answer(digit, digit.to_string().as_bytes())?)
}

/// More than the kernels of both sides hold for a connection.
const HUGE_BYTES: usize = 32 << 20;

pub(crate) fn a_client_that_does_not_read_holds_no_place_in_total(t: &Fixture) -> Check {
    let gates = Gates::new();
    let server = gates.server(t, 2);
    let (mut deaf, mut other) = (Line(dial(&server)?), Line(dial(&server)?));
    gates.begin(&mut deaf, 2)?;
    gates.begin(&mut deaf, 1)?;
    // The answer to the first request fills the connection, and that to the second one waits.
    gates.open(2);
    deaf.0.peek(&mut [0])?;
    gates.open(1);
    gates.begin(&mut other, 4)?;
    gates.begin(&mut other, 5)?;
    gates.open_all()
}

pub(crate) fn a_client_that_does_not_read_leaves_the_line_for_a_place(t: &Fixture) -> Check {
    let gates = Gates::new();
    let server = gates.server(t, 2);
    let (mut deaf, mut one) = (Line(dial(&server)?), Line(dial(&server)?));
    let (mut two, mut three) = (Line(dial(&server)?), Line(dial(&server)?));
    gates.begin(&mut deaf, 2)?;
    gates.begin(&mut one, 4)?;
    // These wait in line. The second one ends as soon as it begins.
    gates.open(6);
    for (line, digit) in [(&mut two, 5), (&mut deaf, 6)] {
        let received = server.stats().pollers.received_bytes;
        call(line, digit)?;
        eventually("it is read", || server.stats().pollers.received_bytes == received + 9);
    }
    gates.open(2);
    gates.wait_for(5);
    deaf.0.peek(&mut [0])?;
    gates.open(4);
    gates.begin(&mut three, 7)?;
    gates.open_all()
}

pub(crate) fn a_client_that_has_gone_holds_no_place_in_total(t: &Fixture) -> Check {
    let gates = Gates::new();
    let server = gates.server(t, 3);
    let (mut gone, mut other) = (Line(dial(&server)?), Line(dial(&server)?));
    for digit in [0, 1, 8] {
        gates.begin(&mut gone, digit)?;
    }
    reset(gone.0)?;
    // The first answer finds that the client is gone. One request still runs at the end.
    gates.open(0);
    gates.begin(&mut other, 4)?;
    gates.open(1);
    gates.begin(&mut other, 5)?;
    gates.open_all()
}

/// Is ready with its request after so many polls. The destructor panics.
struct Brittle(Slice, usize);

impl Future for Brittle {
    type Output = Result<Slice>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Slice>> {
        if self.1 == 0 {
            return Poll::Ready(Ok(self.0.clone()));
        }
        self.1 -= 1;
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Drop for Brittle {
    fn drop(&mut self) {
        panic!("a destructor {ON_PURPOSE}");
    }
}

pub(crate) fn a_future_whose_destructor_panics_is_answered(t: &Fixture) -> Check {
    let (server, _) = serving(t, |request: Slice, _| {
        let polls = usize::from(request == "later");
        Brittle(request, polls)
    });
    let client = client_of(t, addr_of(&server))?;
    block_on(async {
        for request in ["now", "later", "now"] {
            assert_eq!(client.call(body(request)).await?, request);
        }
        Ok(())
    })?;
    assert_eq!(client.stats().dials, 1);
    close(&client)
}
