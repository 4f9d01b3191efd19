//! Socket options: both ends of a connection have them, and what is refused is named.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ringpoll::{Dialer, Error, ServerBuilder, SocketOptions};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, socket_options:
            options_reach_accepted_and_dialled_sockets
            both_ip_versions_have_the_type_of_service
            nodelay_can_be_left_off
            zero_linger_resets_a_connection_at_its_close
            a_device_restricts_both_ends
            options_of_tcp_say_nothing_to_unix_sockets
            a_refused_option_is_named_by_listen_and_dial
            options_of_a_listener_are_set_before_it_is_bound
            v6_only_overrides_what_the_address_says
            an_address_that_is_asked_for_is_never_replaced_by_all_addresses
            a_deferred_connection_is_accepted_when_its_bytes_come
            a_backlog_bounds_the_connections_that_wait
            a_fast_open_dial_exchanges_or_is_refused_by_name
            a_hook_sets_options_that_have_no_setting
            the_error_of_a_hook_ends_listen_and_dial_at_once
            a_hook_that_panics_unwinds_out_of_its_call
        }
    };
}
pub(crate) use cases;

const SECOND: Duration = Duration::from_secs(1);

/// What `read` finds at the accepted and at the dialled end of a connection to `server`.
fn at_both_ends<T: Send + 'static>(
    t: &Fixture,
    server: ServerBuilder,
    dialer: Dialer,
    address: &str,
    read: fn(BorrowedFd<'_>) -> io::Result<T>,
) -> Check<[T; 2]> {
    let (tells, told) = channel();
    let server = server.on_connect(move |conn| {
        tells.send(conn.with_fd(read)).expect("the test listens");
        async { Ok(()) }
    });
    let server = t.spawn_bound(server.bind(address)?);
    let address = server.local_addr().to_string();
    let conn = block_on(async { Ok(dialer.connect(&address).await?) })?;
    let accepted = told.recv_timeout(DEADLINE)???;
    Ok([accepted, conn.with_fd(read)??])
}

/// The integer, or the first four bytes, of an option.
fn int(fd: impl AsFd, level: i32, option: i32) -> io::Result<i32> {
    let mut value = [0; 64];
    option_bytes(fd, level, option, &mut value)?;
    Ok(i32::from_ne_bytes([value[0], value[1], value[2], value[3]]))
}

fn option_bytes(fd: impl AsFd, level: i32, option: i32, value: &mut [u8]) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    let mut bytes = value.len() as libc::socklen_t;
    let start = value.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `bytes` bytes to `start`, which is as long.
    let result = unsafe { libc::getsockopt(fd, level, option, start, &raw mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes as usize) }
}

pub(crate) fn options_reach_accepted_and_dialled_sockets(t: &Fixture) -> Check {
    let options = SocketOptions::new()
        .keepalive(Duration::from_millis(59_001), 7 * SECOND, 5)
        .user_timeout(Duration::from_micros(1_233_001))
        .tos(0xb8)
        .congestion_control("reno")
        .buffers(32 << 10, 48 << 10);
    let server = t.server().socket_options(options.clone());
    let dialer = t.dialer().socket_options(options);
    let found = at_both_ends(t, server, dialer, "127.0.0.1:0", |fd| {
        let of_tcp = |option| int(fd, libc::SOL_TCP, option);
        let of_socket = |option| int(fd, libc::SOL_SOCKET, option);
        let values = [
            of_socket(libc::SO_KEEPALIVE)?,
            of_tcp(libc::TCP_KEEPIDLE)?,
            of_tcp(libc::TCP_KEEPINTVL)?,
            of_tcp(libc::TCP_KEEPCNT)?,
            of_tcp(libc::TCP_USER_TIMEOUT)?,
            int(fd, libc::SOL_IP, libc::IP_TOS)?,
            of_tcp(libc::TCP_NODELAY)?,
            of_socket(libc::SO_LINGER)?,
            of_socket(libc::SO_RCVBUF)?,
            of_socket(libc::SO_SNDBUF)?,
        ];
        Ok((values, sockopt::tcp_congestion(fd)?))
    })?;
    // Times are rounded up. The kernel doubles sizes, for its own bookkeeping (socket(7)).
    let values = [1, 60, 7, 5, 1234, 0xb8, 1, 0, 64 << 10, 96 << 10];
    assert_eq!(found, [(values, "reno".to_owned()), (values, "reno".to_owned())]);
    Ok(())
}

