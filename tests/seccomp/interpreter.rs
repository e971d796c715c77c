//! Runs a seccomp program as the kernel does.

use seccompiler::sock_filter;

/// The data that the kernel passes to a filter (linux/seccomp.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Call {
    pub number: u32,
    pub arch: u32,
    pub arguments: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        let argument = |n: u32| self.arguments[n as usize];
        match offset {
            0 => self.number,
            4 => self.arch,
            // The instruction pointer, which no rule reads.
            8 | 12 => 0,
            16..64 if offset.is_multiple_of(8) => argument((offset - 16) / 8) as u32,
            16..64 if offset % 8 == 4 => (argument((offset - 16) / 8) >> 32) as u32,
            _ => panic!("load from {offset}"),
        }
    }
}

/// Interprets classic BPF as the kernel's seccomp accepts it (kernel/seccomp.c, `seccomp_check_filter`). Any other
/// instruction makes the test fail.
pub(crate) fn verdict(program: &[sock_filter], call: &Call) -> u32 {
    let (mut at, mut a) = (0_usize, 0_u32);
    loop {
        let instruction = program.get(at).unwrap_or_else(|| panic!("ran out of the program at {at}"));
        let k = instruction.k;
        at += 1;
        let holds = match instruction.code {
            0x20 => {
                a = call.word(k);
                continue;
            }
            0x54 => {
                a &= k;
                continue;
            }
            0x05 => {
                at += k as usize;
                continue;
            }
            0x06 => return k,
            0x15 => a == k,
            0x25 => a > k,
            0x35 => a >= k,
            0x45 => a & k != 0,
            code => panic!("instruction {code:#x}"),
        };
        at += usize::from(if holds { instruction.jt } else { instruction.jf });
    }
}
