//! Unix sockets: all forms of names, and which server removes a socket file.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ringpoll::{Address, PeerAddr};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, unix_sockets:
            a_client_bound_to_the_longest_path_is_served
            a_client_with_an_abstract_name_is_served
            a_client_without_a_name_is_served
            the_longest_path_is_listened_on_and_dialed
            an_abstract_name_is_listened_on_and_dialled
            an_abstract_name_too_long_is_one_clear_error
            a_path_too_long_is_one_clear_error
            a_path_with_a_nul_byte_is_refused
            reuse_port_says_nothing_to_a_unix_listener
            a_path_in_use_is_an_error_and_its_server_does_not_notice
            a_stale_socket_file_is_replaced
            shutdown_removes_the_socket_file
            shutdown_leaves_the_socket_of_a_successor
            shutdown_leaves_a_plain_file_in_the_place_of_its_socket
            shutdown_after_a_chdir_removes_the_file_that_was_made
            a_server_that_never_serves_removes_its_socket_file
            a_builder_that_is_dropped_removes_its_socket_file
            a_server_that_fails_to_build_removes_its_socket_file
            a_socket_file_can_be_kept
            an_adopted_listeners_socket_file_stays
            a_slow_unix_peer_that_takes_bytes_is_not_cut_by_the_stall_timeout
        }
    };
}
pub(crate) use cases;

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// An echo over `peer`, bounded by the deadline.
fn echo_over(mut peer: UnixStream, bytes: &[u8]) -> Check {
    bound_unix(&peer)?;
    peer.write_all(bytes)?;
    assert_eq!(read_exactly(&peer, bytes.len())?, bytes);
    Ok(())
}

/// A server on `path`, and what it says of the peers that it served.
fn echo_of_names(t: &Fixture, path: &Path) -> Check<impl Fn() -> Check<PeerAddr>> {
    let (tells, told) = std::sync::mpsc::channel();
    let server = t.server().on_request(move |conn| {
        tells.send(conn.peer_addr().clone()).expect("the test listens");
        echo(conn)
    });
    t.spawn_bound(server.bind(&unix(path))?);
    Ok(move || Ok(told.recv_timeout(DEADLINE)?))
}

/// 108 bytes: no NUL byte ends the name where the kernel hands it over.
pub(crate) fn a_client_bound_to_the_longest_path_is_served(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let own = path_of_bytes(dir.path(), PATH_BYTES_MAX);
    let name = echo_of_names(t, &path)?;
    let peer = connect_named(own.as_os_str().as_bytes(), &path)?;
    echo_over(peer, b"long")?;
    assert_eq!(name()?, PeerAddr::Unix(Some(own)));
    // Nobody else is worse off.
    echo_over(UnixStream::connect(&path)?, b"short")
}

pub(crate) fn a_client_with_an_abstract_name_is_served(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let name = echo_of_names(t, &path)?;
    let unique = format!("\0{}", dir.path().display());
    let longest = format!("{unique:x<108}");
    for own in [unique.as_bytes(), longest.as_bytes()] {
        echo_over(connect_named(own, &path)?, b"abstract")?;
        let own = OsStr::from_bytes(&own[1..]).to_owned();
        assert_eq!(name()?, PeerAddr::Abstract(own));
    }
    Ok(())
}

pub(crate) fn a_client_without_a_name_is_served(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let name = echo_of_names(t, &path)?;
    echo_over(UnixStream::connect(&path)?, b"unnamed")?;
    assert_eq!(name()?, PeerAddr::Unix(None));
    Ok(())
}

pub(crate) fn the_longest_path_is_listened_on_and_dialed(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = path_of_bytes(dir.path(), PATH_BYTES_MAX);
    let server = t.spawn_bound(t.server().on_request(echo).bind(&unix(&path))?);
    assert_eq!(server.local_addr(), PeerAddr::Unix(Some(path.clone())));
    block_on(async {
        let mut conn = t.dialer().connect(&unix(&path)).await?;
        assert_eq!(conn.peer_addr(), PeerAddr::Unix(Some(path.clone())));
        conn.write(b"hello".as_slice())?;
        conn.flush().await?;
        assert_eq!(conn.next(5).await?[..], *b"hello");
        Ok(())
    })?;
    server.shutdown(DEADLINE)?;
    assert!(!path.exists(), "the socket file is still there");
    Ok(())
}

