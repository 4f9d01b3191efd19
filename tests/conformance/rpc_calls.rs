//! The client of calls: each call ends with its own answer, or at once with an error that says
//! whether its request may have been executed.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ringpoll::buffer::LinkBuffer;
use ringpoll::rpc::{CallError, CallErrorKind, Client, Codec, LengthPrefixed};
use ringpoll::{Dialer, Error, Pollers, Resolve, Result, Slice, blocking};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, rpc_calls:
            a_call_ends_at_its_deadline_and_its_late_answer_is_dropped
            a_deadline_holds_before_there_is_a_connection_and_on_a_plain_thread
            deadlines_that_are_far_and_near_all_hold
            a_dropped_call_frees_its_place
            answers_that_no_call_waits_for_are_dropped
            bytes_that_are_no_answer_end_the_connection_and_its_calls
            a_server_that_dies_ends_its_calls_at_once
            a_call_right_after_a_close_does_not_hang
            a_server_that_is_away_ends_calls_as_unsent
            calls_may_wait_for_a_server_that_comes_back
            a_closed_client_finishes_its_calls_and_takes_no_more
            an_aborted_client_ends_its_calls_and_its_connections
            the_last_clone_ends_the_client
            a_call_may_begin_after_its_client_was_dropped
            beyond_the_limit_calls_wait_in_order_and_never_longer_than_they_may
            a_request_that_cannot_be_encoded_ends_its_call_alone
            a_codec_that_panics_ends_its_call_or_its_connection
            calls_without_a_connection_move_to_another
            a_client_ends_with_its_pollers
            settings_that_make_no_sense_are_refused
            a_hook_that_panics_ends_one_dial
            a_dial_that_cannot_succeed_ends_calls_that_wait_for_a_server
            a_connection_whose_first_dial_failed_is_dialed_again
            calls_use_the_connection_that_is_up_while_another_dial_hangs
            answers_before_a_codec_panics_are_delivered
            answers_that_came_before_a_reset_are_delivered
        }
    };
}
pub(crate) use cases;

fn error_of<T: std::fmt::Debug>(result: Result<T, CallError>) -> CallError {
    result.expect_err("the call fails")
}

/// Makes one call on a task, and returns its result there.
fn calling<C: Codec<In = Slice>>(
    client: &Client<C>,
    request: C::Out,
) -> Outcome<Result<Slice, CallError>> {
    let call = client.call(request);
    on_task(async { Ok(call.await) })
}

pub(crate) fn a_call_ends_at_its_deadline_and_its_late_answer_is_dropped(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = client_of(t, server.addr)?;
    let late = client.call_within(body("late"), Duration::from_millis(300));
    let late = on_task(async { Ok(late.await) });
    let mut line = server.accept()?;
    let (number, _) = line.request()?;
    let error = error_of(late.wait());
    assert_eq!(error.kind(), CallErrorKind::Deadline);
    assert!(error.may_have_been_executed());
    assert!(Error::from(error).is_timeout());
    let next = calling(&client, body("next"));
    line.answer(number, b"late")?;
    assert_ne!(line.echo()?, number);
    assert_eq!(next.wait()?, "next");
    let stats = client.stats();
    assert_eq!((stats.discarded_answers, stats.expired_calls, stats.outstanding), (1, 1, 0));
    assert_eq!((stats.dials, stats.connections), (1, 1));
    close(t, client)
}

/// Closes the client, and checks that nothing of it is left.
fn close<C: Codec>(t: &Fixture, client: Client<C>) -> Check {
    block_on(async {
        client.close().await;
        Ok(())
    })?;
    let stats = client.stats();
    assert_eq!((stats.outstanding, stats.waiting, stats.connections), (0, 0, 0));
    no_timer_is_left(t);
    Ok(())
}

/// The timer of a connection that closes while a kernel thread sends may stay until it is due.
fn no_timer_is_left(t: &Fixture) {
    if !matches!(t.mount().backend, Backend::Sqpoll(_)) {
        eventually("no timer is left", || t.clients().stats().timers == 0);
    }
}

