//! Reads a task's resource usage from the cgroup files of the kernel. That takes 0.1 ms, and needs neither a call to a
//! shim nor a further process.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::Path,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use nix::{
    fcntl::{OFlag, open, openat},
    sys::{
        resource::{Resource, getrlimit},
        stat::Mode,
    },
};

use super::{CGROUP_ROOT, CgroupError, CgroupMode, CgroupPath, Cgroups};
use crate::files::none_if_missing;

/// The length of a clock tick. USER_HZ is 100 on all architectures on which Linux runs containers (sysconf(3),
/// `_SC_CLK_TCK`).
const NANOS_PER_TICK: u64 = 10_000_000;
/// The size of the buffer for memory.stat. This is the longest file that is read here, with some 2 KB.
const MEMORY_STAT_MAX: usize = 16 << 10;
/// The size of the buffer for cpu.stat, which is a tenth as long as memory.stat.
const CPU_STAT_MAX: usize = 2 << 10;

/// One measurement of a task's usage. A value is `None` if this kernel does not report it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in nanoseconds since the cgroup was created.
    pub cpu: CpuUsage,
    /// Memory in bytes.
    pub memory: MemoryUsage,
}

/// Returns the CPU usage between two measurements that lie `time` apart, in percent of one CPU: 100 is one whole CPU.
#[allow(clippy::cast_precision_loss, reason = "percentages need no more than 52 bits")]
pub fn cpu_percent(before_ns: u64, after_ns: u64, time: Duration) -> f64 {
    let spent = after_ns.saturating_sub(before_ns);
    if time.is_zero() { 0.0 } else { spent as f64 / time.as_nanos() as f64 * 100.0 }
}

/// A task's CPU time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuUsage {
    /// The total CPU time in nanoseconds.
    pub total_ns: u64,
    /// The CPU time in user mode, in nanoseconds.
    pub user_ns: Option<u64>,
    /// The CPU time in the kernel, in nanoseconds.
    pub system_ns: Option<u64>,
    /// The number of periods in which the task was throttled.
    pub throttled_periods: Option<u64>,
    /// The time for which the task was throttled, in nanoseconds.
    pub throttled_ns: Option<u64>,
}

/// A task's memory, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Anonymous memory.
    pub rss: Option<u64>,
    /// The page cache.
    pub cache: Option<u64>,
    /// All memory that is charged to the cgroup.
    pub usage: Option<u64>,
    /// The maximum of `usage` so far.
    pub max_usage: Option<u64>,
    /// Swapped memory.
    pub swap: Option<u64>,
    /// Memory of the kernel on behalf of the task.
    pub kernel: Option<u64>,
    /// The maximum of `kernel` so far.
    pub kernel_max: Option<u64>,
}

/// The number of measurements with unchanged memory usage after which memory.stat is read only when the task's memory
/// usage or its maximum has changed. Reading memory.stat is most of a measurement's cost, and the memory of few tasks
/// changes within a second. The first unchanged measurements still read it, because the kernel updates memory.stat up
/// to two seconds late.
const SETTLED_AFTER: u32 = 3;
/// Of this many successive measurements with unchanged memory usage, one reads memory.stat nevertheless.
const FULL_READ_EVERY: u32 = 10;

/// A task's cgroup, kept open for many measurements.
#[derive(Debug)]
pub struct Meter {
    groups: Groups,
    last: Option<Usage>,
    /// The number of successive measurements with the same memory usage.
    unchanged: u32,
}

#[derive(Debug)]
enum Groups {
    V1 { cpuacct: GroupDir, cpu: GroupDir, memory: GroupDir },
    V2(GroupDir),
}

impl Cgroups {
    /// Measures a task's present usage. Returns `None` if its cgroup is gone.
    ///
    /// # Errors
    /// Fails when a file of the cgroup can't be opened or read at the moment.
    pub fn usage(&self, task: &CgroupPath) -> Result<Option<Usage>, CgroupError> {
        let failed = |source| CgroupError { doing: "read the usage in", path: task.as_str().into(), source };
        self.meter(task)?.map_or(Ok(None), |mut meter| meter.usage().map_err(failed))
    }

