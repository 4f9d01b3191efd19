//! What decides where handlers run under [`Placement::Auto`](crate::Placement), and when a poller
//! is relieved.

use std::time::Duration;

/// Over how long run times are gathered before it is decided where handlers run.
pub(crate) const PLACEMENT_WINDOW: Duration = Duration::from_millis(20);

/// Calm windows before handlers come back to the poller. With the one in which they ended to be
/// long, that is well within 100 ms.
pub(crate) const CALM_WINDOWS: u32 = 3;

/// Where handlers had to leave again within [`CALM_PROVEN`], twice as many windows have to be calm
/// as the last time, up to so many, half a second: a few long runs in a second, with calm windows
/// between them, would have handlers go back and forth.
pub(crate) const CALM_WINDOWS_MAX: u32 = 25;

/// Handlers that have been on the poller for so long were rightly there.
pub(crate) const CALM_PROVEN: Duration = Duration::from_millis(200);

/// Handlers leave the poller when they delay others by more than so many wake-ups; they come back
/// when that is less than one. A run includes its flush, which with epoll is a system call.
pub(crate) const DELAY_WAKES_MAX: u64 = 2;

/// Runs of so many wake-ups hold up a poller: whoever waits for one would rather have woken a
/// worker.
pub(crate) const LONG_WAKES: u64 = 16;

/// Shorter runs never do: a connection that has sent many small requests has them answered in one
/// run.
pub(crate) const HELD_UP_NS_MIN: u64 = 200_000;

/// Handlers leave the poller as well where such runs hold it up for more than this share of the
/// time, in millionths; they come back below half of it. On two CPUs, with 4,000 requests a second
/// of which 1 % take a millisecond, the P99 of the others is 0.2 ms on workers and 0.8 on pollers,
/// although the mean delay is no more than a wake-up.
pub(crate) const HELD_UP_PPM_MAX: u64 = 10_000;

/// While CPUs are short: runs that differ by no more, as the variance over the square of the mean,
/// are of one length. Those of a handler that always computes for 100 µs differed by a tenth.
pub(crate) const ALIKE_VARIANCE: f64 = 0.25;

/// Long runs that need not count, at most, in one window: a host that takes the CPU away for a
/// while does so a few times in a second, and seldom more often in a window.
pub(crate) const PARDONS_MAX: u32 = 2;

/// Windows after which one more of them need not count.
pub(crate) const WINDOWS_PER_PARDON: u32 = 10;

/// How often somebody looks whether pollers that are awake stand still. Measured with 1 KB echoes:
/// every millisecond takes 0.7 % of a CPU, this 0.2 %.
pub(crate) const STALL_TICK: Duration = Duration::from_millis(4);

/// A poller that was found to stand still is looked at again after so long; one that has stood
/// still for all of that while it ran a handler is held up, and relieved of what it has not come
/// to.
pub(crate) const STALL_TICK_OF_SUSPECT: Duration = Duration::from_millis(1);

/// How often somebody looks while no handlers run on pollers.
pub(crate) const STALL_TICK_OF_POOL: Duration = Duration::from_millis(20);

/// After so many ticks in which every poller slept it sleeps as well, until one is awake.
pub(crate) const STALL_TICKS_IDLE: u32 = 20;

/// Commands that a poller that is held up is relieved of at once.
pub(crate) const RELIEF_COMMANDS_MAX: usize = 1024;

/// Runs that a thread counts for itself before it tells.
pub(crate) const RUNS_PER_TALLY: u32 = 64;

/// A run that is told at once, and one whose time on the wall is checked against what became of its
/// thread's time. Shorter ones are not worth the system calls, even where they were interrupted.
pub(crate) const LONG_RUN_NS: u64 = 50_000;

/// A part of a run that takes less is not one: it was about to begin.
pub(crate) const PART_NS_MIN: u64 = 2_000;

/// How old the figure may be that a long run's waiting is counted from: what its thread waited
/// between then and the run is taken off as well.
pub(crate) const STARVED_REFRESH: Duration = Duration::from_millis(1);

/// What a wake-up costs where it cannot be measured; what is measured is believed within a factor
/// of five.
pub(crate) const WAKE_NS_GUESS: u64 = 5_000;

/// Wake-ups measured at the start: less than a millisecond's worth.
pub(crate) const WAKE_TRIALS: usize = 50;
