//! Dialling: every address is tried, every failure is typed, and what was given up leaves nothing.

use std::future::Future;
use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::net::{UnixListener, UnixStream};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use ringpoll::{Handle, PeerAddr, SocketOptions, unblock};
use rustix::net::sockopt;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, dial:
            a_refused_dial_says_so_and_a_later_one_knows_its_addresses
            a_missing_unix_socket_is_an_error_and_a_later_dial_works
            a_stale_handle_never_touches_a_new_connection
            connections_on_reused_fd_numbers_get_only_their_own_bytes
            dials_with_a_tiny_timeout_succeed_or_time_out
            a_dial_without_an_answer_times_out_and_not_early
            a_time_limit_of_the_kernel_is_no_limit_of_the_dialer
            the_idle_timeout_is_no_limit_of_the_dialer
            dropping_a_dial_gives_up_without_a_leak
            any_stream_fd_can_be_adopted
            what_is_no_stream_socket_is_not_adopted
            dialling_and_closing_repeats
            a_bare_port_is_the_loopback
            ipv6_can_be_dialled
            every_address_of_a_name_is_tried
            an_unknown_name_is_an_error
            malformed_addresses_are_refused_by_connect
            the_local_address_can_be_chosen
            a_local_address_of_another_host_is_an_error
            a_connection_to_itself_is_not_a_connection
            nodelay_is_on_at_both_ends
            a_hundred_dials_at_once_all_arrive
            the_default_group_dials_from_any_thread
            a_handler_may_dial
            dropping_a_client_connection_closes_it
            a_dial_in_the_first_poll_of_a_handler_ends
            a_dial_that_waits_for_room_times_out
            dials_by_name_are_bounded_and_leave_nothing
            a_dial_by_name_that_is_dropped_pins_nothing
        }
    };
}
pub(crate) use cases;

/// An address without a listener.
fn vacant() -> Check<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

pub(crate) fn a_refused_dial_says_so_and_a_later_one_knows_its_addresses(t: &Fixture) -> Check {
    let dialer = t.dialer();
    let vacant = vacant()?.to_string();
    let error = block_on(async { Ok(dialer.connect(&vacant).await.err()) })?;
    let error = error.expect("nobody listens");
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{error:?}");
    assert!(!error.is_timeout(), "{error:?}");
    assert!(error.to_string().contains(&vacant), "does not name the address: {error}");
    let server = t.echo_server();
    block_on(async {
        let mut conn = dialer.connect(&addr_of(&server).to_string()).await?;
        assert_eq!(conn.peer_addr(), PeerAddr::Inet(addr_of(&server)));
        let local = conn.local_addr()?.as_inet().expect("an internet socket");
        assert!(local.ip().is_loopback() && local.port() != 0, "{local}");
        conn.write_copy(b"hello")?;
        conn.flush().await?;
        assert_eq!(conn.next(5).await?[..], b"hello"[..]);
        assert!(conn.is_active());
        Ok(())
    })
}

pub(crate) fn a_missing_unix_socket_is_an_error_and_a_later_dial_works(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let addr = format!("unix:{}", path.display());
    let dialer = t.dialer();
    let error = block_on(async { Ok(dialer.connect(&addr).await.err()) })?;
    let error = error.expect("no such file");
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{error:?}");
    let server = t.spawn_bound(t.server().on_request(echo).bind(&addr)?);
    assert_eq!(server.local_addr(), PeerAddr::Unix(Some(path.clone())));
    block_on(async {
        let mut conn = dialer.connect(&addr).await?;
        assert_eq!(conn.peer_addr(), PeerAddr::Unix(Some(path)));
        conn.write(pattern(0, 100_000))?;
        conn.flush().await?;
        assert_pattern(&conn.next(100_000).await?, 0);
        Ok(())
    })
}

