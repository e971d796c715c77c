//! The rules of the architecture, held against the sources.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

type Uses = BTreeMap<String, BTreeSet<String>>;

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The table of docs/ARCHITECTURE.md: what each module may use besides itself and the files directly in `src/`.
fn documented_uses() -> Uses {
    let text = fs::read_to_string(source().with_file_name("docs").join("ARCHITECTURE.md")).unwrap();
    table_of_uses(&text)
}

fn table_of_uses(text: &str) -> Uses {
    let (_, table) = text.split_once("| module | may use |\n| --- | --- |\n").expect("the table of modules");
    let names = |cell: &str| cell.split(',').map(|name| name.trim().to_owned()).collect::<BTreeSet<_>>();
    let mut uses = Uses::new();
    for row in table.lines().take_while(|line| line.starts_with('|')) {
        let [_, modules, used, _] = row.split('|').collect::<Vec<_>>()[..] else { panic!("{row}") };
        let used = if used.trim() == "nothing" { BTreeSet::new() } else { names(used) };
        uses.extend(names(modules).into_iter().map(|module| (module, used.clone())));
    }
    uses
}

/// What the modules of the sources use: folders and files directly in `src/`, without what only unit tests use.
fn actual_uses() -> Uses {
    let mut actual = Uses::new();
    for file in files(&source()) {
        let path = file.strip_prefix(source()).unwrap();
        let first = Path::new(path.components().next().unwrap().as_os_str());
        let module = first.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&file).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        actual.entry(module.clone()).or_default().extend(uses(text).into_iter().filter(|used| *used != module));
    }
    actual
}

/// The modules use exactly what docs/ARCHITECTURE.md says; files directly in `src/` use no folder.
#[test]
fn modules_use_what_the_architecture_says() {
    let (documented, actual) = (documented_uses(), actual_uses());
    let folders: BTreeSet<&String> = actual.keys().filter(|module| source().join(module.as_str()).is_dir()).collect();
    let mut wrong = Vec::new();
    for (module, used) in &actual {
        // The roots of the crate join everything.
        if module == "main" || module == "lib" {
            continue;
        }
        let used: BTreeSet<&String> = used.iter().filter(|name| folders.contains(name) && *name != "failure").collect();
        let known = documented.get(module);
        if known.is_none() && folders.contains(module) {
            wrong.push(format!("{module} is not in the table"));
        }
        let allowed: BTreeSet<&String> = known.into_iter().flatten().collect();
        wrong.extend(
            used.difference(&allowed).map(|name| format!("{module} uses {name}, which the table does not allow")),
        );
        wrong.extend(
            allowed.difference(&used).map(|name| format!("{module} does not use {name}, which the table lists")),
        );
    }
    wrong.extend(
        documented.keys().filter(|name| !folders.contains(name)).map(|name| format!("there is no module {name}")),
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_table_of_uses_is_read_right() {
    let uses = table_of_uses("x\n| module | may use |\n| --- | --- |\n| a | b, c |\n| b, c | nothing |\n\n| d | e |\n");
    let lists: Vec<_> = uses.iter().map(|(module, used)| (module.as_str(), used.len())).collect();
    assert_eq!(lists, [("a", 2), ("b", 0), ("c", 0)]);
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

pub(crate) fn files(directory: &Path) -> Vec<PathBuf> {
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
    ("failpoint.rs", "a switch for tests"),
];

/// What the driver executes gets default signals, and the limit on descriptors that the driver was started with: a program
/// that is started in another way hands down what this process ignores.
#[test]
fn every_program_is_started_by_one_function() {
    let mut wrong = Vec::new();
    for file in files(&source()) {
        let name = file.strip_prefix(source()).unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&file).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        if text.contains("Command::new(") && !OWN_COMMANDS.iter().any(|(known, _)| name.starts_with(known)) {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "use crate::process::command in {wrong:?}");
}

/// A release build has no failpoint: each function of `failpoint.rs` has a form for release builds that does nothing.
#[test]
fn failpoints_are_compiled_out_of_release_builds() {
    let text = fs::read_to_string(source().join("failpoint.rs")).unwrap();
    let of = |cfg: &str| {
        let (mut found, mut rest) = (BTreeMap::new(), text.as_str());
        while let Some((_, after)) = rest.split_once(cfg) {
            let name = after.split_once("fn ").unwrap().1.split_once('(').unwrap().0.to_owned();
            let body = after.split_once('{').unwrap().1.split_once('}').unwrap().0.trim().to_owned();
            found.insert(name, body);
            rest = after;
        }
        found
    };
    let (debug, release) = (of("#[cfg(debug_assertions)]\n"), of("#[cfg(not(debug_assertions))]\n"));
    assert!(debug.len() > 5, "{debug:?}");
    assert!(debug.keys().eq(release.keys()), "{debug:?} {release:?}");
    let does_nothing = |body: &&String| !["", "false", "None", "Ok(())"].contains(&body.as_str());
    assert_eq!(release.values().filter(does_nothing).collect::<Vec<_>>(), Vec::<&String>::new());
}
