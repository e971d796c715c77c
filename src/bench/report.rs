//! Formats results for people: as a text table, as an HTML page with pictures, and as a comparison of two runs.

use std::fmt::Write as _;

use super::{
    Mode, Results, Row,
    pictures::{Picture, escape, metric_position, pictures},
    summary::{Memory, Throughput},
};

/// Formats what a reader must know before the figures: the machine, and what could not be measured.
pub(super) fn heading(results: &Results) -> String {
    let mut text = String::new();
    let machine = &results.machine;
    let _ = writeln!(
        text,
        "{} x {}, Linux {}, cgroup v{}, load {:.2} before and {:.2} after, unevenness {:.2}{}",
        machine.cpus,
        machine.cpu,
        machine.kernel,
        machine.cgroup_version,
        machine.load_before,
        machine.load_after,
        machine.unevenness,
        if machine.noisy {
            "\nTOO NOISY: the machine did other work meanwhile; trust only the ratios, and repeat the run"
        } else {
            ""
        },
    );
    for (path, why) in &results.left_out {
        // The reason may contain a program's text on stderr, which may have several lines.
        let why: Vec<&str> = why.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let _ = writeln!(text, "left out: {path}: {}", why.join("; "));
    }
    text
}

/// Formats all figures as text tables.
pub fn table(results: &Results) -> String {
    let mut text = String::new();
    text_rows(&mut text, "", &results.rows);
    text_rows(&mut text, "details\n", &results.details);
    if !results.throughput.is_empty() {
        let _ = writeln!(text, "\n{:28} {:>3} {:>7} {:>10} {:>14}", "path", "at", "tasks", "tasks/s", "cpu ms/task");
        for one in &results.throughput {
            let _ = writeln!(
                text,
                "{:28} {:>3} {:>7} {:>10.1} {:>14.1}",
                one.path, one.concurrency, one.tasks, one.per_second, one.cpu_ms_per_task
            );
        }
    }
    for memory in &results.memory {
        let _ = writeln!(
            text,
            "\n{}: {:.0} KiB for each idle task ({} KiB PSS for {} tasks)",
            memory.path, memory.per_task_kib, memory.total_kib, memory.tasks
        );
        for (name, (count, kib)) in &memory.parts {
            let _ = writeln!(text, "  {count:>4} x {name:24} {kib:>8} KiB");
        }
    }
    text
}

/// Adds a table of distributions.
fn text_rows(text: &mut String, title: &str, rows: &[Row]) {
    let _ = writeln!(
        text,
        "\n{title}{:28} {:>12} {:>3} {:30} {:>5} {:>9} {:>9} {:>9} {:>9} {:>9}  ms",
        "path", "mode", "at", "metric", "n", "min", "p50", "p90", "p99", "max"
    );
    let mut rows: Vec<&Row> = rows.iter().collect();
    rows.sort_by_key(|row| (row.mode, row.concurrency, metric_position(&row.metric), row.metric.clone()));
    for row in rows {
        let _ = writeln!(
            text,
            "{:28} {:>12} {:>3} {:30} {:>5} {:>9.3} {:>9.3} {:>9.3} {:>9.3} {:>9.3}",
            row.path,
            row.mode.name(),
            row.concurrency,
            row.metric,
            row.n,
            row.min_ms,
            row.p50_ms,
            row.p90_ms,
            row.p99_ms,
            row.max_ms
        );
    }
}

/// Formats the medians of two results side by side.
pub fn compare(before: &Results, after: &Results) -> String {
    let mut text = format!(
        "{:28} {:>12} {:>3} {:30} {:>9} {:>9} {:>7}\n",
        "path", "mode", "at", "metric", "before", "after", "ratio"
    );
    if before.machine.kernel != after.machine.kernel || before.machine.cpu != after.machine.cpu {
        text.insert_str(0, "The two results come from different machines.\n");
    }
    for new in after.rows.iter().chain(&after.details) {
        let same = |row: &&Row| row.path == new.path && row.key() == new.key();
        if let Some(old) = before.rows.iter().chain(&before.details).find(same) {
            let _ = writeln!(
                text,
                "{:28} {:>12} {:>3} {:30} {:>9.3} {:>9.3} {:>7.2}",
                new.path,
                new.mode.name(),
                new.concurrency,
                new.metric,
                old.p50_ms,
                new.p50_ms,
                new.p50_ms / old.p50_ms
            );
        }
    }
    text
}

