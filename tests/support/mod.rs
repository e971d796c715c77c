//! Code that the behaviour tests share.

pub(crate) mod authority;
pub(crate) mod env;
pub(crate) mod exec;
pub(crate) mod fake_registry;
pub(crate) mod finish;
pub(crate) mod image;
pub(crate) mod leak;
pub(crate) mod modes;
pub(crate) mod services;
pub(crate) mod trials;
pub(crate) mod wrapped_runtime;

pub(crate) use env::{Env, EnvOptions, NotApplicable, Task, not_applicable, shell_in, with_options};
pub(crate) use image::{Entry, Image, Layer, Packing};
pub(crate) use services::services;
pub(crate) use trials::each_case;

use std::time::Duration;

/// Returns a timeout that is far longer than anything takes on a busy machine. A test that reaches it has failed. On
/// emulated machines, `NOMAD_DRIVER_SHIM_TEST_PATIENCE` sets a longer one.
pub(crate) fn patience() -> Duration {
    static SECONDS: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    let told = || std::env::var("NOMAD_DRIVER_SHIM_TEST_PATIENCE").ok()?.parse().ok();
    Duration::from_secs(*SECONDS.get_or_init(|| told().unwrap_or(60)))
}

/// Polls until `check` holds. Panics with the last observation if it never does.
pub(crate) async fn eventually<T: std::fmt::Debug>(what: &str, mut check: impl AsyncFnMut() -> Result<(), T>) {
    let deadline = tokio::time::Instant::now() + patience();
    loop {
        match check().await {
            Ok(()) => return,
            Err(seen) if tokio::time::Instant::now() > deadline => panic!("{what}: never; last seen {seen:?}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Returns the resident memory of a process, in bytes.
pub(crate) fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Writes an executable shell script.
pub(crate) fn script(path: &std::path::Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
}

/// Returns the program under test: this build, or the program that `NOMAD_DRIVER_SHIM_TEST_PROGRAM` names.
pub(crate) fn program() -> std::path::PathBuf {
    let named = std::env::var_os("NOMAD_DRIVER_SHIM_TEST_PROGRAM");
    named.map_or_else(|| env!("CARGO_BIN_EXE_nomad-driver-shim").into(), std::path::PathBuf::from)
}
