//! A shim that is alive, but sends some answers that can't be decoded. Such an answer must not end a task.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use serde_json::json;

use crate::{attack, runtimes, support::Env};

#[tokio::test(flavor = "multi_thread")]
async fn no_task_ends_because_an_answer_was_not_understood() {
    let programs = tempfile::tempdir_in("/var/tmp").unwrap();
    let program = programs.path().join("garbling-shim");
    fs::write(&program, attack::compile("garbling-shim", include_str!("garbling_shim.c"))).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut env = Env::configured(json!({"shim": {"binary": program, "pool": 0}})).await;
    for runtime in runtimes() {
        // The answer to the Wait call carries the exit code.
        let task = env.start(env.shell("exit 7", json!({"runtime": runtime})).await).await;
        let answer = env.try_wait(&task.id).await.unwrap();
        assert_eq!((answer.result.unwrap().exit_code, answer.err.as_str()), (7, ""), "{runtime}");
        env.destroy(&task).await.unwrap();

        // A plugin needs the answer to the State call to recover a task.
        let script = "trap 'exit 8' TERM; echo up; while :; do sleep 0.05; done";
        let task = env.start(env.shell(script, json!({"runtime": runtime})).await).await;
        task.says("up").await;
        env.kill_plugin().await;
        env.start_plugin().await;
        env.recover(&task).await.unwrap_or_else(|status| panic!("{runtime}: {status:?}\n{}", env.plugin().stderr()));
        assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n", "{runtime}");
        env.stop(&task, Duration::from_secs(30), "").await.unwrap();
        assert_eq!(env.wait(&task).await.exit_code, 8, "{runtime}");
        env.destroy(&task).await.unwrap();
    }
    env.finish().await;
}
