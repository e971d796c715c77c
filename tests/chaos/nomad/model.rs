//! What must be true of jobs of a real agent, whatever has happened. Pure: it is told of Nomad's task events, faults and
//! sights, and says what contradicts them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    events::{AllocView, Event, Kind},
    job::may_restart,
};
use crate::{
    model::{Hit, Init, STOPPED},
    report::Figures,
    step::{TaskNumber, Work},
    violations::Violations,
};

/// A failure is excused by a fault that is over for no longer than this: Nomad notices the death of a plugin late, and tries
/// again after pauses.
const AFTERMATH: Duration = Duration::from_secs(30);
/// Nomad tells of the end of a task so long after a fault at most.
const CONSEQUENCE: Duration = Duration::from_secs(60);
/// A plugin that dies so soon after another one may not have been asked for its tasks yet.
const CLOSE: Duration = Duration::from_secs(5);
const KILLED: i32 = 137;
/// Nomad starts a task whose plugin dies meanwhile once more at once, and wraps a refusal of that start so that it counts as
/// final, whatever the driver says of it (`client/allocrunner/taskrunner/task_runner.go`, `runDriver`). No driver can help it.
/// An allocation fails for good as well when the plugin is gone as Nomad first asks for it (`client/client.go`, `makeFailedAlloc`).
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
    /// Events of starts, failures to start, and ends.
    started: u32,
    last_start: Option<Duration>,
    refused: u32,
    codes: Vec<i32>,
    /// Ends of which Nomad has told no code.
    lost: u32,
    last_refusal: Option<String>,
    /// Has an event told why the attempt is over?
    is_explained: bool,
    /// Has Nomad itself made a passing refusal final?
    is_given_up: bool,
    /// Faults that may have killed it, and the last of them.
    hits: u32,
    last_hit: Option<Duration>,
    /// Was an agent killed while it prepared a start?
    may_have_two_readers: bool,
    /// Faults that may have cut off a start whose answer Nomad has not got.
    cut: u32,
}

/// The jobs as Nomad shows them.
#[derive(Debug, Default)]
pub(super) struct Model {
    tasks: BTreeMap<TaskNumber, Task>,
    /// The faults: begin and end, as far as they have ended.
    faults: Vec<(Duration, Option<Duration>)>,
    /// Deaths of plugins.
    deaths: Vec<Duration>,
    /// Strikes at what a start needs besides the plugin.
    strikes: Vec<Duration>,
    violations: Violations,
    pub figures: Figures,
    /// Tasks that Nomad has given up where no driver could have helped.
    pub given_up: u32,
    /// Tasks that Nomad has started anew where no driver could have helped.
    pub let_go: u32,
}

impl Model {
    /// A model that does not mind what contains one of these texts.
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

    /// Nobody wants the task any more.
    pub(super) fn unwanted(&mut self, number: TaskNumber) {
        if let Some(task) = self.tasks.get_mut(&number) {
            task.is_wanted = false;
        }
    }

    /// All tasks, with their works.
    pub(super) fn tasks(&self) -> Vec<(TaskNumber, Work)> {
        self.tasks.iter().map(|(number, task)| (*number, task.work)).collect()
    }

    /// The allocation of a task.
    pub(super) fn alloc(&self, number: TaskNumber) -> Option<String> {
        Some(self.tasks.get(&number)?.alloc.as_ref()?.id.clone())
    }

    /// Events that have told of failed starts and of starts, so far.
    pub(super) fn starts(&self, number: TaskNumber) -> (u32, u32) {
        self.tasks.get(&number).map_or((0, 0), |task| (task.refused, task.started))
    }

    /// All tasks are gone.
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

    /// An agent is killed. Its log collectors live on; those of tasks that it was about to start are unknown to the next one,
    /// which starts others beside them, and two that read one stream may write its lines in another order.
    pub(super) fn agent_died(&mut self) {
        for task in self.tasks.values_mut().filter(|task| !task.is_running()) {
            task.may_have_two_readers = true;
        }
    }

    /// A plugin dies.
    pub(super) fn plugin_died(&mut self, now: Duration) {
        self.deaths.push(now);
    }

    /// Something besides the plugin is struck that a start needs.
    pub(super) fn struck_at_start(&mut self, now: Duration) {
        self.strikes.push(now);
    }

    /// Nomad lets go of a task whose plugin has died when the next plugin can't be asked for it, and does not try again
    /// (`handleTaskExitResult` in `client/allocrunner/taskrunner/task_runner.go`): another death, or a shortage, beside a death.
    fn may_have_let_go(&self, then: Duration) -> bool {
        let mut deaths = self.deaths.iter().filter(|death| **death <= then && then <= **death + AFTERMATH);
        deaths.any(|death| {
            let others = self.deaths.iter().any(|other| other != death && death.abs_diff(*other) <= CLOSE);
            others || self.has_shortage(*death)
        })
    }

    /// Has a start that followed the death of a plugin failed by something else, so that no driver could have made it?
    fn may_fail_again(&self, then: Duration) -> bool {
        let near = |times: &[Duration]| times.iter().filter(|time| then.abs_diff(**time) <= CLOSE).count();
        near(&self.strikes) > 0 || near(&self.deaths) > 1 || self.has_shortage(then)
    }

    /// Did a fault last then, or had it just ended? What only strikes has ended as it began.
    fn has_shortage(&self, then: Duration) -> bool {
        self.faults.iter().any(|(begin, end)| {
            let lasts = end.is_none_or(|end| end > *begin + Duration::from_millis(100));
            lasts && *begin <= then && end.is_none_or(|end| then <= end + CLOSE)
        })
    }

    /// May something that failed then be a fault's doing?
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

    /// Nomad has told of an allocation: the events that are news.
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
                // Nomad waits for three seconds for the news of a plugin's death, and an agent that is stopped misses them.
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
            // What Nomad tells besides says nothing of the attempt.
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
        if written == Some(code) || !task.is_wanted && matches!(code, STOPPED | KILLED | 143) {
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

    /// A task that is wanted and may be started again is never over for good.
    fn judge_state(&mut self, number: TaskNumber) {
        let task = &self.tasks[&number];
        let Some(view) = &task.alloc else { return };
        let is_over = view.status == "complete" && task.started + task.refused == 0;
        let is_dead = is_over || matches!(view.status.as_str(), "failed" | "lost") || view.is_failed;
        // An agent that is killed as it tells of this tells only of an end afterwards.
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

    /// What is alive at one moment: never two of one task.
    pub(super) fn seen(&mut self, inits: &[Init]) {
        self.figures.looks += 1;
        self.violations.add_doubles(inits);
    }

    /// What is not yet as it must be when all faults are over.
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
            // A job that is stopped as its plugin dies may keep its state for ever, although Nomad does nothing more for it.
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
    /// Does it run, as far as Nomad knows?
    fn is_running(&self) -> bool {
        self.alloc.as_ref().is_some_and(|view| view.state == "running" && view.status == "running")
    }

    /// Does Nomad do nothing more for it? One that was stopped before it was placed has no allocation.
    fn is_over(&self) -> bool {
        match &self.alloc {
            Some(view) => view.state == "dead" || matches!(view.status.as_str(), "complete" | "failed"),
            None => !self.is_wanted,
        }
    }

    fn is_given_up(&self) -> bool {
        self.seen.contains(&(0, "given up"))
    }

    /// May a fault have ended it then?
    fn is_hit(&self, then: Duration) -> bool {
        self.last_hit.is_some_and(|last| then <= last + CONSEQUENCE)
    }
}

mod files;
#[cfg(test)]
mod tests;
