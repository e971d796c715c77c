//! Compares what a probe sees in docker's container with what it sees in the driver's.

use std::{
    collections::{BTreeSet, HashSet},
    fmt::Write as _,
    sync::Mutex,
};

use crate::{
    RUNSC,
    differences::{DIFFERENCES, Difference, Line},
    docker::Version,
    probe::{ABSENT, Seen},
};

/// A line of the table that has matched: the numbers of the difference and of its line, the case and the runtime.
type Match = (usize, usize, String, String);

/// The first version of docker in which some of the changes are that [`Difference::current`] names.
const FIRST_NEWER: Version = (23, 0, 0);

static MATCHES: Mutex<BTreeSet<Match>> = Mutex::new(BTreeSet::new());

/// Returns a description of each difference that no line of the table allows.
pub(crate) fn unexplained(case: &str, runtime: &str, docker: &Seen, ours: &Seen) -> Vec<String> {
    let keys: BTreeSet<&String> = docker.keys().chain(ours.keys()).collect();
    let mut found = Vec::new();
    for key in keys {
        let value = |seen: &Seen| seen.get(key).cloned().unwrap_or_else(|| ABSENT.to_owned());
        let (docker, ours) = (value(docker), value(ours));
        if docker != ours && !is_allowed(case, runtime, key, &docker, &ours) {
            found.push(format!("{key}\n    docker: {docker}\n    driver: {ours}"));
        }
    }
    found
}

/// Tells whether a line of the table allows a difference, and notes all lines that do.
fn is_allowed(case: &str, runtime: &str, key: &str, docker: &str, ours: &str) -> bool {
    let mut allowed = false;
    for (number, difference) in DIFFERENCES.iter().enumerate() {
        for (position, line) in difference.lines.iter().enumerate() {
            let applies = line.applies(case, runtime) && matches(line.key, key);
            if applies && matches(line.docker, docker) && matches(line.ours, ours) {
                MATCHES.lock().unwrap().insert((number, position, case.to_owned(), runtime.to_owned()));
                allowed = true;
            }
        }
    }
    allowed
}

/// Returns the lines of the table that have matched nothing, although all cases were compared with this docker: a line
/// for certain cases must match in each of them, and any other line at least once.
pub(crate) fn unused(docker: Version, runtimes: &[&str]) -> Vec<String> {
    let seen = MATCHES.lock().unwrap();
    let mut unused = Vec::new();
    for (number, difference) in DIFFERENCES.iter().enumerate() {
        if difference.current.is_some() && docker >= FIRST_NEWER {
            continue;
        }
        for (position, line) in difference.lines.iter().enumerate() {
            let of_line: HashSet<(&str, &str)> = seen
                .iter()
                .filter(|(difference, line, ..)| (*difference, *line) == (number, position))
                .map(|(_, _, case, runtime)| (case.as_str(), runtime.as_str()))
                .collect();
            unused.extend(missing(difference, line, &of_line, runtimes));
        }
    }
    unused
}

fn missing(difference: &Difference, line: &Line, seen: &HashSet<(&str, &str)>, runtimes: &[&str]) -> Vec<String> {
    // A sandbox does not show all that a line for all runtimes is about.
    let is_judged = if runtimes.contains(&RUNSC) { line.runtime == Some(RUNSC) } else { line.runtime != Some(RUNSC) };
    if line.is_of_host || !is_judged {
        return Vec::new();
    }
    let name = format!("{}: {:?}, docker {:?}, driver {:?}", difference.what, line.key, line.docker, line.ours);
    if line.cases.is_empty() {
        return if seen.is_empty() { vec![format!("{name}: in no case")] } else { Vec::new() };
    }
    let wanted = line.cases.iter().flat_map(|case| runtimes.iter().map(move |runtime| (*case, *runtime)));
    let unseen = wanted.filter(|(case, runtime)| line.applies(case, runtime) && !seen.contains(&(*case, *runtime)));
    unseen.map(|(case, runtime)| format!("{name}: not in {case} with {runtime}")).collect()
}

/// Tells whether a text matches a pattern, in which `*` stands for any text.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut left) = text.strip_prefix(start) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        match left.find(part) {
            Some(at) => left = &left[at + part.len()..],
            None => return false,
        }
    }
    left.ends_with(last)
}

/// Formats a list for a failure.
pub(crate) fn listed(found: &[String]) -> String {
    found.iter().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "  {line}");
        text
    })
}
