//! Programs that attack from inside a task. They are linked statically, so that they run in any image.

use std::{fs, process::Command};

use crate::support::services::{root, run};

/// Compiles a C program, links it statically and returns its bytes.
pub(crate) fn compile(name: &str, source: &str) -> Vec<u8> {
    let directory = root().join("attacks");
    fs::create_dir_all(&directory).unwrap();
    let unique = nomad_driver_shim::ids::random_hex(4);
    let (text, program) = (directory.join(format!("{name}-{unique}.c")), directory.join(format!("{name}-{unique}")));
    fs::write(&text, source).unwrap();
    run(Command::new("cc")
        .args(["-static", "-O1", "-Wall", "-Werror", "-D_GNU_SOURCE", "-o"])
        .arg(&program)
        .arg(&text));
    fs::read(program).unwrap()
}
