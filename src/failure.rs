//! Classifies failures by what has to change before another attempt can succeed: the state of the host, or the job.
//!
//! One table ([`RULES`]) classifies errors by their errno, and messages of other programs (crun, runc, runsc, shims,
//! containerd) by the words that they contain. This module is pure, and knows neither tasks nor Nomad.
//! `docs/reliability.md` contains the same table, and a test compares the two.

use std::{error::Error, io};

use nix::errno::Errno;

/// What has to change before another attempt can succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The state of the host, which changes without the job: another attempt may succeed.
    Host,
    /// The job, its image, or a setting of the node: another attempt fails in the same way.
    Job,
}

/// One kind of failure.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// The failure, as a clause.
    pub failure: &'static str,
    /// The errors of the kernel for this failure.
    pub errnos: &'static [Errno],
    /// The words of messages about this failure, in lower case. glibc, musl and Go have different words for some
    /// errors.
    pub words: &'static [&'static str],
    /// What has to change before another attempt can succeed.
    pub cause: Cause,
    /// Why the failure is classified like this.
    pub reason: &'static str,
}

/// All kinds of failures that are known. The first rule that matches decides, and the host's failures come first. A
/// failure of the host that is reported as the job's ends a service for good, while the opposite costs some attempts,
/// whose number the job's restart policy limits.
pub const RULES: &[Rule] = &[
    Rule {
        failure: "a runtime, or a program that it called, was ended by a signal",
        errnos: &[],
        // Exit statuses as shims report them (containerd/go-runc, monitor.go: 128 + signal), and Go's os.ProcessState.
        words: &[
            "signal: ",
            "exit status 129",
            "exit status 130",
            "exit status 131",
            "exit status 134",
            "exit status 135",
            "exit status 137",
            "exit status 139",
            "exit status 141",
            "exit status 143",
            "exit status 152",
            "exit status 153",
        ],
        cause: Cause::Host,
        reason: "the kernel's OOM killer, an operator or a full file system below a mapped file ended it; a job can't",
    },
    Rule {
        failure: "no space is left on a file system",
        errnos: &[Errno::ENOSPC],
        words: &["no space left on device"],
        cause: Cause::Host,
        reason: "files are deleted, images are garbage-collected, other tasks end",
    },
    Rule {
        failure: "a quota is used up",
        errnos: &[Errno::EDQUOT],
        words: &["disk quota exceeded", "quota exceeded"],
        cause: Cause::Host,
        reason: "as with a full file system",
    },
    Rule {
        failure: "a process or the host has too many files open",
        errnos: &[Errno::EMFILE, Errno::ENFILE],
        words: &[
            "too many open files",
            "no file descriptors available",
            "epollcreate failed with 24",
            "pipe failed with 24",
        ],
        cause: Cause::Host,
        reason: "descriptors are freed as other starts and tasks end",
    },
    Rule {
        failure: "no memory is left",
        errnos: &[Errno::ENOMEM, Errno::ENOBUFS],
        words: &["cannot allocate memory", "out of memory", "no buffer space available"],
        cause: Cause::Host,
        reason: "the kernel, or a cgroup that the runtime was in, had none at that moment",
    },
    Rule {
        failure: "a resource is used up for the moment, such as processes",
        errnos: &[Errno::EAGAIN],
        words: &["resource temporarily unavailable", "try again"],
        cause: Cause::Host,
        reason: "fork(2) fails like this at a limit on processes, until other processes end",
    },
    Rule {
        failure: "something is in use",
        errnos: &[Errno::EBUSY, Errno::ETXTBSY],
        words: &["device or resource busy", "resource busy", "text file busy"],
        cause: Cause::Host,
        reason: "the kernel is still cleaning up a mount, a cgroup or a device; an upgrade is replacing a program",
    },
    Rule {
        failure: "an answer did not come in time",
        errnos: &[Errno::ETIMEDOUT],
        words: &[
            "timed out",
            "connection timed out",
            "operation timed out",
            "context deadline exceeded",
            "deadline exceeded",
            "i/o timeout",
            "timeout",
        ],
        cause: Cause::Host,
        reason: "the host, a disk or a peer was slow",
    },
    Rule {
        failure: "an operation was interrupted",
        errnos: &[Errno::EINTR, Errno::ECANCELED],
        words: &["interrupted system call", "operation canceled", "context canceled"],
        cause: Cause::Host,
        reason: "a signal arrived, or the caller went away; crun says \"Operation canceled\" when it can't write its seccomp program",
    },
    Rule {
        failure: "a network file system's file is gone or its server does not answer",
        errnos: &[Errno::ESTALE, Errno::EREMOTEIO, Errno::EHOSTDOWN],
        words: &["stale file handle", "stale nfs file handle", "remote i/o error", "host is down"],
        cause: Cause::Host,
        reason: "the server comes back, or the volume is mounted again for the next attempt",
    },
    Rule {
        failure: "reading or writing failed",
        errnos: &[Errno::EIO],
        words: &["input/output error", "i/o error"],
        cause: Cause::Host,
        reason: "a disk or a FUSE server failed, which the job can't repair; the allocation may be placed elsewhere after that",
    },
    Rule {
        failure: "a connection failed",
        errnos: &[
            Errno::ECONNREFUSED,
            Errno::ECONNRESET,
            Errno::ECONNABORTED,
            Errno::EPIPE,
            Errno::ENOTCONN,
            Errno::ENETDOWN,
            Errno::ENETUNREACH,
            Errno::EHOSTUNREACH,
        ],
        words: &[
            "connection refused",
            "connection reset by peer",
            "software caused connection abort",
            "broken pipe",
            "transport endpoint is not connected",
            "socket not connected",
            "network is down",
            "network is unreachable",
            "no route to host",
            "host is unreachable",
            "ttrpc: closed",
        ],
        cause: Cause::Host,
        reason: "a registry, a daemon or a FUSE server is being restarted",
    },
    Rule {
        failure: "remains of an earlier attempt are still there",
        errnos: &[Errno::EEXIST, Errno::ENOTEMPTY],
        words: &["already exists", "file exists", "directory not empty"],
        cause: Cause::Host,
        reason: "names are derived from the task, so only an earlier attempt can have them; its teardown is running",
    },
    Rule {
        failure: "the command can't be executed",
        errnos: &[Errno::ENOEXEC],
        // crun: src/libcrun/linux.c and container.c; runc: libcontainer/init_linux.go; runsc: pkg/sentry/fsimpl/user.
        words: &[
            "executable file not found",
            "executable file `",
            "exec: \"",
            "open executable",
            "error finding executable",
            "exec format error",
        ],
        cause: Cause::Job,
        reason: "the image does not have it, or it is not a program",
    },
    Rule {
        failure: "the working directory can't be entered",
        errnos: &[],
        words: &["chdir `", "chdir to cwd", "cwd must be an absolute path"],
        cause: Cause::Job,
        reason: "it is not a directory, or can't be created",
    },
    Rule {
        failure: "the user does not exist",
        errnos: &[],
        words: &["unable to setup user", "unable to find user", "unable to find group"],
        cause: Cause::Job,
        reason: "the job or its image names it",
    },
    Rule {
        failure: "something is not permitted",
        errnos: &[Errno::EACCES, Errno::EPERM],
        words: &["permission denied", "operation not permitted"],
        cause: Cause::Job,
        reason: "file modes, security modules and limits don't change by themselves",
    },
    Rule {
        failure: "a path can't be followed",
        errnos: &[Errno::ENOTDIR, Errno::EISDIR, Errno::ELOOP, Errno::ENAMETOOLONG, Errno::EROFS],
        words: &[
            "not a directory",
            "is a directory",
            "too many levels of symbolic links",
            "file name too long",
            "read-only file system",
        ],
        cause: Cause::Job,
        reason: "the job's mounts don't fit what the image has there",
    },
    Rule {
        failure: "a value is refused by the kernel",
        errnos: &[Errno::EINVAL, Errno::ERANGE, Errno::E2BIG, Errno::ENODEV, Errno::EOPNOTSUPP, Errno::ENOSYS],
        words: &[
            "invalid argument",
            "numerical result out of range",
            "argument list too long",
            "no such device",
            "operation not supported",
            "not supported",
            "function not implemented",
        ],
        cause: Cause::Job,
        reason: "an option of a mount, a limit, a sysctl or a cgroup has a value that this kernel does not take",
    },
    Rule {
        failure: "the container's description is refused",
        errnos: &[],
        words: &[
            "error stat'ing file `",
            "the sysctl `",
            "sysctl \"",
            "open /proc/sys/",
            "invalid device type",
            "unknown version specified",
        ],
        cause: Cause::Job,
        reason: "the job asks for what the runtime does not have, such as an unknown sysctl",
    },
    Rule {
        failure: "the memory limit is too low to start anything",
        errnos: &[],
        words: &[
            "oom: the memory limit could be too low",
            "unable to set memory limit to",
            "container init was oom-killed",
        ],
        cause: Cause::Job,
        reason: "runtimes need a few MiB inside of the limit",
    },
];

