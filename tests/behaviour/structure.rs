//! The architecture's arrows: plugin → task → {shim, rootfs, image, cgroup} → containerd, and never back.

use std::{collections::BTreeMap, fs, path::Path};

/// What each module may name, besides itself and the leaves that everybody may.
const ARROWS: &[(&str, &[&str])] = &[
    ("bench", &["host", "containerd", "cgroup"]),
    ("cli", &["bench", "host", "task", "image", "containerd", "cgroup", "plugin"]),
    ("plugin", &["task", "image", "rootfs", "cgroup", "containerd", "logs", "gvisor"]),
    ("task", &["shim", "rootfs", "image", "cgroup", "containerd", "logs", "gvisor"]),
    ("gvisor", &[]),
    ("shim", &[]),
    ("logs", &[]),
    ("rootfs", &[]),
    ("image", &["containerd"]),
    ("cgroup", &[]),
    ("containerd", &[]),
    ("host", &[]),
    ("failure", &[]),
];

const LEAVES: &[&str] = &[
    "accounts",
    "chain",
    "control",
    "cookie",
    "duration",
    "elf",
    "failure",
    "fault",
    "fifo",
    "ids",
    "netns",
    "overlay",
    "pb",
    "peer",
    "places",
    "privileges",
    "process",
    "size",
    "stamp",
    "text",
];

#[test]
fn arrows_point_one_way() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let modules: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let mut wrong = Vec::new();
    for entry in fs::read_dir(&source).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let allowed = modules.get(name.as_str()).unwrap_or_else(|| panic!("src/{name} is not in the list of arrows"));
        for file in files(&entry.path()) {
            let text = fs::read_to_string(&file).unwrap();
            // What only tests use says nothing about the architecture.
            let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            for used in uses(text) {
                let known = used == name || LEAVES.contains(&used.as_str()) || allowed.contains(&used.as_str());
                if !known {
                    wrong.push(format!("{} uses {used}", file.strip_prefix(&source).unwrap().display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// First path segments after `crate::`, in plain and in braced use.
fn uses(text: &str) -> Vec<String> {
    let ident = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        let Some(inside) = rest.strip_prefix('{') else {
            found.push(ident(rest));
            continue;
        };
        let (mut depth, mut item) = (0, String::new());
        for c in inside.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => found.push(ident(std::mem::take(&mut item).trim())),
                _ => {}
            }
            if depth == 0 && c != ',' {
                item.push(c);
            }
        }
        found.push(ident(item.trim()));
    }
    found.retain(|name| !name.is_empty());
    found
}

fn files(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory).unwrap().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn the_list_of_uses_is_read_right() {
    let text = "use crate::{\n    a::{b, c},\n    d,\n};\nuse crate::e::f;\nlet x = crate::g(1);";
    assert_eq!(uses(text), ["a", "d", "e", "g"]);
}

/// What may be executed in another way than by `process::command`, and why the limit on descriptors is right there.
const OWN_COMMANDS: &[(&str, &str)] = &[
    ("process.rs", "makes the command"),
    ("bench/", "of the command line, which does not raise its limit"),
    ("cli/", "the command line does not raise its limit"),
    ("fault.rs", "a switch for tests"),
];

/// What the driver executes gets default signals, and the limit on descriptors that the driver was started with: a program
/// that is started in another way hands down what this process ignores.
#[test]
fn every_program_is_started_by_one_function() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    for file in files(&source) {
        let name = file.strip_prefix(&source).unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&file).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        if text.contains("Command::new(") && !OWN_COMMANDS.iter().any(|(known, _)| name.starts_with(known)) {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "use crate::process::command in {wrong:?}");
}

/// A release build has no switch that leaves out a step.
#[test]
fn fault_switches_are_compiled_out_of_release_builds() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/fault.rs")).unwrap();
    assert!(text.contains("#[cfg(not(debug_assertions))]\npub const fn skipped(_name: &str) -> bool {\n    false\n}"));
    assert!(text.contains("#[cfg(not(debug_assertions))]\npub const fn point(_name: &str) {}"));
    assert!(text.contains("#[cfg(not(debug_assertions))]\npub const fn boot_id() -> Option<String> {\n    None\n}"));
    assert!(text.contains("#[cfg(not(debug_assertions))]\npub const fn point_within("));
    assert!(text.contains("#[cfg(not(debug_assertions))]\npub const fn intrude("));
}
