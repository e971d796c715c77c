//! seccomp filters of tasks: docker's default profile, profiles from files, and a compiler for both.
//!
//! Each profile can be passed as the OCI spec's `linux.seccomp`. All runtimes accept this form, and compile it with
//! libseccomp at each start (10 to 15 ms for the default profile). A runtime that accepts a compiled program gets one
//! of this module's compiler instead. Such a program is compiled only once, has a tenth of the size, and the same
//! verdict for each call (tests/seccomp/), except for calls that are newer than the profile, which are missing under
//! runc, too. In both forms, arguments that the kernel truncates are compared only by the
//! bits that the kernel keeps.

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
    sync::Arc,
};

use base64::Engine as _;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompBuilder, LinuxSyscallBuilder};
use parking_lot::{Mutex, MutexGuard};
use seccompiler::sock_filter;
use sha2::Digest as _;

use super::Capabilities;

pub use compile::{NewerCalls, NotCompiled, compile};
pub use docker::profile as default_profile;
pub use profile::{Profile, SeccompHost};
pub use restate::for_libseccomp;
pub use syscalls::Machine;

/// The annotation from which crun reads a compiled program (base64 of `struct sock_filter`s) instead of using
/// libseccomp.
pub const CRUN_PROGRAM: &str = "run.oci.seccomp_bpf_data";

/// Why a profile can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The file can't be read.
    #[error("could not read seccomp profile {path}")]
    Read {
        /// The file's path.
        path: PathBuf,
        /// The system call's error.
        source: std::io::Error,
    },
    /// The file is not a profile.
    #[error("seccomp profile {path} has neither docker's form nor the OCI spec's")]
    Parse {
        /// The file's path.
        path: PathBuf,
        /// The parser's error.
        source: serde_json::Error,
    },
    /// The profile contradicts itself, or can't be expressed.
    #[error("seccomp profile: {0}")]
    Invalid(String),
    /// Rules with different actions apply to the same call, and libseccomp would choose one by an order of its own.
    #[error(
        "seccomp profile: rules of different actions for {call} hold for the same arguments; \
        make their conditions exclude each other"
    )]
    Conflict {
        /// The system call.
        call: String,
    },
}

/// A task's filter, in the form that its runtime accepts.
#[derive(Debug, Clone, PartialEq)]
pub enum Filter {
    /// A profile for `linux.seccomp`.
    Profile(Arc<LinuxSeccomp>),
    /// A compiled program for [`CRUN_PROGRAM`].
    Program(Arc<str>),
}

/// The form in which a runtime accepts a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FilterForm {
    /// A profile in `linux.seccomp`.
    Profile,
    /// A compiled program.
    Program,
}

/// The default profile's verdict on `socketcall`, the call through which 32-bit x86 (and s390) programs make all socket
/// calls.
///
/// The address family lies in memory, where no filter can see it. A task that may use `socketcall` may therefore open
/// sockets of the families that the profile forbids (AF_ALG, AF_VSOCK). Docker refused the call (moby/moby#52494),
/// which broke 32-bit programs (moby/moby#52506), and let AppArmor and SELinux refuse the families instead
/// (moby/moby#52547, moby/moby#53551).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SocketcallPolicy {
    /// The call is allowed. An LSM profile should refuse the families.
    Allowed,
    /// The call fails with ENOSYS. Programs can make the direct calls, which Linux has since 4.3, but not all C
    /// libraries do.
    Enosys,
}

/// The source of a profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProfileSource<'a> {
    /// Docker's default profile.
    Default(SocketcallPolicy),
    /// A file, which has been read already.
    File {
        /// The file's path, for error messages.
        path: &'a Path,
        /// The file's content.
        text: &'a [u8],
    },
}

/// Identifies a profile.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Origin {
    Default(SocketcallPolicy),
    /// A file, identified by the hash of its content.
    File(Vec<u8>),
}

/// Everything that a filter depends on: the profile, the task's capabilities, and the form.
type Key = (Origin, Capabilities, FilterForm);

/// A cache of filters. It is kept only in memory, because a plugin makes docker's default filter in under a
/// millisecond: nothing that confines tasks is read back from a file.
#[derive(Debug, Default)]
pub struct FilterCache(Mutex<HashMap<Key, Filter>>);

