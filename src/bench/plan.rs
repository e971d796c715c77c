//! The plan of a run, which says what is measured: a TOML file, or the default plan.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The plan of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plan {
    /// The image of all tasks.
    pub image: String,
    /// How many tasks of each subject are run in each mode, one at a time.
    pub count: usize,
    /// How many of these are run in a row before the next subject's turn.
    pub block: usize,
    /// The modes in which the tasks are run.
    pub modes: Vec<Mode>,
    /// The pause before each task in the mode `gaps`, in milliseconds.
    pub gap_ms: u64,
    /// The numbers of tasks that run at once, besides one at a time. Each is a measurement of its own.
    pub concurrency: Vec<usize>,
    /// How many tasks of each subject are run at each of these numbers.
    pub concurrent_count: usize,
    /// The sequences of steps that tasks go through. Each sequence is measured separately.
    pub sequences: Vec<Vec<Step>>,
    /// How many idle tasks are started to count the memory that they need; 0 to count no memory.
    pub idle_tasks: usize,
    /// The subjects that are compared.
    pub paths: Vec<SubjectPlan>,
}

/// The pauses between the tasks of a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Each task starts right after the one before.
    BackToBack,
    /// There is a pause before each task, as is usual on a node.
    Gaps,
}

impl Mode {
    /// Returns the mode's name in plans and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::BackToBack => "back_to_back",
            Self::Gaps => "gaps",
        }
    }
}

/// A step that a task goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The task is started.
    Start,
    /// A process is run in the task.
    Exec,
    /// The task's resource usage is read once.
    Stats,
    /// The task is sent a signal that its program ignores.
    Signal,
    /// The task is stopped by SIGTERM.
    Stop,
    /// The benchmark does nothing. The task runs long enough for the subject to wait for its end before the end comes.
    /// A sequence with this step measures only the time from the task's end until the end is reported.
    Linger,
    /// The task ends by itself.
    Wait,
    /// The task is removed.
    Destroy,
}

/// The description of one subject.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubjectPlan {
    /// The subject's name in the results.
    pub name: String,
    /// The kind of the subject.
    pub kind: SubjectKind,
    /// The program of a plugin. The kind `plugin` requires it; other kinds ignore it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<PathBuf>,
    /// A plugin's configuration. For this driver, it is merged into the configuration that the benchmark makes; another
    /// plugin gets it unchanged.
    #[serde(default = "nothing", skip_serializing_if = "is_empty")]
    pub config: serde_json::Value,
    /// Options of the `config` block of a plugin's tasks, merged into those that the benchmark sets.
    #[serde(default = "nothing", skip_serializing_if = "is_empty")]
    pub task: serde_json::Value,
}

/// Returns an empty JSON object.
fn nothing() -> serde_json::Value {
    serde_json::json!({})
}

/// Returns whether a value is no object or an empty one.
fn is_empty(value: &serde_json::Value) -> bool {
    value.as_object().is_none_or(serde_json::Map::is_empty)
}

/// The kinds of subjects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SubjectKind {
    /// This driver.
    Driver,
    /// Another Nomad driver plugin.
    Plugin,
    /// containerd's containers and tasks services.
    Containerd,
    /// `runc run`.
    Runc,
    /// `crun run`.
    Crun,
    /// `runsc run` (gVisor), with loopback only, as this driver's tasks without a group's network have it.
    Runsc,
    /// Raw system calls: the time that the kernel needs at least.
    Floor,
    /// `docker run`.
    Docker,
    /// `podman run`.
    Podman,
}

impl SubjectPlan {
    /// Returns a subject of this kind with default options.
    pub fn new(name: &str, kind: SubjectKind) -> Self {
        Self { name: name.to_owned(), kind, program: None, config: nothing(), task: nothing() }
    }
}

