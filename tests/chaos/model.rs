//! A model of what must be true of a node's tasks, whatever has happened. It does no I/O: it receives the calls,
//! answers, faults and observed processes, and records what contradicts the rules.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use crate::{
    report::Figures,
    step::{TaskNumber, Work},
    support::patience,
    violations::Violations,
};

/// How long a fault still excuses a refusal after it has ended: its remains are still being removed.
fn aftermath() -> Duration {
    patience() / 3
}
/// The exit code of a task that handles its stop signal.
pub(crate) const STOPPED: i32 = 9;
const KILLED: i32 = 137;
/// The exit code of a task whose program does not handle the stop signal.
const TERMINATED: i32 = 143;
/// The exit code of `runc init`, which runc starts as the container's first process, if the stop signal comes just
/// before it executes the task's program. The Go runtime restores the signal's default action and sends the signal
/// again, which the kernel ignores for the first process of a PID namespace; then it ends with this code
/// (`dieFromSignal` in Go's `runtime/signal_unix.go`). It is the same with docker and containerd.
const RUNC_INIT_TERMINATED: i32 = 2;
/// The exit code of `runsc exec` if the sandbox ends during the command (gVisor, `runsc/cmd/util`, `Fatalf`).
const RUNSC_FAILED: i32 = 128;

/// Can this be the exit code of a task that was stopped?
pub(crate) fn may_follow_a_stop(code: i32) -> bool {
    matches!(code, STOPPED | KILLED | TERMINATED | RUNC_INIT_TERMINATED)
}

/// An attempt of a task: the number of the task, and the number of the attempt.
pub(crate) type AttemptId = (TaskNumber, u32);

/// A container's first process, as the kernel shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Init {
    pub pid: u32,
    pub attempt: AttemptId,
}

/// The attempts that a fault may have struck.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Hit {
    /// The attempts with these ids.
    Attempts(Vec<AttemptId>),
    /// All attempts that are being started or stopped at this moment.
    Unsettled,
    /// All attempts that run as far as the agent knows and are not in this list of live attempts: they have just ended.
    NotAmong(Vec<AttemptId>),
    /// All attempts.
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// StartTask was called, and has not been answered.
    Asked,
    /// StartTask was answered.
    Running,
    /// WaitTask was answered, or StartTask or RecoverTask was refused.
    Ended,
    /// The agent that called StartTask is dead, and it had not noted the answer.
    Forgotten,
}

#[derive(Debug)]
struct Attempt {
    state: State,
    /// The number of StartTask calls with this id.
    calls: u32,
    was_answered: bool,
    is_hit: bool,
    was_told_to_stop: bool,
    code: Option<i32>,
}

#[derive(Debug)]
struct Task {
    work: Work,
    attempts: Vec<Attempt>,
    /// Should the task run, as long as its work is not done?
    is_wanted: bool,
    /// Is the agent done with the task?
    is_over: bool,
    last_refusal: Option<String>,
}

/// The node as the agent knows it.
#[derive(Debug, Default)]
pub(crate) struct Model {
    tasks: BTreeMap<TaskNumber, Task>,
    /// The number of faults that are in progress now.
    ongoing: u32,
    last_fault: Option<Duration>,
    violations: Violations,
    pub figures: Figures,
}

impl Model {
    /// A model that ignores each violation whose text contains one of these texts.
    pub(crate) fn ignoring(ignored: &[String]) -> Self {
        Self { violations: Violations::ignoring(ignored), ..Self::default() }
    }

    /// The violations that were found so far.
    pub(crate) fn violations(&self) -> &[String] {
        self.violations.found()
    }

    /// Records a violation.
    pub(crate) fn violated(&mut self, what: String) {
        self.violations.add(what);
    }

    pub(crate) fn add(&mut self, task: TaskNumber, work: Work) {
        let new = Task { work, attempts: Vec::new(), is_wanted: true, is_over: false, last_refusal: None };
        self.tasks.insert(task, new);
    }

    pub(crate) fn fault_begins(&mut self, now: Duration) {
        (self.ongoing, self.last_fault) = (self.ongoing + 1, Some(now));
    }

