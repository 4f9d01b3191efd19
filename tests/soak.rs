//! A soak test: many connections send requests of random sizes, some of them concurrently. Either
//! side ends connections at random moments. Every byte is checked, and nothing may leak.
//!
//! `RINGPOLL_SOAK_REQUESTS` is the number of requests for each backend. The default takes some
//! seconds; ten million take minutes in a release build. `RINGPOLL_SOAK_BACKENDS` is a list of
//! backends, separated by commas. The default are those whose kernel threads poll.

#[path = "conformance/harness/mod.rs"]
mod harness;

use std::env;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use harness::*;
use ringpoll::{Connection, Result, ServerHandle};

/// What a test of everything can afford.
const REQUESTS: u64 = 100_000;

const BACKENDS: &str = "sqpoll-shared,sqpoll-config1,sqpoll-config2";

const THREADS: usize = 4;

/// Connections of each thread at a time, all of which wait for answers at once.
const CONNECTIONS: usize = 32;

/// Requests in flight on a connection.
const DEPTH_MAX: usize = 32;

/// A connection lives for about so many bursts of requests.
const BURSTS: usize = 25;

/// How often a run tells how far it is.
const REPORT: Duration = Duration::from_secs(5);

/// How long everything may stand still.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_soak_of_checked_requests_loses_no_byte_and_leaves_nothing() {
    let backends = env::var("RINGPOLL_SOAK_BACKENDS").unwrap_or(BACKENDS.to_owned());
    for name in backends.split(',') {
        let backend = name.parse().expect("a name of a backend");
        run(Mount { backend, placement: Placement::Auto, side: Side::Server }, name, soak);
    }
}

fn requests_wanted() -> u64 {
    match env::var("RINGPOLL_SOAK_REQUESTS") {
        Ok(text) => text.parse().expect("RINGPOLL_SOAK_REQUESTS is a number"),
        Err(_) => REQUESTS,
    }
}

/// What the server does when it has answered a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// Flush or submit, and go on.
    Stay,
    /// Flush, and close.
    Close,
    /// Close, with the answers on their way.
    Cut,
}

const THENS: [Then; 3] = [Then::Stay, Then::Close, Then::Cut];

/// A request or an answer: whose, which one, how much is asked for, what then, and a body.
struct Message {
    id: u32,
    number: u32,
    body: usize,
    /// Of an answer: nothing.
    asked: usize,
    then: Then,
}

impl Message {
    const HEAD: usize = 20;

    fn write_to(&self, bytes: &mut Vec<u8>) {
        let words = [self.body as u32, self.id, self.number, self.asked as u32, self.then as u32];
        bytes.extend(words.iter().flat_map(|word| word.to_be_bytes()));
        bytes.extend(marked(self.id, self.at(), self.body));
    }

    /// Where in the stream of its connection the body begins.
    fn at(&self) -> usize {
        8 * self.number as usize
    }

    /// What its first bytes say.
    fn of_head(head: &[u8]) -> Message {
        let word = |index: usize| {
            u32::from_be_bytes(head[4 * index..][..4].try_into().expect("four bytes"))
        };
        let then = THENS[word(4) as usize];
        let (body, asked) = (word(0) as usize, word(3) as usize);
        Message { id: word(1), number: word(2), body, asked, then }
    }

    /// The only right answer.
    fn answer(&self) -> Message {
        Message { body: self.asked, asked: 0, then: Then::Stay, ..*self }
    }
}

/// Answers everything that has arrived. A wrong byte is a panic, which the server counts.
async fn answer(mut conn: Connection) -> Result<()> {
    let mut last = 0;
    loop {
        let head = conn.next(Message::HEAD).await?;
        let message = Message::of_head(&head);
        assert_marked(&conn.next(message.body).await?, message.id, message.at());
        let mut bytes = Vec::with_capacity(Message::HEAD + message.asked);
        message.answer().write_to(&mut bytes);
        conn.write(bytes)?;
        match message.then {
            Then::Stay => {}
            Then::Close => {
                conn.flush().await?;
                conn.close();
                return Ok(());
            }
            Then::Cut => {
                conn.submit()?;
                conn.close();
                return Ok(());
            }
        }
        last += message.number;
        if conn.len() < Message::HEAD {
            break;
        }
    }
    match last % 3 {
        0 => conn.submit(),
        _ => conn.flush().await,
    }
}

