//! How far a comparison is: a bar on a terminal, lines elsewhere.

use std::cell::Cell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    started: Instant,
    steps: u64,
    done: Cell<u64>,
}

impl Progress {
    pub(crate) fn new(steps: u64) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(steps);
            let style =
                ProgressStyle::with_template("{bar:30} {pos}/{len}, {eta} left: {wide_msg}");
            // Drawn by hand between measurements: a ticking thread would take time from the
            // client's CPU.
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Progress { bar, started: Instant::now(), steps, done: Cell::new(0) }
    }

    /// What comes next.
    pub(crate) fn show(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
            bar.tick();
        }
    }

    pub(crate) fn step(&self) {
        self.done.set(self.done.get() + 1);
        if let Some(bar) = &self.bar {
            bar.inc(1);
        }
    }

    /// A line that stays.
    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// What has been done, and how long the rest takes; the bar has that already.
    pub(crate) fn say_done(&self, what: &str) {
        if self.bar.is_some() {
            return;
        }
        let left = left(self.started.elapsed(), self.done.get(), self.steps);
        let left = left.map_or(String::new(), |left| format!(", {} left", rounded(left)));
        eprintln!("{what}{left}");
    }

    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How long the steps that are left take if they are like those before.
fn left(elapsed: Duration, done: u64, steps: u64) -> Option<Duration> {
    let share = steps.saturating_sub(done) as f64 / done as f64;
    share.is_finite().then(|| elapsed.mul_f64(share))
}

fn rounded(time: Duration) -> String {
    match time.as_secs() {
        0..=89 => format!("{} s", time.as_secs()),
        seconds => format!("{} min", (seconds + 30) / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_from_the_time_spent() {
        let second = Duration::from_secs(1);
        assert_eq!(left(second * 10, 1, 4), Some(second * 30));
        assert_eq!(left(second, 4, 4), Some(Duration::ZERO));
        assert_eq!(left(second, 0, 4), None);
        assert_eq!([rounded(second * 89), rounded(second * 150)], ["89 s", "3 min"]);
    }
}
