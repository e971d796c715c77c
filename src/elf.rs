//! Makes minimal executables: machine code with only the headers that the kernel requires.

/// Makes an executable (elf(5)) of one segment: the ELF header, the program header and the code. Execution begins at
/// the first byte of the code.
pub fn executable(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let machine: u16 = if cfg!(target_arch = "x86_64") { 62 } else { 183 };
    let size = HEADERS + code.len() as u64;
    let mut elf = Vec::new();
    // 64-bit, little-endian, current version.
    elf.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend(2_u16.to_le_bytes());
    elf.extend(machine.to_le_bytes());
    elf.extend(1_u32.to_le_bytes());
    for word in [BASE + HEADERS, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // PT_LOAD, readable and executable.
    elf.extend(1_u32.to_le_bytes());
    elf.extend(5_u32.to_le_bytes());
    for word in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Makes a program that ends at once with this exit code.
pub fn exits_with(code: u8) -> Vec<u8> {
    let machine_code = if cfg!(target_arch = "x86_64") {
        // mov edi, code; mov eax, 231 (exit_group); syscall
        [&[0xbf, code, 0, 0, 0][..], &[0xb8, 231, 0, 0, 0], &[0x0f, 0x05]].concat()
    } else {
        // movz x0, code; movz x8, 94 (exit_group); svc 0
        let words = [0xd280_0000 | u32::from(code) << 5, 0xd280_0008 | 94 << 5, 0xd400_0001_u32];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    };
    executable(&machine_code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_ends_with_its_code() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("program");
        for code in [0, 42, 255] {
            std::fs::write(&path, exits_with(code)).expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("executable");
            let status = std::process::Command::new(&path).status().expect("runs");
            assert_eq!(status.code(), Some(code.into()));
        }
    }
}
