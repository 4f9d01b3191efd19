//! Hosts that refuse system calls, memory or descriptors. The library reports what it found, and
//! works with the rest.
//!
//! A filter or a limit applies to a whole process, and the library probes the host once for each
//! process. So each case runs this program again, as a process with one test.

#[path = "conformance/harness/mod.rs"]
mod harness;

use std::collections::BTreeMap;
use std::env;
use std::fs::File;
use std::io::{self, Read, Seek, Write as _};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use harness::{connect, exchange, fds, holds_within};
use ringpoll::{
    Backend, Dialer, Error, Pollers, RingTier, Server, UringOptions, blocking, unblock,
};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// Both of an operator's switches.
const BACKEND: &str = "RINGPOLL_BACKEND";
const TIER: &str = "RINGPOLL_URING_TIER";

/// Names the case that a child is to run.
const CASE: &str = "RINGPOLL_PROBE_CASE";

/// The last thing a child says, so that one that ran nothing is not taken for a success.
const DONE: &str = "this case has run to its end";

/// How long a child may take on a busy host.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `case` in a process of its own, in the environment `vars`.
fn alone(test: &str, case: &str, vars: &[(&str, &str)], body: impl FnOnce()) {
    if let Some(asked) = env::var_os(CASE) {
        // A child runs the first of its test's cases that it was asked for, and no other.
        if asked == case {
            body();
            println!("{DONE}");
        }
        return;
    }
    let mut output = tempfile::tempfile().expect("a file for the child's output");
    let copy = || Stdio::from(output.try_clone().expect("another descriptor"));
    let mut command = Command::new(env::current_exe().expect("this program has a path"));
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
    // What the developer has set is not what is tested.
    command.env_remove(BACKEND).env_remove(TIER).env(CASE, case).envs(vars.iter().copied());
    let child = command.stdin(Stdio::null()).stdout(copy()).stderr(copy()).spawn();
    let mut child = child.expect("this program can be run again");
    let mut status = None;
    let ended = holds_within(PATIENCE, || {
        status = child.try_wait().expect("it is our child");
        status.is_some()
    });
    if !ended {
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
    }
    let mut said = String::new();
    output.rewind().expect("a file can be read again");
    output.read_to_string(&mut said).expect("tests print text");
    let status = status.unwrap_or_else(|| panic!("{case}: hangs, and said:\n{said}"));
    assert_eq!(status.signal(), None, "{case}: killed, and said:\n{said}");
    assert!(status.success() && said.contains(DONE), "{case}: {status}, and said:\n{said}");
}

/// From here on, `call` ends in `action` on this thread, and on those that it starts.
fn refuse(call: i64, action: SeccompAction) {
    let arch = env::consts::ARCH.try_into().expect("seccompiler knows this machine");
    let rules = BTreeMap::from([(call, Vec::new())]);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, arch);
    let program: BpfProgram =
        filter.and_then(TryInto::try_into).expect("one rule makes a valid filter");
    seccompiler::apply_filter(&program).expect("a process may restrict itself");
}

/// Serves one echo with `backend`, and returns which one it became.
fn serve(backend: Backend) -> Result<Backend, Error> {
    let builder = Server::builder().backend(backend).pollers(1).on_request(harness::echo);
    let server = builder.bind("127.0.0.1:0")?.spawn()?;
    let peer = connect(harness::addr_of(&server)).expect("the server listens");
    assert_eq!(exchange(&peer, b"hello").expect("the server answers"), b"hello");
    let backend = server.stats().backend;
    drop::<TcpStream>(peer);
    server.shutdown(harness::DEADLINE)?;
    Ok(backend)
}

/// Whether rings work on this host, where nothing is refused; says so if not.
fn host_has_rings(test: &str) -> bool {
    let found = ringpoll::capabilities();
    if found.tier.is_some() {
        return true;
    }
    let must = env::var_os("REQUIRE_ALL_BACKENDS").is_some_and(|value| value == "1");
    assert!(!must, "uring is required: {}", found.reason);
    // Nothing to wait for: the reason is all there is to tell.
    drop(harness::skip(test, &found.reason));
    false
}

