//! Checks what a task has left when all is in order, against what Nomad has reported: its starts, its log, its exit
//! code.

use std::{collections::BTreeMap, time::Duration};

use super::{CLOSE, Model, may_restart};
use crate::step::{TaskNumber, Work};

impl Model {
    /// Checks the task's file, in which each start has written a line.
    pub(crate) fn witness(&mut self, number: TaskNumber, text: &str) {
        let task = &self.tasks[&number];
        let count = u32::try_from(text.lines().count()).unwrap_or(u32::MAX);
        // A start whose answer was cut off is rolled back and repeated.
        let most = task.started + task.refused + task.cut;
        let stops = u32::from(!task.is_wanted);
        let least = task.started.saturating_sub(task.hits + stops);
        self.figures.witnesses += 1;
        if count > most || count < least {
            let (started, refused, cut, hits) = (task.started, task.refused, task.cut, task.hits);
            self.violated(format!(
                "task {number} has run {count} times; Nomad tells of {started} starts and {refused} failures to start \
                 (beside {cut} faults while it was not running, and {hits} that may have killed it)"
            ));
        }
    }

    /// Returns why a log is not what it must be: each attempt's lines from 0 on, none missing and none twice. With
    /// `is_whole`, the log of the last attempt must be complete.
    pub(crate) fn log_faults(&self, number: TaskNumber, text: &str, is_whole: bool) -> Vec<String> {
        let mut attempts: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        let prefix = format!("tick {number} ");
        // A line that was cut off may stand in front of the first line of the next attempt.
        for (_, line) in text.lines().filter_map(|line| line.rsplit_once(&prefix)) {
            let mut words = line.split(' ').map(str::parse::<u32>);
            if let (Some(Ok(attempt)), Some(Ok(tick)), None) = (words.next(), words.next(), words.next()) {
                attempts.entry(attempt).or_default().push(tick);
            }
        }
        if self.tasks[&number].may_have_two_readers {
            attempts.values_mut().for_each(|ticks| ticks.sort_unstable());
        }
        let mut wrong = Vec::new();
        for (attempt, ticks) in &attempts {
            for (tick, wanted) in ticks.iter().zip(0..).filter(|(tick, wanted)| *tick != wanted) {
                wrong.push(format!("the log of task {number}: line {tick} of attempt {attempt} where {wanted} is due"));
            }
        }
        let task = &self.tasks[&number];
        if let Work::Batch { code, lines, .. } = task.work {
            let is_done = task.is_wanted && task.codes.last() == Some(&i32::from(code));
            let count =
                attempts.last_key_value().map_or(0, |(_, ticks)| u32::try_from(ticks.len()).unwrap_or(u32::MAX));
            if is_whole && is_done && !self.may_have_lost_its_reader(number) && count != lines {
                wrong.push(format!("the log of task {number} has {count} of {lines} lines of its last attempt"));
            }
        }
        wrong
    }

    /// Was the last start repeated after a failed start whose answer the plugin's death has cut off? A failed start
    /// ends the log's streams. Nomad reads them to this end, and opens them again only when it restarts the task after
    /// an answer.
    fn may_have_lost_its_reader(&self, number: TaskNumber) -> bool {
        let start = self.tasks[&number].last_start;
        let just_before = |start: Duration| self.deaths.iter().any(|death| *death <= start && start <= *death + CLOSE);
        start.is_some_and(|start| just_before(start) && self.may_fail_again(start))
    }

    /// Checks that Nomad has reported how a batch task has ended by itself: with its exit code, or why there is none.
    pub(crate) fn outcome(&mut self, number: TaskNumber) {
        let task = &self.tasks[&number];
        let Work::Batch { code, .. } = task.work else { return };
        if !task.is_wanted || task.is_given_up() || task.codes.last() == Some(&i32::from(code)) {
            return;
        }
        // A wrong exit code, a failed start and a loss were judged when Nomad reported them.
        let (codes, refused) = (&task.codes, task.refused);
        let is_final = !may_restart(task.work) && (!codes.is_empty() || refused > 0 || task.lost > 0);
        if !is_final {
            self.violated(format!(
                "batch task {number} is over without having ended with {code} (codes: {codes:?}, failed starts: {refused})"
            ));
        }
    }
}
