//! A multiplexed client on tokio, as users of tokio write it. Each connection has a task that reads
//! answers and matches them by their numbers, and a writer behind a mutex of tokio.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;

use super::clients::Echo;
use crate::error::{Failure, Result};

/// The connections, which take turns.
#[derive(Clone)]
pub(super) struct OnTokio {
    lines: Arc<[Arc<Line>]>,
    next: Arc<AtomicUsize>,
}

/// One connection.
struct Line {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    /// `None` once the connection has ended.
    waiting: Mutex<Option<Waiting>>,
    next_number: AtomicU32,
}

/// The calls without an answer, by their numbers.
type Waiting = HashMap<u32, oneshot::Sender<Vec<u8>>>;

impl OnTokio {
    pub(super) async fn connect(connections: u32, addr: SocketAddr) -> Result<OnTokio> {
        let failed = || Failure::at(format!("dial {addr}"));
        let mut lines = Vec::new();
        for _ in 0..connections {
            let stream = TcpStream::connect(addr).await.map_err(failed())?;
            stream.set_nodelay(true).map_err(failed())?;
            let (reader, writer) = stream.into_split();
            let line = Arc::new(Line {
                writer: tokio::sync::Mutex::new(writer),
                waiting: Mutex::new(Some(HashMap::new())),
                next_number: AtomicU32::new(0),
            });
            tokio::spawn(Line::read(Arc::clone(&line), reader));
            lines.push(line);
        }
        Ok(OnTokio { lines: lines.into(), next: Arc::default() })
    }
}

impl Echo for OnTokio {
    type Answer = Vec<u8>;

    async fn echo(&self, request: Vec<u8>) -> Result<Vec<u8>> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.lines.len();
        self.lines[index].call(request).await
    }
}

impl Line {
    async fn call(&self, request: Vec<u8>) -> Result<Vec<u8>> {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        match &mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(waiting) => drop(waiting.insert(number, sender)),
            None => return Err(Failure::new("call: the connection has ended")),
        }
        let length = (NUMBER_BYTES + request.len()) as u32;
        let mut frame = Vec::with_capacity(HEADER_BYTES + request.len());
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(&number.to_be_bytes());
        frame.extend_from_slice(&request);
        self.writer.lock().await.write_all(&frame).await.map_err(Failure::at("call: write"))?;
        answer.await.map_err(|_| Failure::new("call: the connection was lost"))
    }

    /// Passes answers to their calls until the connection ends.
    async fn read(self: Arc<Self>, reader: OwnedReadHalf) {
        let mut reader = BufReader::with_capacity(READ_BYTES, reader);
        while let Ok(length) = reader.read_u32().await {
            let Ok(number) = reader.read_u32().await else { break };
            let Some(bytes) = (length as usize).checked_sub(NUMBER_BYTES) else { break };
            if bytes > ANSWER_BYTES_MAX {
                break;
            }
            let mut answer = vec![0; bytes];
            if reader.read_exact(&mut answer).await.is_err() {
                break;
            }
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let call = waiting.as_mut().and_then(|waiting| waiting.remove(&number));
            drop(waiting);
            if let Some(call) = call {
                // A caller that is gone needs no answer.
                let _ = call.send(answer);
            }
        }
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The length, and the number of the call.
const HEADER_BYTES: usize = 8;
const NUMBER_BYTES: usize = 4;
/// As much as the pollers of ringpoll offer the kernel for one receive.
const READ_BYTES: usize = 64 << 10;
/// Far beyond what `calls` sends.
const ANSWER_BYTES_MAX: usize = 1 << 30;
