//! Slots, tokens, buffers and operations in flight, which the behaviour suite cannot see.

mod shared_sends;
mod zero_copy;

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::*;
use crate::buffer::Slice;
use crate::config::RingTier;
use crate::sys::{Flow, Received};

/// A sink that keeps what it gets.
#[derive(Default)]
struct Notes {
    received: HashMap<u64, Vec<u8>>,
    lent: Vec<Slice>,
    ended: Vec<(Token, Option<i32>)>,
    sent: Vec<(Token, Result<usize, Option<i32>>)>,
    accepted: Vec<Socket>,
    removed: Vec<Token>,
    hung_up: Vec<Token>,
    /// Tokens in the order of their bytes.
    order: Vec<Token>,
    keeps_lent: bool,
    /// Asks for a pause from this many bytes on.
    pauses_at: Option<usize>,
}

impl Sink for Notes {
    fn complete(&mut self, token: Token, completion: Completion<'_>) -> Flow {
        let errno = |result: io::Result<()>| result.err().and_then(|error| error.raw_os_error());
        match completion {
            Completion::Received(Received::Copied(bytes)) => self.receive(token, bytes),
            Completion::Received(Received::Lent(slice)) => {
                self.receive(token, &slice);
                if self.keeps_lent {
                    self.lent.push(slice);
                }
            }
            Completion::Ended(result) => self.ended.push((token, errno(result))),
            Completion::Sent(result) => {
                self.sent.push((token, result.map_err(|error| error.raw_os_error())));
            }
            Completion::Accepted(socket, _) => self.accepted.push(socket),
            Completion::Removed => self.removed.push(token),
            Completion::HungUp => self.hung_up.push(token),
            Completion::AcceptFailed(_) | Completion::Connected(_) | Completion::Readable(..) => {}
        }
        let is_full = self.pauses_at.is_some_and(|bytes| self.of(token).len() >= bytes);
        if is_full { Flow::Pause } else { Flow::Continue }
    }
}

impl Notes {
    fn receive(&mut self, token: Token, bytes: &[u8]) {
        self.order.push(token);
        self.received.entry(token.bits()).or_default().extend_from_slice(bytes);
    }

    fn of(&self, token: Token) -> &[u8] {
        self.received.get(&token.bits()).map_or(&[], Vec::as_slice)
    }
}

struct Bench {
    uring: Uring,
    notes: Notes,
    pool: Pool,
    counters: Arc<Counters>,
}

impl Bench {
    /// `None` where the host has no io_uring. Fails there with `REQUIRE_ALL_BACKENDS=1`.
    fn new(options: &UringOptions) -> Option<Bench> {
        Bench::with(options, |_| None)
    }

    /// With the engine of `sqpoll`.
    fn with(
        options: &UringOptions,
        engine: impl FnOnce(&Arc<Counters>) -> Option<Engine>,
    ) -> Option<Bench> {
        let pool = Pool::new();
        let counters = Arc::new(Counters::default());
        let wake = Arc::new(Wake::new().expect("an eventfd"));
        let found = probe::probe();
        if found.tier.is_none() {
            let must = std::env::var_os("REQUIRE_ALL_BACKENDS").is_some_and(|value| value == "1");
            assert!(!must, "io_uring is required: {}", found.reason);
            eprintln!("skipped, no io_uring: {}", found.reason);
            return None;
        }
        let options = RingOptions { uring: options.supported(&found), engine: engine(&counters) };
        let uring = Uring::new(&wake, &pool, &counters, &options);
        let uring = uring.expect("the probe has passed");
        Some(Bench { uring, notes: Notes::default(), pool, counters })
    }

    /// Waits until `is_done`.
    fn until(&mut self, what: &str, is_done: impl Fn(&Notes) -> bool) {
        let begun = Instant::now();
        while !is_done(&self.notes) {
            assert!(begun.elapsed() < Duration::from_secs(10), "not within 10 s: {what}");
            let timeout = Some(Duration::from_millis(20));
            self.uring.wait(timeout, &mut self.notes).expect("a wait");
        }
    }

    fn attach(&mut self, index: u32, generation: u32) -> (Token, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        theirs.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let socket = Arc::new(Socket::adopt(ours.into()).expect("a stream"));
        let token = Token::new(index, generation);
        self.uring.attach(token, socket, 1 << 20).expect("attached");
        (token, theirs)
    }

    fn remove(&mut self, token: Token) {
        self.uring.remove(token);
        self.until("it is removed", |notes| notes.removed.contains(&token));
    }
}