pub(crate) fn a_deadline_holds_before_there_is_a_connection_and_on_a_plain_thread(
    t: &Fixture,
) -> Check {
    let deaf = DeafListener::new()?;
    let client = client_of(t, deaf.addr)?;
    let error = error_of(blocking::wait(client.call_within(body("?"), Duration::from_millis(20))));
    assert_eq!(error.kind(), CallErrorKind::Deadline);
    assert!(!error.may_have_been_executed());
    // The dial has not ended, and ends with the client.
    close(t, client)
}

pub(crate) fn deadlines_that_are_far_and_near_all_hold(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client =
        client_builder(t).call_timeout(Duration::ZERO).connect(&server.addr.to_string())?;
    let unlimited = calling(&client, body("unlimited"));
    let mut line = server.accept()?;
    let (number, _) = line.request()?;
    let mut random = t.random();
    let calls: Vec<_> = (0..200)
        .map(|_| {
            let timeout = Duration::from_millis(random.within(1..60) as u64);
            let call = client.call_within(body("?"), timeout);
            on_task(async { Ok(call.await) })
        })
        .collect();
    for call in calls {
        assert_eq!(error_of(call.wait()).kind(), CallErrorKind::Deadline);
    }
    unlimited.assert_pending();
    line.answer(number, b"late")?;
    assert_eq!(unlimited.wait()?, "late");
    close(t, client)
}

pub(crate) fn a_dropped_call_frees_its_place(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = client_builder(t).outstanding_max(1).connect(&server.addr.to_string())?;
    let dropped = client.call(body("dropped"));
    let task = runtime().spawn(dropped);
    let mut line = server.accept()?;
    let (number, _) = line.request()?;
    let next = calling(&client, body("next"));
    eventually("the next call waits", || client.stats().waiting == 1);
    task.abort();
    let (next_number, _) = line.request()?;
    line.answer(number, b"dropped")?;
    line.answer(next_number, b"next")?;
    assert_eq!(next.wait()?, "next");
    assert_eq!(client.stats().discarded_answers, 1);
    // A call that never began, and one that is dropped before its request leaves.
    drop(client.call(body("never")));
    block_on(async {
        assert!(poll_once(client.call(body("unsent"))).await.is_none());
        Ok(())
    })?;
    assert_eq!(client.stats().outstanding, 0);
    close(t, client)
}

pub(crate) fn answers_that_no_call_waits_for_are_dropped(t: &Fixture) -> Check {
    const UNKNOWN: u32 = 10_000;
    let server = Played::new()?;
    let client = client_of(t, server.addr)?;
    let first = calling(&client, body("first"));
    let mut line = server.accept()?;
    let (number, _) = line.request()?;
    for unknown in 0..UNKNOWN {
        line.answer(1_000_000 + unknown, b"unknown")?;
    }
    line.answer(number, b"first")?;
    line.answer(number, b"repeated")?;
    assert_eq!(first.wait()?, "first");
    let second = calling(&client, body("second"));
    line.echo()?;
    assert_eq!(second.wait()?, "second");
    let stats = client.stats();
    assert_eq!((stats.discarded_answers, stats.dials), (u64::from(UNKNOWN) + 1, 1));
    close(t, client)
}

pub(crate) fn bytes_that_are_no_answer_end_the_connection_and_its_calls(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = client_of(t, server.addr)?;
    let calls = [calling(&client, body("one")), calling(&client, body("two"))];
    let mut line = server.accept()?;
    let (number, _) = line.request()?;
    line.request()?;
    // The answer before the bad frame counts.
    line.answer(number, b"good")?;
    line.0.write_all(&[0, 0, 0, 1, 7])?;
    let results = calls.map(|call| call.wait());
    let (good, bad): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!((good.len(), bad.len()), (1, 1));
    for result in bad {
        let error = error_of(result);
        assert_eq!(error.kind(), CallErrorKind::ConnectionLost);
        assert!(error.may_have_been_executed());
        assert!(error.cause().is_some_and(Error::is_invalid), "{error:?}");
    }
    assert_ended(&line.0);
    let next = calling(&client, body("next"));
    server.accept()?.echo()?;
    assert_eq!(next.wait()?, "next");
    close(t, client)
}

