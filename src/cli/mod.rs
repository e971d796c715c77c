//! The command line: containers without an agent, and a look at what the driver keeps.
//!
//! Data goes to stdout, talk to stderr, `--json` works on every list.

mod advisories;
mod bench;
mod config;
mod doctor;
mod events;
mod exec;
mod gc;
mod images;
mod inspect;
mod kill;
mod logs;
mod ps;
mod pull;
mod run;
mod runs;
mod stats;
mod table;
mod tasks;

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};

use crate::{
    chain,
    containerd::{
        Client,
        private::{self, Hold, PrivateError},
    },
    image::{ImageError, ImageStore, SharedError},
    places::{Places, PlacesError, make_dir},
    text::{self, MESSAGE_MAX},
};

/// Errors of ours, as docker's.
const OURS: u8 = 125;

#[derive(Parser, Debug)]
#[command(
    version,
    about = "A Nomad task driver that starts containers through containerd's shims, without containerd on the start path"
)]
#[command(arg_required_else_help = false, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Option<Command>,
}

/// Options of every command.
#[derive(Args, Debug, Clone)]
pub struct Common {
    /// containerd's socket; a private containerd is started when nobody listens at the default one
    #[arg(long, global = true, value_name = "SOCKET", env = "NOMAD_DRIVER_SHIM_ADDRESS")]
    address: Option<PathBuf>,
    /// containerd's namespace
    #[arg(long, global = true, default_value = "nomad", env = "NOMAD_DRIVER_SHIM_NAMESPACE")]
    namespace: String,
    /// Where run directories are
    #[arg(long, global = true, value_name = "DIR", env = "NOMAD_DRIVER_SHIM_RUN_DIR", default_value_os_t = Places::run_parent())]
    run_dir: PathBuf,
    /// Where state directories are
    #[arg(long, global = true, value_name = "DIR", env = "NOMAD_DRIVER_SHIM_STATE_DIR", default_value_os_t = Places::state_parent())]
    state_dir: PathBuf,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run a command in a new container, through the whole real path: plugin, handshake, StartTask
    Run(Box<run::Run>),
    /// Pull an image
    Pull(pull::Pull),
    /// List images
    Images(images::Images),
    /// List the tasks of all drivers on this host
    Ps(ps::Ps),
    /// Say all that is known of a task
    Inspect(inspect::Inspect),
    /// Print a task's output, as Nomad keeps it
    Logs(logs::Logs),
    /// Run a command in a task
    Exec(exec::Exec),
    /// Say what running tasks use
    Stats(stats::Stats),
    /// Send a signal to a task, or kill all of it
    Kill(kill::Kill),
    /// Tell what happens to tasks, as it happens
    Events(events::Events),
    /// Remove images
    Rmi(gc::Rmi),
    /// Remove what nobody needs: remains of tasks, idle images
    Gc(gc::Gc),
    /// Measure what a task costs: this driver, other plugins, containerd, runc, crun, the bare kernel
    Bench(Box<bench::Bench>),
    /// Say what this host can do, what is missing, and how to fix it
    Doctor(doctor::Doctor),
    /// Check agent and job files before Nomad has them
    Config(config::Config),
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The private containerd.
    #[error(transparent)]
    Private(#[from] PrivateError),
    /// An image.
    #[error("{}", text::shown(&chain(&**.0), MESSAGE_MAX))]
    Image(SharedError),
    /// An image record.
    #[error(transparent)]
    Records(#[from] ImageError),
    /// A name.
    #[error(transparent)]
    Reference(#[from] crate::image::ReferenceError),
    /// containerd.
    #[error(transparent)]
    Containerd(#[from] crate::containerd::ContainerdError),
    /// Nomad's side.
    #[error(transparent)]
    Host(#[from] crate::host::HostError),
    /// A task.
    #[error(transparent)]
    Task(#[from] crate::task::TaskError),
    /// A process in a task.
    #[error(transparent)]
    Exec(#[from] crate::task::ExecError),
    /// A live plugin.
    #[error(transparent)]
    Control(#[from] crate::control::ControlError),
    /// Our own directories.
    #[error(transparent)]
    Places(#[from] PlacesError),
    /// A benchmark.
    #[error(transparent)]
    Bench(#[from] crate::bench::BenchError),
    /// Ctrl-C, before the task ran.
    #[error("interrupted")]
    Interrupted,
    /// An option.
    #[error("{0}")]
    Usage(String),
    /// Output.
    #[error("write output")]
    Output(#[from] std::io::Error),
}

impl CliError {
    /// docker's convention: 127 for a command that is not there, 126 for one that can't be run, 125 for all else.
    fn code(&self) -> u8 {
        match self {
            Self::Host(crate::host::HostError::Call { call: "StartTask", status }) => {
                run::start_failure(status.message())
            }
            Self::Exec(error) => error.exit_code().and_then(|code| u8::try_from(code).ok()).unwrap_or(OURS),
            _ => OURS,
        }
    }
}

/// Runs the command line.
pub async fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { OURS } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let Some(command) = cli.command else {
        explain();
        return ExitCode::FAILURE;
    };
    log_to_stderr();
    let outcome = match command {
        Command::Run(run) => Box::pin(run.execute(&cli.common)).await,
        Command::Pull(pull) => Box::pin(pull.execute(&cli.common)).await,
        Command::Images(images) => images.execute(&cli.common).await,
        Command::Ps(ps) => ps.execute(&cli.common),
        Command::Inspect(inspect) => inspect.execute(&cli.common),
        Command::Logs(logs) => logs.execute(&cli.common).await,
        Command::Exec(exec) => Box::pin(exec.execute(&cli.common)).await,
        Command::Stats(stats) => stats.execute(&cli.common).await,
        Command::Kill(kill) => kill.execute(&cli.common).await,
        Command::Events(events) => events.execute(&cli.common).await,
        Command::Rmi(rmi) => rmi.execute(&cli.common).await,
        Command::Gc(gc) => gc.execute(&cli.common).await,
        Command::Bench(bench) => Box::pin(bench.execute(&cli.common)).await,
        Command::Doctor(doctor) => doctor.execute(&cli.common).await,
        Command::Config(config) => config.execute(),
    };
    outcome.map_or_else(
        |error| {
            say(&format!("nomad-driver-shim: {}", chain(&error)));
            ExitCode::from(error.code())
        },
        ExitCode::from,
    )
}

/// For somebody who starts a plugin by hand.
fn explain() {
    say("nomad-driver-shim is a task driver plugin for HashiCorp Nomad.\n\n\
         Nomad starts it by itself: put this program (or a link to it) into the agent's plugin_dir, and name it in the\n\
         agent's configuration:\n\n  plugin \"nomad-driver-shim\" {\n    config {\n    }\n  }\n\n\
         A job then says driver = \"shim\". The name is the file's, without a leading \"nomad-driver-\"; linked as\n\
         containerd-driver it takes that driver's place.\n\n\
         Without an agent: nomad-driver-shim run IMAGE [COMMAND...], and nomad-driver-shim --help for more.");
}

/// Warnings only: talk must not drown what a user asked for. `NOMAD_DRIVER_SHIM_LOG` opens it.
fn log_to_stderr() {
    use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};
    let filter = EnvFilter::try_from_env("NOMAD_DRIVER_SHIM_LOG").unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::registry().with(crate::plugin::Hclog.with_filter(filter)).init();
}

/// Talk.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Data.
fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// May progress bars be drawn?
fn is_interactive() -> bool {
    std::io::stderr().is_terminal()
}

/// An image's name as a user typed it: files are looked for where they stand.
fn image_named(text: &str) -> Result<crate::image::Reference, CliError> {
    use crate::image::{Archive, Reference};
    Ok(match Reference::parse(text)? {
        Reference::Archive(archive) => {
            let path = std::path::absolute(&archive.path)?;
            Reference::Archive(Archive { path, ..archive })
        }
        registry @ Reference::Registry(_) => registry,
    })
}

/// The containerd that a command uses: the one it was told, the system's when it answers, else a private one.
struct Store {
    client: Client,
    hold: Option<Hold>,
    address: PathBuf,
}

impl Store {
    async fn open(common: &Common) -> Result<Self, CliError> {
        let system = PathBuf::from("/run/containerd/containerd.sock");
        let address = common.address.clone().unwrap_or_else(|| system.clone());
        let client = Client::new(&address, &common.namespace, "overlayfs");
        match client.version().await {
            Ok(_) => return Ok(Self { client, hold: None, address }),
            Err(error) if common.address.is_some() => return Err(error.into()),
            Err(_) => {}
        }
        let hold = private::hold(&common.state_dir.join("containerd"), &common.run_dir.join("containerd")).await?;
        let address = hold.socket();
        let client = Client::new(&address, &common.namespace, "overlayfs");
        Ok(Self { client, hold: Some(hold), address })
    }

    async fn close(self) {
        if let Some(hold) = self.hold {
            hold.release().await;
        }
    }

    /// The image records that the command line's runs share.
    fn images(&self, common: &Common) -> Result<ImageStore, CliError> {
        let places = common.places("cli");
        let images = places.images();
        make_dir(&images).map_err(|source| PlacesError::Create { path: images, source })?;
        Ok(ImageStore::open(&places, self.client.clone())?)
    }
}

impl Common {
    /// Directories of `run`, of which each has its own run directory and all share one state directory.
    fn places(&self, run: &str) -> Places {
        Places::new(self.run_dir.join(run), self.state_dir.join("cli"))
    }
}
