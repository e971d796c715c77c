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
    Engine, EventHub, Force, KeptSettings, Orphans, Record, RecordState, RunRecord, Settings, TaskError,
    live::ended_at,
    lock, millis, read_records, remove_probe, stale_probes,
    sweep::{cgroup_of, containers_on_disk},
};
use crate::{
    cgroup::{CgroupPath, Cgroups, KeepWarm},
    control::Garbage,
    ids::{ContainerId, TaskId},
    places::{Places, names},
    process::{ProcessId, unless_vanished},
    rootfs::RootfsError,
    shim::{self, Client, ShimError},
};

/// The grace period of an engine that only removes garbage: so long that none of its periodic work begins.
const NEVER: Duration = Duration::from_secs(24 * 3600);
/// How long a shim may take to answer. A healthy shim answers within a millisecond.
const ANSWER: Duration = Duration::from_secs(5);
/// How long to wait until the engine has removed what it removes in the background when it is opened, such as idle
/// shims.
const END: Duration = Duration::from_secs(10);
/// How often to check whether that is removed.
const LOOK: Duration = Duration::from_millis(20);

/// An item in the directories of a driver.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Thing {
    /// A task whose start or teardown was not completed. The engine removes it when it is opened.
    HalfDone(TaskId),
    /// A task that has ended.
    Ended(TaskId),
    /// An unrecorded container.
    Container(ContainerId),
    /// An unrecorded shim.
    Shim(String),
    /// A prepared root file system.
    Ahead(String),
    /// The remains of a probe of a runtime.
    Probe(String),
}

impl Thing {
    fn kind_and_name(&self) -> (&'static str, &str) {
        match self {
            Self::HalfDone(id) | Self::Ended(id) => ("task", &id.0),
            Self::Container(id) => ("container", id.as_str()),
            Self::Shim(name) => ("shim", name),
            Self::Ahead(name) => ("rootfs", name),
            Self::Probe(name) => ("probe", name),
        }
    }
}

/// Whether an item is removed or stays, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Goes(String),
    Stays(String),
}

/// All items with their verdicts, and the recorded containers that stay.
type Survey = (Vec<(Thing, Verdict)>, HashSet<ContainerId>);

/// How long ago a task ended, as far as that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The task still runs, with this pid.
    Lives(u32),
    /// The task ended this long ago.
    Ago(Duration),
    /// The task and its shim have ended. It is no longer known how the task ended, so that its remains are of no use.
    Lost,
    /// The task has ended, and its shim, which knows how, does not answer.
    Silent,
}

/// Decides whether a task that was started is garbage. A pure function of the task's end.
fn judge_started(end: End, keep_ended: Duration) -> Verdict {
    match end {
        End::Lives(pid) => Verdict::Stays(format!("its container lives, process {pid}")),
        End::Ago(ago) if ago < keep_ended => Verdict::Stays(format!(
            "it ended {} s ago, and its agent may come back and ask how (--keep-ended)",
            ago.as_secs()
        )),
        End::Ago(ago) => Verdict::Goes(format!("it ended {} s ago", ago.as_secs())),
        End::Lost => Verdict::Goes("it has ended, and so has its shim; it is no longer known how it ended".to_owned()),
        End::Silent => Verdict::Stays("its process has ended, and its shim does not report how".to_owned()),
    }
}

