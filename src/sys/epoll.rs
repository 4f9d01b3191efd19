//! Readiness turned into completions: `epoll(7)`.
//!
//! Owned by one poller thread. A short receive empties the socket, so most requests cost one
//! receive and one send. Who is not through after its turn is `unfinished`, and gets another one
//! after everybody else.
//!
//! TCP streams are watched edge-triggered: a level-triggered event is put back on the kernel's list
//! and polled once more by the next wait, only to be found stale. Unix sockets are level-triggered,
//! because a receive there may be short at a border that the sender made. A receive from TCP is
//! short at a byte that the peer has marked as urgent: then there may be more behind it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

use super::{Backend, Completion, Flow, Received, Sink, Socket, Token, Wake};
use crate::address::PeerAddr;
use crate::buffer::{Block, Chain, Pool, Spent};
use crate::config;
use crate::counters::Counters;

const READ: EventFlags = EventFlags::IN.union(EventFlags::RDHUP).union(EventFlags::PRI);
const GONE: EventFlags = EventFlags::RDHUP.union(EventFlags::HUP).union(EventFlags::ERR);

pub(crate) struct Epoll {
    epoll: OwnedFd,
    events: Vec<Event>,
    /// Events before this one are handled.
    handled: usize,
    entries: Vec<Option<Entry>>,
    /// Stopped at the end of their turn: to be handled again, as if these events had come.
    unfinished: Vec<(Token, EventFlags)>,
    /// Done without waiting; reported by the next `wait`.
    done: Vec<(Token, Completion<'static>)>,
    receiver: Receiver,
    counters: Arc<Counters>,
}

struct Entry {
    token: Token,
    socket: Arc<Socket>,
    role: Role,
    /// What the kernel watches now; empty is not watched at all, since it reports ERR and HUP
    /// unasked.
    watched: EventFlags,
    paused: bool,
    /// The peer ended its side while reception was paused.
    hung_up: bool,
    /// End of stream was reported.
    ended: bool,
    /// The last receive was a large one, so the next may be.
    is_bulk: bool,
    sending: Option<Box<Sending>>,
}

impl Entry {
    #[inline]
    fn only_receives(&self) -> bool {
        self.sending.is_none() && !self.ended && !self.paused
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Listener,
    Connecting,
    Stream,
}

struct Sending {
    rest: Chain,
    sent_bytes: usize,
}

/// The blocks that the next receives fill: one of the size of a few requests, and one for peers
/// that send much at a time.
struct Receiver {
    small: Block,
    bulk: Block,
    pool: Pool,
}

impl Backend for Epoll {
    type Options = ();

    fn new(wake: &Arc<Wake>, pool: &Pool, counters: &Arc<Counters>, (): &()) -> io::Result<Epoll> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let data = EventData::new_u64(Token::NONE.bits());
        epoll::add(&epoll, &**wake, data, EventFlags::IN | EventFlags::ET)?;
        pool.set_aside(1, config::SMALL_BUFFER_BYTES);
        pool.set_aside(1, config::BULK_BUFFER_BYTES);
        Ok(Epoll {
            epoll,
            events: Vec::with_capacity(config::EVENTS_MAX),
            handled: 0,
            entries: Vec::new(),
            unfinished: Vec::new(),
            done: Vec::new(),
            receiver: Receiver {
                small: pool.allocate(config::SMALL_BUFFER_BYTES),
                bulk: pool.allocate(config::BULK_BUFFER_BYTES),
                pool: pool.clone(),
            },
            counters: Arc::clone(counters),
        })
    }

    fn listen(&mut self, token: Token, listener: Arc<Socket>) -> io::Result<()> {
        self.insert(token, listener, Role::Listener)
    }

    fn attach(&mut self, token: Token, socket: Arc<Socket>, _: usize) -> io::Result<()> {
        self.insert(token, socket, Role::Stream)
    }

    fn connect(&mut self, token: Token, socket: Arc<Socket>, peer: &PeerAddr, _: usize) {
        self.counters.setup_calls.add_owned(1);
        let started = match socket.connect(peer) {
            Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => {
                self.insert(token, socket, Role::Connecting)
            }
            Ok(()) => {
                let attached = self.insert(token, socket, Role::Stream);
                self.done.push((token, Completion::Connected(attached)));
                return;
            }
            failed => failed,
        };
        if let Err(error) = started {
            self.done.push((token, Completion::Connected(Err(error))));
        }
    }

