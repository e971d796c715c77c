//! Draws distributions as SVG. Each picture is well-formed XML, so that it is readable as a file and inside of an HTML
//! page.

use std::fmt::Write as _;

use super::{
    Mode, Results, Row,
    summary::{METRICS, MetricKey, SampleSeries},
};

/// The colours of the subjects.
const COLOURS: [&str; 9] =
    ["#0b7a75", "#7fc8c2", "#c1440e", "#e08e45", "#8a6fbf", "#444444", "#1f5fbf", "#b03a78", "#808000"];

/// One picture: the distributions of one metric.
#[derive(Debug, Clone)]
pub struct Picture<'a> {
    /// The metric's name.
    pub metric: &'a str,
    /// How the tasks were run.
    pub mode: Mode,
    /// How many tasks ran at once.
    pub concurrency: usize,
    /// The picture, as an `svg` element.
    pub svg: String,
}

impl Picture<'_> {
    /// Returns the name of the picture's file.
    pub fn file_name(&self) -> String {
        format!("{}-{}-{}.svg", self.metric, self.mode.name(), self.concurrency)
    }
}

/// Returns the names of the measured subjects in the order of the plan, each with its colour.
pub(super) fn subjects_with_colours(results: &Results) -> Vec<(&str, &'static str)> {
    let mut subjects: Vec<&str> = results.rows.iter().map(|row| row.path.as_str()).collect();
    subjects.sort_by_key(|subject| results.plan.paths.iter().position(|plan| plan.name == *subject));
    subjects.dedup();
    subjects.into_iter().enumerate().map(|(n, subject)| (subject, COLOURS[n % COLOURS.len()])).collect()
}

/// Returns the position of a metric among all metrics, to sort by.
pub(super) fn metric_position(metric: &str) -> usize {
    METRICS.iter().position(|(known, _)| *known == metric).unwrap_or(METRICS.len())
}

/// Draws all pictures of a run, in the order in which they are shown.
pub fn pictures<'a>(results: &'a Results) -> Vec<Picture<'a>> {
    let subjects = subjects_with_colours(results);
    let mut keys: Vec<MetricKey<'_>> = results.rows.iter().map(Row::key).collect();
    keys.sort_by_key(|key| (key.concurrency, key.mode, metric_position(key.metric)));
    keys.dedup();
    let mut pictures = Vec::new();
    for key in keys {
        let MetricKey { mode, concurrency, metric } = key;
        let same = |one: &&SampleSeries, subject| one.path == subject && one.key() == key;
        let line = |(subject, colour): &(&'a str, &'static str)| {
            let samples = results.samples.iter().find(|one| same(one, *subject))?;
            Some(Line { subject, colour, values: &samples.ms })
        };
        let lines: Vec<Line<'_>> = subjects.iter().filter_map(line).collect();
        pictures.push(Picture { metric, mode, concurrency, svg: draw(&lines) });
    }
    pictures
}

/// The curve of one subject.
struct Line<'a> {
    subject: &'a str,
    colour: &'static str,
    values: &'a [f64],
}

/// Escapes text for XML and HTML.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Draws cumulative distributions: the share of a subject's tasks that took at most the time on the logarithmic axis.
fn draw(lines: &[Line<'_>]) -> String {
    const WIDTH: f64 = 860.0;
    const HEIGHT: f64 = 280.0;
    const LEFT: f64 = 44.0;
    const BOTTOM: f64 = 46.0;
    let all = lines.iter().flat_map(|line| line.values.iter().copied()).filter(|value| *value > 0.0);
    let (least, most) = all.fold((f64::MAX, 0.001_f64), |(least, most), value| (least.min(value), most.max(value)));
    if least > most {
        return String::new();
    }
    let (low, high) = (least.log10() - 0.05, most.log10() + 0.05);
    let x = |value: f64| LEFT + (value.max(least).log10() - low) / (high - low) * (WIDTH - LEFT - 10.0);
    let y = |share: f64| (1.0 - share) * (HEIGHT - BOTTOM - 10.0) + 10.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" font-size=\"12\" \
         font-family=\"system-ui, sans-serif\"><rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\" />"
    );
    for share in [0.0, 0.5, 0.9, 1.0] {
        let _ = write!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{0}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#ddd\" /><text x=\"4\" y=\"{2:.1}\" fill=\"#666\">{3:.0} %</text>",
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
                    "<line x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"10\" y2=\"{1}\" stroke=\"#eee\" /><text x=\"{0:.1}\" y=\"{2}\" fill=\"#666\" text-anchor=\"middle\">{value} ms</text>",
                    x(value),
                    HEIGHT - BOTTOM,
                    HEIGHT - BOTTOM + 16.0
                );
            }
        }
    }
    let mut legend_x = LEFT;
    for Line { subject, colour, values } in lines {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let mut points = String::new();
        for (n, value) in sorted.iter().enumerate() {
            #[allow(clippy::cast_precision_loss, reason = "a few hundred samples")]
            let (from, to) = (n as f64 / sorted.len() as f64, (n + 1) as f64 / sorted.len() as f64);
            let _ = write!(points, "{0:.1},{1:.1} {0:.1},{2:.1} ", x(*value), y(from), y(to));
        }
        let (subject, bottom) = (escape(subject), HEIGHT - 8.0);
        let _ = write!(
            svg,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"><title>{subject}</title></polyline>\
             <rect x=\"{legend_x}\" y=\"{0}\" width=\"10\" height=\"10\" fill=\"{colour}\" />\
             <text x=\"{1}\" y=\"{bottom}\">{subject}</text>",
            bottom - 9.0,
            legend_x + 14.0
        );
        #[allow(clippy::cast_precision_loss, reason = "a name is short")]
        let width = subject.len() as f64 * 7.0;
        legend_x += 34.0 + width;
    }
    svg.push_str("</svg>");
    svg
}
