//! Prepared root file systems and network namespaces: the next task uses one, no two tasks share one, and all of them are
//! gone when the plugin has ended.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use nomad_driver_shim::pb::driver::NetworkIsolationSpec;
use serde_json::json;

use crate::support::{
    Entry, Env, Image, Layer, Packing, Task, eventually, leak::entries, services, services::run, with_options,
};

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
    wait(&env, 2).await;
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
    wait(&env, 2).await;
    env.kill_plugin().await;
    assert_eq!(waiting(&env).len(), 2);
    env.start_plugin().await;
    wait(&env, 0).await;
    let part = dir(&env);
    env.finish().await;
    assert!(!part.exists(), "and a plugin that leaves takes its own along");
}

/// An image that is used alone has all that the pool holds, and gives one up for another image.
#[tokio::test(flavor = "multi_thread")]
async fn each_image_that_was_used_last_has_one() {
    let mut env = Env::configured(json!({"shim": {"pool": 2}})).await;
    let image = env.busybox().await;
    let extra = Image::busybox().with_layer(Layer::new(&[Entry::dir("extra")], Packing::None));
    let other = extra.push(&services().registry, "test/prepared:1").await;
    env.run(json!({"image": image, "command": "true"})).await;
    wait(&env, 2).await;
    // The name of a new directory is new; its inode number may be that of a removed one.
    let names = |env: &Env| entries(&dir(env)).into_iter().collect::<BTreeSet<_>>();
    let alone = names(&env);
    env.run(json!({"image": other, "command": "true"})).await;
    eventually("one of two is replaced", async || {
        let now = names(&env);
        if now.len() == 2 && now.intersection(&alone).count() == 1 { Ok(()) } else { Err(now) }
    })
    .await;
    env.finish().await;
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

/// The plugin's descriptors of network namespaces, by what they refer to (`net:[INODE]`).
fn network_descriptors(env: &Env) -> impl Iterator<Item = (String, PathBuf)> {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", env.plugin().pid().unwrap())).unwrap();
    let targets = descriptors.filter_map(|entry| {
        let path = entry.unwrap().path();
        Some((fs::read_link(&path).ok()?.to_string_lossy().into_owned(), path))
    });
    targets.filter(|(target, _)| target.starts_with("net:["))
}

/// The network namespaces that the plugin has open, as `net:[INODE]`.
fn prepared_networks(env: &Env) -> BTreeSet<String> {
    network_descriptors(env).map(|(target, _)| target).collect()
}

fn open_networks(env: &Env) -> Vec<fs::File> {
    network_descriptors(env).map(|(_, path)| fs::File::open(path).unwrap()).collect()
}

async fn wait_for_networks(env: &Env, count: usize) -> BTreeSet<String> {
    eventually("network namespaces are prepared", async || {
        let prepared = prepared_networks(env);
        if prepared.len() == count { Ok(()) } else { Err(prepared) }
    })
    .await;
    prepared_networks(env)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_task_has_a_network_namespace_of_its_own() {
    const REPORT: &str =
        "readlink /proc/self/ns/net; ip -o addr show up; sysctl -n net.ipv4.ip_unprivileged_port_start";
    for runtime in ["crun", "runc"] {
        let mut env = Env::configured(json!({"shim": {"pool": 2}, "default_runtime": runtime})).await;
        let mut prepared = wait_for_networks(&env, 2).await;
        let mut used = BTreeSet::new();
        let mut tasks = Vec::new();
        for _ in 0..3 {
            let task = env.sh(&format!("{REPORT}; echo end; exec sleep 600")).await;
            task.says("end").await;
            let said = task.stdout.text();
            let (namespace, rest) = said.split_once('\n').unwrap();
            assert!(
                rest.contains("127.0.0.1/8")
                    && rest.contains("::1/128") == Path::new("/proc/net/if_inet6").exists()
                    && !rest.contains("eth"),
                "{said}"
            );
            assert!(rest.ends_with("\n0\nend\n"), "{said}");
            assert!(prepared.contains(namespace), "a prepared one: {prepared:?} {said}");
            assert!(used.insert(namespace.to_owned()), "no other task has it: {used:?} {said}");
            assert_eq!(env.exec_text(&task, "readlink /proc/self/ns/net").await.trim_end(), namespace);
            tasks.push(task);
            let refilled = wait_for_networks(&env, 2).await;
            assert!(refilled.is_disjoint(&used), "a used one is not prepared again: {refilled:?} {used:?}");
            prepared.extend(refilled);
        }
        for task in tasks {
            env.destroy(&task).await.unwrap();
        }
        env.finish().await;
    }
}

/// A namespace that a start has taken may hold what a runtime has set in it, so no other task gets it.
#[tokio::test(flavor = "multi_thread")]
async fn the_network_namespace_of_a_failed_start_is_discarded() {
    let mut env = Env::configured(json!({"shim": {"pool": 1}})).await;
    let prepared = wait_for_networks(&env, 1).await;
    // While the namespaces exist, the kernel gives their inode numbers to no others.
    let _exist = open_networks(&env);
    let image = env.busybox().await;
    let mut task = env.prepare(json!({"image": image, "command": "/missing"})).await;
    env.try_start(&mut task).await.unwrap_err();
    let (_, out, _) = env.run(json!({"image": image, "command": "readlink", "args": ["/proc/self/ns/net"]})).await;
    assert!(!prepared.contains(out.trim_end()), "{prepared:?} {out}");
    assert!(wait_for_networks(&env, 1).await.is_disjoint(&prepared));
    env.finish().await;
}

/// Tasks with the host's network, or their group's, take none.
#[tokio::test(flavor = "multi_thread")]
async fn other_networks_take_no_prepared_namespace() {
    let mut env = Env::configured(json!({"shim": {"pool": 1}, "security": {"allow_host_namespaces": true}})).await;
    let prepared = wait_for_networks(&env, 1).await;
    // While the namespaces exist, the kernel gives their inode numbers to no others.
    let _exist = open_networks(&env);
    let image = env.busybox().await;
    let report = json!({"image": image, "command": "readlink", "args": ["/proc/self/ns/net"]});
    let (_, out, _) = env.run(with_options(report.clone(), json!({"host_network": true}))).await;
    assert_eq!(out.trim_end(), fs::read_link("/proc/self/ns/net").unwrap().to_string_lossy());

    let name = format!("nds-{}", env.namespace);
    run(Command::new("ip").args(["netns", "add", &name]));
    let path = format!("/run/netns/{name}");
    let group = format!("net:[{}]", fs::metadata(&path).unwrap().ino());
    let mut task = env.prepare(report).await;
    task.config.network_isolation_spec = Some(NetworkIsolationSpec { mode: 1, path, ..Default::default() });
    env.try_start(&mut task).await.unwrap();
    let (_, out, _) = env.finish_task(task).await;
    run(Command::new("ip").args(["netns", "del", &name]));
    assert_eq!(out.trim_end(), group);
    assert_eq!(prepared_networks(&env), prepared);
    env.finish().await;
}

/// A hook may read the path of the namespace in the spec, which is valid during the start only.
#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_with_hooks_prepares_no_network_namespace() {
    let mut env = Env::configured(json!({"shim": {"pool": 1}, "hooks": {"poststop": ["/bin/true"]}})).await;
    let image = env.busybox().await;
    for _ in 0..2 {
        env.run(json!({"image": image, "command": "true"})).await;
    }
    assert_eq!(prepared_networks(&env), BTreeSet::new());
    env.finish().await;
}
