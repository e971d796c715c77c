//! A real dockerd that the suite compares with: it runs in network and mount namespaces of its own, which play its host,
//! and has its own directories, cgroups and containerd. It ends with this process.
//!
//! [`docker`] starts it once for all tests. [`Docker::load`] gives it an image, [`Docker::run`] runs a container to its
//! end, and [`Docker::start`] one that the test executes commands in, stops and removes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, OnceLock},
};

use nomad_driver_shim::ids::random_hex;
use serde_json::json;

use crate::support::{
    Image, eventually, patience,
    services::{root, run, spawn, wait_for},
};

/// The directory that scripts/setup.sh unpacks docker's packages into.
const UNPACKED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/docker");

/// A dockerd.
pub(crate) struct Docker {
    dir: PathBuf,
    /// The process that has made the namespaces, and that cleans up when it is told to end.
    keeper: Mutex<Option<Child>>,
    /// The search path of docker's programs.
    path: String,
    /// The version of dockerd.
    pub(crate) version: Version,
}

/// A version of docker: major, minor and patch number.
pub(crate) type Version = (u32, u32, u32);

/// What a program in a container has written, and its exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A container that runs. It is removed when this value is dropped.
pub(crate) struct Container<'a> {
    docker: &'a Docker,
    /// The container's id.
    pub id: String,
}

static DOCKER: OnceLock<Docker> = OnceLock::new();

/// Returns the dockerd of this process, which the first call starts.
pub(crate) fn docker() -> &'static Docker {
    DOCKER.get_or_init(Docker::launch)
}

/// Ends the dockerd of this process, if a test has started it, and waits until nothing is left of it.
pub(crate) fn end() {
    if let Some(docker) = DOCKER.get() {
        docker.end();
    }
}

impl Docker {
    fn launch() -> Self {
        let dir = root().join("docker");
        fs::create_dir_all(&dir).unwrap();
        let unpacked = ["usr/sbin", "usr/bin"].map(|below| format!("{UNPACKED}/{below}"));
        let path = format!("{}:{}", unpacked.join(":"), std::env::var("PATH").unwrap());
        let text = run(Command::new("dockerd").arg("--version").env("PATH", &path));
        let version = version(&text).unwrap_or_else(|| panic!("no version in {text:?}"));
        // Signals that this process ignores would be ignored in containers as well. On docker's host there are none.
        let mut command = nomad_driver_shim::process::command("unshare");
        command.args(["--net", "--mount", "--propagation", "private"]);
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/compat/dockerd.sh"));
        command.arg(&dir).arg(format!("nds-compat-{}", std::process::id())).env("PATH", &path);
        command.stdin(Stdio::null());
        let keeper = Mutex::new(Some(spawn(command)));
        let this = Self { dir, keeper, path, version };
        this.wait_until_it_answers();
        this
    }

    fn wait_until_it_answers(&self) {
        wait_for("dockerd", || {
            let ended = self.keeper.lock().unwrap().as_mut().and_then(|keeper| keeper.try_wait().unwrap());
            let log = || fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            assert!(ended.is_none(), "dockerd ended ({ended:?}): {}", log());
            self.command(&["version"]).output().unwrap().status.success()
        });
    }

    fn end(&self) {
        let Some(mut keeper) = self.keeper.lock().unwrap().take() else { return };
        let pid = nix::unistd::Pid::from_raw(keeper.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let status = keeper.wait().unwrap();
        assert!(status.success(), "the end of dockerd: {status}");
        assert!(!self.dir.exists(), "{} is left of dockerd", self.dir.display());
    }

    /// Returns docker's command line with these arguments.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.args(arguments).env("PATH", &self.path).env_remove("DOCKER_CONTEXT");
        command.env("DOCKER_HOST", format!("unix://{}", self.dir.join("docker.sock").display()));
        command.env("DOCKER_CONFIG", self.dir.join("config")).stdin(Stdio::null());
        command
    }

    /// Runs docker's command line to its end.
    async fn call(&self, arguments: &[&str]) -> Outcome {
        let mut command = tokio::process::Command::from(self.command(arguments));
        let output = tokio::time::timeout(patience(), command.kill_on_drop(true).output()).await;
        Outcome::of(&output.unwrap_or_else(|_| panic!("docker {arguments:?} hangs")).unwrap())
    }

