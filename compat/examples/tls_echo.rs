// cargo run --release -p ringpoll-compat --example tls_echo -- --addr 127.0.0.1:8443
//! Sends every byte back over TLS, on ringpoll, or on tokio with `--runtime tokio`.
//!
//! It makes a certificate for `localhost` at its start, and writes it to the file behind `--cert`,
//! for clients to trust.

use std::error::Error;
use std::io::{Write, stdout};
use std::sync::Arc;

use ringpoll::Server;
use ringpoll_compat::TokioStream;
use ringpoll_compat::rustls::Acceptor;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

fn main() -> Result<(), Box<dyn Error>> {
    let addr = option("--addr").unwrap_or_else(|| "127.0.0.1:0".to_string());
    let made = rcgen::generate_simple_self_signed(["localhost".to_string()])?;
    if let Some(path) = option("--cert") {
        std::fs::write(path, made.cert.pem())?;
    }
    let key = made.signing_key.serialize_der().try_into()?;
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.into()], key)?;

    match option("--runtime").as_deref() {
        None | Some("ringpoll") => on_ringpoll(&addr, config),
        Some("tokio") => on_tokio(&addr, config),
        Some(other) => Err(format!("--runtime {other}: use ringpoll or tokio").into()),
    }
}

/// `acceptor.reload` replaces the certificate while the server runs.
fn on_ringpoll(addr: &str, config: ServerConfig) -> Result<(), Box<dyn Error>> {
    let acceptor = Acceptor::new(config);
    let server = Server::builder()
        .on_connect(move |conn| {
            let acceptor = acceptor.clone();
            // rustls has buffers of its own, so small ones are enough below it.
            let stream = TokioStream::from(conn).with_output_bytes_max(64 << 10);
            async move { Ok(echo(acceptor.accept(stream).await?).await?) }
        })
        .input_watermarks(64 << 10, 128 << 10)
        .bind(addr)?;
    println!("listening on {}", server.local_addr());
    stdout().flush()?;
    Ok(server.serve()?)
}

#[tokio::main]
async fn on_tokio(addr: &str, config: ServerConfig) -> Result<(), Box<dyn Error>> {
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind(addr).await?;
    println!("listening on {}", listener.local_addr()?);
    stdout().flush()?;
    loop {
        let (conn, _) = listener.accept().await?;
        conn.set_nodelay(true)?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move { echo(acceptor.accept(conn).await?).await });
    }
}

async fn echo(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> std::io::Result<()> {
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

/// The value behind the argument `name`.
fn option(name: &str) -> Option<String> {
    std::env::args().skip_while(|argument| argument != name).nth(1)
}
