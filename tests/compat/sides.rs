//! Runs the probe of a case in a container of docker, and in a task of the driver.

use std::{path::Path, process::Command};

use nomad_driver_shim::pb::driver::NetworkIsolationSpec;
use serde_json::{Value, json};

use crate::{
    cases::{Case, Network, Way},
    docker::{Docker, Outcome},
    probe::{self, Host, PROBE, Seen},
    support::{Env, Task, services, services::run, with_options},
};

/// The limits that each task has because Nomad always sends them.
const LIMITS: [&str; 6] = ["--memory", "64m", "--memory-swap", "64m", "--cpu-shares", "100"];

/// The command that is executed in a running container.
const EXECUTED: [&str; 2] = [PROBE, "settled"];

/// What the cases ask for must be allowed by the operator.
pub(crate) fn configuration(directories: &[&Path]) -> Value {
    json!({
        "allow_privileged": true,
        "security": {
            "allow_host_namespaces": true, "allow_caps": ["ALL"], "allow_devices": ["/dev/*"],
            "allow_new_privileges": true, "allow_seccomp_override": true, "allow_paths": directories,
        },
    })
}

/// The directories that stand for `{dir}` and `{shared}`.
pub(crate) struct Directories<'a> {
    pub dir: &'a Path,
    pub shared: &'a Path,
}

impl Directories<'_> {
    fn fill(&self, text: &str) -> String {
        text.replace("{dir}", self.dir.to_str().unwrap()).replace("{shared}", self.shared.to_str().unwrap())
    }

    fn fill_all(&self, value: &Value) -> Value {
        serde_json::from_str(&self.fill(&value.to_string())).unwrap()
    }
}

/// Returns the name of a case's image, without what names of images may not contain.
fn image_name(case: &Case) -> String {
    case.name
        .chars()
        .map(|letter| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { 'x' })
        .collect()
}

/// Runs the probe in a container of docker, or in a sandbox of gVisor.
pub(crate) async fn in_docker(docker: &Docker, case: &Case, in_sandbox: bool) -> Seen {
    let image = docker.load(&(case.image)(probe::image()), &image_name(case)).await;
    let (dir, shared) = (docker.dir().join("mounted"), docker.shared_dir());
    std::fs::create_dir_all(&dir).unwrap();
    let directories = Directories { dir: &dir, shared: &shared };
    let options: Vec<String> = case.docker.iter().map(|option| directories.fill(option)).collect();
    let network = match case.network {
        Network::None => "none",
        Network::Bridge => "bridge",
        Network::Host => "host",
    };
    let mut all = vec!["--network", network];
    let limits = LIMITS.chunks(2).filter(|pair| !case.docker.contains(&pair[0]));
    all.extend(limits.flatten());
    all.extend(options.iter().map(String::as_str));
    if in_sandbox {
        // The last one of several runtimes counts.
        all.extend(["--runtime", "runsc"]);
    }
    let outcome = match case.way {
        Way::First => docker.run(&image, &all, &[PROBE]).await,
        Way::ByImage => docker.run(&image, &all, &[]).await,
        Way::Executed | Way::ExecutedWithTerminal => {
            let container = docker.start(&image, &all, &[PROBE, "sleep"]).await;
            container.says("ready").await;
            let options: &[&str] = if case.way == Way::Executed { &[] } else { &["--tty"] };
            container.exec(options, &EXECUTED).await
        }
    };
    let Outcome { code, stdout, stderr } = outcome;
    assert_eq!(code, 0, "{}, docker: {stdout}{stderr}", case.name);
    compared(case, Host::of(docker.host_process()).read(&stdout))
}

/// Returns what is compared. The hosts' own networks differ, since docker's host is a namespace; /sys belongs to a
/// network.
fn compared(case: &Case, mut seen: Seen) -> Seen {
    let of_network = ["sysctl net/", "interface ", "mount /sys options"];
    if case.network == Network::Host {
        seen.retain(|key, _| !of_network.iter().any(|start| key.starts_with(start)));
    }
    seen
}

/// Runs the probe in a task of the driver.
pub(crate) async fn in_driver(env: &mut Env, case: &Case, runtime: &str, directories: &Directories<'_>) -> Seen {
    let image =
        (case.image)(probe::image()).push(&services().registry, &format!("compat/{}:1", image_name(case))).await;
    let command = match case.way {
        Way::First => json!({"command": PROBE}),
        Way::ByImage => json!({}),
        Way::Executed | Way::ExecutedWithTerminal => json!({"command": PROBE, "args": ["sleep"]}),
    };
    let config = with_options(command, json!({"image": image, "runtime": runtime}));
    let mut task = env.prepare(with_options(config, directories.fill_all(&case.task))).await;
    (case.request)(&mut task.config);
    let group = (case.network == Network::Bridge).then(|| Group::new(&env.namespace));
    task.config.network_isolation_spec = group.as_ref().map(Group::spec);
    let started = env.try_start(&mut task).await;
    started.unwrap_or_else(|status| panic!("{}, {runtime}: {}", case.name, status.message()));
    let output = match case.way {
        Way::First | Way::ByImage => {
            let (code, out, err) = env.finish_task(task).await;
            assert_eq!(code, 0, "{}, {runtime}: {out}{err}", case.name);
            out
        }
        Way::Executed | Way::ExecutedWithTerminal => executed(env, case, task).await,
    };
    compared(case, Host::of(std::process::id()).read(&output))
}

async fn executed(env: &Env, case: &Case, task: Task) -> String {
    task.says("ready").await;
    let output = if case.way == Way::Executed {
        let answer = env.exec(&task, &EXECUTED, 0).await.unwrap();
        assert_eq!(answer.result.unwrap().exit_code, 0, "{}", String::from_utf8_lossy(&answer.stderr));
        String::from_utf8(answer.stdout).unwrap()
    } else {
        let outcome = env.talk(&task, &EXECUTED, true).await.unwrap().end().await;
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        outcome.stdout
    };
    env.destroy(&task).await.unwrap();
    output
}

/// A network namespace as Nomad makes it for a group, with an address as containers in docker's bridge have.
struct Group {
    name: String,
    /// The namespace of the other end of the group's interface.
    peer: String,
}

impl Group {
    fn new(name: &str) -> Self {
        let this = Self { name: format!("nds-{name}"), peer: format!("nds-{name}-peer") };
        let Self { name, peer } = &this;
        for step in [
            format!("netns add {name}"),
            format!("netns add {peer}"),
            format!("-n {name} link set lo up"),
            format!("-n {name} link add eth0 type veth peer name eth0 netns {peer}"),
            format!("-n {name} addr add 172.17.0.2/16 broadcast 172.17.255.255 dev eth0"),
            format!("-n {peer} link set eth0 up"),
            format!("-n {name} link set eth0 up"),
        ] {
            run(Command::new("ip").args(step.split(' ')));
        }
        this
    }

    fn spec(&self) -> NetworkIsolationSpec {
        NetworkIsolationSpec { path: format!("/run/netns/{}", self.name), ..Default::default() }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for name in [&self.name, &self.peer] {
            let deleted = Command::new("ip").args(["netns", "del", name]).status();
            if !deleted.as_ref().is_ok_and(std::process::ExitStatus::success) {
                eprintln!("could not delete the network namespace {name}: {deleted:?}");
            }
        }
    }
}
