//! Making listeners.
//!
//! Runs on the thread that starts a server. May block that thread for a short time: while the last
//! owner of the address releases it, or while another server starts in the same directory.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use super::file::{DirLock, SocketFile, is_stale};
use super::setup::{SocketError, SocketHook, int, option, seconds, set_int, set_options};
use super::{Socket, name, new_stream};
use crate::address::PeerAddr;
use crate::config::{self, SocketOptions};

/// How to make a listener. Unix sockets ignore the options of TCP and IP.
#[derive(Default)]
pub(crate) struct ListenOptions {
    /// Accepted sockets inherit these options.
    pub(crate) socket: SocketOptions,
    /// `None`: the address decides.
    pub(crate) v6_only: Option<bool>,
    pub(crate) reuse_port: bool,
    /// `None`: [`LISTEN_BACKLOG`](config::LISTEN_BACKLOG).
    pub(crate) backlog: Option<u32>,
    pub(crate) defer_accept: Option<Duration>,
    /// The length of the queue of connections whose handshake is not complete.
    pub(crate) fast_open: Option<u32>,
    /// The socket file stays when the listener closes.
    pub(crate) keeps_file: bool,
    pub(crate) before_bind: Option<SocketHook>,
}

/// A listener, and the socket file that it made.
pub(crate) struct Listener {
    pub(crate) socket: Arc<Socket>,
    pub(crate) file: Option<SocketFile>,
}

/// A listener on `addr`. Replaces a stale socket file. With `v6_only`, a listener on an IPv6
/// address accepts no IPv4. Calls the user's hook: hold no lock.
pub(crate) fn listen(
    addr: &PeerAddr,
    v6_only: bool,
    options: &ListenOptions,
) -> Result<Listener, SocketError> {
    let lock_until = Instant::now() + config::DIR_LOCK_WAIT_MAX;
    retry_while_in_use(|| match addr {
        PeerAddr::Unix(Some(path)) => listen_on_file(addr, path, options, lock_until),
        _ => listen_on_name(addr, v6_only, options),
    })
}

/// Retries while the address is in use. The kernel tears down the rings of a killed server after
/// the process has ended, and those rings still hold the server's sockets.
fn retry_while_in_use<T>(
    mut attempt: impl FnMut() -> Result<T, SocketError>,
) -> Result<T, SocketError> {
    let mut retries = 0;
    loop {
        match attempt() {
            Err(error) if error.is_in_use() && retries < config::BIND_RETRIES_MAX => {
                retries += 1;
                thread::sleep(config::BIND_RETRY_PAUSE);
            }
            done => return done,
        }
    }
}

/// Listens on a port, or on an abstract name.
fn listen_on_name(
    addr: &PeerAddr,
    v6_only: bool,
    options: &ListenOptions,
) -> Result<Listener, SocketError> {
    let fd = unbound(addr, v6_only, options)?;
    name::bind(fd.as_fd(), addr)?;
    rustix::net::listen(&fd, backlog(options))?;
    Ok(Listener { socket: Arc::new(Socket::new(fd, addr)), file: None })
}

fn listen_on_file(
    addr: &PeerAddr,
    path: &Path,
    options: &ListenOptions,
    lock_until: Instant,
) -> Result<Listener, SocketError> {
    let fd = unbound(addr, false, options)?;
    let own_path = std::path::absolute(path)?;
    // Held until the socket listens: a bound socket that does not listen yet looks stale.
    let lock = DirLock::take(path, lock_until);
    match name::bind(fd.as_fd(), addr) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(path) => {
            if lock.is_none() {
                // The holder of the lock may replace the same file.
                tracing::warn!(?path, "listen: stale socket file kept: cannot lock its directory");
                return Err(error.into());
            }
            fs::remove_file(path)?;
            name::bind(fd.as_fd(), addr)?;
        }
        done => done?,
    }
    let socket = Arc::new(Socket::new(fd, addr));
    let own_file = if options.keeps_file { None } else { SocketFile::of(own_path, &socket) };
    rustix::net::listen(&*socket, backlog(options))?;
    Ok(Listener { socket, file: own_file })
}

/// A socket for `addr` that has its options and is not bound.
fn unbound(
    addr: &PeerAddr,
    v6_only: bool,
    options: &ListenOptions,
) -> Result<OwnedFd, SocketError> {
    let socket = new_stream(addr)?;
    let fd = socket.as_fd();
    set_options(fd, addr, &options.socket)?;
    if let PeerAddr::Inet(inet) = addr {
        set_int(fd, option!(SOL_SOCKET, SO_REUSEADDR), 1)?;
        if inet.is_ipv6() {
            set_int(fd, option!(SOL_IPV6, IPV6_V6ONLY), v6_only.into())?;
        }
        if options.reuse_port {
            set_int(fd, option!(SOL_SOCKET, SO_REUSEPORT), 1)?;
        }
        if let Some(time) = options.defer_accept {
            set_int(fd, option!(SOL_TCP, TCP_DEFER_ACCEPT), seconds(time))?;
        }
        if let Some(count) = options.fast_open {
            set_int(fd, option!(SOL_TCP, TCP_FASTOPEN), int(count))?;
        }
    }
    if let Some(hook) = &options.before_bind {
        hook.call("before_bind", fd)?;
    }
    Ok(socket)
}

