//! The subjects of the benchmark: the ways to run a task that are compared. Each starts, waits for, stops and removes a
//! task in its own way, behind the same methods.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use parking_lot::{Mutex, MutexGuard};
use serde_json::{Value, json};
use tokio::process::Child;

use super::{
    BenchError,
    floor::{ContainerProcess, Floor},
    job::Job,
    template::Template,
};
use crate::{
    containerd::{Client, LeaseId},
    host::{Plugin, PluginCommand, call_error, encode},
    ids::ChainId,
    overlay,
    pb::{
        driver::{
            DestroyTaskRequest, ExecTaskRequest, InspectTaskRequest, SignalTaskRequest, StartTaskRequest,
            StopTaskRequest, TaskConfigSchemaRequest, TaskStatsRequest, WaitTaskRequest,
        },
        hclspec::Spec,
    },
};

/// The time within which a task must stop before it is killed. This is also the limit of an exec.
const STOP_TIMEOUT: prost_types::Duration = prost_types::Duration { seconds: 30, nanos: 0 };

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// One of the ways to run a task that are compared, ready to run tasks.
#[derive(Debug)]
pub(crate) struct Subject {
    pub(super) name: String,
    pub(super) backend: Backend,
}

/// How a subject runs tasks.
#[derive(Debug)]
pub(crate) enum Backend {
    /// By calls to a Nomad driver plugin.
    Plugin(Box<PluginBackend>),
    /// By calls to containerd's own services.
    Containerd { client: Client, lease: LeaseId, template: Template },
    /// By the command line of an OCI runtime, in the foreground.
    Runtime { binary: PathBuf, flags: Vec<String>, dir: PathBuf, template: Template, running: RunningTasks<Child> },
    /// By the command line of docker or podman, in the foreground.
    Engine { binary: PathBuf, image: String, running: RunningTasks<Child> },
    /// By raw system calls.
    Floor { dir: PathBuf, template: Template, floor: Box<Floor>, running: RunningTasks<ContainerProcess> },
}

/// The processes of running tasks, by the task's id.
#[derive(Debug)]
pub(crate) struct RunningTasks<T>(Mutex<HashMap<String, T>>);

impl<T> Default for RunningTasks<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> RunningTasks<T> {
    fn put(&self, job: &Job, process: T) {
        self.map().insert(job.id.clone(), process);
    }

    fn take(&self, job: &Job) -> Result<T, Failure> {
        Ok(self.map().remove(&job.id).ok_or("the task does not run")?)
    }

    fn get(&self, job: &Job) -> Result<T, Failure>
    where
        T: Clone,
    {
        Ok(self.map().get(&job.id).cloned().ok_or("the task does not run")?)
    }

    fn map(&self) -> MutexGuard<'_, HashMap<String, T>> {
        self.0.lock()
    }
}

/// A plugin, and the options of the tasks that it runs.
#[derive(Debug)]
pub(crate) struct PluginBackend {
    pub(super) plugin: Plugin,
    pub(super) image: String,
    pub(super) task: Value,
    pub(super) schema: Option<Spec>,
}

/// Returns `base` with `over` merged into it: values of `over` replace values of `base`, and objects are merged.
pub(super) fn merged(base: Value, over: &Value) -> Value {
    match (base, over) {
        (Value::Object(mut base), Value::Object(over)) => {
            for (key, value) in over {
                let old = base.remove(key).unwrap_or_default();
                base.insert(key.clone(), merged(old, value));
            }
            base.into()
        }
        (_, over) => over.clone(),
    }
}

impl PluginBackend {
    /// Starts a plugin as an agent does, configures it, and asks for its schema of task options.
    pub(super) async fn launch(
        command: &PluginCommand,
        config: &Value,
        image: &str,
        task: Value,
    ) -> Result<Self, BenchError> {
        let plugin = Plugin::launch(command).await?;
        if let Err(error) = plugin.configure(config).await {
            plugin.shut_down().await;
            return Err(error.into());
        }
        let schema = plugin.driver().task_config_schema(TaskConfigSchemaRequest {}).await;
        let schema = schema.map_err(call_error("TaskConfigSchema"))?.into_inner().spec;
        Ok(Self { plugin, image: image.to_owned(), task, schema })
    }

    fn task_id(job: &Job) -> String {
        job.dirs.config("1", Vec::new()).id
    }

