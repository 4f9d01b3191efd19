//! Listeners: several at once, of every family, made here or adopted.

use std::io::Write;
use std::net::{Ipv6Addr, TcpListener};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::channel;

use ringpoll::{Address, Backend, PeerAddr, Placement, PollMode, Server};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, listeners:
            one_server_listens_on_tcp_and_unix
            a_std_tcp_listener_can_be_adopted
            a_std_unix_listener_can_be_adopted
            two_servers_share_a_port_with_reuse_port
            a_port_in_use_is_an_error_with_the_kernels_number
            ipv6_is_served
            a_bare_port_listens_on_every_address
            a_family_prefix_restricts_the_address
            host_names_are_resolved_to_listen
            a_listener_drains_a_burst_of_connects
            bytes_sent_before_a_reset_reach_the_handler_that_is_accepted_later
            names_of_settings_parse_and_print
            malformed_addresses_are_invalid
            addresses_parse_into_their_parts
            socket_options_reach_both_ends
            an_unknown_congestion_control_is_refused_by_name
        }
    };
}
pub(crate) use cases;

/// An echo over a unix socket, bounded by the deadline.
fn exchange_unix(path: &Path, bytes: &[u8]) -> Check {
    let mut peer = UnixStream::connect(path)?;
    peer.set_read_timeout(Some(DEADLINE))?;
    peer.write_all(bytes)?;
    assert_eq!(read_exactly(&peer, bytes.len())?, bytes);
    Ok(())
}

pub(crate) fn one_server_listens_on_tcp_and_unix(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let builder = t.server().on_request(echo).listen("127.0.0.1:0")?;
    let builder = builder.listen("tcp:127.0.0.1:0")?;
    let server = builder.listen(&format!("unix:{}", path.display()))?.build()?;
    let addrs = server.local_addrs();
    let handle = t.spawn_bound(server);
    assert_eq!(addrs.len(), 3);
    assert_eq!(handle.local_addrs(), addrs);
    assert_eq!((&addrs[0], &addrs[2]), (&handle.local_addr(), &PeerAddr::Unix(Some(path.clone()))));
    for addr in addrs.iter().filter_map(PeerAddr::as_inet) {
        assert_eq!(exchange(&connect(addr)?, b"tcp")?, b"tcp");
    }
    exchange_unix(&path, b"unix")?;
    assert_eq!(handle.stats().pollers.listeners, 3);
    eventually("all came in", || handle.stats().accepted == 3);
    handle.shutdown(DEADLINE)?;
    assert!(UnixStream::connect(&path).is_err(), "the unix listener is still there");
    Ok(())
}

/// ConvertListener.
pub(crate) fn a_std_tcp_listener_can_be_adopted(t: &Fixture) -> Check {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    // Connects before the server accepts.
    let early = connect(addr)?;
    let server = t.spawn_bound(t.server().on_request(echo).listener(listener)?.build()?);
    assert_eq!(addr_of(&server), addr);
    assert_eq!(exchange(&early, b"early")?, b"early");
    assert_eq!(exchange(&connect(addr)?, b"late")?, b"late");
    Ok(())
}

/// ConvertListener, unix.
pub(crate) fn a_std_unix_listener_can_be_adopted(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path)?;
    let server = t.spawn_bound(t.server().on_request(echo).unix_listener(listener)?.build()?);
    assert_eq!(server.local_addr(), PeerAddr::Unix(Some(path.clone())));
    exchange_unix(&path, b"adopted")
}

/// SO_REUSEPORT: both get connections, and one may leave.
pub(crate) fn two_servers_share_a_port_with_reuse_port(t: &Fixture) -> Check {
    let one = t.spawn(t.server().reuse_port(true).on_request(echo));
    let addr = addr_of(&one);
    let builder = t.server().reuse_port(true).on_request(echo);
    let two = t.spawn_bound(builder.bind(&addr.to_string())?);
    // The kernel spreads by a hash of the ports; 64 of them all on one side is out of the question.
    for _ in 0..64 {
        assert_eq!(exchange(&connect(addr)?, b"hello")?, b"hello");
    }
    let accepted = (one.stats().accepted, two.stats().accepted);
    assert_eq!(accepted.0 + accepted.1, 64);
    assert!(accepted.0 > 0 && accepted.1 > 0, "{accepted:?}");
    one.shutdown(DEADLINE)?;
    for _ in 0..16 {
        assert_eq!(exchange(&connect(addr)?, b"hello")?, b"hello");
    }
    Ok(())
}

/// The error says what failed and keeps errno.
pub(crate) fn a_port_in_use_is_an_error_with_the_kernels_number(t: &Fixture) -> Check {
    let server = t.echo_server();
    let addr = addr_of(&server).to_string();
    let error = t.server().on_request(echo).bind(&addr).expect_err("the port is taken");
    assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE), "{error:?}");
    assert!(error.to_string().contains(&addr), "does not name the address: {error}");
    Ok(())
}

