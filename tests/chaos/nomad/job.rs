//! Jobs in the format of Nomad's API: one group of one task, and policies that make the outcome definite.

use serde_json::{Value, json};

use crate::{
    observe::MARK,
    step::{OciRuntime, TaskNumber, Work},
    task::script,
};

/// The name of the task in each job.
pub(super) const TASK: &str = "t";
const SECOND: u64 = 1_000_000_000;
/// Makes the task count its attempts itself, from the lines that its starts have written, since Nomad does not give it
/// a number.
const COUNT: &str = "ATTEMPT=$(( $(cat /alloc/data/started-$TASK 2>/dev/null | wc -l) + 1 ))";

/// The id of a task's job.
pub(super) fn id(namespace: &str, number: TaskNumber) -> String {
    format!("{namespace}-{number}")
}

/// The number of the task whose job has this id.
pub(super) fn number(namespace: &str, id: &str) -> Option<TaskNumber> {
    id.strip_prefix(namespace)?.strip_prefix('-')?.parse().ok()
}

/// May Nomad start the task again after a failure? For a batch task that is meant to fail it may not, since this task
/// would fail forever.
pub(super) fn may_restart(work: Work) -> bool {
    !matches!(work, Work::Batch { code: 1.., .. })
}

/// The job to register.
pub(super) fn job(namespace: &str, number: TaskNumber, work: Work, runtime: OciRuntime, image: &str) -> Value {
    let runtime = match runtime {
        OciRuntime::Crun => "crun",
        OciRuntime::Runc => "runc",
        OciRuntime::Runsc => "runsc",
    };
    let id = id(namespace, number);
    let kind = if work == Work::Service { "service" } else { "batch" };
    let (attempts, mode) = if may_restart(work) { (1000, "delay") } else { (0, "fail") };
    json!({"Job": {
        "ID": id, "Name": id, "Type": kind, "Datacenters": ["*"],
        // A service without deployments: their health checks are not what is tested.
        "Update": (work == Work::Service).then(|| json!({"MaxParallel": 0})),
        "TaskGroups": [{
            "Name": "g", "Count": 1,
            "RestartPolicy": {"Attempts": attempts, "Interval": 86400 * SECOND, "Delay": SECOND, "Mode": mode},
            "ReschedulePolicy": {"Attempts": 0, "Interval": 0, "Unlimited": false},
            "EphemeralDisk": {"SizeMB": 50},
            "Tasks": [{
                "Name": TASK, "Driver": "shim", "KillTimeout": 5 * SECOND,
                "Config": {
                    "image": image, "command": "/bin/sh", "runtime": runtime,
                    // Nomad would replace `${...}`, but the script contains none.
                    "args": ["-c", format!("{COUNT}; {}", script(work))],
                },
                "Env": {"TASK": number.to_string(), MARK: format!("{namespace}/{number}/1")},
                "Resources": {"CPU": 20, "MemoryMB": 32},
                "LogConfig": {"MaxFiles": 2, "MaxFileSizeMB": 5},
            }],
        }],
    }})
}

#[test]
fn a_job_knows_its_task() {
    assert_eq!(number("test-1", &id("test-1", 12)), Some(12));
    assert_eq!(number("test-1", "test-12-3"), None);
    let lasting = |code| may_restart(Work::Batch { code, lines: 1, pause_ms: 0 });
    assert!(lasting(0) && !lasting(3) && may_restart(Work::Service));
}
