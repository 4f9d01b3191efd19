//! Zero-copy sends: how long their memory is kept, and when ordinary sends take their place.
//!
//! Over loopback the kernel copies every zero-copy send, and keeps the memory until the peer has
//! acknowledged the bytes.

use std::os::fd::OwnedFd;

use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};

use super::shared_sends::{ENGINES, send};
use super::*;
use crate::config::{Capabilities, ZeroCopySend};
use crate::sys::uring::sending::{Progress, Sending};

/// Fewer bytes than the sender's socket takes, and more than the peer's takes.
const BYTES: usize = 1 << 20;

/// The peer's receive buffer. A window of less than a segment would make a transfer last minutes.
const PEER_BYTES: usize = 128 << 10;

const ALWAYS: ZeroCopySend = ZeroCopySend::Always { bytes_min: 1 };

impl Bench {
    /// A bench for zero-copy sends. `None` where the kernel does not report copies.
    fn zero_copy(which: ZeroCopySend) -> Option<Bench> {
        has_reports().then(|| Bench::new(&UringOptions::new().zero_copy_send(which)))?
    }

    /// A TCP connection whose peer takes few bytes until it reads.
    fn attach_tcp(&mut self, index: u32, generation: u32) -> (Token, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        set_socket_recv_buffer_size(&listener, PEER_BYTES).expect("set");
        let ours = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let (theirs, _) = listener.accept().expect("accepted");
        set_socket_send_buffer_size(&ours, 8 * BYTES).expect("set");
        theirs.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let socket = Arc::new(Socket::adopt(OwnedFd::from(ours)).expect("a stream"));
        let token = Token::new(index, generation);
        self.uring.attach(token, socket, 1 << 20).expect("attached");
        (token, theirs)
    }

    /// Sends a pattern from a block of the pool.
    fn send_pattern(&mut self, token: Token) {
        let chain = self.pattern();
        self.uring.send(token, chain);
    }

    fn pattern(&self) -> Chain {
        let mut block = self.pool.allocate(BYTES);
        for (byte, value) in block.spare()[..BYTES].iter_mut().zip(pattern()) {
            *byte = value;
        }
        let mut chain = Chain::new();
        chain.push(block.take(BYTES));
        chain
    }

    fn until_sent(&mut self, token: Token, count: usize) {
        self.until("it is sent", |notes| notes.sent.len() == count);
        assert_eq!(self.notes.sent[count - 1], (token, Ok(BYTES)));
    }

    fn held_bytes(&self) -> u64 {
        self.counters.zero_copy_held_bytes.read()
    }

    fn until_released(&mut self) {
        let counters = Arc::clone(&self.counters);
        self.until("the notification", |_| counters.zero_copy_held_bytes.read() == 0);
        assert_eq!(self.pool.stats().blocks, 0);
    }

    /// Sends, copied sends, and how often a connection was stopped.
    fn counts(&self) -> (u64, u64, u64) {
        let counters = &self.counters;
        let stops = counters.zero_copy_stops.read();
        (counters.zero_copy_sends.read(), counters.zero_copy_copied.read(), stops)
    }
}

fn pattern() -> impl Iterator<Item = u8> {
    (0..BYTES).map(|index| (index % 251) as u8)
}

fn read_pattern(peer: &mut TcpStream) {
    let mut read = vec![0; BYTES];
    peer.read_exact(&mut read).expect("every byte");
    assert!(read.iter().copied().eq(pattern()), "other bytes than those that were sent");
}

/// Fails without the reports where `REQUIRE_ALL_BACKENDS=1`.
fn has_reports() -> bool {
    let found = probe::probe();
    let must = std::env::var_os("REQUIRE_ALL_BACKENDS").is_some_and(|value| value == "1");
    assert!(found.zero_copy_reports || !must, "zero-copy sends are required: {found:?}");
    found.zero_copy_reports
}

#[test]
fn a_send_is_over_before_its_memory_is_free() {
    let Some(mut bench) = Bench::zero_copy(ALWAYS) else { return };
    let (token, mut peer) = bench.attach_tcp(0, 0);
    bench.send_pattern(token);
    bench.until_sent(token, 1);
    assert_eq!(bench.held_bytes(), BYTES as u64);
    assert_eq!(bench.pool.stats().blocks, 1);
    // The connection has no send in flight, so the next one starts.
    bench.send_pattern(token);
    bench.until_sent(token, 2);
    assert_eq!(bench.held_bytes(), 2 * BYTES as u64);
    assert_eq!(bench.counters.sends_in_flight.read(), 0);
    let reader = std::thread::spawn(move || {
        read_pattern(&mut peer);
        read_pattern(&mut peer);
        peer
    });
    bench.until_released();
    assert_eq!(bench.counts(), (2, 2, 0));
    drop(reader.join().expect("does not panic"));
    bench.remove(token);
}

