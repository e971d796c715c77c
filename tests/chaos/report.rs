//! The figures of a run, as a table. This module does no I/O.

use std::{collections::BTreeMap, fmt::Write as _};

/// The counts of a run.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Figures {
    /// Faults that struck a process or resource, by kind.
    pub faults: BTreeMap<String, u32>,
    /// Faults that found nothing to strike.
    pub missed: u32,
    /// How many times the live containers were listed and checked.
    pub looks: u32,
    /// How many times all was in order (`Settle`).
    pub settled: u32,
    /// How many times nothing was left (`Clear`).
    pub cleared: u32,
    pub batch_right: u32,
    /// Batch tasks that a fault has killed.
    pub batch_hit: u32,
    pub batch_wrong: u32,
    /// Starts that were refused with a recoverable error, so that Nomad may try again.
    pub refused: u32,
    pub witnesses: u32,
    pub logs: u32,
    pub logs_whole: u32,
    pub exec_ok: u32,
    pub exec_cut: u32,
    pub exec_wrong: u32,
    /// What was left on the host, line by line.
    pub left: Vec<String>,
}

impl Figures {
    pub(crate) fn struck(&mut self, kind: String) {
        *self.faults.entry(kind).or_default() += 1;
    }

    fn total(&self) -> u32 {
        self.faults.values().sum()
    }

    fn add(&mut self, other: &Self) {
        for (kind, count) in &other.faults {
            *self.faults.entry(kind.clone()).or_default() += count;
        }
        self.left.extend(other.left.iter().cloned());
        for (mine, others) in [
            (&mut self.missed, other.missed),
            (&mut self.looks, other.looks),
            (&mut self.settled, other.settled),
            (&mut self.cleared, other.cleared),
            (&mut self.batch_right, other.batch_right),
            (&mut self.batch_hit, other.batch_hit),
            (&mut self.batch_wrong, other.batch_wrong),
            (&mut self.refused, other.refused),
            (&mut self.witnesses, other.witnesses),
            (&mut self.logs, other.logs),
            (&mut self.logs_whole, other.logs_whole),
            (&mut self.exec_ok, other.exec_ok),
            (&mut self.exec_cut, other.exec_cut),
            (&mut self.exec_wrong, other.exec_wrong),
        ] {
            *mine += others;
        }
    }
}

/// Makes the table: one line for each run, one line for their sum, and the faults by kind.
pub(crate) fn table(runs: &[(String, Figures)]) -> String {
    let mut text = String::from(
        "| run | faults | looks at what is alive | settled / cleared | batch: right / 137 after a hit / wrong | starts refused for now | starts witnessed once | logs whole | exec ok / cut / wrong | left over |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    let mut sum = Figures::default();
    runs.iter().for_each(|(_, figures)| sum.add(figures));
    let sum = ("**sum**".to_owned(), sum);
    for (name, figures) in runs.iter().chain((runs.len() > 1).then_some(&sum)) {
        let left = if figures.left.is_empty() { "nothing".to_owned() } else { figures.left.len().to_string() };
        let _ = writeln!(
            text,
            "| {name} | {} | {} | {} / {} | {} / {} / {} | {} | {} | {} of {} | {} / {} / {} | {left} |",
            figures.total(),
            figures.looks,
            figures.settled,
            figures.cleared,
            figures.batch_right,
            figures.batch_hit,
            figures.batch_wrong,
            figures.refused,
            figures.witnesses,
            figures.logs_whole,
            figures.logs,
            figures.exec_ok,
            figures.exec_cut,
            figures.exec_wrong,
        );
    }
    let kinds: Vec<String> = sum.1.faults.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    let _ = writeln!(text, "\nFaults by kind: {}. Without anything to strike: {}.", kinds.join(", "), sum.1.missed);
    for line in &sum.1.left {
        let _ = writeln!(text, "Left over: {line}");
    }
    text
}

#[test]
fn runs_are_summed_up() {
    let mut one = Figures { batch_right: 2, logs: 3, logs_whole: 3, ..Figures::default() };
    one.struck("SIGKILL of a shim".to_owned());
    let other = Figures { batch_right: 1, left: vec!["mount: x".to_owned()], ..one.clone() };
    let text = table(&[("a".to_owned(), one), ("b".to_owned(), other)]);
    assert!(text.contains("| **sum** | 2 |"), "{text}");
    assert!(text.contains("| 3 / 0 / 0 |") && text.contains("6 of 6"), "{text}");
    assert!(text.contains("SIGKILL of a shim 2") && text.contains("Left over: mount: x"), "{text}");
}
