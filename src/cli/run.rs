//! `run`: runs one task the way Nomad would. The command starts its own program as a plugin and makes the calls that an
//! agent makes.

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{
    CliError, CommonArgs, ContainerdSession,
    gc::StoreLock,
    parse_image, print_message,
    runs::{IdleShim, clean_up, own_plugin, settings},
};
use crate::{
    control::{ANSWER_TIMEOUT, Request, send_request},
    host::{Alloc, Collector, Output, Plugin, call_error, encode},
    ids::random_hex,
    pb::driver::{
        DestroyTaskRequest, InspectTaskRequest, StartTaskRequest, StopTaskRequest, TaskConfigSchemaRequest,
        WaitTaskRequest,
    },
    task::refusal_code,
};

/// The time between the first Ctrl-C and SIGKILL, as docker's.
const STOP_TIMEOUT: prost_types::Duration = prost_types::Duration { seconds: 10, nanos: 0 };
/// The time for which an interrupt waits for a start in progress. Create and Start take a tenth of this even on a busy
/// machine.
const START_GRACE: Duration = Duration::from_secs(2);
/// The time for which the command waits after the task's exit for output that is still in the pipes.
const OUTPUT_DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Run a command in a new container
#[derive(Args, Debug)]
pub(crate) struct Run {
    /// The image: redis:7, registry.example:5000/app@sha256:...
    image: String,
    /// The command and its arguments; they replace the image's CMD
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    /// The task's name
    #[arg(long, default_value = "run")]
    name: String,
    /// OCI runtime: crun, runc, runsc
    #[arg(long)]
    runtime: Option<String>,
    /// Replace the image's ENTRYPOINT and CMD
    #[arg(long)]
    entrypoint: Option<String>,
    /// An environment variable, KEY=VALUE
    #[arg(long, short, value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// A mount: type=bind,source=/host,target=/in,ro
    #[arg(long, value_name = "SPEC")]
    mount: Vec<String>,
    /// User: name, uid, uid:gid
    #[arg(long, short, default_value = "")]
    user: String,
    /// Working directory
    #[arg(long, short = 'w')]
    workdir: Option<String>,
    /// Host name
    #[arg(long)]
    hostname: Option<String>,
    /// Make a small init the first process, which reaps orphans and passes signals on
    #[arg(long)]
    init: bool,
    /// Make the root file system read-only
    #[arg(long)]
    read_only: bool,
    /// Use the host's network
    #[arg(long)]
    host_network: bool,
    /// Remove (nearly) all confinement
    #[arg(long)]
    privileged: bool,
    /// Add a capability
    #[arg(long, value_name = "CAP")]
    cap_add: Vec<String>,
    /// Drop a capability
    #[arg(long, value_name = "CAP")]
    cap_drop: Vec<String>,
    /// Registry credentials, USER:PASSWORD
    #[arg(long, value_name = "USER:PASSWORD", env = "NOMAD_DRIVER_SHIM_AUTH", hide_env_values = true)]
    auth: Option<String>,
    /// Additional options of the task's config block, as JSON
    #[arg(long, value_name = "JSON")]
    config: Option<String>,
    /// Print how long each phase took. The plugin then has an idle shim before the task starts, as an agent's has
    #[arg(long)]
    time: bool,
}

/// Returns docker's exit code for a start that failed, by the runtime's message.
pub(crate) fn start_failure_code(message: &str) -> u8 {
    let create = message.contains("create the container") || message.contains("start the container");
    let code = refusal_code(message).filter(|_| create);
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(super::CLI_ERROR_CODE)
}

