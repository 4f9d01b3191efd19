//! Peers whose host is gone: it has lost its power or its network, and ends no connection.
//!
//! A filter that drops every packet stands for that: the peer's socket acknowledges nothing.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ringpoll::SocketOptions;
use ringpoll::rpc::{CallErrorKind, Client, LengthPrefixed, Pool};
use rustix::net::sockopt;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, rpc_lost_peers:
            a_call_to_a_host_that_is_gone_fails_and_the_next_one_dials
            a_client_without_calls_notices_that_the_host_is_gone
            a_server_that_takes_its_time_is_not_gone
            a_pool_closes_idle_connections_to_a_host_that_is_gone
            what_the_dialer_says_of_silent_hosts_is_kept
        }
    };
}
pub(crate) use cases;

/// The kernel counts keepalive in whole seconds.
const SECOND: Duration = Duration::from_secs(1);

/// Lets the host of `peer` be gone: everything that is sent to `peer` is dropped.
fn vanish(peer: &TcpStream) -> Check {
    // BPF_RET | BPF_K: keep 0 bytes of a packet.
    let mut drop_all = [libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 }];
    let program = libc::sock_fprog { len: 1, filter: drop_all.as_mut_ptr() };
    let (value, length) = ((&raw const program).cast(), size_of::<libc::sock_fprog>());
    let (level, name) = (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER);
    // SAFETY: `program` and the filter that it points to live until the call returns.
    let set = unsafe { libc::setsockopt(peer.as_raw_fd(), level, name, value, length as u32) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error().into()) }
}

fn client_that_notices(t: &Fixture, server: &Played) -> Check<Client<LengthPrefixed>> {
    let builder = client_builder(t).lost_peer_timeout(SECOND).call_timeout(2 * DEADLINE);
    Ok(builder.connect(&server.addr.to_string())?)
}

pub(crate) fn a_call_to_a_host_that_is_gone_fails_and_the_next_one_dials(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = client_that_notices(t, &server)?;
    let warm = on_task({
        let call = client.call(body("warm"));
        async { Ok(call.await) }
    });
    let mut line = server.accept()?;
    line.echo()?;
    warm.wait()?;
    vanish(&line.0)?;
    let error = blocking_error(&client)?;
    assert_eq!(error.kind(), CallErrorKind::ConnectionLost);
    assert!(error.may_have_been_executed());
    let cause = error.cause().and_then(ringpoll::Error::raw_os_error);
    assert_eq!(cause, Some(libc::ETIMEDOUT), "{error:?}");
    let next = on_task({
        let call = client.call(body("next"));
        async { Ok(call.await) }
    });
    server.accept()?.echo()?;
    assert_eq!(next.wait()?, "next");
    Ok(())
}

fn blocking_error(client: &Client<LengthPrefixed>) -> Check<ringpoll::rpc::CallError> {
    let call = client.call(body("?"));
    Ok(block_on(async { Ok(call.await) })?.expect_err("nobody answers"))
}

pub(crate) fn a_client_without_calls_notices_that_the_host_is_gone(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = client_that_notices(t, &server)?;
    block_on(async { Ok(client.ready().await?) })?;
    vanish(&server.accept()?.0)?;
    eventually("the connection fails", || client.stats().lost_connections == 1);
    assert_eq!(client.stats().connections, 0);
    Ok(())
}

pub(crate) fn a_server_that_takes_its_time_is_not_gone(t: &Fixture) -> Check {
    let server = Played::new()?;
    let client = client_that_notices(t, &server)?;
    let call = client.call(body("slow"));
    let slow = on_task(async { Ok(call.await) });
    let mut line = server.accept()?;
    let (number, bytes) = line.request()?;
    std::thread::sleep(3 * SECOND);
    slow.assert_pending();
    line.answer(number, &bytes)?;
    assert_eq!(slow.wait()?, "slow");
    assert_eq!(client.stats().dials, 1);
    Ok(())
}

pub(crate) fn a_pool_closes_idle_connections_to_a_host_that_is_gone(t: &Fixture) -> Check {
    let server = Played::new()?;
    let builder = Pool::builder().dialer(t.dialer()).lost_peer_timeout(SECOND);
    let pool = builder.idle_lifetime(Duration::ZERO).build();
    let address = server.addr.to_string();
    block_on(async { Ok(pool.checkout(&address).await?) })?.give_back();
    assert_eq!(pool.stats().idle, 1);
    vanish(&server.accept()?.0)?;
    eventually("it is closed", || pool.stats().idle == 0);
    Ok(())
}

pub(crate) fn what_the_dialer_says_of_silent_hosts_is_kept(t: &Fixture) -> Check {
    let server = Played::new()?;
    let own = SocketOptions::new().keepalive(7 * SECOND, 5 * SECOND, 3).user_timeout(9 * SECOND);
    for (options, expected) in [
        (SocketOptions::new(), (true, 10 * SECOND, 5 * SECOND, 20_000)),
        (own, (true, 7 * SECOND, 5 * SECOND, 9_000)),
        (
            SocketOptions::new().keepalive(7 * SECOND, 5 * SECOND, 3),
            (true, 7 * SECOND, 5 * SECOND, 0),
        ),
    ] {
        let seen = Arc::new(Mutex::new(None));
        let sees = Arc::clone(&seen);
        let dialer = t.dialer().socket_options(options).before_connect(move |fd| {
            let fd = fd.try_clone_to_owned()?;
            *sees.lock().expect("not poisoned") = Some(fd);
            Ok(())
        });
        let client = client_builder(t).dialer(dialer).connect(&server.addr.to_string())?;
        block_on(async { Ok(client.ready().await?) })?;
        let fd = seen.lock().expect("not poisoned").take().expect("a socket");
        let found = (
            sockopt::socket_keepalive(&fd)?,
            sockopt::tcp_keepidle(&fd)?,
            sockopt::tcp_keepintvl(&fd)?,
            sockopt::tcp_user_timeout(&fd)?,
        );
        assert_eq!(found, expected);
        server.accept()?;
    }
    Ok(())
}
