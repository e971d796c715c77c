use super::*;

/// Messages of crun 1.8.1, runc 1.1.5 and their shim (containerd 1.6.20) on a host with a full disk, few descriptors,
/// few processes, and remains of earlier containers, and after they had been killed.
const HOST: &[&str] = &[
    "OCI runtime create failed: /usr/sbin/runc did not terminate successfully: exit status 137: unknown",
    "OCI runtime create failed: unable to retrieve OCI runtime error (open /run/x/log.json: no such file or directory): /proc/7/fd/4 did not terminate successfully: exit status 137",
    "OCI runtime create failed: /usr/bin/crun did not terminate successfully: signal: killed: unknown",
    "OCI runtime create failed: cannot write status file: No space left on device: unknown",
    "seccomp_export_bpf: Operation canceled",
    "OCI runtime create failed: socketpair: Too many open files",
    "runc create failed: unable to get cgroup freezer state: openat2 /sys/fs/cgroup/freezer/x/freezer.state: too many open files",
    "runc create failed: unable to start container process: unable to start init: fork/exec /proc/self/exe: too many open files",
    "runtime: epollcreate failed with 24\nfatal error: runtime: netpollinit failed",
    "runtime/cgo: pthread_create failed: Resource temporarily unavailable\nSIGABRT: abort",
    "fork/exec /usr/bin/containerd-shim-runc-v2: cannot allocate memory",
    "runc create failed: container with given ID already exists",
    "mkdir /run/x: disk quota exceeded",
    "rmdir `/sys/fs/cgroup/x`: Device or resource busy",
    "failed to create task: context deadline exceeded",
    "open /alloc/data: stale NFS file handle",
    "read /x: input/output error",
];

/// Messages of the same programs about faults of a job.
const JOB: &[&str] = &[
    "executable file `/no/such` not found in $PATH: No such file or directory",
    "OCI runtime create failed: executable file `nosuch` not found: No such file or directory: unknown",
    "runc create failed: unable to start container process: exec: \"/no/such\": stat /no/such: no such file or directory",
    "runc create failed: unable to start container process: exec: \"nosuch\": executable file not found in $PATH: unknown",
    "open executable: Permission denied",
    "open executable: Operation not permitted",
    "open executable: Not a directory",
    "runc create failed: unable to start container process: exec: \"/etc\": permission denied",
    "chdir `/etc/notexec`: Not a directory",
    "chdir `/proc/self/fd/99/x`: No such file or directory",
    "runc create failed: unable to start container process: error during container init: mkdir /etc/notexec: not a directory",
    "setrlimit `RLIMIT_NOFILE`: Operation not permitted",
    "mount `tmpfs` to `tmp`: Invalid argument",
    "mount `x` to `tmp`: No such device",
    "open /proc/sys/net/ipv4/nope: No such file or directory",
    "the sysctl `vm.swappiness` is not namespaced: unknown",
    "runc create failed: unable to start container process: error during container init: open /proc/sys/net/ipv4/nope: no such file or directory",
    "writing file `cpuset.cpus`: Numerical result out of range",
    "OOM: the memory limit could be too low: read from the init process",
    "runc create failed: invalid device type \"z\"",
    "runc create failed: unable to start container process: unable to setup user: uids and gids must be in range 0-2147483647",
];

/// Messages without any known words. They do not say that the job is at fault.
const UNKNOWN: &[&str] = &[
    // This is how runc 1.1.5 reports a full run directory.
    "runc create failed: unable to start container process: error during container init: unable to store init state: %!w(<nil>)",
    "OCI runtime create failed: write to seccomp fd: unknown",
    "runc create failed: unable to create new parent process: namespace path: lstat /run/netns/nope: no such file or directory",
    "OCI runtime create failed: /bin/false did not terminate successfully: exit status 1: unknown",
    "error executing hook `/bin/false` (exit code: 1)",
    "",
];