    /// Opens a task's cgroup for many measurements. Returns `None` if the cgroup is gone.
    ///
    /// # Errors
    /// Fails when the cgroup can't be opened at the moment.
    pub fn meter(&self, task: &CgroupPath) -> Result<Option<Meter>, CgroupError> {
        let open = |hierarchy: &Path| {
            let path = task.in_hierarchy(hierarchy);
            none_if_missing(GroupDir::open(&path)).map_err(|source| CgroupError { doing: "open", path, source })
        };
        let groups = match self.mode {
            CgroupMode::V1 => {
                let (cpuacct, cpu) = (open(&self.controller("cpuacct"))?, open(&self.controller("cpu"))?);
                let memory = open(&self.controller("memory"))?;
                cpuacct.zip(cpu).zip(memory).map(|((cpuacct, cpu), memory)| Groups::V1 { cpuacct, cpu, memory })
            }
            CgroupMode::V2 => open(Path::new(CGROUP_ROOT))?.map(Groups::V2),
        };
        Ok(groups.map(Meter::new))
    }

    /// Returns the mount point of a controller of version 1, which is mounted alone or together with another one, as
    /// `cpu,cpuacct`.
    fn controller(&self, name: &str) -> std::path::PathBuf {
        let has = |point: &&std::path::PathBuf| {
            point.file_name().and_then(|file| file.to_str()).is_some_and(|file| file.split(',').any(|one| one == name))
        };
        self.hierarchies.iter().find(has).cloned().unwrap_or_else(|| Path::new(CGROUP_ROOT).join(name))
    }
}

impl Meter {
    fn new(groups: Groups) -> Self {
        Self { groups, last: None, unchanged: 0 }
    }

    /// Measures the task's present usage. Returns `None` if its cgroup is gone.
    ///
    /// # Errors
    /// Fails when a file of the cgroup can't be opened or read at the moment. A later measurement may succeed.
    pub fn usage(&mut self) -> io::Result<Option<Usage>> {
        let may_reuse = self.unchanged >= SETTLED_AFTER && !self.unchanged.is_multiple_of(FULL_READ_EVERY);
        let known = self.last.as_ref().filter(|_| may_reuse);
        let usage = match &mut self.groups {
            Groups::V1 { cpuacct, cpu, memory } => read_version1(cpuacct, cpu, memory, known)?,
            Groups::V2(group) => read_version2(group, known)?,
        };
        let is_unchanged = usage.zip(self.last).is_some_and(|(now, last)| now.memory.usage == last.memory.usage);
        self.unchanged = if is_unchanged { self.unchanged.wrapping_add(1) } else { 0 };
        self.last = usage;
        Ok(usage)
    }
}

/// Reads the usage on version 1 (cgroup-v1/cpuacct.rst, memory.rst). The total time is in nanoseconds, user and system
/// time are in ticks. `cpuacct.usage_user` and `cpuacct.usage_sys` are in nanoseconds, too, but only account the task
/// that runs at a tick: a task that wakes up for short moments seems idle in them.
fn read_version1(
    cpuacct: &mut GroupDir,
    cpu: &mut GroupDir,
    memory: &mut GroupDir,
    known: Option<&Usage>,
) -> io::Result<Option<Usage>> {
    let Some(total_ns) = cpuacct.read_number("cpuacct.usage")? else { return Ok(None) };
    let memory_usage = memory.read_number("memory.usage_in_bytes")?;
    let known = known.filter(|known| known.memory.usage == memory_usage);
    // If the task has not run since the last measurement, these two files are enough, and six others are not read.
    if let Some(known) = known.filter(|known| known.cpu.total_ns == total_ns) {
        return Ok(Some(*known));
    }
    let (mut parts_text, mut cpu_text) = ([0; 128], [0; CPU_STAT_MAX]);
    let parts = FlatKeyed(cpuacct.read("cpuacct.stat", &mut parts_text)?);
    let nanos = |name: &str| parts.get(name).map(|ticks| ticks.saturating_mul(NANOS_PER_TICK));
    let throttling = FlatKeyed(cpu.read("cpu.stat", &mut cpu_text)?);
    let cpu = CpuUsage {
        total_ns,
        user_ns: nanos("user"),
        system_ns: nanos("system"),
        throttled_periods: throttling.get("nr_throttled"),
        throttled_ns: throttling.get("throttled_time"),
    };
    let max_usage = memory.read_number("memory.max_usage_in_bytes")?;
    if let Some(known) = known.filter(|known| known.memory.max_usage == max_usage) {
        return Ok(Some(Usage { cpu, memory: known.memory }));
    }
    let mut memory_text = [0; MEMORY_STAT_MAX];
    let stat = FlatKeyed(memory.read("memory.stat", &mut memory_text)?);
    Ok(Some(Usage {
        cpu,
        memory: MemoryUsage {
            rss: stat.get("total_rss"),
            cache: stat.get("total_cache"),
            usage: memory_usage,
            max_usage,
            swap: stat.get("total_swap"),
            kernel: memory.read_number("memory.kmem.usage_in_bytes")?,
            kernel_max: memory.read_number("memory.kmem.max_usage_in_bytes")?,
        },
    }))
}

