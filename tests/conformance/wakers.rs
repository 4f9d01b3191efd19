//! Wakers that change from poll to poll, as those of a migrating task do. A future of the library
//! calls the waker of its last poll only. A future that is dropped while it waits has consumed
//! nothing.

use std::future::{Future, poll_fn};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use ringpoll::buffer::{Reader as _, Writer as _};
use ringpoll::{Connection, Dialer, LinkBuffer, Mux, unblock};

use crate::dial::FullBacklog;
use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, wakers:
            a_read_goes_on_with_the_waker_of_its_last_poll
            a_read_that_is_dropped_while_it_waits_takes_nothing
            a_write_goes_on_with_the_waker_of_its_last_poll
            a_write_that_is_dropped_while_it_waits_loses_nothing
            room_is_told_to_the_waker_of_the_last_poll
            a_detach_goes_on_with_the_waker_of_its_last_poll
            a_dial_goes_on_with_the_waker_of_its_last_poll
            a_dial_that_is_dropped_while_it_waits_leaves_nothing
            a_call_goes_on_with_the_waker_of_its_last_poll
            a_producer_goes_on_with_the_waker_of_its_last_poll
            a_producer_that_is_dropped_while_it_waits_sends_nothing
            a_waker_that_panics_harms_nobody_else
        }
    };
}
pub(crate) use cases;

/// Polls a future twice whenever it is polled, with a new waker each time. Passes on the wake-ups
/// of the newest waker alone.
struct Fresh<F, W> {
    future: Pin<Box<F>>,
    /// Tells that the future waits.
    waits: W,
    /// The number of the newest waker.
    newest: Arc<AtomicUsize>,
}

fn fresh<F: Future, W: FnMut() + Unpin>(future: F, waits: W) -> Fresh<F, W> {
    Fresh { future: Box::pin(future), waits, newest: Arc::default() }
}

impl<F: Future, W: FnMut() + Unpin> Future for Fresh<F, W> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        for _ in 0..2 {
            let number = self.newest.fetch_add(1, Ordering::SeqCst) + 1;
            let newest = Arc::clone(&self.newest);
            let waker =
                Waker::from(Arc::new(Numbered { number, newest, task: cx.waker().clone() }));
            if let Poll::Ready(done) = self.future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return Poll::Ready(done);
            }
        }
        (self.waits)();
        Poll::Pending
    }
}

struct Numbered {
    number: usize,
    newest: Arc<AtomicUsize>,
    task: Waker,
}

impl Wake for Numbered {
    fn wake(self: Arc<Self>) {
        if self.number == self.newest.load(Ordering::SeqCst) {
            self.task.wake_by_ref();
        }
    }
}

type Boxed<'a, T> = Pin<Box<dyn Future<Output = Check<T>> + Send + 'a>>;
type OnConnection<T> = for<'a> fn(&'a mut Connection) -> Boxed<'a, T>;

const TEXT: &[u8] = b"hello\n";

/// Each says how many bytes of the text it has taken.
const READS: &[(&str, OnConnection<usize>)] = &[
    ("next", |conn| Box::pin(async { whole(&conn.next(TEXT.len()).await?) })),
    ("peek", |conn| Box::pin(async { whole(&conn.peek(TEXT.len()).await?).map(|_| 0) })),
    ("skip", |conn| {
        Box::pin(async {
            conn.skip(TEXT.len()).await?;
            Ok(TEXT.len())
        })
    }),
    ("until", |conn| Box::pin(async { whole(&conn.until(b'\n').await?) })),
    ("slice", |conn| Box::pin(async { Ok(conn.slice(TEXT.len()).await?.len()) })),
    ("read_to_vec", |conn| Box::pin(async { whole(&conn.read_to_vec(TEXT.len()).await?) })),
    ("read_string", |conn| {
        Box::pin(async { whole(conn.read_string(TEXT.len()).await?.as_bytes()) })
    }),
    ("read_exact", |conn| {
        Box::pin(async {
            let mut buffer = [0; TEXT.len()];
            conn.read_exact(&mut buffer).await?;
            whole(&buffer)
        })
    }),
    ("read", |conn| {
        Box::pin(async {
            let mut buffer = [0; TEXT.len()];
            let count = conn.read(&mut buffer).await?;
            assert_eq!(buffer[..count], TEXT[..count]);
            Ok(count)
        })
    }),
    ("read_byte", |conn| {
        Box::pin(async {
            assert_eq!(conn.read_byte().await?, TEXT[0]);
            Ok(1)
        })
    }),
    ("readable", |conn| {
        Box::pin(async {
            assert!(conn.readable().await? > 0);
            Ok(0)
        })
    }),
    ("poll_readable", |conn| {
        Box::pin(async {
            assert!(poll_fn(|cx| conn.poll_readable(cx)).await? > 0);
            Ok(0)
        })
    }),
];

