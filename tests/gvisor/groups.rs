//! Sandboxes in groups' network namespaces: a sandbox alone has a network stack of its own; a sandbox that shares the
//! namespace uses the kernel's.

use std::{
    path::Path,
    process::{Child, Command},
};

use nomad_driver_shim::pb::driver::NetworkIsolationSpec;
use serde_json::{Value, json};

use crate::support::{Env, Task, eventually, services::run};

/// A namespace with a bridge that acts as the host, and the groups' namespaces that are connected to the bridge.
struct Bridge {
    host: String,
    groups: Vec<String>,
}

impl Bridge {
    fn new(env: &Env, groups: usize) -> Self {
        let ip = |words: &str| run(Command::new("ip").args(words.split(' ')));
        let host = format!("host-{}", env.namespace);
        let mut this = Self { host: host.clone(), groups: Vec::new() };
        ip(&format!("netns add {host}"));
        for words in ["link add br0 type bridge", "addr add 10.77.0.1/24 dev br0", "link set br0 up", "link set lo up"]
        {
            ip(&format!("-n {host} {words}"));
        }
        for n in 0..groups {
            let group = format!("group{n}-{}", env.namespace);
            ip(&format!("netns add {group}"));
            this.groups.push(group.clone());
            ip(&format!("-n {host} link add v{n} type veth peer name eth0 netns {group}"));
            for words in [format!("link set v{n} master br0"), format!("link set v{n} up")] {
                ip(&format!("-n {host} {words}"));
            }
            for words in
                ["link set lo up", &format!("addr add {} dev eth0", Self::address(n) + "/24"), "link set eth0 up"]
            {
                ip(&format!("-n {group} {words}"));
            }
            ip(&format!("-n {group} route add default via 10.77.0.1"));
        }
        this
    }

    fn address(n: usize) -> String {
        format!("10.77.0.{}", n + 10)
    }

    fn told(&self, n: usize) -> Option<NetworkIsolationSpec> {
        let path = format!("/run/netns/{}", self.groups[n]);
        assert!(Path::new(&path).exists());
        Some(NetworkIsolationSpec { mode: 1, path, ..Default::default() })
    }