/// What all clients of a run share.
struct Load {
    addr: SocketAddr,
    next_id: AtomicU32,
    answered: AtomicU64,
    ended: AtomicU64,
    stop: AtomicBool,
}

/// One connection of a client.
struct Client {
    stream: TcpStream,
    id: u32,
    /// Requests so far.
    number: u32,
    /// The answers to those in flight.
    wanted: Vec<u8>,
    waiting: u64,
    ending: Then,
}

impl Client {
    fn connect(load: &Load) -> Check<Client> {
        let id = load.next_id.fetch_add(1, Ordering::Relaxed);
        let stream = connect(load.addr)?;
        let (number, wanted, waiting, ending) = (0, Vec::new(), 0, Then::Stay);
        Ok(Client { stream, id, number, wanted, waiting, ending })
    }

    /// Sends some requests at once, the last of which may be for an end.
    fn send(&mut self, random: &mut Random) -> Check {
        let is_large = random.one_in(100);
        let depth = if is_large { 1 } else { random.within(1..DEPTH_MAX + 1) };
        let (body_max, asked_max) = if is_large { (100_000, 300_000) } else { (1000, 2000) };
        let mut bytes = Vec::new();
        for place in 1..=depth {
            let is_last = place == depth && random.one_in(BURSTS);
            let message = Message {
                id: self.id,
                number: self.number,
                body: random.within(0..body_max),
                asked: random.within(0..asked_max),
                then: if is_last { THENS[random.within(1..3)] } else { Then::Stay },
            };
            message.write_to(&mut bytes);
            message.answer().write_to(&mut self.wanted);
            self.number += 1;
            self.waiting += 1;
            self.ending = message.then;
        }
        Ok(self.stream.write_all(&bytes)?)
    }

    /// Takes what is owed, or ends in its own way with requests in flight. Tells how many answers
    /// were right, and whether the connection goes on.
    fn receive(&mut self, random: &mut Random) -> Check<(u64, bool)> {
        if random.one_in(BURSTS) {
            return self.leave(random).map(|()| (0, false));
        }
        let owed = std::mem::take(&mut self.wanted);
        let got = self.read(owed.len())?;
        self.check(&got, &owed);
        assert!(
            got.len() == owed.len() || self.ending == Then::Cut,
            "{} of {} bytes to connection {}, then {:?}",
            got.len(),
            owed.len(),
            self.id,
            self.ending
        );
        let answered = if got.len() == owed.len() { self.waiting } else { 0 };
        self.waiting = 0;
        if self.ending != Then::Stay {
            assert_ended(&self.stream);
        }
        Ok((answered, self.ending == Then::Stay))
    }

    /// Up to `count` bytes; fewer are all there were before the end.
    fn read(&mut self, count: usize) -> Check<Vec<u8>> {
        let (mut bytes, mut at) = (vec![0; count], 0);
        while at < count {
            match self.stream.read(&mut bytes[at..]) {
                Ok(0) => break,
                Ok(more) => at += more,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                Err(error) => return Err(error.into()),
            }
        }
        bytes.truncate(at);
        Ok(bytes)
    }

    fn check(&self, got: &[u8], owed: &[u8]) {
        if got == &owed[..got.len()] {
            return;
        }
        let wrong = got.iter().zip(owed).position(|(got, owed)| got != owed).expect("they differ");
        let around = wrong.saturating_sub(8)..(wrong + 16).min(got.len());
        let (got, owed) = (&got[around.clone()], &owed[around.clone()]);
        panic!("connection {}: bytes {around:?} are {got:02x?}, not {owed:02x?}", self.id);
    }