    pub(crate) fn fault_ends(&mut self, now: Duration) {
        (self.ongoing, self.last_fault) = (self.ongoing.saturating_sub(1), Some(now));
    }

    /// Can a failure at this time be the consequence of a fault?
    fn is_excused(&self, now: Duration) -> bool {
        self.ongoing > 0 || self.last_fault.is_some_and(|last| now.saturating_sub(last) < aftermath())
    }

    pub(crate) fn hit(&mut self, hit: &Hit) {
        for (number, task) in &mut self.tasks {
            for (attempt, index) in task.attempts.iter_mut().zip(1..) {
                let is_unsettled = attempt.state == State::Asked || attempt.was_told_to_stop;
                attempt.is_hit |= match hit {
                    Hit::Attempts(ids) => ids.contains(&(*number, index)),
                    Hit::Unsettled => is_unsettled,
                    Hit::NotAmong(alive) => attempt.state == State::Running && !alive.contains(&(*number, index)),
                    Hit::All => true,
                };
            }
        }
    }

    fn attempt(&mut self, id: AttemptId) -> &mut Attempt {
        let task = self.tasks.get_mut(&id.0).expect("only tasks that were added are told of");
        &mut task.attempts[id.1 as usize - 1]
    }

    /// Adds an attempt to a task, and returns the attempt's number.
    pub(crate) fn next_attempt(&mut self, task: TaskNumber) -> u32 {
        let attempts = &mut self.tasks.get_mut(&task).expect("a task that was added").attempts;
        attempts.push(Attempt {
            state: State::Asked,
            calls: 0,
            was_answered: false,
            is_hit: false,
            was_told_to_stop: false,
            code: None,
        });
        u32::try_from(attempts.len()).expect("few attempts")
    }

    /// StartTask is called.
    pub(crate) fn asked(&mut self, id: AttemptId) {
        self.attempt(id).calls += 1;
    }

    /// StartTask was answered with a handle.
    pub(crate) fn answered(&mut self, id: AttemptId) {
        let attempt = self.attempt(id);
        (attempt.state, attempt.was_answered) = (State::Running, true);
    }

    /// StartTask was refused.
    pub(crate) fn refused(&mut self, id: AttemptId, is_recoverable: bool, message: &str, now: Duration) {
        let is_excused = self.is_excused(now);
        let attempt = self.attempt(id);
        attempt.state = State::Ended;
        if attempt.was_told_to_stop && message.contains("was stopped while it was being started") {
            return;
        }
        self.figures.refused += 1;
        let task = self.tasks.get_mut(&id.0).expect("a task that was added");
        task.last_refusal = Some(message.to_owned());
        if !is_recoverable {
            self.violated(format!("a start was refused for good: {message}"));
        } else if !is_excused {
            self.violated(format!("a start was refused, and no fault has caused it: {message}"));
        }
    }

    /// The agent that had called StartTask is dead.
    pub(crate) fn forgotten(&mut self, id: AttemptId) {
        self.attempt(id).state = State::Forgotten;
    }

    pub(crate) fn told_to_stop(&mut self, id: AttemptId) {
        self.attempt(id).was_told_to_stop = true;
    }

    /// The agent no longer wants the task.
    pub(crate) fn unwanted(&mut self, task: TaskNumber) {
        if let Some(task) = self.tasks.get_mut(&task) {
            task.is_wanted = false;
        }
    }

    /// The agent is done with the task.
    pub(crate) fn over(&mut self, task: TaskNumber) {
        self.tasks.get_mut(&task).expect("a task that was added").is_over = true;
    }

