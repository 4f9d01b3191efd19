//! Settings of the io_uring engine whose kernel threads poll.

use std::fmt;
use std::time::Duration;

use crate::error::{Error, Result};

/// Shapes of the engine that have a name. Each is a backend name as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SqpollPreset {
    /// `uring-2`: for each poller a kernel thread that receives, and two that send, with a send
    /// ring for each CPU it serves.
    Uring2,
    /// `uring-4`: the same with four threads that send.
    Uring4,
    /// `sqpoll-config1`: for each poller a kernel thread that receives, and two that send, with 16
    /// send rings.
    Config1,
    /// `sqpoll-config2`: the poller receives by itself; two kernel threads send, with 16 send
    /// rings.
    Config2,
    /// `sqpoll-shared`: one kernel thread receives and sends for all pollers, each with one ring
    /// for both. The only one for few CPUs.
    Shared,
}

/// Settings of [`Backend::Sqpoll`](super::Backend::Sqpoll): rings that kernel threads poll, so that
/// a busy server makes no system calls. It pays with CPUs: a kernel thread that waits for work
/// takes as much as one that works.
///
/// For each poller there is a receive ring, and send rings that share kernel threads. A connection
/// is pinned to one send ring, chosen at random; whoever flushes puts the bytes there.
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
    /// The preset that suits the CPUs this process may use, and nothing changed.
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

    /// The shape to start from.
    #[must_use]
    pub const fn preset(mut self, preset: SqpollPreset) -> Self {
        self.preset = Some(preset);
        self
    }

    /// Send rings of each poller. Without this, one for each CPU that a poller serves, 20 at most;
    /// 16 in `sqpoll-config1` and `sqpoll-config2`. More of them are locked by fewer flushers at a
    /// time; fewer let a kernel thread take more from each. None, which is what `sqpoll-shared`
    /// has, means that sends go through the receive ring.
    #[must_use]
    pub const fn send_rings(mut self, count: u16) -> Self {
        self.send_rings = Some(count);
        self
    }

    /// Kernel threads of each poller that send. `sqpoll-shared` has one for everything.
    #[must_use]
    pub const fn send_threads(mut self, count: u16) -> Self {
        self.send_threads = Some(count);
        self
    }

    /// Entries of each send ring, rounded up to a power of two. Where they do not suffice, a flush
    /// sends by itself.
    #[must_use]
    pub const fn send_entries(mut self, count: u32) -> Self {
        self.send_entries = Some(count);
        self
    }

    /// How long a kernel thread polls without finding work before it sleeps, in whole
    /// milliseconds. To wake it takes a system call. Without this, 2 ms; 100 ms beside pollers that
    /// never sleep ([`PollMode::Always`](super::PollMode::Always)), as these save no CPU anyway,
    /// and where CPUs are shared the next work may be longer than 2 ms in coming.
    #[must_use]
    pub const fn idle(mut self, idle: Duration) -> Self {
        self.idle = Some(idle);
        self
    }

    /// The niceness of the kernel threads, -20 to 19; what is below 0 takes privileges. Without
    /// this it is the process's, but 10 where they share CPUs with pollers that sleep: then the
    /// poller gets its turn when there is something for it, and not when a kernel thread has polled
    /// in vain for the rest of its time slice.
    #[must_use]
    pub const fn nice(mut self, nice: i8) -> Self {
        self.nice = Some(nice);
        self
    }

    /// Makes the choice of send rings repeatable.
    #[must_use]
    pub const fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// What these settings mean on `cpus` CPUs, for each of `pollers`, which may `never_sleep`.
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
        // A thread without a ring would have nothing to poll.
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

/// Who takes what a receive ring is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Receiver {
    /// The poller, with each wait.
    Poller,
    /// A kernel thread of the poller's.
    OwnThread,
    /// A kernel thread that does everything, for all pollers.
    SharedThread,
}

