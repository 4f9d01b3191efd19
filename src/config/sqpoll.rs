//! Settings of the backend `sqpoll`, whose kernel threads poll submission queues.

use std::fmt;
use std::time::Duration;

use crate::error::{Error, Result};

/// Named settings of `sqpoll`. Each name is a backend name too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SqpollPreset {
    /// `uring-2`: each poller has one kernel thread that receives, two kernel threads that send,
    /// and a send ring for each CPU that the poller serves.
    Uring2,
    /// `uring-4`: as `uring-2`, with four kernel threads that send.
    Uring4,
    /// `sqpoll-config1`: each poller has one kernel thread that receives, two kernel threads that
    /// send, and 16 send rings.
    Config1,
    /// `sqpoll-config2`: each poller receives by itself, and has two kernel threads that send and
    /// 16 send rings.
    Config2,
    /// `sqpoll-shared`: one kernel thread receives and sends for all pollers. Each poller has one
    /// ring for both. The only preset for few CPUs.
    Shared,
}

/// Settings of [`Backend::Sqpoll`](super::Backend::Sqpoll): kernel threads poll the rings, so that
/// a busy server makes no system calls. This costs CPUs: a kernel thread that polls without work
/// uses a whole CPU.
///
/// Each poller has a receive ring, and send rings that share kernel threads. A connection always
/// uses the same send ring, chosen at random. A flush puts the bytes there on its own thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SqpollOptions {
    preset: Option<SqpollPreset>,
    send_rings: Option<u16>,
    send_threads: Option<u16>,
    send_entries: Option<u32>,
    idle: Option<Duration>,
    nice: Option<i8>,
    seed: Option<u64>,
}

impl SqpollOptions {
    /// The preset that suits the CPUs of this process, with its own values.
    #[must_use]
    pub const fn new() -> SqpollOptions {
        SqpollOptions {
            preset: None,
            send_rings: None,
            send_threads: None,
            send_entries: None,
            idle: None,
            nice: None,
            seed: None,
        }
    }

    /// The preset whose values hold where nothing else is set.
    #[must_use]
    pub const fn preset(mut self, preset: SqpollPreset) -> Self {
        self.preset = Some(preset);
        self
    }

    /// Send rings of each poller, 256 at most. The default is one for each CPU that a poller
    /// serves, 20 at most; 16 in `sqpoll-config1` and `sqpoll-config2`; 0 in `sqpoll-shared`. With
    /// more rings, flushes wait less for each other's lock. With fewer rings, a kernel thread takes
    /// more sends at a time. With 0, which only `sqpoll-shared` allows, sends use the receive ring.
    #[must_use]
    pub const fn send_rings(mut self, count: u16) -> Self {
        self.send_rings = Some(count);
        self
    }

    /// Kernel threads of each poller that send, 1 to 64. `sqpoll-shared` refuses this setting: it
    /// has one kernel thread in all.
    #[must_use]
    pub const fn send_threads(mut self, count: u16) -> Self {
        self.send_threads = Some(count);
        self
    }

    /// Entries of each send ring, rounded up to a power of two. A flush that finds its ring full
    /// sends with a system call.
    #[must_use]
    pub const fn send_entries(mut self, count: u32) -> Self {
        self.send_entries = Some(count);
        self
    }

    /// How long a kernel thread polls without finding work before it sleeps, in whole milliseconds,
    /// 60 s at most. Waking it takes a system call. The default is 2 ms, and 100 ms beside pollers
    /// that never sleep ([`PollMode::Always`](super::PollMode::Always)): those use their CPUs
    /// anyway, and on shared CPUs more than 2 ms may pass before the next work.
    #[must_use]
    pub const fn idle(mut self, idle: Duration) -> Self {
        self.idle = Some(idle);
        self
    }

    /// The niceness of the kernel threads, -20 to 19. Values below 0 need privileges. The default
    /// is the niceness of the process, and 10 where kernel threads share CPUs with pollers that
    /// sleep. A poller that wakes then preempts a kernel thread that polls without work.
    #[must_use]
    pub const fn nice(mut self, nice: i8) -> Self {
        self.nice = Some(nice);
        self
    }