/// The number of a closed fd is taken at once by the next dial.
pub(crate) fn a_stale_handle_never_touches_a_new_connection(t: &Fixture) -> Check {
    let server = t.echo_server();
    let addr = addr_of(&server).to_string();
    let dialer = t.dialer();
    block_on(async {
        let mut stale: Vec<Handle> = Vec::new();
        for _ in 0..50 {
            let mut conn = dialer.connect(&addr).await?;
            for handle in &stale {
                handle.close();
                handle.set_read_deadline(Some(Instant::now()));
                let is_gone = || handle.with_fd(|_| ()).is_err();
                eventually("a closed connection lends no fd", is_gone);
            }
            conn.write_copy(b"mine")?;
            conn.flush().await?;
            assert_eq!(conn.next(4).await?[..], b"mine"[..]);
            stale.push((*conn).clone());
            conn.close();
        }
        Ok(())
    })
}

/// Late events of the old owner of a number must not reach the new one.
pub(crate) fn connections_on_reused_fd_numbers_get_only_their_own_bytes(t: &Fixture) -> Check {
    let server = t.spawn(t.server().on_request(|mut conn| async move {
        let seed = conn.next(1).await?[0];
        conn.write(pattern(usize::from(seed), 20_000))?;
        conn.flush().await
    }));
    let addr = addr_of(&server).to_string();
    let dialer = t.dialer();
    let mut random = t.random();
    block_on(async {
        for round in 0..200 {
            let seed = round as u8;
            let mut conn = dialer.connect(&addr).await?;
            conn.write_copy(&[seed])?;
            conn.flush().await?;
            // Closed with the answer on its way, at any point of it.
            let count = random.within(1..20_001);
            assert_pattern(&conn.next(count).await?, usize::from(seed));
        }
        Ok(())
    })
}

pub(crate) fn dials_with_a_tiny_timeout_succeed_or_time_out(t: &Fixture) -> Check {
    let server = t.echo_server();
    let addr = addr_of(&server).to_string();
    let dialer = t.dialer().timeout(Duration::from_millis(1));
    let mut dials = Vec::new();
    for _ in 0..100 {
        let (dialer, addr) = (dialer.clone(), addr.clone());
        dials.push(runtime().spawn(async move { dialer.connect(&addr).await }));
    }
    block_on(async {
        for dial in dials {
            match dial.await? {
                Ok(conn) => assert!(conn.is_active()),
                Err(error) => assert!(error.is_dial_timeout() && error.is_timeout(), "{error:?}"),
            }
        }
        Ok(())
    })
}

/// Fix row 15: typed, and not before its time.
pub(crate) fn a_dial_without_an_answer_times_out_and_not_early(t: &Fixture) -> Check {
    let deaf = DeafListener::new()?;
    let timeout = Duration::from_millis(50);
    let dialer = t.dialer().timeout(timeout);
    block_on(async {
        let start = Instant::now();
        let error = dialer.connect(&deaf.addr.to_string()).await.expect_err("no answer");
        assert!(start.elapsed() >= timeout, "early, after {:?}", start.elapsed());
        assert!(error.is_dial_timeout() && error.is_timeout(), "{error:?}");
        assert!(!error.is_read_timeout() && !error.is_write_timeout(), "{error:?}");
        Ok(())
    })
}

pub(crate) fn a_time_limit_of_the_kernel_is_no_limit_of_the_dialer(t: &Fixture) -> Check {
    let deaf = DeafListener::new()?;
    let options = SocketOptions::new().user_timeout(Duration::from_secs(1));
    let dialer = t.dialer().socket_options(options).timeout(2 * DEADLINE);
    let dial = on_task(async move { Ok(dialer.connect(&deaf.addr.to_string()).await.map(drop)) });
    let error = dial.wait().expect_err("nobody answers");
    assert_eq!(error.raw_os_error(), Some(libc::ETIMEDOUT), "{error:?}");
    assert!(!error.is_dial_timeout(), "{error:?}");
    Ok(())
}

/// A connection that is being made is not idle.
pub(crate) fn the_idle_timeout_is_no_limit_of_the_dialer(t: &Fixture) -> Check {
    const IDLE: Duration = Duration::from_millis(30);
    let deaf = DeafListener::new()?;
    let dialer = t.dialer().idle_timeout(IDLE).timeout(10 * IDLE);
    block_on(async {
        let error = dialer.connect(&deaf.addr.to_string()).await.expect_err("no answer");
        assert!(error.is_dial_timeout(), "{error:?}");
        Ok(())
    })
}

