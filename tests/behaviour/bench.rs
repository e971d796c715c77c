//! The benchmark measures what it says, and leaves nothing.

use std::{collections::BTreeSet, fs};

use serde_json::Value;

use crate::support::{Env, program, services};

#[tokio::test(flavor = "multi_thread")]
async fn every_path_is_measured_in_one_run() {
    let env = Env::new().await;
    let image = env.busybox().await;
    let plan = env.dir.join("plan.toml");
    // The floor is measured only if its task is confined as runc's.
    let kinds = ["driver", "containerd", "runc", "crun", "floor"];
    let paths: String = kinds.iter().map(|kind| format!("[[paths]]\nname = '{kind}'\nkind = '{kind}'\n")).collect();
    let text = format!(
        "count = 2\nblock = 1\ngap_ms = 1\nconcurrency = [2]\nconcurrent_count = 4\nidle_tasks = 2\n\
         sequences = [['start', 'wait', 'destroy'], ['start', 'stop', 'destroy']]\n{paths}"
    );
    fs::write(&plan, text).unwrap();
    let (json, html) = (env.dir.join("results.json"), env.dir.join("results.html"));
    let (run, state) = (env.dir.join("b-run"), env.dir.join("b-state"));
    let output = tokio::process::Command::new(program())
        .args(["bench", "--plan"])
        .arg(&plan)
        .arg("--json")
        .arg(&json)
        .arg("--html")
        .arg(&html)
        .arg("--pictures")
        .arg(env.dir.join("pictures"))
        .arg("--address")
        .arg(&services().containerd)
        .args(["--namespace", &env.namespace, &image, "--run-dir"])
        .arg(&run)
        .arg("--state-dir")
        .arg(&state)
        .output()
        .await
        .unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    let results: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(results["left_out"], serde_json::json!({}), "{said}");
    let rows = results["rows"].as_array().unwrap();
    let has = |path: &str, mode: &str, metric: &str| {
        rows.iter().any(|row| {
            let same = row["path"] == path && row["mode"] == mode && row["metric"] == metric && row["concurrency"] == 1;
            let ordered = ["min_ms", "p50_ms", "p90_ms", "p99_ms", "max_ms"].map(|key| row[key].as_f64().unwrap());
            same && row["n"] == 2 && ordered.is_sorted() && ordered[0] > 0.0
        })
    };
    for path in kinds {
        for mode in ["back_to_back", "gaps"] {
            for metric in ["first_instruction", "first_byte", "exit_seen", "stop", "destroyed"] {
                assert!(has(path, mode, metric), "{path} {mode} {metric}: {said}");
            }
            // A foreground command has no answer but its end.
            assert_eq!(has(path, mode, "start_task"), !matches!(path, "runc" | "crun"), "{path}");
        }
    }
    let at_two: BTreeSet<&str> =
        results["throughput"].as_array().unwrap().iter().map(|one| one["path"].as_str().unwrap()).collect();
    assert_eq!(at_two, kinds.into());
    assert!(results["memory"].as_array().unwrap().iter().all(|one| one["total_kib"].as_u64().unwrap() > 1000));
    assert!(fs::read_to_string(&html).unwrap().contains("<svg"));
    let picture = fs::read_to_string(env.dir.join("pictures/first_byte-gaps-1.svg")).unwrap();
    assert!(kinds.iter().all(|kind| picture.contains(&format!(">{kind}</text>"))), "{picture}");
    // Nothing stays mounted, in cgroups or in containerd.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(env.dir.to_str().unwrap()), "{mounts}");
    assert_eq!(crate::support::leak::entries(&run), Vec::<String>::new());
    // The command line's image store, as `run` leaves it.
    assert_eq!(crate::support::leak::entries(&state), ["cli"]);
    assert_eq!(crate::support::leak::entries(&state.join("cli/uppers")), Vec::<String>::new());
    let removed = tokio::process::Command::new(program())
        .args(["rmi", &image, "--namespace", &env.namespace, "--address"])
        .arg(&services().containerd)
        .arg("--run-dir")
        .arg(&run)
        .arg("--state-dir")
        .arg(&state)
        .output()
        .await
        .unwrap();
    assert!(removed.status.success(), "{removed:?}");
    let compared = tokio::process::Command::new(program())
        .args(["bench", "--compare"])
        .arg(&json)
        .arg(&json)
        .output()
        .await
        .unwrap();
    assert!(String::from_utf8_lossy(&compared.stdout).contains("1.00"), "{compared:?}");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_plans_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let plan = directory.path().join("plan.toml");
    for (text, part) in [("counts = 3", "counts"), ("count = 0", "nothing would be measured")] {
        fs::write(&plan, text).unwrap();
        let output = tokio::process::Command::new(program())
            .args(["bench", "busybox", "--plan"])
            .arg(&plan)
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(125) && said.contains("plan.toml") && said.contains(part), "{said}");
    }
    let output =
        tokio::process::Command::new(program()).args(["bench", "busybox", "--paths", "x"]).output().await.unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("\"x\" is not in the plan"), "{output:?}");
}
