//! A model of what must be true of the jobs of a real agent, whatever has happened. It does no I/O: it receives Nomad's
//! task events, the faults and the observed processes, and records what contradicts the rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    events::{AllocView, Event, Kind},
    job::may_restart,
};
use crate::{
    model::{Hit, Init, may_follow_a_stop},
    report::Figures,
    step::{TaskNumber, Work},
    violations::Violations,
};

/// How long a fault still excuses a failure after it has ended: Nomad notices the death of a plugin late, and tries
/// again after pauses.
const AFTERMATH: Duration = Duration::from_secs(30);
/// The maximum time between a fault and Nomad's report of a task's end that it caused.
const CONSEQUENCE: Duration = Duration::from_secs(60);
/// If a plugin dies within this time of another one, it may not have been asked for its tasks yet.
const CLOSE: Duration = Duration::from_secs(5);
const KILLED: i32 = 137;
/// If a plugin dies while it starts a task, Nomad starts the task once more at once. It wraps a refusal of this second
/// start so that the refusal counts as final, whatever the driver says of it
/// (`client/allocrunner/taskrunner/task_runner.go`, `runDriver`). No driver can prevent this. An allocation also fails
/// for good if the plugin is gone when Nomad first asks for it (`client/client.go`, `makeFailedAlloc`).
const NOMAD_GIVES_UP: [&str; 2] = [
    "failed to start task after driver exited unexpectedly",
    "failed to initialize driver after it exited unexpectedly",
];

const NOT_ADDED: &str = "Unable to add allocation due to error";

#[derive(Debug)]
struct Task {
    work: Work,
    is_wanted: bool,
    alloc: Option<AllocView>,
    seen: BTreeSet<(u64, &'static str)>,
    /// The number of events of starts.
    started: u32,
    last_start: Option<Duration>,
    /// The number of events of failed starts.
    refused: u32,
    /// The exit codes in the events of ends.
    codes: Vec<i32>,
    /// Ends for which Nomad has reported no exit code.
    lost: u32,
    last_refusal: Option<String>,
    /// Has an event explained why the attempt is over?
    is_explained: bool,
    /// Has Nomad itself made a recoverable refusal final?
    is_given_up: bool,
    /// The number of faults that may have killed the task.
    hits: u32,
    /// The time of the last of these faults.
    last_hit: Option<Duration>,
    /// Was an agent killed while it prepared a start of this task?
    may_have_two_readers: bool,
    /// The number of faults that may have cut off a start before Nomad got its answer.
    cut: u32,
}

/// The jobs as Nomad shows them.
#[derive(Debug, Default)]
pub(super) struct Model {
    tasks: BTreeMap<TaskNumber, Task>,
    /// The beginning of each fault, and its end if it has ended.
    faults: Vec<(Duration, Option<Duration>)>,
    /// The times at which plugins died.
    deaths: Vec<Duration>,
    /// The times of faults that struck something other than the plugin that a start needs.
    strikes: Vec<Duration>,
    violations: Violations,
    pub figures: Figures,
    /// The number of tasks that Nomad has given up where no driver could have prevented it.
    pub given_up: u32,
    /// The number of tasks that Nomad has started anew where no driver could have prevented it.
    pub let_go: u32,
}

impl Model {
    /// A model that ignores each violation whose text contains one of these texts.
    pub(super) fn ignoring(ignored: &[String]) -> Self {
        Self { violations: Violations::ignoring(ignored), ..Self::default() }
    }

    pub(super) fn violations(&self) -> &[String] {
        self.violations.found()
    }

    pub(super) fn violated(&mut self, what: String) {
        self.violations.add(what);
    }

    pub(super) fn add(&mut self, number: TaskNumber, work: Work) {
        let new = Task {
            work,
            is_wanted: true,
            alloc: None,
            seen: BTreeSet::new(),
            started: 0,
            last_start: None,
            refused: 0,
            codes: Vec::new(),
            lost: 0,
            last_refusal: None,
            is_explained: true,
            is_given_up: false,
            hits: 0,
            last_hit: None,
            may_have_two_readers: false,
            cut: 0,
        };
        self.tasks.insert(number, new);
    }