/// Fix row 15: the fixture counts what is left.
pub(crate) fn dropping_a_dial_gives_up_without_a_leak(t: &Fixture) -> Check {
    let deaf = DeafListener::new()?;
    let addr = deaf.addr.to_string();
    let dialer = t.dialer();
    let before = fds().len();
    block_on(async {
        for _ in 0..10 {
            let dial = dialer.connect(&addr);
            let given_up = tokio::time::timeout(Duration::from_millis(5), dial).await;
            assert!(given_up.is_err(), "a deaf listener answered");
        }
        // Also one that has not begun.
        drop(dialer.connect("127.0.0.1:1"));
        eventually_async("all sockets are closed", || fds().len() == before).await
    })
}

/// Socket pairs and other descriptors.
pub(crate) fn any_stream_fd_can_be_adopted(t: &Fixture) -> Check {
    let (one, other) = std::os::unix::net::UnixStream::pair()?;
    let mut conn = t.dialer().adopt(one.into())?;
    let mut default = ringpoll::adopt(other.into())?;
    block_on(async {
        default.write(pattern(0, 50_000))?;
        default.submit()?;
        assert_pattern(&conn.next(50_000).await?, 0);
        conn.write_copy(b"back")?;
        conn.flush().await?;
        assert_eq!(default.next(4).await?[..], b"back"[..]);
        assert_eq!(conn.peer_addr(), PeerAddr::Unix(None));
        drop(default);
        assert!(conn.next(1).await.expect_err("the other end is gone").is_eof());
        Ok(())
    })
}

/// Adopting takes sockets of one kind; others come back as an error, closed.
pub(crate) fn what_is_no_stream_socket_is_not_adopted(t: &Fixture) -> Check {
    let datagram = std::net::UdpSocket::bind("127.0.0.1:0")?;
    assert!(t.dialer().adopt(datagram.into()).is_err(), "a datagram socket is no stream");
    let file = tempfile::tempfile()?;
    assert!(t.dialer().adopt(file.into()).is_err(), "a file is no stream");
    Ok(())
}

pub(crate) fn dialling_and_closing_repeats(t: &Fixture) -> Check {
    let server = t.echo_server();
    let dialer = t.dialer();
    for _ in 0..10 {
        let conn = block_on(async { Ok(dialer.connect(&addr_of(&server).to_string()).await?) })?;
        conn.close();
        eventually("the client's end is gone", || t.clients().stats().connections == 0);
    }
    eventually("all came and went", || {
        let stats = server.stats();
        stats.accepted == 10 && stats.open == 0
    });
    Ok(())
}

pub(crate) fn a_bare_port_is_the_loopback(t: &Fixture) -> Check {
    let server = t.echo_server();
    let dialer = t.dialer();
    let addr = format!(":{}", addr_of(&server).port());
    block_on(async {
        let mut conn = dialer.connect(&addr).await?;
        conn.write_copy(b"hello")?;
        conn.flush().await?;
        assert_eq!(conn.next(5).await?[..], b"hello"[..]);
        Ok(())
    })
}

/// IPv6 only.
pub(crate) fn ipv6_can_be_dialled(t: &Fixture) -> Check {
    let listener = match TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
        Ok(listener) => listener,
        Err(error) => return skip("ipv6_can_be_dialled", error),
    };
    let addr = listener.local_addr()?;
    let dialer = t.dialer();
    block_on(async {
        let conn = dialer.connect(&addr.to_string()).await?;
        assert_eq!(conn.peer_addr(), PeerAddr::Inet(addr));
        let conn = dialer.connect(&format!("tcp6:[::1]:{}", addr.port())).await?;
        assert_eq!(conn.peer_addr(), PeerAddr::Inet(addr));
        assert!(dialer.connect(&format!("tcp4:[::1]:{}", addr.port())).await.is_err());
        Ok(())
    })
}

