//! Limits which tasks may share mounts with the host.
//!
//! A runtime makes a task's mounts one after the other. If one of them is shared with the host, every later mount below
//! it appears on the host as well, and stays there when the task is gone (mount_namespaces(7), "Shared subtrees"). A
//! job could fill the host's memory with such tmpfs mounts, and an allocation's directory that has one can't be
//! removed. Kubernetes allows bidirectional propagation in privileged containers only (kubernetes/kubernetes,
//! pkg/apis/core/validation/validation.go, `validateMountPropagation`).

use crate::{ids::Flavor, rootfs::Capabilities, task::StartRequest};

/// The capability that mount(2) requires.
const MOUNT_CAPABILITY: &str = "CAP_SYS_ADMIN";

/// Turns shared mounts into slave mounts, unless the task itself is able to mount. A task that is not able to mount
/// does not see the difference: the host's mounts still reach it, and it has no mounts of its own that could reach the
/// host. So CSI plugins without privileges, which Nomad gives bidirectional mounts, run as before.
pub(super) fn restrict_propagation(request: &mut StartRequest, flavor: Flavor) {
    let options = &mut request.options;
    let capabilities = Capabilities::defaults(flavor).adjusted(&options.cap_add, &options.cap_drop);
    if options.privileged || capabilities.has(MOUNT_CAPABILITY) {
        return;
    }
    for option in options.mounts.iter_mut().flat_map(|mount| &mut mount.options) {
        match option.as_str() {
            "shared" => "slave".clone_into(option),
            "rshared" => "rslave".clone_into(option),
            _ => {}
        }
    }
    for volume in request.volumes.iter_mut().filter(|volume| volume.propagation == "rshared") {
        volume.propagation = "rslave";
    }
}

#[cfg(test)]
mod tests {
    use super::super::convert;
    use crate::{host::encode_raw, ids::DriverName, pb::driver as wire, plugin::settings};
    use serde_json::{Value, json};

    /// Returns the propagation of a job's mounts and of a bidirectional volume, for a task with these further options.
    fn propagation(driver: &str, more: &Value) -> (Vec<String>, &'static str) {
        let config = encode_raw(&json!({"allow_privileged": true, "security": {"allow_caps": ["ALL"]}}));
        let settings = settings(&DriverName::new(driver).expect("a name"), &config).expect("valid");
        let mount = |option: &str| json!({"source": "alloc/data", "target": format!("/m/{option}"), "options": ["rbind", option]});
        let mut job = json!({"image": "a", "mounts": [mount("rshared"), mount("shared"), mount("private")]});
        job.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
        let volume = wire::Mount {
            task_path: "/v".to_owned(),
            propagation_mode: "bidirectional".to_owned(),
            ..wire::Mount::default()
        };
        let task = wire::TaskConfig {
            alloc_id: "4f1e".to_owned(),
            msgpack_driver_config: encode_raw(&job),
            mounts: vec![volume],
            ..wire::TaskConfig::default()
        };
        let request = convert::start_request(&settings, &task).expect("valid");
        let options = request.options.mounts.iter().map(|mount| mount.options[1].clone()).collect();
        (options, request.volumes[0].propagation)
    }

    #[test]
    fn only_a_task_that_can_mount_shares_its_mounts() {
        for driver in ["shim", "containerd-driver"] {
            for confined in [json!({}), json!({"cap_add": ["ALL"], "cap_drop": ["SYS_ADMIN"]})] {
                let (options, volume) = propagation(driver, &confined);
                assert_eq!((&options[..], volume), (&["rslave", "slave", "private"].map(str::to_owned)[..], "rslave"));
            }
            for open in [json!({"privileged": true}), json!({"cap_add": ["SYS_ADMIN"]}), json!({"cap_add": ["ALL"]})] {
                let (options, volume) = propagation(driver, &open);
                assert_eq!(
                    (&options[..], volume),
                    (&["rshared", "shared", "private"].map(str::to_owned)[..], "rshared")
                );
            }
        }
    }
}