pub(crate) fn a_server_that_dies_ends_its_calls_at_once(t: &Fixture) -> Check {
    let server = Played::new()?;
    let builder = client_builder(t).call_timeout(Duration::ZERO);
    let client = builder.connect(&server.addr.to_string())?;
    for with_reset in [true, false] {
        let call = calling(&client, body("?"));
        let mut line = server.accept()?;
        line.request()?;
        match with_reset {
            true => reset(line.0)?,
            false => drop(line),
        }
        let error = error_of(call.wait());
        assert_eq!(error.kind(), CallErrorKind::ConnectionLost);
        assert!(error.may_have_been_executed() && Error::from(error).is_closed());
    }
    assert_eq!(client.stats().lost_connections, 2);
    close(t, client)
}

pub(crate) fn a_call_right_after_a_close_does_not_hang(t: &Fixture) -> Check {
    const ROUNDS: usize = 50;
    let server = Played::new()?;
    let addr = server.addr.to_string();
    // Without a timeout, a call that is forgotten hangs.
    let builder = client_builder(t).call_timeout(Duration::ZERO);
    let client =
        builder.backoff(Duration::from_millis(1), Duration::from_millis(2)).connect(&addr)?;
    // Each connection answers one request and is closed.
    let served = on_thread(move || {
        let mut answered = 0;
        while answered < ROUNDS {
            let mut line = server.accept()?;
            if line.echo().is_ok() {
                answered += 1;
            }
        }
        Ok(())
    });
    let mut answered = 0;
    let answering = async {
        while answered < ROUNDS {
            match client.call(body("again")).await {
                Ok(answer) => {
                    assert_eq!(answer, "again");
                    answered += 1;
                }
                Err(error) => assert_eq!(error.kind(), CallErrorKind::ConnectionLost),
            }
        }
        Ok(())
    };
    block_on(answering)?;
    served.wait();
    close(t, client)
}

pub(crate) fn a_server_that_is_away_ends_calls_as_unsent(t: &Fixture) -> Check {
    let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let builder = client_builder(t).call_timeout(Duration::ZERO);
    let client = builder
        .backoff(Duration::from_millis(1), Duration::from_millis(4))
        .connect(&addr.to_string())?;
    for _ in 0..5 {
        let error = error_of(block_on(async { Ok(client.call(body("?")).await) })?);
        assert_eq!(error.kind(), CallErrorKind::CannotConnect);
        assert!(!error.may_have_been_executed());
        assert!(error.cause().is_some_and(|cause| cause.raw_os_error().is_some()), "{error:?}");
    }
    let error = error_of(block_on(async { Ok(client.ready().await) })?);
    assert_eq!(error.kind(), CallErrorKind::CannotConnect);
    assert_eq!(client.stats().failed_dials, 6);
    // The server comes, and the client is ready.
    let server = Played::at(addr)?;
    block_on(async { Ok(client.ready().await?) })?;
    let call = calling(&client, body("here"));
    server.accept()?.echo()?;
    assert_eq!(call.wait()?, "here");
    close(t, client)
}

pub(crate) fn calls_may_wait_for_a_server_that_comes_back(t: &Fixture) -> Check {
    let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let backoff = Duration::from_millis(2);
    let builder = client_builder(t).waits_for_server(true).backoff(backoff, backoff);
    let client = builder.connect(&addr.to_string())?;
    let calls: Vec<_> = (0..10).map(|_| calling(&client, body("patient"))).collect();
    let short = client.call_within(body("short"), Duration::from_millis(5));
    let error = error_of(block_on(async { Ok(short.await) })?);
    assert_eq!(error.kind(), CallErrorKind::Deadline);
    assert!(!error.may_have_been_executed());
    eventually("it dials again", || client.stats().failed_dials > 2);
    let mut line = Played::at(addr)?.accept()?;
    for _ in 0..10 {
        line.echo()?;
    }
    for call in calls {
        assert_eq!(call.wait()?, "patient");
    }
    close(t, client)
}