/// Whatever order the resolver gives: only one of the loopback addresses listens.
pub(crate) fn every_address_of_a_name_is_tried(t: &Fixture) -> Check {
    let dialer = t.dialer();
    for ip in ("localhost", 0).to_socket_addrs()?.map(|addr| addr.ip()) {
        let listener = TcpListener::bind((ip, 0))?;
        let addr = format!("localhost:{}", listener.local_addr()?.port());
        block_on(async {
            let conn = dialer.connect(&addr).await?;
            assert_eq!(conn.peer_addr(), PeerAddr::Inet(listener.local_addr()?));
            Ok(())
        })?;
    }
    Ok(())
}

/// `.invalid` never resolves (RFC 6761); without a name server that takes until the timeout.
pub(crate) fn an_unknown_name_is_an_error(t: &Fixture) -> Check {
    let dialer = t.dialer().timeout(Duration::from_millis(500));
    let error = block_on(async { Ok(dialer.connect("no-such-host.invalid:80").await.err()) })?;
    let error = error.expect("there is no such host");
    assert!(error.to_string().contains("no-such-host.invalid"), "does not name it: {error}");
    Ok(())
}

/// The same syntax as for listening.
pub(crate) fn malformed_addresses_are_refused_by_connect(t: &Fixture) -> Check {
    let dialer = t.dialer();
    block_on(async {
        for addr in ["", "nothing", "127.0.0.1:99999", "udp:127.0.0.1:80"] {
            let error = dialer.connect(addr).await.expect_err("malformed");
            assert!(error.is_invalid(), "{addr:?}: {error:?}");
        }
        Ok(())
    })
}

pub(crate) fn the_local_address_can_be_chosen(t: &Fixture) -> Check {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let local = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), 0));
    let dialer = t.dialer().local_addr(local);
    let addr = listener.local_addr()?.to_string();
    let conn = block_on(async { Ok(dialer.connect(&addr).await?) })?;
    let (_peer, from) = listener.accept()?;
    assert_eq!(from.ip(), local.ip());
    assert_eq!(conn.local_addr()?, PeerAddr::Inet(from));
    Ok(())
}

/// The local address is one that no interface has (TEST-NET-3, RFC 5737).
pub(crate) fn a_local_address_of_another_host_is_an_error(t: &Fixture) -> Check {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let dialer = t.dialer().local_addr(SocketAddr::from((Ipv4Addr::new(203, 0, 113, 9), 0)));
    let addr = listener.local_addr()?.to_string();
    let error = block_on(async { Ok(dialer.connect(&addr).await.err()) })?;
    let error = error.expect("not our address");
    assert_eq!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL), "{error:?}");
    Ok(())
}

/// TCP's simultaneous open lets a socket connect to its own port, where no server listens.
pub(crate) fn a_connection_to_itself_is_not_a_connection(t: &Fixture) -> Check {
    let addr = vacant()?;
    let dialer = t.dialer().local_addr(addr).timeout(Duration::from_secs(1));
    let result = block_on(async { Ok(dialer.connect(&addr.to_string()).await.map(|_| ())) })?;
    assert!(result.is_err(), "connected to itself");
    Ok(())
}

pub(crate) fn nodelay_is_on_at_both_ends(t: &Fixture) -> Check {
    let (seen, nodelay) = std::sync::mpsc::channel();
    let server = t.spawn(t.server().on_connect(move |conn| {
        let accepted = conn.with_fd(|fd| sockopt::tcp_nodelay(fd));
        let sent = seen.send(accepted).map_err(ringpoll::Error::other);
        async move { sent }
    }));
    let dialer = t.dialer();
    let addr = addr_of(&server).to_string();
    let conn = block_on(async { Ok(dialer.connect(&addr).await?) })?;
    assert!(conn.with_fd(|fd| sockopt::tcp_nodelay(fd))??, "off at the client");
    assert!(nodelay.recv_timeout(DEADLINE)???, "off at the server");
    Ok(())
}

/// Dials are concurrent: none waits for another.
pub(crate) fn a_hundred_dials_at_once_all_arrive(t: &Fixture) -> Check {
    let server = t.echo_server();
    let addr = addr_of(&server).to_string();
    let mut tasks = Vec::new();
    for index in 0..100 {
        let (dialer, addr) = (t.dialer(), addr.clone());
        tasks.push(runtime().spawn(async move {
            let mut conn = dialer.connect(&addr).await?;
            conn.write(pattern(index, 3000))?;
            conn.flush().await?;
            assert_pattern(&conn.next(3000).await?, index);
            Ok::<_, Failure>(())
        }));
    }
    block_on(async {
        for task in tasks {
            task.await??;
        }
        Ok(())
    })?;
    assert_eq!(server.stats().accepted, 100);
    Ok(())
}