fn backlog(options: &ListenOptions) -> i32 {
    options.backlog.map_or(config::LISTEN_BACKLOG, int)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::PathBuf;
    use std::sync::Barrier;

    fn now_on_port(addr: &PeerAddr) -> Result<Listener, SocketError> {
        listen_on_name(addr, true, &ListenOptions::default())
    }

    fn now(path: &Path, lock_wait: Duration) -> Result<Listener, SocketError> {
        let addr = PeerAddr::Unix(Some(path.to_owned()));
        listen_on_file(&addr, path, &ListenOptions::default(), Instant::now() + lock_wait)
    }

    fn socket_path() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("socket");
        (dir, path)
    }

    #[test]
    fn of_those_that_start_over_one_stale_socket_file_one_wins() {
        const ROUNDS: usize = 400;
        const STARTERS: usize = 3;
        let (_dir, path) = socket_path();
        for round in 0..ROUNDS {
            drop(UnixListener::bind(&path).expect("a socket file"));
            let start = Barrier::new(STARTERS);
            let begin = || {
                start.wait();
                now(&path, Duration::from_secs(10))
            };
            let started: Vec<_> = thread::scope(|scope| {
                let starters: Vec<_> = (0..STARTERS).map(|_| scope.spawn(begin)).collect();
                let ended = starters.into_iter().map(|starter| starter.join());
                ended.map(|started| started.expect("no panic")).collect()
            });
            let refused = |started: &Result<_, SocketError>| {
                started.as_ref().is_err_and(SocketError::is_in_use)
            };
            let winners = started.iter().filter(|started| started.is_ok()).count();
            let losers = started.iter().filter(|started| refused(started)).count();
            assert_eq!((winners, losers), (1, STARTERS - 1), "round {round}");
            let peer = UnixStream::connect(&path).expect("the winner is there");
            let winner = started.into_iter().find_map(Result::ok).expect("one has won");
            winner.socket.accept().expect("the winner is reached");
            drop((peer, winner));
            assert!(!path.exists(), "round {round}: the winner left its file");
        }
    }

    #[test]
    fn an_address_that_becomes_free_soon_is_waited_for() {
        let holder = TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = PeerAddr::Inet(holder.local_addr().expect("it is bound"));
        let (_dir, path) = socket_path();
        let file_holder = UnixListener::bind(&path).expect("a socket file");
        let mut holders = (Some(holder), Some(file_holder));
        let listener = retry_while_in_use(|| {
            let done = now_on_port(&addr);
            holders.0 = None;
            done
        });
        assert_eq!(listener.expect("it is free now").socket.local_addr().expect("bound"), addr);
        let listener = retry_while_in_use(|| {
            let done = now(&path, Duration::ZERO);
            holders.1 = None;
            done
        });
        assert!(listener.is_ok_and(|listener| listener.file.is_some()));
    }

    #[test]
    fn an_address_that_stays_in_use_is_given_up_after_some_tries() {
        let holder = TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = PeerAddr::Inet(holder.local_addr().expect("it is bound"));
        let mut tries = 0;
        let failed = retry_while_in_use(|| {
            tries += 1;
            now_on_port(&addr)
        });
        assert!(failed.is_err_and(|error| error.is_in_use()));
        assert_eq!(tries, config::BIND_RETRIES_MAX + 1);
    }

    #[test]
    fn a_locked_directory_lets_servers_start_and_keeps_stale_files() {
        let (_dir, path) = socket_path();
        let lock = DirLock::take(&path, Instant::now()).expect("nobody has it");
        drop(now(&path, Duration::ZERO).expect("there is no file yet"));
        assert!(!path.exists());
        drop(UnixListener::bind(&path).expect("a socket file"));
        let error = now(&path, Duration::ZERO).err().expect("the file is another's to replace");
        assert!(error.is_in_use());
        assert!(path.exists());
        drop(lock);
        assert!(now(&path, Duration::ZERO).is_ok());
    }

    #[test]
    fn a_socket_that_is_bound_and_does_not_listen_is_not_replaced() {
        let (_dir, path) = socket_path();
        let addr = PeerAddr::Unix(Some(path.clone()));
        let bound = new_stream(&addr).expect("a socket");
        name::bind(bound.as_fd(), &addr).expect("a free path");
        let error = now(&path, Duration::ZERO).err().expect("it is about to listen");
        assert!(error.is_in_use());
        drop(bound);
        assert!(now(&path, Duration::ZERO).is_ok());
    }
}