#[test]
fn a_connection_that_is_removed_leaves_its_memory_to_the_kernel() {
    let Some(mut bench) = Bench::zero_copy(ALWAYS) else { return };
    let (token, mut peer) = bench.attach_tcp(0, 0);
    bench.send_pattern(token);
    bench.until_sent(token, 1);
    bench.remove(token);
    assert_eq!(bench.held_bytes(), BYTES as u64, "freed while the kernel sends from it");
    // A block that was freed early would come back here.
    let mut other = bench.pool.allocate(BYTES);
    other.spare()[..BYTES].fill(0xFF);
    drop(other);
    // The next connection in the slot does not hear of the send.
    let (next, mut next_peer) = bench.attach_tcp(0, 1);
    let reader = std::thread::spawn(move || {
        read_pattern(&mut peer);
        assert_eq!(peer.read(&mut [0]).expect("the end"), 0);
    });
    bench.until_released();
    reader.join().expect("does not panic");
    assert_eq!(bench.notes.sent, [(token, Ok(BYTES))]);
    bench.send_pattern(next);
    bench.until_sent(next, 2);
    read_pattern(&mut next_peer);
    bench.until_released();
}

#[test]
fn a_reset_frees_the_memory_of_a_peer_that_does_not_read() {
    let Some(mut bench) = Bench::zero_copy(ALWAYS) else { return };
    let (token, _peer) = bench.attach_tcp(0, 0);
    bench.send_pattern(token);
    bench.until_sent(token, 1);
    let socket = Arc::clone(&bench.uring.entries.find(token).expect("attached").socket);
    socket.reset().expect("reset");
    bench.remove(token);
    bench.until_released();
}

#[test]
fn a_send_that_waits_for_room_ends_with_its_socket() {
    let Some(mut bench) = Bench::zero_copy(ALWAYS) else { return };
    let (token, _peer) = bench.attach_tcp(0, 0);
    let mut much = bench.pattern();
    for _ in 0..40 {
        much.append(&mut bench.pattern());
    }
    bench.uring.send(token, much);
    bench.uring.wait(Some(Duration::from_millis(20)), &mut bench.notes).expect("a wait");
    assert!(bench.notes.sent.is_empty());
    assert_eq!(bench.counters.sends_in_flight.read(), 1);
    let socket = Arc::clone(&bench.uring.entries.find(token).expect("attached").socket);
    socket.reset().expect("reset");
    bench.remove(token);
    drop(socket);
    bench.until_released();
    assert_eq!(bench.counters.sends_in_flight.read(), 0);
    assert!(bench.notes.sent.is_empty(), "{:?}", bench.notes.sent);
}

#[test]
fn a_poller_that_ends_waits_for_the_peer_to_take_the_bytes() {
    let Some(mut bench) = Bench::zero_copy(ALWAYS) else { return };
    let (token, mut peer) = bench.attach_tcp(0, 0);
    bench.send_pattern(token);
    bench.until_sent(token, 1);
    let (pool, counters) = (bench.pool.clone(), Arc::clone(&bench.counters));
    let reader = std::thread::spawn(move || read_pattern(&mut peer));
    drop(bench);
    reader.join().expect("does not panic");
    assert_eq!(counters.zero_copy_held_bytes.read(), 0);
    assert_eq!(pool.stats().blocks, 0);
}

#[test]
fn a_poller_that_ends_never_frees_memory_that_the_kernel_sends_from() {
    let Some(mut bench) = Bench::zero_copy(ALWAYS) else { return };
    let (token, mut peer) = bench.attach_tcp(0, 0);
    bench.send_pattern(token);
    bench.until_sent(token, 1);
    let (pool, counters) = (bench.pool.clone(), Arc::clone(&bench.counters));
    drop(bench);
    assert_eq!(counters.zero_copy_held_bytes.read(), BYTES as u64);
    assert_eq!(pool.stats().blocks, 1);
    read_pattern(&mut peer);
}

#[test]
fn with_auto_a_connection_whose_bytes_are_copied_gets_ordinary_sends() {
    let Some(mut bench) = Bench::zero_copy(ZeroCopySend::Auto) else { return };
    let (token, mut peer) = bench.attach_tcp(0, 0);
    bench.uring.send(token, chain(&[7; 1000]));
    bench.until("a small send", |notes| notes.sent == [(token, Ok(1000))]);
    peer.read_exact(&mut [0; 1000]).expect("every byte");
    assert_eq!(bench.counts(), (0, 0, 0), "a send below the threshold");
    bench.notes.sent.clear();
    for count in 1..=3 {
        bench.send_pattern(token);
        bench.until_sent(token, count);
        read_pattern(&mut peer);
        bench.until_released();
        assert_eq!(bench.counts(), (1, 1, 1));
    }
    // As after the time of `ZERO_COPY_RETRY`.
    bench.uring.entries.find(token).expect("attached").socket.allow_zero_copy();
    bench.send_pattern(token);
    bench.until_sent(token, 4);
    read_pattern(&mut peer);
    bench.until_released();
    assert_eq!(bench.counts(), (2, 2, 2));
}

