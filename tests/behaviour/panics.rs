//! A part of the driver panics: the panic is logged, no lock or name stays taken, and the interrupted work is done
//! again.

use std::time::Duration;

use nomad_driver_shim::control::{Answer, Request, send_request};
use serde_json::json;

use crate::{
    support::{Env, EnvOptions, eventually, leak},
    trials,
};

async fn env(point: &str) -> Env {
    let config = json!({"state": {"grace": "500ms"}});
    EnvOptions::default().config(config).var("NOMAD_DRIVER_SHIM_PANIC_AT", point).start().await
}

/// Asserts that everything of the attempt is removed: the garbage collection, or a retry, has completed the work that
/// the panic interrupted.
async fn nothing_is_left(mut env: Env, point: &str) {
    eventually(&format!("what a panic at {point} has left goes"), async || {
        let mut left = leak::while_alive(&env).await;
        // The plugin has two descriptors for a shim that a panic has left: it knows the shim as a child and as an
        // adopted shim.
        left.retain(|what| !what.starts_with("descriptors of the plugin"));
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    let said = env.plugin().stderr();
    assert!(said.contains(&format!("at {point} by a failpoint")), "no panic at {point}: {said}");
    env.kill_plugin().await;
    env.set_var("NOMAD_DRIVER_SHIM_PANIC_AT", None);
    env.start_plugin().await;
    env.finish().await;
}

/// Without this, a panic of a background teardown left the counter of teardowns too high, so that each gc waited half a
/// minute. A panic in the call itself left the task half known.
mod a_teardown_that_panics_is_done_again {
    use super::*;

    async fn check(point: &str) {
        let mut env = env(point).await;
        let task = env.sh("sleep 600").await;
        // DestroyTask answers with an error if the call itself panics; a panic in the background comes after the
        // answer.
        drop(env.destroy(&task).await);
        let second = env.sh("echo second").await;
        assert_eq!(env.finish_task(second).await.1, "second\n");
        // This is far less than the time for which gc waits for teardowns that hang.
        let limit = Duration::from_secs(25);
        let swept = send_request(&env.dir.join("run/control.sock"), &Request::Gc { dry_run: false }, limit).await;
        assert!(
            matches!(swept, Ok(Answer::Removed(_))),
            "gc waits for a teardown that nobody is at: {point}: {swept:?}"
        );
        nothing_is_left(env, point).await;
    }

    trials! { check:
        container => "undo.container";
        shim => "undo.shim";
        clearing => "undo.clearing";
        bundle => "undo.bundle";
        record => "undo.record";
    }
}

/// A further attempt of the same allocation's task is not refused forever, either.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_attempt_undoes_what_a_panic_has_left() {
    let mut env = env("undo.clearing").await;
    let config = env.shell("sleep 600", json!({})).await;
    let first = env.start(config.clone()).await;
    env.destroy(&first).await.unwrap();
    let mut again = env.prepare_again(first, "2", config).await;
    env.try_start(&mut again).await.unwrap();
    env.destroy(&again).await.unwrap();
    nothing_is_left(env, "undo.clearing").await;
}

mod a_start_that_panics_is_undone {
    use super::*;

    async fn check(point: &str) {
        let mut env = env(point).await;
        let mut task =
            env.prepare(json!({"image": env.busybox().await, "command": "/bin/sleep", "args": ["600"]})).await;
        env.try_start(&mut task).await.unwrap_err();
        // The id is free, and the allocation's task can be started.
        let mut again =
            env.prepare_again(task, "2", json!({"image": env.busybox().await, "command": "/bin/true"})).await;
        env.try_start(&mut again).await.unwrap_or_else(|status| panic!("{point}: {status:?}"));
        assert_eq!(env.wait(&again).await.exit_code, 0);
        env.destroy(&again).await.unwrap();
        nothing_is_left(env, point).await;
    }

    trials! { check:
        shim => "start.shim";
        mounted => "start.mounted";
        bundle => "start.bundle";
        created => "start.created";
        recorded => "start.recorded";
    }
}

/// Without this, a WaitTask for the task never returned.
#[tokio::test(flavor = "multi_thread")]
async fn an_exit_is_told_in_spite_of_a_panic() {
    let mut env = env("exit.seen").await;
    let task = env.sh("exit 9").await;
    assert_eq!(env.wait(&task).await.exit_code, 9);
    env.destroy(&task).await.unwrap();
    nothing_is_left(env, "exit.seen").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_recovered_in_spite_of_a_panic() {
    let mut env = env("recover.found").await;
    let task = env.sh("sleep 600").await;
    env.kill_plugin().await;
    env.start_plugin().await;
    tokio::time::timeout(crate::support::patience(), env.recover(&task)).await.expect("RecoverTask hangs").unwrap();
    assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n");
    env.destroy(&task).await.unwrap();
    nothing_is_left(env, "recover.found").await;
}
