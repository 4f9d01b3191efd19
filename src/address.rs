//! Addresses: as text, and as the kernel reports them.
//!
//! A leaf: of this crate it imports the error only.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, Result};

/// An address to listen on or to connect to, parsed from text: `HOST:PORT`, `:PORT` or
/// `[::1]:PORT`, each with an optional prefix `tcp:`, `tcp4:` or `tcp6:`, or `unix:PATH` or
/// `unix:@NAME`. A path has at most 108 bytes, and a name at most 107 (unix(7)). Other text, such
/// as a URL, is invalid, and the error says why.
///
/// `:PORT` means every local address when listening, and loopback when connecting.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// A TCP address.
    Tcp {
        /// Name or IP address; empty in `:PORT`.
        host: String,
        /// Port; 0 lets the kernel choose when listening.
        port: u16,
        /// Which IP version may be used.
        family: Family,
    },
    /// A path in the file system. A path that begins with `@` is written `unix:./@PATH`.
    Unix(PathBuf),
    /// A name in the abstract namespace of Linux, without the `@`. There is no file, and the name
    /// is free as soon as the listener is closed. Every process of the network namespace may
    /// connect.
    Abstract(OsString),
}

/// The IP versions that an [`Address`] allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Both. A listener on `:PORT` accepts both with one socket.
    Any,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
}

/// The address of one end of a connection, as the kernel reports it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PeerAddr {
    /// TCP.
    Inet(SocketAddr),
    /// Unix socket; `None` if this end was never bound.
    Unix(Option<PathBuf>),
    /// Unix socket with an abstract name: `unix:@NAME`. The name of a peer may be any bytes. Each
    /// NUL byte is displayed as `@`.
    Abstract(OsString),
}

/// What an [`Address`] names as the other end of a dial.
pub(crate) enum Target<'a> {
    Peer(PeerAddr),
    /// A name, or an IPv6 address with a zone: the addresses are to be looked up.
    Name {
        host: &'a str,
        port: u16,
    },
}

impl PeerAddr {
    /// The IP address and port; `None` for a Unix socket.
    pub fn as_inet(&self) -> Option<SocketAddr> {
        match self {
            PeerAddr::Inet(addr) => Some(*addr),
            PeerAddr::Unix(_) | PeerAddr::Abstract(_) => None,
        }
    }
}

impl Address {
    /// What to connect to. `:PORT` is loopback.
    pub(crate) fn target(&self) -> Target<'_> {
        let (host, port, family) = match self {
            Address::Unix(path) => return Target::Peer(PeerAddr::Unix(Some(path.clone()))),
            Address::Abstract(name) => return Target::Peer(PeerAddr::Abstract(name.clone())),
            Address::Tcp { host, port, family } => (host.as_str(), *port, *family),
        };
        let ip = match family {
            Family::V6 if host.is_empty() => Ok(Ipv6Addr::LOCALHOST.into()),
            _ if host.is_empty() => Ok(Ipv4Addr::LOCALHOST.into()),
            _ => host.parse::<IpAddr>(),
        };
        match ip {
            Ok(ip) => Target::Peer(PeerAddr::Inet((ip, port).into())),
            Err(_) => Target::Name { host, port },
        }
    }

    /// The IP versions that may be used.
    pub(crate) fn family(&self) -> Family {
        match self {
            Address::Tcp { family, .. } => *family,
            Address::Unix(_) | Address::Abstract(_) => Family::Any,
        }
    }

    /// The address to listen on, and whether an IPv6 socket accepts IPv4 as well.
    pub(crate) fn resolve_local(&self) -> Result<(PeerAddr, bool)> {
        match self {
            Address::Unix(path) => Ok((PeerAddr::Unix(Some(path.clone())), false)),
            Address::Abstract(name) => Ok((PeerAddr::Abstract(name.clone()), false)),
            Address::Tcp { host, port, family } if host.is_empty() => match family {
                Family::V4 => Ok((PeerAddr::Inet(([0, 0, 0, 0], *port).into()), false)),
                both => {
                    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port));
                    Ok((PeerAddr::Inet(any), *both == Family::Any))
                }
            },
            Address::Tcp { host, port, family } => Ok((resolve(host, *port, *family)?, false)),
        }
    }
}

