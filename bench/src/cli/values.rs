//! What can stand behind a flag, and how people write it.

use std::net::{Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::str::FromStr;
use std::time::Duration;

use ringpoll::{Backend, Placement};

use crate::error::{Failure, Result};
use crate::peers::Peer;
use crate::wire;

/// CPU numbers as people write them: `0,2-3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CpuList(pub(crate) Vec<usize>);

impl CpuList {
    /// Refuses a CPU that is not among the allowed ones.
    pub(super) fn check(&self, allowed: &[usize]) -> Result<()> {
        match self.0.iter().find(|cpu| !allowed.contains(cpu)) {
            None => Ok(()),
            Some(cpu) => {
                Err(Failure::new(format!("cpu {cpu}: not among the allowed ones, {allowed:?}")))
            }
        }
    }
}

impl FromStr for CpuList {
    type Err = Failure;

    fn from_str(text: &str) -> Result<CpuList> {
        let malformed = || Failure::new(format!("{text:?} is not a list of CPUs such as 0,2-3"));
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: usize = first.parse().map_err(|_| malformed())?;
            let last: usize = last.parse().map_err(|_| malformed())?;
            if first > last || last >= CPUS_MAX {
                return Err(malformed());
            }
            cpus.extend(first..=last);
        }
        cpus.sort_unstable();
        cpus.dedup();
        Ok(CpuList(cpus))
    }
}

/// Two counts of buffers: `256,16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingBuffers {
    pub(super) small: u16,
    pub(super) large: u16,
}

impl FromStr for RingBuffers {
    type Err = Failure;

    fn from_str(text: &str) -> Result<RingBuffers> {
        let counts = text.split_once(',').and_then(|(small, large)| {
            Some(RingBuffers { small: small.parse().ok()?, large: large.parse().ok()? })
        });
        counts.ok_or_else(|| {
            Failure::new(format!("{text:?} is not two numbers of buffers such as 256,16"))
        })
    }
}

/// Peers by name, separated by commas; empty for none.
#[derive(Clone, Debug)]
pub(crate) struct PeerList(pub(crate) Vec<Peer>);

impl FromStr for PeerList {
    type Err = Failure;

    fn from_str(text: &str) -> Result<PeerList> {
        let names = text.split(',').filter(|name| !name.is_empty());
        names.map(str::parse).collect::<Result<_>>().map(PeerList)
    }
}

/// A server by name and address: `netpoll=127.0.0.1:8972`.
#[derive(Clone, Debug)]
pub(crate) struct PeerAddr {
    pub(crate) name: String,
    pub(crate) addrs: Vec<SocketAddr>,
}

impl FromStr for PeerAddr {
    type Err = Failure;

    fn from_str(text: &str) -> Result<PeerAddr> {
        let malformed = || Failure::new(format!("{text:?} is not a server as in NAME=HOST:PORT"));
        let (name, addr) = text.split_once('=').ok_or_else(malformed)?;
        let is_word = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || !name.chars().all(is_word) {
            return Err(malformed());
        }
        // Two rows of one name could not be told apart.
        if name == "ringpoll" || name.parse::<Peer>().is_ok() {
            return Err(Failure::new(format!("{name:?} is the name of a server of this program")));
        }
        Ok(PeerAddr { name: name.to_owned(), addrs: resolve(addr)? })
    }
}

/// A server of this program on another host: `HOST:PORT` where it tells what it is, else
/// `BACKEND=HOST:PORT` or `BACKEND/PLACEMENT=HOST:PORT`.
#[derive(Clone, Debug)]
pub(crate) struct ServerAddr {
    text: String,
    /// What it is said to be.
    pub(crate) named: Option<(Backend, Option<Placement>)>,
    pub(crate) addrs: Vec<SocketAddr>,
}

impl FromStr for ServerAddr {
    type Err = Failure;

