//! One plugin with its own directories and its own containerd namespace, and the tasks that a test runs with it.

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use nomad_driver_shim::{
    host::{Alloc, Collector, Output, Plugin, PluginCommand, TaskDirs, encode, encode_raw},
    ids::random_hex,
    pb::base::ConfigSchemaRequest,
    pb::driver::{
        DestroyTaskRequest, ExitResult, InspectTaskRequest, InspectTaskResponse, RecoverTaskRequest, SignalTaskRequest,
        StartTaskRequest, StopTaskRequest, TaskConfig, TaskConfigSchemaRequest, TaskHandle, WaitTaskRequest,
        WaitTaskResponse,
    },
    pb::hclspec::Spec,
};
use serde_json::{Value, json};
use tonic::Status;

use super::{Image, patience, program, services, services::root};

/// The options in which a test's environment differs from the default.
pub(crate) struct EnvOptions {
    /// Merged over the plugin's configuration.
    pub config: Value,
    /// Added to the plugin's environment.
    pub env: Vec<(String, String)>,
    /// The driver's name.
    pub name: &'static str,
    /// A program that is started in place of the program under test, and that starts it. It gets its path in the
    /// variable `PROGRAM`.
    pub wrapper: Option<PathBuf>,
    /// Another driver than the program under test. Its configuration contains only the options that its schema knows.
    pub driver: Option<PluginCommand>,
}

impl Default for EnvOptions {
    fn default() -> Self {
        Self { config: json!({}), env: Vec::new(), name: "shim", wrapper: None, driver: None }
    }
}

impl EnvOptions {
    /// Sets the configuration that is merged over the tests' own.
    pub(crate) fn config(self, config: Value) -> Self {
        Self { config, ..self }
    }

    /// Adds a variable to the plugin's environment.
    pub(crate) fn var(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts the plugin.
    pub(crate) async fn start(self) -> Env {
        Env::with(self).await
    }
}

/// Ends a row of the conformance suite as not applicable: the driver lacks what the row needs.
pub(crate) struct NotApplicable(pub String);

pub(crate) fn not_applicable(why: &str) -> ! {
    std::panic::resume_unwind(Box::new(NotApplicable(why.to_owned())))
}

pub(crate) struct Env {
    pub plugin: Option<Plugin>,
    pub dir: PathBuf,
    pub namespace: String,
    pub config: Value,
    launch: PluginCommand,
    /// Whether the plugin is another driver than the program under test.
    pub foreign: bool,
    /// The allocations that were made, for the leak checker.
    pub allocs: Vec<Alloc>,
    /// The ids of all tasks for which StartTask was called.
    pub asked: Mutex<Vec<String>>,
    /// Mount points below `dir` that the test itself has made. They are no leaks.
    pub own_mounts: Vec<PathBuf>,
    /// What earlier plugins of this environment have logged.
    pub(super) earlier_log: String,
    /// Whether the leak check has been done, or is left out.
    pub(super) is_finished: bool,
}

/// A task and its collected output.
pub(crate) struct Task {
    pub id: String,
    pub dirs: TaskDirs,
    pub config: TaskConfig,
    pub stdout: Collector,
    pub stderr: Collector,
    pub handle: Option<TaskHandle>,
}

impl Env {
    pub(crate) async fn new() -> Self {
        Self::with(EnvOptions::default()).await
    }

    /// Starts a plugin with this configuration, merged over the tests' own.
    pub(crate) async fn configured(config: Value) -> Self {
        Self::with(EnvOptions { config, ..EnvOptions::default() }).await
    }

    /// Starts a plugin whose tasks use this runtime.
    pub(crate) async fn with_runtime(runtime: &str, mut config: Value) -> Self {
        config["default_runtime"] = json!(runtime);
        Self::configured(config).await
    }

    /// Starts a plugin under the name of nomad-driver-containerd.
    pub(crate) async fn drop_in(config: Value) -> Self {
        Self::with(EnvOptions { config, name: "containerd-driver", ..EnvOptions::default() }).await
    }

