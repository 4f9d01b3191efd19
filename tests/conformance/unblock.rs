//! Blocking calls in handlers: they delay no other connection, in any placement.

use std::io::Write;
use std::time::Duration;

use ringpoll::{Error, unblock};

use crate::harness::*;
use crate::runtime::{inside, plays, pong};

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, unblock:
            calls_that_block_hold_up_their_own_connections_alone
            a_call_that_panics_fails_its_handler_alone
            a_call_is_inside_the_runtime_of_its_handler
            calls_need_no_server_and_no_runtime
            a_call_that_is_dropped_unpolled_never_runs
        }
    };
}
pub(crate) use cases;

/// What the documentation says.
const THREADS_MAX: usize = 256;

/// More calls than there may be threads, all of which block.
pub(crate) fn calls_that_block_hold_up_their_own_connections_alone(t: &Fixture) -> Check {
    let latch = Latch::new();
    let blocks = std::sync::Arc::clone(&latch);
    let server = t.spawn(t.server().pollers(1).on_request(move |mut conn| {
        let latch = std::sync::Arc::clone(&blocks);
        async move {
            let request = conn.next(1).await?;
            if request[0] == b'b' {
                unblock(move || latch.pass()).await?;
            }
            conn.write(request)?;
            conn.flush().await
        }
    }));
    let mut blocked = Vec::new();
    for _ in 0..THREADS_MAX + 20 {
        let mut peer = dial(&server)?;
        peer.write_all(b"b")?;
        blocked.push(peer);
    }
    eventually("every thread is blocked", || latch.count() == THREADS_MAX);
    assert_eq!(unblock_thread_count(), THREADS_MAX);
    let bystander = dial(&server)?;
    for _ in 0..20 {
        assert_eq!(exchange(&bystander, b"e")?, b"e");
    }
    latch.open();
    for peer in blocked {
        assert_eq!(read_exactly(&peer, 1)?, b"b");
    }
    assert_eq!(server.stats().handler_errors, 0);
    Ok(())
}

pub(crate) fn a_call_that_panics_fails_its_handler_alone(t: &Fixture) -> Check {
    let server = t.spawn(t.server().on_request(|mut conn| async move {
        match conn.next(1).await?[0] {
            // An error that the handler may go on after, ...
            b'h' => {
                let error = unblock(|| panic!("{ON_PURPOSE}")).await.expect_err("it panics");
                assert!(error.is_panicked(), "{error:?}");
                conn.write_copy(b"handled")?;
            }
            // ... or fail of.
            b'f' => unblock(|| panic!("{ON_PURPOSE}")).await?,
            _ => conn.write_copy(&unblock(|| *b"working").await?)?,
        }
        conn.flush().await
    }));
    let peer = dial(&server)?;
    for _ in 0..5 {
        (&peer).write_all(b"h")?;
        assert_eq!(read_exactly(&peer, 7)?, b"handled");
        (&peer).write_all(b"w")?;
        assert_eq!(read_exactly(&peer, 7)?, b"working");
        let mut victim = dial(&server)?;
        victim.write_all(b"f")?;
        assert_ended(&victim);
    }
    eventually("the panics are counted", || server.stats().handler_panics == 5);
    Ok(())
}

pub(crate) fn a_call_is_inside_the_runtime_of_its_handler(t: &Fixture) -> Check {
    let server = t.spawn(inside(t).on_request(|conn| async move {
        let answer = unblock(|| {
            tokio::runtime::Handle::current().block_on(async {
                tokio::time::sleep(Duration::from_millis(1)).await;
                42
            })
        });
        assert_eq!(answer.await?, 42);
        let slept = unblock(|| tokio::spawn(tokio::time::sleep(Duration::from_millis(1)))).await?;
        slept.await.map_err(Error::other)?;
        pong(conn).await
    }));
    plays(&server, 5)
}

pub(crate) fn calls_need_no_server_and_no_runtime(_: &Fixture) -> Check {
    let own = std::thread::current().id();
    let there = ringpoll::blocking::wait(unblock(|| {
        let none = tokio::runtime::Handle::try_current().is_err();
        (std::thread::current().id(), none)
    }))?;
    assert!(there.0 != own && there.1, "{there:?}");
    block_on(async {
        let calls: Vec<_> = (0..50).map(|number| tokio::spawn(unblock(move || number))).collect();
        for (number, call) in calls.into_iter().enumerate() {
            assert_eq!(call.await??, number);
        }
        Ok(())
    })
}

pub(crate) fn a_call_that_is_dropped_unpolled_never_runs(t: &Fixture) -> Check {
    let server = t.spawn(t.server().on_request(|conn| async move {
        let (held, fate) = std::sync::mpsc::channel::<()>();
        drop(unblock(move || held.send(())));
        assert!(fate.recv().is_err(), "it ran");
        echo(conn).await
    }));
    assert_eq!(exchange(&dial(&server)?, b"alive")?, b"alive");
    Ok(())
}
