//! What is under a node, whoever plays the agent: the disks of its two directories, its containerd, its copy of the program,
//! its runtimes. Faults (`faults.rs`) strike here.

use std::{
    fs,
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use nomad_driver_shim::ids::random_hex;
use serde_json::json;
use tokio::task::JoinSet;

use crate::{
    disk::Disk,
    faults::pids_group,
    model::Hit,
    plan::Mode,
    support::{Env, EnvOptions, program, services},
    world::Setting,
    wrapper::Wrappers,
};

/// Remains that nobody claims go after the grace period.
const GRACE: &str = "6s";

/// Who is told of faults, and keeps what must be true in spite of them.
pub(crate) trait Journal: Send + Sync {
    fn note(&self, what: &str);
    /// These tasks may have been struck.
    fn hit(&self, hit: &Hit);
    fn fault_begins(&self);
    fn fault_ends(&self);
    /// A fault of this kind has struck. None: there was nothing to strike.
    fn struck(&self, kind: Option<String>);
    /// The process of the plugin that serves the agent.
    fn plugin(&self) -> Option<u32>;
}

/// What is made before the agent starts.
pub(crate) struct Site {
    pub dir: PathBuf,
    pub namespace: String,
    /// Of the run directory and of the state directory.
    pub disks: [Disk; 2],
    /// A copy of the program under test that may be replaced.
    pub program: PathBuf,
    pub containerd_dir: PathBuf,
    pub pids: Option<PathBuf>,
    pub wrappers: Wrappers,
    /// The image of all tasks.
    pub image: String,
}

/// A site, and what goes on there.
pub(crate) struct Ground {
    pub site: Site,
    pub journal: Arc<dyn Journal>,
    /// Commands that are at work, and ends of faults that last.
    lasting: Mutex<JoinSet<()>>,
}

impl Site {
    /// Makes one, with the configuration of its plugin in `Env::config`. No plugin runs there yet.
    pub(crate) async fn prepare(Setting { mode, plant, .. }: Setting<'_>) -> (Self, Env) {
        let id = random_hex(4);
        let containerd_dir = services().root.join(format!("containerd-{id}"));
        let containerd = services::start_containerd(&containerd_dir);
        let mut config = json!({
            "containerd": {"address": containerd}, "state": {"grace": GRACE}, "shim": {"pool": 2},
        });
        match mode {
            Mode::Base | Mode::Bridge => {}
            Mode::OwnLogs => config["disable_log_collection"] = json!(true),
            Mode::AllocScope => config["shim_scope"] = json!("alloc"),
            Mode::NodeScope => config["shim_scope"] = json!("node"),
            Mode::Gvisor => config["default_runtime"] = json!("runsc"),
        }
        let env = plant.map(|names| ("NOMAD_DRIVER_SHIM_SKIP".to_owned(), names.to_owned())).into_iter().collect();
        let mut env = Env::with(EnvOptions { config, env, ..EnvOptions::default() }).await;
        let image = env.busybox().await;
        // Before anything is started: the directories become disks of their own, and the runtimes wrappers.
        env.plugin.take().unwrap().shut_down().await;
        let disks = ["run", "state"].map(|name| Disk::mount(&env.dir.join(name)));
        env.own_mounts = disks.iter().map(|disk| disk.path().to_owned()).collect();
        let wrappers = Wrappers::new(&env.dir);
        env.config["runtime"] = wrappers.config();
        let copy = env.dir.join("bin/nomad-driver-shim");
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(program(), &copy).unwrap();
        env.launch_mut().program.clone_from(&copy);
        let pids = pids_group(&format!("chaos-{id}"));
        let (dir, namespace) = (env.dir.clone(), env.namespace.clone());
        (Self { dir, namespace, disks, program: copy, containerd_dir, pids, wrappers, image }, env)
    }

    /// containerd's process.
    pub(crate) fn containerd(&self) -> u32 {
        fs::read_to_string(self.containerd_dir.join("pid")).unwrap_or_default().parse().unwrap_or(u32::MAX)
    }

    /// After a failure much may be left; nothing of it stays on the machine.
    pub(crate) fn clean(&self, env: &mut Env) {
        crate::faults::end_node(env);
        if let Ok(containerd) = nomad_driver_shim::process::PidFd::open(self.containerd()) {
            containerd.signal(libc::SIGKILL);
        }
        if let Some(group) = &self.pids {
            let _ = fs::remove_dir(group);
        }
        env.own_mounts.clear();
    }
}

impl Ground {
    pub(crate) fn new(site: Site, journal: Arc<dyn Journal>) -> Arc<Self> {
        Arc::new(Self { site, journal, lasting: Mutex::default() })
    }

    /// Does something beside the steps; settling waits for it.
    pub(crate) fn lasting_task(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.lasting.lock().unwrap_or_else(PoisonError::into_inner).spawn(task);
    }

    /// Waits until faults and commands are over.
    pub(crate) async fn outlast(&self) {
        let mut lasting = std::mem::take(&mut *self.lasting.lock().unwrap_or_else(PoisonError::into_inner));
        while lasting.join_next().await.is_some() {}
    }
}
