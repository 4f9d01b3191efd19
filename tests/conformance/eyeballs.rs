//! Dials to names with several addresses: their order, their time limits, and the resolver.

use std::future::{Future, pending, ready};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use ringpoll::{Dialer, PeerAddr, Resolve};
use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};

use crate::dial::FullBacklog;
use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, eyeballs:
            a_silent_address_delays_the_next_by_the_attempt_delay
            a_refused_address_is_followed_at_once
            the_winner_closes_the_others
            every_attempt_has_its_time_limit
            the_time_limit_of_a_dial_ends_all_attempts
            the_attempts_of_a_handler_on_a_poller_overlap
            a_dial_that_is_dropped_leaves_nothing_at_any_stage
            a_full_unix_backlog_ends_with_the_attempt_timeout
            an_error_of_a_hook_ends_all_attempts
            addresses_of_another_family_than_the_local_one_are_not_tried
            an_attempt_delay_beyond_its_limits_is_refused
            only_names_are_resolved
            a_resolver_that_panics_fails_its_dial
            a_resolver_that_never_answers_is_given_up
            the_error_of_a_resolver_names_the_host
            an_answer_without_addresses_is_an_error
            of_ten_thousand_addresses_sixty_four_are_tried
        }
    };
}
pub(crate) use cases;

type Answer = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// A resolver that is a function.
struct By<F>(F);

impl<F: Fn(&str, u16) -> Answer + Send + Sync + 'static> Resolve for By<F> {
    fn resolve(&self, host: &str, port: u16) -> Answer {
        (self.0)(host, port)
    }
}

fn by(resolve: impl Fn(&str, u16) -> Answer + Send + Sync + 'static) -> impl Resolve {
    By(resolve)
}

/// Every name has these addresses.
fn always(addrs: &[SocketAddr]) -> impl Resolve {
    let addrs = addrs.to_vec();
    by(move |_, _| Box::pin(ready(Ok(addrs.clone()))))
}

fn never() -> impl Resolve {
    by(|_, _| Box::pin(pending()))
}

/// An address that refuses connections. Its socket keeps the port, so no dial connects to itself.
struct Refusing {
    addr: SocketAddr,
    _socket: OwnedFd,
}

impl Refusing {
    fn new() -> Check<Refusing> {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
        bind(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let addr = SocketAddr::try_from(getsockname(&socket)?)?;
        Ok(Refusing { addr, _socket: socket })
    }
}

fn listen() -> Check<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let addr = listener.local_addr()?;
    Ok((listener, addr))
}

