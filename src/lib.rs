//! A HashiCorp Nomad task driver that keeps images in containerd's store and starts containers through containerd's
//! shims, without containerd on the start path. `docs/ARCHITECTURE.md` follows a task through these modules.

pub mod accounts;
pub mod bench;
pub mod cgroup;
pub mod cli;
pub mod containerd;
pub mod control;
pub mod cookie;
pub mod duration;
pub mod elf;
pub mod failure;
pub mod fault;
pub mod fifo;
pub mod gvisor;
pub mod host;
pub mod ids;
pub mod image;
pub mod logs;
pub mod netns;
pub mod overlay;
pub mod pb;
pub mod peer;
pub mod places;
pub mod plugin;
pub mod privileges;
pub mod process;
pub mod rootfs;
pub mod shim;
pub mod size;
pub mod stamp;
pub mod task;
pub mod text;

/// An error with all its causes, as one line for people.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let part = inner.to_string();
        // Wrappers that repeat their cause's words add nothing.
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = inner.source();
    }
    text
}
