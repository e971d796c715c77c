//! The kernel's limits on a process's strings and paths. They are checked before a runtime gets the strings: some
//! runtimes hang on longer ones (runc's `create` with a command of a megabyte). crun cuts strings at NUL bytes, so it
//! would see something else than what the driver has checked.

use std::{os::unix::ffi::OsStrExt as _, path::Path};

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::{SysconfVar, sysconf},
};
use oci_spec::runtime::{PosixRlimit, PosixRlimitType, Process, Spec};

use crate::text::quoted;

/// The length of the longest path in bytes, without its NUL byte (`PATH_MAX`, `linux/limits.h`).
const PATH_MAX: usize = 4095;
/// The upper limit on the total size of arguments and environment in bytes, however large the stack's limit is
/// (fs/exec.c, `bprm_stack_limits`: three quarters of `_STK_LIM`).
const TOTAL_MAX: u64 = 6 << 20;
/// The total size in bytes that arguments and environment may have even with a small stack (`ARG_MAX`,
/// `linux/limits.h`).
const TOTAL_MIN: u64 = 128 << 10;
/// The size of the pointer that the kernel counts for each string, in bytes.
const POINTER_SIZE: u64 = 8;

/// Why the kernel would not accept a string or path as it is.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StringError {
    /// The string contains a NUL byte, at which C ends a string.
    #[error("{what} contains a NUL byte: {}", quoted(.value))]
    Nul {
        /// What the string is.
        what: String,
        /// The whole string.
        value: String,
    },
    /// A string is too long for execve(2).
    #[error(
        "{what} has {bytes} bytes; the kernel accepts at most {most} in one argument or variable; pass it in a file"
    )]
    Long {
        /// Which argument or variable it is.
        what: String,
        /// The string's length.
        bytes: usize,
        /// The longest length that the kernel accepts.
        most: usize,
    },
    /// All strings together are too long for execve(2).
    #[error(
        "arguments and environment have {bytes} bytes; the kernel accepts at most {most} of them, a quarter of the stack's limit; pass them in a file, or raise ulimit {{ stack }}"
    )]
    Total {
        /// The total size, including pointers.
        bytes: u64,
        /// The largest size that the kernel accepts.
        most: u64,
    },
    /// A path is too long.
    #[error("{what} has {bytes} bytes; the kernel accepts at most {PATH_MAX} in a path: {}", quoted(.path))]
    Path {
        /// What the path is for.
        what: String,
        /// The path's length.
        bytes: usize,
        /// The path.
        path: String,
    },
}

/// The limits of this host's kernel that differ from host to host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelLimits {
    /// The length of the longest argument or variable in bytes, without its NUL byte (`MAX_ARG_STRLEN`,
    /// `linux/binfmts.h`: 32 pages).
    string: usize,
    /// The soft limit on the stack that a task inherits from this process.
    stack: u64,
}

