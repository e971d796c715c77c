//! Random commands and faults against the real plugin, checked by a model of what must be true whatever happens: no
//! task is lost, doubled or left over, no exit code is wrong, no line of a log is lost or doubled. docs/chaos.md says
//! how to use it.
//!
//! `cargo test` plays a bounded part, `make chaos` the long form (`the_long_form` below).
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::too_many_arguments,
    clippy::zombie_processes,
    clippy::large_futures,
    missing_docs,
    reason = "tests; what they start ends with them"
)]

#[path = "../support/mod.rs"]
#[allow(dead_code, unused_imports, reason = "shared with the behaviour tests")]
mod support;

mod agent;
mod arguments;
mod command;
mod disk;
mod faults;
mod ground;
mod history;
mod judged;
mod model;
mod network;
mod node;
mod nomad;
mod observe;
mod plan;
mod random;
mod report;
mod shrink;
mod soak;
mod step;
mod task;
mod violations;
mod world;
mod wrapper;

use std::time::SystemTime;

use arguments::{AgentKind, Arguments};
use judged::judged;
use plan::{Mode, Wanted, aimed, plan};
use report::{Figures, table};
use step::Step;
use world::Setting;

/// Environment variable with the arguments of the long form.
const ARGUMENTS: &str = "NOMAD_DRIVER_SHIM_CHAOS";

/// The default number of faults.
const FAULTS: usize = 2000;

/// What a list of steps is made from. `words` gives the arguments that make it again.
struct Run {
    wanted: Wanted,
    is_aimed: bool,
    plant: Option<String>,
    ignored: Vec<String>,
}

impl Run {
    fn steps(&self) -> Vec<Step> {
        if self.is_aimed { aimed(&self.wanted) } else { plan(&self.wanted) }
    }

    fn setting(&self) -> Setting<'_> {
        Setting { mode: self.wanted.mode, plant: self.plant.as_deref(), ignored: &self.ignored }
    }

    fn words(&self) -> String {
        let Wanted { seed, faults, mode, .. } = self.wanted;
        let kind = if self.is_aimed { "aimed" } else { "faults" };
        let plant = self.plant.as_ref().map_or_else(String::new, |name| format!(" --plant {name}"));
        format!("--seed {seed} --{kind} {faults} --mode {}{plant}", mode.name())
    }

    async fn play(&self, keep: Option<&[usize]>, replays: usize) -> Result<Figures, String> {
        let play = async |steps: &[Step]| world::play(self.setting(), steps).await;
        judged(&self.words(), &self.steps(), keep, replays, play).await
    }
}

/// The modes that are possible on this machine.
fn available() -> Vec<Mode> {
    let has_runsc = nomad_driver_shim::task::which(std::path::Path::new("runsc")).is_some();
    Mode::ALL.into_iter().filter(|mode| *mode != Mode::Gvisor || has_runsc).collect()
}

/// The bounded part of a mode. The seed is fixed, so a new failure is caused by a change of the code and not by chance.
async fn bounded(mode: Mode, faults: usize) {
    let wanted = Wanted { seed: 20, faults, mode, clock: false };
    let run = Run { wanted, is_aimed: false, plant: None, ignored: Vec::new() };
    match run.play(None, 6).await {
        Ok(figures) => eprintln!("{}", table(&[(run.words(), figures)])),
        Err(text) => failed(&text),
    }
}

/// Prints the history, which is long, apart from the short message of the panic.
fn failed(text: &str) -> ! {
    eprintln!("{text}");
    panic!("a run has failed; its history stands above");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_live_through_faults() {
    bounded(Mode::Base, 24).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_whose_logs_are_ours_live_through_faults() {
    bounded(Mode::OwnLogs, 24).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_that_share_a_shim_live_through_faults() {
    bounded(Mode::NodeScope, 24).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "as long as it is told to take; make chaos"]
async fn the_long_form() {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let text = std::env::var(ARGUMENTS).unwrap_or_default();
    let arguments = Arguments::parse(&text, since.as_secs()).unwrap_or_else(|problem| panic!("{ARGUMENTS}: {problem}"));
    eprintln!("seed {}", arguments.seed);
    if arguments.agent == AgentKind::Nomad {
        return nomad::long_form(&arguments).await;
    }
    if let Some(tasks) = arguments.soak {
        return soak::soak(tasks).await;
    }
    let asked = if arguments.modes.is_empty() { Mode::ALL.to_vec() } else { arguments.modes.clone() };
    let available = available();
    let (modes, missing): (Vec<Mode>, Vec<Mode>) = asked.into_iter().partition(|mode| available.contains(mode));
    let is_asked_for = |mode: &&Mode| arguments.modes.contains(mode);
    if let Some(mode) = missing.iter().find(is_asked_for) {
        panic!("{} is not available on this machine: scripts/setup.sh gvisor builds runsc", mode.name());
    }
    missing.iter().for_each(|mode| eprintln!("{} is not available on this machine; NOT RUN", mode.name()));
    let count = arguments.aimed.or(arguments.faults).unwrap_or(FAULTS).div_ceil(modes.len().max(1));
    let mut runs = Vec::new();
    for mode in modes {
        let wanted = Wanted { seed: arguments.seed, faults: count, mode, clock: arguments.clock };
        let (plant, ignored) = (arguments.plant.clone(), arguments.ignored.clone());
        let run = Run { wanted, is_aimed: arguments.aimed.is_some(), plant, ignored };
        match run.play(arguments.keep.as_deref(), arguments.replays).await {
            Ok(figures) => runs.push((run.words(), figures)),
            Err(text) if arguments.plant.is_some() => {
                eprintln!("{text}");
                return eprintln!("the planted defect was found");
            }
            Err(text) => failed(&format!("{}\n{text}", table(&runs))),
        }
    }
    eprintln!("{}", table(&runs));
    assert!(arguments.plant.is_none(), "the planted defect was not found");
}
