//! The command line.

use std::{
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use nomad_driver_shim::ids::random_hex;

use crate::support::{Image, leak, patience, program, script, services, services::root};

struct Cli {
    dir: PathBuf,
    namespace: String,
}

impl Cli {
    fn new() -> Self {
        let id = random_hex(4);
        Self { dir: root().join(&id), namespace: format!("cli-{id}") }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command
            .args(arguments)
            .env("NOMAD_DRIVER_SHIM_ADDRESS", &services().containerd)
            .env("NOMAD_DRIVER_SHIM_NAMESPACE", &self.namespace)
            .env("NOMAD_DRIVER_SHIM_RUN_DIR", self.dir.join("run"))
            .env("NOMAD_DRIVER_SHIM_STATE_DIR", self.dir.join("state"))
            .stdin(Stdio::null());
        command
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        let mut command = self.command(arguments);
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    /// `run` leaves nothing: no run directory, no mount, no writable layer.
    fn assert_clean(&self) {
        assert_eq!(leak::entries(&self.dir.join("run")), Vec::<String>::new());
        assert_eq!(leak::entries(&self.dir.join("state/cli/uppers")), Vec::<String>::new());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.dir.to_str().unwrap()));
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn busybox() -> String {
    Image::busybox().push(&services().registry, "test/busybox:1").await
}

#[tokio::test(flavor = "multi_thread")]
async fn run_exits_with_the_tasks_code_and_gives_its_output() {
    let (cli, image) = (Cli::new(), busybox().await);
    let output = cli
        .run(&["run", "--env", "A=b", "--user", "1000", &image, "sh", "-c", "echo $A; id -u; echo e >&2; exit 7"])
        .await;
    assert_eq!(
        (output.status.code(), text(&output.stdout), text(&output.stderr)),
        (Some(7), "b\n1000\n".into(), "e\n".into())
    );
    cli.assert_clean();
    let output = cli.run(&["run", "--time", &image, "true"]).await;
    assert_eq!(output.status.code(), Some(0));
    for phase in ["StartTask", "image", "shim: Create", "until the process runs", "but the shim's part", "first byte"] {
        assert!(text(&output.stderr).contains(phase), "{}", text(&output.stderr));
    }
    // A start with an idle shim is what an agent's plugin makes.
    assert!(text(&output.stderr).contains("shim (from the pool)"), "{}", text(&output.stderr));
    cli.assert_clean();
}

/// Whoever calls `run` is root, so nothing that a job can ask for is closed.
#[tokio::test(flavor = "multi_thread")]
async fn run_allows_everything() {
    let (cli, image) = (Cli::new(), busybox().await);
    let options = r#"{
        "devices": ["/dev/fuse"], "security_opt": ["seccomp=unconfined", "no-new-privileges=false"], "pids_limit": 0,
        "shm_size": "100g", "sysctl": [{"net.core.somaxconn": "99"}]
    }"#;
    let script = "ls /dev/fuse; grep -c '^Seccomp:.0' /proc/self/status; grep -c '^NoNewPrivs:.0' /proc/self/status; \
        cat /proc/sys/net/core/somaxconn";
    let output = cli.run(&["run", "--init", "--config", options, &image, "sh", "-c", script]).await;
    assert_eq!(
        (text(&output.stdout).as_str(), text(&output.stderr).as_str()),
        ("/dev/fuse\n1\n1\n99\n", ""),
        "{:?}",
        output.status
    );
    // Whether a limit can be raised depends on the capabilities of whoever runs this test, and on nothing else.
    let options = r#"{"ulimit": [{"rtprio": "7", "nice": "40", "memlock": "unlimited"}]}"#;
    let output = cli.run(&["run", "--config", options, &image, "sh", "-c", "ulimit -l"]).await;
    let refusal = text(&output.stderr);
    assert!(text(&output.stdout) == "unlimited\n" || refusal.contains("RLIMIT"), "{refusal}");
    cli.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_have_dockers_codes_and_one_clear_line() {
    let (cli, image) = (Cli::new(), busybox().await);
    let none = format!("{}/no/such:1", services().registry);
    let private = {
        Image::busybox().push(&services().basic_backdoor, "private/app:1").await;
        format!("{}/private/app:1", services().basic_registry)
    };
    for (arguments, code, words) in [
        (&["run", &image, "/no/such"][..], 127, "/no/such"),
        (&["run", "--runtime", "runc", &image, "/no/such"], 127, "/no/such"),
        (&["run", &image, "/etc/not-executable"], 126, "ermission denied"),
        (&["run", "--runtime", "runc", &image, "/etc/not-executable"], 126, "ermission denied"),
        (&["run", &none], 125, "not found"),
        (&["run", "--user", "ghost", &image], 125, "ghost"),
        (&["run", "127.0.0.1:1/x"], 125, "could not reach"),
        (&["run", &private], 125, "pull access denied"),
        (&["run", "Not An Image"], 125, "Not An Image"),
        (&["run", "--env", "nonsense", &image], 125, "nonsense"),
        (&["run", "--runtime", "kata", &image], 125, "kata"),
        (&["pull", &none], 125, "not found"),
        (&["run"], 125, "IMAGE"),
        (&["no-such-command"], 125, "no-such-command"),
    ] {
        let output = cli.run(arguments).await;
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(words), "{arguments:?}: {stderr}");
        if words != "IMAGE" && words != "no-such-command" {
            assert_eq!(stderr.lines().count(), 1, "{arguments:?}: {stderr}");
        }
        assert!(output.stdout.is_empty());
    }
    cli.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_stops_the_task() {
    let (cli, image) = (Cli::new(), busybox().await);
    let script = "trap 'echo stopped; exit 9' TERM; echo ready; while :; do sleep 0.05; done";
    let mut child = cli.command(&["run", &image, "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
    assert_eq!(line, "ready\n");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), nix::sys::signal::Signal::SIGINT)
        .unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut stdout, &mut rest).unwrap();
    assert_eq!((rest.as_str(), child.wait().unwrap().code()), ("stopped\n", Some(9)));
    cli.assert_clean();
}

/// The plugin dies while a task runs that has a directory of the host bound into it. The directory stays as it is, and
/// everything else is removed.
#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_dies_leaves_the_hosts_directories_alone() {
    let (cli, image) = (Cli::new(), busybox().await);
    let precious = cli.dir.join("precious");
    std::fs::create_dir_all(&precious).unwrap();
    std::fs::write(precious.join("file"), "untouched").unwrap();
    let mount = format!("type=bind,source={},target=/m", precious.display());
    let arguments = ["run", "--mount", &mount, &image, "sh", "-c", "cat /m/file; sleep 600"];
    let mut child = cli.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut text = [0; 9];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut text).unwrap();
    assert_eq!(&text, b"untouched");
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    let plugin = children
        .split_whitespace()
        .find(|pid| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("--name")));
    let plugin: i32 = plugin.unwrap_or_else(|| panic!("{children}")).parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(plugin), nix::sys::signal::Signal::SIGKILL).unwrap();
    let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
    assert_eq!(status.code(), Some(125));
    assert_eq!(std::fs::read_to_string(precious.join("file")).unwrap(), "untouched");
    cli.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn pull_images_and_ps_list_what_there_is() {
    let (cli, image) = (Cli::new(), busybox().await);
    let output = cli.run(&["pull", &image]).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with(&format!("{image}@sha256:")));
    let images: serde_json::Value = serde_json::from_slice(&cli.run(&["images", "--json"]).await.stdout).unwrap();
    assert_eq!((images[0]["name"].as_str(), images[0]["ready"].as_bool()), (Some(image.as_str()), Some(true)));
    assert!(text(&cli.run(&["images"]).await.stdout).contains(&image));

    let mut child = cli
        .command(&["run", "--name", "sleeper", &image, "sh", "-c", "echo ready; sleep 600"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut line).unwrap();
    // The task's first output may come a moment before its record says that it runs.
    crate::support::eventually("it is listed as running", async || {
        let tasks: serde_json::Value = serde_json::from_slice(&cli.run(&["ps", "--json"]).await.stdout).unwrap();
        let listed = (tasks[0]["name"].as_str(), tasks[0]["state"].as_str()) == (Some("sleeper"), Some("running"));
        if listed { Ok(()) } else { Err(tasks) }
    })
    .await;
    assert!(text(&cli.run(&["ps"]).await.stdout).contains("sleeper"));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), nix::sys::signal::Signal::SIGTERM)
        .unwrap();
    child.wait().unwrap();
    assert_eq!(text(&cli.run(&["ps", "--json"]).await.stdout), "[]\n");
    cli.assert_clean();
}

