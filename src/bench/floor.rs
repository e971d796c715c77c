//! The floor: a container that is made by raw system calls and nothing else, from the same spec as those of all other
//! subjects. Its start takes the time that the kernel needs, which is the lower bound for all other subjects.
//!
//! Everything is prepared before the clone, in a [`ChildPlan`], because the child can only make system calls
//! (`floor_child`).

use std::{
    ffi::{CString, c_int},
    fs, io,
    os::{
        fd::AsRawFd as _,
        unix::{ffi::OsStrExt as _, fs::DirBuilderExt as _},
    },
    path::{Path, PathBuf},
    ptr,
    sync::Arc,
};

use base64::Engine as _;
use nix::sys::signal::{SigSet, SigmaskHow};
use serde_json::{Value, json};

use super::floor_child::{self, ChildPlan, MountCall};
use crate::{
    cgroup::{CgroupMode, CgroupPath, Cgroups},
    process::PidFd,
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The size of the child's stack in bytes. The child's frames are small, and none of its functions is recursive.
const STACK_SIZE: usize = 256 << 10;

/// Makes containers by raw system calls.
#[derive(Debug)]
pub(crate) struct Floor {
    cgroups: Cgroups,
    /// The compiled seccomp filter, in the kernel's format.
    seccomp_filter: Vec<libc::sock_filter>,
}

/// The first process of a container, a child of this process.
#[derive(Debug, Clone)]
pub(crate) struct ContainerProcess {
    pid: libc::pid_t,
    handle: Arc<PidFd>,
    cgroup: CgroupPath,
}

impl ContainerProcess {
    /// Waits for the end of the process and returns whether its exit code was 0.
    pub(super) async fn wait(&self) -> io::Result<bool> {
        self.handle.wait_for_end().await;
        let mut status = 0;
        // SAFETY: the process is a child of this one, has ended, and is waited for nowhere else.
        if unsafe { libc::waitpid(self.pid, &raw mut status, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0)
    }

    /// Returns the pid of the process.
    pub(super) fn pid(&self) -> u32 {
        self.pid.cast_unsigned()
    }

    /// Sends a signal. Does nothing if the process has ended.
    pub(super) fn signal(&self, signal: c_int) {
        self.handle.signal(signal);
    }
}

impl Floor {
    /// Makes a floor whose containers have the compiled seccomp filter `program`: its instructions in base64, as crun
    /// takes them.
    pub(super) fn new(program: Option<&str>) -> Result<Self, Failure> {
        let bytes = base64::engine::general_purpose::STANDARD.decode(program.unwrap_or_default())?;
        let program = bytes
            .chunks_exact(8)
            .map(|i| libc::sock_filter {
                code: u16::from_ne_bytes([i[0], i[1]]),
                jt: i[2],
                jf: i[3],
                k: u32::from_ne_bytes([i[4], i[5], i[6], i[7]]),
            })
            .collect();
        Ok(Self { cgroups: Cgroups::detect()?, seccomp_filter: program })
    }

    /// Creates the container of `spec`, whose root file system is mounted already, and starts its process.
    pub(super) fn spawn(&self, spec: &Value, stdout: &Path, stderr: &Path) -> Result<ContainerProcess, Failure> {
        let procs = self.make_cgroup(spec)?;
        let write = |path: &Path| fs::OpenOptions::new().write(true).open(path);
        let (stdin, stdout, stderr) = (fs::File::open("/dev/null")?, write(stdout)?, write(stderr)?);
        let mut plan = self.plan_child(spec, procs, [stdin.as_raw_fd(), stdout.as_raw_fd(), stderr.as_raw_fd()])?;
        let mut flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD | libc::CLONE_NEWNS;
        for namespace in spec["linux"]["namespaces"].as_array().into_iter().flatten() {
            flags |= match namespace["type"].as_str() {
                Some("pid") => libc::CLONE_NEWPID,
                Some("ipc") => libc::CLONE_NEWIPC,
                Some("uts") => libc::CLONE_NEWUTS,
                Some("network") => libc::CLONE_NEWNET,
                Some("cgroup") => libc::CLONE_NEWCGROUP,
                _ => 0,
            };
        }
        let mut stack = vec![0_u8; STACK_SIZE];
        // SAFETY: the pointer is one past the end of the stack, aligned down to 16 bytes as the ABI requires. The stack
        // grows downwards.
        let top = unsafe { stack.as_mut_ptr().add(STACK_SIZE & !15) };
        // All signals are blocked: no signal handler of this process may run in the child, which inherits the handlers.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        // SAFETY: the child runs on a stack of its own and gets `plan`. Both outlive its use of them, because
        // with CLONE_VFORK this thread goes on only after the child has executed a program or ended.
        let pid = unsafe { libc::clone(floor_child::run, top.cast(), flags, (&raw mut plan).cast()) };
        let cloned = if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        before.thread_set_mask()?;
        cloned?;
        if let Some((step, errno)) = plan.failed {
            // SAFETY: the process is a child of this one and has ended.
            unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
            let error = io::Error::from_raw_os_error(errno);
            return Err(format!("the floor's container could not {}: {error}", step.text()).into());
        }
        let handle = Arc::new(PidFd::open(pid.cast_unsigned())?);
        let cgroup = CgroupPath::new(cgroup_path(spec)).ok_or("the template has no cgroup")?;
        Ok(ContainerProcess { pid, handle, cgroup })
    }

    /// Removes the cgroup of a container that has ended.
    pub(super) fn remove_cgroup(&self, process: &ContainerProcess) -> Result<(), Failure> {
        Ok(self.cgroups.remove(&process.cgroup)?)
    }

    /// Creates the cgroup with its limits in every hierarchy, and returns the files that move a process into it.
    fn make_cgroup(&self, spec: &Value) -> Result<Vec<CString>, Failure> {
        let path = cgroup_path(spec).trim_start_matches('/');
        let is_v2 = self.cgroups.mode() == CgroupMode::V2;
        let mut procs = Vec::new();
        for hierarchy in self.cgroups.hierarchies() {
            let group = hierarchy.join(path);
            fs::DirBuilder::new().recursive(true).mode(0o755).create(&group)?;
            if !is_v2 {
                limit_v1(&group, hierarchy, &spec["linux"]["resources"])?;
            } else {
                limit_v2(&group, &spec["linux"]["resources"])?;
            }
            procs.push(c_path(&group.join("cgroup.procs"))?);
        }
        Ok(procs)
    }

    /// Returns the calls that mount the container's cgroup: on version 1, a file system in memory, and in it a mount
    /// for each hierarchy, as runtimes do it.
    fn cgroup_calls(&self, mount: &Value, root: &Path, path: &str) -> Result<Vec<MountCall>, Failure> {
        let mut mount = mount.clone();
        if self.cgroups.mode() == CgroupMode::V2 {
            mount["type"] = "cgroup2".into();
            return mount_calls(&mount, root);
        }
        let destination = mount["destination"].as_str().unwrap_or_default().to_owned();
        let memory = json!({
            "type": "tmpfs", "source": "tmpfs", "destination": destination,
            "options": ["nosuid", "noexec", "nodev", "relatime", "mode=755"],
        });
        let mut all = mount_calls(&memory, root)?;
        let options = mount["options"].as_array().cloned().unwrap_or_default();
        // Runtimes leave out the hierarchy of version 2 that systemd has on such hosts.
        let is_v1 = |hierarchy: &&PathBuf| !hierarchy.join("cgroup.controllers").exists();
        for hierarchy in self.cgroups.hierarchies().iter().filter(is_v1) {
            let name = hierarchy.file_name().unwrap_or_default().to_string_lossy();
            let bind = json!({
                "type": "bind", "source": hierarchy.join(path.trim_start_matches('/')),
                "destination": format!("{destination}/{name}"),
                "options": options.iter().cloned().chain(["bind".into()]).collect::<Vec<Value>>(),
            });
            all.extend(mount_calls(&bind, root)?);
        }
        Ok(all)
    }

    /// Prepares everything that the child needs.
    fn plan_child(&self, spec: &Value, procs: Vec<CString>, stdio: [c_int; 3]) -> Result<ChildPlan, Failure> {
        let root = PathBuf::from(spec["root"]["path"].as_str().unwrap_or_default());
        let mut mounts = Vec::new();
        for mount in spec["mounts"].as_array().into_iter().flatten() {
            match mount["type"].as_str() {
                Some("cgroup") => mounts.extend(self.cgroup_calls(mount, &root, cgroup_path(spec))?),
                _ => mounts.extend(mount_calls(mount, &root)?),
            }
        }
        let masks = masks(spec, &root)?;
        let process = &spec["process"];
        let capabilities = strings(&process["capabilities"]["bounding"]);
        let capabilities = capabilities
            .iter()
            .filter_map(|name| name.parse::<caps::Capability>().ok())
            .fold(0_u64, |set, capability| set | 1 << capability.index());
        let number = |value: &Value| u32::try_from(value.as_u64().unwrap_or_default()).unwrap_or_default();
        let c = |items: Vec<String>| items.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>();
        let (args, env) = (c(strings(&process["args"]))?, c(strings(&process["env"]))?);
        let pointers =
            |strings: &[CString]| strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect::<Vec<_>>();
        let dev = |name: &str| c_path(&root.join("dev").join(name));
        let node = |name: &str, major, minor| -> Result<_, Failure> {
            Ok((dev(name)?, libc::S_IFCHR | 0o666, libc::makedev(major, minor)))
        };
        let link = |target: &str, name: &str| -> Result<_, Failure> { Ok((CString::new(target)?, dev(name)?)) };
        Ok(ChildPlan {
            procs,
            mounts,
            masks,
            nodes: vec![
                node("null", 1, 3)?,
                node("zero", 1, 5)?,
                node("full", 1, 7)?,
                node("random", 1, 8)?,
                node("urandom", 1, 9)?,
                node("tty", 5, 0)?,
            ],
            links: vec![
                link("/proc/self/fd", "fd")?,
                link("/proc/self/fd/0", "stdin")?,
                link("/proc/self/fd/1", "stdout")?,
                link("/proc/self/fd/2", "stderr")?,
                link("pts/ptmx", "ptmx")?,
            ],
            root: c_path(&root)?,
            hostname: CString::new(spec["hostname"].as_str().unwrap_or_default())?,
            groups: process["user"]["additionalGids"].as_array().into_iter().flatten().map(number).collect(),
            uid: number(&process["user"]["uid"]),
            gid: number(&process["user"]["gid"]),
            capabilities,
            no_new_privileges: process["noNewPrivileges"].as_bool().unwrap_or_default(),
            oom_score: CString::new(process["oomScoreAdj"].as_i64().unwrap_or_default().to_string())?,
            seccomp_filter: libc::sock_fprog {
                len: u16::try_from(self.seccomp_filter.len())?,
                filter: self.seccomp_filter.as_ptr().cast_mut(),
            },
            stdio,
            cwd: CString::new(process["cwd"].as_str().unwrap_or("/"))?,
            path: args.first().cloned().unwrap_or_default(),
            args: pointers(&args),
            env: pointers(&env),
            _strings: args.into_iter().chain(env).collect(),
            failed: None,
        })
    }
}

/// Returns the strings of an array in the spec.
fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|item| item.as_str().map(str::to_owned)).collect()
}

