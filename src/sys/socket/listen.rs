//! Making listeners.
//!
//! Runs on the thread that starts a server. May block that thread for a short time: while the last
//! owner of the address releases it, or while another server starts in the same directory.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use std::{fs, io, thread};

use rustix::net::sockopt;

use super::file::{DirLock, SocketFile, is_stale};
use super::{Socket, name, new_stream, set_options};
use crate::address::PeerAddr;
use crate::config::{self, SocketOptions};

/// How to make a listener.
#[derive(Clone, Copy)]
pub(crate) struct ListenOptions<'a> {
    /// An IPv6 socket accepts IPv4 too.
    pub(crate) both_ip: bool,
    /// Ignored for Unix sockets.
    pub(crate) reuse_port: bool,
    /// The socket file stays when the listener closes.
    pub(crate) keeps_file: bool,
    /// Accepted sockets inherit these options.
    pub(crate) socket: &'a SocketOptions,
}

/// A listener, and the socket file that it made.
pub(crate) struct Listener {
    pub(crate) socket: Arc<Socket>,
    pub(crate) file: Option<SocketFile>,
}

/// A listener on `addr`. Replaces a stale socket file.
pub(crate) fn listen(addr: &PeerAddr, options: ListenOptions<'_>) -> io::Result<Listener> {
    let lock_until = Instant::now() + config::DIR_LOCK_WAIT_MAX;
    retry_while_in_use(|| match addr {
        PeerAddr::Unix(Some(path)) => listen_on_file(addr, path, options, lock_until),
        _ => listen_on_port(addr, options),
    })
}

/// Retries while the address is in use. The kernel tears down the rings of a killed server after
/// the process has ended, and those rings still hold the server's sockets.
fn retry_while_in_use<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut retries = 0;
    loop {
        match attempt() {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse
                    && retries < config::BIND_RETRIES_MAX =>
            {
                retries += 1;
                thread::sleep(config::BIND_RETRY_PAUSE);
            }
            done => return done,
        }
    }
}

fn listen_on_port(addr: &PeerAddr, options: ListenOptions<'_>) -> io::Result<Listener> {
    let fd = new_stream(addr)?;
    set_options(&fd, addr, options.socket)?;
    if let PeerAddr::Inet(inet) = addr {
        sockopt::set_socket_reuseaddr(&fd, true)?;
        // Accepted sockets inherit TCP_NODELAY, which saves a call for each of them.
        sockopt::set_tcp_nodelay(&fd, true)?;
        if inet.is_ipv6() {
            sockopt::set_ipv6_v6only(&fd, !options.both_ip)?;
        }
        if options.reuse_port {
            sockopt::set_socket_reuseport(&fd, true)?;
        }
    }
    name::bind(fd.as_fd(), addr)?;
    rustix::net::listen(&fd, config::LISTEN_BACKLOG)?;
    Ok(Listener { socket: Arc::new(Socket::new(fd, addr)), file: None })
}

fn listen_on_file(
    addr: &PeerAddr,
    path: &Path,
    options: ListenOptions<'_>,
    lock_until: Instant,
) -> io::Result<Listener> {
    let fd = new_stream(addr)?;
    set_options(&fd, addr, options.socket)?;
    let own_path = std::path::absolute(path)?;
    // Held until the socket listens: a bound socket that does not listen yet looks stale.
    let lock = DirLock::take(path, lock_until);
    match name::bind(fd.as_fd(), addr) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(path) => {
            if lock.is_none() {
                // The holder of the lock may replace the same file.
                tracing::warn!(?path, "listen: stale socket file kept: cannot lock its directory");
                return Err(error);
            }
            fs::remove_file(path)?;
            name::bind(fd.as_fd(), addr)?;
        }
        done => done?,
    }
    let socket = Arc::new(Socket::new(fd, addr));
    let own_file = if options.keeps_file { None } else { SocketFile::of(own_path, &socket) };
    rustix::net::listen(&*socket, config::LISTEN_BACKLOG)?;
    Ok(Listener { socket, file: own_file })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::PathBuf;
    use std::sync::Barrier;
    use std::time::Duration;

    fn now_on_port(addr: &PeerAddr) -> io::Result<Listener> {
        listen_on_port(addr, plain(&SocketOptions::default()))
    }

    fn plain(socket: &SocketOptions) -> ListenOptions<'_> {
        ListenOptions { both_ip: false, reuse_port: false, keeps_file: false, socket }
    }

    fn now(path: &Path, lock_wait: Duration) -> io::Result<Listener> {
        let addr = PeerAddr::Unix(Some(path.to_owned()));
        let socket = SocketOptions::default();
        listen_on_file(&addr, path, plain(&socket), Instant::now() + lock_wait)
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
            let refused = |started: &io::Result<_>| {
                started.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
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
        assert_eq!(failed.err().map(|error| error.kind()), Some(io::ErrorKind::AddrInUse));
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
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
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
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(bound);
        assert!(now(&path, Duration::ZERO).is_ok());
    }
}
