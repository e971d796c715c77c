//! Tests of the task options that are refused, each with a part of the error's text. The tests do not depend on the
//! host.

use super::*;
use crate::{ids::DriverName, task::Settings};
use serde_json::{Value, json};

/// Returns the error for a task with these options, on an agent with this configuration.
fn error(agent: &Value, mut options: Value) -> String {
    options["image"] = json!("a");
    let settings: Settings =
        settings(&DriverName::new("shim").expect("a name"), &encoded(agent)).expect("valid settings");
    task_options(&settings, GroupNetwork::None, &encoded(&options)).expect_err("refused").to_string()
}

fn encoded(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    let value = rmpv::ext::to_value(value).expect("JSON is MessagePack");
    rmpv::encode::write_value(&mut bytes, &value).expect("in memory");
    bytes
}

/// Makes a test of each refusal. It has the test's name, the options, and a part of the error's text.
macro_rules! refusals {
    ($agent:tt: $($name:ident $options:tt => $words:literal;)+) => {$(
        #[test]
        fn $name() {
            let error = error(&json!($agent), json!($options));
            assert!(error.contains($words), "{error}");
        }
    )+};
}

/// The operator has allowed nothing.
mod not_allowed {
    use super::*;

    refusals! { {}:
        host_pid_mode {"pid_mode": "host"} => "pid_mode = \"host\" is not allowed";
        host_ipc_mode {"ipc_mode": "host"} => "allow_host_namespaces";
        host_uts_mode {"uts_mode": "host"} => "allow_host_namespaces";
        host_cgroupns {"cgroupns": "host"} => "allow_host_namespaces";
        host_network {"host_network": true} => "allow_host_namespaces";
        new_privileges {"security_opt": ["no-new-privileges=false"]} => "allow_new_privileges";
        privileged {"privileged": true} => "allow_privileged";
        no_seccomp {"security_opt": ["seccomp=unconfined"]} => "allow_seccomp_override";
        capability {"cap_add": ["SYS_ADMIN"]} => "SYS_ADMIN is not allowed";
    }
}

/// Tasks have SELinux labels, and the operator lets no job change its own.
mod labels_not_allowed {
    use super::*;

    refusals! { {"security": {"selinux": true}}:
        another_type {"security_opt": ["label=type:spc_t"]} => "allow_label_override";
        no_label {"security_opt": ["label:disable"]} => "\"label:disable\" is not allowed on this node";
    }
}

/// The operator has allowed these sysctls only.
mod sysctls_not_allowed {
    use super::*;

    refusals! { {"security": {"allow_sysctls": ["net.ipv4.*"]}}:
        another_sysctl {"sysctl": [{"net.core.somaxconn": "9"}]} => "allow_sysctls";
    }
}

/// The operator has allowed all of this, but the value is wrong.
mod wrong {
    use super::*;

    refusals! {
        {
            "allow_privileged": true,
            "security": {"allow_host_namespaces": true, "allow_devices": ["/dev/*"], "allow_caps": ["ALL"]},
        }:
        unknown_ulimit {"ulimit": [{"files": "1"}]} => "ulimit: \"files\" is not a limit";
        ulimit_above_the_hard_one {"ulimit": [{"nofile": "2:1"}]} => "above the hard one";
        ulimit_and_file_limit {"ulimit": [{"nofile": "2"}], "file_limit": 2} => "exclude each other";
        negative_file_limit {"file_limit": -2} => "file_limit = -2";
        shm_size_that_is_no_size {"shm_size": "much"} => "shm_size: \"much\" is not a size";
        shm_size_that_is_too_small {"shm_size": "3"} => "less than a kibibyte";
        negative_oom_score {"oom_score_adj": -5} => "oom_score_adj = -5";
        sysctl_of_the_whole_host {"sysctl": [{"kernel.panic": "1"}]} => "whole host";
        sysctl_of_the_hosts_network {"sysctl": [{"net.core.somaxconn": "1"}], "host_network": true} => "host_network";
        security_option {"security_opt": ["apparmor=x"]} => "security_opt: \"apparmor=x\"";
        two_names_of_one_option {"work_dir": "/a", "cwd": "/b"} => "same option";
        cpuset_cpus {"cpuset_cpus": "3-1"} => "cpuset_cpus = \"3-1\"";
        cpuset_mems {"cpuset_mems": "x"} => "cpuset_mems = \"x\"";
        cfs_period {"cpu_cfs_period": 5} => "cpu_cfs_period = 5";
        negative_memory_limit {"memory_hard_limit": -1} => "memory_hard_limit: -1";
        reserved_label {"labels": [{"run.oci.handler": "wasm"}]} => "labels: \"run.oci.handler\" is reserved";
        reserved_annotation {"annotations": [{"dev.gvisor.flag.network": "host"}]} =>
            "annotations: \"dev.gvisor.flag.network\"";
        relative_device {"devices": ["null"]} => "not an absolute path";
        climbing_device {"devices": ["/dev/dri/../null"]} => "without \"..\"";
        host_without_an_address {"extra_hosts": ["db"]} => "\"db\" is not name:address";
        host_with_half_an_address {"extra_hosts": ["db:1.2.3"]} => "not an IP address";
        pull_policy {"image_pull_policy": "sometimes"} => "image_pull_policy = \"sometimes\"";
        pull_policy_and_force_pull {"image_pull_policy": "never", "force_pull": true} => "exclude each other";
        selinux_option {"security_opt": ["label=types:x"]} => "security_opt: \"label=types:x\": the SELinux options are";
        selinux_value {"security_opt": ["label=type:"]} => "is not a type of a SELinux label";
        same_target {"mounts": [{"type": "tmpfs", "target": "/a"}, {"type": "tmpfs", "target": "/a/"}]} =>
            "mounts[1].target = \"/a\" is the target of mounts[0] as well";
        pid_mode {"pid_mode": "weird"} => "pid_mode = \"weird\" is invalid";
        ipc_mode {"ipc_mode": "weird"} => "ipc_mode = \"weird\" is invalid";
        uts_mode {"uts_mode": "weird"} => "uts_mode = \"weird\" is invalid";
        cgroupns {"cgroupns": "weird"} => "cgroupns = \"weird\" is invalid";
        userns_mode {"userns_mode": "remap"} => "userns_mode";
        hostname_of_the_host {"uts_mode": "host", "hostname": "x"} => "exclude each other";
        shm_size_of_the_host {"ipc_mode": "host", "shm_size": "1m"} => "exclude each other";
    }
}