/// An IPv6 socket uses the one of IPv4 towards IPv4 addresses.
pub(crate) fn both_ip_versions_have_the_type_of_service(t: &Fixture) -> Check {
    if let Err(error) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
        return skip("both_ip_versions_have_the_type_of_service", error);
    }
    let options = SocketOptions::new().tos(0x28);
    let server = t.server().socket_options(options.clone());
    let dialer = t.dialer().socket_options(options);
    let found = at_both_ends(t, server, dialer, "[::1]:0", |fd| {
        Ok((int(fd, libc::SOL_IP, libc::IP_TOS)?, int(fd, libc::SOL_IPV6, libc::IPV6_TCLASS)?))
    })?;
    assert_eq!(found, [(0x28, 0x28); 2]);
    Ok(())
}

pub(crate) fn nodelay_can_be_left_off(t: &Fixture) -> Check {
    let nodelay = |fd: BorrowedFd<'_>| Ok(sockopt::tcp_nodelay(fd)?);
    let options = SocketOptions::new().nodelay(false);
    let server = t.server().socket_options(options.clone());
    let dialer = t.dialer().socket_options(options.clone());
    assert_eq!(at_both_ends(t, server, dialer, "127.0.0.1:0", nodelay)?, [false; 2]);
    for (options, is_on) in [(options, false), (SocketOptions::new(), true)] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let adopted = t.dialer().socket_options(options).adopt(stream.into())?;
        assert_eq!(adopted.with_fd(nodelay)??, is_on, "the adopted socket");
    }
    Ok(())
}

/// A peer that has only seen the end of the stream stays in the state CLOSE_WAIT.
pub(crate) fn zero_linger_resets_a_connection_at_its_close(t: &Fixture) -> Check {
    const TCP_CLOSE: i32 = 7;
    let options = SocketOptions::new().zero_linger(true);
    let server = t.server().socket_options(options.clone());
    // A reset that arrives at once would fail the dial.
    let server = t.spawn(server.on_connect(|mut conn| async move { conn.skip(1).await }));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?.to_string();
    let dialer = t.dialer().socket_options(options);
    drop(block_on(async { Ok(dialer.connect(&address).await?) })?);
    let mut dialled = dial(&server)?;
    dialled.write_all(b"!")?;
    for peer in [dialled, listener.accept()?.0] {
        let state = || int(&peer, libc::SOL_TCP, libc::TCP_INFO).expect("a socket of TCP") & 0xff;
        eventually("the reset arrives", || state() == TCP_CLOSE);
    }
    Ok(())
}

pub(crate) fn a_device_restricts_both_ends(t: &Fixture) -> Check {
    let options = SocketOptions::new().device("lo");
    let server = t.server().socket_options(options.clone());
    let dialer = t.dialer().socket_options(options);
    let found = at_both_ends(t, server, dialer, "127.0.0.1:0", |fd| {
        let mut name = [0; libc::IFNAMSIZ];
        let bytes = option_bytes(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, &mut name)?;
        Ok(name[..bytes].to_vec())
    })?;
    assert_eq!(found, [b"lo\0", b"lo\0"]);
    Ok(())
}

/// The sizes of the buffers are the only ones that Unix sockets have.
pub(crate) fn options_of_tcp_say_nothing_to_unix_sockets(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let options = SocketOptions::new()
        .nodelay(true)
        .keepalive(Duration::ZERO, Duration::ZERO, 0)
        .user_timeout(SECOND)
        .zero_linger(true)
        .device("no-such-device")
        .tos(0xb8)
        .congestion_control("carrier-pigeon")
        .buffers(0, 32 << 10);
    let server = t.server().v6_only(true).defer_accept(SECOND).fast_open(1);
    let server = server.socket_options(options.clone());
    let dialer = t.dialer().socket_options(options).fast_open(true);
    let address = format!("unix:{}", dir.path().join("socket").display());
    let found = at_both_ends(t, server, dialer, &address, |fd| {
        Ok((int(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE)?, sockopt::socket_linger(fd)?))
    })?;
    assert_eq!(found, [(0, None); 2]);
    Ok(())
}

