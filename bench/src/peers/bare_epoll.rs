//! An epoll loop without a library: what the kernel costs by itself, and so the limit of any
//! library on epoll.
//!
//! One thread, one input and one output buffer for all connections; level-triggered. A connection
//! keeps bytes only when a frame arrived in part or a reply left in part. While a reply waits, its
//! connection is not read.

use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send, sockopt};
use serde_json::Value;

use super::Service;
use crate::error::{Failure, Result};

pub(super) fn serve(listener: &TcpListener, stop: &UnixStream, service: Service) -> Result<Value> {
    let mut server = Server {
        epoll: epoll::create(CreateFlags::CLOEXEC).map_err(failed("create an epoll"))?,
        connections: Vec::new(),
        free: Vec::new(),
        input: vec![0; INPUT_BYTES * 2],
        output: Vec::with_capacity(INPUT_BYTES),
        service,
        accepted: 0,
        system_calls: 0,
    };
    epoll::add(&server.epoll, listener, EventData::new_u64(LISTENER), EventFlags::IN)
        .map_err(failed("watch the listener"))?;
    epoll::add(&server.epoll, stop, EventData::new_u64(STOP), EventFlags::IN)
        .map_err(failed("watch for signals"))?;
    server.run(listener)?;
    Ok(super::counters(server.accepted, Some(server.system_calls)))
}

struct Server {
    epoll: OwnedFd,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    input: Vec<u8>,
    output: Vec<u8>,
    service: Service,
    accepted: u64,
    system_calls: u64,
}

struct Connection {
    fd: OwnedFd,
    /// The front of a frame that is not whole yet.
    partial: Vec<u8>,
    /// Replies the socket did not take; while there are any, only room to write is watched.
    unsent: Vec<u8>,
    unsent_from: usize,
}

impl Server {
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
                    index => self.serve(index as usize),
                }
            }
        }
    }

    fn accept(&mut self, listener: &TcpListener) {
        for _ in 0..ACCEPTS_MAX {
            self.system_calls += 1;
            // Out of descriptors or nobody there: the listener stays watched either way.
            let Ok(fd) = accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) else {
                return;
            };
            let index = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            self.system_calls += 2;
            let data = EventData::new_u64(index as u64);
            let watched = sockopt::set_tcp_nodelay(&fd, true)
                .and_then(|()| epoll::add(&self.epoll, &fd, data, EventFlags::IN));
            if watched.is_err() {
                self.free.push(index);
                continue;
            }
            self.accepted += 1;
            let connection =
                Connection { fd, partial: Vec::new(), unsent: Vec::new(), unsent_from: 0 };
            self.connections[index] = Some(connection);
        }
    }

    fn serve(&mut self, index: usize) {
        // An event of a connection that an earlier event of the same batch closed.
        let Some(mut connection) = self.connections[index].take() else { return };
        let served = if connection.unsent.is_empty() {
            self.answer(&mut connection, index)
        } else {
            self.send_unsent(&mut connection, index)
        };
        match served {
            Ok(true) => self.connections[index] = Some(connection),
            // Closed by the peer, or broken: dropping it closes the socket, which also ends the
            // watch.
            Ok(false) | Err(_) => {
                self.system_calls += 1;
                self.free.push(index);
            }
        }
    }

    /// Reads once and answers every frame that is whole. `Ok(false)`: the peer has closed.
    fn answer(&mut self, connection: &mut Connection, index: usize) -> io::Result<bool> {
        self.system_calls += 1;
        // A short front is put before what comes, so that the frames of a pipeline are never copied
        // to be whole. A long one would be moved again with every read, so what comes is put behind
        // it.
        let front =
            if connection.partial.len() <= INPUT_BYTES { connection.partial.len() } else { 0 };
        self.input[..front].copy_from_slice(&connection.partial[..front]);
        let bytes = match recv(
            &connection.fd,
            &mut self.input[front..front + INPUT_BYTES],
            RecvFlags::empty(),
        ) {
            Ok((0, _)) => return Ok(false),
            Ok((bytes, _)) => bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        let chunk = &self.input[..front + bytes];
        self.output.clear();
        if connection.partial.len() == front {
            let answered = self.service.answer(chunk, &mut self.output);
            let whole = answered.map_err(io::Error::other)?;
            connection.partial.clear();
            connection.partial.extend_from_slice(&chunk[whole..]);
        } else {
            connection.partial.extend_from_slice(chunk);
            let answered = self.service.answer(&connection.partial, &mut self.output);
            let whole = answered.map_err(io::Error::other)?;
            connection.partial.drain(..whole);
        }
        if self.output.is_empty() {
            return Ok(true);
        }
        let sent = self.send(&connection.fd, &self.output)?;
        self.system_calls += 1;
        if sent < self.output.len() {
            connection.unsent.extend_from_slice(&self.output[sent..]);
            self.watch(connection, index, EventFlags::OUT)?;
        }
        Ok(true)
    }

    fn send_unsent(&mut self, connection: &mut Connection, index: usize) -> io::Result<bool> {
        self.system_calls += 1;
        connection.unsent_from +=
            self.send(&connection.fd, &connection.unsent[connection.unsent_from..])?;
        if connection.unsent_from == connection.unsent.len() {
            connection.unsent = Vec::new();
            connection.unsent_from = 0;
            self.watch(connection, index, EventFlags::IN)?;
        }
        Ok(true)
    }

    fn send(&self, fd: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
        match send(fd, bytes, SendFlags::NOSIGNAL) {
            Ok(sent) => Ok(sent),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    fn watch(
        &mut self,
        connection: &Connection,
        index: usize,
        flags: EventFlags,
    ) -> io::Result<()> {
        self.system_calls += 1;
        let data = EventData::new_u64(index as u64);
        Ok(epoll::modify(&self.epoll, &connection.fd, data, flags)?)
    }
}

fn failed(operation: &str) -> impl FnOnce(Errno) -> Failure {
    move |error| Failure::new(format!("{operation}: {}", io::Error::from(error)))
}

const LISTENER: u64 = u64::MAX;
const STOP: u64 = u64::MAX - 1;
const EVENTS_MAX: usize = 512;
const ACCEPTS_MAX: usize = 64;
/// Measured: with pipelined 1 KB messages a 4 KB buffer loses a factor of four against this.
const INPUT_BYTES: usize = 64 << 10;
