use std::collections::HashMap;
use std::fmt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::buffer::{LinkBuffer, Slice};
use crate::error::Result;

/// A message is the name of its call.
struct Names;

impl Codec for Names {
    type In = u64;
    type Out = u64;

    fn frame_bytes_max(&self) -> usize {
        0
    }

    fn frame_bytes(&self, _: &[u8]) -> Result<Option<usize>> {
        Ok(None)
    }

    fn decode(&self, _: Slice) -> Result<(u32, u64)> {
        Err(Error::invalid("not used"))
    }

    fn encode(&self, _: u32, _: u64, _: &mut LinkBuffer) -> Result<()> {
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Begin {
        deadline_ns: u64,
        may_wait: bool,
    },
    /// Which of the calls, or of the requests that a server has seen.
    Cancel(usize),
    Poll(usize),
    Answer(usize),
    Repeat(usize),
    Connect(u32),
    FailDial(u32),
    Take(u32, usize),
    FailEncode(usize),
    Disconnect(u32),
    Expire(u64),
    Drain,
    Abort,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let link = 0..LINKS;
    let begin = (prop_oneof![0_u64..100, Just(NEVER)], any::<bool>());
    let step = prop_oneof![
        12 => begin.prop_map(|(deadline_ns, may_wait)| Step::Begin { deadline_ns, may_wait }),
        2 => any::<usize>().prop_map(Step::Cancel),
        6 => any::<usize>().prop_map(Step::Poll),
        8 => any::<usize>().prop_map(Step::Answer),
        1 => any::<usize>().prop_map(Step::Repeat),
        4 => link.clone().prop_map(Step::Connect),
        1 => link.clone().prop_map(Step::FailDial),
        6 => (link.clone(), 1_usize..4).prop_map(|(link, count)| Step::Take(link, count)),
        1 => any::<usize>().prop_map(Step::FailEncode),
        1 => link.prop_map(Step::Disconnect),
        2 => (0_u64..100).prop_map(Step::Expire),
    ];
    let last = prop_oneof![Just(vec![]), Just(vec![Step::Drain]), Just(vec![Step::Abort])];
    (prop::collection::vec(step, 0..120), last).prop_map(|(steps, last)| [steps, last].concat())
}

const LINKS: u32 = 2;
const OUTSTANDING_MAX: usize = 5;

/// The table, and what its users know.
struct World {
    calls: Calls<Names>,
    work: Work<Names>,
    handle: Handle,
    /// The names of the calls that have not ended, by their indices.
    alive: HashMap<u32, u64>,
    /// The requests that the servers have seen: link, number, name.
    seen: Vec<(u32, u32, u64)>,
    names: u64,
}

impl World {
    fn new(handle: Handle) -> World {
        let rules = Rules {
            connections: LINKS as usize,
            outstanding_max: OUTSTANDING_MAX,
            waits_for_server: false,
            backoff_first: Duration::from_millis(1),
            backoff_max: Duration::from_millis(8),
        };
        let (alive, seen) = (HashMap::new(), Vec::new());
        World { calls: Calls::new(rules), work: Work::new(), handle, alive, seen, names: 0 }
    }

    fn is(&self, link: u32, wanted: fn(&LinkState) -> bool) -> bool {
        wanted(&self.calls.links[link as usize].state)
    }

    fn alive_at(&self, choice: usize) -> Option<u32> {
        let mut indices: Vec<u32> = self.alive.keys().copied().collect();
        indices.sort_unstable();
        (!indices.is_empty()).then(|| indices[choice % indices.len()])
    }

    /// Polls a call. A call that has ended has its own answer, or an error.
    fn poll(&mut self, index: u32) {
        let mut clone = Some(Waker::noop().clone());
        if let Polled::Done(result) =
            self.calls.poll(index, Waker::noop(), &mut clone, &mut self.work)
        {
            let name = self.alive.remove(&index).expect("it ends once");
            if let Ok(answer) = result {
                assert_eq!(answer, name, "a crossed answer");
            }
        }
    }

    fn answer(&mut self, choice: usize, may_come_again: bool) {
        if self.seen.is_empty() {
            return;
        }
        let chosen = choice % self.seen.len();
        let (link, number, name) = self.seen[chosen];
        if !may_come_again {
            self.seen.swap_remove(chosen);
        }
        self.calls.deliver(link, &mut vec![(number, name)], &mut self.work);
    }

