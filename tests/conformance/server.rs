//! A server's life: what serve returns, limits, running out of fds, shared pollers.

use std::net::TcpStream;
use std::time::Duration;

use ringpoll::{Backend, Balance, Error, PollMode, Pollers};
use rustix::net::{AddressFamily, Shutdown, SocketType};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, server:
            serve_returns_ok_after_shutdown
            serve_returns_an_error_when_the_listener_dies
            wait_returns_when_the_server_has_ended
            a_server_that_never_serves_leaves_nothing
            running_out_of_fds_pauses_accepting_and_recovers
            the_connection_limit_refuses_politely_and_recovers
            two_servers_may_share_a_poller_group
            statistics_tell_what_happened
            every_balance_and_poll_mode_serves
            an_idle_server_sleeps
            a_server_answers_while_thousands_of_connections_come_and_go
        }
    };
}
pub(crate) use cases;

pub(crate) fn serve_returns_ok_after_shutdown(t: &Fixture) -> Check {
    let server = t.server().on_request(echo).bind("127.0.0.1:0")?;
    let handle = server.handle();
    assert_eq!(server.local_addr(), handle.local_addr());
    t.watch(handle.clone());
    let serving = on_thread(move || Ok(server.serve()?));
    assert_eq!(exchange(&dial(&handle)?, b"hello")?, b"hello");
    serving.assert_pending();
    handle.shutdown(DEADLINE)?;
    serving.wait();
    Ok(())
}

/// A listener that stops listening is an error of serve.
pub(crate) fn serve_returns_an_error_when_the_listener_dies(t: &Fixture) -> Check {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let same_socket = listener.try_clone()?;
    let server = t.server().on_request(echo).listener(listener)?.build()?;
    let handle = server.handle();
    t.watch(handle.clone());
    let serving = on_thread(move || Ok(server.serve().map_err(|error| error.to_string())));
    assert_eq!(exchange(&dial(&handle)?, b"hello")?, b"hello");
    serving.assert_pending();
    // Linux takes a listening socket out of its listening state on shutdown; accept then fails.
    rustix::net::shutdown(&same_socket, Shutdown::Both)?;
    let ended = serving.wait();
    assert!(ended.is_err(), "serve returned Ok although nobody asked for it");
    Ok(())
}

/// `ServerHandle::wait`.
pub(crate) fn wait_returns_when_the_server_has_ended(t: &Fixture) -> Check {
    let server = t.echo_server();
    let waiting = {
        let server = server.clone();
        on_thread(move || Ok(server.wait()?))
    };
    exchange(&dial(&server)?, b"hello")?;
    waiting.assert_pending();
    server.shutdown(DEADLINE)?;
    waiting.wait();
    server.wait()?;
    Ok(())
}

/// Bound, built, dropped: the port is free again. The fixture counts the fds.
pub(crate) fn a_server_that_never_serves_leaves_nothing(t: &Fixture) -> Check {
    let server = t.server().on_request(echo).bind("127.0.0.1:0")?;
    let addr = server.local_addr();
    drop(server);
    drop(t.server().on_request(echo).listen("127.0.0.1:0")?);
    let again = t.spawn_bound(t.server().on_request(echo).bind(&addr.to_string())?);
    assert_eq!(exchange(&dial(&again)?, b"hello")?, b"hello");
    Ok(())
}

pub(crate) fn running_out_of_fds_pauses_accepting_and_recovers(t: &Fixture) -> Check {
    const CLIENTS: usize = 20;
    // Before the server starts: an accept in a ring keeps to the limit that it was armed under.
    let mut scarcity = FdScarcity::announced()?;
    let server = t.echo_server();
    let witness = dial(&server)?;
    assert_eq!(exchange(&witness, b"hello")?, b"hello");
    // Our sockets come from the same table: made first, connected when it is full.
    let sockets: Vec<_> = (0..CLIENTS)
        .map(|_| rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None))
        .collect::<std::result::Result<_, _>>()?;
    scarcity.begin(5)?;
    for socket in &sockets {
        rustix::net::connect(socket, &addr_of(&server))?;
    }
    eventually("accepting pauses", || server.stats().accept_pauses >= 1);
    let at_pause = server.stats();
    // Nothing to wait for: half a second of doing nothing is what is asked for.
    holds_within(Duration::from_millis(500), || false);
    let later = server.stats();
    let calls = later.pollers.system_calls() - at_pause.pollers.system_calls();
    assert!(calls < 1000, "{calls} system calls while there was nothing to do");
    assert!(later.accepted <= 1 + 5, "{later:?}");
    assert_eq!(exchange(&witness, b"still served")?, b"still served");
    drop(scarcity);
    for socket in sockets {
        let peer = TcpStream::from(socket);
        bound(&peer)?;
        assert_eq!(exchange(&peer, b"at last")?, b"at last");
    }
    Ok(())
}