/// Reads the usage on version 2 (cgroup-v2.rst). Times are in microseconds.
fn read_version2(group: &mut GroupDir, known: Option<&Usage>) -> io::Result<Option<Usage>> {
    let mut cpu_text = [0; CPU_STAT_MAX];
    let table = FlatKeyed(group.read("cpu.stat", &mut cpu_text)?);
    let nanos = |name: &str| table.get(name).map(|micros| micros.saturating_mul(1000));
    let Some(total_ns) = nanos("usage_usec") else { return Ok(None) };
    let cpu = CpuUsage {
        total_ns,
        user_ns: nanos("user_usec"),
        system_ns: nanos("system_usec"),
        throttled_periods: table.get("nr_throttled"),
        throttled_ns: nanos("throttled_usec"),
    };
    let memory_usage = group.read_number("memory.current")?;
    let max_usage = group.read_number("memory.peak")?;
    if let Some(known) = known.filter(|known| (known.memory.usage, known.memory.max_usage) == (memory_usage, max_usage))
    {
        return Ok(Some(Usage { cpu, memory: known.memory }));
    }
    let mut memory_text = [0; MEMORY_STAT_MAX];
    let stat = FlatKeyed(group.read("memory.stat", &mut memory_text)?);
    // The total `kernel` exists only since Linux 5.18. On older kernels, its largest parts are added up.
    let parts = stat.get("kernel_stack").zip(stat.get("slab")).map(|(stack, slab)| stack + slab);
    Ok(Some(Usage {
        cpu,
        memory: MemoryUsage {
            rss: stat.get("anon"),
            cache: stat.get("file"),
            usage: memory_usage,
            max_usage,
            swap: group.read_number("memory.swap.current")?,
            kernel: stat.get("kernel").or(parts),
            kernel_max: None,
        },
    }))
}

/// The directory of a cgroup, and its files once they were read. The files are kept open, because opening and closing a
/// file costs twice as much as reading it. A file that does not exist is `None`: the kernel, or this cgroup, does not
/// have it.
#[derive(Debug)]
struct GroupDir {
    fd: OwnedFd,
    files: Vec<(&'static str, Option<File>)>,
    keep_open: Option<KeepOpenPermit>,
}

/// The number of directories whose files are kept open.
static KEPT_OPEN: AtomicUsize = AtomicUsize::new(0);
/// A permit to keep the files of one directory open.
#[derive(Debug)]
struct KeepOpenPermit;

impl KeepOpenPermit {
    fn new() -> Option<Self> {
        // The permit is counted first. If there are too many, it is dropped, which reduces the count again.
        let (permit, before) = (Self, KEPT_OPEN.fetch_add(1, Ordering::Relaxed));
        (before < Self::max_kept_open()).then_some(permit)
    }