    /// WaitTask was answered.
    pub(crate) fn exited(&mut self, id: AttemptId, code: i32, text: &str) {
        let work = self.tasks[&id.0].work;
        let attempt = self.attempt(id);
        (attempt.state, attempt.code) = (State::Ended, Some(code));
        let (is_hit, was_told) = (attempt.is_hit, attempt.was_told_to_stop);
        let written = match work {
            Work::Batch { code, .. } => Some(i32::from(code)),
            Work::Service => None,
        };
        let is_right = written == Some(code) || was_told && may_follow_a_stop(code);
        let is_batch = u32::from(written.is_some());
        if is_right {
            self.figures.batch_right += is_batch;
        } else if is_hit && code == KILLED {
            self.figures.batch_hit += is_batch;
        } else {
            self.figures.batch_wrong += is_batch;
            let what = written.map_or("is a service".to_owned(), |code| format!("ends with {code}"));
            self.violated(format!("task {id:?} {what}; WaitTask says {code} {text:?} (told to stop: {was_told}, struck by a fault: {is_hit})"));
        }
    }

    /// RecoverTask was refused.
    pub(crate) fn lost(&mut self, id: AttemptId, message: &str) {
        let attempt = self.attempt(id);
        attempt.state = State::Ended;
        let is_excused = attempt.is_hit || attempt.was_told_to_stop;
        if !is_excused {
            self.violated(format!("task {id:?} was lost without a cause: {message}"));
        }
        if matches!(self.tasks[&id.0].work, Work::Batch { .. }) {
            self.figures.batch_hit += 1;
        }
    }

    /// DestroyTask is called: all that is left of the attempt is removed.
    pub(crate) fn destroyed(&mut self, id: AttemptId) {
        let attempt = self.attempt(id);
        (attempt.state, attempt.was_told_to_stop) = (State::Ended, true);
    }

    /// Is the attempt running, as far as the agent knows?
    pub(crate) fn is_running(&self, id: AttemptId) -> bool {
        let task = self.tasks.get(&id.0);
        let attempt = task.and_then(|task| task.attempts.get(id.1 as usize - 1));
        attempt.is_some_and(|attempt| attempt.state == State::Running && !attempt.was_told_to_stop)
    }

    /// Is the attempt running, and is there no current or recent fault that would explain a failure?
    pub(crate) fn is_quiet(&self, id: AttemptId, now: Duration) -> bool {
        self.is_running(id) && !self.is_excused(now)
    }

    /// A command was run in a task. `got` is its exit code, or the reason why the call failed.
    pub(crate) fn executed(&mut self, id: AttemptId, wanted: i32, got: Result<i32, String>, now: Duration) {
        let may_fail = self.is_excused(now) || !self.is_running(id);
        match got {
            Ok(code) if code == wanted => self.figures.exec_ok += 1,
            Ok(KILLED | RUNSC_FAILED) | Err(_) if may_fail => self.figures.exec_cut += 1,
            Ok(code) => {
                self.figures.exec_wrong += 1;
                self.violated(format!("a command in {id:?} that ends with {wanted} is said to have ended with {code}"));
            }
            Err(message) => {
                self.figures.exec_wrong += 1;
                self.violated(format!("a command in {id:?} failed, and no fault has caused it: {message}"));
            }
        }
    }

    /// Checks the containers that are alive at one moment: never two of one task.
    pub(crate) fn seen(&mut self, inits: &[Init]) {
        self.figures.looks += 1;
        self.violations.add_doubles(inits);
    }

    /// Returns what is not yet as it must be after all faults: each task that is wanted runs once or has done its work,
    /// and no other container is alive. Containers in sandboxes can't be seen (`inits` is `None`).
    pub(crate) fn unrest(&self, inits: Option<&[Init]>) -> Vec<String> {
        let mut found = Vec::new();
        let (can_see, inits) = (inits.is_some(), inits.unwrap_or_default());
        for (number, task) in &self.tasks {
            let alive: Vec<&Init> = inits.iter().filter(|init| init.attempt.0 == *number).collect();
            let last = u32::try_from(task.attempts.len()).expect("few attempts");
            let is_service = task.work == Work::Service;
            let runs = task.attempts.last().is_some_and(|attempt| attempt.state == State::Running);
            if task.is_wanted && is_service {
                let is_alone = !can_see || matches!(alive[..], [one] if one.attempt == (*number, last));
                if !runs || !is_alone {
                    let refusal = task.last_refusal.as_deref().unwrap_or("no start was refused");
                    found.push(format!("service {number} does not run exactly once (running for the agent: {runs}, alive: {alive:?}, {refusal})"));
                }
            } else if !task.is_over {
                let refusal = task.last_refusal.as_deref().unwrap_or("no start was refused");
                found.push(format!("task {number} does not come to its end (alive: {alive:?}, {refusal})"));
            } else if !alive.is_empty() {
                found.push(format!("task {number} is over for the agent, and still alive: {alive:?}"));
            }
        }
        found
    }

