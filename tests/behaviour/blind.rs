//! A plugin that can't inspect the host, for lack of descriptors, considers nothing gone: objects that it can't see
//! stay as they are.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use libc::{SIGCONT, SIGKILL, SIGSTOP};
use nomad_driver_shim::{
    host::{Plugin, encode},
    pb::{
        base::{ConfigSchemaRequest, SetConfigRequest},
        driver::{InitRequest, StartTaskRequest, WaitTaskRequest},
    },
    process::{self, PidFd},
};
use serde_json::{Value, json};

use crate::support::{
    Env, EnvOptions, Task, eventually, leak, patience,
    wrapped_runtime::{Detour, WrappedRuntime},
};

/// Sets the soft limit on the descriptors of a process.
fn limit_descriptors(pid: u32, limit: &str) {
    let status = std::process::Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &format!("--nofile={limit}:")])
        .status()
        .unwrap();
    assert!(status.success());
}

/// Longer than one search for a shim lasts.
const SHORTAGE: Duration = Duration::from_secs(7);

/// A plugin runs out of descriptors at some point of its start, and gets more a while later. It finds its task.
async fn recovered_after_a_shortage(spare: usize) {
    // Objects that could not be removed during the shortage are removed soon after it.
    let config = json!({"state": {"grace": "1s"}});
    let mut env = Env::with(EnvOptions { config, ..EnvOptions::default() }).await;
    let task = env.sh("sleep 600").await;
    let pid = env.attribute(&task, "pid").await;
    env.kill_plugin().await;
    // This plugin has a directory of its own for its socket: in a shared directory, other plugins remove the socket of
    // a killed plugin.
    let plugin = Plugin::launch(env.launch_mut()).await.unwrap();
    let schema = plugin.base().config_schema(ConfigSchemaRequest {}).await.unwrap().into_inner();
    let msgpack_config = encode(schema.spec.as_ref(), &env.config).unwrap();
    plugin.base().set_config(SetConfigRequest { msgpack_config, ..Default::default() }).await.unwrap();
    let number = plugin.pid().unwrap();
    let open = fs::read_dir(format!("/proc/{number}/fd")).unwrap().count();
    limit_descriptors(number, &(open + spare).to_string());
    let began = Instant::now();
    plugin.driver().init(InitRequest {}).await.unwrap();
    tokio::time::sleep(SHORTAGE.saturating_sub(began.elapsed())).await;
    limit_descriptors(number, "1024");
    env.plugin = Some(plugin);
    let recovered = env.recover(&task).await;
    let said = env.plugin().stderr();
    recovered.unwrap_or_else(|status| panic!("{spare} descriptors to spare: {}\n{said}", status.message()));
    assert_eq!(env.attribute(&task, "pid").await, pid, "{spare} descriptors to spare\n{said}");
    assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n");
    assert!(!said.contains("could not read a task record"), "{spare} descriptors to spare\n{said}");
    env.destroy(&task).await.unwrap();
    eventually("nothing is left", async || {
        let left = leak::while_alive(&env).await;
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    // The next plugin removes the remains of probes.
    env.kill_plugin().await;
    env.start_plugin().await;
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_task_is_lost_to_a_shortage_of_descriptors() {
    futures_util::future::join_all((1..=12).map(recovered_after_a_shortage)).await;
}

/// The limit below which `spare` descriptor numbers of a process are free. The process may have open descriptors above
/// the limit.
fn limit_with(pid: u32, spare: usize) -> usize {
    let fds = leak::entries(Path::new(&format!("/proc/{pid}/fd")));
    let open: BTreeSet<usize> = fds.iter().map(|name| name.parse().unwrap()).collect();
    (0..).filter(|number| !open.contains(number)).nth(spare).unwrap()
}

/// A node whose runtime can be made to wait, and the means to start tasks on it.
struct Created {
    env: Env,
    runtime: WrappedRuntime,
    config: Value,
    plugin: u32,
}

impl Created {
    async fn new(runtime: &str) -> Self {
        let wait = "while [ -e $dir/armed ]; do sleep 0.02; done";
        let detour = Detour { verb: "create", first: ":", then: wait };
        let runtime = WrappedRuntime::under_its_own_name(runtime, &detour);
        let config = runtime.configure(json!({"shim": {"pool": 2}}));
        let mut env = Env::with(EnvOptions { config, ..EnvOptions::default() }).await;
        let config = json!({"image": env.busybox().await, "command": "/bin/sleep", "args": ["600"]});
        // After this task, the image is in the store and shims are idle in the pool.
        assert_eq!(env.run(json!({"image": config["image"], "command": "/bin/true"})).await.0, 0);
        let plugin = env.plugin().pid().unwrap();
        Self { env, runtime, config, plugin }
    }

    /// Starts a task. The shortage begins before the runtime creates the container, and the plugin learns of the
    /// container when the container's process waits at the FIFO already. Returns the error of a start that was refused.
    async fn start(&mut self, shortage: impl AsyncFnOnce(u32)) -> (Task, Option<String>) {
        let mut task = self.env.prepare(self.config.clone()).await;
        self.runtime.arm();
        let (mut driver, request) = (self.env.driver(), StartTaskRequest { task: Some(task.config.clone()) });
        let answer = tokio::spawn(async move { driver.start_task(request).await });
        self.runtime.called().await;
        self.runtime.forget_call();
        shortage(self.plugin).await;
        let stopped = PidFd::open(self.plugin).unwrap();
        stopped.signal(SIGSTOP);
        self.runtime.disarm();
        let bundles = self.env.dir.join("run/bundles");
        eventually("the container is created", async || {
            let is_created = |name: &String| bundles.join(name).join("init.pid").exists();
            if leak::entries(&bundles).iter().any(is_created) { Ok(()) } else { Err("no pid file") }
        })
        .await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        stopped.signal(SIGCONT);
        match answer.await.unwrap() {
            Ok(answer) => {
                task.handle = answer.into_inner().handle;
                (task, None)
            }
            Err(status) => (task, Some(status.message().to_owned())),
        }
    }

    /// After the shortage, the task runs, or runs when its start is repeated.
    async fn check(&self, mut task: Task, refused: Option<String>, scene: &str) {
        if let Some(refused) = refused {
            let is_timeout = refused.contains("no answer") || refused.contains("did not complete");
            assert!(!is_timeout, "{scene}: {refused}");
            let again = self.env.try_start(&mut task).await;
            again.unwrap_or_else(|again| panic!("{scene}: {refused}, then {}", again.message()));
        }
        assert_eq!(self.env.exec_text(&task, "echo alive").await, "alive\n", "{scene}");
        self.env.destroy(&task).await.unwrap();
    }
}

/// However few descriptors are left when a container has been created, its start succeeds or is refused. A process that
/// runs already must not be started again: `runc start` would wait for it forever.
#[tokio::test(flavor = "multi_thread")]
async fn a_created_container_starts_with_few_descriptors_or_is_refused() {
    for runtime in ["crun", "runc"] {
        let mut node = Created::new(runtime).await;
        for spare in 0..=8 {
            let shortage = async |plugin| limit_descriptors(plugin, &limit_with(plugin, spare).to_string());
            let (task, refused) = node.start(shortage).await;
            limit_descriptors(node.plugin, "1024");
            node.check(task, refused, &format!("{runtime}, {spare} descriptors to spare")).await;
        }
        node.env.finish().await;
    }
}

/// A shim dies while the plugin can't open the process of the shim's task. The task is not reported as killed as long as
/// it runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_reported_as_killed_only_when_it_is_dead() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let pid: u32 = env.attribute(&task, "pid").await.parse().unwrap();
    let process = PidFd::open(pid).unwrap();
    let shim = PidFd::open(process::parent_of(pid).unwrap()).unwrap();
    let plugin = env.plugin().pid().unwrap();
    let (mut driver, task_id) = (env.driver(), task.id.clone());
    let mut waiting = tokio::spawn(async move { driver.wait_task(WaitTaskRequest { task_id }).await });
    limit_descriptors(plugin, &limit_with(plugin, 0).to_string());
    shim.signal(SIGKILL);
    // The plugin may get a descriptor when the connection to the shim is closed, and can kill the task then.
    let early = tokio::time::timeout(Duration::from_secs(2), &mut waiting).await;
    assert!(early.is_err() || process.has_ended(), "{early:?}");
    limit_descriptors(plugin, "1024");
    let answer = match early {
        Ok(answer) => answer,
        Err(_) => tokio::time::timeout(patience(), waiting).await.unwrap(),
    };
    let answer = answer.unwrap().unwrap().into_inner();
    assert!(process.has_ended());
    assert_eq!(answer.result.unwrap().exit_code, 137);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// When bundles can't be listed, an unrecorded shim may hold a container. The plugin must neither give this shim to the
/// next task nor shut it down when the plugin ends.
#[tokio::test(flavor = "multi_thread")]
async fn no_shim_is_taken_over_when_bundles_can_not_be_listed() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let (path, _) = env.record(&task).await;
    let pid = env.attribute(&task, "pid").await;
    env.kill_plugin().await;
    fs::remove_file(path).unwrap();
    env.set_var("NOMAD_DRIVER_SHIM_BLIND", Some("bundles"));
    env.start_plugin().await;
    eventually("the bundles are looked for", async || {
        let said = env.plugin().stderr();
        if said.contains("a failpoint let a look-up fail") { Ok(()) } else { Err(said) }
    })
    .await;
    // The other task has a shim of its own, not the shim that has a container already.
    let other = env.sh("sleep 600").await;
    assert_ne!(env.record(&other).await.1["shim"], shim_of(&env, &pid), "two tasks share a shim");
    env.destroy(&other).await.unwrap();
    // The plugin is shut down, not killed, so that the idle shims of its pool end with it.
    env.plugin.take().unwrap().shut_down().await;
    env.set_var("NOMAD_DRIVER_SHIM_BLIND", None);
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(env.attribute(&task, "pid").await, pid);
    assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// The name of the shim that a container's process is a child of.
fn shim_of(env: &Env, pid: &str) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let parent = stat.rsplit(") ").next().unwrap().split(' ').nth(1).unwrap().to_owned();
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let cwd = fs::read_link(format!("/proc/{parent}/cwd")).unwrap();
    assert!(cwd.starts_with(env.dir.join("run/shims")), "{}", cwd.display());
    name(&cwd)
}

/// The garbage collection can't list the objects, and so can't know which ones are unused.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_reaped_when_it_can_not_be_listed() {
    for blind in ["shims", "bundles", "runtimes"] {
        let config = json!({"state": {"grace": "100ms"}});
        let mut env = Env::with(EnvOptions { config, ..EnvOptions::default() }).await;
        let task = env.sh("sleep 600").await;
        let (path, _) = env.record(&task).await;
        env.kill_plugin().await;
        fs::remove_file(path).unwrap();
        env.set_var("NOMAD_DRIVER_SHIM_BLIND", Some(blind));
        env.start_plugin().await;
        eventually("the reaper says that it can't look", async || {
            let said = env.plugin().stderr();
            let told = said.contains("could not remove an unused item") && said.contains(&format!("/{blind}"));
            if told { Ok(()) } else { Err(said) }
        })
        .await;
        assert!(!env.plugin().stderr().contains("removed an unused item"), "{}", env.plugin().stderr());
        let bundles = leak::entries(&env.dir.join("run/bundles"));
        assert_eq!(bundles.len(), 1, "{blind}: {bundles:?}");
        env.kill_plugin().await;
        env.set_var("NOMAD_DRIVER_SHIM_BLIND", None);
        env.start_plugin().await;
        // The task is recovered by its handle, or it has been removed already, because no agent has confirmed it for
        // longer than the grace period.
        drop(env.recover(&task).await);
        drop(env.destroy(&task).await);
        eventually("it goes once the reaper sees it", async || {
            let left = leak::entries(&env.dir.join("run/bundles"));
            if left.is_empty() { Ok(()) } else { Err(left) }
        })
        .await;
        env.finish().await;
    }
}
