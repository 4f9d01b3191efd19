//! User code that the library calls or drops: it may panic, and it may call the library again. That
//! ends its own connection at most.
//!
//! One table of such pieces, in `pieces.rs`. Each has a trap, which springs once: it panics, or it
//! calls every method of a handle. Then a connection of the same poller is still served, so is a
//! new one, nothing is left behind, and the server shuts down.

mod pieces;

use std::future::Future;
use std::io::Write;
use std::net::TcpStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use ringpoll::{Connection, Handle, Result, ServerHandle};
use tokio::sync::Semaphore;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, user_code:
            a_panicking_handler_or_callback_costs_its_own_connection_at_most
            a_panicking_waker_costs_its_own_connection_at_most
            a_forced_shutdown_gets_past_a_panicking_waker
            a_panicking_destructor_costs_its_own_connection_at_most
            a_panicking_destructor_of_a_future_that_is_done_costs_nothing
            a_panic_beside_the_handlers_costs_its_own_connection_at_most
            handlers_and_callbacks_may_call_anything
            wakers_may_call_anything
            destructors_may_call_anything
            code_beside_the_handlers_may_call_anything
        }
    };
}
pub(crate) use cases;

pub(crate) fn a_panicking_handler_or_callback_costs_its_own_connection_at_most(
    t: &Fixture,
) -> Check {
    try_all(t, Deed::Panic, pieces::HANDLERS)
}

pub(crate) fn a_panicking_waker_costs_its_own_connection_at_most(t: &Fixture) -> Check {
    try_all(t, Deed::Panic, pieces::WAKERS)
}

/// It closes the connections on their poller, and so wakes the tasks that wait for them.
pub(crate) fn a_forced_shutdown_gets_past_a_panicking_waker(t: &Fixture) -> Check {
    let order = pieces::reads_until_closed;
    let piece = Piece { name: "", place: Place::Order, order, provoke: |_| Ok(()) };
    let scene = Scene::new(Deed::Panic, &piece);
    let stage = Stage::new(t, Arc::clone(&scene))?;
    let victim = stage.reached()?;
    scene.set_trap();
    let server = stage.server.clone();
    let cut = on_thread(move || Ok(server.shutdown_forced(Duration::ZERO)?)).wait();
    assert!(cut > 0, "nothing was cut");
    stage.sprung()?;
    assert_ended(&victim);
    assert_ended(&stage.bystander);
    let open = stage.server.stats().open;
    assert_eq!(open, 0, "connections are left");
    // The server's handlers hold the scene, which holds a handle of the server's.
    drop(scene.other.lock().expect("nobody panics here").take());
    Ok(())
}

pub(crate) fn a_panicking_destructor_costs_its_own_connection_at_most(t: &Fixture) -> Check {
    try_all(t, Deed::Panic, pieces::DESTRUCTORS)
}

/// A future whose destructor panics.
struct Bomb<F>(Pin<Box<F>>);

impl<F: Future> Future for Bomb<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl<F> Drop for Bomb<F> {
    fn drop(&mut self) {
        panic!("a destructor {ON_PURPOSE}");
    }
}

pub(crate) fn a_panicking_destructor_of_a_future_that_is_done_costs_nothing(t: &Fixture) -> Check {
    let server = t.spawn(t.server().on_request(|conn| Bomb(Box::pin(echo_frame(conn)))));
    let peer = dial(&server)?;
    for tag in 0..3 {
        exchange_frame(&peer, tag, 100)?;
    }
    server.shutdown(DEADLINE)?;
    assert_eq!((server.stats().handler_panics, server.stats().handler_errors), (0, 0));
    Ok(())
}

pub(crate) fn a_panic_beside_the_handlers_costs_its_own_connection_at_most(t: &Fixture) -> Check {
    try_all(t, Deed::Panic, pieces::BESIDE)
}

pub(crate) fn handlers_and_callbacks_may_call_anything(t: &Fixture) -> Check {
    try_all(t, Deed::CallAnything, pieces::HANDLERS)
}

pub(crate) fn wakers_may_call_anything(t: &Fixture) -> Check {
    try_all(t, Deed::CallAnything, pieces::WAKERS)
}

pub(crate) fn destructors_may_call_anything(t: &Fixture) -> Check {
    try_all(t, Deed::CallAnything, pieces::DESTRUCTORS)
}