    pub(crate) async fn with(options: EnvOptions) -> Self {
        let id = random_hex(4);
        let dir = root().join(&id);
        std::fs::create_dir_all(&dir).unwrap();
        let namespace = format!("test-{id}");
        let mut config = json!({
            "containerd": {"address": services().containerd, "namespace": namespace},
            "state": {"run_dir": dir.join("run"), "state_dir": dir.join("state")},
            "shim": {"pool": 1},
        });
        // `make test-matrix` sets this variable.
        if let Ok(runtime) = std::env::var("NOMAD_DRIVER_SHIM_TEST_RUNTIME") {
            config["default_runtime"] = json!(runtime);
        }
        merge(&mut config, &options.config);
        let foreign = options.driver.is_some();
        let started = options.wrapper.unwrap_or_else(program);
        let mut launch = options.driver.unwrap_or_else(|| PluginCommand::with_name(started, options.name));
        launch.env.push(("PROGRAM".to_owned(), program().to_str().unwrap().to_owned()));
        launch.env.extend(options.env);
        launch.env.push(("PLUGIN_UNIX_SOCKET_DIR".to_owned(), dir.to_str().unwrap().to_owned()));
        let mut this = Self {
            plugin: None,
            dir,
            namespace,
            config,
            launch,
            foreign,
            allocs: Vec::new(),
            asked: Mutex::default(),
            own_mounts: Vec::new(),
            earlier_log: String::new(),
            is_finished: false,
        };
        this.start_plugin().await;
        this
    }

    pub(crate) async fn start_plugin(&mut self) {
        self.start_plugin_timed(std::time::Instant::now()).await;
    }

    /// Starts the plugin, and returns the time from `began` to the end of the handshake.
    pub(crate) async fn start_plugin_timed(&mut self, began: std::time::Instant) -> Duration {
        let plugin = self.plugin.insert(Plugin::launch(&self.launch).await.unwrap());
        let handshake = began.elapsed();
        if self.foreign {
            let schema = plugin.base().config_schema(ConfigSchemaRequest {}).await.unwrap().into_inner();
            self.config = known(schema.spec.as_ref(), &self.config).unwrap_or_else(|| json!({}));
        }
        plugin.configure(&self.config).await.unwrap();
        handshake
    }

    /// The command that starts plugins from now on.
    pub(crate) fn launch_mut(&mut self) -> &mut PluginCommand {
        &mut self.launch
    }

    /// Sets or removes a variable for the plugins that are started from now on.
    pub(crate) fn set_var(&mut self, name: &str, value: Option<&str>) {
        self.launch.env.retain(|(known, _)| known != name);
        self.launch.env.extend(value.map(|value| (name.to_owned(), value.to_owned())));
    }

    /// Waits for the end of a plugin that a failpoint kills, and removes its socket. Returns its stderr and its signal.
    pub(crate) async fn plugin_died(&mut self) -> (String, Option<i32>) {
        let mut plugin = self.plugin.take().unwrap();
        let ended = tokio::time::timeout(patience(), plugin.wait()).await.expect("the plugin lives on").unwrap();
        let socket = plugin.socket().to_owned();
        // By the end of this delay, everything that the plugin has written is read.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let said = plugin.stderr();
        self.earlier_log.push_str(&said);
        drop(plugin);
        std::fs::remove_file(socket).unwrap();
        (said, std::os::unix::process::ExitStatusExt::signal(&ended))
    }

    /// Kills the plugin as `kill -9` does, and removes the socket that a killed plugin leaves behind.
    pub(crate) async fn kill_plugin(&mut self) {
        let plugin = self.plugin.take().unwrap();
        let socket = plugin.socket().to_owned();
        self.earlier_log.push_str(&plugin.stderr());
        plugin.kill().await;
        std::fs::remove_file(socket).unwrap();
    }

    pub(crate) fn plugin(&self) -> &Plugin {
        self.plugin.as_ref().unwrap()
    }

    pub(crate) fn driver(
        &self,
    ) -> nomad_driver_shim::pb::driver::driver_client::DriverClient<tonic::transport::Channel> {
        self.plugin().driver()
    }