fn whole(read: &[u8]) -> Check<usize> {
    assert_eq!(read, TEXT);
    Ok(TEXT.len())
}

pub(crate) fn a_read_goes_on_with_the_waker_of_its_last_poll(t: &Fixture) -> Check {
    each_read(t, |conn, read, waits| Box::pin(fresh(read(conn), waits)))
}

pub(crate) fn a_read_that_is_dropped_while_it_waits_takes_nothing(t: &Fixture) -> Check {
    each_read(t, |conn, read, mut waits| {
        Box::pin(async move {
            let given_up = poll_once(read(conn)).await;
            assert!(given_up.is_none(), "nothing was sent");
            waits();
            read(conn).await
        })
    })
}

type Waits = Box<dyn FnMut() + Send>;

/// Tells each time; the test listens once.
fn telling(tell: Sender<()>) -> Waits {
    Box::new(move || {
        let _ = tell.send(());
    })
}

/// Has each read wait, as `wait` says, before the peer sends the text byte by byte.
fn each_read(
    t: &Fixture,
    wait: for<'a> fn(&'a mut Connection, OnConnection<usize>, Waits) -> Boxed<'a, usize>,
) -> Check {
    for &(name, read) in READS {
        eprintln!("{name}");
        let (tell, waits) = channel();
        let (mut peer, done) = t.drive(move |mut conn| async move {
            let taken = wait(&mut conn, read, telling(tell)).await?;
            assert_eq!(conn.next(TEXT.len() - taken).await?[..], TEXT[taken..]);
            Ok(())
        })?;
        waits.recv_timeout(DEADLINE)?;
        for byte in TEXT {
            std::io::Write::write_all(&mut peer, &[*byte])?;
        }
        done.wait();
    }
    Ok(())
}

/// More than the kernel takes for a peer that does not read.
const OUTPUT_BYTES: usize = 8 << 20;

/// Each says whether it has ended the output.
const WRITES: &[(&str, OnConnection<bool>)] = &[
    ("flush", |conn| {
        Box::pin(async {
            conn.flush().await?;
            Ok(false)
        })
    }),
    ("poll_flush", |conn| {
        Box::pin(async {
            poll_fn(|cx| conn.poll_flush(cx)).await?;
            Ok(false)
        })
    }),
    ("shutdown_write", |conn| {
        Box::pin(async {
            conn.shutdown_write().await?;
            Ok(true)
        })
    }),
    ("poll_shutdown_write", |conn| {
        Box::pin(async {
            poll_fn(|cx| conn.poll_shutdown_write(cx)).await?;
            Ok(true)
        })
    }),
];

pub(crate) fn a_write_goes_on_with_the_waker_of_its_last_poll(t: &Fixture) -> Check {
    each_write(t, |conn, write, waits| Box::pin(fresh(write(conn), waits)))
}

pub(crate) fn a_write_that_is_dropped_while_it_waits_loses_nothing(t: &Fixture) -> Check {
    each_write(t, |conn, write, mut waits| {
        Box::pin(async move {
            let given_up = poll_once(write(conn)).await;
            assert!(given_up.is_none(), "{OUTPUT_BYTES} bytes fit into a peer that does not read");
            waits();
            write(conn).await
        })
    })
}

