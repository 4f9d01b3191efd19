//! The epoll backend: makes completions from the readiness that `epoll(7)` reports.
//!
//! One poller thread owns the backend. A receive that returns fewer bytes than it asked for has
//! emptied the socket, so most requests cost one receive and one send. A connection sends and
//! receives in turns of bounded size. A connection that has more after its turn is `unfinished` and
//! continues after the other ready connections.
//!
//! TCP streams are edge-triggered. The kernel puts a level-triggered event back on its ready list,
//! and the next wait polls that socket a second time for nothing. Unix sockets are level-triggered:
//! a receive from a Unix socket can return few bytes at a message boundary while more bytes wait.
//! A receive from TCP stops before an urgent byte, and more bytes may wait behind that byte.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

use super::buffer_size::{Size, SizeChoice};
use super::lending::lend_or_copy;
use super::socket::TurnEnd;
use super::{Backend, Completion, Flow, Sink, Socket, Token, Wake};
use crate::address::PeerAddr;
use crate::buffer::{Block, Chain, Pool, Spent};
use crate::config;
use crate::counters::Counters;
use crate::user_code;

const READ: EventFlags = EventFlags::IN.union(EventFlags::RDHUP).union(EventFlags::PRI);
const GONE: EventFlags = EventFlags::RDHUP.union(EventFlags::HUP).union(EventFlags::ERR);

pub(crate) struct Epoll {
    epoll: OwnedFd,
    events: Vec<Event>,
    /// How many of `events` are handled.
    handled: usize,
    entries: Vec<Option<Entry>>,
    /// Connections whose turn has ended with work left, and the events to handle them with again.
    unfinished: Unfinished,
    /// Completions that needed no wait. The next `wait` reports them.
    completed: Vec<(Token, Completion<'static>)>,
    receiver: Receiver,
    counters: Arc<Counters>,
}

struct Entry {
    token: Token,
    socket: Arc<Socket>,
    role: Role,
    /// The events that the kernel watches. Empty: the socket is not registered, because the kernel
    /// reports ERR and HUP for every registered socket.
    watched: EventFlags,
    paused: bool,
    /// The number of `watch_readable`, until `resume`. The entry is paused meanwhile.
    direct: Option<u32>,
    /// An urgent byte has come at some time.
    had_urgent: bool,
    /// The peer ended its side while reception was paused.
    hung_up: bool,
    /// `Ended` was reported.
    ended: bool,
    buffer_size: SizeChoice,
    sending: Option<Box<Sending>>,
    /// The events with which the connection is on `unfinished`.
    unfinished: EventFlags,
}

type Unfinished = Vec<(Token, EventFlags)>;

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

/// The blocks that the next receives fill, by [`Size`].
struct Receiver {
    blocks: [Block; Size::ALL.len()],
    pool: Pool,
}

impl Backend for Epoll {
    type Options = ();

    fn new(wake: &Arc<Wake>, pool: &Pool, counters: &Arc<Counters>, (): &()) -> io::Result<Epoll> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let data = EventData::new_u64(Token::NONE.bits());
        epoll::add(&epoll, &**wake, data, EventFlags::IN | EventFlags::ET)?;
        for size in Size::ALL {
            pool.set_aside(1, size.bytes());
        }
        Ok(Epoll {
            epoll,
            events: Vec::with_capacity(config::EVENTS_MAX),
            handled: 0,
            entries: Vec::new(),
            unfinished: Vec::new(),
            completed: Vec::new(),
            receiver: Receiver {
                blocks: Size::ALL.map(|size| pool.allocate(size.bytes())),
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
                self.completed.push((token, Completion::Connected(attached)));
                return;
            }
            failed => failed,
        };
        if let Err(error) = started {
            self.completed.push((token, Completion::Connected(Err(error))));
        }
    }

    fn resume(&mut self, token: Token) {
        if let Some(entry) = find(&mut self.entries, token) {
            entry.paused = false;
            match entry.direct.take() {
                Some(_) => watch_again(&self.epoll, &self.counters, entry),
                None => watch(&self.epoll, &self.counters, entry),
            }
        }
    }

    fn watch_readable(&mut self, token: Token, number: u32) {
        if let Some(entry) = find(&mut self.entries, token) {
            entry.paused = true;
            entry.direct = Some(number);
            watch_again(&self.epoll, &self.counters, entry);
        }
    }

