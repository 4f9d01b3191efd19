//! `HickoryResolver` with a name server of its own on the loopback.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::thread;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use ringpoll::{Dialer, PeerAddr};
use ringpoll_compat::HickoryResolver;

/// The longest message of a name server without extensions (RFC 1035, section 4.2.1).
const MESSAGE_BYTES_MAX: usize = 512;

const HEADER_BYTES: usize = 12;

/// A resolver that asks this name server only.
fn asking(server: &UdpSocket) -> HickoryResolver {
    let addr = server.local_addr().expect("it is bound");
    let mut connection = ConnectionConfig::udp();
    connection.port = addr.port();
    let server = NameServerConfig::new(addr.ip(), true, vec![connection]);
    let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
    let provider = TokioRuntimeProvider::default();
    let resolver = TokioResolver::builder_with_config(config, provider).build();
    resolver.expect("its settings are valid").into()
}

fn bound() -> UdpSocket {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback works")
}

/// Answers until the process ends: names that begin with "two" have both loopback addresses, and
/// others do not exist.
fn answer(server: UdpSocket) {
    loop {
        let mut message = [0; MESSAGE_BYTES_MAX];
        let (bytes, client) = server.recv_from(&mut message).expect("the socket works");
        server.send_to(&reply(&message[..bytes]), client).expect("the client listens");
    }
}

/// RFC 1035, section 4.1. A question ends with the type and the class, two bytes each.
fn reply(query: &[u8]) -> Vec<u8> {
    let name = query[HEADER_BYTES..].iter().position(|byte| *byte == 0).expect("a name ends");
    let question = &query[HEADER_BYTES..HEADER_BYTES + name + 5];
    let is_ipv6 = question[name + 2] == 28;
    let exists = question[1..4].eq_ignore_ascii_case(b"two");
    let answers = u8::from(exists);
    let code = if exists { 0 } else { 3 };
    let mut reply = query[..2].to_vec();
    reply.extend([0x81, 0x80 | code, 0, 1, 0, answers, 0, 0, 0, 0]);
    reply.extend(question);
    if exists {
        // The name is that of the question; the class and a minute to live follow.
        reply.extend([0xc0, HEADER_BYTES as u8, 0, question[name + 2], 0, 1, 0, 0, 0, 60, 0]);
        match is_ipv6 {
            true => reply.extend([&[16][..], &Ipv6Addr::LOCALHOST.octets()].concat()),
            false => reply.extend([&[4][..], &Ipv4Addr::LOCALHOST.octets()].concat()),
        }
    }
    reply
}

#[tokio::test]
async fn a_name_is_looked_up_and_each_of_its_addresses_is_tried() {
    let server = bound();
    let dialer = Dialer::new().resolver(asking(&server)).timeout(Duration::from_secs(30));
    thread::spawn(move || answer(server));
    let ips: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    for ip in ips {
        // A host without IPv6 has one address to test.
        let Ok(listener) = TcpListener::bind((ip, 0)) else { continue };
        let addr: SocketAddr = listener.local_addr().expect("it is bound");
        let conn = dialer.connect(&format!("two.test:{}", addr.port())).await;
        assert_eq!(conn.expect("it listens").peer_addr(), PeerAddr::Inet(addr));
    }
    let error = dialer.connect("none.test:80").await.expect_err("there is no such name");
    assert_eq!(error.io_kind(), ErrorKind::NotFound, "{error:?}");
    assert!(error.to_string().starts_with("resolve none.test: "), "{error}");
}

#[tokio::test]
async fn a_name_server_that_does_not_answer_is_given_up() {
    let server = bound();
    let dialer = Dialer::new().resolver(asking(&server)).timeout(Duration::from_millis(50));
    let error = dialer.connect("two.test:80").await.expect_err("nobody answers");
    assert!(error.is_dial_timeout(), "{error:?}");
}

#[test]
fn outside_of_a_runtime_the_error_says_what_is_missing() {
    let server = bound();
    let dialer = Dialer::new().resolver(asking(&server));
    let error = ringpoll::blocking::wait(dialer.connect("two.test:80")).expect_err("no runtime");
    assert_eq!(error.io_kind(), ErrorKind::Unsupported, "{error:?}");
    assert!(error.to_string().contains("tokio runtime"), "{error}");
}
