//! The block `runtime "NAME" {}` for gVisor: each setting takes effect, and a platform that does not work here is never
//! used.

use std::{collections::HashMap, fs};

use nomad_driver_shim::pb::{driver::FingerprintRequest, structs::attribute::Value as Attribute};
use serde_json::{Value, json};

use crate::{
    SPELLINGS,
    support::{Env, patience, script},
};

/// Returns the node's attributes, as soon as `done` accepts them.
async fn attributes(env: &Env, done: impl Fn(&HashMap<String, String>) -> bool) -> HashMap<String, String> {
    let mut stream = env.driver().fingerprint(FingerprintRequest {}).await.unwrap().into_inner();
    loop {
        let next = tokio::time::timeout(patience(), stream.message()).await.expect("no news").unwrap().unwrap();
        let text = |value: Attribute| match value {
            Attribute::StringVal(text) => text,
            Attribute::BoolVal(flag) => flag.to_string(),
            other => format!("{other:?}"),
        };
        let all: HashMap<String, String> = next
            .attributes
            .into_iter()
            .filter_map(|(key, attribute)| Some((key.strip_prefix("driver.shim.")?.to_owned(), text(attribute.value?))))
            .collect();
        if done(&all) {
            return all;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn the_node_says_which_sandboxes_it_has() {
    let config =
        json!({"runtime": {"broken": {"type": "gvisor", "binary": "/bin/false"}, "absent": {"binary": "/no/runsc"}}});
    let mut env = Env::configured(config).await;
    let all = attributes(&env, |all| SPELLINGS.iter().all(|name| all[&format!("runtime.{name}")] == "true")).await;
    for name in SPELLINGS {
        assert_eq!(all[&format!("runtime.{name}.platform")], "systrap");
        assert!(!all[&format!("runtime.{name}.version")].is_empty());
        assert!(all["runtimes"].split(',').any(|one| one == name), "{all:?}");
    }
    for (name, why) in [("broken", "does not work on this host"), ("absent", "/no/runsc is not installed")] {
        assert_eq!(all[&format!("runtime.{name}")], "false");
        assert!(!all["runtimes"].contains(name), "{all:?}");
        let config = env.shell("true", json!({"runtime": name})).await;
        let mut task = env.prepare(config).await;
        let said = env.try_start(&mut task).await.unwrap_err().message().to_owned();
        assert!(said.contains(why), "{said}");
    }
    env.finish().await;
}

/// A platform that hangs is detected once, in the background, and is never used.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn a_platform_that_hangs_is_not_used() {
    let directory = tempfile::tempdir().unwrap();
    let runsc = nomad_driver_shim::process::which("runsc".as_ref()).unwrap();
    let hangs = directory.path().join("runsc");
    let real = runsc.display();
    script(
        &hangs,
        &format!("case \"$*\" in *--platform=systrap*' run '*) exec sleep 1234567;; esac\nexec {real} \"$@\""),
    );
    let mut env = Env::with_runtime("runsc", json!({"runtime": {"runsc": {"binary": hangs}}})).await;
    let config = env.shell("dmesg | head -1; exit 3", json!({})).await;
    let (code, out, _) = env.run(config).await;
    assert!(code == 3 && out.contains("Starting gVisor"), "{code} {out}");
    let all = attributes(&env, |all| all["runtime.runsc"] == "true").await;
    assert_eq!(all["runtime.runsc.platform"], "ptrace");
    let left: Vec<String> = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok())
        .filter(|line| line.contains("1234567"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    env.finish().await;
}

async fn with(config: Value, look: impl AsyncFnOnce(&mut Env)) {
    let mut env =
        Env::with_runtime("runsc", json!({"runtime": {"runsc": config}, "security": {"allow_caps": ["ALL"]}})).await;
    look(&mut env).await;
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn what_is_set_is_what_happens() {
    // The overlay setting decides where a task's writes are stored.
    for (overlay, on_the_host) in [(json!({}), false), (json!({"overlay": "none"}), true)] {
        with(overlay, async |env| {
            let config = env.shell("echo x > /written; echo ready; sleep 600", json!({})).await;
            let task = env.start(config).await;
            task.says("ready").await;
            let id = env.attribute(&task, "container_id").await;
            let upper = fs::read_dir(env.dir.join("state/uppers")).unwrap().flatten().next().unwrap().path().join(id);
            assert_eq!(upper.join("upper/written").exists(), on_the_host);
            env.destroy(&task).await.unwrap();
        })
        .await;
    }
    // The debug logs, and further flags and settings of runsc.
    let logs = tempfile::tempdir().unwrap();
    with(json!({"debug_log": logs.path(), "flags": ["net-raw"], "file_access": "shared"}), async |env| {
        let config =
            env.shell("ping -c 1 -W 5 127.0.0.1 > /dev/null && echo raw", json!({"cap_add": ["NET_RAW"]})).await;
        assert_eq!(env.run(config).await.1, "raw\n");
        let names: Vec<_> = fs::read_dir(logs.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
        for command in ["boot", "run", "gofer"] {
            assert!(names.iter().any(|name| name.to_string_lossy().contains(command)), "{command} in {names:?}");
        }
    })
    .await;
    // A sandbox without cgroup limits.
    with(json!({"cgroups": false}), async |env| {
        let config = env.shell("sleep 600", json!({})).await;
        let task = env.start(config).await;
        assert!(crate::processes(env, &task.dirs.alloc_id).is_empty());
        env.destroy(&task).await.unwrap();
    })
    .await;
}