pub(crate) fn code_beside_the_handlers_may_call_anything(t: &Fixture) -> Check {
    try_all(t, Deed::CallAnything, pieces::BESIDE)
}

/// A row of the table.
struct Piece {
    name: &'static str,
    place: Place,
    /// What a handler does that is told to by [`ORDER`].
    order: Order,
    /// Makes the library come to the piece.
    provoke: fn(&Stage) -> Check,
}

/// Which of the server's own pieces springs the trap; `Order` is what the order has made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Prepare,
    ConnectCall,
    ConnectPoll,
    ConnectLaterPoll,
    ConnectDrop,
    RequestCall,
    RequestPoll,
    RequestLaterPoll,
    RequestDrop,
    Disconnect,
    Error,
    Close,
    Order,
}

type Order = fn(Connection, Arc<Scene>) -> Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// The request that tells a handler to do what its row says. Others are sent back.
const ORDER: u8 = b'!';
/// The request that has a handler leave its handle with the scene.
const REMEMBER: u8 = b'=';

/// What a trap does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Panic,
    CallAnything,
}

/// What the handlers of one row share with the test.
struct Scene {
    deed: Deed,
    place: Place,
    order: Order,
    /// The next piece that asks springs the trap.
    is_set: AtomicBool,
    began: AtomicUsize,
    ended: AtomicUsize,
    /// Whose methods the trap calls. Taken out then, so that no value keeps its own connection.
    target: Mutex<Option<Handle>>,
    /// The connection that is under orders.
    victim: Mutex<Option<Handle>>,
    /// A connection that has nothing to do with it.
    other: Mutex<Option<Handle>>,
    /// How often an order has said that it is where it is to be.
    reached: AtomicUsize,
    /// How many futures of handlers are gone.
    finished: AtomicUsize,
    /// Orders that are to stay wait for a permit.
    permits: Semaphore,
}

impl Scene {
    fn new(deed: Deed, piece: &Piece) -> Arc<Scene> {
        Arc::new(Scene {
            deed,
            place: piece.place,
            order: piece.order,
            is_set: AtomicBool::new(false),
            began: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
            target: Mutex::default(),
            victim: Mutex::default(),
            other: Mutex::default(),
            reached: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
            permits: Semaphore::new(0),
        })
    }

    fn set_trap(&self) {
        self.is_set.store(true, Ordering::SeqCst);
    }

    /// What the trap is to call.
    fn aim(&self, handle: &Handle) {
        if self.deed == Deed::CallAnything {
            *self.target.lock().expect("nobody panics here") = Some(handle.clone());
        }
    }

    /// The trap, in a piece of user code.
    fn spring(&self) {
        // A second panic during a first one would end the process.
        if thread::panicking() || !self.is_set.swap(false, Ordering::SeqCst) {
            return;
        }
        self.began.fetch_add(1, Ordering::SeqCst);
        if self.deed == Deed::Panic {
            panic!("{ON_PURPOSE}");
        }
        let target = self.target.lock().expect("nobody panics here").take();
        call_anything(&target.expect("the trap was aimed"));
        self.ended.fetch_add(1, Ordering::SeqCst);
    }

    /// The server's own piece at `place`.
    fn at(&self, place: Place, handle: &Handle) {
        if place == self.place && self.is_set.load(Ordering::SeqCst) {
            self.aim(handle);
            self.spring();
        }
    }

    /// An order is where it is to be.
    fn reach(&self) {
        self.reached.fetch_add(1, Ordering::SeqCst);
    }

    /// An order stays until the end of the scene.
    async fn stay(&self) {
        self.permits.acquire().await.expect("it is never closed").forget();
    }

    /// A handle of the connection, for the test.
    fn expose(&self, handle: &Handle) {
        *self.victim.lock().expect("nobody panics here") = Some(handle.clone());
    }

    fn victim(&self) -> Handle {
        let victim = self.victim.lock().expect("nobody panics here").clone();
        victim.expect("its order has exposed it")
    }
}

