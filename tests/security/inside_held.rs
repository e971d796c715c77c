//! The rights and surroundings of a task, seen from inside: system calls, kernel files, capabilities, descriptors, and
//! the secrets of others that it could find. The same holds for a process that `nomad alloc exec` runs in the task.

use std::{
    collections::BTreeMap,
    fs,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            fs::MetadataExt as _,
            net::{SocketAddr, UnixListener},
        },
    },
    path::Path,
};

use nomad_driver_shim::ids::random_hex;
use serde_json::{Value, json};

use crate::{
    image_with_program, runtimes,
    support::{Env, EnvOptions, Task, eventually, with_options},
};

/// The errors of a call that a confined task may not make.
const REFUSED: [&str; 2] = ["EPERM", "ENOSYS"];

/// Kernel files that a task may not write to. The test only opens them for writing.
const READ_ONLY: &str = "/proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe /proc/sys/kernel/domainname \
    /proc/sys/vm/drop_caches /proc/sys/vm/overcommit_memory /proc/sys/fs/suid_dumpable /proc/sysrq-trigger \
    /proc/irq/default_smp_affinity /sys/kernel/uevent_helper /sys/kernel/mm/transparent_hugepage/enabled \
    /sys/power/state /sys/module/overlay/parameters/index";
/// Kernel files and directories that reveal facts about the host.
const MASKED: &str = "/proc/kcore /proc/keys /proc/timer_list /proc/acpi /proc/scsi /proc/asound /proc/sched_debug \
    /sys/firmware /sys/devices/virtual/powercap";

/// Runs the program of inside_held.c and returns its answers by the names of the calls.
async fn calls(env: &mut Env, image: &str, options: &Value) -> BTreeMap<String, String> {
    let config = with_options(json!({"image": image, "command": "/attack"}), options.clone());
    let (code, out, err) = env.run(config).await;
    assert_eq!(code, 0, "{err}");
    out.lines().filter_map(|line| line.rsplit_once(' ')).map(|(name, answer)| (name.into(), answer.into())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_reach_the_host_are_refused() {
    let image = image_with_program("inside", include_str!("inside_held.c")).await;
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"allow_privileged": true})).await;
        let confined = calls(&mut env, &image, &json!({})).await;
        assert!(confined.len() > 30, "{confined:?}");
        let open: Vec<_> = confined.iter().filter(|(_, answer)| !REFUSED.contains(&answer.as_str())).collect();
        assert!(open.is_empty(), "{runtime}: {open:?}");
        // Control test: without the confinement many of these calls succeed, or fail for another reason.
        let privileged = calls(&mut env, &image, &json!({"privileged": true})).await;
        let open = privileged.values().filter(|answer| !REFUSED.contains(&answer.as_str())).count();
        assert!(open > 15, "{runtime}: {privileged:?}");
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kernel_files_are_read_only_or_masked() {
    let script = format!(
        "for file in {READ_ONLY}; do [ -e $file ] && (: >> $file) 2>/dev/null && echo write $file; done; \
         for file in {MASKED}; do [ -d $file ] && [ -n \"$(ls $file)\" ] && echo read $file; \
             [ -f $file ] && [ -n \"$(head -c 8 $file | od -c)\" ] && echo read $file; done; \
         grep -v '^0*0 ' /proc/kallsyms | head -n 1 | sed 's/^/symbol /'; awk '$3 ~ /^cgroup/ && $4 ~ /^rw/ {{ print \"writable\", $2 }}' /proc/mounts; \
         find /sys/fs/cgroup -name release_agent | sed 's/^/root cgroup /'; \
         for node in /dev/*; do [ -b $node ] && echo disk $node; done; echo looked"
    );
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"allow_privileged": true})).await;
        let config = env.shell(&script, json!({})).await;
        let (_, out, err) = env.run(config.clone()).await;
        assert_eq!(out, "looked\n", "{runtime}: {err}");
        let task = env.start(env.shell("sleep 600", json!({})).await).await;
        assert_eq!(env.exec_text(&task, &script).await, "looked\n", "{runtime}, exec");
        env.destroy(&task).await.unwrap();
        // Control test: without the confinement all kinds of them are found.
        let config = env.shell(&script, json!({"privileged": true})).await;
        let (_, out, _) = env.run(config).await;
        for kind in ["write ", "read ", "symbol ", "disk "] {
            assert!(out.contains(kind), "{runtime}: no {kind:?} in {out}");
        }
        env.finish().await;
    }
}

