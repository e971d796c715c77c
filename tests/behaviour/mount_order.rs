//! The order of a task's mounts: parents first, whatever asks for them; and what happens to two with one target.

use std::{fs, path::Path};

use nomad_driver_shim::pb::driver::Mount;
use serde_json::{Value, json};

use crate::support::{Entry, Env, EnvOptions, Image, Layer, Packing, Task, services};

const RUNTIMES: [&str; 2] = ["crun", "runc"];

async fn env() -> Env {
    Env::configured(json!({"security": {"allow_paths": ["/"]}})).await
}

fn volume(host: &Path, target: &str) -> Mount {
    Mount {
        host_path: host.to_str().unwrap().to_owned(),
        task_path: target.to_owned(),
        propagation_mode: "private".to_owned(),
        ..Mount::default()
    }
}

/// Makes a directory on the host with a file of that name.
fn directory(env: &Env, name: &str) -> std::path::PathBuf {
    let path = env.dir.join("host").join(name);
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join(name), format!("{name}\n")).unwrap();
    path
}

async fn started(env: &Env, mut task: Task) -> Result<String, String> {
    match env.try_start(&mut task).await {
        Ok(()) => {
            let (code, out, err) = env.finish_task(task).await;
            assert_eq!(code, 0, "{out}{err}");
            Ok(out)
        }
        Err(status) => Err(status.message().to_owned()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_is_mounted_before_what_lies_in_it() {
    let mut env = env().await;
    let [outer, inner] = ["outer", "inner"].map(|name| directory(&env, name));
    let file = inner.join("inner");
    let bind = |source: &Path, target: &str| json!({"type": "bind", "source": source, "target": target});
    for runtime in RUNTIMES {
        // Each child is listed before its parent.
        let mounts = json!([
            bind(&file, "/srv/d/c"),
            bind(&outer, "/srv/d"),
            {"type": "tmpfs", "target": "/srv/e/f/g"},
            {"type": "tmpfs", "target": "/srv/e"},
            bind(&inner, "/srv/e/f"),
        ]);
        let script = "cat /srv/d/c /srv/d/outer /srv/e/f/inner && touch /srv/e/x /srv/e/f/g/x && \
            awk '$2 ~ \"^/srv/e\" { print $2, $3 }' /proc/mounts | grep -c tmpfs; ls /srv/e";
        let task = env.prepare(env.shell(script, json!({"mounts": mounts, "runtime": runtime})).await).await;
        assert_eq!(started(&env, task).await.unwrap(), "inner\nouter\ninner\n2\nf\nx\n", "{runtime}");
        // Mount points in a source stay, as with docker.
        fs::remove_file(outer.join("c")).unwrap();
        fs::remove_dir(inner.join("g")).unwrap();
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nomads_directories_and_volumes_hold_mounts() {
    let mut env = env().await;
    let host = directory(&env, "host");
    for runtime in RUNTIMES {
        // The job's blocks come before Nomad's directories in the task's list of mounts, and its volumes after them.
        let mounts = json!([
            {"type": "tmpfs", "target": "/local/cache"},
            {"type": "tmpfs", "target": "/alloc/data/cache"},
            {"type": "bind", "source": host, "target": "/secrets/not/there"},
            {"type": "bind", "source": "local/rendered", "target": "/v/conf/app", "options": ["ro"]},
            {"type": "bind", "source": host, "target": "/etc/app"},
        ]);
        let script = "touch /local/cache/x /alloc/data/cache/x && cat /secrets/not/there/host /v/conf/app /etc/app/host \
            /v/volume && grep -c localhost /etc/hosts";
        let volume_dir = directory(&env, "volume");
        let mut task = env.prepare(env.shell(script, json!({"mounts": mounts, "runtime": runtime})).await).await;
        fs::write(task.dirs.alloc_dir.join("web/local/rendered"), "template\n").unwrap();
        task.config.mounts = vec![volume(&volume_dir, "/v")];
        assert_eq!(started(&env, task).await.unwrap(), "host\ntemplate\nhost\nvolume\n2\n", "{runtime}");
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_mounts_with_one_target_are_refused_by_name() {
    let mut env = env().await;
    let host = directory(&env, "host");
    let bind = |target: &str| json!([{"type": "bind", "source": host, "target": target}]);
    for (target, of_nomad, parts) in [
        ("/v/", vec![volume(&host, "/v")], ["volume_mount of", "mounts[0] has the same target"]),
        ("/a", vec![volume(&host, "/v"), volume(&host, "v")], ["volume_mount of", "has the same target"]),
        ("/secrets", vec![], ["NOMAD_SECRETS_DIR", "mounts[0] has the same target"]),
        ("/var/run/x", vec![volume(&host, "/run/x")], ["mounts[0] has the same target", "links, /var/run/x"]),
    ] {
        let mut task = env.prepare(env.shell("true", json!({"mounts": bind(target)})).await).await;
        if target.starts_with("/var/run") {
            let link = Entry::symlink("var/run", "/run");
            let layer = Layer::new(&[Entry::dir("var"), link], Packing::None);
            let image = Image::busybox().with_layer(layer).push(&services().registry, "test/var-run:1").await;
            let config = json!({"image": image, "command": "/bin/true", "mounts": bind(target)});
            task = env.prepare(config).await;
        }
        task.config.mounts = of_nomad;
        let error = started(&env, task).await.expect_err(target);
        assert!(parts.iter().all(|part| error.contains(part)), "{target}: {error}");
    }
    env.finish().await;
}

/// As with docker, what the job mounts over a network file takes that file's place.
#[tokio::test(flavor = "multi_thread")]
async fn the_jobs_own_network_files_win() {
    let mut env = env().await;
    let host = directory(&env, "of-the-job");
    let script = "cat /etc/hosts /etc/hostname /etc/resolv.conf";
    let mounts: Vec<Value> = ["hosts", "hostname", "resolv.conf"]
        .map(|name| json!({"type": "bind", "source": host.join("of-the-job"), "target": format!("/etc/{name}")}))
        .to_vec();
    for runtime in RUNTIMES {
        let task = env.prepare(env.shell(script, json!({"mounts": mounts, "runtime": runtime})).await).await;
        assert_eq!(started(&env, task).await.unwrap(), "of-the-job\n".repeat(3), "{runtime}");
    }
    env.finish().await;
}

/// Under the name of nomad-driver-containerd, the last of several mounts with one target is visible, and the driver's
/// own come last.
#[tokio::test(flavor = "multi_thread")]
async fn the_old_name_keeps_the_old_order() {
    let mut env = Env::with(EnvOptions { name: "containerd-driver", ..EnvOptions::default() }).await;
    let [first, second] = ["first", "second"].map(|name| directory(&env, name));
    let bind = |source: &Path, target: &str| json!({"type": "bind", "source": source, "target": target, "options": ["rbind", "rw"]});
    let mounts = json!([
        bind(&first, "/m"),
        bind(&second, "/m"),
        bind(&first, "/secrets"),
        bind(&first.join("first"), "/etc/hosts"),
        bind(&second, "/local/inner"),
    ]);
    let script = "ls /m /local/inner; ls /secrets | wc -l; grep -c localhost /etc/hosts";
    let task = env.prepare(env.shell(script, json!({"mounts": mounts})).await).await;
    assert_eq!(started(&env, task).await.unwrap(), "/local/inner:\nsecond\n\n/m:\nsecond\n0\n2\n");
    env.finish().await;
}