pub(crate) fn the_connection_limit_refuses_politely_and_recovers(t: &Fixture) -> Check {
    let server = t.spawn(t.server().connections_max(2).on_request(echo));
    let first = dial(&server)?;
    let second = dial(&server)?;
    assert_eq!(exchange(&first, b"one")?, b"one");
    assert_eq!(exchange(&second, b"two")?, b"two");
    for refused in 1..=3 {
        // Politely: a FIN, which the client reads as the end of the stream, not a reset.
        assert_eof(&dial(&server)?);
        eventually("it is counted", || server.stats().refused == refused);
    }
    assert_eq!(exchange(&first, b"one")?, b"one");
    assert_eq!(server.stats().open, 2);
    drop(second);
    eventually("there is room", || server.stats().open == 1);
    assert_eq!(exchange(&dial(&server)?, b"three")?, b"three");
    Ok(())
}

/// `use_pollers`: ending one server leaves the group to the other.
pub(crate) fn two_servers_may_share_a_poller_group(t: &Fixture) -> Check {
    let group = Pollers::builder().backend(t.mount().backend).count(2).name("shared").build()?;
    let one = t.spawn(t.server().use_pollers(group.clone()).on_request(echo));
    let two = t.spawn(t.server().use_pollers(group.clone()).on_request(echo));
    let peer = dial(&two)?;
    assert_eq!(exchange(&dial(&one)?, b"one")?, b"one");
    assert_eq!(exchange(&peer, b"two")?, b"two");
    one.shutdown(DEADLINE)?;
    assert_eq!(exchange(&peer, b"two")?, b"two");
    assert_eq!((group.count(), group.backend()), (2, t.mount().backend));
    drop(peer);
    two.shutdown(DEADLINE)?;
    // A poller may still be about to let go of the block that it looked for the end with.
    let is_empty = || {
        let left = group.stats();
        (left.connections, left.listeners, left.blocks) == (0, 0, 0)
    };
    assert!(holds_within(DEADLINE, is_empty), "left behind: {:?}", group.stats());
    group.shutdown()?;
    Ok(())
}

/// `ServerStats` add up.
pub(crate) fn statistics_tell_what_happened(t: &Fixture) -> Check {
    let server = t.echo_server();
    let before = server.stats();
    assert_eq!((before.backend, before.poller_count), (t.mount().backend, 2));
    assert_eq!((before.accepted, before.open), (0, 0));
    eventually("the listener is counted", || server.stats().pollers.listeners == 1);
    let peers: Vec<_> = (0..4).map(|_| dial(&server)).collect::<Check<_>>()?;
    for peer in &peers {
        for _ in 0..5 {
            exchange(peer, &[1; 100])?;
        }
    }
    eventually("every run is counted", || server.stats().handler_runs >= 20);
    // Bytes are counted when the send returns, which may be after the client has received them.
    eventually("every byte is counted", || server.stats().pollers.sent_bytes == 2000);
    let stats = server.stats();
    assert_eq!((stats.accepted, stats.open, stats.refused), (4, 4, 0));
    assert_eq!(stats.pollers.received_bytes, 2000);
    assert_eq!((stats.pollers.connections, stats.pollers.accepts), (4, 4));
    // The backend determines which counts change.
    let (calls, pollers) = (stats.pollers.system_calls(), &stats.pollers);
    let (receives, sends) = match stats.backend {
        Backend::Epoll => (pollers.receive_calls, pollers.send_calls),
        Backend::Hybrid => (pollers.ring_completions, pollers.send_calls),
        _ => (pollers.ring_completions, pollers.ring_submissions),
    };
    assert!(receives >= 4 && sends >= 4, "{stats:?}");
    assert!(
        pollers.wait_calls > 0 && calls >= pollers.wait_calls + pollers.send_calls,
        "{stats:?}"
    );
    assert_eq!(server.pollers().stats().connections, 4);
    drop(peers);
    eventually("all are closed", || server.stats().open == 0);
    assert_eq!(server.stats().accepted, 4);
    Ok(())
}

