//! The reaper: what nobody claims goes, after a grace period in which Nomad could have asked for it.

use std::{
    collections::{BTreeSet, HashSet},
    fs, io,
    path::Path,
    sync::Arc,
};

use tokio::net::UnixStream;

use super::{
    Engine, Force, Record, RecordState, TaskError,
    claim::caught,
    engine::Slot,
    live::Task,
    read_records,
    record::Intent,
    remove_probe,
    shared::Hands,
    stale_probes,
    undo::{remove_state, undo},
};
use crate::{
    control::Garbage,
    gvisor,
    ids::{ContainerId, TaskId},
    image::{InUse, Reference},
    places::{Places, PlacesError, names},
    rootfs::RootfsError,
    shim::{self, Client, Found, ShimError},
};

/// Where a shim is looked for that no record names.
const NO_SHIM: &str = "none";

impl Engine {
    /// Sweeps after each grace period, for as long as the engine lives.
    pub(super) fn watch_over(&self, whole: bool) {
        let (grace, engine) = (self.settings().grace, self.downgrade());
        let (keep, images, in_use) = (self.settings().keep_images, self.shared().images.clone(), self.images_in_use());
        tokio::spawn(async move {
            // Pulls of an earlier instance can't be going on. Where a record is missing, its task's lease is not known
            // before RecoverTask brings it; then the first sweep does it.
            if keep.is_some() && whole {
                images.collect_leases(&in_use, false).await;
            }
            if let Some(inner) = engine.upgrade() {
                tell(Self(inner).sweep_probes(false).await);
            }
            loop {
                tokio::time::sleep(grace.max(std::time::Duration::from_millis(100))).await;
                let Some(inner) = engine.upgrade() else { return };
                let this = Self(inner);
                // A reaper that ended with a panic would leave everything that is nobody's for ever.
                let mut swept = caught("the reaper", this.sweep(false)).await.unwrap_or_default();
                swept.retain(|garbage| !garbage.stays);
                this.shared().metrics.swept(swept.iter().filter(|one| one.problem.is_none()).count());
                tell(swept);
            }
        });
    }

    /// Removes what nobody claims: what it was, or, for a dry run, would be.
    pub async fn sweep(&self, dry_run: bool) -> Vec<Garbage> {
        // What is just being cleared away would be counted.
        self.shared().all_cleared().await;
        if !dry_run && self.age() >= self.settings().grace {
            self.held().clear();
        }
        let mut found = self.sweep_tasks(dry_run).await;
        found.extend(self.sweep_leftovers(dry_run).await);
        found.extend(self.sweep_nameless(dry_run).await);
        found.extend(self.sweep_probes(dry_run).await);
        if let Some(keep) = self.settings().keep_images {
            found.extend(self.shared().images.collect(keep, &self.images_in_use(), dry_run).await);
        }
        if !dry_run {
            self.shared().pool.tidy().await;
            tokio::task::block_in_place(|| self.shared().ahead.prune());
        }
        found
    }

    /// Tasks of an earlier instance of us that Nomad has not named to this one.
    async fn sweep_tasks(&self, dry_run: bool) -> Vec<Garbage> {
        if self.age() < self.settings().grace {
            return Vec::new();
        }
        let given_up = |task: &Task| task.record().state == RecordState::Destroying && task.has_ended();
        let (mut found, mut orphans) = (Vec::new(), Vec::new());
        for (id, task) in self.live() {
            // Its destroy had failed when its process would not die; Nomad never asks twice.
            if given_up(&task) {
                let outcome = if dry_run { Ok(()) } else { self.destroy(&id, Force::Yes).await };
                found.push(garbage("task", &id.0, outcome).because("it was destroyed, and something of it was left"));
                continue;
            }
            if task.is_claimed() {
                continue;
            }
            if !task.has_ended() {
                orphans.push((id, task));
                continue;
            }
            // Claimed meanwhile, it is Nomad's business.
            if !dry_run && !task.claim_for_reaper() {
                continue;
            }
            let outcome = if dry_run { Ok(()) } else { self.destroy(&id, Force::Yes).await };
            let why = "it has ended, and no agent has asked for it within state.grace";
            found.push(garbage("task", &id.0, outcome).because(why));
        }
        found.extend(self.treat_orphans(orphans, dry_run).await);
        found
    }

    /// What probes of runtimes have left that were cut off.
    async fn sweep_probes(&self, dry_run: bool) -> Vec<Garbage> {
        let (run, cgroups) = (self.settings().places.run(), &self.shared().cgroups);
        let stale = match tokio::task::block_in_place(|| stale_probes(run, cgroups)) {
            Ok(stale) => stale,
            Err(error) => return vec![Garbage::removed("probe", "all", &Err::<(), _>(error))],
        };
        let mut found = Vec::new();
        for name in stale {
            let outcome = if dry_run { Ok(()) } else { remove_probe(run, cgroups, &name).await };
            let why = "the process that probed a runtime with it has ended";
            found.push(Garbage::removed("probe", &name, &outcome).because(why));
        }
        found
    }

