//! The program of the measured tasks: an executable of 300 bytes in each task's own directory, which writes the times
//! of its first and of its last instruction. So every driver and runtime is measured in the same way, and only by the
//! kernel's clock.
//!
//! The program first reads `CLOCK_MONOTONIC` and writes it as a `struct timespec` of 16 bytes, and does the same before
//! it ends. With one argument it waits for SIGTERM in between. With two arguments it waits for SIGTERM for at most 50
//! ms.

use std::{fs, io, os::unix::fs::PermissionsExt as _, path::Path};

use crate::elf;

/// The program's path inside of a container: every driver mounts Nomad's task directory there.
pub(crate) const PATH: &str = "/local/stamp";
/// The argument that makes the program wait for SIGTERM.
pub(crate) const WAIT_ARG: &str = "wait";
/// The second argument, which makes the program wait for 50 ms at most. That is longer than any subject takes to answer
/// a start once the task runs.
pub(crate) const BRIEF_WAIT_ARG: &str = "a while";

// The code is position independent and uses only the stack that the kernel provides. The mask 0x4000 (1 << 14) means
// SIGTERM, which is blocked before the first write, so that a stop after that write is never lost.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".pushsection .rodata.nds_stamp, \"a\"",
    ".globl nds_stamp_start",
    ".globl nds_stamp_end",
    "nds_stamp_start:",
    "mov r12, rsp",
    "sub rsp, 64",
    // clock_gettime(CLOCK_MONOTONIC, rsp)
    "mov eax, 228",
    "mov edi, 1",
    "mov rsi, rsp",
    "syscall",
    // rt_sigprocmask(SIG_BLOCK, rsp + 32, NULL, 8)
    "mov qword ptr [rsp + 32], 0x4000",
    "mov eax, 14",
    "xor edi, edi",
    "lea rsi, [rsp + 32]",
    "xor edx, edx",
    "mov r10d, 8",
    "syscall",
    // write(1, rsp, 16)
    "mov eax, 1",
    "mov edi, 1",
    "mov rsi, rsp",
    "mov edx, 16",
    "syscall",
    "cmp qword ptr [r12], 1",
    "je 2f",
    // rt_sigtimedwait(rsp + 32, NULL, NULL or rsp + 48, 8)
    "xor edx, edx",
    "cmp qword ptr [r12], 2",
    "je 3f",
    "mov qword ptr [rsp + 48], 0",
    "mov qword ptr [rsp + 56], 50000000",
    "lea rdx, [rsp + 48]",
    "3:",
    "mov eax, 128",
    "lea rdi, [rsp + 32]",
    "xor esi, esi",
    "mov r10d, 8",
    "syscall",
    "2:",
    "mov eax, 228",
    "mov edi, 1",
    "mov rsi, rsp",
    "syscall",
    "mov eax, 1",
    "mov edi, 1",
    "mov rsi, rsp",
    "mov edx, 16",
    "syscall",
    // exit_group(0)
    "mov eax, 231",
    "xor edi, edi",
    "syscall",
    "nds_stamp_end:",
    ".popsection",
);

#[cfg(target_arch = "aarch64")]
std::arch::global_asm!(
    ".pushsection .rodata.nds_stamp, \"a\"",
    ".globl nds_stamp_start",
    ".globl nds_stamp_end",
    "nds_stamp_start:",
    "ldr x19, [sp]",
    "sub sp, sp, #64",
    "mov x8, #113",
    "mov x0, #1",
    "mov x1, sp",
    "svc #0",
    "mov x9, #0x4000",
    "str x9, [sp, #32]",
    "mov x8, #135",
    "mov x0, #0",
    "add x1, sp, #32",
    "mov x2, #0",
    "mov x3, #8",
    "svc #0",
    "mov x8, #64",
    "mov x0, #1",
    "mov x1, sp",
    "mov x2, #16",
    "svc #0",
    "cmp x19, #1",
    "b.eq 2f",
    "mov x2, #0",
    "cmp x19, #2",
    "b.eq 3f",
    "movz x9, #0xf080",
    "movk x9, #0x2fa, lsl #16",
    "stp xzr, x9, [sp, #48]",
    "add x2, sp, #48",
    "3:",
    "mov x8, #137",
    "add x0, sp, #32",
    "mov x1, #0",
    "mov x3, #8",
    "svc #0",
    "2:",
    "mov x8, #113",
    "mov x0, #1",
    "mov x1, sp",
    "svc #0",
    "mov x8, #64",
    "mov x0, #1",
    "mov x1, sp",
    "mov x2, #16",
    "svc #0",
    "mov x8, #94",
    "mov x0, #0",
    "svc #0",
    "nds_stamp_end:",
    ".popsection",
);

unsafe extern "C" {
    static nds_stamp_start: u8;
    static nds_stamp_end: u8;
}

/// Returns the machine code.
fn code() -> &'static [u8] {
    // SAFETY: both labels are in one read-only section, in this order and with the code between them.
    unsafe {
        let (start, end) = (&raw const nds_stamp_start, &raw const nds_stamp_end);
        std::slice::from_raw_parts(start, usize::try_from(end.offset_from(start)).unwrap_or_default())
    }
}

/// Returns the program's file content.
pub(crate) fn program() -> Vec<u8> {
    elf::executable(code())
}

/// Writes the program into a task's own directory.
///
/// # Errors
/// Fails when the file can't be written or made executable.
pub(crate) fn install(local: &Path) -> io::Result<()> {
    let path = local.join("stamp");
    fs::write(&path, program())?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
}

/// Parses the program's output: the times in nanoseconds of its first and, if it has ended, of its last instruction.
pub(crate) fn read(output: &[u8]) -> (Option<u64>, Option<u64>) {
    let mut stamps = output.chunks_exact(16).map(|stamp| {
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |word, byte| word << 8 | u64::from(*byte));
        word(&stamp[..8]) * 1_000_000_000 + word(&stamp[8..])
    });
    (stamps.next(), stamps.next())
}

/// Returns the time of the kernel's monotonic clock in nanoseconds, the clock that the program reads.
pub(crate) fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec, and this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    u64::try_from(time.tv_sec).unwrap_or_default() * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn the_program_writes_the_times_of_its_start_and_end() {
        let directory = tempfile::tempdir().expect("a directory");
        install(directory.path()).expect("written");
        let before = now();
        let output = Command::new(directory.path().join("stamp")).output().expect("runs");
        let after = now();
        assert!(output.status.success() && output.stderr.is_empty());
        let (first, last) = read(&output.stdout);
        let (first, last) = (first.expect("the first time"), last.expect("the last time"));
        assert!(before < first && first <= last && last < after, "{before} {first} {last} {after}");

        let mut waiting =
            Command::new(directory.path().join("stamp")).arg(WAIT_ARG).stdout(Stdio::piped()).spawn().expect("runs");
        let mut stdout = waiting.stdout.take().expect("piped");
        let mut stamp = [0; 16];
        std::io::Read::read_exact(&mut stdout, &mut stamp).expect("the program writes its first time");
        assert!(waiting.try_wait().expect("the child can be waited for").is_none(), "the program waits");
        let pid = nix::unistd::Pid::from_raw(i32::try_from(waiting.id()).expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("sent");
        assert!(waiting.wait().expect("ends").success());

        let output =
            Command::new(directory.path().join("stamp")).args([WAIT_ARG, BRIEF_WAIT_ARG]).output().expect("runs");
        let (first, last) = read(&output.stdout);
        let lived = last.expect("the last time") - first.expect("the first time");
        assert!(lived >= 50_000_000, "{lived} ns");
    }
}
