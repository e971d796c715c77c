//! `config check` checks agent and job files before Nomad gets them.

use std::path::Path;

use serde_json::Value;

use crate::support::program;

/// Runs `config check`. Returns its exit code, stdout and stderr.
fn check(arguments: &[&str], files: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let names = files.iter().map(|(name, _)| *name);
    let output = std::process::Command::new(program())
        .current_dir(dir.path())
        .args(["config", "check"])
        .args(arguments)
        .args(names)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn job(driver: &str, config: &str) -> String {
    format!(
        r#"
        variable "tag" {{ default = "1" }}
        variable "secret" {{ type = string }}
        locals {{
          image = "${{local.name}}:${{var.tag}}"
          name  = "busybox"
        }}
        job "j" {{
          group "g" {{
            network {{ mode = "bridge" }}
            task "other" {{
              driver = "docker"
              config {{ anything = "goes" }}
            }}
            task "t" {{
              driver = "{driver}"
              config {{
                {config}
              }}
            }}
          }}
        }}"#
    )
}

#[test]
fn every_example_is_fine() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("example");
    let files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    // capabilities.nomad says which settings it needs to be allowed.
    let agent = r#"plugin "nomad-driver-shim" {
      config {
        security {
          allow_caps    = ["SYS_TIME", "NET_BIND_SERVICE"]
          allow_devices = ["/dev/fuse"]
        }
      }
    }"#;
    let names: Vec<_> = files.iter().map(|path| path.to_str().unwrap()).collect();
    let (code, stdout, stderr) = check(&[&["--json"], &names[..]].concat(), &[("z.hcl", agent)]);
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    let list: Vec<Value> = serde_json::from_str(&stdout).unwrap();
    for file in &files {
        let of_it = list.iter().filter(|finding| finding["file"] == *file.to_string_lossy());
        assert!(of_it.count() > 0, "{} has nothing for this driver: {stdout}", file.display());
    }
}

#[test]
fn faults_are_told_all_at_once() {
    let config = r#"
        image        = local.image
        command      = "/bin/sh"
        entrypoint   = ["/bin/sh"]
        host_network = true
        shm_size     = "lots"
    "#;
    let (code, stdout, stderr) = check(&[], &[("a.nomad", &job("shim", config))]);
    assert_eq!((code, stderr.as_str()), (Some(1), ""), "{stdout}");
    assert_eq!(stdout.lines().count(), 1, "docker's task is not ours: {stdout}");
    for part in ["a.nomad: task j/g/t: task config: 4 problems", "command and entrypoint", "host_network", "\"lots\""] {
        assert!(stdout.contains(part), "{part} is not in {stdout}");
    }
    let (code, stdout, _) = check(&[], &[("a.nomad", &job("shim", "image = \"a\"\n imagee = 1"))]);
    assert!(code == Some(1) && stdout.contains("imagee"), "{stdout}");
    let (code, stdout, _) = check(&[], &[("a.nomad", &job("containerd-driver", ""))]);
    assert!(code == Some(1) && stdout.contains("missing required argument \"image\""), "{stdout}");
}

#[test]
fn jobs_are_held_against_what_the_agent_allows() {
    let job = job("shim", "image = local.image\n privileged = true");
    let (code, stdout, _) = check(&[], &[("a.nomad", &job)]);
    assert!(code == Some(1) && stdout.contains("allow_privileged"), "{stdout}");
    let agent = "plugin \"nomad-driver-shim\" {\n config { allow_privileged = true }\n}";
    let (code, stdout, _) = check(&[], &[("a.nomad", &job), ("agent.hcl", agent)]);
    assert_eq!(code, Some(0), "{stdout}");
    assert_eq!(stdout, "agent.hcl: plugin \"nomad-driver-shim\": fine\na.nomad: task j/g/t: fine\n");
    // The block of a plugin with another name says nothing about this job.
    let agent = "plugin \"containerd-driver\" {\n config { allow_privileged = true }\n}";
    assert_eq!(check(&[], &[("a.nomad", &job), ("agent.hcl", agent)]).0, Some(1));
}

