//! The child process of the floor, which makes a container around itself and executes the task's program.
//!
//! The child shares the parent's memory until then (`CLONE_VM`, `CLONE_VFORK`), so it allocates nothing, takes no lock
//! and makes only system calls. All that it needs is prepared in [`ChildPlan`].

use std::{
    ffi::{CString, c_char, c_int, c_void},
    ptr,
};

/// The arguments of one mount(2).
pub(super) struct MountCall {
    pub(super) source: CString,
    pub(super) target: CString,
    pub(super) kind: CString,
    pub(super) flags: libc::c_ulong,
    pub(super) data: CString,
}

/// All that the child needs, in the form that system calls require.
pub(super) struct ChildPlan {
    /// The cgroups' files that move a process into them.
    pub(super) procs: Vec<CString>,
    pub(super) root: CString,
    pub(super) mounts: Vec<MountCall>,
    /// Mounts that hide paths or make them read-only. They come after the device nodes, since files are hidden by
    /// `/dev/null`.
    pub(super) masks: Vec<MountCall>,
    /// Device nodes: path, mode and device number.
    pub(super) nodes: Vec<(CString, libc::mode_t, libc::dev_t)>,
    /// Symlinks: target and path.
    pub(super) links: Vec<(CString, CString)>,
    pub(super) hostname: CString,
    pub(super) groups: Vec<libc::gid_t>,
    pub(super) uid: libc::uid_t,
    pub(super) gid: libc::gid_t,
    pub(super) capabilities: u64,
    pub(super) no_new_privileges: bool,
    pub(super) oom_score: CString,
    pub(super) seccomp_filter: libc::sock_fprog,
    pub(super) stdio: [c_int; 3],
    pub(super) cwd: CString,
    pub(super) path: CString,
    pub(super) args: Vec<*const c_char>,
    pub(super) env: Vec<*const c_char>,
    /// The strings that `args` and `env` point to.
    pub(super) _strings: Vec<CString>,
    /// The step that has failed and its errno. The child writes it.
    pub(super) failed: Option<(ChildStep, c_int)>,
}

/// The child's entry point. It runs on memory that it shares with the parent, so it may only make system calls.
pub(super) extern "C" fn run(plan: *mut c_void) -> c_int {
    // SAFETY: `Floor::spawn` passes a `ChildPlan` that lives until this process has executed a program or ended, and
    // does not access it until then.
    let plan = unsafe { &mut *plan.cast::<ChildPlan>() };
    let (Err(step) | Ok(step)) = enter_container(plan);
    // SAFETY: this is errno of the parent's thread, which waits.
    plan.failed = Some((step, unsafe { *libc::__errno_location() }));
    // SAFETY: `_exit` ends this process only, and runs no exit handlers of the parent.
    unsafe { libc::_exit(127) }
}

/// The steps of the child, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChildStep {
    JoinCgroup,
    Setsid,
    MakeSlave,
    Mount,
    MakeDevice,
    Mask,
    Symlink,
    PivotRoot,
    SetHostname,
    LoopbackUp,
    SetOomScore,
    SetStdio,
    SetUser,
    SetCapabilities,
    NoNewPrivileges,
    ChangeDirectory,
    ResetSignals,
    SetSeccompFilter,
    Execute,
}

impl ChildStep {
    /// Returns the step as a verb phrase for errors.
    pub(super) const fn text(self) -> &'static str {
        match self {
            Self::JoinCgroup => "join its cgroup",
            Self::Setsid => "make a session",
            Self::MakeSlave => "make the mounts slaves",
            Self::Mount => "mount",
            Self::MakeDevice => "make a device",
            Self::Mask => "mask a path",
            Self::Symlink => "make a link",
            Self::PivotRoot => "change its root",
            Self::SetHostname => "set its host name",
            Self::LoopbackUp => "set lo up",
            Self::SetOomScore => "set oom_score_adj",
            Self::SetStdio => "set its standard streams",
            Self::SetUser => "change its user",
            Self::SetCapabilities => "set its capabilities",
            Self::NoNewPrivileges => "set no_new_privs",
            Self::ChangeDirectory => "change its directory",
            Self::ResetSignals => "reset its signal mask",
            Self::SetSeccompFilter => "set its seccomp filter",
            Self::Execute => "execute its program",
        }
    }
}

