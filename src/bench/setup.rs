//! Makes the subjects ready to run tasks: reads the OCI spec that they share, starts plugins and looks for programs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{
    BenchError, Plan, SubjectKind, SubjectPlan, file,
    floor::Floor,
    job::{Job, UNTIL_STOPPED},
    lifecycle::{STEP_TIMEOUT, with_timeout},
    subject::{Backend, PluginBackend, RunningTasks, Subject, merged},
    template::Template,
};
use crate::{
    containerd::{Client, LeaseId},
    host::{HostError, PluginCommand},
    ids::random_hex,
    places::Places,
};

/// The name under which the benchmark starts this driver.
const DRIVER: &str = "shim";

/// The programs, directories and services that the benchmark uses.
#[derive(Debug, Clone)]
pub struct Workspace {
    /// The program of this driver.
    pub program: PathBuf,
    /// Directory for sockets, records and bundles. It belongs to this run, and its path is short because of the
    /// sockets.
    pub run: PathBuf,
    /// Directory for the allocations, and for the bundles of the subjects without a driver, on the disk that a node has
    /// them on. A daemon with another `/run`, such as dockerd, finds the allocations here as well.
    pub state: PathBuf,
    /// This driver's state directory with its image records and writable layers. It is kept after the run.
    pub driver_state: PathBuf,
    /// The configuration of this driver's plugin. Each plugin gets a run directory of its own below `run`.
    pub driver_config: Value,
    /// The path of containerd's socket.
    pub address: PathBuf,
    /// The namespace in containerd.
    pub namespace: String,
    /// Called after each task with the number of tasks, to show progress.
    pub on_progress: fn(u64),
}

impl Workspace {
    /// Returns the parent of the allocations' directories.
    pub(super) fn allocs(&self) -> PathBuf {
        self.state.join("allocs")
    }

    /// Starts this driver's plugin with a run directory called `name`. `config` is merged into its configuration.
    async fn launch_driver(
        &self,
        name: &str,
        config: &Value,
        image: &str,
        task: Value,
    ) -> Result<PluginBackend, BenchError> {
        let own = json!({ "state": { "run_dir": self.run.join(name) } });
        let config = merged(merged(self.driver_config.clone(), &own), config);
        PluginBackend::launch(&PluginCommand::with_name(&self.program, DRIVER), &config, image, task).await
    }
}

/// The specs and settings that all subjects of a run share.
pub(super) struct Setup<'a> {
    plan: &'a Plan,
    workspace: &'a Workspace,
    /// The spec with the seccomp profile as JSON, for runc.
    json: Template,
    /// The spec with the compiled seccomp filter, for crun.
    compiled: Template,
}

impl<'a> Setup<'a> {
    /// Reads the spec that this driver writes for a task.
    ///
    /// # Errors
    /// Fails when this driver can't start the task, or its specs for runc and crun differ.
    pub(super) async fn new(plan: &'a Plan, workspace: &'a Workspace) -> Result<Self, BenchError> {
        let json = template(plan, workspace, "runc").await?;
        let compiled = template(plan, workspace, "crun").await?;
        if json.hash() != compiled.hash() {
            return Err(BenchError::Precondition {
                subject: "driver".to_owned(),
                problem: "the spec that it writes for crun differs from the one for runc".to_owned(),
            });
        }
        Ok(Self { plan, workspace, json, compiled })
    }

    /// Returns the hash of the spec.
    pub(super) fn spec_hash(&self) -> String {
        self.json.hash()
    }