/// Formats a self-contained HTML page: each distribution's picture with its figures, then throughput and memory.
pub fn html(results: &Results) -> String {
    let mut page = String::from(
        "<!doctype html><meta charset=utf-8><title>nomad-driver-shim: benchmark</title><style>\
         body{font:15px/1.45 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}\
         table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1em 0}\
         td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}\
         td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}\
         .noisy{background:#fbe3d6;padding:.6em 1em}</style><h1>What a task costs</h1>",
    );
    html_machine(&mut page, results);
    for picture in pictures(results) {
        html_distribution(&mut page, results, &picture);
    }
    html_throughput(&mut page, &results.throughput);
    html_memory(&mut page, &results.memory);
    page
}

/// Adds the machine, whether it was quiet enough, and what was left out.
fn html_machine(page: &mut String, results: &Results) {
    let machine = &results.machine;
    let _ = write!(
        page,
        "<p>{} × {}, Linux {}, cgroup v{}, {} MiB. Load {:.2} before, {:.2} after; the 90th percentile of the time of \
         a fixed piece of work was {:.2} times its minimum.</p>",
        machine.cpus,
        escape(&machine.cpu),
        escape(&machine.kernel),
        machine.cgroup_version,
        machine.memory_mib,
        machine.load_before,
        machine.load_after,
        machine.unevenness
    );
    if machine.noisy {
        page.push_str("<p class=noisy>The machine was too noisy: trust only the ratios, and repeat the run.</p>");
    }
    for (path, why) in &results.left_out {
        let _ = write!(page, "<p>Left out: {}: {}</p>", escape(path), escape(why));
    }
}

/// Adds a picture of one metric, and the table of its figures.
fn html_distribution(page: &mut String, results: &Results, picture: &Picture<'_>) {
    let Picture { metric, mode, concurrency, svg } = picture;
    let meaning = results.definitions.get(*metric).map_or("", String::as_str);
    let _ = write!(
        page,
        "<h2>{} · {} · {concurrency} at once</h2><p>{}.</p>",
        escape(metric),
        if *mode == Mode::Gaps { "after a pause" } else { "back to back" },
        escape(meaning)
    );
    page.push_str(svg);
    page.push_str("<table><tr><th>path<th>n<th>min<th>p50<th>p90<th>p99<th>max</tr>");
    let is_shown = |row: &&Row| (row.mode, row.concurrency, row.metric.as_str()) == (*mode, *concurrency, *metric);
    for row in results.rows.iter().filter(is_shown) {
        let _ = write!(
            page,
            "<tr><td>{}<td>{}<td>{:.2}<td><b>{:.2}</b><td>{:.2}<td>{:.2}<td>{:.2}</tr>",
            escape(&row.path),
            row.n,
            row.min_ms,
            row.p50_ms,
            row.p90_ms,
            row.p99_ms,
            row.max_ms
        );
    }
    page.push_str("</table>");
}

fn html_throughput(page: &mut String, throughput: &[Throughput]) {
    if throughput.is_empty() {
        return;
    }
    page.push_str("<h2>Throughput</h2><table><tr><th>path<th>at once<th>tasks/s<th>CPU ms per task</tr>");
    for one in throughput {
        let _ = write!(
            page,
            "<tr><td>{}<td>{}<td><b>{:.1}</b><td>{:.1}</tr>",
            escape(&one.path),
            one.concurrency,
            one.per_second,
            one.cpu_ms_per_task
        );
    }
    page.push_str("</table>");
}

fn html_memory(page: &mut String, memory: &[Memory]) {
    if memory.is_empty() {
        return;
    }
    page.push_str(
        "<h2>Memory for idle tasks (PSS)</h2><table><tr><th>path<th>tasks<th>KiB per task<th>KiB in total</tr>",
    );
    for one in memory {
        let _ = write!(
            page,
            "<tr><td>{}<td>{}<td><b>{:.0}</b><td>{}</tr>",
            escape(&one.path),
            one.tasks,
            one.per_task_kib,
            one.total_kib
        );
    }
    page.push_str("</table>");
}
