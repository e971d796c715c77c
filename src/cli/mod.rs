//! The command line: runs containers without an agent, and shows and cleans up the driver's state.
//!
//! Data goes to stdout, messages to stderr; `--json` works for every list.

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
    containerd::{
        Client,
        private::{self, DaemonHold, PrivateError},
    },
    error_chain,
    files::create_private_dir,
    image::{ImageError, ImageStore, SharedPullError},
    places::{Places, PlacesError},
    text::{self, MESSAGE_MAX},
};

/// The exit code for errors of the command line itself, as docker's.
const CLI_ERROR_CODE: u8 = 125;

#[derive(Parser, Debug)]
#[command(
    version,
    about = "A Nomad task driver that starts containers through containerd's shims, without containerd on the start path"
)]
#[command(arg_required_else_help = false, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

/// Options of every command.
#[derive(Args, Debug, Clone)]
pub struct CommonArgs {
    /// containerd's socket; a private containerd is started if no containerd answers at the default socket
    #[arg(long, global = true, value_name = "SOCKET", env = "NOMAD_DRIVER_SHIM_ADDRESS")]
    address: Option<PathBuf>,
    /// containerd's namespace
    #[arg(long, global = true, default_value = "nomad", env = "NOMAD_DRIVER_SHIM_NAMESPACE")]
    namespace: String,
    /// The parent of the drivers' run directories
    #[arg(long, global = true, value_name = "DIR", env = "NOMAD_DRIVER_SHIM_RUN_DIR", default_value_os_t = Places::run_parent())]
    run_dir: PathBuf,
    /// The parent of the drivers' state directories
    #[arg(long, global = true, value_name = "DIR", env = "NOMAD_DRIVER_SHIM_STATE_DIR", default_value_os_t = Places::state_parent())]
    state_dir: PathBuf,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run a command in a new container the way Nomad would: through a plugin, its handshake and StartTask
    Run(Box<run::Run>),
    /// Pull an image
    Pull(pull::Pull),
    /// List images
    Images(images::Images),
    /// List the tasks of all drivers on this host
    Ps(ps::Ps),
    /// Show everything that is known about a task
    Inspect(inspect::Inspect),
    /// Print a task's output from Nomad's log files
    Logs(logs::Logs),
    /// Run a command in a task
    Exec(exec::Exec),
    /// Show the resource usage of running tasks
    Stats(stats::Stats),
    /// Send a signal to a task, or kill the whole task
    Kill(kill::Kill),
    /// Print what happens to tasks, as it happens
    Events(events::Events),
    /// Remove images
    Rmi(gc::Rmi),
    /// Remove what is no longer needed: remains of tasks, unused images
    Gc(gc::Gc),
    /// Measure what a task costs: this driver, other plugins, containerd, runc, crun, the bare kernel
    Bench(Box<bench::Bench>),
    /// Show what this host supports, what is missing, and how to fix it
    Doctor(doctor::Doctor),
    /// Check agent and job files before they are submitted to Nomad
    Config(config::Config),
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The private containerd failed.
    #[error(transparent)]
    Private(#[from] PrivateError),
    /// An image can't be pulled.
    #[error("{}", text::sanitize(&error_chain(&**.0), MESSAGE_MAX))]
    Image(SharedPullError),
    /// The image store failed.
    #[error(transparent)]
    Records(#[from] ImageError),
    /// An image's name is not valid.
    #[error(transparent)]
    Reference(#[from] crate::image::ReferenceError),
    /// containerd failed.
    #[error(transparent)]
    Containerd(#[from] crate::containerd::ContainerdError),
    /// The host's side of the plugin protocol failed.
    #[error(transparent)]
    Host(#[from] crate::host::HostError),
    /// An operation on a task failed.
    #[error(transparent)]
    Task(#[from] crate::task::TaskError),
    /// A process can't be run in a task.
    #[error(transparent)]
    Exec(#[from] crate::task::ExecError),
    /// A live plugin refused a request, or could not be reached.
    #[error(transparent)]
    Control(#[from] crate::control::ControlError),
    /// The command line's own directories can't be created.
    #[error(transparent)]
    Places(#[from] PlacesError),
    /// A benchmark failed.
    #[error(transparent)]
    Bench(#[from] crate::bench::BenchError),
    /// The user pressed Ctrl-C before the task was running.
    #[error("interrupted")]
    Interrupted,
    /// An option or argument can't be used.
    #[error("{0}")]
    Usage(String),
    /// A directory or a file of the driver can't be read.
    #[error("could not read {path}")]
    Unreadable {
        /// The directory or file.
        path: PathBuf,
        /// Why it can't be read.
        source: std::io::Error,
    },
    /// Output can't be written, or a file can't be read or written.
    #[error("could not read or write a file or stream")]
    Io(#[from] std::io::Error),
}

impl CliError {
    /// Returns the exit code by docker's convention: 127 for a command that does not exist, 126 for one that can't be
    /// executed, 125 for everything else.
    fn code(&self) -> u8 {
        match self {
            Self::Host(crate::host::HostError::Call { call: "StartTask", status }) => {
                run::start_failure_code(status.message())
            }
            Self::Exec(error) => error.exit_code().and_then(|code| u8::try_from(code).ok()).unwrap_or(CLI_ERROR_CODE),
            _ => CLI_ERROR_CODE,
        }
    }
}

/// Runs the command line.
pub async fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { CLI_ERROR_CODE } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let Some(command) = cli.command else {
        print_introduction();
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
            print_message(&format!("nomad-driver-shim: {}", error_chain(&error)));
            ExitCode::from(error.code())
        },
        ExitCode::from,
    )
}

/// Explains the program to a user who starts the plugin by hand.
fn print_introduction() {
    print_message(
        "nomad-driver-shim is a task driver plugin for HashiCorp Nomad.\n\n\
         Nomad starts it by itself: put this program (or a link to it) into the agent's plugin_dir, and name it in the\n\
         agent's configuration:\n\n  plugin \"nomad-driver-shim\" {\n    config {\n    }\n  }\n\n\
         A job then says driver = \"shim\". The name is the file's, without a leading \"nomad-driver-\"; linked as\n\
         containerd-driver it replaces nomad-driver-containerd.\n\n\
         Without an agent: nomad-driver-shim run IMAGE [COMMAND...], and nomad-driver-shim --help for more.",
    );
}

/// Writes log lines to stderr, and only errors, because further lines would distract from the command's own output.
/// `NOMAD_DRIVER_SHIM_LOG` sets another filter.
fn log_to_stderr() {
    use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};
    let filter = EnvFilter::try_from_env("NOMAD_DRIVER_SHIM_LOG").unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::registry().with(crate::plugin::Hclog.with_filter(filter)).init();
}

/// Prints a message to stderr.
fn print_message(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Prints data to stdout.
fn print_data(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Returns whether progress bars may be drawn.
fn is_interactive() -> bool {
    std::io::stderr().is_terminal()
}

/// Parses an image's name as a user typed it; the path of an image file becomes absolute.
fn parse_image(text: &str) -> Result<crate::image::Reference, CliError> {
    use crate::image::{Archive, Reference};
    Ok(match Reference::parse(text)? {
        Reference::Archive(archive) => {
            let path = std::path::absolute(&archive.path)?;
            Reference::Archive(Archive { path, ..archive })
        }
        registry @ Reference::Registry(_) => registry,
    })
}

/// The containerd that a command uses: the one at `--address`, else the system's if it answers, else a private one.
struct ContainerdSession {
    client: Client,
    hold: Option<DaemonHold>,
    address: PathBuf,
}

impl ContainerdSession {
    async fn open(common: &CommonArgs) -> Result<Self, CliError> {
        let system = PathBuf::from("/run/containerd/containerd.sock");
        let address = common.address.clone().unwrap_or_else(|| system.clone());
        let client = Client::new(&address, &common.namespace, "overlayfs");
        match client.version().await {
            Ok(_) => return Ok(Self { client, hold: None, address }),
            Err(error) if common.address.is_some() => return Err(error.into()),
            Err(_) => {}
        }
        let hold = private::acquire(&common.state_dir.join("containerd"), &common.run_dir.join("containerd")).await?;
        let address = hold.socket();
        let client = Client::new(&address, &common.namespace, "overlayfs");
        Ok(Self { client, hold: Some(hold), address })
    }

    async fn close(self) {
        if let Some(hold) = self.hold {
            hold.release().await;
        }
    }

    /// Opens the image records that all `run`s share.
    fn images(&self, common: &CommonArgs) -> Result<ImageStore, CliError> {
        let places = common.places("cli");
        let images = places.images();
        create_private_dir(&images).map_err(|source| PlacesError::Create { path: images, source })?;
        Ok(ImageStore::open(&places, self.client.clone())?)
    }
}

impl CommonArgs {
    /// Returns the directories of a `run`: each has a run directory of its own, and all share one state directory.
    fn places(&self, run: &str) -> Places {
        Places::new(self.run_dir.join(run), self.state_dir.join("cli"))
    }
}