fn chain(bytes: &[u8]) -> Chain {
    let mut chain = Chain::new();
    chain.push(Slice::from(bytes.to_vec()));
    chain
}

#[test]
fn a_removed_token_hears_nothing_more_and_its_slot_can_be_used_again() {
    let Some(mut bench) = Bench::new(&UringOptions::new()) else { return };
    for generation in 0..100 {
        let (token, mut peer) = bench.attach(0, generation);
        peer.write_all(&generation.to_ne_bytes()).expect("written");
        if generation % 2 == 0 {
            bench.until("bytes", |notes| notes.of(token).len() == 4);
            assert_eq!(bench.notes.of(token), generation.to_ne_bytes());
        }
        let before = bench.notes.of(token).len();
        bench.remove(token);
        assert!(bench.notes.of(token).len() - before <= 4);
        // The descriptor is closed before `Removed` is reported.
        let mut rest = Vec::new();
        let ended = peer.read_to_end(&mut rest);
        // Closing a Unix socket with unread bytes resets the connection.
        let is_over =
            ended.map_or_else(|error| error.kind() == ErrorKind::ConnectionReset, |_| true);
        assert!(rest.is_empty() && is_over);
    }
    assert_eq!(bench.uring.operations.in_flight, 1, "only the wake-up is armed");
}

#[test]
fn a_send_under_way_keeps_its_slot_and_its_memory_until_it_is_over() {
    let Some(mut bench) = Bench::new(&UringOptions::new()) else { return };
    let (token, mut peer) = bench.attach(0, 0);
    // More bytes than a socket pair holds, and the peer does not read.
    bench.uring.send(token, chain(&vec![7; 4 << 20]));
    bench.uring.wait(Some(Duration::from_millis(20)), &mut bench.notes).expect("a wait");
    assert!(bench.notes.sent.is_empty());
    bench.uring.remove(token);
    assert!(bench.uring.entries.find(token).is_some(), "forgotten with a send in flight");
    bench.until("it is removed", |notes| notes.removed == [token]);
    assert!(bench.uring.entries.find(token).is_none());
    assert_eq!(bench.counters.sends_in_flight.read(), 0);
    let mut rest = Vec::new();
    peer.read_to_end(&mut rest).expect("what was sent before");
    assert!(rest.len() < 4 << 20 && rest.iter().all(|byte| *byte == 7));
}

#[test]
fn sends_of_many_pieces_and_short_ones_arrive_whole_and_in_order() {
    let Some(mut bench) = Bench::new(&UringOptions::new()) else { return };
    let (token, mut peer) = bench.attach(0, 0);
    let mut gather = Chain::new();
    let bytes: Vec<u8> = (0..1_000_000u32).map(|index| (index % 251) as u8).collect();
    for piece in bytes.chunks(777) {
        gather.push(Slice::from(piece.to_vec()));
    }
    bench.uring.send(token, gather);
    let total = bytes.len();
    let reader = std::thread::spawn(move || {
        let mut read = vec![0; total];
        peer.read_exact(&mut read).expect("all of it");
        (read, peer)
    });
    bench.until("all is sent", |notes| !notes.sent.is_empty());
    assert_eq!(bench.notes.sent, [(token, Ok(total))]);
    assert_eq!(reader.join().expect("does not panic").0, bytes);
}

#[test]
fn a_send_to_a_peer_that_is_gone_fails_once() {
    let Some(mut bench) = Bench::new(&UringOptions::new()) else { return };
    let (token, peer) = bench.attach(0, 0);
    drop(peer);
    bench.until("the end", |notes| !notes.ended.is_empty());
    bench.uring.send(token, chain(b"hello"));
    bench.until("the failure", |notes| !notes.sent.is_empty());
    assert_eq!(bench.notes.sent, [(token, Err(Some(libc::EPIPE)))]);
    bench.remove(token);
}