/// `ringpoll::connect`, on a runtime and with the built-in wait.
pub(crate) fn the_default_group_dials_from_any_thread(t: &Fixture) -> Check {
    let server = t.echo_server();
    let addr = addr_of(&server).to_string();
    let talk = async move {
        let mut conn = ringpoll::connect(&addr).await?;
        conn.write_copy(b"hello")?;
        conn.flush().await?;
        let answer = conn.next(5).await?;
        Ok::<_, Failure>(answer.to_vec())
    };
    let addr = addr_of(&server).to_string();
    assert_eq!(block_on(talk)?, b"hello");
    let mut conn = ringpoll::blocking::wait(ringpoll::connect(&addr))?;
    ringpoll::blocking::wait(async move {
        conn.write_copy(b"again")?;
        conn.flush().await?;
        assert_eq!(conn.next(5).await?[..], b"again"[..]);
        Ok(())
    })
}

/// A proxy: the handler's own connection lives on the same pollers.
pub(crate) fn a_handler_may_dial(t: &Fixture) -> Check {
    let upstream = t.echo_server();
    let addr = addr_of(&upstream).to_string();
    let proxy = t.spawn(t.server().on_request(move |mut conn| {
        let addr = addr.clone();
        async move {
            let request = conn.next(100).await?;
            let mut upstream = ringpoll::connect(&addr).await?;
            upstream.write(request)?;
            upstream.flush().await?;
            let answer = upstream.slice(100).await?;
            conn.append(answer)?;
            conn.flush().await
        }
    }));
    let peer = dial(&proxy)?;
    for round in 0..50 {
        assert_pattern(&exchange(&peer, &pattern(round, 100))?, round);
    }
    eventually("nothing stays upstream", || upstream.stats().open == 0);
    Ok(())
}

/// The client's end is closed by dropping it, whole or in halves.
pub(crate) fn dropping_a_client_connection_closes_it(t: &Fixture) -> Check {
    let (conn, peer) = t.client()?;
    drop(conn);
    assert_eof(&peer);
    let (conn, peer) = t.client()?;
    let (reader, writer) = conn.split();
    drop(reader);
    peer.set_read_timeout(Some(Duration::from_millis(20)))?;
    let silence = (&peer).read(&mut [0]).expect_err("nothing was sent");
    assert_eq!(silence.kind(), ErrorKind::WouldBlock, "closed although one half is in use");
    bound(&peer)?;
    drop(writer);
    assert_eof(&peer);
    Ok(())
}

/// A unix listener whose accept queue is full: a connect to it is asked to try again.
pub(crate) struct FullBacklog {
    dir: tempfile::TempDir,
    _listener: UnixListener,
    _filler: UnixStream,
}

impl FullBacklog {
    pub(crate) fn new() -> Check<FullBacklog> {
        let dir = tempfile::tempdir()?;
        let listener = UnixListener::bind(dir.path().join("socket"))?;
        // A second listen() only changes the backlog; the kernel takes one more than that.
        rustix::net::listen(&listener, 0)?;
        let filler = UnixStream::connect(dir.path().join("socket"))?;
        Ok(FullBacklog { dir, _listener: listener, _filler: filler })
    }

    pub(crate) fn addr(&self) -> String {
        format!("unix:{}", self.dir.path().join("socket").display())
    }
}

/// A dial that pauses in the first poll of a handler on a poller, which has no task yet.
pub(crate) fn a_dial_in_the_first_poll_of_a_handler_ends(t: &Fixture) -> Check {
    let foreign = SocketAddr::from((Ipv4Addr::new(203, 0, 113, 9), 0));
    let dialer = t.dialer().local_addr(foreign).timeout(Duration::from_secs(5));
    let server = t.spawn(t.server().placement(Placement::Inline).on_request(move |mut conn| {
        let dialer = dialer.clone();
        async move {
            conn.next(1).await?;
            let error = dialer.connect("127.0.0.1:9").await.expect_err("no address of this host");
            assert_eq!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL), "{error:?}");
            conn.write_copy(b"e")?;
            conn.flush().await
        }
    }));
    assert_eq!(exchange(&dial(&server)?, b"d")?, b"e");
    Ok(())
}