/// No ring works, for a reason that names `what`. `Auto` selects epoll.
fn assert_epoll_takes_over(what: &[&str]) {
    let found = ringpoll::capabilities();
    assert_eq!((found.tier, found.backend()), (None, Backend::Epoll), "{found:?}");
    for word in what {
        assert!(found.reason.contains(word), "no {word:?} in the reason: {:?}", found.reason);
    }
    assert!(
        !found.zero_copy_send && !found.zero_copy_reports && !found.receive_bundles,
        "{found:?}"
    );
    assert_eq!(serve(Backend::Auto).expect("epoll works"), Backend::Epoll);
    assert_eq!(serve(Backend::Epoll).expect("epoll works"), Backend::Epoll);
    for backend in [Backend::Uring, Backend::Hybrid] {
        let pollers = Pollers::builder().backend(backend).count(1).build();
        for error in [serve(backend).err(), pollers.err()] {
            let error = error.unwrap_or_else(|| panic!("{backend} works although it cannot"));
            assert!(error.is_unsupported(), "{backend}: {error:?}");
            let message = error.to_string();
            assert!(message.contains(&found.reason), "{message:?} lacks {:?}", found.reason);
        }
    }
    assert_nothing_left();
}

/// No ring, and no child process: neither running nor dead and unburied.
fn assert_nothing_left() {
    let is_ring = |target: &String| target.contains("io_uring");
    let gone = holds_within(harness::DEADLINE, || !fds().values().any(is_ring));
    assert!(gone, "a ring is left: {:?}", fds());
    // SAFETY: a null status is allowed; without children there is nothing to wait for.
    let child = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) };
    let errno = io::Error::last_os_error().raw_os_error();
    assert_eq!((child, errno), (-1, Some(libc::ECHILD)), "a child process is left");
}

/// One test for each way in which a host says no.
macro_rules! refusals {
    ($($name:ident: $call:ident => $action:expr, [$($told:expr),+];)+) => {
        $(
            #[test]
            fn $name() {
                alone(stringify!($name), "refused", &[], || {
                    refuse(libc::$call, $action);
                    assert_epoll_takes_over(&[$($told),+]);
                });
            }
        )+
    };
}

const EPERM: SeccompAction = SeccompAction::Errno(libc::EPERM as u32);
const EACCES: SeccompAction = SeccompAction::Errno(libc::EACCES as u32);
const ENOSYS: SeccompAction = SeccompAction::Errno(libc::ENOSYS as u32);

// EPERM from io_uring_setup is also what `kernel.io_uring_disabled` answers with, a setting of the
// whole host that a test must not touch.
refusals! {
    setup_refused_with_eperm_means_epoll:
        SYS_io_uring_setup => EPERM, ["io_uring_setup", "os error 1)"];
    setup_refused_with_eacces_means_epoll:
        SYS_io_uring_setup => EACCES, ["io_uring_setup", "os error 13)"];
    setup_refused_with_enosys_means_epoll:
        SYS_io_uring_setup => ENOSYS, ["io_uring_setup", "os error 38)"];
    register_refused_with_eperm_means_epoll:
        SYS_io_uring_register => EPERM, ["io_uring_register", "os error 1)"];
    register_refused_with_eacces_means_epoll:
        SYS_io_uring_register => EACCES, ["io_uring_register", "os error 13)"];
    register_refused_with_enosys_means_epoll:
        SYS_io_uring_register => ENOSYS, ["io_uring_register", "os error 38)"];
    enter_refused_with_eperm_means_epoll:
        SYS_io_uring_enter => EPERM, ["io_uring_enter", "os error 1)"];
    enter_refused_with_eacces_means_epoll:
        SYS_io_uring_enter => EACCES, ["io_uring_enter", "os error 13)"];
    enter_refused_with_enosys_means_epoll:
        SYS_io_uring_enter => ENOSYS, ["io_uring_enter", "os error 38)"];
    a_filter_that_kills_the_thread_at_setup_means_epoll:
        SYS_io_uring_setup => SeccompAction::KillThread, ["io_uring", "kill"];
    a_filter_that_kills_the_process_at_setup_means_epoll:
        SYS_io_uring_setup => SeccompAction::KillProcess, ["io_uring", "kill"];
    a_filter_that_traps_setup_means_epoll:
        SYS_io_uring_setup => SeccompAction::Trap, ["io_uring", "kill"];
    a_filter_that_kills_the_process_at_register_means_epoll:
        SYS_io_uring_register => SeccompAction::KillProcess, ["io_uring", "kill"];
    a_filter_that_kills_the_process_at_enter_means_epoll:
        SYS_io_uring_enter => SeccompAction::KillProcess, ["io_uring", "kill"];
}

