//! Garbage collection: removes tasks, containers, shims and images that nothing uses, after the grace period in which
//! Nomad could have asked for them.

use std::{
    collections::{BTreeSet, HashSet},
    fs, io,
    path::Path,
    sync::Arc,
};

use tokio::net::UnixStream;

use super::{
    Engine, Force, Record, RecordState, TaskError,
    context::TeardownState,
    engine::Slot,
    guards::catch_panic,
    live::Task,
    read_records,
    record::Intent,
    remove_probe, stale_probes,
    undo::{remove_runsc_state, undo},
};
use crate::{
    cgroup::CgroupPath,
    containerd::LeaseId,
    control::Garbage,
    files::none_if_missing,
    gvisor,
    ids::{AllocId, ContainerId, ShimId, TaskId},
    image::{ImagesInUse, Reference},
    places::{Places, PlacesError, list_names},
    rootfs::RootfsError,
    shim::{self, Adoption, Client, ShimError},
};

impl Engine {
    /// Runs the garbage collection in the background after each grace period, for as long as the engine lives.
    /// `all_recorded` says whether every container has a readable record.
    pub(super) fn spawn_gc_loop(&self, all_recorded: bool) {
        let (grace, engine) = (self.settings().grace, self.downgrade());
        let (keep, images, in_use) = (self.settings().keep_images, self.context().images.clone(), self.images_in_use());
        tokio::spawn(async move {
            // No pull of an earlier plugin can be in progress, so its unused leases are collected now. If a record is
            // missing, the lease of its task is not known before RecoverTask brings the handle. Then the first regular
            // garbage collection collects the leases.
            if keep.is_some() && all_recorded {
                images.collect_unrecorded_leases(&in_use, false).await;
            }
            if let Some(inner) = engine.upgrade() {
                log_garbage(Self(inner).gc_probes(false).await);
            }
            loop {
                tokio::time::sleep(grace.max(std::time::Duration::from_millis(100))).await;
                let Some(inner) = engine.upgrade() else { return };
                let this = Self(inner);
                // Without `catch_panic`, a panic would end the garbage collection for the rest of the plugin's life.
                let mut removed = catch_panic("the garbage collection", this.gc(false)).await.unwrap_or_default();
                removed.retain(|garbage| !garbage.stays);
                this.context().metrics.gc_removed(removed.iter().filter(|one| one.problem.is_none()).count());
                log_garbage(removed);
            }
        });
    }

    /// Runs the garbage collection once. Returns what was removed (in a dry run: what would be removed) and what could
    /// not be removed.
    pub async fn gc(&self, dry_run: bool) -> Vec<Garbage> {
        // Without this wait, teardowns in progress would be reported as garbage.
        self.context().wait_for_teardowns().await;
        if !dry_run && self.age() >= self.settings().grace {
            self.parked_fifos().clear();
        }
        let mut found = self.gc_tasks(dry_run).await;
        found.extend(self.gc_pending_teardowns(dry_run).await);
        found.extend(self.gc_unrecorded(dry_run).await);
        found.extend(self.gc_probes(dry_run).await);
        if let Some(keep) = self.settings().keep_images {
            found.extend(self.context().images.collect_garbage(keep, &self.images_in_use(), dry_run).await);
        }
        if !dry_run {
            self.context().pool.remove_unused().await;
            tokio::task::block_in_place(|| self.context().rootfs_pool.prune());
        }
        found
    }

    /// Removes tasks of an earlier plugin that no agent has asked this plugin for.
    async fn gc_tasks(&self, dry_run: bool) -> Vec<Garbage> {
        if self.age() < self.settings().grace {
            return Vec::new();
        }
        let destroy_failed = |task: &Task| task.record().state == RecordState::Destroying && task.has_ended();
        let (mut found, mut orphans) = (Vec::new(), Vec::new());
        for (id, task) in self.started_tasks() {
            // DestroyTask failed, because the task's process did not die. Nomad does not repeat the call.
            if destroy_failed(&task) {
                let outcome = if dry_run { Ok(()) } else { self.destroy(&id, Force::Yes).await };
                found.push(garbage("task", &id.0, outcome).with_reason("it was destroyed, but not completely removed"));
                continue;
            }
            if task.has_holder() {
                continue;
            }
            if !task.has_ended() {
                orphans.push((id, task));
                continue;
            }
            // A task that an agent has asked for meanwhile stays.
            if !dry_run && !task.reserve_for_gc() {
                continue;
            }
            let outcome = if dry_run { Ok(()) } else { self.destroy(&id, Force::Yes).await };
            let why = "it has ended, and no agent has asked for it within state.grace";
            found.push(garbage("task", &id.0, outcome).with_reason(why));
        }
        found.extend(self.apply_orphan_policy(orphans, dry_run).await);
        found
    }