/// Returns the step as the error if a system call of the child has failed.
const fn check(succeeded: bool, step: ChildStep) -> Result<(), ChildStep> {
    if succeeded { Ok(()) } else { Err(step) }
}

/// Makes the container around this process and executes its program. Returns only if a step fails, with that step.
fn enter_container(plan: &ChildPlan) -> Result<ChildStep, ChildStep> {
    // SAFETY: the child calls these functions; see each of them.
    unsafe {
        join_cgroup(plan)?;
        enter_root(plan)?;
        set_up_process(plan)?;
        drop_privileges(plan)?;
        execute(plan)
    }
}

/// Joins the cgroups and leaves the session.
///
/// # Safety
/// The child calls this, so it makes only system calls. Every pointer comes from a `CString` of `plan`.
unsafe fn join_cgroup(plan: &ChildPlan) -> Result<(), ChildStep> {
    // SAFETY: each pointer is valid during its call, and each string is terminated.
    unsafe {
        for procs in &plan.procs {
            let fd = libc::open(procs.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            check(fd >= 0 && libc::write(fd, c"0".as_ptr().cast(), 1) == 1, ChildStep::JoinCgroup)?;
            libc::close(fd);
        }
        check(libc::setsid() >= 0, ChildStep::Setsid)
    }
}

/// Mounts what the container has, and changes the root directory (mount(2), pivot_root(2)).
///
/// # Safety
/// The child calls this, so it makes only system calls. Every pointer comes from a `CString` of `plan`.
unsafe fn enter_root(plan: &ChildPlan) -> Result<(), ChildStep> {
    let null = ptr::null::<c_char>();
    // SAFETY: each pointer is valid during its call, and each string is terminated.
    unsafe {
        let slave = libc::MS_REC | libc::MS_SLAVE;
        check(libc::mount(null, c"/".as_ptr(), null, slave, ptr::null()) == 0, ChildStep::MakeSlave)?;
        let old = libc::umask(0);
        let mut is_dev_mounted = false;
        for mount in &plan.mounts {
            if !is_dev_mounted {
                // The first target that doesn't exist yet is below /dev, which is mounted by now.
                is_dev_mounted = libc::access(mount.target.as_ptr(), libc::F_OK) != 0;
            }
            if is_dev_mounted {
                libc::mkdir(mount.target.as_ptr(), 0o755);
            }
            check(call_mount(mount), ChildStep::Mount)?;
        }
        for (path, mode, device) in &plan.nodes {
            check(libc::mknod(path.as_ptr(), *mode, *device) == 0, ChildStep::MakeDevice)?;
        }
        for mask in &plan.masks {
            check(call_mount(mask), ChildStep::Mask)?;
        }
        for (target, path) in &plan.links {
            check(libc::symlink(target.as_ptr(), path.as_ptr()) == 0, ChildStep::Symlink)?;
        }
        libc::umask(old);
        let is_entered = libc::chdir(plan.root.as_ptr()) == 0
            && libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) == 0
            && libc::umount2(c".".as_ptr(), libc::MNT_DETACH) == 0
            && libc::chdir(c"/".as_ptr()) == 0;
        check(is_entered, ChildStep::PivotRoot)
    }
}

/// Makes one call of mount(2). Returns whether it succeeded.
///
/// # Safety
/// The child calls this, so it makes only a system call.
unsafe fn call_mount(mount: &MountCall) -> bool {
    let (source, target) = (mount.source.as_ptr(), mount.target.as_ptr());
    // SAFETY: each pointer comes from a `CString` that lives during the call.
    unsafe { libc::mount(source, target, mount.kind.as_ptr(), mount.flags, mount.data.as_ptr().cast()) == 0 }
}

