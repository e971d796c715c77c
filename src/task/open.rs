//! Opens an engine: creates its components, and recovers or tears down the tasks of an earlier plugin.

use std::{
    collections::HashSet,
    fs::File,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Instant,
};

use nix::fcntl::Flock;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, watch};

use super::{
    Engine, EventHub, PersistedSettings, Runtimes, Settings, TaskError, apparmor,
    context::{CONCURRENT_TEARDOWNS_MAX, EngineContext, Masked},
    engine::Inner,
    group::NetnsRegistry,
    load_records, lock,
    logs::LogWriterSupervisor,
    metrics::Metrics,
    record::Records,
    recover::CONCURRENT_RECOVERIES_MAX,
};
use crate::{
    cgroup::{CgroupLockPrimer, CgroupMode, Cgroups, PrimingMode},
    containerd,
    ids::ContainerId,
    image::{ImageStore, Reference},
    netns_pool::NetnsPool,
    places::Places,
    rootfs::{
        Capabilities, Hooks, KernelLimits, MaskedPaths, RootfsPool, UpperStorage,
        apparmor::{AppArmorHost, DriverProfile, Loader},
        labels::PolicyLabels,
        limits::DefaultSysctls,
        seccomp::{FilterCache, FilterForm},
    },
    shim::{Launcher, PidFiles, Pool, SealedCopy},
};

