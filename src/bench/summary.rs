//! From samples to figures.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Kind, Machine, Mode, Plan};

/// The metrics of the first list, each with what it is.
pub const METRICS: [(&str, &str); 6] = [
    ("start_task", "from the call that starts the task to its answer"),
    ("first_instruction", "from that call to the first instruction of the task's program"),
    ("first_byte", "from that call to the first byte of its output at the reader"),
    ("exit_seen", "from that call to the answer that tells of its end; the task ends at once"),
    ("stop", "from the call that stops a task to its answer; the task ends at SIGTERM"),
    ("destroyed", "from the call that starts the task to the answer that it is removed; the task ends at once"),
];

/// One figure: milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured.
    pub path: String,
    /// How.
    pub mode: Mode,
    /// How many at once.
    pub concurrency: usize,
    /// What of it.
    pub metric: String,
    /// Of so many.
    pub n: usize,
    /// The least.
    pub min_ms: f64,
    /// The median.
    pub p50_ms: f64,
    /// One in ten took longer.
    pub p90_ms: f64,
    /// One in a hundred took longer.
    pub p99_ms: f64,
    /// The most.
    pub max_ms: f64,
}

/// How many tasks a path gets through.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// Which path.
    pub path: String,
    /// How many at once.
    pub concurrency: usize,
    /// Of so many tasks, from start to removal.
    pub tasks: usize,
    /// In a second.
    pub per_second: f64,
    /// Milliseconds of processor for each task, of everything that ran on the machine meanwhile.
    pub cpu_ms_per_task: f64,
}

/// What lives while tasks idle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Which path.
    pub path: String,
    /// How many tasks.
    pub tasks: usize,
    /// Proportional set size of all that lives beside them, in KiB.
    pub total_kib: u64,
    /// By task, in KiB.
    pub per_task_kib: f64,
    /// The same by program: how many processes, and KiB.
    pub parts: BTreeMap<String, (usize, u64)>,
}

/// A ratio of medians.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// What.
    pub path: String,
    /// By what.
    pub to: String,
    /// How.
    pub mode: Mode,
    /// How many at once.
    pub concurrency: usize,
    /// What of it.
    pub metric: String,
    /// The median of the one by the other's.
    pub p50: f64,
}

/// Raw figures, in the order they were taken: milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Samples {
    /// Which path.
    pub path: String,
    /// How.
    pub mode: Mode,
    /// How many at once.
    pub concurrency: usize,
    /// What.
    pub metric: String,
    /// The figures.
    pub ms: Vec<f64>,
}

/// All that came out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// The form of this file.
    pub version: u32,
    /// Seconds since the epoch.
    pub at: u64,
    /// The machine.
    pub machine: Machine,
    /// What was planned.
    pub plan: Plan,
    /// The spec that all paths but other plugins and engines ran, without names.
    pub spec_hash: String,
    /// Paths that could not be measured, or from some moment on, and why.
    pub left_out: BTreeMap<String, String>,
    /// What the metrics are.
    pub definitions: BTreeMap<String, String>,
    /// The figures.
    pub rows: Vec<Row>,
    /// Further ones: our own driver's phases, the time from the task's last instruction to the answer, single calls.
    pub details: Vec<Row>,
    /// How many tasks they get through.
    pub throughput: Vec<Throughput>,
    /// What lives beside idle tasks.
    pub memory: Vec<Memory>,
    /// Of the first path to all others.
    pub ratios: Vec<Ratio>,
    /// Everything, raw.
    pub samples: Vec<Samples>,
}

impl Results {
    /// Has this driver failed, or a path that had been measured in part? What is not installed is no failure.
    pub fn is_broken(&self) -> bool {
        let own = |name: &str| self.plan.paths.iter().any(|path| path.name == name && path.kind == Kind::Driver);
        self.left_out.keys().any(|name| own(name) || self.rows.iter().any(|row| row.path == *name))
    }
}

/// What samples belong to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Which path, by its place in the plan.
    pub path: usize,
    /// How.
    pub mode: Mode,
    /// How many at once.
    pub concurrency: usize,
    /// What.
    pub metric: String,
}

/// Nanoseconds by what they belong to.
pub type Measured = BTreeMap<Key, Vec<u64>>;

#[allow(clippy::cast_precision_loss, reason = "nanoseconds of a run")]
fn ms(nanoseconds: u64) -> f64 {
    (nanoseconds as f64 / 1000.0).round() / 1000.0
}

/// The value at a rank from 0 to 1: the nearest one, never made up.
fn at(sorted: &[u64], rank: f64) -> u64 {
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank")]
    let index = ((sorted.len() as f64 * rank).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied().unwrap_or_default()
}

/// Figures of all samples.
pub fn rows(measured: &Measured, names: &[String]) -> Vec<Row> {
    measured
        .iter()
        .map(|(key, values)| {
            let mut sorted = values.clone();
            sorted.sort_unstable();
            Row {
                path: names[key.path].clone(),
                mode: key.mode,
                concurrency: key.concurrency,
                metric: key.metric.clone(),
                n: sorted.len(),
                min_ms: ms(at(&sorted, 0.0)),
                p50_ms: ms(at(&sorted, 0.5)),
                p90_ms: ms(at(&sorted, 0.9)),
                p99_ms: ms(at(&sorted, 0.99)),
                max_ms: ms(at(&sorted, 1.0)),
            }
        })
        .collect()
}

/// Raw samples.
pub fn samples(measured: &Measured, names: &[String]) -> Vec<Samples> {
    measured
        .iter()
        .map(|(key, values)| Samples {
            path: names[key.path].clone(),
            mode: key.mode,
            concurrency: key.concurrency,
            metric: key.metric.clone(),
            ms: values.iter().map(|value| ms(*value)).collect(),
        })
        .collect()
}

/// Medians of `path` by those of all others.
pub fn ratios(rows: &[Row], path: &str) -> Vec<Ratio> {
    let own = rows.iter().filter(|row| row.path == path);
    own.flat_map(|own| {
        let same = move |row: &&Row| {
            row.path != own.path
                && (row.mode, row.concurrency, &row.metric) == (own.mode, own.concurrency, &own.metric)
                && row.p50_ms > 0.0
        };
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
        assert_eq!([0.0, 0.5, 0.9, 0.99, 1.0].map(|rank| at(&sorted, rank)), [1, 50, 90, 99, 100]);
        assert_eq!(at(&[7], 0.99), 7);
    }

    #[test]
    fn ratios_compare_like_with_like() {
        let key = |path, metric: &str| Key { path, mode: Mode::Gaps, concurrency: 1, metric: metric.to_owned() };
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
