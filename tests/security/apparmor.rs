//! AppArmor. The second boot of `make test-cgroup2` runs these tests on a kernel that has AppArmor. On any other host
//! the same tests check that the driver claims nothing: no task names a profile, and a job that asks for one is refused
//! with a reason.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nomad_driver_shim::{
    ids::random_hex,
    pb::{
        driver::{FingerprintRequest, FingerprintResponse, StopTaskRequest, fingerprint_response::HealthState},
        structs::attribute::Value as Attribute,
    },
    task::{AppArmorHost, AppArmorSupport},
};
use serde_json::{Value, json};

use crate::{
    image_with_program, runtimes,
    support::{Env, EnvOptions, Image, Task, eventually, patience, program, script, services, services::run},
};

/// Prints a process's own profile; prints `none` where the kernel has no AppArmor.
const LABEL: &str = "cat /proc/self/attr/apparmor/current 2>/dev/null || echo none";

/// Is AppArmor enabled on this host?
fn is_enabled() -> bool {
    AppArmorHost::default().support() == AppArmorSupport::Enabled
}

/// The label that a task has under this profile.
fn confined(profile: &str) -> String {
    if is_enabled() { format!("{profile} (enforce)\n") } else { "none\n".to_owned() }
}

/// The label that a task has without a profile.
fn unconfined() -> &'static str {
    if is_enabled() { "unconfined\n" } else { "none\n" }
}

/// A plugin called `name` with this configuration.
async fn plugin(name: &'static str, config: Value) -> Env {
    Env::with(EnvOptions { name, config, ..EnvOptions::default() }).await
}

/// Restarts the plugin with another `security` block. The image stays, because it is the part that takes time on an
/// emulated machine.
async fn restart(env: &mut Env, security: Value) {
    env.plugin.take().unwrap().shut_down().await;
    env.config["security"] = security;
    env.start_plugin().await;
}

/// Runs a task with these options to its end and returns its AppArmor label.
async fn label(env: &mut Env, options: Value) -> String {
    let config = env.shell(LABEL, options.clone()).await;
    let (code, out, err) = env.run(config).await;
    assert_eq!(code, 0, "{options}: {err}");
    out
}

/// Returns the reason for which a task with these options is refused.
async fn refusal(env: &mut Env, options: Value) -> String {
    let config = env.shell(LABEL, options.clone()).await;
    let mut task = env.prepare(config).await;
    let refused = env.try_start(&mut task).await.expect_err(&format!("{options} is started"));
    refused.message().to_owned()
}

async fn fingerprint(env: &Env) -> FingerprintResponse {
    let mut fingerprints = env.driver().fingerprint(FingerprintRequest {}).await.unwrap().into_inner();
    tokio::time::timeout(patience(), fingerprints.message()).await.unwrap().unwrap().unwrap()
}

/// The node's attribute `driver.NAME.apparmor`, of a healthy driver.
async fn attribute(env: &Env, name: &str) -> String {
    let fingerprint = fingerprint(env).await;
    assert_eq!(fingerprint.health, i32::from(HealthState::Healthy), "{}", fingerprint.health_description);
    match fingerprint.attributes[&format!("driver.{name}.apparmor")].value.clone() {
        Some(Attribute::StringVal(profile)) => profile,
        other => panic!("{other:?}"),
    }
}

/// Loads a profile with the real parser, under a name that no other test uses.
fn load(name: &str, rules: &str) {
    let path = crate::support::services::root().join(format!("profile-{}", random_hex(4)));
    fs::write(&path, format!("profile \"{name}\" flags=(attach_disconnected) {{ file, signal, network, {rules} }}\n"))
        .unwrap();
    run(Command::new("apparmor_parser").arg("-Kr").arg(path));
}

