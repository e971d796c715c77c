//! seccomp filters of tasks: docker's default profile, profiles from files, and our own compiler for them.
//!
//! Every profile ends as the OCI spec's `linux.seccomp`, which any runtime takes and has compiled by libseccomp at
//! each start (10 to 15 ms for the default profile). A runtime that takes a compiled program gets one of ours instead:
//! compiled once, a tenth of the size, and equal in every verdict (tests/seccomp/). In both forms, arguments that the
//! kernel truncates are compared by the bits that it keeps.

mod arguments;
mod compile;
mod conditions;
mod docker;
mod profile;
mod program;
mod restate;
mod syscalls;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use base64::Engine as _;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompBuilder, LinuxSyscallBuilder};
use seccompiler::sock_filter;
use sha2::Digest as _;

use super::Capabilities;

pub use compile::{NotCompiled, compile};
pub use docker::profile as default_profile;
pub use profile::{Host, Profile};
pub use restate::for_libseccomp;
pub use syscalls::Machine;

/// crun reads a compiled program from here (base64 of `struct sock_filter`s), and skips libseccomp.
pub const CRUN_PROGRAM: &str = "run.oci.seccomp_bpf_data";

/// Why a profile can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The file can't be read.
    #[error("seccomp profile {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no profile.
    #[error("seccomp profile {path} is neither docker's nor the OCI spec's form of one")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// It says something that nobody knows.
    #[error("seccomp profile: {0}")]
    Invalid(String),
    /// libseccomp would decide by an order of its own.
    #[error(
        "seccomp profile: rules of different actions for {call} hold for the same arguments; \
        make their conditions exclude each other"
    )]
    Conflict {
        /// The system call.
        call: String,
    },
}

/// A task's filter, in the form its runtime takes.
#[derive(Debug, Clone, PartialEq)]
pub enum Filter {
    /// For `linux.seccomp`.
    Profile(Arc<LinuxSeccomp>),
    /// For [`CRUN_PROGRAM`].
    Program(Arc<str>),
}

/// In which form a runtime takes a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// As `linux.seccomp`.
    Profile,
    /// As a compiled program.
    Program,
}

/// What the default profile does with `socketcall`, by which 32-bit x86 (and s390) programs make every call about sockets.
///
/// The address family lies in memory, where no filter can see it: whoever may use `socketcall` may open sockets of the
/// families that the profile forbids (AF_ALG, AF_VSOCK). docker refused it (moby/moby#52494), broke 32-bit programs with
/// that (moby/moby#52506), and had AppArmor and SELinux refuse the families instead (moby/moby#52547, moby/moby#53551).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Multiplexer {
    /// It works. An LSM profile should refuse the families.
    Allowed,
    /// It answers ENOSYS. Programs can make the direct calls that Linux has since 4.3, but not all C libraries do.
    Enosys,
}

/// Where a profile comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source<'a> {
    /// Docker's default.
    Default(Multiplexer),
    /// A file, read already.
    File {
        /// Which, for messages.
        path: &'a Path,
        /// What is in it.
        text: &'a [u8],
    },
}

/// Which profile was read.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Origin {
    Default(Multiplexer),
    /// A file, by its hash.
    File(Vec<u8>),
}

/// What a filter depends on: the profile, what the task may do, and the form.
type Key = (Origin, Capabilities, Form);

/// Filters that have been made once. A plugin makes docker's default again in under a millisecond, so they are kept in
/// memory only: nothing that confines tasks is read back from a file.
#[derive(Debug, Default)]
pub struct Filters(Mutex<HashMap<Key, Filter>>);

/// Jobs have a handful of capability sets between them; one that makes up ever new profiles must not fill memory.
const FILTERS_MAX: usize = 64;

impl Filters {
    /// The filter of a task with these capabilities. A profile that we don't compile stays in its own form, which
    /// every runtime takes.
    ///
    /// # Errors
    /// When the file is no profile, or contradicts itself.
    pub fn get(&self, source: Source<'_>, capabilities: &Capabilities, form: Form) -> Result<Filter, SeccompError> {
        let origin = match source {
            Source::Default(multiplexer) => Origin::Default(multiplexer),
            Source::File { text, .. } => Origin::File(sha2::Sha256::digest(text).to_vec()),
        };
        let key = (origin, capabilities.clone(), form);
        if let Some(known) = self.filters().get(&key) {
            return Ok(known.clone());
        }
        let profile = match source {
            Source::Default(multiplexer) => default_profile(multiplexer),
            Source::File { path, text } => Profile::read(path, text)?,
        };
        let host = Host::this();
        let filter = made(&profile.resolve(host, capabilities)?, host, form)?;
        let mut filters = self.filters();
        if filters.len() >= FILTERS_MAX {
            filters.clear();
        }
        filters.insert(key, filter.clone());
        Ok(filter)
    }

    fn filters(&self) -> MutexGuard<'_, HashMap<Key, Filter>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn made(profile: &LinuxSeccomp, host: Host, form: Form) -> Result<Filter, SeccompError> {
    if let (Form::Program, Some(machine)) = (form, Machine::of_this_host()) {
        match compile(profile, machine) {
            Ok(program) => {
                return Ok(Filter::Program(encoded(&program).into()));
            }
            Err(reason) => {
                tracing::info!(%reason, "a seccomp profile is left to libseccomp; starts with it take longer");
            }
        }
    }
    Ok(Filter::Profile(Arc::new(for_libseccomp(profile, host)?)))
}

/// A program in the form of [`CRUN_PROGRAM`] that lets everything pass but one call, which fails with `errno`. None on
/// architectures that we make no programs for.
pub fn failing(call: &str, errno: u32) -> Option<String> {
    let failing = LinuxSyscallBuilder::default().names([call.to_owned()]).action(LinuxSeccompAction::ScmpActErrno);
    let failing = failing.errno_ret(errno).build().ok()?;
    let profile = LinuxSeccompBuilder::default().default_action(LinuxSeccompAction::ScmpActAllow).syscalls([failing]);
    compile(&profile.build().ok()?, Machine::of_this_host()?).ok().map(|program| encoded(&program))
}

fn encoded(program: &[sock_filter]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes(program))
}

/// A program as the kernel and crun take it: `struct sock_filter`s in this machine's byte order (linux/filter.h).
pub fn bytes(program: &[sock_filter]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(program.len() * 8);
    for instruction in program {
        bytes.extend(instruction.code.to_ne_bytes());
        bytes.extend([instruction.jt, instruction.jf]);
        bytes.extend(instruction.k.to_ne_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_default_profile_is_kept_for_itself() {
        let filters = Filters::default();
        let capabilities = Capabilities::parse(&["CHOWN".to_owned()]).expect("capabilities");
        let made = |multiplexer| {
            let filter = filters.get(Source::Default(multiplexer), &capabilities, Form::Profile).expect("a filter");
            let Filter::Profile(profile) = filter else { panic!("asked for a profile") };
            let mut rules = profile.syscalls().iter().flatten().filter(|rule| rule.names() == &["socketcall"]);
            rules.next().map(oci_spec::runtime::LinuxSyscall::action)
        };
        for _ in 0..2 {
            assert_eq!(made(Multiplexer::Allowed), Some(LinuxSeccompAction::ScmpActAllow));
            assert_eq!(made(Multiplexer::Enosys), Some(LinuxSeccompAction::ScmpActErrno));
        }
        assert_eq!(filters.filters().len(), 2);
    }
}
