//! How a test ends that has failed: `support/finish.rs`.

use std::{fs, process::Command};

use nix::mount::{MsFlags, mount};

use crate::support::{Env, leak};

/// The outcome of a test that ran in a process of its own.
struct Outcome {
    passed: bool,
    output: String,
    /// The directory of the test's environment.
    directory: String,
}

/// Runs one of the tests below that are `ignored`.
fn outcome_of(test: &str) -> Outcome {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--show-output", "--exact", &format!("runner::{test}")]);
    // The leak check polls for a sixth of this time before it gives up.
    command.env("NOMAD_DRIVER_SHIM_TEST_PATIENCE", "30");
    let output = command.output().unwrap();
    let output = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    assert!(output.contains("running 1 test\n"), "{output}");
    let directory = output.split_once("the environment: ").map(|(_, rest)| rest.lines().next().unwrap().to_owned());
    Outcome { passed: output.contains("test result: ok."), directory: directory.expect(&output), output }
}

/// The mounts and processes of an environment whose test has ended.
fn left_in(directory: &str) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut left: Vec<String> = mounts.lines().filter(|line| line.contains(directory)).map(str::to_owned).collect();
    for pid in leak::entries("/proc".as_ref()).iter().filter(|name| name.parse::<u32>().is_ok()) {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        if line.contains(directory) || cwd.starts_with(directory) {
            left.push(format!("process {pid}: {line}"));
        }
    }
    left
}

#[test]
fn a_test_that_panics_shows_the_log_and_leaves_nothing() {
    let outcome = outcome_of("panics_on_purpose");
    assert!(!outcome.passed, "{}", outcome.output);
    let log = "the plugin's last log lines";
    for part in ["a panic on purpose", log, "killed at stop.marked by a failpoint", "left by the failed test"] {
        assert!(outcome.output.contains(part), "{part:?} not in {}", outcome.output);
    }
    let shown = outcome.output.split_once(log).unwrap().1.split_once("left by the failed test").unwrap().0;
    assert!((2..=41).contains(&shown.lines().count()), "the log lines of both plugins, but not all: {shown}");
    assert_eq!(left_in(&outcome.directory), Vec::<String>::new());
}

#[test]
fn a_leak_is_noticed_though_the_test_does_not_look() {
    let outcome = outcome_of("leaks_on_purpose");
    assert!(!outcome.passed, "{}", outcome.output);
    assert!(outcome.output.contains("left while the plugin lives"), "{}", outcome.output);
    assert_eq!(left_in(&outcome.directory), Vec::<String>::new());
}

#[test]
fn a_test_without_a_leak_passes_though_it_does_not_look() {
    let outcome = outcome_of("ends_without_a_leak_on_purpose");
    assert!(outcome.passed, "{}", outcome.output);
    assert_eq!(left_in(&outcome.directory), Vec::<String>::new());
}

async fn environment() -> Env {
    let env = Env::new().await;
    eprintln!("the environment: {}", env.dir.display());
    env
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the tests above run it"]
async fn panics_on_purpose() {
    let mut env = environment().await;
    env.kill_plugin().await;
    env.set_var("NOMAD_DRIVER_SHIM_KILL_AT", Some("stop.marked"));
    env.start_plugin().await;
    let task = env.sh("sleep 600").await;
    env.stop(&task, std::time::Duration::from_secs(1), "").await.unwrap_err();
    env.plugin_died().await;
    env.set_var("NOMAD_DRIVER_SHIM_KILL_AT", None);
    env.start_plugin().await;
    env.sh("sleep 600").await;
    panic!("a panic on purpose");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the tests above run it"]
async fn leaks_on_purpose() {
    let env = environment().await;
    let point = env.dir.join("leak");
    fs::create_dir(&point).unwrap();
    mount(Some("tmpfs"), &point, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the tests above run it"]
async fn ends_without_a_leak_on_purpose() {
    let mut env = environment().await;
    let task = env.sh("exit 3").await;
    assert_eq!(env.finish_task(task).await.0, 3);
}
