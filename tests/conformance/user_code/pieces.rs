//! The table: every piece of user code that the library calls or drops.

use std::fmt;
use std::future::Future;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::panic::resume_unwind;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ringpoll::{Connection, Mux, Result, unblock};

use super::{Order, Piece, Place, Scene, Stage};
use crate::harness::*;

const SHORT: Duration = Duration::from_millis(50);
/// Above what is copied.
const OWNED: usize = 64 << 10;
/// More than the kernel takes for a peer that does not read.
static TOO_MUCH: [u8; 8 << 20] = [7; 8 << 20];
/// As much as a mux keeps for its driver.
static MUX_FULL: [u8; 1 << 20] = [7; 1 << 20];

/// Handlers and callbacks.
pub(super) const HANDLERS: &[Piece] = &[
    own("on_prepare", Place::Prepare, no_order, by_dialling),
    own("on_connect, called", Place::ConnectCall, no_order, by_dialling),
    own("on_connect, first poll", Place::ConnectPoll, no_order, by_dialling),
    own("on_connect, later poll", Place::ConnectLaterPoll, no_order, by_dialling),
    own("on_connect, drop of its future", Place::ConnectDrop, no_order, by_dialling),
    own("on_request, called", Place::RequestCall, no_order, by_a_request),
    own("on_request, first poll", Place::RequestPoll, no_order, by_a_request),
    own("on_request, later poll", Place::RequestLaterPoll, waits_for_more, by_more),
    own("on_request, drop of its future", Place::RequestDrop, no_order, by_a_request),
    own("on_request, drop of one that waited", Place::RequestDrop, waits_for_more, by_more),
    own("on_disconnect", Place::Disconnect, no_order, by_leaving),
    own("on_error", Place::Error, fails, by_an_order),
    own("close callback, peer closes", Place::Close, no_order, by_leaving),
    own("close callback, handler closes", Place::Close, closes, by_an_order),
    own("close callback, idle timeout", Place::Close, goes_idle, by_an_order),
];

/// Wakers that wait for a connection.
pub(super) const WAKERS: &[Piece] = &[
    made("reader's waker, woken by bytes", reads::<WAKE>, by_more),
    made("reader's waker, woken by the end", reads::<WAKE>, by_half_closing),
    made("reader's waker, woken by a reset", reads::<WAKE>, by_a_reset),
    made("reader's waker, woken by its timer", reads_in_time, by_an_order),
    made("reader's waker, woken by the idle timeout", reads_idly, by_an_order),
    made("reader's waker, woken by a close", reads::<WAKE>, by_a_close),
    made("reader's waker, woken by a new timeout", reads::<WAKE>, by_a_new_timeout),
    made("flusher's waker, woken by progress", flushes::<WAKE>, by_reading),
    made("flusher's waker, woken by a reset", flushes::<WAKE>, by_a_reset),
    made("flusher's waker, woken by its timer", flushes_in_time, by_an_order),
    made("flusher's waker, woken by a close", flushes::<WAKE>, by_a_close),
    made("flusher's waker, woken by a new timeout", flushes::<WAKE>, by_a_new_timeout),
    made("writer's waker, woken by room", waits_for_room, by_reading),
    made("waker of a read's future, woken by bytes", polls_a_read, by_more),
    made("waker of a flush's future, woken by progress", polls_a_flush, by_reading),
    made("waker of a read's future, dropped with it", gives_up_a_read, by_an_order),
    made("reader's waker, dropped once woken", reads::<DROP>, by_more),
    made("flusher's waker, dropped once woken", flushes::<DROP>, by_reading),
    made("reader's waker, dropped for the next one", replaces_reader, by_an_order),
    made("flusher's waker, dropped for the next one", replaces_flusher, by_an_order),
    made("reader's waker, dropped at the run's end", leaves_reader, by_an_order),
    made("flusher's waker, dropped at the end", leaves_flusher, by_an_order_and_a_reset),
];