#[test]
fn connections_without_a_buffer_are_served_in_the_order_in_which_they_starved() {
    const COUNT: u32 = 64;
    let options = UringOptions::new().receive_buffers(1, 1);
    let Some(mut bench) = Bench::new(&options) else { return };
    let mut peers: Vec<_> = (0..COUNT).map(|index| bench.attach(index, 0)).collect();
    bench.uring.wait(Some(Duration::ZERO), &mut bench.notes).expect("a wait");
    for (_, peer) in &mut peers {
        peer.write_all(b"x").expect("written");
    }
    // One pass takes all of them: one connection finds the buffer, and the others starve.
    bench.uring.wait(Some(Duration::ZERO), &mut bench.notes).expect("a wait");
    let class = bench.uring.operations.buffers.class(Size::Small);
    let starved: Vec<Token> = class.starved.iter().map(|(token, _)| *token).collect();
    assert!(starved.len() > 10, "{} starve", starved.len());
    let served = bench.notes.order.len();
    bench.until("all are served", |notes| notes.order.len() == COUNT as usize);
    let mut expected: VecDeque<Token> = starved.into();
    for token in &bench.notes.order[served..] {
        if expected.front() == Some(token) {
            expected.pop_front();
        }
    }
    assert!(expected.is_empty(), "out of order: {:?}", bench.notes.order);
    assert!(bench.counters.starvations.read() >= 10);
    assert!(bench.counters.starved_ns.read() > 0);
}

#[test]
fn a_lent_buffer_is_replaced_at_once_and_keeps_its_bytes() {
    let options = UringOptions::new().receive_buffers(2, 1);
    let Some(mut bench) = Bench::new(&options) else { return };
    bench.notes.keeps_lent = true;
    let (token, mut peer) = bench.attach(0, 0);
    for round in 0..50u8 {
        peer.write_all(&[round; 2000]).expect("written");
        bench.until("the round", |notes| notes.of(token).len() == 2000 * (usize::from(round) + 1));
        assert_eq!(bench.uring.operations.buffers.class(Size::Small).ring.ready(), 2);
    }
    assert_eq!(bench.counters.starvations.read(), 0);
    for (round, slice) in bench.notes.lent.iter().enumerate() {
        assert!(slice.iter().all(|byte| usize::from(*byte) == round));
    }
    assert_eq!(bench.pool.stats().blocks, bench.notes.lent.len() as u64);
    bench.notes.lent.clear();
    assert_eq!(bench.pool.stats().blocks, 0);
}

#[test]
fn buffers_that_a_burst_needed_go_back_and_the_others_serve_on() {
    const COUNT: u32 = 200;
    let Some(mut bench) = Bench::new(&UringOptions::new()) else { return };
    let small_first = usize::from(crate::config::uring::FIRST_SMALL_BUFFERS);
    let mut peers: Vec<_> = (0..COUNT).map(|index| bench.attach(index, 0)).collect();
    let mut received = 0;
    for _ in 0..2 {
        for (_, peer) in &mut peers {
            peer.write_all(&[7; 3000]).expect("written");
        }
        received += 3000;
        bench.until("the burst", |notes| {
            (0..COUNT).all(|index| notes.of(Token::new(index, 0)).len() == received)
        });
    }
    let ready = |bench: &Bench| bench.uring.operations.buffers.ready(Size::Small);
    assert!(ready(&bench) > small_first, "the burst found enough buffers at first");
    if bench.uring.operations.ring.tier() != RingTier::Defer {
        assert!(!bench.uring.has_grown(), "the kernel may take buffers at any time");
        return;
    }
    // A completion that is not taken names a buffer.
    peers[0].1.write_all(&[8; 3000]).expect("written");
    bench.uring.enter(Until::Timeout(Duration::from_secs(10))).expect("an enter");
    assert!(bench.uring.operations.ring.completion_count() > 0, "the bytes have come");
    let before = ready(&bench);
    bench.uring.shrink();
    bench.uring.shrink();
    assert_eq!(ready(&bench), before);
    bench.until("its bytes", |notes| notes.of(peers[0].0).len() == received + 3000);

    // The first call finds the demand of the burst.
    bench.uring.shrink();
    bench.uring.shrink();
    assert_eq!(ready(&bench), small_first);
    assert!(!bench.uring.has_grown());
    assert_eq!(bench.pool.stats().blocks, 0);
    for round in 0..3 {
        for (_, peer) in &mut peers[1..] {
            peer.write_all(&[round; 3000]).expect("written");
        }
        received += 3000;
        bench.until("what follows", |notes| {
            (1..COUNT).all(|index| notes.of(Token::new(index, 0)).len() == received)
        });
        for index in 1..COUNT {
            let bytes = bench.notes.of(Token::new(index, 0));
            assert!(bytes[received - 3000..].iter().all(|byte| *byte == round));
        }
    }
}

#[test]
fn buffers_of_a_size_go_back_when_no_receive_uses_them() {
    let options = UringOptions::new();
    let with_kernel_thread = Bench::polled(shared_sends::SHARED, &options).map(|(bench, _)| bench);
    for bench in [Bench::new(&options), with_kernel_thread].into_iter().flatten() {
        buffers_go_back(bench);
    }
}

