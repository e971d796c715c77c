//! The commands that show and control the tasks of a live or a dead plugin.

use std::{
    fs,
    process::{Command, Output, Stdio},
    time::Duration,
};

use nomad_driver_shim::{ids::random_hex, places::Places};
use serde_json::{Value, json};

use crate::support::{Env, Task, eventually, leak, program, services};

/// A command on the environment's plugin; the plugin's driver name is the name of its run directory.
fn command(env: &Env, arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command
        .args(arguments)
        .env("NOMAD_DRIVER_SHIM_ADDRESS", &services().containerd)
        .env("NOMAD_DRIVER_SHIM_NAMESPACE", &env.namespace)
        .env("NOMAD_DRIVER_SHIM_RUN_DIR", &env.dir)
        .env("NOMAD_DRIVER_SHIM_STATE_DIR", env.dir.join("cli-state"))
        .stdin(Stdio::null());
    command
}

async fn cli(env: &Env, arguments: &[&str]) -> Output {
    let mut command = command(env, arguments);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

async fn told(env: &Env, arguments: &[&str]) -> String {
    let output = cli(env, arguments).await;
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

async fn refused(env: &Env, arguments: &[&str]) -> (i32, String) {
    let output = cli(env, arguments).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.trim().lines().count() == 1, "{arguments:?}: {said}");
    (output.status.code().unwrap(), said)
}

async fn tasks(env: &mut Env) -> (Task, String) {
    let task = env.sh("trap 'exit 12' USR1; echo up; while :; do sleep 0.05; done").await;
    task.says("up").await;
    let id = env.attribute(&task, "container_id").await;
    (task, id)
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_are_shown_and_acted_on_with_and_without_a_plugin() {
    let mut env = Env::new().await;
    let (task, id) = tasks(&mut env).await;
    for round in ["with a plugin", "without"] {
        let list: Value = serde_json::from_str(&told(&env, &["ps", "--json"]).await).unwrap();
        assert_eq!((list[0]["driver"].as_str(), list[0]["state"].as_str()), (Some("run"), Some("running")), "{round}");
        let all: Value = serde_json::from_str(&told(&env, &["inspect", &id]).await).unwrap();
        assert_eq!(all["record"]["container_id"], json!(id));
        assert_eq!(all["spec"]["process"]["args"][0], json!("/bin/sh"));
        assert!(!all.to_string().contains("FROM_IMAGE=yes"), "values may be secrets");
        assert!(told(&env, &["inspect", "--env", &id]).await.contains("FROM_IMAGE=yes"));
        let output = cli(&env, &["exec", &id, "sh", "-c", "echo $FROM_IMAGE; echo err >&2; exit 3"]).await;
        assert_eq!(
            (output.status.code(), &output.stdout[..], &output.stderr[..]),
            (Some(3), &b"yes\n"[..], &b"err\n"[..])
        );
        let terminal = cli(&env, &["exec", "-t", &id, "sh", "-c", "tty; stty size"]).await;
        assert!(String::from_utf8_lossy(&terminal.stdout).starts_with("/dev/pts/"), "{terminal:?}");
        assert_eq!(refused(&env, &["exec", &id, "/no/such"]).await.0, 127);
        let usage: Value = serde_json::from_str(&told(&env, &["stats", "--json", &id]).await).unwrap();
        assert!(usage[0]["memory"].as_u64().unwrap() > 0, "{usage}");
        assert!(told(&env, &["stats"]).await.lines().count() == 2);
        if round == "with a plugin" {
            env.kill_plugin().await;
        }
    }
    // Without a plugin, the command sends the signal through the shim; the next plugin finds out that the task has
    // ended.
    told(&env, &["kill", "--signal", "USR1", &id]).await;
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 12);
    env.destroy(&task).await.unwrap();
    // With a plugin, the command sends the signal through the plugin.
    let (task, id) = tasks(&mut env).await;
    told(&env, &["kill", &id]).await;
    assert_eq!(env.wait(&task).await.exit_code, 137);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// The process may have ended before its terminal gets a size. `script` gives the command a terminal.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_ends_at_once_needs_no_terminal_size() {
    let mut env = Env::new().await;
    let (task, id) = tasks(&mut env).await;
    for _ in 0..10 {
        let exec = command(&env, &["exec", "-t", &id, "true"]);
        let line = std::iter::once(exec.get_program()).chain(exec.get_args()).map(|word| word.to_str().unwrap());
        let line = line.collect::<Vec<_>>().join(" ");
        let mut script = Command::new("script");
        script.args(["-qec", &format!("stty rows 20 cols 70; {line}"), "/dev/null"]).stdin(Stdio::null());
        script.envs(exec.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let output = tokio::task::spawn_blocking(move || script.output().unwrap()).await.unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert_eq!((output.status.code(), String::from_utf8_lossy(&said).as_ref()), (Some(0), ""));
    }
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn input_goes_to_what_is_execd() {
    use std::io::Write as _;
    let mut env = Env::new().await;
    let (task, id) = tasks(&mut env).await;
    let mut command = command(&env, &["exec", "-i", &id, "cat"]);
    let output = tokio::task::spawn_blocking(move || {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let typist = std::thread::spawn(move || stdin.write_all(&b"0123456789".repeat(100_000)).unwrap());
        let output = child.wait_with_output().unwrap();
        typist.join().unwrap();
        output
    });
    let output = output.await.unwrap();
    assert!(output.status.success());
    assert!(output.stdout == b"0123456789".repeat(100_000), "{} bytes", output.stdout.len());
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// The reader of the output closes it, or the command is interrupted: the exec'd process ends, and the task goes on.
#[tokio::test(flavor = "multi_thread")]
async fn an_exec_that_nobody_wants_any_more_ends() {
    let mut env = Env::new().await;
    let (task, id) = tasks(&mut env).await;
    let markers = env.dir.join("run/bundles").join(&id).join("execs");
    for end in ["the reader leaves", "an interrupt"] {
        let mut child =
            command(&env, &["exec", &id, "yes"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        assert_eq!(line, "y\n");
        if end == "an interrupt" {
            let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        }
        drop(out);
        let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
        assert!(!status.success(), "{end}");
        assert_eq!(leak::entries(&markers), Vec::<String>::new(), "{end}");
        assert!(!env.exec_text(&task, "ps -o args").await.contains("yes"), "{end}");
    }
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// A plugin that dies and is started again ends the processes that its own clients have exec'd, but not those of other
/// clients.
#[tokio::test(flavor = "multi_thread")]
async fn an_exec_of_the_command_line_outlives_the_plugin() {
    let mut env = Env::new().await;
    let (task, id) = tasks(&mut env).await;
    let mut child =
        command(&env, &["exec", "-i", &id, "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut echo = |text: &str| {
        let mut line = String::new();
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), text.as_bytes()).unwrap();
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        assert_eq!(line, text);
    };
    echo("before\n");
    env.kill_plugin().await;
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    echo("after\n");
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_named_clearly_or_not_at_all() {
    let mut env = Env::new().await;
    let (first, _) = tasks(&mut env).await;
    let (second, _) = tasks(&mut env).await;
    let (code, said) = refused(&env, &["inspect", "web"]).await;
    assert!(code == 125 && said.contains("means 2 tasks"), "{said}");
    assert!(refused(&env, &["inspect", "nobody"]).await.1.contains("no task \"nobody\""));
    told(&env, &["inspect", &first.dirs.alloc_id]).await;
    assert!(refused(&env, &["kill", "--signal", "NONSENSE", &first.dirs.alloc_id]).await.1.contains("NONSENSE"));
    for task in [&first, &second] {
        env.destroy(task).await.unwrap();
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_read_where_nomad_keeps_them() {
    let mut env = Env::new().await;
    let (task, id) = tasks(&mut env).await;
    assert!(refused(&env, &["logs", &id]).await.1.contains("no logs of the task"));
    let logs = task.dirs.alloc_dir.join("alloc/logs");
    fs::write(logs.join("web.stdout.0"), "a\nb\n").unwrap();
    fs::write(logs.join("web.stdout.10"), "d\n").unwrap();
    fs::write(logs.join("web.stdout.9"), "c\n").unwrap();
    fs::write(logs.join("web.stderr.0"), "e\n").unwrap();
    assert_eq!(told(&env, &["logs", &id]).await, "a\nb\nc\nd\n");
    assert_eq!(told(&env, &["logs", "--tail", "2", &id]).await, "c\nd\n");
    assert_eq!(told(&env, &["logs", "--stderr", &id]).await, "e\n");
    let mut following = command(&env, &["logs", "-f", "--tail", "1", &id]).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = std::io::BufReader::new(following.stdout.take().unwrap());
    let mut line = || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        line
    };
    assert_eq!(line(), "d\n");
    fs::write(logs.join("web.stdout.10"), "d\nf\n").unwrap();
    assert_eq!(line(), "f\n");
    fs::write(logs.join("web.stdout.11"), "g\n").unwrap();
    assert_eq!(line(), "g\n", "over the rotation");
    following.kill().unwrap();
    following.wait().unwrap();
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_told_as_they_happen() {
    let mut env = Env::new().await;
    let mut listening =
        command(&env, &["events", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = std::io::BufReader::new(listening.stdout.take().unwrap());
    let mut said = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(listening.stderr.as_mut().unwrap()), &mut said).unwrap();
    assert!(said.contains("listening to 1"), "{said}");
    // The request for events is on its way to the plugin; a pull takes far longer than that.
    let task = env.sh("exit 4").await;
    env.finish_task(task).await;
    let mut seen = Vec::new();
    while !seen.iter().any(|message: &String| message.contains("Exited")) {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(event["driver"], json!("run"));
        seen.push(event["message"].as_str().unwrap().to_owned());
    }
    assert!(seen[0] == "Downloading image" && seen[1].starts_with("Started, process "), "{seen:?}");
    assert_eq!(seen[2], "Exited with code 4");
    listening.kill().unwrap();
    listening.wait().unwrap();
    env.plugin.take().unwrap().shut_down().await;
    assert!(refused(&env, &["events"]).await.1.contains("no plugin is running"));
    env.start_plugin().await;
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_shown_and_removed() {
    let mut env = Env::configured(json!({"image": {"keep": "0s"}})).await;
    let image = env.busybox().await;
    assert!(told(&env, &["pull", &image]).await.contains(&image));
    let task = env.sh("exit 0").await;
    env.finish_task(task).await;
    let shown = told(&env, &["gc", "--dry-run", "--keep", "0s"]).await;
    assert_eq!(shown.matches("would be removed").count(), 2, "the plugin's and the command line's: {shown}");
    let removed = told(&env, &["gc", "--keep", "0s"]).await;
    assert_eq!(removed.matches("removed").count(), 2, "{removed}");
    assert_eq!(told(&env, &["gc", "--keep", "0s"]).await.lines().count(), 1, "nothing is left");
    assert_eq!(leak::entries(&env.dir.join("cli-state/cli/images")), Vec::<String>::new());
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_record_names_is_reaped() {
    let env = Env::configured(json!({"state": {"grace": "1s"}})).await;
    let stray = format!("stray-{}", random_hex(10));
    let places = Places::new(env.dir.join("run"), env.dir.join("state"));
    for place in [places.bundles(), places.uppers()] {
        fs::create_dir_all(place.join(&stray).join("x")).unwrap();
    }
    eventually("the stray container is reaped", async || {
        let left = leak::entries(&env.dir.join("run/bundles"));
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    env.finish().await;
}

/// Runs of the command line share a state directory: none of them takes the writable layers of another one for remains.
#[tokio::test(flavor = "multi_thread")]
async fn what_another_plugin_has_made_is_its_own() {
    let mut env = Env::new().await;
    let task = env.sh("echo old > /file; echo ready; sleep 600").await;
    task.says("ready").await;
    let mut other = Env::configured(json!({"state": {"grace": "500ms", "state_dir": env.dir.join("state")}})).await;
    // The other plugin runs three garbage collections in this time.
    tokio::time::sleep(Duration::from_millis(2000)).await;
    assert_eq!(env.exec_text(&task, "cat /file; echo new > /other; cat /other").await, "old\nnew\n");
    assert!(other.plugin.take().unwrap().shut_down().await.status.is_some_and(|status| status.success()));
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_removed_by_name() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    told(&env, &["pull", &image]).await;
    let (task, _) = tasks(&mut env).await;
    assert!(refused(&env, &["rmi", &image]).await.1.contains("in use"));
    env.destroy(&task).await.unwrap();
    assert!(told(&env, &["rmi", &image]).await.contains(&image));
    assert!(refused(&env, &["rmi", &image]).await.1.contains("is not stored on this node"));
    assert_eq!(told(&env, &["images"]).await.lines().count(), 1);
    env.finish().await;
}

/// A plugin of another version may not know a request. Its answer is neither an empty list nor the end of the plugin.
#[tokio::test(flavor = "multi_thread")]
async fn an_unexpected_answer_of_a_plugin_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let places = Places::new(directory.path().join("run/other"), directory.path().join("state/other"));
    fs::create_dir_all(places.tasks()).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(places.control()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, mut request) = (stream.unwrap(), String::new());
            std::io::BufRead::read_line(&mut std::io::BufReader::new(&stream), &mut request).unwrap();
            std::io::Write::write_all(&mut stream, b"\"not_here\"\n").unwrap();
        }
    });
    for arguments in [["events"].as_slice(), &["gc", "--dry-run"]] {
        let mut command = Command::new(program());
        command.args(arguments).arg("--run-dir").arg(directory.path().join("run"));
        command.arg("--state-dir").arg(directory.path().join("state")).stdin(Stdio::null());
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains("unexpected answer NotHere") && !said.contains("has ended"), "{arguments:?}: {said}");
    }
}
