//! Two network namespaces of this host, joined by a pair of virtual cards.
//!
//! Made by the command `ip`, under names that are gone again before anything is measured: from then
//! on the namespaces live as long as this process and what it starts, whatever ends them. Only a
//! process that is killed while it makes them leaves names behind; the next one removes those.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::geteuid;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::{Failure, Result};

/// Holding it keeps both of them.
#[derive(Debug)]
pub(crate) struct Namespaces {
    server: File,
    client: File,
}

impl Namespaces {
    /// Makes both. The calling thread is in the client's from then on, and so is what it starts.
    pub(crate) fn enter() -> Result<Namespaces> {
        if !geteuid().is_root() {
            return Err(Failure::new("--namespaces: only root may make network namespaces"));
        }
        let made = Namespaces::make().map_err(Failure::at("--namespaces"))?;
        move_to(&made.client)?;
        Ok(made)
    }

    /// Does something where the servers are. A process lives where the thread was that started it.
    pub(crate) fn among_servers<T>(&self, act: impl FnOnce() -> T) -> Result<T> {
        move_to(&self.server)?;
        let done = act();
        move_to(&self.client)?;
        Ok(done)
    }

    fn make() -> Result<Namespaces> {
        let pid = std::process::id();
        remove_stale(pid)?;
        let [server, client] = SIDES.map(|side| Name(format!("{PREFIX}{pid}-{side}")));
        for name in [&server, &client] {
            ip(&["netns", "add", &name.0])?;
        }
        ip(&[
            &["link", "add", SIDES[0], "netns", &server.0, "type", "veth"][..],
            &["peer", "name", SIDES[1], "netns", &client.0],
        ]
        .concat())?;
        for (name, side, addr) in [(&server, SIDES[0], SERVER_IP), (&client, SIDES[1], CLIENT_IP)] {
            ip(&["-n", &name.0, "addr", "add", &format!("{addr}/{PREFIX_BITS}"), "dev", side])?;
            ip(&["-n", &name.0, "link", "set", side, "up"])?;
            ip(&["-n", &name.0, "link", "set", "lo", "up"])?;
        }
        let made = Namespaces { server: server.open()?, client: client.open()? };
        server.remove()?;
        client.remove()?;
        Ok(made)
    }
}

/// A namespace as `ip` knows it. Dropping it removes the name.
struct Name(String);

impl Name {
    fn open(&self) -> Result<File> {
        let path = Path::new(DIRECTORY).join(&self.0);
        File::open(&path).map_err(Failure::at(format!("open {}", path.display())))
    }

    fn remove(self) -> Result<()> {
        ip(&["netns", "del", &self.0])
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        // There is nothing to remove where it was never made, or is removed already.
        if Path::new(DIRECTORY).join(&self.0).exists() {
            let _ = ip(&["netns", "del", &self.0]);
        }
    }
}

/// Removes the names that a process left which was killed while it made them. Another process may
/// do the same at the same time.
fn remove_stale(own_pid: u32) -> Result<()> {
    // There is no such directory before the first namespace.
    let Ok(found) = fs::read_dir(DIRECTORY) else { return Ok(()) };
    let is_alive = |pid| pid != own_pid && Path::new(&format!("/proc/{pid}")).exists();
    for name in found.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        if maker(&name).is_some_and(|pid| !is_alive(pid)) {
            let removed = ip(&["netns", "del", &name]);
            if Path::new(DIRECTORY).join(&name).exists() {
                removed?;
            }
        }
    }
    Ok(())
}

/// The process that made a namespace of that name; `None`: not one of ours.
fn maker(name: &str) -> Option<u32> {
    let (pid, side) = name.strip_prefix(PREFIX)?.split_once('-')?;
    SIDES.contains(&side).then(|| pid.parse().ok())?
}

fn move_to(namespace: &File) -> Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(Failure::at("enter a network namespace"))
}

fn ip(args: &[&str]) -> Result<()> {
    let mut command = Command::new(IP);
    // Not cut short by an interrupt from the keyboard, which is for this process alone.
    command.args(args).stdin(Stdio::null()).process_group(0);
    let output = command.output().map_err(|error| match error.kind() {
        ErrorKind::NotFound => Failure::new("the command ip is missing, which iproute2 brings"),
        _ => Failure::new(format!("start {IP}: {error}")),
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let first = said.lines().next().unwrap_or("no word why");
    Err(Failure::new(format!("{IP} {}: {first}", args.join(" "))))
}

const IP: &str = "ip";
/// Where `ip` keeps the names.
const DIRECTORY: &str = "/var/run/netns";
/// What ours are called, before the number of the process and the side.
const PREFIX: &str = "ringpoll-";
/// Also the names of the cards.
const SIDES: [&str; 2] = ["server", "client"];
/// Nobody else is in there; RFC 2544 has these for benchmarks.
pub(crate) const SERVER_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 1));
const CLIENT_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 2));
const PREFIX_BITS: u32 = 30;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_names_carry_their_maker() {
        assert_eq!(maker("ringpoll-17-server"), Some(17));
        assert_eq!(maker("ringpoll-4-client"), Some(4));
        for other in ["ringpoll-17", "ringpoll-x-server", "ringpoll-17-other", "blue", ""] {
            assert_eq!(maker(other), None, "{other}");
        }
    }

    #[test]
    fn several_processes_may_remove_what_a_dead_one_left() {
        // Above what any process may have for a number.
        let stale: Vec<_> =
            (5_000_000..5_000_010).map(|pid| Name(format!("{PREFIX}{pid}-client"))).collect();
        for name in &stale {
            if let Err(failure) = ip(&["netns", "add", &name.0]) {
                return println!("left out: {failure}");
            }
        }
        std::thread::scope(|scope| {
            let removing = [(); 3].map(|()| scope.spawn(|| remove_stale(std::process::id())));
            for removed in removing.map(|thread| thread.join().unwrap()) {
                removed.unwrap();
            }
        });
        assert!(stale.iter().all(|name| !Path::new(DIRECTORY).join(&name.0).exists()));
    }

    #[test]
    fn what_ip_complains_about_is_told_with_its_arguments() {
        let said = ip(&["netns", "del", "ringpoll-0-nobody"]).unwrap_err().to_string();
        assert!(said.contains("missing") || said.contains("ringpoll-0-nobody: "), "{said}");
    }
}
