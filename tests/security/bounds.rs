//! Limits on what a task may use of its host: processes, file systems in memory, limits of setrlimit(2). A job that
//! asks for more than the operator allows is refused with the option's name, and what a job gets is charged to its
//! task.

use std::{fs, process::Command};

use serde_json::{Value, json};

use crate::{image_with_program, runtimes, support};
use support::{Env, EnvOptions, Task, program};

/// Returns the reason for which a job with these options is refused.
async fn refused(env: &mut Env, options: Value) -> String {
    let config = env.shell("true", options.clone()).await;
    let mut task = env.prepare(config).await;
    match env.try_start(&mut task).await {
        Err(status) => status.message().to_owned(),
        Ok(()) => panic!("{options} was taken"),
    }
}

/// Reads a file of a task's cgroup, on cgroup v1 or v2.
async fn cgroup_file(env: &Env, task: &Task, controller: &str, name: &str) -> String {
    let cgroup = env.record(task).await.1["cgroup"].as_str().unwrap().to_owned();
    let (v1, v2) = (format!("/sys/fs/cgroup/{controller}{cgroup}/{name}"), format!("/sys/fs/cgroup{cgroup}/{name}"));
    let text = fs::read_to_string(&v1).or_else(|_| fs::read_to_string(&v2)).unwrap_or_else(|_| panic!("{v1}, {v2}"));
    text.trim().to_owned()
}

/// A shell function that prints a mount point's options from the task's own mountinfo.
const MOUNT_OPTIONS: &str = r#"options() { awk -v at="$1" '$5 == at { print $6 }' /proc/self/mountinfo; };"#;

/// A job without an option for processes has a limit all the same. The limit also holds for processes that are run in
/// the task later.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_says_nothing_has_a_limit_of_processes() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let config = env.shell("exec sleep 600", json!({})).await;
        let task = env.start(config).await;
        assert_eq!(cgroup_file(&env, &task, "pids", "pids.max").await, "2048", "{runtime}");
        // The default leaves room for a service of many processes.
        let threads =
            env.exec_text(&task, "for i in $(seq 100); do sleep 600 & done; jobs | wc -l; kill $(jobs -p)").await;
        assert_eq!(threads.trim(), "100", "{runtime}");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// The operator's limit holds for forked processes, threads and exec'd processes alike.
#[tokio::test(flavor = "multi_thread")]
async fn neither_forks_nor_threads_nor_execs_pass_the_operators_limit() {
    let threads = r#"#include <pthread.h>
        #include <stdio.h>
        #include <unistd.h>
        static void *wait_for_the_end(void *unused) { pause(); return unused; }
        int main(void) {
            int count = 0;
            pthread_t thread;
            while (count < 200 && pthread_create(&thread, NULL, wait_for_the_end, NULL) == 0) count++;
            printf("threads %d\n", count);
            fflush(stdout);
            pause();
        }"#;
    let image = image_with_program("threads", threads).await;
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"pids_limit": 40})).await;
        let script = "for i in $(seq 80); do sleep 600 & done 2>/dev/null; jobs | wc -l";
        let config = env.shell(script, json!({})).await;
        let (_, out, err) = env.run(config).await;
        assert!(out.trim().parse::<u32>().unwrap_or(0) < 40, "{runtime}: {out} {err}");

        let task = env.start(json!({"image": image, "command": "/attack"})).await;
        task.says("threads ").await;
        let count: u32 = task.stdout.text().trim().trim_start_matches("threads ").parse().unwrap();
        assert!(count < 40, "{runtime}: {count} threads");
        // The task has used up its limit: neither a process that is run in the task nor its children fit in.
        let exec = env.exec(&task, &["/bin/sh", "-c", "sleep 1 & sleep 1 & wait; echo ran"], 0).await;
        let ran = exec.as_ref().is_ok_and(|answer| answer.stdout == b"ran\n" && answer.stderr.is_empty());
        assert!(!ran, "{runtime}: {exec:?}");
        assert_eq!(cgroup_file(&env, &task, "pids", "pids.max").await, "40", "{runtime}");
        env.destroy(&task).await.unwrap();

        for limit in [41, 0, -1, i64::MAX] {
            let error = refused(&mut env, json!({"pids_limit": limit})).await;
            assert!(error.contains(&format!("pids_limit = {limit} ")), "{runtime}: {error}");
            assert!(error.contains("40") && error.contains("plugin option pids_limit"), "{runtime}: {error}");
        }
        let config = env.shell("exec sleep 600", json!({"pids_limit": 20})).await;
        let task = env.start(config).await;
        assert_eq!(cgroup_file(&env, &task, "pids", "pids.max").await, "20", "{runtime}");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// The operator may switch the limit off. Under the name `containerd-driver` there is no limit by default.
