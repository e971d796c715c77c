//! What a task uses, read from the kernel's own files: no call to a shim, no process, 0.1 ms.

use std::{
    fs::File,
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

use super::{CgroupMode, CgroupPath, Cgroups, ROOT};

/// USER_HZ is 100 wherever Linux runs containers (sysconf(3), `_SC_CLK_TCK`).
const NANOS_PER_TICK: u64 = 10_000_000;
/// The longest file read here, memory.stat, has some 2 KB.
const MEMORY_STAT_MAX: usize = 16 << 10;
/// cpu.stat has a tenth of it.
const CPU_STAT_MAX: usize = 2 << 10;

/// One look at a task's cgroup. None where this kernel does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time in nanoseconds since the group was made.
    pub cpu: CpuUsage,
    /// Memory in bytes.
    pub memory: MemoryUsage,
}

/// Of one processor, in percent: what was spent between two looks that lie `time` apart. 100 is a whole one.
#[allow(clippy::cast_precision_loss, reason = "percentages need no more than 52 bits")]
pub fn percent(before_ns: u64, after_ns: u64, time: Duration) -> f64 {
    let spent = after_ns.saturating_sub(before_ns);
    if time.is_zero() { 0.0 } else { spent as f64 / time.as_nanos() as f64 * 100.0 }
}

/// Processor time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuUsage {
    /// All of it, in nanoseconds.
    pub total_ns: u64,
    /// In user mode, in nanoseconds.
    pub user_ns: Option<u64>,
    /// In the kernel, in nanoseconds.
    pub system_ns: Option<u64>,
    /// How many periods it was held back in.
    pub throttled_periods: Option<u64>,
    /// How long it was held back, in nanoseconds.
    pub throttled_ns: Option<u64>,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Anonymous memory.
    pub rss: Option<u64>,
    /// Page cache.
    pub cache: Option<u64>,
    /// All that is charged to the group.
    pub usage: Option<u64>,
    /// The most that ever was.
    pub max_usage: Option<u64>,
    /// Swap.
    pub swap: Option<u64>,
    /// The kernel's own on its behalf.
    pub kernel: Option<u64>,
    /// The most that ever was of it.
    pub kernel_max: Option<u64>,
}

/// What a task's memory is made of is read again when it holds more or less of it, or has held more. That is relied on
/// after so many looks at which nothing moved (memory.stat is up to two seconds late) ...
const SETTLED: u32 = 3;
/// ... and not in each tenth. It is most of what a look costs, and few tasks' memory moves in a second.
const WHOLE: u32 = 10;

/// A task's cgroup, held open for many looks.
#[derive(Debug)]
pub struct Meter {
    groups: Groups,
    last: Option<Usage>,
    /// For how many looks it has held as much memory.
    still: u32,
}

#[derive(Debug)]
enum Groups {
    V1 { cpuacct: Dir, cpu: Dir, memory: Dir },
    V2(Dir),
}

impl Cgroups {
    /// What a task uses right now; None when its group is gone.
    pub fn usage(&self, task: &CgroupPath) -> Option<Usage> {
        self.meter(task)?.usage()
    }

    /// Opens a task's cgroup; None when it is gone.
    pub fn meter(&self, task: &CgroupPath) -> Option<Meter> {
        let groups = match self.mode {
            CgroupMode::V1 => Groups::V1 {
                cpuacct: Dir::open(&task.below(&self.controller("cpuacct")))?,
                cpu: Dir::open(&task.below(&self.controller("cpu")))?,
                memory: Dir::open(&task.below(&self.controller("memory")))?,
            },
            CgroupMode::V2 => Groups::V2(Dir::open(&task.below(Path::new(ROOT)))?),
        };
        Some(Meter::new(groups))
    }

    /// Where a v1 controller is mounted: alone, or with another as `cpu,cpuacct`.
    fn controller(&self, name: &str) -> std::path::PathBuf {
        let has = |point: &&std::path::PathBuf| {
            point.file_name().and_then(|file| file.to_str()).is_some_and(|file| file.split(',').any(|one| one == name))
        };
        self.hierarchies.iter().find(has).cloned().unwrap_or_else(|| Path::new(ROOT).join(name))
    }
}

impl Meter {
    fn new(groups: Groups) -> Self {
        Self { groups, last: None, still: 0 }
    }

    /// What the task uses right now; None when its group is gone.
    pub fn usage(&mut self) -> Option<Usage> {
        let settled = self.still >= SETTLED && !self.still.is_multiple_of(WHOLE);
        let known = self.last.as_ref().filter(|_| settled);
        let usage = match &mut self.groups {
            Groups::V1 { cpuacct, cpu, memory } => version1(cpuacct, cpu, memory, known),
            Groups::V2(group) => version2(group, known),
        };
        let still = usage.zip(self.last).is_some_and(|(now, last)| now.memory.usage == last.memory.usage);
        self.still = if still { self.still.wrapping_add(1) } else { 0 };
        self.last = usage;
        usage
    }
}

