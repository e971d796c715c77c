//! Programs that are systems of their own: systemd, dockerd in a privileged container, and set-user-id programs.

use serde_json::json;

use super::{Life, Program, until, writes};

const INNER: &str = "docker -H unix:///run/inner.sock";

/// Runs a unit.
const UNIT: &str = "printf '[Service]\\nType=oneshot\\nExecStart=sh -c \"echo ran > /tmp/ran\"\\n' > /run/systemd/system/job.service && \
    systemctl daemon-reload && systemctl start job && cat /tmp/ran";

pub(super) fn programs() -> Vec<Program> {
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let systemd = json!({
        "Cmd": ["/lib/systemd/systemd"], "Env": [path, "container=docker"], "StopSignal": "SIGRTMIN+3",
    });
    let dockerd = json!({
        "Cmd": ["dockerd", "--host", "unix:///run/inner.sock", "--bridge", "none", "--iptables=false"],
        "Env": [path], "Volumes": {"/var/lib/docker": {}},
    });
    let sudo = json!({
        "Cmd": ["sh", "-c",
            "useradd app && echo 'app ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/app && \
             exec setpriv --reuid=app --regid=app --init-groups sh -c 'sudo -n id -un; sudo -n -u nobody id -un; grep NoNewPrivs /proc/self/status'"],
        "Env": [path],
    });
    let inner = |command: &str| -> &'static str { Box::leak(format!("{INNER} {command}").into()) };
    let import: &'static str = Box::leak(
        format!(
            "tar -C /entry -c busybox | {INNER} import - bb > /dev/null && {INNER} image inspect -f '{{{{.Os}}}}' bb"
        )
        .into(),
    );
    vec![
        Program::new(
            "systemd in a privileged container",
            systemd,
            vec![Life::Service(
                vec![
                    until("systemctl is-system-running | grep -qE 'running|degraded'"),
                    writes("systemctl is-active systemd-journald", "active\n"),
                    writes(UNIT, "ran\n"),
                ],
                130,
            )],
        )
        .with(
            "--privileged --runtime bounded --tmpfs /run --tmpfs /run/lock",
            json!({"privileged": true, "mounts": [
                {"type": "tmpfs", "target": "/run", "options": ["rw", "nosuid", "nodev"]},
                {"type": "tmpfs", "target": "/run/lock", "options": ["rw", "nosuid", "nodev"]},
            ]}),
        ),
        Program::new(
            "dockerd in a privileged container",
            dockerd,
            vec![Life::Service(
                vec![
                    until(inner("version > /dev/null")),
                    // The VOLUME is no overlay, so that dockerd can make its own overlays there.
                    writes(inner("info -f '{{.Driver}}'"), "overlay2\n"),
                    writes(import, "linux\n"),
                    writes(inner("run --rm --network none bb /busybox echo from inside"), "from inside\n"),
                    writes(inner("run --rm --network none --memory 32m bb /busybox id -u"), "0\n"),
                ],
                0,
            )],
        )
        .with("--privileged --runtime bounded", json!({"privileged": true})),
        Program::new("sudo", sudo, vec![Life::Once(vec!["root\nnobody\nNoNewPrivs:\t0\n"])])
            .with("", json!({"security_opt": ["no-new-privileges=false"]})),
    ]
}
