//! Opens an engine: creates its components, and recovers or tears down the tasks of an earlier plugin.

use std::{
    collections::HashSet,
    fs::File,
    sync::{Arc, Mutex, OnceLock},
    time::Instant,
};

use nix::fcntl::Flock;
use tokio::sync::{Notify, Semaphore, watch};

use super::{
    Engine, EventHub, KeptSettings, Runtimes, Settings, TaskError, apparmor,
    engine::Inner,
    group::Groups,
    load_records, lock,
    logs::LogKeeper,
    metrics::Metrics,
    recover::RECOVERIES,
    shared::{Masked, Shared, TEARDOWNS},
};
use crate::{
    cgroup::{CgroupMode, Cgroups, KeepWarm, Warmer},
    containerd,
    ids::ContainerId,
    image::{ImageStore, Reference},
    rootfs::{
        Ahead, Capabilities, KernelLimits, MaskedPaths, UpperOn,
        apparmor::{Host, Loader, OwnProfile},
        seccomp::{Filters, Form},
    },
    shim::{Launcher, PidFiles, Pool, Sealed},
};

impl Engine {
    /// Creates the directories, takes the lock, reads the records, and tears down what an earlier plugin left
    /// unfinished.
    ///
    /// # Errors
    /// When another plugin holds the lock, or the host can't be used at all.
    pub async fn open(settings: Settings, events: EventHub) -> Result<Self, TaskError> {
        // This runs concurrently with the rest. Only a start that comes at this very moment has to wait for it.
        drop(tokio::task::spawn_blocking(Reference::prepare));
        let places = settings.places.clone();
        places.create()?;
        let lock = lock::take(&places).await?;
        if let Err(error) = KeptSettings::of(&settings).save(&places) {
            tracing::warn!(%error, "could not save the settings; gc will not know them while no plugin is running");
        }
        Self::open_locked(settings, events, lock, &HashSet::new()).await
    }

    /// Opens an engine for a caller that holds the lock already and has created the directories. The containers in
    /// `excluded` are neither recovered nor torn down, and no requests are sent to them or their shims.
    ///
    /// # Errors
    /// When the host can't be used at all.
    pub(super) async fn open_locked(
        settings: Settings,
        events: EventHub,
        lock: Flock<File>,
        alone: &HashSet<ContainerId>,
    ) -> Result<Self, TaskError> {
        let places = settings.places.clone();
        let loader = Loader::new(Host::default(), OwnProfile::of(&settings.name));
        apparmor::prepare(loader.clone(), settings.security.apparmor.clone());
        let cgroups = Cgroups::detect()?;
        let group = cgroups.own_group()?;
        let log_keeper = LogKeeper::new(places.clone(), group.clone());
        let runtimes = Runtimes::find(&settings, &cgroups).await;
        let containerd = &settings.containerd;
        let client = containerd::Client::new(&containerd.address, &containerd.namespace, &containerd.snapshotter);
        let images = ImageStore::open(&places, client).map_err(|error| super::SharedImageError(Arc::new(error)))?;
        let binary = crate::process::which(&settings.shim.binary).unwrap_or_else(|| settings.shim.binary.clone());
        let launcher =
            Launcher::new(binary, containerd.namespace.clone(), settings.shim.pool.scope, places.clone(), group);
        // Only crun gets a sealed copy: other runtimes gain nothing by it.
        if let Some(crun) = runtimes.default_runtime().ok().filter(|runtime| runtime.filters == Form::Program) {
            let (binary, refused) =
                (crun.binary.clone(), |error: &std::io::Error| tracing::info!(%error, "could not seal a copy of crun"));
            if let Ok(Ok(sealed)) = tokio::task::spawn_blocking(move || Sealed::of(&binary).inspect_err(refused)).await
            {
                launcher.hand_out(sealed);
            }
        }
        let launcher = Arc::new(launcher);
        let warning = launcher.clone();
        tokio::spawn(async move { warning.warn().await });
        let pool = Pool::new(launcher, settings.shim.pool);
        let records = load_records(&places.tasks())?;
        if records.bad.is_empty() && !records.good.iter().any(|record| record.gvisor) {
            match places.is_alone() {
                Ok(true) => runtimes.prune(&places),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(
                        error = %crate::chain(&error),
                        "could not check whether old copies of runsc are in use; they are kept"
                    );
                }
            }
        }
        let warmer = match settings.keep_warm {
            KeepWarm::Starts if cgroups.mode() == CgroupMode::V2 => None,
            KeepWarm::Never => None,
            keep => {
                let refused = |error: &std::io::Error| {
                    tracing::warn!(%error, "could not start the cgroup lock primer (cgroup.keep_warm)");
                };
                Warmer::start(&cgroups, keep).inspect_err(refused).ok()
            }
        };
        let most = if settings.upper == UpperOn::Disk { settings.shim.pool.size } else { 0 };
        let ahead = Ahead::new(places.ahead(), most);
        let unwatched =
            |error: &std::io::Error| tracing::warn!(%error, "could not watch pid files; starts take longer");
        let pid_files = PidFiles::new().inspect_err(unwatched).ok();
        let shared = Arc::new(Shared {
            settings,
            cgroups,
            runtimes,
            images,
            filters: Filters::default(),
            apparmor: loader,
            pool,
            pid_files,
            ahead,
            events,
            metrics: Metrics::default(),
            groups: Groups::default(),
            log_keeper,
            warmer,
            own_capabilities: Capabilities::of_this_process(),
            masked: Masked { host: MaskedPaths::of_this_host(), sandbox: MaskedPaths::of_a_sandbox() },
            kernel: KernelLimits::of_this_process(),
            clearing: watch::Sender::new(0),
            teardowns: Semaphore::new(TEARDOWNS),
            hurry: Notify::new(),
            settled: Notify::new(),
            leftovers: Mutex::default(),
        });
        let engine = Self(Arc::new(Inner {
            shared,
            tasks: Mutex::default(),
            turns: Mutex::default(),
            held: Mutex::default(),
            former: Mutex::default(),
            opened: Instant::now(),
            attended: OnceLock::new(),
            recoveries: Semaphore::new(RECOVERIES),
            left_alone: Mutex::default(),
            _lock: lock,
        }));
        let whole = engine.sort_out(records, alone);
        engine.watch_over(whole);
        engine.follow_share_pools();
        // This driver may write the logs of tasks of an earlier plugin, whatever the settings say now.
        let has_logs = engine.shared().log_keeper.has_work();
        if has_logs {
            engine.shared().log_keeper.insist();
        }
        if has_logs || engine.settings().own_logs {
            engine.watch_logs();
        }
        Ok(engine)
    }
}
