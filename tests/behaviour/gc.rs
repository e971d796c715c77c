//! The command `gc` without a live plugin: unused objects are removed, live ones stay, and each object has a reason.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use nomad_driver_shim::{ids::random_hex, process::PidFd};
use serde_json::{Value, json};

use crate::{
    support::{Env, EnvOptions, Image, Task, eventually, leak, patience, program, script, services, services::root},
    trials,
};

async fn cli(env: &Env, arguments: &[&str]) -> Output {
    let mut command = Command::new(program());
    command
        .args(arguments)
        .env("NOMAD_DRIVER_SHIM_ADDRESS", &services().containerd)
        .env("NOMAD_DRIVER_SHIM_NAMESPACE", &env.namespace)
        .env("NOMAD_DRIVER_SHIM_RUN_DIR", &env.dir)
        // This state directory is not the plugin's: the plugin has written down its own.
        .env("NOMAD_DRIVER_SHIM_STATE_DIR", env.dir.join("cli-state"))
        .stdin(Stdio::null());
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// One line of `gc`: kind and name of the object, whether it stays, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    kind: String,
    name: String,
    stays: bool,
    why: String,
}

/// The output of `gc` for this environment's driver. No line may report a failure.
async fn gc(env: &Env, arguments: &[&str]) -> Vec<Line> {
    let output = cli(env, &[&["gc", "--json"][..], arguments].concat()).await;
    let said = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said:?}");
    let found: Vec<(String, Value)> = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{said:?}"));
    let own = found.into_iter().filter(|(driver, one)| driver == "run" && one["kind"] != "probe");
    let line = |(_, one): (String, Value)| {
        assert_eq!(one["problem"], Value::Null, "{one}");
        let text = |field: &str| one[field].as_str().unwrap_or_default().to_owned();
        let line = Line { kind: text("kind"), name: text("name"), stays: one["stays"] == true, why: text("why") };
        assert!(!line.why.is_empty(), "{one}");
        line
    };
    own.map(line).collect()
}

/// The line about the object of this name. There is exactly one.
fn of<'a>(lines: &'a [Line], name: &str) -> &'a Line {
    let found: Vec<&Line> = lines.iter().filter(|line| line.name == name).collect();
    let [line] = found[..] else { panic!("{name}: {lines:#?}") };
    line
}

/// Every path below the environment's run and state directories, with the sizes of files.
fn everything(env: &Env) -> Vec<String> {
    fn look(path: &Path, found: &mut Vec<String>) {
        let Ok(meta) = path.symlink_metadata() else { return };
        // A shim may write into its own log at any time, so the size of the log does not count.
        let counts = meta.is_file() && path.file_name().is_none_or(|name| name != "log");
        found.push(format!("{} {}", path.display(), if counts { meta.len() } else { 0 }));
        if meta.is_dir() && path.file_name().is_none_or(|name| name != "rootfs") {
            leak::entries(path).iter().for_each(|name| look(&path.join(name), found));
        }
    }
    let mut found = Vec::new();
    for top in ["run", "state"] {
        look(&env.dir.join(top), &mut found);
    }
    found.sort();
    found
}

async fn pid(env: &Env, task: &Task) -> u32 {
    env.attribute(task, "pid").await.parse().unwrap()
}

async fn shim_of(env: &Env, task: &Task) -> (String, i32) {
    let name = env.record(task).await.1["shim"].as_str().unwrap().to_owned();
    let identity = fs::read(env.dir.join("run/shims").join(&name).join("pid")).unwrap();
    let identity: Value = serde_json::from_slice(&identity).unwrap();
    (name, i32::try_from(identity["pid"].as_i64().unwrap()).unwrap())
}