#[test]
fn messages_of_runtimes_are_classified() {
    for (messages, cause) in [(HOST, Some(Cause::Host)), (JOB, Some(Cause::Job)), (UNKNOWN, None)] {
        for message in messages {
            assert_eq!(of_message(message), cause, "{message}");
        }
    }
}

#[test]
fn names_that_a_job_has_chosen_do_not_count() {
    for name in ["no space left on device", "signal: killed", "exit status 137", "/bin/too many open files"] {
        for message in [
            format!("executable file `{name}` not found in $PATH: No such file or directory"),
            format!("runc create failed: exec: \"{name}\": executable file not found in $PATH"),
            format!("OCI runtime create failed: mount `{name}` to `tmp`: Invalid argument"),
        ] {
            // "signal: killed" contains a colon, but none precedes it.
            assert_eq!(of_message(&message), Some(Cause::Job), "{message}");
        }
    }
    // Only whole words count.
    assert_eq!(of_message("hook: exit status 1370"), None);
    assert_eq!(of_message("x: timeouts"), None);
}

#[test]
fn an_errno_is_found_below_every_wrapping() {
    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] io::Error);
    let kernel = || io::Error::from_raw_os_error(libc::EMFILE);
    let wrapped = Outer(io::Error::other(Outer(kernel())));
    assert_eq!(of_error(&wrapped), Some(Cause::Host));
    assert_eq!(of_error(&Outer(io::Error::other(Errno::ENOSPC))), Some(Cause::Host));
    assert_eq!(of_error(&io::Error::from(io::ErrorKind::TimedOut)), Some(Cause::Host));
    assert_eq!(of_error(&Outer(io::Error::from_raw_os_error(libc::EACCES))), Some(Cause::Job));
    assert_eq!(of_error(&Outer(io::Error::from_raw_os_error(libc::ENOENT))), None);
    assert_eq!(of_error(&Outer(io::Error::other("words"))), None);
}

/// The kernel's text for an errno is classified like the errno itself.
#[test]
fn errnos_and_their_words_agree() {
    for rule in RULES {
        for errno in rule.errnos {
            let text = io::Error::from_raw_os_error(*errno as i32).to_string();
            assert_eq!(of_message(&format!("open `x`: {text}")), Some(rule.cause), "{text}");
            assert_eq!(of_errno(*errno), Some(rule.cause), "{errno}");
        }
        for words in rule.words {
            assert_eq!(*words, words.to_lowercase(), "words are compared in lower case");
        }
    }
}

/// Renders the table for operators.
fn table(cause: Cause) -> String {
    let mut text =
        "| failure | errors of the kernel | words in a message | why |\n| --- | --- | --- | --- |\n".to_owned();
    for rule in RULES.iter().filter(|rule| rule.cause == cause) {
        let list = |items: Vec<String>| if items.is_empty() { "-".to_owned() } else { items.join(", ") };
        let errnos = list(rule.errnos.iter().map(|errno| format!("`{errno:?}`")).collect());
        let words = list(rule.words.iter().map(|words| format!("`` {} ``", words.trim())).collect());
        text.push_str(&format!("| {} | {errnos} | {words} | {} |\n", rule.failure, rule.reason));
    }
    text
}

/// Compares the tables in docs/reliability.md with the rules. `UPDATE_DOCS=1 cargo test reliability` writes them.
#[test]
fn docs_reliability_has_the_tables() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reliability.md");
    let mut document = std::fs::read_to_string(path).expect("docs/reliability.md");
    for (name, cause) in [("host", Cause::Host), ("job", Cause::Job)] {
        let (begin, end) = (format!("<!-- failures: {name} -->\n"), format!("<!-- end of failures: {name} -->"));
        let from = document.find(&begin).expect("a marker where the table begins") + begin.len();
        let to = document.find(&end).expect("a marker where the table ends");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            document.replace_range(from..to, &table(cause));
        } else {
            assert_eq!(document[from..to], table(cause), "UPDATE_DOCS=1 cargo test reliability writes it");
        }
    }
    std::fs::write(path, document).expect("written");
}
