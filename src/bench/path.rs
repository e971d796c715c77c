//! The things compared, each driven in its own way, all asked the same.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::DirBuilderExt as _,
    path::{Path as FilePath, PathBuf},
    process::Stdio,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde_json::{Value, json};
use tokio::process::Child;

use super::{
    BenchError,
    floor::{Floor, Process},
    job::Job,
    template::Template,
};
use crate::{
    containerd::{Client, LeaseId},
    host::{Launch, Plugin, called, encode},
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

/// Before a stop turns into a kill.
const STOP: prost_types::Duration = prost_types::Duration { seconds: 30, nanos: 0 };

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// One of the things compared, ready.
#[derive(Debug)]
pub struct Path {
    pub(super) name: String,
    pub(super) way: Way,
}

/// How it is driven.
#[derive(Debug)]
pub enum Way {
    /// A driver plugin.
    Plugin(Box<PluginWay>),
    /// containerd's own services.
    Containerd { client: Client, lease: LeaseId, template: Template },
    /// An OCI runtime's command line.
    Runtime { binary: PathBuf, flags: Vec<String>, dir: PathBuf, template: Template, running: Running<Child> },
    /// docker's or podman's.
    Engine { binary: PathBuf, image: String, running: Running<Child> },
    /// Raw calls.
    Floor { dir: PathBuf, template: Template, floor: Box<Floor>, running: Running<Process> },
}

/// What runs, by task.
#[derive(Debug)]
pub struct Running<T>(Mutex<HashMap<String, T>>);

impl<T> Default for Running<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Running<T> {
    fn put(&self, job: &Job, process: T) {
        self.map().insert(job.id.clone(), process);
    }

    fn take(&self, job: &Job) -> Result<T, Failure> {
        Ok(self.map().remove(&job.id).ok_or("it does not run")?)
    }

    fn get(&self, job: &Job) -> Result<T, Failure>
    where
        T: Clone,
    {
        Ok(self.map().get(&job.id).cloned().ok_or("it does not run")?)
    }

    fn map(&self) -> MutexGuard<'_, HashMap<String, T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A plugin and what its tasks are given.
#[derive(Debug)]
pub struct PluginWay {
    pub(super) plugin: Plugin,
    pub(super) image: String,
    pub(super) task: Value,
    pub(super) schema: Option<Spec>,
}

/// Overlays one JSON object over another, block by block.
pub(super) fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

impl PluginWay {
    /// Starts a plugin as an agent does, and configures it.
    pub(super) async fn launch(launch: &Launch, config: &Value, image: &str, task: Value) -> Result<Self, BenchError> {
        let plugin = Plugin::launch(launch).await?;
        if let Err(error) = plugin.configure(config).await {
            plugin.leave().await;
            return Err(error.into());
        }
        let schema = plugin.driver().task_config_schema(TaskConfigSchemaRequest {}).await;
        let schema = schema.map_err(called("TaskConfigSchema"))?.into_inner().spec;
        Ok(Self { plugin, image: image.to_owned(), task, schema })
    }

    fn task_id(job: &Job) -> String {
        job.dirs.config("1", Vec::new()).id
    }

    async fn start(&self, job: &Job) -> Result<(), Failure> {
        let command = job.command();
        let mut config = json!({ "image": self.image, "command": command[0], "args": command[1..] });
        merge(&mut config, &self.task);
        let task = job.dirs.config("1", encode(self.schema.as_ref(), &config)?);
        self.plugin.driver().start_task(StartTaskRequest { task: Some(task) }).await.map_err(called("StartTask"))?;
        Ok(())
    }
}

impl Path {
    /// Starts the task: returns when whoever asked would be told that it runs.
    pub(super) async fn start(&self, job: &Job) -> Result<(), Failure> {
        match &self.way {
            Way::Plugin(way) => way.start(job).await,
            Way::Containerd { client, lease, template } => {
                let parent: Option<ChainId> = serde_json::from_value(json!(template.chain_id)).ok();
                let mounts = client.prepare_snapshot(lease, &job.id, parent.as_ref(), HashMap::new()).await?;
                let bundle = job.alloc.dir.join("bundle");
                own_files(&bundle)?;
                let spec = template.fill(job, &bundle, &job.id, "rootfs");
                client.create_container(&job.id, serde_json::to_vec(&spec)?).await?;
                let path = |path: &FilePath| path.to_string_lossy().into_owned();
                client.create_task(&job.id, mounts, &path(&job.dirs.stdout), &path(&job.dirs.stderr)).await?;
                client.start_task(&job.id).await?;
                Ok(())
            }
            Way::Runtime { binary, flags, dir, template, running } => {
                let bundle = dir.join(&job.id);
                mount(&bundle, template)?;
                fs::write(bundle.join("config.json"), template.fill(job, &bundle, &job.id, "rootfs").to_string())?;
                let mut command = runtime(binary, dir);
                command.args(flags).args(["run", "--bundle"]).arg(&bundle).arg(&job.id);
                let child = spawn(command, job)?;
                running.put(job, child);
                Ok(())
            }
            Way::Engine { binary, image, running } => {
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
            Way::Floor { dir, template, floor, running } => {
                let bundle = dir.join(&job.id);
                let process = tokio::task::block_in_place(|| -> Result<Process, Failure> {
                    mount(&bundle, template)?;
                    let root = bundle.join("rootfs");
                    let spec = template.fill(job, &bundle, &job.id, &root.to_string_lossy());
                    floor.spawn(&spec, &job.dirs.stdout, &job.dirs.stderr)
                })?;
                running.put(job, process);
                Ok(())
            }
        }
    }

    /// Waits for its end: true when it ended well.
    pub(super) async fn wait(&self, job: &Job) -> Result<bool, Failure> {
        match &self.way {
            Way::Plugin(way) => {
                let request = WaitTaskRequest { task_id: PluginWay::task_id(job) };
                let answer = way.plugin.driver().wait_task(request).await.map_err(called("WaitTask"))?.into_inner();
                Ok(answer.result.is_some_and(|result| result.exit_code == 0))
            }
            Way::Containerd { client, .. } => Ok(client.wait_task(&job.id).await? == 0),
            Way::Runtime { running, .. } | Way::Engine { running, .. } => {
                Ok(running.take(job)?.wait().await?.success())
            }
            Way::Floor { running, .. } => running.get(job)?.wait().await.map_err(Failure::from),
        }
    }

    /// Has it stop: returns when it has.
    pub(super) async fn stop(&self, job: &Job) -> Result<(), Failure> {
        match &self.way {
            Way::Plugin(way) => {
                let request = StopTaskRequest {
                    task_id: PluginWay::task_id(job),
                    timeout: Some(STOP),
                    signal: "SIGTERM".to_owned(),
                };
                way.plugin.driver().stop_task(request).await.map_err(called("StopTask"))?;
                return Ok(());
            }
            Way::Containerd { client, .. } => client.kill_task(&job.id, libc::SIGTERM.cast_unsigned()).await?,
            Way::Runtime { binary, dir, .. } => {
                let mut command = runtime(binary, dir);
                command.args(["kill", &job.id, "TERM"]);
                check(command).await?;
            }
            Way::Engine { binary, .. } => {
                let mut command = tokio::process::Command::new(binary);
                command.args(["stop", "--time", "30", &job.id]);
                check(command).await?;
            }
            Way::Floor { running, .. } => {
                running.get(job)?.signal(libc::SIGTERM);
            }
        }
        self.wait(job).await.map(drop)
    }

    /// Can it be told to stop? crun notes a task when that may have begun already (1.8).
    pub(super) async fn is_known(&self, job: &Job) -> bool {
        !matches!(self.way, Way::Runtime { .. }) || self.pid(job).await.is_ok()
    }

    /// Ends and removes what there is of a task, whatever went wrong with it before. That is told; not what lacks here.
    pub(super) async fn abandon(&self, job: &Job) {
        let will_end = match &self.way {
            // Its removal ends it.
            Way::Plugin(_) => false,
            Way::Containerd { client, .. } => client.kill_all(&job.id).await.is_ok(),
            Way::Runtime { binary, dir, .. } => {
                let mut command = runtime(binary, dir);
                command.args(["delete", "--force", &job.id]);
                check(command).await.is_ok()
            }
            Way::Engine { binary, .. } => {
                let mut command = tokio::process::Command::new(binary);
                command.args(["rm", "--force", &job.id]);
                check(command).await.is_ok()
            }
            Way::Floor { running, .. } => running.get(job).map(|process| process.signal(libc::SIGKILL)).is_ok(),
        };
        if will_end {
            drop(self.wait(job).await);
        }
        drop(self.destroy(job).await);
    }

    /// Removes it.
    pub(super) async fn destroy(&self, job: &Job) -> Result<(), Failure> {
        match &self.way {
            Way::Plugin(way) => {
                let request = DestroyTaskRequest { task_id: PluginWay::task_id(job), force: true };
                way.plugin.driver().destroy_task(request).await.map_err(called("DestroyTask"))?;
            }
            Way::Containerd { client, .. } => {
                client.delete_task(&job.id).await?;
                client.delete_container(&job.id).await?;
                client.remove_snapshot(&job.id).await?;
            }
            Way::Runtime { dir, .. } => unmount(&dir.join(&job.id))?,
            Way::Engine { .. } => {}
            Way::Floor { dir, floor, running, .. } => {
                if let Ok(process) = running.take(job) {
                    floor.clear(&process)?;
                }
                unmount(&dir.join(&job.id))?;
            }
        }
        Ok(())
    }

    /// Runs a process in it.
    pub(super) async fn exec(&self, job: &Job) -> Result<(), Failure> {
        let Way::Plugin(way) = &self.way else { return Err("exec is for plugins".into()) };
        let request = ExecTaskRequest {
            task_id: PluginWay::task_id(job),
            command: vec![super::stamp::PATH.to_owned()],
            timeout: Some(STOP),
        };
        way.plugin.driver().exec_task(request).await.map_err(called("ExecTask"))?;
        Ok(())
    }

    /// Asks what it uses, once.
    pub(super) async fn stats(&self, job: &Job) -> Result<(), Failure> {
        let Way::Plugin(way) = &self.way else { return Err("stats are for plugins".into()) };
        let request = TaskStatsRequest {
            task_id: PluginWay::task_id(job),
            collection_interval: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        };
        let mut stream = way.plugin.driver().task_stats(request).await.map_err(called("TaskStats"))?.into_inner();
        stream.message().await?.ok_or("no statistics")?;
        Ok(())
    }

    /// Sends a signal that it does not heed.
    pub(super) async fn signal(&self, job: &Job) -> Result<(), Failure> {
        let Way::Plugin(way) = &self.way else { return Err("signals are for plugins".into()) };
        let request = SignalTaskRequest { task_id: PluginWay::task_id(job), signal: "SIGWINCH".to_owned() };
        way.plugin.driver().signal_task(request).await.map_err(called("SignalTask"))?;
        Ok(())
    }

    /// How long the parts of its start took, by our own driver's word: milliseconds by name.
    pub(super) async fn phases(&self, job: &Job) -> Vec<(String, f64)> {
        let Way::Plugin(way) = &self.way else { return Vec::new() };
        let request = InspectTaskRequest { task_id: PluginWay::task_id(job) };
        let Ok(answer) = way.plugin.driver().inspect_task(request).await else { return Vec::new() };
        let attributes = answer.into_inner().driver.map(|driver| driver.attributes).unwrap_or_default();
        attributes
            .into_iter()
            .filter_map(|(name, value)| {
                let phase = name.strip_prefix("phase.")?.strip_suffix("_ms")?.to_owned();
                Some((phase, value.parse().ok()?))
            })
            .collect()
    }

    /// The process of a task that runs, on the host.
    pub(super) async fn pid(&self, job: &Job) -> Result<u32, Failure> {
        match &self.way {
            Way::Runtime { binary, dir, .. } => {
                let mut command = runtime(binary, dir);
                command.args(["state", &job.id]).stdin(Stdio::null());
                let output = command.kill_on_drop(true).output().await?;
                let state: Value = serde_json::from_slice(&output.stdout)?;
                Ok(state["pid"].as_u64().and_then(|pid| pid.try_into().ok()).ok_or("no pid in its state")?)
            }
            Way::Floor { running, .. } => Ok(running.get(job)?.pid()),
            _ => Err("it does not say".into()),
        }
    }

    /// The processes that it keeps beside the tasks.
    pub(super) fn daemons(&self) -> Vec<u32> {
        match &self.way {
            Way::Plugin(way) => way.plugin.pid().into_iter().collect(),
            _ => Vec::new(),
        }
    }

    /// Does it have something that lives between tasks, whose memory could be counted?
    pub(super) fn has_memory(&self) -> bool {
        matches!(self.way, Way::Plugin(_) | Way::Containerd { .. })
    }

    /// Ends what only it uses.
    pub(super) async fn close(self) {
        match self.way {
            Way::Plugin(way) => {
                way.plugin.leave().await;
            }
            Way::Containerd { client, lease, .. } => drop(client.delete_lease(&lease).await),
            _ => {}
        }
    }
}

/// An OCI runtime's command on its own tasks.
fn runtime(binary: &FilePath, dir: &FilePath) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(binary);
    command.arg("--root").arg(dir.join("state"));
    command
}

/// Starts a foreground command with the task's FIFOs as its output.
fn spawn(mut command: tokio::process::Command, job: &Job) -> Result<tokio::process::Child, Failure> {
    let write = |path: &FilePath| fs::OpenOptions::new().write(true).open(path);
    let (stdout, stderr) =
        tokio::task::block_in_place(|| Ok::<_, std::io::Error>((write(&job.dirs.stdout)?, write(&job.dirs.stderr)?)))?;
    Ok(command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).kill_on_drop(true).spawn()?)
}

async fn check(mut command: tokio::process::Command) -> Result<(), Failure> {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned().into()) }
}

/// hosts and resolv.conf, which the spec mounts from the bundle.
fn own_files(bundle: &FilePath) -> std::io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o711).create(bundle)?;
    fs::write(bundle.join("hosts"), "127.0.0.1 localhost\n")?;
    fs::write(bundle.join("resolv.conf"), "")
}

/// A bundle with its root file system, as the driver makes it.
fn mount(bundle: &FilePath, template: &Template) -> std::io::Result<()> {
    own_files(bundle)?;
    for directory in ["rootfs", "upper", "work"] {
        fs::DirBuilder::new().mode(0o755).create(bundle.join(directory))?;
    }
    overlay::mount_writable(&template.lowers, &template.overlay_options, bundle, &bundle.join("rootfs"))
}

fn unmount(bundle: &FilePath) -> std::io::Result<()> {
    nix::mount::umount2(&bundle.join("rootfs"), nix::mount::MntFlags::MNT_DETACH)?;
    fs::remove_dir_all(bundle)
}
