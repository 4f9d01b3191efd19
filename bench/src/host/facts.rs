//! What else a figure depends on: the machine under the kernel, and what the kernel lets this
//! process do.

use std::fs;

use ringpoll::Capabilities;
use serde::Serialize;

use super::read_line;

/// What the kernel does against a flaw of the CPU.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Mitigation {
    pub(crate) flaw: String,
    pub(crate) state: String,
}

/// All that the kernel names, in the order of their names.
pub(crate) fn mitigations() -> Vec<Mitigation> {
    let dir = "/sys/devices/system/cpu/vulnerabilities";
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut all: Vec<_> = names
        .filter_map(|flaw| Some(Mitigation { state: read_line(&format!("{dir}/{flaw}"))?, flaw }))
        .collect();
    all.sort_by(|a, b| a.flaw.cmp(&b.flaw));
    all
}

/// The states in a line: what costs time is named.
pub(crate) fn mitigations_in_short(all: &[Mitigation]) -> String {
    if all.is_empty() {
        return "unknown".to_owned();
    }
    let with = |start: &str| {
        let of = all.iter().filter(|one| one.state.starts_with(start));
        of.map(|one| one.flaw.as_str()).collect::<Vec<_>>()
    };
    let (active, open) = (with("Mitigation"), with("Vulnerable"));
    let named = |what: &str, names: &[&str]| match names {
        [] => format!("{what}: none"),
        names => format!("{what}: {}", names.join(", ")),
    };
    let rest = all.len() - active.len() - open.len();
    let (active, open) = (named("active", &active), named("vulnerable", &open));
    format!("{active}; {open}; not affected: {rest}")
}

/// What this process may do beyond what every process may.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Privileges {
    pub(crate) root: bool,
    pub(crate) net_admin: bool,
    pub(crate) sys_nice: bool,
}

impl Privileges {
    pub(crate) fn read() -> Privileges {
        Privileges::of(&fs::read_to_string("/proc/self/status").unwrap_or_default())
    }

    fn of(status: &str) -> Privileges {
        let value = |key: &str| status.lines().find_map(|line| line.strip_prefix(key));
        let effective = value("CapEff:").and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
        let has = |bit: u32| effective.is_some_and(|bits| bits & (1 << bit) != 0);
        // Real, effective, saved, of the file system.
        let user = value("Uid:").and_then(|text| text.split_whitespace().nth(1));
        Privileges {
            root: user == Some("0"),
            net_admin: has(CAP_NET_ADMIN),
            sys_nice: has(CAP_SYS_NICE),
        }
    }

    pub(crate) fn in_short(&self) -> String {
        let with = |has: bool| if has { "with" } else { "without" };
        let user = if self.root { "root" } else { "an ordinary user" };
        format!(
            "{user}, {} CAP_NET_ADMIN, {} CAP_SYS_NICE",
            with(self.net_admin),
            with(self.sys_nice)
        )
    }
}

/// What the probe of the library finds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Rings {
    pub(crate) tier: Option<String>,
    pub(crate) reason: String,
    /// 0: for all, 1: for some, 2: for nobody; `None` before Linux 6.6.
    pub(crate) disabled_sysctl: Option<u32>,
    pub(crate) sqpoll: bool,
    pub(crate) sqpoll_reason: String,
    pub(crate) offered: Vec<&'static str>,
    pub(crate) missing: Vec<&'static str>,
}

