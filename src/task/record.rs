//! Records of tasks on disk. A record is written before anything of its task is created, so that everything that was
//! created can be found and removed.
//!
//! The first line of a record's file is the record, and each further line is a later state. The last line that can be
//! read is valid. Appending a line costs a tenth of replacing the file, because ext4 writes out the content of a file
//! that replaces another one (`auto_da_alloc`).

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::group::NetnsMembership;
use crate::{
    cgroup::{CgroupPath, SharePool},
    containerd::LeaseId,
    files::{none_if_missing, remove_file_if_exists, replace_private},
    ids::{AllocId, ContainerId, ShimId, TaskId},
    process::{self, ProcessId},
};

/// The version of the file's format.
const FORMAT_VERSION: u32 = 2;

/// A task record could not be read, written or removed.
#[derive(Debug, thiserror::Error)]
#[error("could not {doing} the task record {path}")]
pub struct RecordError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// What a later plugin needs to know about a task. The names of everything that is created for the task follow from
/// `container_id`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The kernel's boot id. After a reboot nothing of the task runs any more.
    pub boot_id: String,
    /// What the task is and what belongs to it. This is fixed before anything of the task is created.
    #[serde(flatten)]
    pub intent: Intent,
    /// How far the task has come.
    pub state: RecordState,
}

/// The part of a record that does not change: what the task is and what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Nomad's id of this attempt.
    pub task_id: TaskId,
    /// The task's name.
    pub name: String,
    /// The id of the task's allocation.
    pub alloc_id: AllocId,
    /// The allocation's directory on the host.
    pub alloc_dir: PathBuf,
    /// The path that the task's standard output goes to.
    pub stdout: PathBuf,
    /// The path that the task's standard error goes to.
    pub stderr: PathBuf,
    /// The id of the task's container.
    pub container_id: ContainerId,
    /// The task's image.
    pub image: String,
    /// The lease that keeps the image's layers in containerd.
    pub lease: LeaseId,
    /// The runtime's name.
    pub runtime: String,
    /// Whether the runtime is gVisor's runsc.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gvisor: bool,
    /// The name of the shim's directory.
    pub shim: ShimId,
    /// The shim's program, if the runtime has a shim of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shim_program: Option<PathBuf>,
    /// The shim's namespace. The runtime keeps its state in a directory of this name.
    pub namespace: String,
    /// The task's cgroup.
    pub cgroup: CgroupPath,
    /// The pool of shared processors that the task uses, if this driver has to follow the pool's changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share_pool: Option<SharePool>,
    /// The group's network namespace, if the task is in one, and how the task uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<NetnsMembership>,
    /// The signal that asks the task to stop.
    pub stop_signal: i32,
}

/// How far a task has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum RecordState {
    /// The task is about to be created.
    Intended,
    /// The task's process runs.
    Running(RunRecord),
    /// The task was asked to stop.
    Stopping {
        /// The process that runs.
        #[serde(flatten)]
        run: RunRecord,
        /// When the task is killed, in milliseconds since the epoch.
        deadline: u64,
    },
    /// The task has ended, and is not yet destroyed.
    Exited(ExitRecord),
    /// The task is no longer needed and is being destroyed. Parts of it may still be there.
    Destroying,
}

impl RecordState {
    /// Returns the process that runs in this state, if there is one.
    pub fn run(&self) -> Option<RunRecord> {
        match self {
            Self::Running(run) | Self::Stopping { run, .. } => Some(*run),
            Self::Intended | Self::Exited(_) | Self::Destroying => None,
        }
    }

    /// Returns when the task was started, in milliseconds since the epoch, if this state says so.
    pub fn started_at(&self) -> Option<u64> {
        match self {
            Self::Running(run) | Self::Stopping { run, .. } => Some(run.started_at),
            Self::Exited(exit) => Some(exit.started_at),
            Self::Intended | Self::Destroying => None,
        }
    }
}

/// A process that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The container's first process.
    #[serde(flatten)]
    pub process: ProcessId,
    /// When it was started, in milliseconds since the epoch.
    pub started_at: u64,
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The exit code: 0 to 255, or 128 + n if signal n ended the process.
    pub code: i32,
    /// Whether the OOM killer killed a process in the task's cgroup.
    pub oom_killed: bool,
    /// The reason why the code is not the process's own, if it is not.
    pub error: Option<String>,
    /// When the task was started, in milliseconds since the epoch.
    pub started_at: u64,
    /// When the task ended, in milliseconds since the epoch.
    pub at: u64,
}

/// The handle of a task, which Nomad stores and gives back to `RecoverTask` (its `driver_state`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskHandle {
    /// The task's record when the task had been started. It stands in for a record on disk that was lost or torn.
    pub record: Record,
}

impl TaskHandle {
    /// The version of this driver's handles. Version 1 is the one of nomad-driver-containerd.
    pub const VERSION: i32 = 2;

    /// Encodes the handle for Nomad.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::json!(self).to_string().into_bytes()
    }

    /// Decodes a handle that Nomad has stored.
    ///
    /// # Errors
    /// When it is not a handle of this driver.
    pub fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