/// Prints the lines of `/proc/self/status` that show what a process may do.
const CONFINED: &str =
    "grep -E '^(Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs|Seccomp):' /proc/self/status | tr -s '\\t\\n' '  '";

#[tokio::test(flavor = "multi_thread")]
async fn capabilities_and_descriptors_are_the_least_for_init_and_exec() {
    // The capabilities chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service,
    // sys_chroot, mknod, audit_write and setfcap: docker's set without net_raw.
    let docker = "00000000a80405fb";
    let docker = format!("{:016x}", u64::from_str_radix(docker, 16).unwrap());
    let root = format!(
        "CapInh: 0000000000000000 CapPrm: {docker} CapEff: {docker} CapBnd: {docker} CapAmb: 0000000000000000 NoNewPrivs: 1 Seccomp: 2 "
    );
    let user =
        root.replace(&format!("Prm: {docker} CapEff: {docker}"), "Prm: 0000000000000000 CapEff: 0000000000000000");
    // Lists the shell's own descriptors. A pipe in the script would add a descriptor.
    let look = format!("{CONFINED}; echo; ulimit -c; for fd in /proc/$$/fd/*; do readlink $fd; done; echo end");
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"allow_privileged": true})).await;
        let dir = env.dir.display().to_string();
        for (name, expected) in [("root", &root), ("user", &user)] {
            let config = env.shell(&format!("{look}; exec sleep 600"), json!({})).await;
            let mut task = env.prepare(config).await;
            task.config.user = name.to_owned();
            env.try_start(&mut task).await.unwrap();
            task.says("end\n").await;
            let later = env.exec_text(&task, "for fd in /proc/1/fd/*; do readlink $fd; done; true").await;
            assert_eq!(later.lines().count(), 3, "{runtime}, {name}: {later}");
            for said in [task.stdout.text(), env.exec_text(&task, &look).await] {
                let lines: Vec<&str> = said.lines().collect();
                // The process's rights, no core files, and three descriptors.
                assert_eq!((lines[0], lines[1], lines.len()), (expected.as_str(), "0", 6), "{runtime}, {name}: {said}");
                assert!(!said.contains(&dir), "{runtime}, {name}: {said}");
            }
            env.destroy(&task).await.unwrap();
        }
        // Control test: a privileged task has more capabilities.
        let config = env.shell(&look, json!({"privileged": true})).await;
        assert!(!env.run(config).await.1.contains(&docker), "{runtime}");
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_does_not_protect_itself_nor_end_by_its_own_exec() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let task = env.start(env.shell("sleep 600", json!({})).await).await;
        let lower = "for score in -1000 -999 -1; do (echo $score > /proc/self/oom_score_adj) 2>/dev/null && echo lowered; done; \
             (echo -1000 > /proc/1/oom_score_adj) 2>/dev/null && echo lowered; cat /proc/1/oom_score_adj";
        assert_eq!(env.exec_text(&task, lower).await, "0\n", "{runtime}");
        // Control test: a process may raise its own score.
        let raise = "echo 500 > /proc/self/oom_score_adj; cat /proc/self/oom_score_adj";
        // The driver sets the score when the process runs already, so it may overwrite this value.
        eventually("a process raises its own score", async || {
            let score = env.exec_text(&task, raise).await;
            if score == "500\n" { Ok(()) } else { Err(score) }
        })
        .await;
        // pid_namespaces(7): an init process gets from inside its namespace only the signals that it handles.
        assert_eq!(env.exec_text(&task, "kill -9 1; kill -9 -1; echo alive").await, "alive\n", "{runtime}");
        assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n", "{runtime}");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// The pids of the plugin and its shims.
