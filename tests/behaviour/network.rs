//! A group in Nomad's bridge mode: the tests call the CNI plugins that Nomad's client calls, in namespaces of their
//! own.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use nomad_driver_shim::{
    host::Alloc,
    ids::random_hex,
    pb::driver::{HostsConfig, NetworkIsolationSpec, PortMapping, TaskConfig},
};
use serde_json::{Value, json};

use crate::support::{Env, eventually, patience, services::run, shell_in};

const HOST_PORT: u16 = 28_080;

/// A network namespace that stands for the host, with Nomad's bridge, and a group's namespace that is connected to it.
struct Bridge {
    host: String,
    group: String,
    /// The host's address on the bridge.
    gateway: String,
    /// The group's address.
    address: String,
}

impl Bridge {
    /// Makes the namespaces as Nomad's client does for a group in bridge mode with one mapped port.
    fn new(env: &Env, alloc: &str) -> Self {
        let (host, group) = (format!("host-{}", env.namespace), format!("group-{}", env.namespace));
        for name in [&host, &group] {
            run(Command::new("ip").args(["netns", "add", name]));
        }
        run(Command::new("ip").args(["-n", &host, "link", "set", "lo", "up"]));
        let mut this = Self { host, group, gateway: String::new(), address: String::new() };
        let name = "nomad";
        let ipam = json!({
            "type": "host-local", "ranges": [[{"subnet": "172.26.64.0/20"}]], "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": env.dir.join("cni"),
        });
        this.cni(alloc, json!({"name": name, "type": "loopback"}));
        let made = this.cni(
            alloc,
            json!({
                "name": name, "type": "bridge", "bridge": "nomad", "ipMasq": true, "isGateway": true,
                "forceAddress": true, "ipam": ipam,
            }),
        );
        let port = json!({"hostPort": HOST_PORT, "containerPort": 8080, "protocol": "tcp"});
        this.cni(
            alloc,
            json!({
                "name": name, "type": "portmap", "capabilities": {"portMappings": true}, "snat": true,
                "runtimeConfig": {"portMappings": [port]}, "prevResult": made,
            }),
        );
        let text = |value: &Value| value.as_str().unwrap().split('/').next().unwrap().to_owned();
        (this.gateway, this.address) = (text(&made["ips"][0]["gateway"]), text(&made["ips"][0]["address"]));
        this
    }

