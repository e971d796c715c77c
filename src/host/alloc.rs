//! Creates an allocation's directories as Nomad's client does for drivers with image isolation.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use nix::{sys::stat::Mode, unistd::mkfifo};

use super::HostError;
use crate::pb::driver::{
    AllocatedCpuResources, AllocatedMemoryResources, AllocatedTaskResources, LinuxResources, Resources, TaskConfig,
};

/// An allocation and its directory.
#[derive(Debug, Clone)]
pub struct Alloc {
    /// The allocation's id.
    pub id: String,
    /// The allocation's directory.
    pub dir: PathBuf,
}

/// A task of an allocation, with its FIFOs.
#[derive(Debug, Clone)]
pub struct TaskDirs {
    /// The task's name.
    pub name: String,
    /// The allocation's id.
    pub alloc_id: String,
    /// The allocation's directory.
    pub alloc_dir: PathBuf,
    /// The FIFO of standard output.
    pub stdout: PathBuf,
    /// The FIFO of standard error.
    pub stderr: PathBuf,
}

fn failed(path: &Path) -> impl Fn(io::Error) -> HostError {
    let path = path.to_owned();
    move |source| HostError::File { path: path.clone(), source }
}

/// Creates a directory and its parents, and sets the directory's mode.
fn create_dir(path: &Path, mode: u32) -> Result<(), HostError> {
    fs::create_dir_all(path).map_err(failed(path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed(path))
}

impl Alloc {
    /// Creates an allocation's directory below `parent`.
    ///
    /// # Errors
    /// Fails when a directory can't be created.
    pub fn create(parent: &Path, id: &str) -> Result<Self, HostError> {
        let dir = parent.join(id);
        for shared in ["alloc", "alloc/data", "alloc/logs", "alloc/tmp"] {
            create_dir(&dir.join(shared), 0o777)?;
        }
        Ok(Self { id: id.to_owned(), dir })
    }

    /// Creates a task's directories and its two FIFOs.
    ///
    /// # Errors
    /// Fails when a directory or FIFO can't be created.
    pub fn create_task(&self, name: &str) -> Result<TaskDirs, HostError> {
        for (own, mode) in [("local", 0o777), ("secrets", 0o777), ("private", 0o700), ("tmp", 0o777)] {
            create_dir(&self.dir.join(name).join(own), mode)?;
        }
        let logs = self.dir.join("alloc/logs");
        let fifo = |stream: &str| {
            let path = logs.join(format!(".{name}.{stream}.fifo"));
            match mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR) {
                Ok(()) | Err(nix::Error::EEXIST) => Ok(path),
                Err(errno) => Err(failed(&path)(errno.into())),
            }
        };
        Ok(TaskDirs {
            name: name.to_owned(),
            alloc_id: self.id.clone(),
            alloc_dir: self.dir.clone(),
            stdout: fifo("stdout")?,
            stderr: fifo("stderr")?,
        })
    }

    /// Removes the allocation's directory.
    ///
    /// # Errors
    /// Fails when the directory can't be removed.
    pub fn remove(&self) -> Result<(), HostError> {
        fs::remove_dir_all(&self.dir).map_err(failed(&self.dir))
    }
}

impl TaskDirs {
    /// Returns the configuration that Nomad sends for the attempt `attempt` of this task, with 100 MHz and 64 MiB. The
    /// caller may change it.
    pub fn config(&self, attempt: &str, msgpack_driver_config: Vec<u8>) -> TaskConfig {
        let env = [
            ("NOMAD_ALLOC_DIR", "/alloc"),
            ("NOMAD_TASK_DIR", "/local"),
            ("NOMAD_SECRETS_DIR", "/secrets"),
            ("NOMAD_ALLOC_ID", &self.alloc_id),
            ("NOMAD_TASK_NAME", &self.name),
        ];
        TaskConfig {
            id: format!("{}/{}/{attempt}", self.alloc_id, self.name),
            name: self.name.clone(),
            alloc_id: self.alloc_id.clone(),
            alloc_dir: self.alloc_dir.to_string_lossy().into_owned(),
            stdout_path: self.stdout.to_string_lossy().into_owned(),
            stderr_path: self.stderr.to_string_lossy().into_owned(),
            job_name: self.name.clone(),
            job_id: self.name.clone(),
            task_group_name: self.name.clone(),
            namespace: "default".to_owned(),
            env: env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<HashMap<_, _>>(),
            resources: Some(resources(100, 64)),
            msgpack_driver_config,
            ..Default::default()
        }
    }
}

/// Returns the resources that Nomad sends for a task with this CPU and memory.
fn resources(mhz: i64, mebibytes: i64) -> Resources {
    Resources {
        allocated_resources: Some(AllocatedTaskResources {
            cpu: Some(AllocatedCpuResources { cpu_shares: mhz }),
            memory: Some(AllocatedMemoryResources { memory_mb: mebibytes, memory_max_mb: 0 }),
            networks: Vec::new(),
        }),
        linux_resources: Some(LinuxResources {
            cpu_shares: mhz,
            memory_limit_bytes: mebibytes << 20,
            ..Default::default()
        }),
        ports: Vec::new(),
    }
}