/// Counts the attempts of a dialer.
fn counted(dialer: Dialer) -> (Dialer, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let attempts = Arc::clone(&count);
    let dialer = dialer.before_connect(move |_| {
        attempts.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    (dialer, count)
}

/// The error of a dial that cannot succeed.
fn failure(dialer: &Dialer, addr: &str) -> Check<ringpoll::Error> {
    let error = block_on(async { Ok(dialer.connect(addr).await.err()) })?;
    Ok(error.expect("the dial cannot succeed"))
}

const NAME: &str = "name.test:80";

/// Without the second attempt, the dial would last for the two minutes of the kernel.
pub(crate) fn a_silent_address_delays_the_next_by_the_attempt_delay(t: &Fixture) -> Check {
    let (deaf, (_listener, addr)) = (DeafListener::new()?, listen()?);
    let delay = Duration::from_millis(50);
    let dialer = t.dialer().attempt_delay(delay).resolver(always(&[deaf.addr, addr]));
    let start = Instant::now();
    let conn = block_on(async { Ok(dialer.connect(NAME).await?) })?;
    assert!(start.elapsed() >= delay, "early, after {:?}", start.elapsed());
    assert_eq!(conn.peer_addr(), PeerAddr::Inet(addr));
    // The default delay is short enough as well.
    let dialer = t.dialer().resolver(always(&[deaf.addr, addr]));
    let conn = block_on(async { Ok(dialer.connect(NAME).await?) })?;
    assert_eq!(conn.peer_addr(), PeerAddr::Inet(addr));
    Ok(())
}

/// With the delay between them, 63 attempts would begin after two minutes.
pub(crate) fn a_refused_address_is_followed_at_once(t: &Fixture) -> Check {
    let (refusing, (_listener, addr)) = (Refusing::new()?, listen()?);
    let mut addrs = vec![refusing.addr; 63];
    addrs.push(addr);
    let dialer = t.dialer().attempt_delay(Duration::from_secs(2)).resolver(always(&addrs));
    let (dialer, attempts) = counted(dialer);
    let conn = block_on(async { Ok(dialer.connect(NAME).await?) })?;
    assert_eq!(conn.peer_addr(), PeerAddr::Inet(addr));
    assert_eq!(attempts.load(Ordering::SeqCst), 64);
    let error = failure(&t.dialer().resolver(always(&addrs[..3])), NAME)?;
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{error:?}");
    let start = format!("connect {NAME} (3 addresses tried): {}: ", refusing.addr);
    assert!(error.to_string().starts_with(&start), "{error}");
    Ok(())
}

pub(crate) fn the_winner_closes_the_others(t: &Fixture) -> Check {
    let (deaf, (_listener, addr)) = (DeafListener::new()?, listen()?);
    let mut addrs = vec![deaf.addr; 5];
    addrs.push(addr);
    let dialer = t.dialer().attempt_delay(Duration::from_millis(10)).resolver(always(&addrs));
    let before = fds().len();
    let conn = block_on(async { Ok(dialer.connect(NAME).await?) })?;
    assert_eq!(conn.peer_addr(), PeerAddr::Inet(addr));
    eventually("only the winner has a descriptor", || fds().len() == before + 1);
    eventually("the poller has one connection", || t.clients().stats().connections == 1);
    eventually("no timer is left", || t.timers() == 0);
    assert!(conn.is_active());
    Ok(())
}

pub(crate) fn every_attempt_has_its_time_limit(t: &Fixture) -> Check {
    let deaf = DeafListener::new()?;
    let limit = Duration::from_millis(50);
    let dialer = t.dialer().attempt_timeout(limit).attempt_delay(Duration::from_millis(10));
    let dialer = dialer.resolver(always(&[deaf.addr, deaf.addr]));
    let start = Instant::now();
    let error = failure(&dialer, NAME)?;
    assert!(start.elapsed() >= limit, "early, after {:?}", start.elapsed());
    assert!(error.is_dial_timeout(), "{error:?}");
    let text = format!("connect {NAME} (2 addresses tried): {}: no reply in 50ms", deaf.addr);
    assert_eq!(error.to_string(), text);
    // An address that is no name has one attempt.
    let error = failure(&dialer, &deaf.addr.to_string())?;
    assert!(error.is_dial_timeout(), "{error:?}");
    assert_eq!(error.to_string(), format!("connect {}: no reply in 50ms", deaf.addr));
    Ok(())
}

pub(crate) fn the_time_limit_of_a_dial_ends_all_attempts(t: &Fixture) -> Check {
    let deaf = DeafListener::new()?;
    let limit = Duration::from_millis(100);
    let dialer = t.dialer().timeout(limit).attempt_delay(Duration::from_millis(10));
    // The time limit of an attempt is not reached.
    let dialer = dialer.attempt_timeout(Duration::from_secs(1000));
    let dialer = dialer.resolver(always(&[deaf.addr; 3]));
    let before = fds().len();
    let start = Instant::now();
    let error = failure(&dialer, NAME)?;
    assert!(start.elapsed() >= limit, "early, after {:?}", start.elapsed());
    assert!(error.is_dial_timeout(), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(" addresses tried): no reply in 100ms"), "{text}");
    eventually("every descriptor is closed", || fds().len() == before);
    eventually("no timer is left", || t.timers() == 0);
    Ok(())
}

/// In the first poll of a handler, without a runtime.
pub(crate) fn the_attempts_of_a_handler_on_a_poller_overlap(t: &Fixture) -> Check {
    let (deaf, (_listener, addr)) = (DeafListener::new()?, listen()?);
    let dialer = Dialer::new().attempt_delay(Duration::from_millis(10));
    let connects = dialer.clone().resolver(always(&[deaf.addr, addr]));
    let late = dialer.attempt_timeout(Duration::from_millis(20));
    let late = late.resolver(always(&[deaf.addr, deaf.addr]));
    let server = t.spawn(t.server().placement(Placement::Inline).on_request(move |mut conn| {
        let (connects, late) = (connects.clone(), late.clone());
        async move {
            conn.next(1).await?;
            assert_eq!(connects.connect(NAME).await?.peer_addr(), PeerAddr::Inet(addr));
            let error = late.connect(NAME).await.expect_err("nobody answers");
            assert!(error.is_dial_timeout(), "{error:?}");
            conn.write_copy(b"e")?;
            conn.flush().await
        }
    }));
    assert_eq!(exchange(&dial(&server)?, b"d")?, b"e");
    Ok(())
}

/// A waker that polls nothing.
struct Task;

impl Wake for Task {
    fn wake(self: Arc<Self>) {}
}

/// Polls the dial until `is_there`, drops it, and checks that nothing is left.
fn drop_at(
    t: &Fixture,
    stage: &str,
    dialer: &Dialer,
    addr: &str,
    mut is_there: impl FnMut() -> bool,
) {
    let before = fds().len();
    let task = Arc::new(Task);
    {
        let waker = Waker::from(Arc::clone(&task));
        let mut dial = pin!(dialer.connect(addr));
        eventually(stage, || {
            let polled = dial.as_mut().poll(&mut Context::from_waker(&waker));
            // One that connects at once is there as well.
            is_there() || polled.is_ready()
        });
    }
    let is_free = || Arc::strong_count(&task) == 1 && t.timers() == 0;
    eventually(&format!("{stage}: no task and no timer"), is_free);
    eventually(&format!("{stage}: no descriptor"), || fds().len() == before);
}

pub(crate) fn a_dial_that_is_dropped_leaves_nothing_at_any_stage(t: &Fixture) -> Check {
    let (deaf, full, (listener, addr)) = (DeafListener::new()?, FullBacklog::new()?, listen()?);
    let long = Duration::from_secs(1000);
    let dialer = t.dialer().timeout(long).attempt_timeout(long);
    let before = fds().len();
    drop_at(t, "look-up", &dialer.clone().resolver(never()), NAME, || true);
    let several = dialer.clone().resolver(always(&[deaf.addr; 3]));
    let slow = several.clone().attempt_delay(Duration::from_secs(2));
    drop_at(t, "first attempt", &slow, NAME, || fds().len() == before + 1);
    let fast = several.attempt_delay(Duration::from_millis(10));
    drop_at(t, "third attempt", &fast, NAME, || fds().len() == before + 3);
    drop_at(t, "pause", &dialer, &full.addr(), || true);
    let foreign = SocketAddr::from((Ipv4Addr::new(203, 0, 113, 9), 0));
    let elsewhere = dialer.clone().local_addr(foreign);
    drop_at(t, "local address", &elsewhere, &deaf.addr.to_string(), || true);
    // Connected, but not polled since.
    drop_at(t, "connected", &dialer, &addr.to_string(), || listener.accept().is_ok());
    Ok(())
}

pub(crate) fn a_full_unix_backlog_ends_with_the_attempt_timeout(t: &Fixture) -> Check {
    let full = FullBacklog::new()?;
    let dialer = t.dialer().attempt_timeout(Duration::from_millis(50));
    let error = failure(&dialer, &full.addr())?;
    assert!(error.is_dial_timeout(), "{error:?}");
    Ok(())
}

pub(crate) fn an_error_of_a_hook_ends_all_attempts(t: &Fixture) -> Check {
    let (deaf, (_listener, addr)) = (DeafListener::new()?, listen()?);
    let dialer = t.dialer().attempt_delay(Duration::from_millis(10));
    let dialer = dialer.resolver(always(&[deaf.addr, deaf.addr, addr]));
    let before = fds().len();
    let calls = AtomicUsize::new(0);
    let hooked =
        dialer.clone().before_connect(move |_| match calls.fetch_add(1, Ordering::SeqCst) {
            0 => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::EPERM)),
        });
    let error = failure(&hooked, NAME)?;
    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error:?}");
    assert!(error.to_string().starts_with(&format!("connect {NAME}: before_connect: ")), "{error}");
    let calls = AtomicUsize::new(0);
    let hooked = dialer.before_connect(move |_| match calls.fetch_add(1, Ordering::SeqCst) {
        0 => Ok(()),
        _ => panic!("{ON_PURPOSE}"),
    });
    let task = runtime().spawn(async move { hooked.connect(NAME).await.map(drop) });
    let ended = block_on(async { Ok(task.await) })?;
    assert!(ended.expect_err("the hook panics").is_panic());
    eventually("every descriptor is closed", || fds().len() == before);
    eventually("no timer is left", || t.timers() == 0);
    Ok(())
}

