//! Fairness: no connection waits while others run again and again. The bounds are those that
//! `docs/ARCHITECTURE.md` gives for pollers and workers; on tokio the runtime decides.

use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringpoll::{Connection, Result, ServerHandle};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, fairness:
            connections_that_always_have_input_take_turns
        }
    };
}
pub(crate) use cases;

/// Connections that always have input.
const CROWD: usize = 64;
/// Runs of each, which consume a byte.
const RUNS: usize = 40;
/// The first byte of a connection of the crowd is this, and its number.
const FIRST: u8 = 128;

/// The runs, in order.
type Diary = Vec<Entry>;

#[derive(Clone, Copy)]
struct Entry {
    number: usize,
    /// As opposed to a worker.
    on_poller: bool,
}

/// What the handlers share with the test.
#[derive(Default)]
struct Scene {
    latches: [Latch; 3],
    diary: Mutex<Diary>,
    /// Runs that were begun, or queued for a worker or a runtime.
    begun: AtomicUsize,
}

impl Scene {
    /// Serves the crowd, and connections that halt at the latch that their byte is the number of.
    async fn serve(self: Arc<Scene>, mut conn: Connection) -> Result<()> {
        let byte = conn.next(1).await?[0];
        let Some(number) = byte.checked_sub(FIRST) else {
            self.latches[usize::from(byte)].pass();
            return Ok(());
        };
        let thread = std::thread::current();
        let on_poller = thread.name().is_some_and(|name| !name.starts_with("ringpoll-w"));
        let count = {
            let mut diary = self.diary.lock().expect("nobody panics here");
            diary.push(Entry { number: usize::from(number), on_poller });
            diary.len()
        };
        if !on_poller {
            self.let_others_queue_up(count);
        }
        Ok(())
    }

    /// Gives the poller time, though not for long, to hand over more runs than may wait behind a
    /// blocked worker: so that the shared queue has some while there is input.
    fn let_others_queue_up(&self, count: usize) {
        let until = Instant::now() + Duration::from_millis(1);
        let queued = || self.begun.load(Ordering::Relaxed).saturating_sub(count);
        while queued() < CROWD / 2 + 8 && Instant::now() < until {
            std::thread::yield_now();
        }
    }
}

struct Crowd {
    server: ServerHandle,
    scene: Arc<Scene>,
    peers: Vec<TcpStream>,
}

impl Crowd {
    fn new(t: &Fixture, placement: Placement) -> Check<Crowd> {
        let scene = Arc::<Scene>::default();
        let handlers = Arc::clone(&scene);
        let builder = t.server().pollers(1).placement(placement);
        let server = t.spawn(builder.on_request(move |conn| Arc::clone(&handlers).serve(conn)));
        let peers = (0..CROWD).map(|_| dial(&server)).collect::<Check<Vec<_>>>()?;
        eventually("all are accepted", || server.stats().open == CROWD as u64);
        Ok(Crowd { server, scene, peers })
    }

    /// Blocks a thread that runs handlers at latch `index`, once it gets so far.
    fn halt(&self, index: u8) -> Check<TcpStream> {
        let mut peer = dial(&self.server)?;
        peer.write_all(&[index])?;
        Ok(peer)
    }

    fn await_halted(&self, index: usize) {
        eventually("a thread is blocked", || self.scene.latches[index].count() == 1);
    }

    /// All input of the crowd at once: from its first run on, each has some left.
    fn send(&mut self) -> Check {
        for (peer, number) in self.peers.iter_mut().zip(FIRST..) {
            peer.write_all(&[number; RUNS])?;
        }
        Ok(())
    }

    fn await_runs(&self, count: usize) {
        eventually("the runs began", || self.server.stats().handler_runs == count as u64);
    }

    fn finished_diary(&self) -> Diary {
        let count = || self.scene.diary.lock().expect("nobody panics here").len();
        // Handlers look at this every moment.
        let start = Instant::now();
        while count() < CROWD * RUNS {
            assert!(start.elapsed() < DEADLINE, "not all input is consumed");
            let begun = self.server.stats().handler_runs as usize;
            self.scene.begun.store(begun, Ordering::Relaxed);
            std::thread::yield_now();
        }
        self.scene.diary.lock().expect("nobody panics here").clone()
    }
}