pub(crate) fn a_refused_option_is_named_by_listen_and_dial(t: &Fixture) -> Check {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?.to_string();
    let keepalive = |idle: u32, interval: u32, probes| {
        SocketOptions::new().keepalive(idle * SECOND, interval * SECOND, probes)
    };
    let device = |name| SocketOptions::new().device(name);
    let congestion = |name| SocketOptions::new().congestion_control(name);
    for (options, what, errno) in [
        (keepalive(0, 1, 1), "TCP_KEEPIDLE 0", libc::EINVAL),
        (keepalive(40_000, 1, 1), "TCP_KEEPIDLE 40000", libc::EINVAL),
        (keepalive(1, 0, 1), "TCP_KEEPINTVL 0", libc::EINVAL),
        (keepalive(1, 40_000, 1), "TCP_KEEPINTVL 40000", libc::EINVAL),
        (keepalive(1, 1, 0), "TCP_KEEPCNT 0", libc::EINVAL),
        (keepalive(1, 1, 500), "TCP_KEEPCNT 500", libc::EINVAL),
        (device("no-such-device"), "SO_BINDTODEVICE \"no-such-device\"", libc::ENODEV),
        (device("lo-and-many-more-bytes"), "SO_BINDTODEVICE", libc::ENODEV),
        (device(""), "SO_BINDTODEVICE \"\"", libc::ENODEV),
        (congestion("carrier-pigeon"), "TCP_CONGESTION \"carrier-pigeon\"", libc::ENOENT),
        (congestion(""), "TCP_CONGESTION \"\"", libc::EINVAL),
    ] {
        let server = t.server().socket_options(options.clone());
        let listening = server.listen("127.0.0.1:0").expect_err("no kernel takes it");
        let dialer = t.dialer().socket_options(options);
        let dialing = block_on(async { Ok(dialer.connect(&address).await.err()) })?;
        let dialing = dialing.expect("no kernel takes it");
        for (error, operation) in [(listening, "listen 127.0.0.1:0: "), (dialing, "connect ")] {
            let message = error.to_string();
            assert!(message.starts_with(operation) && message.contains(what), "{message}");
            assert_eq!(error.raw_os_error(), Some(errno), "{message}");
        }
    }
    Ok(())
}

/// The hook runs after the options are set.
pub(crate) fn options_of_a_listener_are_set_before_it_is_bound(t: &Fixture) -> Check {
    let found = Arc::new(Mutex::new(Vec::new()));
    let server = t.server().reuse_port(true).defer_accept(5 * SECOND).fast_open(17);
    let seen = Arc::clone(&found);
    let server = server.before_bind(move |fd| {
        *seen.lock().expect("no test panics here") = vec![
            int(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT)?,
            int(fd, libc::SOL_TCP, libc::TCP_DEFER_ACCEPT)?,
            int(fd, libc::SOL_TCP, libc::TCP_FASTOPEN)?,
        ];
        Ok(())
    });
    t.spawn(server.on_request(echo));
    // The kernel rounds 5 s up to 1 + 2 + 4 s.
    assert_eq!(*found.lock().expect("no test panics here"), [1, 7, 17]);
    Ok(())
}

pub(crate) fn v6_only_overrides_what_the_address_says(t: &Fixture) -> Check {
    if let Err(error) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
        return skip("v6_only_overrides_what_the_address_says", error);
    }
    let from_v4 = |server: ServerBuilder, address: &str| -> Check<io::Result<Vec<u8>>> {
        let server = t.spawn_bound(server.on_request(echo).bind(address)?);
        let peer = connect((Ipv4Addr::LOCALHOST, addr_of(&server).port()).into());
        Ok(peer.and_then(|peer| exchange(&peer, b"four")))
    };
    assert_eq!(from_v4(t.server().v6_only(false), "[::]:0")??, b"four");
    assert_eq!(from_v4(t.server().v6_only(false), "127.0.0.1:0")??, b"four");
    for (server, address) in [(t.server(), "[::]:0"), (t.server().v6_only(true), ":0")] {
        let refused = from_v4(server, address)?.expect_err("it accepts IPv6 only");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{address}: {refused}");
    }
    Ok(())
}

