//! Socket addresses in the kernel's form, and the calls that take or return them.
//!
//! The address of a Unix socket has a length. A NUL byte may come before the end, or not at all
//! where a path fills the address. A peer chooses its own address, so decoding accepts every
//! address.

use std::ffi::OsStr;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::retry_on_intr;

use crate::address::{PeerAddr, UNIX_NAME_BYTES_MAX, UNIX_PATH_BYTES_MAX};

/// Room for an address of any family, and the length of the address in it. Aligned as
/// `sockaddr_storage`.
#[repr(C, align(8))]
struct RawAddr {
    bytes: [u8; ROOM],
    len: libc::socklen_t,
}

pub(super) fn bind(fd: BorrowedFd<'_>, addr: &PeerAddr) -> io::Result<()> {
    let raw = match addr {
        PeerAddr::Inet(addr) => return Ok(rustix::net::bind(fd, addr)?),
        PeerAddr::Unix(path) => RawAddr::of_path(path.as_deref())?,
        PeerAddr::Abstract(name) => RawAddr::of_name(name)?,
    };
    // SAFETY: the kernel reads `len` bytes, and `raw` has as many.
    check(unsafe { libc::bind(fd.as_raw_fd(), raw.as_ptr(), raw.len) })?;
    Ok(())
}

pub(super) fn connect(fd: BorrowedFd<'_>, addr: &PeerAddr) -> io::Result<()> {
    let raw = match addr {
        PeerAddr::Inet(addr) => return Ok(retry_on_intr(|| rustix::net::connect(fd, addr))?),
        PeerAddr::Unix(path) => RawAddr::of_path(path.as_deref())?,
        PeerAddr::Abstract(name) => RawAddr::of_name(name)?,
    };
    retry(|| {
        // SAFETY: the kernel reads `len` bytes, and `raw` has as many.
        unsafe { libc::connect(fd.as_raw_fd(), raw.as_ptr(), raw.len) }
    })?;
    Ok(())
}

/// A connection of the listener `fd`, non-blocking and close-on-exec, and its peer.
pub(super) fn accept(fd: BorrowedFd<'_>) -> io::Result<(OwnedFd, PeerAddr)> {
    let mut raw = RawAddr::new();
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let accepted = retry(|| {
        let (addr, len) = raw.room();
        // SAFETY: the kernel writes at most `len` bytes to `addr`, which has room for as many.
        unsafe { libc::accept4(fd.as_raw_fd(), addr, len, flags) }
    })?;
    // SAFETY: the call has just made this descriptor, so nothing else owns it.
    let accepted = unsafe { OwnedFd::from_raw_fd(accepted) };
    Ok((accepted, raw.decode()))
}

pub(super) fn local(fd: BorrowedFd<'_>) -> io::Result<PeerAddr> {
    let mut raw = RawAddr::new();
    let (addr, len) = raw.room();
    // SAFETY: the kernel writes at most `len` bytes to `addr`, which has room for as many.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), addr, len) })?;
    Ok(raw.decode())
}

pub(super) fn peer(fd: BorrowedFd<'_>) -> io::Result<PeerAddr> {
    let mut raw = RawAddr::new();
    let (addr, len) = raw.room();
    // SAFETY: the kernel writes at most `len` bytes to `addr`, which has room for as many.
    check(unsafe { libc::getpeername(fd.as_raw_fd(), addr, len) })?;
    Ok(raw.decode())
}

/// The peer of a connection that the peer may have reset. After a reset, getpeername(2) fails with
/// `ENOTCONN`, and `SO_PEERNAME` still returns the address.
pub(super) fn peer_even_if_reset(fd: BorrowedFd<'_>) -> io::Result<PeerAddr> {
    match peer(fd) {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
        done => return done,
    }
    // `SO_PEERNAME` fails if the buffer is longer than the address. Both ends of a connection have
    // the same family, and the addresses of an IP family have one length.
    let mut raw = RawAddr::new();
    let (addr, len) = raw.room();
    // SAFETY: the kernel writes at most `len` bytes to `addr`, which has room for as many.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), addr, len) })?;
    let (level, option) = (libc::SOL_SOCKET, libc::SO_PEERNAME);
    // SAFETY: `len` is that of the address just written, so `addr` has room for as many bytes.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), level, option, addr.cast(), len) })?;
    Ok(raw.decode())
}