impl Family {
    pub(crate) fn allows(self, addr: &SocketAddr) -> bool {
        match self {
            Family::Any => true,
            Family::V4 => addr.is_ipv4(),
            Family::V6 => addr.is_ipv6(),
        }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Address> {
        let parsed = match text.strip_prefix("unix:") {
            Some(unix) => unix.strip_prefix('@').map_or_else(|| parse_path(unix), parse_name),
            None => parse_tcp(text),
        };
        parsed.map_err(|why| {
            Error::invalid(format!("bad address {text:?}: {why}; use HOST:PORT or unix:PATH"))
        })
    }
}

/// Parses the text after `unix:`.
fn parse_path(path: &str) -> Result<Address, String> {
    let bytes = path.len();
    if path.is_empty() {
        return Err("the path is empty".to_owned());
    }
    if path.contains('\0') {
        return Err("a path has no NUL byte".to_owned());
    }
    if path.ends_with('/') {
        return Err("a path that ends with a slash is a directory".to_owned());
    }
    if bytes > UNIX_PATH_BYTES_MAX {
        return Err(format!("the path has {bytes} bytes, and at most {UNIX_PATH_BYTES_MAX} fit"));
    }
    Ok(Address::Unix(PathBuf::from(path)))
}

/// Parses the text after `unix:@`.
fn parse_name(name: &str) -> Result<Address, String> {
    let bytes = name.len();
    if name.is_empty() {
        return Err("the name is empty".to_owned());
    }
    if name.contains('\0') {
        return Err("a name has no NUL byte".to_owned());
    }
    if bytes > UNIX_NAME_BYTES_MAX {
        return Err(format!("the name has {bytes} bytes, and at most {UNIX_NAME_BYTES_MAX} fit"));
    }
    Ok(Address::Abstract(OsString::from(name)))
}

fn parse_tcp(text: &str) -> Result<Address, String> {
    if text.contains("://") {
        return Err("a URL is not an address".to_owned());
    }
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err("it has a space or a control character".to_owned());
    }
    if let Some((before, _)) = text.split_once('/') {
        let has_port = before.rsplit_once(':').is_some_and(|(_, port)| parse_port(port).is_some());
        let why = if has_port { "nothing may follow the port" } else { "a path needs unix:" };
        return Err(why.to_owned());
    }
    let (family, rest) = match text.split_once(':') {
        Some(("tcp", rest)) if rest.contains(':') => (Family::Any, rest),
        Some(("tcp4", rest)) => (Family::V4, rest),
        Some(("tcp6", rest)) => (Family::V6, rest),
        _ => (Family::Any, text),
    };
    let (host, port) = split_port(rest)?;
    if port.is_empty() {
        return Err("the port is missing".to_owned());
    }
    let port = parse_port(port).ok_or("the port is not a number up to 65535")?;
    Ok(Address::Tcp { host: host.to_owned(), port, family })
}

/// Splits `HOST:PORT`, and removes brackets around the host.
fn split_port(text: &str) -> Result<(&str, &str), String> {
    if let Some(bracketed) = text.strip_prefix('[') {
        let (host, rest) = bracketed.split_once(']').ok_or("the ] is missing")?;
        if host.is_empty() {
            return Err("there is no IPv6 address in the [ ]".to_owned());
        }
        let port = rest.strip_prefix(':').ok_or("the port is missing")?;
        return Ok((host, port));
    }
    let (host, port) = text.rsplit_once(':').ok_or("the port is missing")?;
    if host.contains(':') {
        let is_ipv6 = |text: &str| {
            let ip = text.split('%').next().unwrap_or(text);
            ip.parse::<Ipv6Addr>().is_ok()
        };
        let why = if is_ipv6(host) || is_ipv6(text) {
            "an IPv6 address needs [ ] around it"
        } else {
            "only tcp:, tcp4:, tcp6: and unix: may come before the host"
        };
        return Err(why.to_owned());
    }
    Ok((host, port))
}

/// Parses digits only. The standard library would also accept a sign.
fn parse_port(text: &str) -> Option<u16> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Abstract(name) => write_name(f, name),
            Address::Tcp { host, port, family } => {
                let family = match family {
                    Family::Any => "",
                    Family::V4 => "tcp4:",
                    Family::V6 => "tcp6:",
                };
                let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
                write!(f, "{family}{open}{host}{close}:{port}")
            }
        }
    }
}

impl fmt::Display for PeerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerAddr::Inet(addr) => addr.fmt(f),
            PeerAddr::Unix(Some(path)) => write!(f, "unix:{}", path.display()),
            PeerAddr::Unix(None) => f.write_str("unix:"),
            PeerAddr::Abstract(name) => write_name(f, name),
        }
    }
}

fn write_name(f: &mut fmt::Formatter<'_>, name: &OsStr) -> fmt::Result {
    write!(f, "unix:@{}", name.to_string_lossy().replace('\0', "@"))
}

/// The first address of `host` to listen on.
fn resolve(host: &str, port: u16, family: Family) -> Result<PeerAddr> {
    let mut found = (host, port)
        .to_socket_addrs()
        .map_err(|error| Error::io(format_args!("resolve {host}"), error))?;
    let first = found.find(|addr| family.allows(addr)).map(PeerAddr::Inet);
    first.ok_or_else(|| Error::invalid(format!("resolve {host}: {NO_ADDRESS_OF_FAMILY}")))
}

pub(crate) const NO_ADDRESS_OF_FAMILY: &str = "no address of the family asked for";