/// Only `:PORT` means all addresses. The address is of a documentation prefix (RFC 3849).
pub(crate) fn an_address_that_is_asked_for_is_never_replaced_by_all_addresses(
    t: &Fixture,
) -> Check {
    for server in [t.server(), t.server().v6_only(false), t.server().v6_only(true)] {
        assert!(server.listen("[2001:db8::7]:0").is_err(), "it listens on another address");
    }
    Ok(())
}

/// The kernel's queue is in order: the silent connection would have been accepted first.
pub(crate) fn a_deferred_connection_is_accepted_when_its_bytes_come(t: &Fixture) -> Check {
    let server = t.spawn(t.server().defer_accept(60 * SECOND).on_request(echo));
    let mut silent = dial(&server)?;
    assert_eq!(exchange(&dial(&server)?, b"second")?, b"second");
    assert_eq!(server.stats().accepted, 1, "the silent connection was accepted");
    silent.write_all(b"first")?;
    assert_eq!(read_exactly(&silent, 5)?, b"first");
    assert_eq!(server.stats().accepted, 2);
    Ok(())
}

/// The kernel refuses a connection when more than the backlog wait (`unix_stream_connect`).
pub(crate) fn a_backlog_bounds_the_connections_that_wait(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let address = format!("unix:{}", path.display());
    for (backlog, waiting) in [(0, 1), (3, 4)] {
        let server = t.server().backlog(backlog).on_request(echo).bind(&address)?;
        let mut peers = Vec::new();
        let full = loop {
            let flags = SocketFlags::NONBLOCK;
            let fd =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            match rustix::net::connect(&fd, &SocketAddrUnix::new(&path)?) {
                Ok(()) => peers.push(fd),
                Err(error) => break error,
            }
        };
        assert_eq!((full, peers.len()), (rustix::io::Errno::AGAIN, waiting));
        // Those that waited are served.
        t.spawn_bound(server).shutdown(DEADLINE)?;
    }
    Ok(())
}

/// Whether there is a cookie depends on the host. The bytes arrive in both cases.
pub(crate) fn a_fast_open_dial_exchanges_or_is_refused_by_name(t: &Fixture) -> Check {
    let allowed = fs::read_to_string("/proc/sys/net/ipv4/tcp_fastopen")?;
    let server = t.spawn(t.server().fast_open(16).on_request(echo));
    let (dialer, address) = (t.dialer().fast_open(true), addr_of(&server).to_string());
    // The first connection gets a cookie for the later ones, where the host has cookies.
    for _ in 0..4 {
        let dialled = block_on(async { Ok(dialer.connect(&address).await) })?;
        if allowed.trim().parse::<u32>()? & 1 == 0 {
            let error = dialled.expect_err("the host does not allow it");
            assert!(error.to_string().contains("TCP_FASTOPEN_CONNECT 1"), "{error}");
            assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
            continue;
        }
        let mut conn = dialled?;
        assert_eq!(conn.with_fd(|fd| int(fd, libc::SOL_TCP, libc::TCP_FASTOPEN_CONNECT))??, 1);
        block_on(async {
            for bytes in [pattern(0, 10), pattern(0, 100_000)] {
                conn.write(bytes.clone())?;
                conn.flush().await?;
                assert_pattern(&conn.next(bytes.len()).await?, 0);
            }
            Ok(())
        })?;
    }
    Ok(())
}

pub(crate) fn a_hook_sets_options_that_have_no_setting(t: &Fixture) -> Check {
    let set = |fd: BorrowedFd<'_>| Ok(sockopt::set_ip_ttl(fd, 33)?);
    let (server, dialer) = (t.server().before_bind(set), t.dialer().before_connect(set));
    let found = at_both_ends(t, server, dialer, "127.0.0.1:0", |fd| Ok(sockopt::ip_ttl(fd)?))?;
    assert_eq!(found, [33; 2]);
    let dir = tempfile::tempdir()?;
    let set = |fd: BorrowedFd<'_>| Ok(sockopt::set_socket_passcred(fd, true)?);
    let (server, dialer) = (t.server().before_bind(set), t.dialer().before_connect(set));
    let address = format!("unix:{}", dir.path().join("socket").display());
    let found = at_both_ends(t, server, dialer, &address, |fd| Ok(sockopt::socket_passcred(fd)?))?;
    assert!(found[1], "{found:?}");
    Ok(())
}

