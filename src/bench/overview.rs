//! Formats the figures that users look at first: how long a start, its large phases and a stop take, with all subjects
//! side by side. Everything else is in the tables of `report`.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{Mode, Results, Row, pictures::subjects_with_colours, report::heading, summary::MetricKey};

/// The metrics of the overview, in this order: the start until the task's first output and until the answer to Nomad,
/// the time from start to removal of a task that does nothing, and the stop.
const SHOWN: [&str; 4] = ["first_byte", "start_task", "destroyed", "stop"];
/// The beginning of the names of the driver's phases in the details.
const PHASE: &str = "phase.";
/// The phase that is the whole start.
const WHOLE: &str = "phase.total";
/// The phases that are not parts of the sum of all phases: `released` overlaps with others, and `own` is the whole
/// start without the shim's part.
const OVERLAPPING: [&str; 2] = ["phase.released", "phase.own"];
/// The share of its start from which on a phase counts as large.
const LARGE_SHARE: f64 = 0.1;

/// The width of a cell. A wider one moves the rest of its line.
const CELL: usize = 7;

/// A group of columns below a common title.
struct Group {
    title: String,
    heads: Vec<&'static str>,
    /// The cells of a line, by the line's label.
    cells: BTreeMap<String, Vec<String>>,
}

/// Formats the overview of a run.
pub fn overview(results: &Results) -> String {
    let mut text = heading(results);
    let subjects: Vec<String> = subjects_with_colours(results).into_iter().map(|(name, _)| name.to_owned()).collect();
    let Some(first) = subjects.first() else { return text };
    let _ = writeln!(
        text,
        "\nTimes are in milliseconds, n is the number of tasks. All subjects took turns in one run. The ratio is {first}'s\n\
         p50 divided by the subject's: below 1, {first} takes less time."
    );
    for metric in SHOWN {
        let groups = results.plan.modes.iter().map(|mode| times(results, metric, *mode)).collect::<Vec<_>>();
        let definition = results.definitions.get(metric).map_or("", String::as_str);
        write_table(&mut text, &format!("{metric}: {definition}"), &subjects, &groups);
    }
    let (labels, groups) = phases(results, &subjects);
    write_table(&mut text, "large phases of this driver's starts; share is the part of the start", &labels, &groups);
    let title =
        format!("tasks at once, from start to removal, and idle tasks; the ratio is {first}'s to the subject's");
    write_table(&mut text, &title, &subjects, &loads(results, first));
    text
}

/// Returns the figures of one metric for all subjects, measured with one task at a time.
fn times(results: &Results, metric: &str, mode: Mode) -> Group {
    let key = MetricKey { mode, concurrency: 1, metric };
    let ratio = |row: &Row| {
        let ratio = results.ratios.iter().find(|ratio| ratio.to == row.path && ratio.key() == key);
        ratio.map(|ratio| format!("{:.3}", ratio.p50)).unwrap_or_default()
    };
    let rows = results.rows.iter().filter(|row| row.key() == key);
    Group {
        title: mode_title(results, mode),
        heads: vec!["n", "min", "p50", "p99", "ratio"],
        cells: rows.map(|row| (row.path.clone(), figures(row, ratio(row)))).collect(),
    }
}

/// Returns the large phases of the starts that this driver reports, with the labels of their lines.
fn phases(results: &Results, subjects: &[String]) -> (Vec<String>, Vec<Group>) {
    let mut labels = Vec::new();
    let mut groups = Vec::new();
    for mode in &results.plan.modes {
        let rows: Vec<&Row> = results
            .details
            .iter()
            .filter(|row| row.mode == *mode && row.concurrency == 1 && row.metric.starts_with(PHASE))
            .filter(|row| !OVERLAPPING.contains(&row.metric.as_str()))
            .collect();
        let mut cells = BTreeMap::new();
        for subject in subjects {
            let own = || rows.iter().filter(|row| row.path == *subject);
            let Some(whole) = own().find(|row| row.metric == WHOLE).map(|row| row.p50_ms) else { continue };
            for row in own().filter(|row| row.p50_ms >= whole * LARGE_SHARE) {
                let label = format!("{subject}: {}", &row.metric[PHASE.len()..]);
                cells.insert(label.clone(), figures(row, format!("{:.2}", row.p50_ms / whole)));
                if !labels.contains(&label) {
                    labels.push(label);
                }
            }
        }
        groups.push(Group { title: mode_title(results, *mode), heads: vec!["n", "min", "p50", "p99", "share"], cells });
    }
    (labels, groups)
}

