//! The command that this program starts.

use crate::system::{self, EACCES, ENOENT, ENOEXEC, ENOTDIR, Errno, SignalSet};

/// The exit codes of shells and docker for a command that can't be run, and for one that does not exist.
const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;
/// The directories in which a command is looked up without `PATH`, as in glibc.
const DEFAULT_PATH: &[u8] = b"/bin:/usr/bin";
/// The length of the kernel's longest path, with its terminator.
const PATH_MAX: usize = 4096;
/// The shell that runs a script without a `#!` line, as execvp(3) does.
const SHELL: &core::ffi::CStr = c"/bin/sh";

/// A list of strings as the kernel passes it: pointers, of which the last one is null.
type Strings = *const *const u8;

/// The command with its arguments, and the environment.
pub(crate) struct Arguments {
    command: Strings,
    count: usize,
    environment: Strings,
}

impl Arguments {
    /// Reads them from the initial stack: a count, the arguments, a null pointer, the environment, a null pointer.
    /// Returns `None` if there is no command behind `--`.
    ///
    /// # Safety
    /// `stack` must be the stack pointer that the kernel has set.
    pub(crate) unsafe fn read(stack: *const usize) -> Option<Self> {
        // SAFETY: the kernel has put the number of arguments at the stack pointer, and that many pointers and a null
        // pointer behind it. The environment follows.
        unsafe {
            let count = *stack;
            let all = stack.add(1).cast::<*const u8>();
            let is_separator = count > 2 && bytes(*all.add(1)) == b"--";
            is_separator.then(|| Self { command: all.add(2), count: count - 2, environment: all.add(count + 1) })
        }
    }

    fn name(&self) -> *const u8 {
        // SAFETY: there is at least one argument.
        unsafe { *self.command }
    }

    /// Returns the value of `PATH`.
    fn path(&self) -> &[u8] {
        let mut at = self.environment;
        // SAFETY: the environment ends with a null pointer, and its entries are C strings.
        unsafe {
            while !(*at).is_null() {
                if let Some(path) = bytes(*at).strip_prefix(b"PATH=") {
                    return path;
                }
                at = at.add(1);
            }
        }
        DEFAULT_PATH
    }
}

/// Turns this process, the child, into the command. As in tini, the command has a process group of its own, which has
/// the terminal if there is one. Signals are as they were before this program was started.
pub(crate) fn execute(arguments: &Arguments, signals: SignalSet) -> ! {
    system::own_foreground_group();
    system::set_signals(signals);
    let error = run_found(arguments);
    system::write_error(b"init: exec ");
    // SAFETY: the name is a C string of the initial stack.
    system::write_error(unsafe { bytes(arguments.name()) });
    let (reason, code): (&[u8], i32) = match error {
        ENOENT | ENOTDIR => (b": not found\n", NOT_FOUND),
        EACCES => (b": permission denied\n", NOT_EXECUTABLE),
        _ => (b": can't be executed\n", NOT_EXECUTABLE),
    };
    system::write_error(reason);
    system::exit(code)
}

/// Executes the command, which is looked up in `PATH` if it is a bare name. Returns why that has failed: the last
/// error, but rather that a file may not be executed than that there is none (execvp(3)).
fn run_found(arguments: &Arguments) -> Errno {
    // SAFETY: the name is a C string of the initial stack.
    let name = unsafe { bytes(arguments.name()) };
    if name.contains(&b'/') {
        return run_file(arguments, arguments.name());
    }
    let mut found = ENOENT;
    for directory in arguments.path().split(|byte| *byte == b':') {
        let mut path = [0_u8; PATH_MAX];
        if !join(&mut path, directory, name) {
            continue;
        }
        match run_file(arguments, path.as_ptr()) {
            ENOENT | ENOTDIR => {}
            error => found = error,
        }
    }
    found
}

/// Writes `directory/name` with its terminator into a buffer of zeros. Returns false if it does not fit. An empty entry
/// of `PATH` means the working directory.
fn join(path: &mut [u8; PATH_MAX], directory: &[u8], name: &[u8]) -> bool {
    let directory = if directory.is_empty() { b"." } else { directory };
    if directory.len() + name.len() + 2 > PATH_MAX {
        return false;
    }
    let parts = directory.iter().chain(b"/").chain(name);
    path.iter_mut().zip(parts).for_each(|(to, from)| *to = *from);
    true
}

fn run_file(arguments: &Arguments, file: *const u8) -> Errno {
    let error = system::execve(file, arguments.command, arguments.environment);
    if error != ENOEXEC {
        return error;
    }
    run_script(arguments, file)
}

/// The number of arguments that a script without a `#!` line can have. Their list is on the stack.
const SCRIPT_ARGUMENTS_MAX: usize = 1024;

fn run_script(arguments: &Arguments, file: *const u8) -> Errno {
    if arguments.count > SCRIPT_ARGUMENTS_MAX {
        return ENOEXEC;
    }
    let mut list = [core::ptr::null::<u8>(); SCRIPT_ARGUMENTS_MAX + 2];
    list[0] = SHELL.as_ptr().cast();
    list[1] = file;
    for number in 1..arguments.count {
        // SAFETY: `count` is the number of arguments.
        list[number + 1] = unsafe { *arguments.command.add(number) };
    }
    system::execve(SHELL.as_ptr().cast(), list.as_ptr(), arguments.environment);
    ENOEXEC
}

/// Returns the bytes of a C string.
///
/// # Safety
/// `text` must be a C string that is never changed.
unsafe fn bytes(text: *const u8) -> &'static [u8] {
    let mut length = 0;
    // SAFETY: a C string ends with a null byte, and all bytes before it can be read.
    unsafe {
        while *text.add(length) != 0 {
            length += 1;
        }
        core::slice::from_raw_parts(text, length)
    }
}
