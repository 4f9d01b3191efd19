//! Client libraries made for tokio, inside handlers wherever they are placed: HTTP and Redis.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use ringpoll::{Connection, Error, Result, Slice};

use crate::harness::*;
use crate::runtime::{inside, plays, pong};

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, clients:
            an_http_client_works_in_handlers
            a_redis_client_works_in_handlers
        }
    };
}
pub(crate) use cases;

/// A client that handlers share, until the test takes it away so that its connections end.
struct Lent<T>(Arc<Mutex<Option<T>>>);

impl<T: Clone> Lent<T> {
    fn new(client: T) -> Lent<T> {
        Lent(Arc::new(Mutex::new(Some(client))))
    }

    fn share(&self) -> Lent<T> {
        Lent(Arc::clone(&self.0))
    }

    fn client(&self) -> T {
        self.0.lock().expect("nobody panics here").clone().expect("lent while handlers run")
    }

    fn take_back(&self) {
        self.0.lock().expect("nobody panics here").take();
    }
}

/// A line without its end.
async fn line(conn: &mut Connection) -> Result<String> {
    let line = conn.until(b'\n').await?;
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

/// Just enough of HTTP/1.1: answers with what it was asked, on a connection that stays.
async fn http(mut conn: Connection) -> Result<()> {
    let request = line(&mut conn).await?;
    let mut length = 0;
    loop {
        let header = line(&mut conn).await?.to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().map_err(Error::other)?;
        }
    }
    let body = conn.next(length).await?;
    let size = request.len() + 1 + length;
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n{request}\n");
    conn.write_copy(head.as_bytes())?;
    conn.write(body)?;
    conn.flush().await
}

pub(crate) fn an_http_client_works_in_handlers(t: &Fixture) -> Check {
    let behind = t.spawn(t.server().on_request(http));
    let url = format!("http://{}/there", addr_of(&behind));
    // A proxy that this host's environment names is not for the test.
    let lent = Lent::new(reqwest::Client::builder().no_proxy().build()?);
    let shared = lent.share();
    let server = t.spawn(inside(t).on_request(move |conn| {
        let (client, url) = (shared.client(), url.clone());
        async move {
            let asked = client.get(&url).send().await.map_err(Error::other)?;
            let answer = asked.text().await.map_err(Error::other)?;
            assert_eq!(answer, "GET /there HTTP/1.1\n");
            let body = pattern(7, 100_000);
            let sent = client.post(&url).body(body).send().await.map_err(Error::other)?;
            let answer = sent.bytes().await.map_err(Error::other)?;
            let echoed = answer.strip_prefix(b"POST /there HTTP/1.1\n").expect("what was asked");
            assert_eq!(echoed.len(), 100_000);
            assert_pattern(echoed, 7);
            pong(conn).await
        }
    }));
    plays(&server, 3)?;
    lent.take_back();
    Ok(())
}

type Store = Mutex<HashMap<Vec<u8>, Slice>>;

/// One command of the Redis protocol (RESP): an array of strings, each behind its length.
async fn command(conn: &mut Connection) -> Result<Vec<Slice>> {
    let count = number(conn, '*').await?;
    let mut parts = Vec::with_capacity(count);
    for _ in 0..count {
        let length = number(conn, '$').await?;
        parts.push(conn.next(length).await?);
        conn.skip(2).await?;
    }
    Ok(parts)
}

async fn number(conn: &mut Connection, mark: char) -> Result<usize> {
    let line = line(conn).await?;
    let digits = line.strip_prefix(mark).ok_or_else(|| Error::other(format!("{line:?}")))?;
    digits.parse().map_err(Error::other)
}

/// Just enough of a Redis server: it keeps and gives, and agrees to everything else.
async fn redis(mut conn: Connection, store: Arc<Store>) -> Result<()> {
    let parts = command(&mut conn).await?;
    match parts[0].to_ascii_uppercase().as_slice() {
        b"GET" => {
            let found = store.lock().expect("nobody panics here").get(&parts[1][..]).cloned();
            match found {
                None => conn.write_copy(b"$-1\r\n")?,
                Some(value) => {
                    conn.write_copy(format!("${}\r\n", value.len()).as_bytes())?;
                    conn.write(value)?;
                    conn.write_copy(b"\r\n")?;
                }
            }
        }
        b"SET" => {
            let (key, value) = (parts[1].to_vec(), parts[2].clone());
            store.lock().expect("nobody panics here").insert(key, value);
            conn.write_copy(b"+OK\r\n")?;
        }
        _ => conn.write_copy(b"+OK\r\n")?,
    }
    conn.flush().await
}

pub(crate) fn a_redis_client_works_in_handlers(t: &Fixture) -> Check {
    let store = Arc::<Store>::default();
    let kept = Arc::clone(&store);
    let behind = t.spawn(t.server().on_request(move |conn| redis(conn, Arc::clone(&kept))));
    let client = redis::Client::open(format!("redis://{}/", addr_of(&behind)))?;
    // On a busy host an answer may take longer than the client would wait.
    let config = redis::AsyncConnectionConfig::new()
        .set_connection_timeout(Some(DEADLINE))
        .set_response_timeout(Some(DEADLINE));
    let connecting = client.get_multiplexed_async_connection_with_config(&config);
    let connected = runtime().block_on(connecting)?;
    let lent = Lent::<MultiplexedConnection>::new(connected);
    let shared = lent.share();
    let server = t.spawn(inside(t).on_request(move |conn| {
        let mut client = shared.client();
        async move {
            let key = format!("key {}", conn.id());
            let value = format!("value of {}", conn.id());
            let missing: Option<String> = client.get("missing").await.map_err(Error::other)?;
            assert_eq!(missing, None);
            let _: () = client.set(&key, &value).await.map_err(Error::other)?;
            let found: String = client.get(&key).await.map_err(Error::other)?;
            assert_eq!(found, value);
            pong(conn).await
        }
    }));
    plays(&server, 10)?;
    lent.take_back();
    // Blocks that the poller lent to values.
    store.lock().expect("nobody panics here").clear();
    Ok(())
}
