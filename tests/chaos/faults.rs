//! Faults. Each fault finds its victim, reports to the model which attempts it may have hit, and strikes. Only
//! processes of the node are struck.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::mount::{MntFlags, umount2};
use nomad_driver_shim::{cgroup::Cgroups, process::PidFd};

use crate::{
    ground::Ground,
    model::Hit,
    observe::{self, Victim},
    step::{Call, Fault, Place, Target},
    support::{Env, leak, patience, program, services},
};

/// Time limit within which a call begins that the previous step has caused.
fn called() -> Duration {
    patience() / 40
}
/// How many process ids before the newest one are searched as well, since the call may have begun before the search.
const RECENT: u32 = 64;
/// Interval between two searches for the process of the call.
const LOOK: Duration = Duration::from_micros(300);
/// Delay before a killed containerd is started again: the time in which its death would be noticed.
const CONTAINERD_AWAY: Duration = Duration::from_millis(300);
/// Environment variable with the path of an earlier version of the program, for downgrades. If it is not set, a copy of
/// the program under test is used.
const FORMER: &str = "NOMAD_DRIVER_SHIM_CHAOS_FORMER";

impl Ground {
    /// Carries out a fault. A fault that lasts is ended in the background.
    pub(crate) async fn strike(self: &Arc<Self>, fault: Fault) {
        if let Fault::Kill { target, .. } | Fault::KillDuring { target, .. } = fault
            && matches!(target, Target::Shim | Target::Runtime)
        {
            // This hit is reported before the victim is looked for and again after that: a start may be answered
            // meanwhile.
            self.journal.hit(&Hit::Unsettled);
        }
        let found = match fault {
            Fault::Kill { target, pick } => self.kill(target, self.pick(target, pick)).await,
            Fault::Freeze { target, pick, ms } => self.freeze(self.pick(target, pick).as_ref(), ms),
            Fault::KillDuring { target, call, after_ms } => {
                let victim = self.during(call, after_ms, target).await;
                self.kill(target, victim).await
            }
            Fault::TerminateDuring { call, after_ms } => {
                let victim = self.during(call, after_ms, Target::Plugin).await;
                Self::terminate(victim.as_ref())
            }
            Fault::Terminate => Self::terminate(self.pick(Target::Plugin, 0).as_ref()),
            Fault::Full { place, ms } => {
                let disk = if place == Place::Run { &self.site.disks[0] } else { &self.site.disks[1] };
                disk.fill();
                self.journal.hit(&Hit::Unsettled);
                self.lasting(ms, move |ground| {
                    if place == Place::Run { &ground.site.disks[0] } else { &ground.site.disks[1] }.empty();
                    ground.journal.hit(&Hit::Unsettled);
                });
                true
            }
            Fault::FewDescriptors { spare, ms } => self.few_descriptors(spare, ms),
            Fault::NoProcesses { ms } => self.no_processes(ms),
            Fault::Replace { former } => self.replace(former),
            // A reboot ends everything, the agent as well, so `World` carries it out.
            Fault::Reboot { .. } => false,
            Fault::ClockJump { seconds } => {
                let arguments = ["-s".to_owned(), format!("{seconds} seconds")];
                Command::new("date").args(arguments).output().is_ok_and(|output| output.status.success())
            }
        };
        self.journal.fault_begins();
        self.journal.fault_ends();
        self.journal.struck(found.then(|| fault.kind()));
    }

    fn pick(&self, target: Target, pick: u64) -> Option<Victim> {
        let mut found = observe::victims(target, &self.site.dir, &self.site.namespace, self.site.containerd());
        let index = usize::try_from(pick).unwrap() % found.len().max(1);
        (!found.is_empty()).then(|| found.swap_remove(index))
    }