/// Removes the garbage of a driver whose plugin does not run. Returns what was removed (in a dry run: would be removed)
/// and what stays, with the reasons. Returns `None` if another process holds the driver's lock.
///
/// # Errors
/// When the directories can't be read, or no engine can be opened for them.
pub async fn clear_unattended(
    settings: Settings,
    keep_ended: Duration,
    dry_run: bool,
) -> Result<Option<Vec<Garbage>>, TaskError> {
    let kept = KeptSettings::read(&settings.places)
        .map_err(|source| TaskError::KeptSettings { path: settings.places.kept_settings(), source })?;
    let settings = restrict(match kept {
        Some(kept) => kept.apply(settings),
        None => settings,
    });
    // The lock is held until the end, so that no plugin can start meanwhile.
    let Some(lock) = lock::try_take(&settings.places)? else { return Ok(None) };
    let (found, alone) = survey(&settings, keep_ended).await?;
    let goes = found.iter().filter(|(_, verdict)| matches!(verdict, Verdict::Goes(_))).count();
    if dry_run || goes == 0 {
        return Ok(Some(found.iter().map(|(thing, verdict)| told(thing, verdict, &Ok(()))).collect()));
    }
    settings.places.create()?;
    let engine = Engine::open_locked(settings, EventHub::default(), lock, &alone).await?;
    let mut outcomes = Vec::new();
    for (thing, verdict) in &found {
        let outcome = match verdict {
            Verdict::Goes(_) => engine.clear(thing).await,
            Verdict::Stays(_) => Ok(()),
        };
        outcomes.push(told(thing, verdict, &outcome));
    }
    engine.close().await;
    Ok(Some(outcomes))
}

/// Returns the settings for an engine that only removes garbage: without a shim pool, prepared root file systems and
/// periodic work.
fn restrict(mut settings: Settings) -> Settings {
    settings.shim.pool.size = 0;
    Settings {
        grace: NEVER,
        orphans: Orphans::Keep,
        keep_warm: KeepWarm::Never,
        own_logs: false,
        keep_images: None,
        metrics: None,
        ..settings
    }
}

/// Converts an item with its verdict and the outcome of its removal into a line of the report.
fn told(thing: &Thing, verdict: &Verdict, outcome: &Result<(), TaskError>) -> Garbage {
    let (kind, name) = thing.kind_and_name();
    match verdict {
        Verdict::Goes(why) => Garbage::removed(kind, name, outcome).because(why),
        Verdict::Stays(why) => Garbage::staying(kind, name, why),
    }
}

/// Lists all items and judges them, without changing anything. Also returns the recorded containers that stay.
async fn survey(settings: &Settings, keep_ended: Duration) -> Result<Survey, TaskError> {
    let places = &settings.places;
    let cgroups = Cgroups::detect()?;
    let records = read_records(&places.tasks())?;
    let (mut found, mut alone) = (Vec::new(), HashSet::new());
    for record in &records.good {
        let judged = judge(places, record, keep_ended).await;
        if let Verdict::Stays(_) = judged.1 {
            alone.insert(record.container_id.clone());
        }
        found.push(judged);
    }
    let goes = |why: &str| Verdict::Goes(why.to_owned());
    let mut claimed: HashSet<ContainerId> = records.good.iter().map(|record| record.container_id.clone()).collect();
    for path in records.bad.iter().filter(|path| path.extension().is_some_and(|kind| kind == "json")) {
        let id = path.file_stem().and_then(|name| ContainerId::from_file_name(name.to_str()?));
        if let Some(id) = id.filter(|id| claimed.insert(id.clone())) {
            let why = "its record can't be read; the next plugin can recover it from its agent's handle, or removes it";
            found.push((Thing::Container(id), Verdict::Stays(why.to_owned())));
        }
    }
    let named: HashSet<&str> = records.good.iter().map(|record| record.shim.as_str()).collect();
    let nameless: Vec<String> =
        names(&places.shims())?.into_iter().filter(|name| !named.contains(name.as_str())).collect();
    let containers = containers_on_disk(places, &settings.containerd.namespace)?;
    for id in containers.into_iter().filter(|id| !claimed.contains(id)) {
        let verdict = judge_nameless(places, &cgroups, &id, &nameless).await;
        found.push((Thing::Container(id), verdict));
    }
    // An unrecorded shim may hold a container whose record is lost, and is then the only way to reach that container.
    let hides =
        found.iter().any(|(thing, verdict)| matches!((thing, verdict), (Thing::Container(_), Verdict::Stays(_))));
    for name in nameless {
        let verdict = if hides {
            Verdict::Stays("no record names it, and it may hold a container whose record is lost".to_owned())
        } else {
            goes("no record names it: it was an idle shim of a plugin that has ended")
        };
        found.push((Thing::Shim(name), verdict));
    }
    let ahead = names(&places.ahead())?.into_iter();
    found.extend(
        ahead.map(|name| (Thing::Ahead(name), goes("it was prepared for the next task of a plugin that has ended"))),
    );
    let probes = stale_probes(places.run(), &cgroups);
    let probes = probes.map_err(|source| TaskError::Stays { path: places.run().to_owned(), source })?.into_iter();
    found.extend(probes.map(|name| (Thing::Probe(name), goes("the process that probed a runtime with it has ended"))));
    Ok((found, alone))
}