/// Returns the calls that hide the spec's masked paths and make its read-only paths read-only.
fn masks(spec: &Value, root: &Path) -> Result<Vec<MountCall>, Failure> {
    let inside = |path: &str| root.join(path.trim_start_matches('/'));
    let mut masks = Vec::new();
    for path in strings(&spec["linux"]["maskedPaths"]) {
        // The host's own /proc and /sys show whether the path exists and is a directory.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        let target = c_path(&inside(&path))?;
        let empty = CString::default();
        masks.push(if metadata.is_dir() {
            let kind = CString::new("tmpfs")?;
            MountCall { source: kind.clone(), target, kind, flags: libc::MS_RDONLY, data: empty }
        } else {
            let source = c_path(&inside("/dev/null"))?;
            MountCall { source, target, kind: empty.clone(), flags: libc::MS_BIND, data: empty }
        });
    }
    for path in strings(&spec["linux"]["readonlyPaths"]) {
        if fs::metadata(&path).is_err() {
            continue;
        }
        let target = c_path(&inside(&path))?;
        for flags in [
            libc::MS_BIND | libc::MS_REC,
            libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
        ] {
            let empty = CString::default();
            masks.push(MountCall {
                source: target.clone(),
                target: target.clone(),
                kind: empty.clone(),
                flags,
                data: empty,
            });
        }
    }
    Ok(masks)
}

