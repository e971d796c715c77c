//! Offline garbage collection: the garbage of a driver whose plugin does not run.
//!
//! A survey first lists everything in the driver's directories, and decides what is garbage and why, without changing
//! anything. Then an engine that has the driver's lock removes the garbage, and touches nothing else. It does not
//! recover the other tasks, as the next plugin would, since a recovery can end a task, for example one whose shim has
//! died.

use std::{
    collections::HashSet,
    fs, io,
    path::Path,
    time::{Duration, SystemTime},
};

use tokio_util::sync::CancellationToken;

use super::{
    Engine, EventHub, Force, OrphanPolicy, PersistedSettings, Record, RecordState, RunRecord, Settings, TaskError,
    epoch_millis,
    gc::{cgroup_in_bundle, containers_on_disk},
    live::ended_at,
    lock, read_records, remove_probe, stale_probes,
};
use crate::{
    cgroup::{Cgroups, PrimingMode},
    control::Garbage,
    ids::{ContainerId, ShimId, TaskId},
    places::{Places, list_names},
    process::{ProcessId, none_if_vanished},
    rootfs::RootfsError,
    shim::{self, Client, ShimError},
};

/// The grace period of an engine that only removes garbage: so long that none of its periodic work begins.
const UNLIMITED_GRACE: Duration = Duration::from_secs(24 * 3600);
/// How long a shim may take to answer. A healthy shim answers within a millisecond.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait until the engine has removed what it removes in the background when it is opened, such as idle
/// shims.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How often to check whether that is removed.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// An item in the directories of a driver.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Item {
    /// A task whose start or teardown was not completed. The engine removes it when it is opened.
    Unfinished(TaskId),
    /// A task that was started. It is garbage only if it has ended.
    Started(TaskId),
    /// An unrecorded container.
    Container(ContainerId),
    /// An unrecorded shim.
    Shim(ShimId),
    /// A prepared root file system.
    PreparedRootfs(String),
    /// The remains of a probe of a runtime.
    Probe(String),
}

impl Item {
    fn kind_and_name(&self) -> (&'static str, &str) {
        match self {
            Self::Unfinished(id) | Self::Started(id) => ("task", &id.0),
            Self::Container(id) => ("container", id.as_str()),
            Self::Shim(id) => ("shim", id.as_str()),
            Self::PreparedRootfs(name) => ("rootfs", name),
            Self::Probe(name) => ("probe", name),
        }
    }
}

/// Whether an item is removed or stays, with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Remove(String),
    Keep(String),
}

/// All items with their verdicts, and the recorded containers that stay.
type Survey = (Vec<(Item, Verdict)>, HashSet<ContainerId>);

/// Whether a task still runs, and if not, how long ago it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TaskEnd {
    /// The task still runs. Its first process has this pid.
    Running(u32),
    /// The task ended this long ago.
    EndedAgo(Duration),
    /// The task and its shim have ended. It is no longer known how the task ended, so that its remains are of no use.
    Unknown,
    /// The task has ended, and its shim, which knows how, does not answer.
    ShimSilent,
}

/// Decides whether a task that was started is garbage.
fn judge_started(end: TaskEnd, keep_ended: Duration) -> Verdict {
    match end {
        TaskEnd::Running(pid) => Verdict::Keep(format!("its container lives, process {pid}")),
        TaskEnd::EndedAgo(ago) if ago < keep_ended => Verdict::Keep(format!(
            "it ended {} s ago, and its agent may come back and ask how (--keep-ended)",
            ago.as_secs()
        )),
        TaskEnd::EndedAgo(ago) => Verdict::Remove(format!("it ended {} s ago", ago.as_secs())),
        TaskEnd::Unknown => {
            Verdict::Remove("it has ended, and so has its shim; it is no longer known how it ended".to_owned())
        }
        TaskEnd::ShimSilent => Verdict::Keep("its process has ended, and its shim does not report how".to_owned()),
    }
}