/// cgroup-v1/cpuacct.rst, memory.rst: times in nanoseconds, and of user and system in ticks. `cpuacct.usage_user` and
/// `_sys` have nanoseconds, too, but only count who runs at a tick: a task that wakes up for moments seems idle.
fn version1(cpuacct: &mut Dir, cpu: &mut Dir, memory: &mut Dir, known: Option<&Usage>) -> Option<Usage> {
    let total_ns = cpuacct.number("cpuacct.usage")?;
    let held = memory.number("memory.usage_in_bytes");
    let known = known.filter(|known| known.memory.usage == held);
    // It has not run: two files have told, in place of eight.
    if let Some(known) = known.filter(|known| known.cpu.total_ns == total_ns) {
        return Some(*known);
    }
    let (mut parts_text, mut cpu_text) = ([0; 128], [0; CPU_STAT_MAX]);
    let parts = Table(cpuacct.read("cpuacct.stat", &mut parts_text));
    let nanos = |name: &str| parts.get(name).map(|ticks| ticks.saturating_mul(NANOS_PER_TICK));
    let throttling = Table(cpu.read("cpu.stat", &mut cpu_text));
    let cpu = CpuUsage {
        total_ns,
        user_ns: nanos("user"),
        system_ns: nanos("system"),
        throttled_periods: throttling.get("nr_throttled"),
        throttled_ns: throttling.get("throttled_time"),
    };
    let max_usage = memory.number("memory.max_usage_in_bytes");
    if let Some(known) = known.filter(|known| known.memory.max_usage == max_usage) {
        return Some(Usage { cpu, memory: known.memory });
    }
    let mut memory_text = [0; MEMORY_STAT_MAX];
    let stat = Table(memory.read("memory.stat", &mut memory_text));
    Some(Usage {
        cpu,
        memory: MemoryUsage {
            rss: stat.get("total_rss"),
            cache: stat.get("total_cache"),
            usage: held,
            max_usage,
            swap: stat.get("total_swap"),
            kernel: memory.number("memory.kmem.usage_in_bytes"),
            kernel_max: memory.number("memory.kmem.max_usage_in_bytes"),
        },
    })
}

/// cgroup-v2.rst: times in microseconds.
fn version2(group: &mut Dir, known: Option<&Usage>) -> Option<Usage> {
    let mut cpu_text = [0; CPU_STAT_MAX];
    let table = Table(group.read("cpu.stat", &mut cpu_text));
    let nanos = |name: &str| table.get(name).map(|micros| micros.saturating_mul(1000));
    let cpu = CpuUsage {
        total_ns: nanos("usage_usec")?,
        user_ns: nanos("user_usec"),
        system_ns: nanos("system_usec"),
        throttled_periods: table.get("nr_throttled"),
        throttled_ns: nanos("throttled_usec"),
    };
    let held = group.number("memory.current");
    let max_usage = group.number("memory.peak");
    if let Some(known) = known.filter(|known| (known.memory.usage, known.memory.max_usage) == (held, max_usage)) {
        return Some(Usage { cpu, memory: known.memory });
    }
    let mut memory_text = [0; MEMORY_STAT_MAX];
    let stat = Table(group.read("memory.stat", &mut memory_text));
    // `kernel` is younger (5.18) than its largest parts.
    let parts = stat.get("kernel_stack").zip(stat.get("slab")).map(|(stack, slab)| stack + slab);
    Some(Usage {
        cpu,
        memory: MemoryUsage {
            rss: stat.get("anon"),
            cache: stat.get("file"),
            usage: held,
            max_usage,
            swap: group.number("memory.swap.current"),
            kernel: stat.get("kernel").or(parts),
            kernel_max: None,
        },
    })
}

/// A cgroup's directory, and its files once they were read. Opening and closing one costs twice as much as reading it.
#[derive(Debug)]
struct Dir {
    fd: OwnedFd,
    files: Vec<(&'static str, Option<File>)>,
    keep: Option<Kept>,
}

/// Directories whose files are kept open.
static KEPT: AtomicUsize = AtomicUsize::new(0);
/// One of them.
#[derive(Debug)]
struct Kept;

impl Kept {
    fn new() -> Option<Self> {
        // It counts first, and takes itself back by being dropped.
        let (kept, before) = (Self, KEPT.fetch_add(1, Ordering::Relaxed));
        (before < Self::most()).then_some(kept)
    }