pub(crate) fn a_closed_client_finishes_its_calls_and_takes_no_more(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = client_builder(t).outstanding_max(1).connect(&server.addr.to_string())?;
    let outstanding = calling(&client, body("outstanding"));
    let mut line = server.accept()?;
    let (number, _) = line.request()?;
    let waiting = calling(&client, body("waiting"));
    eventually("it waits", || client.stats().waiting == 1);
    let closing = client.clone();
    let closed = on_task(async move {
        closing.close().await;
        Ok(())
    });
    assert_eq!(error_of(waiting.wait()).kind(), CallErrorKind::Closed);
    let error = error_of(calling(&client, body("late")).wait());
    assert_eq!(error.kind(), CallErrorKind::Closed);
    assert!(!error.may_have_been_executed());
    assert!(!client.is_open());
    assert_eq!(error_of(client.try_call(body("late"))).kind(), CallErrorKind::Closed);
    assert_eq!(
        error_of(block_on(async { Ok(client.ready().await) })?).kind(),
        CallErrorKind::Closed
    );
    closed.assert_pending();
    line.answer(number, b"answered")?;
    assert_eq!(outstanding.wait()?, "answered");
    closed.wait();
    assert_eof(&line.0);
    close(t, client)
}

pub(crate) fn an_aborted_client_ends_its_calls_and_its_connections(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = client_builder(t).outstanding_max(1).connect(&server.addr.to_string())?;
    let sent = calling(&client, body("sent"));
    let mut line = server.accept()?;
    line.request()?;
    let waiting = calling(&client, body("waiting"));
    eventually("it waits", || client.stats().waiting == 1);
    client.abort();
    let error = error_of(sent.wait());
    assert!(error.kind() == CallErrorKind::Closed && error.may_have_been_executed());
    let error = error_of(waiting.wait());
    assert!(error.kind() == CallErrorKind::Closed && !error.may_have_been_executed());
    assert_ended(&line.0);
    client.abort();
    close(t, client)
}

/// As with `oneshot` of a service, which drops the service before the first poll of its call.
pub(crate) fn a_call_may_begin_after_its_client_was_dropped(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = client_of(t, server.addr)?;
    let call = client.call(body("late"));
    drop(client);
    let call = on_task(async move { Ok(call.await?) });
    let mut line = server.accept()?;
    let (number, request) = line.request()?;
    line.answer(number, &request)?;
    assert_eq!(call.wait(), "late");
    assert_eof(&line.0);
    Ok(())
}

pub(crate) fn the_last_clone_ends_the_client(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = client_of(t, server.addr)?;
    let call = calling(&client, body("outlives it"));
    let mut line = server.accept()?;
    let (number, request) = line.request()?;
    drop(client.clone());
    drop(client);
    call.assert_pending();
    line.answer(number, &request)?;
    assert_eq!(call.wait()?, "outlives it");
    assert_eof(&line.0);
    no_timer_is_left(t);
    Ok(())
}

pub(crate) fn beyond_the_limit_calls_wait_in_order_and_never_longer_than_they_may(
    t: &Fixture,
) -> Check {
    let server = Played::new()?;
    let client = client_builder(t).outstanding_max(2).connect(&server.addr.to_string())?;
    let mut calls = Vec::new();
    for index in 0..6 {
        calls.push(calling(&client, body(&index.to_string())));
        let begun = || client.stats().outstanding + client.stats().waiting == index + 1;
        eventually("it has begun", begun);
    }
    assert_eq!((client.stats().outstanding, client.stats().waiting), (2, 4));
    let full = error_of(client.try_call(body("?")));
    assert_eq!(full.kind(), CallErrorKind::Full);
    assert!(Error::from(full).is_limit());
    let short = client.call_within(body("short"), Duration::from_millis(5));
    let short = error_of(block_on(async { Ok(short.await) })?);
    assert!(short.kind() == CallErrorKind::Deadline && !short.may_have_been_executed());
    let mut line = server.accept()?;
    for index in 0..6 {
        let (number, request) = line.request()?;
        assert_eq!(request, index.to_string().as_bytes());
        line.answer(number, &request)?;
    }
    for (index, call) in calls.into_iter().enumerate() {
        assert_eq!(call.wait()?, index.to_string());
    }
    let begun = client.try_call(body("begun"))?;
    line.echo()?;
    assert_eq!(block_on(async { Ok(begun.await?) })?, "begun");
    close(t, client)
}