    fn resume(&mut self, token: Token) {
        if let Some(entry) = find(&mut self.entries, token) {
            entry.paused = false;
            watch(&self.epoll, &self.counters, entry);
        }
    }

    fn send(&mut self, token: Token, gather: Chain) {
        let Some(entry) = find(&mut self.entries, token) else { return };
        debug_assert!(entry.sending.is_none(), "one send in flight per token");
        entry.sending = Some(Box::new(Sending { rest: gather, sent_bytes: 0 }));
        self.counters.sends_in_flight.add_owned(1);
        match advance_send(entry, &self.counters) {
            Turn::Done(result) => self.done.push((token, Completion::Sent(result))),
            Turn::Waits => {}
            Turn::Unfinished => self.unfinished.push((token, EventFlags::OUT)),
        }
        watch(&self.epoll, &self.counters, entry);
    }

    fn remove(&mut self, token: Token) {
        if find(&mut self.entries, token).is_some()
            && let Some(mut entry) = self.entries[token.index()].take()
        {
            if entry.sending.take().is_some() {
                self.counters.sends_in_flight.add_owned(1u64.wrapping_neg());
            }
            entry.ended = true;
            entry.role = Role::Stream;
            watch(&self.epoll, &self.counters, &mut entry);
        }
        self.done.push((token, Completion::Removed));
    }

    fn wait(&mut self, timeout: Option<Duration>, sink: &mut impl Sink) -> io::Result<bool> {
        let busy = !self.done.is_empty() || !self.unfinished.is_empty();
        let timeout = if busy { Some(Duration::ZERO) } else { timeout };
        if busy {
            for (token, completion) in std::mem::take(&mut self.done) {
                sink.complete(token, completion);
            }
        }
        if self.handled == self.events.len() {
            self.collect(timeout)?;
            if busy {
                // Their turn comes once in each full pass over the events.
                for (token, flags) in std::mem::take(&mut self.unfinished) {
                    self.handle_again(token, flags, sink);
                }
            }
        }
        // A few at a time: what a round touches in our memory and in the kernel's is still in the
        // cache when its handlers run and send.
        let end = self.events.len().min(self.handled + config::EVENTS_PER_ROUND);
        for index in self.handled..end {
            let event = self.events[index];
            self.handle(Token::from_bits(event.data.u64()), event.flags, sink);
        }
        self.handled = end;
        Ok(end == self.events.len())
    }
}

impl Drop for Epoll {
    fn drop(&mut self) {
        self.receiver.pool.bring_back(1, config::SMALL_BUFFER_BYTES);
        self.receiver.pool.bring_back(1, config::BULK_BUFFER_BYTES);
    }
}

impl Epoll {
    /// Asks the kernel for events.
    fn collect(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.counters.wait_calls.add_owned(1);
        self.handled = 0;
        self.events.clear();
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs().min(i64::MAX as u64) as i64,
            tv_nsec: timeout.subsec_nanos().into(),
        });
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn insert(&mut self, token: Token, socket: Arc<Socket>, role: Role) -> io::Result<()> {
        let index = token.index();
        if index >= self.entries.len() {
            self.entries.resize_with(index + 1, || None);
        }
        debug_assert!(self.entries[index].is_none(), "slot in use");
        let mut entry = Entry {
            token,
            socket,
            role,
            watched: EventFlags::empty(),
            paused: false,
            hung_up: false,
            ended: false,
            is_bulk: false,
            sending: None,
        };
        entry.watched = wanted(&entry);
        self.counters.control_calls.add_owned(1);
        epoll::add(&self.epoll, &*entry.socket, EventData::new_u64(token.bits()), entry.watched)?;
        self.entries[index] = Some(entry);
        Ok(())
    }

    #[inline(never)]
    fn handle_again(&mut self, token: Token, flags: EventFlags, sink: &mut impl Sink) {
        self.handle(token, flags, sink);
    }