    /// Waits until a runtime is in the middle of this call, and then `after_ms` longer. Returns the process to strike.
    async fn during(&self, call: Call, after_ms: u64, target: Target) -> Option<Victim> {
        // No runtime is called for a start: the driver itself starts the container through its exec FIFO.
        let mut runtime = None;
        if call != Call::Start {
            let (deadline, first) = (Instant::now() + called(), observe::last_pid().saturating_sub(RECENT));
            runtime = tokio::task::block_in_place(|| {
                while Instant::now() < deadline {
                    let found = observe::runtime_in(call, &self.site.dir, first);
                    if found.is_some() {
                        return found;
                    }
                    #[allow(clippy::disallowed_methods, reason = "shorter than what a timer of tokio's can wait")]
                    std::thread::sleep(LOOK);
                }
                None
            });
            runtime?;
        }
        if after_ms > 0 {
            tokio::time::sleep(Duration::from_millis(after_ms)).await;
        }
        match (target, runtime) {
            (Target::Runtime, Some(pid)) => Some(Victim { pid, holds: Vec::new() }),
            (Target::Plugin, _) => self.pick(Target::Plugin, 0),
            _ => self.pick(target, after_ms),
        }
    }

    async fn kill(self: &Arc<Self>, target: Target, victim: Option<Victim>) -> bool {
        let Some(victim) = victim else { return false };
        let Ok(process) = PidFd::open(victim.pid) else { return false };
        // The hit is reported before the kill, because the kill has its consequences at once.
        if matches!(target, Target::Shim | Target::Init) {
            self.journal.hit(&Hit::Attempts(victim.holds.clone()));
        }
        if matches!(target, Target::Shim | Target::Runtime) {
            self.journal.hit(&Hit::Unsettled);
        }
        if target == Target::Shim {
            // A shim under SIGSTOP makes no further container while the test looks up which containers the shim holds
            // by now.
            process.signal(libc::SIGSTOP);
            let inits = observe::inits(&self.site.namespace);
            let holds = inits.iter().filter(|init| observe::parent(init.pid) == Some(victim.pid));
            self.journal.hit(&Hit::Attempts(holds.map(|init| init.attempt).collect()));
            self.journal.hit(&Hit::Unsettled);
            self.journal.hit(&Hit::NotAmong(inits.into_iter().map(|init| init.attempt).collect()));
        }
        process.signal(libc::SIGKILL);
        self.journal.note(&format!("killed {target}, {victim:?}"));
        if target == Target::Containerd {
            let ground = self.clone();
            self.lasting_task(async move {
                tokio::time::sleep(CONTAINERD_AWAY).await;
                let dir = ground.site.containerd_dir.clone();
                let _ = tokio::task::spawn_blocking(move || services::start_containerd(&dir)).await;
            });
        }
        true
    }

    fn freeze(self: &Arc<Self>, victim: Option<&Victim>, ms: u64) -> bool {
        let process = victim.and_then(|victim| PidFd::open(victim.pid).ok());
        let Some(process) = process else { return false };
        process.signal(libc::SIGSTOP);
        self.journal.note(&format!("stopped {victim:?} for {ms} ms"));
        self.lasting(ms, move |_| process.signal(libc::SIGCONT));
        true
    }

    fn terminate(victim: Option<&Victim>) -> bool {
        let process = victim.and_then(|victim| PidFd::open(victim.pid).ok());
        process.inspect(|process| process.signal(libc::SIGTERM)).is_some()
    }

    fn few_descriptors(self: &Arc<Self>, spare: u64, ms: u64) -> bool {
        let Some(plugin) = self.journal.plugin() else { return false };
        let open = leak::entries(Path::new(&format!("/proc/{plugin}/fd"))).len() as u64;
        if !limit_descriptors(plugin, open + spare) {
            return false;
        }
        self.journal.hit(&Hit::Unsettled);
        self.lasting(ms, move |ground| {
            // The limit is raised to the hard limit, as the plugin does at its start. The limit from before this fault
            // may be a low one, because another fault of this kind may have come meanwhile.
            limit_descriptors(plugin, u64::MAX);
            ground.journal.hit(&Hit::Unsettled);
        });
        true
    }