pub(crate) fn a_request_that_cannot_be_encoded_ends_its_call_alone(t: &Fixture) -> Check {
    let server = Played::new()?;
    let codec = LengthPrefixed::new().with_message_bytes_max(8);
    let client = Client::builder(codec).dialer(t.dialer()).connect(&server.addr.to_string())?;
    let calls = ["short", "much too long", "short"].map(|text| calling(&client, body(text)));
    let mut line = server.accept()?;
    line.echo()?;
    line.echo()?;
    let [first, long, last] = calls.map(|call| call.wait());
    assert_eq!((first?, last?), (body("short"), body("short")));
    let error = error_of(long);
    assert_eq!(error.kind(), CallErrorKind::Codec);
    assert!(!error.may_have_been_executed() && Error::from(error).is_limit());
    close(t, client)
}

/// Panics for the requests `encode` and for the answers `decode`.
struct Bomb(LengthPrefixed);

impl Codec for Bomb {
    type In = Slice;
    type Out = Slice;

    fn frame_bytes_max(&self) -> usize {
        self.0.frame_bytes_max()
    }

    fn frame_bytes(&self, front: &[u8]) -> Result<Option<usize>> {
        self.0.frame_bytes(front)
    }

    fn decode(&self, frame: Slice) -> Result<(u32, Slice)> {
        let (number, body) = self.0.decode(frame)?;
        assert!(body != "decode", "{ON_PURPOSE}");
        Ok((number, body))
    }

    fn encode(&self, number: u32, message: Slice, writer: &mut LinkBuffer) -> Result<()> {
        let panics = message == "encode";
        self.0.encode(number, message, writer)?;
        assert!(!panics, "{ON_PURPOSE}");
        Ok(())
    }
}

pub(crate) fn a_codec_that_panics_ends_its_call_or_its_connection(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = Client::builder(Bomb(LengthPrefixed::new())).dialer(t.dialer());
    let client = client.connect(&server.addr.to_string())?;
    let encode = calling(&client, body("encode"));
    let mut line = server.accept()?;
    let error = error_of(encode.wait());
    assert_eq!(error.kind(), CallErrorKind::Codec);
    assert!(error.cause().is_some_and(Error::is_panicked) && !error.may_have_been_executed());
    // What the codec had written of it is not sent.
    let good = calling(&client, body("good"));
    line.echo()?;
    assert_eq!(good.wait()?, "good");
    let decode = calling(&client, body("decode"));
    line.echo()?;
    let error = error_of(decode.wait());
    assert_eq!(error.kind(), CallErrorKind::ConnectionLost);
    assert!(error.cause().is_some_and(Error::is_panicked), "{error:?}");
    let again = calling(&client, body("again"));
    server.accept()?.echo()?;
    assert_eq!(again.wait()?, "again");
    close(t, client)
}

pub(crate) fn calls_without_a_connection_move_to_another(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = client_builder(t).connections(2).call_timeout(Duration::ZERO);
    let client = client.connect(&server.addr.to_string())?;
    let first = calling(&client, body("first"));
    let mut line = server.accept()?;
    let (number, _) = line.request()?;
    // The second connection is made, and lost, while the first is busy.
    let lost = calling(&client, body("lost"));
    let mut second = server.accept()?;
    second.request()?;
    drop(server);
    drop(second);
    assert_eq!(error_of(lost.wait()).kind(), CallErrorKind::ConnectionLost);
    // There is no server to dial, and one connection left.
    for _ in 0..4 {
        let moved = calling(&client, body("moved"));
        line.echo()?;
        assert_eq!(moved.wait()?, "moved");
    }
    line.answer(number, b"first")?;
    assert_eq!(first.wait()?, "first");
    close(t, client)
}

