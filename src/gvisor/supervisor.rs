//! The sandbox supervisor, which saves the exit code of a sandbox for gVisor's own shim.
//!
//! That shim gets a task's exit code from `runsc wait`, which asks the sandbox. A sandbox that has ended by then,
//! because its task was short, was killed or ran out of memory, can't answer, and the shim reports 128. But the kernel
//! has the exit code, because the sandbox's process ends in the same way as the task's first process. So the supervisor
//! calls `runsc create`, remains as the sandbox's parent, writes the exit code to a file, and releases a lock on that
//! file. `runsc wait` is replaced by waiting for the lock.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::{fs::OpenOptionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::wait::{WaitStatus, wait, waitpid},
    unistd::{ForkResult, Pid, fork, pipe, setsid},
};

use crate::{
    privileges::{SyscallFilter, confine},
    process,
};

/// This program's command that wrapper scripts call: `runsc-keeper RUNSC [FLAG...] -- [ARGUMENT...]`. The arguments are
/// those with which the shim has called its runsc.
pub const COMMAND: &str = "runsc-keeper";

/// The process name of a sandbox supervisor once its container has been created.
pub const SUPERVISOR_COMM: &std::ffi::CStr = c"runsc-keeper";

/// The system calls that a sandbox supervisor needs once its sandbox runs: it waits for the sandbox's end, writes the
/// exit code to a file that is already open, and ends.
const ALLOWED_SYSCALLS: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_flock,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_wait4,
    libc::SYS_write,
];

/// A shim's call of runsc.
#[derive(Debug, PartialEq, Eq)]
struct ShimCall<'a> {
    command: &'a str,
    root: Option<&'a str>,
    pid_file: Option<&'a str>,
    id: &'a str,
    /// Whether the call is about the container's first process, and not about an exec'd one.
    is_for_init: bool,
}

/// Parses the arguments of a call by gVisor's shim: global flags as `--name=value`, the command, the command's flags
/// with `=` or as two arguments, and the container's id.
fn parse(args: &[String]) -> Option<ShimCall<'_>> {
    let at = args.iter().position(|arg| !arg.starts_with('-'))?;
    let (globals, rest) = args.split_at(at);
    let (command, rest) = rest.split_first()?;
    let pid_flag = rest.iter().position(|arg| arg == "--pid-file");
    let pid_file = pid_flag.and_then(|at| rest.get(at + 1)).map(String::as_str);
    Some(ShimCall {
        command,
        root: globals.iter().find_map(|arg| arg.strip_prefix("--root=")),
        pid_file,
        id: rest.last()?,
        is_for_init: !rest
            .iter()
            .any(|arg| arg.starts_with("--pid") && arg != "--pid-file" || arg.starts_with("--rootpid")),
    })
}

impl ShimCall<'_> {
    /// Returns the file for the exit code. The file is locked until the exit code has been written.
    fn exit_code_path(&self) -> Option<PathBuf> {
        Some(Path::new(self.root?).join(format!("{}{EXIT_CODE_SUFFIX}", self.id)))
    }
}

/// The suffix of the file for the exit code, which follows the container's id.
pub(super) const EXIT_CODE_SUFFIX: &str = ".exit-code";

/// Handles a shim's call of runsc.
pub fn main(arguments: &[String]) -> ExitCode {
    let Some(at) = arguments.iter().position(|arg| arg == "--") else { return refused("-- is missing") };
    let (runsc, args) = (&arguments[..at], &arguments[at + 1..]);
    let Some((program, flags)) = runsc.split_first() else { return refused("runsc is missing") };
    let runsc_command = || {
        let mut command = process::command(program);
        command.args(flags).args(args);
        command
    };
    let call = parse(args);
    let call = call.as_ref().and_then(|call| Some((call, call.exit_code_path()?)));
    let outcome = match call {
        Some((call, path)) if call.command == "create" => create_supervised(runsc_command(), &path, call.pid_file),
        Some((call, path)) if call.command == "wait" && call.is_for_init => match wait_for_exit_code(&path) {
            Some(code) => return print_exit_status(call.id, code),
            None => Ok(None),
        },
        Some((call, path)) if call.command == "delete" => {
            // A `create` of the same container truncates a file that is left here.
            let _ = fs::remove_file(path);
            Ok(None)
        }
        _ => Ok(None),
    };
    match outcome {
        Ok(Some(code)) => ExitCode::from(code),
        Ok(None) => refused(&format!("could not execute {program}: {}", runsc_command().exec())),
        Err(error) => refused(&error.to_string()),
    }
}

/// Prints why a call failed and returns the exit code of a failure.
#[allow(clippy::print_stderr, reason = "read by the shim, like runsc's own messages")]
fn refused(problem: &str) -> ExitCode {
    eprintln!("nomad-driver-shim: {COMMAND}: {problem}");
    ExitCode::from(128)
}