fn buffers_go_back(mut bench: Bench) {
    let ready = |bench: &Bench| bench.uring.operations.buffers.ready(Size::Large);
    for round in 0..2 {
        let (token, mut peer) = bench.attach(round, 0);
        let mut sent = 0;
        while bench.uring.entries.find(token).expect("attached").armed_size != Size::Large {
            peer.write_all(&[7; 100_000]).expect("written");
            sent += 100_000;
            bench.until("the bytes", |notes| notes.of(token).len() == sent);
        }
        for _ in 0..4 {
            bench.uring.shrink();
        }
        assert!(ready(&bench) > 0, "the kernel may fill these");
        bench.remove(token);
        assert!(bench.uring.has_grown(), "shrinking gives them back");
        bench.uring.shrink();
        bench.uring.shrink();
        assert_eq!((ready(&bench), bench.uring.has_grown()), (0, false));
        assert_eq!(bench.pool.stats().blocks, 0);
    }
}

#[test]
fn a_paused_connection_receives_nothing_until_it_resumes() {
    let Some(mut bench) = Bench::new(&UringOptions::new()) else { return };
    bench.notes.pauses_at = Some(1);
    let (token, mut peer) = bench.attach(0, 0);
    peer.write_all(b"one").expect("written");
    bench.until("the first", |notes| notes.of(token) == b"one");
    let is_off = |bench: &mut Bench| {
        bench.uring.entries.find(token).expect("attached").reception == Reception::Off
    };
    while !is_off(&mut bench) {
        bench.uring.wait(Some(Duration::from_millis(20)), &mut bench.notes).expect("a wait");
    }
    peer.write_all(b"two").expect("written");
    bench.uring.wait(Some(Duration::from_millis(20)), &mut bench.notes).expect("a wait");
    assert_eq!(bench.notes.of(token), b"one");
    bench.uring.resume(token);
    bench.until("the second", |notes| notes.of(token) == b"onetwo");
}

#[test]
fn full_queues_lose_nothing() {
    const COUNT: u32 = 200;
    let options = UringOptions::new().queue_entries(2, 4);
    let Some(mut bench) = Bench::new(&options) else { return };
    let mut peers: Vec<_> = (0..COUNT).map(|index| bench.attach(index, 0)).collect();
    for round in 1..=5 {
        for (token, peer) in &mut peers {
            peer.write_all(&token.bits().to_ne_bytes()).expect("written");
        }
        bench.until("the round", |notes| {
            notes.received.len() == COUNT as usize
                && notes.received.values().all(|bytes| bytes.len() == 8 * round)
        });
    }
    for (token, _) in &peers {
        let expected = token.bits().to_ne_bytes().repeat(5);
        assert_eq!(bench.notes.of(*token), expected);
    }
    assert!(bench.counters.submit_calls.read() > 0);
    assert!(bench.counters.completion_overflows.read() + bench.counters.rearms.read() > 0);
}

#[test]
fn a_ring_taken_down_closes_what_it_has_accepted_and_lets_the_port_go() {
    let Some(mut bench) = Bench::new(&UringOptions::new()) else { return };
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("bound");
    let socket = Arc::new(Socket::adopt(listener.into()).expect("a listener"));
    bench.uring.listen(Token::new(0, 0), socket).expect("listens");
    bench.uring.wait(Some(Duration::ZERO), &mut bench.notes).expect("a wait");
    let mut clients: Vec<_> =
        (0..8).map(|_| TcpStream::connect(addr).expect("connected")).collect();
    // The kernel accepts the connections, and nothing takes the completions.
    bench.uring.operations.ring.enter(Until::Now, &bench.counters).expect("entered");
    drop(bench);
    for client in &mut clients {
        client.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let ended = client.read(&mut [0]);
        let is_over = match &ended {
            Ok(bytes) => *bytes == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        };
        assert!(is_over, "{ended:?}");
    }
    drop(clients);
    assert!(TcpListener::bind(addr).is_ok(), "the address is still in use");
}

