//! Records of tasks on disk: written before anything is made, so that whatever was made can be found and undone.
//!
//! A record's file has the record in its first line, and in each further one a later state; the last that can be read
//! holds. Appending a line costs a tenth of replacing a file, which makes ext4 write out the new one's content
//! (`auto_da_alloc`).

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::group::Membership;
use crate::{
    cgroup::SharePool,
    ids::{ContainerId, TaskId},
    places::write_private,
    process::{self, ProcessId},
};

/// The form of the record's file.
const VERSION: u32 = 2;

/// Why a record could not be kept.
#[derive(Debug, thiserror::Error)]
#[error("task record: {doing} {path}")]
pub struct RecordError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// A task as its next finder needs to know it. All names of what is made follow from `container_id`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The kernel's boot id: after a reboot nothing of it runs any more.
    pub boot_id: String,
    /// Who it is and what belongs to it; fixed before anything is made.
    #[serde(flatten)]
    pub intent: Intent,
    /// How far it came.
    pub state: RecordState,
}

impl std::ops::Deref for Record {
    type Target = Intent;
    fn deref(&self) -> &Intent {
        &self.intent
    }
}

/// What a record is made of besides its own bookkeeping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Nomad's id.
    pub task_id: TaskId,
    /// The task's name.
    pub name: String,
    /// Its allocation.
    pub alloc_id: String,
    /// The allocation's directory on the host.
    pub alloc_dir: PathBuf,
    /// Where its standard output goes.
    pub stdout: PathBuf,
    /// Where its standard error goes.
    pub stderr: PathBuf,
    /// The container.
    pub container_id: ContainerId,
    /// Its image.
    pub image: String,
    /// What keeps the image's layers in containerd.
    pub lease: String,
    /// The runtime's name.
    pub runtime: String,
    /// Is that gVisor's runsc?
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gvisor: bool,
    /// The shim's directory name.
    pub shim: String,
    /// The shim's program, where that is not everybody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shim_program: Option<PathBuf>,
    /// The shim's namespace, below which the runtime keeps its state.
    pub namespace: String,
    /// Its cgroup.
    pub cgroup: String,
    /// The pool whose processors it has, where that is ours to follow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share_pool: Option<SharePool>,
    /// The group's network namespace, where it is in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Membership>,
    /// The signal that asks it to stop.
    pub stop_signal: i32,
}

/// How far a task came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum RecordState {
    /// About to be made.
    Intended,
    /// Its process runs.
    Running(RunRecord),
    /// It was asked to stop.
    Stopping {
        /// What runs.
        #[serde(flatten)]
        run: RunRecord,
        /// When it is killed; milliseconds since the epoch.
        deadline: u64,
    },
    /// It has ended, and is not yet destroyed.
    Exited(ExitRecord),
    /// Nobody wants it any more; something of it may still be there.
    Destroying,
}

impl RecordState {
    /// What runs, as far as this tells.
    pub fn run(&self) -> Option<RunRecord> {
        match self {
            Self::Running(run) | Self::Stopping { run, .. } => Some(*run),
            Self::Intended | Self::Exited(_) | Self::Destroying => None,
        }
    }
}

/// A process that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The container's first process.
    #[serde(flatten)]
    pub process: ProcessId,
    /// Milliseconds since the epoch.
    pub started_at: u64,
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// 0 to 255; 128 + n for a death by signal n.
    pub code: i32,
    /// Did the OOM killer strike in its cgroup?
    pub oom_killed: bool,
    /// Why the code is not the process's own, when it is not.
    pub error: Option<String>,
    /// When it was started; milliseconds since the epoch.
    pub started_at: u64,
    /// When it ended; milliseconds since the epoch.
    pub at: u64,
}

/// What Nomad keeps for us and gives back to `RecoverTask` (its `driver_state`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskHandle {
    /// The task as it was when it had been started: by this it is found when its record was lost or torn.
    pub record: Record,
}

impl TaskHandle {
    /// The handle's version; 1 is the old driver's.
    pub const VERSION: i32 = 2;

    /// For Nomad's keeping.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::json!(self).to_string().into_bytes()
    }

    /// From Nomad's keeping.
    ///
    /// # Errors
    /// When it is not ours.
    pub fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

impl Record {
    /// An intent of this boot.
    ///
    /// # Errors
    /// When the kernel does not tell its boot id.
    pub fn new(intent: Intent) -> Result<Self, RecordError> {
        Ok(Self { version: VERSION, boot_id: boot_id()?, intent, state: RecordState::Intended })
    }

    /// Is it of this boot?
    pub fn is_current(&self) -> bool {
        boot_id().is_ok_and(|boot| boot == self.boot_id)
    }