    // Part of its loop: a processor that comes back from a system call does not know any more where
    // the calls around it return to. Each costs some 15 ns more there.
    #[inline(always)]
    fn handle(&mut self, token: Token, flags: EventFlags, sink: &mut impl Sink) {
        // An event of a slot that was removed or reused since it was queued names an old
        // generation.
        let Some(entry) = find(&mut self.entries, token) else { return };
        match entry.role {
            Role::Listener => accept(entry, &self.counters, sink),
            Role::Connecting => {
                let connected = entry.socket.take_error();
                entry.role = Role::Stream;
                entry.ended = connected.is_err();
                sink.complete(token, Completion::Connected(connected));
            }
            Role::Stream => {
                let only_received = entry.only_receives();
                if entry.sending.is_some()
                    && flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR)
                {
                    match advance_send(entry, &self.counters) {
                        Turn::Done(result) => {
                            sink.complete(token, Completion::Sent(result));
                        }
                        Turn::Waits => {}
                        Turn::Unfinished => self.unfinished.push((token, EventFlags::OUT)),
                    }
                }
                if !entry.ended && !entry.paused {
                    if self.receiver.receive(entry, flags, &self.counters, sink) {
                        self.unfinished.push((token, EventFlags::IN));
                    }
                } else if !entry.ended && flags.intersects(GONE) && !entry.hung_up {
                    entry.hung_up = true;
                    sink.complete(token, Completion::HungUp);
                }
                if only_received && entry.only_receives() {
                    // What is watched is the same.
                    return;
                }
            }
        }
        watch(&self.epoll, &self.counters, entry);
    }
}

impl Receiver {
    /// Receives once; again where that has filled the small block, and while the peer is known to
    /// have finished, to report its end in the same pass. `true`: there may be more, also behind a
    /// byte that was marked as urgent.
    #[inline(always)]
    fn receive(
        &mut self,
        entry: &mut Entry,
        flags: EventFlags,
        counters: &Counters,
        sink: &mut impl Sink,
    ) -> bool {
        if !flags.intersects(READ | GONE) {
            return false;
        }
        if flags.contains(EventFlags::PRI) {
            entry.socket.discard_urgent();
        }
        loop {
            counters.receive_calls.add_owned(1);
            let block = if entry.is_bulk { &mut self.bulk } else { &mut self.small };
            let room = block.capacity_left();
            let bytes = match entry.socket.receive(block.spare()) {
                Ok(0) => return end(entry, Ok(()), sink),
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => return end(entry, Err(error), sink),
            };
            counters.received_bytes.add_owned(bytes as u64);
            let received = if bytes < room / config::LENT_PART_MIN {
                Received::Copied(&block.spare()[..bytes])
            } else {
                let fresh = self.pool.allocate(room);
                Received::Lent(std::mem::replace(block, fresh).finish(bytes))
            };
            let flow = sink.complete(entry.token, Completion::Received(received));
            let is_full = bytes == room;
            let was_bulk = entry.is_bulk;
            entry.is_bulk = if was_bulk { bytes > config::SMALL_BUFFER_BYTES } else { is_full };
            if flow == Flow::Pause {
                entry.paused = true;
                return false;
            }
            if !flags.intersects(GONE) && (was_bulk || !is_full) {
                return is_full || flags.contains(EventFlags::PRI);
            }
        }
    }
}

/// Nothing more will be received.
fn end(entry: &mut Entry, result: io::Result<()>, sink: &mut impl Sink) -> bool {
    entry.ended = true;
    sink.complete(entry.token, Completion::Ended(result));
    false
}