/// Values that the library drops.
pub(super) const DESTRUCTORS: &[Piece] = &[
    made("context, replaced", replaces_context, by_an_order),
    made("context, dropped with its connection", sets_context, by_leaving_after),
    made("owner of bytes, flushed", flushes_owner, by_reading_a_little),
    made("owner of bytes, sent by the poller", flushes_owner_last, by_reading),
    made("owner of bytes, submitted and closed", submits_owner_and_closes, by_an_order_and_leaving),
    made("owner of bytes, submitted and reset", submits_owner, by_a_reset),
    made("owner of bytes, submitted and closed elsewhere", submits_owner, by_a_close_and_leaving),
    made("owner of bytes, written and closed", writes_owner_and_closes, by_an_order),
    made("owner of bytes, written and closed at home", writes_owner, by_a_close_at_home),
    made("owner of bytes, written and idle", writes_owner_and_goes_idle, by_an_order),
    made("error that a handler returns", fails_with_a_value, by_an_order),
    made("error that a spawned future returns", spawns_a_failure, by_an_order),
    made("error that a handler returns, its handle kept", fails_and_is_kept, by_an_order),
    made("payload of a handler's panic", panics_with_a_value, by_an_order),
    made("payload of a callback's panic", closes_with_a_value, by_an_order),
    made("payload of a spawned future's panic", spawns_a_panic, by_an_order),
    made("payload of a panic in unblock", unblocks_a_panic, by_an_order),
];

/// Code that runs beside the handlers.
pub(super) const BESIDE: &[Piece] = &[
    made("spawned future, first poll", spawns, by_an_order),
    made("spawned future, later poll", spawns_a_wait, by_an_order),
    made("spawned future, its drop", spawns_a_value, by_an_order),
    made("unblock, its closure", unblocks, by_an_order),
    made("unblock, a result that nobody takes", unblocks_and_leaves, by_an_order),
    made("mux, a sender's waker", fills_a_mux, by_reading_on),
    made("mux, a flusher's waker", flushes_a_mux, by_reading_on),
    made("mux, owner of a message", sends_owner_through_a_mux, by_reading_a_little),
];

const fn own(
    name: &'static str,
    place: Place,
    order: Order,
    provoke: fn(&Stage) -> Check,
) -> Piece {
    Piece { name, place, order, provoke }
}

const fn made(name: &'static str, order: Order, provoke: fn(&Stage) -> Check) -> Piece {
    Piece { name, place: Place::Order, order, provoke }
}

// How the library is brought to a piece.

fn by_dialling(stage: &Stage) -> Check {
    stage.scene.set_trap();
    let _victim = dial(&stage.server)?;
    stage.sprung()
}

fn by_a_request(stage: &Stage) -> Check {
    let mut victim = stage.dial()?;
    stage.scene.set_trap();
    victim.write_all(b"fine")?;
    stage.sprung()
}

fn by_leaving(stage: &Stage) -> Check {
    let victim = stage.dial()?;
    stage.scene.set_trap();
    drop(victim);
    stage.sprung()
}

fn by_leaving_after(stage: &Stage) -> Check {
    let victim = stage.reached()?;
    assert_eq!(exchange(&victim, b"fine")?, b"fine");
    stage.scene.set_trap();
    drop(victim);
    stage.sprung()
}

/// By the order alone, which is given with the trap set.
fn by_an_order(stage: &Stage) -> Check {
    let mut victim = stage.dial()?;
    stage.scene.set_trap();
    victim.write_all(&[super::ORDER])?;
    stage.sprung()
}

fn by_an_order_and_leaving(stage: &Stage) -> Check {
    let victim = stage.reached()?;
    drop(victim);
    stage.sprung()
}

fn by_an_order_and_a_reset(stage: &Stage) -> Check {
    reset(stage.reached()?)?;
    stage.sprung()
}

/// With the trap set once the order was carried out.
fn after_the_order(stage: &Stage) -> Check<TcpStream> {
    let victim = stage.reached()?;
    stage.scene.set_trap();
    Ok(victim)
}

fn by_more(stage: &Stage) -> Check {
    let mut victim = after_the_order(stage)?;
    victim.write_all(b"x")?;
    stage.sprung()
}

fn by_half_closing(stage: &Stage) -> Check {
    let victim = after_the_order(stage)?;
    victim.shutdown(Shutdown::Write)?;
    stage.sprung()
}

fn by_a_reset(stage: &Stage) -> Check {
    reset(after_the_order(stage)?)?;
    stage.sprung()
}

fn by_a_close(stage: &Stage) -> Check {
    let _victim = after_the_order(stage)?;
    stage.elsewhere(|handle| handle.close())?;
    stage.sprung()
}

fn by_a_close_and_leaving(stage: &Stage) -> Check {
    let victim = after_the_order(stage)?;
    stage.elsewhere(|handle| handle.close())?;
    drop(victim);
    stage.sprung()
}

fn by_a_close_at_home(stage: &Stage) -> Check {
    let finished = |at_least| stage.scene.finished.load(Ordering::SeqCst) >= at_least;
    let before = stage.scene.finished.load(Ordering::SeqCst);
    let _victim = after_the_order(stage)?;
    // Of this connection: on_connect, a request, and the order.
    assert!(holds_within(DEADLINE, || finished(before + 3)), "its order does not end");
    stage.elsewhere(|handle| handle.close())?;
    stage.sprung()
}

