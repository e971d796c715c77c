//! Attacks on the driver, and the promises that must hold against them. `docs/security.md` lists the promises and names
//! a test for each.
//!
//! Tests that depend on a runtime's behaviour run with crun and with runc, or with the runtime that
//! `NOMAD_DRIVER_SHIM_TEST_RUNTIME` names. With `NOMAD_DRIVER_SHIM_TEST_PROGRAM` they run another build of the driver,
//! to check that a test fails without its fix.
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

mod advisories;
mod apparmor;
mod attack;
mod bounds;
mod credentials;
mod decoy;
mod directories;
mod documents_held;
mod false_containerd;
mod garbling_shim;
mod hostile_containerd;
mod hostile_shim;
mod hung_volume;
mod images_held;
mod inputs;
mod inside_held;
mod interrupt;
mod layers;
mod layers_held;
mod links;
mod masks;
mod mounts;
mod mounts_held;
mod options_held;
mod privileges;
mod probe;
mod propagation;
mod races;
mod registries_held;
mod seccomp;
mod sockets_held;
mod text;

use serde_json::json;
use support::{Env, Image, services};

/// The runtimes with which an attack is tried.
pub fn runtimes() -> Vec<String> {
    match std::env::var("NOMAD_DRIVER_SHIM_TEST_RUNTIME") {
        Ok(runtime) => vec![runtime],
        Err(_) => ["crun", "runc"].map(str::to_owned).to_vec(),
    }
}

/// A busybox image with a static program at `/attack`, built from C.
pub async fn image_with_program(name: &str, source: &str) -> String {
    let program = attack::compile(name, source);
    let layer = support::Layer::new(&[support::Entry::file("attack", program)], support::Packing::Gzip);
    Image::busybox().with_layer(layer).push(&services().registry, &format!("attack/{name}:1")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attack_program_runs_in_a_task() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let image = image_with_program(
            "hello",
            r#"#include <stdio.h>
            int main(void) { puts("hello from an attack"); return 3; }"#,
        )
        .await;
        let (code, out, err) = env.run(json!({"image": image, "command": "/attack"})).await;
        assert_eq!((code, out.as_str()), (3, "hello from an attack\n"), "{runtime}: {err}");
        env.finish().await;
    }
}