impl Run {
    /// Runs the task, and returns its exit code.
    ///
    /// # Errors
    /// Fails when the task can't be started.
    pub(crate) async fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        let config = self.task_config()?;
        // An invalid name is refused before a containerd is started.
        parse_image(&self.image)?;
        let _lock = StoreLock::shared(common)?;
        let began = Instant::now();
        let store = ContainerdSession::open(common).await?;
        let containerd = began.elapsed();
        let id = format!("run-{}", random_hex(6));
        let session = Session { run: &self, config, id: &id, address: store.address.clone(), common };
        let outcome = Box::pin(session.execute(containerd)).await;
        clean_up(common, &store.address, &id).await;
        store.close().await;
        outcome
    }

    fn task_config(&self) -> Result<serde_json::Value, CliError> {
        let mut config = json!({
            "image": parse_image(&self.image)?.to_string(),
            "image_pull_timeout": "30m",
            "init": self.init,
            "readonly_rootfs": self.read_only,
            "host_network": self.host_network,
            "privileged": self.privileged,
        });
        let list = |items: &[String]| (!items.is_empty()).then(|| json!(items));
        let (command, args) = match (&self.entrypoint, self.command.split_first()) {
            (None, Some((command, args))) => (Some(command.clone()), args.to_vec()),
            _ => (None, self.command.clone()),
        };
        let mut mounts = Vec::new();
        for spec in &self.mount {
            mounts.push(parse_mount(spec).map_err(CliError::Usage)?);
        }
        let auth = match self.auth.as_deref().map(|pair| pair.split_once(':')) {
            None => None,
            Some(Some((username, password))) => Some(json!({ "username": username, "password": password })),
            Some(None) => return Err(CliError::Usage("--auth needs USER:PASSWORD".to_owned())),
        };
        let options = [
            ("command", command.map(|command| json!(command))),
            ("args", list(&args)),
            ("entrypoint", self.entrypoint.as_ref().map(|entrypoint| json!([entrypoint]))),
            ("cwd", self.workdir.as_ref().map(|cwd| json!(cwd))),
            ("hostname", self.hostname.as_ref().map(|name| json!(name))),
            ("runtime", self.runtime.as_ref().map(|name| json!(name))),
            ("cap_add", list(&self.cap_add)),
            ("cap_drop", list(&self.cap_drop)),
            ("mounts", (!mounts.is_empty()).then(|| json!(mounts))),
            ("auth", auth),
        ];
        for (name, value) in options {
            if let Some(value) = value {
                config[name] = value;
            }
        }
        if let Some(text) = &self.config {
            let more: serde_json::Map<String, serde_json::Value> =
                serde_json::from_str(text).map_err(|error| CliError::Usage(format!("--config: {error}")))?;
            for (name, value) in more {
                config[name] = value;
            }
        }
        Ok(config)
    }
}

/// Converts `type=bind,source=/a,target=/b,ro` to a `mounts` block.
fn parse_mount(spec: &str) -> Result<serde_json::Value, String> {
    let mut block = serde_json::Map::new();
    let mut options = Vec::new();
    for part in spec.split(',') {
        match part.split_once('=') {
            Some(("type", kind)) => drop(block.insert("type".to_owned(), json!(kind))),
            Some(("source" | "src", path)) => drop(block.insert("source".to_owned(), json!(path))),
            Some(("target" | "dst" | "destination", path)) => drop(block.insert("target".to_owned(), json!(path))),
            _ => options.push(part),
        }
    }
    if !block.contains_key("target") {
        return Err(format!("--mount {spec:?} has no target=..."));
    }
    block.entry("type").or_insert_with(|| json!("bind"));
    block.insert("options".to_owned(), json!(options));
    Ok(block.into())
}

/// One `run`.
struct Session<'a> {
    run: &'a Run,
    config: serde_json::Value,
    id: &'a str,
    address: PathBuf,
    common: &'a CommonArgs,
}