    /// Makes the random choice of send rings repeatable.
    #[must_use]
    pub const fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// The engine that these settings ask for, for `pollers` pollers on `cpus` CPUs.
    ///
    /// # Errors
    /// Invalid: settings that contradict each other, or that no kernel accepts.
    pub(crate) fn plan(
        &self,
        cpus: usize,
        pollers: usize,
        never_sleeps: bool,
    ) -> Result<SqpollPlan> {
        let preset = self.preset.unwrap_or_else(|| SqpollPreset::for_cpus(cpus, pollers));
        let own_rings = cpus.div_ceil(pollers.max(1)).clamp(1, SEND_RINGS_AUTO_MAX.into()) as u16;
        let (receiver, rings, threads) = match preset {
            SqpollPreset::Uring2 => (Receiver::OwnThread, own_rings, 2),
            SqpollPreset::Uring4 => (Receiver::OwnThread, own_rings, 4),
            SqpollPreset::Config1 => (Receiver::OwnThread, CONFIG_SEND_RINGS, 2),
            SqpollPreset::Config2 => (Receiver::Poller, CONFIG_SEND_RINGS, 2),
            SqpollPreset::Shared => (Receiver::SharedThread, 0, 0),
        };
        let is_shared = receiver == Receiver::SharedThread;
        let send_rings = self.send_rings.unwrap_or(rings);
        // A kernel thread needs a ring to poll.
        let send_threads = self.send_threads.unwrap_or(threads).min(send_rings.max(1));
        if is_shared && self.send_threads.is_some() {
            return Err(Error::invalid(format!("{preset}: one thread does everything")));
        }
        if send_rings > SEND_RINGS_MAX || (send_rings == 0 && !is_shared) {
            let least = u16::from(!is_shared);
            return Err(Error::invalid(format!(
                "{preset}: {send_rings} send rings: choose {least} to {SEND_RINGS_MAX}"
            )));
        }
        if self.send_threads.is_some_and(|count| !(1..=SEND_THREADS_MAX).contains(&count)) {
            return Err(Error::invalid(format!(
                "{preset}: choose 1 to {SEND_THREADS_MAX} threads that send"
            )));
        }
        let send_entries = self.send_entries.unwrap_or(SEND_ENTRIES);
        if !(1..=SEND_ENTRIES_MAX).contains(&send_entries) {
            return Err(Error::invalid(format!(
                "{preset}: {send_entries} send entries: choose 1 to {SEND_ENTRIES_MAX}"
            )));
        }
        let idle = self.idle.unwrap_or(if never_sleeps { IDLE_BESIDE_SPINNING } else { IDLE });
        let idle_ms = u32::try_from(idle.as_millis()).unwrap_or(u32::MAX);
        if !(1..=IDLE_MS_MAX).contains(&idle_ms) {
            return Err(Error::invalid(format!(
                "{preset}: an idle time of {idle:?}: choose 1 ms to {IDLE_MS_MAX} ms"
            )));
        }
        if self.nice.is_some_and(|nice| !(-20..=19).contains(&nice)) {
            return Err(Error::invalid(format!("{preset}: choose a niceness of -20 to 19")));
        }
        let mut plan = SqpollPlan {
            preset,
            receiver,
            send_rings,
            send_threads,
            send_entries,
            idle_ms,
            nice: self.nice,
            seed: self.seed,
            cpus: Vec::new(),
        };
        if !never_sleeps && plan.is_crowded(cpus, pollers) {
            plan.nice = plan.nice.or(Some(CROWDED_NICE));
        }
        Ok(plan)
    }
}

/// Which thread takes the submissions of a receive ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Receiver {
    /// The poller, with each wait.
    Poller,
    /// A kernel thread of the poller.
    OwnThread,
    /// The one kernel thread, which receives and sends for all pollers.
    SharedThread,
}

/// The values of every setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SqpollPlan {
    pub(crate) preset: SqpollPreset,
    pub(crate) receiver: Receiver,
    /// 0: sends use the receive ring.
    pub(crate) send_rings: u16,
    /// Without the kernel thread that receives.
    pub(crate) send_threads: u16,
    pub(crate) send_entries: u32,
    pub(crate) idle_ms: u32,
    /// `None`: the niceness of the process.
    pub(crate) nice: Option<i8>,
    pub(crate) seed: Option<u64>,
    /// The CPU of each kernel thread, in order. Empty: any CPU.
    pub(crate) cpus: Vec<usize>,
}

impl SqpollPlan {
    /// The plan of one poller. Its kernel threads get the CPUs after those of the previous pollers.
    pub(crate) fn of_poller(&self, index: usize) -> SqpollPlan {
        let mut plan = self.clone();
        if !plan.cpus.is_empty() && plan.receiver != Receiver::SharedThread {
            let taken = index * self.threads(1);
            plan.cpus.rotate_left(taken % self.cpus.len());
        }
        plan
    }

