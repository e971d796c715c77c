//! Prepared root file systems: the next task of the image uses one, no two tasks share one, and all of them are gone
//! when the plugin has ended.

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt as _, path::PathBuf};

use serde_json::json;

use crate::support::{Env, Task, eventually, leak::entries};

fn dir(env: &Env) -> PathBuf {
    let parts = env.dir.join("state/ahead");
    parts.join(entries(&parts).first().map_or("none", String::as_str))
}

/// The writable layers of the prepared root file systems that no task uses yet, by inode.
fn waiting(env: &Env) -> BTreeSet<u64> {
    let layers = entries(&dir(env)).into_iter().map(|name| dir(env).join(name).join("layer/upper"));
    layers.filter_map(|layer| Some(fs::metadata(layer).ok()?.ino())).collect()
}

async fn wait(env: &Env, count: usize) {
    eventually("so many wait", async || {
        let waiting = waiting(env);
        if waiting.len() == count { Ok(()) } else { Err(waiting) }
    })
    .await;
}

async fn layer(env: &Env, task: &Task) -> u64 {
    let uppers = env.dir.join("state/uppers");
    let part = uppers.join(&entries(&uppers)[0]);
    fs::metadata(part.join(env.attribute(task, "container_id").await).join("upper")).unwrap().ino()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_task_of_an_image_has_one_and_nobody_elses_files() {
    let mut env = Env::configured(json!({"shim": {"pool": 2}})).await;
    let first = env.sh("echo mine > /file; echo ready; exec sleep 600").await;
    first.says("ready").await;
    wait(&env, 1).await;
    let made = waiting(&env);
    assert!(!made.contains(&layer(&env, &first).await));
    let mut seen = BTreeSet::new();
    for _ in 0..2 {
        let task = env.sh("ls /file; stat -c %a /; echo yours > /file; echo ready; exec sleep 600").await;
        task.says("ready").await;
        assert_eq!(task.stdout.text(), "755\nready\n");
        assert!(seen.insert(layer(&env, &task).await), "a layer of its own");
        env.destroy(&task).await.unwrap();
    }
    assert!(made.is_subset(&seen), "those that were made were used: {made:?} {seen:?}");
    assert_eq!(env.exec_text(&first, "cat /file").await, "mine\n");
    env.destroy(&first).await.unwrap();

    // A killed plugin leaves the directories of its prepared root file systems, and the next plugin removes them.
    wait(&env, 1).await;
    env.kill_plugin().await;
    assert_eq!(waiting(&env).len(), 1);
    env.start_plugin().await;
    wait(&env, 0).await;
    let part = dir(&env);
    env.finish().await;
    assert!(!part.exists(), "and a plugin that leaves takes its own along");
}

#[tokio::test(flavor = "multi_thread")]
async fn none_is_made_without_a_pool() {
    let mut env = Env::configured(json!({"shim": {"pool": 0}})).await;
    for _ in 0..2 {
        let task = env.sh("exec sleep 600").await;
        env.destroy(&task).await.unwrap();
    }
    assert_eq!(entries(&env.dir.join("state/ahead")), Vec::<String>::new());
    env.finish().await;
}