impl KernelLimits {
    /// Reads the limits from the kernel. Shims, runtimes and tasks inherit this process's limit on the stack.
    pub fn of_this_process() -> Self {
        let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|page| usize::try_from(page).ok());
        let stack = getrlimit(Resource::RLIMIT_STACK).map_or(8 << 20, |(soft, _)| soft);
        Self { string: page.unwrap_or(4096) * 32 - 1, stack }
    }

    /// Returns the largest total size of arguments and environment where the stack is limited to `stack` bytes.
    fn total(stack: u64) -> u64 {
        TOTAL_MAX.min(stack / 4).max(TOTAL_MIN)
    }

    /// Checks the strings of a process, each by itself and all together. `stack` is the task's own limit on its stack,
    /// if it has one.
    ///
    /// # Errors
    /// Fails with the first string that execve(2) would not accept as it is.
    fn check_strings(&self, args: &[String], env: &[String], stack: Option<u64>) -> Result<(), StringError> {
        // The command is a path itself, or becomes one when it is looked up in PATH.
        if let Some(command) = args.first() {
            check_path("the command", Path::new(command))?;
        }
        let arguments = args.iter().enumerate().map(|(n, text)| (text, Named::Argument(n)));
        let variables = env.iter().map(|text| (text, Named::Variable(text)));
        let mut total = 0;
        for (text, named) in arguments.chain(variables) {
            if text.contains('\0') {
                return Err(StringError::Nul { what: named.to_string(), value: text.clone() });
            }
            if text.len() > self.string {
                return Err(StringError::Long { what: named.to_string(), bytes: text.len(), most: self.string });
            }
            total += text.len() as u64 + 1 + POINTER_SIZE;
        }
        let most = Self::total(stack.unwrap_or(self.stack));
        if total > most { Err(StringError::Total { bytes: total, most }) } else { Ok(()) }
    }

    /// Checks the strings and paths of a process.
    ///
    /// # Errors
    /// Fails with the first one that the kernel would not accept as it is.
    pub fn check_process(&self, process: &Process) -> Result<(), StringError> {
        let mut limits = process.rlimits().iter().flatten();
        let stack = limits.find(|limit| limit.typ() == PosixRlimitType::RlimitStack).map(PosixRlimit::soft);
        let (args, env) = (process.args().as_deref(), process.env().as_deref());
        self.check_strings(args.unwrap_or_default(), env.unwrap_or_default(), stack)?;
        check_path("cwd", process.cwd())
    }

    /// Checks all strings and paths of a spec that jobs and images can influence.
    ///
    /// # Errors
    /// Fails with the first string or path that the kernel would not accept as it is.
    pub fn check(&self, spec: &Spec) -> Result<(), StringError> {
        if let Some(process) = spec.process() {
            self.check_process(process)?;
        }
        if let Some(hostname) = spec.hostname() {
            no_nul(|| "hostname".to_owned(), hostname)?;
        }
        for mount in spec.mounts().iter().flatten() {
            let options = mount.options().iter().flatten().chain(mount.typ());
            check_mount(mount.destination(), mount.source().as_deref(), options)?;
        }
        for (key, value) in spec.annotations().iter().flatten() {
            no_nul(|| "the key of an annotation".to_owned(), key)?;
            no_nul(|| format!("annotation {}", quoted(key)), value)?;
        }
        let Some(linux) = spec.linux() else { return Ok(()) };
        for (name, value) in linux.sysctl().iter().flatten() {
            check_path("the name of a sysctl", Path::new(name))?;
            no_nul(|| format!("sysctl {}", quoted(name)), value)?;
        }
        for device in linux.devices().iter().flatten() {
            check_path("the path of a device", device.path())?;
        }
        for namespace in linux.namespaces().iter().flatten() {
            namespace.path().iter().try_for_each(|place| check_path("the path of a namespace", place))?;
        }
        linux.cgroups_path().iter().try_for_each(|place| check_path("the path of the cgroup", place))
    }
}

/// How error messages name a string of a process.
enum Named<'a> {
    /// An argument, by its index.
    Argument(usize),
    /// A variable, as `NAME=value`.
    Variable(&'a str),
}

impl std::fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Argument(0) => write!(f, "the command"),
            Self::Argument(n) => write!(f, "argument {n} of the command"),
            Self::Variable(text) => {
                write!(f, "environment variable {}", quoted(text.split('=').next().unwrap_or(text)))
            }
        }
    }
}

/// Checks the strings and paths of a mount: its target, its source, and its options, of which the type may be one.
///
/// # Errors
/// Fails with the first string or path that the kernel would not accept as it is.
pub fn check_mount<'a>(
    target: &Path,
    source: Option<&Path>,
    mut options: impl Iterator<Item = &'a String>,
) -> Result<(), StringError> {
    check_path("the target of a mount", target)?;
    let named = |what: &str| format!("{what} of the mount at {}", quoted(&target.to_string_lossy()));
    if let Some(source) = source {
        check_path(&named("the source"), source)?;
    }
    options.try_for_each(|option| no_nul(|| named("an option"), option))
}

/// Checks that a text contains no NUL byte, at which C would end the string.
///
/// # Errors
/// Fails when the text contains a NUL byte.
pub(crate) fn no_nul(what: impl FnOnce() -> String, text: &str) -> Result<(), StringError> {
    if text.contains('\0') { Err(StringError::Nul { what: what(), value: text.to_owned() }) } else { Ok(()) }
}

