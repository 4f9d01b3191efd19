// cargo run --release --example chat -- --addr 127.0.0.1:8972
//! A chat: every line that a client sends goes to all other clients. Try it with two `nc`.
//!
//! A client that does not read is disconnected when more than 1 MiB waits for it. No client waits
//! for another one.

use std::collections::HashMap;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use ringpoll::{Connection, Error, Handle, Mux, ReadHalf, Result, Server, Slice};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some("--addr"), Some(addr)) = (args.next().as_deref(), args.next()) else {
        return Err(Error::other("usage: chat --addr HOST:PORT"));
    };
    let room = Arc::new(Room::default());
    let server = Server::builder()
        .read_bytes_max(LINE_BYTES_MAX)
        .on_connect(move |conn| take_part(conn, Arc::clone(&room)))
        .on_error(|peer, error| eprintln!("{}: {error}", peer.peer_addr()))
        .bind(&addr)?;
    println!("listening on {}", server.local_addr());
    server.serve()
}

/// Serves one client until it ends its stream, or is disconnected.
async fn take_part(conn: Connection, room: Arc<Room>) -> Result<()> {
    let handle = conn.handle();
    let (mut reader, writer) = conn.split();
    // Other clients send through the mux. Its driver flushes what they have sent.
    let (mux, driver) = Mux::new(writer);
    reader.spawn(driver)?;
    let number = room.enter(Member { mux, handle });
    let result = pass_lines(&mut reader, &room, number).await;
    room.leave(number);
    result
}

async fn pass_lines(reader: &mut ReadHalf, room: &Room, number: u64) -> Result<()> {
    while reader.readable().await? > 0 {
        match reader.until(b'\n').await {
            Ok(line) => room.say(number, &line),
            // The client has ended its stream within a line.
            Err(error) if error.is_eof() => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// All clients.
#[derive(Default)]
struct Room {
    members: Mutex<Members>,
}

#[derive(Default)]
struct Members {
    next_number: u64,
    by_number: HashMap<u64, Member>,
}

struct Member {
    mux: Mux,
    handle: Handle,
}

impl Room {
    fn enter(&self, member: Member) -> u64 {
        let mut members = self.lock();
        members.next_number += 1;
        let number = members.next_number;
        members.by_number.insert(number, member);
        number
    }

    /// The driver of the member ends when its mux is dropped.
    fn leave(&self, number: u64) {
        let left = self.lock().by_number.remove(&number);
        drop(left);
    }

    /// Sends `line` to all members but the speaker. All members get lines in the same order,
    /// because the lock is held.
    fn say(&self, speaker: u64, line: &Slice) {
        for (number, member) in &self.lock().by_number {
            if *number != speaker && !accepts_now(&member.mux, line) {
                // The member is too slow, or gone. Its handler ends, and removes it.
                member.handle.abort();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Members> {
        self.members.lock().expect("no thread panics with it")
    }
}

/// Whether the mux has accepted `line` without a wait.
fn accepts_now(mux: &Mux, line: &Slice) -> bool {
    let sending = pin!(mux.send(line.clone()));
    matches!(sending.poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(Ok(())))
}

const LINE_BYTES_MAX: usize = 64 << 10;
