//! Tasks that call: each makes one call after the other on its connection, and a connection has as
//! many of them as it may have requests in flight.
//!
//! Everything is on one thread, and nobody keeps the state borrowed while waiting.

use std::cell::{RefCell, RefMut};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tonic::Status;

use super::channel::{Channel, Client};
use crate::error::Result;
use crate::load::Plan;
use crate::load::client::{OnReply, Reply};
use crate::load::dice::Dice;
use crate::load::tally::Tally;
use crate::rpc::grpc::message_bytes;
use crate::wire::{Request, Template};

pub(super) struct Lanes {
    pub(super) started: Instant,
    template: Template,
    depth: u32,
    is_open_loop: bool,
    requests_max: Option<u64>,
    state: RefCell<State>,
    /// Told when the loop should look before its next alarm.
    pub(super) news: Notify,
}

pub(super) struct State {
    /// `None`: lost.
    links: Vec<Option<Link>>,
    open_count: usize,
    dice: Dice,
    stopping: bool,
    in_flight: usize,
    /// The last reply, or the first request since nothing was in flight.
    waiting_since: Instant,
    pub(super) tally: Tally,
}

/// One connection.
struct Link {
    client: Client,
    lanes: u32,
    next_sequence: u64,
    /// Open loop: the requests that are not sent yet.
    scheduled: VecDeque<Asked>,
}

/// A request.
#[derive(Clone, Copy)]
struct Asked {
    /// When it was sent, or was due, in nanoseconds since the start.
    since_ns: u64,
    heavy: bool,
}

impl Lanes {
    pub(super) fn new(plan: &Plan, channels: Vec<Channel>) -> Result<Rc<Lanes>> {
        let links = channels.into_iter().zip(0_u64..).map(|(channel, number)| {
            // Sequence numbers of connections are kept apart, so that a reply to another one is a
            // wrong reply.
            let client = Client::new(channel);
            let next_sequence = number << 40;
            Some(Link { client, lanes: 0, next_sequence, scheduled: VecDeque::new() })
        });
        let links: Vec<_> = links.collect();
        let state = State {
            open_count: links.len(),
            links,
            dice: Dice::new(plan.heavy_percent, plan.seed),
            stopping: false,
            in_flight: 0,
            waiting_since: Instant::now(),
            tally: Tally::new()?,
        };
        Ok(Rc::new(Lanes {
            started: Instant::now(),
            template: Template::of(plan.protocol, plan.payload_bytes),
            depth: plan.depth,
            is_open_loop: plan.rate.is_some(),
            requests_max: plan.requests_max,
            state: RefCell::new(state),
            news: Notify::new(),
        }))
    }

    pub(super) fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// Closed loop: all lanes begin.
    pub(super) fn start(self: &Rc<Lanes>) {
        if self.is_open_loop {
            return;
        }
        let mut state = self.state();
        for (index, link) in state.links.iter_mut().enumerate() {
            (0..self.depth).for_each(|_| self.open_lane(index, link));
        }
    }

    /// Open loop: hands a request out, the first one with number 0.
    pub(super) fn schedule(self: &Rc<Lanes>, request: u64, due_ns: u64) {
        let mut state = self.state();
        // Chosen when it is due, and for lost connections too: so every server is asked for the
        // same at the same time.
        let heavy = state.dice.is_heavy();
        let index = (request % state.links.len() as u64) as usize;
        let link = &mut state.links[index];
        // A lost connection's requests are not sent: its loss is the error that says so.
        if let Some(open) = link {
            open.scheduled.push_back(Asked { since_ns: due_ns, heavy });
            if open.lanes < self.depth {
                self.open_lane(index, link);
            }
        }
    }

    /// How long a reply is, and what all of them add up to. Nothing is in flight any more.
    pub(super) fn end(&self) -> Result<(u64, Tally)> {
        let reply_bytes = message_bytes(&self.payload_of(Request::cheap(0)));
        let mut state = self.state();
        state.links.clear();
        Ok((reply_bytes as u64, std::mem::replace(&mut state.tally, Tally::new()?)))
    }

