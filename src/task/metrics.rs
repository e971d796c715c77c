//! Metrics of the driver in Prometheus' text format (Prometheus' exposition_formats.md, version 0.0.4).
//!
//! Counting is a few atomic additions, and nothing is locked on the start path.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::{Phases, TaskError};

/// Upper bounds of the histograms' buckets, in seconds. They range from the driver's own share of a start to a slow
/// pull.
const BUCKETS: [f64; 14] = [0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 5.0, 30.0];

/// The causes of failed starts, which are the values of the label `cause` of `starts_failed_total`.
const CAUSES: [&str; 7] = ["config", "image", "rootfs", "shim", "runtime", "stopped", "host"];

/// A histogram of durations.
#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS.len()],
    count: AtomicU64,
    micros: AtomicU64,
}

impl Histogram {
    fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        if let Some(at) = BUCKETS.iter().position(|bound| seconds <= *bound) {
            self.buckets[at].fetch_add(1, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.micros.fetch_add(u64::try_from(time.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn render(&self, text: &mut String, name: &str, label: &str) {
        let mut below = 0;
        for (bound, bucket) in BUCKETS.iter().zip(&self.buckets) {
            below += bucket.load(Ordering::Relaxed);
            let _ = writeln!(text, "{name}_bucket{{{label},le=\"{bound}\"}} {below}");
        }
        let count = self.count.load(Ordering::Relaxed);
        #[allow(clippy::cast_precision_loss, reason = "seconds in sum need no more than 52 bits of microseconds")]
        let sum = self.micros.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(text, "{name}_bucket{{{label},le=\"+Inf\"}} {count}");
        let _ = writeln!(text, "{name}_sum{{{label}}} {sum}");
        let _ = writeln!(text, "{name}_count{{{label}}} {count}");
    }
}

/// Counters of events since the plugin was started.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    starts: AtomicU64,
    failures: [AtomicU64; CAUSES.len()],
    phases: [Histogram; Phases::COUNT],
    pool_hits: AtomicU64,
    pool_misses: AtomicU64,
    pulls: AtomicU64,
    pulls_failed: AtomicU64,
    exits: AtomicU64,
    oom_kills: AtomicU64,
    shims_died: AtomicU64,
    gc_removed: AtomicU64,
    log_dropped: AtomicU64,
}

/// Numbers of what exists at the moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Gauges {
    /// Tasks that are being started.
    pub starting: usize,
    /// Tasks that run.
    pub running: usize,
    /// Tasks that have ended and are not yet destroyed.
    pub exited: usize,
    /// Tasks whose teardown is pending.
    pub pending_teardowns: usize,
    /// Idle shims in the pool.
    pub idle_shims: usize,
    /// Images that tasks can be started from without contacting containerd or a registry.
    pub images: usize,
}

impl Metrics {
    /// Counts a start of a task and the durations of its phases.
    pub(crate) fn started(&self, phases: &Phases) {
        self.starts.fetch_add(1, Ordering::Relaxed);
        for (histogram, (_, time)) in self.phases.iter().zip(phases.by_name()) {
            if let Some(time) = time {
                histogram.observe(time);
            }
        }
        let pool = if phases.pooled { &self.pool_hits } else { &self.pool_misses };
        pool.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a failed start.
    pub(crate) fn failed(&self, error: &TaskError) {
        if let Some(at) = CAUSES.iter().position(|known| *known == cause(error)) {
            self.failures[at].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a pull of an image.
    pub(crate) fn pulled(&self, succeeded: bool) {
        let counter = if succeeded { &self.pulls } else { &self.pulls_failed };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts the end of a task.
    pub(crate) fn exited(&self, oom_killed: bool, shim_died: bool) {
        self.exits.fetch_add(1, Ordering::Relaxed);
        self.oom_kills.fetch_add(u64::from(oom_killed), Ordering::Relaxed);
        self.shims_died.fetch_add(u64::from(shim_died), Ordering::Relaxed);
    }

    /// Counts bytes of output that the log writer dropped.
    pub(crate) fn log_dropped(&self, bytes: u64) {
        self.log_dropped.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts remains that garbage collection removed.
    pub(crate) fn gc_removed(&self, count: usize) {
        self.gc_removed.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Renders all metrics in Prometheus' text format.
    pub(crate) fn render(&self, gauges: Gauges) -> String {
        let mut text = String::with_capacity(8 << 10);
        let mut counter = |name: &str, help: &str, value: &AtomicU64| {
            let _ = writeln!(text, "# HELP nomad_driver_shim_{name} {help}");
            let _ = writeln!(text, "# TYPE nomad_driver_shim_{name} counter");
            let _ = writeln!(text, "nomad_driver_shim_{name} {}", value.load(Ordering::Relaxed));
        };
        counter("starts_total", "Tasks that were started.", &self.starts);
        counter("pool_hits_total", "Starts that got an idle shim from the pool.", &self.pool_hits);
        counter("pool_misses_total", "Starts that had to launch a shim.", &self.pool_misses);
        counter("pulls_total", "Images that were pulled.", &self.pulls);
        counter("pulls_failed_total", "Pulls that failed.", &self.pulls_failed);
        counter("exits_total", "Tasks that ended.", &self.exits);
        counter("oom_kills_total", "Tasks that ended with an OOM kill in their cgroup.", &self.oom_kills);
        counter("shims_died_total", "Tasks that ended because their shim died.", &self.shims_died);
        counter(
            "log_dropped_bytes_total",
            "Output of tasks that could not be written and was dropped.",
            &self.log_dropped,
        );
        counter("swept_total", "Remains that no agent asked for and garbage collection removed.", &self.gc_removed);
        let name = "nomad_driver_shim_starts_failed_total";
        let _ = writeln!(text, "# HELP {name} Starts that failed, by cause.\n# TYPE {name} counter");
        for (cause, count) in CAUSES.iter().zip(&self.failures) {
            let _ = writeln!(text, "{name}{{cause=\"{cause}\"}} {}", count.load(Ordering::Relaxed));
        }
        let name = "nomad_driver_shim_start_phase_seconds";
        let _ = writeln!(text, "# HELP {name} How long the parts of a start took.\n# TYPE {name} histogram");
        for ((phase, _), histogram) in Phases::default().by_name().iter().zip(&self.phases) {
            histogram.render(&mut text, name, &format!("phase=\"{phase}\""));
        }
        let name = "nomad_driver_shim_tasks";
        let _ = writeln!(text, "# HELP {name} Tasks by state.\n# TYPE {name} gauge");
        for (state, count) in [
            ("starting", gauges.starting),
            ("running", gauges.running),
            ("exited", gauges.exited),
            ("leftover", gauges.pending_teardowns),
        ] {
            let _ = writeln!(text, "{name}{{state=\"{state}\"}} {count}");
        }
        for (name, help, count) in [
            ("idle_shims", "Idle shims in the pool.", gauges.idle_shims),
            (
                "images",
                "Images that tasks can be started from without contacting containerd or a registry.",
                gauges.images,
            ),
        ] {
            let _ = writeln!(text, "# HELP nomad_driver_shim_{name} {help}\n# TYPE nomad_driver_shim_{name} gauge");
            let _ = writeln!(text, "nomad_driver_shim_{name} {count}");
        }
        text
    }
}

fn cause(error: &TaskError) -> &'static str {
    match error {
        TaskError::Image(_) => "image",
        TaskError::Rootfs(_) | TaskError::Stdio(_) => "rootfs",
        TaskError::Shim { .. } => "shim",
        TaskError::Runtime(_) => "runtime",
        TaskError::Stopped(_) => "stopped",
        TaskError::AlreadyStarted(_) | TaskError::Reference(_) | TaskError::Signal(_) => "config",
        _ => "host",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::TaskId;

    #[test]
    fn buckets_add_up_and_sums_are_seconds() {
        let metrics = Metrics::default();
        let millis = Duration::from_millis;
        let phases = Phases { create: millis(10), total: millis(14), pooled: true, ..Phases::default() };
        metrics.started(&phases);
        metrics.started(&Phases { create: Duration::from_secs(60), pooled: false, ..phases });
        metrics.failed(&TaskError::Stopped(TaskId("x".to_owned())));
        let text = metrics.render(Gauges { running: 2, ..Gauges::default() });
        for line in [
            "nomad_driver_shim_starts_total 2",
            "nomad_driver_shim_pool_hits_total 1",
            "nomad_driver_shim_start_phase_seconds_bucket{phase=\"create\",le=\"0.008\"} 0",
            "nomad_driver_shim_start_phase_seconds_bucket{phase=\"create\",le=\"0.015\"} 1",
            "nomad_driver_shim_start_phase_seconds_bucket{phase=\"create\",le=\"30\"} 1",
            "nomad_driver_shim_start_phase_seconds_bucket{phase=\"create\",le=\"+Inf\"} 2",
            "nomad_driver_shim_start_phase_seconds_sum{phase=\"create\"} 60.01",
            "nomad_driver_shim_starts_failed_total{cause=\"stopped\"} 1",
            "nomad_driver_shim_tasks{state=\"running\"} 2",
        ] {
            assert!(text.lines().any(|known| known == line), "{line} is not in\n{text}");
        }
        // Every line is a comment, or a name (perhaps with labels) and a number.
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').expect("a value");
            assert!(name.starts_with("nomad_driver_shim_") && value.parse::<f64>().is_ok(), "{line}");
        }
    }
}