    /// Returns the name of the busybox image in the real registry.
    pub(crate) async fn busybox(&self) -> String {
        static NAME: tokio::sync::OnceCell<String> = tokio::sync::OnceCell::const_new();
        NAME.get_or_init(async || Image::busybox().push(&services().registry, "test/busybox:1").await).await.clone()
    }

    /// Prepares a task of a new allocation, ready to be started, with readers on its FIFOs.
    pub(crate) async fn prepare(&mut self, config: Value) -> Task {
        let alloc = Alloc::create(&self.dir.join("allocs"), &format!("{}-{}", self.namespace, random_hex(4))).unwrap();
        self.allocs.push(alloc.clone());
        let dirs = alloc.create_task("web").unwrap();
        self.prepare_in(dirs, "1", config).await
    }

    /// Prepares a further attempt of a task, with the task's existing log collector.
    pub(crate) async fn prepare_again(&self, task: Task, attempt: &str, config: Value) -> Task {
        let config = task.dirs.config(attempt, self.encoded(config).await);
        Task { id: config.id.clone(), config, handle: None, ..task }
    }

    async fn encoded(&self, config: Value) -> Vec<u8> {
        let schema = self.driver().task_config_schema(TaskConfigSchemaRequest {}).await.unwrap().into_inner();
        match encode(schema.spec.as_ref(), &config) {
            Ok(encoded) => encoded,
            Err(mismatch) if self.foreign => not_applicable(&mismatch.to_string()),
            Err(_) => encode_raw(&config),
        }
    }

    pub(crate) async fn prepare_in(&self, dirs: TaskDirs, attempt: &str, config: Value) -> Task {
        let config = dirs.config(attempt, self.encoded(config).await);
        let (stdout, stderr) =
            (Collector::start(&dirs.stdout, Output::Memory), Collector::start(&dirs.stderr, Output::Memory));
        Task { id: config.id.clone(), dirs, config, stdout, stderr, handle: None }
    }

    /// Calls RecoverTask as Nomad does, with the task's id only inside the handle.
    pub(crate) async fn recover(&self, task: &Task) -> Result<(), Status> {
        let request = RecoverTaskRequest { task_id: String::new(), handle: task.handle.clone() };
        self.driver().recover_task(request).await.map(drop)
    }

    pub(crate) async fn try_start(&self, task: &mut Task) -> Result<(), Status> {
        let request = StartTaskRequest { task: Some(task.config.clone()) };
        self.asked.lock().unwrap().push(task.id.clone());
        let answer = self.driver().start_task(request).await?.into_inner();
        task.handle = answer.handle;
        Ok(())
    }

    /// Starts a task of a new allocation.
    pub(crate) async fn start(&mut self, config: Value) -> Task {
        let mut task = self.prepare(config).await;
        self.try_start(&mut task)
            .await
            .unwrap_or_else(|status| panic!("{}\n{}", status.message(), self.plugin().stderr()));
        task
    }

    /// Returns the options of a task that runs a shell script in busybox. `options` take precedence.
    pub(crate) async fn shell(&self, script: &str, options: Value) -> Value {
        with_options(shell_in(&self.busybox().await, script), options)
    }

    /// Starts a shell in busybox.
    pub(crate) async fn sh(&mut self, script: &str) -> Task {
        let config = self.shell(script, json!({})).await;
        self.start(config).await
    }

    /// Runs a task to its end and destroys it. Returns the exit code, stdout and stderr.
    pub(crate) async fn run(&mut self, config: Value) -> (i32, String, String) {
        let task = self.start(config).await;
        self.finish_task(task).await
    }

    pub(crate) async fn finish_task(&self, task: Task) -> (i32, String, String) {
        let code = self.wait(&task).await.exit_code;
        let (out, err) = task.output().await;
        self.destroy(&task).await.unwrap();
        (code, out, err)
    }

    pub(crate) async fn try_wait(&self, id: &str) -> Result<WaitTaskResponse, Status> {
        let request = WaitTaskRequest { task_id: id.to_owned() };
        let mut driver = self.driver();
        tokio::time::timeout(patience(), driver.wait_task(request))
            .await
            .expect("WaitTask hangs")
            .map(tonic::Response::into_inner)
    }

