//! The table of rows, with the results of this run.

use std::{fmt::Write as _, fs, path::Path, sync::Mutex};

use crate::row::{Row, Verdict};

struct Line {
    id: &'static str,
    says: &'static str,
    test: String,
    verdict: Verdict,
}

/// The results so far.
#[derive(Default)]
pub(crate) struct Report {
    lines: Mutex<Vec<Line>>,
    faults: Mutex<Vec<(&'static str, Vec<&'static str>)>>,
}

const HEAD: &str = "# Conformance\n\n\
    What a Nomad driver that runs images must do, and whether this driver does it. Rows 6.x come from Nomad's own test \
    harness and from the drivers' own suites (docs/protocol/nomad-plugin.md#6). Rows 001 to 011 are the shell tests of \
    nomad-driver-containerd, and rows B1 to B28 are its defects (docs/protocol/nomad-driver-containerd.md#9). \
    `make test` runs the rows on this driver and writes this page. `make test DRIVER=/path/to/plugin` runs them on any \
    other driver, with the plugin configuration `DRIVER_CONFIG='{\"option\": ...}'`. A row is not applicable if the \
    driver's schema lacks an option that the row needs.\n\n";

impl Report {
    pub(crate) fn add(&self, row: &Row, verdict: &Verdict) {
        let line = Line { id: row.id, says: row.says, test: row.test.clone(), verdict: verdict.clone() };
        self.lines.lock().unwrap().push(line);
    }

    pub(crate) fn add_fault(&self, says: &'static str, red: &[&'static str]) {
        self.faults.lock().unwrap().push((says, red.to_vec()));
    }

    /// Writes the page and prints the totals. The page of this driver stays as it is if only some of the rows ran or if
    /// a row is red.
    pub(crate) fn finish(&self, driver: Option<&Path>, sandboxed: Option<&str>, whole: bool) {
        let order: Vec<&str> = crate::rows().iter().map(|row| row.id).collect();
        let mut lines = self.lines.lock().unwrap();
        lines.sort_by_key(|line| (order.iter().position(|id| *id == line.id), line.test.clone()));
        let count = |wanted: fn(&Verdict) -> bool| lines.iter().filter(|line| wanted(&line.verdict)).count();
        let red = count(|verdict| matches!(verdict, Verdict::Red(_)));
        let absent = count(|verdict| matches!(verdict, Verdict::NotApplicable(_)));
        let limited = count(|verdict| matches!(verdict, Verdict::Limited(_)));
        let green = lines.len() - red - absent - limited;
        let sum = format!("{} rows, {green} green, {red} red, {absent} not applicable", lines.len());
        let sum = if limited > 0 { format!("{sum}, {limited} met differently") } else { sum };
        eprintln!("conformance: {sum}");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let ours = root.join("docs/conformance.md");
        let before = fs::read_to_string(&ours).unwrap_or_default();
        let (rows, sandboxes) = before.split_once(SANDBOXES).unwrap_or((&before, ""));
        let page = self.page(&lines);
        let (path, text) = match (driver, sandboxed) {
            (Some(_), _) => (root.join("target/conformance.md"), page),
            _ if !whole || red > 0 => return,
            (None, Some(runtime)) => (ours, format!("{rows}{SANDBOXES}{}", section(runtime, &sum, &lines, sandboxes))),
            (None, None) if sandboxes.is_empty() => (ours, page),
            (None, None) => (ours, format!("{page}{SANDBOXES}{sandboxes}")),
        };
        match fs::write(&path, text) {
            Ok(()) => eprintln!("conformance: {}", path.display()),
            Err(error) => eprintln!("conformance: write {}: {error}", path.display()),
        }
    }

    fn page(&self, lines: &[Line]) -> String {
        let mut text = HEAD.to_owned();
        text.push_str("| row | promise | test | seen |\n| --- | --- | --- | --- |\n");
        for line in lines {
            let seen = match &line.verdict {
                Verdict::Green => "yes".to_owned(),
                Verdict::Red(why) => format!("**no**: {}", cell(why)),
                Verdict::NotApplicable(why) => format!("not applicable: {}", cell(why)),
                Verdict::Limited(reason) => format!("otherwise: {reason}"),
            };
            let _ = writeln!(text, "| {} | {} | `{}` | {seen} |", line.id, line.says, line.test);
        }
        let mut faults = self.faults.lock().unwrap();
        faults.sort();
        if !faults.is_empty() {
            text.push_str(
                "\n## Rows that notice a fault\n\nThe rows that go red when this driver has a planted fault:\n\n",
            );
            text.push_str("| a driver that | red |\n| --- | --- |\n");
            for (says, red) in faults.iter() {
                let _ = writeln!(text, "| {says} | {} |", red.join(", "));
            }
        }
        text
    }
}

/// The head of the sections that runs with a gVisor runtime write.
const SANDBOXES: &str = "\n## In a gVisor sandbox\n\n\
    `make test-gvisor` runs the same rows with gVisor as the default runtime. All rows are green except those listed \
    here. For a listed row, the suite checks what gVisor does instead (`tests/conformance/gvisor.rs`).\n";

/// Replaces the section of `runtime` in `before`, and keeps the sections of other runtimes.
fn section(runtime: &str, sum: &str, lines: &[Line], before: &str) -> String {
    let head = |runtime: &str| format!("\n### `{runtime}`\n\n");
    let own = head(runtime);
    let mut parts: Vec<String> = before
        .split("\n### `")
        .filter(|part| !part.trim().is_empty() && !part.starts_with(&format!("{runtime}`")))
        .map(|part| format!("\n### `{part}"))
        .collect();
    let mut text = format!("{own}{sum}.\n\n| row | test | limit |\n| --- | --- | --- |\n");
    for line in lines {
        if let Verdict::Limited(reason) = line.verdict {
            let _ = writeln!(text, "| {} | `{}` | {reason} |", line.id, line.test);
        }
    }
    parts.push(text);
    parts.sort();
    parts.concat()
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect()
}