    /// Writes the record, whole or not at all. No fsync: after a crash of the host nothing of it runs.
    ///
    /// # Errors
    /// As the file system.
    pub fn save(&self, path: &Path) -> Result<(), RecordError> {
        let draft = path.with_extension("tmp");
        let failed = |doing| {
            let path = path.to_owned();
            move |source: io::Error| RecordError { doing, path, source }
        };
        let bytes = serde_json::to_vec(self).map_err(|error| failed("encode")(error.into()))?;
        let saved = write_private(&draft, &bytes)
            .map_err(failed("write"))
            .and_then(|()| fs::rename(&draft, path).map_err(failed("rename")));
        if saved.is_err() {
            // Nothing else removes a draft before the next plugin starts.
            let _ = fs::remove_file(&draft);
        }
        saved
    }

    /// Adds the state to the record's file, or writes that anew when it is gone.
    ///
    /// # Errors
    /// As the file system.
    pub fn save_state(&self, path: &Path) -> Result<(), RecordError> {
        if self.append_state(path)? { Ok(()) } else { self.save(path) }
    }

    /// As `save_state`, some time after the state was set: the record of a task that is being destroyed may have been
    /// removed by then, and is not written anew.
    ///
    /// # Errors
    /// As the file system.
    pub fn save_late(&self, path: &Path) -> Result<(), RecordError> {
        let is_there = self.append_state(path)?;
        if is_there || self.state == RecordState::Destroying { Ok(()) } else { self.save(path) }
    }

    /// True when the record's file is there.
    fn append_state(&self, path: &Path) -> Result<bool, RecordError> {
        let failed = |doing| move |source: io::Error| RecordError { doing, path: path.to_owned(), source };
        let state = serde_json::to_string(&self.state).map_err(|error| failed("encode")(error.into()))?;
        match fs::OpenOptions::new().append(true).open(path) {
            // In one write, and with the line's end before it: one that was cut off spoils itself only.
            Ok(mut file) => {
                file.write_all(format!("\n{state}").as_bytes()).map_err(failed("append to"))?;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed("open")(error)),
        }
    }

    fn read(path: &Path) -> Result<Self, Unread> {
        let bytes = fs::read(path).map_err(|error| match error {
            error if error.kind() == io::ErrorKind::NotFound => Unread::Gone,
            error if process::is_passing(&error) => Unread::NotNow(error),
            error => Unread::Bad(error.to_string()),
        })?;
        Self::parse(&bytes).map_err(Unread::Bad)
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut lines = bytes.split(|&byte| byte == b'\n');
        let first = lines.next().unwrap_or_default();
        // The version first: a later one may have another form.
        let version = serde_json::from_slice::<Versioned>(first).map_err(|error| error.to_string())?.version;
        if version != VERSION {
            return Err(format!("it has version {version}, this driver's is {VERSION}"));
        }
        let mut record = serde_json::from_slice::<Self>(first).map_err(|error| error.to_string())?;
        if let Some(state) = lines.rev().find_map(|line| serde_json::from_slice(line).ok()) {
            record.state = state;
        }
        Ok(record)
    }