impl Record {
    /// Creates a record of the current boot in the state `Intended`.
    ///
    /// # Errors
    /// When the kernel's boot id can't be read.
    pub fn new(intent: Intent) -> Result<Self, RecordError> {
        Ok(Self { version: FORMAT_VERSION, boot_id: boot_id()?, intent, state: RecordState::Intended })
    }

    /// Says whether the record is of the current boot.
    pub fn is_current(&self) -> bool {
        boot_id().is_ok_and(|boot| boot == self.boot_id)
    }

    /// Writes the record, whole or not at all. It is not synced to disk, because after a crash of the host nothing of
    /// the task runs.
    ///
    /// # Errors
    /// When the file can't be written or renamed.
    pub fn save(&self, path: &Path) -> Result<(), RecordError> {
        let failed = |doing, source| RecordError { doing, path: path.to_owned(), source };
        let bytes = serde_json::to_vec(self).map_err(|error| failed("encode", error.into()))?;
        // `load_all` knows drafts by this extension, and removes those that a killed plugin has left.
        let replaced = replace_private(path, &path.with_extension("tmp"), &bytes);
        replaced.map_err(|error| failed(error.doing, error.source))
    }

    /// Appends the state to the record's file, or writes the whole record again if the file is gone.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn save_state(&self, path: &Path) -> Result<(), RecordError> {
        if self.append_state(path)? { Ok(()) } else { self.save(path) }
    }

    /// Does the same as `save_state`, some time after the state was set. The record of a task that is being destroyed
    /// may have been removed by then, and is not written again.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn save_late(&self, path: &Path) -> Result<(), RecordError> {
        let is_there = self.append_state(path)?;
        if is_there || self.state == RecordState::Destroying { Ok(()) } else { self.save(path) }
    }

    /// Appends the state to the record's file. Returns false if there is no such file.
    fn append_state(&self, path: &Path) -> Result<bool, RecordError> {
        let failed = |doing| move |source: io::Error| RecordError { doing, path: path.to_owned(), source };
        let state = serde_json::to_string(&self.state).map_err(|error| failed("encode")(error.into()))?;
        let opened = none_if_missing(fs::OpenOptions::new().append(true).open(path)).map_err(failed("open"))?;
        let Some(mut file) = opened else { return Ok(false) };
        // One write, which begins with the line break: a line that is cut off spoils only itself.
        file.write_all(format!("\n{state}").as_bytes()).map_err(failed("append to"))?;
        Ok(true)
    }

    fn read(path: &Path) -> Result<Self, ReadFailure> {
        let bytes = fs::read(path).map_err(|error| match error {
            error if error.kind() == io::ErrorKind::NotFound => ReadFailure::Gone,
            error if process::is_transient(&error) => ReadFailure::Transient(error),
            error => ReadFailure::Invalid(error.to_string()),
        })?;
        Self::parse(&bytes).map_err(ReadFailure::Invalid)
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut lines = bytes.split(|&byte| byte == b'\n');
        let first = lines.next().unwrap_or_default();
        // The version is checked first, because a later version may have another format.
        let version = serde_json::from_slice::<Versioned>(first).map_err(|error| error.to_string())?.version;
        if version != FORMAT_VERSION {
            return Err(format!("it has version {version}, this driver's is {FORMAT_VERSION}"));
        }
        let mut record = serde_json::from_slice::<Self>(first).map_err(|error| error.to_string())?;
        if let Some(state) = lines.rev().find_map(|line| serde_json::from_slice(line).ok()) {
            record.state = state;
        }
        Ok(record)
    }

    /// Removes a record. It may be gone already.
    ///
    /// # Errors
    /// When the file can't be removed.
    pub fn remove(path: &Path) -> Result<(), RecordError> {
        if crate::failpoint::skip("record") {
            return Ok(());
        }
        // A torn record of the same container may have been set aside. What it described is gone now.
        for path in [path, &path.with_extension("bad")] {
            let failed = |source| RecordError { doing: "remove", path: path.to_owned(), source };
            remove_file_if_exists(path).map_err(failed)?;
        }
        Ok(())
    }
}

/// The reason why a record was not read.
enum ReadFailure {
    /// The record was removed meanwhile.
    Gone,
    /// The process lacks descriptors or memory to read the record. That says nothing about the record.
    Transient(io::Error),
    /// The record is torn or of another version, or the file system can't read it.
    Invalid(String),
}

/// The records in a directory.
#[derive(Debug, Default)]
pub struct Records {
    /// The records that can be read.
    pub readable: Vec<Record>,
    /// The files that can't be read. `load_all` has renamed them to `<container>.bad`.
    pub unreadable: Vec<PathBuf>,
}