/// Removes the garbage of a driver whose plugin does not run. Returns what was removed (in a dry run: would be removed)
/// and what stays, with the reasons. Returns `None` if another process holds the driver's lock.
///
/// # Errors
/// When the directories can't be read, or no engine can be opened for them.
pub async fn gc_offline(
    settings: Settings,
    keep_ended: Duration,
    dry_run: bool,
) -> Result<Option<Vec<Garbage>>, TaskError> {
    let saved = PersistedSettings::read(&settings.places)
        .map_err(|source| TaskError::PersistedSettings { path: settings.places.kept_settings(), source })?;
    let settings = restrict(match saved {
        Some(saved) => saved.apply(settings),
        None => settings,
    });
    // The lock is held until the end, so that no plugin can start meanwhile.
    let Some(lock) = lock::try_take(&settings.places)? else { return Ok(None) };
    let (found, excluded) = survey(&settings, keep_ended).await?;
    let to_remove = found.iter().filter(|(_, verdict)| matches!(verdict, Verdict::Remove(_))).count();
    if dry_run || to_remove == 0 {
        return Ok(Some(found.iter().map(|(item, verdict)| report_line(item, verdict, &Ok(()))).collect()));
    }
    settings.places.create()?;
    let engine = Engine::open_locked(settings, EventHub::default(), lock, &excluded).await?;
    let mut outcomes = Vec::new();
    for (item, verdict) in &found {
        let outcome = match verdict {
            Verdict::Remove(_) => engine.remove_item(item).await,
            Verdict::Keep(_) => Ok(()),
        };
        outcomes.push(report_line(item, verdict, &outcome));
    }
    engine.close().await;
    Ok(Some(outcomes))
}

/// Returns the settings for an engine that only removes garbage: without a shim pool, prepared root file systems and
/// periodic work.
fn restrict(mut settings: Settings) -> Settings {
    settings.shim.pool.size = 0;
    Settings {
        grace: UNLIMITED_GRACE,
        orphans: OrphanPolicy::Keep,
        keep_warm: PrimingMode::Never,
        disable_log_collection: false,
        keep_images: None,
        metrics: None,
        ..settings
    }
}

/// Converts an item with its verdict and the outcome of its removal into a line of the report.
fn report_line(item: &Item, verdict: &Verdict, outcome: &Result<(), TaskError>) -> Garbage {
    let (kind, name) = item.kind_and_name();
    match verdict {
        Verdict::Remove(why) => Garbage::removed(kind, name, outcome).with_reason(why),
        Verdict::Keep(why) => Garbage::kept(kind, name, why),
    }
}

/// Lists all items and judges them, without changing anything. Also returns the recorded containers that stay.
async fn survey(settings: &Settings, keep_ended: Duration) -> Result<Survey, TaskError> {
    let places = &settings.places;
    let cgroups = Cgroups::detect()?;
    let records = read_records(&places.tasks())?;
    let (mut found, mut excluded) = (Vec::new(), HashSet::new());
    for record in &records.readable {
        let judged = judge_recorded(places, record, keep_ended).await;
        if let Verdict::Keep(_) = judged.1 {
            excluded.insert(record.intent.container_id.clone());
        }
        found.push(judged);
    }
    let remove = |why: &str| Verdict::Remove(why.to_owned());
    let mut recorded: HashSet<ContainerId> =
        records.readable.iter().map(|record| record.intent.container_id.clone()).collect();
    for path in records.unreadable.iter().filter(|path| path.extension().is_some_and(|kind| kind == "json")) {
        let id = path.file_stem().and_then(|name| ContainerId::from_file_name(name.to_str()?));
        if let Some(id) = id.filter(|id| recorded.insert(id.clone())) {
            let why = "its record can't be read; the next plugin can recover it from its agent's handle, or removes it";
            found.push((Item::Container(id), Verdict::Keep(why.to_owned())));
        }
    }
    let named: HashSet<&ShimId> = records.readable.iter().map(|record| &record.intent.shim).collect();
    let unrecorded: Vec<ShimId> = places.list_shims()?.into_iter().filter(|id| !named.contains(id)).collect();
    let containers = containers_on_disk(places, &settings.containerd.namespace)?;
    for id in containers.into_iter().filter(|id| !recorded.contains(id)) {
        let verdict = judge_unrecorded(places, &cgroups, &id, &unrecorded).await;
        found.push((Item::Container(id), verdict));
    }
    // An unrecorded shim may hold a container whose record is lost, and is then the only way to reach that container.
    let may_hide_container =
        found.iter().any(|(item, verdict)| matches!((item, verdict), (Item::Container(_), Verdict::Keep(_))));
    for name in unrecorded {
        let verdict = if may_hide_container {
            Verdict::Keep("no record names it, and it may hold a container whose record is lost".to_owned())
        } else {
            remove("no record names it: it was an idle shim of a plugin that has ended")
        };
        found.push((Item::Shim(name), verdict));
    }
    let prepared = list_names(&places.prepared_rootfs())?.into_iter();
    found.extend(prepared.map(|name| {
        (Item::PreparedRootfs(name), remove("it was prepared for the next task of a plugin that has ended"))
    }));
    let probes = stale_probes(places.run(), &cgroups);
    let probes = probes.map_err(file("list the probes in", places.run()))?.into_iter();
    found.extend(probes.map(|name| (Item::Probe(name), remove("the process that probed a runtime with it has ended"))));
    Ok((found, excluded))
}