    /// Makes a subject ready to run tasks.
    pub(super) async fn open(&self, plan: &SubjectPlan) -> Result<Subject, BenchError> {
        let Self { workspace, plan: Plan { image, .. }, .. } = self;
        let dir = workspace.state.join(&plan.name);
        fs::create_dir_all(&dir).map_err(file(&dir))?;
        let failed = |source| BenchError::Step { subject: plan.name.clone(), doing: "get ready", source };
        let backend = match plan.kind {
            SubjectKind::Driver => {
                let plugin = workspace.launch_driver(&plan.name, &plan.config, image, plan.task.clone()).await?;
                Backend::Plugin(Box::new(plugin))
            }
            SubjectKind::Plugin => {
                let command = PluginCommand::new(plan.program.clone().unwrap_or_default());
                let plugin = PluginBackend::launch(&command, &plan.config, image, plan.task.clone()).await?;
                Backend::Plugin(Box::new(plugin))
            }
            SubjectKind::Containerd => {
                let client = Client::new(&workspace.address, &workspace.namespace, "overlayfs");
                let lease = LeaseId(format!("nomad-driver-shim-bench-{}", random_hex(6)));
                client.create_lease(&lease, None).await.map_err(|error| failed(Box::new(error)))?;
                Backend::Containerd { client, lease, template: self.json.clone() }
            }
            SubjectKind::Runc => self.runtime(plan, dir, "runc", Vec::new())?,
            SubjectKind::Crun => self.runtime(plan, dir, "crun", Vec::new())?,
            SubjectKind::Runsc => {
                let shared = format!("--shared-root={}", Places::gvisor_shared_root().display());
                self.runtime(plan, dir, "runsc", vec!["--network=none".to_owned(), shared])?
            }
            SubjectKind::Docker => self.engine(plan, "docker")?,
            SubjectKind::Podman => self.engine(plan, "podman")?,
            SubjectKind::Floor => {
                let template = self.compiled.clone();
                let floor = Floor::new(template.seccomp_filter.as_deref()).map_err(failed)?;
                Backend::Floor { dir, template, floor: Box::new(floor), running: RunningTasks::default() }
            }
        };
        Ok(Subject { name: plan.name.clone(), backend })
    }

    fn runtime(
        &self,
        plan: &SubjectPlan,
        dir: PathBuf,
        program: &str,
        flags: Vec<String>,
    ) -> Result<Backend, BenchError> {
        let (binary, template) = (installed(plan, program)?, self.json.clone());
        Ok(Backend::Runtime { binary, flags, dir, template, running: RunningTasks::default() })
    }

    fn engine(&self, plan: &SubjectPlan, program: &str) -> Result<Backend, BenchError> {
        let (binary, image) = (installed(plan, program)?, self.plan.image.clone());
        Ok(Backend::Engine { binary, image, running: RunningTasks::default() })
    }
}

/// Returns the path of a program that a subject needs.
fn installed(plan: &SubjectPlan, program: &str) -> Result<PathBuf, BenchError> {
    crate::process::which(Path::new(program)).ok_or_else(|| BenchError::Precondition {
        subject: plan.name.clone(),
        problem: format!("{program} is not installed"),
    })
}

/// Starts a task by this driver with an OCI runtime and reads the spec that the driver writes for it.
async fn template(plan: &Plan, workspace: &Workspace, runtime: &str) -> Result<Template, BenchError> {
    let name = format!("probe-{runtime}");
    let own = plan.paths.iter().find(|path| path.kind == SubjectKind::Driver);
    let task = merged(own.map_or(json!({}), |path| path.task.clone()), &json!({"runtime": runtime}));
    // Without a pool, the spec does not name a prepared network namespace of this plugin.
    let plugin = workspace.launch_driver(&name, &json!({"shim": {"pool": 0}}), &plan.image, task).await?;
    let subject = Subject { name: "driver".to_owned(), backend: Backend::Plugin(Box::new(plugin)) };
    let job = Job::new(&workspace.allocs(), &UNTIL_STOPPED)?;
    let outcome = async {
        with_timeout(&subject.name, "start a task to read its spec", subject.start(&job))
            .await
            .map_err(plain_call_error)?;
        let run = workspace.run.join(&name);
        let template = Template::of_driver(&run, &workspace.driver_state, &plan.image, &job);
        with_timeout(&subject.name, "remove the task whose spec was read", subject.destroy(&job)).await?;
        template
    };
    let outcome = outcome.await;
    subject.close().await;
    job.clear(STEP_TIMEOUT).await?;
    outcome
}

/// Returns the error of the driver's call itself, if a step failed by one. The first task fails mostly because of the
/// image that the user named, which the command `run` reports in the same words.
fn plain_call_error(error: BenchError) -> BenchError {
    match error {
        BenchError::Step { subject, doing, source } => match source.downcast::<HostError>() {
            Ok(call) => BenchError::Host(*call),
            Err(source) => BenchError::Step { subject, doing, source },
        },
        other => other,
    }
}
