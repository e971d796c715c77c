//! A node with all that it needs, and the playing of steps on it.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nomad_driver_shim::{
    host::{Alloc, encode},
    ids::random_hex,
    pb::driver::TaskConfigSchemaRequest,
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{
    agent::{Runner, Wish},
    faults,
    ground::{Ground, Journal as _, Site},
    model::{Hit, Model},
    network::Network,
    node::Node,
    observe,
    plan::Mode,
    report::Figures,
    step::{Fault, OciRuntime, Step, TaskNumber, Work},
    support::{leak, patience},
    task::{TaskFiles, script},
};

/// Time limit for all to be in order again after the last fault, on a machine that does other work as well.
fn settled() -> Duration {
    patience()
}
/// Time limit for the removal of remains that no agent has confirmed. It is longer than the grace period.
fn swept() -> Duration {
    patience() / 2
}
/// Interval between two looks at the live containers.
const LOOK: Duration = Duration::from_millis(100);

/// A node under test.
pub(crate) struct World {
    pub node: Arc<Node>,
    mode: Mode,
    runners: Mutex<BTreeMap<TaskNumber, Arc<Runner>>>,
    allocs: Mutex<HashMap<usize, (Alloc, Option<Network>)>>,
    ground: Arc<Ground>,
    schema: Option<nomad_driver_shim::pb::hclspec::Spec>,
    running: Mutex<JoinSet<()>>,
}

/// The result of a run.
pub(crate) struct Outcome {
    pub violations: Vec<String>,
    pub figures: Figures,
    pub history: Vec<String>,
    /// The last warnings of the plugins.
    pub warnings: Vec<String>,
}

/// The settings of a node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setting<'a> {
    pub mode: Mode,
    /// A step of the driver that is left out as a planted defect.
    pub plant: Option<&'a str>,
    /// Texts of known defects, which are ignored.
    pub ignored: &'a [String],
}

/// Plays steps on a new node, until all steps are done or there is a violation.
pub(crate) async fn play(setting: Setting<'_>, steps: &[Step]) -> Outcome {
    let (world, supervisor) = World::start(setting).await;
    let mode = setting.mode;
    let watch = tokio::spawn(watch(world.node.clone(), mode));
    for (index, step) in steps.iter().enumerate() {
        world.node.note(format!("step {index}: {step}"));
        world.step(*step).await;
        if !world.node.model().violations().is_empty() {
            break;
        }
    }
    // A part of a history may lack the `Clear` step at its end.
    if steps.last() != Some(&Step::Clear) && world.node.model().violations().is_empty() {
        world.step(Step::Clear).await;
    }
    watch.abort();
    let _ = watch.await;
    world.finish(supervisor).await
}

/// Checks all the time that no task has two live containers.
async fn watch(node: Arc<Node>, mode: Mode) {
    // Processes in a sandbox can't be seen from outside of it.
    if mode == Mode::Gvisor {
        return;
    }
    loop {
        let inits = tokio::task::block_in_place(|| observe::inits(&node.namespace));
        node.model().seen(&inits);
        tokio::time::sleep(LOOK).await;
    }
}

impl World {
    async fn start(setting: Setting<'_>) -> (Arc<Self>, tokio::task::JoinHandle<()>) {
        let (site, env) = Site::prepare(setting).await;
        let (node, supervisor) = Node::start(env, Model::ignoring(setting.ignored));
        let link = node.link().await.expect("the first plugin comes up");
        let schema = link.driver.clone().task_config_schema(TaskConfigSchemaRequest {}).await.unwrap().into_inner();
        let world = Self {
            mode: setting.mode,
            runners: Mutex::default(),
            allocs: Mutex::default(),
            ground: Ground::new(site, node.clone()),
            schema: schema.spec,
            running: Mutex::default(),
            node,
        };
        (Arc::new(world), supervisor)
    }

