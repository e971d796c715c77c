//! Servers: a web server without root on port 80, and sshd, which changes users.

use serde_json::json;

use super::{Life, Program, Step, until, writes};

/// Reads the page that the server in the container serves.
const FETCH: &str =
    "python3 -c 'import urllib.request as u; print(u.urlopen(\"http://127.0.0.1/\").read().decode(), end=\"\")'";

pub(super) fn programs() -> Vec<Program> {
    let nginx = json!({
        "Cmd": ["nginx", "-c", "/entry/nginx.conf", "-g", "daemon off;"], "User": "www-data",
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "ExposedPorts": {"80/tcp": {}}, "StopSignal": "SIGQUIT",
    });
    let python = json!({
        "Cmd": ["python3", "-m", "http.server", "80"], "User": "nobody", "WorkingDir": "/entry",
        "Env": ["PATH=/usr/bin:/bin"], "StopSignal": "SIGINT",
    });
    let sshd = json!({"Entrypoint": ["/entry/sshd"], "ExposedPorts": {"2222/tcp": {}}, "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]});
    let ssh = "ssh -p 2222 -i /root/key -o StrictHostKeyChecking=no -o LogLevel=ERROR app@127.0.0.1 ";
    let login: &'static str = Box::leak(format!("{ssh} 'id -un; echo $HOME; umask'").into());
    let terminal: &'static str = Box::leak(format!("{ssh} -tt 'tty' | tr -d '\\r' | cut -d/ -f1-3").into());
    let fetched =
        || vec![until(FETCH), writes(FETCH, "it works\n"), writes("id -un; ps -o user= -p 1", "www-data\nwww-data\n")];
    vec![
        Program::new("nginx as www-data on port 80", nginx.clone(), vec![Life::Service(fetched(), 0)]),
        Program::new("nginx with a read-only root", nginx, vec![Life::Service(fetched(), 0)]).with(
            "--read-only --tmpfs /tmp",
            json!({"readonly_rootfs": true, "mounts": [
                {"type": "tmpfs", "target": "/tmp", "options": ["rw", "nosuid", "nodev", "mode=1777"]},
            ]}),
        ),
        Program::new(
            "python's web server as nobody on port 80",
            python,
            vec![Life::Service(vec![until(FETCH), Step::Contains(vec!["sh", "-c", FETCH], "nginx.conf")], 0)],
        ),
        Program::new(
            "sshd",
            sshd,
            vec![Life::Service(
                vec![until(login), writes(login, "app\n/home/app\n0022\n"), writes(terminal, "/dev/pts\n")],
                0,
            )],
        ),
    ]
}
