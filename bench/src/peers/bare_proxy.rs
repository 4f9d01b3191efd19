//! A proxy without a library: what forwarding costs by itself on epoll, and so its limit.
//!
//! One thread, one buffer for all; level-triggered. A connection and its counterpart stand side by
//! side. What one does not take is kept for it, and its counterpart is not read meanwhile.

use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde_json::Value;

use crate::error::{Failure, Result};

pub(super) fn serve(
    listener: &TcpListener,
    stop: &UnixStream,
    upstream: SocketAddr,
) -> Result<Value> {
    let mut proxy = Proxy {
        epoll: epoll::create(CreateFlags::CLOEXEC).map_err(failed("create an epoll"))?,
        upstream,
        pairs: Vec::new(),
        free: Vec::new(),
        buffer: vec![0; BUFFER_BYTES],
        accepted: 0,
        system_calls: 0,
    };
    for (watched, data) in [(listener.as_fd(), LISTENER), (stop.as_fd(), STOP)] {
        epoll::add(&proxy.epoll, watched, EventData::new_u64(data), EventFlags::IN)
            .map_err(failed("watch"))?;
    }
    proxy.run(listener)?;
    Ok(super::counters(proxy.accepted, Some(proxy.system_calls)))
}

struct Proxy {
    epoll: OwnedFd,
    upstream: SocketAddr,
    /// A client and its connection to the upstream.
    pairs: Vec<Option<[End; 2]>>,
    free: Vec<usize>,
    buffer: Vec<u8>,
    accepted: u64,
    system_calls: u64,
}

struct End {
    stream: TcpStream,
    /// What it has not taken, from `unsent_from` on.
    unsent: Vec<u8>,
    unsent_from: usize,
    /// It sends nothing more.
    ended: bool,
    watched: EventFlags,
}

impl Proxy {
    fn run(&mut self, listener: &TcpListener) -> Result<()> {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS_MAX);
        loop {
            events.clear();
            self.system_calls += 1;
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(failed("wait")(error)),
            }
            for event in &events {
                match event.data.u64() {
                    STOP => return Ok(()),
                    LISTENER => self.accept(listener),
                    data => self.turn((data / 2) as usize, (data % 2) as usize, event.flags),
                }
            }
        }
    }

    fn accept(&mut self, listener: &TcpListener) {
        for _ in 0..ACCEPTS_MAX {
            self.system_calls += 1;
            let Ok((client, _)) = listener.accept() else { return };
            self.system_calls += SETUP_CALLS;
            // Waits for the upstream: this is about bytes, not about connecting.
            let index = self.free.pop().unwrap_or_else(|| {
                self.pairs.push(None);
                self.pairs.len() - 1
            });
            match self.pair(client, index) {
                Ok(pair) => {
                    self.accepted += 1;
                    self.pairs[index] = Some(pair);
                }
                // Without an upstream the client is closed.
                Err(_) => self.free.push(index),
            }
        }
    }

    fn pair(&self, client: TcpStream, index: usize) -> std::io::Result<[End; 2]> {
        let upstream = TcpStream::connect(self.upstream)?;
        let end = |(stream, side): (TcpStream, u64)| {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            let data = EventData::new_u64(index as u64 * 2 + side);
            epoll::add(&self.epoll, &stream, data, EventFlags::IN)?;
            let watched = EventFlags::IN;
            Ok(End { stream, unsent: Vec::new(), unsent_from: 0, ended: false, watched })
        };
        let ends: std::io::Result<Vec<End>> =
            [(client, 0), (upstream, 1)].map(end).into_iter().collect();
        Ok(ends?.try_into().unwrap_or_else(|_| unreachable!("two were made")))
    }

    /// What an event asks for; afterwards the pair is there or closed.
    fn turn(&mut self, index: usize, side: usize, flags: EventFlags) {
        // An event of a pair that an earlier event of the same batch closed.
        let Some(mut pair) = self.pairs[index].take() else { return };
        let mut done = if flags.contains(EventFlags::OUT) {
            self.send_unsent(&mut pair[side])
        } else {
            Ok(())
        };
        let readable = flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR);
        if done.is_ok() && readable && pair[side].watched.contains(EventFlags::IN) {
            done = self.forward(&mut pair, side);
        }
        let is_over = pair.iter().all(|end| end.ended && end.unsent.is_empty());
        if done.is_err() || is_over || self.watch(&mut pair, index).is_err() {
            // Dropping them closes both sockets, which also ends the watch.
            self.system_calls += 2;
            self.free.push(index);
            return;
        }
        self.pairs[index] = Some(pair);
    }

    /// Reads once, and sends that to the counterpart.
    fn forward(&mut self, pair: &mut [End; 2], side: usize) -> std::io::Result<()> {
        self.system_calls += 1;
        let bytes = match recv(&pair[side].stream, &mut self.buffer[..], RecvFlags::empty()) {
            Ok((bytes, _)) => bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        self.system_calls += 1;
        let other = &mut pair[1 - side];
        if bytes == 0 {
            pair[side].ended = true;
            return pair[1 - side].stream.shutdown(Shutdown::Write);
        }
        let sent = sent(send(&other.stream, &self.buffer[..bytes], SendFlags::NOSIGNAL))?;
        other.unsent.extend_from_slice(&self.buffer[sent..bytes]);
        Ok(())
    }

    fn send_unsent(&mut self, end: &mut End) -> std::io::Result<()> {
        self.system_calls += 1;
        let rest = &end.unsent[end.unsent_from..];
        end.unsent_from += sent(send(&end.stream, rest, SendFlags::NOSIGNAL))?;
        if end.unsent_from == end.unsent.len() {
            (end.unsent, end.unsent_from) = (Vec::new(), 0);
        }
        Ok(())
    }

    /// Room to write while there is something left to send; bytes to read while the counterpart
    /// takes them.
    fn watch(&mut self, pair: &mut [End; 2], index: usize) -> std::io::Result<()> {
        let blocked = [0, 1].map(|side: usize| !pair[side].unsent.is_empty());
        for side in [0, 1] {
            let end = &mut pair[side];
            let mut wanted = EventFlags::empty();
            wanted.set(EventFlags::IN, !end.ended && !blocked[1 - side]);
            wanted.set(EventFlags::OUT, blocked[side]);
            if wanted != end.watched {
                self.system_calls += 1;
                let data = EventData::new_u64((index * 2 + side) as u64);
                epoll::modify(&self.epoll, &end.stream, data, wanted)?;
                end.watched = wanted;
            }
        }
        Ok(())
    }
}

/// How much was taken.
fn sent(result: rustix::io::Result<usize>) -> std::io::Result<usize> {
    match result {
        Ok(sent) => Ok(sent),
        Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

fn failed(operation: &str) -> impl FnOnce(Errno) -> Failure {
    move |error| Failure::new(format!("{operation}: {}", std::io::Error::from(error)))
}

const LISTENER: u64 = u64::MAX;
const STOP: u64 = u64::MAX - 1;
const EVENTS_MAX: usize = 512;
const ACCEPTS_MAX: usize = 64;
const BUFFER_BYTES: usize = 64 << 10;
/// Socket and connect, and options and watch of both.
const SETUP_CALLS: u64 = 8;
