//! Generates the wire types from `proto/`, without `protoc`: protox parses the files for tonic's generator, and
//! ttrpc-codegen has a parser of its own. Compiles the init program of tasks from `init/`.

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// gRPC, client and server: the plugin serves these services, and the module `host` calls them.
const NOMAD: &[&str] = &[
    "goplugin/plugin.proto",
    "nomad/hclspec.proto",
    "nomad/structs.proto",
    "nomad/base.proto",
    "nomad/driver.proto",
    "google/status.proto",
];

/// gRPC, client only: containerd's services.
const CONTAINERD: &[&str] = &[
    "containerd/types.proto",
    "containerd/version.proto",
    "containerd/content.proto",
    "containerd/snapshots.proto",
    "containerd/diff.proto",
    "containerd/images.proto",
    "containerd/leases.proto",
    "containerd/containers.proto",
    "containerd/tasks.proto",
];

/// ttrpc: the messages of the shim's Task service and the options of shims. The calls are made by the methods' names
/// (`src/shim/client.rs`), so only the messages are generated.
const SHIM: &[&str] = &["proto/shim/task.proto", "proto/shim/runc_options.proto", "proto/shim/runtime_options.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=build.rs");

    tonic_prost_build::configure().include_file("nomad_side.rs").compile_fds(protox::compile(NOMAD, ["proto"])?)?;
    tonic_prost_build::configure()
        .build_server(false)
        .include_file("containerd_side.rs")
        .compile_fds(protox::compile(CONTAINERD, ["proto"])?)?;

    let out = PathBuf::from(env::var("OUT_DIR")?);
    compile_init(&out.join("init"))?;
    let out = out.join("shim");
    fs::create_dir_all(&out)?;
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(SHIM)
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(true))
        .run()?;
    // The generated mod.rs begins with inner attributes and inner doc comments, which `include!` does not accept.
    let front = out.join("mod.rs");
    let kept: Vec<String> = fs::read_to_string(&front)?
        .lines()
        .filter(|line| !line.starts_with("#!") && !line.starts_with("//!"))
        .map(str::to_owned)
        .collect();
    fs::write(&front, kept.join("\n"))?;
    Ok(())
}

/// Compiles the program that is the first process of tasks with `init = true`. It runs in every image, so it is static
/// and uses neither the standard library nor libc. It has the same target as the driver.
fn compile_init(out: &Path) -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=init");
    let mut rustc = Command::new(env::var("RUSTC")?);
    rustc.args(["--crate-name", "init", "--edition", "2024", "--target", &env::var("TARGET")?, "init/main.rs", "-o"]);
    rustc.arg(out);
    for option in ["opt-level=s", "panic=abort", "relocation-model=static", "strip=symbols"] {
        rustc.args(["-C", option]);
    }
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-Wl,--build-id=none", "-Wl,-z,noseparate-code"] {
        rustc.arg("-C").arg(format!("link-arg={argument}"));
    }
    // Cargo sets this variable where a linker is configured for the target, as for the build for arm64.
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    let status = rustc.status()?;
    if status.success() { Ok(()) } else { Err(format!("the compiler of init/main.rs has failed: {status}").into()) }
}