/// Prints an exit code in the format of `runsc wait`.
#[allow(clippy::print_stdout, reason = "read by the shim")]
fn print_exit_status(id: &str, code: u8) -> ExitCode {
    println!("{}", serde_json::json!({ "id": id, "exitStatus": code }));
    ExitCode::SUCCESS
}

/// Waits until the supervisor has released its lock, and returns the exit code that the supervisor has written. Returns
/// `None` if the supervisor died before it could write one.
fn wait_for_exit_code(path: &Path) -> Option<u8> {
    let file = File::open(path).ok()?;
    let mut file = Flock::lock(file, FlockArg::LockShared).ok()?;
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Starts a sandbox supervisor that runs `runsc create`, and waits for the end of `runsc create` only. Returns the exit
/// code of `runsc create`; `None` for a call without a pid file, which is not supervised.
fn create_supervised(mut runsc: Command, exit_code_path: &Path, pid_file: Option<&str>) -> io::Result<Option<u8>> {
    let Some(pid_file) = pid_file else { return Ok(None) };
    if let Some(root) = exit_code_path.parent() {
        crate::files::create_private_dir(root)?;
    }
    let file = File::options().create(true).truncate(true).write(true).read(true).mode(0o600).open(exit_code_path)?;
    // The lock belongs to the open file description, which the child inherits. It is taken before the shim gets an
    // answer, so a later `runsc wait` finds the file locked.
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| io::Error::from(error))?;
    let (code_reader, code_writer) = pipe()?;
    // SAFETY: this process has one thread, so the child may call anything.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => {
            drop(code_writer);
            // The child holds the lock from now on. If the lock were dropped here, it would be released for the child,
            // too.
            std::mem::forget(lock);
            let mut code = Vec::new();
            File::from(code_reader).read_to_end(&mut code)?;
            Ok(Some(code.first().copied().unwrap_or(128)))
        }
        ForkResult::Child => {
            drop(code_reader);
            let outcome = supervise(&mut runsc, lock, Path::new(pid_file), File::from(code_writer));
            if outcome.is_err() {
                // Without the file, `runsc wait` is not replaced.
                let _ = fs::remove_file(exit_code_path);
            }
            // No process waits for the supervisor's exit code.
            Ok(Some(0))
        }
    }
}

/// Runs `runsc create`, writes its exit code to `create_code`, becomes the parent of the processes that it leaves
/// behind, and waits for the sandbox among them. The sandbox's exit code is written to the locked file.
fn supervise(runsc: &mut Command, mut lock: Flock<File>, pid_file: &Path, mut create_code: File) -> io::Result<()> {
    setsid()?;
    nix::sys::prctl::set_child_subreaper(true)?;
    let child = runsc.spawn()?;
    // The shim waits for the end of its pipes, which only the sandbox may keep open.
    redirect_streams_to_null()?;
    let child = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    let code = code_of(&waitpid(child, None)?).unwrap_or(128);
    let sandbox = fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse().ok()).map(Pid::from_raw);
    // With this name, the process is not mistaken for a runtime that is creating a container.
    nix::sys::prctl::set_name(SUPERVISOR_COMM)?;
    create_code.write_all(&[code])?;
    drop(create_code);
    let Some(sandbox) = sandbox.filter(|_| code == 0) else {
        return Err(io::ErrorKind::NotFound.into());
    };
    // A failure is ignored: the sandbox continues, and a supervisor that could not be confined is still its parent.
    let _ = confine(&[], SyscallFilter::Only(ALLOWED_SYSCALLS));
    loop {
        let status = wait()?;
        if status.pid() == Some(sandbox)
            && let Some(code) = code_of(&status)
        {
            return write!(lock, "{code}");
        }
    }
}

/// Redirects the standard streams of this process to /dev/null.
fn redirect_streams_to_null() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}

/// Converts a status to an exit code, which is 128 + n if signal n ended the process. Returns `None` while the process
/// lives.
fn code_of(status: &WaitStatus) -> Option<u8> {
    match status {
        WaitStatus::Exited(_, code) => u8::try_from(*code).ok(),
        WaitStatus::Signaled(_, signal, _) => u8::try_from(128 + *signal as i32).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_the_shim_are_parsed() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let text = words("--root=/r/nomad --log=/b/log.json create --bundle /b --pid-file /b/init.pid c1");
        let call = parse(&text).expect("a call");
        assert_eq!((call.command, call.pid_file, call.id), ("create", Some("/b/init.pid"), "c1"));
        assert_eq!(call.exit_code_path(), Some(PathBuf::from("/r/nomad/c1.exit-code")));
        assert!(parse(&words("--root=/r wait c1")).expect("a call").is_for_init);
        assert!(!parse(&words("--root=/r wait --pid 7 c1")).expect("a call").is_for_init);
        assert_eq!(parse(&words("--version")), None);
    }
}