/// The longest path, in bytes, in the address of a Unix socket: the size of `sun_path` (unix(7)),
/// which needs no NUL byte at its end.
pub(crate) const UNIX_PATH_BYTES_MAX: usize = 108;

/// The longest abstract name, in bytes: a NUL byte stands before the name.
pub(crate) const UNIX_NAME_BYTES_MAX: usize = UNIX_PATH_BYTES_MAX - 1;

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn addresses_read_back_as_what_they_print() {
        for text in ["127.0.0.1:80", "[::1]:80", "localhost:0", ":80", "tcp4:h:1", "unix:/tmp/a"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for (text, parsed) in [
            ("unix:@name", Address::Abstract("name".into())),
            ("unix:@a/b@c ", Address::Abstract("a/b@c ".into())),
            ("unix:./@name", Address::Unix("./@name".into())),
        ] {
            let address = text.parse::<Address>().unwrap();
            assert_eq!((address.to_string().as_str(), address), (text, parsed));
        }
        assert_eq!("tcp:h:1".parse::<Address>().unwrap().to_string(), "h:1");
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_reason() {
        let (longest, longer) = ("x".repeat(108), "x".repeat(109));
        for (text, reason) in [
            ("", "port is missing"),
            ("127.0.0.1", "port is missing"),
            ("h:", "port is missing"),
            ("[::1]", "port is missing"),
            ("[::1]80", "port is missing"),
            ("h:99999", "up to 65535"),
            ("h:+80", "up to 65535"),
            ("h:http", "up to 65535"),
            ("::1:80", "IPv6"),
            ("::1", "IPv6"),
            ("fe80::1%eth0:80", "IPv6"),
            ("[::1:80", "]"),
            ("[]:80", "no IPv6 address"),
            ("udp:1.2.3.4:5", "before the host"),
            ("TCP:h:80", "before the host"),
            ("http://host:80", "URL"),
            ("http://host", "URL"),
            ("tcp://host:80", "URL"),
            ("/run/socket", "unix:"),
            ("./socket", "unix:"),
            ("run/socket:1", "unix:"),
            ("UNIX:/run/socket", "unix:"),
            ("h:80/", "follow the port"),
            ("h:80/index", "follow the port"),
            (" h:80", "space"),
            ("h :80", "space"),
            ("h:80\n", "space"),
            ("unix:", "empty"),
            ("unix:/run/", "slash"),
            ("unix:/a\0b", "NUL"),
            (&format!("unix:{longer}"), "109 bytes"),
            ("unix:@", "empty"),
            ("unix:@a\0b", "NUL"),
            (&format!("unix:@{longest}"), "108 bytes"),
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.is_invalid(), "{text}: {error}");
            let message = error.to_string();
            // The text around the reason is the same for all and must not match.
            let why = message.strip_suffix("; use HOST:PORT or unix:PATH").unwrap();
            let why = why.strip_prefix(&format!("bad address {text:?}: ")).unwrap();
            assert!(why.contains(reason), "{text:?}: {why:?} does not tell of {reason:?}");
        }
        assert!(format!("unix:{longest}").parse::<Address>().is_ok());
        assert!(format!("unix:@{}", &longest[1..]).parse::<Address>().is_ok());
    }

    #[test]
    fn every_abstract_name_of_a_peer_has_a_text() {
        let text = |name: &[u8]| PeerAddr::Abstract(OsStr::from_bytes(name).to_owned()).to_string();
        assert_eq!(text(b"name"), "unix:@name");
        assert_eq!(text(b"a\0b\0"), "unix:@a@b@");
        assert_eq!(text(b"\xff"), "unix:@\u{fffd}");
    }

    #[test]
    fn a_port_alone_listens_everywhere_and_connects_to_loopback() {
        let address: Address = ":80".parse().unwrap();
        assert_eq!(
            address.resolve_local().unwrap(),
            (PeerAddr::Inet("[::]:80".parse().unwrap()), true)
        );
        assert_eq!(known(":80"), Some(PeerAddr::Inet("127.0.0.1:80".parse().unwrap())));
        assert_eq!(known("tcp6::80"), Some(PeerAddr::Inet("[::1]:80".parse().unwrap())));
    }

    fn known(text: &str) -> Option<PeerAddr> {
        match text.parse::<Address>().unwrap().target() {
            Target::Peer(peer) => Some(peer),
            Target::Name { .. } => None,
        }
    }

    #[test]
    fn only_names_and_zones_have_to_be_looked_up() {
        for text in ["10.0.0.1:80", "[2001:db8::1]:80", ":80", "unix:/tmp/a", "unix:@name"] {
            assert!(known(text).is_some(), "{text}");
        }
        for text in ["localhost:80", "10.0.0:80", "[fe80::1%lo]:80"] {
            assert_eq!(known(text), None, "{text}");
        }
    }
}
