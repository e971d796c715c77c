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

/// The files and directories whose citations are checked.
const CITING: &[&str] = &["src", "tests", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"];

/// Comments, tests and documents cite pages by their path, sections by the number at the beginning of a heading, and
/// decisions by their number. Links of Markdown pages are relative to the page.
#[test]
fn cited_pages_and_sections_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut wrong = Vec::new();
    for name in CITING {
        let path = root.join(name);
        let citing = if path.is_dir() { files(&path) } else { vec![path] };
        for file in citing {
            let Ok(text) = String::from_utf8(fs::read(&file).unwrap()) else { continue };
            let from = file.strip_prefix(root).unwrap().display().to_string();
            for citation in citations(&text) {
                if let Some(reason) = unresolved(root, citation) {
                    wrong.push(format!("{from} cites {citation}: {reason}"));
                }
            }
            if file.extension().is_some_and(|extension| extension == "md") {
                let missing = links(&text).into_iter().filter(|link| !file.with_file_name(link).exists());
                wrong.extend(missing.map(|link| format!("{from} links to {link}: no such file")));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The citations in a text, without what follows them: `docs/chaos.md`, `docs/protocol/shim.md#7.1`, `docs/decisions/003`.
fn citations(text: &str) -> Vec<&str> {
    let in_path = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let mut found = Vec::new();
    for (at, _) in text.match_indices("docs/") {
        // A path of another project, or an address on the web.
        if text[..at].ends_with(in_path) {
            continue;
        }
        let cited = &text[at..];
        let end = cited.find(|c: char| !in_path(c)).unwrap_or(cited.len());
        let path = cited[..end].trim_end_matches('.');
        if decision(path).is_some() {
            found.push(path);
        } else if Path::new(path).extension().is_some_and(|extension| extension == "md") {
            let section = cited[end..].strip_prefix('#').map_or("", |rest| {
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '.').unwrap_or(rest.len());
                rest[..end].trim_end_matches('.')
            });
            let length = if section.is_empty() { path.len() } else { end + 1 + section.len() };
            found.push(&cited[..length]);
        }
    }
    found
}

/// The number of the decision that a citation names.
fn decision(citation: &str) -> Option<&str> {
    let number = citation.strip_prefix("docs/decisions/")?;
    (number.len() == 3 && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(number)
}

/// The reason why a citation leads nowhere, if it does.
fn unresolved(root: &Path, citation: &str) -> Option<&'static str> {
    if let Some(number) = decision(citation) {
        let prefix = format!("{number}-");
        let mut pages = fs::read_dir(root.join("docs/decisions")).unwrap().flatten();
        let is_known = pages.any(|page| page.file_name().to_string_lossy().starts_with(&prefix));
        return (!is_known).then_some("no such decision");
    }
    let (page, section) = citation.split_once('#').unwrap_or((citation, ""));
    let Ok(text) = fs::read_to_string(root.join(page)) else { return Some("no such page") };
    let mut headings = text.lines().filter(|line| line.starts_with('#'));
    let is_heading = |line: &str| line.trim_start_matches('#').split_whitespace().next() == Some(section);
    (!section.is_empty() && !headings.any(is_heading)).then_some("no such section")
}

/// The files that a Markdown page links to, relative to the page.
fn links(page: &str) -> Vec<&str> {
    let targets = page.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    let files = targets.map(|(target, _)| target.split_once('#').map_or(target, |(file, _)| file));
    files.filter(|file| !file.is_empty() && !file.contains("://")).collect()
}

#[test]
fn citations_that_lead_nowhere_are_found() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The test above reads this file as well, so it must not have the bad citations as they are.
    let text = "See @/chaos.md, (@/protocol/shim.md#7.1). Also `@/decisions/003`; @/nowhere.md, @/decisions/999 and \
                @/protocol/shim.md#99.1. Not of this project: https://example.org/@/other.md. No pages: @/decisions/, @/x."
        .replace('@', "docs");
    let right = ["chaos.md", "protocol/shim.md#7.1", "decisions/003"].map(|cited| format!("docs/{cited}"));
    let wrong = ["nowhere.md", "decisions/999", "protocol/shim.md#99.1"].map(|cited| format!("docs/{cited}"));
    let found = citations(&text);
    assert_eq!(found, [right.as_slice(), wrong.as_slice()].concat());
    let unresolved: Vec<&str> = found.into_iter().filter(|citation| unresolved(root, citation).is_some()).collect();
    assert_eq!(unresolved, wrong);
    assert_eq!(links("[a](b.md#c), [d](https://example.org/e), [f](#g) and ![h](i/j.svg)"), ["b.md", "i/j.svg"]);
}