/// Skipped, with the reason, where the host has no IPv6.
pub(crate) fn ipv6_is_served(t: &Fixture) -> Check {
    if let Err(error) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
        return skip("ipv6_is_served", error);
    }
    let server = t.spawn_bound(t.server().on_request(echo).bind("[::1]:0")?);
    let addr = addr_of(&server);
    assert_eq!(addr.ip(), Ipv6Addr::LOCALHOST);
    assert_eq!(exchange(&connect(addr)?, b"six")?, b"six");
    Ok(())
}

/// ":port".
pub(crate) fn a_bare_port_listens_on_every_address(t: &Fixture) -> Check {
    let server = t.spawn_bound(t.server().on_request(echo).bind(":0")?);
    let addr = addr_of(&server);
    assert!(addr.ip().is_unspecified(), "{addr}");
    let peer = connect(([127, 0, 0, 1], addr.port()).into())?;
    assert_eq!(exchange(&peer, b"any")?, b"any");
    Ok(())
}

/// tcp4, tcp6.
pub(crate) fn a_family_prefix_restricts_the_address(t: &Fixture) -> Check {
    let server = t.spawn_bound(t.server().on_request(echo).bind("tcp4::0")?);
    assert!(addr_of(&server).is_ipv4());
    let server = t.spawn_bound(t.server().on_request(echo).bind("tcp4:localhost:0")?);
    assert!(addr_of(&server).is_ipv4());
    if let Err(error) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
        return skip("a_family_prefix_restricts_the_address (tcp6)", error);
    }
    let server = t.spawn_bound(t.server().on_request(echo).bind("tcp6:[::1]:0")?);
    assert!(addr_of(&server).is_ipv6());
    assert!(t.server().on_request(echo).bind("tcp4:[::1]:0").is_err());
    assert!(t.server().on_request(echo).bind("tcp6:127.0.0.1:0").is_err());
    Ok(())
}

/// A name that /etc/hosts knows.
pub(crate) fn host_names_are_resolved_to_listen(t: &Fixture) -> Check {
    let server = t.spawn_bound(t.server().on_request(echo).bind("localhost:0")?);
    assert!(addr_of(&server).ip().is_loopback());
    assert_eq!(exchange(&dial(&server)?, b"named")?, b"named");
    Ok(())
}

/// Fix row 16: more connects than one accept per event could serve in time.
pub(crate) fn a_listener_drains_a_burst_of_connects(t: &Fixture) -> Check {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    let peers: Vec<_> = (0..100).map(|_| connect(addr)).collect::<std::io::Result<_>>()?;
    let server = t.spawn_bound(t.server().on_request(echo).listener(listener)?.build()?);
    for peer in &peers {
        assert_eq!(exchange(peer, b"burst")?, b"burst");
    }
    assert_eq!(server.stats().accepted, 100);
    Ok(())
}

/// The kernel still has the bytes, and hands them over before the error.
pub(crate) fn bytes_sent_before_a_reset_reach_the_handler_that_is_accepted_later(
    t: &Fixture,
) -> Check {
    const COUNT: usize = 5;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    let mut names = Vec::new();
    for _ in 0..COUNT {
        let mut peer = connect(addr)?;
        names.push(PeerAddr::Inet(peer.local_addr()?));
        peer.write_all(b"hello")?;
        reset(peer)?;
    }
    let (tells, told) = channel();
    let builder = t.server().on_connect(move |mut conn| {
        let tells = tells.clone();
        async move {
            let name = conn.peer_addr().clone();
            let bytes = conn.next(5).await.map(|bytes| bytes.to_vec());
            let end = conn.next(1).await.map(|bytes| bytes.to_vec());
            tells.send((name, bytes, end)).expect("the test listens");
            Ok(())
        }
    });
    let server = t.spawn_bound(builder.listener(listener)?.build()?);
    let mut served = Vec::new();
    for _ in 0..COUNT {
        let (name, bytes, end) = told.recv_timeout(DEADLINE)?;
        served.push(name);
        assert_eq!(bytes?, b"hello");
        let error = end.expect_err("the peer is gone");
        assert_eq!(error.raw_os_error(), Some(libc::ECONNRESET), "{error:?}");
    }
    served.sort_by_key(PeerAddr::to_string);
    names.sort_by_key(PeerAddr::to_string);
    assert_eq!(served, names);
    assert_eq!(server.stats().accepted, COUNT as u64);
    Ok(())
}