    /// Keeps the plugin, and the processes that it has started, from starting any process or thread.
    fn no_processes(self: &Arc<Self>, ms: u64) -> bool {
        let (Some(group), Some(plugin)) = (self.site.pids.clone(), self.journal.plugin()) else { return false };
        if fs::write(group.join("cgroup.procs"), plugin.to_string()).is_err() {
            return false;
        }
        let count = fs::read_to_string(group.join("pids.current")).unwrap_or_default();
        if fs::write(group.join("pids.max"), count.trim()).is_err() {
            return false;
        }
        self.journal.hit(&Hit::Unsettled);
        self.lasting(ms, move |ground| {
            let _ = fs::write(group.join("pids.max"), "max");
            ground.journal.hit(&Hit::Unsettled);
        });
        true
    }

    /// Replaces the program as a package manager does: renames a new file over the old one, then asks the plugin to
    /// end.
    fn replace(&self, former: bool) -> bool {
        let named = std::env::var_os(FORMER).filter(|_| former);
        let source = named.map_or_else(program, std::path::PathBuf::from);
        let draft = self.site.program.with_extension("new");
        if fs::copy(source, &draft).and_then(|_| fs::rename(&draft, &self.site.program)).is_err() {
            return false;
        }
        Self::terminate(self.pick(Target::Plugin, 0).as_ref())
    }

    /// Begins a fault that lasts, and runs `end` after `ms` milliseconds. The `Settle` step waits for this.
    fn lasting(self: &Arc<Self>, ms: u64, end: impl FnOnce(&Self) + Send + 'static) {
        self.journal.fault_begins();
        let ground = self.clone();
        self.lasting_task(async move {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            end(&ground);
            ground.journal.fault_ends();
        });
    }
}

/// Sets the soft limit on a process's descriptors, to the hard limit at most. Returns whether that was possible.
fn limit_descriptors(pid: u32, limit: u64) -> bool {
    let Ok(pid) = libc::pid_t::try_from(pid) else { return false };
    let mut former = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit into `former`, and reads none.
    if unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut former) } != 0 {
        return false;
    }
    let new = libc::rlimit { rlim_cur: limit.min(former.rlim_max), ..former };
    // SAFETY: the kernel reads one rlimit from `new`, and writes none.
    unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const new, std::ptr::null_mut()) == 0 }
}

/// Kills all processes of the node and its tasks until none is left, as a power cut does.
pub(crate) fn end_everything(env: &Env) {
    for _ in 0..200 {
        let alive = [observe::marked_processes(&env.namespace), observe::all_of(&env.dir)].concat();
        if alive.is_empty() {
            return;
        }
        for process in alive.into_iter().filter_map(|pid| PidFd::open(pid).ok()) {
            process.signal(libc::SIGKILL);
        }
        #[allow(clippy::disallowed_methods, reason = "the whole node waits for this")]
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Ends all processes of a node and removes its mounts and cgroups, so that nothing of it stays on the machine.
pub(crate) fn end_node(env: &Env) {
    end_everything(env);
    unmount_all(env);
}

/// Unmounts all that the driver has mounted and removes its cgroups. A restarted kernel would have none of them either.
pub(crate) fn unmount_all(env: &Env) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for point in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new) {
        if point.starts_with(&env.dir) && !env.own_mounts.iter().any(|own| own == point) {
            let _ = umount2(point, MntFlags::MNT_DETACH);
        }
    }
    let mut groups = leak::cgroups(env);
    groups.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    groups.iter().for_each(|path| drop(fs::remove_dir(path)));
}

/// Makes a cgroup with the pids controller for the test: in this controller's own hierarchy of cgroup version 1, or
/// else in the hierarchy of version 2.
pub(crate) fn pids_group(name: &str) -> Option<std::path::PathBuf> {
    let cgroups = Cgroups::detect().ok()?;
    let of_version_1 = cgroups.hierarchies().iter().find(|path| path.ends_with("pids"));
    let unified = || cgroups.hierarchies().iter().find(|path| path.join("cgroup.subtree_control").exists());
    let hierarchy = of_version_1.or_else(unified)?;
    if of_version_1.is_none() {
        fs::write(hierarchy.join("cgroup.subtree_control"), "+pids").ok()?;
    }
    let group = hierarchy.join(name);
    fs::create_dir(&group).ok()?;
    Some(group)
}
