//! The directory and the plugin of each `run`, and their removal.

use std::{fs::File, path::Path};

use nix::fcntl::{Flock, FlockArg};
use serde_json::json;

use super::{CliError, CommonArgs, print_message};
use crate::{
    control::{ANSWER_TIMEOUT, Request, send_request},
    files::remove_dir_all_if_exists,
    host::{Plugin, PluginCommand},
    pb::driver::DestroyTaskRequest,
    places::MountPoints,
    task::read_records,
};

/// Starts this program as a plugin.
pub(crate) async fn own_plugin() -> Result<Plugin, CliError> {
    Ok(Plugin::launch(&PluginCommand::with_name(std::env::current_exe()?, "shim")).await?)
}

/// docker's names of the limits that a job can set.
const ULIMITS: [&str; 15] = [
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// Whether the plugin of a run has an idle shim when the task starts, as an agent's plugin has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IdleShim {
    /// It has one, so that the start takes as long as an agent's.
    Ready,
    /// It has none: a plugin that starts one task is done sooner without it.
    None,
}

/// Returns the plugin's configuration for the run called `id`.
pub(crate) fn settings(common: &CommonArgs, address: &Path, id: &str, idle: IdleShim) -> serde_json::Value {
    let mut settings = plugin_config(common, address, id);
    settings["shim"] = json!({ "pool": u8::from(idle == IdleShim::Ready) });
    settings["pids_limit"] = json!(0);
    let unlimited = ULIMITS.map(|name| (name.to_owned(), json!("unlimited")));
    settings["security"]["ulimit_max"] = json!([serde_json::Map::from_iter(unlimited)]);
    settings["security"]["tmpfs_max"] = json!("unlimited");
    settings
}

/// Returns the configuration of a plugin that belongs to this command line and has the run directory called `id`.
pub(crate) fn plugin_config(common: &CommonArgs, address: &Path, id: &str) -> serde_json::Value {
    let places = common.places(id);
    // The user of this command is root already, so these options forbid the user nothing.
    json!({
        "allow_privileged": true,
        "security": {
            "allow_caps": ["ALL"],
            "allow_paths": ["/"],
            "allow_devices": ["*"],
            "allow_host_namespaces": true,
            "allow_new_privileges": true,
            "allow_seccomp_override": true,
            "allow_apparmor_override": true,
        },
        "containerd": { "address": address, "namespace": common.namespace },
        "state": { "run_dir": places.run(), "state_dir": places.state() },
        // All commands share one image store, from which only `gc` and `rmi` remove images.
        "image": { "keep": "forever" },
    })
}

/// Removes a run's directory. If a plugin died or was stopped in the middle of a start, it has left a task's record
/// there. Then another plugin destroys the task first.
pub(crate) async fn clean_up(common: &CommonArgs, address: &Path, id: &str) {
    let places = common.places(id);
    let read_remaining = || match read_records(&places.tasks()) {
        Ok(records) => Some(records.readable),
        Err(error) => {
            print_message(&format!(
                "nomad-driver-shim: {}: the remains of the run are kept",
                crate::error_chain(&error)
            ));
            None
        }
    };
    let Some(records) = read_remaining() else { return };
    if !records.is_empty()
        && let Ok(plugin) = own_plugin().await
    {
        if plugin.configure(&settings(common, address, id, IdleShim::None)).await.is_ok() {
            for record in read_remaining().unwrap_or_default() {
                let request = DestroyTaskRequest { task_id: record.intent.task_id.0, force: true };
                if let Err(status) = plugin.driver().destroy_task(request).await {
                    print_message(&format!(
                        "nomad-driver-shim: could not destroy the task of the run: {}",
                        status.message()
                    ));
                }
            }
        }
        plugin.shut_down().await;
    }
    places.remove_uppers_if_empty();
    if read_remaining().is_none_or(|records| !records.is_empty()) || !remove_unless_mounted(places.run()) {
        print_message(&format!(
            "nomad-driver-shim: some files could not be removed; they are in {}",
            places.run().display()
        ));
    }
}

/// Removes a directory of the command line, unless something may be mounted in it, which may be a directory of the
/// host. Returns false if something may be mounted.
pub(crate) fn remove_unless_mounted(path: &Path) -> bool {
    if MountPoints::read().may_be_below(path) {
        return false;
    }
    if let Err(error) = remove_dir_all_if_exists(path) {
        print_message(&format!("nomad-driver-shim: could not remove {}: {error}", path.display()));
    }
    true
}

/// Returns whether the run's plugin has ended. A plugin that lives gets no request.
pub(crate) fn has_ended(common: &CommonArgs, id: &str) -> bool {
    let lock = File::options().append(true).open(common.places(id).lock());
    lock.is_ok_and(|lock| Flock::lock(lock, FlockArg::LockExclusiveNonblock).is_ok())
}

/// Returns whether the run's own process is gone. Its plugin, if it still runs, is then shut down: a run is useless
/// without its terminal.
pub(crate) async fn is_abandoned(common: &CommonArgs, id: &str) -> bool {
    let places = common.places(id);
    match send_request(&places.control(), &Request::Leave, ANSWER_TIMEOUT).await {
        Ok(_) => true,
        // A plugin that is just starting holds its lock, but does not listen yet.
        Err(error) if error.no_plugin_listens() => has_ended(common, id),
        Err(_) => false,
    }
}