/// Everything a handle offers.
fn call_anything(handle: &Handle) {
    // Whether these succeed depends on whether the connection has ended; that they return does not.
    let _ = (handle.stats(), handle.is_active(), handle.is_closed(), handle.id());
    let _ = (handle.local_addr(), handle.peer_addr(), format!("{handle:?}"));
    handle.set_read_timeout(Some(DEADLINE));
    handle.set_write_timeout(Some(DEADLINE));
    handle.set_write_stall_timeout(Some(DEADLINE));
    handle.set_deadline(None);
    let _ = (handle.is_shutting_down(), handle.shutdown_begun());
    handle.set_idle_timeout(Some(DEADLINE));
    handle.set_context(7_u8);
    let _ = handle.context::<u8>();
    handle.on_close(|_| ());
    let _ = handle.with_fd(|_| ());
    let _ = handle.spawn(async { Ok(()) });
    handle.close();
}

/// A handler's future that springs the trap where it is told to: in its first poll, in a later one,
/// or when it is dropped after its end.
struct Trapped {
    scene: Arc<Scene>,
    handle: Handle,
    places: [Place; 3],
    polls: usize,
    inner: Pin<Box<dyn Future<Output = Result<()>> + Send>>,
}

impl Future for Trapped {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let place = self.places[self.polls.min(1)];
        self.polls += 1;
        let polled = self.inner.as_mut().poll(cx);
        // After the poll: the first one sets the trap for the second.
        self.scene.at(place, &self.handle);
        polled
    }
}

impl Drop for Trapped {
    fn drop(&mut self) {
        self.scene.finished.fetch_add(1, Ordering::SeqCst);
        self.scene.at(self.places[2], &self.handle);
    }
}

fn trapped(
    scene: &Arc<Scene>,
    handle: Handle,
    places: [Place; 3],
    inner: impl Future<Output = Result<()>> + Send + 'static,
) -> Trapped {
    Trapped { scene: Arc::clone(scene), handle, places, polls: 0, inner: Box::pin(inner) }
}

async fn serve(mut conn: Connection, scene: Arc<Scene>) -> Result<()> {
    match conn.peek(1).await?[0] {
        ORDER => {
            conn.skip(1).await?;
            (scene.order)(conn, scene).await
        }
        REMEMBER => {
            *scene.other.lock().expect("nobody panics here") = Some(conn.handle());
            echo(conn).await
        }
        _ => echo(conn).await,
    }
}

/// The test of one row: a server with one poller, and the other connections to it.
struct Stage {
    scene: Arc<Scene>,
    server: ServerHandle,
    bystander: TcpStream,
    other: TcpStream,
}

impl Stage {
    fn new(t: &Fixture, scene: Arc<Scene>) -> Check<Stage> {
        let [prepare, connect, request, disconnect, error] = [(); 5].map(|()| Arc::clone(&scene));
        let builder = t.server().pollers(1).output_bytes_max(1 << 20);
        let builder = builder
            .on_prepare(move |handle| {
                let closing = Arc::clone(&prepare);
                handle.on_close(move |handle| closing.at(Place::Close, handle));
                prepare.at(Place::Prepare, handle);
                Ok(())
            })
            .on_connect(move |conn| {
                connect.at(Place::ConnectCall, &conn);
                let places = [Place::ConnectPoll, Place::ConnectLaterPoll, Place::ConnectDrop];
                trapped(&connect, conn.handle(), places, async move {
                    tokio::task::yield_now().await;
                    drop(conn);
                    Ok(())
                })
            })
            .on_request(move |conn| {
                request.at(Place::RequestCall, &conn);
                let places = [Place::RequestPoll, Place::RequestLaterPoll, Place::RequestDrop];
                trapped(&request, conn.handle(), places, serve(conn, Arc::clone(&request)))
            })
            .on_disconnect(move |handle| disconnect.at(Place::Disconnect, handle))
            .on_error(move |handle, _| error.at(Place::Error, handle));
        let server = builder.bind("127.0.0.1:0")?.spawn()?;
        let (bystander, other) = (dial(&server)?, dial(&server)?);
        assert_eq!(exchange(&bystander, b"before")?, b"before");
        assert_eq!(exchange(&other, &[REMEMBER])?, [REMEMBER]);
        Ok(Stage { scene, server, bystander, other })
    }

    /// A connection that works.
    fn dial(&self) -> Check<TcpStream> {
        let peer = dial(&self.server)?;
        assert_eq!(exchange(&peer, b"fine")?, b"fine");
        Ok(peer)
    }