    fn from_str(text: &str) -> Result<ServerAddr> {
        let (name, addr) =
            text.split_once('=').map_or((None, text), |(name, addr)| (Some(name), addr));
        let named = name.map(|name| {
            let (backend, placement) =
                name.split_once('/').map_or((name, None), |(name, rest)| (name, Some(rest)));
            let placement = placement.map(str::parse).transpose().map_err(Failure::at(text))?;
            Ok((backend.parse().map_err(Failure::at(text))?, placement))
        });
        let named = named.transpose()?;
        Ok(ServerAddr { text: text.to_owned(), named, addrs: resolve(addr)? })
    }
}

impl std::fmt::Display for ServerAddr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// A number of bytes: `1024`, `1k`, `16M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) u32);

impl FromStr for Bytes {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Bytes> {
        let (digits, shift) = match text.as_bytes().last() {
            Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
            Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
            _ => (text, 0),
        };
        let count = digits.parse::<u32>().ok().and_then(|count| count.checked_mul(1 << shift));
        count.filter(|bytes| *bytes <= BYTES_MAX).map(Bytes).ok_or_else(|| {
            Failure::new(format!("{text:?} is not a size such as 1024, 1k or 16M, up to 1024M"))
        })
    }
}

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The addresses a `HOST:PORT` stands for.
pub(crate) fn resolve(addr: &str) -> Result<Vec<SocketAddr>> {
    let wrong = |why: String| Failure::new(format!("bad address {addr:?}: {why}"));
    let (host, port) = addr.rsplit_once(':').ok_or_else(|| wrong("no port".into()))?;
    if host.is_empty() {
        return Err(wrong("no host".into()));
    }
    port.parse::<u16>().map_err(|_| wrong(format!("port {port:?} is not a number up to 65535")))?;
    let found: Vec<_> = addr.to_socket_addrs().map_err(|error| wrong(error.to_string()))?.collect();
    if found.is_empty() { Err(wrong("the host has no address".into())) } else { Ok(found) }
}

/// A host by name or address, as it stands before a port.
pub(super) fn host(text: &str) -> Result<String> {
    let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let is_host = match inner {
        Some(inner) => inner.parse::<Ipv6Addr>().is_ok(),
        None => {
            let is_word = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !text.is_empty() && text.chars().all(is_word)
        }
    };
    if is_host { Ok(text.to_owned()) } else { Err(Failure::new(format!("{text:?} is not a host"))) }
}

pub(super) fn duration(text: &str) -> Result<Duration> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let scale = match unit {
        "ms" => Some(1e-3),
        "" | "s" => Some(1.0),
        "m" => Some(60.0),
        _ => None,
    };
    let seconds = scale.zip(number.parse::<f64>().ok()).map(|(scale, number)| scale * number);
    seconds
        .filter(|seconds| (0.0..=SECONDS_MAX).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| Failure::new(format!("{text:?} is not a duration such as 10s, 500ms or 2m")))
}

pub(super) fn some_duration(text: &str) -> Result<Duration> {
    duration(text)?
        .checked_sub(Duration::from_millis(1))
        .map(|rest| rest + Duration::from_millis(1))
        .ok_or_else(|| Failure::new(format!("{text:?} is too short: 1ms is the least")))
}

pub(super) fn rate(text: &str) -> Result<f64> {
    let rate = text.parse::<f64>().ok().filter(|rate| (0.001..=1e9).contains(rate));
    rate.ok_or_else(|| Failure::new(format!("{text:?} is not a number of requests per second")))
}

/// A share: `1`, `0.5`, `100`.
pub(super) fn percent(text: &str) -> Result<f64> {
    let percent = text.parse::<f64>().ok().filter(|percent| (0.0..=100.0).contains(percent));
    percent.ok_or_else(|| Failure::new(format!("{text:?} is not a share of 0 to 100 percent")))
}

/// A number of things: `1000`, `50k`, `50M`.
pub(super) fn count(text: &str) -> Result<u64> {
    let (digits, scale) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1_000),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 1_000_000),
        _ => (text, 1),
    };
    let count = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(scale));
    count.filter(|count| *count > 0).ok_or_else(|| {
        Failure::new(format!("{text:?} is not a number such as 1000, 50k or 50M, at least 1"))
    })
}