#[test]
fn unix_sockets_get_ordinary_sends() {
    let Some(mut bench) = Bench::zero_copy(ALWAYS) else { return };
    let (token, mut peer) = bench.attach(0, 0);
    let reader = std::thread::spawn(move || {
        peer.read_exact(&mut vec![0; BYTES]).expect("every byte");
        peer
    });
    bench.send_pattern(token);
    bench.until_sent(token, 1);
    reader.join().expect("does not panic");
    assert_eq!(bench.counts(), (0, 0, 0));
}

#[test]
fn memory_that_peers_do_not_take_is_bounded() {
    const COUNT: u32 = 80;
    let Some(mut bench) = Bench::zero_copy(ALWAYS) else { return };
    let peers: Vec<_> = (0..COUNT).map(|index| bench.attach_tcp(index, 0)).collect();
    for (token, _) in &peers {
        bench.send_pattern(*token);
        bench.until("it is sent", |notes| notes.sent.iter().any(|(sent, _)| sent == token));
    }
    assert_eq!(bench.held_bytes(), crate::config::uring::ZERO_COPY_HELD_BYTES_MAX);
    for (token, _) in &peers {
        let socket = Arc::clone(&bench.uring.entries.find(*token).expect("attached").socket);
        socket.reset().expect("reset");
        bench.uring.remove(*token);
    }
    bench.until_released();
}

/// A kernel thread that polls would keep the process from ending: see `ZeroCopyRule::NEVER`.
#[test]
fn sends_through_every_engine_are_ordinary() {
    for engine in ENGINES {
        let options = UringOptions::new().zero_copy_send(ALWAYS);
        let Some((mut bench, rings)) = Bench::polled(engine, &options) else { return };
        let (token, mut peer) = bench.attach_tcp(0, 0);
        let socket = bench.socket(token);
        assert!(send(&rings, token, &socket, b"of a thread"));
        bench.until("it is sent", |notes| notes.sent == [(token, Ok(11))]);
        bench.uring.send(token, chain(b"of a poller"));
        bench.until("it is sent", |notes| notes.sent.len() == 2);
        peer.read_exact(&mut [0; 22]).expect("every byte");
        bench.remove(token);
        assert_eq!((bench.held_bytes(), bench.counts()), (0, (0, 0, 0)));
    }
}

/// A process may lock few bytes of memory, and the kernel then refuses zero-copy sends.
#[test]
fn a_send_that_may_lock_no_memory_becomes_an_ordinary_one() {
    let rule = UringOptions {
        zero_copy_send: ALWAYS,
        has_zero_copy_reports: true,
        ..UringOptions::default()
    }
    .zero_copy_rule();
    let counters = Counters::default();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let socket = Socket::adopt(listener.into()).expect("a socket");
    for errno in [libc::ENOMEM, libc::ENOBUFS] {
        socket.allow_zero_copy();
        assert!(socket.suits_zero_copy(1, &rule, &counters));
        let mut sending = Sending::new(chain(b"hello"));
        let _ = sending.prepare(&socket, 0, Some(rule));
        let progress = sending.complete(-errno, &socket, &counters);
        assert!(matches!(progress, Progress::Unfinished), "{progress:?}");
        assert!(!socket.suits_zero_copy(1, &rule, &counters));
    }
    assert_eq!(counters.zero_copy_stops.read(), 2);
}

#[test]
fn a_host_without_support_gets_ordinary_sends() {
    let none = Capabilities::without_rings(String::new());
    let listed = Capabilities { zero_copy_send: true, ..none.clone() };
    let all = Capabilities { zero_copy_reports: true, ..listed.clone() };
    let found = |found: &Capabilities, which: ZeroCopySend| {
        UringOptions::new().zero_copy_send(which).supported(found).zero_copy_send
    };
    for which in [ZeroCopySend::Off, ZeroCopySend::Auto, ALWAYS] {
        assert_eq!(found(&none, which), ZeroCopySend::Off);
        assert_eq!(found(&all, which), which);
    }
    assert_eq!(found(&listed, ZeroCopySend::Auto), ZeroCopySend::Off);
    assert_eq!(found(&listed, ALWAYS), ALWAYS);
    let rule = UringOptions::new().zero_copy_send(ALWAYS).supported(&listed).zero_copy_rule();
    assert!(!rule.has_reports, "older kernels refuse an operation that asks for reports");
}