pub(crate) fn a_client_ends_with_its_pollers(t: &Fixture) -> Check {
    let server = Played::new()?;
    let pollers = Pollers::builder().backend(t.mount().backend).count(1).build()?;
    let dialer = ringpoll::Dialer::new().pollers(pollers.clone());
    let client = Client::builder(LengthPrefixed::new()).dialer(dialer);
    let client = client.connect(&server.addr.to_string())?;
    let call = calling(&client, body("?"));
    let mut line = server.accept()?;
    line.request()?;
    pollers.shutdown()?;
    let error = error_of(call.wait());
    let lost = [CallErrorKind::ConnectionLost, CallErrorKind::Closed];
    assert!(lost.contains(&error.kind()) && error.may_have_been_executed(), "{error:?}");
    let error = error_of(calling(&client, body("?")).wait());
    assert_eq!(error.kind(), CallErrorKind::Closed);
    block_on(async {
        client.close().await;
        Ok(())
    })
}

pub(crate) fn settings_that_make_no_sense_are_refused(t: &Fixture) -> Check {
    let builders = [
        client_builder(t).connections(0),
        client_builder(t).connections(257),
        client_builder(t).outstanding_max(0),
    ];
    for builder in builders {
        assert!(builder.connect("127.0.0.1:1").expect_err("refused").is_invalid());
    }
    assert!(client_builder(t).connect("no port").expect_err("refused").is_invalid());
    Ok(())
}

/// Runs `failure` in the dial with this index.
fn fails_once(t: &Fixture, at: usize, failure: fn() -> io::Result<()>) -> Dialer {
    let dials = AtomicUsize::new(0);
    t.dialer().before_connect(move |_| match dials.fetch_add(1, Ordering::SeqCst) {
        index if index == at => failure(),
        _ => Ok(()),
    })
}

pub(crate) fn a_hook_that_panics_ends_one_dial(t: &Fixture) -> Check {
    let server = Played::new()?;
    let dialer = fails_once(t, 0, || panic!("a hook {ON_PURPOSE}"));
    let client = client_builder(t).dialer(dialer).connect(&server.addr.to_string())?;
    let error = error_of(calling(&client, body("?")).wait());
    assert_eq!(error.kind(), CallErrorKind::CannotConnect);
    assert!(error.cause().is_some_and(Error::is_panicked), "{error:?}");
    assert!(client.is_open() && client.stats().failed_dials == 1);
    let next = calling(&client, body("next"));
    server.accept()?.echo()?;
    assert_eq!(next.wait()?, "next");
    close(t, client)
}

pub(crate) fn a_dial_that_cannot_succeed_ends_calls_that_wait_for_a_server(t: &Fixture) -> Check {
    let dialer = t.dialer().attempt_delay(Duration::ZERO);
    let builder = client_builder(t).dialer(dialer).waits_for_server(true);
    let client = builder.call_timeout(Duration::ZERO).connect("127.0.0.1:1")?;
    let error = error_of(calling(&client, body("?")).wait());
    assert_eq!(error.kind(), CallErrorKind::CannotConnect);
    assert!(error.cause().is_some_and(Error::is_invalid), "{error:?}");
    close(t, client)
}

pub(crate) fn a_connection_whose_first_dial_failed_is_dialed_again(t: &Fixture) -> Check {
    let server = Played::new()?;
    let dialer = fails_once(t, 1, || Err(io::Error::other("on purpose")));
    let pause = Duration::from_millis(1);
    let client = client_builder(t).dialer(dialer).connections(2).backoff(pause, pause);
    let client = client.connect(&server.addr.to_string())?;
    let mut calls = vec![calling(&client, body("first"))];
    let mut first = server.accept()?;
    first.request()?;
    let mut second = None;
    eventually("the second connection is made", || {
        calls.push(calling(&client, body("further")));
        second = server.try_accept().expect("a listener");
        second.is_some()
    });
    assert_eq!(client.stats().failed_dials, 1);
    client.abort();
    for call in calls {
        assert_eq!(error_of(call.wait()).kind(), CallErrorKind::Closed);
    }
    close(t, client)
}

/// The first lookup has this address. The others never end.
struct Once(SocketAddr, AtomicUsize);

