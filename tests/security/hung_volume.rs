//! Files on a file system that does not answer: its task is refused or stopped, and all other tasks continue.

use std::{
    fs::{self, File},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nomad_driver_shim::pb::driver::{Mount, StartTaskRequest};
use serde_json::json;

use crate::{
    runtimes,
    support::{Env, Task},
};

/// A FUSE file system without a server. Once this value is dropped, its operations fail with an error.
struct Hung {
    path: PathBuf,
    server: Option<File>,
}

impl Hung {
    fn new(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        let server = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        mount(Some("hung"), &path, Some("fuse"), MsFlags::empty(), Some(options.as_str())).unwrap();
        Self { path, server: Some(server) }
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        drop(self.server.take());
        umount2(&self.path, MntFlags::MNT_DETACH).unwrap();
    }
}

fn with_volume(task: &mut Task, host: &Path) {
    task.config.mounts =
        vec![Mount { host_path: host.to_str().unwrap().to_owned(), task_path: "/v".to_owned(), ..Mount::default() }];
}

async fn goes_on(env: &mut Env, running: &Task) {
    let began = Instant::now();
    env.inspect(&running.id).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "InspectTask took {:?}", began.elapsed());
    let config = env.shell("echo alive", json!({})).await;
    assert_eq!(env.run(config).await.1, "alive\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_volume_holds_up_nobody_else() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let hung = Hung::new(env.dir.join("hung"));
        let config = env.shell("sleep 600", json!({})).await;
        let running = env.start(config).await;
        let mut starts = Vec::new();
        let mut tasks = Vec::new();
        for _ in 0..6 {
            let mut task = env.prepare(env.shell("true", json!({})).await).await;
            with_volume(&mut task, &hung.path.join("sub"));
            let (mut driver, request) = (env.driver(), StartTaskRequest { task: Some(task.config.clone()) });
            starts.push(tokio::spawn(async move { driver.start_task(request).await }));
            tasks.push(task);
        }
        // By now the starts hang, or will hang soon.
        tokio::time::sleep(Duration::from_millis(100)).await;
        goes_on(&mut env, &running).await;
        for (task, start) in tasks.iter().zip(starts) {
            env.stop(task, Duration::from_secs(1), "").await.unwrap();
            let refused = tokio::time::timeout(Duration::from_secs(20), start).await.expect("the start hangs on");
            let refused = refused.unwrap().expect_err("nothing can be mounted");
            assert!(refused.message().contains("was stopped"), "{runtime}: {}", refused.message());
        }
        goes_on(&mut env, &running).await;
        env.destroy(&running).await.unwrap();
        drop(hung);
        env.finish().await;
    }
}

/// A device, a seccomp profile or an image on a dead file system holds up no other task, and its start can be stopped.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_file_holds_up_nobody_else() {
    let security = json!({"allow_paths": ["/"], "allow_devices": ["*"], "allow_seccomp_override": true});
    let mut env = Env::configured(json!({"security": security})).await;
    let hung = Hung::new(env.dir.join("hung"));
    let config = env.shell("sleep 600", json!({})).await;
    let running = env.start(config).await;
    let file = hung.path.join("sub").to_str().unwrap().to_owned();
    for options in
        [json!({"devices": [file]}), json!({"seccomp_profile": file}), json!({"image": format!("oci-archive:{file}")})]
    {
        let mut starts = Vec::new();
        for _ in 0..6 {
            let task = env.prepare(env.shell("true", options.clone()).await).await;
            let (mut driver, request) = (env.driver(), StartTaskRequest { task: Some(task.config.clone()) });
            starts.push((task, tokio::spawn(async move { driver.start_task(request).await })));
        }
        // By now the starts hang, or will hang soon.
        tokio::time::sleep(Duration::from_millis(100)).await;
        goes_on(&mut env, &running).await;
        for (task, start) in starts {
            env.stop(&task, Duration::from_secs(1), "").await.unwrap();
            let refused = tokio::time::timeout(Duration::from_secs(20), start).await.expect("the start hangs on");
            let refused = refused.unwrap().expect_err("the file can't be opened");
            assert!(refused.message().contains("was stopped"), "{options}: {}", refused.message());
        }
    }
    env.destroy(&running).await.unwrap();
    drop(hung);
    env.finish().await;
}