impl Session<'_> {
    async fn execute(&self, containerd: Duration) -> Result<u8, CliError> {
        let places = self.common.places(self.id);
        let began = Instant::now();
        let plugin = own_plugin().await?;
        let idle = if self.run.time { IdleShim::Ready } else { IdleShim::None };
        let outcome = match plugin.configure(&settings(self.common, &self.address, self.id, idle)).await {
            Ok(()) => {
                let handshake = began.elapsed();
                if idle == IdleShim::Ready {
                    wait_for_idle_shim(&places.control()).await;
                }
                self.task(&plugin, containerd, handshake, &places.run().join("alloc")).await
            }
            Err(error) => Err(error.into()),
        };
        if outcome.is_err() && std::env::var_os("NOMAD_DRIVER_SHIM_LOG").is_some() {
            print_message(plugin.stderr().trim_end());
        }
        plugin.shut_down().await;
        outcome
    }

    async fn task(
        &self,
        plugin: &Plugin,
        containerd: Duration,
        handshake: Duration,
        allocs: &Path,
    ) -> Result<u8, CliError> {
        let run = self.run;
        let mut driver = plugin.driver();
        let schema =
            driver.task_config_schema(TaskConfigSchemaRequest {}).await.map_err(call_error("TaskConfigSchema"))?;
        let config = encode(schema.into_inner().spec.as_ref(), &self.config).map_err(crate::host::HostError::from)?;
        let alloc = Alloc::create(allocs, self.id)?;
        let dirs = alloc.create_task(&run.name)?;
        let mut task = dirs.config("1", config);
        // A task of this command gets no limits on memory and CPU.
        task.resources = None;
        task.user.clone_from(&run.user);
        for pair in &run.env {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| CliError::Usage(format!("--env {pair:?} has no =")))?;
            task.env.insert(key.to_owned(), value.to_owned());
        }
        let stdout = Collector::start(&dirs.stdout, forward_to(std::io::stdout()));
        let stderr = Collector::start(&dirs.stderr, forward_to(std::io::stderr()));
        // From here on an interrupt stops the task, even if it comes before StartTask has answered.
        let mut interrupts = Interrupts::listen()?;
        let began = Instant::now();
        let task_id = task.id.clone();
        let mut starting = driver.clone();
        let start = starting.start_task(StartTaskRequest { task: Some(task) });
        tokio::pin!(start);
        let answer = tokio::select! {
            answer = &mut start => Some(answer),
            () = interrupts.next() => {
                // If the container is about to run, StartTask answers soon, and the task is stopped properly then. The
                // command does not wait for a pull.
                interrupts.pending = true;
                tokio::time::timeout(START_GRACE, &mut start).await.ok()
            }
        };
        answer.ok_or(CliError::Interrupted)?.map_err(call_error("StartTask"))?;
        let started = began.elapsed();
        let exit = self.wait(&mut driver.clone(), &task_id, &mut interrupts).await;
        let exit_seen = began.elapsed();
        stdout.wait_for_end(OUTPUT_DRAIN_TIMEOUT).await;
        stderr.wait_for_end(OUTPUT_DRAIN_TIMEOUT).await;
        if run.time {
            let inspect = InspectTaskRequest { task_id: task_id.clone() };
            let answer = driver.inspect_task(inspect).await.map_err(call_error("InspectTask"))?.into_inner();
            let first = stdout.first_byte().or(stderr.first_byte()).map(|first| first.duration_since(began));
            let phases = answer.driver.map(|driver| driver.attributes).unwrap_or_default();
            print_message(&timing(
                &phases,
                &[
                    ("containerd ready", Some(containerd)),
                    ("plugin handshake and Init", Some(handshake)),
                    ("StartTask", Some(started)),
                    ("first byte of output", first),
                    ("exit seen", Some(exit_seen)),
                ],
            ));
        }
        let request = DestroyTaskRequest { task_id, force: true };
        let destroyed = driver.destroy_task(request).await.map_err(call_error("DestroyTask"));
        let code = exit?;
        destroyed?;
        alloc.remove()?;
        Ok(code)
    }

    /// Waits for the task's exit code. Ctrl-C and SIGTERM stop the task; a second one changes nothing, since the stop
    /// has its own deadline.
    async fn wait(
        &self,
        driver: &mut crate::pb::driver::driver_client::DriverClient<tonic::transport::Channel>,
        task_id: &str,
        interrupts: &mut Interrupts,
    ) -> Result<u8, CliError> {
        let mut waiting = driver.clone();
        let wait = waiting.wait_task(WaitTaskRequest { task_id: task_id.to_owned() });
        tokio::pin!(wait);
        let answer = tokio::select! {
            answer = &mut wait => answer,
            () = interrupts.next() => self.stop(driver, task_id, wait).await,
        };
        let answer = answer.map_err(call_error("WaitTask"))?.into_inner();
        if !answer.err.is_empty() {
            print_message(&format!("nomad-driver-shim: {}", answer.err));
        }
        let result = answer.result.unwrap_or_default();
        if result.oom_killed && answer.err.is_empty() {
            print_message("nomad-driver-shim: a process of the task was OOM Killed; the task itself succeeded");
        }
        Ok(u8::try_from(result.exit_code).unwrap_or(super::CLI_ERROR_CODE))
    }

    async fn stop<T>(
        &self,
        driver: &mut crate::pb::driver::driver_client::DriverClient<tonic::transport::Channel>,
        task_id: &str,
        wait: impl Future<Output = T>,
    ) -> T {
        let request =
            StopTaskRequest { task_id: task_id.to_owned(), timeout: Some(STOP_TIMEOUT), signal: String::new() };
        if let Err(status) = driver.stop_task(request).await {
            print_message(&format!("nomad-driver-shim: could not stop the task: {}", status.message()));
        }
        wait.await
    }
}