/// FromStr and Display are inverse; an unknown name lists the known ones.
pub(crate) fn names_of_settings_parse_and_print(_: &Fixture) -> Check {
    for name in ["auto", "epoll", "uring", "hybrid"] {
        assert_eq!(name.parse::<Backend>()?.to_string(), name);
    }
    for name in ["auto", "inline", "pool", "pool:4"] {
        assert_eq!(name.parse::<Placement>()?.to_string(), name);
    }
    assert_eq!("pool".parse::<Placement>()?, Placement::Pool { workers: 0 });
    assert_eq!("pool:4".parse::<Placement>()?, Placement::Pool { workers: 4 });
    for name in ["adaptive", "always", "never"] {
        assert_eq!(name.parse::<PollMode>()?.to_string(), name);
    }
    let error = "kqueue".parse::<Backend>().expect_err("not of this kernel");
    assert!(error.is_invalid() && error.to_string().contains("epoll"), "{error:?}");
    assert!("pool:x".parse::<Placement>().expect_err("no count").is_invalid());
    assert!("sometimes".parse::<PollMode>().expect_err("unknown").is_invalid());
    Ok(())
}

/// Refused before any socket is made.
pub(crate) fn malformed_addresses_are_invalid(_: &Fixture) -> Check {
    let malformed =
        ["", "nothing", "127.0.0.1", "127.0.0.1:", "1.2.3.4:99999", "[::1:80", "udp:1.2.3.4:5"];
    for text in malformed {
        let parsed = text.parse::<Address>();
        assert!(parsed.as_ref().is_err_and(ringpoll::Error::is_invalid), "{text:?}: {parsed:?}");
        let listening = Server::builder().listen(text).err();
        assert!(listening.is_some_and(|error| error.is_invalid()), "{text:?} can be listened on");
    }
    Ok(())
}

/// The address syntax.
pub(crate) fn addresses_parse_into_their_parts(_: &Fixture) -> Check {
    let parts = |text: &str| match text.parse::<Address>() {
        Ok(Address::Tcp { host, port, .. }) => Ok((host, port)),
        Ok(Address::Unix(path)) => Ok((path.display().to_string(), 0)),
        Ok(Address::Abstract(name)) => Ok((name.display().to_string(), 0)),
        Ok(other) => panic!("{text:?} is {other:?}"),
        Err(error) => Err(error),
    };
    for text in ["127.0.0.1:80", "tcp:127.0.0.1:80", "tcp4:127.0.0.1:80"] {
        assert_eq!(parts(text)?, ("127.0.0.1".to_owned(), 80), "{text}");
    }
    for text in ["[::1]:80", "tcp:[::1]:80", "tcp6:[::1]:80"] {
        assert_eq!(parts(text)?, ("::1".to_owned(), 80), "{text}");
    }
    assert_eq!(parts("localhost:80")?, ("localhost".to_owned(), 80));
    assert_eq!(parts(":80")?.1, 80);
    assert_eq!(parts("unix:/run/x")?, ("/run/x".to_owned(), 0));
    assert_eq!(parts("unix:@x")?, ("x".to_owned(), 0));
    Ok(())
}

/// Congestion control and fixed buffers, as the kernel tells of them.
pub(crate) fn socket_options_reach_both_ends(t: &Fixture) -> Check {
    let (tells, told) = channel();
    let server = t.server().congestion_control("reno").socket_buffers(32 << 10, 48 << 10);
    let server = server.on_connect(move |conn| {
        let options = conn.with_fd(socket_options);
        tells.send(options).expect("the test listens");
        async { Ok(()) }
    });
    let server = t.spawn(server);
    let dialer = t.dialer().congestion_control("reno").socket_buffers(32 << 10, 48 << 10);
    let address = addr_of(&server).to_string();
    let conn = block_on(async { Ok(dialer.connect(&address).await?) })?;
    for options in [told.recv_timeout(DEADLINE)?, conn.with_fd(socket_options)] {
        // The kernel doubles sizes, for its own bookkeeping (socket(7)).
        assert_eq!(options??, ("reno".to_owned(), 64 << 10, 96 << 10));
    }
    Ok(())
}

fn socket_options(fd: BorrowedFd<'_>) -> std::io::Result<(String, usize, usize)> {
    use rustix::net::sockopt;
    let congestion = sockopt::tcp_congestion(fd)?;
    let receive_bytes = sockopt::socket_recv_buffer_size(fd)?;
    Ok((congestion, receive_bytes, sockopt::socket_send_buffer_size(fd)?))
}

/// It is told where the listener or the connection is made, not by silence later.
pub(crate) fn an_unknown_congestion_control_is_refused_by_name(t: &Fixture) -> Check {
    let server = t.server().congestion_control("carrier-pigeon").on_request(echo);
    let error = server.listen("127.0.0.1:0").expect_err("no kernel has it");
    assert!(error.to_string().contains("carrier-pigeon"), "{error}");
    let dialer = t.dialer().congestion_control("carrier-pigeon");
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let error = block_on(async { Ok(dialer.connect(&address).await.err()) })?;
    let error = error.expect("no kernel has it");
    assert!(error.to_string().contains("carrier-pigeon"), "{error}");
    Ok(())
}