impl Engine {
    /// Creates the directories, takes the lock, reads the records, and tears down what an earlier plugin left
    /// unfinished.
    ///
    /// # Errors
    /// When another plugin holds the lock, or the host can't be used at all.
    pub async fn open(settings: Settings, events: EventHub) -> Result<Self, TaskError> {
        // The pattern is compiled concurrently with the rest. Only a start that comes during that time waits for it.
        drop(tokio::task::spawn_blocking(Reference::precompile_pattern));
        let places = settings.places.clone();
        places.create()?;
        let lock = lock::take(&places).await?;
        if let Err(error) = PersistedSettings::of(&settings).save(&places) {
            tracing::warn!(%error, "could not save the settings; the command gc needs them when no plugin is running");
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
        excluded: &HashSet<ContainerId>,
    ) -> Result<Self, TaskError> {
        let places = settings.places.clone();
        let loader = Loader::new(AppArmorHost::default(), DriverProfile::of(&settings.name));
        apparmor::load_own_profile(loader.clone(), settings.security.apparmor.clone());
        let cgroups = Cgroups::detect()?;
        let group = cgroups.create_own_group()?;
        let log_writer_supervisor = LogWriterSupervisor::new(places.clone(), group.clone());
        let runtimes = Runtimes::find(&settings, &cgroups).await;
        let containerd = &settings.containerd;
        let client = containerd::Client::new(&containerd.address, &containerd.namespace, &containerd.snapshotter);
        let images = ImageStore::open(&places, client).map_err(|error| super::SharedImageError(Arc::new(error)))?;
        images.remove_stale_views();
        let launcher = launcher(&settings, &runtimes, group).await;
        let pool = Pool::new(launcher, settings.shim.pool);
        let records = load_records(&places.tasks())?;
        prune_pinned_runtimes(&places, &runtimes, &records);
        let primer = cgroup_primer(settings.keep_warm, &cgroups);
        let max_prepared = if settings.upper == UpperStorage::Disk { settings.shim.pool.size } else { 0 };
        let rootfs_pool = RootfsPool::new(places.prepared_rootfs(), max_prepared);
        // A hook may read the path of a task's network namespace in the spec, and that of a prepared namespace is valid
        // during the start only.
        let has_hooks = settings.hooks != Hooks::default();
        let netns_pool = NetnsPool::new(if has_hooks { 0 } else { settings.shim.pool.size });
        let log_failure =
            |error: &std::io::Error| tracing::warn!(%error, "could not watch pid files; starts take longer");
        let pid_files = PidFiles::new().inspect_err(log_failure).ok();
        let policy_labels = if settings.security.selinux { PolicyLabels::of_this_host() } else { None };
        let context = Arc::new(EngineContext {
            policy_labels,
            settings,
            cgroups,
            runtimes,
            images,
            seccomp_filters: FilterCache::default(),
            apparmor: loader,
            pool,
            pid_files,
            rootfs_pool,
            netns_pool,
            events,
            metrics: Metrics::default(),
            groups: NetnsRegistry::default(),
            log_writer_supervisor,
            cgroup_primer: primer,
            own_capabilities: Capabilities::bounding_set(),
            default_sysctls: DefaultSysctls::for_this_host(),
            masked: Masked { host: MaskedPaths::for_this_host()?, sandbox: MaskedPaths::for_sandbox() },
            kernel_limits: KernelLimits::of_this_process(),
            background_teardowns: watch::Sender::new(0),
            deferred_work_lock: tokio::sync::Mutex::default(),
            teardown_permits: Semaphore::new(CONCURRENT_TEARDOWNS_MAX),
            teardown_requested: Notify::new(),
            teardown_finished: Notify::new(),
            pending_teardowns: Mutex::default(),
        });
        let engine = Self(Arc::new(Inner {
            context,
            tasks: Mutex::default(),
            attempt_locks: Mutex::default(),
            parked_fifos: Mutex::default(),
            legacy: Mutex::default(),
            opened_at: Instant::now(),
            agent_connected_for: OnceLock::new(),
            recovery_permits: Semaphore::new(CONCURRENT_RECOVERIES_MAX),
            left_alone: Mutex::default(),
            _lock: lock,
        }));
        let records_complete = engine.recover_all(records, excluded);
        engine.spawn_gc_loop(records_complete);
        engine.follow_share_pools();
        // The log writer may have logs of an earlier plugin's tasks, even if the settings have changed since.
        let has_logs = engine.context().log_writer_supervisor.has_work();
        if has_logs {
            engine.context().log_writer_supervisor.ensure_in_background();
        }
        if has_logs || engine.settings().disable_log_collection {
            engine.watch_logs();
        }
        Ok(engine)
    }
}

/// Creates the launcher of shims. If crun is the default runtime, shims get a sealed copy of it. Other runtimes gain
/// nothing by a sealed copy.
async fn launcher(settings: &Settings, runtimes: &Runtimes, group: Vec<PathBuf>) -> Arc<Launcher> {
    let binary = crate::process::which(&settings.shim.binary).unwrap_or_else(|| settings.shim.binary.clone());
    let launcher = Launcher::new(
        binary,
        settings.containerd.namespace.clone(),
        settings.shim.pool.scope,
        settings.places.clone(),
        group,
    );
    if let Some(crun) = runtimes.default_runtime().ok().filter(|runtime| runtime.filters == FilterForm::Program) {
        let binary = crun.binary.clone();
        let log_failure = |error: &std::io::Error| {
            tracing::info!(%error, "could not make a sealed copy of crun; shims call crun itself");
        };
        if let Ok(Ok(sealed)) =
            tokio::task::spawn_blocking(move || SealedCopy::of(&binary).inspect_err(log_failure)).await
        {
            launcher.set_sealed_runtime(sealed);
        }
    }
    let launcher = Arc::new(launcher);
    let to_check = launcher.clone();
    tokio::spawn(async move { to_check.warn_about_version().await });
    launcher
}

/// Removes copies of runsc that no task of this host can need any more.
fn prune_pinned_runtimes(places: &Places, runtimes: &Runtimes, records: &Records) {
    if records.unreadable.is_empty() && !records.readable.iter().any(|record| record.intent.gvisor) {
        match places.is_only_user_of_state_dir() {
            Ok(true) => runtimes.prune_pinned(places),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(
                    error = %crate::error_chain(&error),
                    "could not check whether old copies of runsc are in use; they are kept"
                );
            }
        }
    }
}

/// Starts the primer of the kernel's cgroup lock. `None` if the operator has disabled the primer, if starts don't need
/// it (cgroup version 2), or if it can't be started.
fn cgroup_primer(mode: PrimingMode, cgroups: &Cgroups) -> Option<CgroupLockPrimer> {
    match mode {
        PrimingMode::Starts if cgroups.mode() == CgroupMode::V2 => None,
        PrimingMode::Never => None,
        mode => {
            let log_failure = |error: &std::io::Error| {
                tracing::warn!(%error, "could not start the cgroup lock primer (cgroup.keep_warm)");
            };
            CgroupLockPrimer::start(cgroups, mode).inspect_err(log_failure).ok()
        }
    }
}