#[tokio::test(flavor = "multi_thread")]
async fn there_is_no_limit_of_processes_where_the_operator_wants_none() {
    let open = EnvOptions { config: json!({"pids_limit": 0}), ..EnvOptions::default() };
    let old = EnvOptions { name: "containerd-driver", ..EnvOptions::default() };
    for options in [open, old] {
        let mut env = Env::with(options).await;
        for job in [json!({}), json!({"pids_limit": -1})] {
            let config = env.shell("exec sleep 600", job).await;
            let task = env.start(config).await;
            assert_eq!(cgroup_file(&env, &task, "pids", "pids.max").await, "max");
            env.destroy(&task).await.unwrap();
        }
        env.finish().await;
    }
}

/// A job's tmpfs permits neither set-user-id programs nor devices, unless the job asks for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_tmpfs_has_neither_devices_nor_set_user_id_programs() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let tmpfs = |target: &str, options: &[&str]| json!({"type": "tmpfs", "target": target, "options": options});
        let mounts = json!([
            tmpfs("/closed", &[]),
            tmpfs("/sized", &["size=1m,mode=755"]),
            tmpfs("/open", &["suid", "dev"]),
            {"type": "tmpfs", "target": "/bare"},
        ]);
        // The device numbers of /dev/null, which the device cgroup lets every task open.
        let script = format!(
            "{MOUNT_OPTIONS} for at in /closed /sized /open /bare; do
                mknod $at/null c 1 3; (: > $at/null) 2>/dev/null && device=opened || device=refused;
                echo $at $(options $at) $device; done"
        );
        let config = env.shell(&script, json!({"mounts": mounts})).await;
        let (code, out, err) = env.run(config).await;
        assert_eq!(code, 0, "{runtime}: {err}");
        for line in out.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [at, options, device] = words[..] else { panic!("{runtime}: {out}") };
            let options: Vec<&str> = options.split(',').collect();
            let closed = options.contains(&"nosuid") && options.contains(&"nodev") && device == "refused";
            assert_eq!(closed, at != "/open", "{runtime}: {line}");
        }
        assert_eq!(out.lines().count(), 4, "{runtime}: {out}");
        env.finish().await;
    }
}

/// Sizes that are larger than the host could ever provide are refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_file_systems_in_memory_are_bounded() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        for option in
            ["size=100%", "size=900t", "size=0", "nr_blocks=0", "nr_inodes=0", "mode=700,size=100%", "nr_inodes=900t"]
        {
            let mounts = json!([{"type": "tmpfs", "target": "/t", "options": [option]}]);
            let error = refused(&mut env, json!({"mounts": mounts})).await;
            let named = option.trim_start_matches("mode=700,");
            assert!(error.contains("mounts[0].options") && error.contains(named), "{runtime}: {error}");
            assert!(error.contains("tmpfs_max"), "{runtime}: {error}");
        }
        // The kernel would read these sizes as other numbers than a person does, or parts of them as further options.
        for option in ["size=010m", "size=0x1000000", "size=1m,huge=always", "size=1m,context=x", "size=1m,mpol=local"]
        {
            let mounts = json!([{"type": "tmpfs", "target": "/t", "options": [option]}]);
            let error = refused(&mut env, json!({"mounts": mounts})).await;
            assert!(error.contains("mounts[0].options"), "{runtime}: {error}");
        }
        for size in ["999999g", "99999t"] {
            let error = refused(&mut env, json!({"shm_size": size})).await;
            assert!(error.contains("shm_size") && error.contains(size), "{runtime}: {error}");
        }
        env.finish().await;

        let mut env = Env::with_runtime(&runtime, json!({"security": {"tmpfs_max": "8m"}})).await;
        let error = refused(&mut env, json!({"shm_size": "9m"})).await;
        assert!(error.contains("\"9m\" is above 8 MiB"), "{runtime}: {error}");
        // A tmpfs without a size option has the ceiling as its size, too.
        let mounts = json!([{"type": "tmpfs", "target": "/t"}]);
        let script = "for at in /t /dev/shm; do df -k $at | tail -1 | awk '{print $2}'; done";
        let config = env.shell(script, json!({"mounts": mounts})).await;
        assert_eq!(env.run(config).await.1, "8192\n8192\n", "{runtime}");
        env.finish().await;
    }
}

/// The contents of a tmpfs are charged to the task's memory: the pages, and the inodes of files without pages.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_tmpfs_holds_counts_to_its_task() {
    let fill = r#"#include <fcntl.h>
        #include <stdio.h>
        #include <string.h>
        #include <unistd.h>
        static char page[65536];
        int main(int argc, char **argv) {
            if (argc > 1 && strcmp(argv[1], "pages") == 0) {
                int fd = open("/t/file", O_CREAT | O_WRONLY, 0600);
                for (int i = 0; i < 4096; i++) if (write(fd, page, sizeof page) != sizeof page) return 1;
            } else {
                char name[64];
                for (int i = 0; i < 1000000; i++) {
                    sprintf(name, "/t/%d", i);
                    int fd = open(name, O_CREAT | O_WRONLY, 0600);
                    if (fd < 0) return 1;
                    close(fd);
                }
            }
            puts("all of it is there");
            return 0;
        }"#;
    let image = image_with_program("fill", fill).await;
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        for what in ["pages", "inodes"] {
            // The task has 64 MiB: a quarter of what the pages need, and of the kernel memory that a million inodes
            // need.
            let mounts = json!([{"type": "tmpfs", "target": "/t", "options": ["size=1g"]}]);
            let config = json!({"image": image, "command": "/attack", "args": [what], "mounts": mounts});
            let (code, out, _) = env.run(config).await;
            assert!(code != 0 && out.is_empty(), "{runtime}: {what}: {code} {out}");
        }
        env.finish().await;
    }
}

