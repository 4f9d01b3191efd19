//! Sends that any thread starts, through rings that kernel threads poll.

use super::*;
use crate::config::{SqpollOptions, SqpollPreset};

/// Every way of a send: through send rings with their own kernel threads, beside a receive ring
/// with and without a kernel thread; through the receive ring; through send rings on the kernel
/// thread of the receive ring.
pub(super) const ENGINES: [SqpollOptions; 4] = [
    SqpollOptions::new().preset(SqpollPreset::Config1).send_rings(2).send_threads(1),
    SqpollOptions::new().preset(SqpollPreset::Config2).send_rings(3).send_threads(2),
    SHARED,
    SHARED.send_rings(2),
];
pub(super) const SHARED: SqpollOptions = SqpollOptions::new().preset(SqpollPreset::Shared);

/// More bytes than a socket pair holds.
const MUCH: usize = 4 << 20;

impl Bench {
    pub(super) fn polled(
        sqpoll: SqpollOptions,
        options: &UringOptions,
    ) -> Option<(Bench, Arc<SendRings>)> {
        let plan = sqpoll.plan(2, 1, false).expect("valid settings");
        let mut rings = None;
        let bench = Bench::with(options, |counters| {
            let made = Arc::new(SendRings::new(&plan, counters));
            rings = Some(Arc::clone(&made));
            Some(Engine::new(plan, &made, &Arc::default()))
        });
        Some((bench?, rings.expect("made with the engine")))
    }

    pub(super) fn socket(&mut self, token: Token) -> Arc<Socket> {
        Arc::clone(&self.uring.entries.find(token).expect("attached").socket)
    }
}

/// Runs `test` with every engine.
fn each(test: impl Fn(Bench, Arc<SendRings>)) {
    for engine in ENGINES {
        let Some((bench, rings)) = Bench::polled(engine, &UringOptions::new()) else { return };
        test(bench, rings);
    }
}

pub(super) fn send(rings: &SendRings, token: Token, socket: &Arc<Socket>, bytes: &[u8]) -> bool {
    rings.send(token, socket, &mut chain(bytes))
}

#[test]
fn a_send_of_another_thread_wakes_a_poller_that_sleeps() {
    const ROUNDS: usize = 200;
    each(|mut bench, rings| {
        let (token, mut peer) = bench.attach(0, 0);
        let socket = bench.socket(token);
        let begun = Instant::now();
        for round in 0..ROUNDS {
            std::thread::scope(|scope| {
                scope.spawn(|| assert!(send(&rings, token, &socket, &[round as u8; 100])));
                // Without wake-ups, the rounds would take minutes.
                while bench.notes.sent.len() <= round {
                    let timeout = Some(Duration::from_secs(5));
                    bench.uring.wait(timeout, &mut bench.notes).expect("a wait");
                }
            });
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "woken by its own timeout");
        assert_eq!(bench.notes.sent, [(token, Ok(100)); ROUNDS]);
        let mut read = vec![0; 100 * ROUNDS];
        peer.read_exact(&mut read).expect("all of it");
        let in_order = read.chunks(100).zip(0..).all(|(part, round)| part == [round as u8; 100]);
        assert!(in_order);
        assert_eq!(bench.counters.send_calls.read(), 0);
    });
}

#[test]
fn requests_are_received_and_answered() {
    each(|mut bench, _rings| {
        let mut peers: Vec<_> = (0..50).map(|index| bench.attach(index, 7)).collect();
        for round in 1..=3 {
            for (token, peer) in &mut peers {
                peer.write_all(&token.bits().to_ne_bytes()).expect("written");
            }
            bench.until("the round", |notes| {
                notes.received.len() == 50
                    && notes.received.values().all(|bytes| bytes.len() == 8 * round)
            });
            for (token, peer) in &mut peers {
                bench.uring.send(*token, chain(&token.bits().to_ne_bytes()));
                let mut answer = [0; 8];
                peer.read_exact(&mut answer).expect("an answer");
                assert_eq!(answer, token.bits().to_ne_bytes());
            }
            bench.until("all are sent", |notes| notes.sent.len() == 50 * round);
        }
        for (token, _) in peers {
            bench.remove(token);
        }
        assert_eq!(bench.counters.sends_in_flight.read(), 0);
    });
}

