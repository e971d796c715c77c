//! Makes a list of steps for a real agent from a seed. It does no I/O, as the plan for the stand-in.

use std::fmt;

use crate::{
    plan::Wanted,
    random::Random,
    step::{Call, Fault, OciRuntime, Place, Target, TaskNumber, Work},
};

/// How an agent ends or is suspended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Agent {
    /// SIGKILL of the agent; its plugin lives on.
    Killed,
    /// SIGKILL of the agent and of its plugin.
    KilledWithPlugin,
    /// SIGTERM: the agent ends its plugin and leaves.
    Terminated,
    /// SIGSTOP, and SIGCONT after a while.
    Stopped,
}

/// One step of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Run {
        task: TaskNumber,
        work: Work,
        runtime: OciRuntime,
    },
    /// The job is stopped.
    Stop {
        task: TaskNumber,
    },
    /// The agent ends or is suspended, and comes back after a while.
    Agent {
        how: Agent,
        away_ms: u64,
    },
    Stretch {
        call: Call,
        before_ms: u64,
        after_ms: u64,
    },
    Fault(Fault),
    Pause {
        ms: u64,
    },
    /// Waits until all faults are over and all that must be true is true.
    Settle,
    /// Stops and purges all jobs, and makes Nomad collect its garbage. Nothing of the jobs may be left.
    Clear,
}

/// How many services run at a time, at most.
const SERVICES: usize = 4;
/// How many `Settle` steps there are between two `Clear` steps.
const ROUNDS: usize = 3;

/// Makes the steps of a run.
pub(super) fn plan(wanted: &Wanted) -> Vec<Step> {
    let random = Random::new(wanted.seed);
    let mut planner = Planner { random, steps: Vec::new(), services: Vec::new(), next: 0, faults: 0 };
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

struct Planner {
    random: Random,
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
            let call = self.random.one_of(&[Call::Create, Call::Kill, Call::Delete]);
            let (before_ms, after_ms) = (self.random.between(0, 40), self.random.between(0, 120));
            self.steps.push(Step::Stretch { call, before_ms, after_ms });
        }
        let end = (self.faults + usize::try_from(self.random.between(5, 9)).unwrap()).min(limit);
        while self.faults < end {
            self.command();
            // Nomad needs some time between the registration of a job and the start of its task.
            let ms = self.random.between(0, 1500);
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
        let runtime = self.random.one_of(&[OciRuntime::Crun, OciRuntime::Runc]);
        self.steps.push(Step::Run { task, work, runtime });
        task
    }

    fn start_service(&mut self) {
        let task = self.start(Work::Service);
        self.services.push(task);
    }

    fn start_batch(&mut self) {
        let code = u8::try_from(self.random.one_of(&[0, 0, 1, 3, 5])).unwrap();
        let lines = u32::try_from(self.random.between(3, 30)).unwrap();
        let pause_ms = self.random.one_of(&[0, 50, 100]);
        self.start(Work::Batch { code, lines, pause_ms });
    }

    fn stop(&mut self) {
        let task = self.random.one_of(&self.services);
        self.services.retain(|known| *known != task);
        self.steps.push(Step::Stop { task });
    }

    fn command(&mut self) {
        let may_start = if self.services.len() < SERVICES { 25 } else { 0 };
        let may_stop = if self.services.len() > 1 { 20 } else { 0 };
        match self.random.weighted(&[(40, 0), (may_start, 1), (may_stop, 2)]) {
            0 => self.start_batch(),
            1 => self.start_service(),
            _ => self.stop(),
        }
    }

    /// Adds a command that makes the runtime do a call, and a fault in the middle of the call.
    fn aimed(&mut self) {
        let call = self.random.one_of(&[Call::Create, Call::Create, Call::Kill, Call::Delete]);
        let after_ms = self.random.between(0, 120);
        let target = self.random.weighted(&[(50, Target::Plugin), (30, Target::Runtime), (20, Target::Shim)]);
        match call {
            Call::Kill | Call::Delete if self.services.len() > 1 => self.stop(),
            _ => self.start_batch(),
        }
        let is_polite = target == Target::Plugin && self.random.chance(30);
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
            return self.aimed();
        }
        if self.random.chance(18) {
            let how = self.random.weighted(&[
                (35, Agent::Killed),
                (25, Agent::KilledWithPlugin),
                (20, Agent::Terminated),
                (20, Agent::Stopped),
            ]);
            let away_ms = self.random.between(100, 3000);
            self.faults += 1;
            return self.steps.push(Step::Agent { how, away_ms });
        }
        let pick = self.random.between(0, 7);
        let target = self.random.weighted(&[
            (30, Target::Plugin),
            (22, Target::Shim),
            (10, Target::Containerd),
            (12, Target::Runtime),
            (16, Target::Init),
        ]);
        let ms = self.random.between(500, 4000);
        let place = self.random.one_of(&[Place::Run, Place::State]);
        let spare = self.random.between(0, 12);
        let fault = self.random.weighted(&[
            (50, Fault::Kill { target, pick }),
            (14, Fault::Freeze { target, pick, ms }),
            (6, Fault::Terminate),
            (10, Fault::Full { place, ms }),
            (8, Fault::FewDescriptors { spare, ms }),
            (6, Fault::NoProcesses { ms }),
            (5, Fault::Replace { former: false }),
        ]);
        self.add(fault);
        if matches!(fault, Fault::Full { .. } | Fault::FewDescriptors { .. } | Fault::NoProcesses { .. }) {
            // A shortage only affects a task that is started during it.
            self.start_service();
        }
    }
}

