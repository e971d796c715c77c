//! The rights of each process of the driver, as the kernel reports them. The plugin and its helpers have the
//! capabilities that they need and no others, the processes that they start have what they need, and only root may use
//! their sockets, whatever the mode of the socket's file.

use std::{
    fs,
    os::{
        fd::AsRawFd as _,
        unix::{fs::PermissionsExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nomad_driver_shim::host::PluginCommand;
use serde_json::{Value, json};

use crate::{attack, image_with_program, runtimes, support};
use support::{Entry, Env, EnvOptions, Image, Layer, Packing, eventually, leak, services, with_options};

/// The numbers of the capabilities that tests name (linux, `include/uapi/linux/capability.h`).
const CAP_DAC_OVERRIDE: u64 = 1 << 1;
const CAP_SYS_RESOURCE: u64 = 1 << 24;

/// The capabilities that a plugin may have: for files of tasks through their overlays (chown, dac_override, fowner,
/// fsetid, linux_immutable, mknod, setfcap), for mounts and namespaces (sys_admin), for processes (kill, sys_ptrace,
/// sys_nice, sys_resource) and for networks (net_admin, net_bind_service).
const PLUGIN: [u32; 14] = [0, 1, 3, 4, 5, 9, 10, 12, 19, 21, 23, 24, 27, 31];

/// The fields of a process's or thread's `status` in proc(5).
struct Status(String);

impl Status {
    fn of(process: impl std::fmt::Display) -> Self {
        Self(fs::read_to_string(format!("/proc/{process}/status")).unwrap())
    }

    /// Reads a thread's status; `None` if the thread has just ended.
    fn of_thread(pid: u32, thread: &str) -> Option<Self> {
        fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).ok().map(Self)
    }

    fn field(&self, name: &str) -> &str {
        let mut lines = self.0.lines();
        lines
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"))
            .unwrap_or_else(|| panic!("{name}: {}", self.0))
    }

    fn set(&self, name: &str) -> u64 {
        u64::from_str_radix(self.field(name), 16).unwrap()
    }
}

fn threads(pid: u32) -> Vec<Status> {
    let threads = leak::entries(Path::new(&format!("/proc/{pid}/task")));
    threads.iter().filter_map(|thread| Status::of_thread(pid, thread)).collect()
}

/// Fails if a thread of the plugin has more capabilities than a plugin may have.
fn assert_reduced(env: &Env, when: &str) {
    let allowed = PLUGIN.iter().fold(0, |set, number| set | 1_u64 << number);
    let threads = threads(env.plugin().pid().unwrap());
    assert!(threads.len() > 3, "{when}: {} threads", threads.len());
    for thread in threads {
        for set in ["CapEff", "CapPrm"] {
            let more = thread.set(set) & !allowed;
            assert_eq!(more, 0, "{when}: thread {} has {more:#x} more in {set}", thread.field("Name"));
        }
        assert_eq!((thread.set("CapInh"), thread.set("CapAmb")), (0, 0), "{when}");
    }
}

fn bounding() -> u64 {
    Status::of("self").set("CapBnd")
}

/// The pids of the shims of an environment.
fn shims(env: &Env) -> Vec<u32> {
    let directory = env.dir.join("run/shims");
    let identity = |name: &String| -> Option<u64> {
        let text = fs::read(directory.join(name).join("pid")).ok()?;
        serde_json::from_slice::<Value>(&text).ok()?["pid"].as_u64()
    };
    leak::entries(&directory).iter().filter_map(identity).map(|pid| u32::try_from(pid).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plugin_has_only_what_it_needs_and_its_tasks_have_theirs() {
    for runtime in runtimes() {
        let config = json!({"allow_privileged": true, "security": {"allow_caps": ["ALL"]}});
        let mut env = Env::with_runtime(&runtime, config).await;
        assert_reduced(&env, "at the start");
        let script = "grep ^Cap /proc/self/status; exec sleep 600";
        for (options, expected) in [
            // The thirteen default capabilities: chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap,
            // net_bind_service, sys_chroot, mknod, audit_write, setfcap.
            (json!({}), 0xa804_05fb & bounding()),
            (json!({"privileged": true}), bounding()),
            (
                json!({"cap_add": ["SYS_TIME", "SYSLOG", "MAC_ADMIN"]}),
                (0xa804_05fb | 1 << 25 | 1 << 34 | 1 << 33) & bounding(),
            ),
            (json!({"cap_add": ["SYS_MODULE"], "cap_drop": ["ALL"]}), (1 << 16) & bounding()),
        ] {
            let task = env.start(env.shell(script, options.clone()).await).await;
            task.says("CapAmb").await;
            let seen = Status(task.stdout.text());
            for set in ["CapEff", "CapPrm", "CapBnd"] {
                assert_eq!(seen.set(set), expected, "{runtime}: {options}: {set}");
            }
            // A process that is run in the task later has the same capabilities.
            let seen = Status(env.exec_text(&task, "grep ^Cap /proc/self/status").await);
            assert_eq!(seen.set("CapEff"), expected, "{runtime}: {options}: exec");
            assert_reduced(&env, "while a task runs");
            env.destroy(&task).await.unwrap();
        }
        let shims = shims(&env);
        assert!(!shims.is_empty(), "{runtime}: one waits");
        for shim in shims {
            let status = Status::of(shim);
            // The runtime is the shim's child, and must be able to give a task every capability that a task may have.
            assert_eq!((status.set("CapPrm"), status.set("CapBnd")), (bounding(), bounding()), "{runtime}");
        }
        env.finish().await;
    }
}

/// Does the file system of a directory have extended attributes that users may set?
fn has_user_attributes(dir: &Path) -> bool {
    let file = std::fs::File::create(dir.join("attributes")).unwrap();
    // SAFETY: both strings end with a zero, and the kernel reads one byte of the value.
    let set = unsafe { libc::fsetxattr(file.as_raw_fd(), c"user.mine".as_ptr(), c"x".as_ptr().cast(), 1, 0) };
    std::fs::remove_file(dir.join("attributes")).unwrap();
    set == 0
}

/// The kernel makes a task's changes to its root file system with the rights of the plugin that mounted it. A task with
/// every capability must not lack there what the plugin has given up.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_do_to_their_files_what_their_capabilities_let_them() {
    let source = r#"#include <errno.h>
        #include <fcntl.h>
        #include <linux/fs.h>
        #include <linux/capability.h>
        #include <stdio.h>
        #include <string.h>
        #include <sys/ioctl.h>
        #include <sys/stat.h>
        #include <sys/sysmacros.h>
        #include <sys/xattr.h>
        #include <unistd.h>
        static void said(const char *what, int outcome) { printf("%s %s\n", what, outcome == 0 ? "ok" : strerror(errno)); }
        int main(void) {
            int fd = open("/f", O_CREAT | O_RDWR, 0600);
            said("write", write(fd, "x", 1) == 1 ? 0 : -1);
            said("chown", fchown(fd, 1234, 5678));
            struct stat seen;
            said("chmod", fchmod(fd, 06755));
            said("set-id bits", fstat(fd, &seen) == 0 && (seen.st_mode & 06000) == 06000 ? 0 : -1);
            said("device", mknod("/b", S_IFBLK | 0600, makedev(7, 0)));
            struct vfs_cap_data data = {.magic_etc = VFS_CAP_REVISION_2, .data[0].permitted = 1};
            said("setfcap", fsetxattr(fd, "security.capability", &data, XATTR_CAPS_SZ_2, 0));
            said("trusted", fsetxattr(fd, "trusted.mine", "x", 1, 0));
            said("user", fsetxattr(fd, "user.mine", "x", 1, 0));
            int flags = 0;
            said("flags", ioctl(fd, FS_IOC_GETFLAGS, &flags));
            flags |= FS_IMMUTABLE_FL;
            said("immutable", ioctl(fd, FS_IOC_SETFLAGS, &flags));
            flags &= ~FS_IMMUTABLE_FL;
            said("mutable", ioctl(fd, FS_IOC_SETFLAGS, &flags));
            // A file of the image is copied up with all of its attributes, and one in a directory of somebody else made.
            said("copied up", chmod("/bin/busybox", 04755));
            said("directory", mkdir("/d", 0700) || chown("/d", 1234, 1234) || mkdir("/d/d", 0700));
            said("rename", rename("/d", "/e"));
            said("remove", rmdir("/e/d") || rmdir("/e") || unlink("/b"));
            return 0;
        }"#;
    let image = image_with_program("files", source).await;
    for runtime in runtimes() {
        let config = json!({"allow_privileged": true, "security": {"allow_caps": ["ALL"]}});
        let mut env = Env::with_runtime(&runtime, config).await;
        for options in [json!({"privileged": true}), json!({"cap_add": ["ALL"]})] {
            let config = with_options(json!({"image": image, "command": "/attack"}), options.clone());
            let (code, out, err) = env.run(config).await;
            assert_eq!(code, 0, "{runtime}: {err}");
            // A tmpfs, where the writable layer may be, has these attributes only since Linux 6.6.
            let lacks = |line: &str| line == "user Operation not supported" && !has_user_attributes(&env.dir);
            let failed: Vec<_> = out.lines().filter(|line| !line.ends_with(" ok") && !lacks(line)).collect();
            assert!(failed.is_empty() && out.lines().count() == 15, "{runtime}: {options}: {out}");
        }
        env.finish().await;
    }
}

/// An agent may be started without full rights. Then the processes that the plugin starts regain no rights, or not all
/// of them, and the plugin's tasks must have all that the plugin could give them.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_confined_itself_still_runs_tasks() {
    for (confinement, kept) in [
        // The plugin must keep the rights that its children would not regain.
        (&["--no-new-privs"][..], bounding()),
        // As with systemd's CapabilityBoundingSet: without sys_time and setpcap.
        (&["--bounding-set", "-sys_time,-setpcap"][..], bounding() & !(1 << 25 | 1 << 8)),
    ] {
        let own = support::program().to_str().unwrap().to_owned();
        let words = confinement.iter().map(|word| (*word).to_owned());
        let args = words.chain([own, "--name".to_owned(), "shim".to_owned()]).collect();
        let config = json!({"allow_privileged": true, "disable_log_collection": true});
        let driver = Some(PluginCommand { args, ..PluginCommand::new("setpriv") });
        let mut env = Env::with(EnvOptions { driver, config, ..EnvOptions::default() }).await;
        let plugin = Status::of(env.plugin().pid().unwrap());
        assert_eq!(plugin.set("CapBnd"), kept, "{confinement:?}");
        let is_reduced = plugin.set("CapEff") != kept;
        assert_eq!(is_reduced, confinement != ["--no-new-privs"], "{confinement:?}");
        let script = "grep ^Cap /proc/self/status; exec sleep 600";
        let task = env.start(env.shell(script, json!({"privileged": true})).await).await;
        let log = task.dirs.alloc_dir.join("alloc/logs/web.stdout.0");
        eventually("its log is written", async || match fs::read_to_string(&log) {
            Ok(text) if text.contains("CapAmb") => Ok(()),
            other => Err(other.map_err(|error| error.to_string())),
        })
        .await;
        let seen = Status(fs::read_to_string(&log).unwrap());
        assert_eq!((seen.set("CapEff"), seen.set("CapBnd")), (kept, kept), "{confinement:?}");
        for (role, pid) in log_processes(&env) {
            let status = Status::of(pid);
            let more = status.set("CapEff") & !(CAP_DAC_OVERRIDE | CAP_SYS_RESOURCE);
            assert_eq!((more, status.field("NoNewPrivs")), (0, "1"), "{confinement:?}: {role}");
        }
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// The pids of the log writer and the log writer supervisor, with their roles.
fn log_processes(env: &Env) -> Vec<(&'static str, u32)> {
    let place = env.dir.join("run/logs");
    let pids = leak::entries(Path::new("/proc")).into_iter().filter_map(|pid| pid.parse::<u32>().ok());
    let role = |pid: u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let ours = words.iter().any(|word| Path::new(word.as_ref()) == place);
        ours.then(|| if words.iter().any(|word| word == "--writer") { ("writer", pid) } else { ("keeper", pid) })
    };
    pids.filter_map(role).collect()
}

async fn own_logs() -> Env {
    let config = json!({"disable_log_collection": true});
    Env::configured(config).await
}

#[tokio::test(flavor = "multi_thread")]
async fn log_processes_have_only_what_they_need() {
    let mut env = own_logs().await;
    let task = env.start(env.shell("while :; do echo x; sleep 1; done", json!({})).await).await;
    let file = task.dirs.alloc_dir.join("alloc/logs/web.stdout.0");
    eventually("its log is written", async || match fs::read_to_string(&file) {
        Ok(text) if text.starts_with("x\n") => Ok(()),
        other => Err(other.map_err(|error| error.to_string())),
    })
    .await;
    let allowed = CAP_DAC_OVERRIDE | CAP_SYS_RESOURCE;
    let processes = log_processes(&env);
    assert_eq!(processes.len(), 2, "{processes:?}");
    for (role, pid) in processes {
        for status in threads(pid) {
            for set in ["CapEff", "CapPrm", "CapBnd"] {
                let more = status.set(set) & !allowed;
                assert_eq!(more, 0, "the {role} has {more:#x} more in {set}");
            }
            assert_eq!((status.set("CapInh"), status.set("CapAmb")), (0, 0), "{role}");
            // The process has a system call filter, and can't gain rights by executing a program.
            assert_eq!((status.field("Seccomp"), status.field("NoNewPrivs")), ("2", "1"), "{role}");
        }
    }
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// The log writer has kept the capabilities that it needs: a directory that another user has closed does not stop a
/// log.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_goes_on_in_a_directory_that_is_somebody_elses() {
    let mut env = own_logs().await;
    let config = env.shell("seq 3000; exec sleep 600", json!({"log_max_size": "4k"})).await;
    let task = env.prepare(config).await;
    let logs = task.dirs.alloc_dir.join("alloc/logs");
    std::os::unix::fs::chown(&logs, Some(1234), Some(1234)).unwrap();
    fs::set_permissions(&logs, fs::Permissions::from_mode(0o500)).unwrap();
    // The log is continued in a file that an earlier collector has left and that belongs to another user.
    fs::write(logs.join("web.stdout.0"), "before\n").unwrap();
    std::os::unix::fs::chown(logs.join("web.stdout.0"), Some(1234), Some(1234)).unwrap();
    fs::set_permissions(logs.join("web.stdout.0"), fs::Permissions::from_mode(0o400)).unwrap();
    let mut task = task;
    env.try_start(&mut task).await.unwrap();
    eventually("all of it is written and rotated", async || {
        let all: String =
            (0..10).filter_map(|n| fs::read_to_string(logs.join(format!("web.stdout.{n}"))).ok()).collect();
        let whole = all.starts_with("before\n1\n2\n") && all.ends_with("\n2999\n3000\n");
        if whole { Ok(()) } else { Err(all.len()) }
    })
    .await;
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// The thread that reads layers of untrusted images has no capabilities, and makes only the system calls that computing
/// needs.
#[tokio::test(flavor = "multi_thread")]
async fn the_reader_of_layers_has_nothing() {
    let mut env = Env::new().await;
    let layer = Layer::new(&[Entry::file("zeros", vec![0_u8; 192 << 20])], Packing::Gzip);
    let image = Image::busybox().with_layer(layer).push(&services().registry, "privileges/large:1").await;
    let pid = env.plugin().pid().unwrap();
    let mut task = env.prepare(json!({"image": image, "command": "/bin/true"})).await;
    let looking = async {
        loop {
            let confined = threads(pid).into_iter().find(|thread| thread.field("Seccomp") == "2");
            if let Some(thread) = confined {
                return thread;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let (started, seen) = tokio::join!(env.try_start(&mut task), tokio::time::timeout(support::patience(), looking));
    started.unwrap();
    let seen = seen.expect("no thread was confined");
    assert_eq!((seen.set("CapEff"), seen.set("CapPrm"), seen.field("NoNewPrivs")), (0, 0, "1"));
    assert_reduced(&env, "after a pull");
    env.finish_task(task).await;
    env.finish().await;
}

/// Connects to a unix socket, sends a text, and counts the bytes that come back until the other side closes or sends
/// nothing for three seconds. With `silent` it sends nothing and waits until the other side closes.
const KNOCK: &str = r#"#include <errno.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/time.h>
    #include <sys/un.h>
    #include <unistd.h>
    static const char http2[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0";
    int main(int argc, char **argv) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        struct timeval patience = {.tv_sec = 3};
        char text[4096];
        if (argc < 3) return 1;
        strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
        int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
            printf("connect: %s\n", strerror(errno));
            return 1;
        }
        if (strcmp(argv[2], "silent") == 0) {
            puts("connected");
            fflush(stdout);
            while (read(fd, text, sizeof text) > 0) { }
            return 0;
        }
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        if (strcmp(argv[2], "http2") == 0) send(fd, http2, sizeof http2 - 1, MSG_NOSIGNAL);
        else send(fd, argv[2], strlen(argv[2]), MSG_NOSIGNAL);
        long total = 0, count;
        while ((count = read(fd, text, sizeof text)) > 0) total += count;
        printf("%ld bytes\n", total);
        return 0;
    }"#;

/// Installs a program that other users may run, in a directory that they can reach.
fn knocker(env: &Env) -> PathBuf {
    let path = env.dir.join("knock");
    fs::write(&path, attack::compile("knock", KNOCK)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Opens a socket to all users, as a mistake with modes would.
fn opened(socket: &Path) {
    fs::set_permissions(socket, fs::Permissions::from_mode(0o777)).unwrap();
    let directories =
        socket.ancestors().skip(1).take_while(|directory| directory.starts_with(support::services::root()));
    for directory in directories {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

/// Connects to a socket as a user and returns what the program prints about the answer.
async fn knocked(knock: &Path, socket: &Path, text: &str, user: u32) -> String {
    let mut command = Command::new(knock);
    command.arg(socket).arg(text).uid(user).gid(user).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_are_roots_whatever_their_modes_say() {
    let directory = tempfile::tempdir_in(support::services::root()).unwrap();
    let metrics = directory.path().join("metrics.sock");
    let mut env = Env::configured(json!({"metrics": {"address": format!("unix:{}", metrics.display())}})).await;
    let knock = knocker(&env);
    // The first actual work opens the engine, and the engine opens the sockets.
    assert_eq!(env.run(env.shell("true", json!({})).await).await.0, 0);
    let plugin = env.plugin().socket().to_owned();
    let control = env.dir.join("run/control.sock");
    for (socket, text) in [
        (&plugin, "http2"),
        (&control, "{\"gc\":{\"dry_run\":true}}\n"),
        (&control, "\"leave\"\n"),
        (&metrics, "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"),
    ] {
        opened(socket);
        let heard = knocked(&knock, socket, text, 0).await;
        assert!(heard.ends_with(" bytes") && heard != "0 bytes", "root at {}: {heard}", socket.display());
        for user in [65534, 1000] {
            let heard = knocked(&knock, socket, text, user).await;
            assert_eq!(heard, "0 bytes", "user {user} at {}, {text:?}", socket.display());
        }
    }
    eventually("the refusals are in the plugin's log", async || {
        let said = env.plugin().stderr();
        let sockets = ["the plugin's socket", "the control socket", "the metrics socket"];
        let logged = sockets.iter().all(|socket| said.contains(&format!("a connection to {socket} was refused")));
        if logged && said.contains("of user 65534, which may not use it") { Ok(()) } else { Err(said) }
    })
    .await;
    // The plugin still serves all others.
    assert_eq!(env.run(env.shell("true", json!({})).await).await.0, 0);
    // Restores the modes for the check of modes.
    fs::set_permissions(&control, fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(env.dir.join("run"), fs::Permissions::from_mode(0o700)).unwrap();
    env.finish().await;
}

/// A host may give the socket to a group (go-plugin's `PLUGIN_UNIX_SOCKET_GROUP`): only the group's members may
/// connect.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_the_host_names_may_connect() {
    let env = EnvOptions::default().var("PLUGIN_UNIX_SOCKET_GROUP", "4242").start().await;
    let (knock, socket) = (knocker(&env), env.plugin().socket().to_owned());
    opened(&socket);
    let member = |groups: &'static [&'static str]| {
        let mut command = Command::new("setpriv");
        command.args(groups).args(["--reuid", "65534"]).arg(&knock).arg(&socket).arg("http2");
        async move {
            let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        }
    };
    for (groups, admitted) in [
        (&["--regid", "4242", "--clear-groups"][..], true),
        (&["--regid", "65534", "--groups", "7,4242"][..], true),
        (&["--regid", "65534", "--groups", "7,4243"][..], false),
        (&["--regid", "65534", "--clear-groups"][..], false),
    ] {
        let heard = member(groups).await;
        assert_eq!(heard != "0 bytes", admitted, "{groups:?}: {heard}");
    }
    env.finish().await;
}

/// A user who may not connect does not count as an agent: a plugin without an agent exits all the same.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_do_not_keep_a_plugin() {
    let mut env = Env::configured(json!({"state": {"orphan_timeout": "2s"}})).await;
    assert_eq!(env.run(env.shell("true", json!({})).await).await.0, 0);
    let socket = env.plugin().socket().to_owned();
    opened(&socket);
    // A connection of another user that sends nothing and stays for as long as the plugin permits.
    let mut stranger = Command::new(knocker(&env));
    stranger.arg(&socket).arg("silent").uid(65534).gid(65534).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut stranger = stranger.spawn().unwrap();
    let mut line = String::new();
    let mut out = std::io::BufReader::new(stranger.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    assert_eq!(line, "connected\n");
    let mut process = env.plugin.take().unwrap().detach().unwrap();
    let left = tokio::time::timeout(support::patience(), process.wait()).await;
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    if left.is_err() {
        process.kill().await.unwrap();
    }
    assert!(left.is_ok(), "a stranger's connection keeps the plugin");
    env.start_plugin().await;
    env.finish().await;
}