/// Sets the host name, the loopback device, the OOM score and the standard streams.
///
/// # Safety
/// The child calls this, so it makes only system calls. Every pointer comes from a `CString` or array of `plan`.
unsafe fn set_up_process(plan: &ChildPlan) -> Result<(), ChildStep> {
    // SAFETY: each pointer is valid during its call, and each length is that of the memory it goes with.
    unsafe {
        let is_named = libc::sethostname(plan.hostname.as_ptr(), plan.hostname.as_bytes().len()) == 0;
        check(is_named, ChildStep::SetHostname)?;
        check(loopback_up(), ChildStep::LoopbackUp)?;
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        let score = plan.oom_score.as_bytes();
        check(fd >= 0 && libc::write(fd, score.as_ptr().cast(), score.len()) >= 0, ChildStep::SetOomScore)?;
        libc::close(fd);
        for (to, from) in plan.stdio.iter().enumerate() {
            check(libc::dup2(*from, c_int::try_from(to).unwrap_or_default()) >= 0, ChildStep::SetStdio)?;
        }
        libc::close_range(3, libc::c_uint::MAX, 0);
    }
    Ok(())
}

/// Changes the user and reduces the capabilities (capset(2)).
///
/// # Safety
/// The child calls this, so it makes only system calls. Every pointer comes from an array of `plan` or of this stack.
unsafe fn drop_privileges(plan: &ChildPlan) -> Result<(), ChildStep> {
    // SAFETY: each pointer is valid during its call; the structs have the layout that the kernel wants.
    unsafe {
        for capability in 0..=63 {
            // An error is EINVAL: the kernel knows no capabilities of this and higher numbers.
            if plan.capabilities & (1_u64 << capability) == 0
                && libc::prctl(libc::PR_CAPBSET_DROP, capability as libc::c_ulong, 0, 0, 0) != 0
            {
                break;
            }
        }
        let is_changed = libc::syscall(libc::SYS_setgroups, plan.groups.len(), plan.groups.as_ptr()) == 0
            && libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_setresgid, plan.gid, plan.gid, plan.gid) == 0
            && libc::syscall(libc::SYS_setresuid, plan.uid, plan.uid, plan.uid) == 0;
        check(is_changed, ChildStep::SetUser)?;
        // A `struct __user_cap_header_struct` of version 3, and two of `struct __user_cap_data_struct`.
        let header: [u32; 2] = [0x2008_0522, 0];
        let (low, high) = (plan.capabilities as u32, (plan.capabilities >> 32) as u32);
        let sets: [u32; 6] = [low, low, 0, high, high, 0];
        check(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) == 0, ChildStep::SetCapabilities)?;
        let is_set = !plan.no_new_privileges || libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;
        check(is_set, ChildStep::NoNewPrivileges)
    }
}

/// Executes the program with default signals and under the seccomp filter (seccomp(2)). Returns only if that fails.
///
/// # Safety
/// The child calls this, so it makes only system calls. Every pointer comes from a `CString` or array of `plan`.
unsafe fn execute(plan: &ChildPlan) -> Result<ChildStep, ChildStep> {
    // SAFETY: each pointer is valid during its call, and the arrays of pointers end with a null pointer.
    unsafe {
        check(libc::chdir(plan.cwd.as_ptr()) == 0, ChildStep::ChangeDirectory)?;
        // execve(2) keeps the signal mask and leaves ignored signals ignored, so both are reset here.
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        let is_reset = libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) == 0;
        check(is_reset, ChildStep::ResetSignals)?;
        let filter = &raw const plan.seccomp_filter;
        let is_filtered = plan.seccomp_filter.len == 0
            || libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, filter) == 0;
        check(is_filtered, ChildStep::SetSeccompFilter)?;
        libc::execve(plan.path.as_ptr(), plan.args.as_ptr(), plan.env.as_ptr());
    }
    Ok(ChildStep::Execute)
}

/// Sets the loopback device `lo` up, as runtimes do in a network namespace that they create.
///
/// # Safety
/// The child calls this, so it makes only system calls.
unsafe fn loopback_up() -> bool {
    // SAFETY: a zeroed ifreq is valid; the name fits; the call reads the member of the union that was written
    // (netdevice(7)).
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return false;
        }
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as c_char;
        request.ifr_name[1] = b'o' as c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        let up = libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request) == 0;
        libc::close(socket);
        up
    }
}
