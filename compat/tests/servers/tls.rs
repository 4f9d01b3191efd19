//! TLS on connections that speak no HTTP.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ringpoll::{Backend, Server, ServerBuilder, ServerHandle};
use ringpoll_compat::rustls::{Acceptor, Connector, ServerStream};
use rustls::HandshakeKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::apps::ANY;
use crate::clients::tls;
use crate::harness::{Check, DEADLINE, Identity, pattern, wait_until};

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, tls:
            bytes_go_both_ways_and_names_and_protocols_are_known
            a_reload_serves_another_certificate
            sessions_are_resumed
            garbage_and_endless_handshakes_cost_nothing_lasting
            a_connector_checks_names_and_tells_what_it_refuses
            a_connector_gives_up_on_a_peer_that_is_silent
            a_slow_reader_costs_a_bounded_amount_of_memory
        }
    };
}
pub(crate) use cases;

/// A server whose connections `serve` has after their handshake.
struct TlsServer {
    addr: SocketAddr,
    handle: ServerHandle,
}

impl TlsServer {
    fn new<F>(
        backend: Backend,
        acceptor: &Acceptor,
        change: impl FnOnce(ServerBuilder) -> ServerBuilder,
        serve: fn(ServerStream) -> F,
    ) -> Check<TlsServer>
    where
        F: Future<Output = std::io::Result<()>> + Send + 'static,
    {
        let acceptor = acceptor.clone();
        let server = Server::builder().backend(backend).pollers(1).on_connect(move |conn| {
            let acceptor = acceptor.clone();
            async move { Ok(serve(acceptor.accept(conn).await?).await?) }
        });
        let handle = change(server).bind(ANY)?.spawn()?;
        Ok(TlsServer { addr: handle.local_addr().as_inet().expect("TCP"), handle })
    }

    fn echo(backend: Backend, acceptor: &Acceptor) -> Check<TlsServer> {
        TlsServer::new(backend, acceptor, |server| server, echo)
    }

    /// Ends the server, whose connections have ended.
    async fn end(self) -> Check {
        wait_until(|| self.handle.stats().open == 0).await;
        assert_eq!(self.handle.stats().handler_panics, 0);
        Ok(tokio::task::spawn_blocking(move || self.handle.shutdown(DEADLINE)).await??)
    }
}

/// Sends every byte back. The first answer is preceded by the name and the protocol of the client.
async fn echo(mut stream: ServerStream) -> std::io::Result<()> {
    let tls = stream.get_ref().1;
    let name = tls.server_name().unwrap_or("-");
    let protocol = String::from_utf8_lossy(tls.alpn_protocol().unwrap_or(b"-"));
    let line = format!("{name} {protocol}\n");
    stream.write_all(line.as_bytes()).await?;
    let mut buffer = vec![0; 16 << 10];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return stream.shutdown().await;
        }
        stream.write_all(&buffer[..count]).await?;
        stream.flush().await?;
    }
}

/// Asks for one echo.
async fn answers<S>(stream: &mut S, first: &str, bytes: &[u8]) -> Check
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut line = vec![0; first.len()];
    stream.read_exact(&mut line).await?;
    assert_eq!(String::from_utf8_lossy(&line), first);
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut got = vec![0; bytes.len()];
    let writes = async {
        writer.write_all(bytes).await?;
        writer.flush().await
    };
    tokio::try_join!(writes, reader.read_exact(&mut got))?;
    assert!(got == bytes, "not the {} bytes", bytes.len());
    Ok(())
}

pub(crate) async fn bytes_go_both_ways_and_names_and_protocols_are_known(
    backend: Backend,
) -> Check {
    let identity = Identity::new()?;
    let mut config = identity.server()?;
    config.alpn_protocols = vec![b"echo".to_vec()];
    let server = TlsServer::echo(backend, &Acceptor::new(config))?;
    let client = identity.client(&["other", "echo"])?;
    let mut stream = tls(server.addr, &client).await?;
    answers(&mut stream, "localhost echo\n", &pattern(5_000_000)).await?;
    stream.shutdown().await?;
    assert_eq!(stream.read(&mut [0]).await?, 0, "the end is announced");

    let connector = Connector::new(client);
    let mut stream = connector.connect(&format!("localhost:{}", server.addr.port())).await?;
    answers(&mut stream, "localhost echo\n", &pattern(5_000_000)).await?;
    drop(stream);
    server.end().await
}

pub(crate) async fn a_reload_serves_another_certificate(backend: Backend) -> Check {
    let (old, new) = (Identity::new()?, Identity::new()?);
    let acceptor = Acceptor::new(old.server()?);
    let server = TlsServer::echo(backend, &acceptor)?;
    let (trusts_old, trusts_new) = (old.client(&[])?, new.client(&[])?);
    tls(server.addr, &trusts_new).await.expect_err("not that certificate");
    let mut before = tls(server.addr, &trusts_old).await?;
    acceptor.reload(new.server()?);
    answers(&mut before, "localhost -\n", b"goes on").await?;
    let mut after = tls(server.addr, &trusts_new).await?;
    answers(&mut after, "localhost -\n", b"begins").await?;
    let again = old.client(&[])?;
    tls(server.addr, &again).await.expect_err("not that certificate any more");
    drop((before, after));
    server.end().await
}

