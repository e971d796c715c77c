//! Computes the figures of a run from its samples. The types of the results file are here, too.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Machine, Mode, Plan, SubjectKind};

/// The main metrics, each with its definition. All other metrics are details.
pub(crate) const METRICS: [(&str, &str); 6] = [
    ("start_task", "from the call that starts the task to its answer"),
    ("first_instruction", "from the call that starts the task to the first instruction of the task's program"),
    ("first_byte", "from the call that starts the task to the first byte of the task's output at the reader"),
    (
        "exit_seen",
        "from the call that starts the task to the answer that reports the task's end; the task ends at once",
    ),
    ("stop", "from the call that stops a task to its answer; the task ends at SIGTERM"),
    ("destroyed", "from the call that starts the task to the answer that the task is removed; the task ends at once"),
];

/// The figures of one metric of one subject, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The subject's name.
    pub path: String,
    /// The mode in which the tasks were run.
    pub mode: Mode,
    /// How many tasks ran at once.
    pub concurrency: usize,
    /// The metric's name.
    pub metric: String,
    /// The number of samples.
    pub n: usize,
    /// The minimum.
    pub min_ms: f64,
    /// The median.
    pub p50_ms: f64,
    /// The 90th percentile.
    pub p90_ms: f64,
    /// The 99th percentile.
    pub p99_ms: f64,
    /// The maximum.
    pub max_ms: f64,
}

/// The throughput of one subject.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// The subject's name.
    pub path: String,
    /// How many tasks ran at once.
    pub concurrency: usize,
    /// How many tasks were run, from start to removal.
    pub tasks: usize,
    /// Tasks per second.
    pub per_second: f64,
    /// Milliseconds of processor time per task, of everything that ran on the machine meanwhile.
    pub cpu_ms_per_task: f64,
}

/// The memory that one subject needs for idle tasks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// The subject's name.
    pub path: String,
    /// The number of idle tasks.
    pub tasks: usize,
    /// The proportional set size, in KiB, of all processes that run for the tasks, without the tasks' own.
    pub total_kib: u64,
    /// The same per task, in KiB.
    pub per_task_kib: f64,
    /// The same by program: the number of processes, and KiB.
    pub parts: BTreeMap<String, (usize, u64)>,
}

/// The ratio of two subjects' medians.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// The first subject's name.
    pub path: String,
    /// The name of the subject that the first one is compared with.
    pub to: String,
    /// The mode in which the tasks were run.
    pub mode: Mode,
    /// How many tasks ran at once.
    pub concurrency: usize,
    /// The metric's name.
    pub metric: String,
    /// The first subject's median divided by the other's.
    pub p50: f64,
}

/// The raw samples of one metric of one subject.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleSeries {
    /// The subject's name.
    pub path: String,
    /// The mode in which the tasks were run.
    pub mode: Mode,
    /// How many tasks ran at once.
    pub concurrency: usize,
    /// The metric's name.
    pub metric: String,
    /// Milliseconds, in the order in which they were measured.
    pub ms: Vec<f64>,
}

/// All results of a run: the content of a results file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// The version of the file's format.
    pub version: u32,
    /// When the run ended, in seconds since the epoch.
    pub at: u64,
    /// The host.
    pub machine: Machine,
    /// The plan of the run.
    pub plan: Plan,
    /// The hash of the spec that all subjects ran except other plugins, docker and podman, without the names that
    /// differ from task to task.
    pub spec_hash: String,
    /// The subjects that could not be measured, at all or from some moment on, with the reason.
    pub left_out: BTreeMap<String, String>,
    /// The definitions of the main metrics.
    pub definitions: BTreeMap<String, String>,
    /// The figures of the main metrics.
    pub rows: Vec<Row>,
    /// The figures of further metrics: the phases of this driver's starts, the time from the task's last instruction to
    /// the answer, and single calls.
    pub details: Vec<Row>,
    /// The throughput of the subjects.
    pub throughput: Vec<Throughput>,
    /// The memory that the subjects need for idle tasks.
    pub memory: Vec<Memory>,
    /// The ratios of the first subject's medians to those of all others.
    pub ratios: Vec<Ratio>,
    /// The raw samples of all metrics.
    pub samples: Vec<SampleSeries>,
}

impl Results {
    /// Returns whether this driver has failed, or a subject that was measured in part. A program that is not installed
    /// is no failure.
    pub fn is_broken(&self) -> bool {
        let own = |name: &str| self.plan.paths.iter().any(|path| path.name == name && path.kind == SubjectKind::Driver);
        self.left_out.keys().any(|name| own(name) || self.rows.iter().any(|row| row.path == *name))
    }
}

/// The subject, mode, concurrency and metric of a series of samples.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    /// The subject, by its index among the measured ones.
    pub subject: usize,
    /// The mode in which the tasks were run.
    pub mode: Mode,
    /// How many tasks ran at once.
    pub concurrency: usize,
    /// The metric's name.
    pub metric: String,
}