fn by_a_new_timeout(stage: &Stage) -> Check {
    let _victim = after_the_order(stage)?;
    stage.elsewhere(|handle| {
        handle.set_read_timeout(Some(DEADLINE));
        handle.set_write_timeout(Some(DEADLINE));
    })?;
    stage.sprung()
}

/// Reads all that there is.
fn by_reading(stage: &Stage) -> Check {
    let victim = after_the_order(stage)?;
    read_until_sprung(stage, victim)
}

fn by_reading_on(stage: &Stage) -> Check {
    stage.scene.set_trap();
    read_until_sprung(stage, stage.reached()?)
}

fn by_reading_a_little(stage: &Stage) -> Check {
    let mut victim = stage.dial()?;
    stage.scene.set_trap();
    victim.write_all(&[super::ORDER])?;
    read_until_sprung(stage, victim)
}

/// The peer reads until the trap has sprung, or there is nothing more to read.
fn read_until_sprung(stage: &Stage, mut victim: TcpStream) -> Check {
    let scene = Arc::clone(&stage.scene);
    // It looks again after each such time.
    victim.set_read_timeout(Some(SHORT))?;
    let reading = on_thread(move || {
        let (mut buffer, start) = (vec![0; 64 << 10], Instant::now());
        while scene.began.load(Ordering::SeqCst) == 0 && start.elapsed() < DEADLINE {
            match victim.read(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                Err(_) => {}
            }
        }
        Ok(victim)
    });
    stage.sprung()?;
    // Held open until then.
    drop(reading.wait());
    Ok(())
}

// What handlers do.

type Done = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

fn no_order(_: Connection, _: Arc<Scene>) -> Done {
    unreachable!("nobody gives it")
}

fn waits_for_more(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.reach();
        conn.next(1).await.map(drop)
    })
}

fn fails(_: Connection, _: Arc<Scene>) -> Done {
    Box::pin(async { Err(ringpoll::Error::other(ON_PURPOSE)) })
}

fn closes(conn: Connection, _: Arc<Scene>) -> Done {
    Box::pin(async move {
        conn.close();
        Ok(())
    })
}

fn goes_idle(conn: Connection, _: Arc<Scene>) -> Done {
    Box::pin(async move {
        conn.set_idle_timeout(Some(SHORT));
        Ok(())
    })
}

/// Springs the trap when it is dropped.
struct Value(Arc<Scene>);

impl Drop for Value {
    fn drop(&mut self) {
        self.0.spring();
    }
}

/// A waker that springs the trap when it is woken, or when it is dropped.
struct Loud<const ON: u8>(Arc<Scene>);

const WAKE: u8 = 0;
const DROP: u8 = 1;

impl<const ON: u8> Wake for Loud<ON> {
    fn wake(self: Arc<Self>) {
        if ON == WAKE {
            self.0.spring();
        }
    }
}

impl<const ON: u8> Drop for Loud<ON> {
    fn drop(&mut self) {
        if ON == DROP {
            self.0.spring();
        }
    }
}

/// A waker with one owner: the code that it is passed to.
fn with_loud<const ON: u8>(
    conn: &mut Connection,
    scene: &Arc<Scene>,
    poll: impl FnOnce(&mut Connection, &mut Context<'_>) -> bool,
) {
    scene.aim(conn);
    let waker = Waker::from(Arc::new(Loud::<ON>(Arc::clone(scene))));
    assert!(poll(conn, &mut Context::from_waker(&waker)), "it has nothing to wait for");
}

fn poll_read(conn: &mut Connection, cx: &mut Context<'_>) -> bool {
    conn.poll_readable(cx).is_pending()
}

fn poll_flush(conn: &mut Connection, cx: &mut Context<'_>) -> bool {
    conn.poll_flush(cx).is_pending()
}

fn reads<const ON: u8>(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.expose(&conn);
        with_loud::<ON>(&mut conn, &scene, poll_read);
        scene.reach();
        scene.stay().await;
        Ok(())
    })
}

/// Stays until its connection is closed.
pub(super) fn reads_until_closed(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        with_loud::<WAKE>(&mut conn, &scene, poll_read);
        scene.reach();
        while !conn.is_closed() {
            tokio::task::yield_now().await;
        }
        Ok(())
    })
}

fn reads_in_time(conn: Connection, scene: Arc<Scene>) -> Done {
    conn.set_read_timeout(Some(SHORT));
    reads::<WAKE>(conn, scene)
}

