//! Makes a list of steps from a seed. It does no I/O: the same seed, number of faults and mode always give the same
//! list, so that a failure can be repeated, and parts of the list can be tried on their own.

use crate::{
    random::Random,
    step::{Call, Fate, Fault, OciRuntime, Place, Step, Target, TaskNumber, Work},
};

/// A configuration of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    /// The log is read from Nomad's FIFOs, and each task has its own shim.
    Base,
    /// `disable_log_collection`: the driver's log writer writes the logs.
    OwnLogs,
    /// `shim_scope = "alloc"`.
    AllocScope,
    /// `shim_scope = "node"`.
    NodeScope,
    /// The tasks run in groups with network namespaces.
    Bridge,
    /// The tasks run in gVisor's sandboxes.
    Gvisor,
}

impl Mode {
    /// All modes of a long run.
    pub(crate) const ALL: [Self; 6] =
        [Self::Base, Self::OwnLogs, Self::AllocScope, Self::NodeScope, Self::Bridge, Self::Gvisor];

    /// The mode's name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::OwnLogs => "own-logs",
            Self::AllocScope => "alloc-scope",
            Self::NodeScope => "node-scope",
            Self::Bridge => "bridge",
            Self::Gvisor => "gvisor",
        }
    }

    /// The mode of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    fn runtimes(self) -> &'static [OciRuntime] {
        match self {
            Self::Gvisor => &[OciRuntime::Runsc],
            _ => &[OciRuntime::Crun, OciRuntime::Runc],
        }
    }
}

/// The parameters of a list of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub seed: u64,
    pub faults: usize,
    pub mode: Mode,
    /// May the host's clock be set? Only in a virtual machine.
    pub clock: bool,
}

/// How many services run at a time, at most.
const SERVICES: usize = 5;
/// How many `Settle` steps there are between two `Clear` steps.
const ROUNDS: usize = 3;

/// Makes the steps of a run.
pub(crate) fn plan(wanted: &Wanted) -> Vec<Step> {
    let mut planner = Planner {
        random: Random::new(wanted.seed),
        mode: wanted.mode,
        clock: wanted.clock,
        steps: Vec::new(),
        services: Vec::new(),
        next: 0,
        faults: 0,
    };
    let mut round = 0;
    while planner.faults < wanted.faults {
        planner.round(wanted.faults);
        round += 1;
        if round % ROUNDS == 0 && planner.faults < wanted.faults {
            planner.clear();
        }
    }
    planner.clear();
    planner.steps
}

/// Makes steps with kills of the plugin in the middle of the runtime's calls and no other faults, `faults` of them. In
/// every other round, the calls are as quick as the runtime itself.
pub(crate) fn aimed(wanted: &Wanted) -> Vec<Step> {
    let mut planner = Planner {
        random: Random::new(wanted.seed),
        mode: wanted.mode,
        clock: false,
        steps: Vec::new(),
        services: Vec::new(),
        next: 0,
        faults: 0,
    };
    let calls = [Call::Delete, Call::Create, Call::Start, Call::Kill];
    let mut round = 0;
    while planner.faults < wanted.faults {
        let is_stretched = round % 2 == 1;
        for call in calls {
            let (before_ms, after_ms) = if is_stretched { (30, 60) } else { (0, 0) };
            planner.steps.push(Step::Stretch { call, before_ms, after_ms });
        }
        for call in calls.into_iter().cycle().take((wanted.faults - planner.faults).min(8)) {
            planner.aimed_at(call, if is_stretched { 90 } else { 8 }, Some(Target::Plugin));
        }
        planner.steps.push(Step::Settle);
        round += 1;
        if round % 4 == 0 {
            planner.clear();
        }
    }
    planner.clear();
    planner.steps
}

struct Planner {
    random: Random,
    mode: Mode,
    clock: bool,
    steps: Vec<Step>,
    /// Services that should run.
    services: Vec<TaskNumber>,
    next: TaskNumber,
    faults: usize,
}

impl Planner {
    fn round(&mut self, limit: usize) {
        while self.services.len() < 2 {
            self.start_service();
        }
        for _ in 0..self.random.between(0, 2) {
            let call = self.random.one_of(&[Call::Create, Call::Kill, Call::Delete, Call::Exec]);
            let (before_ms, after_ms) = (self.random.between(0, 40), self.random.between(0, 120));
            self.steps.push(Step::Stretch { call, before_ms, after_ms });
        }
        let end = (self.faults + usize::try_from(self.random.between(4, 8)).unwrap()).min(limit);
        while self.faults < end {
            for _ in 0..self.random.between(1, 3) {
                self.command();
            }
            let ms = self.random.between(0, 400);
            self.steps.push(Step::Pause { ms });
            self.fault();
        }
        self.steps.push(Step::Settle);
    }

