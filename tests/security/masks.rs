//! The parts of /proc and /sys that are hidden from a task, seen from inside: by its first process and by a process
//! that is run in it later, by every path that leads there.

use serde_json::json;

use crate::{runtimes, support::Env};

/// Paths that must show nothing: each path, and other paths to the same files.
const HIDDEN: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/1/root/proc/interrupts",
    "/proc/self/root/proc/interrupts",
    "/proc/thread-self/cwd/proc/interrupts",
    "/proc/self/task/1/root/proc/interrupts",
];

/// The processors' counters, by both paths to them.
const PROCESSORS: &str =
    "/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle /sys/bus/cpu/devices/cpu*/thermal_throttle";

/// Prints what can be read below each path.
fn script() -> String {
    format!(
        "for path in {} {PROCESSORS}; do
            found=$(find \"$path\" -type f 2>/dev/null | head -n 50 | xargs -r head -c 100 2>/dev/null; head -c 100 \"$path\" 2>/dev/null)
            [ -z \"$found\" ] || echo \"$path shows $found\"
        done; echo end",
        HIDDEN.join(" ")
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn masked_paths_show_nothing() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let config = env.shell(&format!("{}; sleep 600", script()), json!({})).await;
        let task = env.start(config).await;
        task.says("end\n").await;
        let shown = |text: &str| text.lines().filter(|line| *line != "end").map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(shown(&task.stdout.text()), [""; 0], "{runtime}");
        assert_eq!(shown(&env.exec_text(&task, &script()).await), [""; 0], "{runtime}, exec");
        // A task can't remove a mask, and no other mount of proc shows the files below it.
        let tries = "umount /proc/interrupts; umount -l /proc/interrupts; mount -t proc proc /mnt; mkdir -p /p && mount -t proc p /p; \
                     unshare -Urmp mount -t proc proc /mnt; cat /proc/interrupts /mnt/interrupts /p/interrupts 2>/dev/null; true";
        assert_eq!(env.exec_text(&task, &format!("({tries}) 2>/dev/null")).await, "", "{runtime}");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// A privileged task sees what the host sees.
#[tokio::test(flavor = "multi_thread")]
async fn privileged_tasks_see_everything() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"allow_privileged": true})).await;
        let script = "head -c 4096 /proc/interrupts; ls /sys/firmware";
        let config = env.shell(script, json!({"privileged": true})).await;
        let (code, out, err) = env.run(config).await;
        assert!(code == 0 && out.contains("CPU0") && out.lines().count() > 3, "{runtime}: {out} {err}");
        env.finish().await;
    }
}
