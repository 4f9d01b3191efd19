// cargo run --release --example mux_rpc
//! Concurrent calls over one connection. The server runs each request as a future and answers in
//! the order of completion. The threads of a client share the connection. The program ends by
//! itself.
//!
//!   request and response  number: u64 · length: u32 (big-endian, of the body) · body

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use ringpoll::{Connection, Error, Handle, Mux, ReadHalf, Result, Server, Slice, blocking};
use tokio::sync::{Semaphore, watch};

fn main() -> Result<()> {
    let value = Arc::new(watch::Sender::new(None));
    let server = Server::builder()
        .on_connect(move |conn| serve(conn, Arc::clone(&value)))
        .bind("127.0.0.1:0")?
        .spawn()?;

    let client = Client::connect(&server.local_addr().to_string())?;
    thread::scope(|scope| {
        // This call is answered after another call has stored the value. So it succeeds only if the
        // server runs both concurrently.
        let get = scope.spawn(|| client.call("get"));
        let echo = |thread| {
            let client = &client;
            scope.spawn(move || (0..100).try_for_each(|call| client.echo(thread, call)))
        };
        let echoes: Vec<_> = (0..8).map(echo).collect();
        for echo in echoes {
            echo.join().expect("does not panic")?;
        }
        println!("client: 800 calls came back");
        client.call("put hello")?;
        println!("client: got {}", get.join().expect("does not panic")?);
        Ok::<(), Error>(())
    })?;
    client.close()?;
    println!("client: done");
    server.shutdown(Duration::from_secs(5))
}

// ---- server ----

/// Reads requests until the end of the connection, without waiting for their answers.
async fn serve(conn: Connection, value: Arc<watch::Sender<Option<String>>>) -> Result<()> {
    let (mut reader, writer) = conn.split();
    let (mux, driver) = Mux::new(writer);
    reader.spawn(driver)?;
    // Limits the requests in progress, also for a client that does not read its answers.
    let places = Arc::new(Semaphore::new(REQUESTS_MAX));
    while reader.readable().await? > 0 {
        let (number, body) = read_frame(&mut reader).await?;
        let place = Arc::clone(&places).acquire_owned().await.map_err(Error::other)?;
        let (mux, value) = (mux.clone(), Arc::clone(&value));
        reader.spawn(async move {
            let reply = answer(&body, &value).await?;
            mux.send(frame(number, &reply)).await?;
            drop(place);
            Ok(())
        })?;
    }
    Ok(())
}

async fn answer(request: &[u8], value: &watch::Sender<Option<String>>) -> Result<Vec<u8>> {
    if let Some(new) = request.strip_prefix(b"put ") {
        value.send_replace(Some(String::from_utf8_lossy(new).into_owned()));
        return Ok(Vec::new());
    }
    if request != b"get" {
        return Ok(request.to_vec());
    }
    let mut changes = value.subscribe();
    let found = changes.wait_for(Option::is_some).await.map_err(Error::other)?;
    Ok(found.clone().unwrap_or_default().into_bytes())
}

// ---- client ----

/// One connection for any number of threads.
struct Client {
    mux: Mux,
    next: AtomicU64,
    /// The waiting calls, by the number of their request.
    waiting: Waiting,
    handle: Handle,
    threads: [thread::JoinHandle<Result<()>>; 2],
}

type Waiting = Arc<Mutex<HashMap<u64, mpsc::SyncSender<Slice>>>>;

impl Client {
    fn connect(addr: &str) -> Result<Client> {
        let conn = blocking::wait(ringpoll::connect(addr))?;
        let handle = conn.handle();
        let (reader, writer) = conn.split();
        let (mux, driver) = Mux::new(writer);
        let waiting = Waiting::default();
        let answers = Arc::clone(&waiting);
        let threads = [
            thread::spawn(move || blocking::wait(driver)),
            thread::spawn(move || blocking::wait(deliver(reader, answers))),
        ];
        Ok(Client { mux, next: AtomicU64::new(0), waiting, handle, threads })
    }

    fn call(&self, request: &str) -> Result<String> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = mpsc::sync_channel(1);
        self.waiting.lock().expect("nobody panics with it").insert(number, sender);
        blocking::wait(self.mux.send(frame(number, request.as_bytes())))?;
        let answer = answer.recv_timeout(CALL_TIMEOUT).map_err(Error::other)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    fn echo(&self, thread: usize, call: usize) -> Result<()> {
        let request = format!("call {call} of thread {thread}");
        let answer = self.call(&request)?;
        match answer == request {
            true => Ok(()),
            false => Err(Error::other(format!("asked {request:?}, got {answer:?}"))),
        }
    }

    /// Sends the remaining messages, then closes the connection, which ends the reader.
    fn close(self) -> Result<()> {
        blocking::wait(self.mux.close())?;
        self.handle.close();
        self.threads.into_iter().try_for_each(|thread| thread.join().expect("does not panic"))
    }
}

/// Passes each answer to the call that waits for it, until the connection is closed.
async fn deliver(mut reader: ReadHalf, waiting: Waiting) -> Result<()> {
    loop {
        match reader.readable().await {
            Ok(0) => return Err(Error::other("the server has ended the connection")),
            Ok(_) => {}
            Err(error) if error.is_closed() => return Ok(()),
            Err(error) => return Err(error),
        }
        let (number, body) = read_frame(&mut reader).await?;
        let waiter = waiting.lock().expect("nobody panics with it").remove(&number);
        let waiter = waiter.ok_or_else(|| Error::other(format!("nobody asked {number}")))?;
        // Fails if the call no longer waits.
        let _ = waiter.send(body);
    }
}

// ---- frames, in both directions ----

async fn read_frame(reader: &mut ReadHalf) -> Result<(u64, Slice)> {
    let head = reader.peek(HEAD_BYTES).await?;
    let (number, length) = head.split_at(8);
    let number = u64::from_be_bytes(number.try_into().expect("eight bytes"));
    let length = u32::from_be_bytes(length.try_into().expect("four bytes")) as usize;
    if length > BODY_BYTES_MAX {
        return Err(Error::other(format!("a body of {length} bytes, 1 MiB at most")));
    }
    let frame = reader.next(HEAD_BYTES + length).await?;
    Ok((number, frame.slice(HEAD_BYTES..)))
}

fn frame(number: u64, body: &[u8]) -> Vec<u8> {
    let length = body.len() as u32; // at most BODY_BYTES_MAX, as in the request
    [&number.to_be_bytes()[..], &length.to_be_bytes(), body].concat()
}

const HEAD_BYTES: usize = 12;
const BODY_BYTES_MAX: usize = 1024 * 1024;
const REQUESTS_MAX: usize = 1024;
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
