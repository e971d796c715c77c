//! The same faults with a real Nomad agent in the place of the stand-in: with its state, its retries and its own view
//! of what has happened to a task. Without a program `nomad`, these tests do nothing but print that they were not run.

mod agent;
mod api;
mod events;
mod job;
mod model;
mod plan;
mod record;
mod scenarios;
mod world;

use std::path::{Path, PathBuf};

use crate::{
    arguments::Arguments,
    failed,
    judged::judged,
    plan::{Mode, Wanted},
    report::{Figures, table},
    world::{Outcome, Setting},
};
use scenarios::Failure;

/// The default number of faults. With Nomad, each fault takes some seconds.
const FAULTS: usize = 100;
/// The number of faults in the bounded part.
const FEW: usize = 8;

/// The modes that a run with a real agent goes through by default. The other modes need more of the host.
const MODES: [Mode; 1] = [Mode::Base];

/// Plays one run. Returns the arguments that play it again, and its figures.
async fn run(
    binary: &Path,
    arguments: &Arguments,
    mode: Mode,
    faults: usize,
    replays: usize,
) -> Result<(String, Figures), String> {
    let Arguments { seed, clock, plant, .. } = arguments;
    let steps = plan::plan(&Wanted { seed: *seed, faults, mode, clock: *clock });
    let planted = plant.as_ref().map_or_else(String::new, |name| format!(" --plant {name}"));
    let words = format!("--agent nomad --seed {seed} --faults {faults} --mode {}{planted}", mode.name());
    let setting = Setting { mode, plant: plant.as_deref(), ignored: &arguments.ignored };
    let play = async |steps: &[plan::Step]| world::play(binary.to_owned(), setting, steps).await;
    let figures = judged(&words, &steps, arguments.keep.as_deref(), replays, play).await?;
    Ok((words, figures))
}

/// What `make chaos ARGS="--agent nomad"` does: a run with random faults, and then the scenarios.
pub(crate) async fn long_form(arguments: &Arguments) {
    let binary = agent::binary().unwrap_or_else(|| {
        panic!("no Nomad agent was found: NOMAD_BIN names no program that can be run, and `nomad` is not in PATH")
    });
    let modes = if arguments.modes.is_empty() { MODES.to_vec() } else { arguments.modes.clone() };
    let faults = arguments.faults.unwrap_or(FAULTS).div_ceil(modes.len());
    let mut runs = Vec::new();
    for mode in modes {
        assert!(!matches!(mode, Mode::Bridge | Mode::Gvisor), "{} is not played with a real agent", mode.name());
        match run(&binary, arguments, mode, faults, arguments.replays).await {
            Ok(run) => runs.push(run),
            Err(text) if arguments.plant.is_some() => {
                eprintln!("{text}");
                return eprintln!("the planted defect was found");
            }
            Err(text) => failed(&text),
        }
    }
    eprintln!("{}", table(&runs));
    assert!(arguments.plant.is_none(), "the planted defect was not found");
    if arguments.keep.is_none() {
        told(scenarios::play(binary, &Failure::ALL).await);
    }
}

/// Prints the outcome. If there was a violation, fails with the history.
fn told(outcome: Outcome) {
    let Outcome { violations, figures, history, warnings } = outcome;
    let shown = [("wrong", &violations), ("the plugins' last warnings", &warnings), ("history", &history)];
    if !violations.is_empty() {
        failed(&shown.map(|(what, lines)| format!("{what}:\n  {}\n", lines.join("\n  "))).concat());
    }
    let results = history.iter().filter(|line| line.contains(" failed starts of "));
    results.for_each(|line| eprintln!("{line}"));
    eprintln!("{}", table(&[("passing failures, with a real agent".to_owned(), figures)]));
}

/// The path of Nomad's program. If it was not found, prints that `what` is not run.
fn binary_or_say(what: &str) -> Option<PathBuf> {
    let binary = agent::binary();
    if binary.is_none() {
        eprintln!("NOT RUN: {what} needs a Nomad agent, and neither NOMAD_BIN nor PATH has one");
    }
    binary
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_of_a_real_agent_survive_each_passing_failure() {
    if let Some(binary) = binary_or_say("services_of_a_real_agent_survive_each_passing_failure") {
        told(scenarios::play(binary, &Failure::QUICK).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_of_a_real_agent_live_through_faults() {
    if let Some(binary) = binary_or_say("tasks_of_a_real_agent_live_through_faults") {
        let arguments = Arguments::parse("--agent nomad", 20).unwrap();
        match run(&binary, &arguments, Mode::Base, FEW, 0).await {
            Ok(run) => eprintln!("{}", table(&[run])),
            Err(text) => failed(&text),
        }
    }
}
