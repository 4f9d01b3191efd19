//! Counts of servers and times of handlers, under the facade `metrics`.

use std::time::{Duration, Instant};

use metrics::Unit;
use ringpoll::rpc::Pool;
use ringpoll::{Connection, Result, ServerHandle};
use ringpoll_compat::metrics::{PoolMetrics, ServerMetrics, timed};

use crate::harness::{Check, DEADLINE, Fixture, wait_until};
use crate::recorder::{Keeps, recorder};

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, metrics:
            a_sample_has_the_counts_of_the_server
            a_local_recorder_gets_the_samples_of_its_thread
            samples_are_taken_until_the_server_ends
            a_dropped_sampling_ends_its_thread
            every_end_of_a_run_is_timed
            a_handler_that_panics_in_its_call_is_timed
            a_sample_has_the_counts_of_the_pool
        }
    };
}
pub(crate) use cases;

async fn echo(mut conn: Connection) -> Result<()> {
    let bytes = conn.len();
    let data = conn.next(bytes).await?;
    conn.write(data)?;
    conn.flush().await
}

async fn ask(t: &Fixture, server: &ServerHandle, rounds: usize) -> Check<Connection> {
    let mut conn = t.connect(server).await?;
    for _ in 0..rounds {
        conn.write("question")?;
        conn.flush().await?;
        assert_eq!(conn.next(8).await?, "question");
    }
    Ok(conn)
}

pub(crate) async fn a_sample_has_the_counts_of_the_server(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_request(echo))?;
    let name = format!("counts-{}", t.backend);
    let recorder = recorder();
    let metrics = ServerMetrics::new(server.clone(), name.clone());
    let value = |metric: &str| {
        recorder.value(&format!("ringpoll_{metric}{{server={name}}}")).expect("it is sampled")
    };
    wait_until(|| server.stats().pollers.listeners == 1).await;
    metrics.sample();
    assert_eq!((value("accepted_total"), value("open_connections")), (0, 0));
    assert_eq!((value("pollers"), value("poller_listeners")), (1, 1));
    let conn = ask(t, &server, 10).await?;
    // A send is counted after the peer may have its bytes.
    wait_until(|| server.stats().pollers.sent_bytes == 80).await;
    metrics.sample();
    assert_eq!((value("accepted_total"), value("open_connections")), (1, 1));
    assert_eq!(value("poller_received_bytes_total"), 80);
    assert_eq!(value("poller_sent_bytes_total"), 80);
    assert!(value("poller_handler_runs_total") >= 10);
    drop(conn);
    wait_until(|| server.stats().open == 0).await;
    metrics.sample();
    assert_eq!((value("accepted_total"), value("open_connections")), (1, 0));
    for (key, _, has_decreased) in recorder.of_server(&name) {
        assert!(!key.contains("_total") || !has_decreased, "{key} has decreased");
    }
    assert_eq!(recorder.unit("ringpoll_poller_received_bytes_total"), Some(Unit::Bytes));
    assert_eq!(recorder.unit("ringpoll_placement_wake_ns"), Some(Unit::Nanoseconds));
    assert_eq!(recorder.unit("ringpoll_handler_seconds"), Some(Unit::Seconds));
    Ok(())
}

pub(crate) async fn a_sample_has_the_counts_of_the_pool(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_request(echo))?;
    let address = server.local_addr().to_string();
    let name = format!("pool-{}", t.backend);
    let recorder = recorder();
    let pool = Pool::builder().dialer(t.dialer()).build();
    let metrics = PoolMetrics::new(pool.clone(), name.clone());
    let value = |metric: &str| {
        recorder.value(&format!("ringpoll_pool_{metric}{{pool={name}}}")).expect("it is sampled")
    };
    let conn = pool.checkout(&address).await?;
    pool.checkout(&address).await?.give_back();
    metrics.sample();
    assert_eq!((value("checked_out"), value("idle"), value("dials_total")), (1, 1, 2));
    drop(conn);
    pool.shutdown(DEADLINE).await?;
    metrics.sample();
    assert_eq!((value("checked_out"), value("idle"), value("dials_total")), (0, 0, 2));
    assert_eq!(recorder.unit("ringpoll_pool_idle"), Some(Unit::Count));
    Ok(())
}

