//! A real containerd and real registries. They are started once for all tests, and the kernel ends them when this
//! process ends.

use std::{
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{OnceLock, mpsc},
    time::{Duration, Instant},
};

use nomad_driver_shim::ids::random_hex;

/// The services that all tests share.
pub(crate) struct Services {
    /// containerd's socket.
    pub containerd: PathBuf,
    /// A registry without TLS.
    pub registry: String,
    /// A registry with TLS, signed by `ca`.
    pub tls_registry: String,
    /// The certificate of the authority that signs for `tls_registry`.
    pub ca: PathBuf,
    /// A registry that requires user `tester` with password `secret`.
    pub basic_registry: String,
    /// A registry without authentication on the storage of `basic_registry`, through which tests store images.
    pub basic_backdoor: String,
    /// The directory of all these services.
    pub root: PathBuf,
}

/// Spawns children from one thread that never ends, since the parent-death signal is tied to the spawning thread.
fn spawner() -> &'static mpsc::Sender<(Command, mpsc::Sender<Child>)> {
    static SPAWNER: OnceLock<mpsc::Sender<(Command, mpsc::Sender<Child>)>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (send, receive) = mpsc::channel::<(Command, mpsc::Sender<Child>)>();
        std::thread::spawn(move || {
            for (mut command, answer) in receive {
                // SAFETY: prctl is async-signal-safe and touches no memory of this process.
                unsafe {
                    command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
                        0 => Ok(()),
                        _ => Err(std::io::Error::last_os_error()),
                    });
                }
                answer.send(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"))).unwrap();
            }
        });
        send
    })
}

/// Starts a program that ends with this process.
pub(crate) fn spawn(command: Command) -> Child {
    let (answer, child) = mpsc::channel();
    spawner().send((command, answer)).unwrap();
    child.recv().unwrap()
}

pub(crate) fn services() -> &'static Services {
    static SERVICES: OnceLock<Services> = OnceLock::new();
    SERVICES.get_or_init(start)
}

/// Returns the directory of this process's files. Its path is short, since sockets are below it, and it is on a real
/// file system, since an overlay can't be an upper layer.
pub(crate) fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let parent = Path::new("/var/tmp/nds-test");
        fs::create_dir_all(parent).unwrap();
        // Removes the remains of an earlier run that was interrupted.
        for entry in fs::read_dir(parent).unwrap().flatten() {
            let pid = entry.file_name().to_string_lossy().to_string();
            if !Path::new("/proc").join(&pid).exists() {
                sweep(&entry.path());
            }
        }
        let root = parent.join(std::process::id().to_string());
        fs::create_dir_all(&root).unwrap();
        root
    })
}

fn sweep(path: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for line in mounts.lines().rev() {
        let point = line.split(' ').nth(4).unwrap();
        if Path::new(point).starts_with(path) {
            let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    let _ = fs::remove_dir_all(path);
}

fn start() -> Services {
    let root = root().to_owned();
    let containerd = start_containerd(&root.join("containerd"));
    let registry = start_registry(&root.join("registry"), "", "");
    let (ca, tls) = certificates(&root.join("tls"));
    let tls_registry = start_registry(&root.join("tls-registry"), &tls, "");
    let basic = root.join("basic-registry");
    fs::create_dir_all(&basic).unwrap();
    let users = run(Command::new("htpasswd").args(["-Bbn", "tester", "secret"]));
    fs::write(basic.join("users"), users).unwrap();
    let auth = format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", basic.join("users").display());
    let basic_registry = start_registry(&basic, "", &auth);
    let basic_backdoor = start_registry(&basic, "", "");
    Services { containerd, registry, tls_registry, ca, basic_registry, basic_backdoor, root }
}

/// Starts a separate containerd below `dir`. Returns its socket.
pub(crate) fn start_containerd(dir: &Path) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    let socket = dir.join("containerd.sock");
    let config = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = {socket:?}\n",
        dir.join("root"),
        dir.join("state"),
    );
    fs::write(dir.join("config.toml"), config).unwrap();
    let mut command = Command::new("containerd");
    command.arg("--config").arg(dir.join("config.toml"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(dir.join("log")).unwrap());
    let child = spawn(command);
    wait_for("containerd", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    fs::write(dir.join("pid"), child.id().to_string()).unwrap();
    socket
}

/// Starts a registry. Returns its address. `tls` and `auth` are lines of its configuration.
fn start_registry(dir: &Path, tls: &str, auth: &str) -> String {
    fs::create_dir_all(dir).unwrap();
    let address = free_address();
    let config = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n{auth}http:\n  addr: {address}\n{tls}",
        dir.join("data").display(),
    );
    let path = dir.join(format!("{}.yml", random_hex(4)));
    fs::write(&path, config).unwrap();
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(&path);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(dir.join("log")).unwrap());
    drop(spawn(command));
    wait_for("registry", || std::net::TcpStream::connect(&address).is_ok());
    address
}

/// Returns a loopback address with a free port.
pub(crate) fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Makes an authority, and a certificate for 127.0.0.1 signed by it.
fn certificates(dir: &Path) -> (PathBuf, String) {
    fs::create_dir_all(dir).unwrap();
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    fs::write(dir.join("ext"), "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n").unwrap();
    let openssl = |arguments: &[&str]| drop(run(Command::new("openssl").args(arguments)));
    let (ca, ca_key, key, csr, cert, ext) =
        (path("ca.pem"), path("ca.key"), path("key"), path("csr"), path("cert"), path("ext"));
    let new = ["-newkey", "rsa:2048", "-nodes"];
    openssl(
        &[&["req", "-x509", "-days", "2", "-subj", "/CN=test authority", "-keyout", &ca_key, "-out", &ca], &new[..]]
            .concat(),
    );
    openssl(&[&["req", "-subj", "/CN=test", "-keyout", &key, "-out", &csr], &new[..]].concat());
    openssl(&[
        "x509",
        "-req",
        "-days",
        "2",
        "-in",
        &csr,
        "-CA",
        &ca,
        "-CAkey",
        &ca_key,
        "-CAcreateserial",
        "-extfile",
        &ext,
        "-out",
        &cert,
    ]);
    (ca.into(), format!("  tls: {{certificate: {cert}, key: {key}}}\n"))
}

/// Runs a program to its end. Returns its stdout.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; run scripts/setup.sh"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Polls until `check` holds, outside of tokio's runtime.
pub(crate) fn wait_for(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + super::patience();
    while !check() {
        assert!(Instant::now() < deadline, "{what} did not come up");
        #[allow(clippy::disallowed_methods, reason = "no runtime here, and nothing else to do")]
        std::thread::sleep(Duration::from_millis(20));
    }
}
