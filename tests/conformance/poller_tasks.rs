//! Tasks that a program runs on a group of pollers.

use std::collections::HashMap;
use std::future::{pending, poll_fn};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::thread;

use ringpoll::rpc::{Client, LengthPrefixed, serve_calls};
use ringpoll::{Balance, Pollers, Result, Slice};
use tokio::sync::Semaphore;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, poller_tasks:
            tasks_take_turns_on_the_pollers_and_stay_there
            a_task_that_panics_ends_alone
            pollers_that_end_drop_their_tasks
            pollers_that_have_ended_drop_a_task_at_once
            tasks_that_wait_for_each_other_end_one_after_the_other
            a_task_dials_and_exchanges_on_its_own_poller
            tasks_are_the_callers_of_a_client
        }
    };
}
pub(crate) use cases;

fn group(t: &Fixture, count: usize) -> Result<Pollers> {
    let builder = Pollers::builder().backend(t.mount().backend).balance(Balance::LeastConnections);
    builder.count(count).name("tasks").build()
}

fn name() -> String {
    thread::current().name().unwrap_or_default().to_owned()
}

/// Tells its owner when it is dropped.
struct Guard(Sender<String>);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.send(name());
    }
}

pub(crate) fn tasks_take_turns_on_the_pollers_and_stay_there(t: &Fixture) -> Check {
    let group = group(t, 2)?;
    let (sender, names) = channel();
    let wakers = Arc::new(Mutex::new(Vec::<Waker>::new()));
    for _ in 0..4 {
        let (sender, wakers) = (sender.clone(), Arc::clone(&wakers));
        group.spawn(async move {
            let before = name();
            let mut has_waited = false;
            poll_fn(|cx| match std::mem::replace(&mut has_waited, true) {
                true => Poll::Ready(()),
                false => {
                    wakers.lock().expect("not poisoned").push(cx.waker().clone());
                    Poll::Pending
                }
            })
            .await;
            let _ = sender.send((before, name()));
        });
    }
    eventually("all wait", || wakers.lock().expect("not poisoned").len() == 4);
    // From a thread that is no poller.
    let waiting = std::mem::take(&mut *wakers.lock().expect("not poisoned"));
    waiting.into_iter().for_each(Waker::wake);
    let mut counts = HashMap::new();
    for _ in 0..4 {
        let (before, after) = names.recv_timeout(DEADLINE)?;
        assert_eq!(before, after);
        *counts.entry(after).or_insert(0) += 1;
    }
    let expected = [("tasks-p0".to_owned(), 2), ("tasks-p1".to_owned(), 2)];
    assert_eq!(counts, HashMap::from(expected));
    end_empty(&group)
}

pub(crate) fn a_task_that_panics_ends_alone(t: &Fixture) -> Check {
    let group = group(t, 1)?;
    let (sender, names) = channel();
    for round in 0..3 {
        let guard = Guard(sender.clone());
        group.spawn(async move {
            let _guard = guard;
            if round == 1 {
                tokio::task::yield_now().await;
            }
            panic!("{ON_PURPOSE}");
        });
        assert_eq!(names.recv_timeout(DEADLINE)?, "tasks-p0");
    }
    let guard = Guard(sender);
    group.spawn(async move { drop(guard) });
    assert_eq!(names.recv_timeout(DEADLINE)?, "tasks-p0");
    end_empty(&group)
}

pub(crate) fn pollers_that_end_drop_their_tasks(t: &Fixture) -> Check {
    let group = group(t, 2)?;
    let (sender, dropped) = channel();
    let begun = Arc::new(AtomicUsize::new(0));
    for _ in 0..8 {
        let (guard, begun) = (Guard(sender.clone()), Arc::clone(&begun));
        group.spawn(async move {
            let _guard = guard;
            begun.fetch_add(1, Ordering::SeqCst);
            pending().await
        });
    }
    eventually("they run", || begun.load(Ordering::SeqCst) == 8);
    assert!(dropped.try_recv().is_err());
    end_empty(&group)?;
    drop(sender);
    assert_eq!(dropped.iter().count(), 8);
    Ok(())
}

pub(crate) fn pollers_that_have_ended_drop_a_task_at_once(t: &Fixture) -> Check {
    let group = group(t, 1)?;
    group.shutdown()?;
    let (sender, dropped) = channel();
    let guard = Guard(sender);
    group.spawn(async move {
        let _guard = guard;
        panic!("it ran");
    });
    assert_eq!(dropped.try_recv()?, name());
    Ok(())
}

/// Dropping a task here wakes the next one. Dropped inside each other they would take all of the
/// stack.
pub(crate) fn tasks_that_wait_for_each_other_end_one_after_the_other(t: &Fixture) -> Check {
    const COUNT: usize = 20_000;
    let group = group(t, 1)?;
    let permits = Arc::new(Semaphore::new(1));
    let (ended, waiting) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    for _ in 0..COUNT {
        let (permits, ended) = (Arc::clone(&permits), CountsDrop(Arc::clone(&ended)));
        let waiting = Arc::clone(&waiting);
        group.spawn(async move {
            let _ended = ended;
            waiting.fetch_add(1, Ordering::SeqCst);
            let _permit = permits.acquire().await;
            pending().await
        });
    }
    eventually("all wait", || waiting.load(Ordering::SeqCst) == COUNT);
    end_empty(&group)?;
    assert_eq!(ended.load(Ordering::SeqCst), COUNT);
    Ok(())
}

struct CountsDrop(Arc<AtomicUsize>);

impl Drop for CountsDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

pub(crate) fn a_task_dials_and_exchanges_on_its_own_poller(t: &Fixture) -> Check {
    let address = addr_of(&t.echo_server()).to_string();
    let (sender, done) = channel();
    for _ in 0..8 {
        let (dialer, address, sender) = (t.dialer(), address.clone(), sender.clone());
        t.clients().spawn(async move {
            let exchange = async {
                let mut conn = dialer.connect(&address).await?;
                for round in 0..100_u8 {
                    conn.write(vec![round; 100])?;
                    conn.flush().await?;
                    let answer = conn.next(100).await?;
                    assert!(answer.iter().all(|&byte| byte == round));
                }
                Ok::<(), ringpoll::Error>(())
            };
            let _ = sender.send(exchange.await);
        });
    }
    drop(sender);
    for _ in 0..8 {
        done.recv_timeout(DEADLINE)??;
    }
    Ok(())
}

pub(crate) fn tasks_are_the_callers_of_a_client(t: &Fixture) -> Check {
    let echo = |request: Slice, _| async move { Ok(request) };
    let server = t.spawn(t.server().on_connect(serve_calls(LengthPrefixed::new(), echo)));
    let builder = Client::builder(LengthPrefixed::new()).dialer(t.dialer()).connections(2);
    let client = builder.connect(&addr_of(&server).to_string())?;
    let (sender, done) = channel();
    for caller in 0..64_u8 {
        let (client, sender) = (client.clone(), sender.clone());
        t.clients().spawn(async move {
            for sequence in 0..50_u8 {
                let answer = client.call(Slice::from(vec![caller, sequence])).await;
                assert_eq!(&answer.expect("an answer")[..], [caller, sequence]);
            }
            let _ = sender.send(());
        });
    }
    drop(sender);
    for _ in 0..64 {
        done.recv_timeout(DEADLINE)?;
    }
    block_on(async {
        client.close().await;
        Ok(())
    })?;
    let stats = client.stats();
    assert_eq!((stats.answers, stats.discarded_answers, stats.outstanding), (64 * 50, 0, 0));
    Ok(())
}
