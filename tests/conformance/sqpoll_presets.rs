//! The presets of the `sqpoll` backend, its settings and its counts.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ringpoll::{
    Backend, Pollers, PollersBuilder, Server, SqpollOptions, SqpollPreset, UringOptions,
};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, sqpoll_presets:
            each_preset_serves_and_tells_its_name
            without_a_preset_one_is_chosen_and_told
            each_preset_has_the_kernel_threads_it_says
            each_poller_has_a_receive_ring_and_the_send_rings_it_was_told
            settings_that_contradict_each_other_are_refused
            cpus_that_are_not_there_are_refused
            kernel_threads_run_where_they_are_told
            kernel_threads_stay_where_the_process_may_run
            the_time_of_kernel_threads_is_told
            the_time_of_kernel_threads_never_runs_backwards
            settings_of_the_receive_ring_count
            too_few_cpus_are_warned_of_once
            the_host_is_said_to_have_it
        }
    };
}
pub(crate) use cases;

fn of(preset: SqpollPreset) -> SqpollOptions {
    SqpollOptions::new().preset(preset)
}

fn pollers(options: SqpollOptions, count: usize) -> PollersBuilder {
    Pollers::builder().backend(Backend::Sqpoll(options)).count(count)
}

/// The CPUs that this thread may run on.
fn cpus() -> Vec<usize> {
    let set = sched_getaffinity(None).expect("a thread may ask where it runs");
    (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
}

/// By its name, as an operator chooses it.
pub(crate) fn each_preset_serves_and_tells_its_name(t: &Fixture) -> Check {
    let names = ["uring-2", "uring-4", "sqpoll-config1", "sqpoll-config2", "sqpoll-shared"];
    assert_eq!(SqpollPreset::ALL.map(|preset| preset.to_string()), names);
    for name in names {
        let backend: Backend = name.parse()?;
        let server = t.server().backend(backend).pollers(1).on_request(echo_frame);
        let server = server.bind("127.0.0.1:0")?.spawn()?;
        let peers: Vec<_> = (0..5).map(|_| dial(&server)).collect::<Check<_>>()?;
        for (tag, peer) in peers.iter().enumerate() {
            for size in [1, 5000, 200_000] {
                exchange_frame(peer, tag, size)?;
            }
        }
        assert_eq!(server.stats().backend.to_string(), name);
        assert_eq!(server.pollers().backend().to_string(), name);
        drop(peers);
        server.shutdown(DEADLINE)?;
    }
    Ok(())
}

/// Plain `sqpoll`: what it became is told, and it is one that suits this host.
pub(crate) fn without_a_preset_one_is_chosen_and_told(t: &Fixture) -> Check {
    let plain: Backend = "sqpoll".parse()?;
    assert_eq!(plain, Backend::Sqpoll(SqpollOptions::new()));
    let server = t.spawn(t.server().backend(plain).pollers(1).on_request(echo_frame));
    exchange_frame(&dial(&server)?, 1, 3000)?;
    let chosen = server.stats().backend.to_string();
    assert_eq!(server.pollers().backend().to_string(), chosen);
    let is_preset = SqpollPreset::ALL.iter().any(|preset| preset.to_string() == chosen);
    assert!(is_preset, "{chosen:?} is no preset");
    let threads = server.stats().pollers.sqpoll_threads as usize;
    // Else they would wait for each other.
    assert!(threads == 1 || threads < cpus().len(), "{chosen} on {} CPUs", cpus().len());
    assert_ne!(server.stats().backend, plain, "the preset is not in it");
    Ok(())
}

/// What the counters say, and what the host shows.
pub(crate) fn each_preset_has_the_kernel_threads_it_says(_: &Fixture) -> Check {
    let four_rings = |preset| of(preset).send_rings(4);
    for count in [1, 3] {
        for (options, threads) in [
            (of(SqpollPreset::Shared), 1),
            (four_rings(SqpollPreset::Shared), 1),
            (of(SqpollPreset::Config1), 3 * count),
            (of(SqpollPreset::Config2), 2 * count),
            (four_rings(SqpollPreset::Uring2), 3 * count),
            (four_rings(SqpollPreset::Uring4), 5 * count),
            (of(SqpollPreset::Config1).send_threads(1), 2 * count),
            (of(SqpollPreset::Config2).send_threads(3), 3 * count),
        ] {
            let before = KernelThreadsBefore::now();
            let group = pollers(options, count).build()?;
            let told = group.stats().sqpoll_threads as usize;
            assert_eq!(told, threads, "{options:?} with {count} pollers");
            before.assert_started(threads);
            group.shutdown()?;
            before.assert_return();
        }
    }
    Ok(())
}

/// The receive ring and its twenty.
pub(crate) fn each_poller_has_a_receive_ring_and_the_send_rings_it_was_told(_: &Fixture) -> Check {
    for count in [1, 2] {
        for (options, each) in [
            (of(SqpollPreset::Shared), 1),
            (of(SqpollPreset::Shared).send_rings(5), 6),
            (of(SqpollPreset::Config1), 17),
            (of(SqpollPreset::Config2), 17),
            (of(SqpollPreset::Uring2).send_rings(20), 21),
            (of(SqpollPreset::Uring4).send_rings(20), 21),
        ] {
            let before = ring_count();
            let group = pollers(options, count).build()?;
            let rings = ring_count() - before;
            // The shared thread may belong to an additional ring that is otherwise unused.
            let spare = usize::from(of(SqpollPreset::Shared) == options.send_rings(0));
            assert!((each * count..=each * count + spare).contains(&rings), "{rings}: {options:?}");
            group.shutdown()?;
            eventually("the rings are closed", || ring_count() == before);
        }
    }
    Ok(())
}

/// Refused as invalid, and before anything is started.
fn assert_refused(t: &Fixture, options: SqpollOptions, cpus: &[usize]) {
    let (before, open) = (KernelThreadsBefore::now(), fds());
    let group = pollers(options, 1).sqpoll_cpus(cpus.to_vec()).build().err();
    let server = t.server().backend(Backend::Sqpoll(options)).sqpoll_cpus(cpus.to_vec());
    let server = server.on_request(echo).bind("127.0.0.1:0").err();
    for error in [group, server] {
        let error = error.unwrap_or_else(|| panic!("{options:?} on CPUs {cpus:?} is accepted"));
        assert!(error.is_invalid(), "{options:?} on CPUs {cpus:?}: {error:?}");
    }
    let opened: Vec<_> =
        fds().into_iter().filter(|(fd, target)| open.get(fd) != Some(target)).collect();
    // Fewer may be open now: what the test before left is closed when it suits the kernel.
    let started = (before.started(), opened);
    assert!(started.0.is_empty() && started.1.is_empty(), "{options:?} started {started:?}");
}

pub(crate) fn settings_that_contradict_each_other_are_refused(t: &Fixture) -> Check {
    let (shared, config1) = (of(SqpollPreset::Shared), of(SqpollPreset::Config1));
    let (config2, uring2) = (of(SqpollPreset::Config2), of(SqpollPreset::Uring2));
    for options in [
        shared.send_threads(1),
        shared.send_rings(4).send_threads(2),
        config1.send_rings(0),
        config2.send_rings(0),
        uring2.send_rings(0),
        config1.send_rings(u16::MAX),
        config1.send_threads(0),
        config2.send_threads(u16::MAX),
        config1.send_entries(0),
        config1.send_entries(u32::MAX),
        shared.idle(Duration::ZERO),
        shared.idle(Duration::from_micros(999)),
        config1.idle(Duration::from_micros(1)),
        config1.idle(Duration::MAX),
    ] {
        assert_refused(t, options, &[]);
    }
    // Next to them, what is allowed.
    for options in [shared.send_rings(1), config1.send_rings(1), shared.send_entries(1)] {
        pollers(options.idle(Duration::from_millis(1)), 1).build()?.shutdown()?;
    }
    Ok(())
}

pub(crate) fn cpus_that_are_not_there_are_refused(t: &Fixture) -> Check {
    for preset in [SqpollPreset::Shared, SqpollPreset::Config1, SqpollPreset::Config2] {
        for cpu in [1_000_000, usize::MAX, CpuSet::MAX_CPU - 1] {
            assert_refused(t, of(preset), &[cpu]);
            assert_refused(t, of(preset), &[cpus()[0], cpu]);
        }
    }
    Ok(())
}

/// Kernel thread by kernel thread, in turn.
pub(crate) fn kernel_threads_run_where_they_are_told(t: &Fixture) -> Check {
    let all = cpus();
    let reversed: Vec<_> = all.iter().rev().copied().collect();
    for chosen in [vec![all[0]], vec![all[all.len() - 1]], all.clone(), reversed] {
        for (preset, threads) in
            [(SqpollPreset::Shared, 1), (SqpollPreset::Config1, 3), (SqpollPreset::Config2, 2)]
        {
            let before = KernelThreadsBefore::now();
            let builder = t.server().backend(Backend::Sqpoll(of(preset))).pollers(1);
            let server = builder.sqpoll_cpus(chosen.clone()).on_request(echo_frame);
            let server = server.bind("127.0.0.1:0")?.spawn()?;
            let peer = dial(&server)?;
            for size in [10, 5000] {
                exchange_frame(&peer, 1, size)?;
            }
            let mut wanted: Vec<_> =
                (0..threads).map(|index| chosen[index % chosen.len()].to_string()).collect();
            before.assert_started(threads);
            let mut allowed: Vec<_> =
                before.started().into_iter().map(|thread| thread.cpus_allowed).collect();
            wanted.sort();
            allowed.sort();
            assert_eq!(allowed, wanted, "{preset} told to use {chosen:?}");
            for thread in before.started() {
                assert!(chosen.contains(&thread.cpu), "{thread:?} ran elsewhere than {chosen:?}");
            }
            drop(peer);
            server.shutdown(DEADLINE)?;
        }
    }
    Ok(())
}

/// Not told anything, they keep to what the process was given.
pub(crate) fn kernel_threads_stay_where_the_process_may_run(_: &Fixture) -> Check {
    for cpu in cpus() {
        for preset in [SqpollPreset::Shared, SqpollPreset::Config1, SqpollPreset::Config2] {
            let before = KernelThreadsBefore::now();
            let started = thread::spawn(move || {
                let mut only = CpuSet::new();
                only.set(cpu);
                sched_setaffinity(None, &only).expect("a thread may restrict itself");
                pollers(of(preset), 1).build()
            });
            let group = started.join().expect("a start does not panic")?;
            before.assert_started(group.stats().sqpoll_threads as usize);
            for thread in before.started() {
                assert_eq!(thread.cpus_allowed, cpu.to_string(), "{preset}: {thread:?}");
            }
            group.shutdown()?;
        }
    }
    Ok(())
}

/// As the host counts it, and of these threads only.
pub(crate) fn the_time_of_kernel_threads_is_told(t: &Fixture) -> Check {
    /// What a thread takes between two looks, and until the kernel has counted it.
    const BLUR_US: u64 = 30_000;
    for preset in [SqpollPreset::Shared, SqpollPreset::Config1, SqpollPreset::Config2] {
        let before = KernelThreadsBefore::now();
        let options = of(preset).idle(Duration::from_millis(1));
        let builder = t.server().backend(Backend::Sqpoll(options)).pollers(2);
        let server = t.spawn(builder.on_request(echo_frame));
        let peers: Vec<_> = (0..50).map(|_| dial(&server)).collect::<Check<_>>()?;
        let load = |rounds: usize| -> Check {
            for round in 0..rounds {
                for (tag, mut peer) in peers.iter().enumerate() {
                    peer.write_all(&frame(tag + round, 2000))?;
                }
                for (tag, peer) in peers.iter().enumerate() {
                    expect_frame(peer, tag + round, 2000)?;
                }
            }
            let_kernel_threads_sleep();
            Ok(())
        };
        load(10)?;
        let first = server.stats().pollers;
        load(40)?;
        let second = server.stats().pollers;
        let (cpu_us, work_us) = (second.sqpoll_cpu_us, second.sqpoll_work_us);
        assert!(cpu_us > first.sqpoll_cpu_us, "{preset}: no CPU time for 2000 requests");
        assert!(work_us > first.sqpoll_work_us, "{preset}: no work for 2000 requests");
        assert!(work_us <= cpu_us + BLUR_US, "{preset}: {work_us} µs of {cpu_us}");
        let shown: u64 = before.started().iter().map(|thread| thread.run_ns / 1000).sum();
        let apart = shown.abs_diff(cpu_us);
        assert!(apart <= BLUR_US, "{preset}: {cpu_us} µs told, {shown} µs shown by the host");
        // Another group's threads are not counted, nor is work elsewhere.
        let other = pollers(of(preset), 1).build()?;
        let _peer = dial(&server)?;
        other.shutdown()?;
        drop(peers);
        server.shutdown(DEADLINE)?;
    }
    Ok(())
}

/// Whenever it is asked for, also while they are at work.
pub(crate) fn the_time_of_kernel_threads_never_runs_backwards(t: &Fixture) -> Check {
    const ROUNDS: usize = 100;
    for preset in [SqpollPreset::Shared, SqpollPreset::Config1, SqpollPreset::Config2] {
        let builder = t.server().backend(Backend::Sqpoll(of(preset))).pollers(1);
        let server = t.spawn(builder.on_request(echo_frame));
        let peers: Vec<_> = (0..20).map(|_| dial(&server)).collect::<Check<_>>()?;
        let load = on_thread(move || {
            for round in 0..ROUNDS {
                for (tag, mut peer) in peers.iter().enumerate() {
                    peer.write_all(&frame(tag + round, 3000))?;
                }
                for (tag, peer) in peers.iter().enumerate() {
                    expect_frame(peer, tag + round, 3000)?;
                }
            }
            Ok(())
        });
        let (mut cpu_us, mut work_us, mut runs) = (0, 0, 0);
        while runs < 20 * ROUNDS as u64 {
            let stats = server.stats();
            let told = (stats.pollers.sqpoll_cpu_us, stats.pollers.sqpoll_work_us);
            assert!(told.0 >= cpu_us && told.1 >= work_us, "{preset}: {told:?} after {cpu_us} µs");
            (cpu_us, work_us) = told;
            runs = stats.handler_runs;
        }
        load.wait();
        server.shutdown(DEADLINE)?;
    }
    Ok(())
}

/// Buffers and queues of the receive ring are the ones that were asked for.
pub(crate) fn settings_of_the_receive_ring_count(t: &Fixture) -> Check {
    let uring = UringOptions::new().queue_entries(2, 4).receive_buffers(2, 1);
    for preset in [SqpollPreset::Shared, SqpollPreset::Config1, SqpollPreset::Config2] {
        let builder = t.server().backend(Backend::Sqpoll(of(preset))).pollers(1);
        let server = t.spawn(builder.uring(uring.clone()).on_request(echo_frame));
        let peers: Vec<_> = (0..60).map(|_| dial(&server)).collect::<Check<_>>()?;
        let starved = || server.stats().pollers.starvations > 0;
        let is_starved = holds_within(DEADLINE, || {
            let round = || -> Check {
                for (tag, mut peer) in peers.iter().enumerate() {
                    peer.write_all(&frame(tag, 9000))?;
                }
                peers.iter().enumerate().try_for_each(|(tag, peer)| expect_frame(peer, tag, 9000))
            };
            round().is_err() || starved()
        });
        assert!(is_starved && starved(), "{preset}: two buffers suffice: {:?}", server.stats());
        for options in [uring.clone().queue_entries(0, 1), uring.clone().receive_buffers(0, 1)] {
            let refused = pollers(of(preset), 1).uring(options).build().err();
            assert!(refused.is_some_and(|error| error.is_invalid()), "{preset}");
        }
    }
    Ok(())
}

/// Collects the messages of warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = String::new();
        event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            text += &format!("{}={value:?} ", field.name());
        });
        self.0.lock().expect("nobody panics here").push(text);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// One line when it starts, which says what to expect; none where there is nothing to warn of.