/// The tasks of such a group have loopback only, which is rarely meant.
#[test]
fn ports_without_a_network_are_warned_of() {
    let job = |network: &str, group: &str, config: &str| {
        format!(
            "job \"j\" {{\n group \"g\" {{\n {network}\n {group}\n task \"t\" {{\n driver = \"shim\"\n \
             config {{\n image = \"a\"\n {config}\n }}\n }}\n }}\n}}"
        )
    };
    let ports = "network {\n port \"http\" {}\n }";
    let connect = "service {\n connect {\n native = true\n }\n }";
    for (network, group, config, warned) in [
        (ports, "", "", Some("ports")),
        ("network {\n mode = \"host\"\n port \"http\" {}\n }", "", "", Some("ports")),
        ("", connect, "host_network = false", Some("Consul Connect")),
        ("network {\n mode = \"bridge\"\n port \"http\" {}\n }", connect, "", None),
        ("network {\n mode = var.unknown\n port \"http\" {}\n }", "", "", None),
        (ports, "", "host_network = var.unknown", None),
        ("network {}", "service {\n name = \"a\"\n }", "", None),
    ] {
        let (code, stdout, stderr) = check(&[], &[("a.nomad", &job(network, group, config))]);
        let lines: Vec<&str> = stderr.lines().filter(|line| line.contains("warning")).collect();
        let described = format!("{network} {group} {config}: {stdout}{stderr}");
        assert!(code == Some(0) && stdout.ends_with("fine\n"), "{described}");
        match warned {
            None => assert!(lines.is_empty(), "{described}"),
            Some(words) => {
                let all = [words, "task j/g/t", "loopback only", "mode = \"bridge\"", "host_network = true"];
                assert!(lines.len() == 1 && all.iter().all(|part| lines[0].contains(part)), "{described}");
            }
        }
    }
    // Programs find the warning in the JSON.
    let (_, stdout, _) = check(&["--json"], &[("a.nomad", &job(ports, "", ""))]);
    let list: Value = serde_json::from_str(&stdout).unwrap();
    assert!(list[0]["warning"].as_str().is_some_and(|text| text.contains("ports")), "{stdout}");
}

#[test]
fn an_agents_faults_are_told() {
    let agent = r#"
        plugin "docker" {
          config { what = "ever" }
        }
        plugin "nomad-driver-shim" {
          args = ["--name", "fast"]
          config {
            stats_interval = "soon"
            cgroup { keep_warm = "1h" }
          }
        }"#;
    let (code, stdout, _) = check(&[], &[("agent.hcl", agent)]);
    assert!(code == Some(1) && stdout.lines().count() == 1, "{stdout}");
    assert!(stdout.contains("stats_interval") && stdout.contains("keep_warm"), "{stdout}");
    // Whether the job is valid depends on settings that the command doesn't know.
    let (code, stdout, _) = check(&[], &[("agent.hcl", agent), ("a.nomad", &job("fast", "image = local.image"))]);
    assert!(code == Some(1) && stdout.contains("task j/g/t: not checked"), "{stdout}");
    let renamed = r#"plugin "nomad-driver-shim" { args = ["--name", "fast"] }"#;
    let (code, stdout, _) = check(&[], &[("agent.hcl", renamed), ("a.nomad", &job("fast", "image = local.image"))]);
    assert!(code == Some(0) && stdout.contains("task j/g/t: fine"), "{stdout}");
    let args = r#"plugin "nomad-driver-shim" { args = ["--nane", "fast"] }"#;
    let (code, stdout, _) = check(&[], &[("agent.hcl", args)]);
    assert!(code == Some(1) && stdout.contains("only --name NAME is known"), "{stdout}");
    for wrong in [r#""--name fast""#, r#"["--name",5]"#] {
        let args = format!("plugin \"nomad-driver-shim\" {{ args = {wrong} }}");
        let (code, stdout, _) = check(&[], &[("agent.hcl", &args)]);
        assert!(code == Some(1) && stdout.contains("args must be a list of texts"), "{wrong}: {stdout}");
        assert!(stdout.contains(wrong), "{stdout}");
    }
}