    fn clear(&mut self) {
        self.services.clear();
        self.steps.push(Step::Clear);
    }

    fn start(&mut self, work: Work) -> TaskNumber {
        let task = self.next;
        self.next += 1;
        let runtime = self.random.one_of(self.mode.runtimes());
        self.steps.push(Step::Start { task, work, runtime });
        task
    }

    fn start_service(&mut self) {
        let task = self.start(Work::Service);
        self.services.push(task);
    }

    fn start_batch(&mut self) {
        let code = u8::try_from(self.random.between(0, 5)).unwrap();
        let work = if self.random.chance(50) {
            Work::Batch { code, lines: 3, pause_ms: 0 }
        } else {
            let lines = u32::try_from(self.random.between(5, 30)).unwrap();
            Work::Batch { code, lines, pause_ms: 50 }
        };
        self.start(work);
    }

    fn a_service(&mut self) -> TaskNumber {
        if self.services.is_empty() {
            self.start_service();
        }
        self.random.one_of(&self.services)
    }

    fn take_service(&mut self) -> TaskNumber {
        let task = self.a_service();
        self.services.retain(|known| *known != task);
        task
    }

    fn stop(&mut self) {
        let task = self.take_service();
        let timeout_ms = self.random.one_of(&[0, 300, 5000]);
        self.steps.push(Step::Stop { task, timeout_ms });
    }

    fn command(&mut self) {
        #[derive(Clone, Copy)]
        enum Command {
            Batch,
            Service,
            Stop,
            Destroy,
            Signal,
            Exec,
            Stats,
            Inspect,
            Recover,
        }
        let kind = self.random.weighted(&[
            (30, Command::Batch),
            (if self.services.len() < SERVICES { 20 } else { 0 }, Command::Service),
            (if self.services.len() > 1 { 12 } else { 0 }, Command::Stop),
            (if self.services.len() > 1 { 8 } else { 0 }, Command::Destroy),
            (5, Command::Signal),
            (20, Command::Exec),
            (5, Command::Stats),
            (5, Command::Inspect),
            (5, Command::Recover),
        ]);
        match kind {
            Command::Batch => return self.start_batch(),
            Command::Service => return self.start_service(),
            Command::Stop => return self.stop(),
            Command::Signal | Command::Exec | Command::Stats | Command::Inspect | Command::Recover => {}
            Command::Destroy => {
                let force = self.random.chance(70);
                let task = if force { self.take_service() } else { self.a_service() };
                return self.steps.push(Step::Destroy { task, force });
            }
        }
        let task = self.a_service();
        let code = u8::try_from(self.random.between(0, 5)).unwrap();
        self.steps.push(match kind {
            Command::Signal => Step::Signal { task },
            Command::Stats => Step::Stats { task },
            Command::Inspect => Step::Inspect { task },
            Command::Recover => Step::Recover { task },
            _ => Step::Exec { task, code },
        });
    }

    /// Adds a command that makes the runtime do this call, and a kill in the middle of the call.
    fn aimed_at(&mut self, call: Call, within_ms: u64, only: Option<Target>) {
        let after_ms = self.random.between(0, within_ms);
        let drawn = self.random.weighted(&[(60, Target::Plugin), (25, Target::Runtime), (15, Target::Shim)]);
        let target = only.unwrap_or(drawn);
        match call {
            Call::Create | Call::Start if self.services.len() < SERVICES => self.start_service(),
            Call::Create | Call::Start => self.start_batch(),
            Call::Kill => self.stop(),
            Call::Delete => {
                let task = self.take_service();
                self.steps.push(Step::Destroy { task, force: true });
            }
            Call::Exec => {
                let task = self.a_service();
                self.steps.push(Step::Exec { task, code: 0 });
            }
        }
        let is_polite = only.is_none() && target == Target::Plugin && self.random.chance(30);
        self.add(if is_polite {
            Fault::TerminateDuring { call, after_ms }
        } else {
            Fault::KillDuring { target, call, after_ms }
        });
    }

    fn add(&mut self, fault: Fault) {
        self.faults += 1;
        self.steps.push(Step::Fault(fault));
    }

