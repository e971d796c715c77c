//! What is measured: a TOML file, or the default.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plan {
    /// The image of all tasks.
    pub image: String,
    /// Tasks of each path in each mode, one at a time.
    pub count: usize,
    /// So many in a row before another path's turn.
    pub block: usize,
    /// One after the other, or with a pause before each.
    pub modes: Vec<Mode>,
    /// That pause, in milliseconds.
    pub gap_ms: u64,
    /// How many at once, beside one: each is a measurement of its own.
    pub concurrency: Vec<usize>,
    /// Tasks of each path at each of these.
    pub concurrent_count: usize,
    /// What becomes of a task. Each sequence is measured for itself.
    pub sequences: Vec<Vec<Step>>,
    /// Idle tasks whose memory is counted; 0 for none.
    pub idle_tasks: usize,
    /// What is compared.
    pub paths: Vec<PathPlan>,
}

/// Back to back or with gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// One after the other.
    BackToBack,
    /// After a pause each, as tasks come to a node.
    Gaps,
}

impl Mode {
    /// As plans and results have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::BackToBack => "back_to_back",
            Self::Gaps => "gaps",
        }
    }
}

/// A step in a task's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// It is started.
    Start,
    /// A process is run in it.
    Exec,
    /// Its use of the machine is asked for once.
    Stats,
    /// It is sent a signal that it does not heed.
    Signal,
    /// It is told to stop.
    Stop,
    /// Nothing is done: the task goes on for long enough that its end is waited for when it comes. A sequence with this
    /// tells only how long after the end that is seen.
    Linger,
    /// It ends by itself.
    Wait,
    /// It is removed.
    Destroy,
}

/// One of the things compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathPlan {
    /// Its name in the results.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// A plugin's program; its name is the path's name where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<PathBuf>,
    /// A plugin's configuration, over what the benchmark sets.
    #[serde(default = "nothing", skip_serializing_if = "is_empty")]
    pub config: serde_json::Value,
    /// Options of its tasks' `config` block, over what the benchmark sets.
    #[serde(default = "nothing", skip_serializing_if = "is_empty")]
    pub task: serde_json::Value,
}

fn nothing() -> serde_json::Value {
    serde_json::json!({})
}

fn is_empty(value: &serde_json::Value) -> bool {
    value.as_object().is_none_or(serde_json::Map::is_empty)
}

/// What a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
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
    /// `runsc run`: gVisor's, with loopback only, as this driver's tasks without a group have it.
    Runsc,
    /// What the kernel takes.
    Floor,
    /// `docker run`.
    Docker,
    /// `podman run`.
    Podman,
}

impl PathPlan {
    /// A path of this kind with nothing special.
    pub fn new(name: &str, kind: Kind) -> Self {
        Self { name: name.to_owned(), kind, program: None, config: nothing(), task: nothing() }
    }
}

impl Default for Plan {
    fn default() -> Self {
        let cold =
            PathPlan { config: serde_json::json!({"shim": {"pool": 0}}), ..PathPlan::new("shim_cold", Kind::Driver) };
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
                PathPlan::new("driver", Kind::Driver),
                PathPlan {
                    config: serde_json::json!({"shim_scope": "node"}),
                    ..PathPlan::new("driver_node_scope", Kind::Driver)
                },
                cold,
                PathPlan::new("containerd", Kind::Containerd),
                PathPlan::new("runc", Kind::Runc),
                PathPlan::new("crun", Kind::Crun),
                PathPlan::new("floor", Kind::Floor),
                PathPlan::new("docker", Kind::Docker),
                PathPlan::new("podman", Kind::Podman),
            ],
        }
    }
}

impl Plan {
    /// How many tasks it comes to, idle ones not counted.
    pub fn tasks(&self) -> u64 {
        let alone = self.count * self.modes.len() * self.sequences.len();
        let together = self.concurrent_count * self.concurrency.len();
        ((alone + together) * self.paths.len()) as u64
    }

    /// A first look, in half a minute.
    #[must_use]
    pub fn quick(self) -> Self {
        Self { count: self.count.min(20), block: 5, concurrency: vec![4], concurrent_count: 16, idle_tasks: 8, ..self }
    }

    /// Reads a plan file.
    ///
    /// # Errors
    /// In words for who wrote it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let plan: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        plan.check()?;
        Ok(plan)
    }

    /// Can it be carried out?
    ///
    /// # Errors
    /// Which part can't.
    pub fn check(&self) -> Result<(), String> {
        for sequence in &self.sequences {
            let good = sequence.first() == Some(&Step::Start)
                && sequence.last() == Some(&Step::Destroy)
                && sequence.iter().filter(|step| matches!(step, Step::Stop | Step::Wait)).count() == 1
                && sequence.iter().filter(|step| matches!(step, Step::Start | Step::Destroy)).count() == 2
                && (!sequence.contains(&Step::Linger) || sequence.contains(&Step::Wait));
            if !good {
                return Err(format!(
                    "sequences: {sequence:?} is not start, anything, one of stop and wait, anything, destroy"
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
                return Err(format!("paths: {:?} is there twice", path.name));
            }
            if path.kind == Kind::Plugin && path.program.is_none() {
                return Err(format!("paths: {:?} is a plugin and has no program", path.name));
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
        Plan::default().check().expect("the default holds");
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