impl RawAddr {
    fn new() -> RawAddr {
        RawAddr { bytes: [0; ROOM], len: 0 }
    }

    fn of_path(path: Option<&Path>) -> io::Result<RawAddr> {
        let path = path.map_or(&[][..], |path| path.as_os_str().as_bytes());
        if path.is_empty() {
            return Err(invalid("a unix socket needs a path".to_owned()));
        }
        if path.contains(&0) {
            return Err(invalid("a path has no NUL byte".to_owned()));
        }
        if path.len() > UNIX_PATH_BYTES_MAX {
            let bytes = path.len();
            return Err(invalid(format!("{bytes} bytes of path, {UNIX_PATH_BYTES_MAX} at most")));
        }
        let mut raw = RawAddr::new();
        let end = FAMILY_BYTES + path.len();
        raw.bytes[..FAMILY_BYTES].copy_from_slice(&(libc::AF_UNIX as u16).to_ne_bytes());
        raw.bytes[FAMILY_BYTES..end].copy_from_slice(path);
        // The length includes a NUL byte where there is room for one (unix(7)).
        raw.len = (end + 1).min(FAMILY_BYTES + UNIX_PATH_BYTES_MAX) as libc::socklen_t;
        Ok(raw)
    }

    /// An abstract address: a NUL byte and the name. The length of the address ends the name.
    fn of_name(name: &OsStr) -> io::Result<RawAddr> {
        let name = name.as_bytes();
        let bytes = name.len();
        if bytes == 0 || bytes > UNIX_NAME_BYTES_MAX {
            return Err(invalid(format!("{bytes} bytes of name, 1 to {UNIX_NAME_BYTES_MAX} fit")));
        }
        let mut raw = RawAddr::new();
        let start = FAMILY_BYTES + 1;
        raw.bytes[..FAMILY_BYTES].copy_from_slice(&(libc::AF_UNIX as u16).to_ne_bytes());
        raw.bytes[start..start + bytes].copy_from_slice(name);
        raw.len = (start + bytes) as libc::socklen_t;
        Ok(raw)
    }

    fn as_ptr(&self) -> *const libc::sockaddr {
        self.bytes.as_ptr().cast()
    }

    /// Where the kernel writes an address, and the size of that room.
    fn room(&mut self) -> (*mut libc::sockaddr, *mut libc::socklen_t) {
        self.len = self.bytes.len() as libc::socklen_t;
        (self.bytes.as_mut_ptr().cast(), &raw mut self.len)
    }

    /// The address that the kernel wrote. An address of an unknown family decodes as a Unix address
    /// without a path.
    fn decode(&self) -> PeerAddr {
        let addr = &self.bytes[..self.bytes.len().min(self.len as usize)];
        let Some((family, name)) = addr.split_first_chunk::<FAMILY_BYTES>() else {
            return PeerAddr::Unix(None);
        };
        let inet = match i32::from(u16::from_ne_bytes(*family)) {
            libc::AF_UNIX => return unix(name),
            libc::AF_INET => inet4(name),
            libc::AF_INET6 => inet6(name),
            _ => None,
        };
        inet.map_or(PeerAddr::Unix(None), PeerAddr::Inet)
    }
}

/// `sockaddr_un` without its family.
fn unix(name: &[u8]) -> PeerAddr {
    match name {
        [0, name @ ..] if name.iter().any(|byte| *byte != 0) => {
            PeerAddr::Abstract(OsStr::from_bytes(name).to_owned())
        }
        [] | [0, ..] => PeerAddr::Unix(None),
        path => {
            let path = path.split(|byte| *byte == 0).next().unwrap_or(path);
            PeerAddr::Unix(Some(PathBuf::from(OsStr::from_bytes(path))))
        }
    }
}

/// `sockaddr_in` without its family: port and address in network byte order.
fn inet4(name: &[u8]) -> Option<SocketAddr> {
    let (port, rest) = name.split_first_chunk()?;
    let ip = rest.first_chunk::<4>()?;
    Some((Ipv4Addr::from(*ip), u16::from_be_bytes(*port)).into())
}