pub(crate) fn connections_that_always_have_input_take_turns(t: &Fixture) -> Check {
    match t.mount().placement {
        Placement::Pool { .. } => take_turns_although_a_worker_is_blocked(t),
        placement => take_turns_on_their_poller(t, placement),
    }
}

/// Where in the diary `one` ran.
fn places(diary: &Diary, one: usize) -> Vec<usize> {
    let places: Vec<_> = (0..diary.len()).filter(|place| diary[*place].number == one).collect();
    assert_eq!(places.len(), RUNS);
    places
}

/// A poller gives each connection one run in each of its rounds: so between two runs of one, each
/// other one has two at most, the one of that round and the one of the next. Before the first there
/// may be a few rounds more, since not all that has arrived is collected at once.
fn take_turns_on_their_poller(t: &Fixture, placement: Placement) -> Check {
    const BETWEEN_MAX: usize = 2;
    const BEFORE_MAX: usize = 8;
    const _: () = assert!(BEFORE_MAX < RUNS, "what a bound would not show");
    let mut crowd = Crowd::new(t, placement)?;
    let _halts = crowd.halt(0)?;
    crowd.await_halted(0);
    crowd.send()?;
    crowd.scene.latches[0].open();
    let diary = crowd.finished_diary();
    // `Auto` may have moved the handlers meanwhile: what ran elsewhere does not count.
    let longest = |wait: &[Entry]| {
        let mut runs = [0; CROWD];
        wait.iter().filter(|entry| entry.on_poller).for_each(|entry| runs[entry.number] += 1);
        runs.into_iter().max().expect("there is a crowd")
    };
    let mut checked = 0;
    for one in 0..CROWD {
        let places = places(&diary, one);
        let before = longest(&diary[..places[0]]);
        // Where a kernel thread receives, when it does so is its own affair.
        let is_late = before > BEFORE_MAX && !t.mount().receives_behind_pollers();
        assert!(!is_late, "another had {before} runs before the first of {one}");
        for ends in places.windows(2) {
            if ends.iter().all(|end| diary[*end].on_poller) {
                let between = longest(&diary[ends[0] + 1..ends[1]]);
                assert!(between <= BETWEEN_MAX, "another had {between} runs while {one} waited");
                checked += 1;
            }
        }
    }
    assert!(checked == CROWD * (RUNS - 1) || placement == Placement::Auto, "{checked} checked");
    Ok(())
}

/// Of two workers one is blocked, with tasks in its queue, and the other always finds some in the
/// shared one. It looks at its neighbour every 64 runs, and takes half of the 32 tasks at most that
/// are there: within six looks all of them. Before and after, the queues hold one run of each other
/// connection.
fn take_turns_although_a_worker_is_blocked(t: &Fixture) -> Check {
    const OTHERS_MAX: usize = 6 * 64 + 2 * CROWD;
    const _: () = assert!(OTHERS_MAX < (CROWD / 2) * (RUNS - 1), "what a bound would not show");
    let mut crowd = Crowd::new(t, Placement::Pool { workers: 2 })?;
    // Both workers stand at a latch, so that the next tasks queue up in this order.
    let mut halts = vec![crowd.halt(0)?, crowd.halt(1)?];
    crowd.await_halted(0);
    crowd.await_halted(1);
    halts.push(crowd.halt(2)?);
    crowd.await_runs(3);
    crowd.send()?;
    crowd.await_runs(3 + CROWD);
    // One takes the run that halts, and a batch of the others behind it.
    crowd.scene.latches[0].open();
    crowd.await_halted(2);
    crowd.scene.latches[1].open();
    let diary = crowd.finished_diary();
    crowd.scene.latches[2].open();
    for one in 0..CROWD {
        let places = places(&diary, one);
        let between = places.windows(2).map(|ends| ends[1] - ends[0] - 1);
        let others = between.chain([places[0]]).max().expect("it ran");
        assert!(others <= OTHERS_MAX, "{one} waited for {others} runs of others");
    }
    Ok(())
}
