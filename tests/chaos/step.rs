//! What a run is made of: commands of an agent, faults, and moments at which all must be in order.

use std::fmt;

/// A task of the run, by its number. Two tasks in a row belong to the same allocation.
pub(crate) type TaskNumber = usize;

/// What a task does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// Writes so many lines with a pause before each, and ends with a code.
    Batch {
        /// 0 to 5.
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
    /// gVisor's; only in the mode that has it.
    Runsc,
}

/// A kind of process that faults strike.
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

/// What becomes of the plugin while its agent is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fate {
    /// It lives, and the next agent connects to it again.
    Kept,
    /// It dies, too, at the end of that time.
    Killed,
    /// It lives, and the next agent starts another one.
    Replaced,
}

/// A directory of the driver, on a small disk of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Run,
    State,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// SIGKILL.
    Kill { target: Target, pick: u64 },
    /// SIGSTOP, and SIGCONT after a while.
    Freeze { target: Target, pick: u64, ms: u64 },
    /// SIGKILL while the runtime is in the middle of a call: so long after that is seen to have begun.
    KillDuring { target: Target, call: Call, after_ms: u64 },
    /// SIGTERM of the plugin, whatever it does.
    Terminate,
    /// SIGTERM of the plugin while the runtime is in the middle of a call.
    TerminateDuring { call: Call, after_ms: u64 },
    /// No space is left on a device.
    Full { place: Place, ms: u64 },
    /// The plugin can open only so many more descriptors.
    FewDescriptors { spare: u64, ms: u64 },
    /// The plugin can't start a process or a thread.
    NoProcesses { ms: u64 },
    /// The program is replaced, and the plugin asked to end. Downgrades are the same with a former program.
    Replace { former: bool },
    /// The host is started anew: every process is gone. The run directory is empty where it was in memory.
    Reboot { run_dir_stays: bool },
    /// The host's clock is set. Only where that harms nobody.
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
    /// RecoverTask for a task that is known already.
    Recover {
        task: TaskNumber,
    },
    /// The agent dies, and the next one comes after a while.
    AgentRestart {
        away_ms: u64,
        plugin: Fate,
    },
    /// From here on the runtime's calls of this kind take longer, before and after the runtime's own work.
    Stretch {
        call: Call,
        before_ms: u64,
        after_ms: u64,
    },
    Fault(Fault),
    Pause {
        ms: u64,
    },
    /// All faults are over; what must be true is waited for.
    Settle,
    /// All tasks are stopped or destroyed; nothing of them may be left.
    Clear,
}

impl Fault {
    /// What the table of figures calls it.
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
    /// Is it a fault? The death of an agent counts as one.
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
    /// The runtime's own word for it.
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