    /// The number of kernel threads of `pollers` pollers.
    pub(crate) fn threads(&self, pollers: usize) -> usize {
        match self.receiver {
            Receiver::Poller => pollers * usize::from(self.send_threads),
            Receiver::OwnThread => pollers * (1 + usize::from(self.send_threads)),
            Receiver::SharedThread => 1,
        }
    }

    /// The number of CPUs with one for each thread, and one for the handlers.
    fn wanted_cpus(&self, pollers: usize) -> usize {
        self.threads(pollers) + pollers + 1
    }

    /// Kernel threads share CPUs.
    fn is_crowded(&self, cpus: usize, pollers: usize) -> bool {
        cpus < self.wanted_cpus(pollers)
    }

    /// A warning where there are too few CPUs.
    pub(crate) fn warning(&self, cpus: usize, pollers: usize, has_quota: bool) -> Option<String> {
        let threads = self.threads(pollers);
        let preset = self.preset;
        if has_quota {
            return Some(format!(
                "{preset}: {threads} kernel threads poll, and their polling counts against the \
                 CPU quota: backend uring does more with it"
            ));
        }
        if !self.is_crowded(cpus, pollers) {
            return None;
        }
        let wanted = self.wanted_cpus(pollers);
        let count = |number: usize, what: &str| match number {
            1 => format!("1 {what}"),
            _ => format!("{number} {what}s"),
        };
        let crowd = format!(
            "{preset}: {} and {} on {}",
            count(threads, "kernel thread"),
            count(pollers, "poller"),
            count(cpus, "CPU")
        );
        Some(if self.receiver == Receiver::SharedThread {
            format!("{crowd}: polling takes time from the handlers; expect no more than of uring")
        } else {
            format!(
                "{crowd}: threads that share a CPU wait for each other, up to a scheduler tick at \
                 each hop; expect a fraction of what uring or sqpoll-shared do, unless there are \
                 {wanted} CPUs"
            )
        })
    }
}

impl SqpollPreset {
    /// Every preset.
    pub const ALL: [SqpollPreset; 5] = [
        SqpollPreset::Uring2,
        SqpollPreset::Uring4,
        SqpollPreset::Config1,
        SqpollPreset::Config2,
        SqpollPreset::Shared,
    ];

    /// The preset that leaves CPUs for the handlers. Kernel threads that share a CPU cost more than
    /// they save, so each kernel thread needs a CPU.
    fn for_cpus(cpus: usize, pollers: usize) -> SqpollPreset {
        // CPUs of each poller: for itself and its kernel threads, and as many for the handlers.
        match cpus / pollers.max(1) {
            0..=5 => SqpollPreset::Shared,
            6..=7 => SqpollPreset::Config2,
            _ => SqpollPreset::Uring2,
        }
    }

    fn name(self) -> &'static str {
        match self {
            SqpollPreset::Uring2 => "uring-2",
            SqpollPreset::Uring4 => "uring-4",
            SqpollPreset::Config1 => "sqpoll-config1",
            SqpollPreset::Config2 => "sqpoll-config2",
            SqpollPreset::Shared => "sqpoll-shared",
        }
    }
}

impl fmt::Display for SqpollPreset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The preset's name, or `sqpoll` without a preset.
impl fmt::Display for SqpollOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.preset.map_or("sqpoll", SqpollPreset::name))
    }
}

/// How long a kernel thread polls without finding work before it sleeps.
const IDLE: Duration = Duration::from_millis(2);

/// [`IDLE`] beside pollers that never sleep.
const IDLE_BESIDE_SPINNING: Duration = Duration::from_millis(100);

/// The niceness of kernel threads that share CPUs with pollers. With 100 connections, and one
/// kernel thread and one poller on one CPU, a niceness of 0, 5, 8, 12 and 19 served 0.80, 0.88,
/// 0.92, 0.92 and 0.91 of the requests that `uring` served. The P99 fell from 3.4 ms at 0 to 0.5 ms
/// at 5.
const CROWDED_NICE: i8 = 10;

/// The longest idle time. A longer one is most likely a mistake.
const IDLE_MS_MAX: u32 = 60_000;

/// The most send rings by default: one for each CPU that a poller serves.
const SEND_RINGS_AUTO_MAX: u16 = super::CPUS_PER_POLLER as u16;

/// The send rings of the two configurations that were published with figures.
const CONFIG_SEND_RINGS: u16 = 16;

/// Each send ring takes descriptors and memory, and the poller looks at it in every round.
const SEND_RINGS_MAX: u16 = 256;

const SEND_THREADS_MAX: u16 = 64;

