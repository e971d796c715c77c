//! Results for people: a table, a page with pictures, a comparison.

use std::fmt::Write as _;

use super::{Mode, Results, Row, summary::METRICS};

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::BackToBack => "back_to_back",
        Mode::Gaps => "gaps",
    }
}

/// All figures, as text.
pub fn table(results: &Results) -> String {
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
            "\nTOO NOISY: the machine did other things meanwhile; read ratios only, and repeat this"
        } else {
            ""
        },
    );
    for (path, why) in &results.left_out {
        let _ = writeln!(text, "left out: {path}: {why}");
    }
    for (title, rows) in [("", &results.rows), ("details\n", &results.details)] {
        let _ = writeln!(
            text,
            "\n{title}{:28} {:>12} {:>3} {:30} {:>5} {:>9} {:>9} {:>9} {:>9} {:>9}  ms",
            "path", "mode", "at", "metric", "n", "min", "p50", "p90", "p99", "max"
        );
        let mut rows: Vec<&Row> = rows.iter().collect();
        rows.sort_by_key(|row| (row.mode, row.concurrency, place(&row.metric), row.metric.clone()));
        for row in rows {
            let _ = writeln!(
                text,
                "{:28} {:>12} {:>3} {:30} {:>5} {:>9.3} {:>9.3} {:>9.3} {:>9.3} {:>9.3}",
                row.path,
                mode(row.mode),
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
    if !results.throughput.is_empty() {
        let _ = writeln!(text, "\n{:28} {:>3} {:>7} {:>10} {:>14}", "path", "at", "tasks", "tasks/s", "cpu ms a task");
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
            "\n{}: {:.0} KiB an idle task ({} KiB PSS for {})",
            memory.path, memory.per_task_kib, memory.total_kib, memory.tasks
        );
        for (name, (count, kib)) in &memory.parts {
            let _ = writeln!(text, "  {count:>4} x {name:24} {kib:>8} KiB");
        }
    }
    text
}

fn place(metric: &str) -> usize {
    METRICS.iter().position(|(name, _)| *name == metric).unwrap_or(METRICS.len())
}

/// Medians of two results side by side.
pub fn compare(before: &Results, after: &Results) -> String {
    let mut text = format!(
        "{:28} {:>12} {:>3} {:30} {:>9} {:>9} {:>7}\n",
        "path", "mode", "at", "metric", "before", "after", "ratio"
    );
    if before.machine.kernel != after.machine.kernel || before.machine.cpu != after.machine.cpu {
        text.insert_str(0, "These are results of two different machines.\n");
    }
    for new in after.rows.iter().chain(&after.details) {
        let same = |row: &&Row| {
            (&row.path, row.mode, row.concurrency, &row.metric) == (&new.path, new.mode, new.concurrency, &new.metric)
        };
        if let Some(old) = before.rows.iter().chain(&before.details).find(same) {
            let _ = writeln!(
                text,
                "{:28} {:>12} {:>3} {:30} {:>9.3} {:>9.3} {:>7.2}",
                new.path,
                mode(new.mode),
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

const COLOURS: [&str; 9] =
    ["#0b7a75", "#7fc8c2", "#c1440e", "#e08e45", "#8a6fbf", "#444444", "#1f5fbf", "#b03a78", "#808000"];

/// A page by itself: pictures of the distributions, then all figures.
pub fn html(results: &Results) -> String {
    let mut paths: Vec<&str> = results.rows.iter().map(|row| row.path.as_str()).collect();
    paths.sort_by_key(|path| results.plan.paths.iter().position(|plan| plan.name == *path));
    paths.dedup();
    let colour = |path: &str| COLOURS[paths.iter().position(|known| *known == path).unwrap_or(0) % COLOURS.len()];
    let mut page = String::from(
        "<!doctype html><meta charset=utf-8><title>nomad-driver-shim: benchmark</title><style>\
         body{font:15px/1.45 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}\
         table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1em 0}\
         td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}\
         td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}\
         .key{display:inline-block;width:.9em;height:.9em;margin:0 .3em 0 1em;vertical-align:-.1em}\
         .noisy{background:#fbe3d6;padding:.6em 1em}</style><h1>What a task costs</h1>",
    );
    let machine = &results.machine;
    let _ = write!(
        page,
        "<p>{} × {}, Linux {}, cgroup v{}, {} MiB. Load {:.2} before, {:.2} after; a fixed piece of work took {:.2} \
         times its least at the 90th percentile.</p>",
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
        page.push_str("<p class=noisy>The machine was too noisy: read ratios only, and repeat this.</p>");
    }
    for (path, why) in &results.left_out {
        let _ = write!(page, "<p>Left out: {}: {}</p>", escape(path), escape(why));
    }
    page.push_str("<p>");
    for path in &paths {
        let _ = write!(page, "<span class=key style=\"background:{}\"></span>{}", colour(path), escape(path));
    }
    page.push_str("</p>");
    let mut pictures: Vec<(Mode, usize, &str)> =
        results.rows.iter().map(|row| (row.mode, row.concurrency, row.metric.as_str())).collect();
    pictures.sort_by_key(|(mode, concurrency, metric)| (*concurrency, *mode, place(metric)));
    pictures.dedup();
    for (in_mode, concurrency, metric) in pictures {
        let meaning = results.definitions.get(metric).map_or("", String::as_str);
        let _ = write!(
            page,
            "<h2>{} · {} · {concurrency} at once</h2><p>{}.</p>",
            escape(metric),
            if in_mode == Mode::Gaps { "after a pause" } else { "back to back" },
            escape(meaning)
        );
        let same = |path: &str, mode: Mode, at: usize, what: &str| {
            (mode, at, what) == (in_mode, concurrency, metric) && paths.contains(&path)
        };
        let lines: Vec<(&str, &[f64])> = results
            .samples
            .iter()
            .filter(|one| same(&one.path, one.mode, one.concurrency, &one.metric))
            .map(|one| (one.path.as_str(), &one.ms[..]))
            .collect();
        page.push_str(&picture(&lines, &colour));
        page.push_str("<table><tr><th>path<th>n<th>min<th>p50<th>p90<th>p99<th>max</tr>");
        for row in results.rows.iter().filter(|row| same(&row.path, row.mode, row.concurrency, &row.metric)) {
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
    if !results.throughput.is_empty() {
        page.push_str("<h2>Throughput</h2><table><tr><th>path<th>at once<th>tasks/s<th>CPU ms a task</tr>");
        for one in &results.throughput {
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
    if !results.memory.is_empty() {
        page.push_str(
            "<h2>Memory beside idle tasks (PSS)</h2><table><tr><th>path<th>tasks<th>KiB a task<th>KiB in all</tr>",
        );
        for one in &results.memory {
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
    page
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Distributions: how many of a path's tasks took at most so long, on a logarithmic axis.
fn picture(lines: &[(&str, &[f64])], colour: &dyn Fn(&str) -> &'static str) -> String {
    const WIDTH: f64 = 860.0;
    const HEIGHT: f64 = 260.0;
    const LEFT: f64 = 44.0;
    const BOTTOM: f64 = 26.0;
    let all = lines.iter().flat_map(|(_, values)| values.iter().copied()).filter(|value| *value > 0.0);
    let (least, most) = all.fold((f64::MAX, 0.001_f64), |(least, most), value| (least.min(value), most.max(value)));
    if least > most {
        return String::new();
    }
    let (low, high) = (least.log10() - 0.05, most.log10() + 0.05);
    let x = |value: f64| LEFT + (value.max(least).log10() - low) / (high - low) * (WIDTH - LEFT - 10.0);
    let y = |share: f64| (1.0 - share) * (HEIGHT - BOTTOM - 10.0) + 10.0;
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=img font-size=12 font-family=system-ui>");
    for share in [0.0, 0.5, 0.9, 1.0] {
        let _ = write!(
            svg,
            "<line x1={LEFT} x2={} y1={1:.1} y2={1:.1} stroke=#ddd /><text x=4 y={2:.1} fill=#666>{3:.0} %</text>",
            WIDTH - 10.0,
            y(share),
            y(share) + 4.0,
            share * 100.0
        );
    }
    for exponent in -1..=5 {
        for step in [1.0, 2.0, 5.0] {
            let value = step * 10_f64.powi(exponent);
            if value >= least * 0.9 && value <= most * 1.1 {
                let _ = write!(
                    svg,
                    "<line x1={0:.1} x2={0:.1} y1=10 y2={1} stroke=#eee /><text x={0:.1} y={2} fill=#666 text-anchor=middle>{value} ms</text>",
                    x(value),
                    HEIGHT - BOTTOM,
                    HEIGHT - 8.0
                );
            }
        }
    }
    for (path, values) in lines {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let mut points = String::new();
        for (n, value) in sorted.iter().enumerate() {
            #[allow(clippy::cast_precision_loss, reason = "a few hundred")]
            let (from, to) = (n as f64 / sorted.len() as f64, (n + 1) as f64 / sorted.len() as f64);
            let _ = write!(points, "{0:.1},{1:.1} {0:.1},{2:.1} ", x(*value), y(from), y(to));
        }
        let _ = write!(
            svg,
            "<polyline points=\"{points}\" fill=none stroke=\"{}\" stroke-width=2><title>{}</title></polyline>",
            colour(path),
            escape(path)
        );
    }
    svg.push_str("</svg>");
    svg
}