    async fn step(self: &Arc<Self>, step: Step) {
        match step {
            Step::Start { task, work, runtime } => self.start_task(task, work, runtime).await,
            Step::Stop { task, timeout_ms } => self.wish(task, Wish::Stop(Duration::from_millis(timeout_ms))),
            Step::Destroy { task, force: true } => self.wish(task, Wish::Destroy),
            Step::Destroy { task, .. }
            | Step::Signal { task }
            | Step::Exec { task, .. }
            | Step::Stats { task }
            | Step::Inspect { task }
            | Step::Recover { task } => {
                if let Some(runner) = self.runner(task) {
                    let node = self.node.clone();
                    self.ground.lasting_task(async move { runner.command(&node, step).await });
                }
            }
            Step::AgentRestart { away_ms, plugin } => {
                let now = self.node.now();
                self.node.model().fault_begins(now);
                self.node.restart_agent(Duration::from_millis(away_ms), plugin).await;
                let now = self.node.now();
                let mut model = self.node.model();
                model.fault_ends(now);
                model.figures.struck(format!("death of the agent, plugin {plugin:?}").to_lowercase());
            }
            Step::Stretch { call, before_ms, after_ms } => self.ground.site.wrappers.stretch(call, before_ms, after_ms),
            Step::Fault(Fault::Reboot { run_dir_stays }) => self.reboot(run_dir_stays).await,
            Step::Fault(fault) => {
                // A shortage strikes the plugin that serves the agent, so a plugin that is just being started is waited
                // for.
                let _ = self.node.link().await;
                self.ground.strike(fault).await;
            }
            Step::Pause { ms } => tokio::time::sleep(Duration::from_millis(ms)).await,
            Step::Settle => self.settle().await,
            Step::Clear => self.clear().await,
        }
    }

    fn runner(&self, task: TaskNumber) -> Option<Arc<Runner>> {
        self.runners.lock().unwrap_or_else(PoisonError::into_inner).get(&task).cloned()
    }