    pub(crate) async fn wait(&self, task: &Task) -> ExitResult {
        self.try_wait(&task.id).await.unwrap().result.unwrap()
    }

    pub(crate) async fn stop(&self, task: &Task, timeout: Duration, signal: &str) -> Result<(), Status> {
        let timeout = Some(prost_types::Duration::try_from(timeout).unwrap());
        let request = StopTaskRequest { task_id: task.id.clone(), timeout, signal: signal.to_owned() };
        self.driver().stop_task(request).await.map(drop)
    }

    pub(crate) async fn destroy(&self, task: &Task) -> Result<(), Status> {
        self.destroy_with(task, true).await
    }

    pub(crate) async fn destroy_with(&self, task: &Task, force: bool) -> Result<(), Status> {
        self.driver().destroy_task(DestroyTaskRequest { task_id: task.id.clone(), force }).await.map(drop)
    }

    pub(crate) async fn inspect(&self, id: &str) -> Result<InspectTaskResponse, Status> {
        self.driver().inspect_task(InspectTaskRequest { task_id: id.to_owned() }).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn attribute(&self, task: &Task, name: &str) -> String {
        self.inspect(&task.id).await.unwrap().driver.unwrap().attributes[name].clone()
    }

    /// Returns the path of a task's record, and its content: the first line, with the last of the states that follow.
    pub(crate) async fn record(&self, task: &Task) -> (PathBuf, Value) {
        let path = self.dir.join("run/tasks").join(format!("{}.json", self.attribute(task, "container_id").await));
        let record = read_record(&path);
        (path, record)
    }

    pub(crate) async fn signal(&self, task: &Task, signal: &str) -> Result<(), Status> {
        let request = SignalTaskRequest { task_id: task.id.clone(), signal: signal.to_owned() };
        self.driver().signal_task(request).await.map(drop)
    }
}

impl Task {
    /// Returns stdout and stderr after both have ended.
    pub(crate) async fn output(&self) -> (String, String) {
        for stream in [&self.stdout, &self.stderr] {
            assert!(stream.wait_for_end(patience()).await.is_some(), "no end of the task's output");
        }
        (self.stdout.text(), self.stderr.text())
    }

    /// Waits until the task has written `text`.
    pub(crate) async fn says(&self, text: &str) {
        super::eventually(&format!("output {text:?}"), async || {
            let seen = self.stdout.text();
            if seen.contains(text) { Ok(()) } else { Err(seen) }
        })
        .await;
    }
}

/// Returns the options of a task that runs a shell script in this image.
pub(crate) fn shell_in(image: &str, script: &str) -> Value {
    json!({"image": image, "command": "/bin/sh", "args": ["-c", script]})
}

/// Returns `config` with these options added or replaced.
pub(crate) fn with_options(mut config: Value, options: Value) -> Value {
    let Value::Object(options) = options else { panic!("{options} is no object") };
    options.into_iter().for_each(|(name, value)| config[name] = value);
    config
}

/// What of a configuration a schema knows.
fn known(spec: Option<&Spec>, config: &Value) -> Option<Value> {
    use nomad_driver_shim::pb::hclspec::spec::Block;
    match (spec?.block.as_ref()?, config) {
        (Block::Object(object), Value::Object(given)) => {
            let keep =
                |(key, value): (&String, &Value)| Some((key.clone(), known(Some(object.attributes.get(key)?), value)?));
            Some(Value::Object(given.iter().filter_map(keep).collect()))
        }
        (Block::BlockValue(block), value) => known(block.nested.as_deref(), value),
        (Block::Default(default), value) => known(default.primary.as_deref(), value),
        (_, value) => Some(value.clone()),
    }
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            from.iter().for_each(|(key, value)| merge(into.entry(key).or_insert(Value::Null), value));
        }
        (into, from) => *into = from.clone(),
    }
}

pub(crate) fn read_record(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut record = lines[0].clone();
    if let [_, .., state] = &lines[..] {
        record["state"] = state.clone();
    }
    record
}