fn shoot(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

async fn ended(process: &PidFd) {
    tokio::time::timeout(patience(), process.wait_for_end()).await.expect("it lives on");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lives_stays_and_what_has_ended_goes_without_a_plugin() {
    let mut env = Env::new().await;
    let lives = env.sh("echo ready; sleep 600").await;
    lives.says("ready").await;
    let noted = env.sh("exit 3").await;
    env.wait(&noted).await;
    // This task ends while no plugin runs, so that only its shim knows of its end.
    let unseen = env.sh("echo ready; until [ -e /alloc/data/go ]; do sleep 0.05; done; exit 4").await;
    unseen.says("ready").await;
    // No process knows of this task's end, because its shim is killed, too.
    let lost = env.sh("echo ready; sleep 600").await;
    lost.says("ready").await;
    let (life, unseen_ends, lost_ends) = (
        PidFd::open(pid(&env, &lives).await).unwrap(),
        PidFd::open(pid(&env, &unseen).await).unwrap(),
        PidFd::open(pid(&env, &lost).await).unwrap(),
    );
    let lost_shim = shim_of(&env, &lost).await.1;
    eventually("a shim waits for the next task", async || {
        let shims = leak::entries(&env.dir.join("run/shims"));
        let up = shims.iter().filter(|name| env.dir.join("run/shims").join(name).join("pid").exists());
        if up.count() == 5 { Ok(()) } else { Err(shims) }
    })
    .await;
    env.kill_plugin().await;
    fs::write(unseen.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    ended(&unseen_ends).await;
    shoot(lost_shim);
    lost_ends.signal(libc::SIGKILL);
    ended(&lost_ends).await;
    let stray = format!("stray-{}", random_hex(10));
    for place in [env.dir.join("run/bundles"), leaf(&env.dir.join("state/uppers"))] {
        fs::create_dir_all(place.join(&stray).join("x")).unwrap();
    }

    let before = everything(&env);
    let shown = gc(&env, &["--dry-run"]).await;
    assert_eq!(everything(&env), before, "a dry run changes nothing");
    assert!(of(&shown, &lives.id).stays && of(&shown, &lives.id).why.contains("its container lives, process"));
    for task in [&noted, &unseen] {
        let line = of(&shown, &task.id);
        assert!(line.stays && line.why.contains("its agent may come back and ask how"), "{line:?}");
    }
    let goes = |lines: &[Line], name: &str, why: &str| {
        let line = of(lines, name);
        assert!(!line.stays && line.why.contains(why), "{line:?}");
    };
    goes(&shown, &lost.id, "no longer known how it ended");
    goes(&shown, &stray, "no record names it");
    assert!(shown.iter().any(|line| line.kind == "shim" && !line.stays), "the one that waits: {shown:#?}");

    let done = gc(&env, &[]).await;
    let said = |lines: &[Line]| {
        let mut said: Vec<_> = lines.iter().map(|line| (line.name.clone(), line.stays)).collect();
        said.sort();
        said
    };
    assert_eq!(said(&done), said(&shown), "what was shown is done");
    let kept = leak::entries(&env.dir.join("run/tasks"));
    assert_eq!(kept.len(), 3, "{kept:?}");
    assert!(!life.has_ended());
    assert!(!env.dir.join("run/bundles").join(&stray).exists());
    // An operator who wants these tasks removed all the same uses an option.
    let done = gc(&env, &["--keep-ended", "0s"]).await;
    for task in [&noted, &unseen] {
        goes(&done, &task.id, "it ended");
    }
    let kept = leak::entries(&env.dir.join("run/tasks"));
    assert_eq!(kept.len(), 1, "{kept:?}");

    // The task that lives was not disturbed.
    env.start_plugin().await;
    env.recover(&lives).await.unwrap();
    assert!(!life.has_ended());
    assert_eq!(env.exec_text(&lives, "echo alive").await, "alive\n");
    let error = env.recover(&lost).await.unwrap_err();
    assert!(error.message().contains("no record"), "{error:?}");
    env.destroy(&lives).await.unwrap();
    env.finish().await;
}

/// In some cases neither a container's cgroup nor its runtime's state leads to its process, so `gc` asks the shim, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_only_its_shim_knows_stays() {
    let mut env = Env::new().await;
    let task = env.sh("echo ready; sleep 600").await;
    task.says("ready").await;
    let (path, _) = env.record(&task).await;
    let (id, life) = (env.attribute(&task, "container_id").await, PidFd::open(pid(&env, &task).await).unwrap());
    env.kill_plugin().await;
    let states = leaf(&leaf(&env.dir.join("run/runtimes"))).join(&id);
    let known_by = |name: &str| states.join(name);
    let known_by = ["status", "state.json"].map(known_by).into_iter().find(|path| path.exists()).unwrap();
    let hidden = [path, known_by, env.dir.join("run/bundles").join(&id).join("config.json")];
    let aside = |path: &Path| env.dir.join(path.file_name().unwrap());
    hidden.iter().for_each(|path| fs::rename(path, aside(path)).unwrap());
    let done = gc(&env, &[]).await;
    assert!(of(&done, &id).stays && of(&done, &id).why.contains("lives in shim"), "{done:#?}");
    assert!(!life.has_ended());
    hidden.iter().for_each(|path| fs::rename(aside(path), path).unwrap());
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// The path of the only entry in this directory.
fn leaf(path: &Path) -> std::path::PathBuf {
    let entries = leak::entries(path);
    let [only] = &entries[..] else { panic!("{entries:?}") };
    path.join(only)
}

/// Tasks whose start or teardown was in progress when the plugin was killed.
mod what_is_half_done_is_undone_without_a_plugin {
    use super::*;

    async fn check(point: &str, why: &str) {
        let mut env = EnvOptions::default().var("NOMAD_DRIVER_SHIM_KILL_AT", point).start().await;
        let mut task =
            env.prepare(json!({"image": env.busybox().await, "command": "/bin/sleep", "args": ["600"]})).await;
        if env.try_start(&mut task).await.is_ok() {
            let _ = env.destroy(&task).await;
        }
        env.plugin_died().await;
        assert_eq!(leak::entries(&env.dir.join("run/tasks")).len(), 1, "{point}");
        let shown = gc(&env, &["--dry-run"]).await;
        assert!(!of(&shown, &task.id).stays && of(&shown, &task.id).why.contains(why), "{point}: {shown:#?}");
        gc(&env, &[]).await;
        assert_eq!(gc(&env, &[]).await, [], "{point}: nothing is left");
        assert_eq!(leak::of_tasks(&env).await, Vec::<String>::new(), "{point}");
        env.set_var("NOMAD_DRIVER_SHIM_KILL_AT", None);
        env.start_plugin().await;
        env.finish().await;
    }

    trials! { check:
        start => "start.created", "had begun to start it";
        container => "undo.container", "had begun to destroy it";
        upper => "undo.upper", "had begun to destroy it";
    }
}

/// The agent can bring back a container whose record was lost, as long as the container and its shim live.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_lives_without_a_record_stays_with_its_shim() {
    let mut env = Env::new().await;
    let task = env.sh("echo ready; sleep 600").await;
    task.says("ready").await;
    let (path, _) = env.record(&task).await;
    let id = env.attribute(&task, "container_id").await;
    let (shim, life) = (shim_of(&env, &task).await.0, PidFd::open(pid(&env, &task).await).unwrap());
    env.kill_plugin().await;
    for lose in [true, false] {
        if lose {
            fs::remove_file(&path).unwrap();
        } else {
            // A damaged record protects its container, too.
            fs::write(&path, "{ torn").unwrap();
        }
        let done = gc(&env, &[]).await;
        assert!(of(&done, &id).stays && of(&done, &shim).stays, "{done:#?}");
        assert!(!life.has_ended());
    }
    fs::remove_file(&path).unwrap();
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// The command knows the paths of the runtimes from the last plugin, and from its own options if the plugin has not
/// written them down.
#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_of_the_operators_is_found_without_a_plugin() {
    let dir = root().join(random_hex(4));
    fs::create_dir_all(&dir).unwrap();
    let (runtime, calls) = (dir.join("crun-of-ours"), dir.join("calls"));
    let crun = nomad_driver_shim::process::which(Path::new("crun")).unwrap();
    script(&runtime, &format!("echo \"$@\" >> {}; exec {} \"$@\"", calls.display(), crun.display()));
    let mut env = Env::configured(json!({"runtime": {"special": {"binary": runtime}}})).await;
    let image = env.busybox().await;
    let task = env
        .start(json!({"image": image, "runtime": "special", "command": "/bin/sh", "args": ["-c", "echo ready; sleep 600"]}))
        .await;
    task.says("ready").await;
    let (shim, life) = (shim_of(&env, &task).await.1, PidFd::open(pid(&env, &task).await).unwrap());
    eventually("a shim waits for the next task", async || {
        let shims = leak::entries(&env.dir.join("run/shims"));
        if shims.len() == 2 { Ok(()) } else { Err(shims) }
    })
    .await;
    env.kill_plugin().await;
    shoot(shim);
    // The container stays as long as its process lives, although no shim watches it.
    assert!(of(&gc(&env, &[]).await, &task.id).stays && !life.has_ended());
    life.signal(libc::SIGKILL);
    ended(&life).await;
    fs::write(&calls, "").unwrap();
    assert!(!of(&gc(&env, &[]).await, &task.id).stays);
    let called = fs::read_to_string(&calls).unwrap();
    assert!(called.contains(" delete "), "{called}");
    assert_eq!(leak::of_tasks(&env).await, Vec::<String>::new());
    // The run directory of an earlier version has no settings file.
    fs::remove_file(env.dir.join("run/settings.json")).unwrap();
    assert_eq!(gc(&env, &["--dry-run"]).await, []);
    env.start_plugin().await;
    env.finish().await;
}

/// The removal of a task must not end the shim that it shares with a task that lives.
#[tokio::test(flavor = "multi_thread")]
async fn a_shared_shim_outlives_a_task_that_goes() {
    let mut env = Env::configured(json!({"shim_scope": "node"})).await;
    let lives = env.sh("echo ready; sleep 600").await;
    lives.says("ready").await;
    let over = env.sh("exit 3").await;
    env.wait(&over).await;
    assert_eq!(shim_of(&env, &lives).await, shim_of(&env, &over).await);
    let (shim, life) = (
        PidFd::open(shim_of(&env, &lives).await.1.cast_unsigned()).unwrap(),
        PidFd::open(pid(&env, &lives).await).unwrap(),
    );
    env.kill_plugin().await;
    let done = gc(&env, &["--keep-ended", "0s"]).await;
    assert!(of(&done, &lives.id).stays && !of(&done, &over.id).stays, "{done:#?}");
    assert_eq!(leak::entries(&env.dir.join("run/tasks")).len(), 1);
    assert!(!shim.has_ended() && !life.has_ended());
    env.start_plugin().await;
    env.recover(&lives).await.unwrap();
    assert_eq!(env.exec_text(&lives, "echo alive").await, "alive\n");
    env.destroy(&lives).await.unwrap();
    env.finish().await;
}

/// A plugin that has the lock and can't be asked is left alone, and so are all of its objects.
#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_can_not_be_asked_keeps_its_things() {
    let mut env = Env::new().await;
    let task = env.sh("exit 3").await;
    env.wait(&task).await;
    env.kill_plugin().await;
    let lock = fs::File::options().append(true).open(env.dir.join("run/lock")).unwrap();
    let held = Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
    let before = everything(&env);
    let done = gc(&env, &["--keep-ended", "0s"]).await;
    assert!(done.len() == 1 && done[0].stays && done[0].why.contains("holds the driver's lock"), "{done:#?}");
    assert_eq!(everything(&env), before);
    drop(held);
    assert!(!of(&gc(&env, &["--keep-ended", "0s"]).await, &task.id).stays);
    env.start_plugin().await;
    env.finish().await;
}

/// A live plugin collects the garbage itself, and gives reasons, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_live_plugin_gives_reasons() {
    let mut env = Env::configured(json!({"state": {"grace": "1s"}, "image": {"keep": "0s"}})).await;
    let task = env.sh("echo ready; sleep 600").await;
    task.says("ready").await;
    assert_eq!(gc(&env, &["--dry-run"]).await, [], "its agent has it, and it has its image");
    env.kill_plugin().await;
    env.start_plugin().await;
    eventually("nobody asks for it", async || {
        let lines = gc(&env, &["--dry-run"]).await;
        let stays = lines.iter().any(|line| line.name == task.id && line.stays && line.why.contains("state.orphans"));
        if stays { Ok(()) } else { Err(lines) }
    })
    .await;
    // A dry run and a real run give the same reasons.
    for arguments in [&["gc", "--dry-run"][..], &["gc"]] {
        let table = cli(&env, arguments).await;
        let table = String::from_utf8(table.stdout).unwrap();
        assert!(table.lines().next().unwrap().trim_end().ends_with("WHY") && table.contains("kept"), "{table}");
    }
    env.recover(&task).await.unwrap();
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// A `run` that was killed together with its plugin leaves a run directory of its own, which otherwise only that `run`
/// would remove.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_without_its_plugin_is_shown_and_cleared() {
    let id = random_hex(4);
    let (dir, image) = (root().join(&id), Image::busybox().push(&services().registry, "test/busybox:1").await);
    let command = |arguments: &[&str]| {
        let mut command = Command::new(program());
        command
            .args(arguments)
            .env("NOMAD_DRIVER_SHIM_ADDRESS", &services().containerd)
            .env("NOMAD_DRIVER_SHIM_NAMESPACE", format!("gc-{id}"))
            .env("NOMAD_DRIVER_SHIM_RUN_DIR", dir.join("run"))
            .env("NOMAD_DRIVER_SHIM_STATE_DIR", dir.join("state"))
            .stdin(Stdio::null());
        command
    };
    let lines = async |arguments: &[&str]| {
        let mut gc = command(arguments);
        let output = tokio::task::spawn_blocking(move || gc.output().unwrap()).await.unwrap();
        let said = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{said:?}");
        let found: Vec<(String, Value)> = serde_json::from_slice(&output.stdout).unwrap();
        found.into_iter().filter(|(_, one)| one["kind"] == "run").map(|(_, one)| one).collect::<Vec<_>>()
    };
    let mut run = command(&["run", &image, "sh", "-c", "echo $$; echo ready; sleep 600"]);
    let mut run = run.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut stdout = std::io::BufReader::new(run.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("ready") {
        std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
    }
    assert_eq!(lines(&["gc", "--json", "--dry-run"]).await, Vec::<Value>::new(), "it is at work");
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", run.id())).unwrap();
    let is_plugin =
        |pid: &&str| fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("--name"));
    let plugin: i32 = children.split_whitespace().find(is_plugin).unwrap().parse().unwrap();
    run.kill().unwrap();
    run.wait().unwrap();
    let process = PidFd::open(plugin.cast_unsigned()).unwrap();
    process.signal(libc::SIGKILL);
    // Until the plugin has ended, it has the lock of its directory, and may have its socket.
    ended(&process).await;
    let shown = lines(&["gc", "--json", "--dry-run"]).await;
    assert!(shown.len() == 1 && shown[0]["why"] == "the command that it belongs to has ended", "{shown:?}");
    let runs = leak::entries(&dir.join("run"));
    assert_eq!(runs.len(), 1, "a dry run changes nothing: {runs:?}");
    assert_eq!(lines(&["gc", "--json"]).await.len(), 1);
    assert_eq!(leak::entries(&dir.join("run")), Vec::<String>::new());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.to_str().unwrap()), "its container is gone");
}