pub(crate) fn addresses_of_another_family_than_the_local_one_are_not_tried(t: &Fixture) -> Check {
    let (listener, addr) = listen()?;
    let other = SocketAddr::from((Ipv6Addr::LOCALHOST, addr.port()));
    let local = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), 0));
    let dialer = t.dialer().local_addr(local);
    let (mixed, attempts) = counted(dialer.clone().resolver(always(&[other, addr, other])));
    let conn = block_on(async { Ok(mixed.connect(NAME).await?) })?;
    assert_eq!(conn.peer_addr(), PeerAddr::Inet(addr));
    assert_eq!(listener.accept()?.1.ip(), local.ip());
    assert_eq!(attempts.load(Ordering::SeqCst), 1);
    for (dialer, target) in [
        (dialer.clone().resolver(always(&[other, other])), NAME.to_owned()),
        (dialer.clone(), other.to_string()),
    ] {
        let error = failure(&dialer, &target)?;
        assert!(error.is_invalid(), "{error:?}");
        let why = "no address of the family of the local address 127.0.0.2:0";
        assert_eq!(error.to_string(), format!("connect {target}: {why}"));
    }
    // Unix sockets have no such address.
    let name = format!("unix:@ringpoll-eyeballs-{}", std::process::id());
    let server = t.spawn_bound(t.server().on_request(echo).bind(&name)?);
    let conn = block_on(async { Ok(dialer.connect(&name).await?) })?;
    assert_eq!(conn.peer_addr(), server.local_addr());
    Ok(())
}

