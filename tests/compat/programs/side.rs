//! The two sides that a program runs on: a real dockerd, and the driver.

use std::{path::PathBuf, time::Duration};

use nomad_driver_shim::ids::random_hex;
use serde_json::json;

use super::{Program, Step, image, limit_memory};
use crate::{
    docker::{Container, Outcome, docker},
    support::{Env, Task, patience, services, with_options},
};

/// How long a program may take to end after its stop signal.
const STOP_SECONDS: u32 = 30;

/// How long a command that is repeated until it succeeds may need.
fn ready_timeout() -> Duration {
    patience() * 2
}

/// One side, with the container that runs there.
pub(super) enum Side {
    Docker { image: String, data: PathBuf, container: Option<Container<'static>> },
    Driver { env: Box<Env>, image: String, runtime: &'static str, data: PathBuf, task: Option<Box<Task>> },
}

impl Side {
    pub(super) async fn docker(program: &Program) -> Self {
        let data = docker().dir().join(format!("data-{}", random_hex(4)));
        std::fs::create_dir_all(&data).unwrap();
        Self::Docker { image: image::in_docker(program).await, data, container: None }
    }

    pub(super) async fn driver(program: &Program) -> Self {
        let data = services().root.join(format!("data-{}", random_hex(4)));
        let env = Env::configured(json!({
            "allow_privileged": true,
            "security": {"allow_new_privileges": true, "allow_paths": [data], "allow_caps": ["ALL"]},
        }));
        let image = image::in_registry(program).await;
        Self::Driver { env: Box::new(env.await), image, runtime: "", data, task: None }
    }

    /// Runs the next containers with this runtime of the driver, with an empty data directory.
    pub(super) fn use_runtime(&mut self, name: &'static str) {
        let Self::Driver { runtime, data, .. } = self else { panic!("docker has its own runtime") };
        *runtime = name;
        if data.exists() {
            std::fs::remove_dir_all(&data).unwrap();
        }
        std::fs::create_dir_all(data).unwrap();
    }

    /// Starts a container of the program.
    pub(super) async fn start(&mut self, program: &Program) -> Result<(), String> {
        match self {
            Self::Docker { image, data, container } => {
                // The container of the earlier life is removed.
                *container = None;
                let data = data.to_str().unwrap();
                let options: Vec<String> = program.docker.iter().map(|option| option.replace("{data}", data)).collect();
                let memory = format!("{}m", program.memory);
                let mut all = vec!["--network", "none", "--memory", &memory, "--memory-swap", &memory];
                all.extend(options.iter().map(String::as_str));
                *container = Some(docker().start(image, &all, &[]).await);
                Ok(())
            }
            Self::Driver { env, image, runtime, data, task } => {
                let options = program.task.to_string().replace("{data}", data.to_str().unwrap());
                let options = with_options(serde_json::from_str(&options).unwrap(), json!({"runtime": runtime}));
                let mut started = env.prepare(with_options(options, json!({"image": image}))).await;
                limit_memory(&mut started.config, program.memory);
                env.try_start(&mut started).await.map_err(|status| status.message().to_owned())?;
                *task = Some(Box::new(started));
                Ok(())
            }
        }
    }

    async fn execute(&self, command: &[&str]) -> Outcome {
        match self {
            Self::Docker { container, .. } => container.as_ref().expect("a container").exec(&[], command).await,
            Self::Driver { env, task, .. } => {
                let task = task.as_ref().expect("a task");
                match env.exec(task, command, 0).await {
                    Ok(answer) => Outcome {
                        code: answer.result.unwrap().exit_code,
                        stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
                        stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
                    },
                    Err(status) => Outcome { code: -1, stdout: String::new(), stderr: status.message().to_owned() },
                }
            }
        }
    }

    /// Executes one step's command.
    ///
    /// # Errors
    /// When the command does not do what the step expects.
    pub(super) async fn step(&self, step: &Step) -> Result<(), String> {
        let (command, outcome) = match step {
            Step::Until(command) => {
                let deadline = tokio::time::Instant::now() + ready_timeout();
                loop {
                    let outcome = self.execute(command).await;
                    if outcome.code == 0 {
                        return Ok(());
                    }
                    if tokio::time::Instant::now() > deadline {
                        return Err(format!("{command:?} does not succeed: {outcome:?}"));
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
            Step::Writes(command, _) | Step::Contains(command, _) => (command, self.execute(command).await),
        };
        let is_right = match step {
            Step::Writes(_, text) => outcome.stdout == *text,
            Step::Contains(_, text) => outcome.stdout.contains(text),
            Step::Until(_) => true,
        };
        if outcome.code == 0 && is_right { Ok(()) } else { Err(format!("{command:?}: {outcome:?}")) }
    }

    /// Returns what the container has written so far.
    pub(super) async fn output(&self) -> (String, String) {
        match self {
            Self::Docker { container, .. } => {
                let logs = container.as_ref().expect("a container").logs().await;
                (logs.stdout, logs.stderr)
            }
            Self::Driver { task, .. } => {
                let task = task.as_ref().expect("a task");
                (task.stdout.text(), task.stderr.text())
            }
        }
    }

    /// Stops the container by its image's stop signal. Returns its exit code and output.
    pub(super) async fn stop(&mut self) -> Outcome {
        match self {
            Self::Docker { container, .. } => container.as_ref().expect("a container").stop(STOP_SECONDS).await,
            Self::Driver { env, task, .. } => {
                let stopped = task.as_ref().expect("a task");
                let timeout = Duration::from_secs(STOP_SECONDS.into());
                env.stop(stopped, timeout, "").await.unwrap();
                self.wait().await
            }
        }
    }

    /// Waits for the container's end. Returns its exit code and output.
    pub(super) async fn wait(&mut self) -> Outcome {
        match self {
            Self::Docker { container, .. } => container.as_ref().expect("a container").wait().await,
            Self::Driver { env, task, .. } => {
                let (code, stdout, stderr) = env.finish_task(*task.take().expect("a task")).await;
                Outcome { code, stdout, stderr }
            }
        }
    }

    /// Removes what is left of this side, and looks for leaks of the driver.
    pub(super) async fn end(self) {
        match self {
            Self::Docker { container, data, .. } => {
                drop(container);
                std::fs::remove_dir_all(data).unwrap();
            }
            Self::Driver { env, data, .. } => {
                env.finish().await;
                std::fs::remove_dir_all(data).unwrap();
            }
        }
    }
}