#[test]
fn a_shared_send_owns_its_socket_until_it_is_over_and_its_late_end_is_not_reported() {
    each(|mut bench, rings| {
        let (old, mut peer) = bench.attach(0, 0);
        assert!(send(&rings, old, &bench.socket(old), &vec![7; MUCH]));
        bench.uring.wait(Some(Duration::from_millis(20)), &mut bench.notes).expect("a wait");
        bench.remove(old);
        // The slot has a new owner. A closed descriptor would have a new owner too.
        let (new, mut other) = bench.attach(0, 1);
        let reader = std::thread::spawn(move || {
            let mut read = Vec::new();
            peer.read_to_end(&mut read).expect("all of it, and then the end");
            read
        });
        let is_over = |bench: &Bench| bench.counters.sends_in_flight.read() == 0;
        let begun = Instant::now();
        while !is_over(&bench) && begun.elapsed() < Duration::from_secs(10) {
            let timeout = Some(Duration::from_millis(20));
            bench.uring.wait(timeout, &mut bench.notes).expect("a wait");
        }
        assert!(is_over(&bench) && bench.notes.sent.is_empty(), "{:?}", bench.notes.sent);
        assert_eq!(reader.join().expect("does not panic"), vec![7; MUCH]);
        assert!(send(&rings, new, &bench.socket(new), b"mine"));
        bench.until("its own send", |notes| notes.sent == [(new, Ok(4))]);
        let mut read = [0; 4];
        other.read_exact(&mut read).expect("its own bytes");
        assert_eq!(read, *b"mine");
    });
}

#[test]
fn a_send_ends_with_its_socket() {
    each(|mut bench, rings| {
        let (token, _peer) = bench.attach(0, 0);
        let socket = bench.socket(token);
        assert!(send(&rings, token, &socket, &vec![7; MUCH]));
        bench.uring.wait(Some(Duration::from_millis(20)), &mut bench.notes).expect("a wait");
        assert!(bench.notes.sent.is_empty());
        socket.shutdown(crate::sys::socket::Side::Both).expect("shut down");
        bench.until("the failure", |notes| notes.sent == [(token, Err(Some(libc::EPIPE)))]);
    });
}

#[test]
fn a_poller_that_ends_ends_its_sends_and_takes_no_more() {
    each(|mut bench, rings| {
        let (token, mut peer) = bench.attach(0, 0);
        let socket = bench.socket(token);
        assert!(send(&rings, token, &socket, &vec![7; MUCH]));
        assert_eq!(bench.counters.sends_in_flight.read(), 1);
        let counters = Arc::clone(&bench.counters);
        assert!(rings.usage().0 > 0);
        drop(bench);
        assert_eq!(counters.sends_in_flight.read(), 0);
        assert_eq!(rings.usage().0, 0, "kernel threads remain");
        let mut kept = chain(b"kept");
        assert!(!rings.send(token, &socket, &mut kept));
        assert_eq!(kept.front_slice(), b"kept");
        drop(socket);
        let mut rest = Vec::new();
        peer.read_to_end(&mut rest).expect("what was sent before");
        assert!(rest.len() < MUCH);
    });
}

#[test]
fn peers_that_do_not_read_keep_nobody_from_sending() {
    const STUCK: u32 = 40;
    // A completion queue with room for four.
    let options = UringOptions::new().queue_entries(2, 4);
    for engine in [SHARED.send_entries(1), SHARED.send_rings(1).send_entries(1)] {
        let Some((mut bench, rings)) = Bench::polled(engine, &options) else { return };
        let stuck: Vec<_> = (0..STUCK).map(|index| bench.attach(index, 0)).collect();
        for (token, _) in &stuck {
            bench.uring.send(*token, chain(&vec![7; MUCH]));
        }
        let (token, mut peer) = bench.attach(STUCK, 0);
        let socket = bench.socket(token);
        for taken in 1..=100 {
            // A full queue refuses the send. A flush would then send with a system call.
            while !send(&rings, token, &socket, b"through") {
                let timeout = Some(Duration::from_millis(1));
                bench.uring.wait(timeout, &mut bench.notes).expect("a wait");
            }
            bench.until("it is sent", |notes| notes.sent.len() == taken);
        }
        let taken = 100;
        let mut read = vec![0; 7 * taken];
        peer.read_exact(&mut read).expect("what was taken");
        assert!(read.chunks(7).all(|part| part == b"through"));
        assert!(
            bench.notes.sent.iter().all(|(whose, _)| *whose == token),
            "who is stuck is not through"
        );
        // All sends end at once, and the completion queue has room for four.
        for (token, _) in &stuck {
            let socket = bench.socket(*token);
            socket.shutdown(crate::sys::socket::Side::Both).expect("shut down");
        }
        bench.until("all have ended", |notes| notes.sent.len() == taken + STUCK as usize);
        assert_eq!(bench.counters.sends_in_flight.read(), 0);
    }
}