#[test]
fn after_lost_completions_connections_fail_and_listeners_go_on() {
    let Some(mut bench) = Bench::new(&UringOptions::new()) else { return };
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("bound");
    let socket = Arc::new(Socket::adopt(listener.into()).expect("a listener"));
    bench.uring.listen(Token::new(0, 0), socket).expect("listens");
    let (idle, _idle_peer) = bench.attach(1, 0);
    let (sending, _sending_peer) = bench.attach(2, 0);
    bench.uring.send(sending, chain(&vec![7; 4 << 20]));
    bench.uring.wait(Some(Duration::ZERO), &mut bench.notes).expect("a wait");

    bench.uring.rebuild(&mut bench.notes).expect("a new ring");
    let lost = Some(libc::EBADR);
    bench.notes.ended.sort_unstable();
    assert_eq!(bench.notes.ended, [(idle, lost), (sending, lost)]);
    assert_eq!(bench.notes.sent, [(sending, Err(lost))]);
    bench.remove(idle);
    bench.remove(sending);
    let _client = TcpStream::connect(addr).expect("connected");
    bench.until("it is accepted", |notes| notes.accepted.len() == 1);
}

#[test]
fn every_tier_that_the_kernel_has_works() {
    for tier in [RingTier::Plain, RingTier::Coop, RingTier::Defer] {
        let Some(mut bench) = Bench::new(&UringOptions::new().tier_max(tier)) else { return };
        assert!(bench.uring.operations.ring.tier() <= tier);
        let (token, mut peer) = bench.attach(0, 0);
        peer.write_all(b"hello").expect("written");
        bench.until("bytes", |notes| notes.of(token) == b"hello");
        bench.uring.send(token, chain(b"world"));
        bench.until("the send", |notes| notes.sent == [(token, Ok(5))]);
        bench.remove(token);
    }
}

#[test]
fn an_end_that_was_known_before_the_pause_is_told_all_the_same() {
    const BYTES: usize = 50_000;
    let options = UringOptions::new().receive_buffers(1, 1);
    let Some(mut bench) = Bench::new(&options) else { return };
    // Far more bytes than fit the one buffer before the end is known.
    bench.notes.pauses_at = Some(BYTES / 2);
    let (token, mut peer) = bench.attach(0, 0);
    peer.write_all(&[7; BYTES]).expect("written");
    drop(peer);
    bench.until("the end is told", |notes| notes.hung_up.contains(&token));
    bench.until("it pauses", |notes| notes.of(token).len() >= BYTES / 2);
    assert!(bench.notes.of(token).len() < BYTES && bench.notes.ended.is_empty());
    bench.notes.pauses_at = None;
    bench.uring.resume(token);
    bench.until("all is received", |notes| notes.ended == [(token, None)]);
    assert_eq!(bench.notes.of(token), [7; BYTES]);
}

#[test]
fn an_end_that_was_known_before_the_first_byte_is_told_behind_the_pause() {
    let Some(mut bench) = Bench::new(&UringOptions::new()) else { return };
    bench.notes.pauses_at = Some(1);
    let (ours, mut peer) = UnixStream::pair().expect("a socket pair");
    peer.write_all(&[7; 50_000]).expect("written");
    drop(peer);
    let token = Token::new(0, 0);
    let socket = Arc::new(Socket::adopt(ours.into()).expect("a socket"));
    bench.uring.attach(token, socket, 1).expect("attached");
    bench.until("the end is told", |notes| notes.hung_up.contains(&token));
    assert!(bench.notes.of(token).len() < 50_000 && bench.notes.ended.is_empty());
    bench.notes.pauses_at = None;
    bench.uring.resume(token);
    bench.until("all is received", |notes| notes.ended == [(token, None)]);
    assert_eq!(bench.notes.of(token), [7; 50_000]);
}

#[test]
fn an_end_that_came_with_the_bytes_before_the_arming_is_noticed() {
    for is_tcp in [false, true] {
        let Some(mut bench) = Bench::new(&UringOptions::new()) else { return };
        let token = Token::new(0, 0);
        let ours: std::os::fd::OwnedFd = if is_tcp {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let mut peer = TcpStream::connect(listener.local_addr().expect("bound")).expect("up");
            let (ours, _) = listener.accept().expect("accepted");
            peer.write_all(b"last").expect("written");
            // Dropping the peer sends a reset, not a FIN.
            let no_linger = Some(Duration::ZERO);
            rustix::net::sockopt::set_socket_linger(&peer, no_linger).expect("set");
            ours.into()
        } else {
            let (ours, mut peer) = UnixStream::pair().expect("a socket pair");
            peer.write_all(b"last").expect("written");
            ours.into()
        };
        let socket = Arc::new(Socket::adopt(ours).expect("a stream"));
        bench.uring.attach(token, socket, 1 << 20).expect("attached");
        bench.until("the end", |notes| !notes.ended.is_empty());
        let is_whole = bench.notes.of(token) == b"last";
        assert!(is_whole || is_tcp, "a reset may take the bytes along, a close may not");
    }
}