/// Most containers have a filter that says nothing about rings.
#[test]
fn a_filter_that_lets_rings_through_leaves_them_in_use() {
    const TEST: &str = "a_filter_that_lets_rings_through_leaves_them_in_use";
    alone(TEST, "filtered", &[], || {
        refuse(libc::SYS_acct, EPERM);
        if host_has_rings(TEST) {
            assert_eq!(serve(Backend::Auto).expect("rings work"), Backend::Uring);
            assert_nothing_left();
        }
    });
}

/// What the kernel takes apart of the probe's rings late, it takes apart elsewhere.
#[test]
fn the_probe_does_not_interrupt_what_its_caller_does_next() {
    const TEST: &str = "the_probe_does_not_interrupt_what_its_caller_does_next";
    for round in 0..5 {
        alone(TEST, &format!("round {round}"), &[], || {
            if !host_has_rings(TEST) {
                return;
            }
            // poll(2) would be restarted; epoll_wait(2) never is (signal(7)).
            let epoll = epoll::create(CreateFlags::CLOEXEC).expect("an epoll instance");
            let moment = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
            let mut events = [const { MaybeUninit::uninit() }; 1];
            let ready = epoll::wait(&epoll, &mut events, Some(&moment));
            assert!(ready.is_ok_and(|(ready, _)| ready.is_empty()), "epoll_wait was interrupted");
        });
    }
}

/// A host may have no room for one more thread.
#[test]
fn no_thread_for_the_probe_is_a_reason_and_no_panic() {
    const TEST: &str = "no_thread_for_the_probe_is_a_reason_and_no_panic";
    alone(TEST, "no thread", &[], || {
        refuse(libc::SYS_clone3, SeccompAction::Errno(libc::EAGAIN as u32));
        let found = ringpoll::capabilities();
        assert_eq!((found.tier, found.backend()), (None, Backend::Epoll), "{found:?}");
        for reason in [&found.reason, &found.sqpoll_reason] {
            assert!(reason.contains("thread") && reason.contains("os error 11)"), "{reason:?}");
        }
        let error = Pollers::builder().backend(Backend::Uring).count(1).build().err();
        assert!(error.is_some_and(|error| error.is_unsupported()));
    });
}

/// A program may restrict itself when it has started: what was found is then no longer true.
#[test]
fn rings_refused_after_the_probe_are_an_error_and_no_panic() {
    const TEST: &str = "rings_refused_after_the_probe_are_an_error_and_no_panic";
    for call in [libc::SYS_io_uring_setup, libc::SYS_io_uring_register] {
        alone(TEST, &format!("call {call}"), &[], || {
            if !host_has_rings(TEST) {
                return;
            }
            let running = Pollers::builder().backend(Backend::Uring).count(1).build();
            let running = running.expect("rings work so far");
            refuse(call, EPERM);
            for backend in [Backend::Uring, Backend::Hybrid] {
                let error = serve(backend).expect_err("no ring can be made any more");
                assert!(error.to_string().contains("os error 1)"), "{backend}: {error}");
            }
            // It may have been decided already; what it must not do is panic or hang.
            if let Err(error) = serve(Backend::Auto) {
                assert!(error.to_string().contains("os error 1)"), "{error}");
            }
            assert_eq!(serve(Backend::Epoll).expect("epoll works"), Backend::Epoll);
            running.shutdown().expect("what runs can be ended");
            assert_nothing_left();
        });
    }
}

#[test]
fn the_environment_replaces_the_backend_that_was_asked_for() {
    const TEST: &str = "the_environment_replaces_the_backend_that_was_asked_for";
    let names = ["epoll", "uring", "hybrid", "auto"];
    for name in names {
        alone(TEST, name, &[(BACKEND, name)], || {
            let has_rings = name == "epoll" || host_has_rings(TEST);
            if !has_rings {
                let error = serve(Backend::Epoll).err();
                assert_eq!(error.is_some_and(|error| error.is_unsupported()), name != "auto");
                return;
            }
            let wanted: Backend = name.parse().expect("a name of a backend");
            let wanted = match wanted {
                Backend::Auto => ringpoll::capabilities().backend(),
                named => named,
            };
            for asked in [Backend::Auto, Backend::Epoll, Backend::Uring, Backend::Hybrid] {
                assert_eq!(serve(asked).expect("this host has all of them"), wanted, "{asked}");
                let pollers = Pollers::builder().backend(asked).count(1).build();
                assert_eq!(pollers.expect("this host has all of them").backend(), wanted);
            }
            assert_nothing_left();
        });
    }
}