    /// A connection whose handler has its orders.
    fn ordered(&self) -> Check<TcpStream> {
        let mut peer = self.dial()?;
        peer.write_all(&[ORDER])?;
        Ok(peer)
    }

    /// The same, and has come to where it says so.
    fn reached(&self) -> Check<TcpStream> {
        let peer = self.ordered()?;
        let reached = || self.scene.reached.load(Ordering::SeqCst) == 1;
        assert!(holds_within(DEADLINE, reached), "its order was not carried out");
        Ok(peer)
    }

    /// Waits until the trap has sprung.
    fn sprung(&self) -> Check {
        let sprung = || self.scene.began.load(Ordering::SeqCst) == 1;
        assert!(holds_within(DEADLINE, sprung), "the library never came to it");
        Ok(())
    }

    /// Runs `code` on another thread. A panic of what it runs into is its caller's; it must return.
    fn elsewhere(&self, code: impl FnOnce(&Handle) + Send + 'static) -> Check {
        let victim = self.scene.victim();
        on_thread(move || {
            // Both ways are fine.
            let _ = catch_unwind(AssertUnwindSafe(|| code(&victim)));
            Ok(())
        })
        .wait();
        Ok(())
    }

    /// What must hold after the trap has sprung.
    fn check_aftermath(self) -> Check {
        let Stage { scene, server, bystander, other } = self;
        if scene.deed == Deed::CallAnything {
            let returned = || scene.ended.load(Ordering::SeqCst) == 1;
            assert!(holds_within(DEADLINE, returned), "it hangs in what it calls");
        }
        assert_eq!(exchange(&bystander, b"served")?, b"served", "the bystander is served");
        assert_eq!(exchange(&dial(&server)?, b"new")?, b"new", "a new connection is served");
        scene.permits.add_permits(100);
        if let Some(victim) = scene.victim.lock().expect("nobody panics here").clone()
            && victim.is_closed()
        {
            let is_gone = || victim.with_fd(|_| ()).is_err();
            assert!(holds_within(DEADLINE, is_gone), "a closed connection keeps its descriptor");
        }
        for handle in [&scene.victim, &scene.other, &scene.target] {
            let handle = handle.lock().expect("nobody panics here").take();
            drop(handle);
        }
        drop(other);
        let left = || (server.stats().open, server.stats().spawned);
        let is_clean = holds_within(DEADLINE, || left() == (1, 0));
        assert!(is_clean, "connections and spawned futures are left, with one's own: {:?}", left());
        drop(bystander);
        left_with(&server, 0);
        let ending = server.clone();
        on_thread(move || Ok(ending.shutdown(DEADLINE)?)).wait();
        Ok(())
    }
}

/// Tries every row, and fails with all that failed. `RINGPOLL_PIECE` names a single row to be
/// tried: a process that is aborted does not say which row it was.
fn try_all(t: &Fixture, deed: Deed, pieces: &[Piece]) -> Check {
    let mut failures = String::new();
    let only = std::env::var("RINGPOLL_PIECE").ok();
    for piece in pieces.iter().filter(|piece| only.as_ref().is_none_or(|only| only == piece.name)) {
        still_runs();
        eprintln!("{}", piece.name);
        let result = catch_unwind(AssertUnwindSafe(|| try_piece(t, deed, piece)));
        let failure = match result {
            Ok(Ok(())) => continue,
            Ok(Err(failure)) => failure.message().to_owned(),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or(panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
                text.unwrap_or_else(|| "panicked".to_owned())
            }
        };
        failures += &format!("\n  {}: {failure}", piece.name);
    }
    if failures.is_empty() { Ok(()) } else { Err(Failure::new(failures)) }
}

fn try_piece(t: &Fixture, deed: Deed, piece: &Piece) -> Check {
    let scene = Scene::new(deed, piece);
    let stage = Stage::new(t, Arc::clone(&scene))?;
    let server = stage.server.clone();
    let result = catch_unwind(AssertUnwindSafe(|| {
        (piece.provoke)(&stage)?;
        stage.check_aftermath()
    }));
    if !matches!(result, Ok(Ok(()))) {
        // The row has failed. The server may hang for ever, and so may the thread that drops it
        // last.
        scene.permits.add_permits(100);
        thread::spawn(move || {
            // The test has failed already.
            let _ = server.shutdown_forced(Duration::ZERO);
            std::mem::forget(server);
        });
    }
    match result {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