/// On a poller, in the first poll of a handler, and on a task.
pub(crate) fn a_dial_that_waits_for_room_times_out(t: &Fixture) -> Check {
    let full = FullBacklog::new()?;
    let (dialer, addr) = (t.dialer().timeout(Duration::from_millis(100)), full.addr());
    block_on(async {
        let error = dialer.connect(&addr).await.expect_err("the backlog is full");
        assert!(error.is_dial_timeout(), "{error:?}");
        Ok(())
    })?;
    let server = t.spawn(t.server().placement(Placement::Inline).on_request(move |mut conn| {
        let (dialer, addr) = (dialer.clone(), addr.clone());
        async move {
            conn.next(1).await?;
            let error = dialer.connect(&addr).await.expect_err("the backlog is full");
            assert!(error.is_dial_timeout(), "{error:?}");
            conn.write_copy(b"e")?;
            conn.flush().await
        }
    }));
    assert_eq!(exchange(&dial(&server)?, b"d")?, b"e");
    Ok(())
}

/// What the documentation says.
const UNBLOCK_THREADS_MAX: usize = 256;

/// Blocks every thread that names are looked up on, until the latch opens.
fn block_threads() -> Check<(Arc<Latch>, Vec<Outcome<()>>)> {
    let latch = Latch::new();
    let calls = (0..UNBLOCK_THREADS_MAX).map(|_| {
        let blocks = Arc::clone(&latch);
        on_task(async move { Ok(unblock(move || blocks.pass()).await?) })
    });
    let calls = calls.collect();
    eventually("every thread is blocked", || latch.count() == UNBLOCK_THREADS_MAX);
    Ok((latch, calls))
}

/// A resolver that does not answer, as a dial sees it: no thread is free to look a name up.
pub(crate) fn dials_by_name_are_bounded_and_leave_nothing(t: &Fixture) -> Check {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let addr = format!("tcp4:localhost:{}", listener.local_addr()?.port());
    let (latch, blocked) = block_threads()?;
    let before = thread_count();
    let (dialer, soon) = (t.dialer(), Duration::from_millis(20));
    let dials: Vec<_> = (0..600)
        .map(|_| {
            let (dialer, addr) = (dialer.clone().timeout(soon), addr.clone());
            on_task(async move { Ok(dialer.connect(&addr).await.map(drop)) })
        })
        .collect();
    for dial in dials {
        let error = dial.wait().expect_err("nobody looks the name up");
        assert!(error.is_dial_timeout(), "{error:?}");
    }
    assert!(thread_count() <= before, "{before} threads before:\n{}", threads());
    assert!(unblock_thread_count() <= UNBLOCK_THREADS_MAX);
    eventually("no timer is left", || t.timers() == 0);
    latch.open();
    blocked.iter().for_each(Outcome::wait);
    // Those that timed out have left no place taken.
    let conn = block_on(async { Ok(dialer.connect(&addr).await?) })?;
    conn.close();
    Ok(())
}

pub(crate) fn a_dial_by_name_that_is_dropped_pins_nothing(t: &Fixture) -> Check {
    struct Task;

    impl Wake for Task {
        fn wake(self: Arc<Self>) {}
    }

    let (latch, blocked) = block_threads()?;
    let dialer = t.dialer().timeout(Duration::from_secs(1000));
    let task = Arc::new(Task);
    {
        let mut dial = pin!(dialer.connect("localhost:9"));
        let waker = Waker::from(Arc::clone(&task));
        assert!(dial.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        eventually("its timer is set", || t.timers() == 1);
    }
    assert_eq!(Arc::strong_count(&task), 1, "the task is pinned");
    eventually("its timer is gone", || t.timers() == 0);
    latch.open();
    blocked.iter().for_each(Outcome::wait);
    Ok(())
}
