//! Failures of handlers: they end their own connection, are reported, and end nothing else.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use ringpoll::{Error, Handle, Result, any_error};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, failures:
            a_panicking_handler_closes_only_its_own_connection
            a_panic_before_the_first_await_closes_only_its_own_connection
            a_panic_after_the_connection_was_given_back_closes_it
            a_panic_in_on_connect_closes_only_its_own_connection
            a_panic_in_a_synchronous_callback_does_not_end_the_server
            a_handler_error_closes_the_connection_and_is_reported
            an_error_from_on_connect_closes_the_connection_and_is_reported
            the_message_of_a_panic_is_reported
            a_handler_may_return_any_error
            a_refusal_in_on_prepare_closes_before_any_handler
        }
    };
}
pub(crate) use cases;

/// What a server reports through on_error.
fn errors() -> (impl Fn(&Handle, &Error) + Send + Sync + 'static, Receiver<Error>) {
    let (report, errors): (Sender<Error>, _) = channel();
    let copy = move |_: &Handle, error: &Error| {
        // An Error is not Clone: what the tests ask of it is told by three questions.
        let copy = if error.is_panicked() {
            Error::other("panicked")
        } else {
            Error::other(error.to_string())
        };
        report.send(copy).expect("the test listens");
    };
    (copy, errors)
}

/// A handler that panics, fails or echoes, as the request says.
async fn obey(mut conn: ringpoll::Connection) -> Result<()> {
    match conn.peek(1).await?[0] {
        b'p' => panic!("told to panic {ON_PURPOSE}"),
        b'e' => Err(Error::other("told to fail")),
        _ => echo(conn).await,
    }
}

pub(crate) fn a_panicking_handler_closes_only_its_own_connection(t: &Fixture) -> Check {
    let (on_error, errors) = errors();
    let server = t.spawn(t.server().on_request(obey).on_error(on_error));
    let bystanders: Vec<_> = (0..5).map(|_| dial(&server)).collect::<Check<_>>()?;
    for round in 1..=5 {
        let mut victim = dial(&server)?;
        assert_eq!(exchange(&victim, b"fine")?, b"fine");
        victim.write_all(b"p")?;
        assert_ended(&victim);
        assert_eq!(errors.recv_timeout(DEADLINE)?.to_string(), "panicked");
        for peer in &bystanders {
            assert_eq!(exchange(peer, b"alive")?, b"alive");
        }
        eventually("the panic is counted", || server.stats().handler_panics == round);
    }
    eventually("only the victims are closed", || server.stats().open == 5);
    Ok(())
}

/// The handler's own code panics, before there is a future.
pub(crate) fn a_panic_before_the_first_await_closes_only_its_own_connection(t: &Fixture) -> Check {
    let (on_error, errors) = errors();
    let server = t.spawn(
        t.server()
            .on_request(|mut conn| {
                assert!(conn.try_peek(1).is_none_or(|byte| byte[0] != b'p'), "{ON_PURPOSE}");
                echo(conn)
            })
            .on_error(on_error),
    );
    let bystander = dial(&server)?;
    for round in 1..=3 {
        let mut victim = dial(&server)?;
        victim.write_all(b"p")?;
        assert_ended(&victim);
        assert_eq!(errors.recv_timeout(DEADLINE)?.to_string(), "panicked");
        assert_eq!(exchange(&bystander, b"alive")?, b"alive");
        eventually("the panic is counted", || server.stats().handler_panics == round);
    }
    eventually("only the victims are closed", || server.stats().open == 1);
    Ok(())
}

/// A run that has given its connection back panics, in its first poll and in a later one.
pub(crate) fn a_panic_after_the_connection_was_given_back_closes_it(t: &Fixture) -> Check {
    let (on_error, errors) = errors();
    let server = t.spawn(
        t.server()
            .on_request(|mut conn| async move {
                let order = conn.next(1).await?;
                if order[0] == b'w' {
                    conn.next(1).await?;
                }
                drop(conn);
                panic!("{ON_PURPOSE}");
            })
            .on_error(on_error),
    );
    for (first, later) in [(b"p", &b""[..]), (b"w", b"p")] {
        let mut victim = dial(&server)?;
        victim.write_all(first)?;
        victim.write_all(later)?;
        assert_ended(&victim);
        assert_eq!(errors.recv_timeout(DEADLINE)?.to_string(), "panicked");
        eventually("it is finished", || server.stats().open == 0);
    }
    assert_eq!(server.stats().handler_panics, 2);
    Ok(())
}