/// Returns a path in the form that system calls take.
fn c_path(path: &Path) -> Result<CString, Failure> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Returns the calls that make one mount of the spec, and creates the mount's target from outside of the container.
fn mount_calls(mount: &Value, root: &Path) -> Result<Vec<MountCall>, Failure> {
    let text = |key: &str| mount[key].as_str().unwrap_or_default().to_owned();
    let (source, kind) = (text("source"), text("type"));
    let target = root.join(text("destination").trim_start_matches('/'));
    let (mut flags, mut propagation, mut bind, mut data) = (0, 0, false, Vec::new());
    for option in mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        match option {
            "nosuid" => flags |= libc::MS_NOSUID,
            "noexec" => flags |= libc::MS_NOEXEC,
            "nodev" => flags |= libc::MS_NODEV,
            "ro" => flags |= libc::MS_RDONLY,
            "strictatime" => flags |= libc::MS_STRICTATIME,
            "relatime" => flags |= libc::MS_RELATIME,
            "rw" => {}
            "bind" | "rbind" => bind = true,
            "rprivate" => propagation = libc::MS_PRIVATE | libc::MS_REC,
            "rslave" => propagation = libc::MS_SLAVE | libc::MS_REC,
            other => data.push(other),
        }
    }
    let on_dev = target.starts_with(root.join("dev")) && target != root.join("dev");
    // Targets below /dev are created by the child, after /dev was mounted.
    if bind && fs::metadata(&source).is_ok_and(|source| source.is_file()) {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        drop(fs::OpenOptions::new().create(true).append(true).open(&target)?);
    } else if !on_dev {
        fs::create_dir_all(&target)?;
    }
    let empty = CString::default();
    let target = c_path(&target)?;
    let call = |source: &str, kind: &str, flags, data: &str| -> Result<MountCall, Failure> {
        Ok(MountCall {
            source: CString::new(source)?,
            target: target.clone(),
            kind: CString::new(kind)?,
            flags,
            data: if data.is_empty() { empty.clone() } else { CString::new(data)? },
        })
    };
    if !bind {
        return Ok(vec![call(&source, &kind, flags, &data.join(","))?]);
    }
    let mut all = vec![call(&source, "", libc::MS_BIND | libc::MS_REC, "")?];
    if flags != 0 {
        all.push(call("", "", libc::MS_BIND | libc::MS_REMOUNT | flags, "")?);
    }
    if propagation != 0 {
        all.push(call("", "", propagation, "")?);
    }
    Ok(all)
}

