//! TLS by rustls over ringpoll connections.
//!
//! [`Acceptor`] is the server's side, [`Connector`] the client's. Both make streams of
//! `tokio-rustls`, which work in every placement and on any executor. The features of `rustls`, and
//! so its cryptography, are the user's to choose.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use ringpoll::Server;
//! use ringpoll_compat::rustls::Acceptor;
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//!
//! # fn run(config: rustls::ServerConfig) -> ringpoll::Result<()> {
//! let acceptor = Acceptor::new(config);
//! Server::builder()
//!     .on_connect(move |conn| {
//!         let acceptor = acceptor.clone();
//!         async move {
//!             let mut stream = acceptor.accept(conn).await?;
//!             let mut bytes = [0; 1024];
//!             let count = stream.read(&mut bytes).await?;
//!             stream.write_all(&bytes[..count]).await?;
//!             Ok(stream.shutdown().await?)
//!         }
//!     })
//!     .bind("0.0.0.0:8443")?
//!     .serve()
//! # }
//! ```

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ringpoll::{Address, Dialer, Handle, Result};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::TokioStream;

/// A TLS stream of a server. Its parts are the connection and rustls's state, with ALPN, server
/// name and certificates of the client.
pub type ServerStream = server::TlsStream<TokioStream>;

/// A TLS stream of a client.
pub type ClientStream = client::TlsStream<TokioStream>;

/// Accepts TLS on connections of a server. Clones share the configuration, which
/// [`reload`](Self::reload) replaces while the server runs.
///
/// A handshake runs in the handler of its own connection, so a peer that sends garbage, or that
/// never ends its handshake, delays no other connection. Its connection ends after
/// [`handshake_timeout`](Self::handshake_timeout), whatever it sends.
#[derive(Clone)]
pub struct Acceptor {
    config: Arc<Mutex<Arc<ServerConfig>>>,
    handshake_timeout: Duration,
    /// Offered where the configuration offers nothing.
    default_alpn: Vec<Vec<u8>>,
}

/// Begins TLS on connections of a client.
#[derive(Clone)]
pub struct Connector {
    config: Arc<ClientConfig>,
    dialer: Dialer,
    handshake_timeout: Duration,
}

impl Acceptor {
    /// An acceptor with `config`.
    pub fn new(config: impl Into<Arc<ServerConfig>>) -> Acceptor {
        Acceptor {
            config: Arc::new(Mutex::new(config.into())),
            handshake_timeout: HANDSHAKE_TIMEOUT,
            default_alpn: Vec::new(),
        }
    }

    /// Limits the time of a handshake, from its begin to its end. Zero means no limit. The default
    /// is 10 s.
    #[must_use]
    pub fn handshake_timeout(mut self, timeout: Duration) -> Acceptor {
        self.handshake_timeout = timeout;
        self
    }

    /// Uses `config` for handshakes that begin from now on, in all clones of this acceptor.
    /// Connections that exist keep their configuration. Sessions are resumed across a reload only
    /// if both configurations share `session_storage` or `ticketer`.
    pub fn reload(&self, config: impl Into<Arc<ServerConfig>>) {
        let config = config.into();
        let mut current = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *current, config);
        drop(current);
        // The destructors of its parts are user code, so no lock is held.
        drop(old);
    }

    /// The configuration for the next handshake.
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Performs the server's side of a handshake.
    ///
    /// The handshake uses the deadlines of the connection, and clears them at its end.
    ///
    /// # Errors
    /// The peer speaks no TLS, or no version and cipher that the configuration allows; the peer
    /// refuses the certificate; timeout; errors of the connection. The connection is closed then.
    pub async fn accept(&self, stream: impl Into<TokioStream>) -> Result<ServerStream> {
        let stream = stream.into();
        let mut config = self.config();
        if config.alpn_protocols.is_empty() && !self.default_alpn.is_empty() {
            Arc::make_mut(&mut config).alpn_protocols = self.default_alpn.clone();
        }
        let limit = Limit::begin(stream.get_ref(), self.handshake_timeout);
        limit.end(TlsAcceptor::from(config).accept(stream).await)
    }

    /// Offers `protocols` where the configuration offers nothing.
    #[cfg(feature = "axum")]
    pub(crate) fn with_default_alpn(mut self, protocols: &[&[u8]]) -> Acceptor {
        self.default_alpn = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        self
    }
}

