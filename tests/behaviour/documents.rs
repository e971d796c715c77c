//! The pages, sections and decisions that documents and comments cite exist.

use std::{fs, path::Path};

use crate::structure::files;

/// docs/ARCHITECTURE.md names files of `src/` by their path below `src/`.
#[test]
fn the_architecture_names_files_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/ARCHITECTURE.md")).unwrap();
    let quoted: Vec<&str> = text.split('`').skip(1).step_by(2).filter(|word| word.ends_with(".rs")).collect();
    assert!(quoted.len() > 50, "{quoted:?}");
    let is_there = |path: &&str| root.join("src").join(path).exists() || root.join(path).exists();
    let missing: Vec<&str> = quoted.into_iter().filter(|path| !path.contains('*') && !is_there(path)).collect();
    assert_eq!(missing, Vec::<&str>::new());
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

/// The citations in a text, without the text that follows each: `docs/chaos.md`, `docs/protocol/shim.md#7.1`,
/// `docs/decisions/003`.
fn citations(text: &str) -> Vec<&str> {
    let in_path = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let mut found = Vec::new();
    for (at, _) in text.match_indices("docs/") {
        // This is a path of another project, or an address on the web.
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
    // The test above reads this file as well, so the bad citations must not appear here literally.
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
