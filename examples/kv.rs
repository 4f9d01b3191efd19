// cargo run --release --example kv -- --addr 127.0.0.1:6379
//! A key-value server that speaks the Redis protocol (RESP2), for any Redis client. It keeps its
//! data in memory only. With `--runtime tokio` plain tokio serves the same commands, to compare.
//!
//! A command is parsed where it was received, and its answer is written into the output of the
//! connection. All commands that have arrived are answered with one flush.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes};
use ringpoll::{Connection, Error, Placement, Result, Server, WritePart};

fn main() -> Result<()> {
    let (mut addr, mut runtime) = (None, "ringpoll".to_owned());
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        match (name.as_str(), args.next()) {
            ("--addr", Some(value)) => addr = Some(value),
            ("--runtime", Some(value)) => runtime = value,
            _ => return Err(usage()),
        }
    }
    let addr = addr.ok_or_else(usage)?;
    let store = Arc::new(Store::new());
    let swept = Arc::clone(&store);
    std::thread::spawn(move || swept.remove_expired_forever());
    match runtime.as_str() {
        "ringpoll" => on_ringpoll(&addr, store),
        "tokio" => on_tokio(&addr, store),
        _ => Err(usage()),
    }
}

fn usage() -> Error {
    Error::other("usage: kv --addr HOST:PORT [--runtime ringpoll|tokio]")
}

// ---- the connections ----

fn on_ringpoll(addr: &str, store: Arc<Store>) -> Result<()> {
    let server = Server::builder()
        // Every command takes less than a few microseconds.
        .placement(Placement::Inline)
        .on_request(move |conn| serve(conn, Arc::clone(&store)))
        .on_error(|peer, error| eprintln!("{}: {error}", peer.peer_addr()))
        .bind(addr)?;
    println!("listening on {}", server.local_addr());
    server.serve()
}

/// Answers all commands that have arrived.
async fn serve(mut conn: Connection, store: Arc<Store>) -> Result<()> {
    let (mut reader, mut writer) = conn.parts();
    let mut commands = reader.frames(COMMAND_BYTES_MAX, command_bytes);
    let mut next = commands.next().await;
    loop {
        match next {
            Ok(Some(command)) => execute(command, &store, &mut writer)?,
            Ok(None) => return writer.flush().await,
            Err(error) if is_of_the_connection(&error) => return Err(error),
            Err(error) => {
                writer.write_copy(format!("-ERR {error}\r\n").as_bytes())?;
                writer.shutdown_write().await?;
                return Err(error);
            }
        }
        // Bounds the answers that a client asks for with one piece of input.
        if writer.pending_len() >= ANSWER_BYTES_MAX {
            writer.flush().await?;
        }
        next = commands.try_next();
    }
}

/// Any other error is about the bytes that the client has sent.
fn is_of_the_connection(error: &Error) -> bool {
    error.is_closed() || error.is_eof() || error.is_timeout() || error.raw_os_error().is_some()
}

fn on_tokio(addr: &str, store: Arc<Store>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(addr).await?;
        println!("listening on {}", listener.local_addr()?);
        loop {
            let (stream, peer) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                if let Err(error) = serve_tokio(stream, store).await {
                    eprintln!("{peer}: {error}");
                }
            });
        }
    })
}

async fn serve_tokio(mut stream: tokio::net::TcpStream, store: Arc<Store>) -> Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (mut input, mut output) = (bytes::BytesMut::with_capacity(16 << 10), Vec::new());
    while stream.read_buf(&mut input).await? > 0 {
        let mut done = 0;
        let refused = loop {
            match command_bytes(&input[done..]) {
                Ok(Some(bytes)) if done + bytes <= input.len() => {
                    execute(&input[done..done + bytes], &store, &mut output)?;
                    done += bytes;
                }
                Ok(_) => break None,
                Err(error) => break Some(error),
            }
            if output.len() >= ANSWER_BYTES_MAX {
                stream.write_all(&output).await?;
                output.clear();
            }
        };
        if let Some(error) = &refused {
            output.extend(format!("-ERR {error}\r\n").into_bytes());
        }
        stream.write_all(&output).await?;
        if let Some(error) = refused {
            stream.shutdown().await?;
            return Err(error);
        }
        output.clear();
        bytes::Buf::advance(&mut input, done);
    }
    Ok(())
}

// ---- the protocol ----

