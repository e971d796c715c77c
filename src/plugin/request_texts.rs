//! Checks the texts that Nomad sends in addition to a job's `config`. The job's author has written some of them:
//! environment, user, volumes, name servers. Texts in `config` are checked where they are decoded.

use super::config::ConfigError;
use crate::{pb::driver as wire, text::quoted};

/// Checks that no text has a NUL byte, at which C programs would end it, and that no text could begin a new line in a
/// file that the driver writes.
///
/// # Errors
/// When a text has a forbidden character; the error has all faults.
pub(crate) fn check(task: &wire::TaskConfig) -> Result<(), ConfigError> {
    let mut faults = Vec::new();
    let mut forbid = |name: String, text: &str, forbidden: Forbidden| {
        if text.contains(|c| forbidden.matches(c)) {
            faults.push(format!("{name} contains {}", forbidden.description()));
        }
    };
    for (name, text) in [
        ("user", &task.user),
        ("the task's name", &task.name),
        ("the task's id", &task.id),
        ("the allocation's id", &task.alloc_id),
        ("the allocation's directory", &task.alloc_dir),
        ("the path of standard output", &task.stdout_path),
        ("the path of standard error", &task.stderr_path),
    ] {
        forbid(name.to_owned(), text, Forbidden::Nul);
    }
    for (key, value) in &task.env {
        forbid(format!("env: the name {}", quoted(key)), key, Forbidden::Nul);
        forbid(format!("env: {}", quoted(key)), value, Forbidden::Nul);
    }
    for mount in &task.mounts {
        forbid("volume_mount: destination".to_owned(), &mount.task_path, Forbidden::Nul);
        forbid(format!("volume_mount {}: source", quoted(&mount.task_path)), &mount.host_path, Forbidden::Nul);
    }
    for device in &task.devices {
        let texts = [&device.task_path, &device.host_path, &device.cgroup_permissions];
        texts.into_iter().for_each(|text| forbid(format!("device {}", quoted(text)), text, Forbidden::Nul));
    }
    // These texts become parts of lines of hosts(5) and resolv.conf(5).
    let dns = task.dns.clone().unwrap_or_default();
    for (name, list) in [("servers", &dns.servers), ("searches", &dns.searches), ("options", &dns.options)] {
        list.iter().for_each(|text| forbid(format!("dns: {name}: {}", quoted(text)), text, Forbidden::Control));
    }
    let network = task.network_isolation_spec.as_ref();
    if let Some(hosts) = network.and_then(|network| network.hosts_config.as_ref()) {
        for text in [&hosts.hostname, &hosts.address] {
            forbid(format!("network: hostname {}", quoted(text)), text, Forbidden::Control);
        }
    }
    forbid("the network's path".to_owned(), network.map_or("", |network| &network.path), Forbidden::Nul);
    if faults.is_empty() { Ok(()) } else { Err(ConfigError::job_faults(faults)) }
}

/// The characters that a text must not contain.
#[derive(Clone, Copy)]
enum Forbidden {
    /// The NUL byte.
    Nul,
    /// Control characters, which include line ends.
    Control,
}

impl Forbidden {
    fn matches(self, c: char) -> bool {
        match self {
            Self::Nul => c == '\0',
            Self::Control => c.is_control(),
        }
    }

    fn description(self) -> &'static str {
        match self {
            Self::Nul => "a NUL byte",
            Self::Control => "a control character",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut wire::TaskConfig)) -> String {
        let mut task = wire::TaskConfig {
            env: [("A".to_owned(), "line\nline".to_owned())].into(),
            mounts: vec![wire::Mount { task_path: "/data".to_owned(), ..Default::default() }],
            devices: vec![wire::Device::default()],
            dns: Some(wire::DnsConfig { servers: vec!["10.0.0.1".to_owned()], ..Default::default() }),
            ..Default::default()
        };
        check(&task).expect("fine");
        change(&mut task);
        check(&task).expect_err("refused").to_string()
    }

    #[test]
    fn each_text_is_named() {
        let nul = || "a\0b".to_owned();
        assert!(refused(|task| task.user = nul()).contains("user contains a NUL byte"));
        assert!(refused(|task| task.name = nul()).contains("the task's name"));
        assert!(refused(|task| task.alloc_dir = nul()).contains("the allocation's directory"));
        assert!(refused(|task| drop(task.env.insert("B".to_owned(), nul()))).contains("env: \"B\" contains"));
        let key = refused(|task| drop(task.env.insert(nul(), String::new())));
        assert!(key.contains("env: the name \"a\\u{0}b\" contains"), "{key}");
        assert!(refused(|task| task.mounts[0].task_path = nul()).contains("volume_mount: destination"));
        assert!(refused(|task| task.mounts[0].host_path = nul()).contains("volume_mount \"/data\": source"));
        assert!(refused(|task| task.devices[0].task_path = nul()).contains("device"));
        let line = "1.1.1.1\nnameserver 6.6.6.6".to_owned();
        let dns = refused(|task| task.dns.get_or_insert_default().servers.push(line.clone()));
        assert!(dns.contains("dns: servers: \"1.1.1.1\\nnameserver 6.6.6.6\" contains a control character"), "{dns}");
        let hosts = refused(|task| {
            let hosts = wire::HostsConfig { hostname: "a\n1.2.3.4 b".to_owned(), address: String::new() };
            task.network_isolation_spec =
                Some(wire::NetworkIsolationSpec { hosts_config: Some(hosts), ..Default::default() });
        });
        assert!(hosts.contains("network: hostname"), "{hosts}");
    }
}