pub(crate) async fn a_local_recorder_gets_the_samples_of_its_thread(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_request(echo))?;
    let local = Keeps::default();
    metrics::with_local_recorder(&local, || ServerMetrics::new(server, "local").sample());
    let ours = local.of_server("local");
    assert!(ours.len() > 40, "{ours:?}");
    assert!(recorder().of_server("local").is_empty());
    Ok(())
}

pub(crate) async fn samples_are_taken_until_the_server_ends(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_request(echo))?;
    let name = format!("spawned-{}", t.backend);
    let key = format!("ringpoll_accepted_total{{server={name}}}");
    let recorder = recorder();
    let metrics = ServerMetrics::new(server.clone(), name.clone());
    let often = metrics.clone().spawn(Duration::from_millis(1))?;
    wait_until(|| recorder.changes(&key) >= 3).await;
    assert!(!often.is_finished());
    drop(often);
    // The next samples of this one are the first and the last.
    let samples = recorder.changes(&key);
    let seldom = metrics.spawn(Duration::from_secs(3600))?;
    wait_until(|| recorder.changes(&key) == samples + 1).await;
    drop(ask(t, &server, 1).await?);
    let begun = Instant::now();
    server.shutdown_async(DEADLINE).await?;
    wait_until(|| seldom.is_finished()).await;
    assert!(begun.elapsed() < DEADLINE);
    assert_eq!((recorder.changes(&key), recorder.value(&key)), (samples + 2, Some(1)));
    Ok(())
}

pub(crate) async fn a_dropped_sampling_ends_its_thread(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_request(echo))?;
    let name = format!("dropped-{}", t.backend);
    let key = format!("ringpoll_accepted_total{{server={name}}}");
    let recorder = recorder();
    let sampling = ServerMetrics::new(server.clone(), name).spawn(Duration::from_secs(3600))?;
    wait_until(|| recorder.changes(&key) == 1).await;
    drop(ask(t, &server, 1).await?);
    // Waits for the thread, which takes a last sample.
    drop(sampling);
    assert_eq!((recorder.changes(&key), recorder.value(&key)), (2, Some(1)));
    Ok(())
}

/// Ends as its first byte says.
async fn by_order(mut conn: Connection) -> Result<()> {
    match conn.read_byte().await? {
        b'o' => conn.flush().await,
        b'e' => Err(ringpoll::Error::other("expected")),
        _ => panic!("expected"),
    }
}

pub(crate) async fn every_end_of_a_run_is_timed(t: &mut Fixture) -> Check {
    let name = format!("timed-{}", t.backend);
    let recorder = recorder();
    let server = t.spawn(t.builder().on_connect(timed(name.clone(), by_order)))?;
    let count = |outcome: &str| {
        let labels = format!("{{server={name},outcome={outcome}}}");
        recorder.changes(&format!("ringpoll_handler_seconds{labels}"))
    };
    for (order, outcome) in [("o", "ok"), ("e", "error"), ("p", "panic")] {
        let mut conn = t.connect(&server).await?;
        conn.write(order)?;
        conn.flush().await?;
        wait_until(|| count(outcome) == 1).await;
        if outcome != "ok" {
            assert!(t.error().await.contains("expected"));
        }
    }
    let conn = t.connect(&server).await?;
    drop(timed(name.clone(), by_order)(conn));
    // The server's run of the last connection ends with the connection, by an error.
    assert!(t.error().await.contains("Eof"));
    wait_until(|| count("error") == 2).await;
    assert_eq!((count("ok"), count("panic"), count("dropped")), (1, 1, 1));
    Ok(())
}

pub(crate) async fn a_handler_that_panics_in_its_call_is_timed(t: &mut Fixture) -> Check {
    let (recorder, name) = (recorder(), format!("call-{}", t.backend));
    let handler = |_: Connection| -> std::future::Ready<Result<()>> { panic!("expected") };
    let server = t.spawn(t.builder().on_connect(timed(name.clone(), handler)))?;
    let mut conn = t.connect(&server).await?;
    assert_eq!(conn.readable().await?, 0);
    assert!(t.error().await.contains("expected"));
    let key = format!("ringpoll_handler_seconds{{server={name},outcome=panic}}");
    assert_eq!(recorder.changes(&key), 1);
    Ok(())
}