/// How many bytes the first command in `front` has; `None` if that is not known yet.
fn command_bytes(front: &[u8]) -> Result<Option<usize>> {
    match front.first() {
        None => return Ok(None),
        Some(b'*') => {}
        // A line of words.
        Some(_) => match front.iter().take(INLINE_BYTES_MAX).position(|&byte| byte == b'\n') {
            Some(index) => return Ok(Some(index + 1)),
            None if front.len() < INLINE_BYTES_MAX => return Ok(None),
            None => return Err(Error::other("Protocol error: too big inline request")),
        },
    }
    let Some((count, mut bytes)) = number_line(front)? else { return Ok(None) };
    if count > ARGUMENTS_MAX {
        return Err(too_long());
    }
    for _ in 0..count {
        let Some(rest) = front.get(bytes..).filter(|rest| !rest.is_empty()) else {
            return Ok(None);
        };
        if rest[0] != b'$' {
            let found = char::from(rest[0]).escape_default();
            return Err(Error::other(format!("Protocol error: expected '$', got '{found}'")));
        }
        let Some((length, line_bytes)) = number_line(rest)? else { return Ok(None) };
        bytes += line_bytes + length + b"\r\n".len();
        if bytes > COMMAND_BYTES_MAX {
            return Err(too_long());
        }
    }
    Ok(Some(bytes))
}

/// The number in a line like `$12\r\n`, and the length of the line; `None` if it is not complete.
fn number_line(line: &[u8]) -> Result<Option<(usize, usize)>> {
    let mut number = 0;
    for (index, &byte) in line.iter().enumerate().skip(1) {
        match byte {
            b'0'..=b'9' if number < COMMAND_BYTES_MAX => {
                number = number * 10 + usize::from(byte - b'0');
            }
            b'\r' if index > 1 && index + 1 == line.len() => return Ok(None),
            b'\r' if index > 1 && line[index + 1] == b'\n' => return Ok(Some((number, index + 2))),
            _ => return Err(Error::other("Protocol error: invalid length")),
        }
    }
    Ok(None)
}

fn too_long() -> Error {
    Error::other("Protocol error: too long a command")
}

/// The words of one whole command, its name first. They refer to the received bytes.
fn words(command: &[u8]) -> Vec<&[u8]> {
    if command[0] != b'*' {
        let words = command.split(u8::is_ascii_whitespace);
        return words.filter(|word| !word.is_empty()).collect();
    }
    // `command_bytes` has accepted these lines.
    let (_, line_bytes) = number_line(command).ok().flatten().unwrap_or_default();
    let (mut rest, mut words) = (&command[line_bytes..], Vec::with_capacity(4));
    while let Ok(Some((length, line_bytes))) = number_line(rest) {
        let (word, behind) = rest[line_bytes..].split_at(length);
        words.push(word);
        rest = &behind[b"\r\n".len()..];
    }
    words
}

/// Where answers go.
trait Answer {
    /// Room for `bytes`.
    fn room(&mut self, bytes: usize) -> Result<impl BufMut>;

    /// Writes a value, without copying it if it is large.
    fn put_value(&mut self, value: Bytes) -> Result<()>;
}

impl Answer for WritePart<'_> {
    fn room(&mut self, bytes: usize) -> Result<impl BufMut> {
        self.reserve_buf(bytes)
    }

    fn put_value(&mut self, value: Bytes) -> Result<()> {
        self.write(value)
    }
}

impl Answer for Vec<u8> {
    fn room(&mut self, _: usize) -> Result<impl BufMut> {
        Ok(self)
    }

    fn put_value(&mut self, value: Bytes) -> Result<()> {
        self.extend_from_slice(&value);
        Ok(())
    }
}

fn text(answer: &mut impl Answer, text: &str) -> Result<()> {
    answer.room(text.len())?.put_slice(text.as_bytes());
    Ok(())
}

fn integer(answer: &mut impl Answer, value: i64) -> Result<()> {
    text(answer, &format!(":{value}\r\n"))
}

/// A value, or the mark that there is none.
fn bulk(answer: &mut impl Answer, value: Option<&[u8]>) -> Result<()> {
    let Some(value) = value else { return text(answer, "$-1\r\n") };
    let mut room = answer.room(value.len() + HEAD_BYTES)?;
    put_head(&mut room, b'$', value.len());
    room.put_slice(value);
    room.put_slice(b"\r\n");
    Ok(())
}

/// A value of the store. A large one is not copied.
fn stored(answer: &mut impl Answer, value: Option<Bytes>) -> Result<()> {
    match value {
        Some(value) if value.len() >= SHARED_BYTES_MIN => {
            put_head(&mut answer.room(HEAD_BYTES)?, b'$', value.len());
            answer.put_value(value)?;
            text(answer, "\r\n")
        }
        value => bulk(answer, value.as_deref()),
    }
}