    /// Removes the remains of runtime probes that were cut off.
    async fn gc_probes(&self, dry_run: bool) -> Vec<Garbage> {
        let (run, cgroups) = (self.settings().places.run(), &self.context().cgroups);
        let stale = match tokio::task::block_in_place(|| stale_probes(run, cgroups)) {
            Ok(stale) => stale,
            Err(error) => return vec![Garbage::removed("probe", "all", &Err::<(), _>(error))],
        };
        let mut found = Vec::new();
        for name in stale {
            let outcome = if dry_run { Ok(()) } else { remove_probe(run, cgroups, &name).await };
            let why = "the process that probed a runtime with it has ended";
            found.push(Garbage::removed("probe", &name, &outcome).with_reason(why));
        }
        found
    }

    /// Runs the queued teardowns, which have failed before.
    async fn gc_pending_teardowns(&self, dry_run: bool) -> Vec<Garbage> {
        let ids: Vec<TaskId> = {
            let pending_teardowns = self.pending_teardowns();
            let free = pending_teardowns.iter().filter(|(_, pending)| pending.state == TeardownState::Queued);
            free.map(|(id, _)| id.clone()).collect()
        };
        let mut found = Vec::new();
        for id in ids {
            let outcome = if dry_run { Ok(()) } else { self.destroy_pending(&id).await.unwrap_or(Ok(())) };
            found.push(
                garbage("task", &id.0, outcome).with_reason("it could not be removed before, and is tried again"),
            );
        }
        found
    }

    /// Removes unrecorded containers and shims.
    async fn gc_unrecorded(&self, dry_run: bool) -> Vec<Garbage> {
        if self.age() < self.settings().grace {
            return Vec::new();
        }
        let places = &self.settings().places;
        // The containers and shims are listed before the records, since a record is written before anything of its task
        // is made.
        let containers = containers_on_disk(places, self.context().pool.launcher().namespace());
        let (containers, shims) = match containers.and_then(|containers| Ok((containers, places.list_shims()?))) {
            Ok(listed) => listed,
            Err(error) => return vec![garbage("container", "all", Err(error.into()))],
        };
        let records = match read_records(&places.tasks()) {
            Ok(records) => records,
            Err(error) => return vec![garbage("container", "all", Err(error.into()))],
        };
        // A record that can't be read at the moment counts, too. Torn records were renamed when the engine was opened.
        let unread = records.unreadable.iter().filter(|path| path.extension().is_some_and(|kind| kind == "json"));
        let mut recorded: HashSet<ContainerId> =
            unread.filter_map(|path| ContainerId::from_file_name(path.file_stem()?.to_str()?)).collect();
        recorded.extend(records.readable.iter().map(|record| record.intent.container_id.clone()));
        recorded.extend(self.tasks().values().filter_map(Slot::record).map(|record| record.intent.container_id));
        recorded.extend(self.pending_teardowns().values().map(|pending| pending.record.intent.container_id.clone()));
        let containers: Vec<_> = containers.into_iter().filter(|id| !recorded.contains(id)).collect();
        let records = records.readable;
        let held = self.context().pool.launcher().held_ids();
        let named: HashSet<&ShimId> = records.iter().map(|record| &record.intent.shim).collect();
        let shims: Vec<_> = shims.into_iter().filter(|shim| !named.contains(shim) && !held.contains(shim)).collect();
        let mut found = Vec::new();
        for id in containers {
            let outcome = if dry_run { Ok(()) } else { self.destroy_unrecorded(&id, &shims).await };
            found.push(garbage("container", id.as_str(), outcome).with_reason("no record names it"));
        }
        let all_ended = found.iter().all(|container| container.problem.is_none());
        // A shim whose container was just removed may be in the pool now.
        let held = self.context().pool.launcher().held_ids();
        for name in shims.into_iter().filter(|name| !held.contains(name)) {
            let dir = places.shim(&name);
            // If the check fails, the shim is asked to exit all the same.
            if dir.try_exists().unwrap_or(true) {
                if !dry_run && all_ended && shim::is_unusable(&dir) {
                    shim::kill_shim(&dir);
                }
                let gone = dry_run || shim::shut_down_unrecorded(&dir).await;
                let problem = (!gone).then(|| "it does not exit; it may still hold a container".to_owned());
                found.push(
                    Garbage::new("shim", name.as_str(), problem)
                        .with_reason("no record names it, and it holds no container"),
                );
            }
        }
        found
    }

