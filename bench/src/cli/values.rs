//! What can stand behind a flag, and how people write it.

use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Failure, Result};
use crate::peers::Peer;
use crate::rpc::Protocol;
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
        let peers: Vec<Peer> = names.map(str::parse).collect::<Result<_>>()?;
        // A comparison sends the same to all.
        match peers.iter().find(|peer| peer.protocol() != Protocol::Frames) {
            Some(peer) => {
                let protocol = peer.protocol();
                Err(Failure::new(format!("peer {peer}: speaks {protocol}, the others frames")))
            }
            None => Ok(PeerList(peers)),
        }
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