impl Default for Plan {
    fn default() -> Self {
        let cold = SubjectPlan {
            config: serde_json::json!({"shim": {"pool": 0}}),
            ..SubjectPlan::new("shim_cold", SubjectKind::Driver)
        };
        Self {
            image: String::new(),
            count: 200,
            block: 10,
            modes: vec![Mode::BackToBack, Mode::Gaps],
            gap_ms: 100,
            concurrency: vec![4, 16],
            concurrent_count: 128,
            sequences: vec![
                vec![Step::Start, Step::Wait, Step::Destroy],
                vec![Step::Start, Step::Stop, Step::Destroy],
                vec![Step::Start, Step::Linger, Step::Wait, Step::Destroy],
            ],
            idle_tasks: 100,
            paths: vec![
                SubjectPlan::new("driver", SubjectKind::Driver),
                SubjectPlan {
                    config: serde_json::json!({"shim_scope": "node"}),
                    ..SubjectPlan::new("driver_node_scope", SubjectKind::Driver)
                },
                cold,
                SubjectPlan::new("containerd", SubjectKind::Containerd),
                SubjectPlan::new("runc", SubjectKind::Runc),
                SubjectPlan::new("crun", SubjectKind::Crun),
                SubjectPlan::new("floor", SubjectKind::Floor),
                SubjectPlan::new("docker", SubjectKind::Docker),
                SubjectPlan::new("podman", SubjectKind::Podman),
            ],
        }
    }
}

impl Plan {
    /// Returns how many tasks the plan runs, without idle tasks.
    pub fn tasks(&self) -> u64 {
        let alone = self.count * self.modes.len() * self.sequences.len();
        let together = self.concurrent_count * self.concurrency.len();
        ((alone + together) * self.paths.len()) as u64
    }

    /// Reduces the plan to a run of half a minute, for a first impression.
    #[must_use]
    pub fn quick(self) -> Self {
        Self { count: self.count.min(20), block: 5, concurrency: vec![4], concurrent_count: 16, idle_tasks: 8, ..self }
    }

    /// Parses a plan file.
    ///
    /// # Errors
    /// Returns a description of what is wrong with the plan.
    pub fn parse(text: &str) -> Result<Self, String> {
        let plan: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        plan.check()?;
        Ok(plan)
    }

    /// Checks whether the plan can be carried out.
    ///
    /// # Errors
    /// Returns a description of the part that can't be carried out.
    pub fn check(&self) -> Result<(), String> {
        for sequence in &self.sequences {
            let good = sequence.first() == Some(&Step::Start)
                && sequence.last() == Some(&Step::Destroy)
                && sequence.iter().filter(|step| matches!(step, Step::Stop | Step::Wait)).count() == 1
                && sequence.iter().filter(|step| matches!(step, Step::Start | Step::Destroy)).count() == 2
                && (!sequence.contains(&Step::Linger) || sequence.contains(&Step::Wait));
            if !good {
                return Err(format!(
                    "sequences: {sequence:?} must begin with start, have exactly one of stop and wait, and end with \
                     destroy; linger needs wait"
                ));
            }
        }
        for (name, number) in
            [("count", self.count), ("block", self.block), ("concurrent_count", self.concurrent_count)]
        {
            if number == 0 {
                return Err(format!("{name} = 0: nothing would be measured"));
            }
        }
        if self.modes.is_empty() || self.sequences.is_empty() || self.paths.is_empty() {
            return Err("modes, sequences and paths must not be empty".to_owned());
        }
        let mut names = std::collections::BTreeSet::new();
        for path in &self.paths {
            if !names.insert(&path.name) {
                return Err(format!("paths: the name {:?} is used twice", path.name));
            }
            if path.kind == SubjectKind::Plugin && path.program.is_none() {
                return Err(format!("paths: {:?} is a plugin, but has no program", path.name));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_read_and_checked() {
        Plan::default().check().expect("the default plan is valid");
        let plan = Plan::parse(
            "count = 5\nconcurrency = []\nsequences = [['start', 'exec', 'stop', 'destroy']]\n\
             [[paths]]\nname = 'a'\nkind = 'driver'\n[paths.config.shim]\npool = 3\n",
        )
        .expect("a plan");
        assert_eq!((plan.count, plan.gap_ms, plan.paths.len()), (5, 100, 1));
        assert_eq!(plan.paths[0].config["shim"]["pool"], 3);
        assert_eq!(plan.paths[0].task, serde_json::json!({}));
        for (text, part) in [
            ("count = 0", "nothing would be measured"),
            ("counts = 1", "counts"),
            ("sequences = [['start', 'destroy']]", "one of stop and wait"),
            ("[[paths]]\nname = 'a'\nkind = 'plugin'", "no program"),
            ("[[paths]]\nname = 'a'\nkind = 'runc'\n[[paths]]\nname = 'a'\nkind = 'crun'", "twice"),
        ] {
            let error = Plan::parse(text).expect_err("refused");
            assert!(error.contains(part), "{part:?} in {error}");
        }
    }
}