pub(crate) async fn sessions_are_resumed(backend: Backend) -> Check {
    let identity = Identity::new()?;
    let server = TlsServer::echo(backend, &Acceptor::new(identity.server()?))?;
    let client = identity.client(&[])?;
    let mut kinds = Vec::new();
    for _ in 0..3 {
        let mut stream = tls(server.addr, &client).await?;
        answers(&mut stream, "localhost -\n", b"hello").await?;
        kinds.push(stream.get_ref().1.handshake_kind());
    }
    let resumed = Some(HandshakeKind::Resumed);
    assert_eq!(kinds, [Some(HandshakeKind::Full), resumed, resumed]);
    server.end().await
}

pub(crate) async fn garbage_and_endless_handshakes_cost_nothing_lasting(backend: Backend) -> Check {
    let limit = Duration::from_millis(100);
    let identity = Identity::new()?;
    let acceptor = Acceptor::new(identity.server()?).handshake_timeout(limit);
    let server = TlsServer::echo(backend, &acceptor)?;
    let begun = Instant::now();
    // Half of them send nothing, the others a byte of a record now and then.
    let mut stuck = Vec::new();
    for index in 0..20 {
        let mut stream = TcpStream::connect(server.addr).await?;
        stuck.push(tokio::spawn(async move {
            let record = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
            for byte in record.iter().cycle().take_while(|_| index % 2 == 0).take(10_000) {
                if stream.write_all(&[*byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // Fails if the server has closed with bytes unread.
            let _ = stream.read_to_end(&mut Vec::new()).await;
        }));
    }
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &pattern(100_000)] {
        let mut stream = TcpStream::connect(server.addr).await?;
        // These fail if the server has closed before it took everything.
        let _ = stream.write_all(garbage).await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
    }
    // The others are still stuck, and the server serves.
    let mut good = tls(server.addr, &identity.client(&[])?).await?;
    answers(&mut good, "localhost -\n", b"hello").await?;
    for peer in stuck {
        peer.await?;
    }
    assert!(begun.elapsed() >= limit);
    wait_until(|| server.handle.stats().open == 1).await;
    wait_until(|| server.handle.stats().handler_errors == 22).await;
    // The limit of the handshake does not bound what comes after it.
    tokio::time::sleep(limit).await;
    good.write_all(b"still here").await?;
    let mut got = [0; 10];
    good.read_exact(&mut got).await?;
    assert_eq!(&got, b"still here");
    drop(good);
    server.end().await
}

pub(crate) async fn a_connector_checks_names_and_tells_what_it_refuses(backend: Backend) -> Check {
    let identity = Identity::new()?;
    let server = TlsServer::echo(backend, &Acceptor::new(identity.server()?))?;
    let connector = Connector::new(identity.client(&[])?);
    let error = connector.connect(&server.addr.to_string()).await.expect_err("another name");
    assert!(error.to_string().starts_with("tls handshake: invalid peer certificate"), "{error}");
    let error = connector.connect("unix:/nowhere").await.expect_err("no name");
    assert_eq!(error.io_kind(), std::io::ErrorKind::InvalidInput, "{error}");
    server.end().await
}

pub(crate) async fn a_connector_gives_up_on_a_peer_that_is_silent(_: Backend) -> Check {
    let limit = Duration::from_millis(50);
    let listener = tokio::net::TcpListener::bind(ANY).await?;
    let config = Identity::new()?.client(&[])?;
    let connector = Connector::new(config).handshake_timeout(limit);
    let begun = Instant::now();
    let address = listener.local_addr()?.to_string();
    let error = connector.connect(&address).await.expect_err("nothing answers");
    assert_eq!(error.io_kind(), std::io::ErrorKind::TimedOut);
    assert_eq!(error.to_string(), "tls handshake: not complete in 50ms");
    assert!(begun.elapsed() >= limit);
    Ok(())
}

async fn sends_much(mut stream: ServerStream) -> std::io::Result<()> {
    let piece = vec![b'x'; 64 << 10];
    for _ in 0..MUCH_BYTES / piece.len() {
        stream.write_all(&piece).await?;
    }
    stream.shutdown().await
}

const MUCH_BYTES: usize = 32 << 20;

pub(crate) async fn a_slow_reader_costs_a_bounded_amount_of_memory(backend: Backend) -> Check {
    let identity = Identity::new()?;
    let acceptor = Acceptor::new(identity.server()?);
    let (tell, told) = std::sync::mpsc::channel();
    let change = |server: ServerBuilder| {
        server.socket_buffers(0, 32 << 10).on_prepare(move |conn| {
            drop(tell.send(conn.clone()));
            Ok(())
        })
    };
    let server = TlsServer::new(backend, &acceptor, change, sends_much)?;
    let mut stream = tls(server.addr, &identity.client(&[])?).await?;
    let conn = told.recv()?;
    let (mut got, mut buffer) = (0, vec![0; 64 << 10]);
    loop {
        let unsent = conn.stats().unsent_bytes as usize;
        let bound = ringpoll_compat::TokioStream::OUTPUT_BYTES_MAX;
        assert!(unsent <= bound, "{unsent} unsent bytes");
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        got += count;
    }
    assert_eq!(got, MUCH_BYTES);
    drop(stream);
    server.end().await
}