    /// Returns the maximum number of directories whose files are kept open. With some three files each, they use at
    /// most half of the file descriptors. A task needs five descriptors for other purposes.
    fn max_kept_open() -> usize {
        static MAX: OnceLock<usize> = OnceLock::new();
        *MAX.get_or_init(|| {
            let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
            usize::try_from(soft / 8).unwrap_or(usize::MAX)
        })
    }
}

impl Drop for KeepOpenPermit {
    fn drop(&mut self) {
        KEPT_OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

impl GroupDir {
    fn open(path: &Path) -> io::Result<Self> {
        let fd = open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok(Self { fd, files: Vec::new(), keep_open: KeepOpenPermit::new() })
    }

    /// Returns the text of a file, or an empty text if the file does not exist.
    fn read<'a>(&mut self, name: &'static str, buffer: &'a mut [u8]) -> io::Result<&'a str> {
        let at = match self.files.iter().position(|(known, _)| *known == name) {
            Some(at) => at,
            None => {
                let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
                let opened = openat(self.fd.as_fd(), name, flags, Mode::empty()).map_err(io::Error::from);
                // Any other failure, such as a lack of descriptors, may not last. The next call tries again.
                self.files.push((name, none_if_missing(opened)?.map(File::from)));
                self.files.len() - 1
            }
        };
        let length = self.files[at].1.as_ref().map_or(Ok(0), |file| read_all(file, buffer));
        if self.keep_open.is_none() {
            self.files.clear();
        }
        Ok(std::str::from_utf8(&buffer[..length?]).unwrap_or_default())
    }

    fn read_number(&mut self, name: &'static str) -> io::Result<Option<u64>> {
        Ok(self.read(name, &mut [0; 64])?.trim().parse().ok())
    }
}

/// Reads a file of a cgroup from its beginning, and returns the length of its text. A read from the beginning returns
/// the present state, however long the file has been open (seq_file.rst). The file of a cgroup that was removed, and one
/// that this kernel can't read, is empty.
fn read_all(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    loop {
        match file.read_at(&mut buffer[length..], length as u64) {
            Ok(0) => return Ok(length),
            Ok(more) => length += more,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EOPNOTSUPP)) => return Ok(0),
            Err(error) => return Err(error),
        }
        // The kernel returns up to a page at a time. If it returned less, the text is complete.
        if length < 4096 {
            return Ok(length);
        }
    }
}

/// A text with lines of the form `name value` (cgroup-v2.rst, "flat keyed").
struct FlatKeyed<'a>(&'a str);