fn processes(env: &Env) -> Vec<u32> {
    let shims = env.dir.join("run/shims");
    let is_shim = |pid: &u32| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&shims));
    let mut pids: Vec<u32> = nomad_driver_shim::process::all_pids().unwrap().into_iter().filter(is_shim).collect();
    pids.push(env.plugin().pid().unwrap());
    pids
}

/// The abstract sockets of a process. Every process in the same network namespace can connect to one (CVE-2020-15257).
fn abstract_sockets(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    let own: Vec<String> =
        links.filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())).collect();
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    let rows = table.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let named = rows.filter(|row| row.len() > 7 && row[7].starts_with('@') && own.iter().any(|inode| inode == row[6]));
    named.map(|row| row[7].to_owned()).collect()
}

/// The files below a directory that contain a text, with their modes.
fn files_with(dir: &Path, text: &str) -> Vec<(String, u32)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, metadata) = (entry.path(), entry.metadata().unwrap());
        if metadata.is_dir() && !path.ends_with("rootfs") && !path.ends_with("mounts") {
            found.extend(files_with(&path, text));
        } else if metadata.is_file() && String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).contains(text) {
            found.push((path.display().to_string(), metadata.mode() & 0o7777));
        }
    }
    found
}

/// Starts a task with a secret of its job in its environment.
async fn task_with_secret(env: &mut Env, secret: &str) -> Task {
    let config = env.shell("env; sleep 600", json!({})).await;
    let mut task = env.prepare(config).await;
    task.config.env.insert("TOKEN".to_owned(), secret.to_owned());
    env.try_start(&mut task).await.unwrap();
    task.says(secret).await;
    task
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_stay_where_they_belong() {
    let (of_the_agent, of_the_job) = (format!("agent-{}", random_hex(8)), format!("job-{}", random_hex(8)));
    for runtime in runtimes() {
        let config = json!({"default_runtime": runtime});
        let mut env = EnvOptions::default().config(config).var("AGENT_TOKEN", &of_the_agent).start().await;
        let task = task_with_secret(&mut env, &of_the_job).await;
        assert!(!task.stdout.text().contains(&of_the_agent), "{runtime}: the agent's environment is the task's");
        let plugin = env.plugin().pid().unwrap();
        // A process that the plugin has just forked is a copy of the plugin until it executes its program.
        let command = |pid: u32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        eventually("all processes have executed their programs", async || {
            let is_copy = |pid: &u32| *pid != plugin && command(*pid) == command(plugin);
            let copies: Vec<u32> = processes(&env).into_iter().filter(is_copy).collect();
            if copies.is_empty() { Ok(()) } else { Err(copies) }
        })
        .await;
        let processes = processes(&env);
        assert!(processes.len() >= 2, "{processes:?}");
        for pid in processes {
            let read =
                |file: &str| String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/{file}")).unwrap()).into_owned();
            let seen = format!("{}{}", read("environ"), read("cmdline"));
            assert!(!seen.contains(&of_the_job), "{runtime}, {pid}: {seen}");
            assert_eq!(seen.contains(&of_the_agent), pid == plugin, "{runtime}, {pid}: {seen}");
            assert_eq!(abstract_sockets(pid), Vec::<String>::new(), "{runtime}, {pid}");
        }
        // The secret is on disk only where root alone can read it, and is not in the log.
        let mut files = files_with(&env.dir.join("run"), &of_the_job);
        files.extend(files_with(&env.dir.join("state"), &of_the_job));
        assert!(!files.is_empty(), "the probe is none: not even config.json has the secret");
        let closed = |path: &str, mode: u32| mode & 0o077 == 0 || path.contains("/run/runtimes/");
        assert!(files.iter().all(|(path, mode)| closed(path, *mode)), "{runtime}: {files:?}");
        assert!(!env.plugin().stderr().contains(&of_the_job), "{runtime}: in the log");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
    // Control test: an abstract socket of this process is found.
    let name = format!("held-{}", random_hex(4));
    let _listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    assert!(abstract_sockets(std::process::id()).contains(&format!("@{name}")));
}