/// The mode, concurrency and metric of a figure. Only figures with the same key can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct MetricKey<'a> {
    /// How many tasks ran at once.
    pub(super) concurrency: usize,
    /// The mode in which the tasks were run.
    pub(super) mode: Mode,
    /// The metric's name.
    pub(super) metric: &'a str,
}

impl Row {
    /// Returns the key of the row's figures.
    pub(super) fn key(&self) -> MetricKey<'_> {
        MetricKey { concurrency: self.concurrency, mode: self.mode, metric: &self.metric }
    }
}

impl Ratio {
    /// Returns the key of the ratio.
    pub(super) fn key(&self) -> MetricKey<'_> {
        MetricKey { concurrency: self.concurrency, mode: self.mode, metric: &self.metric }
    }
}

impl SampleSeries {
    /// Returns the key of the samples.
    pub(super) fn key(&self) -> MetricKey<'_> {
        MetricKey { concurrency: self.concurrency, mode: self.mode, metric: &self.metric }
    }
}

/// All samples in nanoseconds, by their keys.
pub(crate) type Measured = BTreeMap<Key, Vec<u64>>;

/// Converts nanoseconds to milliseconds, rounded to microseconds.
#[allow(clippy::cast_precision_loss, reason = "nanoseconds of a run")]
fn ms(nanoseconds: u64) -> f64 {
    (nanoseconds as f64 / 1000.0).round() / 1000.0
}

/// Returns the sample at a rank from 0 to 1. This is always a value that was measured, never one that is interpolated.
fn percentile(sorted: &[u64], rank: f64) -> u64 {
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank")]
    let index = ((sorted.len() as f64 * rank).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied().unwrap_or_default()
}

/// Computes the figures of all samples.
pub(crate) fn rows(measured: &Measured, names: &[String]) -> Vec<Row> {
    measured
        .iter()
        .map(|(key, values)| {
            let mut sorted = values.clone();
            sorted.sort_unstable();
            Row {
                path: names[key.subject].clone(),
                mode: key.mode,
                concurrency: key.concurrency,
                metric: key.metric.clone(),
                n: sorted.len(),
                min_ms: ms(percentile(&sorted, 0.0)),
                p50_ms: ms(percentile(&sorted, 0.5)),
                p90_ms: ms(percentile(&sorted, 0.9)),
                p99_ms: ms(percentile(&sorted, 0.99)),
                max_ms: ms(percentile(&sorted, 1.0)),
            }
        })
        .collect()
}

/// Returns all samples in milliseconds.
pub(crate) fn samples(measured: &Measured, names: &[String]) -> Vec<SampleSeries> {
    measured
        .iter()
        .map(|(key, values)| SampleSeries {
            path: names[key.subject].clone(),
            mode: key.mode,
            concurrency: key.concurrency,
            metric: key.metric.clone(),
            ms: values.iter().map(|value| ms(*value)).collect(),
        })
        .collect()
}

/// Computes the ratios of the medians of the subject `path` to those of all others.
pub(crate) fn ratios(rows: &[Row], path: &str) -> Vec<Ratio> {
    let own = rows.iter().filter(|row| row.path == path);
    own.flat_map(|own| {
        let same = move |row: &&Row| row.path != own.path && row.key() == own.key() && row.p50_ms > 0.0;
        rows.iter().filter(same).map(|other| Ratio {
            path: own.path.clone(),
            to: other.path.clone(),
            mode: own.mode,
            concurrency: own.concurrency,
            metric: own.metric.clone(),
            p50: (own.p50_ms / other.p50_ms * 1000.0).round() / 1000.0,
        })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_values_that_were_measured() {
        let sorted: Vec<u64> = (1..=100).collect();
        assert_eq!([0.0, 0.5, 0.9, 0.99, 1.0].map(|rank| percentile(&sorted, rank)), [1, 50, 90, 99, 100]);
        assert_eq!(percentile(&[7], 0.99), 7);
    }

    #[test]
    fn ratios_compare_like_with_like() {
        let key = |subject, metric: &str| Key { subject, mode: Mode::Gaps, concurrency: 1, metric: metric.to_owned() };
        let measured: Measured = [
            (key(0, "a"), vec![1_000_000, 3_000_000, 2_000_000]),
            (key(1, "a"), vec![8_000_000]),
            (key(1, "b"), vec![1]),
        ]
        .into();
        let rows = rows(&measured, &["x".to_owned(), "y".to_owned()]);
        assert_eq!((rows[0].min_ms, rows[0].p50_ms, rows[0].max_ms, rows[0].n), (1.0, 2.0, 3.0, 3));
        let ratios = ratios(&rows, "x");
        assert_eq!(ratios.len(), 1);
        assert_eq!((ratios[0].to.as_str(), ratios[0].p50), ("y", 0.25));
    }
}
