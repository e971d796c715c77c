//! Mounts that a task makes for other tasks, as Nomad's CSI node plugins do: the agent mounts a directory of the host
//! into the privileged plugin with `bidirectional` propagation, and gives the volumes below it to other tasks.

use std::{fs, path::Path};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nomad_driver_shim::pb::driver::Mount;
use serde_json::json;

use crate::support::{Env, Task, eventually};

/// A shared mount in which the node plugin mounts volumes: on most hosts, systemd makes all mounts shared.
struct Staging(std::path::PathBuf);

impl Staging {
    fn new(path: std::path::PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        mount(None::<&str>, &path, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        Self(path)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("could not unmount {}: {error}", self.0.display());
        }
    }
}

/// Starts a task that waits, with a directory of the host in it, as the agent asks for it.
async fn task_with(env: &mut Env, runtime: &str, host: &Path, target: &str, propagation: &str) -> Task {
    let options = json!({"runtime": runtime, "privileged": propagation == "bidirectional"});
    let config = env.shell("exec sleep 600", options).await;
    let mut task = env.prepare(config).await;
    task.config.mounts.push(Mount {
        host_path: host.to_str().unwrap().to_owned(),
        task_path: target.to_owned(),
        propagation_mode: propagation.to_owned(),
        ..Mount::default()
    });
    env.try_start(&mut task).await.unwrap();
    task
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_plugin_mounts_volumes_for_other_tasks() {
    const STAGE: &str = "mkdir -p /csi/vol && mount -t tmpfs none /csi/vol && echo staged > /csi/vol/file; echo $?";
    let mut env = Env::configured(json!({"allow_privileged": true})).await;
    for runtime in ["crun", "runc"] {
        let staging = Staging::new(env.dir.join("csi"));
        let file = staging.0.join("vol/file");
        let plugin = task_with(&mut env, runtime, &staging.0, "/csi", "bidirectional").await;
        let follower = task_with(&mut env, runtime, &staging.0, "/all", "host-to-task").await;
        assert_eq!(env.exec_text(&plugin, STAGE).await, "0\n", "{runtime}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "staged\n", "{runtime}: the host sees the volume");
        assert_eq!(env.exec_text(&follower, "cat /all/vol/file").await, "staged\n", "{runtime}");
        let user = task_with(&mut env, runtime, &staging.0.join("vol"), "/data", "private").await;
        let write = "cat /data/file && echo written >> /data/file";
        assert_eq!(env.exec_text(&user, write).await, "staged\n", "{runtime}");
        assert_eq!(env.exec_text(&plugin, "cat /csi/vol/file").await, "staged\nwritten\n", "{runtime}");

        // The node plugin unmounts the volume. It goes everywhere, except from the task that has a mount of its own.
        assert_eq!(env.exec_text(&plugin, "umount /csi/vol; echo $?").await, "0\n", "{runtime}");
        assert!(!file.exists(), "{runtime}: the host sees that the volume is unmounted");
        assert_eq!(env.exec_text(&follower, "ls -A /all/vol").await, "", "{runtime}");
        assert_eq!(env.exec_text(&user, "tail -n 1 /data/file").await, "written\n", "{runtime}");
        env.destroy(&user).await.unwrap();

        // The node plugin ends, for example for an upgrade. Its volumes stay for the tasks that use them.
        assert_eq!(env.exec_text(&plugin, STAGE).await, "0\n", "{runtime}");
        env.destroy(&plugin).await.unwrap();
        let gone = async || match crate::support::leak::entries(&env.dir.join("run/bundles")).len() {
            1 => Ok(()),
            bundles => Err(bundles),
        };
        eventually("the node plugin's task is removed", gone).await;
        assert_eq!(fs::read_to_string(&file).unwrap(), "staged\n", "{runtime}: the volume stays");
        assert_eq!(env.exec_text(&follower, "cat /all/vol/file").await, "staged\n", "{runtime}");
        let next = task_with(&mut env, runtime, &staging.0, "/csi", "bidirectional").await;
        assert_eq!(env.exec_text(&next, "umount /csi/vol; echo $?").await, "0\n", "{runtime}");
        assert!(!file.exists(), "{runtime}: the next node plugin unmounts what the one before has mounted");
        env.destroy(&next).await.unwrap();
        env.destroy(&follower).await.unwrap();
    }
    env.finish().await;
}