/// Checks a path's length, and that it contains no NUL byte.
fn check_path(what: &str, path: &Path) -> Result<(), StringError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.contains(&0) {
        return Err(StringError::Nul { what: what.to_owned(), value: path.to_string_lossy().into_owned() });
    }
    if bytes.len() > PATH_MAX {
        let path = path.to_string_lossy().into_owned();
        return Err(StringError::Path { what: what.to_owned(), bytes: bytes.len(), path });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const LIMITS: KernelLimits = KernelLimits { string: 131_071, stack: 8 << 20 };

    #[test]
    fn the_limits_are_the_kernels() {
        let check = |args: &[String], env: &[String], stack| LIMITS.check_strings(args, env, stack);
        let long = |bytes| "x".repeat(bytes);
        check(&["sh".to_owned(), long(131_071)], &[], None).expect("fits");
        check(&[long(4095)], &[], None).expect("a path");
        let error = check(&[long(4096)], &[], None).expect_err("no path").to_string();
        assert!(error.starts_with("the command has 4096 bytes; the kernel accepts at most 4095 in a path"), "{error}");
        let error = check(&["sh".to_owned(), long(131_072)], &[], None).expect_err("too long").to_string();
        assert!(
            error.starts_with("argument 1 of the command has 131072 bytes; the kernel accepts at most 131071"),
            "{error}"
        );
        let error = check(&[], &[format!("BIG={}", long(131_072))], None).expect_err("too long").to_string();
        assert!(error.starts_with("environment variable \"BIG\" has 131076 bytes"), "{error}");
        // The default limit is 2 MiB: 16 strings of 128 KiB with their pointers are slightly larger.
        let many = |count| [vec!["sh".to_owned()], vec![long(131_071); count]].concat();
        check(&many(15), &[], None).expect("fits");
        assert!(matches!(check(&many(16), &[], None), Err(StringError::Total { most: 2_097_152, .. })));
        check(&many(16), &[], Some(libc::RLIM_INFINITY)).expect("6 MiB");
        assert!(check(&many(48), &[], Some(libc::RLIM_INFINITY)).is_err());
        check(&[], &[long(100_000)], Some(4096)).expect("128 KiB in any case");
        let real = KernelLimits::of_this_process();
        assert!(real.string >= LIMITS.string && real.stack > 0, "{real:?}");
    }

    fn spec() -> Value {
        json!({
            "ociVersion": "1.0.2", "hostname": "host", "annotations": {"key": "value"},
            "root": {"path": "rootfs"},
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": ["sh", "-c"], "env": ["A=1"], "cwd": "/srv",
                "rlimits": [{"type": "RLIMIT_STACK", "hard": 8_388_608, "soft": 8_388_608}],
            },
            "mounts": [{"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]}],
            "linux": {
                "sysctl": {"net.core.somaxconn": "9"}, "cgroupsPath": "/nomad/a",
                "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}],
                "namespaces": [{"type": "network", "path": "/run/netns/x"}],
            },
        })
    }

    /// Calls `visit` with each text of a spec and its JSON pointer.
    fn each_text(value: &mut Value, at: &str, visit: &mut impl FnMut(&str, &mut String)) {
        match value {
            Value::String(text) => visit(at, text),
            Value::Array(items) => {
                items.iter_mut().enumerate().for_each(|(n, item)| each_text(item, &format!("{at}/{n}"), visit));
            }
            Value::Object(map) => map.iter_mut().for_each(|(key, item)| each_text(item, &format!("{at}/{key}"), visit)),
            _ => {}
        }
    }

    #[test]
    fn no_text_of_a_spec_may_contain_a_nul_byte() {
        let mut places = Vec::new();
        each_text(&mut spec(), "", &mut |at, _| places.push(at.to_owned()));
        // These are set by the driver, or are keywords of the OCI spec.
        let set_by_driver = [
            "/ociVersion",
            "/root/path",
            "/process/rlimits/0/type",
            "/linux/devices/0/type",
            "/linux/namespaces/0/type",
        ];
        for place in places.iter().filter(|place| !set_by_driver.contains(&place.as_str())) {
            let mut changed = spec();
            each_text(&mut changed, "", &mut |at, text| {
                if at == place {
                    text.push_str("\0x");
                }
            });
            let changed: Spec = serde_json::from_value(changed).expect("a spec");
            assert!(matches!(LIMITS.check(&changed), Err(StringError::Nul { .. })), "{place}");
        }
        for (object, key) in [("/annotations", "key\0x"), ("/linux/sysctl", "net.x\0y")] {
            let mut changed = spec();
            changed.pointer_mut(object).expect("there")[key] = json!("1");
            let changed: Spec = serde_json::from_value(changed).expect("a spec");
            assert!(matches!(LIMITS.check(&changed), Err(StringError::Nul { .. })), "{object}");
        }
        LIMITS.check(&serde_json::from_value(spec()).expect("a spec")).expect("fine");
    }

    #[test]
    fn paths_have_the_kernels_length() {
        for (place, what) in [
            ("/process/cwd", "cwd"),
            ("/mounts/0/destination", "the target of a mount"),
            ("/mounts/0/source", "the source of the mount at \"/t\""),
            ("/linux/devices/0/path", "the path of a device"),
        ] {
            let with = |bytes: usize| {
                let mut changed = spec();
                *changed.pointer_mut(place).expect("there") = json!(format!("/{}", "p".repeat(bytes - 1)));
                LIMITS.check(&serde_json::from_value(changed).expect("a spec"))
            };
            with(4095).expect(place);
            let error = with(1 << 20).expect_err(place).to_string();
            assert!(error.starts_with(&format!("{what} has 1048576 bytes")) && error.len() < 1000, "{error}");
        }
    }
}