/// Returns the figures of the subjects with many tasks: the throughput at each number of tasks, and the memory of idle
/// tasks.
fn loads(results: &Results, first: &str) -> Vec<Group> {
    let ratio = |own: Option<f64>, other: f64| {
        own.filter(|_| other > 0.0).map(|own| format!("{:.2}", own / other)).unwrap_or_default()
    };
    let mut groups = Vec::new();
    for concurrency in &results.plan.concurrency {
        let all = || results.throughput.iter().filter(|one| one.concurrency == *concurrency);
        let own = all().find(|one| one.path == first).map(|one| one.per_second);
        let cells = all().map(|one| {
            let ratio = if one.path == first { String::new() } else { ratio(own, one.per_second) };
            (one.path.clone(), vec![one.tasks.to_string(), format!("{:.1}", one.per_second), ratio])
        });
        groups.push(Group {
            title: format!("{concurrency} at once"),
            heads: vec!["n", "tasks/s", "ratio"],
            cells: cells.collect(),
        });
    }
    let own = results.memory.iter().find(|one| one.path == first).map(|one| one.per_task_kib);
    let cells = results.memory.iter().map(|one| {
        let ratio = if one.path == first { String::new() } else { ratio(own, one.per_task_kib) };
        (one.path.clone(), vec![one.tasks.to_string(), format!("{:.0}", one.per_task_kib), ratio])
    });
    groups.push(Group { title: "idle".to_owned(), heads: vec!["n", "KiB/task", "ratio"], cells: cells.collect() });
    groups
}

fn mode_title(results: &Results, mode: Mode) -> String {
    match mode {
        Mode::BackToBack => "back to back".to_owned(),
        Mode::Gaps => format!("after {} ms of pause", results.plan.gap_ms),
    }
}

/// Returns the cells of a row, with one more at the end.
fn figures(row: &Row, last: String) -> Vec<String> {
    let ms = |value: f64| format!("{value:.2}");
    vec![row.n.to_string(), ms(row.min_ms), ms(row.p50_ms), ms(row.p99_ms), last]
}

