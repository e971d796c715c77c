//! The leak checker itself: it finds nothing after a complete teardown, and it finds remains when any one step of the
//! teardown is skipped.

use std::fs;

use nix::mount::{MsFlags, mount};
use serde_json::json;

use crate::{
    support::{Env, EnvOptions, leak},
    trials,
};

/// Objects that are meant to stay, such as the shims of the pool, are checked after this delay.
const SOON: std::time::Duration = std::time::Duration::from_millis(300);

/// Runs and destroys a task in a plugin whose failpoint skips `step`, and returns the leaks that the checker finds.
async fn leaks_without(step: &str) -> Vec<String> {
    // A shim's directory is removed only together with its shim, so the shim must not be reused for that step.
    let config = json!({"shim": {"reuse": step != "shim-dir"}});
    let mut env = EnvOptions::default().config(config).var("NOMAD_DRIVER_SHIM_SKIP", step).start().await;
    let task = env.sh("sleep 600").await;
    let outcome = env.destroy(&task).await;
    // After this delay the pool is full again: one more shim than that is a leak.
    tokio::time::sleep(SOON).await;
    let mut leaks = leak::alive_within(&env, SOON).await;
    assert!(!leaks.is_empty(), "nothing noticed without {step}");
    assert!(env.plugin().stderr().contains("a failpoint skipped a step"), "the switch must fire: {step}");
    drop(outcome);
    env.plugin.take().unwrap().shut_down().await;
    leaks.extend(leak::afterwards_within(&env, SOON).await);
    leak::remove(&env).await;
    env.skip_leak_check();
    leaks
}

mod each_undo_that_is_left_out_is_noticed {
    use super::*;

    /// Leaves `step` out, and looks for a leak that contains `sign`.
    async fn check(step: &str, sign: &str) {
        let leaks = leaks_without(step).await;
        assert!(leaks.iter().any(|leak| leak.contains(sign)), "{step}: {sign:?} not in {leaks:#?}");
    }

    trials! { check:
        // A shim that deletes a container also unmounts its root file system. The mount is left only if both steps are
        // skipped.
        container_and_unmount => "container,unmount", "mount: ";
        container => "container", " state of ";
        bundle => "bundle", "run/bundles/";
        upper => "upper", "state/uppers/";
        record => "record", "run/tasks/";
        shim => "shim", "shims: ";
        shim_directory => "shim-dir", "shim";
    }
}

/// The next plugin removes what a crashed plugin has left, by the crashed plugin's records.
#[tokio::test(flavor = "multi_thread")]
async fn a_destroy_after_a_crash_undoes_by_the_record() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    env.kill_plugin().await;
    env.start_plugin().await;
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// A start that was interrupted by a crash between two steps: the record's state is `intended`, and nothing or only a
/// part of the attempt exists.
#[tokio::test(flavor = "multi_thread")]
async fn a_half_made_start_is_undone_at_the_next_opening() {
    // The plugin holds the attempt's log FIFOs open until Nomad asks for the task again, or until the grace period is
    // over.
    let mut env = Env::configured(json!({"state": {"grace": "1s"}})).await;
    let task = env.sh("sleep 600").await;
    let (path, mut record) = env.record(&task).await;
    env.kill_plugin().await;
    record["state"] = json!({"is": "intended"});
    std::fs::write(&path, record.to_string()).unwrap();
    env.start_plugin().await;
    env.finish().await;
}

/// A plugin that is killed while it reads an image's accounts leaves the mount of the image's layers, or its directory.
#[tokio::test(flavor = "multi_thread")]
async fn mounts_of_images_that_a_killed_plugin_left_are_removed() {
    let mut env = Env::new().await;
    // The first process of this host lives, and has not started at this time.
    let (mounted, empty) = (env.dir.join("state/images/view-1-77-ab"), env.dir.join("state/images/view-1-78-ab"));
    env.kill_plugin().await;
    for path in [&mounted, &empty] {
        fs::create_dir(path).unwrap();
    }
    mount(Some("tmpfs"), &mounted, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    env.start_plugin().await;
    assert!(!mounted.exists() && !empty.exists());
    env.finish().await;
}