impl Rings {
    pub(crate) fn probe() -> Rings {
        let found = ringpoll::capabilities();
        let (offered, missing): (Vec<_>, Vec<_>) =
            features(found).into_iter().partition(|(_, offered)| *offered);
        let names = |list: Vec<(&'static str, bool)>| list.into_iter().map(|(name, _)| name);
        Rings {
            tier: found.tier.map(|tier| tier.to_string()),
            reason: found.reason.clone(),
            disabled_sysctl: read_line("/proc/sys/kernel/io_uring_disabled")
                .and_then(|text| text.parse().ok()),
            sqpoll: found.sqpoll,
            sqpoll_reason: found.sqpoll_reason.clone(),
            offered: names(offered).collect(),
            missing: names(missing).collect(),
        }
    }
}

/// What a ring may have beyond its tier, and whether it does.
pub(crate) fn features(found: &Capabilities) -> [(&'static str, bool); 7] {
    [
        ("no sq array", found.no_sq_array),
        ("no iowait", found.no_iowait),
        ("receive bundles", found.receive_bundles),
        ("incremental buffers", found.incremental_buffers),
        ("zero-copy send", found.zero_copy_send),
        ("zero-copy reports", found.zero_copy_reports),
        ("napi busy poll", found.napi_busy_poll),
    ]
}

pub(crate) fn memory_bytes() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Whether a hypervisor is below, and whose where the firmware tells.
pub(crate) fn virtualization() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut flags = info.lines().filter(|line| line.starts_with("flags"));
    let is_guest = flags.any(|line| line.split_whitespace().any(|flag| flag == "hypervisor"));
    let firmware = ["sys_vendor", "product_name"]
        .iter()
        .filter_map(|name| read_line(&format!("/sys/class/dmi/id/{name}")))
        .collect::<Vec<_>>()
        .join(" ");
    match (is_guest, firmware.is_empty()) {
        (true, true) => "a virtual machine".to_owned(),
        (true, false) => format!("a virtual machine ({firmware})"),
        (false, true) => "no hypervisor seen".to_owned(),
        (false, false) => format!("no hypervisor seen ({firmware})"),
    }
}

pub(crate) fn clock_source() -> Option<String> {
    read_line("/sys/devices/system/clocksource/clocksource0/current_clocksource")
}

/// The model that is in force where the kernel tells it (to root), else what it was built with.
pub(crate) fn preemption() -> Option<String> {
    let in_force = read_line("/sys/kernel/debug/sched/preempt").and_then(|line| {
        let (_, rest) = line.split_once('(')?;
        Some(rest.split_once(')')?.0.to_owned())
    });
    let built = read_line("/proc/sys/kernel/version").map(|version| built_with(&version));
    match (in_force, built) {
        (Some(model), Some(built)) => Some(format!("{model} ({built})")),
        (model, built) => model.or(built),
    }
}

fn built_with(version: &str) -> String {
    let word = version.split_whitespace().find(|word| word.starts_with("PREEMPT"));
    word.unwrap_or("no PREEMPT in the kernel's version").to_owned()
}

pub(crate) fn frequency_governor() -> Option<String> {
    read_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
}

/// Whether CPUs share cores.
pub(crate) fn smt_active() -> Option<bool> {
    read_line("/sys/devices/system/cpu/smt/active").map(|text| text == "1")
}

/// `linux/capability.h`.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_NICE: u32 = 23;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mitigations_that_cost_are_named_and_the_rest_is_counted() {
        let of = |flaw: &str, state: &str| Mitigation { flaw: flaw.into(), state: state.into() };
        let all = [
            of("meltdown", "Not affected"),
            of("retbleed", "Mitigation: untrained return thunk"),
            of("spectre_v2", "Mitigation: Retpolines"),
            of("tsa", "Vulnerable: no microcode"),
        ];
        let short = mitigations_in_short(&all);
        assert_eq!(short, "active: retbleed, spectre_v2; vulnerable: tsa; not affected: 1");
        assert!(mitigations_in_short(&all[..1]).starts_with("active: none; vulnerable: none"));
        assert_eq!(mitigations_in_short(&[]), "unknown");
    }

    #[test]
    fn privileges_are_those_in_force() {
        let nice =
            Privileges::of("Uid:\t0\t1000\t0\t0\nCapPrm:\tffff\nCapEff:\t0000000000800000\n");
        assert_eq!((nice.root, nice.net_admin, nice.sys_nice), (false, false, true));
        let root = Privileges::of("Uid:\t1000\t0\t0\t0\nCapEff:\t000001fffeffffff\n");
        assert_eq!((root.root, root.net_admin, root.sys_nice), (true, true, true));
        let none = Privileges::of("");
        assert_eq!((none.root, none.net_admin, none.sys_nice), (false, false, false));
        assert_eq!(
            none.in_short(),
            "an ordinary user, without CAP_NET_ADMIN, without CAP_SYS_NICE"
        );
    }

    #[test]
    fn a_kernel_says_in_its_version_how_it_was_built() {
        assert_eq!(built_with("#1 SMP PREEMPT_DYNAMIC @0"), "PREEMPT_DYNAMIC");
        assert!(built_with("#1 SMP Debian").starts_with("no PREEMPT"));
    }
}