impl Step {
    /// Is this step a fault?
    #[cfg(test)]
    fn is_fault(&self) -> bool {
        matches!(self, Self::Fault(_) | Self::Agent { .. })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use crate::step::Step as Common;
        match *self {
            Self::Run { task, work, runtime } => write!(f, "{}", Common::Start { task, work, runtime }),
            Self::Stop { task } => write!(f, "stop job {task}"),
            Self::Agent { how: Agent::Stopped, away_ms } => write!(f, "FAULT SIGSTOP of the agent for {away_ms} ms"),
            Self::Agent { how, away_ms } => write!(f, "FAULT {}, away for {away_ms} ms", how.kind()),
            Self::Stretch { call, before_ms, after_ms } => {
                write!(f, "{}", Common::Stretch { call, before_ms, after_ms })
            }
            Self::Fault(fault) => write!(f, "{}", Common::Fault(fault)),
            Self::Pause { ms } => write!(f, "{}", Common::Pause { ms }),
            Self::Settle => f.write_str("settle"),
            Self::Clear => f.write_str("clear"),
        }
    }
}

impl Agent {
    /// The name of this fault in the table of figures.
    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::Killed => "SIGKILL of the agent",
            Self::KilledWithPlugin => "SIGKILL of the agent and the plugin",
            Self::Terminated => "SIGTERM of the agent",
            Self::Stopped => "SIGSTOP of the agent",
        }
    }
}

#[test]
fn a_plan_for_an_agent_has_the_faults_that_were_asked_for_and_names_only_tasks_that_it_starts() {
    let wanted = Wanted { seed: 7, faults: 300, mode: crate::plan::Mode::Base, clock: false };
    let steps = plan(&wanted);
    assert_eq!(steps, plan(&wanted));
    assert_ne!(steps, plan(&Wanted { seed: 8, ..wanted }));
    assert_eq!(steps.iter().filter(|step| step.is_fault()).count(), 300);
    assert_eq!(steps.last(), Some(&Step::Clear));
    let mut started = 0;
    for step in &steps {
        match step {
            Step::Run { task, .. } => {
                assert_eq!(*task, started);
                started += 1;
            }
            Step::Stop { task } => assert!(*task < started),
            _ => {}
        }
    }
    for how in [Agent::Killed, Agent::KilledWithPlugin, Agent::Terminated, Agent::Stopped] {
        assert!(steps.iter().any(|step| matches!(step, Step::Agent { how: drawn, .. } if *drawn == how)), "{how:?}");
    }
}
