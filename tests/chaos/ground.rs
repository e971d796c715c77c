//! What a node consists of, apart from its agent: the disks of its two directories, its containerd, its copy of the
//! program, and its runtimes. Both kinds of agent use it. Faults (`faults.rs`) strike here.

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

/// The grace period of the plugin under test. Remains that no agent has confirmed are removed after it.
const GRACE: &str = "6s";

/// Receives the reports about faults, and passes them to the model of what must be true in spite of them.
pub(crate) trait Journal: Send + Sync {
    fn note(&self, what: &str);
    /// A fault may have struck these attempts.
    fn hit(&self, hit: &Hit);
    fn fault_begins(&self);
    fn fault_ends(&self);
    /// A fault of this kind has struck. `None` means that there was nothing to strike.
    fn struck(&self, kind: Option<String>);
    /// The process id of the plugin that serves the agent.
    fn plugin(&self) -> Option<u32>;
}

/// Everything that is made before the agent starts.
pub(crate) struct Site {
    pub dir: PathBuf,
    pub namespace: String,
    /// The disks of the run directory and of the state directory, in this order.
    pub disks: [Disk; 2],
    /// A copy of the program under test, which a fault may replace.
    pub program: PathBuf,
    pub containerd_dir: PathBuf,
    pub pids: Option<PathBuf>,
    pub wrappers: Wrappers,
    /// The image of all tasks.
    pub image: String,
}

/// A site, with the commands and faults that are in progress on it.
pub(crate) struct Ground {
    pub site: Site,
    pub journal: Arc<dyn Journal>,
    /// Commands that are in progress, and the tasks that end lasting faults.
    lasting: Mutex<JoinSet<()>>,
}

impl Site {
    /// Makes a site, and puts the configuration of its plugin into `Env::config`. No plugin runs there yet.
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
        // The model checks what is left, and `clean` removes it.
        env.skip_leak_check();
        let image = env.busybox().await;
        // Before any process is started, each directory gets a disk of its own and each runtime a wrapper.
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

    /// The process id of containerd.
    pub(crate) fn containerd(&self) -> u32 {
        fs::read_to_string(self.containerd_dir.join("pid")).unwrap_or_default().parse().unwrap_or(u32::MAX)
    }

    /// Removes all that a failed run may have left on the machine.
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

    /// Runs `task` concurrently with the steps. The `Settle` step waits for its end.
    pub(crate) fn lasting_task(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.lasting.lock().unwrap_or_else(PoisonError::into_inner).spawn(task);
    }

    /// Waits until all faults and commands in progress are over.
    pub(crate) async fn outlast(&self) {
        let mut lasting = std::mem::take(&mut *self.lasting.lock().unwrap_or_else(PoisonError::into_inner));
        while lasting.join_next().await.is_some() {}
    }
}