#[test]
fn what_finds_the_queue_full_is_refused_to_others_and_kept_by_the_poller() {
    let options = UringOptions::new().queue_entries(1, 64);
    let Some((mut bench, rings)) = Bench::polled(SHARED.send_entries(1), &options) else { return };
    let mut peers: Vec<_> = (0..64).map(|index| bench.attach(index, 0)).collect();
    let sockets: Vec<_> = peers.iter().map(|(token, _)| bench.socket(*token)).collect();
    // More sends at once than fit a queue of one entry, even with a fast kernel thread.
    let mut refused = 0;
    for (index, (token, _)) in peers.iter().enumerate() {
        if index % 2 == 0 {
            bench.uring.send(*token, chain(b"kept"));
        } else if !send(&rings, *token, &sockets[index], b"kept") {
            refused += 1;
            bench.uring.send(*token, chain(b"kept"));
        }
    }
    assert!(refused > 0 && bench.counters.full_send_rings.read() > refused);
    bench.until("all are sent", |notes| notes.sent.len() == 64);
    for (_, peer) in &mut peers {
        let mut read = [0; 4];
        peer.read_exact(&mut read).expect("the bytes");
        assert_eq!(read, *b"kept");
    }
}

#[test]
fn after_lost_completions_sends_go_through_the_new_ring() {
    each(|mut bench, rings| {
        let (old, _peer) = bench.attach(0, 0);
        bench.uring.wait(Some(Duration::ZERO), &mut bench.notes).expect("a wait");
        bench.uring.rebuild(&mut bench.notes).expect("a new ring");
        assert_eq!(bench.notes.ended, [(old, Some(libc::EBADR))]);
        bench.remove(old);
        let (token, mut peer) = bench.attach(1, 0);
        assert!(send(&rings, token, &bench.socket(token), b"new"));
        bench.until("the send", |notes| notes.sent == [(token, Ok(3))]);
        peer.write_all(b"hello").expect("written");
        bench.until("bytes", |notes| notes.of(token) == b"hello");
        assert!(rings.usage().0 > 0);
    });
}

#[test]
fn a_connection_is_pinned_to_one_ring_and_all_rings_are_used() {
    let plan = |seed| {
        let options = SqpollOptions::new().preset(SqpollPreset::Config1).seed(seed);
        options.plan(2, 1, false).expect("valid settings")
    };
    let rings = |seed| SendRings::new(&plan(seed), &Arc::default());
    let choice = |seed| -> Vec<usize> {
        let rings = rings(seed);
        (0..1000).map(|index| rings.index(Token::new(index, 3))).collect()
    };
    let chosen = choice(42);
    assert_eq!(chosen, choice(42));
    assert_ne!(chosen, choice(43));
    for ring in 0..16 {
        let share = chosen.iter().filter(|one| **one == ring).count();
        assert!((30..120).contains(&share), "ring {ring} has {share} of 1000");
    }
}

#[test]
fn a_busy_poller_makes_no_system_call() {
    each(|mut bench, rings| {
        let (token, mut peer) = bench.attach(0, 0);
        let socket = bench.socket(token);
        let calls =
            |bench: &Bench| bench.counters.wait_calls.read() + bench.counters.submit_calls.read();
        bench.until("it is armed", |notes| notes.received.is_empty());
        let is_polled = bench.uring.operations.ring.collector().is_some();
        let before = calls(&bench);
        for round in 1..=100 {
            peer.write_all(b"request").expect("written");
            while bench.notes.of(token).len() < 7 * round {
                bench.uring.wait(Some(Duration::ZERO), &mut bench.notes).expect("a look");
            }
            assert!(send(&rings, token, &socket, b"answer"));
            while bench.notes.sent.len() < round {
                bench.uring.wait(Some(Duration::ZERO), &mut bench.notes).expect("a look");
            }
        }
        // Without a kernel thread on the receive ring, the poller must enter the kernel.
        assert!(!is_polled || calls(&bench) == before, "{} calls", calls(&bench) - before);
    });
}
