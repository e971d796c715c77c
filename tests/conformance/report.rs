//! The table of rows, as the run saw them.

use std::{fmt::Write as _, fs, path::Path, sync::Mutex};

use crate::row::{Row, Verdict};

struct Line {
    id: &'static str,
    says: &'static str,
    test: String,
    verdict: Verdict,
}

/// What has been seen so far.
#[derive(Default)]
pub struct Report {
    lines: Mutex<Vec<Line>>,
    faults: Mutex<Vec<(&'static str, Vec<&'static str>)>>,
}

const HEAD: &str = "# Conformance\n\n\
    What a Nomad driver with images must do. Rows 6.x are those of the upstream harness and of the drivers' own test \
    suites, the numbered tests are nomad-driver-containerd's, B1 to B28 are its defects. `make test` runs them on this \
    driver and writes this page; `make test DRIVER=/path/to/plugin` runs them on any other, \
    `DRIVER_CONFIG='{\"option\": ...}'` being its plugin configuration. A row that needs an option which the driver's \
    schema does not have is not applicable.\n\n";

impl Report {
    pub fn add(&self, row: &Row, verdict: &Verdict) {
        let line = Line { id: row.id, says: row.says, test: row.test.clone(), verdict: verdict.clone() };
        self.lines.lock().unwrap().push(line);
    }

    pub fn add_fault(&self, says: &'static str, red: &[&'static str]) {
        self.faults.lock().unwrap().push((says, red.to_vec()));
    }

    /// Writes the page and says how it went. A part of the rows, or a red one of ours, leaves the page as it is.
    pub fn finish(&self, driver: Option<&Path>, whole: bool) {
        let order: Vec<&str> = crate::rows().iter().map(|row| row.id).collect();
        let mut lines = self.lines.lock().unwrap();
        lines.sort_by_key(|line| (order.iter().position(|id| *id == line.id), line.test.clone()));
        let count = |wanted: fn(&Verdict) -> bool| lines.iter().filter(|line| wanted(&line.verdict)).count();
        let red = count(|verdict| matches!(verdict, Verdict::Red(_)));
        let absent = count(|verdict| matches!(verdict, Verdict::NotApplicable(_)));
        eprintln!(
            "conformance: {} rows, {} green, {red} red, {absent} not applicable",
            lines.len(),
            lines.len() - red - absent
        );
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = match driver {
            Some(_) => root.join("target/conformance.md"),
            None if whole && red == 0 => root.join("docs/conformance.md"),
            None => return,
        };
        let mut text = HEAD.to_owned();
        text.push_str("| row | promise | test | seen |\n| --- | --- | --- | --- |\n");
        for line in lines.iter() {
            let seen = match &line.verdict {
                Verdict::Green => "yes".to_owned(),
                Verdict::Red(why) => format!("**no**: {}", cell(why)),
                Verdict::NotApplicable(why) => format!("not applicable: {}", cell(why)),
            };
            let _ = writeln!(text, "| {} | {} | `{}` | {seen} |", line.id, line.says, line.test);
        }
        let mut faults = self.faults.lock().unwrap();
        faults.sort();
        if !faults.is_empty() {
            text.push_str(
                "\n## Rows that notice a fault\n\nThis driver with a fault put in: the rows that go red.\n\n",
            );
            text.push_str("| a driver that | red |\n| --- | --- |\n");
            for (says, red) in faults.iter() {
                let _ = writeln!(text, "| {says} | {} |", red.join(", "));
            }
        }
        match fs::write(&path, text) {
            Ok(()) => eprintln!("conformance: {}", path.display()),
            Err(error) => eprintln!("conformance: write {}: {error}", path.display()),
        }
    }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect()
}