    fn all_runners(&self) -> Vec<Arc<Runner>> {
        self.runners.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn wish(&self, task: TaskNumber, wish: Wish) {
        // A part of a history may name a task that it does not start.
        if let Some(runner) = self.runner(task) {
            runner.wish(wish);
        }
    }

    /// Reboots the node as a power cut does: everything ends, and a new agent starts.
    async fn reboot(&self, run_dir_stays: bool) {
        self.node.model().hit(&Hit::All);
        let ground = self.ground.clone();
        self.node
            .reboot(move |env| {
                faults::end_everything(env);
                faults::unmount_all(env);
                if !run_dir_stays {
                    ground.site.disks[0].forget();
                }
                let boot = random_hex(8);
                env.set_var("NOMAD_DRIVER_SHIM_BOOT_ID", Some(&boot));
            })
            .await;
        self.node.fault_begins();
        self.node.fault_ends();
        self.node.struck(Some(Fault::Reboot { run_dir_stays }.kind()));
    }

    async fn start_task(self: &Arc<Self>, number: TaskNumber, work: Work, runtime: OciRuntime) {
        let (alloc, network) = self.alloc(number / 2).await;
        let dirs = alloc.create_task(if number.is_multiple_of(2) { "even" } else { "odd" }).unwrap();
        let mut config = json!({"image": self.ground.site.image, "command": "/bin/sh", "args": ["-c", script(work)]});
        config["runtime"] = Value::from(match runtime {
            OciRuntime::Crun => "crun",
            OciRuntime::Runc => "runc",
            OciRuntime::Runsc => "runsc",
        });
        let encoded = encode(self.schema.as_ref(), &config).unwrap();
        let mut files = TaskFiles::new(number, dirs, &self.node.namespace, encoded);
        if self.mode == Mode::OwnLogs {
            files = files.without_collectors();
        }
        if let Some(path) = network {
            files = files.in_network(&path);
        }
        let runner = Runner::new(&self.node, files, work);
        self.runners.lock().unwrap_or_else(PoisonError::into_inner).insert(number, runner.clone());
        self.running.lock().unwrap_or_else(PoisonError::into_inner).spawn(runner.run());
    }

    async fn alloc(&self, number: usize) -> (Alloc, Option<PathBuf>) {
        let mut env = self.node.env.lock().await;
        let mut allocs = self.allocs.lock().unwrap_or_else(PoisonError::into_inner);
        let (alloc, network) = allocs.entry(number).or_insert_with(|| {
            let alloc = Alloc::create(&env.dir.join("allocs"), &format!("{}-{number}", env.namespace)).unwrap();
            env.allocs.push(alloc.clone());
            let network = (self.mode == Mode::Bridge).then(|| Network::new(&format!("chaos-{}", random_hex(6))));
            (alloc, network)
        });
        (alloc.clone(), network.as_ref().map(|network| network.path().to_owned()))
    }

    /// Waits for the end of all faults, and then, up to a time limit, until all is as it must be.
    async fn settle(&self) {
        self.ground.outlast().await;
        let deadline = self.node.now() + settled();
        let unrest = loop {
            let inits = match self.mode {
                Mode::Gvisor => None,
                _ => Some(tokio::task::block_in_place(|| observe::inits(&self.node.namespace))),
            };
            let unrest = self.node.model().unrest(inits.as_deref());
            if unrest.is_empty() || self.node.now() > deadline || !self.node.model().violations().is_empty() {
                break unrest;
            }
            tokio::time::sleep(LOOK).await;
        };
        unrest.into_iter().for_each(|what| self.node.model().violated(what));
        let runners = self.all_runners();
        for runner in runners.iter().filter(|runner| runner.running().is_some()) {
            runner.command(&self.node, Step::Exec { task: runner.files.number, code: 4 }).await;
            if let Some(((_, attempt), _)) = runner.running() {
                runner.files.started(attempt).await;
            }
            runner.files.check(&self.node).await;
        }
        self.node.model().figures.settled += 1;
        self.node.note("settled");
    }

    /// Ends all tasks, and waits, up to a time limit, until nothing of them is left.
    async fn clear(&self) {
        self.ground.outlast().await;
        for (runner, index) in self.all_runners().into_iter().zip(0..) {
            let wish = if index % 2 == 0 { Wish::Destroy } else { Wish::Stop(Duration::from_secs(5)) };
            runner.wish(wish);
        }
        self.settle().await;
        let mut running = std::mem::take(&mut *self.running.lock().unwrap_or_else(PoisonError::into_inner));
        let over = tokio::time::timeout(settled(), async { while running.join_next().await.is_some() {} });
        if over.await.is_err() {
            self.node.model().violated("tasks that were destroyed do not come to their end".to_owned());
        }
        self.node.own_plugin().await;
        let mut left = {
            let env = self.node.env.lock().await;
            leak::alive_within(&env, swept()).await
        };
        // Files that the test itself keeps in these directories are not counted.
        left.retain(|line| !line.contains(".filler"));
        self.forget_tasks().await;
        let mut model = self.node.model();
        model.figures.cleared += 1;
        model.figures.left.extend(left.iter().cloned());
        left.into_iter().for_each(|line| model.violated(format!("left over: {line}")));
        drop(model);
        self.node.note("cleared");
    }

    async fn forget_tasks(&self) {
        self.runners.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let allocs = std::mem::take(&mut *self.allocs.lock().unwrap_or_else(PoisonError::into_inner));
        for (alloc, _network) in allocs.into_values() {
            let _ = alloc.remove();
        }
    }

    async fn finish(self: Arc<Self>, supervisor: tokio::task::JoinHandle<()>) -> Outcome {
        self.ground.outlast().await;
        self.node.end();
        let _ = supervisor.await;
        self.running.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
        let plugin = self.node.env.lock().await.plugin.take();
        if let Some(plugin) = plugin {
            self.node.listen_to(&plugin);
            plugin.shut_down().await;
        }
        // A plugin that was killed before an agent could connect to it has left its socket behind, as any killed plugin
        // does.
        for name in leak::entries(&self.node.dir).into_iter().filter(|name| name.starts_with("plugin-")) {
            let _ = fs::remove_file(self.node.dir.join(name));
        }
        let failed = !self.node.model().violations().is_empty();
        let mut env = self.node.env.lock().await;
        let left = if failed { Vec::new() } else { leak::afterwards_within(&env, swept()).await };
        self.ground.site.clean(&mut env);
        drop(env);
        let mut model = std::mem::take(&mut *self.node.model());
        model.figures.left.extend(left.iter().cloned());
        left.into_iter().for_each(|line| model.violated(format!("left over after the plugin: {line}")));
        Outcome {
            violations: model.violations().to_vec(),
            figures: model.figures,
            history: self.node.history.lines(),
            warnings: self.node.history.warnings(),
        }
    }
}