/// The `process` of a running task's OCI spec.
async fn process(env: &Env, task: &Task) -> Value {
    let container = env.attribute(task, "container_id").await;
    let config = fs::read(env.dir.join("run/bundles").join(container).join("config.json")).unwrap();
    serde_json::from_slice::<Value>(&config).unwrap()["process"].take()
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_and_what_is_execed_in_them_have_the_drivers_profile_and_take_signals() {
    let own = "nomad-driver-shim-shim";
    let mut env = plugin("shim", json!({"security": {"allow_caps": ["SYS_ADMIN"]}})).await;
    for runtime in runtimes() {
        let waits = "trap 'echo usr1' USR1; trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done";
        let options = json!({"runtime": runtime, "cap_add": ["SYS_ADMIN"]});
        let config = env.shell(&format!("{LABEL}; {waits}"), options).await;
        let task = env.start(config).await;
        task.says("ready").await;
        assert_eq!(task.stdout.text(), format!("{}ready\n", confined(own)), "{runtime}");
        assert_eq!(env.exec_text(&task, LABEL).await, confined(own), "{runtime}: exec");
        let named = process(&env, &task).await["apparmorProfile"].take();
        assert_eq!(named, if is_enabled() { json!(own) } else { Value::Null }, "{runtime}");

        // Neither the capabilities nor the system call filter prevents this mount.
        let mounted = env.exec_text(&task, "mkdir -p /m; mount -t tmpfs none /m 2>&1; echo $?").await;
        let expected = if is_enabled() { mounted.contains("ermission denied") } else { mounted == "0\n" };
        assert!(expected, "{runtime}: {mounted}");

        // The runtime and the shim send these signals, and the profile permits them.
        env.signal(&task, "SIGUSR1").await.unwrap();
        task.says("usr1").await;
        env.stop(&task, patience(), "").await.unwrap();
        assert_eq!(env.wait(&task).await.exit_code, 7, "{runtime}: SIGTERM");
        env.destroy(&task).await.unwrap();
        let stays = env.shell("trap '' TERM; echo ready; sleep 600", json!({"runtime": runtime})).await;
        let task = env.start(stays).await;
        task.says("ready").await;
        env.stop(&task, Duration::ZERO, "").await.unwrap();
        assert_eq!(env.wait(&task).await.exit_code, 137, "{runtime}: SIGKILL");
        env.destroy(&task).await.unwrap();
    }
    assert_eq!(attribute(&env, "shim").await, if is_enabled() { own } else { "unconfined" });
    env.finish().await;
}

/// Tries what the profile denies, as root with all capabilities and no system call filter, and prints one line with the
/// errno for each attempt. It writes nothing: it only opens and closes files. The first argument is a process outside
/// the task.
const ATTACK: &str = r#"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void tell(const char *what, long outcome) { printf("%s %d\n", what, outcome < 0 ? errno : 0); }

static void opened(const char *path, int flags) {
    int fd = open(path, flags);
    tell(path, fd);
    if (fd >= 0) close(fd);
}

int main(int count, char **words) {
    pid_t outside = count > 1 ? atoi(words[1]) : 0;
    mkdir("/t", 0700);
    tell("mount", mount("none", "/t", "tmpfs", 0, ""));
    tell("bind", mount("/t", "/t", NULL, MS_BIND, NULL));
    tell("remount", mount(NULL, "/proc", NULL, MS_REMOUNT | MS_BIND, NULL));
    tell("propagation", mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
    tell("socket alg", socket(38, SOCK_SEQPACKET, 0));
    tell("socket vsock", socket(40, SOCK_STREAM, 0));
#ifdef __x86_64__
    /* socketcall(SYS_SOCKET, {38, SOCK_SEQPACKET, 0}), which a filter of system calls can't look into. */
    unsigned *low = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    if (low != MAP_FAILED) {
        low[0] = 38; low[1] = SOCK_SEQPACKET; low[2] = 0;
        int answer;
        __asm__ volatile("int $0x80" : "=a"(answer) : "a"(102), "b"(1), "c"(low) : "memory", "r8", "r9", "r10", "r11");
        if (answer < 0) { errno = -answer; answer = -1; }
        tell("socketcall alg", answer);
    }
#endif
    tell("socket inet", socket(AF_INET, SOCK_STREAM, 0));
    tell("socket unix", socket(AF_UNIX, SOCK_STREAM, 0));
    opened("/proc/sysrq-trigger", O_WRONLY);
    opened("/proc/sys/kernel/core_pattern", O_WRONLY);
    opened("/proc/sys/kernel/sysrq", O_WRONLY);
    opened("/proc/sys/vm/overcommit_memory", O_WRONLY);
    opened("/proc/irq/default_smp_affinity", O_WRONLY);
    opened("/proc/sys/kernel/shmmax", O_WRONLY);
    opened("/proc/self/oom_score_adj", O_WRONLY);
    opened("/proc/1/../sys/kernel/modprobe", O_WRONLY);
    opened("/proc/thread-self/../../../../sys/kernel/hotplug", O_WRONLY);
    opened("/sys/kernel/mm/transparent_hugepage/enabled", O_WRONLY);
    opened("/sys/module/overlay/parameters/metacopy", O_WRONLY);
    opened("/etc/hosts", O_RDWR);
    if (outside > 0) {
        tell("seize outside", ptrace(PTRACE_SEIZE, outside, 0, 0));
        tell("signal outside", kill(outside, SIGCONT));
    }
    pid_t child = fork();
    if (child == 0) { pause(); _exit(0); }
    tell("seize child", ptrace(PTRACE_SEIZE, child, 0, 0));
    tell("signal child", kill(child, SIGKILL));
    waitpid(child, NULL, 0);
    return 0;
}
"#;

/// Runs the attack and returns each attempt's errno, or 0 for success.
async fn attacked(env: &mut Env, image: &str, outside: u32, options: Value) -> std::collections::BTreeMap<String, i32> {
    let mut config = json!({
        "image": image, "command": "/attack", "args": [outside.to_string()], "privileged": true, "pid_mode": "host",
    });
    options.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    let (code, out, err) = env.run(config).await;
    assert_eq!(code, 0, "{out}{err}");
    let lines = out.lines().map(|line| line.rsplit_once(' ').unwrap());
    lines.map(|(what, errno)| (what.to_owned(), errno.parse().unwrap())).collect()
}

/// A privileged task has no other protection: no system call filter, no read-only paths, all capabilities, and the
/// host's processes are visible. The profile denies it what a container's root must not do; without the profile all of
/// it is permitted.
#[tokio::test(flavor = "multi_thread")]
async fn the_profile_denies_what_nothing_else_does() {
    let image = image_with_program("apparmor", ATTACK).await;
    let mut outside = Command::new("sleep").arg("600").spawn().unwrap();
    let config = json!({"allow_privileged": true, "security": {"allow_host_namespaces": true}});
    let mut env = plugin("shim", config).await;
    for runtime in runtimes() {
        let open = attacked(&mut env, &image, outside.id(), json!({"runtime": runtime})).await;
        for (what, errno) in &open {
            // A kernel without these features has nothing to protect.
            let absent = [libc::ENOENT, libc::EAFNOSUPPORT, libc::ENOSYS].contains(errno);
            assert!(*errno == 0 || absent, "{runtime}: unconfined, {what}: {errno}");
        }
        let asked = json!({"runtime": runtime, "security_opt": ["apparmor=default"]});
        if is_enabled() {
            let closed = attacked(&mut env, &image, outside.id(), asked).await;
            let fine =
                ["socket inet", "socket unix", "/proc/sys/kernel/shmmax", "/proc/self/oom_score_adj", "/etc/hosts"];
            let fine = [&fine[..], &["seize child", "signal child"]].concat();
            for (what, errno) in &closed {
                let expected = if fine.contains(&what.as_str()) { 0 } else { libc::EACCES };
                assert!(
                    *errno == expected || *errno == libc::ENOENT && open[what] == libc::ENOENT,
                    "{runtime}: {what}: {errno}, not {expected}\n{closed:?}"
                );
            }
            for what in [
                "mount",
                "bind",
                "socket alg",
                "socket vsock",
                "/proc/sysrq-trigger",
                "seize outside",
                "signal outside",
            ] {
                assert_eq!(closed[what], libc::EACCES, "{runtime}: {what}");
            }
        } else {
            let refused = refusal(&mut env, asked).await;
            assert!(refused.contains("security_opt: ") && refused.contains("AppArmor is not enabled"), "{refused}");
        }
    }
    env.finish().await;
    outside.kill().unwrap();
    outside.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn another_profile_is_for_the_operator_to_allow() {
    let theirs = format!("nds-test-{}", random_hex(4));
    let opt = |option: &str| json!({"security_opt": [option]});
    let mut env = plugin("shim", json!({"allow_privileged": true})).await;
    for option in
        ["apparmor=unconfined", "apparmor:unconfined", "apparmor=docker-default", "apparmor=nomad-driver-shim-shim"]
    {
        let refused = refusal(&mut env, opt(option)).await;
        assert!(refused.contains(&format!("{option:?}")) && refused.contains("allow_apparmor_override"), "{refused}");
    }

    restart(&mut env, json!({"allow_apparmor_override": true})).await;
    assert_eq!(label(&mut env, json!({})).await, confined("nomad-driver-shim-shim"));
    assert_eq!(label(&mut env, opt("apparmor=unconfined")).await, unconfined());
    assert_eq!(label(&mut env, json!({"privileged": true})).await, unconfined());
    let refused = refusal(&mut env, opt(&format!("apparmor={theirs}"))).await;
    let why = if is_enabled() { "is not loaded on this node" } else { "AppArmor is not enabled" };
    for part in ["security_opt: ", &format!("{theirs:?}"), why] {
        assert!(refused.contains(part), "{part:?} in {refused}");
    }
    // Names that the kernel would not read as the name of one profile.
    let stacked = "nomad-driver-shim-shim//&unconfined";
    for odd in ["&unconfined", stacked, ":ns:unconfined", "a\nb", "a\0b", " unconfined", ""] {
        let refused = refusal(&mut env, opt(&format!("apparmor={odd}"))).await;
        assert!(refused.contains("is not the name of an AppArmor profile"), "{odd:?}: {refused}");
    }
    if is_enabled() {
        load(&theirs, "");
        let both = json!({"privileged": true, "security_opt": [format!("apparmor={theirs}")]});
        assert_eq!(label(&mut env, both).await, confined(&theirs));
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operators_word_holds_for_tasks_that_say_nothing() {
    let theirs = format!("nds-test-{}", random_hex(4));
    let mut env = plugin("shim", json!({"security": {"apparmor": "unconfined"}})).await;
    assert_eq!(label(&mut env, json!({})).await, unconfined());
    assert_eq!(attribute(&env, "shim").await, "unconfined");

    // The profile is not loaded: tasks fail, and the node's health description says why.
    restart(&mut env, json!({"apparmor": theirs})).await;
    let refused = refusal(&mut env, json!({})).await;
    assert!(refused.contains("security.apparmor: ") && refused.contains(&format!("{theirs:?}")), "{refused}");
    let looked = fingerprint(&env).await;
    assert_eq!(looked.health, i32::from(HealthState::Unhealthy));
    assert!(looked.health_description.contains(&theirs), "{}", looked.health_description);
    if is_enabled() {
        load(&theirs, "");
        assert_eq!(label(&mut env, json!({})).await, confined(&theirs));
        assert_eq!(attribute(&env, "shim").await, theirs);
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn under_the_old_name_tasks_are_unconfined_until_somebody_asks() {
    let own = confined("nomad-driver-shim-containerd-driver");
    let mut env = plugin("containerd-driver", json!({})).await;
    assert_eq!(label(&mut env, json!({})).await, unconfined());
    if is_enabled() {
        assert_eq!(label(&mut env, json!({"security_opt": ["apparmor=default"]})).await, own);
    }
    restart(&mut env, json!({"apparmor": "default"})).await;
    if is_enabled() {
        assert_eq!(label(&mut env, json!({})).await, own);
    } else {
        // The operator has asked for the profile by name, so no task runs without it.
        let refused = refusal(&mut env, json!({})).await;
        assert!(refused.contains("security.apparmor: ") && refused.contains("AppArmor is not enabled"), "{refused}");
    }
    env.finish().await;
}

/// A profile changes while tasks run: another program replaces it, the next plugin loads it again, or it is unloaded.
#[tokio::test(flavor = "multi_thread")]
async fn a_profile_is_refreshed_by_the_next_plugin_and_loaded_again_when_it_is_gone() {
    let own = "nomad-driver-shim-replaced";
    let mut env = plugin("replaced", json!({})).await;
    let config = env.shell("echo ready; sleep 600", json!({})).await;
    let task = env.start(config).await;
    task.says("ready").await;
    assert_eq!(env.exec_text(&task, LABEL).await, confined(own));
    if is_enabled() {
        load(own, "deny /etc/hosts r,");
        let answer = env.exec(&task, &["/bin/cat", "/etc/hosts"], 0).await.unwrap();
        assert_ne!(answer.result.unwrap().exit_code, 0, "a replaced profile holds for running tasks");
    }
    // The next plugin recovers the task, and loads the driver's own profile again.
    restart(&mut env, json!({})).await;
    env.recover(&task).await.unwrap();
    eventually("the profile is the driver's again", async || {
        let answer = env.exec(&task, &["/bin/cat", "/etc/hosts"], 0).await.unwrap();
        if answer.result.unwrap().exit_code == 0 { Ok(()) } else { Err(answer.stderr) }
    })
    .await;
    assert_eq!(env.exec_text(&task, LABEL).await, confined(own));
    if is_enabled() {
        fs::write("/sys/kernel/security/apparmor/.remove", own).unwrap();
        assert!(!AppArmorHost::default().loaded().unwrap().iter().any(|loaded| loaded == own));
        // Running tasks lose the profile, which the driver can't prevent. An exec in such a task is refused instead of
        // running unconfined.
        let answer = env.exec(&task, &["/bin/true"], 0).await;
        assert!(answer.is_err() || answer.unwrap().result.unwrap().exit_code != 0);
    }
    assert_eq!(label(&mut env, json!({})).await, confined(own), "never without it");
    assert_eq!(env.exec_text(&task, LABEL).await, confined(own));
    assert_eq!(env.exec_text(&task, &LABEL.replace("self", "1")).await, unconfined(), "the profile is lost for good");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// A directory with the programs that a plugin needs, without `apparmor_parser`.
fn path_without_parser() -> PathBuf {
    let bin = crate::support::services::root().join(format!("bin-{}", random_hex(4)));
    fs::create_dir_all(&bin).unwrap();
    for name in ["containerd-shim-runc-v2", "crun", "runc"] {
        let path = nomad_driver_shim::task::which(Path::new(name)).unwrap();
        std::os::unix::fs::symlink(path, bin.join(name)).unwrap();
    }
    bin
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_parser_or_with_one_that_fails_nobody_is_deceived() {
    let bin = path_without_parser();
    let path = vec![("PATH".to_owned(), bin.to_str().unwrap().to_owned())];
    let config = json!({"allow_privileged": true});
    let mut env = Env::with(EnvOptions { name: "parserless", env: path, config, ..EnvOptions::default() }).await;
    // The driver follows docker's rule: a host without a parser counts as a host without AppArmor. A log line reports
    // it to the operator.
    assert_eq!(label(&mut env, json!({})).await, unconfined());
    assert_eq!(attribute(&env, "parserless").await, "unconfined");
    assert_eq!(env.plugin().stderr().contains("apparmor_parser is not installed"), is_enabled());
    // A job that asks for the profile by name does not run without it.
    let refused = refusal(&mut env, json!({"security_opt": ["apparmor=default"]})).await;
    let why = if is_enabled() { "apparmor_parser is not in the plugin's PATH" } else { "AppArmor is not enabled" };
    assert!(refused.contains(why), "{refused}");

    let calls = bin.join("calls");
    let fails = format!("echo \"$*\" >> {}; echo 'no such rule' >&2; exit 3", calls.display());
    script(&bin.join("apparmor_parser"), &fails);
    restart(&mut env, json!({})).await;
    if is_enabled() {
        let refused = refusal(&mut env, json!({})).await;
        for part in ["security.apparmor: ", "nomad-driver-shim-parserless", "no such rule", "apparmor = \"unconfined\""]
        {
            assert!(refused.contains(part), "{part:?} in {refused}");
        }
        let looked = fingerprint(&env).await;
        assert_eq!(looked.health, i32::from(HealthState::Unhealthy));
        assert!(looked.health_description.contains("no such rule"), "{}", looked.health_description);
        assert_eq!(label(&mut env, json!({"privileged": true})).await, unconfined());
        // The plugin does not run the parser again for each start.
        assert_eq!(fs::read_to_string(&calls).unwrap(), "-Kr\n");
    } else {
        assert_eq!(label(&mut env, json!({})).await, unconfined());
        assert!(!calls.exists(), "a kernel without AppArmor is not given profiles");
    }
    env.finish().await;
}

/// A start that waits for the profile can be stopped, and a plugin that exits ends its parser as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_parser_that_hangs_holds_up_neither_a_stop_nor_the_plugins_end() {
    let bin = path_without_parser();
    let calls = bin.join("calls");
    script(&bin.join("apparmor_parser"), &format!("echo $$ >> {}; exec /bin/sleep 600", calls.display()));
    let path = vec![("PATH".to_owned(), bin.to_str().unwrap().to_owned())];
    // The image is pushed first: the plugin gives its parser half a minute, and on an emulated machine the push takes a
    // good part of that time.
    let image = Image::busybox().push(&services().registry, "test/busybox:1").await;
    let mut env = Env::with(EnvOptions { name: "hanging", env: path, ..EnvOptions::default() }).await;
    if is_enabled() {
        let mut task = env.prepare(json!({"image": image, "command": "/bin/true"})).await;
        let stop = StopTaskRequest { task_id: task.id.clone(), timeout: None, signal: String::new() };
        let stopping = async {
            // A stop that arrives before the plugin knows the start succeeds and changes nothing.
            loop {
                env.driver().stop_task(stop.clone()).await.unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let started = tokio::select! {
            started = env.try_start(&mut task) => started,
            () = stopping => unreachable!(),
        };
        let error = started.expect_err("there is no profile");
        assert!(error.message().contains("was stopped while it was being started"), "{error}");
        let looked = fingerprint(&env).await;
        assert_eq!(looked.health, i32::from(HealthState::Unhealthy), "{}", looked.health_description);
    } else {
        assert_eq!(label(&mut env, json!({})).await, unconfined());
    }
    env.finish().await;
    let parsers = fs::read_to_string(&calls).unwrap_or_default();
    assert_eq!(parsers.lines().count(), usize::from(is_enabled()));
    eventually("the parser is gone", async || {
        let left: Vec<_> = parsers.lines().filter(|pid| Path::new("/proc").join(pid).exists()).collect();
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_says_what_there_is() {
    let doctor = |path: Option<PathBuf>| {
        let mut command = Command::new(program());
        command.args(["doctor", "--json"]);
        if let Some(path) = path {
            command.env("PATH", path);
        }
        let findings: Vec<Value> = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
        let finding = findings.into_iter().find(|finding| finding["what"] == "AppArmor").unwrap();
        (finding["verdict"].as_str().unwrap().to_owned(), finding["detail"].as_str().unwrap().to_owned())
    };
    let (verdict, detail) = doctor(None);
    let bare = path_without_parser();
    if is_enabled() {
        assert!(verdict == "ok" && detail.contains("apparmor_parser"), "{verdict} {detail}");
        let (verdict, detail) = doctor(Some(bare));
        assert!(verdict == "note" && detail.contains("install apparmor"), "{verdict} {detail}");
    } else {
        assert!(verdict == "note" && detail.contains("not enabled"), "{verdict} {detail}");
    }
}
