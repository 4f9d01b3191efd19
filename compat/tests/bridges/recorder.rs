//! A recorder that keeps everything, for the whole process.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder,
    SharedString, Unit,
};

/// The recorder. It is installed by its first use.
pub(crate) fn recorder() -> &'static Keeps {
    static RECORDER: OnceLock<Keeps> = OnceLock::new();
    static INSTALLED: OnceLock<()> = OnceLock::new();
    let recorder = RECORDER.get_or_init(Keeps::default);
    INSTALLED.get_or_init(|| {
        metrics::set_global_recorder(recorder).expect("no other recorder is installed");
    });
    recorder
}

#[derive(Debug, Default)]
pub(crate) struct Keeps {
    /// By the name and the labels.
    values: Mutex<BTreeMap<String, Arc<Kept>>>,
    units: Mutex<BTreeMap<String, Option<Unit>>>,
}

/// One metric.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    value: AtomicU64,
    changes: AtomicU64,
    has_decreased: AtomicBool,
}

impl Keeps {
    /// The present value of a counter or a gauge. For a histogram, the sum in milliseconds.
    pub(crate) fn value(&self, key: &str) -> Option<u64> {
        let values = self.values.lock().expect("no panic");
        values.get(key).map(|kept| kept.value.load(Ordering::SeqCst))
    }

    /// How often it was changed.
    pub(crate) fn changes(&self, key: &str) -> u64 {
        let values = self.values.lock().expect("no panic");
        values.get(key).map_or(0, |kept| kept.changes.load(Ordering::SeqCst))
    }

    pub(crate) fn unit(&self, name: &str) -> Option<Unit> {
        *self.units.lock().expect("no panic").get(name).expect("it is described")
    }

    /// The metrics with the label `server` = `server`, as name, labels and value.
    pub(crate) fn of_server(&self, server: &str) -> Vec<(String, u64, bool)> {
        let label = format!("{{server={server}");
        let values = self.values.lock().expect("no panic");
        let ours = values.iter().filter(|(key, _)| key.contains(&label));
        ours.map(|(key, kept)| {
            let has_decreased = kept.has_decreased.load(Ordering::SeqCst);
            (key.clone(), kept.value.load(Ordering::SeqCst), has_decreased)
        })
        .collect()
    }

    fn kept(&self, key: &Key) -> Arc<Kept> {
        let labels: Vec<_> =
            key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        let name = format!("{}{{{}}}", key.name(), labels.join(","));
        Arc::clone(self.values.lock().expect("no panic").entry(name).or_default())
    }

    fn describe(&self, name: KeyName, unit: Option<Unit>) {
        self.units.lock().expect("no panic").insert(name.as_str().to_owned(), unit);
    }
}

impl Kept {
    fn set_to(&self, value: u64) {
        let before = self.value.swap(value, Ordering::SeqCst);
        self.changes.fetch_add(1, Ordering::SeqCst);
        if value < before {
            self.has_decreased.store(true, Ordering::SeqCst);
        }
    }
}

impl Recorder for Keeps {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        self.describe(name, unit);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        self.describe(name, unit);
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        self.describe(name, unit);
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.kept(key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.kept(key))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.kept(key))
    }
}

impl CounterFn for Kept {
    fn increment(&self, by: u64) {
        self.set_to(self.value.load(Ordering::SeqCst) + by);
    }

    fn absolute(&self, value: u64) {
        self.set_to(value);
    }
}

impl GaugeFn for Kept {
    fn increment(&self, by: f64) {
        CounterFn::increment(self, by as u64);
    }

    fn decrement(&self, by: f64) {
        self.set_to(self.value.load(Ordering::SeqCst) - by as u64);
    }

    fn set(&self, value: f64) {
        self.set_to(value as u64);
    }
}

impl HistogramFn for Kept {
    fn record(&self, seconds: f64) {
        CounterFn::increment(self, (seconds * 1000.0) as u64);
    }
}