/// A value that a server or node fills in is neither valid nor invalid here.
#[test]
fn values_that_are_not_known_are_left_out_and_named() {
    let config = r#"
        image    = var.secret
        command  = upper("/bin/sh")
        hostname = "${NOMAD_ALLOC_ID}"
        shm_size = "${var.tag}m"
        mounts {
          type   = "bind"
          target = "/x"
          source = "${NOMAD_TASK_DIR}/x"
        }
        mounts {
          type   = "tmpfs"
          target = "/y"
        }"#;
    let job = job("shim", config);
    let (code, stdout, stderr) = check(&[], &[("a.nomad", &job)]);
    assert_eq!((code, stdout.as_str()), (Some(0), "a.nomad: task j/g/t: fine\n"), "{stderr}");
    for name in ["image", "command", "hostname", "mounts.source"] {
        assert!(stderr.contains(&format!("{name} was not checked")), "{name}: {stderr}");
    }
    assert_eq!(stderr.lines().count(), 4, "{stderr}");
    let (code, stdout, stderr) = check(&["--var", "secret=a b", "--var", "tag=x"], &[("a.nomad", &job)]);
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stdout.contains("\"a b\"") && stdout.contains("\"xm\""), "{stdout}");
    assert!(!stderr.contains("image was"), "{stderr}");
    let (code, _, stderr) = check(&["--var", "secrets=a"], &[("a.nomad", &job)]);
    assert!(code == Some(125) && stderr.contains("--var secrets"), "{stderr}");
}

#[test]
fn tasks_outside_of_groups_are_told() {
    let task = "task \"t\" {\n driver = \"shim\"\n config {\n image = \"a\"\n }\n}";
    let (code, stdout, _) = check(&[], &[("a.nomad", task)]);
    assert!(
        code == Some(1) && stdout.contains("task \"t\": Nomad accepts a task block only inside of a job block"),
        "{stdout}"
    );
    let (code, stdout, _) = check(&[], &[("a.nomad", &format!("job \"j\" {{\n{task}\n}}"))]);
    assert_eq!((code, stdout.as_str()), (Some(0), "a.nomad: task j/t: fine\n"));
}

#[test]
fn tasks_that_are_made_or_whose_driver_is_not_known_are_told() {
    let job = r#"
        variable "driver" {}
        job "j" {
          dynamic "group" {
            for_each = ["a", "b"]
            labels   = [group.value]
            content {
              task "t" {
                driver = "shim"
                config {
                  image    = "x:${group.value}"
                  shm_size = "lots"
                }
              }
              task "u" {
                driver = var.driver
                config {}
              }
            }
          }
        }"#;
    let (code, stdout, stderr) = check(&[], &[("a.nomad", job)]);
    assert_eq!(code, Some(1), "{stdout}{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(lines[0].starts_with("a.nomad: task j/dynamic/t: task config: shm_size"), "{stdout}");
    assert_eq!(lines[1..], ["a.nomad: task j/dynamic/u: not checked"]);
    assert!(stderr.contains("u: driver was not checked"), "{stderr}");
    let (_, stdout, _) = check(&["--var", "driver=containerd-driver"], &[("a.nomad", job)]);
    assert!(stdout.contains("task j/dynamic/u: config: missing required argument"), "{stdout}");
}

#[test]
fn what_cannot_be_checked_is_told() {
    let (code, stdout, _) = check(&[], &[("a.nomad", "job \"j\" {\n  group = = 1\n}")]);
    assert!(code == Some(1) && stdout.contains("a.nomad: HCL:") && stdout.contains("line 2, column"), "{stdout}");
    let other = job("another", "image = local.image");
    let (code, stdout, stderr) = check(&[], &[("a.nomad", &other)]);
    assert_eq!((code, stdout.as_str()), (Some(125), ""));
    assert!(stderr.contains("shim, containerd-driver") && stderr.contains("--driver"), "{stderr}");
    let (code, stdout, _) = check(&["--driver", "another"], &[("a.nomad", &other)]);
    assert!(code == Some(0) && stdout.contains("fine"), "{stdout}");
    let (code, _, stderr) = check(&["absent.nomad"], &[]);
    assert!(code == Some(125) && stderr.contains("absent.nomad"), "{stderr}");
}
