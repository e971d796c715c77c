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
fn uses(text: &str) -> BTreeSet<String> {
    paths_after("crate::", text).into_iter().map(|mut path| path.swap_remove(0)).collect()
}

/// The paths that follow `prefix`, in plain and in braced use.
fn paths_after(prefix: &str, text: &str) -> Vec<Vec<String>> {
    let starts = text.match_indices(prefix).filter(|(at, _)| {
        let before = text[..*at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':')
    });
    starts.flat_map(|(at, _)| leaves(tree_at(&text[at + prefix.len()..]))).collect()
}

/// By how much a character changes the depth of nested braces.
fn nesting(c: char) -> i32 {
    match c {
        '{' => 1,
        '}' => -1,
        _ => 0,
    }
}

/// The tree of imports at the beginning of the text: a path, the last part of which may be a list in braces.
fn tree_at(text: &str) -> &str {
    let mut depth = 0;
    let end = text.find(|c: char| {
        depth += nesting(c);
        depth < 0 || (depth == 0 && !c.is_alphanumeric() && !matches!(c, '_' | ':' | '}'))
    });
    &text[..end.unwrap_or(text.len())]
}

/// The paths of a tree of imports: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn leaves(tree: &str) -> Vec<Vec<String>> {
    let tree = tree.trim();
    if let Some(inside) = tree.strip_prefix('{').and_then(|tree| tree.strip_suffix('}')) {
        let mut depth = 0;
        let items = inside.split(|c: char| {
            depth += nesting(c);
            c == ',' && depth == 0
        });
        return items.flat_map(leaves).collect();
    }
    let head: String = tree.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    match tree[head.len()..].strip_prefix("::") {
        _ if head.is_empty() => Vec::new(),
        Some(rest) if !rest.is_empty() => {
            leaves(rest).into_iter().map(|path| [vec![head.clone()], path].concat()).collect()
        }
        _ => vec![vec![head]],
    }
}

/// Folders whose modules use each other in circles, and why.
const CIRCLES: &[(&str, &str)] =
    &[("task", "the context holds the types of its parts, whose functions take the context")];

/// What the modules of a folder use of each other, without what only unit tests use. Names that `mod.rs` exports count
/// as their module's.
fn uses_inside(folder: &Path) -> Uses {
    let read = |file: &Path| {
        let text = fs::read_to_string(file).unwrap();
        text.split("#[cfg(test)]\nmod tests").next().unwrap().to_owned()
    };
    let module_of = |file: &Path| {
        let first = file.strip_prefix(folder).unwrap().components().next().unwrap();
        Path::new(first.as_os_str()).file_stem().unwrap().to_str().unwrap().to_owned()
    };
    let sources: Vec<(String, PathBuf)> = files(folder).into_iter().map(|file| (module_of(&file), file)).collect();
    let modules: BTreeSet<&String> = sources.iter().map(|(module, _)| module).filter(|name| *name != "mod").collect();
    let exports = paths_after("use ", &read(&folder.join("mod.rs"))).into_iter();
    let exported: BTreeMap<String, String> = exports
        .filter(|path| path.len() > 1 && modules.contains(&path[0]))
        .map(|path| (path[path.len() - 1].clone(), path[0].clone()))
        .collect();
    let own_path: Vec<_> = folder.strip_prefix(source()).unwrap().iter().map(|part| part.to_str().unwrap()).collect();
    let own_path = format!("crate::{}::", own_path.join("::"));
    let mut found = Uses::new();
    for (module, file) in sources.iter().filter(|(module, _)| module != "mod" && module != "tests") {
        let depth = file.strip_prefix(folder).unwrap().iter().count() - usize::from(file.ends_with("mod.rs"));
        let text = read(file);
        let paths = [paths_after(&"super::".repeat(depth), &text), paths_after(&own_path, &text)].concat();
        let used = paths.into_iter().filter_map(|mut path| {
            let first = path.swap_remove(0);
            if modules.contains(&first) { Some(first) } else { exported.get(&first).cloned() }
        });
        found.entry(module.clone()).or_default().extend(used.filter(|name| name != module));
    }
    found
}

/// The modules that use themselves by way of others.
fn circles(uses: &Uses) -> BTreeSet<&String> {
    let reaches_itself = |start: &&String| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![*start]);
        while let Some(module) = next.pop() {
            next.extend(uses.get(module).into_iter().flatten().filter(|used| seen.insert(*used)));
        }
        seen.contains(start)
    };
    uses.keys().filter(reaches_itself).collect()
}

/// Inside of a folder, no two modules use each other, also not by way of others.
#[test]
fn no_modules_of_a_folder_use_each_other_in_circles() {
    let folders: BTreeSet<PathBuf> = files(&source())
        .into_iter()
        .filter(|file| file.ends_with("mod.rs"))
        .map(|file| file.with_file_name(""))
        .collect();
    assert!(folders.len() > 10, "{folders:?}");
    for folder in folders {
        let name = folder.strip_prefix(source()).unwrap().to_str().unwrap().trim_end_matches('/').to_owned();
        let uses = uses_inside(&folder);
        let found = circles(&uses);
        let known = CIRCLES.iter().any(|(folder, _)| *folder == name);
        assert_eq!(!found.is_empty(), known, "circles in {name}: {found:?}");
    }
}

#[test]
fn circles_are_found() {
    let uses: Uses = [("a", vec!["b"]), ("b", vec!["c"]), ("c", vec!["b"]), ("d", vec!["a"])]
        .into_iter()
        .map(|(module, used)| (module.to_owned(), used.into_iter().map(str::to_owned).collect()))
        .collect();
    assert_eq!(circles(&uses).into_iter().collect::<Vec<_>>(), ["b", "c"]);
}

pub(crate) fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn the_list_of_uses_is_read_right() {
    let text = "use crate::{\n    a::{b, c},\n    d,\n};\nuse crate::e::f;\nlet x = crate::g(1);";
    assert_eq!(uses(text).into_iter().collect::<Vec<_>>(), ["a", "d", "e", "g"]);
    let text = "use super::{A, b::{C as D, self}};\nuse super::super::e::F;";
    assert_eq!(paths_after("super::", text)[..3], [vec!["A"], vec!["b", "C"], vec!["b", "self"]]);
    assert_eq!(paths_after("super::super::", text), [["e", "F"]]);
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
