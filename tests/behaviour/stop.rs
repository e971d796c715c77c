//! StopTask: which signal is sent, to which processes, and how long the driver waits.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Env, Image, services, shell_in};

const TRAPS: &str =
    "for s in TERM INT QUIT USR1; do trap \"echo $s; exit 0\" $s; done; echo ready; while :; do sleep 0.02; done";
const LONG: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn the_signal_is_the_jobs_then_the_images_then_sigterm() {
    let mut env = Env::new().await;
    let with_stopsignal = Image::busybox()
        .with_config("StopSignal", json!("SIGQUIT"))
        .push(&services().registry, "test/stopsignal:1")
        .await;
    let plain = env.busybox().await;
    for (image, signal, expected) in [
        (&plain, "", "TERM"),
        (&plain, "SIGINT", "INT"),
        (&with_stopsignal, "", "QUIT"),
        (&with_stopsignal, "SIGUSR1", "USR1"),
        (&plain, "SIGNONSENSE", "TERM"),
    ] {
        let task = env.start(shell_in(image, TRAPS)).await;
        task.says("ready").await;
        let began = Instant::now();
        env.stop(&task, LONG, signal).await.unwrap();
        assert!(began.elapsed() < LONG / 2, "stop returns when the process ends, not when the time is over");
        let (code, out, _) = env.finish_task(task).await;
        assert_eq!((code, out.as_str()), (0, format!("ready\n{expected}\n").as_str()), "{image} {signal}");
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_ignores_the_signal_is_killed_after_the_timeout() {
    let mut env = Env::new().await;
    let task = env.sh("trap '' TERM; echo ready; while :; do sleep 0.05; done").await;
    task.says("ready").await;
    let began = Instant::now();
    env.stop(&task, Duration::from_secs(1), "").await.unwrap();
    assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(env.finish_task(task).await.0, 137);
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_time_means_sigkill_at_once_and_to_everybody() {
    let mut env = Env::new().await;
    let task = env.sh("(trap '' TERM; setsid sleep 600) & trap 'echo TERM; exit 0' TERM; echo ready; while :; do sleep 0.05; done").await;
    task.says("ready").await;
    let began = Instant::now();
    env.stop(&task, Duration::ZERO, "").await.unwrap();
    assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
    let (code, out, _) = env.finish_task(task).await;
    assert_eq!((code, out.as_str()), (137, "ready\n"));
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_what_has_ended_or_never_was_is_fine() {
    let mut env = Env::new().await;
    let task = env.sh("exit 3").await;
    assert_eq!(env.wait(&task).await.exit_code, 3);
    env.stop(&task, LONG, "").await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 3, "a stop changes nothing of it");
    env.destroy(&task).await.unwrap();
    env.stop(&task, LONG, "").await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_stops_at_once_both_return() {
    let mut env = Env::new().await;
    let task = env.sh("trap 'sleep 0.3; exit 0' TERM; echo ready; while :; do sleep 0.02; done").await;
    task.says("ready").await;
    let (first, second) = tokio::join!(env.stop(&task, LONG, ""), env.stop(&task, LONG, ""));
    first.unwrap();
    second.unwrap();
    assert_eq!(env.finish_task(task).await.0, 0);
    env.finish().await;
}