/// Writes a line like `$12\r\n`.
fn put_head(room: &mut impl BufMut, kind: u8, number: usize) {
    let (mut digits, mut at, mut number) = ([0; 20], 20, number);
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    room.put_u8(kind);
    room.put_slice(&digits[at..]);
    room.put_slice(b"\r\n");
}

// ---- the commands ----

fn execute(command: &[u8], store: &Store, answer: &mut impl Answer) -> Result<()> {
    let words = words(command);
    // An empty command has no answer.
    let Some((name, arguments)) = words.split_first() else { return Ok(()) };
    let (mut upper, bytes) = ([0; 16], name.len().min(16));
    upper[..bytes].copy_from_slice(&name[..bytes]);
    upper.make_ascii_uppercase();
    match (&upper[..bytes], arguments) {
        (b"GET", [key]) => stored(answer, store.get(key)),
        (b"SET", [key, value, options @ ..]) => set(key, value, options, store, answer),
        (b"MGET", keys @ [_, ..]) => {
            let values: Vec<Option<Bytes>> = keys.iter().map(|key| store.get(key)).collect();
            if values.iter().flatten().map(Bytes::len).sum::<usize>() > COMMAND_BYTES_MAX {
                return text(answer, "-ERR the answer is too large\r\n");
            }
            put_head(&mut answer.room(HEAD_BYTES)?, b'*', keys.len());
            values.into_iter().try_for_each(|value| stored(answer, value))
        }
        (b"MSET", pairs @ [_, ..]) if pairs.len() % 2 == 0 => {
            pairs.chunks(2).for_each(|pair| store.set(pair[0], pair[1], None));
            text(answer, "+OK\r\n")
        }
        (b"DEL", keys @ [_, ..]) => {
            integer(answer, keys.iter().filter(|key| store.remove(key)).count() as i64)
        }
        (b"EXISTS", keys @ [_, ..]) => {
            integer(answer, keys.iter().filter(|key| store.get(key).is_some()).count() as i64)
        }
        (b"INCR", [key]) => match store.increment(key) {
            Some(value) => integer(answer, value),
            None => text(answer, "-ERR value is not an integer or out of range\r\n"),
        },
        (b"EXPIRE", [key, seconds]) => expire(key, seconds, store, answer),
        (b"TTL", [key]) => ttl(key, store, answer),
        (b"PING", []) => text(answer, "+PONG\r\n"),
        (b"PING" | b"ECHO", [message]) => bulk(answer, Some(message)),
        (b"DBSIZE", []) => integer(answer, store.len() as i64),
        (b"FLUSHALL", _) => {
            store.clear();
            text(answer, "+OK\r\n")
        }
        // Clients ask for these when they start, and accept an empty list.
        (b"COMMAND" | b"CONFIG", _) => text(answer, "*0\r\n"),
        (name, _) => {
            let name = String::from_utf8_lossy(name).escape_default().to_string();
            text(answer, &format!("-ERR '{name}': unknown command or wrong arguments\r\n"))
        }
    }
}

fn set(
    key: &[u8],
    value: &[u8],
    options: &[&[u8]],
    store: &Store,
    answer: &mut impl Answer,
) -> Result<()> {
    let expires = match options {
        [] => None,
        [unit, count] if unit.eq_ignore_ascii_case(b"EX") => Some(after(count, 1000)),
        [unit, count] if unit.eq_ignore_ascii_case(b"PX") => Some(after(count, 1)),
        _ => return text(answer, "-ERR syntax error\r\n"),
    };
    if expires == Some(None) {
        return text(answer, "-ERR invalid expire time in 'set' command\r\n");
    }
    store.set(key, value, expires.flatten());
    text(answer, "+OK\r\n")
}

fn expire(key: &[u8], seconds: &[u8], store: &Store, answer: &mut impl Answer) -> Result<()> {
    if parse(seconds).is_none() {
        return text(answer, "-ERR value is not an integer or out of range\r\n");
    }
    let found = match after(seconds, 1000) {
        Some(expires) => store.expire(key, expires),
        // A time that is not in the future ends the key.
        None => store.remove(key),
    };
    integer(answer, i64::from(found))
}

/// Answers the seconds until the key expires: -1 if it never does, -2 if there is no such key.
fn ttl(key: &[u8], store: &Store, answer: &mut impl Answer) -> Result<()> {
    let seconds = match store.expires(key) {
        None => -2,
        Some(None) => -1,
        Some(Some(expires)) => {
            let left = expires.saturating_duration_since(Instant::now());
            (left.as_millis() as i64 + 500) / 1000
        }
    };
    integer(answer, seconds)
}

