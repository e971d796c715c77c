//! Exit codes, fifty times each. gVisor's own shim asks the sandbox for the exit code, and the sandbox may be gone by
//! then.

use std::time::Duration;

use nomad_driver_shim::pb::driver::ExitResult;
use serde_json::json;

use crate::{SPELLINGS, support::Env};

const TIMES: usize = 50;
const AT_ONCE: usize = 3;
const MIB: i64 = 1 << 20;

/// How a task ends, and with which result.
#[derive(Clone, Copy, Debug)]
enum Case {
    Exits(i32),
    Killed,
    OutOfMemory,
}

async fn one(env: &Env, case: Case, alloc: nomad_driver_shim::host::Alloc) -> ExitResult {
    let script = match case {
        Case::Exits(code) => format!("exit {code}"),
        Case::Killed => "sleep 600".to_owned(),
        Case::OutOfMemory => "exec tail /dev/zero".to_owned(),
    };
    let config = env.shell(&script, json!({})).await;
    let mut task = env.prepare_in(alloc.create_task("web").unwrap(), "1", config).await;
    if let Case::OutOfMemory = case {
        let resources = task.config.resources.as_mut().unwrap();
        resources.allocated_resources.as_mut().unwrap().memory.as_mut().unwrap().memory_mb = 60;
        resources.linux_resources.as_mut().unwrap().memory_limit_bytes = 60 * MIB;
    }
    env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{case:?}: {}", status.message()));
    if let Case::Killed = case {
        env.stop(&task, Duration::ZERO, "").await.unwrap();
    }
    let result = env.wait(&task).await;
    env.destroy(&task).await.unwrap();
    result
}

async fn fifty(runtime: &str) {
    let mut env = Env::with_runtime(runtime, json!({})).await;
    for case in [Case::Exits(0), Case::Exits(1), Case::Exits(4), Case::Killed, Case::OutOfMemory] {
        let mut right = 0;
        let mut wrong = Vec::new();
        while right + wrong.len() < TIMES {
            let count = AT_ONCE.min(TIMES - right - wrong.len());
            let name = |n: usize| format!("{}-{}-{n}", env.namespace, nomad_driver_shim::ids::random_hex(4));
            let allocs: Vec<_> = (0..count)
                .map(|n| nomad_driver_shim::host::Alloc::create(&env.dir.join("allocs"), &name(n)).unwrap())
                .collect();
            env.allocs.extend(allocs.iter().cloned());
            let results = futures_util::future::join_all(allocs.into_iter().map(|alloc| one(&env, case, alloc))).await;
            for result in results {
                let told = (result.exit_code, result.oom_killed);
                let good = match case {
                    Case::Exits(code) => told == (code, false),
                    // Nomad's clients report a death by signal in either of these ways.
                    Case::Killed => (told.0 == 137 || result.signal == 9) && !told.1,
                    Case::OutOfMemory => (told.0 == 137 || result.signal == 9) && told.1,
                };
                if good { right += 1 } else { wrong.push(result) }
            }
        }
        eprintln!("{runtime}: {case:?}: {right} of {TIMES}");
        assert!(wrong.is_empty(), "{runtime}, {case:?}: {wrong:?}");
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn runsc_behind_runcs_shim() {
    fifty(SPELLINGS[0]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn gvisors_own_shim() {
    fifty(SPELLINGS[1]).await;
}
