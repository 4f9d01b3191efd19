//! Unix sockets by their raw addresses: the standard library and rustix refuse, or panic at, names
//! that Linux takes.

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketType};

use super::peer::bound_unix;

/// The longest path that an address takes: it has no room for a NUL byte behind it (unix(7)).
pub(crate) const PATH_BYTES_MAX: usize = 108;

/// A path of exactly `bytes` bytes in `dir`.
pub(crate) fn path_of_bytes(dir: &Path, bytes: usize) -> PathBuf {
    let padding = bytes - dir.as_os_str().len() - 1;
    let path = dir.join("x".repeat(padding));
    assert_eq!(path.as_os_str().len(), bytes);
    path
}

/// A stream whose own end is bound to `own_name`, connected to the listener at `path`. A name that
/// begins with a NUL byte is an abstract one.
pub(crate) fn connect_named(own_name: &[u8], path: &Path) -> io::Result<UnixStream> {
    let fd = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
    bind_raw(&fd, own_name)?;
    connect_raw(&fd, path.as_os_str().as_bytes())?;
    let stream = UnixStream::from(fd);
    bound_unix(&stream)?;
    Ok(stream)
}

fn bind_raw(fd: &OwnedFd, name: &[u8]) -> io::Result<()> {
    let (addr, len) = raw_addr(name);
    // SAFETY: the kernel reads `len` bytes of `addr`, which has as many.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const addr).cast(), len) })
}

fn connect_raw(fd: &OwnedFd, name: &[u8]) -> io::Result<()> {
    let (addr, len) = raw_addr(name);
    // SAFETY: the kernel reads `len` bytes of `addr`, which has as many.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const addr).cast(), len) })
}

fn raw_addr(name: &[u8]) -> (libc::sockaddr_un, libc::socklen_t) {
    let mut addr = libc::sockaddr_un { sun_family: libc::AF_UNIX as u16, sun_path: [0; 108] };
    for (place, byte) in addr.sun_path.iter_mut().zip(name) {
        *place = *byte as libc::c_char;
    }
    let len = offset_of!(libc::sockaddr_un, sun_path) + name.len();
    assert!(len <= size_of::<libc::sockaddr_un>(), "{} bytes are no name", name.len());
    (addr, len as libc::socklen_t)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
