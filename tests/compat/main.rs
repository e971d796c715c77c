//! The differential suite: a program sees in a task what it sees under `docker run`.
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

#[allow(dead_code, reason = "for the comparisons that follow")]
mod docker;
mod harness;
mod programs;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

/// How many tests run at once. Each is busy with a few processes.
const AT_ONCE: usize = 2;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(AT_ONCE));
    let mut trials = vec![Trial::test("dockerd runs containers", || block_on(harness::runs_containers()))];
    trials.extend(programs::trials(&["crun", "runc"]));
    let conclusion = libtest_mimic::run(&arguments, trials);
    docker::end();
    conclusion.exit_code()
}

fn block_on(future: impl Future<Output = Result<(), Failed>>) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(future)
}
