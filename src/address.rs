//! Addresses: as text, and as the kernel reports them.
//!
//! A leaf: of this crate it imports the error only.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, Result};

/// An address to listen on or to connect to, parsed from text: `HOST:PORT`, `:PORT` or
/// `[::1]:PORT`, each with an optional prefix `tcp:`, `tcp4:` or `tcp6:`, or `unix:PATH`. A path
/// has at most 108 bytes (unix(7)). Other text, such as a URL, is invalid, and the error says why.
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
    /// A path in the file system.
    Unix(PathBuf),
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
    /// Unix socket; `None` if this end was never bound to a path.
    Unix(Option<PathBuf>),
}

impl PeerAddr {
    /// The IP address and port; `None` for a Unix socket.
    pub fn as_inet(&self) -> Option<SocketAddr> {
        match self {
            PeerAddr::Inet(addr) => Some(*addr),
            PeerAddr::Unix(_) => None,
        }
    }
}

impl Address {
    /// All addresses to try when connecting, in the order of the resolver. Blocks on name servers,
    /// unless the host is an IP address.
    pub(crate) fn resolve_peers(&self) -> Result<Vec<PeerAddr>> {
        match self {
            Address::Unix(path) => Ok(vec![PeerAddr::Unix(Some(path.clone()))]),
            Address::Tcp { host, port, family } => {
                let loopback = if *family == Family::V6 { "::1" } else { "127.0.0.1" };
                resolve(if host.is_empty() { loopback } else { host }, *port, *family)
            }
        }
    }

    /// The address to listen on, and whether an IPv6 socket accepts IPv4 as well.
    pub(crate) fn resolve_local(&self) -> Result<(PeerAddr, bool)> {
        match self {
            Address::Unix(path) => Ok((PeerAddr::Unix(Some(path.clone())), false)),
            Address::Tcp { host, port, family } if host.is_empty() => match family {
                Family::V4 => Ok((PeerAddr::Inet(([0, 0, 0, 0], *port).into()), false)),
                both => {
                    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port));
                    Ok((PeerAddr::Inet(any), *both == Family::Any))
                }
            },
            Address::Tcp { host, port, family } => {
                Ok((resolve(host, *port, *family)?.swap_remove(0), false))
            }
        }
    }

    /// Whether resolving the address may block on a name server.
    pub(crate) fn needs_resolver(&self) -> bool {
        match self {
            Address::Tcp { host, .. } => {
                !host.is_empty() && host.parse::<std::net::IpAddr>().is_err()
            }
            Address::Unix(_) => false,
        }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Address> {
        let parsed = match text.strip_prefix("unix:") {
            Some(path) => parse_path(path),
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
        }
    }
}

fn resolve(host: &str, port: u16, family: Family) -> Result<Vec<PeerAddr>> {
    let found = (host, port)
        .to_socket_addrs()
        .map_err(|error| Error::io(format_args!("resolve {host}"), error))?;
    let addrs: Vec<_> = found
        .filter(|addr| match family {
            Family::Any => true,
            Family::V4 => addr.is_ipv4(),
            Family::V6 => addr.is_ipv6(),
        })
        .map(PeerAddr::Inet)
        .collect();
    if addrs.is_empty() {
        return Err(Error::invalid(format!("resolve {host}: no address of the family asked for")));
    }
    Ok(addrs)
}

/// The longest path, in bytes, in the address of a Unix socket: the size of `sun_path` (unix(7)),
/// which needs no NUL byte at its end.
pub(crate) const UNIX_PATH_BYTES_MAX: usize = 108;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_what_they_print() {
        for text in ["127.0.0.1:80", "[::1]:80", "localhost:0", ":80", "tcp4:h:1", "unix:/tmp/a"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
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
    }

    #[test]
    fn a_port_alone_listens_everywhere_and_connects_to_loopback() {
        let address: Address = ":80".parse().unwrap();
        assert_eq!(
            address.resolve_local().unwrap(),
            (PeerAddr::Inet("[::]:80".parse().unwrap()), true)
        );
        assert_eq!(
            address.resolve_peers().unwrap(),
            vec![PeerAddr::Inet("127.0.0.1:80".parse().unwrap())]
        );
    }
}
