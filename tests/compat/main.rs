//! The differential suite: a program sees in a task what it sees under `docker run`. A probe runs in a container of a
//! real dockerd and in a task of the driver, with equal options, and both outputs are compared line by line. Intended
//! differences are a table (`differences.rs`), which is also in docs/compatibility.md.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::too_many_arguments,
    clippy::zombie_processes,
    clippy::large_futures,
    missing_docs,
    reason = "tests; what they start ends with them"
)]

#[path = "../support/mod.rs"]
#[allow(dead_code, unused_imports, reason = "shared with the behaviour tests")]
mod support;

mod cases;
mod compare;
mod differences;
mod docker;
mod harness;
mod page;
mod probe;
mod programs;
mod sides;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use libtest_mimic::{Arguments, Failed, Trial};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use cases::Case;
use sides::Directories;
use support::Env;

/// How many cases run at once. Each is busy with a few processes.
const AT_ONCE: usize = 2;

/// The runtimes that are compared with docker's runc.
const RUNTIMES: [&str; 2] = ["crun", "runc"];
/// gVisor, which is compared with `docker run --runtime runsc` where `NOMAD_DRIVER_SHIM_TEST_RUNTIME` asks for it.
const RUNSC: &str = "runsc";

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(AT_ONCE));
    let cases = cases::cases().into_iter().filter(|case| !runtimes().contains(&RUNSC) || case.is_possible_in_sandbox());
    let cases = cases.map(|case| Trial::test(case.name, move || block_on(compare(&case))));
    let others = [
        Trial::test("dockerd runs containers", || block_on(harness::runs_containers())),
        Trial::test("the page has the same differences", page::has_the_same_differences),
    ];
    let programs = programs::trials(runtimes());
    let trials = cases.chain(others).chain(programs).collect();
    let _shared = (!arguments.list).then(|| SharedMount::of_host(support::services::root()));
    let whole = arguments.filter.is_none() && arguments.skip.is_empty() && !arguments.list;
    let conclusion = libtest_mimic::run(&arguments, trials);
    let mut code = conclusion.exit_code();
    if whole && !conclusion.has_failed() {
        let unused = compare::unused(docker::docker().version, runtimes());
        if !unused.is_empty() {
            eprintln!("differences that the table lists and that do not occur:\n{}", compare::listed(&unused));
            code = ExitCode::FAILURE;
        }
    }
    docker::end();
    code
}

/// Returns the runtimes that this run compares.
fn runtimes() -> &'static [&'static str] {
    match std::env::var("NOMAD_DRIVER_SHIM_TEST_RUNTIME").as_deref() {
        Ok(RUNSC) => &[RUNSC],
        Ok(other) => panic!("NOMAD_DRIVER_SHIM_TEST_RUNTIME: {other:?} can't be compared with docker; {RUNSC} can"),
        Err(_) => &RUNTIMES,
    }
}

fn block_on(future: impl Future<Output = Result<(), Failed>>) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(future)
}

/// Compares what the probe sees under `docker run` with what it sees in a task, with each runtime.
async fn compare(case: &Case) -> Result<(), Failed> {
    let docker = sides::in_docker(docker::docker(), case, runtimes().contains(&RUNSC)).await;
    let files = support::services().root.join(nomad_driver_shim::ids::random_hex(4));
    let (dir, shared) = (files.join("mounted"), files.join("shared"));
    for path in [&dir, &shared] {
        std::fs::create_dir_all(path).unwrap();
    }
    let mut env = Env::configured(sides::configuration(&[&files])).await;
    let mount = SharedMount::in_memory(&shared);
    let mut found = Vec::new();
    for runtime in runtimes() {
        let ours = sides::in_driver(&mut env, case, runtime, &Directories { dir: &dir, shared: &shared }).await;
        let unexplained = compare::unexplained(case.name, runtime, &docker, &ours);
        found.extend(unexplained.into_iter().map(|difference| format!("{runtime}: {difference}")));
    }
    env.finish().await;
    drop(mount);
    if found.is_empty() {
        Ok(())
    } else {
        Err(Failed::from(format!("{} differences:\n{}", found.len(), compare::listed(&found))))
    }
}

/// A shared mount, which is unmounted when this value is dropped.
struct SharedMount(PathBuf);

impl SharedMount {
    /// Mounts a file system in memory.
    fn in_memory(path: &Path) -> Self {
        Self::make(path, "tmpfs", MsFlags::empty())
    }

    /// Makes a directory a shared mount, as everything is on a host with systemd, and below docker's own directory.
    fn of_host(path: &Path) -> Self {
        Self::make(path, path.to_str().unwrap(), MsFlags::MS_BIND)
    }

    fn make(path: &Path, source: &str, flags: MsFlags) -> Self {
        mount(Some(source), path, Some("tmpfs"), flags, None::<&str>).unwrap();
        mount(None::<&str>, path, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for SharedMount {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("could not unmount {}: {error}", self.0.display());
        }
    }
}