    async fn start(&self, job: &Job) -> Result<(), Failure> {
        let command = job.command();
        let config = json!({ "image": self.image, "command": command[0], "args": command[1..] });
        let config = merged(config, &self.task);
        let task = job.dirs.config("1", encode(self.schema.as_ref(), &config)?);
        self.plugin
            .driver()
            .start_task(StartTaskRequest { task: Some(task) })
            .await
            .map_err(call_error("StartTask"))?;
        Ok(())
    }
}

impl Subject {
    /// Starts the task. Returns when the subject reports to its caller that the task runs. A foreground command never
    /// reports this, so for such a subject the function returns when the command was started.
    pub(super) async fn start(&self, job: &Job) -> Result<(), Failure> {
        match &self.backend {
            Backend::Plugin(backend) => backend.start(job).await,
            Backend::Containerd { client, lease, template } => {
                let parent: Option<ChainId> = serde_json::from_value(json!(template.chain_id)).ok();
                let mounts = client.prepare_snapshot(lease, &job.id, parent.as_ref(), HashMap::new()).await?;
                let bundle = job.alloc.dir.join("bundle");
                write_network_files(&bundle)?;
                let spec = template.fill(job, &bundle, &job.id, "rootfs");
                client.create_container(&job.id, serde_json::to_vec(&spec)?).await?;
                let path = |path: &Path| path.to_string_lossy().into_owned();
                client.create_task(&job.id, mounts, &path(&job.dirs.stdout), &path(&job.dirs.stderr)).await?;
                client.start_task(&job.id).await?;
                Ok(())
            }
            Backend::Runtime { binary, flags, dir, template, running } => {
                let bundle = dir.join(&job.id);
                make_bundle(&bundle, template)?;
                fs::write(bundle.join("config.json"), template.fill(job, &bundle, &job.id, "rootfs").to_string())?;
                let mut command = runtime(binary, dir);
                command.args(flags).args(["run", "--bundle"]).arg(&bundle).arg(&job.id);
                let child = spawn(command, job)?;
                running.put(job, child);
                Ok(())
            }
            Backend::Engine { binary, image, running } => {
                let mut command = tokio::process::Command::new(binary);
                let local = format!("{}:/local", job.alloc.dir.join("task/local").display());
                let memory = ["--memory", "64m", "--network", "none", "--read-only=false"];
                command
                    .args(["run", "--rm", "--name", &job.id, "-v", &local])
                    .args(memory)
                    .arg(image)
                    .args(job.command());
                let child = spawn(command, job)?;
                running.put(job, child);
                Ok(())
            }
            Backend::Floor { dir, template, floor, running } => {
                let bundle = dir.join(&job.id);
                let process = tokio::task::block_in_place(|| -> Result<ContainerProcess, Failure> {
                    make_bundle(&bundle, template)?;
                    let root = bundle.join("rootfs");
                    let spec = template.fill(job, &bundle, &job.id, &root.to_string_lossy());
                    floor.spawn(&spec, &job.dirs.stdout, &job.dirs.stderr)
                })?;
                running.put(job, process);
                Ok(())
            }
        }
    }

    /// Waits for the task's end and returns whether its exit code was 0.
    pub(super) async fn wait(&self, job: &Job) -> Result<bool, Failure> {
        match &self.backend {
            Backend::Plugin(backend) => {
                let request = WaitTaskRequest { task_id: PluginBackend::task_id(job) };
                let answer =
                    backend.plugin.driver().wait_task(request).await.map_err(call_error("WaitTask"))?.into_inner();
                Ok(answer.result.is_some_and(|result| result.exit_code == 0))
            }
            Backend::Containerd { client, .. } => Ok(client.wait_task(&job.id).await? == 0),
            Backend::Runtime { running, .. } | Backend::Engine { running, .. } => {
                Ok(running.take(job)?.wait().await?.success())
            }
            Backend::Floor { running, .. } => running.get(job)?.wait().await.map_err(Failure::from),
        }
    }

    /// Stops the task and waits for its end.
    pub(super) async fn stop(&self, job: &Job) -> Result<(), Failure> {
        match &self.backend {
            Backend::Plugin(backend) => {
                let request = StopTaskRequest {
                    task_id: PluginBackend::task_id(job),
                    timeout: Some(STOP_TIMEOUT),
                    signal: "SIGTERM".to_owned(),
                };
                backend.plugin.driver().stop_task(request).await.map_err(call_error("StopTask"))?;
                return Ok(());
            }
            Backend::Containerd { client, .. } => client.kill_task(&job.id, libc::SIGTERM.cast_unsigned()).await?,
            Backend::Runtime { binary, dir, .. } => {
                let mut command = runtime(binary, dir);
                command.args(["kill", &job.id, "TERM"]);
                check(command).await?;
            }
            Backend::Engine { binary, .. } => {
                let mut command = tokio::process::Command::new(binary);
                command.args(["stop", "-t", "30", &job.id]);
                check(command).await?;
            }
            Backend::Floor { running, .. } => {
                running.get(job)?.signal(libc::SIGTERM);
            }
        }
        self.wait(job).await.map(drop)
    }

