//! The keeper of a sandbox's exit code, for gVisor's own shim.
//!
//! That shim learns how a task ended from `runsc wait`, which asks the sandbox itself: one that is gone by then, because
//! it was quick, killed or out of memory, can't be asked, and the shim answers 128. The kernel knows better: the
//! sandbox's process ends as the task's first process did. So `runsc create` is called by a process that stays behind as
//! the sandbox's parent, notes how it ends, and lets go of a lock; and `runsc wait` waits for that lock.

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
    privileges::{Calls, confine},
    process,
};

/// The command of ours that wrappers call: `runsc-keeper RUNSC [FLAG...] -- [WORD...]`, the words being what the shim has
/// called its runsc with.
pub const COMMAND: &str = "runsc-keeper";

/// What a keeper is called once its container is made.
pub const KEEPING: &std::ffi::CStr = c"runsc-keeper";

/// All that a keeper calls once its sandbox runs: it waits for its end, notes it in a file that it has open, and ends.
const ALLOWED: &[libc::c_long] = &[
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

/// What a shim calls runsc for.
#[derive(Debug, PartialEq, Eq)]
struct Call<'a> {
    command: &'a str,
    root: Option<&'a str>,
    pid_file: Option<&'a str>,
    id: &'a str,
    /// Is it for a container's first process, and nothing else of it?
    whole: bool,
}

/// Reads what gVisor's shim says: global flags as `--name=value`, the command, its flags with `=` or as two words, the id.
fn parse(words: &[String]) -> Option<Call<'_>> {
    let at = words.iter().position(|word| !word.starts_with('-'))?;
    let (globals, rest) = words.split_at(at);
    let (command, rest) = rest.split_first()?;
    let value = |list: &'_ [String], name: &str| -> Option<usize> { list.iter().position(|word| word == name) };
    let pid_file = value(rest, "--pid-file").and_then(|at| rest.get(at + 1)).map(String::as_str);
    Some(Call {
        command,
        root: globals.iter().find_map(|word| word.strip_prefix("--root=")),
        pid_file,
        id: rest.last()?,
        whole: !rest
            .iter()
            .any(|word| word.starts_with("--pid") && word != "--pid-file" || word.starts_with("--rootpid")),
    })
}

impl Call<'_> {
    /// Where the exit code is noted, and which lock says that it is not yet.
    fn note(&self) -> Option<PathBuf> {
        Some(Path::new(self.root?).join(format!("{}{SUFFIX}", self.id)))
    }
}

/// Follows the container's id in the note's name.
pub(super) const SUFFIX: &str = ".exit-code";

/// Does what the shim wants of runsc.
pub fn main(arguments: &[String]) -> ExitCode {
    let Some(at) = arguments.iter().position(|word| word == "--") else { return refused("-- is missing") };
    let (runsc, words) = (&arguments[..at], &arguments[at + 1..]);
    let Some((program, flags)) = runsc.split_first() else { return refused("runsc is missing") };
    let real = || {
        let mut command = process::command(program);
        command.args(flags).args(words);
        command
    };
    let call = parse(words);
    let noted = call.as_ref().and_then(|call| Some((call, call.note()?)));
    let outcome = match noted {
        Some((call, note)) if call.command == "create" => create(real(), &note, call.pid_file),
        Some((call, note)) if call.command == "wait" && call.whole => match awaited(&note) {
            Some(code) => return told(call.id, code),
            None => Ok(None),
        },
        Some((call, note)) if call.command == "delete" => {
            let _ = fs::remove_file(note);
            Ok(None)
        }
        _ => Ok(None),
    };
    match outcome {
        Ok(Some(code)) => ExitCode::from(code),
        Ok(None) => refused(&format!("{program}: {}", real().exec())),
        Err(error) => refused(&error.to_string()),
    }
}

