//! A real Nomad agent: server and client in one process on loopback. It has its own directory, so its state outlives
//! the process.

use std::{
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use nomad_driver_shim::{process::PidFd, task::which};
use serde_json::Value;

use super::api::Api;
use crate::support::{Env, eventually, services};

/// Environment variable with the path of Nomad's program.
const BINARY: &str = "NOMAD_BIN";
/// Time limit for an agent to leave after it was asked to.
const LEAVES: Duration = Duration::from_secs(40);

/// The path of Nomad's program: what `NOMAD_BIN` names, or `nomad` in PATH.
pub(super) fn binary() -> Option<PathBuf> {
    let named = std::env::var_os(BINARY).filter(|value| !value.is_empty()).map(PathBuf::from);
    which(&named.unwrap_or_else(|| "nomad".into()))
}

/// An agent's files, and its process while there is one.
pub(super) struct Agent {
    binary: PathBuf,
    dir: PathBuf,
    environment: Vec<(String, String)>,
    child: Option<Child>,
    pub api: Api,
}

impl Agent {
    /// Writes the configuration of an agent that uses the plugin of `env`. The agent is not started yet. Its directory
    /// is not below the plugin's directory, so that the processes of the one are not taken for those of the other.
    pub(super) fn new(binary: PathBuf, env: &mut Env) -> Self {
        let dir = env.dir.with_file_name(format!("{}-nomad", env.namespace));
        fs::create_dir_all(&dir).unwrap();
        let (http, rpc, serf) = (services::free_address(), services::free_address(), services::free_address());
        fs::write(dir.join("agent.hcl"), configuration(&dir, env, [&http, &rpc, &serf])).unwrap();
        let mut environment = env.launch_mut().env.clone();
        environment.retain(|(name, _)| name != "PROGRAM");
        Self { binary, dir, environment, child: None, api: Api::new(&http) }
    }

    /// The directory in which Nomad makes the files of its tasks.
    pub(super) fn alloc_dir(&self) -> PathBuf {
        self.dir.join("allocs")
    }

    /// Starts the agent, and waits until it serves and its driver can run tasks.
    pub(super) async fn start(&mut self) {
        self.launch();
        eventually("an agent with a healthy driver", async || {
            let nodes = self.api.get("nodes").await?;
            let id = nodes[0]["ID"].as_str().ok_or("no node")?;
            let node = self.api.get(&format!("node/{id}")).await?;
            let is_ready = node["Status"] == "ready" && node["Drivers"]["shim"]["Healthy"] == true;
            if is_ready { Ok(()) } else { Err(format!("{} {}", node["Status"], node["Drivers"])) }
        })
        .await;
    }

    /// Starts the agent's process.
    pub(super) fn launch(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join("agent.log")).unwrap();
        let mut command = Command::new(&self.binary);
        command.args(["agent", "-config"]).arg(self.dir.join("agent.hcl")).current_dir(&self.dir);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::from(log.as_fd().try_clone_to_owned().unwrap())).stderr(log);
        self.child = Some(services::spawn(command));
    }

    /// The agent's process.
    pub(super) fn process(&self) -> Option<PidFd> {
        self.child.as_ref().and_then(|child| PidFd::open(child.id()).ok())
    }

    /// Sends the agent a signal that ends it, and waits for its end. Returns whether the end came in time.
    pub(super) async fn end(&mut self, signal: i32) -> bool {
        let Some(process) = self.process() else { return true };
        process.signal(signal);
        let came = tokio::time::timeout(LEAVES, process.wait_for_end()).await.is_ok();
        if !came {
            process.signal(libc::SIGKILL);
            process.wait_for_end().await;
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
        came
    }

    /// The log of the agent and its plugins.
    pub(super) fn log(&self) -> String {
        fs::read(self.dir.join("agent.log"))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Keeps a copy of the agent's log, which is needed to understand a failure.
    pub(super) fn keep_log(&self) -> PathBuf {
        let name = self.dir.file_name().unwrap_or_default().to_string_lossy();
        let path = std::env::temp_dir().join(format!("chaos-{name}.log"));
        fs::write(&path, self.log()).unwrap();
        path
    }

    /// Ends the log collectors that an agent had started but could not note before it died: no other agent knows of
    /// them.
    fn end_collectors(&self) {
        for pid in nomad_driver_shim::process::all_pids().unwrap_or_default() {
            let is_ours = fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|path| path == self.dir);
            if let Some(process) = is_ours.then(|| PidFd::open(pid).ok()).flatten() {
                process.signal(libc::SIGKILL);
            }
        }
    }

    /// Removes the agent's files, after its log collectors and what Nomad had mounted there.
    pub(super) fn remove(&self) {
        self.end_collectors();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for point in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new) {
            if point.starts_with(&self.dir) {
                let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
            }
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The agent's configuration file. It switches off all that would contact other hosts: fingerprints of clouds, Consul
/// and Vault, and the check for a newer version.
fn configuration(dir: &Path, env: &Env, addresses: [&str; 3]) -> String {
    let port = |address: &str| address.rsplit(':').next().unwrap_or_default().to_owned();
    let [http, rpc, serf] = addresses.map(port);
    let mut plugin = String::new();
    body(&env.config, &mut plugin);
    format!(
        r#"
name                 = "chaos"
data_dir             = {data:?}
plugin_dir           = {plugins:?}
bind_addr            = "127.0.0.1"
log_level            = "DEBUG"
log_json             = true
disable_update_check = true
leave_on_interrupt   = false
leave_on_terminate   = false
ports {{
  http = {http}
  rpc  = {rpc}
  serf = {serf}
}}
advertise {{
  http = "127.0.0.1"
  rpc  = "127.0.0.1"
  serf = "127.0.0.1"
}}
telemetry {{
  disable_hostname = true
}}
server {{
  enabled          = true
  bootstrap_expect = 1
}}
client {{
  enabled           = true
  alloc_dir         = {allocs:?}
  alloc_mounts_dir  = {mounts:?}
  network_interface = "lo"
  servers           = ["127.0.0.1:{rpc}"]
  cpu_total_compute = 100000
  options {{
    "driver.allowlist"      = "shim"
    "fingerprint.denylist"  = "env_aws,env_azure,env_digitalocean,env_gce,consul,vault"
  }}
}}
plugin "nomad-driver-shim" {{
  args = ["--name", "shim"]
  config {{
{plugin}  }}
}}
"#,
        data = dir.join("data"),
        plugins = env.dir.join("bin"),
        allocs = dir.join("allocs"),
        mounts = dir.join("mounts"),
    )
}

/// The plugin's configuration as HCL. `runtime` is a block with a label, other objects are plain blocks.
fn body(config: &Value, text: &mut String) {
    for (key, value) in config.as_object().into_iter().flatten() {
        match value {
            Value::Object(labels) if key == "runtime" => {
                for (label, inner) in labels {
                    text.push_str(&format!("runtime {label:?} {{\n"));
                    body(inner, text);
                    text.push_str("}\n");
                }
            }
            Value::Object(_) => {
                text.push_str(&format!("{key} {{\n"));
                body(value, text);
                text.push_str("}\n");
            }
            _ => text.push_str(&format!("{key} = {value}\n")),
        }
    }
}

#[test]
fn a_configuration_becomes_blocks() {
    let config = serde_json::json!({"shim": {"pool": 2}, "runtime": {"crun": {"binary": "/x"}}, "flag": true});
    let mut text = String::new();
    body(&config, &mut text);
    let lines: Vec<&str> = text.lines().collect();
    for wanted in ["shim {", "pool = 2", "runtime \"crun\" {", "binary = \"/x\"", "flag = true"] {
        assert!(lines.contains(&wanted), "{wanted} is not in {text}");
    }
}