    /// Those whose undo failed, over and over.
    async fn sweep_leftovers(&self, dry_run: bool) -> Vec<Garbage> {
        let ids: Vec<TaskId> = {
            let leftovers = self.leftovers();
            let free = leftovers.iter().filter(|(_, leftover)| leftover.hands == Hands::Free);
            free.map(|(id, _)| id.clone()).collect()
        };
        let mut found = Vec::new();
        for id in ids {
            let outcome = if dry_run { Ok(()) } else { self.destroy_leftover(&id).await.unwrap_or(Ok(())) };
            found.push(garbage("task", &id.0, outcome).because("it could not be undone before, and is tried again"));
        }
        found
    }

    /// Containers and shims without a record.
    async fn sweep_nameless(&self, dry_run: bool) -> Vec<Garbage> {
        if self.age() < self.settings().grace {
            return Vec::new();
        }
        let places = &self.settings().places;
        // What is there first, what is claimed second: a record is written before anything of its task is made.
        let containers = containers_on_disk(places, self.shared().pool.launcher().namespace());
        let (containers, shims) = match containers.and_then(|containers| Ok((containers, names(&places.shims())?))) {
            Ok(listed) => listed,
            Err(error) => return vec![garbage("container", "all", Err(error.into()))],
        };
        let records = match read_records(&places.tasks()) {
            Ok(records) => records,
            Err(error) => return vec![garbage("container", "all", Err(error.into()))],
        };
        // A record that can't be read just now is one all the same; those that are torn were set aside at the opening.
        let unread = records.bad.iter().filter(|path| path.extension().is_some_and(|kind| kind == "json"));
        let mut claimed: HashSet<ContainerId> =
            unread.filter_map(|path| ContainerId::from_file_name(path.file_stem()?.to_str()?)).collect();
        claimed.extend(records.good.iter().map(|record| record.container_id.clone()));
        claimed.extend(self.tasks().values().filter_map(Slot::record).map(|record| record.intent.container_id));
        claimed.extend(self.leftovers().values().map(|leftover| leftover.record.container_id.clone()));
        let containers: Vec<_> = containers.into_iter().filter(|id| !claimed.contains(id)).collect();
        let records = records.good;
        let own = self.shared().pool.launcher().own();
        let named: HashSet<&str> = records.iter().map(|record| record.shim.as_str()).collect();
        let shims: Vec<_> =
            shims.into_iter().filter(|shim| !named.contains(shim.as_str()) && !own.contains(shim)).collect();
        let mut found = Vec::new();
        for id in containers {
            let outcome = if dry_run { Ok(()) } else { self.undo_nameless(&id, &shims).await };
            found.push(garbage("container", id.as_str(), outcome).because("no record claims it"));
        }
        let all_ended = found.iter().all(|container| container.problem.is_none());
        // What held a container that was just ended serves others now.
        let own = self.shared().pool.launcher().own();
        for name in shims.into_iter().filter(|name| !own.contains(name)) {
            let dir = places.shim(&name);
            // Where that can't be told, it is asked to end all the same.
            if dir.try_exists().unwrap_or(true) {
                if !dry_run && all_ended && shim::is_unusable(&dir) {
                    shim::kill_shim(&dir);
                }
                let gone = dry_run || shim::end_stray(&dir).await;
                let problem = (!gone).then(|| "it does not end; it may still hold a container".to_owned());
                found.push(
                    Garbage::new("shim", &name, problem).because("no record names it, and it holds no container"),
                );
            }
        }
        found
    }