/// The same for on_connect.
pub(crate) fn a_panic_in_on_connect_closes_only_its_own_connection(t: &Fixture) -> Check {
    let (on_error, errors) = errors();
    let server = t.spawn(t.server().on_connect(obey).on_request(obey).on_error(on_error));
    let bystander = dial(&server)?;
    assert_eq!(exchange(&bystander, b"alive")?, b"alive");
    let mut victim = dial(&server)?;
    victim.write_all(b"p")?;
    assert_ended(&victim);
    assert_eq!(errors.recv_timeout(DEADLINE)?.to_string(), "panicked");
    assert_eq!(exchange(&bystander, b"alive")?, b"alive");
    Ok(())
}

/// A panic in a callback that runs on the poller must not take the poller with it.
pub(crate) fn a_panic_in_a_synchronous_callback_does_not_end_the_server(t: &Fixture) -> Check {
    let left = Arc::new(AtomicUsize::new(3));
    let prepared = Arc::clone(&left);
    let disconnects = Arc::new(AtomicUsize::new(0));
    let disconnected = Arc::clone(&disconnects);
    let server = t.spawn(
        t.server()
            .pollers(1)
            .on_prepare(move |handle| {
                let turn = prepared.fetch_sub(1, Ordering::SeqCst);
                handle.on_close(move |_| {
                    assert_ne!(turn, 2, "the second close callback {ON_PURPOSE}");
                });
                assert_ne!(turn, 3, "the first on_prepare {ON_PURPOSE}");
                Ok(())
            })
            .on_request(echo)
            .on_disconnect(move |_| {
                let count = disconnected.fetch_add(1, Ordering::SeqCst);
                assert_ne!(count, 1, "the second on_disconnect {ON_PURPOSE}");
            }),
    );
    assert_ended(&dial(&server)?);
    for _ in 0..2 {
        let peer = dial(&server)?;
        assert_eq!(exchange(&peer, b"alive")?, b"alive");
        drop(peer);
        eventually("the connection closes", || server.stats().open == 0);
    }
    left.store(100, Ordering::SeqCst);
    assert_eq!(exchange(&dial(&server)?, b"alive")?, b"alive");
    Ok(())
}

pub(crate) fn a_handler_error_closes_the_connection_and_is_reported(t: &Fixture) -> Check {
    let (on_error, errors) = errors();
    let server = t.spawn(t.server().on_request(obey).on_error(on_error));
    let bystander = dial(&server)?;
    let mut victim = dial(&server)?;
    victim.write_all(b"e")?;
    assert_ended(&victim);
    assert_eq!(errors.recv_timeout(DEADLINE)?.to_string(), "told to fail");
    eventually("it is counted", || server.stats().handler_errors == 1);
    assert_eq!(exchange(&bystander, b"alive")?, b"alive");
    assert_eq!(server.stats().handler_panics, 0);
    assert!(errors.try_recv().is_err(), "told twice");
    Ok(())
}

/// The same for on_connect.
pub(crate) fn an_error_from_on_connect_closes_the_connection_and_is_reported(t: &Fixture) -> Check {
    let (on_error, errors) = errors();
    let server = t.spawn(t.server().on_connect(obey).on_error(on_error));
    let mut victim = dial(&server)?;
    victim.write_all(b"e")?;
    assert_ended(&victim);
    assert_eq!(errors.recv_timeout(DEADLINE)?.to_string(), "told to fail");
    eventually("it is gone", || server.stats().open == 0);
    Ok(())
}

/// Literals, formatted messages, and other values; where the handler is called, in its first poll,
/// and in a later one.
pub(crate) fn the_message_of_a_panic_is_reported(t: &Fixture) -> Check {
    /// A value of the user that panics once more when it is dropped.
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("the value of a panic {ON_PURPOSE}");
        }
    }
    fn explode(order: u8) {
        match order {
            b'l' => panic!("(panics on purpose)"),
            b'f' => panic!("order {} {ON_PURPOSE}", char::from(order)),
            b'n' => std::panic::panic_any(7),
            _ => std::panic::panic_any(Bomb),
        }
    }
    let (report, errors) = channel();
    let builder = t.server().on_error(move |_, error| {
        report.send((error.to_string(), error.is_panicked())).expect("the test listens");
    });
    let server = t.spawn(builder.on_request(|mut conn| {
        let order = conn.try_peek(2).map(|order| [order[0], order[1]]);
        if let Some([b'c', order]) = order {
            explode(order);
        }
        async move {
            let order = conn.next(2).await?;
            if order[0] == b'w' {
                conn.next(1).await?;
            }
            explode(order[1]);
            Ok(())
        }
    }));
    let wanted = [
        (b'l', "handler panicked: (panics on purpose)"),
        (b'f', "handler panicked: order f (panics on purpose)"),
        (b'n', "handler panicked: a value that is no text"),
        (b'b', "handler panicked: a value that is no text"),
    ];
    for place in [b'c', b'p', b'w'] {
        for (order, message) in wanted {
            let mut victim = dial(&server)?;
            victim.write_all(&[place, order])?;
            if place == b'w' {
                victim.write_all(b".")?;
            }
            assert_ended(&victim);
            assert_eq!(errors.recv_timeout(DEADLINE)?, (message.to_owned(), true));
        }
    }
    eventually("all are finished", || server.stats().open == 0);
    assert_eq!(server.stats().handler_panics, 12);
    assert!(errors.try_recv().is_err(), "told twice");
    Ok(())
}