    /// Returns whether the task can be stopped. An OCI runtime has to know the task first: crun 1.8 writes a
    /// container's state only when the task may run already.
    pub(super) async fn can_be_stopped(&self, job: &Job) -> bool {
        !matches!(self.backend, Backend::Runtime { .. }) || self.pid(job).await.is_ok()
    }

    /// Ends and removes a task that has failed, as far as it exists. Further errors are ignored: the failure was
    /// reported already.
    pub(super) async fn abandon(&self, job: &Job) {
        let will_end = match &self.backend {
            // `destroy` ends the task as well.
            Backend::Plugin(_) => false,
            Backend::Containerd { client, .. } => client.kill_all(&job.id).await.is_ok(),
            Backend::Runtime { binary, dir, .. } => {
                let mut command = runtime(binary, dir);
                command.args(["delete", "--force", &job.id]);
                check(command).await.is_ok()
            }
            Backend::Engine { binary, .. } => {
                let mut command = tokio::process::Command::new(binary);
                command.args(["rm", "--force", &job.id]);
                check(command).await.is_ok()
            }
            Backend::Floor { running, .. } => running.get(job).map(|process| process.signal(libc::SIGKILL)).is_ok(),
        };
        if will_end {
            drop(self.wait(job).await);
        }
        drop(self.destroy(job).await);
    }

    /// Removes the task.
    pub(super) async fn destroy(&self, job: &Job) -> Result<(), Failure> {
        match &self.backend {
            Backend::Plugin(backend) => {
                let request = DestroyTaskRequest { task_id: PluginBackend::task_id(job), force: true };
                backend.plugin.driver().destroy_task(request).await.map_err(call_error("DestroyTask"))?;
            }
            Backend::Containerd { client, .. } => {
                client.delete_task(&job.id).await?;
                client.delete_container(&job.id).await?;
                client.remove_snapshot(&job.id).await?;
            }
            Backend::Runtime { dir, .. } => unmount(&dir.join(&job.id))?,
            Backend::Engine { .. } => {}
            Backend::Floor { dir, floor, running, .. } => {
                if let Ok(process) = running.take(job) {
                    floor.remove_cgroup(&process)?;
                }
                unmount(&dir.join(&job.id))?;
            }
        }
        Ok(())
    }

    /// Runs a process in the task.
    pub(super) async fn exec(&self, job: &Job) -> Result<(), Failure> {
        let Backend::Plugin(backend) = &self.backend else { return Err("only plugins can run the step exec".into()) };
        let request = ExecTaskRequest {
            task_id: PluginBackend::task_id(job),
            command: vec![super::stamp::PATH.to_owned()],
            timeout: Some(STOP_TIMEOUT),
        };
        backend.plugin.driver().exec_task(request).await.map_err(call_error("ExecTask"))?;
        Ok(())
    }

    /// Reads the task's resource usage once.
    pub(super) async fn stats(&self, job: &Job) -> Result<(), Failure> {
        let Backend::Plugin(backend) = &self.backend else { return Err("only plugins can run the step stats".into()) };
        let request = TaskStatsRequest {
            task_id: PluginBackend::task_id(job),
            collection_interval: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        };
        let mut stream =
            backend.plugin.driver().task_stats(request).await.map_err(call_error("TaskStats"))?.into_inner();
        stream.message().await?.ok_or("the plugin sent no statistics")?;
        Ok(())
    }

    /// Sends the task a signal that its program ignores.
    pub(super) async fn signal(&self, job: &Job) -> Result<(), Failure> {
        let Backend::Plugin(backend) = &self.backend else { return Err("only plugins can run the step signal".into()) };
        let request = SignalTaskRequest { task_id: PluginBackend::task_id(job), signal: "SIGWINCH".to_owned() };
        backend.plugin.driver().signal_task(request).await.map_err(call_error("SignalTask"))?;
        Ok(())
    }