/// Decides whether an unrecorded container is garbage. `shims` are the shims that may hold it.
async fn judge_nameless(places: &Places, cgroups: &Cgroups, id: &ContainerId, shims: &[String]) -> Verdict {
    let unknown = |why: String| {
        Verdict::Stays(format!("no record names it, and it is not known whether a process of it lives ({why})"))
    };
    match process_of(places, cgroups, id) {
        Ok(Some(pid)) => {
            return Verdict::Stays(format!("its container lives, process {pid}, though no record names it"));
        }
        Ok(None) => {}
        Err(error) => return unknown(crate::chain(&error)),
    }
    // `find_process` may miss a sandbox, since sandboxes may choose their cgroup and their runtimes write their state
    // in other formats. So the shims are asked as well.
    for shim in shims {
        match lives_in(&places.shim(shim), id).await {
            Ok(false) => {}
            Ok(true) => {
                return Verdict::Stays(format!("its container lives in shim {shim}, though no record names it"));
            }
            Err(error) => return unknown(format!("shim {shim}: {}", crate::chain(&error))),
        }
    }
    Verdict::Goes("no record names it, and no process of it lives".to_owned())
}

/// Does the container's process live in the shim of this directory? A shim that has ended has no container.
async fn lives_in(dir: &Path, id: &ContainerId) -> Result<bool, ShimError> {
    if !shim::is_alive(dir) {
        return Ok(false);
    }
    let ask = async { Client::connect(&dir.join("sock"), None).await?.is_alive(id.as_str()).await };
    match tokio::time::timeout(ANSWER, ask).await {
        Ok(Err(error)) if error.is_not_found() => Ok(false),
        Ok(answer) => answer,
        Err(_) => Err(ShimError::Late { call: "State", after: ANSWER }),
    }
}

/// Decides whether a recorded task is garbage.
async fn judge(places: &Places, record: &Record, keep_ended: Duration) -> (Thing, Verdict) {
    let id = record.task_id.clone();
    let half_done = |why: &str| (Thing::HalfDone(record.task_id.clone()), Verdict::Goes(why.to_owned()));
    if !record.is_current() {
        return half_done("the host was restarted since it was started");
    }
    let end = match &record.state {
        RecordState::Intended => {
            return half_done("a plugin had begun to start it, and no agent knows that it runs");
        }
        RecordState::Destroying => return half_done("a plugin had begun to destroy it"),
        RecordState::Exited(exit) => End::Ago(since(exit.at)),
        RecordState::Running(run) | RecordState::Stopping { run, .. } => end_of(places, record, run).await,
    };
    (Thing::Ended(id), judge_started(end, keep_ended))
}