pub(crate) fn an_abstract_name_is_listened_on_and_dialled(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let unique = dir.path().display().to_string();
    for name in [&unique, &format!("{unique:x<107}")] {
        let address = format!("unix:@{name}");
        let server = t.spawn_bound(t.server().on_request(echo).bind(&address)?);
        assert_eq!(server.local_addr(), PeerAddr::Abstract(name.into()));
        assert_eq!(server.local_addr().to_string(), address);
        // The kernel and the standard library know the same name.
        echo_over(connect_abstract(name)?, b"std")?;
        block_on(async {
            let mut conn = t.dialer().connect(&address).await?;
            assert_eq!(conn.peer_addr(), server.local_addr());
            conn.write(b"hello".as_slice())?;
            conn.flush().await?;
            assert_eq!(conn.next(5).await?[..], *b"hello");
            Ok(())
        })?;
        let error = t.server().on_request(echo).bind(&address).expect_err("the name is taken");
        assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE), "{error:?}");
        server.shutdown(DEADLINE)?;
        let error = block_on(async { Ok(t.dialer().connect(&address).await.err()) })?;
        let error = error.expect("nobody listens");
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{error:?}");
        t.spawn_bound(t.server().on_request(echo).bind(&address)?);
    }
    assert_eq!(fs::read_dir(dir.path())?.count(), 0, "there is a file");
    Ok(())
}

fn connect_abstract(name: &str) -> Check<UnixStream> {
    let addr = SocketAddr::from_abstract_name(name)?;
    Ok(UnixStream::connect_addr(&addr)?)
}

pub(crate) fn an_abstract_name_too_long_is_one_clear_error(t: &Fixture) -> Check {
    let address = format!("unix:@{}", "x".repeat(PATH_BYTES_MAX));
    let listening = t.server().on_request(echo).bind(&address).expect_err("too long");
    let dialing = block_on(async { Ok(t.dialer().connect(&address).await.err()) })?;
    for error in [listening, dialing.expect("too long")] {
        assert!(error.is_invalid(), "{error:?}");
        let message = error.to_string();
        assert!(message.contains("108") && message.contains("107"), "no lengths in {message:?}");
    }
    Ok(())
}

pub(crate) fn a_path_too_long_is_one_clear_error(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = path_of_bytes(dir.path(), PATH_BYTES_MAX + 1);
    let listening = t.server().on_request(echo).bind(&unix(&path)).expect_err("too long");
    let dialing = block_on(async { Ok(t.dialer().connect(&unix(&path)).await.err()) })?;
    for error in [listening, dialing.expect("too long")] {
        assert!(error.is_invalid(), "{error:?}");
        let message = error.to_string();
        assert!(message.contains("109") && message.contains("108"), "no lengths in {message:?}");
    }
    assert!(!path.exists());
    Ok(())
}

pub(crate) fn a_path_with_a_nul_byte_is_refused(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    for text in [format!("unix:{}/a\0b", dir.path().display()), "unix:\0abstract".to_owned()] {
        let listening = t.server().on_request(echo).bind(&text).expect_err("it has a NUL byte");
        let dialing = block_on(async { Ok(t.dialer().connect(&text).await.err()) })?;
        let parsing = text.parse::<Address>().expect_err("it has a NUL byte");
        for error in [listening, dialing.expect("it has a NUL byte"), parsing] {
            assert!(error.is_invalid() && error.to_string().contains("NUL"), "{error:?}");
        }
    }
    assert_eq!(fs::read_dir(dir.path())?.count(), 0, "something was bound all the same");
    Ok(())
}

/// Kernels differ in whether they refuse the option there.
pub(crate) fn reuse_port_says_nothing_to_a_unix_listener(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let builder = t.server().reuse_port(true).on_request(echo).listen("127.0.0.1:0")?;
    t.spawn_bound(builder.bind(&unix(&path))?);
    echo_over(UnixStream::connect(&path)?, b"unix")
}

pub(crate) fn a_path_in_use_is_an_error_and_its_server_does_not_notice(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let server = t.spawn_bound(t.server().on_request(echo).bind(&unix(&path))?);
    let error = t.server().on_request(echo).bind(&unix(&path)).expect_err("the path is taken");
    assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE), "{error:?}");
    echo_over(UnixStream::connect(&path)?, b"still here")?;
    assert_eq!(server.stats().accepted, 1, "connections were made only to ask");
    Ok(())
}

pub(crate) fn a_stale_socket_file_is_replaced(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    drop(UnixListener::bind(&path)?);
    let server = t.spawn_bound(t.server().on_request(echo).bind(&unix(&path))?);
    echo_over(UnixStream::connect(&path)?, b"replaced")?;
    server.shutdown(DEADLINE)?;
    assert!(!path.exists(), "the socket file is still there");
    Ok(())
}

pub(crate) fn shutdown_removes_the_socket_file(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let server = t.spawn_bound(t.server().on_request(echo).bind(&unix(&path))?);
    echo_over(UnixStream::connect(&path)?, b"served")?;
    server.shutdown(DEADLINE)?;
    assert!(!path.exists(), "the socket file is still there");
    // Its address counts as free.
    t.spawn_bound(t.server().on_request(echo).bind(&unix(&path))?);
    echo_over(UnixStream::connect(&path)?, b"served")
}