pub(crate) fn an_attempt_delay_beyond_its_limits_is_refused(t: &Fixture) -> Check {
    let (_listener, addr) = listen()?;
    for delay in [Duration::ZERO, Duration::from_millis(9), Duration::from_millis(2001)] {
        let error = failure(&t.dialer().attempt_delay(delay), &addr.to_string())?;
        assert!(error.is_invalid(), "{error:?}");
        assert!(error.to_string().contains("from 10ms to 2s"), "{error}");
    }
    for delay in [Duration::from_millis(10), Duration::from_secs(2)] {
        let dialer = t.dialer().attempt_delay(delay);
        block_on(async { Ok(dialer.connect(&addr.to_string()).await.map(drop)?) })?;
    }
    Ok(())
}

pub(crate) fn only_names_are_resolved(t: &Fixture) -> Check {
    let (_listener, addr) = listen()?;
    let asked: Arc<Mutex<Vec<(String, u16)>>> = Arc::default();
    let asks = Arc::clone(&asked);
    // One that several dialers may share.
    let resolver = Arc::new(by(move |host, port| {
        asks.lock().expect("nobody panics here").push((host.to_owned(), port));
        Box::pin(ready(Ok(vec![addr])))
    }));
    let dialer = t.dialer().resolver(Arc::clone(&resolver));
    let missing = "unix:/no/such/directory/socket";
    block_on(async {
        dialer.connect(&addr.to_string()).await?;
        dialer.connect(&format!(":{}", addr.port())).await?;
        assert!(dialer.connect(missing).await.is_err());
        // The zone of a host that no interface has.
        assert!(dialer.connect("[fe80::1%nothing]:80").await.is_err());
        let conn = dialer.connect("tcp4:localhost:81").await?;
        assert_eq!(conn.peer_addr(), PeerAddr::Inet(addr));
        let error = dialer.connect("tcp6:name.test:82").await.expect_err("an IPv4 address");
        assert!(error.is_invalid(), "{error:?}");
        Ok(())
    })?;
    let asked = asked.lock().expect("nobody panics here");
    assert_eq!(asked[..], [("localhost".to_owned(), 81), ("name.test".to_owned(), 82)]);
    Ok(())
}

