//! Classifies the errors of tasks: may Nomad answer an error with another attempt?
//!
//! Nomad applies a job's restart policy to recoverable errors only; an unrecoverable error ends the task for good. So
//! an error is unrecoverable only if the job itself has to change, and an error that is not classified is the host's.

use std::error::Error;

use super::{RuntimeError, TaskError};
use crate::{
    failpoint,
    failure::{self, Cause},
    rootfs::RootfsError,
    shim::stdio::StdioError,
};

impl TaskError {
    /// Says whether another attempt may succeed although the job does not change. Nomad applies its restart policy only
    /// then.
    pub fn is_recoverable(&self) -> bool {
        self.failure_cause() == Cause::Host && !failpoint::skip("recoverable")
    }

    fn failure_cause(&self) -> Cause {
        match self {
            Self::Image(error) => error.0.failure_cause(),
            Self::Shim { source, .. } => source.failure_cause(),
            Self::Rootfs(error) => rootfs_cause(error),
            Self::AppArmor(error) if error.is_transient() => Cause::Host,
            // Unless the kernel failed, the error says what is wrong with a setting of the job or the operator.
            Self::AppArmor(error) => cause_by_errno_or(error, Cause::Job),
            Self::Runtime(error) => runtime_cause(error),
            Self::Stdio(error) => stdio_cause(error),
            Self::Group(error) => cause_by_errno_or(error, Cause::Job),
            // Files, processes and connections of the driver itself: a job has no part in them.
            Self::Log(_)
            | Self::LogWriter(_)
            | Self::Cgroup(_)
            | Self::Record(_)
            | Self::Places(_)
            | Self::LockHeld { .. }
            | Self::Lock { .. }
            | Self::PersistedSettings { .. }
            | Self::Worker(_)
            | Self::MountSourcesUnreachable { .. }
            | Self::RootfsUnmounted { .. } => Cause::Host,
            // Remains of an earlier attempt.
            Self::TeardownInProgress(_)
            | Self::EarlierAttemptRemains { .. }
            | Self::Legacy(_)
            | Self::NotRemoved { .. }
            | Self::Unkillable { .. } => Cause::Host,
            // The request can't be fulfilled, however often it is made. Nomad does not restart exec sessions.
            Self::AlreadyStarted(_)
            | Self::NotFound(_)
            | Self::StillRunning(_)
            | Self::Signal(_)
            | Self::Reference(_)
            | Self::NotInSandbox { .. }
            | Self::Unrecoverable { .. }
            | Self::Exec(_)
            | Self::Stopped(_)
            | Self::Ended(_) => Cause::Job,
        }
    }
}