    /// Runs the ADD command of one CNI plugin and returns its result.
    fn cni(&self, alloc: &str, mut config: Value) -> Value {
        config["cniVersion"] = json!("0.4.0");
        let directories = ["/opt/cni/bin", "/usr/lib/cni"];
        let plugin = config["type"].as_str().unwrap();
        let path = directories.iter().map(|directory| Path::new(directory).join(plugin)).find(|path| path.exists());
        let path = path.expect("CNI plugins are installed by scripts/setup.sh");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.host]).arg(path);
        command.env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", alloc).env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", format!("/run/netns/{}", self.group)).env("CNI_PATH", directories.join(":"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{plugin}: {}", String::from_utf8_lossy(&output.stdout));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Adds to the task's configuration what Nomad passes to the driver for the group's network.
    fn told_to(&self, config: &mut TaskConfig) {
        let hosts = HostsConfig { hostname: "group-of-two".to_owned(), address: self.address.clone() };
        config.network_isolation_spec = Some(NetworkIsolationSpec {
            mode: 1,
            path: format!("/run/netns/{}", self.group),
            hosts_config: Some(hosts),
            ..Default::default()
        });
        let port =
            PortMapping { label: "http".to_owned(), value: HOST_PORT.into(), to: 8080, host_ip: self.gateway.clone() };
        config.resources.as_mut().unwrap().ports.push(port);
        config.env.insert("NOMAD_PORT_http".to_owned(), "8080".to_owned());
    }

    /// Requests the page from the mapped port, as a client on the host does, until the answer is as expected.
    async fn answers(&self, expected: &str) {
        let address = format!("http://{}:{HOST_PORT}/page", self.gateway);
        eventually("the mapped port answers", async || {
            let output = Command::new("ip")
                .args(["netns", "exec", &self.host, "busybox", "timeout", "5", "busybox", "wget", "-qO-", &address])
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            if said == expected { Ok(()) } else { Err((said, String::from_utf8_lossy(&output.stderr).into_owned())) }
        })
        .await;
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        for name in [&self.group, &self.host] {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

/// A group asks for ports without a network of its own: its task runs, and an event says what it lacks.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_with_ports_and_without_a_network_is_told() {
    use nomad_driver_shim::pb::driver::TaskEventsRequest;
    let config = serde_json::json!({"security": {"allow_host_namespaces": true}});
    let mut env = Env::configured(config).await;
    let mut events = env.driver().task_events(TaskEventsRequest {}).await.unwrap().into_inner();
    let image = env.busybox().await;
    // Only the last of these tasks gets an event; those of the others would come first.
    for (host_network, variable) in
        [(false, "NOMAD_TASK_NAME"), (true, "NOMAD_PORT_http"), (false, "NOMAD_UPSTREAM_ADDR_db")]
    {
        let mut config = shell_in(&image, "true");
        config["host_network"] = host_network.into();
        let mut task = env.prepare(config).await;
        task.config.env.insert(variable.to_owned(), "8080".to_owned());
        env.try_start(&mut task).await.unwrap();
        let id = task.id.clone();
        env.finish_task(task).await;
        if variable.starts_with("NOMAD_UPSTREAM") {
            let told = loop {
                let event = tokio::time::timeout(patience(), events.message()).await.unwrap().unwrap().unwrap();
                if event.message.contains("loopback only") {
                    break event;
                }
            };
            assert_eq!(told.task_id, id);
            for part in [variable, "network { mode = \"bridge\" }", "host_network = true"] {
                assert!(told.message.contains(part), "{part:?} in {}", told.message);
            }
        }
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tasks_of_a_group_share_a_bridged_network_and_its_mapped_port() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let alloc = Alloc::create(&env.dir.join("allocs"), &format!("{}-{}", env.namespace, random_hex(4))).unwrap();
    env.allocs.push(alloc.clone());
    let bridge = Bridge::new(&env, &alloc.id);
    let sh = |script: &str| shell_in(&image, script);
    let mut tasks = Vec::new();
    for (name, script) in [
        ("server", "mkdir /www; echo from the task > /www/page; exec httpd -f -p $NOMAD_PORT_http -h /www"),
        ("client", "sleep 600"),
    ] {
        let mut task = env.prepare_in(alloc.create_task(name).unwrap(), "1", sh(script)).await;
        bridge.told_to(&mut task.config);
        env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{}", status.message()));
        tasks.push(task);
    }
    let [server, client] = &tasks[..] else { unreachable!() };
    let links = "readlink /proc/self/ns/net";
    assert_eq!(env.exec_text(server, links).await, env.exec_text(client, links).await);
    bridge.answers("from the task\n").await;
    // The other task reaches the server on loopback and by the group's name.
    for address in ["127.0.0.1:8080", "group-of-two:8080"] {
        let seen = env.exec_text(client, &format!("timeout 5 wget -qO- http://{address}/page")).await;
        assert_eq!(seen, "from the task\n", "{address}");
    }
    // The route out of the group: the default route leads to the host.
    let routes = env.exec_text(client, "ip route").await;
    assert!(routes.contains(&format!("default via {}", bridge.gateway)), "{routes}");
    env.kill_plugin().await;
    bridge.answers("from the task\n").await;
    env.start_plugin().await;
    for task in &tasks {
        env.recover(task).await.unwrap();
    }
    bridge.answers("from the task\n").await;
    // When one task ends, the other task keeps the network.
    env.destroy(client).await.unwrap();
    bridge.answers("from the task\n").await;
    env.destroy(server).await.unwrap();
    drop(bridge);
    env.finish().await;
}