/// An error of this crate stays what it was, and any other error is the source.
pub(crate) fn a_handler_may_return_any_error(t: &Fixture) -> Check {
    type Boxed = Box<dyn std::error::Error + Send + Sync>;
    #[derive(Debug)]
    struct Own(u8);
    impl std::fmt::Display for Own {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "own error {}", self.0)
        }
    }
    impl std::error::Error for Own {}
    async fn fail(mut conn: ringpoll::Connection) -> Result<(), Boxed> {
        match conn.next(1).await?[0] {
            b'o' => return Err(Own(7).into()),
            b't' => return Err("a text".into()),
            b'i' => Err(std::io::Error::from_raw_os_error(32))?,
            _ => {}
        }
        // The peer ends its side.
        conn.next(1000).await?;
        Ok(())
    }
    async fn fail_later(handle: Handle) -> Result<(), Own> {
        handle.close();
        Err(Own(8))
    }
    let (report, errors) = channel();
    let builder = t.server().on_error(move |_, error| {
        let source = std::error::Error::source(error);
        let own = source.and_then(|source| source.downcast_ref::<Own>()).map(|own| own.0);
        let told = (error.to_string(), own, error.is_eof(), error.raw_os_error());
        report.send(told).expect("the test listens");
    });
    let server = t.spawn(builder.on_connect(|mut conn| async move {
        if conn.peek(1).await?[0] == b's' {
            return conn.spawn(any_error(fail_later(conn.handle())));
        }
        any_error(fail(conn)).await
    }));
    let ask = |order: &[u8]| -> Check<_> {
        let mut peer = dial(&server)?;
        peer.write_all(order)?;
        peer.shutdown(std::net::Shutdown::Write)?;
        let told = errors.recv_timeout(DEADLINE)?;
        assert_ended(&peer);
        Ok(told)
    };
    assert_eq!(ask(b"o")?, ("own error 7".to_owned(), Some(7), false, None));
    assert_eq!(ask(b"t")?, ("a text".to_owned(), None, false, None));
    let (_, own, is_eof, errno) = ask(b"i")?;
    assert_eq!((own, is_eof, errno), (None, false, Some(32)));
    let (_, own, is_eof, errno) = ask(b"e")?;
    assert_eq!((own, is_eof, errno), (None, true, None));
    assert_eq!(ask(b"s")?, ("own error 8".to_owned(), Some(8), false, None));
    Ok(())
}

/// `on_prepare` may refuse, by an error or by closing.
pub(crate) fn a_refusal_in_on_prepare_closes_before_any_handler(t: &Fixture) -> Check {
    let (prepared, handled) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (asked, connected, requested) =
        (Arc::clone(&prepared), Arc::clone(&handled), Arc::clone(&handled));
    let server = t.spawn(
        t.server()
            .on_prepare(move |handle| match asked.fetch_add(1, Ordering::SeqCst) % 3 {
                0 => Err(Error::other("not you")),
                1 => {
                    handle.close();
                    Ok(())
                }
                _ => Ok(()),
            })
            .on_connect(move |_| {
                connected.fetch_add(1, Ordering::SeqCst);
                async { Ok(()) }
            })
            .on_request(move |conn| {
                requested.fetch_add(1, Ordering::SeqCst);
                echo(conn)
            }),
    );
    for round in 0..5 {
        for _ in 0..2 {
            let mut refused = dial(&server)?;
            // The server may have closed already.
            let _ = refused.write_all(b"hello");
            assert_ended(&refused);
            assert_eq!(handled.load(Ordering::SeqCst), 2 * round);
        }
        assert_eq!(exchange(&dial(&server)?, b"hello")?, b"hello");
    }
    eventually("nobody stays", || server.stats().open == 0);
    let stats = server.stats();
    assert_eq!((stats.refused, stats.accepted), (10, 5));
    Ok(())
}