impl Resolve for Once {
    fn resolve(
        &self,
        _: &str,
        _: u16,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>> {
        match self.1.fetch_add(1, Ordering::SeqCst) {
            0 => Box::pin(std::future::ready(Ok(vec![self.0]))),
            _ => Box::pin(std::future::pending()),
        }
    }
}

pub(crate) fn calls_use_the_connection_that_is_up_while_another_dial_hangs(t: &Fixture) -> Check {
    let server = Played::new()?;
    let dialer = t.dialer().resolver(Once(server.addr, AtomicUsize::new(0)));
    let client = client_builder(t).dialer(dialer).connections(2).connect("server:1")?;
    let first = calling(&client, body("first"));
    let mut line = server.accept()?;
    let (number, _) = line.request()?;
    let hangs = calling(&client, body("hangs"));
    eventually("it dials", || client.stats().dials == 2);
    let calls = [(); 4].map(|()| calling(&client, body("passes")));
    for _ in &calls {
        assert_ne!(line.echo()?, number);
    }
    for call in calls {
        assert_eq!(call.wait()?, "passes");
    }
    line.answer(number, b"first")?;
    assert_eq!(first.wait()?, "first");
    client.abort();
    assert_eq!(error_of(hangs.wait()).kind(), CallErrorKind::Closed);
    close(t, client)
}

pub(crate) fn answers_before_a_codec_panics_are_delivered(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = Client::builder(Bomb(LengthPrefixed::new())).dialer(t.dialer());
    let client = client.connect(&server.addr.to_string())?;
    let calls = ["good", "decode"].map(|text| calling(&client, body(text)));
    let mut line = server.accept()?;
    let mut requests = [line.request()?, line.request()?];
    requests.sort_by_key(|(_, body)| body == b"decode");
    let answers = requests.map(|(number, body)| {
        let length = (body.len() as u32 + 4).to_be_bytes();
        [&length[..], &number.to_be_bytes(), &body].concat()
    });
    line.0.write_all(&answers.concat())?;
    let [good, decode] = calls.map(|call| call.wait());
    assert_eq!(good?, "good");
    let error = error_of(decode);
    assert_eq!(error.kind(), CallErrorKind::ConnectionLost);
    assert!(error.cause().is_some_and(Error::is_panicked), "{error:?}");
    close(t, client)
}

/// Waits for the latch before it encodes `block`.
struct Slow(LengthPrefixed, Arc<Latch>);

impl Codec for Slow {
    type In = Slice;
    type Out = Slice;

    fn frame_bytes_max(&self) -> usize {
        self.0.frame_bytes_max()
    }

    fn frame_bytes(&self, front: &[u8]) -> Result<Option<usize>> {
        self.0.frame_bytes(front)
    }

    fn decode(&self, frame: Slice) -> Result<(u32, Slice)> {
        self.0.decode(frame)
    }

    fn encode(&self, number: u32, message: Slice, writer: &mut LinkBuffer) -> Result<()> {
        if message == "block" {
            self.1.pass();
        }
        self.0.encode(number, message, writer)
    }
}

/// The server answers, and closes the connection while bytes of the client are unread. So it sends
/// a reset, which the request meets that is being encoded.
pub(crate) fn answers_that_came_before_a_reset_are_delivered(t: &Fixture) -> Check {
    let (server, latch) = (Played::new()?, Latch::new());
    let codec = Slow(LengthPrefixed::new(), Arc::clone(&latch));
    let client = Client::builder(codec).dialer(t.dialer()).connect(&server.addr.to_string())?;
    let answered = calling(&client, body("answered"));
    let mut line = server.accept()?;
    let (number, request) = line.request()?;
    let unread = calling(&client, body("unread"));
    line.0.peek(&mut [0])?;
    let blocked = calling(&client, body("block"));
    eventually("it is being encoded", || latch.count() == 1);
    line.answer(number, &request)?;
    drop(line);
    latch.open();
    assert_eq!(answered.wait()?, "answered");
    for lost in [unread, blocked] {
        assert_eq!(error_of(lost.wait()).kind(), CallErrorKind::ConnectionLost);
    }
    close(t, client)
}
