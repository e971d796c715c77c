//! The steps of a run: commands of an agent, faults, and moments at which all must be in order.

use std::fmt;

/// The number of a task in the run. Each pair of tasks (0 and 1, 2 and 3, ...) belongs to the same allocation.
pub(crate) type TaskNumber = usize;

/// What a task does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// Writes `lines` lines with a pause before each, and ends with `code`.
    Batch {
        /// The exit code, from 0 to 5.
        code: u8,
        lines: u32,
        pause_ms: u32,
    },
    /// Writes a line ten times a second until it is asked to stop.
    Service,
}

/// An OCI runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OciRuntime {
    Crun,
    Runc,
    /// gVisor's runtime, only in the mode for it.
    Runsc,
}

/// A kind of process that a fault may strike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    Plugin,
    Shim,
    Containerd,
    Runtime,
    Init,
    LogWriter,
    Keeper,
}

/// A call of an OCI runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Call {
    Create,
    Start,
    Kill,
    Delete,
    Exec,
}

/// What happens to the plugin while its agent is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fate {
    /// The plugin lives, and the next agent connects to it again.
    Kept,
    /// The plugin dies as well, at the end of that time.
    Killed,
    /// The plugin lives, and the next agent starts another one.
    Replaced,
}

/// A directory of the driver that is on a small disk of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Run,
    State,
}

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// SIGKILL of a process.
    Kill { target: Target, pick: u64 },
    /// SIGSTOP of a process, and SIGCONT after a while.
    Freeze { target: Target, pick: u64, ms: u64 },
    /// SIGKILL while the runtime is in the middle of a call, `after_ms` after the call was seen to have begun.
    KillDuring { target: Target, call: Call, after_ms: u64 },
    /// SIGTERM of the plugin at any moment.
    Terminate,
    /// SIGTERM of the plugin while the runtime is in the middle of a call.
    TerminateDuring { call: Call, after_ms: u64 },
    /// No space is left on the disk of a directory.
    Full { place: Place, ms: u64 },
    /// The plugin can open only `spare` more descriptors.
    FewDescriptors { spare: u64, ms: u64 },
    /// The plugin can't start any process or thread.
    NoProcesses { ms: u64 },
    /// The program is replaced, and the plugin is asked to end. A downgrade does the same with an earlier version of
    /// the program.
    Replace { former: bool },
    /// The host is rebooted: every process is gone. The run directory is empty afterwards if it was in memory.
    Reboot { run_dir_stays: bool },
    /// The host's clock is set. This happens only where it can do no harm.
    ClockJump { seconds: i64 },
}

/// One step of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Start {
        task: TaskNumber,
        work: Work,
        runtime: OciRuntime,
    },
    Stop {
        task: TaskNumber,
        timeout_ms: u64,
    },
    Destroy {
        task: TaskNumber,
        force: bool,
    },
    Signal {
        task: TaskNumber,
    },
    Exec {
        task: TaskNumber,
        code: u8,
    },
    Stats {
        task: TaskNumber,
    },
    Inspect {
        task: TaskNumber,
    },
    /// RecoverTask for a task that the plugin knows already.
    Recover {
        task: TaskNumber,
    },
    /// The agent dies, and the next agent starts after a while.
    AgentRestart {
        away_ms: u64,
        plugin: Fate,
    },
    /// From this step on, the runtime's calls of this kind take longer, before and after the runtime's own work.
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
    /// Stops or destroys all tasks. Nothing of them may be left.
    Clear,
}

impl Fault {
    /// The name of this kind of fault in the table of figures.
    pub(crate) fn kind(&self) -> String {
        match self {
            Self::Kill { target, .. } => format!("SIGKILL of {target}"),
            Self::Freeze { target, .. } => format!("SIGSTOP of {target}"),
            Self::KillDuring { target, call, .. } => format!("SIGKILL of {target} during {call}"),
            Self::Terminate => "SIGTERM of the plugin".to_owned(),
            Self::TerminateDuring { call, .. } => format!("SIGTERM of the plugin during {call}"),
            Self::Full { place, .. } => format!("full {place} directory"),
            Self::FewDescriptors { .. } => "few descriptors".to_owned(),
            Self::NoProcesses { .. } => "no further processes".to_owned(),
            Self::Replace { former: false } => "upgrade in place".to_owned(),
            Self::Replace { former: true } => "downgrade in place".to_owned(),
            Self::Reboot { run_dir_stays: false } => "reboot".to_owned(),
            Self::Reboot { run_dir_stays: true } => "reboot, run directory kept".to_owned(),
            Self::ClockJump { .. } => "clock jump".to_owned(),
        }
    }
}

impl Step {
    /// Is this step a fault? The death of an agent counts as one.
    pub(crate) fn is_fault(&self) -> bool {
        matches!(self, Self::Fault(_) | Self::AgentRestart { .. })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plugin => "the plugin",
            Self::Shim => "a shim",
            Self::Containerd => "containerd",
            Self::Runtime => "an OCI runtime",
            Self::Init => "a container's init",
            Self::LogWriter => "the log writer",
            Self::Keeper => "the log writer's keeper",
        })
    }
}

impl Call {
    /// The runtime's own name for the call.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Kill => "kill",
            Self::Delete => "delete",
            Self::Exec => "exec",
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.word())
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Run { "run" } else { "state" })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind())?;
        match self {
            Self::Kill { pick, .. } => write!(f, " (number {pick})"),
            Self::Freeze { pick, ms, .. } => write!(f, " (number {pick}) for {ms} ms"),
            Self::KillDuring { after_ms, .. } | Self::TerminateDuring { after_ms, .. } => {
                write!(f, ", {after_ms} ms after its begin")
            }
            Self::Full { ms, .. } | Self::NoProcesses { ms } => write!(f, " for {ms} ms"),
            Self::FewDescriptors { spare, ms } => write!(f, ": {spare} more, for {ms} ms"),
            Self::ClockJump { seconds } => write!(f, " by {seconds} s"),
            Self::Terminate | Self::Replace { .. } | Self::Reboot { .. } => Ok(()),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start { task, work: Work::Service, runtime } => write!(f, "start service {task} with {runtime:?}"),
            Self::Start { task, work: Work::Batch { code, lines, pause_ms }, runtime } => {
                write!(f, "start batch {task} with {runtime:?}: {lines} lines, {pause_ms} ms each, code {code}")
            }
            Self::Stop { task, timeout_ms } => write!(f, "stop {task} within {timeout_ms} ms"),
            Self::Destroy { task, force: true } => write!(f, "destroy {task} by force"),
            Self::Destroy { task, force: false } => write!(f, "destroy {task} if it has ended"),
            Self::Signal { task } => write!(f, "send SIGUSR1 to {task}"),
            Self::Exec { task, code } => write!(f, "run a command in {task} that ends with {code}"),
            Self::Stats { task } => write!(f, "read the statistics of {task}"),
            Self::Inspect { task } => write!(f, "inspect {task}"),
            Self::Recover { task } => write!(f, "recover {task} once more"),
            Self::AgentRestart { away_ms, plugin } => {
                write!(f, "the agent dies and is away for {away_ms} ms; its plugin is {plugin:?}")
            }
            Self::Stretch { call, before_ms, after_ms } => {
                write!(f, "stretch {call} by {before_ms} ms before and {after_ms} ms after")
            }
            Self::Fault(fault) => write!(f, "FAULT {fault}"),
            Self::Pause { ms } => write!(f, "pause for {ms} ms"),
            Self::Settle => f.write_str("settle"),
            Self::Clear => f.write_str("clear"),
        }
    }
}