/// Finds out whether a task still runs, or how long ago it ended, if its record says that it runs.
async fn end_of(places: &Places, record: &Record, run: &RunRecord) -> End {
    if !run.process.is_gone() {
        return End::Lives(run.process.pid);
    }
    // Since containerd 2.4.2, a shim writes the end of its container to this file before it exits.
    let noted = fs::metadata(places.bundle(&record.container_id).join(shim::EXIT_NOTE));
    if let Some(at) = noted.ok().and_then(|note| note.modified().ok()) {
        return End::Ago(SystemTime::now().duration_since(at).unwrap_or_default());
    }
    let dir = places.shim(&record.shim);
    if !shim::is_alive(&dir) {
        return End::Lost;
    }
    let ask = async {
        let client = Client::connect(&dir.join("sock"), None).await.ok()?;
        client.wait(record.container_id.as_str()).await.ok()
    };
    match tokio::time::timeout(ANSWER, ask).await {
        Ok(Some(exit)) => End::Ago(since(ended_at(&exit))),
        Ok(None) | Err(_) => End::Silent,
    }
}

/// Returns how long ago `at` was, a time in milliseconds since the epoch.
fn since(at: u64) -> Duration {
    Duration::from_millis(millis(SystemTime::now()).saturating_sub(at))
}

/// Returns the pid of a process of an unrecorded container; `None` if it has no process.
///
/// # Errors
/// When the container's files or cgroup can't be read.
fn process_of(places: &Places, cgroups: &Cgroups, id: &ContainerId) -> Result<Option<u32>, TaskError> {
    let group = CgroupPath::recorded(&cgroup_of(places, id)?);
    if !group.as_str().is_empty()
        && let Some(pid) = cgroups.processes(&group)?.into_iter().next()
    {
        return Ok(Some(pid));
    }
    // If the bundle is gone, the runtime's state still names the pid.
    for runtime in names(&places.runtimes())? {
        let root = places.runtime_root(&runtime);
        for namespace in names(&root)? {
            if let Some(pid) = pid_in(&root.join(namespace).join(id.as_str()))?
                && unless_vanished(ProcessId::of(pid)).map_err(file(&root))?.is_some()
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
            Err(error) => return Err(file(&path)(error)),
            Ok(text) => {
                let state: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
                return Ok(state[field].as_u64().and_then(|pid| pid.try_into().ok()));
            }
        }
    }
    Ok(None)
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> TaskError {
    let path = path.to_owned();
    move |source| RootfsError::File { doing: "read", path, source }.into()
}

impl Engine {
    async fn clear(&self, thing: &Thing) -> Result<(), TaskError> {
        let places = &self.settings().places;
        match thing {
            Thing::HalfDone(id) => self.outlast_leftover(id, &CancellationToken::new()).await,
            Thing::Ended(id) => {
                // The engine's recovery asks the shim in the background how the task ended.
                let _ = tokio::time::timeout(ANSWER, self.wait(id)).await;
                // This call is refused if the task runs after all.
                self.destroy(id, Force::No).await
            }
            Thing::Container(id) => self.undo_nameless(id, &names(&places.shims())?).await,
            Thing::Shim(name) => gone(&places.shim(name)).await,
            Thing::Ahead(name) => gone(&places.ahead().join(name)).await,
            Thing::Probe(name) => remove_probe(places.run(), &self.shared().cgroups, name)
                .await
                .map_err(|source| TaskError::Stays { path: places.run().join(name), source }),
        }
    }
}

/// Waits until the engine, which removes this path in the background when it is opened, has done so.
async fn gone(path: &Path) -> Result<(), TaskError> {
    let deadline = tokio::time::Instant::now() + END;
    while path.exists() {
        if tokio::time::Instant::now() > deadline {
            let source = std::io::Error::from(std::io::ErrorKind::TimedOut);
            return Err(TaskError::Stays { path: path.to_owned(), source });
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lives_or_may_still_be_asked_for_stays() {
        let hour = Duration::from_secs(3600);
        let stays = |end, keep| matches!(judge_started(end, keep), Verdict::Stays(_));
        assert!(stays(End::Lives(7), Duration::ZERO));
        assert!(stays(End::Silent, Duration::ZERO));
        assert!(stays(End::Ago(Duration::from_secs(5)), hour));
        assert!(!stays(End::Ago(hour), hour));
        assert!(!stays(End::Ago(Duration::ZERO), Duration::ZERO));
        assert!(!stays(End::Lost, hour));
    }
}