/// Writes a table with the labels' lines and the groups' columns. A line or a group without any cell is left out, and
/// so is an empty table.
fn write_table(text: &mut String, title: &str, labels: &[String], groups: &[Group]) {
    let groups: Vec<&Group> = groups.iter().filter(|group| !group.cells.is_empty()).collect();
    let labels: Vec<&String> =
        labels.iter().filter(|label| groups.iter().any(|group| group.cells.contains_key(*label))).collect();
    if labels.is_empty() {
        return;
    }
    let wide = labels.iter().map(|label| label.chars().count()).max().unwrap_or_default();
    let line = |label: &str, cells: &dyn Fn(&Group) -> Vec<String>| {
        let mut line = format!("{label:wide$}");
        for group in &groups {
            line.push_str("  ");
            line.extend(cells(group).iter().map(|cell| format!(" {cell:>CELL$}")));
        }
        format!("{}\n", line.trim_end())
    };
    let heads = |group: &Group| group.heads.iter().map(|head| (*head).to_owned()).collect();
    let cells = |label: &str, group: &Group| {
        group.cells.get(label).cloned().unwrap_or_else(|| vec![String::new(); group.heads.len()])
    };
    let titles = |group: &Group| vec![format!("{:<1$}", group.title, (CELL + 1) * group.heads.len() - 1)];
    let _ = write!(text, "\n{title}\n{}{}", line("", &titles), line("", &heads));
    for label in labels {
        text.push_str(&line(label, &|group| cells(label, group)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        Machine, Plan, SubjectKind, SubjectPlan,
        summary::{self, Key, METRICS, Measured, Memory, Throughput},
    };

    /// Samples of milliseconds, one task at a time, by subject and metric.
    fn measured(samples: &[(usize, Mode, &str, &[u64])]) -> Measured {
        let key = |subject, mode, metric: &str| Key { subject, mode, concurrency: 1, metric: metric.to_owned() };
        let nanoseconds = |all: &[u64]| all.iter().map(|ms| ms * 1_000_000).collect();
        samples.iter().map(|(path, mode, metric, all)| (key(*path, *mode, metric), nanoseconds(all))).collect()
    }

    fn results() -> Results {
        let names = ["driver".to_owned(), "runc".to_owned()];
        let (main, details) = (
            measured(&[
                (0, Mode::BackToBack, "first_byte", &[10, 12, 30]),
                (1, Mode::BackToBack, "first_byte", &[40, 48, 60, 50]),
                (0, Mode::Gaps, "first_byte", &[14]),
                (0, Mode::BackToBack, "exit_seen", &[77]),
            ]),
            measured(&[
                (0, Mode::BackToBack, "phase.total", &[20]),
                (0, Mode::BackToBack, "phase.create", &[15]),
                (0, Mode::BackToBack, "phase.bundle", &[1]),
                (0, Mode::BackToBack, "phase.released", &[18]),
                (0, Mode::BackToBack, "destroy", &[99]),
            ]),
        );
        let rows = summary::rows(&main, &names);
        let throughput = |path: &str, per_second| Throughput {
            path: path.to_owned(),
            concurrency: 4,
            tasks: 128,
            per_second,
            cpu_ms_per_task: 88.0,
        };
        let memory =
            Memory { path: "driver".to_owned(), tasks: 8, total_kib: 800, per_task_kib: 100.0, parts: BTreeMap::new() };
        Results {
            version: 1,
            at: 0,
            machine: Machine::describe(),
            plan: Plan {
                concurrency: vec![4],
                paths: vec![
                    SubjectPlan::new("driver", SubjectKind::Driver),
                    SubjectPlan::new("runc", SubjectKind::Runc),
                ],
                ..Plan::default()
            },
            spec_hash: String::new(),
            left_out: BTreeMap::from([("podman".to_owned(), "no\n\nanswer".to_owned())]),
            definitions: METRICS.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect(),
            ratios: summary::ratios(&rows, "driver"),
            rows,
            details: summary::rows(&details, &names),
            throughput: vec![throughput("driver", 60.0), throughput("runc", 40.0)],
            memory: vec![memory],
            samples: Vec::new(),
        }
    }

    /// Returns the lines below a title, up to the next empty line.
    fn table<'a>(text: &'a str, title: &str) -> Vec<&'a str> {
        let (_, rest) = text.split_once(&format!("\n{title}")).unwrap_or_else(|| panic!("{title}: {text}"));
        rest.lines().skip(1).take_while(|line| !line.is_empty()).collect()
    }

    #[test]
    fn subjects_are_side_by_side_with_their_ratio() {
        let text = overview(&results());
        assert_eq!(
            table(&text, "first_byte: from"),
            [
                "         back to back                              after 100 ms of pause",
                "               n     min     p50     p99   ratio         n     min     p50     p99   ratio",
                "driver         3   10.00   12.00   30.00                 1   14.00   14.00   14.00",
                "runc           4   40.00   48.00   60.00   0.250",
            ]
        );
        assert!(text.contains("left out: podman: no; answer\n"), "{text}");
    }

    #[test]
    fn only_large_phases_are_shown() {
        let text = overview(&results());
        assert_eq!(
            table(&text, "large phases"),
            [
                "                 back to back",
                "                       n     min     p50     p99   share",
                "driver: create         1   15.00   15.00   15.00    0.75",
                "driver: total          1   20.00   20.00   20.00    1.00",
            ]
        );
        assert!(!text.contains("77.00") && !text.contains("99.00"), "{text}");
    }

    #[test]
    fn many_tasks_are_compared_as_well() {
        let text = overview(&results());
        let lines: Vec<Vec<&str>> =
            table(&text, "tasks at once").into_iter().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[2..], [vec!["driver", "128", "60.0", "8", "100"], vec!["runc", "128", "40.0", "1.50"]]);
    }
}