fn reads_idly(conn: Connection, scene: Arc<Scene>) -> Done {
    conn.set_idle_timeout(Some(SHORT));
    reads::<WAKE>(conn, scene)
}

fn flushes<const ON: u8>(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.expose(&conn);
        conn.write(&TOO_MUCH[..])?;
        with_loud::<ON>(&mut conn, &scene, poll_flush);
        scene.reach();
        scene.stay().await;
        Ok(())
    })
}

fn flushes_in_time(conn: Connection, scene: Arc<Scene>) -> Done {
    conn.set_write_timeout(Some(SHORT));
    flushes::<WAKE>(conn, scene)
}

fn waits_for_room(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        conn.write(&TOO_MUCH[..])?;
        with_loud::<WAKE>(&mut conn, &scene, |conn, cx| conn.poll_writable(cx).is_pending());
        scene.reach();
        scene.stay().await;
        Ok(())
    })
}

/// Polls a future once, by hand.
fn poll_loudly<const ON: u8, T>(scene: &Arc<Scene>, future: Pin<&mut impl Future<Output = T>>) {
    let waker = Waker::from(Arc::new(Loud::<ON>(Arc::clone(scene))));
    let polled = future.poll(&mut Context::from_waker(&waker));
    assert!(polled.is_pending(), "it has nothing to wait for");
}

fn polls_a_read(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        let mut read = pin!(conn.next(1));
        poll_loudly::<WAKE, _>(&scene, read.as_mut());
        scene.reach();
        scene.stay().await;
        Ok(())
    })
}

fn polls_a_flush(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        conn.write(&TOO_MUCH[..])?;
        let mut flush = pin!(conn.flush());
        poll_loudly::<WAKE, _>(&scene, flush.as_mut());
        scene.reach();
        scene.stay().await;
        Ok(())
    })
}

fn gives_up_a_read(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        let mut read = pin!(conn.next(1));
        poll_loudly::<DROP, _>(&scene, read.as_mut());
        Ok(())
    })
}

fn replaces_reader(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        with_loud::<DROP>(&mut conn, &scene, poll_read);
        poll_read(&mut conn, &mut Context::from_waker(Waker::noop()));
        Ok(())
    })
}

fn replaces_flusher(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        conn.write(&TOO_MUCH[..])?;
        with_loud::<DROP>(&mut conn, &scene, poll_flush);
        poll_flush(&mut conn, &mut Context::from_waker(Waker::noop()));
        Ok(())
    })
}

fn leaves_reader(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        with_loud::<DROP>(&mut conn, &scene, poll_read);
        Ok(())
    })
}

fn leaves_flusher(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.set_trap();
        conn.write(&TOO_MUCH[..])?;
        with_loud::<DROP>(&mut conn, &scene, poll_flush);
        scene.reach();
        Ok(())
    })
}

fn replaces_context(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        conn.set_context(Value(scene));
        conn.set_context(0_u8);
        Ok(())
    })
}

fn sets_context(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        let other = scene.other.lock().expect("nobody panics here").clone();
        scene.aim(&other.expect("it was exposed first"));
        conn.set_context(Value(Arc::clone(&scene)));
        scene.reach();
        Ok(())
    })
}

/// Memory that springs the trap when it is given back.
struct Owner {
    memory: Vec<u8>,
    _value: Value,
}

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.memory
    }
}

fn owned(conn: &Connection, scene: &Arc<Scene>) -> Bytes {
    scene.expose(conn);
    scene.aim(conn);
    Bytes::from_owner(Owner { memory: vec![7; OWNED], _value: Value(Arc::clone(scene)) })
}

fn flushes_owner(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        let bytes = owned(&conn, &scene);
        conn.write(bytes)?;
        conn.flush().await
    })
}

fn flushes_owner_last(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        let bytes = owned(&conn, &scene);
        conn.write(&TOO_MUCH[..])?;
        conn.write(bytes)?;
        scene.reach();
        conn.flush().await
    })
}

fn submits_owner(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        let bytes = owned(&conn, &scene);
        conn.write(&TOO_MUCH[..])?;
        conn.write(bytes)?;
        conn.submit()?;
        scene.reach();
        scene.stay().await;
        Ok(())
    })
}

fn submits_owner_and_closes(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        let bytes = owned(&conn, &scene);
        conn.write(&TOO_MUCH[..])?;
        conn.write(bytes)?;
        conn.submit()?;
        scene.set_trap();
        scene.reach();
        conn.close();
        Ok(())
    })
}

fn writes_owner(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        let bytes = owned(&conn, &scene);
        conn.write(bytes)?;
        scene.reach();
        Ok(())
    })
}

