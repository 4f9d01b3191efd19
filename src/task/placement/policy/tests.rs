//! Decisions of the policy, window by window.

use std::cell::Cell;
use std::thread;
use std::time::Instant;

use super::super::measurement::{CHECKED_NS_MIN, Spent};
use super::*;

const WINDOW_NS: u64 = WINDOW.as_nanos() as u64;

const IDLE: Host = Host {
    begin: || {},
    let_finish: |_| {},
    starved: || Duration::ZERO,
    spent: || None,
    used: || Duration::ZERO,
};

thread_local! {
    /// What `Host::used` says on this thread.
    static USED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

fn policy(pollers: usize) -> Policy {
    with_host(pollers, IDLE)
}

/// In a process with one CPU, of which [`pass_used`] says how much is in use.
fn on_one_cpu() -> Policy {
    with_host(1, Host { used: || USED.get(), ..IDLE })
}

fn with_host(pollers: usize, host: Host) -> Policy {
    Policy::new(Places::PollersFirst, pollers, 1, 5_000, host)
}

fn of_pool(places: Places) -> Policy {
    Policy::new(places, 1, 1, 5_000, Host { used: || USED.get(), ..IDLE })
}

/// Records a poll of one run.
fn record(policy: &Policy, took_ns: u64, ended_ns: u64) {
    let poll = Measurement { ended_ns, took_ns, preempted_ns: 0, parts: 1, longest_ns: took_ns };
    policy.record(&poll);
}

/// Lets `runs` of that length pass in each of `windows`.
fn pass(policy: &Policy, windows: u32, runs: u32, took: Duration) {
    pass_used(policy, windows, 0, &[(runs, took)]);
}

/// Lets the process use so many millionths of its CPU in each of `windows`, and `runs` pass.
fn pass_used(policy: &Policy, windows: u32, used_ppm: u32, runs: &[(u32, Duration)]) {
    for _ in 0..windows {
        USED.set(USED.get() + WINDOW * used_ppm / 1_000_000);
        let began_ns = lock(&policy.window).began_ns;
        for (count, took) in runs {
            for _ in 0..*count {
                record(policy, took.as_nanos() as u64, began_ns + WINDOW_NS / 2);
            }
        }
        // A run of this length is reported at once, and so ends the window.
        record(policy, CHECKED_NS_MIN, began_ns + WINDOW_NS);
    }
}

#[test]
fn handlers_of_one_length_move_only_while_there_are_cpus_left() {
    let policy = on_one_cpu();
    let alike = [(280, Duration::from_micros(60))];
    pass_used(&policy, 50, 950_000, &alike);
    assert_eq!(policy.stats().flips, 0, "{:?}", policy.stats());
    pass_used(&policy, 3, 750_000, &alike);
    assert!(policy.is_inline() && policy.stats().is_crowded, "{:?}", policy.stats());
    pass_used(&policy, 1, 650_000, &alike);
    assert!(!policy.is_inline() && !policy.stats().is_crowded, "{:?}", policy.stats());
    // On workers the process uses more of its CPUs, but not all of them.
    pass_used(&policy, 50, 850_000, &alike);
    assert!(!policy.is_inline(), "{:?}", policy.stats());
    // Almost the same length is good enough.
    let nearly = [(100, Duration::from_micros(60)), (100, Duration::from_micros(140))];
    pass_used(&policy, CALM_WINDOWS, 950_000, &nearly);
    assert!(policy.is_inline(), "{:?}", policy.stats());
}

#[test]
fn handlers_of_a_pool_come_to_the_poller_only_if_they_may_and_are_short() {
    let short = Duration::from_micros(1);
    for places in [Places::WorkersFirst, Places::Workers] {
        let policy = of_pool(places);
        pass(&policy, CALM_WINDOWS - 1, 100, short);
        assert!(!policy.is_inline(), "they are not known yet");
        pass(&policy, 50, 100, short);
        assert_eq!(policy.is_inline(), places == Places::WorkersFirst);
    }
    let policy = of_pool(Places::WorkersFirst);
    pass(&policy, 50, 2, Duration::from_millis(1));
    assert!(!policy.is_inline(), "{:?}", policy.stats());
}

/// The thread that follows the policy is told each change once.
#[test]
fn threads_let_each_other_finish_while_cpus_are_short_and_no_run_is_long() {
    thread_local!(static TOLD: Cell<Option<bool>> = const { Cell::new(None) });
    let host = Host { used: || USED.get(), let_finish: |lets| TOLD.set(Some(lets)), ..IDLE };
    let policy = Policy::new(Places::Workers, 1, 1, 5_000, host);
    let told = || {
        policy.follow();
        TOLD.take()
    };
    let (short, long) = (Duration::from_micros(10), Duration::from_millis(1));
    pass_used(&policy, 2, 500_000, &[(100, short)]);
    assert_eq!(told(), None);
    pass_used(&policy, 1, 950_000, &[(100, short)]);
    assert_eq!(told(), Some(true));
    pass_used(&policy, 1, 950_000, &[(100, short)]);
    assert_eq!(told(), None, "told once");
    pass_used(&policy, 2, 950_000, &[(100, short), (5, long)]);
    assert_eq!(told(), Some(false));
    pass_used(&policy, 1, 950_000, &[(100, short)]);
    assert_eq!(told(), Some(true));
    pass_used(&policy, 1, 500_000, &[(100, short)]);
    assert_eq!(told(), Some(false));
}

#[test]
fn short_ones_do_not_wait_behind_long_ones_even_where_cpus_are_short() {
    let policy = on_one_cpu();
    let mixed = [(100, Duration::from_micros(5)), (100, Duration::from_micros(150))];
    pass_used(&policy, 5, 1_000_000, &mixed);
    assert!(!policy.is_inline(), "{:?}", policy.stats());
    pass_used(&policy, 50, 1_000_000, &mixed);
    assert!(!policy.is_inline(), "{:?}", policy.stats());
}

#[test]
fn runs_that_preemption_makes_longer_stay_where_cpus_are_short() {
    let policy = on_one_cpu();
    pass_used(&policy, 1, 1_000_000, &[(150, Duration::from_micros(100))]);
    let preempted = [(150, Duration::from_micros(100)), (3, Duration::from_micros(300))];
    pass_used(&policy, 50, 1_000_000, &preempted);
    assert_eq!(policy.stats().flips, 0, "{:?}", policy.stats());
    let long = [(150, Duration::from_micros(100)), (3, Duration::from_micros(1000))];
    pass_used(&policy, 5, 1_000_000, &long);
    assert!(!policy.is_inline(), "{:?}", policy.stats());
}

#[test]
fn what_handlers_wait_for_a_cpu_says_that_there_is_none() {
    let policy = policy(1);
    let ended_ns = lock(&policy.window).began_ns + WINDOW_NS;
    policy.record(&Measurement {
        ended_ns,
        took_ns: CHECKED_NS_MIN,
        preempted_ns: WINDOW_NS,
        parts: 1,
        longest_ns: CHECKED_NS_MIN,
    });
    assert!(policy.stats().is_crowded, "{:?}", policy.stats());
}

#[test]
fn cheap_handlers_stay_on_the_poller_however_many_there_are() {
    let policy = policy(1);
    pass(&policy, 50, 5_000, Duration::from_nanos(500));
    assert!(policy.is_inline(), "{:?}", policy.stats());
    assert_eq!(policy.stats().flips, 0);
}

/// The example of the module documentation.
#[test]
fn of_two_handlers_that_use_the_same_cpu_time_the_longer_one_moves() {
    let decides = |runs: u64, took_ns| {
        let policy = policy(1);
        // In the first window both long runs may be outliers.
        for _ in 0..2 {
            let began_ns = lock(&policy.window).began_ns;
            for run in 1..=runs {
                record(&policy, took_ns, began_ns + WINDOW_NS / runs * run);
            }
            // Fills the batch, whose report ends the window.
            while lock(&policy.window).began_ns == began_ns {
                record(&policy, 0, began_ns + WINDOW_NS);
            }
        }
        (policy.stats().delay_ns, policy.is_inline())
    };
    assert_eq!(decides(200, 10_000), (500, true));
    assert_eq!(decides(2, 1_000_000), (50_000, false));
}

#[test]
fn a_few_long_runs_move_the_handlers_to_the_workers_within_100_ms() {
    let policy = policy(1);
    // One of a hundred runs takes a millisecond. With 10,000 runs a second that is two in 20 ms.
    let windows = Duration::from_millis(100).as_micros() / WINDOW.as_micros();
    pass(&policy, windows as u32, 4, Duration::from_millis(1));
    assert!(!policy.is_inline(), "{:?}", policy.stats());
    assert_eq!(policy.stats().flips, 1);
}

#[test]
fn handlers_of_middling_length_move_where_they_crowd_a_poller() {
    let few = policy(1);
    pass(&few, 10, 20, Duration::from_micros(40));
    assert!(few.is_inline(), "{:?}", few.stats());
    let many = policy(1);
    pass(&many, 10, 400, Duration::from_micros(40));
    assert!(!many.is_inline(), "{:?}", many.stats());
    let spread = policy(4);
    pass(&spread, 10, 400, Duration::from_micros(40));
    assert!(spread.is_inline(), "{:?}", spread.stats());
}

#[test]
fn what_the_host_takes_away_now_and_then_moves_nothing() {
    let policy = policy(1);
    for _ in 0..10 {
        pass(&policy, 1, 2, Duration::from_millis(8));
        pass(&policy, 2 * WINDOWS_PER_OUTLIER, 640, Duration::from_micros(5));
    }
    assert!(policy.is_inline(), "{:?}", policy.stats());
}

#[test]
fn long_runs_that_hardly_move_the_mean_move_the_handlers() {
    let policy = policy(1);
    let length = Duration::from_nanos(policy.blocking_ns_min() + 1000);
    // Three runs of 200 µs in 20 ms: the mean delay is less than one wake-up.
    pass(&policy, 10, 3, length);
    assert!(policy.stats().delay_ns < policy.wake_ns, "{:?}", policy.stats());
    assert!(!policy.is_inline(), "{:?}", policy.stats());
}

#[test]
fn few_runs_that_fill_window_after_window_move() {
    let policy = policy(1);
    pass(&policy, 4, 1, Duration::from_millis(30));
    assert!(!policy.is_inline(), "{:?}", policy.stats());
}

#[test]
fn they_come_back_when_they_have_become_cheap_and_not_before() {
    let policy = policy(1);
    pass(&policy, 1, 100, Duration::from_millis(1));
    assert!(!policy.is_inline());
    // Between the two limits nothing moves.
    pass(&policy, 20, 640, Duration::from_micros(20));
    assert!(!policy.is_inline(), "{:?}", policy.stats());
    pass(&policy, CALM_WINDOWS, 5_000, Duration::from_nanos(500));
    assert!(policy.is_inline(), "{:?}", policy.stats());
    assert_eq!(policy.stats().flips, 2);
}

#[test]
fn now_and_then_a_long_run_does_not_move_them_back_and_forth() {
    let policy = policy(1);
    let again = |policy: &Policy, calm: u32| {
        pass(policy, 1, 10, Duration::from_millis(1));
        pass(policy, calm, 640, Duration::from_nanos(500));
    };
    for _ in 0..100 {
        again(&policy, CALM_WINDOWS + 2);
    }
    // After two moves to and fro it takes more calm windows in a row than there are.
    assert!(!policy.is_inline() && policy.stats().flips <= 5, "{:?}", policy.stats());
    pass(&policy, CALM_WINDOWS_MAX, 640, Duration::from_nanos(500));
    assert!(policy.is_inline(), "{:?}", policy.stats());
    // Handlers that stay for a while need few calm windows again.
    pass(&policy, 60, 640, Duration::from_nanos(500));
    again(&policy, CALM_WINDOWS);
    assert!(policy.is_inline(), "{:?}", policy.stats());
}

#[test]
fn two_policies_on_one_thread_hear_of_their_runs() {
    let (one, other) = (policy(1), policy(1));
    for _ in 0..200 {
        for policy in [&one, &other] {
            let ended_ns = lock(&policy.window).began_ns;
            record(policy, 40_000, ended_ns);
        }
    }
    for policy in [&one, &other] {
        assert!(lock(&policy.window).tally.runs >= 100, "{:?}", policy.stats());
    }
}

#[test]
fn parts_of_a_run_count_as_runs_and_the_longest_for_itself() {
    let policy = policy(1);
    let ended_ns = lock(&policy.window).began_ns;
    record(&policy, CHECKED_NS_MIN, ended_ns);
    let three =
        Measurement { ended_ns, took_ns: 3_000, preempted_ns: 0, parts: 3, longest_ns: 1_000 };
    policy.record(&three);
    assert_eq!(lock(&policy.window).tally.runs, 1);
    let longest_ns = 2 * CHECKED_NS_MIN;
    policy.record(&Measurement { took_ns: longest_ns + 5_000, parts: 6, longest_ns, ..three });
    let window = lock(&policy.window);
    let longest = [longest_ns, CHECKED_NS_MIN];
    assert_eq!((window.tally.runs, window.tally.longest_ns), (10, longest));
    let blocking = window.tally.blocking(1_000, policy.blocking_ns_min(), false, 0);
    let squares = longest.map(|ns| ns * ns).iter().sum::<u64>() + 8 * 1_000_000;
    assert_eq!(blocking.delay_ns, squares / 2_000);
}

#[test]
fn nobody_waits_to_tell_of_a_run_and_nothing_is_lost() {
    let policy = policy(1);
    let window = lock(&policy.window);
    let ended_ns = window.began_ns;
    for _ in 0..3 {
        record(&policy, CHECKED_NS_MIN, ended_ns);
    }
    drop(window);
    record(&policy, 1_000, ended_ns);
    assert_eq!(lock(&policy.window).tally.runs, 4);
}

/// Runs of a millisecond that are timed, until the handlers move or there were enough of them.
fn moves(policy: &Policy, run: impl Fn()) -> bool {
    let begun = Instant::now();
    while policy.is_inline() && begun.elapsed() < 10 * WINDOW {
        policy.time(&run);
    }
    !policy.is_inline()
}

#[test]
fn runs_that_compute_or_block_for_long_move() {
    let computes = || {
        let from = Instant::now();
        while from.elapsed() < Duration::from_millis(1) {}
    };
    assert!(moves(&policy(1), computes));
    assert!(moves(&policy(1), || thread::sleep(Duration::from_millis(1))));
}

#[test]
fn time_that_others_took_from_a_run_is_not_held_against_it() {
    thread_local! {
        static QUEUED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }
    // The sleep stands for a wait in the run queue.
    let waits = || {
        let from = Instant::now();
        thread::sleep(Duration::from_millis(1));
        QUEUED.set(QUEUED.get() + from.elapsed());
    };
    let policy = with_host(1, Host { starved: || QUEUED.get(), ..IDLE });
    policy.time(|| {});
    assert!(!moves(&policy, waits), "{:?}", policy.stats());
}

#[test]
fn what_a_host_took_from_runs_that_never_waited_moves_nothing() {
    thread_local! {
        static SAID: Cell<Spent> = const { Cell::new(Spent { ran: Duration::ZERO, waits: 0 }) };
    }
    let spent = |waits| {
        SAID.set(Spent { ran: SAID.get().ran + Duration::from_micros(1), waits });
        // The sleep stands for steal time, as long as the thread is not said to wait.
        thread::sleep(Duration::from_millis(1));
    };
    let host = Host { spent: || Some(SAID.get()), ..IDLE };
    let never_waits = with_host(1, host);
    assert!(!moves(&never_waits, || spent(7)), "{:?}", never_waits.stats());
    assert!(moves(&with_host(1, host), || spent(SAID.get().waits + 1)));
    assert!(moves(&policy(1), || spent(7)));
}