/// Decides whether an unrecorded container is garbage. `shims` are the shims that may hold it.
async fn judge_unrecorded(places: &Places, cgroups: &Cgroups, id: &ContainerId, shims: &[ShimId]) -> Verdict {
    let unknown = |why: String| {
        Verdict::Keep(format!("no record names it, and it is not known whether a process of it lives ({why})"))
    };
    match find_process(places, cgroups, id) {
        Ok(Some(pid)) => {
            return Verdict::Keep(format!("its container lives, process {pid}, though no record names it"));
        }
        Ok(None) => {}
        Err(error) => return unknown(crate::error_chain(&error)),
    }
    // `find_process` may miss a sandbox, since sandboxes may choose their cgroup and their runtimes write their state
    // in other formats. So the shims are asked as well.
    for shim in shims {
        match lives_in_shim(&places.shim(shim), id).await {
            Ok(false) => {}
            Ok(true) => {
                return Verdict::Keep(format!("its container lives in shim {shim}, though no record names it"));
            }
            Err(error) => return unknown(format!("shim {shim}: {}", crate::error_chain(&error))),
        }
    }
    Verdict::Remove("no record names it, and no process of it lives".to_owned())
}

/// Says whether the container's process lives in the shim of this directory. A shim that has ended has no container.
async fn lives_in_shim(dir: &Path, id: &ContainerId) -> Result<bool, ShimError> {
    if !shim::is_alive(dir) {
        return Ok(false);
    }
    let ask = async { Client::connect(&dir.join("sock"), None).await?.is_alive(id.as_str()).await };
    match tokio::time::timeout(QUERY_TIMEOUT, ask).await {
        Ok(Err(error)) if error.is_not_found() => Ok(false),
        Ok(answer) => answer,
        Err(_) => Err(ShimError::TimedOut { call: "State", after: QUERY_TIMEOUT }),
    }
}

/// Decides whether a recorded task is garbage.
async fn judge_recorded(places: &Places, record: &Record, keep_ended: Duration) -> (Item, Verdict) {
    let id = record.intent.task_id.clone();
    let unfinished = |why: &str| (Item::Unfinished(record.intent.task_id.clone()), Verdict::Remove(why.to_owned()));
    if !record.is_current() {
        return unfinished("the host was restarted since it was started");
    }
    let end = match &record.state {
        RecordState::Intended => {
            return unfinished("a plugin had begun to start it, and no agent knows that it runs");
        }
        RecordState::Destroying => return unfinished("a plugin had begun to destroy it"),
        RecordState::Exited(exit) => TaskEnd::EndedAgo(elapsed_since(exit.at)),
        RecordState::Running(run) | RecordState::Stopping { run, .. } => probe_end(places, record, run).await,
    };
    (Item::Started(id), judge_started(end, keep_ended))
}

/// Finds out whether a task still runs, or how long ago it ended, if its record says that it runs.
async fn probe_end(places: &Places, record: &Record, run: &RunRecord) -> TaskEnd {
    if !run.process.is_gone() {
        return TaskEnd::Running(run.process.pid);
    }
    // Shims of containerd 2.4.2 and newer write this file when the container's first process ends.
    let exit_file = fs::metadata(places.bundle(&record.intent.container_id).join(shim::EXIT_FILE));
    if let Some(at) = exit_file.ok().and_then(|file| file.modified().ok()) {
        return TaskEnd::EndedAgo(SystemTime::now().duration_since(at).unwrap_or_default());
    }
    let dir = places.shim(&record.intent.shim);
    if !shim::is_alive(&dir) {
        return TaskEnd::Unknown;
    }
    let ask = async {
        let client = Client::connect(&dir.join("sock"), None).await.ok()?;
        client.wait(record.intent.container_id.as_str()).await.ok()
    };
    match tokio::time::timeout(QUERY_TIMEOUT, ask).await {
        Ok(Some(exit)) => TaskEnd::EndedAgo(elapsed_since(ended_at(&exit))),
        Ok(None) | Err(_) => TaskEnd::ShimSilent,
    }
}