impl FlatKeyed<'_> {
    fn get(&self, name: &str) -> Option<u64> {
        let value = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value?.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn dir(group: &tempfile::TempDir) -> GroupDir {
        GroupDir::open(group.path()).expect("a directory")
    }

    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let group = tempfile::tempdir().expect("a temporary directory");
        for (name, text) in files {
            fs::write(group.path().join(name), text).expect("written");
        }
        group
    }

    #[test]
    fn version_2_counts_microseconds() {
        let group = group(&[
            ("cpu.stat", "usage_usec 3000\nuser_usec 2000\nsystem_usec 1000\nnr_throttled 4\nthrottled_usec 7\n"),
            ("memory.stat", "anon 10\nfile 20\nkernel_stack 1\nslab 2\n"),
            ("memory.current", "33\n"),
            ("memory.swap.current", "0\n"),
        ]);
        let usage = read_version2(&mut dir(&group), None).expect("read").expect("a group");
        assert_eq!(
            (usage.cpu.total_ns, usage.cpu.user_ns, usage.cpu.throttled_ns),
            (3_000_000, Some(2_000_000), Some(7000))
        );
        let memory = MemoryUsage {
            rss: Some(10),
            cache: Some(20),
            usage: Some(33),
            swap: Some(0),
            kernel: Some(3),
            ..Default::default()
        };
        assert_eq!(usage.memory, memory);
    }

    #[test]
    fn version_1_counts_nanoseconds() {
        let group = group(&[
            ("cpuacct.usage", "38000000\n"),
            ("cpuacct.stat", "user 2\nsystem 1\n"),
            ("cpu.stat", "nr_periods 0\nnr_throttled 4\nthrottled_time 7\n"),
            ("memory.stat", "rss 1\ntotal_rss 10\ntotal_cache 20\ntotal_swap 7\n"),
            ("memory.usage_in_bytes", "33\n"),
            ("memory.max_usage_in_bytes", "50\n"),
        ]);
        let usage = read_version1(&mut dir(&group), &mut dir(&group), &mut dir(&group), None);
        let usage = usage.expect("read").expect("a group");
        let CpuUsage { total_ns, user_ns, system_ns, throttled_periods, .. } = usage.cpu;
        assert_eq!((total_ns, user_ns, system_ns), (38_000_000, Some(20_000_000), Some(10_000_000)));
        assert_eq!(throttled_periods, Some(4));
        assert_eq!((usage.memory.rss, usage.memory.swap, usage.memory.max_usage), (Some(10), Some(7), Some(50)));
        assert_eq!(usage.memory.kernel, None);
    }

    /// Reading all files of five hundred tasks each second is two thirds of the cost of watching these tasks.
    #[test]
    fn memory_stat_is_not_read_each_time_while_memory_is_unchanged() {
        let group = group(&[
            ("cpuacct.usage", "5\n"),
            ("memory.usage_in_bytes", "33\n"),
            ("memory.max_usage_in_bytes", "40\n"),
            ("memory.stat", "total_rss 1\n"),
        ]);
        let (cpuacct, cpu, memory) = (dir(&group), dir(&group), dir(&group));
        let mut meter = Meter::new(Groups::V1 { cpuacct, cpu, memory });
        let set = |file: &str, text: &str| fs::write(group.path().join(file), text).expect("written");
        let mut measure = || {
            let usage = meter.usage().expect("read").expect("a group");
            (usage.cpu.total_ns, usage.memory.rss)
        };
        // The first measurement, and as many as it takes until memory.stat is not read every time any more.
        for n in 0..=SETTLED_AFTER {
            set("memory.stat", &format!("total_rss {n}\n"));
            assert_eq!(measure(), (5, Some(u64::from(n))), "a late change in memory.stat is read");
        }
        set("memory.stat", "total_rss 70\n");
        for n in SETTLED_AFTER..FULL_READ_EVERY {
            // The task may run, and its CPU time is measured.
            set("cpuacct.usage", &n.to_string());
            assert_eq!(measure(), (u64::from(n), Some(u64::from(SETTLED_AFTER))));
        }
        assert_eq!(measure(), (9, Some(70)), "memory.stat is read again after that many measurements");
        set("memory.stat", "total_rss 80\n");
        assert_eq!(measure(), (9, Some(70)));
        set("memory.max_usage_in_bytes", "41\n");
        assert_eq!(measure(), (9, Some(70)), "the maximum is not read for a task that has not run");
        set("cpuacct.usage", "10\n");
        assert_eq!(measure(), (10, Some(80)), "the maximum has changed");
        set("memory.stat", "total_rss 90\n");
        set("memory.usage_in_bytes", "34\n");
        assert_eq!(measure(), (10, Some(90)), "the usage has changed");
    }

    #[test]
    fn a_group_that_is_gone_has_no_usage() {
        let empty = group(&[]);
        let (mut one, mut two, mut three) = (dir(&empty), dir(&empty), dir(&empty));
        assert_eq!(read_version1(&mut one, &mut two, &mut three, None).expect("read"), None);
        assert_eq!(read_version2(&mut one, None).expect("read"), None);
        assert!(none_if_missing(GroupDir::open(Path::new("/nonexistent"))).expect("looked").is_none());
    }

    /// A link that leads to itself stands for a file that can't be opened for lack of descriptors: unit tests share
    /// their process's limit.
    #[test]
    fn a_file_that_can_not_be_opened_once_is_read_later() {
        let group = group(&[("memory.current", "33\n"), ("memory.stat", "anon 10\n")]);
        let file = group.path().join("cpu.stat");
        std::os::unix::fs::symlink("cpu.stat", &file).expect("linked");
        let mut meter = Meter::new(Groups::V2(dir(&group)));
        assert_eq!(meter.usage().expect_err("the file can't be opened").raw_os_error(), Some(libc::ELOOP));
        fs::remove_file(&file).expect("removed");
        fs::write(&file, "usage_usec 3\n").expect("written");
        assert_eq!(meter.usage().expect("read").map(|usage| usage.cpu.total_ns), Some(3000));
    }
}