/// Classifies an error by the errnos in its chain of sources, the outermost first. Returns `None` if the chain has no
/// errno of the table.
pub fn of_error(error: &(dyn Error + 'static)) -> Option<Cause> {
    errnos(error).into_iter().find_map(of_errno)
}

/// Classifies an errno. Returns `None` for one that is not in the table.
pub fn of_errno(errno: Errno) -> Option<Cause> {
    RULES.iter().find(|rule| rule.errnos.contains(&errno)).map(|rule| rule.cause)
}

/// Classifies a message of another program. Returns `None` if it contains no words of the table.
///
/// A message may quote the job's strings, such as a command's name, and words in these strings say nothing about the
/// failure. So words count only at the beginning or the end of a part of the message, where the parts are separated by
/// colons. Programs put an error's text there, while names are in the middle of a part or in quotes. A job can still
/// choose a name that contains a colon. Then its own failure may be repeated as often as its restart policy permits.
pub fn of_message(message: &str) -> Option<Cause> {
    let message = message.to_lowercase();
    let says = |words: &&str| {
        message.match_indices(words).any(|(at, _)| {
            let (before, after) = (&message[..at], &message[at + words.len()..]);
            let is_whole = !words.ends_with(char::is_alphanumeric) || !after.starts_with(char::is_alphanumeric);
            let begins = before.trim_end().is_empty() || before.ends_with(": ") || before.ends_with('\n');
            let ends = before.ends_with(' ') && (after.is_empty() || after.starts_with([':', '\n']));
            is_whole && (begins || ends)
        })
    };
    RULES.iter().find(|rule| rule.words.iter().any(says)).map(|rule| rule.cause)
}

/// Returns all errnos in an error's chain of sources. An [`io::Error`] may contain an error of another kind, which is
/// not its source but is displayed in its place.
fn errnos(error: &(dyn Error + 'static)) -> Vec<Errno> {
    let mut found = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(errno) = error.downcast_ref::<Errno>() {
            found.push(*errno);
        }
        if let Some(error) = error.downcast_ref::<io::Error>() {
            found.extend(error.raw_os_error().map(Errno::from_raw).or_else(|| errno_of_kind(error.kind())));
            if let Some(inner) = error.get_ref() {
                let inner: &(dyn Error + 'static) = inner;
                found.extend(errnos(inner));
            }
        }
        next = error.source();
    }
    found
}

/// Returns the errno that corresponds to the kind of an [`io::Error`] that does not come from the kernel.
fn errno_of_kind(kind: io::ErrorKind) -> Option<Errno> {
    Some(match kind {
        io::ErrorKind::StorageFull => Errno::ENOSPC,
        io::ErrorKind::QuotaExceeded => Errno::EDQUOT,
        io::ErrorKind::OutOfMemory => Errno::ENOMEM,
        io::ErrorKind::WouldBlock => Errno::EAGAIN,
        io::ErrorKind::ResourceBusy => Errno::EBUSY,
        io::ErrorKind::TimedOut => Errno::ETIMEDOUT,
        io::ErrorKind::Interrupted => Errno::EINTR,
        io::ErrorKind::StaleNetworkFileHandle => Errno::ESTALE,
        io::ErrorKind::ConnectionRefused => Errno::ECONNREFUSED,
        io::ErrorKind::ConnectionReset => Errno::ECONNRESET,
        io::ErrorKind::BrokenPipe => Errno::EPIPE,
        io::ErrorKind::PermissionDenied => Errno::EACCES,
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