/// Has each write wait, as `wait` says, before the peer reads.
fn each_write(
    t: &Fixture,
    wait: for<'a> fn(&'a mut Connection, OnConnection<bool>, Waits) -> Boxed<'a, bool>,
) -> Check {
    for &(name, write) in WRITES {
        eprintln!("{name}");
        let (tell, waits) = channel();
        let (peer, done) = t.drive(move |mut conn| async move {
            conn.write(pattern(0, OUTPUT_BYTES))?;
            if !wait(&mut conn, write, telling(tell)).await? {
                conn.shutdown_write().await?;
            }
            assert!(conn.next(1).await.expect_err("the peer ends").is_closed());
            Ok(())
        })?;
        waits.recv_timeout(DEADLINE)?;
        let output = read_all(&peer)?;
        assert_eq!(output.len(), OUTPUT_BYTES);
        assert_pattern(&output, 0);
        drop(peer);
        done.wait();
    }
    Ok(())
}

pub(crate) fn room_is_told_to_the_waker_of_the_last_poll(t: &Fixture) -> Check {
    let tuning = Tuning { output_bytes_max: 64 << 10, ..Tuning::default() };
    let (tell, waits) = channel();
    let (peer, done) = t.drive_tuned(tuning, move |mut conn| async move {
        conn.write(pattern(0, OUTPUT_BYTES))?;
        conn.submit()?;
        let room = poll_fn(|cx| conn.poll_writable(cx));
        assert!(fresh(room, telling(tell)).await? > 0);
        Ok(conn.shutdown_write().await?)
    })?;
    waits.recv_timeout(DEADLINE)?;
    assert_eq!(read_all(&peer)?.len(), OUTPUT_BYTES);
    done.wait();
    Ok(())
}

/// It waits twice: for the flush, and for the poller.
pub(crate) fn a_detach_goes_on_with_the_waker_of_its_last_poll(t: &Fixture) -> Check {
    let (tell, waits) = channel();
    let (peer, done) = t.drive(move |mut conn| async move {
        conn.write(pattern(0, OUTPUT_BYTES))?;
        let detached = fresh(conn.detach(), telling(tell)).await?;
        drop(detached.fd);
        Ok(())
    })?;
    waits.recv_timeout(DEADLINE)?;
    assert_eq!(read_all(&peer)?.len(), OUTPUT_BYTES);
    done.wait();
    Ok(())
}

/// What dials are made to.
struct Targets {
    listener: TcpListener,
    deaf: DeafListener,
    full: FullBacklog,
}

impl Targets {
    fn new() -> Check<Targets> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        Ok(Targets { listener, deaf: DeafListener::new()?, full: FullBacklog::new()? })
    }

    /// Dials by name, each with whether it connects.
    fn dials(&self, t: &Fixture) -> Check<Vec<(&'static str, Dialer, String, bool)>> {
        let (plain, addr) = (t.dialer(), self.listener.local_addr()?);
        let soon = plain.clone().timeout(Duration::from_millis(100));
        // TEST-NET-3 (RFC 5737): no interface has it.
        let foreign = SocketAddr::from((Ipv4Addr::new(203, 0, 113, 9), 0));
        let elsewhere = soon.clone().local_addr(foreign);
        Ok(vec![
            ("local address", elsewhere, addr.to_string(), false),
            ("by name", plain.clone(), format!("tcp4:localhost:{}", addr.port()), true),
            ("by address", plain, addr.to_string(), true),
            ("no answer", soon.clone(), self.deaf.addr.to_string(), false),
            ("full backlog", soon, self.full.addr(), false),
        ])
    }
}