    fn fault(&mut self) {
        if self.random.chance(25) {
            let call = self.random.one_of(&[Call::Create, Call::Delete, Call::Delete, Call::Kill, Call::Exec]);
            return self.aimed_at(call, 150, None);
        }
        if self.random.chance(10) {
            let away_ms = self.random.between(100, 1500);
            let plugin = self.random.one_of(&[Fate::Kept, Fate::Killed, Fate::Killed, Fate::Replaced]);
            if self.random.chance(50) {
                self.start_batch();
                self.steps.push(Step::Pause { ms: 300 });
            }
            self.faults += 1;
            return self.steps.push(Step::AgentRestart { away_ms, plugin });
        }
        let (is_own_logs, pick) = (self.mode == Mode::OwnLogs, self.random.between(0, 7));
        let target = self.random.weighted(&[
            (30, Target::Plugin),
            (20, Target::Shim),
            (8, Target::Containerd),
            (20, Target::Runtime),
            (10, Target::Init),
            (if is_own_logs { 15 } else { 0 }, Target::LogWriter),
            (if is_own_logs { 15 } else { 0 }, Target::Keeper),
        ]);
        let ms = self.random.between(500, 3000);
        let pressure_ms = self.random.between(300, 1500);
        let place = self.random.one_of(&[Place::Run, Place::Run, Place::State]);
        let spare = self.random.between(0, 12);
        let (former, run_dir_stays) = (self.random.chance(50), self.random.chance(50));
        let seconds = self.random.one_of(&[-3600, -5, 5, 3600]);
        let fault = self.random.weighted(&[
            (55, Fault::Kill { target, pick }),
            (15, Fault::Freeze { target, pick, ms }),
            (5, Fault::Terminate),
            (8, Fault::Full { place, ms: pressure_ms }),
            (6, Fault::FewDescriptors { spare, ms: pressure_ms }),
            (4, Fault::NoProcesses { ms: pressure_ms }),
            (3, Fault::Replace { former }),
            (2, Fault::Reboot { run_dir_stays }),
            (if self.clock { 5 } else { 0 }, Fault::ClockJump { seconds }),
        ]);
        if matches!(fault, Fault::Full { .. } | Fault::FewDescriptors { .. } | Fault::NoProcesses { .. }) {
            // A shortage only affects a task that is started during it.
            self.add(fault);
            return self.start_batch();
        }
        self.add(fault);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted { seed: 7, faults: 400, mode: Mode::OwnLogs, clock: false };

    #[test]
    fn the_same_seed_gives_the_same_steps() {
        assert_eq!(plan(&WANTED), plan(&WANTED));
        assert_ne!(plan(&WANTED), plan(&Wanted { seed: 8, ..WANTED }));
    }

    #[test]
    fn a_plan_has_as_many_faults_as_were_asked_for_and_ends_with_nothing_left() {
        for mode in Mode::ALL {
            for faults in [1, 7, 100] {
                let steps = plan(&Wanted { mode, faults, ..WANTED });
                assert_eq!(steps.iter().filter(|step| step.is_fault()).count(), faults);
                assert_eq!(steps.last(), Some(&Step::Clear));
                let steps = aimed(&Wanted { mode, faults, ..WANTED });
                assert_eq!(steps.iter().filter(|step| step.is_fault()).count(), faults);
                assert_eq!(steps.last(), Some(&Step::Clear));
            }
        }
    }

    #[test]
    fn every_kind_of_fault_comes_up_but_the_clock_only_where_it_may_be_set() {
        let kinds = |wanted: &Wanted| {
            let steps = plan(wanted);
            let faults = steps.iter().filter_map(|step| match step {
                Step::Fault(fault) => Some(fault.kind()),
                _ => None,
            });
            faults.collect::<std::collections::BTreeSet<_>>()
        };
        let all = kinds(&WANTED);
        for wanted in ["SIGKILL of the plugin", "SIGSTOP of a shim", "full run directory", "reboot", "few descriptors"]
        {
            assert!(all.contains(wanted), "{wanted} is not in {all:?}");
        }
        assert!(!all.contains("clock jump"));
        assert!(kinds(&Wanted { clock: true, ..WANTED }).contains("clock jump"));
    }

    #[test]
    fn a_command_names_a_task_that_was_started_before() {
        let mut started = 0;
        for step in plan(&WANTED) {
            match step {
                Step::Start { task, .. } => {
                    assert_eq!(task, started);
                    started += 1;
                }
                Step::Stop { task, .. } | Step::Destroy { task, .. } | Step::Exec { task, .. } => {
                    assert!(task < started);
                }
                _ => {}
            }
        }
    }
}
