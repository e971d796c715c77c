//! The probe: a static program that prints what it can see of its container, and the normalisation of what it prints.

use std::{collections::BTreeMap, fs, process::Command, sync::OnceLock};

use crate::support::{
    Entry, Image, Layer, Packing,
    services::{root, run},
};

/// The parts of the probe's source.
const SOURCE: [&str; 4] = [
    include_str!("probe/main.c"),
    include_str!("probe/process.c"),
    include_str!("probe/files.c"),
    include_str!("probe/kernel.c"),
];

/// The path of the probe in its image.
pub(crate) const PROBE: &str = "/probe";

/// The value of a key that one side does not have.
pub(crate) const ABSENT: &str = "(absent)";

/// The host name that cases choose. Other names of containers are not compared.
pub(crate) const NAME: &str = "api";

/// Keys whose values differ from one moment to the next, by the beginnings of their names.
const UNSTABLE: [&str; 4] = [
    "sysctl net/netfilter/nf_conntrack_count",
    "sysctl net/ipv6/conf/all/stable_secret",
    "process wchan",
    "status SigQ",
];

/// Keys whose values are ids of processes.
const PROCESS_IDS: [&str; 5] = ["process id", "process parent", "status PPid", "status NStgid", "status NSpid"];

/// The kernel's names of the capabilities, in its order (linux/capability.h).
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// What a probe has seen: a value for each key.
pub(crate) type Seen = BTreeMap<String, String>;

/// Returns an image of busybox with the probe.
pub(crate) fn image() -> Image {
    static PROGRAM: OnceLock<Vec<u8>> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        let directory = root().join("probe");
        fs::create_dir_all(&directory).unwrap();
        let (text, program) = (directory.join("probe.c"), directory.join("probe"));
        fs::write(&text, SOURCE.concat()).unwrap();
        run(Command::new("cc")
            .args(["-static", "-O1", "-Wall", "-Werror", "-Wno-format-truncation", "-D_GNU_SOURCE", "-o"])
            .arg(&program)
            .arg(&text));
        fs::read(program).unwrap()
    });
    let layer = Layer::new(&[Entry::file(&PROBE[1..], program.clone())], Packing::Gzip);
    Image::busybox().with_layer(layer)
}

/// The host of a container, as far as a container can show parts of it.
pub(crate) struct Host {
    /// The links of `/proc/PID/ns` of a process of the host.
    namespaces: Vec<String>,
    name: String,
}

impl Host {
    /// The host whose namespaces this process is in.
    pub(crate) fn of(process: u32) -> Self {
        let links = fs::read_dir(format!("/proc/{process}/ns")).unwrap();
        let link = |entry: std::io::Result<fs::DirEntry>| {
            fs::read_link(entry.unwrap().path()).unwrap().to_string_lossy().into_owned()
        };
        let name = nix::unistd::gethostname().unwrap().into_string().unwrap();
        Self { namespaces: links.map(link).collect(), name }
    }

    /// Reads a probe's output. What has no meaning to a program is replaced: ids, numbers of namespaces, names that the
    /// container was given because it had none.
    pub(crate) fn read(&self, output: &str) -> Seen {
        let mut seen = Seen::new();
        for line in output.lines() {
            let (key, value) = line.trim_end_matches('\r').split_once('\t').unwrap_or_else(|| panic!("{line:?}"));
            if UNSTABLE.iter().any(|unstable| key.starts_with(unstable)) {
                continue;
            }
            match key.strip_prefix("status Cap") {
                Some(set) => seen.extend(capabilities(set, value)),
                None => add(&mut seen, key, self.value(key, value)),
            }
        }
        if let Some(address) = seen.get("interface eth0 inet").cloned() {
            for (_, value) in
                seen.iter_mut().filter(|(key, _)| key.starts_with("interface ") || key.starts_with("text "))
            {
                *value = value.replace(&address, "<address>");
            }
        }
        let own = seen.get("hostname").cloned().unwrap_or_default();
        for (key, value) in &mut seen {
            if own != NAME && own != self.name && !own.is_empty() && is_about_names(key) {
                *value = value.replace(&own, "<id>");
            }
            if is_about_names(key) {
                *value = value.replace(&self.name, "<host>");
            }
        }
        seen
    }

    fn value(&self, key: &str, value: &str) -> String {
        let is_own_cgroup = key.starts_with("cgroup path ")
            || key == "process cpuset"
            || (key.starts_with("mount /sys/fs/cgroup") && key.ends_with(" root"));
        if key.starts_with("namespace ") {
            let hosts = self.namespaces.iter().any(|namespace| namespace == value);
            return if hosts { "the host's".to_owned() } else { "its own".to_owned() };
        }
        if is_own_cgroup && value != "/" {
            return "<the container's>".to_owned();
        }
        // 0 is a process outside of the namespace, and 1 the namespace's first process.
        if PROCESS_IDS.contains(&key) && !["0", "1"].contains(&value) {
            return "<another>".to_owned();
        }
        // docker passes them in a random order. Linux sorts them, and gVisor does not.
        if key == "status Groups" {
            let mut groups: Vec<&str> = value.split_whitespace().collect();
            groups.sort_unstable();
            return groups.join(" ");
        }
        value.to_owned()
    }
}

/// Adds a line. A key that occurs again, such as a mount over another one, gets a number.
fn add(seen: &mut Seen, key: &str, value: String) {
    let mut unique = key.to_owned();
    let mut number = 2;
    while seen.contains_key(&unique) {
        unique = format!("{key} #{number}");
        number += 1;
    }
    seen.insert(unique, value);
}

fn is_about_names(key: &str) -> bool {
    ["hostname", "env HOSTNAME", "text /etc/", "sysctl kernel hostname"].iter().any(|start| key.starts_with(start))
}

/// Returns a line for each capability of a set, which is a hexadecimal number.
fn capabilities(set: &str, value: &str) -> Vec<(String, String)> {
    let bits = u64::from_str_radix(value, 16).unwrap();
    let named = CAPABILITIES.iter().enumerate().filter(|(bit, _)| bits >> bit & 1 == 1);
    let mut lines: Vec<_> = named.map(|(_, name)| (format!("capability {set} {name}"), "yes".to_owned())).collect();
    if bits >> CAPABILITIES.len() != 0 {
        lines.push((format!("capability {set} of newer kernels"), format!("{bits:x}")));
    }
    lines
}
