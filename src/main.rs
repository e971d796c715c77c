//! `nomad-driver-shim`: a Nomad driver plugin when Nomad starts it, a command line otherwise.

use std::{path::Path, process::ExitCode};

use nomad_driver_shim::{chain, cli, gvisor, ids::DriverName, logs, plugin};
use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [command, rest @ ..] = &arguments[..]
        && command == logs::COMMAND
    {
        return run_log_writer(rest);
    }
    if let [command, rest @ ..] = &arguments[..]
        && command == gvisor::KEEPER_COMMAND
    {
        return gvisor::keeper_main(rest);
    }
    // One crypto library for the registry client and AutoMTLS; a second call would fail, and there is none.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(4).max_blocking_threads(64).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("start the runtime: {error}")),
    };
    let code = if plugin::is_plugin() { runtime.block_on(run_plugin()) } else { runtime.block_on(cli::main()) };
    // Nothing that still runs may keep us: the agent waits 2 s, then kills.
    runtime.shutdown_background();
    code
}

/// The log writer or its keeper: plain threads, so that they stay small.
fn run_log_writer(arguments: &[String]) -> ExitCode {
    tracing_subscriber::registry().with(plugin::Hclog.with_filter(EnvFilter::new("info"))).init();
    nomad_driver_shim::process::raise_descriptor_limit();
    let outcome = match arguments {
        [flag, logs] if flag == logs::WRITER => logs::write(Path::new(logs)),
        [logs] => logs::keep(Path::new(logs)),
        _ => return fail("log-writer DIRECTORY is for the driver itself"),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&format!("log writer: {error}")),
    }
}

async fn run_plugin() -> ExitCode {
    // The agent filters by its own level, which a plugin is not told.
    let filter = EnvFilter::try_from_env("NOMAD_DRIVER_SHIM_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,nomad_driver_shim=debug"));
    tracing_subscriber::registry().with(plugin::Hclog.with_filter(filter)).init();
    nomad_driver_shim::process::raise_descriptor_limit();
    let mut arguments = std::env::args();
    let argv0 = arguments.next().unwrap_or_default();
    let name = match DriverName::of_plugin(&argv0, &arguments.collect::<Vec<_>>()) {
        Ok(name) => name,
        Err(error) => return fail(&error.to_string()),
    };
    match plugin::serve(name).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&chain(&error)),
    }
}

#[allow(clippy::print_stderr, reason = "the last word of a program that can't go on")]
fn fail(problem: &str) -> ExitCode {
    eprintln!("nomad-driver-shim: {problem}");
    ExitCode::FAILURE
}
