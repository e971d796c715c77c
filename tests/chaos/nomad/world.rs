//! A node with a real agent and all that it needs, and the playing of steps on it.

use std::{
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use nomad_driver_shim::host::Alloc;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use super::{
    agent::Agent,
    api::Api,
    events::AllocView,
    job::{self, TASK, job},
    model::Model,
    plan,
    plan::Step,
    record::Record,
};
use crate::{
    ground::{Ground, Journal as _, Site},
    observe,
    step::{OciRuntime, TaskNumber, Work},
    support::{Env, leak, patience},
    world::{Outcome, Setting},
};

/// Time limit for all to be in order again after the last fault: Nomad asks a driver that was gone again only after 5
/// to 40 s.
const SETTLED: Duration = Duration::from_secs(180);
/// Time limit for Nomad to collect its garbage and for the driver to remove its remains.
const SWEPT: Duration = Duration::from_secs(60);
/// Interval between two looks at the live containers.
const LOOK: Duration = Duration::from_millis(100);
/// Interval between two readings of Nomad's events. Nomad keeps only ten events for each task.
const POLL: Duration = Duration::from_millis(300);
/// Time limit for the last lines of a log to be written.
const LATE_LINES: Duration = Duration::from_secs(5);

/// The parts of the agent whose warnings are shown: this driver's plugin, and Nomad's code that runs its tasks.
const OURS: [&str; 2] = ["driver_mgr.nomad-driver-shim", "task_runner"];

/// A node with a real agent.
pub(super) struct World {
    pub ground: Arc<Ground>,
    pub record: Arc<Record>,
    env: Mutex<Env>,
    agent: Mutex<Agent>,
    alloc_dir: PathBuf,
    api: Api,
    /// The beginning of the run in nanoseconds since 1970, as Nomad counts.
    began: u64,
}

/// Plays steps on a new node, until all steps are done or there is a violation.
pub(super) async fn play(binary: PathBuf, setting: Setting<'_>, steps: &[Step]) -> Outcome {
    let world = World::start(binary, setting).await;
    let watches = world.watch();
    for (index, step) in steps.iter().enumerate() {
        world.record.history.note(&format!("step {index}: {step}"));
        world.step(*step).await;
        if !world.is_right() {
            break;
        }
    }
    // A part of a history may lack the `Clear` step at its end.
    if steps.last() != Some(&Step::Clear) && world.is_right() {
        world.step(Step::Clear).await;
    }
    for watch in watches {
        watch.abort();
        let _ = watch.await;
    }
    world.finish().await
}

impl World {
    /// Starts a node, and waits until its agent is ready.
    pub(super) async fn start(binary: PathBuf, setting: Setting<'_>) -> Arc<Self> {
        let (site, mut env) = Site::prepare(setting).await;
        let mut agent = Agent::new(binary, &mut env);
        let record = Arc::new(Record::new(&site, Model::ignoring(setting.ignored)));
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
        agent.start().await;
        Arc::new(Self {
            ground: Ground::new(site, record.clone()),
            record,
            env: Mutex::new(env),
            alloc_dir: agent.alloc_dir(),
            api: agent.api.clone(),
            agent: Mutex::new(agent),
            began: u64::try_from(now).unwrap(),
        })
    }

    /// Watches the live containers and what Nomad reports, until the returned tokio tasks are aborted.
    pub(super) fn watch(self: &Arc<Self>) -> [tokio::task::JoinHandle<()>; 2] {
        let record = self.record.clone();
        let kernel = tokio::spawn(async move {
            loop {
                let inits = tokio::task::block_in_place(|| observe::inits(&record.namespace));
                record.model().seen(&inits);
                tokio::time::sleep(LOOK).await;
            }
        });
        let world = self.clone();
        let nomad = tokio::spawn(async move {
            loop {
                // While there is no agent, there is no answer.
                let _ = world.poll().await;
                tokio::time::sleep(POLL).await;
            }
        });
        [kernel, nomad]
    }

    pub(super) fn is_right(&self) -> bool {
        self.record.model().violations().is_empty()
    }

    /// Reads what Nomad reports of all tasks.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub(super) async fn poll(&self) -> Result<(), String> {
        let answer = self.api.get("allocations?task_states=true").await?;
        let mut env = self.env.lock().await;
        for entry in answer.as_array().into_iter().flatten() {
            let Some(number) = job::number(&self.record.namespace, entry["JobID"].as_str().unwrap_or_default()) else {
                continue;
            };
            let view = AllocView::read(entry, self.began);
            if env.allocs.iter().all(|alloc| alloc.id != view.id) {
                env.allocs.push(Alloc { id: view.id.clone(), dir: self.alloc_dir.join(&view.id) });
            }
            let news = self.record.model().told(number, &view);
            for event in news {
                self.record.note(&format!("task {number}, at {:.3}: {}", event.then.as_secs_f64(), event.kind));
            }
        }
        Ok(())
    }

    async fn step(self: &Arc<Self>, step: Step) {
        match step {
            Step::Run { task, work, runtime } => self.run(task, work, runtime).await,
            Step::Stop { task } => self.stop(task, false).await,
            Step::Agent { how, away_ms } => self.agent_goes(how, Duration::from_millis(away_ms)).await,
            Step::Stretch { call, before_ms, after_ms } => {
                self.ground.site.wrappers.stretch(call, before_ms, after_ms);
            }
            Step::Fault(fault) => {
                // Nomad starts a plugin again by itself, but not at once.
                let deadline = Instant::now() + patience();
                while self.record.plugin().is_none() && Instant::now() < deadline {
                    tokio::time::sleep(LOOK).await;
                }
                self.ground.strike(fault).await;
            }
            Step::Pause { ms } => tokio::time::sleep(Duration::from_millis(ms)).await,
            Step::Settle => self.settle().await,
            Step::Clear => self.clear().await,
        }
    }

    /// Registers a job.
    pub(super) async fn run(&self, number: TaskNumber, work: Work, runtime: OciRuntime) {
        self.record.model().add(number, work);
        let body = job(&self.record.namespace, number, work, runtime, &self.ground.site.image);
        self.ask(&format!("the registration of job {number}"), async || self.api.put("jobs", &body).await).await;
    }

    /// Stops a job.
    pub(super) async fn stop(&self, number: TaskNumber, purge: bool) {
        // A part of a history may name a task that it does not start.
        if self.record.model().tasks().iter().all(|(known, _)| *known != number) {
            return;
        }
        self.record.model().unwanted(number);
        let path = format!("job/{}?purge={purge}", job::id(&self.record.namespace, number));
        self.ask(&format!("the end of job {number}"), async || match self.api.delete(&path).await {
            // The job was deleted by an earlier request whose answer was lost.
            Err(text) if text.starts_with("404") => Ok(Value::Null),
            answer => answer,
        })
        .await;
    }

    /// Repeats a request to the agent until it succeeds: the agent may be electing itself as leader.
    async fn ask(&self, what: &str, request: impl AsyncFn() -> Result<Value, String>) {
        let deadline = Instant::now() + patience();
        loop {
            match request().await {
                Ok(_) => return,
                Err(error) if Instant::now() > deadline => {
                    return self.record.model().violated(format!("{what} is not answered: {error}"));
                }
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    async fn agent_goes(&self, how: plan::Agent, away: Duration) {
        self.record.fault_begins();
        let mut agent = self.agent.lock().await;
        match how {
            plan::Agent::Stopped => {
                if let Some(process) = agent.process() {
                    process.signal(libc::SIGSTOP);
                    tokio::time::sleep(away).await;
                    process.signal(libc::SIGCONT);
                }
            }
            plan::Agent::Terminated => {
                if !agent.end(libc::SIGTERM).await {
                    self.record.note("the agent had to be killed after SIGTERM");
                }
            }
            plan::Agent::Killed | plan::Agent::KilledWithPlugin => {
                self.record.model().agent_died();
                let plugins =
                    observe::victims(crate::step::Target::Plugin, &self.record.dir, &self.record.namespace, 0);
                agent.end(libc::SIGKILL).await;
                for plugin in plugins.iter().filter(|_| how == plan::Agent::KilledWithPlugin) {
                    if let Ok(process) = nomad_driver_shim::process::PidFd::open(plugin.pid) {
                        process.signal(libc::SIGKILL);
                    }
                }
            }
        }
        if how != plan::Agent::Stopped {
            tokio::time::sleep(away).await;
            agent.launch();
        }
        drop(agent);
        self.record.fault_ends();
        self.record.struck(Some(how.kind().to_owned()));
    }

    /// Returns what is not yet as it must be.
    pub(super) async fn unrest(&self) -> Vec<String> {
        if let Err(error) = self.poll().await {
            return vec![format!("the agent does not answer: {error}")];
        }
        let inits = tokio::task::block_in_place(|| observe::inits(&self.record.namespace));
        self.record.model().unrest(&inits)
    }

    /// Waits for the end of all faults, and then, up to a time limit, until all is as it must be.
    pub(super) async fn settle(&self) {
        self.ground.outlast().await;
        let deadline = Instant::now() + SETTLED;
        let unrest = loop {
            let unrest = self.unrest().await;
            // A violation says more than a list of what is not yet in order.
            if unrest.is_empty() || !self.is_right() {
                break Vec::new();
            }
            if Instant::now() > deadline {
                break unrest;
            }
            tokio::time::sleep(POLL).await;
        };
        unrest.into_iter().for_each(|what| self.record.model().violated(what));
        let tasks = self.record.model().tasks();
        for (number, work) in tasks {
            self.check(number, work).await;
        }
        self.record.model().figures.settled += 1;
        self.record.note("settled");
    }

    /// Checks a task's log, starts and outcome with the model.
    async fn check(&self, number: TaskNumber, work: Work) {
        let Some(alloc) = self.record.model().alloc(number) else { return };
        let shared = self.alloc_dir.join(alloc).join("alloc");
        let started = fs::read_to_string(shared.join(format!("data/started-{number}"))).unwrap_or_default();
        self.record.model().witness(number, &started);
        self.record.model().outcome(number);
        let deadline = Instant::now() + LATE_LINES;
        let wrong = loop {
            let log = fs::read_to_string(shared.join(format!("logs/{TASK}.stdout.0"))).unwrap_or_default();
            let wrong = self.record.model().log_faults(number, &log, work != Work::Service);
            if wrong.is_empty() || Instant::now() > deadline {
                break wrong;
            }
            tokio::time::sleep(LOOK).await;
        };
        let mut model = self.record.model();
        model.figures.logs += 1;
        model.figures.logs_whole += u32::from(wrong.is_empty());
        wrong.into_iter().for_each(|what| model.violated(what));
    }

    /// Ends all jobs, and waits, up to a time limit, until nothing of them is left.
    pub(super) async fn clear(&self) {
        self.ground.outlast().await;
        let tasks = self.record.model().tasks();
        for (number, _) in &tasks {
            self.stop(*number, false).await;
        }
        self.settle().await;
        for (number, _) in &tasks {
            self.stop(*number, true).await;
        }
        let deadline = Instant::now() + SWEPT;
        let left = loop {
            // A request that comes before the purge is done collects too little, so it is repeated.
            let _ = self.api.put("system/gc", &json!({})).await;
            let mut left = leak::entries(&self.alloc_dir);
            left.iter_mut().for_each(|name| name.insert_str(0, "allocation of Nomad's: "));
            let env = self.env.lock().await;
            match self.record.plugin() {
                Some(plugin) => left.extend(leak::beside(&env, plugin, Duration::from_secs(2)).await),
                None => left.push("there is no plugin".to_owned()),
            }
            // Files that the test itself keeps in these directories are not counted.
            left.retain(|line| !line.contains(".filler"));
            if left.is_empty() || Instant::now() > deadline {
                break left;
            }
        };
        let mut model = self.record.model();
        model.figures.cleared += 1;
        model.figures.left.extend(left.iter().cloned());
        left.into_iter().for_each(|line| model.violated(format!("left over: {line}")));
        model.forget();
        drop(model);
        self.record.note("cleared");
    }

    /// Ends the agent and the node, and returns the outcome of the run.
    pub(super) async fn finish(self: Arc<Self>) -> Outcome {
        self.ground.outlast().await;
        let mut agent = self.agent.lock().await;
        let came = agent.end(libc::SIGTERM).await;
        let mut env = self.env.lock().await;
        let is_right = self.is_right();
        // A plugin that was killed has left its socket behind, as any killed plugin does.
        for name in leak::entries(&env.dir).into_iter().filter(|name| name.starts_with("plugin")) {
            let _ = fs::remove_file(env.dir.join(name));
        }
        let left = if is_right { leak::afterwards_within(&env, SWEPT).await } else { Vec::new() };
        self.ground.site.clean(&mut env);
        // Nomad's warnings about itself are of no help, so they are left out.
        for line in agent.log().lines().filter(|line| OURS.iter().any(|module| line.contains(module))) {
            self.record.history.listen_to(line);
        }
        if !is_right {
            self.record.note(&format!("the agent's log is kept: {}", agent.keep_log().display()));
        }
        agent.remove();
        let mut model = self.record.model();
        if !came && is_right {
            model.violated("the agent does not leave after SIGTERM".to_owned());
        }
        model.figures.left.extend(left.iter().cloned());
        left.into_iter().for_each(|line| model.violated(format!("left over after the plugin: {line}")));
        eprintln!("Nomad itself gave up {} tasks and let go of {} (docs/chaos.md)", model.given_up, model.let_go);
        Outcome {
            violations: model.violations().to_vec(),
            figures: std::mem::take(&mut model.figures),
            history: self.record.history.lines(),
            warnings: self.record.history.warnings(),
        }
    }
}