    /// The one of these shims that has the container, if one has.
    ///
    /// # Errors
    /// When one of them can't be asked: it may have it.
    async fn shim_that_holds(&self, id: &ContainerId, shims: &[String]) -> Result<Found, TaskError> {
        let shared = self.shared();
        for name in shims {
            let dir = shared.settings.places.shim(name);
            let (path, failed) = (dir.join("sock"), |source| TaskError::Shim { doing: "ask a shim", source });
            match UnixStream::connect(&path).await {
                Ok(_) => {}
                // Nobody listens any more.
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                    continue;
                }
                Err(source) => {
                    return Err(failed(ShimError::File { id: name.clone(), doing: "connect to", path, source }));
                }
            }
            let client = Client::connect(&path, None).await.map_err(failed)?;
            match client.is_alive(id.as_str()).await {
                Ok(_) => return Ok(shared.pool.launcher().adopt(name).await),
                // It has ended since; then it has nothing.
                Err(error) if error.is_not_found() || matches!(error, ShimError::Gone { .. }) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(Found::Gone)
    }

    /// Ends and removes a container that no record claims. `shims`: those that may hold it.
    pub(super) async fn undo_nameless(&self, id: &ContainerId, shims: &[String]) -> Result<(), TaskError> {
        let shared = self.shared();
        let places = &shared.settings.places;
        let shim = self.shim_that_holds(id, shims).await?;
        let cgroup = cgroup_of(places, id)?;
        // A later attempt of the same task has the same one: then it is no longer this container's to be emptied.
        let mut known: Vec<Record> = self.tasks().values().filter_map(Slot::record).collect();
        known.extend(self.leftovers().values().map(|leftover| leftover.record.clone()));
        known.extend(self.left_alone().iter().map(|(record, _)| record.clone()));
        let starting = self.tasks().values().any(|slot| matches!(slot, Slot::Starting { .. }));
        let cgroup =
            if starting || known.iter().any(|record| record.cgroup == cgroup) { String::new() } else { cgroup };
        let emptied = !cgroup.is_empty();
        let known_to = |root: &Path| -> Result<bool, PlacesError> {
            Ok(names(root)?.iter().any(|name| gvisor::container_of(name) == id.as_str()))
        };
        let mut runtime = None;
        for name in names(&places.runtimes())? {
            if known_to(&places.runtime_state(&name, shared.pool.launcher().namespace()))? {
                runtime = Some(name);
                break;
            }
        }
        let record = Record::new(Intent {
            task_id: TaskId(String::new()),
            name: String::new(),
            alloc_id: String::new(),
            alloc_dir: Path::new("/").to_owned(),
            stdout: "/dev/null".into(),
            stderr: "/dev/null".into(),
            container_id: id.clone(),
            image: String::new(),
            lease: String::new(),
            runtime: runtime.unwrap_or_default(),
            // Its files are what the runtime finds it by, below.
            gvisor: false,
            shim: NO_SHIM.to_owned(),
            shim_program: None,
            namespace: shared.pool.launcher().namespace().to_owned(),
            cgroup,
            share_pool: None,
            group: None,
            stop_signal: libc::SIGKILL,
        })?;
        undo(shared, &record, shim).await?;
        // Without its bundle only the runtime itself still knows the container.
        for runtime in names(&places.runtimes())? {
            let root = places.runtime_state(&runtime, shared.pool.launcher().namespace());
            if known_to(&root)? {
                match shared.delete_by_runtime(&runtime, &root, id).await {
                    // Nobody can be asked any more; its processes were ended by their cgroup.
                    Err(_) if emptied && shared.runtimes.binary(&runtime).is_none() => {}
                    outcome => outcome?,
                }
                remove_state(&root, id)?;
            }
        }
        Ok(())
    }

    /// Removes an image that no task uses, and what keeps it in containerd.
    ///
    /// # Errors
    /// When a task uses it, it is not here, or containerd refuses.
    pub async fn remove_image(&self, reference: &Reference) -> Result<(), TaskError> {
        self.shared().all_cleared().await;
        let in_use = self.images_in_use();
        let removed = self.shared().images.remove(&reference.to_string(), &in_use).await;
        // One of its own would keep its layers.
        tokio::task::block_in_place(|| self.shared().ahead.give_up());
        removed.map_err(|error| TaskError::Image(super::SharedImageError(Arc::new(error))))
    }

    /// Images that a record names. Those of starts at work are held by the starts themselves.
    fn images_in_use(&self) -> InUse {
        let mut records: Vec<Record> = self.leftovers().values().map(|leftover| leftover.record.clone()).collect();
        records.extend(self.tasks().values().filter_map(Slot::record));
        records.into_iter().map(|record| (record.intent.image, record.intent.lease)).collect()
    }
}

/// Container ids that anything on disk is named after.
pub(super) fn containers_on_disk(places: &Places, namespace: &str) -> Result<BTreeSet<ContainerId>, PlacesError> {
    let mut found = Vec::new();
    for path in [places.bundles(), places.uppers(), places.logs()] {
        found.extend(names(&path)?);
    }
    for runtime in names(&places.runtimes())? {
        found.extend(names(&places.runtime_state(&runtime, namespace))?);
    }
    // gVisor's files are named after containers, too.
    found.iter_mut().for_each(|name| *name = gvisor::container_of(name).to_owned());
    let bad = names(&places.tasks())?.into_iter().filter_map(|name| name.strip_suffix(".bad").map(str::to_owned));
    found.extend(bad);
    Ok(found.iter().filter_map(|name| ContainerId::from_file_name(name)).collect())
}

/// The cgroup that a container's bundle names; empty where it has none.
///
/// # Errors
/// When the bundle can't be read.
pub(super) fn cgroup_of(places: &Places, id: &ContainerId) -> Result<String, RootfsError> {
    let path = places.bundle(id).join("config.json");
    let config = match fs::read(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(RootfsError::File { doing: "read", path, source });
        }
        read => read.unwrap_or_default(),
    };
    // A bundle that was cut off has half of it: then nothing was started with it.
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
    Ok(config["linux"]["cgroupsPath"].as_str().unwrap_or_default().to_owned())
}

/// Writes down what was removed, and what could not be.
fn tell(swept: Vec<Garbage>) {
    for Garbage { kind, name, problem, why, .. } in swept {
        match problem {
            None => tracing::info!(kind, name, why, "removed; nobody claims it"),
            Some(problem) => tracing::warn!(kind, name, problem, "nobody claims it"),
        }
    }
}

fn garbage(kind: &str, name: &str, outcome: Result<(), TaskError>) -> Garbage {
    // Somebody else was faster.
    let outcome = outcome.or_else(|error| if matches!(error, TaskError::NotFound(_)) { Ok(()) } else { Err(error) });
    Garbage::removed(kind, name, &outcome)
}