/// Neither the retries of an address in use, nor other addresses, are for the errors of a hook.
pub(crate) fn the_error_of_a_hook_ends_listen_and_dial_at_once(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let unix = format!("unix:{}", path.display());
    let server = t.echo_server();
    let name = format!("localhost:{}", addr_of(&server).port());
    let errors: [fn() -> io::Error; 5] = [
        || io::Error::from_raw_os_error(libc::EPERM),
        || io::Error::from_raw_os_error(libc::EADDRINUSE),
        || io::ErrorKind::WouldBlock.into(),
        || io::ErrorKind::ConnectionRefused.into(),
        || io::Error::other("no room in the table"),
    ];
    for fail in errors {
        let calls = Arc::new(AtomicUsize::new(0));
        let hook = || {
            let calls = Arc::clone(&calls);
            move |_: BorrowedFd<'_>| {
                calls.fetch_add(1, Ordering::Relaxed);
                Err(fail())
            }
        };
        let told = |error: Error, operation: &str| {
            let message = error.to_string();
            let expected = fail();
            assert!(message.starts_with(operation), "{message}");
            assert!(message.ends_with(&expected.to_string()), "{message}");
            assert_eq!(error.raw_os_error(), expected.raw_os_error());
            assert_eq!(error.io_kind(), expected.kind());
            assert_eq!(calls.swap(0, Ordering::Relaxed), 1, "calls for {message}");
        };
        for address in ["127.0.0.1:0", ":0", &unix] {
            let failed = t.server().before_bind(hook()).listen(address);
            let operation = format!("listen {address}: before_bind: ");
            told(failed.expect_err("the hook fails"), &operation);
        }
        let dialer = t.dialer().before_connect(hook()).timeout(DEADLINE);
        for address in [&name, &unix] {
            let failed = block_on(async { Ok(dialer.connect(address).await.err()) })?;
            let operation = format!("connect {address}: before_connect: ");
            told(failed.expect("the hook fails"), &operation);
        }
    }
    assert!(!path.exists(), "a socket was bound all the same");
    assert_eq!(server.stats().accepted, 0, "a socket connected all the same");
    Ok(())
}

/// A dial runs inside a future of the user, and so does the panic.
pub(crate) fn a_hook_that_panics_unwinds_out_of_its_call(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let unix = format!("unix:{}", dir.path().join("socket").display());
    for address in ["127.0.0.1:0", &unix] {
        let builder = t.server().on_request(echo).before_bind(|_| panic!("{ON_PURPOSE}"));
        let listening = catch_unwind(AssertUnwindSafe(|| builder.listen(address)));
        assert!(listening.is_err(), "the panic is lost");
        // Nothing is left that holds the address.
        t.spawn_bound(t.server().on_request(echo).bind(address)?);
    }
    let mut peer = UnixStream::connect(dir.path().join("socket"))?;
    bound_unix(&peer)?;
    peer.write_all(b"served")?;
    assert_eq!(read_exactly(&peer, 6)?, b"served");

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?.to_string();
    let dialer = t.dialer().before_connect(|_| panic!("{ON_PURPOSE}"));
    let dialling = {
        let (dialer, address) = (dialer.clone(), address.clone());
        runtime().spawn(async move { dialer.connect(&address).await.map(drop) })
    };
    let ended = block_on(async { Ok(dialling.await) })?;
    assert!(ended.expect_err("the panic is lost").is_panic());
    // In a handler it is a panic of the handler.
    let server = t.spawn(t.server().on_connect(move |_| {
        let (dialer, address) = (dialer.clone(), address.clone());
        async move { dialer.connect(&address).await.map(drop) }
    }));
    let mut peer = dial(&server)?;
    assert_eq!(peer.read(&mut [0])?, 0);
    eventually("the panic is counted", || server.stats().handler_panics == 1);
    Ok(())
}