impl Connector {
    /// A connector with `config`, which dials with default settings.
    pub fn new(config: impl Into<Arc<ClientConfig>>) -> Connector {
        Connector {
            config: config.into(),
            dialer: Dialer::new(),
            handshake_timeout: HANDSHAKE_TIMEOUT,
        }
    }

    /// Dials with the settings of `dialer`.
    #[must_use]
    pub fn dialer(mut self, dialer: Dialer) -> Connector {
        self.dialer = dialer;
        self
    }

    /// Limits the time of a handshake, without the dial before it. Zero means no limit. The default
    /// is 10 s.
    #[must_use]
    pub fn handshake_timeout(mut self, timeout: Duration) -> Connector {
        self.handshake_timeout = timeout;
        self
    }

    /// Dials `address` (see [`Address`]) and performs a handshake. The host of the address is the
    /// name that the server's certificate must have.
    ///
    /// # Errors
    /// Those of [`Dialer::connect`] and of [`handshake`](Self::handshake). Invalid, if the address
    /// has no host.
    pub async fn connect(&self, address: &str) -> Result<ClientStream> {
        let name = match address.parse()? {
            Address::Tcp { host, .. } => ServerName::try_from(host).map_err(|error| {
                invalid(format!("connect {address}: not a name for a certificate: {error}"))
            })?,
            _ => {
                let error = invalid(format!("connect {address}: no name for a certificate"));
                return Err(error.into());
            }
        };
        self.handshake(name, self.dialer.connect(address).await?).await
    }

    /// Performs the client's side of a handshake. `name` is sent to the server (SNI), unless it is
    /// an IP address, and the server's certificate must have it.
    ///
    /// The handshake uses the deadlines of the connection, and clears them at its end.
    ///
    /// # Errors
    /// The peer speaks no TLS, or no version and cipher that the configuration allows; the
    /// certificate is not valid for `name`; timeout; errors of the connection. The connection is
    /// closed then.
    pub async fn handshake(
        &self,
        name: ServerName<'static>,
        stream: impl Into<TokioStream>,
    ) -> Result<ClientStream> {
        let stream = stream.into();
        let limit = Limit::begin(stream.get_ref(), self.handshake_timeout);
        limit.end(TlsConnector::from(Arc::clone(&self.config)).connect(name, stream).await)
    }
}

/// A deadline on all waits of one handshake.
struct Limit {
    connection: Handle,
    timeout: Duration,
}

impl Limit {
    fn begin(connection: &Handle, timeout: Duration) -> Limit {
        if !timeout.is_zero() {
            connection.set_deadline(Instant::now().checked_add(timeout));
        }
        Limit { connection: connection.clone(), timeout }
    }

    fn end<T>(self, done: io::Result<T>) -> Result<T> {
        let Limit { connection, timeout } = self;
        match done {
            Ok(stream) => {
                if !timeout.is_zero() {
                    connection.set_deadline(None);
                }
                Ok(stream)
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                let message = format!("tls handshake: not complete in {timeout:?}");
                Err(io::Error::new(error.kind(), message).into())
            }
            Err(error) => {
                Err(io::Error::new(error.kind(), format!("tls handshake: {error}")).into())
            }
        }
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

macro_rules! impl_from_config {
    ($($config:ty => $type:ident;)+) => {$(
        impl From<$config> for $type {
            fn from(config: $config) -> $type {
                $type::new(config)
            }
        }
    )+};
}

impl_from_config! {
    ServerConfig => Acceptor;
    Arc<ServerConfig> => Acceptor;
    ClientConfig => Connector;
    Arc<ClientConfig> => Connector;
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acceptor")
            .field("handshake_timeout", &self.handshake_timeout)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("handshake_timeout", &self.handshake_timeout)
            .finish_non_exhaustive()
    }
}

/// The bound on output for TLS of axum and tonic: as much as rustls buffers itself. With eight
/// peers that do not read, 256 KiB here and the default watermarks on input,
/// `examples/tls_echo.rs` needed 17.8 MiB on epoll, and 4.9 MiB on tokio.
#[cfg(feature = "axum")]
pub(crate) const TLS_OUTPUT_BYTES_MAX: usize = 64 << 10;

/// A handshake takes two round trips and some milliseconds of computing, also on a slow path.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