/// A future that panics when it is dropped, or polled as well.
struct Bomb {
    in_poll: bool,
}

impl Future for Bomb {
    type Output = io::Result<Vec<SocketAddr>>;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> std::task::Poll<Self::Output> {
        assert!(!self.in_poll, "{ON_PURPOSE}");
        std::task::Poll::Pending
    }
}

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("{ON_PURPOSE}");
    }
}

pub(crate) fn a_resolver_that_panics_fails_its_dial(t: &Fixture) -> Check {
    let at_once = by(|_, _| panic!("{ON_PURPOSE}"));
    let in_poll = by(|_, _| Box::pin(Bomb { in_poll: true }));
    for dialer in [t.dialer().resolver(at_once), t.dialer().resolver(in_poll)] {
        let error = failure(&dialer, NAME)?;
        assert!(error.is_panicked(), "{error:?}");
        let text = format!("resolve name.test: the resolver panicked: {ON_PURPOSE}");
        assert_eq!(error.to_string(), text);
    }
    let dialer = t.dialer().resolver(by(|_, _| Box::pin(Bomb { in_poll: false })));
    let error = failure(&dialer.timeout(Duration::from_millis(20)), NAME)?;
    assert!(error.is_dial_timeout(), "{error:?}");
    Ok(())
}

pub(crate) fn a_resolver_that_never_answers_is_given_up(t: &Fixture) -> Check {
    let limit = Duration::from_millis(50);
    let dialer = t.dialer().timeout(limit).resolver(never());
    let start = Instant::now();
    let error = failure(&dialer, NAME)?;
    assert!(start.elapsed() >= limit, "early, after {:?}", start.elapsed());
    assert!(error.is_dial_timeout(), "{error:?}");
    assert_eq!(error.to_string(), format!("connect {NAME}: no reply in 50ms"));
    Ok(())
}

pub(crate) fn the_error_of_a_resolver_names_the_host(t: &Fixture) -> Check {
    let refuses = by(|_, _| Box::pin(ready(Err(io::ErrorKind::PermissionDenied.into()))));
    let error = failure(&t.dialer().resolver(refuses), NAME)?;
    assert_eq!(error.io_kind(), io::ErrorKind::PermissionDenied, "{error:?}");
    assert!(error.to_string().starts_with("resolve name.test: "), "{error}");
    Ok(())
}

pub(crate) fn an_answer_without_addresses_is_an_error(t: &Fixture) -> Check {
    let error = failure(&t.dialer().resolver(always(&[])), NAME)?;
    assert_eq!(error.io_kind(), io::ErrorKind::NotFound, "{error:?}");
    assert_eq!(error.to_string(), "resolve name.test: the host has no address");
    Ok(())
}

pub(crate) fn of_ten_thousand_addresses_sixty_four_are_tried(t: &Fixture) -> Check {
    let refusing = Refusing::new()?;
    let (dialer, attempts) = counted(t.dialer().resolver(always(&vec![refusing.addr; 10_000])));
    let error = failure(&dialer, NAME)?;
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{error:?}");
    assert!(error.to_string().contains("(64 addresses tried)"), "{error}");
    assert_eq!(attempts.load(Ordering::SeqCst), 64);
    Ok(())
}