/// `sockaddr_in6` without its family: port, flow and address in network byte order, and a scope in
/// host byte order.
fn inet6(name: &[u8]) -> Option<SocketAddr> {
    let (port, rest) = name.split_first_chunk()?;
    let (flow, rest) = rest.split_first_chunk()?;
    let (ip, rest) = rest.split_first_chunk::<16>()?;
    let scope = u32::from_ne_bytes(*rest.first_chunk()?);
    let (port, flow) = (u16::from_be_bytes(*port), u32::from_be_bytes(*flow));
    Some(SocketAddrV6::new(Ipv6Addr::from(*ip), port, flow, scope).into())
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

fn retry(mut call: impl FnMut() -> libc::c_int) -> io::Result<libc::c_int> {
    loop {
        match check(call()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

const ROOM: usize = size_of::<libc::sockaddr_storage>();

const FAMILY_BYTES: usize = size_of::<libc::sa_family_t>();

const _: () = assert!(
    FAMILY_BYTES + UNIX_PATH_BYTES_MAX == size_of::<libc::sockaddr_un>(),
    "a path fills the address of a unix socket"
);

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(family: libc::c_int, name: &[u8]) -> PeerAddr {
        let mut raw = RawAddr::new();
        raw.bytes[..2].copy_from_slice(&(family as u16).to_ne_bytes());
        raw.bytes[2..2 + name.len()].copy_from_slice(name);
        raw.len = (2 + name.len()) as u32;
        raw.decode()
    }

    #[test]
    fn every_name_of_a_unix_socket_decodes() {
        let path = |path: &str| PeerAddr::Unix(Some(PathBuf::from(path)));
        let longest = "x".repeat(UNIX_PATH_BYTES_MAX);
        let terminated = format!("{longest}\0");
        let name = |name: &str| PeerAddr::Abstract(name.into());
        for (bytes, addr) in [
            ("", PeerAddr::Unix(None)),
            ("\0", PeerAddr::Unix(None)),
            ("\0\0\0", PeerAddr::Unix(None)),
            ("\0abstract", name("abstract")),
            ("\0a\0b\0", name("a\0b\0")),
            (&longest.replacen('x', "\0", 1), name(&longest[1..])),
            ("/a", path("/a")),
            ("/a\0", path("/a")),
            ("/a\0b\0\0", path("/a")),
            (&longest, path(&longest)),
            (&terminated, path(&longest)),
        ] {
            assert_eq!(decoded(libc::AF_UNIX, bytes.as_bytes()), addr, "{bytes:?}");
        }
    }

    #[test]
    fn addresses_of_the_internet_decode_as_the_standard_library_has_them() {
        let v4 = [0, 80, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(decoded(libc::AF_INET, &v4).to_string(), "127.0.0.1:80");
        let mut v6 = [0; 26];
        (v6[1], v6[21]) = (80, 1);
        v6[22..].copy_from_slice(&7u32.to_ne_bytes());
        assert_eq!(decoded(libc::AF_INET6, &v6).to_string(), "[::1%7]:80");
    }

    #[test]
    fn what_the_kernel_cut_off_or_made_of_another_family_decodes_to_no_path() {
        assert_eq!(RawAddr::new().decode(), PeerAddr::Unix(None));
        for (family, name) in [(libc::AF_INET, &[0; 5][..]), (libc::AF_INET6, &[0; 25]), (40, &[])]
        {
            assert_eq!(decoded(family, name), PeerAddr::Unix(None));
        }
    }

    #[test]
    fn a_path_is_encoded_with_a_nul_byte_where_there_is_room() {
        let encoded = |path: &str| RawAddr::of_path(Some(Path::new(path)));
        assert_eq!(encoded("/a").expect("a path").len, 5);
        assert_eq!(encoded(&"x".repeat(107)).expect("a path").len, 110);
        assert_eq!(encoded(&"x".repeat(108)).expect("a path").len, 110);
        for path in ["", "\0a", "/a\0b", &"x".repeat(109)] {
            let error = encoded(path).err().expect("no path");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path:?}");
        }
    }
    #[test]
    fn an_abstract_name_is_encoded_without_padding_and_decodes_to_itself() {
        let longest = "x".repeat(UNIX_NAME_BYTES_MAX);
        for name in ["a", "a\0b", &longest] {
            let raw = RawAddr::of_name(OsStr::new(name)).expect("a name");
            assert_eq!(raw.len as usize, 3 + name.len());
            assert_eq!(raw.decode(), PeerAddr::Abstract(name.into()));
        }
        for name in ["", &"x".repeat(UNIX_NAME_BYTES_MAX + 1)] {
            let error = RawAddr::of_name(OsStr::new(name)).err().expect("no name");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name:?}");
        }
    }
}