fn writes_owner_and_closes(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        let bytes = owned(&conn, &scene);
        conn.write(bytes)?;
        conn.close();
        Ok(())
    })
}

fn writes_owner_and_goes_idle(mut conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        let bytes = owned(&conn, &scene);
        conn.write(bytes)?;
        conn.set_idle_timeout(Some(SHORT));
        Ok(())
    })
}

/// An error that springs the trap when it is dropped.
struct Failed(#[allow(dead_code, reason = "it is there to be dropped")] Value);

impl fmt::Debug for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ON_PURPOSE)
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ON_PURPOSE)
    }
}

impl std::error::Error for Failed {}

fn fails_with_a_value(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        Err(ringpoll::Error::other(Failed(Value(scene))))
    })
}

/// Its descriptor, too, closes with its run, even while handles exist.
fn fails_and_is_kept(conn: Connection, scene: Arc<Scene>) -> Done {
    scene.expose(&conn);
    fails_with_a_value(conn, scene)
}

fn spawns_a_failure(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        conn.spawn(async move { Err(ringpoll::Error::other(Failed(Value(scene)))) })
    })
}

/// Panics, past the panic hook, with a payload that springs the trap when it is dropped.
fn panic_with(scene: Arc<Scene>) -> ! {
    resume_unwind(Box::new(Value(scene)))
}

fn panics_with_a_value(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        panic_with(scene)
    })
}

fn closes_with_a_value(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        conn.on_close(move |_| panic_with(scene));
        conn.close();
        Ok(())
    })
}

fn spawns_a_panic(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        conn.spawn(async move { panic_with(scene) })
    })
}

fn unblocks_a_panic(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        unblock(move || panic_with(scene)).await
    })
}

fn spawns(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        conn.spawn(async move {
            scene.spring();
            Ok(())
        })
    })
}

fn spawns_a_wait(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        conn.spawn(async move {
            tokio::task::yield_now().await;
            scene.spring();
            Ok(())
        })
    })
}

/// A future that springs the trap when it is dropped after its end.
struct Ends(#[allow(dead_code, reason = "it is there to be dropped")] Value);

impl Future for Ends {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn spawns_a_value(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        conn.spawn(Ends(Value(scene)))
    })
}

fn unblocks(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        unblock(move || scene.spring()).await
    })
}

fn unblocks_and_leaves(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        let (begins, begun) = channel();
        let (gives_up, given_up) = channel::<()>();
        let work = move || {
            // Fails where the test has failed.
            let _ = begins.send(());
            let _ = given_up.recv_timeout(DEADLINE);
            Value(scene)
        };
        let mut call = Box::pin(unblock(work));
        let polled = call.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(polled.is_pending(), "it waits for leave");
        begun.recv_timeout(DEADLINE).map_err(ringpoll::Error::other)?;
        drop(call);
        drop(gives_up);
        Ok(())
    })
}

/// Runs a mux on the connection, until a sender of it waits.
fn fills_a_mux(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        let (reader, writer) = conn.split();
        let (mux, driver) = Mux::new(writer);
        reader.spawn(driver)?;
        let waker = Waker::from(Arc::new(Loud::<WAKE>(Arc::clone(&scene))));
        let mut sends = Vec::new();
        loop {
            let mux = mux.clone();
            let mut send = Box::pin(async move { mux.send(&MUX_FULL[..]).await });
            if send.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                sends.push(send);
                break;
            }
        }
        scene.reach();
        scene.stay().await;
        reader.close();
        Ok(())
    })
}

fn flushes_a_mux(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        scene.aim(&conn);
        let (reader, writer) = conn.split();
        let (mux, driver) = Mux::new(writer);
        reader.spawn(driver)?;
        mux.send(&TOO_MUCH[..]).await?;
        let mut flush = Box::pin(mux.flush());
        let waker = Waker::from(Arc::new(Loud::<WAKE>(Arc::clone(&scene))));
        let polled = flush.as_mut().poll(&mut Context::from_waker(&waker));
        assert!(polled.is_pending(), "the peer does not read yet");
        drop(waker);
        scene.reach();
        scene.stay().await;
        reader.close();
        Ok(())
    })
}

fn sends_owner_through_a_mux(conn: Connection, scene: Arc<Scene>) -> Done {
    Box::pin(async move {
        let bytes = owned(&conn, &scene);
        let (reader, writer) = conn.split();
        let (mux, driver) = Mux::new(writer);
        reader.spawn(driver)?;
        mux.send(bytes).await?;
        // It ends either way.
        let _ = mux.close().await;
        Ok(())
    })
}
