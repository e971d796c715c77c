//! Ways out of a container that a sandbox closes. Each probe must also succeed once the confinement is removed, which
//! proves that the probe works.

use std::fs;

use serde_json::{Value, json};

use crate::{SPELLINGS, support::Env};

/// Runs a task that tries `script`. Returns `in` if the script succeeded, else `out`.
async fn tries(env: &mut Env, script: &str, options: Value) -> String {
    let config = env.shell(&format!("({script}) > /dev/null 2>&1 && echo in || echo out"), options).await;
    let (code, out, err) = env.run(config).await;
    assert_eq!(code, 0, "{script}: {out}{err}");
    out.trim().to_owned()
}

/// Options of a container that is as open as possible: no sandbox, no confinement.
fn open() -> Value {
    json!({"runtime": "crun", "privileged": true})
}

fn with(mut options: Value, name: &str, value: Value) -> Value {
    options[name] = value;
    options
}

async fn probe(env: &mut Env, script: &str, opened: Value) {
    assert_eq!(tries(env, script, json!({})).await, "out", "in the sandbox: {script}");
    assert_eq!(tries(env, script, opened.clone()).await, "in", "the probe is none with {opened}: {script}");
}

fn allowed() -> Value {
    json!({
        "allow_privileged": true,
        "security": {
            "allow_host_namespaces": true, "allow_caps": ["ALL"], "allow_paths": ["/"], "allow_devices": ["*"],
            "allow_seccomp_override": true,
        },
        "runtime": {"raw": {"binary": "runsc", "flags": ["net-raw"]}},
    })
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn ways_out_are_closed() {
    for runtime in SPELLINGS {
        let mut env = Env::with_runtime(runtime, allowed()).await;
        // A mount in the task.
        probe(&mut env, "mkdir -p /m && mount -t tmpfs none /m", json!({"cap_add": ["SYS_ADMIN"]})).await;
        // Kernel parameters: gVisor's are not the host's, even for a privileged task.
        let script = "echo probe > /proc/sys/kernel/domainname && grep probe /proc/sys/kernel/domainname";
        probe(&mut env, script, open()).await;
        assert_eq!(tries(&mut env, script, json!({"privileged": true})).await, "out", "privileged, in the sandbox");
        // A raw socket.
        let script = "ping -c 1 -W 2 127.0.0.1";
        probe(&mut env, script, json!({"runtime": "raw", "cap_add": ["NET_RAW"]})).await;
        assert_eq!(tries(&mut env, script, json!({"cap_add": ["NET_RAW"]})).await, "out", "without runsc's flag");
        // The objects of a host process that ptrace(2) would reach: its memory and environment.
        let host = std::process::id();
        let script = format!("grep -q . /proc/{host}/environ && cat /proc/{host}/maps");
        probe(&mut env, &script, with(open(), "pid_mode", json!("host"))).await;
        // A device, by its numbers.
        probe(&mut env, "mknod /d b 7 0 && head -c 1 /d", open()).await;
        // A file of the host.
        let secret = env.dir.join("secret");
        fs::write(&secret, "of the host").unwrap();
        let path = secret.display();
        let script = format!("cat {path} || cat /proc/1/root/{path} || cat /../../../..{path} || cat /bound{path}");
        let bind = json!([{"type": "bind", "source": "/", "target": "/bound", "options": ["rbind", "ro"]}]);
        probe(&mut env, &script, json!({"mounts": bind})).await;
        env.finish().await;
    }
}

/// The task sees gVisor's kernel, and the host sees none of its processes.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn its_kernel_is_gvisors() {
    for runtime in SPELLINGS {
        let mut env = Env::with_runtime(runtime, json!({})).await;
        let config = env.shell("dmesg; uname -r; exec -a marked-by-the-test sleep 600", json!({})).await;
        let task = env.start(config).await;
        task.says("Starting gVisor").await;
        task.says("gvisor\n").await;
        let lines: Vec<String> = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok())
            .filter(|line| line.starts_with("marked-by-the-test"))
            .collect();
        assert!(lines.is_empty(), "{lines:?}");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}