/// Returns how long ago `at` was, a time in milliseconds since the epoch.
fn elapsed_since(at: u64) -> Duration {
    Duration::from_millis(epoch_millis(SystemTime::now()).saturating_sub(at))
}

/// Returns the pid of a process of an unrecorded container; `None` if it has no process.
///
/// # Errors
/// When the container's files or cgroup can't be read.
fn find_process(places: &Places, cgroups: &Cgroups, id: &ContainerId) -> Result<Option<u32>, TaskError> {
    if let Some(group) = cgroup_in_bundle(places, id)?
        && let Some(pid) = cgroups.processes(&group)?.into_iter().next()
    {
        return Ok(Some(pid));
    }
    // If the bundle is gone, the runtime's state still names the pid.
    for runtime in list_names(&places.runtimes())? {
        let root = places.runtime_root(&runtime);
        for namespace in list_names(&root)? {
            if let Some(pid) = pid_in(&root.join(namespace).join(id.as_str()))?
                && none_if_vanished(ProcessId::of(pid)).map_err(file("read", &root))?.is_some()
            {
                return Ok(Some(pid));
            }
        }
    }
    Ok(None)
}

/// Returns the pid in a container's directory of runc's (`state.json`) or crun's (`status`) state.
fn pid_in(state: &Path) -> Result<Option<u32>, TaskError> {
    for (name, field) in [("state.json", "init_process_pid"), ("status", "pid")] {
        let path = state.join(name);
        match fs::read(&path) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) => return Err(file("read", &path)(error)),
            Ok(text) => {
                let state: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
                return Ok(state[field].as_u64().and_then(|pid| pid.try_into().ok()));
            }
        }
    }
    Ok(None)
}

fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TaskError {
    let path = path.to_owned();
    move |source| RootfsError::File { doing, path, source }.into()
}

impl Engine {
    async fn remove_item(&self, item: &Item) -> Result<(), TaskError> {
        let places = &self.settings().places;
        match item {
            Item::Unfinished(id) => self.complete_teardown(id, &CancellationToken::new()).await,
            Item::Started(id) => {
                // The engine's recovery is finding out in the background how the task ended.
                let _ = tokio::time::timeout(QUERY_TIMEOUT, self.wait(id)).await;
                // If the task runs after all, this call is refused.
                self.destroy(id, Force::No).await
            }
            Item::Container(id) => self.destroy_unrecorded(id, &places.list_shims()?).await,
            Item::Shim(name) => wait_until_removed(&places.shim(name)).await,
            Item::PreparedRootfs(name) => wait_until_removed(&places.prepared_rootfs().join(name)).await,
            Item::Probe(name) => remove_probe(places.run(), &self.context().cgroups, name)
                .await
                .map_err(|source| TaskError::NotRemoved { path: places.run().join(name), source }),
        }
    }
}

/// Waits until the engine, which removes this path in the background when it is opened, has done so.
async fn wait_until_removed(path: &Path) -> Result<(), TaskError> {
    let deadline = tokio::time::Instant::now() + REMOVAL_TIMEOUT;
    while path.exists() {
        if tokio::time::Instant::now() > deadline {
            let source = std::io::Error::from(std::io::ErrorKind::TimedOut);
            return Err(TaskError::NotRemoved { path: path.to_owned(), source });
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_and_recently_ended_tasks_stay() {
        let hour = Duration::from_secs(3600);
        let stays = |end, keep| matches!(judge_started(end, keep), Verdict::Keep(_));
        assert!(stays(TaskEnd::Running(7), Duration::ZERO));
        assert!(stays(TaskEnd::ShimSilent, Duration::ZERO));
        assert!(stays(TaskEnd::EndedAgo(Duration::from_secs(5)), hour));
        assert!(!stays(TaskEnd::EndedAgo(hour), hour));
        assert!(!stays(TaskEnd::EndedAgo(Duration::ZERO), Duration::ZERO));
        assert!(!stays(TaskEnd::Unknown, hour));
    }
}