fn parse(number: &[u8]) -> Option<i64> {
    std::str::from_utf8(number).ok()?.parse().ok()
}

/// The time after `count` units; `None` if it is not in the future.
fn after(count: &[u8], unit_ms: u64) -> Option<Instant> {
    let count = u64::try_from(parse(count)?).ok().filter(|count| *count > 0)?;
    Instant::now().checked_add(Duration::from_millis(count.checked_mul(unit_ms)?))
}

// ---- the store ----

/// Keys and values, in parts with a lock each.
struct Store {
    parts: Vec<Mutex<Part>>,
}

type Part = HashMap<Box<[u8]>, Entry>;

struct Entry {
    value: Bytes,
    expires: Option<Instant>,
}

impl Store {
    fn new() -> Store {
        Store { parts: (0..PARTS).map(|_| Mutex::default()).collect() }
    }

    fn part(&self, key: &[u8]) -> MutexGuard<'_, Part> {
        let end = key.iter().rev().take(8);
        let index = end.fold(0, |sum: usize, &byte| sum.wrapping_mul(31) + usize::from(byte));
        self.parts[index % PARTS].lock().expect("no thread panics with it")
    }

    /// Calls `code` with the entry of `key`, unless it has expired.
    fn with<T>(&self, key: &[u8], code: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let mut part = self.part(key);
        let entry = part.get_mut(key)?;
        if entry.expires.is_some_and(|expires| expires <= Instant::now()) {
            part.remove(key);
            return None;
        }
        Some(code(entry))
    }

    fn get(&self, key: &[u8]) -> Option<Bytes> {
        self.with(key, |entry| entry.value.clone())
    }

    fn set(&self, key: &[u8], value: &[u8], expires: Option<Instant>) {
        // A copy: a reference would keep the whole block of input in memory.
        let entry = Entry { value: Bytes::copy_from_slice(value), expires };
        let mut part = self.part(key);
        match part.get_mut(key) {
            Some(old) => *old = entry,
            None => _ = part.insert(key.into(), entry),
        }
    }

    /// Whether there was such a key.
    fn remove(&self, key: &[u8]) -> bool {
        let found = self.with(key, |_| ()).is_some();
        self.part(key).remove(key);
        found
    }

    /// `None` if the value is no number, or the largest one.
    fn increment(&self, key: &[u8]) -> Option<i64> {
        let mut part = self.part(key);
        let live = part.get(key).filter(|entry| entry.expires.is_none_or(|at| at > Instant::now()));
        let (value, expires) = match live {
            Some(entry) => (parse(&entry.value)?, entry.expires),
            None => (0, None),
        };
        let value = value.checked_add(1)?;
        part.insert(key.into(), Entry { value: value.to_string().into(), expires });
        Some(value)
    }

    /// When `key` expires, if there is such a key.
    fn expires(&self, key: &[u8]) -> Option<Option<Instant>> {
        self.with(key, |entry| entry.expires)
    }

    fn expire(&self, key: &[u8], expires: Instant) -> bool {
        self.with(key, |entry| entry.expires = Some(expires)).is_some()
    }

    fn len(&self) -> usize {
        self.parts.iter().map(|part| part.lock().expect("no thread panics with it").len()).sum()
    }

    fn clear(&self) {
        self.parts.iter().for_each(|part| part.lock().expect("no thread panics with it").clear());
    }

    /// Frees the memory of expired keys that nobody asks for.
    fn remove_expired_forever(&self) {
        for part in self.parts.iter().cycle() {
            std::thread::sleep(SWEEP_INTERVAL);
            let now = Instant::now();
            let mut part = part.lock().expect("no thread panics with it");
            part.retain(|_, entry| entry.expires.is_none_or(|expires| expires > now));
        }
    }
}

/// The largest command, its values included.
const COMMAND_BYTES_MAX: usize = 16 << 20;
/// The longest command in the form of a line.
const INLINE_BYTES_MAX: usize = 64 << 10;
/// It also bounds the answer of MGET, where each of them costs a few bytes.
const ARGUMENTS_MAX: usize = 1 << 20;
/// A flush follows when this many bytes of answers are written.
const ANSWER_BYTES_MAX: usize = 256 << 10;
/// Room for the lines around a value.
const HEAD_BYTES: usize = 24;
/// Smaller values are copied by the library as well.
const SHARED_BYTES_MIN: usize = 4097;
const PARTS: usize = 64;
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);