    /// With some three files each, they have at most half of the descriptors; tasks need five each themselves.
    fn most() -> usize {
        static MOST: OnceLock<usize> = OnceLock::new();
        *MOST.get_or_init(|| {
            let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
            usize::try_from(soft / 8).unwrap_or(usize::MAX)
        })
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        KEPT.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Dir {
    fn open(path: &Path) -> Option<Self> {
        let fd = open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
        Some(Self { fd, files: Vec::new(), keep: Kept::new() })
    }

    /// A file's text; empty when it is not there.
    fn read<'a>(&mut self, name: &'static str, buffer: &'a mut [u8]) -> &'a str {
        // Read from its beginning, such a file tells the present state, however long it has been open (seq_file.rst).
        let all_of = |file: &File, buffer: &mut [u8]| {
            let mut length = 0;
            while let Ok(more @ 1..) = file.read_at(&mut buffer[length..], length as u64) {
                length += more;
                // A number, or less than a page: that was all of it.
                if length < 4096 {
                    break;
                }
            }
            length
        };
        let known = self.files.iter().position(|(known, _)| *known == name);
        let at = known.unwrap_or_else(|| {
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
            self.files.push((name, openat(self.fd.as_fd(), name, flags, Mode::empty()).ok().map(File::from)));
            self.files.len() - 1
        });
        let length = self.files[at].1.as_ref().map_or(0, |file| all_of(file, buffer));
        if self.keep.is_none() {
            self.files.clear();
        }
        std::str::from_utf8(&buffer[..length]).unwrap_or_default()
    }

    fn number(&mut self, name: &'static str) -> Option<u64> {
        self.read(name, &mut [0; 64]).trim().parse().ok()
    }
}

/// `name value` lines.
struct Table<'a>(&'a str);

impl Table<'_> {
    fn get(&self, name: &str) -> Option<u64> {
        let value = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value?.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn dir(group: &tempfile::TempDir) -> Dir {
        Dir::open(group.path()).expect("a directory")
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
        let usage = version2(&mut dir(&group), None).expect("a group");
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
        let usage = version1(&mut dir(&group), &mut dir(&group), &mut dir(&group), None).expect("a group");
        let CpuUsage { total_ns, user_ns, system_ns, throttled_periods, .. } = usage.cpu;
        assert_eq!((total_ns, user_ns, system_ns), (38_000_000, Some(20_000_000), Some(10_000_000)));
        assert_eq!(throttled_periods, Some(4));
        assert_eq!((usage.memory.rss, usage.memory.swap, usage.memory.max_usage), (Some(10), Some(7), Some(50)));
        assert_eq!(usage.memory.kernel, None);
    }

    /// Reading everything of five hundred tasks each second is two thirds of what watching them costs.
    #[test]
    fn memory_that_does_not_move_is_not_taken_apart_each_time() {
        let group = group(&[
            ("cpuacct.usage", "5\n"),
            ("memory.usage_in_bytes", "33\n"),
            ("memory.max_usage_in_bytes", "40\n"),
            ("memory.stat", "total_rss 1\n"),
        ]);
        let (cpuacct, cpu, memory) = (dir(&group), dir(&group), dir(&group));
        let mut meter = Meter::new(Groups::V1 { cpuacct, cpu, memory });
        let set = |file: &str, text: &str| fs::write(group.path().join(file), text).expect("written");
        let mut look = || meter.usage().map(|usage| (usage.cpu.total_ns, usage.memory.rss)).expect("a group");
        // The first look, and as many as it takes to rely on nothing having moved.
        for n in 0..=SETTLED {
            set("memory.stat", &format!("total_rss {n}\n"));
            assert_eq!(look(), (5, Some(u64::from(n))), "late news of what it did");
        }
        set("memory.stat", "total_rss 70\n");
        for n in SETTLED..WHOLE {
            // It may run, and that is told.
            set("cpuacct.usage", &n.to_string());
            assert_eq!(look(), (u64::from(n), Some(u64::from(SETTLED))));
        }
        assert_eq!(look(), (9, Some(70)), "for ever");
        set("memory.stat", "total_rss 80\n");
        assert_eq!(look(), (9, Some(70)));
        set("memory.max_usage_in_bytes", "41\n");
        assert_eq!(look(), (9, Some(70)), "what does not run can't have held more");
        set("cpuacct.usage", "10\n");
        assert_eq!(look(), (10, Some(80)), "it has held more");
        set("memory.stat", "total_rss 90\n");
        set("memory.usage_in_bytes", "34\n");
        assert_eq!(look(), (10, Some(90)), "it holds more");
    }

    #[test]
    fn a_group_that_is_gone_has_no_usage() {
        let empty = group(&[]);
        let (mut one, mut two, mut three) = (dir(&empty), dir(&empty), dir(&empty));
        assert_eq!((version1(&mut one, &mut two, &mut three, None), version2(&mut one, None)), (None, None));
        assert!(Dir::open(Path::new("/nonexistent")).is_none());
    }
}