    /// Returns how long the phases of the task's start took, as this driver reports it: milliseconds by name. Empty for
    /// other subjects.
    pub(super) async fn phases(&self, job: &Job) -> Vec<(String, f64)> {
        let Backend::Plugin(backend) = &self.backend else { return Vec::new() };
        let request = InspectTaskRequest { task_id: PluginBackend::task_id(job) };
        let Ok(answer) = backend.plugin.driver().inspect_task(request).await else { return Vec::new() };
        let attributes = answer.into_inner().driver.map(|driver| driver.attributes).unwrap_or_default();
        attributes
            .into_iter()
            .filter_map(|(name, value)| {
                let phase = name.strip_prefix("phase.")?.strip_suffix("_ms")?.to_owned();
                Some((phase, value.parse().ok()?))
            })
            .collect()
    }

    /// Returns the pid, on the host, of a running task's process.
    pub(super) async fn pid(&self, job: &Job) -> Result<u32, Failure> {
        match &self.backend {
            Backend::Runtime { binary, dir, .. } => {
                let mut command = runtime(binary, dir);
                command.args(["state", &job.id]).stdin(Stdio::null());
                let output = command.kill_on_drop(true).output().await?;
                let state: Value = serde_json::from_slice(&output.stdout)?;
                Ok(state["pid"].as_u64().and_then(|pid| pid.try_into().ok()).ok_or("the runtime reports no pid")?)
            }
            Backend::Floor { running, .. } => Ok(running.get(job)?.pid()),
            _ => Err("this subject does not report the pids of its tasks".into()),
        }
    }

    /// Returns the pids of the daemons that the subject runs besides the tasks.
    pub(super) fn daemons(&self) -> Vec<u32> {
        match &self.backend {
            Backend::Plugin(backend) => backend.plugin.pid().into_iter().collect(),
            _ => Vec::new(),
        }
    }

    /// Returns whether the subject has processes that live longer than a task, whose memory can be counted.
    pub(super) fn has_daemons(&self) -> bool {
        matches!(self.backend, Backend::Plugin(_) | Backend::Containerd { .. })
    }

    /// Ends and removes what only this subject uses.
    pub(super) async fn close(self) {
        match self.backend {
            Backend::Plugin(backend) => {
                backend.plugin.shut_down().await;
            }
            Backend::Containerd { client, lease, .. } => drop(client.delete_lease(&lease).await),
            _ => {}
        }
    }
}

/// Returns a command of an OCI runtime whose state is below `dir`.
fn runtime(binary: &Path, dir: &Path) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(binary);
    command.arg("--root").arg(dir.join("state"));
    command
}

/// Starts a command in the foreground, with the task's FIFOs as its stdout and stderr.
fn spawn(mut command: tokio::process::Command, job: &Job) -> Result<tokio::process::Child, Failure> {
    let write = |path: &Path| fs::OpenOptions::new().write(true).open(path);
    let (stdout, stderr) =
        tokio::task::block_in_place(|| Ok::<_, std::io::Error>((write(&job.dirs.stdout)?, write(&job.dirs.stderr)?)))?;
    Ok(command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).kill_on_drop(true).spawn()?)
}

/// Runs a command to its end. If the command fails, its text on stderr is the error.
async fn check(mut command: tokio::process::Command) -> Result<(), Failure> {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned().into()) }
}

/// Writes `hostname`, `hosts` and `resolv.conf`, which the spec mounts from the bundle.
fn write_network_files(bundle: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o711).create(bundle)?;
    fs::write(bundle.join("hostname"), "bench\n")?;
    fs::write(bundle.join("hosts"), "127.0.0.1 localhost\n")?;
    fs::write(bundle.join("resolv.conf"), "")
}

/// Makes a bundle and mounts its root file system, as this driver does.
fn make_bundle(bundle: &Path, template: &Template) -> std::io::Result<()> {
    write_network_files(bundle)?;
    for directory in ["rootfs", "upper", "work"] {
        fs::DirBuilder::new().mode(0o755).create(bundle.join(directory))?;
    }
    overlay::mount_writable(&template.lowers, &template.overlay_options, bundle, &bundle.join("rootfs"))
}

/// Unmounts a bundle's root file system and removes the bundle.
fn unmount(bundle: &Path) -> std::io::Result<()> {
    nix::mount::umount2(&bundle.join("rootfs"), nix::mount::MntFlags::MNT_DETACH)?;
    fs::remove_dir_all(bundle)
}
