//! Text of images, registries, runtimes and jobs, where Nomad, its users and its logs show it: it is never longer than
//! people read, and contains nothing that a terminal or a log file acts on.

use serde_json::{Value, json};

use crate::{
    runtimes,
    support::{
        Env, Image, eventually,
        fake_registry::{Answer, FakeRegistry},
        services,
    },
};

/// Colours, a window title, a forged log line, the second set of control characters, and characters that change the
/// direction of text.
const EVIL: &str = "\u{1b}[31m\u{1b}]0;title\u{7}\r\n2026-01-01 [ERROR] forged\u{9b}2J\u{202e}txt\u{2066}\u{2028}";

fn is_acted_on(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}')
}

fn assert_plain(what: &str, text: &str) {
    assert!(text.chars().count() < 3000, "{what}: {} characters", text.chars().count());
    assert!(!text.contains(is_acted_on), "{what}: {text:?}");
}

/// Every line that the plugin has logged, as the agent reads it.
async fn assert_logs_are_plain(env: &Env) {
    eventually("whole lines", async || {
        let said = env.plugin().stderr();
        if said.ends_with('\n') { Ok(()) } else { Err(said.len()) }
    })
    .await;
    for line in env.plugin().stderr().lines() {
        assert!(line.len() < 64 << 10, "a line of {} bytes", line.len());
        let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        for (key, value) in line.as_object().unwrap() {
            let text = value.as_str().unwrap_or_default();
            assert!(!text.contains(is_acted_on), "{key}: {text:?}");
        }
    }
}

