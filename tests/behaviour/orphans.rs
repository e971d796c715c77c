//! Tasks that no agent asks for any longer: `state { orphans }`.

use std::fs;

use nomad_driver_shim::{
    control::{ANSWER_TIMEOUT, Answer, Garbage, Request, send_request},
    host::Plugin,
    ids::random_hex,
    process::PidFd,
};
use serde_json::json;

use crate::support::{Env, Task, eventually};

async fn environment(orphans: &str) -> Env {
    let config = json!({"state": {"grace": "1s", "orphans": orphans, "orphan_timeout": "10m"}});
    Env::configured(config).await
}

async fn gc(env: &Env, dry_run: bool) -> Vec<Garbage> {
    let answer =
        send_request(&env.dir.join("run/control.sock"), &Request::Gc { dry_run }, ANSWER_TIMEOUT).await.unwrap();
    let Answer::Removed(garbage) = answer else { panic!("{answer:?}") };
    garbage
}

async fn process(env: &Env, task: &Task) -> PidFd {
    PidFd::open(env.attribute(task, "pid").await.parse().unwrap()).unwrap()
}

/// Kills the plugin and starts another one. The agent makes no calls to it except those that initialize the plugin.
async fn next_plugin(env: &mut Env) {
    env.kill_plugin().await;
    env.start_plugin().await;
}

/// Waits for a round of garbage collection to pass: each round removes an unrecorded bundle such as this one.
async fn swept(env: &Env) {
    let stray = env.dir.join("run/bundles").join(format!("stray-{}", random_hex(10)));
    fs::create_dir_all(&stray).unwrap();
    eventually("a sweep", async || if stray.exists() { Err(()) } else { Ok(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_that_is_to_end_is_stopped_politely_and_destroyed() {
    let mut env = environment("end").await;
    let stopped = env.sh("trap 'echo stopping; exit 0' TERM; echo ready; while :; do sleep 0.05; done").await;
    stopped.says("ready").await;
    // The agent asks for this task within the grace period, so the task stays for as long as the agent wants.
    let kept = env.sh("echo ready; sleep 600").await;
    kept.says("ready").await;
    let (gone, stays) = (process(&env, &stopped).await, process(&env, &kept).await);
    next_plugin(&mut env).await;
    env.recover(&kept).await.unwrap();
    stopped.says("stopping").await;
    eventually("it is gone", async || {
        let tasks = crate::support::leak::entries(&env.dir.join("run/tasks"));
        if gone.has_ended() && tasks.len() == 1 { Ok(()) } else { Err(tasks) }
    })
    .await;
    swept(&env).await;
    assert!(!stays.has_ended(), "its agent has it");
    assert_eq!(env.exec_text(&kept, "echo alive").await, "alive\n");
    let error = env.recover(&stopped).await.unwrap_err();
    assert!(error.message().contains("no record of it"), "{error:?}");
    env.destroy(&kept).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_asks_while_the_end_is_at_work_is_told_so() {
    let mut env = environment("end").await;
    let deaf = "trap 'echo asked' TERM; echo ready; until [ -e /alloc/data/go ]; do sleep 0.05; done; echo over";
    let (asked, mut anew) = (env.sh(deaf).await, env.sh(deaf).await);
    asked.says("ready").await;
    anew.says("ready").await;
    let first = process(&env, &anew).await;
    next_plugin(&mut env).await;
    for task in [&asked, &anew] {
        task.says("asked").await;
        let error = env.recover(task).await.unwrap_err();
        let clear = ["no agent had asked for it within state.grace", "is being removed"];
        assert!(clear.iter().all(|words| error.message().contains(words)), "{error:?}");
    }
    // An agent that starts this same task again gets a new one; the call does not answer that the task already runs.
    env.try_start(&mut anew).await.unwrap();
    assert!(first.has_ended());
    assert_ne!(env.inspect(&anew.id).await.unwrap().task.unwrap().state, 0);
    fs::write(asked.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    asked.says("over").await;
    eventually("it is gone", async || {
        let tasks = crate::support::leak::entries(&env.dir.join("run/tasks"));
        if tasks.len() == 1 { Ok(()) } else { Err(tasks) }
    })
    .await;
    swept(&env).await;
    assert_eq!(env.exec_text(&anew, "echo alive").await, "alive\n");
    env.destroy(&anew).await.unwrap();
    env.finish().await;
}

/// While an agent is down, it does not ask for its tasks, and loses none of them: the grace period counts only while an
/// agent is connected.
#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_without_an_agent_runs_on() {
    let mut env = environment("end").await;
    let task = env.sh("echo ready; sleep 600").await;
    task.says("ready").await;
    let runs = process(&env, &task).await;
    next_plugin(&mut env).await;
    let socket = env.plugin().socket().to_owned();
    let child = env.plugin.take().unwrap().detach();
    let why = "no agent has been connected for as long as state.grace";
    eventually("its grace is over", async || {
        let garbage = gc(&env, true).await;
        let stays = garbage.iter().any(|one| one.stays && one.name == task.id && one.why.contains(why));
        if stays { Ok(()) } else { Err(garbage) }
    })
    .await;
    let found = gc(&env, false).await;
    assert!(found.iter().all(|one| one.stays), "{found:?}");
    assert!(!runs.has_ended());
    // The agent is back, and asks for the task.
    env.plugin = Some(Plugin::reattach(&socket).await.unwrap());
    env.recover(&task).await.unwrap();
    swept(&env).await;
    assert!(!runs.has_ended());
    env.destroy(&task).await.unwrap();
    let leaks = crate::support::leak::of_tasks(&env).await;
    assert_eq!(leaks, Vec::<String>::new());
    env.plugin.take().unwrap().shut_down().await;
    child.unwrap().wait().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_that_is_kept_is_warned_of_once() {
    let mut env = environment("keep").await;
    let (one, two) = (env.sh("echo ready; sleep 600").await, env.sh("echo ready; sleep 600").await);
    for task in [&one, &two] {
        task.says("ready").await;
    }
    let runs = process(&env, &one).await;
    next_plugin(&mut env).await;
    for _ in 0..3 {
        swept(&env).await;
    }
    assert!(!runs.has_ended());
    let said = env.plugin().stderr();
    for task in [&one, &two] {
        let warnings: Vec<&str> =
            said.lines().filter(|line| line.contains(&task.id) && line.contains("no agent has asked for it")).collect();
        assert_eq!(warnings.len(), 1, "{warnings:#?}");
    }
    let garbage = gc(&env, true).await;
    assert!(garbage.iter().any(|found| found.stays && found.name == one.id && found.why.contains("\"keep\"")));
    // An agent can still recover the tasks after the grace period.
    for task in [one, two] {
        env.recover(&task).await.unwrap();
        env.destroy(&task).await.unwrap();
    }
    env.finish().await;
}