#[allow(clippy::print_stderr, reason = "read by the shim, as runsc's own words are")]
fn refused(problem: &str) -> ExitCode {
    eprintln!("nomad-driver-shim: {COMMAND}: {problem}");
    ExitCode::from(128)
}

/// As `runsc wait` says it.
#[allow(clippy::print_stdout, reason = "read by the shim")]
fn told(id: &str, code: u8) -> ExitCode {
    println!("{}", serde_json::json!({ "id": id, "exitStatus": code }));
    ExitCode::SUCCESS
}

/// Waits until the keeper has ended: the code that it has noted, if it lived to do so.
fn awaited(note: &Path) -> Option<u8> {
    let file = File::open(note).ok()?;
    let mut file = Flock::lock(file, FlockArg::LockShared).ok()?;
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Has a keeper run `runsc create` and waits for that only: its exit code.
fn create(mut runsc: Command, note: &Path, pid_file: Option<&str>) -> io::Result<Option<u8>> {
    let Some(pid_file) = pid_file else { return Ok(None) };
    if let Some(root) = note.parent() {
        crate::places::make_dir(root)?;
    }
    let file = File::options().create(true).truncate(true).write(true).read(true).mode(0o600).open(note)?;
    // Of the open file, so that the child has it, too; and whoever waits finds it taken once we have answered.
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| io::Error::from(error))?;
    let (answer, tell) = pipe()?;
    // SAFETY: this process has one thread, so the child may do what it likes.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => {
            drop(tell);
            // The lock is the child's now.
            std::mem::forget(lock);
            let mut code = Vec::new();
            File::from(answer).read_to_end(&mut code)?;
            Ok(Some(code.first().copied().unwrap_or(128)))
        }
        ForkResult::Child => {
            drop(answer);
            let kept = keep(&mut runsc, lock, Path::new(pid_file), File::from(tell));
            if kept.is_err() {
                let _ = fs::remove_file(note);
            }
            // Nobody asks.
            Ok(Some(0))
        }
    }
}

/// Becomes the parent of whatever `runsc create` leaves, and waits for the sandbox among it.
fn keep(runsc: &mut Command, mut lock: Flock<File>, pid_file: &Path, mut tell: File) -> io::Result<()> {
    setsid()?;
    nix::sys::prctl::set_child_subreaper(true)?;
    let child = runsc.spawn()?;
    // The shim waits for the end of its pipes, which must be the sandbox's alone.
    silence()?;
    let child = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    let code = code_of(&waitpid(child, None)?).unwrap_or(128);
    let sandbox = fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse().ok()).map(Pid::from_raw);
    // For whoever looks whether a runtime is at work: this is none.
    nix::sys::prctl::set_name(KEEPING)?;
    tell.write_all(&[code])?;
    drop(tell);
    let Some(sandbox) = sandbox.filter(|_| code == 0) else {
        return Err(io::ErrorKind::NotFound.into());
    };
    // The sandbox lives on in any case, and a keeper that could not be confined is still its parent.
    let _ = confine(&[], Calls::Only(ALLOWED));
    loop {
        let status = wait()?;
        if status.pid() == Some(sandbox)
            && let Some(code) = code_of(&status)
        {
            return write!(lock, "{code}");
        }
    }
}

fn silence() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}

/// 128 + n for a death by signal n; None while it lives.
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
    fn the_shims_calls_are_understood() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let text = words("--root=/r/nomad --log=/b/log.json create --bundle /b --pid-file /b/init.pid c1");
        let call = parse(&text).expect("a call");
        assert_eq!((call.command, call.pid_file, call.id), ("create", Some("/b/init.pid"), "c1"));
        assert_eq!(call.note(), Some(PathBuf::from("/r/nomad/c1.exit-code")));
        assert!(parse(&words("--root=/r wait c1")).expect("a call").whole);
        assert!(!parse(&words("--root=/r wait --pid 7 c1")).expect("a call").whole);
        assert_eq!(parse(&words("--version")), None);
    }
}