/// Waits until the plugin has an idle shim. Without one, the start launches a shim, and the phases say so.
async fn wait_for_idle_shim(control: &Path) {
    if let Err(error) = send_request(control, &Request::FillPool, ANSWER_TIMEOUT).await {
        print_message(&format!("nomad-driver-shim: no idle shim: {}", crate::error_chain(&error)));
    }
}

/// Waits for Ctrl-C and SIGTERM.
struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
    /// Whether the next call of `next` returns at once, because of an interrupt that has already come.
    pending: bool,
}

impl Interrupts {
    fn listen() -> Result<Self, CliError> {
        let (interrupt, terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        Ok(Self { interrupt, terminate, pending: false })
    }

    async fn next(&mut self) {
        if std::mem::take(&mut self.pending) {
            return;
        }
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

fn forward_to(writer: impl Write + Send + 'static) -> Output {
    Output::Writer(Box::new(writer))
}

/// Formats the phases of a run as a table. The phases inside of the plugin are below StartTask.
fn timing(phases: &std::collections::HashMap<String, String>, steps: &[(&str, Option<Duration>)]) -> String {
    let mut text = String::from("phase                                  ms\n");
    for (name, took) in steps {
        let took = took.map_or_else(|| "-".to_owned(), |took| format!("{:.2}", took.as_secs_f64() * 1000.0));
        text.push_str(&format!("{name:32} {took:>8}\n"));
        if *name == "StartTask" {
            let pooled = phases.get("phase.shim_pooled").is_some_and(|pooled| pooled == "true");
            let shim = if pooled { "shim (from the pool)" } else { "shim (started now)" };
            let parts = [
                ("image", "image_ms"),
                (shim, "shim_ms"),
                ("record, rootfs, bundle", "bundle_ms"),
                ("shim: Create", "create_ms"),
                ("shim: Start", "start_ms"),
                ("until the process runs", "released_ms"),
                ("all but the shim's part", "own_ms"),
                ("total, in the plugin", "total_ms"),
            ];
            for (label, key) in parts {
                let value = phases.get(&format!("phase.{key}")).and_then(|value| value.parse::<f64>().ok());
                if let Some(value) = value {
                    text.push_str(&format!("  {label:30} {value:>8.2}\n"));
                }
            }
        }
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_starts_have_dockers_codes() {
        let prefix = "create the container: OCI runtime create failed: ";
        for (message, code) in [
            ("exec: \"/x\": stat /x: no such file or directory", 127),
            ("executable file `/x` not found in $PATH: No such file or directory", 127),
            ("exec: \"/etc/passwd\": permission denied", 126),
            ("open executable: Permission denied", 126),
            ("cgroups: something else", 125),
        ] {
            assert_eq!(start_failure_code(&format!("{prefix}{message}")), code, "{message}");
        }
        assert_eq!(start_failure_code("image x was not found: no such file or directory"), 125);
    }

    #[test]
    fn mounts_are_read_as_dockers() {
        let block = parse_mount("type=bind,src=/a,dst=/b,ro").expect("a mount");
        assert_eq!(block, json!({"type": "bind", "source": "/a", "target": "/b", "options": ["ro"]}));
        assert!(parse_mount("source=/a").is_err());
    }
}