pub(crate) fn too_few_cpus_are_warned_of_once(t: &Fixture) -> Check {
    let crowd = cpus().len() + 1;
    let warned = |backend: Backend| -> Check<Vec<String>> {
        let warnings = Warnings::default();
        let server = tracing::subscriber::with_default(warnings.clone(), || {
            let builder = Server::builder().backend(backend).pollers(1).on_request(echo);
            builder.bind("127.0.0.1:0")?.spawn()
        })?;
        t.watch(server.clone());
        server.shutdown(DEADLINE)?;
        let warnings = warnings.0.lock().expect("nobody panics here").clone();
        Ok(warnings)
    };
    let options = of(SqpollPreset::Config2).send_rings(64).send_threads(crowd.min(64) as u16);
    let crowded = warned(Backend::Sqpoll(options))?;
    assert_eq!(crowded.len(), 1, "{crowded:?}");
    assert!(crowded[0].contains("sqpoll-config2"), "whose warning is this: {crowded:?}");
    let others = warned(Backend::Epoll)?;
    assert!(others.is_empty(), "{others:?}");
    Ok(())
}

/// A mounted engine is one that the probe found.
pub(crate) fn the_host_is_said_to_have_it(_: &Fixture) -> Check {
    let found = ringpoll::capabilities();
    assert!(found.sqpoll && !found.sqpoll_reason.is_empty(), "{found:?}");
    // `Auto` never selects it, because it occupies CPUs.
    let group = Pollers::builder().backend(Backend::Auto).count(1).build()?;
    assert!(!matches!(group.backend(), Backend::Sqpoll(_)), "{}", group.backend());
    assert_eq!(group.stats().sqpoll_threads, 0);
    Ok(group.shutdown()?)
}