/// Writes the limits to a cgroup of version 1, as runtimes do (linux, Documentation/admin-guide/cgroup-v1).
fn limit_v1(group: &Path, hierarchy: &Path, resources: &Value) -> io::Result<()> {
    let put = |file: &str, value: String| {
        let path = group.join(file);
        if path.exists() { fs::write(path, value) } else { Ok(()) }
    };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if group.join(file).exists() {
            // The parent groups may be new, too, and then have no processors and memory nodes yet.
            let mut place = hierarchy.to_owned();
            for part in group.strip_prefix(hierarchy).into_iter().flat_map(Path::iter) {
                let above = fs::read_to_string(place.join(file))?;
                place.push(part);
                if fs::read_to_string(place.join(file))?.trim().is_empty() {
                    fs::write(place.join(file), above.trim())?;
                }
            }
        }
    }
    let number = |value: &Value| value.as_i64().map(|number| number.to_string());
    for (file, value) in [
        ("memory.limit_in_bytes", &resources["memory"]["limit"]),
        ("memory.soft_limit_in_bytes", &resources["memory"]["reservation"]),
        ("memory.memsw.limit_in_bytes", &resources["memory"]["swap"]),
        ("cpu.shares", &resources["cpu"]["shares"]),
        ("cpu.cfs_period_us", &resources["cpu"]["period"]),
        ("cpu.cfs_quota_us", &resources["cpu"]["quota"]),
        ("pids.max", &resources["pids"]["limit"]),
    ] {
        if let Some(value) = number(value) {
            put(file, value)?;
        }
    }
    for rule in resources["devices"].as_array().into_iter().flatten() {
        let part = |key: &str| rule[key].as_i64().map_or_else(|| "*".to_owned(), |number| number.to_string());
        let kind = rule["type"].as_str().unwrap_or("a");
        let access = rule["access"].as_str().unwrap_or("rwm");
        let file = if rule["allow"].as_bool() == Some(true) { "devices.allow" } else { "devices.deny" };
        put(file, format!("{kind} {}:{} {access}", part("major"), part("minor")))?;
    }
    Ok(())
}

/// Writes the limits to a cgroup of version 2, except those on devices, which need a BPF program there.
fn limit_v2(group: &Path, resources: &Value) -> io::Result<()> {
    let shares = resources["cpu"]["shares"].as_u64().map(|shares| 1 + (shares.saturating_sub(2) * 9999) / 262_142);
    for (file, value) in [
        ("memory.max", resources["memory"]["limit"].as_u64()),
        ("memory.low", resources["memory"]["reservation"].as_u64()),
        ("cpu.weight", shares),
        ("pids.max", resources["pids"]["limit"].as_u64()),
    ] {
        let path = group.join(file);
        if let Some(value) = value
            && path.exists()
        {
            fs::write(path, value.to_string())?;
        }
    }
    Ok(())
}

/// Returns the cgroup's path from the spec.
fn cgroup_path(spec: &Value) -> &str {
    spec["linux"]["cgroupsPath"].as_str().unwrap_or_default()
}