    fn send(&mut self, token: Token, gather: Chain) {
        let Some(entry) = find(&mut self.entries, token) else { return };
        debug_assert!(entry.sending.is_none(), "one send in flight per token");
        entry.sending = Some(Box::new(Sending { rest: gather, sent_bytes: 0 }));
        self.counters.sends_in_flight.add_owned(1);
        if let Some(result) = advance_send(entry, &mut self.unfinished, &self.counters) {
            self.completed.push((token, Completion::Sent(result)));
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
        self.completed.push((token, Completion::Removed));
    }

    fn wait(&mut self, timeout: Option<Duration>, sink: &mut impl Sink) -> io::Result<bool> {
        let busy = !self.completed.is_empty() || !self.unfinished.is_empty();
        let timeout = if busy { Some(Duration::ZERO) } else { timeout };
        if busy {
            for (token, completion) in std::mem::take(&mut self.completed) {
                sink.complete(token, completion);
            }
        }
        if self.handled == self.events.len() {
            self.collect(timeout)?;
            if busy {
                // An unfinished connection gets one turn in each pass over the events.
                for (token, flags) in std::mem::take(&mut self.unfinished) {
                    if let Some(entry) = find(&mut self.entries, token) {
                        entry.unfinished.remove(flags);
                    }
                    self.handle(token, flags, sink);
                }
            }
        }
        // Only some events are handled at a time, so that the memory of these connections is still
        // cached when their handlers run and send.
        let end = self.events.len().min(self.handled + config::EVENTS_PER_ROUND);
        for index in self.handled..end {
            let event = self.events[index];
            self.handle(Token::from_bits(event.data.u64()), event.flags, sink);
        }
        self.handled = end;
        Ok(end == self.events.len())
    }

    fn has_grown(&self) -> bool {
        false
    }

    fn shrink(&mut self) {}
}

impl Drop for Epoll {
    fn drop(&mut self) {
        for size in Size::ALL {
            self.receiver.pool.bring_back(1, size.bytes());
        }
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
            direct: None,
            had_urgent: false,
            hung_up: false,
            ended: false,
            buffer_size: SizeChoice::new(Size::Small),
            sending: None,
            unfinished: EventFlags::empty(),
        };
        entry.watched = wanted(&entry);
        self.counters.control_calls.add_owned(1);
        epoll::add(&self.epoll, &*entry.socket, EventData::new_u64(token.bits()), entry.watched)?;
        self.entries[index] = Some(entry);
        Ok(())
    }

    #[inline(always)]
    fn handle(&mut self, token: Token, flags: EventFlags, sink: &mut impl Sink) {
        // The event may name a token that was removed after the kernel queued the event.
        let Some(entry) = find(&mut self.entries, token) else { return };
        // The next pass handles the events for which the connection is on `unfinished`.
        let flags = flags.difference(entry.unfinished);
        match entry.role {
            Role::Listener => accept(entry, &self.counters, sink),
            Role::Connecting => {
                let connected = entry.socket.take_error();
                entry.role = Role::Stream;
                entry.ended = connected.is_err();
                sink.complete(token, Completion::Connected(connected));
            }
            Role::Stream => {
                if flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR)
                    && let Some(result) = advance_send(entry, &mut self.unfinished, &self.counters)
                {
                    sink.complete(token, Completion::Sent(result));
                }
                if !entry.ended && !entry.paused {
                    if self.receiver.receive(entry, flags, &self.counters, sink) {
                        leave_unfinished(entry, EventFlags::IN, &mut self.unfinished);
                    }
                } else if !entry.ended {
                    if let Some(number) = entry.direct
                        && flags.intersects(READ | GONE)
                    {
                        discard_urgent(entry, flags);
                        sink.complete(token, Completion::Readable(number, entry.had_urgent));
                    }
                    if flags.intersects(GONE) && !entry.hung_up {
                        entry.hung_up = true;
                        sink.complete(token, Completion::HungUp);
                    }
                }
            }
        }
        watch(&self.epoll, &self.counters, entry);
    }
}

impl Receiver {
    /// Receives once. Receives again after filling a block that is not of the largest size, and
    /// while the peer is known to have ended, so that the same pass reports the end. Returns `true`
    /// when the socket may hold more bytes.
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
        discard_urgent(entry, flags);
        loop {
            counters.receive_calls.add_owned(1);
            let size = entry.buffer_size.size();
            let block = &mut self.blocks[size as usize];
            let bytes = match entry.socket.receive(block.spare()) {
                Ok(0) => return end(entry, Ok(()), sink),
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => return end(entry, Err(error), sink),
            };
            counters.received_bytes.add_owned(bytes as u64);
            let received = lend_or_copy(block, bytes, &self.pool);
            let flow = sink.complete(entry.token, Completion::Received(received));
            let is_full = bytes == size.bytes();
            entry.buffer_size.note(bytes, 1);
            if flow == Flow::Pause {
                entry.paused = true;
                return false;
            }
            if !flags.intersects(GONE) && (size == Size::Large || !is_full) {
                return is_full || flags.contains(EventFlags::PRI);
            }
        }
    }
}

fn discard_urgent(entry: &mut Entry, flags: EventFlags) {
    if flags.contains(EventFlags::PRI) {
        entry.had_urgent = true;
        entry.socket.discard_urgent();
    }
}

/// Reports the end of reception. Returns `false`: there are no more bytes.
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
            // The new connection failed, not the listener.
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

