//! Jobs as Nomad's API takes them: one group of one task, and a policy by which its outcome is definite.

use serde_json::{Value, json};

use crate::{
    observe::MARK,
    step::{OciRuntime, TaskNumber, Work},
    task::script,
};

/// The task of each job.
pub(super) const TASK: &str = "t";
const SECOND: u64 = 1_000_000_000;
/// A task's attempts are counted by the task itself, from the lines that its starts have left, since Nomad tells it of none.
const COUNT: &str = "ATTEMPT=$(( $(cat /alloc/data/started-$TASK 2>/dev/null | wc -l) + 1 ))";

/// The id of a task's job.
pub(super) fn id(namespace: &str, number: TaskNumber) -> String {
    format!("{namespace}-{number}")
}

/// The task whose job has this id.
pub(super) fn number(namespace: &str, id: &str) -> Option<TaskNumber> {
    id.strip_prefix(namespace)?.strip_prefix('-')?.parse().ok()
}

/// May Nomad start the task again after a failure? A batch task that is to fail may not, or it would fail for ever.
pub(super) fn may_restart(work: Work) -> bool {
    !matches!(work, Work::Batch { code: 1.., .. })
}

/// What is registered.
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
        // A service without deployments, whose health checks are not what is tested.
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
                    // Nomad would replace `${...}`, of which there is none.
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