pub(crate) fn a_dial_goes_on_with_the_waker_of_its_last_poll(t: &Fixture) -> Check {
    let targets = Targets::new()?;
    for (name, dialer, addr, connects) in targets.dials(t)? {
        eprintln!("{name}");
        let (peer, done) = t.drive(move |_conn| async move {
            Ok(fresh(async { dialer.connect(&addr).await.is_ok() }, || ()).await)
        })?;
        assert_eq!(done.wait(), connects, "{name}");
        drop(peer);
    }
    Ok(())
}

pub(crate) fn a_dial_that_is_dropped_while_it_waits_leaves_nothing(t: &Fixture) -> Check {
    let targets = Targets::new()?;
    for (name, dialer, addr, _) in targets.dials(t)? {
        eprintln!("{name}");
        let dialer = dialer.timeout(Duration::from_secs(1000));
        let (peer, done) = t.drive(move |_conn| async move {
            let dial = dialer.connect(&addr);
            // On a poller of its own it may be through at once.
            drop(poll_once(dial).await);
            Ok(())
        })?;
        done.wait();
        drop(peer);
        if name == "local address" {
            // It pauses without a socket. Timers of sockets stay until they are swept out.
            eventually("no timer is left", || t.timers() == 0);
        }
    }
    Ok(())
}

pub(crate) fn a_call_goes_on_with_the_waker_of_its_last_poll(t: &Fixture) -> Check {
    let (tell, waits) = channel();
    let latch = Latch::new();
    let blocks = Arc::clone(&latch);
    let (_peer, done) = t.drive(move |_conn| async move {
        // One is given up, and takes nothing from the next.
        assert!(
            poll_once(unblock(|| std::thread::sleep(Duration::from_millis(1)))).await.is_none()
        );
        let call = unblock(move || {
            blocks.pass();
            42
        });
        assert_eq!(fresh(call, telling(tell)).await?, 42);
        Ok(())
    })?;
    waits.recv_timeout(DEADLINE)?;
    latch.open();
    done.wait();
    Ok(())
}

type OnMux = for<'a> fn(&'a Mux) -> Boxed<'a, ()>;

/// As much as may wait for the driver of a mux.
static FULL: [u8; 1 << 20] = [7; 1 << 20];

/// Each with what it adds to the output.
const PRODUCERS: &[(&str, OnMux, &[u8])] = &[
    ("send", |mux| Box::pin(async { Ok(mux.send(TEXT).await?) }), TEXT),
    ("send_copy", |mux| Box::pin(async { Ok(mux.send_copy(TEXT).await?) }), TEXT),
    ("send_buffer", |mux| Box::pin(async { Ok(mux.send_buffer(buffer()).await?) }), TEXT),
    ("flush", |mux| Box::pin(async { Ok(mux.flush().await?) }), b""),
    ("close", |mux| Box::pin(async { Ok(mux.close().await?) }), b""),
];

fn buffer() -> LinkBuffer {
    let mut buffer = LinkBuffer::new();
    buffer.write_copy(TEXT).expect("memory takes it");
    buffer
}

/// The driver changes its waker as well.
pub(crate) fn a_producer_goes_on_with_the_waker_of_its_last_poll(t: &Fixture) -> Check {
    each_producer(t, true, |mux, produce, waits| Box::pin(fresh(produce(mux), waits)))
}

pub(crate) fn a_producer_that_is_dropped_while_it_waits_sends_nothing(t: &Fixture) -> Check {
    each_producer(t, false, |mux, produce, mut waits| {
        Box::pin(async move {
            assert!(poll_once(produce(mux)).await.is_none(), "there was no room");
            waits();
            // Fails after a close that was begun and given up.
            drop(mux.flush().await);
            Ok(())
        })
    })
}