/// A new release takes the path before the old one has gone.
pub(crate) fn shutdown_leaves_the_socket_of_a_successor(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let old = t.spawn_bound(t.server().on_request(echo).bind(&unix(&path))?);
    echo_over(UnixStream::connect(&path)?, b"old")?;
    fs::remove_file(&path)?;
    let new = t.spawn_bound(t.server().on_request(echo).bind(&unix(&path))?);
    old.shutdown(DEADLINE)?;
    echo_over(UnixStream::connect(&path)?, b"new")?;
    new.shutdown(DEADLINE)?;
    assert!(!path.exists(), "the socket file is still there");
    Ok(())
}

pub(crate) fn shutdown_leaves_a_plain_file_in_the_place_of_its_socket(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let server = t.spawn_bound(t.server().on_request(echo).bind(&unix(&path))?);
    fs::remove_file(&path)?;
    fs::write(&path, "precious")?;
    server.shutdown(DEADLINE)?;
    assert_eq!(fs::read(&path)?, b"precious");
    // Nor does a server bind over it.
    let error = t.server().on_request(echo).bind(&unix(&path)).expect_err("it is a plain file");
    assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE), "{error:?}");
    assert_eq!(fs::read(&path)?, b"precious");
    Ok(())
}

/// The working directory of the process; the one of before comes back when this is dropped.
struct WorkingDir(PathBuf);

impl WorkingDir {
    fn change(dir: &Path) -> Check<WorkingDir> {
        let before = std::env::current_dir()?;
        std::env::set_current_dir(dir)?;
        Ok(WorkingDir(before))
    }
}

impl Drop for WorkingDir {
    fn drop(&mut self) {
        std::env::set_current_dir(&self.0).expect("the directory of before is still there");
    }
}

pub(crate) fn shutdown_after_a_chdir_removes_the_file_that_was_made(t: &Fixture) -> Check {
    let (first, second) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let _restored = WorkingDir::change(first.path())?;
    let server = t.spawn_bound(t.server().on_request(echo).bind("unix:socket")?);
    std::env::set_current_dir(second.path())?;
    fs::write("socket", "precious")?;
    server.shutdown(DEADLINE)?;
    assert_eq!(fs::read("socket")?, b"precious");
    assert!(!first.path().join("socket").exists(), "the socket file is still there");
    Ok(())
}

pub(crate) fn a_server_that_never_serves_removes_its_socket_file(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let server = t.server().on_request(echo).bind(&unix(&path))?;
    assert!(path.exists());
    let handle = server.handle();
    drop(server);
    assert!(!path.exists(), "the socket file is still there");
    drop(handle);
    Ok(())
}

pub(crate) fn a_builder_that_is_dropped_removes_its_socket_file(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let builder = t.server().on_request(echo).listen(&unix(&path))?;
    assert!(path.exists());
    drop(builder);
    assert!(!path.exists(), "the socket file is still there");
    Ok(())
}

pub(crate) fn a_server_that_fails_to_build_removes_its_socket_file(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let error = t.server().bind(&unix(&path)).expect_err("it has no handler");
    assert!(error.is_invalid(), "{error:?}");
    assert!(!path.exists(), "the socket file is still there");
    Ok(())
}

pub(crate) fn a_socket_file_can_be_kept(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    for _ in 0..2 {
        // The file that the first leaves is a stale one for the second.
        let builder = t.server().keep_socket_file(true).on_request(echo);
        let server = t.spawn_bound(builder.bind(&unix(&path))?);
        echo_over(UnixStream::connect(&path)?, b"kept")?;
        server.shutdown(DEADLINE)?;
        assert!(path.exists(), "the socket file was to be kept");
    }
    Ok(())
}

pub(crate) fn an_adopted_listeners_socket_file_stays(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path)?;
    let server = t.spawn_bound(t.server().on_request(echo).unix_listener(listener)?.build()?);
    echo_over(UnixStream::connect(&path)?, b"adopted")?;
    server.shutdown(DEADLINE)?;
    assert!(path.exists(), "the caller's socket file is gone");
    Ok(())
}

pub(crate) fn a_slow_unix_peer_that_takes_bytes_is_not_cut_by_the_stall_timeout(
    t: &Fixture,
) -> Check {
    const STALL: Duration = Duration::from_millis(400);
    const SIZE: usize = 2 << 20;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("slow");
    let (sends, sent) = std::sync::mpsc::channel();
    let builder = t.server().write_stall_timeout(STALL).on_connect(move |mut conn| {
        let sends = sends.clone();
        async move {
            conn.write(pattern(0, SIZE))?;
            let start = Instant::now();
            let flushed = conn.flush().await;
            sends.send((flushed, start.elapsed())).map_err(ringpoll::Error::other)
        }
    });
    t.spawn_bound(builder.bind(&unix(&path))?);
    let peer = UnixStream::connect(&path)?;
    bound_unix(&peer)?;
    let mut received = 0;
    while received < SIZE {
        let bytes = read_exactly(&peer, 32 << 10)?;
        assert_pattern(&bytes, received);
        received += bytes.len();
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let (flushed, took) = sent.recv_timeout(DEADLINE)?;
    flushed?;
    assert!(took > 2 * STALL, "the peer was not slow: {took:?}");
    Ok(())
}