/// An engine, worked out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SqpollPlan {
    pub(crate) preset: SqpollPreset,
    pub(crate) receiver: Receiver,
    /// 0: sends go through the receive ring.
    pub(crate) send_rings: u16,
    /// Beside the receiver's.
    pub(crate) send_threads: u16,
    pub(crate) send_entries: u32,
    pub(crate) idle_ms: u32,
    /// `None` is the process's.
    pub(crate) nice: Option<i8>,
    pub(crate) seed: Option<u64>,
    /// Where each kernel thread is to run, in turn; empty is anywhere.
    pub(crate) cpus: Vec<usize>,
}

impl SqpollPlan {
    /// The plan of one poller: its kernel threads get the CPUs after those of the pollers before.
    pub(crate) fn of_poller(&self, index: usize) -> SqpollPlan {
        let mut plan = self.clone();
        if !plan.cpus.is_empty() && plan.receiver != Receiver::SharedThread {
            let taken = index * self.threads(1);
            plan.cpus.rotate_left(taken % self.cpus.len());
        }
        plan
    }

    /// Kernel threads of `pollers` together.
    pub(crate) fn threads(&self, pollers: usize) -> usize {
        match self.receiver {
            Receiver::Poller => pollers * usize::from(self.send_threads),
            Receiver::OwnThread => pollers * (1 + usize::from(self.send_threads)),
            Receiver::SharedThread => 1,
        }
    }

    /// CPUs that give each thread its own, and the handlers one more.
    fn wanted_cpus(&self, pollers: usize) -> usize {
        self.threads(pollers) + pollers + 1
    }

    /// Kernel threads have to share CPUs.
    fn is_crowded(&self, cpus: usize, pollers: usize) -> bool {
        cpus < self.wanted_cpus(pollers)
    }

    /// What to expect where there are too few CPUs, if there are.
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
    /// All of them.
    pub const ALL: [SqpollPreset; 5] = [
        SqpollPreset::Uring2,
        SqpollPreset::Uring4,
        SqpollPreset::Config1,
        SqpollPreset::Config2,
        SqpollPreset::Shared,
    ];

    /// The one that leaves CPUs to the handlers. Kernel threads that share a CPU cost more than
    /// they save, so each one gets its own.
    fn for_cpus(cpus: usize, pollers: usize) -> SqpollPreset {
        // Of each poller: itself, its kernel threads, and as much again for the handlers.
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

/// The preset's name, or `sqpoll` where none was chosen.
impl fmt::Display for SqpollOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.preset.map_or("sqpoll", SqpollPreset::name))
    }
}

/// How long a kernel thread polls in vain before it sleeps.
const IDLE: Duration = Duration::from_millis(2);

/// The same beside pollers that never sleep.
const IDLE_BESIDE_SPINNING: Duration = Duration::from_millis(100);

/// Of kernel threads that share CPUs with pollers. With 100 connections, one thread for everything
/// and the poller on one CPU, 0, 5, 8, 12 and 19 served 0.80, 0.88, 0.92, 0.92 and 0.91 of what
/// the poller does without it, and the P99 fell from 3.4 ms to 0.5 ms at 5.
const CROWDED_NICE: i8 = 10;

/// A kernel thread that polls for longer without work is a mistake.
const IDLE_MS_MAX: u32 = 60_000;

/// One for each CPU up to here: a poller serves no more.
const SEND_RINGS_AUTO_MAX: u16 = super::CPUS_PER_POLLER as u16;

/// Of the two configurations that were published with figures.
const CONFIG_SEND_RINGS: u16 = 16;

/// Each takes descriptors and memory, and a look in every round.
const SEND_RINGS_MAX: u16 = 256;

const SEND_THREADS_MAX: u16 = 64;

/// Of each ring that takes sends: four rounds of a poller, which may keep a kernel thread on the
/// same CPU from taking any meanwhile.
const SEND_ENTRIES: u32 = 1024;

/// Completions that a send ring has room for. More of them between two rounds of the poller cost
/// a system call.
pub(crate) const SEND_COMPLETIONS: u32 = 4096;

/// The kernel's own bound (`IORING_MAX_ENTRIES`).
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