    /// The job's task is no longer wanted.
    pub(super) fn unwanted(&mut self, number: TaskNumber) {
        if let Some(task) = self.tasks.get_mut(&number) {
            task.is_wanted = false;
        }
    }

    /// All tasks, with the work of each.
    pub(super) fn tasks(&self) -> Vec<(TaskNumber, Work)> {
        self.tasks.iter().map(|(number, task)| (*number, task.work)).collect()
    }

    /// The id of a task's allocation.
    pub(super) fn alloc(&self, number: TaskNumber) -> Option<String> {
        Some(self.tasks.get(&number)?.alloc.as_ref()?.id.clone())
    }

    /// The numbers of failed starts and of starts that events have reported so far.
    pub(super) fn starts(&self, number: TaskNumber) -> (u32, u32) {
        self.tasks.get(&number).map_or((0, 0), |task| (task.refused, task.started))
    }

    /// Forgets all tasks, after their removal.
    pub(super) fn forget(&mut self) {
        self.tasks.clear();
    }

    pub(super) fn fault_begins(&mut self, now: Duration) {
        self.faults.push((now, None));
        for task in self.tasks.values_mut().filter(|task| !task.is_running()) {
            task.cut += 1;
        }
    }

    pub(super) fn fault_ends(&mut self, now: Duration) {
        if let Some(fault) = self.faults.iter_mut().find(|(_, end)| end.is_none()) {
            fault.1 = Some(now);
        }
    }

    /// An agent is killed. Its log collectors live on. The next agent does not know the collectors of tasks that the
    /// killed agent was about to start, and starts further collectors for them. Two collectors that read one stream may
    /// write its lines in another order.
    pub(super) fn agent_died(&mut self) {
        for task in self.tasks.values_mut().filter(|task| !task.is_running()) {
            task.may_have_two_readers = true;
        }
    }

    /// A plugin dies.
    pub(super) fn plugin_died(&mut self, now: Duration) {
        self.deaths.push(now);
    }

    /// A fault strikes something other than the plugin that a start needs.
    pub(super) fn struck_at_start(&mut self, now: Duration) {
        self.strikes.push(now);
    }

    /// May Nomad have let go of a task? It does so when the task's plugin has died and the next plugin can't be asked
    /// for the task, and then it does not try again (`handleTaskExitResult` in
    /// `client/allocrunner/taskrunner/task_runner.go`). The cause is a second death, or a shortage, close to the first
    /// death.
    fn may_have_let_go(&self, then: Duration) -> bool {
        let mut deaths = self.deaths.iter().filter(|death| **death <= then && then <= **death + AFTERMATH);
        deaths.any(|death| {
            let others = self.deaths.iter().any(|other| other != death && death.abs_diff(*other) <= CLOSE);
            others || self.has_shortage(*death)
        })
    }

    /// May a start that followed the death of a plugin have failed for another reason, so that no driver could have
    /// made it succeed?
    fn may_fail_again(&self, then: Duration) -> bool {
        let near = |times: &[Duration]| times.iter().filter(|time| then.abs_diff(**time) <= CLOSE).count();
        near(&self.strikes) > 0 || near(&self.deaths) > 1 || self.has_shortage(then)
    }

    /// Was a lasting fault in progress at this time, or had it just ended? A fault without a duration has ended as it
    /// began.
    fn has_shortage(&self, then: Duration) -> bool {
        self.faults.iter().any(|(begin, end)| {
            let lasts = end.is_none_or(|end| end > *begin + Duration::from_millis(100));
            lasts && *begin <= then && end.is_none_or(|end| then <= end + CLOSE)
        })
    }

    /// Can a failure at this time be the consequence of a fault?
    fn is_excused(&self, then: Duration) -> bool {
        self.faults.iter().any(|(begin, end)| *begin <= then && end.is_none_or(|end| then <= end + AFTERMATH))
    }