/// Has each producer wait, as `wait` says, before the driver of its mux begins.
fn each_producer(
    t: &Fixture,
    adds: bool,
    wait: for<'a> fn(&'a Mux, OnMux, Waits) -> Boxed<'a, ()>,
) -> Check {
    for &(name, produce, added) in PRODUCERS {
        eprintln!("{name}");
        let (tell, waits) = channel();
        let (peer, done) = t.drive(move |conn| async move {
            let (reader, writer) = conn.split();
            let (mux, driver) = Mux::new(writer);
            mux.send(&FULL[..]).await?;
            let mut driver = Some(driver);
            let waits = Box::new(move || {
                if let Some(driver) = driver.take() {
                    drop(tell.send(driver));
                }
            });
            wait(&mux, produce, waits).await?;
            // Fails where that was a close.
            drop(mux.close().await);
            drop(reader);
            Ok(())
        })?;
        let driver = waits.recv_timeout(DEADLINE)?;
        let driven = on_task(async move { Ok(fresh(driver, || ()).await?) });
        let output = read_all(&peer)?;
        assert!(output.starts_with(&FULL), "{} bytes", output.len());
        assert_eq!(&output[FULL.len()..], if adds { added } else { b"" });
        driven.wait();
        done.wait();
    }
    Ok(())
}

/// Panics whenever it is called.
#[derive(Default)]
struct Panics {
    calls: AtomicUsize,
}

impl Wake for Panics {
    fn wake(self: Arc<Self>) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        panic!("{ON_PURPOSE}");
    }
}

/// Polls `future` with a waker that panics, whenever that is called.
fn panicking<T>(future: impl Future<Output = T>, mut waits: impl FnMut()) -> T {
    let panics = Arc::<Panics>::default();
    let waker = Waker::from(Arc::clone(&panics));
    let mut future = pin!(future);
    loop {
        let before = panics.calls.load(Ordering::SeqCst);
        if let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return done;
        }
        waits();
        eventually("the waker is called", || panics.calls.load(Ordering::SeqCst) > before);
    }
}

/// Each time, the same thread has to wake another task after it.
pub(crate) fn a_waker_that_panics_harms_nobody_else(t: &Fixture) -> Check {
    let (mut conn, mut peer) = t.client()?;
    let send = || std::io::Write::write_all(&mut peer, TEXT).expect("it is open");
    whole(&panicking(conn.next(TEXT.len()), send)?)?;
    std::io::Write::write_all(&mut peer, TEXT)?;
    whole(&block_on(async { Ok(conn.next(TEXT.len()).await?) })?)?;

    let foreign = SocketAddr::from((Ipv4Addr::new(203, 0, 113, 9), 0));
    let dialer = t.dialer().local_addr(foreign);
    assert!(panicking(dialer.connect("127.0.0.1:9"), || ()).is_err());
    assert!(block_on(async { Ok(dialer.connect("127.0.0.1:9").await.is_err()) })?);

    let latch = Latch::new();
    let blocks = Arc::clone(&latch);
    panicking(unblock(move || blocks.pass()), || latch.open())?;
    block_on(async { Ok(unblock(|| ()).await?) })?;

    let (reader, writer) = conn.split();
    let (mux, driver) = Mux::new(writer);
    block_on(async { Ok(mux.send(&FULL[..]).await?) })?;
    let mut driver = Some(driver);
    let (mut others, mut driven) = (Vec::new(), Vec::new());
    panicking(mux.send(TEXT), || {
        for _ in 0..driver.iter().len() {
            let mut other = Box::pin({
                let mux = mux.clone();
                async move { Ok(mux.send(TEXT).await?) }
            });
            let (tell, waits) = channel();
            others.push(on_task(async move {
                let first = poll_once(other.as_mut()).await;
                let _ = tell.send(first.is_none());
                other.await
            }));
            assert!(waits.recv_timeout(DEADLINE).expect("it is polled"), "there was no room");
        }
        driven.extend(driver.take().map(|driver| on_task(async { Ok(driver.await?) })));
    })?;
    others.iter().for_each(Outcome::wait);
    block_on(async { Ok(mux.close().await?) })?;
    driven.iter().for_each(Outcome::wait);
    assert_eq!(read_exactly(&peer, FULL.len() + 2 * TEXT.len())?.len(), FULL.len() + 12);
    drop(reader);
    Ok(())
}