fn accept(entry: &mut Entry, counters: &Counters, sink: &mut impl Sink) {
    for _ in 0..config::ACCEPTS_PER_EVENT_MAX {
        counters.accept_calls.add_owned(1);
        let flow = match entry.socket.accept() {
            Ok((socket, peer)) => {
                counters.accepts.add_owned(1);
                sink.complete(entry.token, Completion::Accepted(socket, peer))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            // The connection was gone before we came; the next one may be fine.
            Err(error) if Socket::is_error_of_the_newcomer(&error) => Flow::Continue,
            Err(error) => {
                sink.complete(entry.token, Completion::AcceptFailed(error));
                Flow::Pause
            }
        };
        if flow == Flow::Pause {
            entry.paused = true;
            return;
        }
    }
}

/// How a turn of sending ended.
enum Turn {
    /// The gathered bytes are through, or never will be.
    Done(io::Result<usize>),
    /// The socket is full, and the kernel will tell when it has room.
    Waits,
    /// There may be room for more.
    Unfinished,
}

/// Sends one turn's worth.
fn advance_send(entry: &mut Entry, counters: &Counters) -> Turn {
    let Some(sending) = &mut entry.sending else { return Turn::Waits };
    let (mut turn_bytes, mut spent) = (0, Spent::default());
    let result = loop {
        if sending.rest.is_empty() {
            break Ok(sending.sent_bytes);
        }
        if turn_bytes >= config::SEND_TURN_BYTES {
            return Turn::Unfinished;
        }
        match entry.socket.send_chain(&mut sending.rest, &mut spent, counters) {
            Ok((asked, sent)) => {
                sending.sent_bytes += sent;
                turn_bytes += sent;
                if sent < asked {
                    return Turn::Waits;
                }
            }
            Err(error) => break Err(error),
        }
    };
    entry.sending = None;
    counters.sends_in_flight.add_owned(1u64.wrapping_neg());
    Turn::Done(result)
}

fn find(entries: &mut [Option<Entry>], token: Token) -> Option<&mut Entry> {
    entries.get_mut(token.index())?.as_mut().filter(|entry| entry.token == token)
}

/// Tells the kernel what to watch, if that changed. A failure leaves the connection deaf, so it is
/// ended by the events that are still watched or by its timeouts; `epoll_ctl` fails here only for
/// lack of kernel memory.
fn watch(epoll: &OwnedFd, counters: &Counters, entry: &mut Entry) {
    let want = wanted(entry);
    if want == entry.watched {
        return;
    }
    counters.control_calls.add_owned(1);
    let data = EventData::new_u64(entry.token.bits());
    let done = if want.is_empty() {
        epoll::delete(epoll, &*entry.socket)
    } else if entry.watched.is_empty() {
        epoll::add(epoll, &*entry.socket, data, want)
    } else {
        epoll::modify(epoll, &*entry.socket, data, want)
    };
    match done {
        Ok(()) => entry.watched = want,
        Err(error) => tracing::error!(%error, "epoll_ctl"),
    }
}

fn wanted(entry: &Entry) -> EventFlags {
    let mut want = match entry.role {
        Role::Listener if entry.paused => EventFlags::empty(),
        Role::Listener => EventFlags::IN,
        Role::Connecting => EventFlags::OUT,
        Role::Stream if entry.ended => EventFlags::empty(),
        Role::Stream if !entry.paused => READ,
        Role::Stream if !entry.hung_up => EventFlags::RDHUP,
        Role::Stream => EventFlags::empty(),
    };
    if entry.sending.is_some() {
        want |= EventFlags::OUT;
    }
    if entry.role == Role::Stream && entry.socket.is_tcp() && !want.is_empty() {
        want |= EventFlags::ET;
    }
    want
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::buffer::Slice;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[derive(Default)]
    struct Kept {
        lent: Vec<Slice>,
        copied: Vec<usize>,
    }

    impl Sink for Kept {
        fn complete(&mut self, _: Token, completion: Completion<'_>) -> Flow {
            match completion {
                Completion::Received(Received::Lent(slice)) => self.lent.push(slice),
                Completion::Received(Received::Copied(bytes)) => self.copied.push(bytes.len()),
                _ => {}
            }
            Flow::Continue
        }
    }

    /// What is lent pins four times its bytes at most, after large receives as well.
    #[test]
    fn a_receive_is_lent_from_a_block_that_it_fills_well_and_copied_otherwise() {
        let (pool, wake) = (Pool::new(), Arc::new(Wake::new().expect("an eventfd")));
        let counters = Arc::new(Counters::default());
        let mut epoll = Epoll::new(&wake, &pool, &counters, &()).expect("an epoll");
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        let token = Token::new(0, 0);
        let socket = Arc::new(Socket::adopt(ours.into()).expect("a stream"));
        epoll.attach(token, socket, 1 << 20).expect("attached");
        let small = config::SMALL_BUFFER_BYTES;
        let mut receive = |bytes: usize| {
            theirs.write_all(&vec![7; bytes]).expect("room in the socket");
            let mut kept = Kept::default();
            let came = |kept: &Kept| {
                let lent: usize = kept.lent.iter().map(|slice| slice.len()).sum();
                lent + kept.copied.iter().sum::<usize>()
            };
            while came(&kept) < bytes {
                epoll.wait(Some(Duration::from_secs(10)), &mut kept).expect("a wait");
            }
            let lent: Vec<usize> = kept.lent.iter().map(|slice| slice.len()).collect();
            (lent, kept.copied, pool.stats().block_bytes as usize)
        };
        assert_eq!(receive(small / 4 - 1), (vec![], vec![small / 4 - 1], 0));
        assert_eq!(receive(small / 4), (vec![small / 4], vec![], small));
        let large = 40 << 10;
        let both = (vec![small, large], vec![], small + config::BULK_BUFFER_BYTES);
        assert_eq!(receive(small + large), both);
        // The large block still waits, is filled badly, and gives way to the small one.
        assert_eq!(receive(small / 4), (vec![], vec![small / 4], 0));
        assert_eq!(receive(small / 4), (vec![small / 4], vec![], small));
    }
}