    pub(super) fn hit(&mut self, hit: &Hit, now: Duration) {
        for (number, task) in &mut self.tasks {
            let is_hit = match hit {
                Hit::Attempts(ids) => ids.iter().any(|(task, _)| task == number),
                Hit::Unsettled => !task.is_running() || !task.is_wanted,
                Hit::NotAmong(alive) => task.is_running() && alive.iter().all(|(alive, _)| alive != number),
                Hit::All => true,
            };
            if is_hit {
                (task.hits, task.last_hit) = (task.hits + 1, Some(now));
            }
        }
    }

    /// Takes over what Nomad reports of an allocation. Returns the events that are new.
    pub(super) fn told(&mut self, number: TaskNumber, view: &AllocView) -> Vec<Event> {
        let Some(task) = self.tasks.get_mut(&number) else { return Vec::new() };
        let former = task.alloc.replace(view.clone());
        if let Some(former) = former.filter(|former| former.id != view.id) {
            self.violated(format!("task {number} has got another allocation: {} after {}", view.id, former.id));
        }
        let mut news = Vec::new();
        for event in &view.events {
            let is_news =
                self.tasks.get_mut(&number).is_some_and(|task| task.seen.insert((event.nanos, event.kind.name())));
            if is_news {
                self.judge(number, event);
                news.push(event.clone());
            }
        }
        self.judge_state(number);
        news
    }

    fn judge(&mut self, number: TaskNumber, event: &Event) {
        let (is_excused, may_fail_again) = (self.is_excused(event.then), self.may_fail_again(event.then));
        let Some(task) = self.tasks.get_mut(&number) else { return };
        let was_explained = std::mem::replace(&mut task.is_explained, true);
        match &event.kind {
            Kind::Started => {
                (task.started, task.is_explained) = (task.started + 1, false);
                task.last_start = Some(event.then);
            }
            Kind::Terminated(code) => {
                task.codes.push(*code);
                self.exited(number, *code, event.then);
            }
            Kind::Disconnected(message) => {
                task.lost += 1;
                // Nomad waits for three seconds to learn of a plugin's death, and an agent under SIGSTOP misses these
                // seconds.
                if self.deaths.iter().any(|death| *death <= event.then && event.then <= *death + AFTERMATH) {
                    self.let_go += 1;
                } else {
                    self.violated(format!("task {number} was taken for ended, and no plugin has died: {message}"));
                }
            }
            Kind::DriverFailure(message) => {
                task.refused += 1;
                task.last_refusal = Some(message.clone());
                task.is_given_up |= may_fail_again && NOMAD_GIVES_UP.iter().any(|text| message.contains(text));
                self.figures.refused += 1;
                if !is_excused {
                    self.violated(format!("a start was refused, and no fault has caused it: {message}"));
                }
            }
            Kind::Restarting | Kind::NotRestarting if !was_explained => {
                task.lost += 1;
                let is_excused = task.is_hit(event.then) || !task.is_wanted;
                if !is_excused && self.may_have_let_go(event.then) {
                    self.let_go += 1;
                } else if !is_excused {
                    self.violated(format!("task {number} was lost without a cause"));
                }
            }
            Kind::Restarting | Kind::NotRestarting => {}
            // Other events of Nomad say nothing about the attempt.
            Kind::Other(_) => task.is_explained = was_explained,
        }
    }

    fn exited(&mut self, number: TaskNumber, code: i32, then: Duration) {
        let task = &self.tasks[&number];
        let is_hit = task.is_hit(then);
        let written = match task.work {
            Work::Batch { code, .. } => Some(i32::from(code)),
            Work::Service => None,
        };
        let is_batch = u32::from(written.is_some());
        if written == Some(code) || !task.is_wanted && may_follow_a_stop(code) {
            self.figures.batch_right += is_batch;
        } else if is_hit && code == KILLED {
            self.figures.batch_hit += is_batch;
        } else {
            self.figures.batch_wrong += is_batch;
            let what = written.map_or("is a service".to_owned(), |code| format!("ends with {code}"));
            let wanted = task.is_wanted;
            self.violated(format!(
                "task {number} {what}; Nomad says {code} (wanted: {wanted}, struck by a fault: {is_hit})"
            ));
        }
    }