#[test]
fn an_unknown_name_in_the_environment_is_refused() {
    const TEST: &str = "an_unknown_name_in_the_environment_is_refused";
    for (index, name) in ["garbage", "URING", "uring ", "epoll,uring"].into_iter().enumerate() {
        for variable in [BACKEND, TIER] {
            alone(TEST, &format!("{variable} {index}"), &[(variable, name)], || {
                // A tier says nothing where there is no ring.
                let backend = if variable == TIER { Backend::Uring } else { Backend::Epoll };
                if variable == TIER && !host_has_rings(TEST) {
                    return;
                }
                let pollers = Pollers::builder().backend(backend).count(1).build().err();
                for error in [serve(backend).err(), pollers] {
                    let error = error.unwrap_or_else(|| panic!("{variable}={name:?} is accepted"));
                    assert!(error.is_invalid(), "{variable}={name:?}: {error:?}");
                    let message = error.to_string();
                    let known = if variable == TIER { "coop" } else { "hybrid" };
                    assert!(message.contains(known), "{message:?} does not name {known}");
                }
            });
        }
    }
}

#[test]
fn the_environment_caps_the_tier_and_the_ring_still_serves() {
    const TEST: &str = "the_environment_caps_the_tier_and_the_ring_still_serves";
    for (name, cap) in
        [("defer", RingTier::Defer), ("coop", RingTier::Coop), ("plain", RingTier::Plain)]
    {
        alone(TEST, name, &[(TIER, name)], || {
            if !host_has_rings(TEST) {
                return;
            }
            let best = ringpoll::capabilities().tier.expect("this host has rings");
            for (backend, asked) in
                [(Backend::Uring, RingTier::Defer), (Backend::Hybrid, RingTier::Coop)]
            {
                assert_eq!(serve(backend).expect("a lesser ring serves"), backend);
                let options = UringOptions::new().tier_max(asked);
                let builder = Server::builder().backend(backend).uring(options);
                let is_deferred = cap.min(best).min(asked) == RingTier::Defer;
                let is_received = harness::receives_behind_a_handler(builder);
                let is_received = is_received.expect("a lesser ring serves");
                assert_eq!(is_received, !is_deferred, "asked for {asked:?}, capped at {cap:?}");
            }
            assert_nothing_left();
        });
    }
}

/// What the documentation of `Dialer::connect` says.
const LOOKUPS_MAX: usize = 64;

/// Names the file in which the resolver looks for aliases of names without a dot, before it asks a
/// name server. It blocks if that file is a pipe without a writer.
const ALIASES: &str = "HOSTALIASES";

/// A dial ends in time, and its lookup continues. Lookups occupy a bounded number of threads, and
/// delay no other calls.
#[test]
fn a_resolver_that_hangs_takes_a_bounded_number_of_threads() {
    const TEST: &str = "a_resolver_that_hangs_takes_a_bounded_number_of_threads";
    let dir = tempfile::tempdir().expect("a directory for the pipe");
    let path = dir.path().join("pipe").display().to_string();
    if env::var_os(CASE).is_none() {
        let made = Command::new("mkfifo").arg(&path).status().expect("a pipe can be made");
        assert!(made.success(), "mkfifo: {made}");
    }
    alone(TEST, "aliases", &[(ALIASES, &path)], || {
        let pollers = Pollers::builder().backend(Backend::Epoll).count(1).build();
        let pollers = pollers.expect("epoll works");
        let dialer = Dialer::new().pollers(pollers.clone()).timeout(Duration::from_millis(100));
        let error = blocking::wait(dialer.connect("no-such-host:9")).expect_err("no such host");
        if !error.is_dial_timeout() {
            // Nothing to wait for: the reason is all there is to tell.
            return drop(harness::skip(TEST, format_args!("the resolver reads no pipe: {error}")));
        }
        harness::runtime();
        let before = harness::thread_count();
        let dials: Vec<_> = (0..300)
            .map(|_| {
                let dialer = dialer.clone();
                harness::on_task(
                    async move { Ok(dialer.connect("no-such-host:9").await.map(drop)) },
                )
            })
            .collect();
        for dial in dials {
            let error = dial.wait().expect_err("no such host");
            assert!(error.is_dial_timeout(), "{error:?}");
        }
        assert!(harness::thread_count() <= before, "more threads:\n{}", harness::threads());
        assert!(harness::unblock_thread_count() <= LOOKUPS_MAX);
        assert_eq!(blocking::wait(unblock(|| 7)).expect("threads are left for others"), 7);
        let no_timers = holds_within(harness::DEADLINE, || pollers.stats().timers == 0);
        assert!(no_timers, "timers are left: {:?}", pollers.stats());
        let_go(&env::var(ALIASES).expect("the parent has set it"));
        assert_a_name_is_found(&dialer);
        pollers.shutdown().expect("nothing is left");
    });
}

