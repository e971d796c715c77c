//! `doctor` knows runtimes with known vulnerabilities, and does not fail because of them.

use std::process::Command;

use serde_json::Value;

use crate::support::{program, script, services::root};

/// `doctor --json` with a PATH that has only these programs, each of which prints these words as its version. Returns
/// whether `doctor` succeeded, and its findings.
fn doctor(name: &str, programs: &[(&str, &str)]) -> (bool, Vec<Value>) {
    let dir = root().join(format!("doctor-{name}"));
    std::fs::create_dir_all(&dir).unwrap();
    for (program, words) in programs {
        script(&dir.join(program), &format!("echo '{words}'"));
    }
    let mut command = Command::new(program());
    command.args(["doctor", "--json", "--address"]).arg(dir.join("no.sock")).env("PATH", &dir);
    let output = command.output().unwrap();
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    (output.status.success(), findings.as_array().unwrap().clone())
}

fn advisories(findings: &[Value]) -> Vec<String> {
    let notes = findings.iter().filter(|finding| finding["what"] == "advisories");
    notes
        .map(|finding| {
            assert_eq!(finding["verdict"], "note", "{finding}");
            finding["detail"].as_str().unwrap().to_owned()
        })
        .collect()
}

#[test]
fn doctor_notes_runtimes_with_known_vulnerabilities() {
    let (_, findings) = doctor("old", &[("runc", "runc version 1.1.5+ds1"), ("youki", "youki version: 0.5.6")]);
    let notes = advisories(&findings);
    assert_eq!(notes.len(), 2, "{findings:#?}");
    for part in ["runc 1.1.5+ds1", "CVE-2024-21626", "fixed in 1.1.12", "CVE-2025-52881", "CVE-2026-41579", "tracker"] {
        assert!(notes[0].contains(part), "{part} in {}", notes[0]);
    }
    assert!(notes[1].contains("CVE-2025-62161") && notes[1].contains("fixed in 0.5.7"), "{}", notes[1]);
    let runc = findings.iter().find(|finding| finding["what"] == "runc").unwrap();
    assert_eq!(runc["verdict"], "ok", "a note, not a failure");
}

#[test]
fn doctor_says_nothing_of_fixed_ones() {
    for words in ["runc version 1.5.1", "runc version 1.3.6", "runc version unknown", "nonsense"] {
        let (_, findings) = doctor("new", &[("runc", words)]);
        assert_eq!(advisories(&findings), [""; 0], "{words}");
    }
    // Release candidates have an entry of their own: their fix came before the release.
    let (_, findings) = doctor("candidate", &[("runc", "runc version 1.4.0-rc.2")]);
    assert!(advisories(&findings)[0].contains("fixed in 1.4.0-rc.3"), "{findings:#?}");
}