    /// Checks that a task that is wanted and may be started again is never over for good.
    fn judge_state(&mut self, number: TaskNumber) {
        let task = &self.tasks[&number];
        let Some(view) = &task.alloc else { return };
        let is_over = view.status == "complete" && task.started + task.refused == 0;
        let is_dead = is_over || matches!(view.status.as_str(), "failed" | "lost") || view.is_failed;
        // An agent that is killed while it reports such a failure reports afterwards only that the task has ended.
        let was_never_asked = task.started + task.refused == 0 && !self.deaths.is_empty();
        let is_not_added = view.why.starts_with(NOT_ADDED) || was_never_asked;
        let may_be_dead = !may_restart(task.work) && !is_not_added;
        if !is_dead || !task.is_wanted || may_be_dead || task.is_given_up() {
            return;
        }
        let refusal = task.last_refusal.clone().unwrap_or_else(|| format!("no start was refused; {}", view.why));
        let is_nomads = task.is_given_up || is_not_added;
        if let Some(task) = self.tasks.get_mut(&number) {
            task.seen.insert((0, "given up"));
        }
        if is_nomads {
            self.given_up += 1;
        } else {
            self.violated(format!("Nomad has given up task {number} for good: {refusal}"));
        }
    }

    /// Checks the containers that are alive at one moment: never two of one task.
    pub(super) fn seen(&mut self, inits: &[Init]) {
        self.figures.looks += 1;
        self.violations.add_doubles(inits);
    }

    /// Returns what is not yet as it must be when all faults are over.
    pub(super) fn unrest(&self, inits: &[Init]) -> Vec<String> {
        let mut found = Vec::new();
        for (number, task) in &self.tasks {
            let alive: Vec<u32> = inits.iter().filter(|init| init.attempt.0 == *number).map(|init| init.pid).collect();
            let state = task.alloc.as_ref().map_or("no allocation", |view| view.state.as_str());
            let refusal = task.last_refusal.as_deref().unwrap_or("no start was refused");
            let must_run = task.is_wanted && task.work == Work::Service && !task.is_given_up();
            if must_run && !(task.is_running() && alive.len() == 1) {
                found.push(format!(
                    "service {number} does not run exactly once (for Nomad: {state}, alive: {alive:?}, {refusal})"
                ));
            // A job that is stopped while its plugin dies may keep its state forever, although Nomad does nothing more
            // for it.
            } else if !must_run && task.is_wanted && !task.is_over() {
                found.push(format!(
                    "task {number} does not come to its end (for Nomad: {state}, alive: {alive:?}, {refusal})"
                ));
            } else if !must_run && !alive.is_empty() {
                found.push(format!("task {number} is over or stopped for Nomad, and still alive: {alive:?}"));
            }
        }
        found
    }
}

impl Task {
    /// Is the task running, as far as Nomad knows?
    fn is_running(&self) -> bool {
        self.alloc.as_ref().is_some_and(|view| view.state == "running" && view.status == "running")
    }

    /// Is Nomad done with the task? A job that was stopped before it was placed has no allocation.
    fn is_over(&self) -> bool {
        match &self.alloc {
            Some(view) => view.state == "dead" || matches!(view.status.as_str(), "complete" | "failed"),
            None => !self.is_wanted,
        }
    }

    fn is_given_up(&self) -> bool {
        self.seen.contains(&(0, "given up"))
    }

    /// Can a fault have ended the task at this time?
    fn is_hit(&self, then: Duration) -> bool {
        self.last_hit.is_some_and(|last| then <= last + CONSEQUENCE)
    }
}

mod files;
#[cfg(test)]
mod tests;