/// Settings change which thread does the work, not the result.
pub(crate) fn every_balance_and_poll_mode_serves(t: &Fixture) -> Check {
    for balance in [Balance::RoundRobin, Balance::Random, Balance::LeastConnections] {
        for poll_mode in [PollMode::Adaptive, PollMode::Always, PollMode::Never] {
            let builder = t.server().pollers(3).balance(balance).poll_mode(poll_mode);
            let server = t.spawn(builder.on_request(echo));
            let peers: Vec<_> = (0..6).map(|_| dial(&server)).collect::<Check<_>>()?;
            for peer in &peers {
                assert_eq!(exchange(peer, b"hello")?, b"hello");
            }
            // Polling threads would only slow down the rest of the test.
            drop(peers);
            server.shutdown(DEADLINE)?;
        }
    }
    Ok(())
}

/// Idle means no CPU: pollers are asleep in the kernel, not looking around.
pub(crate) fn an_idle_server_sleeps(t: &Fixture) -> Check {
    let server = t.echo_server();
    let peers: Vec<_> = (0..10).map(|_| dial(&server)).collect::<Check<_>>()?;
    for peer in &peers {
        exchange(peer, b"hello")?;
    }
    // The last spins, if any, are over soon after the last request.
    holds_within(Duration::from_millis(50), || false);
    let before = server.stats().pollers.system_calls();
    holds_within(Duration::from_millis(300), || false);
    let calls = server.stats().pollers.system_calls() - before;
    assert!(calls < 50, "{calls} system calls in 300 ms of silence");
    Ok(())
}

/// Churn beside a steady connection.
pub(crate) fn a_server_answers_while_thousands_of_connections_come_and_go(t: &Fixture) -> Check {
    const CHURN: u64 = if cfg!(debug_assertions) { 1000 } else { 5000 };
    let server = t.echo_server();
    let steady = dial(&server)?;
    let churn: Vec<_> = (0..2)
        .map(|_| {
            let (addr, mut random) = (addr_of(&server), t.random());
            on_thread(move || {
                for _ in 0..CHURN / 2 {
                    let peer = connect(addr)?;
                    if random.one_in(2) {
                        exchange(&peer, b"hello")?;
                    }
                    if random.one_in(2) {
                        reset(peer)?;
                    }
                }
                Ok(())
            })
        })
        .collect();
    for round in 0..200 {
        assert_pattern(&exchange(&steady, &pattern(round, 100))?, round);
    }
    for thread in churn {
        thread.wait();
    }
    eventually("only the steady one is left", || server.stats().open == 1);
    // A connection reset while it waits to be accepted is never seen by the server.
    assert!(server.stats().accepted <= CHURN + 1);
    Ok(())
}

/// Lets the process open a few more fds, and then almost none, until dropped.
struct FdScarcity {
    limit: rustix::process::Rlimit,
    fillers: Vec<std::fs::File>,
}

impl FdScarcity {
    /// Lowers the limit to what a test needs.
    fn announced() -> Check<FdScarcity> {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        const ROOM: u64 = 200;
        let limit = getrlimit(Resource::Nofile);
        let highest = fds().keys().copied().max().unwrap_or(0) as u64;
        setrlimit(Resource::Nofile, Rlimit { current: Some(highest + ROOM), ..limit })?;
        Ok(FdScarcity { limit, fillers: Vec::new() })
    }

    /// Takes all but `spare` of what is left.
    fn begin(&mut self, spare: usize) -> Check {
        let null = std::fs::File::open("/dev/null")?;
        while let Ok(filler) = null.try_clone() {
            self.fillers.push(filler);
        }
        drop(null);
        // The first one is as good as any, and is closed already.
        let keep = (self.fillers.len() + 1).checked_sub(spare);
        self.fillers.truncate(keep.ok_or_else(|| Error::other("too few fds"))?);
        Ok(())
    }
}

impl Drop for FdScarcity {
    fn drop(&mut self) {
        let restored = rustix::process::setrlimit(rustix::process::Resource::Nofile, self.limit);
        assert!(restored.is_ok(), "the fd limit stays lowered: {restored:?}");
    }
}