/// Starts a task that must fail, and checks the driver's error text, which ends with the cause.
async fn refused(env: &mut Env, what: &str, config: Value, cause: &str) {
    let mut task = env.prepare(config).await;
    let status = env.try_start(&mut task).await.expect_err(what);
    assert_plain(what, status.message());
    assert!(status.details().len() < 16 << 10, "{what}: {} bytes of details", status.details().len());
    assert!(status.message().contains(cause), "{what}: {cause:?} in {}", status.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_words_are_cut_and_escaped() {
    let long = "U".repeat(1_000_000);
    let program = format!("/bin/no-{EVIL}-{}", "p".repeat(3000));
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        for (name, key, value, cause) in [
            ("user", "User", json!(long), "is not in the image's /etc/passwd"),
            ("user-group", "User", json!(format!("0:{long}{EVIL}")), "is not in the image's /etc/group"),
            ("user-escapes", "User", json!(EVIL), "is not in the image's /etc/passwd"),
            ("workdir", "WorkingDir", json!(format!("{EVIL}{long}")), "is not an absolute path"),
            // The runtime's own error text, which repeats the image's text.
            ("cmd", "Cmd", json!([format!("/bin/{EVIL}")]), "o such file or directory"),
            ("cmd-long", "Cmd", json!([program]), ""),
        ] {
            let image = Image::busybox().with_config(key, value);
            let image = image.push(&services().registry, &format!("text/{name}:1")).await;
            refused(&mut env, &format!("{runtime}, {name}"), json!({"image": image}), cause).await;
        }
        // This value only appears in the log.
        let image = Image::busybox().with_config("StopSignal", json!(format!("{EVIL}{long}")));
        let image = image.push(&services().registry, "text/stopsignal:1").await;
        assert_eq!(env.run(json!({"image": image, "command": "/bin/true"})).await.0, 0);
        assert_logs_are_plain(&env).await;
        env.finish().await;
    }
}

/// A job's own text comes back to its author, and to all users who inspect the task. Many faults are all reported, each
/// with the end of its text.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_words_are_cut_and_escaped_and_no_fault_hides_another() {
    let long = "J".repeat(1_000_000);
    let mut env = Env::with_runtime("crun", json!({})).await;
    for (what, options, cause) in [
        ("image", json!({"image": format!("{EVIL}{long}")}), "is not an image reference"),
        ("runtime", json!({"runtime": format!("{long}{EVIL}")}), "is not configured"),
        ("cwd", json!({"cwd": format!("{EVIL}{long}")}), "is not an absolute path"),
        ("option", json!({long.clone(): "1"}), "unknown option"),
    ] {
        let config = env.shell("true", options).await;
        refused(&mut env, what, config, cause).await;
    }
    let caps: Vec<String> = (0..200).map(|n| format!("{n}{EVIL}{}", "C".repeat(5000))).collect();
    let options = json!({"cap_add": caps, "cwd": "relative", "hostname": EVIL, "privileged": true, "shm_size": long});
    let mut task = env.prepare(env.shell("true", options).await).await;
    let status = env.try_start(&mut task).await.expect_err("refused");
    let text = status.message();
    assert!(
        text.chars().count() < 10_000 && !text.contains(is_acted_on),
        "{} characters: {text:?}",
        text.chars().count()
    );
    for part in ["cwd = \"relative\"", "hostname = ", "allow_privileged", " more"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_logs_are_plain(&env).await;
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_words_are_cut_and_escaped() {
    let mut env = Env::with_runtime("crun", json!({})).await;
    let registry = FakeRegistry::start().await;
    for (name, status) in [("gone", 404), ("denied", 403), ("teapot", 418)] {
        let body = json!({"errors": [{"code": EVIL, "message": format!("{EVIL}{}", "R".repeat(20_000))}]});
        let answer = Answer { status, ..Answer::ok("application/json", serde_json::to_vec(&body).unwrap()) };
        registry.set(&format!("/v2/{name}/manifests/1"), answer);
        let image = format!("{}/{name}:1", registry.address);
        refused(&mut env, name, json!({"image": image}), &registry.address).await;
    }
    assert_logs_are_plain(&env).await;
    env.finish().await;
}

/// A runtime's error text in an interactive session, and in Nomad's events.
#[tokio::test(flavor = "multi_thread")]
async fn words_of_runtimes_are_escaped_in_sessions_and_events() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let mut events =
            env.driver().task_events(nomad_driver_shim::pb::driver::TaskEventsRequest {}).await.unwrap().into_inner();
        let image = Image::busybox().push(&services().registry, &format!("text/events-{runtime}:1")).await;
        let config = json!({"image": image, "command": "/bin/sleep", "args": ["600"]});
        let task = env.start(config).await;
        let event = events.message().await.unwrap().expect("the download is told");
        assert_plain("event", &event.message);
        event.annotations.values().for_each(|value| assert_plain("annotation", value));
        let outcome = env.talk(&task, &[&format!("/bin/{EVIL}")], false).await.unwrap().end().await;
        assert!(outcome.code == Some(127), "{runtime}: {outcome:?}");
        assert_plain("session", outcome.stderr.trim_end_matches('\n'));
        let error = env.exec(&task, &[&format!("/bin/{EVIL}")], 0).await.expect_err("refused");
        assert_plain("exec", error.message());
        let error = env.exec(&task, &["/bin/sh", "-c", &format!("sleep 600 # {EVIL}")], 100).await.expect_err("late");
        assert_plain("exec that is late", error.message());
        env.destroy(&task).await.unwrap();
        assert_logs_are_plain(&env).await;
        env.finish().await;
    }
}

/// Statuses that may contain text from outside the driver are made in one source file.
#[test]
fn no_status_is_made_of_foreign_text_elsewhere() {
    let plugin = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/plugin");
    let files = std::fs::read_dir(plugin).unwrap().flatten().map(|entry| entry.path());
    let mut seen = 0;
    for file in files.filter(|file| file.extension().is_some_and(|extension| extension == "rs")) {
        let text = std::fs::read_to_string(&file).unwrap();
        for (n, line) in text.lines().enumerate().filter(|(_, line)| line.contains("Status::")) {
            seen += 1;
            let made_here = file.ends_with("status.rs");
            // `unsupported` formats a name that this driver chooses.
            let foreign = line.contains("format!") && !line.contains("is not supported by this driver");
            assert!(made_here || !foreign, "{}:{}: {line}", file.display(), n + 1);
        }
    }
    assert!(seen > 5, "the sources are looked at");
}
