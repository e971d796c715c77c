//! The first process of a task with `init = true`. It starts the task's command as its child, passes signals on to it,
//! reaps orphans, and ends with the command's exit code: what docker's `--init` (tini) does.
//!
//! `build.rs` compiles this program by itself, without the standard library and without libc, so that it is one static
//! file of a few kilobytes that runs in every image. It is a part of the driver's own executable, which mounts it into
//! containers (`src/rootfs/init.rs`, docs/decisions/033).
//!
//! Usage: `init -- COMMAND [ARGUMENT...]`
#![no_std]
#![no_main]
// The compiler must not turn the loops of `memory` into calls of the same functions.
#![no_builtins]

mod command;
mod memory;
mod system;

use command::{Arguments, execute};
use system::{SignalSet, Wait};

/// The exit code when this program itself fails, as tini's.
const FAILED: i32 = 1;

/// Called by the entry point with the initial stack, which holds the arguments and the environment (execve(2)).
///
/// # Safety
/// `stack` must be the stack pointer that the kernel has set.
#[unsafe(no_mangle)]
unsafe extern "C" fn run(stack: *const usize) -> ! {
    // SAFETY: the caller passes the kernel's initial stack.
    let Some(arguments) = (unsafe { Arguments::read(stack) }) else {
        system::write_error(b"usage: init -- COMMAND [ARGUMENT...]\n");
        system::exit(FAILED)
    };
    // All signals wait until this process asks for them. SIGCHLD waits as well, so no child's end is missed.
    let before = system::block_signals(SignalSet::ALL);
    // Orphans come to this process also where it is not the first one of its PID namespace (pid_mode = "host").
    system::become_subreaper();
    match system::fork() {
        Ok(0) => execute(&arguments, before),
        Ok(child) => supervise(child),
        Err(_) => {
            system::write_error(b"init: can't start a process for the command\n");
            system::exit(FAILED)
        }
    }
}

/// Passes on signals and reaps processes until the child ends, and then ends with its code. The kernel then kills what
/// is left in the PID namespace.
fn supervise(child: i32) -> ! {
    loop {
        match system::wait_for_signal() {
            Some(system::SIGCHLD) => {
                while let Wait::Ended { pid, code } = system::reap() {
                    if pid == child {
                        system::exit(code);
                    }
                }
            }
            // The child may have ended a moment ago; then a SIGCHLD is pending.
            Some(signal) => system::kill(child, signal),
            None => {}
        }
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    system::write_error(b"init: internal error\n");
    system::exit(FAILED)
}