    /// Returns the addresses and routes that `ip` shows for a group.
    fn seen(&self, n: usize) -> (String, String) {
        let ip = |words: &str| {
            let output = Command::new("ip").args(["-n", &self.groups[n]]).args(words.split(' ')).output().unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        (ip("-4 addr show eth0"), ip("route"))
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        for name in self.groups.iter().chain([&self.host]) {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

async fn prepare(env: &mut Env, bridge: &Bridge, n: usize, script: &str, options: Value) -> Task {
    let config = env.shell(script, options).await;
    let mut task = env.prepare(config).await;
    task.config.network_isolation_spec = bridge.told(n);
    task
}

async fn start(env: &mut Env, bridge: &Bridge, n: usize, script: &str, options: Value) -> Task {
    let mut task = prepare(env, bridge, n, script, options).await;
    env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{}", status.message()));
    task
}

fn server(port: u16, text: &str) -> String {
    format!("mkdir /www; echo {text} > /www/f; exec httpd -f -p {port} -h /www")
}

async fn reaches(env: &Env, from: &Task, address: &str, expected: &str) {
    let url = format!("http://{address}/f");
    eventually(&format!("{expected} at {address}"), async || {
        let answer = env.exec(from, &["/bin/wget", "-qO-", &url], 0).await.unwrap();
        let said = String::from_utf8_lossy(&answer.stdout).into_owned();
        if said.trim() == expected { Ok(()) } else { Err((said, String::from_utf8_lossy(&answer.stderr).into_owned())) }
    })
    .await;
}

fn mixed() -> Value {
    json!({"runtime": {"mixed": {"binary": "runsc", "network": "host"}}})
}

/// The first group is a sandbox with its own network stack. The second has a sandbox and a task without one.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn two_groups_one_mixed_reach_each_other() {
    let mut env = Env::with_runtime("runsc", mixed()).await;
    let bridge = Bridge::new(&env, 2);
    let before = bridge.seen(0);
    let alone = start(&mut env, &bridge, 0, &server(8080, "alone"), json!({})).await;
    let boxed = start(&mut env, &bridge, 1, &server(8080, "boxed"), json!({"runtime": "mixed"})).await;
    let side = start(&mut env, &bridge, 1, &server(9090, "side"), json!({"runtime": "crun"})).await;
    let (first, second) = (Bridge::address(0), Bridge::address(1));
    reaches(&env, &alone, &format!("{second}:8080"), "boxed").await;
    reaches(&env, &alone, &format!("{second}:9090"), "side").await;
    for task in [&boxed, &side] {
        reaches(&env, task, &format!("{first}:8080"), "alone").await;
        reaches(&env, task, "127.0.0.1:8080", "boxed").await;
        reaches(&env, task, "127.0.0.1:9090", "side").await;
    }
    // A running sandbox takes the addresses out of the namespace and gives them back when it is destroyed. The next
    // sandbox gets them, and keeps them if the plugin dies.
    assert!(!bridge.seen(0).0.contains(&first), "{:?}", bridge.seen(0));
    env.destroy(&alone).await.unwrap();
    assert_eq!(bridge.seen(0), before);
    let again = start(&mut env, &bridge, 0, &server(8080, "again"), json!({})).await;
    reaches(&env, &side, &format!("{first}:8080"), "again").await;
    env.kill_plugin().await;
    env.start_plugin().await;
    for task in [&again, &boxed, &side] {
        env.recover(task).await.unwrap();
    }
    reaches(&env, &side, &format!("{first}:8080"), "again").await;
    let mut second_in = prepare(&mut env, &bridge, 0, "true", json!({"runtime": "crun"})).await;
    let why = env.try_start(&mut second_in).await.unwrap_err().message().to_owned();
    assert!(why.contains("belongs to the gVisor sandbox of task \"web\""), "after a recovery: {why}");
    for task in [&again, &boxed, &side] {
        env.destroy(task).await.unwrap();
    }
    assert_eq!(bridge.seen(0), before);
    assert_eq!(std::fs::read_dir(env.dir.join("run/netns")).map_or(0, Iterator::count), 0);
    env.finish().await;
}

struct Stranger(Child);

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A sandbox with its own network stack does not share its group's namespace. A second task is refused with that
/// reason.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn what_can_not_work_is_refused() {
    let mut env = Env::with_runtime("runsc", mixed()).await;
    let bridge = Bridge::new(&env, 2);
    let before = bridge.seen(0);
    let alone = start(&mut env, &bridge, 0, "sleep 600", json!({})).await;
    for options in [json!({"runtime": "crun"}), json!({"runtime": "mixed"}), json!({})] {
        let mut other = prepare(&mut env, &bridge, 0, "true", options).await;
        let why = env.try_start(&mut other).await.unwrap_err().message().to_owned();
        assert!(why.contains("network = \"host\"") && why.contains("\"web\""), "{why}");
    }
    // The refused starts have changed nothing: the sandbox still has the addresses.
    assert!(!bridge.seen(0).0.contains(&Bridge::address(0)));
    env.destroy(&alone).await.unwrap();
    assert_eq!(bridge.seen(0), before);

    let side = start(&mut env, &bridge, 1, "sleep 600", json!({"runtime": "crun"})).await;
    let mut boxed = prepare(&mut env, &bridge, 1, "true", json!({})).await;
    let why = env.try_start(&mut boxed).await.unwrap_err().message().to_owned();
    assert!(why.contains("needs the group's namespace") && why.contains("task \"web\""), "{why}");
    env.destroy(&side).await.unwrap();

    // A process of another driver, such as a sidecar.
    let child = Command::new("ip").args(["netns", "exec", &bridge.groups[1], "sleep", "600"]).spawn().unwrap();
    let _stranger = Stranger(child);
    eventually("a stranger in the namespace", async || {
        let mut boxed = prepare(&mut env, &bridge, 1, "true", json!({})).await;
        match env.try_start(&mut boxed).await {
            Err(status) if status.message().contains("is in it") && status.message().contains("(sleep)") => Ok(()),
            other => {
                let _ = env.destroy(&boxed).await;
                Err(format!("{other:?}"))
            }
        }
    })
    .await;
    env.finish().await;
}