/// Classifies an error by its errno, or as `otherwise` if it has none that is known.
fn cause_by_errno_or(error: &(dyn Error + 'static), otherwise: Cause) -> Cause {
    failure::of_error(error).unwrap_or(otherwise)
}

fn rootfs_cause(error: &RootfsError) -> Cause {
    match error {
        // The driver's own files and mounts, Nomad's directories, and containerd's layers.
        RootfsError::File { .. }
        | RootfsError::MountRootfs { .. }
        | RootfsError::LayersGone { .. }
        | RootfsError::AllocDir { .. } => Cause::Host,
        // The other errors are about names and paths of the job and its image.
        other => cause_by_errno_or(other, Cause::Job),
    }
}

fn runtime_cause(error: &RuntimeError) -> Cause {
    match error {
        RuntimeError::Wrapper { .. } | RuntimeError::Delete { .. } => Cause::Host,
        // The problem that a runtime's probe has found. A runtime does not work either while its host is broken.
        RuntimeError::Broken { problem, .. } => failure::of_message(problem).unwrap_or(Cause::Host),
        RuntimeError::Unknown { .. }
        | RuntimeError::NotAllowed { .. }
        | RuntimeError::Missing { .. }
        | RuntimeError::Unfiltered(_)
        | RuntimeError::None => Cause::Job,
    }
}

fn stdio_cause(error: &StdioError) -> Cause {
    match error {
        // Nomad makes the FIFOs, and makes them again for each attempt. A link in their place was put there by the
        // task.
        StdioError::Open { .. } => cause_by_errno_or(error, Cause::Host),
        StdioError::NotFifo { .. } => Cause::Job,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::Digest,
        image::{ImageError, LayerProblem},
        rootfs::mount_origin::MountOrigin,
        shim::{RefusalCode, ShimError},
        task::{GroupError, SharedImageError},
    };
    use std::{io, sync::Arc};

    fn kernel(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    /// There is one error of each step of a start here. Its errno says that the host is at fault.
    #[test]
    fn passing_failures_are_recoverable_in_every_step() {
        let layer = |errno| ImageError::Layer {
            image: "x".to_owned(),
            digest: Digest::of(b"x"),
            source: LayerProblem::Unreadable { source: kernel(errno) },
        };
        for errno in [libc::ENOSPC, libc::EDQUOT, libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EAGAIN, libc::EBUSY] {
            for error in [
                TaskError::Image(SharedImageError(Arc::new(layer(errno)))),
                RootfsError::Source { option: "mounts: source", source_path: "x".to_owned(), source: kernel(errno) }
                    .into(),
                RootfsError::MountAtTarget {
                    origin: MountOrigin::Job(0),
                    target: "/x".to_owned(),
                    source: kernel(errno),
                }
                .into(),
                RootfsError::AllocDir { path: "/x".into(), source: kernel(errno) }.into(),
                RootfsError::File { doing: "write", path: "/x".into(), source: kernel(errno) }.into(),
                RootfsError::Gateway { name: "x".to_owned(), source: kernel(errno) }.into(),
                StdioError::Open { path: "/x".into(), source: kernel(errno) }.into(),
                TaskError::LogWriter(kernel(errno)),
                GroupError::Addresses { namespace: "/x".into(), source: kernel(errno) }.into(),
                RuntimeError::Wrapper { name: "x".to_owned(), source: kernel(errno) }.into(),
                shim(ShimError::Spawn { binary: "/x".into(), source: kernel(errno) }),
                RuntimeError::Broken { name: "x".to_owned(), problem: kernel(errno).to_string() }.into(),
            ] {
                assert!(error.is_recoverable(), "{}", crate::error_chain(&error));
            }
        }
    }

    #[test]
    fn faults_of_a_job_are_not_recoverable() {
        for error in [
            RootfsError::Source { option: "mounts: source", source_path: "x".to_owned(), source: kernel(libc::ENOENT) }
                .into(),
            RootfsError::MountAtTarget {
                origin: MountOrigin::Job(0),
                target: "/x".to_owned(),
                source: kernel(libc::EINVAL),
            }
            .into(),
            RootfsError::NoCommand.into(),
            StdioError::NotFifo { path: "/x".into(), kind: "a symbolic link" }.into(),
            RuntimeError::None.into(),
            shim(refused(
                RefusalCode::UNKNOWN,
                "OCI runtime create failed: executable file `/x` not found: No such file or directory",
            )),
            shim(refused(RefusalCode::INVALID_ARGUMENT, "invalid")),
        ] {
            let error: TaskError = error;
            assert!(!error.is_recoverable(), "{}", crate::error_chain(&error));
        }
    }

    #[test]
    fn what_a_runtime_says_is_the_hosts_fault_unless_it_says_otherwise() {
        for text in [
            "OCI runtime create failed: /usr/sbin/runc did not terminate successfully: exit status 137: unknown",
            "OCI runtime create failed: write to seccomp fd: unknown",
            "OCI runtime create failed: runc create failed: unable to store init state: %!w(<nil>): unknown",
            "failed to delete task: cannot open directory '/run/x': No such file or directory",
        ] {
            assert!(shim(refused(RefusalCode::UNKNOWN, text)).is_recoverable(), "{text}");
        }
        // A failure of the host keeps its class, whatever the gRPC code.
        assert!(shim(refused(RefusalCode::INVALID_ARGUMENT, "mkdir /x: no space left on device")).is_recoverable());
    }

    fn refused(code: RefusalCode, message: &str) -> ShimError {
        ShimError::Refused { call: "Create", code, message: message.to_owned() }
    }

    fn shim(source: ShimError) -> TaskError {
        TaskError::Shim { doing: "create the container", source }
    }
}