    /// Returns the one of these shims that has the container; [`Adoption::Gone`] if none has it.
    ///
    /// # Errors
    /// When one of the shims can't be queried, since that shim may have the container.
    async fn find_shim_holding(&self, id: &ContainerId, shims: &[ShimId]) -> Result<Adoption, TaskError> {
        let context = self.context();
        for name in shims {
            let dir = context.settings.places.shim(name);
            let (path, failed) = (dir.join("sock"), |source| TaskError::Shim { doing: "query a shim", source });
            match UnixStream::connect(&path).await {
                Ok(_) => {}
                // The shim no longer listens.
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                    continue;
                }
                Err(source) => {
                    return Err(failed(ShimError::File { id: name.to_string(), doing: "connect to", path, source }));
                }
            }
            let client = Client::connect(&path, None).await.map_err(failed)?;
            match client.is_alive(id.as_str()).await {
                Ok(_) => return Ok(context.pool.launcher().adopt(name).await),
                // A shim that has ended meanwhile has no container.
                Err(error) if error.is_not_found() || matches!(error, ShimError::ConnectionLost { .. }) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(Adoption::Gone)
    }

    /// Kills and removes an unrecorded container. `shims` are the shims that may hold it.
    ///
    /// # Errors
    /// When it is not known which shim has the container, or something of the container can't be removed.
    pub(super) async fn destroy_unrecorded(&self, id: &ContainerId, shims: &[ShimId]) -> Result<(), TaskError> {
        let context = self.context();
        let places = &context.settings.places;
        let shim = self.find_shim_holding(id, shims).await?;
        let cgroup = cgroup_in_bundle(places, id)?;
        // A later attempt of the same task uses the same cgroup. Then the cgroup's processes are not this container's.
        let mut known: Vec<Record> = self.tasks().values().filter_map(Slot::record).collect();
        known.extend(self.pending_teardowns().values().map(|pending| pending.record.clone()));
        known.extend(self.left_alone().iter().map(|(record, _)| record.clone()));
        let starting = self.tasks().values().any(|slot| matches!(slot, Slot::Starting { .. }));
        let cgroup = cgroup.filter(|cgroup| !starting && known.iter().all(|record| record.intent.cgroup != *cgroup));
        let cgroup_was_killed = cgroup.is_some();
        let runtime_has_container = |root: &Path| -> Result<bool, PlacesError> {
            Ok(list_names(root)?.iter().any(|name| gvisor::container_of_state_file(name) == id.as_str()))
        };
        let mut runtime = None;
        for name in list_names(&places.runtimes())? {
            if runtime_has_container(&places.runtime_state(&name, context.pool.launcher().namespace()))? {
                runtime = Some(name);
                break;
            }
        }
        let record = Record::new(Intent {
            task_id: TaskId(String::new()),
            name: String::new(),
            alloc_id: AllocId::default(),
            alloc_dir: Path::new("/").to_owned(),
            stdout: "/dev/null".into(),
            stderr: "/dev/null".into(),
            container_id: id.clone(),
            image: String::new(),
            lease: LeaseId(String::new()),
            runtime: runtime.unwrap_or_default(),
            // `runsc` needs the container's files to delete it below, so that `undo` must not remove them.
            gvisor: false,
            // A new id, which no shim has.
            shim: ShimId::random(),
            shim_program: None,
            namespace: context.pool.launcher().namespace().to_owned(),
            cgroup: cgroup.unwrap_or_default(),
            share_pool: None,
            group: None,
            stop_signal: libc::SIGKILL,
        })?;
        undo(context, &record, shim).await?;
        // If the bundle is gone, only the runtime itself still knows the container.
        for runtime in list_names(&places.runtimes())? {
            let root = places.runtime_state(&runtime, context.pool.launcher().namespace());
            if runtime_has_container(&root)? {
                match context.delete_by_runtime(&runtime, &root, id).await {
                    // The runtime is no longer installed. The container's processes were killed by their cgroup.
                    Err(_) if cgroup_was_killed && context.runtimes.binary(&runtime).is_none() => {}
                    outcome => outcome?,
                }
                remove_runsc_state(&root, id)?;
            }
        }
        Ok(())
    }

    /// Removes an image that no task uses, and its lease in containerd.
    ///
    /// # Errors
    /// When a task uses the image, the image is not available locally, or containerd refuses.
    pub async fn remove_image(&self, reference: &Reference) -> Result<(), TaskError> {
        self.context().wait_for_teardowns().await;
        let in_use = self.images_in_use();
        let removed = self.context().images.remove(&reference.to_string(), &in_use).await;
        // A prepared root file system of this image would keep the image's layers mounted.
        tokio::task::block_in_place(|| self.context().rootfs_pool.discard_all());
        removed.map_err(|error| TaskError::Image(super::SharedImageError(Arc::new(error))))
    }

    /// Returns the images and leases that a record names. Starts in progress hold their images themselves.
    fn images_in_use(&self) -> ImagesInUse {
        let mut records: Vec<Record> =
            self.pending_teardowns().values().map(|pending| pending.record.clone()).collect();
        records.extend(self.tasks().values().filter_map(Slot::record));
        records.into_iter().map(|record| (record.intent.image, record.intent.lease)).collect()
    }
}

/// Returns the ids of all containers that any file or directory of the driver is named after.
pub(super) fn containers_on_disk(places: &Places, namespace: &str) -> Result<BTreeSet<ContainerId>, PlacesError> {
    let mut found = Vec::new();
    for path in [places.bundles(), places.uppers(), places.logs()] {
        found.extend(list_names(&path)?);
    }
    for runtime in list_names(&places.runtimes())? {
        found.extend(list_names(&places.runtime_state(&runtime, namespace))?);
    }
    // The names of gVisor's files contain the container's id.
    found.iter_mut().for_each(|name| *name = gvisor::container_of_state_file(name).to_owned());
    let bad = list_names(&places.tasks())?.into_iter().filter_map(|name| name.strip_suffix(".bad").map(str::to_owned));
    found.extend(bad);
    Ok(found.iter().filter_map(|name| ContainerId::from_file_name(name)).collect())
}

/// Returns the cgroup that a container's bundle names; `None` if there is no bundle, or it names none.
///
/// # Errors
/// When the bundle can't be read.
pub(super) fn cgroup_in_bundle(places: &Places, id: &ContainerId) -> Result<Option<CgroupPath>, RootfsError> {
    let path = places.bundle(id).join("config.json");
    let config = none_if_missing(fs::read(&path));
    let config = config.map_err(|source| RootfsError::File { doing: "read", path, source })?;
    // A file that can't be parsed was cut off while it was written. Then no container was started with it.
    let config: serde_json::Value = serde_json::from_slice(&config.unwrap_or_default()).unwrap_or_default();
    Ok(config["linux"]["cgroupsPath"].as_str().and_then(CgroupPath::new))
}

/// Logs what was removed, and what could not be removed.
fn log_garbage(items: Vec<Garbage>) {
    for Garbage { kind, name, problem, why, .. } in items {
        match problem {
            None => tracing::info!(kind, name, why, "garbage collection removed an unused item"),
            Some(problem) => tracing::warn!(kind, name, problem, "garbage collection could not remove an unused item"),
        }
    }
}

fn garbage(kind: &str, name: &str, outcome: Result<(), TaskError>) -> Garbage {
    // Another call may have destroyed the task meanwhile.
    let outcome = outcome.or_else(|error| if matches!(error, TaskError::NotFound(_)) { Ok(()) } else { Err(error) });
    Garbage::removed(kind, name, &outcome)
}