    /// Checks the file in which each start of a batch task has written a line with the attempt's number.
    pub(crate) fn witness(&mut self, number: TaskNumber, text: &str) {
        let mut starts: HashMap<u32, u32> = HashMap::new();
        for attempt in text.lines().filter_map(|line| line.parse().ok()) {
            *starts.entry(attempt).or_default() += 1;
        }
        let task = &self.tasks[&number];
        let mut wrong = Vec::new();
        for (attempt, index) in task.attempts.iter().zip(1..) {
            let count = starts.remove(&index).unwrap_or(0);
            // A start whose answer was cut off is rolled back and repeated.
            let least = u32::from(attempt.was_answered && !attempt.is_hit && !attempt.was_told_to_stop);
            if count > attempt.calls || count < least {
                wrong.push(format!(
                    "attempt {index} of task {number} has run {count} times for {} calls of StartTask",
                    attempt.calls
                ));
            }
        }
        wrong.extend(
            starts.keys().map(|index| format!("attempt {index} of task {number} was never asked for, and has run")),
        );
        self.figures.witnesses += 1;
        wrong.into_iter().for_each(|what| self.violated(what));
    }

    /// Checks a task's log, as far as it was written: lines 0 to n of each attempt, in order, none missing and none
    /// twice.
    pub(crate) fn log(&mut self, number: TaskNumber, prefix: &str, text: &str) {
        let task = &self.tasks[&number];
        let mut wrong = Vec::new();
        let mut next: HashMap<u32, u32> = HashMap::new();
        // A start whose answer was cut off is rolled back and repeated. The attempt's log begins anew each time.
        let mut begins: HashMap<u32, u32> =
            (1..).zip(&task.attempts).map(|(index, attempt)| (index, attempt.calls)).collect();
        // A line that was cut off may stand in front of the first line of the next attempt.
        for (_, line) in text.lines().filter_map(|line| line.rsplit_once(prefix)) {
            let mut words = line.split(' ').map(str::parse::<u32>);
            let (Some(Ok(attempt)), Some(Ok(tick)), None) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            let wanted = next.entry(attempt).or_default();
            let begins = begins.entry(attempt).or_default();
            if tick == 0 && *begins > 0 {
                *begins -= 1;
            } else if tick != *wanted || tick == 0 {
                wrong.push(format!("the log of task {number}: line {tick} of attempt {attempt} where {wanted} is due"));
            }
            *wanted = tick + 1;
        }
        if let Work::Batch { code, lines, .. } = task.work {
            for (attempt, index) in task.attempts.iter().zip(1..) {
                let is_whole = attempt.code == Some(i32::from(code)) && !attempt.was_told_to_stop && !attempt.is_hit;
                let count = next.get(&index).copied().unwrap_or(0);
                // A start that was rolled back and repeated has written some of its lines twice.
                if is_whole && attempt.calls == 1 && count != lines {
                    wrong.push(format!("the log of task {number} has {count} of {lines} lines of attempt {index}"));
                }
            }
        }
        self.figures.logs += 1;
        if wrong.is_empty() {
            self.figures.logs_whole += 1;
        }
        wrong.into_iter().for_each(|what| self.violated(what));
    }

    /// Must the log's streams come to their end? They need not for an attempt that never ran: a start that was refused
    /// for lack of descriptors can't open the log either. Nomad waits for the streams' end only after an attempt that
    /// has run.
    pub(crate) fn must_end_its_log(&self, task: TaskNumber) -> bool {
        self.tasks[&task].attempts.last().is_some_and(|attempt| attempt.was_answered)
    }
}

#[cfg(test)]
mod tests;