/// Ends the look-ups that hang at the pipe `path`, and lets no further one hang.
fn let_go(path: &str) {
    let pipe = format!("{path}-left");
    std::fs::rename(path, &pipe).expect("the pipe is there");
    File::create(path).expect("a file without aliases");
    // When the pipe is opened for writing, its readers open it as well, and read its end.
    File::options().write(true).open(pipe).expect("look-ups hang at it");
}

fn assert_a_name_is_found(dialer: &Dialer) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("a bound socket has a name").port();
    let dialer = dialer.clone().timeout(harness::DEADLINE);
    let conn = blocking::wait(dialer.connect(&format!("tcp4:localhost:{port}")));
    conn.expect("look-ups have threads again").close();
}

/// Kernels before 5.11 have no `epoll_pwait2`, nor have some filters: what is left counts
/// milliseconds in an `i32`, which 25 days do not fit into.
#[test]
fn a_timeout_of_sixty_days_serves_where_waits_are_short() {
    const TEST: &str = "a_timeout_of_sixty_days_serves_where_waits_are_short";
    alone(TEST, "epoll_pwait2", &[], || {
        refuse(libc::SYS_epoll_pwait2, ENOSYS);
        let days = Duration::from_secs(60 * 24 * 60 * 60);
        let builder = Server::builder().backend(Backend::Epoll).pollers(1).read_timeout(days);
        let builder = builder.on_request(|mut conn| async move {
            let request = conn.next(5).await?;
            conn.write(request)?;
            conn.flush().await
        });
        let server = builder.bind("127.0.0.1:0").expect("a free port").spawn().expect("threads");
        let mut peer = connect(harness::addr_of(&server)).expect("the server listens");
        peer.write_all(b"hel").expect("the server is there");
        let is_set = || server.stats().pollers.timers > 0;
        assert!(holds_within(harness::DEADLINE, is_set), "the read has no timer");
        peer.write_all(b"lo").expect("the server is there");
        // The timer stays set after the read, so the poller has slept with it before the second.
        assert_eq!(harness::read_exactly(&peer, 5).expect("it answers"), b"hello");
        assert_eq!(exchange(&peer, b"again").expect("it still answers"), b"again");
        drop(peer);
        server.shutdown(harness::DEADLINE).expect("its poller runs");
    });
}

/// The poller that fails has no listener of its server's: whoever waits is told all the same. With
/// epoll, since a ring is not found by its descriptor.
#[test]
fn a_poller_that_fails_ends_its_server_with_the_reason() {
    const TEST: &str = "a_poller_that_fails_ends_its_server_with_the_reason";
    alone(TEST, "epoll", &[], || {
        let builder = Server::builder().backend(Backend::Epoll).pollers(2);
        let server = builder.on_request(harness::echo).bind("127.0.0.1:0").expect("a free port");
        let server = server.spawn().expect("it can be served");
        let addr = harness::addr_of(&server);
        let peers = [connect(addr), connect(addr)].map(|peer| peer.expect("it listens"));
        for peer in &peers {
            assert_eq!(exchange(peer, b"hello").expect("it answers"), b"hello");
        }
        let mut epolls = fds().into_iter().filter(|(_, target)| target.contains("[eventpoll]"));
        let (last, _) = epolls.next_back().expect("the second poller was made last");
        let other = File::open("/dev/null").expect("it is there");
        // SAFETY: both descriptors are open; the poller's number stays its own, but names a file
        // that nobody can wait for.
        assert!(unsafe { libc::dup2(other.as_raw_fd(), last) } >= 0);
        let (tell, told) = std::sync::mpsc::channel();
        let waits = server.clone();
        std::thread::spawn(move || tell.send(waits.wait()).expect("the test listens"));
        // The poller is in a wait that has begun; the bytes end it.
        for mut peer in &peers {
            peer.write_all(b"wake up").expect("the server is there");
        }
        let ended = told.recv_timeout(harness::DEADLINE).expect("the server ends");
        let error = ended.expect_err("a poller has failed").to_string();
        assert!(error.contains("a poller has ended: its backend cannot wait"), "{error:?}");
    });
}