pub(super) const FRAME_MAX: Bytes = Bytes(wire::FRAME_BYTES_MAX);
/// What `sched_setaffinity` takes in this program.
const CPUS_MAX: usize = 1024;
/// A gigabyte per frame: enough for every question, small enough for a laptop.
const BYTES_MAX: u32 = 1 << 30;
/// A week.
const SECONDS_MAX: f64 = 7.0 * 24.0 * 3600.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_read_as_people_write_them() {
        assert_eq!("0".parse::<CpuList>().unwrap().0, [0]);
        assert_eq!("3,0-2,1".parse::<CpuList>().unwrap().0, [0, 1, 2, 3]);
        for wrong in ["", "a", "2-1", "1-", "0,", "1-99999999999"] {
            assert!(wrong.parse::<CpuList>().is_err(), "{wrong:?}");
        }
        assert_eq!("256,16".parse::<RingBuffers>().unwrap(), RingBuffers { small: 256, large: 16 });
        for wrong in ["", "256", "256,", "256,x", "1,2,3", "70000,1"] {
            assert!(wrong.parse::<RingBuffers>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_server_by_address_has_a_name_of_its_own() {
        let peer: PeerAddr = "netpoll=127.0.0.1:80".parse().unwrap();
        assert_eq!(peer.name, "netpoll");
        assert_eq!(peer.addrs, [SocketAddr::from(([127, 0, 0, 1], 80))]);
        for wrong in ["127.0.0.1:80", "=127.0.0.1:80", "a b=127.0.0.1:80", "a=80", "tokio=[::1]:1"]
        {
            assert!(wrong.parse::<PeerAddr>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_server_elsewhere_has_a_name_or_tells_it() {
        let read = |text: &str| text.parse::<ServerAddr>().unwrap();
        assert_eq!(read("127.0.0.1:80").named, None);
        assert_eq!(read("epoll=127.0.0.1:80").named, Some((Backend::Epoll, None)));
        let inline = read("hybrid/inline=[::1]:80");
        assert_eq!(inline.named, Some((Backend::Hybrid, Some(Placement::Inline))));
        assert_eq!(inline.to_string(), "hybrid/inline=[::1]:80");
        for wrong in ["80", "=127.0.0.1:80", "kqueue=127.0.0.1:80", "epoll/=127.0.0.1:80"] {
            assert!(wrong.parse::<ServerAddr>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn sizes_and_durations_read_as_people_write_them() {
        assert_eq!("16M".parse::<Bytes>().unwrap().0, 16 << 20);
        assert_eq!("0".parse::<Bytes>().unwrap().0, 0);
        for wrong in ["", "k", "-1", "1G", "2000M", "4294967296"] {
            assert!(wrong.parse::<Bytes>().is_err(), "{wrong:?}");
        }
        assert_eq!(duration("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(duration("1.5s").unwrap(), Duration::from_millis(1500));
        assert_eq!(duration("2m").unwrap(), Duration::from_secs(120));
        for wrong in ["", "s", "1h", "-1s", "1e9s", "NaN", "99999999999m"] {
            assert!(duration(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn counts_read_as_people_write_them() {
        assert_eq!(count("50M").unwrap(), 50_000_000);
        assert_eq!(count("1").unwrap(), 1);
        for wrong in ["", "0", "M", "-1", "1.5k", "99999999999999999999", "9999999999999999M"] {
            assert!(count(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn shares_are_percent() {
        assert_eq!([percent("0").unwrap(), percent("0.5").unwrap()], [0.0, 0.5]);
        assert_eq!(percent("100").unwrap(), 100.0);
        for wrong in ["", "-1", "100.1", "1%", "NaN", "inf", "many"] {
            assert!(percent(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_bad_address_says_what_is_wrong() {
        assert!(resolve("nowhere").unwrap_err().to_string().contains("no port"));
        assert!(resolve("127.0.0.1:99999").unwrap_err().to_string().contains("99999"));
        assert!(resolve(":80").unwrap_err().to_string().contains("no host"));
        assert_eq!(resolve("127.0.0.1:80").unwrap(), [SocketAddr::from(([127, 0, 0, 1], 80))]);
    }
}
