//! Real programs, in images made of Debian's packages, as their upstream images run them: with an entry point that drops
//! privileges, a VOLUME and a stop signal. Each runs under `docker run` first and then as a task of the driver, and does
//! the same work on both sides.
//!
//! The packages are unpacked by `scripts/setup.sh programs`, which takes minutes. So `make test` ignores these tests, and
//! `make test-compat` runs them.

mod databases;
mod image;
mod languages;
mod servers;
mod side;
mod systems;

use libtest_mimic::{Failed, Trial};
use nomad_driver_shim::pb::driver::TaskConfig;
use serde_json::{Value, json};

use crate::docker::Outcome;
use side::Side;

/// A program, and the work that it does in a container.
pub(crate) struct Program {
    pub name: &'static str,
    /// The configuration of the program's image.
    pub config: Value,
    /// The options of `docker run`. `{data}` stands for a directory that outlives the container.
    pub docker: Vec<&'static str>,
    /// The options of the task.
    pub task: Value,
    /// The memory limit, in MiB.
    pub memory: i64,
    /// One container after the other, all with the same data directory.
    pub lives: Vec<Life>,
}

/// What happens to a container from its start to its end.
pub(crate) enum Life {
    /// The program ends by itself, with the exit code 0. Its output must contain these texts, and be the same as under
    /// docker.
    Once(Vec<&'static str>),
    /// Commands are executed in the container, and then it is stopped. The exit code must be this one.
    Service(Vec<Step>, i32),
}

/// A command that is executed in a running container.
pub(crate) enum Step {
    /// The command is repeated until it ends with 0.
    Until(Vec<&'static str>),
    /// The command ends with 0 and writes this text.
    Writes(Vec<&'static str>, &'static str),
    /// The command ends with 0, and its output contains this text.
    Contains(Vec<&'static str>, &'static str),
}

impl Program {
    fn new(name: &'static str, config: Value, lives: Vec<Life>) -> Self {
        Self { name, config, docker: Vec::new(), task: json!({}), memory: 512, lives }
    }

    /// Adds options of `docker run`, separated by blanks, and the options of a task that mean the same.
    fn with(self, docker: &'static str, task: Value) -> Self {
        Self { docker: docker.split_whitespace().collect(), task, ..self }
    }

    fn memory(self, memory: i64) -> Self {
        Self { memory, ..self }
    }
}

/// Returns a step that executes a shell script, which ends with 0 and writes this text.
fn writes(script: &'static str, text: &'static str) -> Step {
    Step::Writes(vec!["sh", "-c", script], text)
}

/// Returns a step that executes a shell script until it ends with 0.
fn until(script: &'static str) -> Step {
    Step::Until(vec!["sh", "-c", script])
}

/// Sets the memory limit that Nomad sends, in MiB.
fn limit_memory(config: &mut TaskConfig, memory: i64) {
    let allocated = config.resources.as_mut().and_then(|resources| resources.allocated_resources.as_mut());
    allocated.and_then(|resources| resources.memory.as_mut()).expect("a memory limit").memory_mb = memory;
}

fn programs() -> impl Iterator<Item = Program> {
    [databases::programs(), servers::programs(), languages::programs(), systems::programs()].into_iter().flatten()
}

/// Returns a trial for each program.
pub(crate) fn trials(runtimes: &'static [&'static str]) -> Vec<Trial> {
    let trial = |(position, program): (usize, Program)| {
        let run = move || {
            let program = programs().nth(position).expect("a program");
            crate::block_on(compare(program, runtimes))
        };
        Trial::test(format!("program: {}", program.name), run).with_ignored_flag(true)
    };
    programs().enumerate().map(trial).collect()
}

/// Runs a program under docker, and then as a task with each runtime.
async fn compare(program: Program, runtimes: &[&'static str]) -> Result<(), Failed> {
    let mut docker = Side::docker(&program).await;
    let under_docker = live(&mut docker, &program).await.map_err(|problem| format!("under docker: {problem}"))?;
    docker.end().await;
    let mut driver = Side::driver(&program).await;
    for runtime in runtimes {
        driver.use_runtime(runtime);
        let as_task = live(&mut driver, &program).await.map_err(|problem| format!("with {runtime}: {problem}"))?;
        if under_docker != as_task {
            let problem = format!("the outputs differ\ndocker: {under_docker:#?}\n{runtime}: {as_task:#?}");
            return Err(problem.into());
        }
    }
    driver.end().await;
    Ok(())
}

/// Plays all lives of a program, and returns the outputs that must be the same on both sides.
async fn live(side: &mut Side, program: &Program) -> Result<Vec<String>, String> {
    let mut outputs = Vec::new();
    for (number, life) in program.lives.iter().enumerate() {
        side.start(program).await?;
        match life {
            Life::Once(texts) => {
                let Outcome { code, stdout, stderr } = side.wait().await;
                let whole = format!("{stdout}{stderr}");
                let missing = texts.iter().find(|text| !whole.contains(**text));
                if code != 0 || missing.is_some() {
                    return Err(format!("exit code {code}, without {missing:?}: {whole}"));
                }
                outputs.push(stdout);
            }
            Life::Service(steps, expected) => {
                for step in steps {
                    if let Err(problem) = side.step(step).await {
                        return Err(format!("life {number}: {problem}\n{:?}", side.output().await));
                    }
                }
                let outcome = side.stop().await;
                if outcome.code != *expected {
                    return Err(format!(
                        "life {number} ended with {} instead of {expected}: {outcome:?}",
                        outcome.code
                    ));
                }
            }
        }
    }
    Ok(outputs)
}