/// A job gets no limit above the operator's maximum, and by default no priority over the host's processes.
#[tokio::test(flavor = "multi_thread")]
async fn no_limit_of_a_job_is_above_the_operators() {
    let (_, own) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        for (name, value) in [
            ("rtprio", "99".to_owned()),
            ("rtprio", "0:1".to_owned()),
            ("nice", "40".to_owned()),
            ("memlock", "-1".to_owned()),
            ("msgqueue", "unlimited".to_owned()),
            ("nofile", (own + 1).to_string()),
        ] {
            let error = refused(&mut env, json!({"ulimit": {name: value}})).await;
            let named = error.contains(&format!("ulimit: {name} = ")) && error.contains("security { ulimit_max }");
            assert!(named, "{runtime}: {name} = {value}: {error}");
        }
        let error = refused(&mut env, json!({"file_limit": own + 1})).await;
        assert!(error.contains("file_limit: nofile = ") && error.contains("ulimit_max"), "{runtime}: {error}");
        let script = "ulimit -Hn; ulimit -Hr; ulimit -He";
        let config = env.shell(script, json!({"ulimit": {"nofile": own.to_string(), "rtprio": "0"}})).await;
        assert_eq!(env.run(config).await.1, format!("{own}\n0\n0\n"), "{runtime}");
        env.finish().await;

        let security = json!({"ulimit_max": {"nofile": "512", "core": "0"}});
        let mut env = Env::with_runtime(&runtime, json!({"security": security})).await;
        assert!(refused(&mut env, json!({"ulimit": {"nofile": "513"}})).await.contains("nofile = 513 is above 512"));
        // Neither a job without limits nor a process that is run in its task gets the agent's own limits.
        let script = "ulimit -Hn; ulimit -Sn; ulimit -Hc";
        let config = env.shell("exec sleep 600", json!({})).await;
        let task = env.start(config).await;
        assert_eq!(env.exec_text(&task, script).await, "512\n512\n0\n", "{runtime}");
        env.destroy(&task).await.unwrap();
        let config = env.shell(script, json!({})).await;
        assert_eq!(env.run(config).await.1, "512\n512\n0\n", "{runtime}");
        env.finish().await;
    }
}

/// Uses the driver's own check of a job, without a runtime, which might refuse the job for its own reasons.
#[test]
fn a_real_time_priority_is_refused_before_anything_is_made() {
    let directory = tempfile::tempdir().unwrap();
    let check = |driver: &str, limit: &str| {
        let file = directory.path().join("job.hcl");
        let config = format!("image = \"busybox\"\nulimit {{\n{limit}\n}}");
        let task = format!("task \"t\" {{\ndriver = \"{driver}\"\nconfig {{\n{config}\n}}\n}}");
        fs::write(&file, format!("job \"j\" {{\ngroup \"g\" {{\n{task}\n}}\n}}")).unwrap();
        let output = Command::new(program()).args(["config", "check"]).arg(&file).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    for limit in ["rtprio = 99", "nice = \"0:1\""] {
        let (code, said) = check("shim", limit);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("ulimit_max"), "{said}");
        assert_eq!(check("containerd-driver", limit).0, Some(0), "the old driver has no ceilings");
    }
    // This check can't know the limits that follow from a node's own limits.
    assert_eq!(check("shim", "nofile = 99999999").0, Some(0));
}

/// Ceilings that make no sense are refused when the agent starts.
#[tokio::test(flavor = "multi_thread")]
async fn ceilings_that_mean_nothing_are_refused() {
    let agent = |config: &str| {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("agent.hcl");
        fs::write(&file, format!("plugin \"nomad-driver-shim\" {{\nconfig {{\n{config}\n}}\n}}")).unwrap();
        let output = Command::new(program()).args(["config", "check"]).arg(&file).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    for (config, part) in [
        ("pids_limit = 9999999", "pids_limit = 9999999 is above the kernel's maximum"),
        ("security {\ntmpfs_max = \"much\"\n}", "security.tmpfs_max: \"much\""),
        ("security {\ntmpfs_max = \"0\"\n}", "security.tmpfs_max: \"0\""),
        ("security {\nulimit_max {\nfiles = 1\n}\n}", "security.ulimit_max: \"files\" is not a limit"),
        ("security {\nulimit_max {\nnofile = \"1:2\"\n}\n}", "a ceiling has one"),
    ] {
        let said = agent(config);
        assert!(said.contains(part), "{config}: {said}");
    }
    let fine = "pids_limit = 0\nsecurity {\ntmpfs_max = \"unlimited\"\nulimit_max {\nnofile = -1\nrtprio = 10\n}\n}";
    assert!(agent(fine).contains("fine"), "{}", agent(fine));
}
