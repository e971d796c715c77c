//! Mounts of a task do not appear on the host, where a task's directory lies on a shared file system. systemd makes all
//! file systems shared (systemd/systemd, `mount_setup`); here a tmpfs of the test is shared.

use std::{fs, path::PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nomad_driver_shim::pb::driver::Mount;
use serde_json::{Value, json};

use crate::{
    decoy::mounts_below,
    runtimes,
    support::{Env, Task},
};

/// A plugin whose allocations lie on a shared file system, as on a usual host.
struct Shared {
    env: Env,
    allocs: PathBuf,
}

impl Shared {
    async fn new(runtime: &str) -> Self {
        let env = Env::with_runtime(runtime, json!({"allow_privileged": true})).await;
        let allocs = env.dir.join("allocs");
        fs::create_dir_all(&allocs).unwrap();
        mount(Some("tmpfs"), &allocs, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        mount(None::<&str>, &allocs, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        Self { env, allocs }
    }

    /// Prepares a task with these options that only waits.
    async fn prepare(&mut self, options: Value) -> Task {
        let config = self.env.shell("echo mounted; exec sleep 600", options).await;
        self.env.prepare(config).await
    }

    /// The mounts that a task makes on the host while it runs and those that it leaves there, which are then removed.
    async fn seen(&mut self, mut task: Task) -> Vec<String> {
        let alloc = task.dirs.alloc_dir.clone();
        self.env.try_start(&mut task).await.unwrap();
        task.says("mounted").await;
        let mut seen = mounts_below(&alloc);
        self.env.destroy(&task).await.unwrap();
        let left = mounts_below(&alloc);
        seen.extend(left.iter().map(|line| format!("left: {line}")));
        for line in left.iter().rev() {
            umount2(line.split(' ').nth(5).unwrap(), MntFlags::MNT_DETACH).unwrap();
        }
        seen
    }

    async fn finish(self) {
        umount2(&self.allocs, MntFlags::MNT_DETACH).unwrap();
        self.env.finish().await;
    }
}

/// A bind of one of the task's own directories, and a mount below it.
fn mounts(propagation: &str) -> Value {
    json!([
        {"type": "bind", "source": "alloc/data", "target": "/m", "options": ["rbind", "rw", propagation]},
        {"type": "tmpfs", "target": "/m/below", "options": ["size=1m"]},
    ])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_propagation_brings_no_mount_to_the_host() {
    for runtime in runtimes() {
        let mut shared = Shared::new(&runtime).await;
        for propagation in ["shared", "rshared", "slave", "rslave", "private", "rprivate"] {
            let task = shared.prepare(json!({"mounts": mounts(propagation)})).await;
            assert_eq!(shared.seen(task).await, Vec::<String>::new(), "{runtime}, {propagation}");
        }
        // A privileged task may share a mount, and would leave the mounts below it on the host: that is refused.
        let mut task = shared.prepare(json!({"mounts": mounts("rshared"), "privileged": true})).await;
        let refused = shared.env.try_start(&mut task).await.expect_err("a mount that the host would keep");
        assert!(refused.message().contains("/m/below"), "{runtime}: {}", refused.message());
        // Control test: a mount that such a task makes itself is seen on the host, and stays.
        let share =
            json!([{"type": "bind", "source": "alloc/data", "target": "/m", "options": ["rbind", "rw", "rshared"]}]);
        let script = "mkdir /m/below && mount -t tmpfs tmpfs /m/below && echo mounted; exec sleep 600";
        let options = json!({"mounts": share, "privileged": true});
        let config = shared.env.shell(script, options).await;
        let task = shared.env.prepare(config).await;
        let seen = shared.seen(task).await;
        assert!(seen.iter().any(|line| line.starts_with("left: ") && line.contains("/below ")), "{runtime}: {seen:?}");
        shared.finish().await;
    }
}

/// `volume_mount { propagation_mode = "bidirectional" }` with each kind of mount that can lie below such a volume: the
/// job's own, one of the directories that every task has, and the files of `/etc`.
#[tokio::test(flavor = "multi_thread")]
async fn a_bidirectional_volume_brings_no_mount_to_the_host() {
    for runtime in runtimes() {
        let mut shared = Shared::new(&runtime).await;
        for (target, variable, options) in [
            ("/v", None, json!({"mounts": [{"type": "tmpfs", "target": "/v/below"}]})),
            ("/v", None, json!({"mounts": [{"type": "bind", "source": "local", "target": "/v/below"}]})),
            ("/v", Some("NOMAD_TASK_DIR"), json!({})),
            ("/v", Some("NOMAD_SECRETS_DIR"), json!({})),
            ("/etc", None, json!({})),
        ] {
            let shown = format!("{runtime}, {target}, {variable:?}, {options}");
            let mut task = shared.prepare(options).await;
            let host_path = task.dirs.alloc_dir.join("volume");
            fs::create_dir_all(&host_path).unwrap();
            if let Some(variable) = variable {
                task.config.env.insert(variable.to_owned(), format!("{target}/below"));
            }
            task.config.mounts.push(Mount {
                host_path: host_path.display().to_string(),
                task_path: target.to_owned(),
                propagation_mode: "bidirectional".to_owned(),
                ..Mount::default()
            });
            assert_eq!(shared.seen(task).await, Vec::<String>::new(), "{shown}");
        }
        shared.finish().await;
    }
}