/// Sends one turn of the entry's send. Returns the result when the send is over. Otherwise the
/// kernel reports room in the socket, or the send is put on `unfinished`.
fn advance_send(
    entry: &mut Entry,
    unfinished: &mut Unfinished,
    counters: &Counters,
) -> Option<io::Result<usize>> {
    let sending = entry.sending.as_mut()?;
    let turn = entry.socket.send_turn(&mut sending.rest, &mut Spent::default(), counters);
    sending.sent_bytes += turn.bytes;
    let result = match turn.end {
        Ok(TurnEnd::Done) => Ok(sending.sent_bytes),
        Ok(TurnEnd::Full) => return None,
        Ok(TurnEnd::Unfinished) => {
            leave_unfinished(entry, EventFlags::OUT, unfinished);
            return None;
        }
        Err(error) => Err(error),
    };
    entry.sending = None;
    counters.sends_in_flight.add_owned(1u64.wrapping_neg());
    Some(result)
}

/// Puts the connection on `unfinished`, unless it is there with this flag.
fn leave_unfinished(entry: &mut Entry, flag: EventFlags, unfinished: &mut Unfinished) {
    if !entry.unfinished.contains(flag) {
        entry.unfinished.insert(flag);
        unfinished.push((entry.token, flag));
    }
}

fn find(entries: &mut [Option<Entry>], token: Token) -> Option<&mut Entry> {
    entries.get_mut(token.index())?.as_mut().filter(|entry| entry.token == token)
}

/// Tells the kernel which events to watch, if they changed. `epoll_ctl` fails here only without
/// kernel memory. The connection then misses events, and the events that are still watched or its
/// timeouts end the connection.
fn watch(epoll: &OwnedFd, counters: &Counters, entry: &mut Entry) {
    if wanted(entry) != entry.watched {
        watch_again(epoll, counters, entry);
    }
}

/// [`watch`], also where the events are the same: the kernel then reports again what it has
/// reported before.
fn watch_again(epoll: &OwnedFd, counters: &Counters, entry: &mut Entry) {
    let want = wanted(entry);
    if want.is_empty() && entry.watched.is_empty() {
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
        Err(error) => user_code::log(|| tracing::error!(%error, "epoll_ctl")),
    }
}

fn wanted(entry: &Entry) -> EventFlags {
    let is_direct = entry.direct.is_some();
    let mut want = match entry.role {
        Role::Listener if entry.paused => EventFlags::empty(),
        Role::Listener => EventFlags::IN,
        Role::Connecting => EventFlags::OUT,
        Role::Stream if entry.ended => EventFlags::empty(),
        Role::Stream if !entry.paused || is_direct => READ,
        Role::Stream if !entry.hung_up => EventFlags::RDHUP,
        Role::Stream => EventFlags::empty(),
    };
    if entry.sending.is_some() {
        want |= EventFlags::OUT;
    }
    // A reader that receives by itself empties a Unix socket before it waits, so that
    // edge-triggered events lose nothing.
    let is_edge = is_direct || entry.socket.is_tcp();
    if entry.role == Role::Stream && is_edge && !want.is_empty() {
        want |= EventFlags::ET;
    }
    want
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::buffer::Slice;
    use crate::sys::Received;
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

    /// A backend with one connection, and the peer of this connection.
    fn attached() -> (Epoll, UnixStream) {
        let (pool, wake) = (Pool::new(), Arc::new(Wake::new().expect("an eventfd")));
        let counters = Arc::new(Counters::default());
        let mut epoll = Epoll::new(&wake, &pool, &counters, &()).expect("an epoll");
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let socket = Arc::new(Socket::adopt(ours.into()).expect("a stream"));
        epoll.attach(Token::new(0, 0), socket, 1 << 20).expect("attached");
        (epoll, theirs)
    }

    /// A lent slice keeps at most four times its bytes, after large receives too.
    #[test]
    fn a_receive_is_lent_from_a_block_that_it_fills_well_and_copied_otherwise() {
        let (mut epoll, mut theirs) = attached();
        let pool = epoll.receiver.pool.clone();
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
        // A quarter of the small block without its header room.
        let lent = 1 << 10;
        assert_eq!(receive(lent - 1), (vec![], vec![lent - 1], 0));
        assert_eq!(receive(lent), (vec![lent], vec![], small));
        let (medium, large) = (config::MEDIUM_BUFFER_BYTES, config::LARGE_BUFFER_BYTES);
        let all = (vec![small, medium, large / 4], vec![], small + medium + large);
        assert_eq!(receive(small + medium + large / 4), all);
        // These receives use the large block and fill little of it, until the size shrinks.
        for _ in 0..config::FIT_SMALLER_TO_SHRINK {
            assert_eq!(receive(lent), (vec![], vec![lent], 0));
        }
        assert_eq!(receive(lent), (vec![lent], vec![], small));
    }

    #[test]
    fn a_connection_that_has_more_gets_one_turn_in_a_pass() {
        let (mut epoll, mut theirs) = attached();
        let counters = Arc::clone(&epoll.counters);
        theirs.set_nonblocking(true).expect("a flag");
        for pass in 0..20 {
            // Until the socket is full: more than a turn receives.
            while theirs.write(&[7; 4096]).is_ok() {}
            let before = counters.receive_calls.read();
            epoll.wait(Some(Duration::from_secs(10)), &mut Kept::default()).expect("a wait");
            let calls = counters.receive_calls.read() - before;
            // The first receives fill smaller blocks.
            assert!(calls == 1 || pass < 2, "{calls} receives in pass {pass}");
        }
    }
}