    /// Removes a record. One that is gone is fine.
    ///
    /// # Errors
    /// As the file system.
    pub fn remove(path: &Path) -> Result<(), RecordError> {
        if crate::fault::skipped("record") {
            return Ok(());
        }
        // A torn one of the same container was set aside; what it stood for is gone now.
        for path in [path, &path.with_extension("bad")] {
            match fs::remove_file(path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(RecordError { doing: "remove", path: path.to_owned(), source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Why a record was not read.
enum Unread {
    /// It was removed meanwhile.
    Gone,
    /// There is no descriptor or memory to read it with; that says nothing of the record.
    NotNow(io::Error),
    /// It is torn, of another version, or the file system can't give it.
    Bad(String),
}

/// What a directory of records holds.
#[derive(Debug, Default)]
pub struct Records {
    /// Those that can be read.
    pub good: Vec<Record>,
    /// Files that can't, and are set aside as `<container>.bad`.
    pub bad: Vec<PathBuf>,
}

/// All records of a directory. One that is torn is renamed to `.bad` and reported; the rest goes on.
///
/// # Errors
/// When the directory or one of the records can't be read just now, or the kernel does not tell its boot id: what a record
/// says is nothing to go by then.
pub fn load_all(directory: &Path) -> Result<Records, RecordError> {
    boot_id()?;
    let mut records = read_all(directory)?;
    for path in &mut records.bad {
        if path.extension().is_some_and(|extension| extension == "bad") {
            continue;
        }
        let aside = path.with_extension("bad");
        if let Err(error) = fs::rename(&*path, &aside) {
            tracing::error!(path = %path.display(), %error, "a bad record could not even be renamed");
        }
        *path = aside;
    }
    for draft in drafts(directory) {
        // A write that was cut off; its predecessor, if any, is whole.
        let _ = fs::remove_file(draft);
    }
    Ok(records)
}

/// As `load_all`, without touching anything: for those who only look. A directory that is not there has no records.
///
/// # Errors
/// When the directory or one of the records can't be read just now.
pub fn read_all(directory: &Path) -> Result<Records, RecordError> {
    let unreadable = |source| RecordError { doing: "list", path: directory.to_owned(), source };
    let mut records = Records::default();
    let Some(entries) = process::unless_vanished(fs::read_dir(directory)).map_err(unreadable)? else {
        return Ok(records);
    };
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => {}
            Some("bad") => {
                records.bad.push(path);
                continue;
            }
            _ => continue,
        }
        match Record::read(&path) {
            Ok(record) => records.good.push(record),
            Err(Unread::Gone) => {}
            Err(Unread::NotNow(source)) => return Err(RecordError { doing: "read", path, source }),
            Err(Unread::Bad(problem)) => {
                tracing::error!(path = %path.display(), problem, "task record can't be read");
                records.bad.push(path);
            }
        }
    }
    Ok(records)
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

fn drafts(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|kind| kind == "tmp")).collect()
}

/// Milliseconds since the epoch.
pub fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn boot_id() -> Result<String, RecordError> {
    let path = || PathBuf::from("/proc/sys/kernel/random/boot_id");
    process::boot_id().map_err(|source| RecordError { doing: "read", path: path(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let task_id = TaskId("a/web/1".to_owned());
        Record::new(Intent {
            container_id: ContainerId::derive("a", "web", &task_id),
            task_id,
            name: "web".to_owned(),
            alloc_id: "a".to_owned(),
            alloc_dir: "/allocs/a".into(),
            stdout: "/allocs/a/alloc/logs/.web.stdout.fifo".into(),
            stderr: "/allocs/a/alloc/logs/.web.stderr.fifo".into(),
            image: "app".to_owned(),
            lease: "l".to_owned(),
            runtime: "runc".to_owned(),
            shim: "s".to_owned(),
            namespace: "nomad".to_owned(),
            cgroup: "/nomad/a.web".to_owned(),
            share_pool: None,
            group: None,
            gvisor: false,
            shim_program: None,
            stop_signal: 15,
        })
        .expect("a boot id")
    }

    #[test]
    fn records_come_back_and_torn_ones_are_set_aside() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut record = record();
        let path = directory.path().join("x.json");
        record.save(&path).expect("saved");
        record.state = RecordState::Exited(ExitRecord { code: 7, oom_killed: true, error: None, started_at: 1, at: 2 });
        record.save_state(&path).expect("added");
        for (name, text) in [("torn.json", "{\"version\":2"), ("empty.json", ""), ("future.json", "{\"version\":9}")] {
            fs::write(directory.path().join(name), text).expect("written");
        }
        fs::write(directory.path().join("cut.tmp"), "{").expect("written");
        let looked = read_all(directory.path()).expect("read");
        assert_eq!((looked.good, looked.bad.len()), (vec![record.clone()], 3));
        assert!(directory.path().join("torn.json").exists(), "who only looks touches nothing");
        let records = load_all(directory.path()).expect("read");
        assert_eq!((records.good, records.bad.len()), (vec![record.clone()], 3));
        assert_eq!(load_all(directory.path()).expect("read").bad.len(), 3, "and they are known the next time");
        assert!(record.is_current());
        for name in ["torn.bad", "empty.bad", "future.bad"] {
            assert!(directory.path().join(name).exists(), "{name}");
        }
        assert!(!directory.path().join("cut.tmp").exists());
    }

    #[test]
    fn a_record_that_can_not_be_saved_leaves_no_draft() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        // No file is renamed over a directory.
        let path = directory.path().join("x.json");
        fs::create_dir(&path).expect("made");
        record().save(&path).expect_err("a directory is in its place");
        crate::places::write_whole(&path, b"text", 0o600).expect_err("a directory is in its place");
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
    }

    #[test]
    fn the_last_whole_state_holds() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("x.json");
        let read = || read_all(directory.path()).expect("read").good.pop().expect("a record");
        let (stopping, run) = (8, RunRecord { process: ProcessId { pid: 7, start: 9 }, started_at: 5 });
        let mut record = record();
        record.save(&path).expect("saved");
        assert_eq!(read(), record);
        for state in [RecordState::Running(run), RecordState::Stopping { run, deadline: stopping }] {
            record.state = state;
            record.save_state(&path).expect("added");
            assert_eq!(read(), record);
        }
        let torn = fs::read_to_string(&path).expect("read") + "\n{\"is\":\"exi";
        fs::write(&path, torn).expect("written");
        assert_eq!(read(), record, "a line that was cut off says nothing");
        record.state = RecordState::Destroying;
        record.save_state(&path).expect("added");
        assert_eq!(read(), record, "and spoils none after it");
        fs::remove_file(&path).expect("removed");
        record.save_late(&path).expect("nothing to be done");
        assert!(!path.exists(), "the record of a task that was destroyed comes back");
        record.save_state(&path).expect("written anew");
        assert_eq!(read(), record);
    }

    #[test]
    fn every_state_survives_the_disk() {
        let run = RunRecord { process: ProcessId { pid: 7, start: 9 }, started_at: 5 };
        for state in [
            RecordState::Intended,
            RecordState::Running(run),
            RecordState::Stopping { run, deadline: 8 },
            RecordState::Destroying,
        ] {
            let record = Record { state, ..record() };
            let bytes = TaskHandle { record: record.clone() }.encode();
            assert_eq!(TaskHandle::decode(&bytes).expect("ours").record, record);
        }
    }
}