/// Rings of older kernels, and memory that is registered, count against it.
#[test]
fn no_memory_to_lock_is_survived_and_told() {
    const TEST: &str = "no_memory_to_lock_is_survived_and_told";
    alone(TEST, "memlock", &[], || {
        let nothing = Rlimit { current: Some(0), maximum: Some(0) };
        setrlimit(Resource::Memlock, nothing).expect("a limit may be lowered");
        // Root may lock what it likes.
        become_nobody();
        let found = ringpoll::capabilities();
        assert!(!found.reason.is_empty());
        if found.tier.is_none() {
            assert_epoll_takes_over(&["os error"]);
        } else {
            assert_eq!(serve(Backend::Auto).expect("the probe said so"), Backend::Uring);
            assert_eq!(serve(Backend::Hybrid).expect("the probe said so"), Backend::Hybrid);
        }
    });
}

fn become_nobody() {
    const NOBODY: libc::uid_t = 65_534;
    // SAFETY: `geteuid` has no preconditions.
    if unsafe { libc::geteuid() } == 0 {
        // SAFETY: takes any numbers, and changes this process only.
        let changed = unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) };
        assert_eq!(changed, 0, "root may become somebody else");
    }
}

/// Whatever the descriptors suffice for: pollers work, or there is one clear error; never a panic,
/// and nothing that stays open.
#[test]
fn too_few_descriptors_are_one_clear_error() {
    const TEST: &str = "too_few_descriptors_are_one_clear_error";
    for backend in [Backend::Auto, Backend::Epoll, Backend::Uring, Backend::Hybrid] {
        // Found out before the descriptors are scarce, or with few of them.
        for spare_at_probe in [None, Some(0), Some(1), Some(2), Some(3), Some(5)] {
            let case = format!("{backend}, probed with {spare_at_probe:?}");
            alone(TEST, &case, &[], || scarce(backend, spare_at_probe));
        }
    }
}

fn scarce(backend: Backend, spare_at_probe: Option<u64>) {
    let _fillers = fill_gaps();
    if let Some(spare) = spare_at_probe {
        leave_fds(spare);
    }
    let found = ringpoll::capabilities();
    let is_told = found.tier.is_some() || found.reason.contains("os error 24)");
    assert!(is_told || spare_at_probe.is_none(), "no word of it: {:?}", found.reason);
    leave_fds(1000);
    let before = fds().len();
    for spare in 0..16 {
        leave_fds(spare);
        let built = Pollers::builder().backend(backend).count(2).build();
        leave_fds(1000);
        match built {
            Ok(pollers) => pollers.shutdown().expect("they can be ended"),
            Err(error) => {
                let is_clear = error.raw_os_error() == Some(libc::EMFILE)
                    || error.to_string().contains("os error 24)");
                assert!(is_clear, "{spare} spare descriptors: {error:?}");
            }
        }
        let returned = holds_within(harness::DEADLINE, || fds().len() == before);
        assert!(returned, "{spare} spare: {before} descriptors before, now {:?}", fds());
    }
    let rings = matches!(backend, Backend::Uring | Backend::Hybrid);
    if !rings || found.tier.is_some() {
        let pollers = Pollers::builder().backend(backend).count(2).build();
        pollers.expect("with enough descriptors all is well");
    }
}

/// Lets this process open so many more descriptors, given that none is free below the highest.
fn leave_fds(spare: u64) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let set = |current| {
        setrlimit(Resource::Nofile, Rlimit { current, maximum }).expect("within the maximum");
    };
    // Looking takes a descriptor as well.
    set(maximum);
    let highest = fds().keys().copied().max().unwrap_or(0) as u64;
    set(Some(highest + 1 + spare));
}

/// Takes every free descriptor below the highest, so that what is left can be counted.
fn fill_gaps() -> Vec<File> {
    let highest = fds().keys().copied().max().unwrap_or(0);
    let mut fillers = Vec::new();
    while fds().len() <= highest as usize {
        fillers.push(File::open("/dev/null").expect("a null device"));
    }
    fillers
}
