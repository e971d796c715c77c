//! `init = true` in a sandbox: the init reaps orphans, passes signals on, and ends with the command's exit code.

use std::time::Duration;

use serde_json::json;

use crate::{SPELLINGS, support::Env};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn the_init_works_in_a_sandbox() {
    for runtime in SPELLINGS {
        let mut env = Env::with_runtime(runtime, json!({})).await;
        let init = json!({"init": true});
        let script = "tr '\\0' ' ' < /proc/1/cmdline | cut -d' ' -f1-3; exit 7";
        let (code, out, err) = env.run(env.shell(script, init.clone()).await).await;
        assert_eq!((code, out.as_str()), (7, "/.nomad-init -- /bin/sh\n"), "{runtime}: {err}");
        let script = "(sleep 0.1 &); sleep 1; grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l";
        assert_eq!(env.run(env.shell(script, init.clone()).await).await.1, "0\n", "{runtime}");
        let script = "trap 'echo stopped; exit 9' TERM; echo ready; while :; do sleep 0.02; done";
        let task = env.start(env.shell(script, init).await).await;
        task.says("ready").await;
        env.stop(&task, Duration::from_secs(60), "").await.unwrap();
        let (code, out, _) = env.finish_task(task).await;
        assert_eq!((code, out.as_str()), (9, "ready\nstopped\n"), "{runtime}");
        env.finish().await;
    }
}