    fn disconnect(&mut self, link: u32) {
        // Numbers start anew on each connection, and what was sent on the old one never comes.
        self.seen.retain(|&(of, ..)| of != link);
        self.calls.disconnected(link, Error::gone("on purpose"), &mut self.work);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Begin { deadline_ns, may_wait } => {
                self.names += 1;
                let (name, work) = (self.names, &mut self.work);
                let was_full = self.calls.outstanding == OUTSTANDING_MAX;
                match self.calls.begin(name, deadline_ns, None, may_wait, work) {
                    Ok(index) => assert!(self.alive.insert(index, name).is_none()),
                    Err(error) => {
                        assert_eq!(error.kind(), CallErrorKind::Full);
                        assert!(was_full && !may_wait);
                    }
                }
            }
            Step::Cancel(choice) => {
                if let Some(index) = self.alive_at(choice) {
                    self.alive.remove(&index);
                    self.calls.cancel(index, &mut self.work);
                }
            }
            Step::Poll(choice) => {
                if let Some(index) = self.alive_at(choice) {
                    self.poll(index);
                }
            }
            Step::Answer(choice) => self.answer(choice, false),
            Step::Repeat(choice) => self.answer(choice, true),
            Step::Connect(link) if self.is(link, |state| matches!(state, LinkState::Dialing)) => {
                assert!(self.calls.connected(link, self.handle.clone(), &mut self.work));
            }
            Step::FailDial(link) if self.is(link, |state| matches!(state, LinkState::Dialing)) => {
                assert!(!self.calls.dial_failed(link, Error::gone("on purpose"), &mut self.work));
            }
            Step::Take(link, count) if self.is(link, |state| matches!(state, LinkState::Up(_))) => {
                let (mut messages, mut waker) = (Vec::new(), Some(Waker::noop().clone()));
                let work = &mut self.work;
                self.calls.take_queued(link, count, &mut messages, &mut waker, work);
                let seen = messages.into_iter().map(|(number, name)| (link, number, name));
                self.seen.extend(seen);
            }
            Step::FailEncode(choice) if !self.seen.is_empty() => {
                let chosen = choice % self.seen.len();
                let (link, number, _) = self.seen.swap_remove(chosen);
                let error = Error::invalid("on purpose");
                self.calls.encode_failed(link, number, error, &mut self.work);
            }
            Step::Disconnect(link) if self.is(link, |state| matches!(state, LinkState::Up(_))) => {
                self.disconnect(link);
            }
            Step::Expire(now_ns) => {
                self.calls.expire(now_ns, Waker::noop().clone(), &mut self.work);
            }
            Step::Drain => self.calls.drain(&mut self.work),
            Step::Abort => self.calls.abort(&mut self.work),
            _ => {}
        }
        self.check();
    }

    /// What must hold after each step.
    fn check(&mut self) {
        self.work.drop_unused();
        let mut outstanding = 0;
        for index in self.calls.entries.indices() {
            let state = &self.calls.entries.at(index).state;
            outstanding += usize::from(matches!(state, State::Queued(..) | State::Sent { .. }));
        }
        assert_eq!(self.calls.outstanding, outstanding);
        assert!(outstanding <= OUTSTANDING_MAX);
        let links = &self.calls.links;
        let of_links: usize =
            links.iter().map(|link| link.queue.count() + link.numbers.len()).sum();
        assert_eq!(of_links, outstanding);
        assert_eq!(self.calls.entries.count(), self.alive.len());
        let has_room = outstanding < OUTSTANDING_MAX;
        assert!(!has_room || self.calls.line.count() == 0, "a call waits although there is room");
        for link in links {
            let is_idle = link.queue.count() == 0;
            assert!(is_idle || !matches!(link.state, LinkState::Down), "nobody serves a queue");
        }
    }

    /// Ends all calls and connections, and checks that nothing is left.
    fn finish(mut self) {
        for index in self.alive.keys().copied().collect::<Vec<_>>() {
            self.poll(index);
        }
        for index in std::mem::take(&mut self.alive).into_keys() {
            self.calls.cancel(index, &mut self.work);
            self.work.drop_unused();
        }
        self.check();
        assert_eq!(self.calls.first_deadline(), None);
        self.calls.drain(&mut self.work);
        assert!(self.calls.has_ended());
        for link in 0..LINKS {
            match self.calls.links[link as usize].state {
                LinkState::Up(_) => self.disconnect(link),
                LinkState::Dialing => {
                    assert!(self.calls.next_dial(link, &mut self.work).is_none());
                }
                LinkState::Down => {}
            }
        }
        assert!(self.calls.is_gone());
    }
}

#[test]
fn calls_end_once_with_their_own_answers_and_leave_nothing() {
    let (one, _other) = UnixStream::pair().expect("sockets");
    let connection = crate::dial::adopt(one.into()).expect("a stream");
    let handle = connection.handle();
    proptest!(|(steps in steps())| {
        let mut world = World::new(handle.clone());
        for step in steps {
            world.step(step);
        }
        world.finish();
    });
}

#[test]
fn a_number_is_not_given_twice_while_its_call_waits() {
    let mut link = Link::new();
    assert_eq!((link.number(), link.number()), (1, 2));
    link.numbers.extend([(u32::MAX, 0), (1, 1)]);
    link.next_number = u32::MAX;
    assert_eq!((link.number(), link.number(), link.number()), (0, 2, 3));
}

/// Counts how many of it are dropped.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("on purpose")
    }
}

impl std::error::Error for Counted {}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn no_error_is_dropped_under_the_lock() {
    let (one, _other) = UnixStream::pair().expect("sockets");
    let connection = crate::dial::adopt(one.into()).expect("a stream");
    let World { mut calls, mut work, handle, .. } = World::new(connection.handle());
    let dropped = Arc::<AtomicUsize>::default();
    let error = || Error::other(Counted(Arc::clone(&dropped)));
    let count = || dropped.load(Ordering::SeqCst);
    for failed in 0..2 {
        let call = calls.begin(1, NEVER, None, true, &mut work).expect("it is open");
        let link = work.dials.pop().expect("it dials");
        assert!(!calls.dial_failed(link, error(), &mut work));
        calls.cancel(call, &mut work);
        assert_eq!(count(), 0);
        work.drop_unused();
        // The table keeps the last failure.
        assert_eq!(count(), failed);
        dropped.store(0, Ordering::SeqCst);
    }
    calls.begin(1, NEVER, None, true, &mut work).expect("it is open");
    let link = work.dials.pop().expect("it dials");
    assert!(calls.connected(link, handle, &mut work));
    calls.encode_failed(link, 7, error(), &mut work);
    calls.disconnected(link, error(), &mut work);
    assert_eq!(count(), 0);
    work.drop_unused();
    assert_eq!(count(), 2);
}