    /// As [`Self::call`], and panics if the command fails.
    async fn called(&self, arguments: &[&str]) -> String {
        let outcome = self.call(arguments).await;
        assert_eq!(outcome.code, 0, "docker {arguments:?}: {}", outcome.stderr);
        outcome.stdout
    }

    /// Gives dockerd an image, and returns the name that containers of it are started by.
    pub(crate) async fn load(&self, image: &Image, name: &str) -> String {
        let name = format!("compat/{name}:1");
        let path = self.dir.join(format!("{}.tar", random_hex(4)));
        fs::write(&path, archive(image, &name)).unwrap();
        self.load_archive(&path).await;
        fs::remove_file(&path).unwrap();
        name
    }

    /// Gives dockerd the images of an archive that was made as `docker save` does.
    pub(crate) async fn load_archive(&self, path: &Path) {
        self.called(&["load", "--input", path.to_str().unwrap()]).await;
    }

    /// Runs a container to its end and removes it. `options` are those of `docker run`.
    pub(crate) async fn run(&self, image: &str, options: &[&str], command: &[&str]) -> Outcome {
        self.call(&[&["run", "--rm"], options, &[image], command].concat()).await
    }

    /// Starts a container. `options` are those of `docker run`.
    pub(crate) async fn start(&self, image: &str, options: &[&str], command: &[&str]) -> Container<'_> {
        let id = self.called(&[&["run", "--detach"], options, &[image], command].concat()).await;
        Container { docker: self, id: id.trim().to_owned() }
    }

    /// Returns the process whose namespaces are those of docker's host.
    pub(crate) fn host_process(&self) -> u32 {
        self.keeper.lock().unwrap().as_ref().expect("dockerd runs").id()
    }

    /// A directory that is a shared mount on docker's host.
    pub(crate) fn shared_dir(&self) -> PathBuf {
        self.dir.join("shared")
    }

    /// The directory of dockerd, for files that containers mount.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Container<'_> {
    /// Executes a command in the container. `options` are those of `docker exec`.
    pub(crate) async fn exec(&self, options: &[&str], command: &[&str]) -> Outcome {
        self.docker.call(&[&["exec"], options, &[&self.id], command].concat()).await
    }

    /// Returns what the container has written so far.
    pub(crate) async fn logs(&self) -> Outcome {
        self.docker.call(&["logs", &self.id]).await
    }

    /// Waits until the container has written `text` to its standard output or error.
    pub(crate) async fn says(&self, text: &str) {
        eventually(&format!("docker's container says {text:?}"), async || {
            let logs = self.logs().await;
            if logs.stdout.contains(text) || logs.stderr.contains(text) { Ok(()) } else { Err(logs) }
        })
        .await;
    }

    /// Sends the image's stop signal, and SIGKILL after `seconds`. Returns the exit code and the whole output.
    pub(crate) async fn stop(&self, seconds: u32) -> Outcome {
        self.docker.called(&["stop", "--time", &seconds.to_string(), &self.id]).await;
        self.wait().await
    }

    /// Waits for the container's end. Returns the exit code and the whole output.
    pub(crate) async fn wait(&self) -> Outcome {
        let code = self.docker.called(&["wait", &self.id]).await;
        Outcome { code: code.trim().parse().unwrap(), ..self.logs().await }
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let removed = self.docker.command(&["rm", "--force", "--volumes", &self.id]).output();
        if !removed.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("could not remove docker's container {}: {removed:?}", self.id);
        }
    }
}

impl Outcome {
    fn of(output: &Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Packs an image as `docker save` does.
fn archive(image: &Image, name: &str) -> Vec<u8> {
    let mut files = vec![("config.json".to_owned(), image.config_bytes())];
    let layers = image.layers.iter().enumerate();
    files.extend(layers.map(|(number, layer)| (format!("{number}.tar"), layer.bytes.clone())));
    let names: Vec<&str> = files[1..].iter().map(|(name, _)| name.as_str()).collect();
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": names}]);
    let manifest = ("manifest.json".to_owned(), manifest.to_string().into_bytes());
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in files.iter().chain([&manifest]) {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, &content[..]).unwrap();
    }
    archive.into_inner().unwrap()
}

/// Finds the version in `Docker version 20.10.24+dfsg1, build 5d6db84`.
fn version(text: &str) -> Option<Version> {
    let word = text.split_whitespace().find(|word| word.starts_with(|first: char| first.is_ascii_digit()))?;
    let mut numbers = word.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
}