/// The maximum number of filters that are cached. All jobs together usually have a handful of capability sets. A job
/// that uses another profile at each start must not fill the memory.
const FILTERS_MAX: usize = 64;

impl FilterCache {
    /// Returns the filter of a task with these capabilities. A profile that can't be compiled is returned as a profile,
    /// which every runtime accepts.
    ///
    /// # Errors
    /// Fails when the file is not a profile, or the profile contradicts itself.
    pub fn get(
        &self,
        source: ProfileSource<'_>,
        capabilities: &Capabilities,
        form: FilterForm,
    ) -> Result<Filter, SeccompError> {
        let origin = match source {
            ProfileSource::Default(socketcall) => Origin::Default(socketcall),
            ProfileSource::File { text, .. } => Origin::File(sha2::Sha256::digest(text).to_vec()),
        };
        let key = (origin, capabilities.clone(), form);
        if let Some(known) = self.filters().get(&key) {
            return Ok(known.clone());
        }
        let profile = match source {
            ProfileSource::Default(socketcall) => default_profile(socketcall),
            ProfileSource::File { path, text } => Profile::read(path, text)?,
        };
        let host = SeccompHost::this();
        let filter = build_filter(&profile.resolve(host, capabilities)?, host, form)?;
        let mut filters = self.filters();
        if filters.len() >= FILTERS_MAX {
            filters.clear();
        }
        filters.insert(key, filter.clone());
        Ok(filter)
    }

    fn filters(&self) -> MutexGuard<'_, HashMap<Key, Filter>> {
        self.0.lock()
    }
}

fn build_filter(profile: &LinuxSeccomp, host: SeccompHost, form: FilterForm) -> Result<Filter, SeccompError> {
    if let (FilterForm::Program, Some(machine)) = (form, Machine::of_this_host()) {
        match compile(profile, machine, NewerCalls::Missing) {
            Ok(program) => {
                return Ok(Filter::Program(encoded(&program).into()));
            }
            Err(reason) => {
                tracing::info!(
                    %reason,
                    "a seccomp profile can't be compiled and is left to libseccomp; starts with it take longer"
                );
            }
        }
    }
    Ok(Filter::Profile(Arc::new(for_libseccomp(profile, host)?)))
}

/// Returns a program, in the form of [`CRUN_PROGRAM`], that allows all calls except one, which fails with `errno`.
/// Returns `None` on architectures for which the compiler makes no programs.
pub fn program_failing_one_call(call: &str, errno: u32) -> Option<String> {
    let failing = LinuxSyscallBuilder::default().names([call.to_owned()]).action(LinuxSeccompAction::ScmpActErrno);
    let failing = failing.errno_ret(errno).build().ok()?;
    let profile = LinuxSeccompBuilder::default().default_action(LinuxSeccompAction::ScmpActAllow).syscalls([failing]);
    compile(&profile.build().ok()?, Machine::of_this_host()?, NewerCalls::Default).ok().map(|program| encoded(&program))
}

fn encoded(program: &[sock_filter]) -> String {
    base64::engine::general_purpose::STANDARD.encode(program_bytes(program))
}

/// Returns a program as the kernel and crun accept it: `struct sock_filter`s in this machine's byte order
/// (linux/filter.h).
pub fn program_bytes(program: &[sock_filter]) -> Vec<u8> {
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
    fn each_default_profile_is_cached_separately() {
        let filters = FilterCache::default();
        let capabilities = Capabilities::parse(&["CHOWN".to_owned()]).expect("capabilities");
        let action_for_socketcall = |socketcall| {
            let filter =
                filters.get(ProfileSource::Default(socketcall), &capabilities, FilterForm::Profile).expect("a filter");
            let Filter::Profile(profile) = filter else { panic!("asked for a profile") };
            let mut rules = profile.syscalls().iter().flatten().filter(|rule| rule.names() == &["socketcall"]);
            rules.next().map(oci_spec::runtime::LinuxSyscall::action)
        };
        for _ in 0..2 {
            assert_eq!(action_for_socketcall(SocketcallPolicy::Allowed), Some(LinuxSeccompAction::ScmpActAllow));
            assert_eq!(action_for_socketcall(SocketcallPolicy::Enosys), Some(LinuxSeccompAction::ScmpActErrno));
        }
        assert_eq!(filters.filters().len(), 2);
    }
}