/// Entries of each ring that takes sends: the sends of four rounds. A poller on the CPU of the
/// kernel thread may run that long before the kernel thread takes any.
const SEND_ENTRIES: u32 = 1024;

/// Completions that fit a send ring. More completions between two rounds of the poller cost a
/// system call.
pub(crate) const SEND_COMPLETIONS: u32 = 4096;

/// The kernel's bound (`IORING_MAX_ENTRIES`).
const SEND_ENTRIES_MAX: u32 = super::uring::SUBMISSION_ENTRIES_MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_presets_are_what_was_published() {
        let shape = |preset, cpus, pollers| {
            let plan = SqpollOptions::new().preset(preset).plan(cpus, pollers, false).unwrap();
            (plan.receiver, plan.send_rings, plan.send_threads, plan.threads(pollers))
        };
        assert_eq!(shape(SqpollPreset::Uring2, 20, 1), (Receiver::OwnThread, 20, 2, 3));
        assert_eq!(shape(SqpollPreset::Uring4, 40, 2), (Receiver::OwnThread, 20, 4, 10));
        assert_eq!(shape(SqpollPreset::Config1, 2, 1), (Receiver::OwnThread, 16, 2, 3));
        assert_eq!(shape(SqpollPreset::Config2, 2, 1), (Receiver::Poller, 16, 2, 2));
        assert_eq!(shape(SqpollPreset::Shared, 2, 2), (Receiver::SharedThread, 0, 0, 1));
    }

    #[test]
    fn few_cpus_get_one_thread_for_everything() {
        let chosen =
            |cpus, pollers| SqpollOptions::new().plan(cpus, pollers, false).unwrap().preset;
        assert_eq!(chosen(1, 1), SqpollPreset::Shared);
        assert_eq!(chosen(4, 1), SqpollPreset::Shared);
        assert_eq!(chosen(6, 1), SqpollPreset::Config2);
        assert_eq!(chosen(20, 1), SqpollPreset::Uring2);
        assert_eq!(chosen(20, 20), SqpollPreset::Shared);
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        let refused = |options: SqpollOptions| options.plan(4, 1, false).unwrap_err().is_invalid();
        let config1 = SqpollOptions::new().preset(SqpollPreset::Config1);
        assert!(refused(config1.send_rings(0)));
        assert!(refused(config1.send_rings(SEND_RINGS_MAX + 1)));
        assert!(refused(config1.send_threads(0)));
        assert!(refused(config1.send_threads(SEND_THREADS_MAX + 1)));
        assert!(refused(config1.send_entries(0)));
        assert!(refused(config1.idle(Duration::from_micros(999))));
        assert!(refused(config1.idle(Duration::from_secs(3600))));
        let shared = SqpollOptions::new().preset(SqpollPreset::Shared);
        assert!(refused(shared.send_threads(2)));
        assert_eq!(shared.send_rings(3).plan(4, 1, false).unwrap().send_rings, 3);
    }

    #[test]
    fn kernel_threads_that_share_cpus_make_way_for_pollers_that_sleep() {
        let nice = |options: SqpollOptions, cpus, never_sleeps| {
            options.plan(cpus, 1, never_sleeps).unwrap().nice
        };
        let shared = SqpollOptions::new().preset(SqpollPreset::Shared);
        assert_eq!(nice(shared, 2, false), Some(CROWDED_NICE));
        assert_eq!(nice(shared, 2, true), None);
        assert_eq!(shared.plan(2, 1, false).unwrap().idle_ms, 2);
        assert_eq!(shared.plan(2, 1, true).unwrap().idle_ms, 100);
        assert_eq!(nice(shared, 3, false), None);
        assert_eq!(nice(shared.nice(3), 2, false), Some(3));
        assert_eq!(nice(shared.nice(0), 2, false), Some(0));
        assert!(shared.nice(20).plan(2, 1, false).unwrap_err().is_invalid());
    }

    #[test]
    fn what_lacks_cpus_is_warned_of() {
        let warning = |preset, cpus, has_quota| {
            let plan = SqpollOptions::new().preset(preset).plan(cpus, 1, false).unwrap();
            plan.warning(cpus, 1, has_quota)
        };
        assert!(warning(SqpollPreset::Config1, 2, false).unwrap().contains("5 CPUs"));
        assert!(warning(SqpollPreset::Shared, 2, false).is_some());
        assert_eq!(warning(SqpollPreset::Shared, 3, false), None);
        assert_eq!(warning(SqpollPreset::Config1, 5, false), None);
        assert!(warning(SqpollPreset::Config1, 64, true).unwrap().contains("quota"));
    }
}