    /// Ends with requests in flight, and some of the answers read.
    fn leave(&mut self, random: &mut Random) -> Check {
        let owed = std::mem::take(&mut self.wanted);
        let part = random.within(0..owed.len() + 1);
        match random.within(0..4) {
            0 => return Ok(()),
            1 => {
                let got = self.read(part)?;
                self.check(&got, &owed);
                reset(self.stream.try_clone()?)?;
            }
            2 => {
                let got = self.read(part)?;
                self.check(&got, &owed);
            }
            // Half closed: every answer comes all the same.
            _ => {
                self.stream.shutdown(Shutdown::Write)?;
                let got = self.read(owed.len())?;
                self.check(&got, &owed);
                let is_whole = got.len() == owed.len() || self.ending == Then::Cut;
                assert!(is_whole, "{} of {} bytes before the end", got.len(), owed.len());
                assert_ended(&self.stream);
            }
        }
        Ok(())
    }
}

/// Keeps [`CONNECTIONS`] busy until it is told to stop.
fn drive(load: &Load, random: &mut Random) -> Check {
    let mut clients: Vec<_> =
        (0..CONNECTIONS).map(|_| Client::connect(load)).collect::<Check<_>>()?;
    while !load.stop.load(Ordering::Relaxed) {
        for client in &mut clients {
            client.send(random)?;
        }
        for client in &mut clients {
            let (answered, goes_on) = client.receive(random)?;
            load.answered.fetch_add(answered, Ordering::Relaxed);
            if !goes_on {
                load.ended.fetch_add(1, Ordering::Relaxed);
                *client = Client::connect(load)?;
            }
        }
    }
    Ok(())
}

fn soak(t: &Fixture) -> Check {
    let wanted = requests_wanted();
    let (kernel_threads, rings) = (KernelThreadsBefore::now(), ring_count());
    let server = t.spawn(t.server().pollers(1).on_request(answer));
    let load = Arc::new(Load {
        addr: addr_of(&server),
        next_id: AtomicU32::new(1),
        answered: AtomicU64::new(0),
        ended: AtomicU64::new(0),
        stop: AtomicBool::new(false),
    });
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let (load, mut random) = (Arc::clone(&load), t.random());
            on_thread(move || drive(&load, &mut random))
        })
        .collect();
    follow(&server, &load, wanted, &threads);
    load.stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.wait_for_all();
    }
    left_with(&server, 0);
    let stats = server.stats();
    assert_eq!(stats.handler_panics, 0, "the server got a wrong byte");
    server.shutdown(DEADLINE)?;
    kernel_threads.assert_return();
    eventually("the rings are closed", || ring_count() == rings);
    Ok(())
}

/// Reports until all is answered. Fails when nothing moves, or a client has failed.
fn follow(server: &ServerHandle, load: &Load, wanted: u64, threads: &[Outcome<()>]) {
    let start = Instant::now();
    let (mut reported, mut moved, mut last) = (start, start, 0);
    while last < wanted {
        holds_within(Duration::from_millis(50), || load.answered.load(Ordering::Relaxed) >= wanted);
        // None ends before it is told to, unless it has failed.
        threads.iter().for_each(Outcome::assert_pending);
        let answered = load.answered.load(Ordering::Relaxed);
        if answered > last {
            (last, moved) = (answered, Instant::now());
            still_runs();
        }
        assert!(moved.elapsed() < PATIENCE, "all stands still: {:?}", server.stats());
        if reported.elapsed() > REPORT || answered >= wanted {
            reported = Instant::now();
            let (stats, ended) = (server.stats(), load.ended.load(Ordering::Relaxed));
            let rate = answered as f64 / start.elapsed().as_secs_f64();
            say(&format!(
                "{}: {answered} of {wanted} requests, {rate:.0}/s, {ended} connections ended, {} \
                 blocks held",
                stats.backend, stats.pollers.blocks
            ));
        }
    }
}
