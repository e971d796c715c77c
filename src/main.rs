//! `nomad-driver-shim`: a Nomad driver plugin when Nomad starts it, a command line otherwise.

use std::{path::Path, process::ExitCode};

use nomad_driver_shim::{
    chain, cli, gvisor,
    ids::DriverName,
    logs, plugin,
    privileges::{self, PrivilegeError, Reduced},
    process,
};
use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

fn main() -> ExitCode {
    // While there is one thread, from which all others have their mask.
    process::unblock_signals();
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
    // While there is one thread: capabilities are each thread's own.
    let reduced = plugin::is_plugin().then(privileges::reduce_plugin);
    // One crypto library for the registry client and AutoMTLS; a second call would fail, and there is none.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(4).max_blocking_threads(64).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("start the runtime: {error}")),
    };
    let code = match reduced {
        Some(reduced) => runtime.block_on(run_plugin(reduced)),
        None => runtime.block_on(cli::main()),
    };
    // Nothing that still runs may keep us: the agent waits 2 s, then kills.
    runtime.shutdown_background();
    code
}

/// The log writer or its keeper: plain threads, so that they stay small.
fn run_log_writer(arguments: &[String]) -> ExitCode {
    tracing_subscriber::registry().with(plugin::Hclog.with_filter(EnvFilter::new("info"))).init();
    process::raise_descriptor_limit();
    let (role, logs) = match arguments {
        [flag, logs] if flag == logs::WRITER => (logs::Role::Writer, Path::new(logs)),
        [logs] => (logs::Role::Keeper, Path::new(logs)),
        _ => return fail("log-writer DIRECTORY is for the driver itself"),
    };
    if let Err(error) = role.confine() {
        // Tasks wait for what they have written to be taken: that must go on.
        tracing::warn!(error = chain(&error), "a log process keeps privileges that it does not need");
    }
    let outcome = match role {
        logs::Role::Writer => logs::write(logs),
        logs::Role::Keeper => logs::keep(logs),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&format!("log writer: {error}")),
    }
}

async fn run_plugin(reduced: Result<Reduced, PrivilegeError>) -> ExitCode {
    // The agent filters by its own level, which a plugin is not told.
    let filter = EnvFilter::try_from_env("NOMAD_DRIVER_SHIM_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,nomad_driver_shim=debug"));
    tracing_subscriber::registry().with(plugin::Hclog.with_filter(filter)).init();
    process::raise_descriptor_limit();
    match reduced {
        Ok(Reduced::Yes) => {}
        Ok(Reduced::No(reason)) => tracing::info!(%reason, "the plugin keeps all capabilities of the agent"),
        Err(error) => tracing::warn!(error = chain(&error), "the plugin keeps capabilities that it does not need"),
    }
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
