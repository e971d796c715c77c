//! A task driver for HashiCorp Nomad: it runs each task of a job as a container.
//!
//! The driver keeps images in containerd's content and snapshot store, and starts containers through containerd's
//! shims. It starts the shims itself and speaks ttrpc to them, so a task whose image is already unpacked starts without
//! a call to containerd or a registry, even while containerd is stopped. The OCI runtime behind the shim is crun, runc
//! or gVisor's runsc.
//!
//! If Nomad starts the program `nomad-driver-shim` (with Nomad's cookie in its environment), it is a driver plugin that
//! serves gRPC on a unix socket. Otherwise it is a command line tool for the same images and tasks. The plugin also
//! starts its own program as a log writer and as a supervisor of gVisor's sandboxes. This crate is the library of that
//! program and of its tests; it is no stable interface for other projects.
//!
//! # How a StartTask goes through the modules
//!
//! 1. [`plugin`] receives the call (`driver.rs`), converts the message (`convert.rs`) and checks the job's options
//!    against the tables of options (`config/`, `options/`). A request with mistakes is refused as a whole, with all of
//!    them in one message, before anything is created.
//! 2. [`task`] (`Engine::start`) reserves the task's id, takes the lock of this allocation's task, so that one attempt
//!    at a time is created or torn down, and removes what is left of earlier attempts.
//! 3. [`task`] (`start.rs`) chooses the runtime and collects everything that can be looked up in advance: the AppArmor
//!    profile, the sources of mounts, devices, `hosts` and `resolv.conf`. [`image`] returns the image's record, from
//!    memory or after a pull into the store of [`containerd`].
//! 4. [`task`] (`create_task`) has [`rootfs`] build the OCI spec, takes a shim from the pool of [`shim`] or launches
//!    one, and writes the task's record. The record names everything that is created from here on, so that a later
//!    plugin can find it after a crash.
//! 5. [`rootfs`] makes the bundle: `config.json`, the root file system (one that was prepared earlier, or an overlay
//!    mount) and the task's mounts.
//! 6. [`task`] (`create_and_start`) calls the shim, which creates the container in the task's cgroup ([`cgroup`]), and
//!    starts its process. The record's state becomes `running`, and Nomad gets the answer.
//! 7. In the background, [`task`] waits for the task's end at the shim, the pools of shims and root file systems are
//!    refilled, and [`logs`] writes the task's output if Nomad's log collector is switched off.
//!
//! If a step fails, the attempt is undone in reverse order, by the same code that destroys a task and that removes what
//! a crashed plugin has left (`task/undo.rs`). A restarted plugin reads the records, connects to the shims that still
//! run, and takes over their tasks (`task/recover.rs`).
//!
//! # Where to look
//!
//! | question | place |
//! | --- | --- |
//! | How do the parts work together, and why? | `docs/ARCHITECTURE.md`, `docs/decisions/` |
//! | What does a word mean? | `docs/GLOSSARY.md` |
//! | Which options are there, and where are they checked? | `docs/options.md`, [`plugin`] (`options/`, `config/`) |
//! | In which states can a task be, and who changes them? | [`task`] (`engine.rs`, `record.rs`) |
//! | How is a container described to the runtime? | [`rootfs`] (`spec.rs`) |
//! | How does the driver speak to a shim? | [`shim`] (`client.rs`), `proto/shim/` |
//! | What does Nomad send? | `proto/nomad/`, [`plugin`] (`convert.rs`), [`host`] for the opposite side |
//! | Where are files on disk? | [`places`] |
//! | What is defended against whom? | `docs/security.md` |
//! | What happens when something dies? | `docs/reliability.md`, `tests/behaviour/crash.rs` |
//!
//! # Modules
//!
//! `plugin` uses `task`, and `task` uses `shim`, `rootfs`, `image`, `cgroup`, `logs` and `gvisor`, which do not know
//! each other. `tests/behaviour/structure.rs` checks which module may use which.
//!
//! Layers, from Nomad down to the kernel:
//!
//! - [`plugin`]: everything that Nomad sees: handshake, gRPC services, options, fingerprint, events and log lines.
//! - [`task`]: tasks, their states and records, the start path, teardown, recovery and garbage collection.
//! - [`shim`]: launching shims, the pool of idle shims, the ttrpc client, exec and log FIFOs.
//! - [`rootfs`]: the OCI spec, the bundle, root file systems, mounts, seccomp filters and AppArmor profiles.
//! - [`image`]: image names, registries, archives, pulls, unpacking, image records and their collection.
//! - [`containerd`]: the client of containerd's image services, and the private containerd of the command line.
//! - [`cgroup`]: the cgroups of tasks and shims, OOM kills, and the statistics of tasks.
//! - [`logs`]: the log writer, which replaces Nomad's log collectors, and its supervisor.
//! - [`gvisor`]: runsc's flags, the script that carries them, and the supervisor of sandboxes.
//!
//! Other users of the protocol:
//!
//! - [`cli`]: the command line, with one file for each command.
//! - [`host`]: Nomad's side of the plugin protocol, for `run`, `bench` and the tests.
//! - [`mod@bench`]: the benchmark, which compares this driver with other ways to start a container.
//!
//! Small modules that every other module may use:
//!
//! - [`accounts`]: passwd and group files of images, which are not trusted.
//! - [`control`]: the protocol of the plugin's control socket.
//! - [`cookie`]: how a program knows that it was started as a plugin.
//! - [`duration`], [`size`]: durations and sizes as users write them.
//! - [`elf`]: minimal executables from machine code.
//! - [`failpoint`]: switches by which tests skip steps or kill the plugin; not in release builds.
//! - [`failure`]: classifies failures by what has to change before another attempt can succeed.
//! - [`fifo`]: the state of a FIFO.
//! - [`file_id`]: identifies a file, to notice that it was changed or replaced.
//! - [`files`]: creates, writes, replaces and removes files.
//! - [`ids`]: driver names, task and container ids, digests.
//! - [`netns`]: addresses, routes and processes of a network namespace.
//! - [`overlay`]: overlay mounts of many layers.
//! - [`pb`]: the wire types that `build.rs` generates from `proto/`.
//! - [`peer`]: which users may connect to a socket.
//! - [`places`]: the paths of the driver's files, and helpers to list them.
//! - [`privileges`]: the capabilities and system calls that each of the program's processes keeps.
//! - [`process`]: identifies, starts and watches processes.
//! - [`text`]: makes text from other programs safe to show.

pub mod accounts;
pub mod bench;
pub mod cgroup;
pub mod cli;
pub mod containerd;
pub mod control;
pub mod cookie;
pub mod duration;
pub mod elf;
pub mod failpoint;
pub mod failure;
pub mod fifo;
pub mod file_id;
pub mod files;
pub mod gvisor;
pub mod host;
pub mod ids;
pub mod image;
pub mod logs;
pub mod netns;
pub mod netns_pool;
pub mod overlay;
pub mod pb;
pub mod peer;
pub mod places;
pub mod plugin;
pub mod privileges;
pub mod process;
mod process_name;
pub mod rootfs;
pub mod shim;
pub mod size;
pub mod task;
pub mod text;

/// Formats an error and all its causes as one line of text for people.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let part = inner.to_string();
        // Some errors end with the text of their cause, which would then be there twice.
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = inner.source();
    }
    text
}
