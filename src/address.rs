//! Addresses as people write them, and as the kernel reports them.
//!
//! A leaf: imports nothing of ours but the error.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Where to listen or connect: `HOST:PORT`, `:PORT`, `[::1]:PORT`, with `tcp:`, `tcp4:` or `tcp6:`
/// in front, or `unix:PATH`.
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

/// Which IP versions an [`Address`] stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Both; listening on `:PORT` takes both with one socket.
    Any,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
}

/// One end of a connection, as the kernel names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PeerAddr {
    /// TCP.
    Inet(SocketAddr),
    /// Unix socket; `None` is an end that was never bound to a path.
    Unix(Option<PathBuf>),
}

impl PeerAddr {
    /// The IP address and port, unless this is a unix socket.
    pub fn as_inet(&self) -> Option<SocketAddr> {
        match self {
            PeerAddr::Inet(addr) => Some(*addr),
            PeerAddr::Unix(_) => None,
        }
    }
}

impl Address {
    /// Every address to try when connecting, in the resolver's order. Blocks on name servers unless
    /// the host is an IP address.
    pub(crate) fn resolve_peers(&self) -> Result<Vec<PeerAddr>> {
        match self {
            Address::Unix(path) => Ok(vec![PeerAddr::Unix(Some(path.clone()))]),
            Address::Tcp { host, port, family } => {
                let loopback = if *family == Family::V6 { "::1" } else { "127.0.0.1" };
                resolve(if host.is_empty() { loopback } else { host }, *port, *family)
            }
        }
    }

    /// The address to listen on, and whether an IPv6 socket takes IPv4 as well.
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

    /// Whether finding the peer may block on a name server.
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
        let (family, rest) = match text.split_once(':') {
            Some(("unix", "")) => return Err(malformed(text, "empty path")),
            Some(("unix", path)) => return Ok(Address::Unix(PathBuf::from(path))),
            Some(("tcp", rest)) if rest.contains(':') => (Family::Any, rest),
            Some(("tcp4", rest)) => (Family::V4, rest),
            Some(("tcp6", rest)) => (Family::V6, rest),
            _ => (Family::Any, text),
        };
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| malformed(text, "no port"))?;
        let port =
            port.parse().map_err(|_| malformed(text, "the port is not a number up to 65535"))?;
        let host = match host.strip_prefix('[') {
            Some(inner) => inner.strip_suffix(']').ok_or_else(|| malformed(text, "missing ]"))?,
            None if host.contains(':') => return Err(malformed(text, "IPv6 needs [ ]")),
            None => host,
        };
        Ok(Address::Tcp { host: host.to_owned(), port, family })
    }
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

fn malformed(text: &str, why: &str) -> Error {
    Error::invalid(format!("bad address {text:?}: {why}; use HOST:PORT or unix:PATH"))
}

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
        for text in ["", "127.0.0.1", "h:99999", "::1:80", "[::1:80", "unix:", "h:"] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.is_invalid(), "{text}: {error}");
        }
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