    fn open_lane(self: &Rc<Lanes>, index: usize, link: &mut Option<Link>) {
        if let Some(link) = link {
            link.lanes += 1;
            spawn_local(Rc::clone(self).run_lane(index, link.client.clone()));
        }
    }

    async fn run_lane(self: Rc<Lanes>, index: usize, mut client: Client) {
        while let Some((asked, request)) = self.next(index) {
            let reply = client.call(self.payload_of(request)).await;
            self.take(index, asked, request, reply);
        }
    }

    /// The next request on a connection; none, and the lane ends.
    fn next(&self, index: usize) -> Option<(Asked, Request)> {
        let mut state = self.state();
        let state = &mut *state;
        // A lane that was opened and had no turn before the end finds no connections any more.
        let link = state.links.get_mut(index)?.as_mut()?;
        let asked = if state.stopping {
            None
        } else if self.is_open_loop {
            link.scheduled.pop_front()
        } else {
            let since_ns = self.started.elapsed().as_nanos() as u64;
            Some(Asked { since_ns, heavy: state.dice.is_heavy() })
        };
        let Some(asked) = asked else {
            link.lanes -= 1;
            return None;
        };
        let request = Request { sequence: link.next_sequence, heavy: asked.heavy };
        link.next_sequence += 1;
        if state.in_flight == 0 {
            state.waiting_since = Instant::now();
        }
        state.in_flight += 1;
        Some((asked, request))
    }

    /// Counts and checks what came of a request.
    fn take(&self, index: usize, asked: Asked, request: Request, reply: Result<Bytes, Status>) {
        let now_ns = self.started.elapsed().as_nanos() as u64;
        let mut state = self.state();
        state.in_flight -= 1;
        let wrong = match reply {
            Ok(payload) if self.is_right(request, &payload) => {
                state.waiting_since = Instant::now();
                state.tally.on_reply(Reply {
                    since_ns: asked.since_ns,
                    now_ns,
                    heavy: asked.heavy,
                });
                None
            }
            Ok(_) => Some("wrong reply".to_owned()),
            Err(status) => Some(format!("{:?}: {}", status.code(), status.message())),
        };
        if let Some(error) = wrong {
            state.lose(index, &error);
        }
        let is_last = state.in_flight == 0 || state.open_count == 0;
        if is_last || state.tally.has_all(self.requests_max) {
            self.news.notify_one();
        }
    }

    fn is_right(&self, request: Request, payload: &[u8]) -> bool {
        payload.len() == self.template.reply_bytes() && self.template.matches(request, 0, payload)
    }

    fn payload_of(&self, request: Request) -> Bytes {
        let mut payload = Vec::with_capacity(self.template.reply_bytes());
        self.template.append(request, &mut payload);
        payload.into()
    }
}

impl State {
    pub(super) fn open_count(&self) -> usize {
        self.open_count
    }

    /// How many requests wait for their replies, and how long none has come.
    pub(super) fn waited(&self) -> (usize, Duration) {
        (self.in_flight, self.waiting_since.elapsed())
    }

    /// No lane sends any more.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
    }

    /// A silent connection that the server closed is an error.
    pub(super) fn check_idle(&mut self, idle: &[Channel]) {
        for (index, _) in idle.iter().enumerate().filter(|(_, channel)| channel.is_closed()) {
            self.tally.count_error(|| format!("idle connection {index}: closed by the server"));
        }
    }

    /// Its other lanes end as their calls do, and are not counted again.
    fn lose(&mut self, index: usize, error: &str) {
        if self.links[index].take().is_some() {
            self.open_count -= 1;
            self.tally.count_error(|| format!("connection {index}: {error}"));
        }
    }
}