/// Reads all records of a directory. A record that is torn is logged and renamed to `.bad`. Drafts are removed.
///
/// # Errors
/// When the directory or one of the records can't be read at the moment, or the kernel's boot id can't be read. The
/// caller must then not conclude anything from the records that are missing.
pub(crate) fn load_all(directory: &Path) -> Result<Records, RecordError> {
    boot_id()?;
    let mut records = read_all(directory)?;
    for path in &mut records.unreadable {
        if path.extension().is_some_and(|extension| extension == "bad") {
            continue;
        }
        let aside = path.with_extension("bad");
        if let Err(error) = fs::rename(&*path, &aside) {
            tracing::error!(path = %path.display(), %error, "could not set aside an unreadable task record");
        }
        *path = aside;
    }
    for draft in drafts(directory) {
        // The write of this file was interrupted. The record that it was to replace, if there is one, is whole.
        let _ = fs::remove_file(draft);
    }
    Ok(records)
}

/// Reads all records of a directory and changes nothing, for callers that only inspect them. A directory that does not
/// exist has no records.
///
/// # Errors
/// When the directory or one of the records can't be read at the moment.
pub fn read_all(directory: &Path) -> Result<Records, RecordError> {
    let unreadable = |source| RecordError { doing: "list", path: directory.to_owned(), source };
    let mut records = Records::default();
    let Some(entries) = process::none_if_vanished(fs::read_dir(directory)).map_err(unreadable)? else {
        return Ok(records);
    };
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => {}
            Some("bad") => {
                records.unreadable.push(path);
                continue;
            }
            _ => continue,
        }
        match Record::read(&path) {
            Ok(record) => records.readable.push(record),
            Err(ReadFailure::Gone) => {}
            Err(ReadFailure::Transient(source)) => return Err(RecordError { doing: "read", path, source }),
            Err(ReadFailure::Invalid(problem)) => {
                tracing::error!(path = %path.display(), problem, "could not read a task record");
                records.unreadable.push(path);
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

/// Converts a time to milliseconds since the epoch.
pub fn epoch_millis(time: SystemTime) -> u64 {
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
            alloc_id: AllocId::new("a").expect("an id"),
            alloc_dir: "/allocs/a".into(),
            stdout: "/allocs/a/alloc/logs/.web.stdout.fifo".into(),
            stderr: "/allocs/a/alloc/logs/.web.stderr.fifo".into(),
            image: "app".to_owned(),
            lease: LeaseId("l".to_owned()),
            runtime: "runc".to_owned(),
            shim: ShimId::from_dir_name("s").expect("an id"),
            namespace: "nomad".to_owned(),
            cgroup: CgroupPath::new("/nomad/a.web").expect("a path"),
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
        let listed = read_all(directory.path()).expect("read");
        assert_eq!((listed.readable, listed.unreadable.len()), (vec![record.clone()], 3));
        assert!(directory.path().join("torn.json").exists(), "read_all changes nothing");
        let records = load_all(directory.path()).expect("read");
        assert_eq!((records.readable, records.unreadable.len()), (vec![record.clone()], 3));
        assert_eq!(load_all(directory.path()).expect("read").unreadable.len(), 3, "they are reported again");
        assert!(record.is_current());
        for name in ["torn.bad", "empty.bad", "future.bad"] {
            assert!(directory.path().join(name).exists(), "{name}");
        }
        assert!(!directory.path().join("cut.tmp").exists());
    }

    #[test]
    fn a_record_that_can_not_be_saved_leaves_no_draft() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        // rename(2) does not put a file in the place of a directory.
        let path = directory.path().join("x.json");
        fs::create_dir(&path).expect("made");
        record().save(&path).expect_err("a directory is in its place");
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
    }

    #[test]
    fn the_last_whole_state_holds() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("x.json");
        let read = || read_all(directory.path()).expect("read").readable.pop().expect("a record");
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
        assert_eq!(read(), record, "a line that was cut off is ignored");
        record.state = RecordState::Destroying;
        record.save_state(&path).expect("added");
        assert_eq!(read(), record, "a line that was cut off does not spoil the next one");
        fs::remove_file(&path).expect("removed");
        record.save_late(&path).expect("nothing to do");
        assert!(!path.exists(), "the record of a destroyed task was written again");
        record.save_state(&path).expect("written again");
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
            assert_eq!(TaskHandle::decode(&bytes).expect("a handle of this driver").record, record);
        }
    }

    /// A record as an earlier version has written it, with each state that it may end with. Its bytes stay what they
    /// are.
    #[test]
    fn records_of_earlier_versions_are_read_and_written_alike() {
        let text = include_str!("../../tests/samples/record-v2.json");
        let lines: Vec<&str> = text.lines().collect();
        for last in 1..=lines.len() {
            let record = Record::parse(lines[..last].join("\n").as_bytes()).expect("read");
            let mut expected: serde_json::Value = serde_json::from_str(lines[0]).expect("json");
            if last > 1 {
                expected["state"] = serde_json::from_str(lines[last - 1]).expect("json");
            }
            assert_eq!(serde_json::to_value(&record).expect("json"), expected, "{}", lines[last - 1]);
            // Nomad has the handle, which carries the same record.
            let handle = serde_json::json!({"record": expected}).to_string();
            let decoded = TaskHandle::decode(handle.as_bytes()).expect("a handle");
            assert_eq!(decoded.record, record);
            assert_eq!(TaskHandle::decode(&decoded.encode()).expect("a handle"), decoded);
        }
    }
}
