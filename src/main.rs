//! `nomad-driver-shim`: a Nomad driver plugin if Nomad starts it, a command line tool otherwise.

use std::{path::Path, process::ExitCode};

use nomad_driver_shim::{
    cli, error_chain, gvisor,
    ids::DriverName,
    logs, plugin,
    privileges::{self, PrivilegeError, Reduction},
    process,
};
use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

fn main() -> ExitCode {
    // This comes before a second thread exists: threads inherit the signal mask of the thread that starts them.
    process::unblock_signals();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [command, rest @ ..] = &arguments[..]
        && command == logs::SUPERVISOR_COMMAND
    {
        return run_log_writer(rest);
    }
    if let [command, rest @ ..] = &arguments[..]
        && command == gvisor::SUPERVISOR_COMMAND
    {
        return gvisor::supervisor_main(rest);
    }
    // This comes before a second thread exists: each thread has capabilities of its own.
    let reduced = plugin::is_plugin().then(privileges::reduce_plugin);
    // The registry client and AutoMTLS use the same crypto library. Only a second call could fail, and there is none.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(4).max_blocking_threads(64).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("could not start the async runtime: {error}")),
    };
    let code = match reduced {
        Some(reduced) => runtime.block_on(run_plugin(reduced)),
        None => runtime.block_on(cli::main()),
    };
    // Async tasks that still run must not delay the exit: the agent waits 2 s for the plugin to end, then kills it.
    runtime.shutdown_background();
    code
}

/// Runs the log writer or its supervisor. Both use plain threads instead of the async runtime, to need little memory.
fn run_log_writer(arguments: &[String]) -> ExitCode {
    tracing_subscriber::registry().with(plugin::Hclog.with_filter(EnvFilter::new("info"))).init();
    process::raise_descriptor_limit();
    let (role, logs) = match arguments {
        [flag, logs] if flag == logs::WRITER_FLAG => (logs::Role::Writer, Path::new(logs)),
        [logs] => (logs::Role::Supervisor, Path::new(logs)),
        _ => return fail("`log-writer DIRECTORY` is an internal command, which only the driver itself calls"),
    };
    if let Err(error) = role.confine() {
        // The process continues: tasks block until the log writer has read what they write.
        tracing::warn!(error = error_chain(&error), "could not drop the unneeded privileges of a log process");
    }
    let outcome = match role {
        logs::Role::Writer => logs::run_writer(logs),
        logs::Role::Supervisor => logs::run_supervisor(logs),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&format!("log writer: {error}")),
    }
}

/// Runs the plugin until the agent or a successor asks it to stop.
async fn run_plugin(reduced: Result<Reduction, PrivilegeError>) -> ExitCode {
    // The agent filters by its own log level, which it does not pass to plugins.
    let filter = EnvFilter::try_from_env("NOMAD_DRIVER_SHIM_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,nomad_driver_shim=debug"));
    tracing_subscriber::registry().with(plugin::Hclog.with_filter(filter)).init();
    process::raise_descriptor_limit();
    match reduced {
        Ok(Reduction::Dropped) => {}
        Ok(Reduction::Kept(reason)) => tracing::info!(%reason, "the plugin keeps all capabilities of the agent"),
        Err(error) => {
            tracing::warn!(error = error_chain(&error), "could not drop the unneeded capabilities of the plugin");
        }
    }
    let mut arguments = std::env::args();
    let argv0 = arguments.next().unwrap_or_default();
    let name = match DriverName::from_command_line(&argv0, &arguments.collect::<Vec<_>>()) {
        Ok(name) => name,
        Err(error) => return fail(&error.to_string()),
    };
    match plugin::serve(name).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error_chain(&error)),
    }
}

/// Reports a problem on stderr and returns the exit code of a failure.
#[allow(clippy::print_stderr, reason = "the program can't go on and reports why")]
fn fail(problem: &str) -> ExitCode {
    eprintln!("nomad-driver-shim: {problem}");
    ExitCode::FAILURE
}
