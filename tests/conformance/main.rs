//! The conformance suite: what any Nomad driver with images must do, one row for each requirement. The rows look only
//! at the wire protocol and at the kernel. They come from docs/protocol/nomad-plugin.md#6, from the shell tests of
//! nomad-driver-containerd, and from its defects B1 to B28 (docs/protocol/nomad-driver-containerd.md#9).
//!
//! `make test DRIVER=/path/to/plugin` runs the rows on that driver, with the plugin configuration `DRIVER_CONFIG`
//! (JSON). Without `DRIVER`, the rows run on this driver, and then on this driver with faults added, where the matching
//! rows must turn red. A complete run on this driver writes `docs/conformance.md`; a run on another driver writes
//! `target/conformance.md`.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::too_many_arguments,
    clippy::zombie_processes,
    clippy::large_futures,
    missing_docs,
    reason = "tests; what they start ends with them"
)]

#[path = "../support/mod.rs"]
#[allow(dead_code, unused_imports, reason = "shared with the behaviour tests")]
mod support;

mod client;
mod defects;
mod exec;
mod faulty;
mod gvisor;
mod images;
mod lifecycle;
mod logs;
mod options;
mod peer;
mod report;
mod resources;
mod row;
mod seen;

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use libtest_mimic::{Arguments, Failed, Trial};
use nomad_driver_shim::host::PluginCommand;

use report::Report;
use row::{Row, Verdict};

fn rows() -> Vec<Row> {
    let parts = [
        exec::rows(),
        lifecycle::rows(),
        images::rows(),
        options::rows(),
        resources::rows(),
        logs::rows(),
        client::rows(),
        peer::rows(),
        defects::rows(),
    ];
    parts.into_iter().flatten().collect()
}

/// How many rows run at once. A row spends most of its time waiting.
const AT_ONCE: usize = 6;

fn main() -> ExitCode {
    if let Some(fault) = faulty::wanted() {
        return faulty::serve(fault);
    }
    row::keep_quiet();
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(AT_ONCE));
    let driver = std::env::var_os("DRIVER").filter(|path| !path.is_empty()).map(PathBuf::from);
    let report = Arc::new(Report::default());
    let runtime = std::env::var("NOMAD_DRIVER_SHIM_TEST_RUNTIME").ok().filter(|_| driver.is_none());
    let sandboxed = runtime.filter(|runtime| runtime.contains("runsc"));
    let rows = match &sandboxed {
        Some(runtime) => gvisor::adapt(runtime, rows()),
        None => rows().into_iter().map(|row| (row, None)).collect(),
    };
    let mut trials: Vec<Trial> = rows
        .into_iter()
        .map(|(row, limit)| {
            let (report, driver) = (report.clone(), driver.clone().map(PluginCommand::new));
            Trial::test(row.name(), move || {
                let verdict = match (row.run(driver), limit) {
                    (Verdict::Green, Some(reason)) => Verdict::Limited(reason),
                    (other, _) => other,
                };
                report.add(&row, &verdict);
                match verdict {
                    Verdict::Red(why) => Err(Failed::from(why)),
                    Verdict::Green | Verdict::NotApplicable(_) | Verdict::Limited(_) => Ok(()),
                }
            })
        })
        .collect();
    if driver.is_none() && sandboxed.is_none() {
        trials.extend(faulty::FAULTS.iter().map(|fault| {
            let report = report.clone();
            Trial::test(format!("a driver that {}", fault.says), move || fault.is_noticed(&report))
        }));
    }
    let whole = arguments.filter.is_none() && arguments.skip.is_empty() && !arguments.list;
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        report.finish(driver.as_deref(), sandboxed.as_deref(), whole);
    }
    conclusion.exit_code()
}
