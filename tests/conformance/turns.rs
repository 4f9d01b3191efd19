//! One run at a time for each connection, in order, for all costs of handlers, and while they
//! change their placement.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ringpoll::{Connection, Result, ServerHandle};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, turns:
            handlers_take_turns_in_order_while_their_cost_changes
        }
    };
}
pub(crate) use cases;

/// Connections of each client.
const CONNECTIONS: usize = 12;
/// Numbers that a client has in flight on each connection while handlers are costly.
const DEPTH: usize = 16;
/// Tells a handler to panic.
const PANIC: u64 = u64::MAX;

/// What a connection's handlers know of each other.
#[derive(Default)]
struct Turn {
    is_taken: AtomicBool,
    next: AtomicU64,
}

/// Answers one number, which must be the next. For one number of four it computes for a while
/// before that: handlers that all take the same may stay on a poller where CPUs are short.
async fn count(mut conn: Connection, cost: Duration) -> Result<()> {
    let turn = conn.context::<Turn>().expect("set before the first run");
    assert!(!turn.is_taken.swap(true, Ordering::SeqCst), "two handlers run at once");
    let number = conn.next(8).await?;
    let value = u64::from_be_bytes(number[..].try_into().expect("eight bytes"));
    assert_ne!(value, PANIC, "{ON_PURPOSE}");
    assert_eq!(value, turn.next.fetch_add(1, Ordering::SeqCst), "lost or out of order");
    let begun = Instant::now();
    while value % 4 == 0 && begun.elapsed() < cost {
        std::hint::spin_loop();
    }
    conn.write(number)?;
    conn.flush().await?;
    assert!(turn.is_taken.swap(false, Ordering::SeqCst), "another handler ended meanwhile");
    Ok(())
}

/// What the clients are told, and what they tell.
#[derive(Default)]
struct Load {
    is_costly: AtomicBool,
    is_over: AtomicBool,
    answers: AtomicU64,
}

impl Load {
    /// Counts up on every connection until told to stop. While handlers are cheap there is one
    /// number in flight, so that a debug build does not keep a poller busy.
    fn drive(&self, server: &ServerHandle, mut random: Random) -> Check {
        let open = |_| Ok((dial(server)?, 0_u64));
        let mut peers = (0..CONNECTIONS).map(open).collect::<Check<Vec<(TcpStream, u64)>>>()?;
        while !self.is_over.load(Ordering::Relaxed) {
            if !self.is_costly.load(Ordering::Relaxed) {
                let one = random.within(0..CONNECTIONS);
                self.exchange(&mut peers[one..=one], 1)?;
                continue;
            }
            self.exchange(&mut peers, DEPTH)?;
            // One that fails in the midst of the others.
            let mut victim = dial(server)?;
            victim.write_all(&[0_u64, PANIC, 1].map(u64::to_be_bytes).concat())?;
            assert_eq!(read_all_or_reset(&victim)?, [0; 8]);
        }
        Ok(())
    }

    /// Sends so many numbers on each, and then expects them.
    fn exchange(&self, peers: &mut [(TcpStream, u64)], depth: usize) -> Check {
        let numbers = |next: u64| {
            let numbers = (next..next + depth as u64).map(u64::to_be_bytes);
            numbers.collect::<Vec<_>>().concat()
        };
        for (peer, next) in peers.iter_mut() {
            peer.write_all(&numbers(*next))?;
        }
        for (peer, next) in peers {
            assert_eq!(read_exactly(&*peer, 8 * depth)?, numbers(*next), "lost or out of order");
            *next += depth as u64;
            self.answers.fetch_add(depth as u64, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// What comes before the end of a connection that may end by a reset.
fn read_all_or_reset(mut peer: &TcpStream) -> Check<Vec<u8>> {
    use std::io::{ErrorKind, Read};
    let mut bytes = Vec::new();
    match peer.read_to_end(&mut bytes) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => Err(error.into()),
        _ => Ok(bytes),
    }
}

impl Drop for StopsAtEnd<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Relaxed);
    }
}

/// A case that fails must not wait for its clients for ever.
struct StopsAtEnd<'a>(&'a Load);

pub(crate) fn handlers_take_turns_in_order_while_their_cost_changes(t: &Fixture) -> Check {
    let load = Arc::<Load>::default();
    let costs = Arc::clone(&load);
    let prepared = t.server().on_prepare(|handle| {
        handle.set_context(Turn::default());
        Ok(())
    });
    let server = t.spawn(prepared.on_request(move |conn| {
        let is_costly = costs.is_costly.load(Ordering::Relaxed);
        count(conn, Duration::from_micros(if is_costly { 1000 } else { 0 }))
    }));
    thread::scope(|scope| {
        let drive = |_| scope.spawn(|| load.drive(&server, t.random()));
        let clients: Vec<_> = (0..2).map(drive).collect();
        let stops = StopsAtEnd(&load);
        for round in 0..2 {
            for is_costly in [true, false] {
                load.is_costly.store(is_costly, Ordering::Relaxed);
                let answers = load.answers.load(Ordering::Relaxed);
                let goes_on = || load.answers.load(Ordering::Relaxed) >= answers + 100;
                let moved = || server.stats().auto.is_none_or(|auto| auto.is_inline != is_costly);
                let what = format!("costly {is_costly} has its effect, round {round}");
                let has_effect = holds_within(DEADLINE, || goes_on() && moved());
                assert!(has_effect, "not within {DEADLINE:?}: {what}: {:?}", server.stats());
            }
        }
        drop(stops);
        clients.into_iter().try_for_each(|client| client.join().expect("does not panic"))
    })?;
    let stats = server.stats();
    assert!(stats.handler_panics > 0, "none was told to");
    assert_eq!(stats.handler_errors, 0);
    assert!(stats.auto.is_none_or(|auto| auto.flips >= 4), "{stats:?}");
    Ok(())
}