/// A killed `run` leaves its container behind. `gc` ends and removes this container, and does not touch the container
/// of a `run` that lives.
#[tokio::test(flavor = "multi_thread")]
async fn gc_clears_runs_that_were_killed() {
    let (cli, image) = (Cli::new(), busybox().await);
    let start = |name: &str| {
        let mut child = cli
            .command(&["run", "--name", name, &image, "sh", "-c", "echo ready; sleep 60"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut line).unwrap();
        child
    };
    let (mut lives, mut killed) = (start("lives"), start("killed"));
    killed.kill().unwrap();
    killed.wait().unwrap();
    let removed = cli.run(&["gc", "--keep", "0s"]).await;
    assert!(removed.status.success(), "{} {}", text(&removed.stdout), text(&removed.stderr));
    assert_eq!(text(&removed.stdout).matches("removed").count(), 1, "{}", text(&removed.stdout));
    let tasks: serde_json::Value = serde_json::from_slice(&cli.run(&["ps", "--json"]).await.stdout).unwrap();
    assert_eq!((tasks.as_array().unwrap().len(), tasks[0]["name"].as_str()), (1, Some("lives")), "{tasks}");
    assert!(!cli.run(&["rmi", &image]).await.status.success(), "a run uses it");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(lives.id().cast_signed()), nix::sys::signal::Signal::SIGTERM)
        .unwrap();
    lives.wait().unwrap();
    assert!(cli.run(&["rmi", &image]).await.status.success());
    cli.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_knows_this_host() {
    let cli = Cli::new();
    let output = cli.run(&["doctor", "--json"]).await;
    let findings: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success(), "{findings:#}");
    for what in ["root", "cgroups", "overlayfs", "shim", "runc", "crun", "containerd"] {
        let finding = findings.as_array().unwrap().iter().find(|finding| finding["what"] == what);
        assert_ne!(finding.unwrap_or_else(|| panic!("{what}"))["verdict"], "MISSING", "{findings:#}");
    }
    let mut command = cli.command(&["doctor"]);
    let bare = tokio::task::spawn_blocking(move || {
        command.env("PATH", "/nowhere").env("NOMAD_DRIVER_SHIM_ADDRESS", "/no/such.sock").output().unwrap()
    });
    let bare = bare.await.unwrap();
    assert_eq!(bare.status.code(), Some(1));
    assert!(text(&bare.stdout).contains("install containerd"), "{}", text(&bare.stdout));
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_does_not_wait_for_a_program_that_hangs() {
    let (cli, programs) = (Cli::new(), tempfile::tempdir().unwrap());
    script(&programs.path().join("youki"), "exec sleep 600");
    let mut command = tokio::process::Command::from(cli.command(&["doctor"]));
    command.env("PATH", format!("{}:{}", programs.path().display(), std::env::var("PATH").unwrap())).kill_on_drop(true);
    let output = tokio::time::timeout(patience(), command.output()).await.expect("doctor ends").unwrap();
    assert!(text(&output.stdout).contains("containerd"), "{}", text(&output.stdout));
}

/// If the system has no containerd, the driver starts a private one. All commands that need it share it, and the last
/// one ends it.
#[tokio::test(flavor = "multi_thread")]
async fn a_private_containerd_comes_and_goes() {
    let (cli, image) = (Cli::new(), busybox().await);
    // A host may have a running containerd. A mount namespace of their own hides it from these commands.
    let hidden = "mkdir -p /run/containerd && mount -t tmpfs none /run/containerd && exec \"$0\" \"$@\"";
    let private = |arguments: &[&str]| {
        let plain = cli.command(arguments);
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-c", hidden])
            .arg(plain.get_program())
            .args(arguments);
        command.envs(plain.get_envs().filter_map(|(key, value)| Some((key, value?))));
        command.env_remove("NOMAD_DRIVER_SHIM_ADDRESS").stdin(Stdio::null());
        command
    };
    let children: Vec<_> = (0..3)
        .map(|n| {
            private(&["run", &image, "sh", "-c", &format!("sleep 0.{n}; exit {n}")])
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for (n, child) in children.into_iter().enumerate() {
        let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
        assert_eq!(output.status.code(), i32::try_from(n).ok(), "{}", text(&output.stderr));
    }
    assert!(!cli.dir.join("run/containerd/pid").exists(), "the last one ended it");
    // Of two that start at once, neither waits for the other's end.
    let mut long = private(&["run", &image, "sleep", "20"]).spawn().unwrap();
    let short = private(&["run", &image, "true"]).stderr(Stdio::piped()).spawn().unwrap();
    let output = tokio::task::spawn_blocking(move || short.wait_with_output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(long.try_wait().unwrap().is_none(), "the first one still runs");
    assert!(tokio::task::spawn_blocking(move || long.wait().unwrap()).await.unwrap().success());
    let lines: Vec<_> = leak::entries(std::path::Path::new("/proc"))
        .into_iter()
        .filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok())
        .filter(|line| line.contains(cli.dir.to_str().unwrap()))
        .collect();
    assert!(lines.is_empty(), "{lines:?}");
    assert!(cli.dir.join("state/containerd").exists(), "its store stays");
}
