//! Puts the sources of a task's mounts below the bundle's `mounts/`, from where the runtime takes them.
//!
//! `mounts` is a small file system in memory of its own: the task's own files (hosts, resolv.conf) lie in it, so that a task
//! that writes to them can't fill a directory of the host, and one unmount takes all of it away.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, openat},
    mount::{MsFlags, mount},
    sys::stat::{Mode, SFlag, mkdirat},
};
use oci_spec::runtime::{Mount, MountBuilder};

use super::{
    RootfsError,
    arrangement::{Place, Placed, arrange},
    bundle::BundlePaths,
    image_links::{self, Wanted, kind_of},
    mount_attributes::{Attributes, Depth},
    mounts::{MountContent, Source, TaskMount, open_path, open_plain},
    pins::{Pins, PreparedPins},
    target::{MountTarget, SysTargets},
};

/// Options that say how mounts spread between mount namespaces (mount_namespaces(7)).
const PROPAGATION: [&str; 6] = ["private", "rprivate", "slave", "rslave", "shared", "rshared"];
/// Options of file systems in memory that are the default, or the opposite of an attribute.
const WITHOUT_EFFECT: [&str; 9] =
    ["rw", "suid", "dev", "exec", "relatime", "norelatime", "atime", "diratime", "strictatime"];
/// Places of every container, where runtimes mount or make files.
const DIRECTORIES: [&str; 4] = ["dev", "proc", "sys", "etc"];

/// Who mounts what lies below another bind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nesting {
    /// We do, into the tree that the runtime takes as a whole.
    InTheTree,
    /// The runtime does, by itself: a gVisor sandbox has mounts of its own kernel, by which alone its tasks see a mount point,
    /// and finds targets inside of the sandbox only. That no link is on the way is still seen to.
    ByTheRuntime,
}

/// Makes the places of `base` and of the task's mounts in the root file system free of links, puts the sources of all
/// mounts below the bundle's `mounts/`, and each mount that lies below a bind into that one's tree: the mounts that are
/// left to the runtime, after those of `base`, and the file system that the sources are in.
///
/// # Errors
/// When a mount can't go where it should, named by its option and target. What was mounted goes with the bundle.
pub fn place(
    paths: &BundlePaths,
    base: &[Mount],
    mounts: &[TaskMount],
    (sys, nesting): (SysTargets, Nesting),
    prepared: Option<PreparedPins>,
) -> Result<(Vec<Mount>, Pins), RootfsError> {
    let base: Vec<PathBuf> = base.iter().map(|mount| mount.destination().clone()).collect();
    let pins = attach_pins(paths, mounts, prepared)?;
    let root = paths.rootfs();
    let root = image_links::open_root(&root).map_err(|source| file("open", &root, source))?;
    let is_base = |path: &Path| base.iter().any(|base| base == path);
    for directory in DIRECTORIES {
        let path = Path::new(directory);
        // Nothing is written to /etc but what is mounted there, and for that the link is resolved. docker puts an empty
        // directory over it, and the image's own files would be gone.
        if directory != "etc" || !image_links::leads_to_directory(root.as_fd(), Path::new("/etc"), is_base) {
            make_plain(root.as_fd(), path, Wanted::Directory)?;
        }
    }
    let targets = resolve_targets(root.as_fd(), &base, mounts, sys)?;
    let placed = arrange(mounts, &targets).map_err(|misplaced| mounts[misplaced.number].refused(misplaced.problem))?;
    let tree = Tree { paths, placed: &placed, mounts, nesting };
    let mut left = Vec::with_capacity(placed.len());
    for one in &placed {
        tree.put(one).map_err(|source| {
            let mount = tree.mount(one);
            RootfsError::Mounting { option: mount.option, target: mount.target.to_string(), source }
        })?;
        if one.place == Place::Runtime || nesting == Nesting::ByTheRuntime {
            left.push(tree.for_runtime(one)?);
        }
    }
    Ok((left, pins))
}

/// Refuses targets at which a mount would take away what confines the task.
///
/// # Errors
/// Why the mount may not go there, with its option and target.
pub fn check(mount: &TaskMount, target: &MountTarget, sys: SysTargets) -> Result<(), RootfsError> {
    target.check(sys).map_err(|problem| mount.refused(problem))?;
    // runc masks parts of /proc and /sys by the container's own /dev/null (CVE-2025-31133). Nomad gives the host's /dev to
    // CSI plugins.
    let covers_null = ["/dev", "/dev/null"].into_iter().find(|path| target.path() == Path::new(path));
    let is_the_hosts = |path: &str| matches!(&mount.content, MountContent::Bind(source) if source.is_the_hosts(path));
    match covers_null.filter(|path| sys == SysTargets::Refused && !is_the_hosts(path)) {
        None => Ok(()),
        Some(path) => Err(mount.refused(format!(
            "{path} can be covered in privileged tasks only, except by the host's own {path}; mount below /dev, or elsewhere"
        ))),
    }
}

/// How far the root of the container's mounts must spread for its mounts to do so: runtimes set it before they bind, and
/// a bind below a private root has no peers any more (mount_namespaces(7)). docker's rule.
pub fn root_propagation(mounts: &[TaskMount]) -> Option<&'static str> {
    let has = |wanted: [&str; 2]| {
        mounts.iter().flat_map(|mount| &mount.options).any(|option| wanted.contains(&option.as_str()))
    };
    match (has(["rshared", "shared"]), has(["rslave", "slave"])) {
        (true, _) => Some("rshared"),
        (false, true) => Some("rslave"),
        (false, false) => None,
    }
}

/// Mounts the file system in which everything is pinned.
fn attach_pins(paths: &BundlePaths, mounts: &[TaskMount], prepared: Option<PreparedPins>) -> Result<Pins, RootfsError> {
    let length = |mount: &TaskMount| if let MountContent::File(text) = &mount.content { text.len() } else { 0 };
    let pins = paths.pins();
    Pins::attach(&pins, mounts.iter().map(length).sum(), prepared)
        .map_err(|source| file("mount a file system at", &pins, source))
}

fn make_plain(root: BorrowedFd<'_>, path: &Path, wanted: Wanted) -> Result<(), RootfsError> {
    image_links::make_plain(root, path, wanted).map_err(|source| RootfsError::Image { path: path.to_owned(), source })
}

/// Where the mounts' targets lead in the image, the outermost first, since what lies below one of them is not the image's.
fn resolve_targets(
    root: BorrowedFd<'_>,
    base: &[PathBuf],
    mounts: &[TaskMount],
    sys: SysTargets,
) -> Result<Vec<MountTarget>, RootfsError> {
    let mut targets: Vec<MountTarget> = mounts.iter().map(|mount| mount.target.clone()).collect();
    let mut order: Vec<usize> = (0..mounts.len()).collect();
    order.sort_by_key(|number| targets[*number].depth());
    for (at, number) in order.iter().copied().enumerate() {
        let mount = &mounts[number];
        let known: Vec<&Path> = order[..at].iter().map(|other| targets[*other].path()).collect();
        let is_mount = |path: &Path| base.iter().any(|base| base == path) || known.contains(&path);
        let resolve = |path: &Path| image_links::resolve(root, path, is_mount).map_err(|error| mount.unresolved(error));
        let target = mount.target.path();
        let found = match (&mount.content, target.parent(), target.file_name()) {
            // A file that every container has: docker puts its own in the place of whatever the image has there.
            (MountContent::File(_), Some(parent), Some(name)) if !target.ancestors().any(is_mount) => {
                let found = resolve(parent)?.join(name);
                make_plain(root, found.strip_prefix("/").unwrap_or(&found), Wanted::File)?;
                found
            }
            _ => resolve(target)?,
        };
        let found = MountTarget::found(found);
        check(mount, &found, sys)?;
        targets[number] = found;
    }
    Ok(targets)
}

/// What the mounts of a task are put with.
struct Tree<'a> {
    paths: &'a BundlePaths,
    placed: &'a [Placed],
    mounts: &'a [TaskMount],
    nesting: Nesting,
}

impl Tree<'_> {
    fn mount(&self, placed: &Placed) -> &TaskMount {
        &self.mounts[placed.number]
    }

    /// Do other mounts lie in this one's tree?
    fn holds_others(&self, placed: &Placed) -> bool {
        self.nesting == Nesting::InTheTree
            && self
                .placed
                .iter()
                .any(|other| matches!(&other.place, Place::Within { top, .. } if *top == placed.number))
    }

    /// Pins a mount's source, and moves it to its target where that lies in another's tree.
    fn put(&self, placed: &Placed) -> io::Result<()> {
        let mount = self.mount(placed);
        let pin = self.paths.pinned(placed.number);
        let is_inside = placed.place != Place::Runtime && self.nesting == Nesting::InTheTree;
        match &mount.content {
            MountContent::FileSystem { .. } if !is_inside => {}
            MountContent::FileSystem { .. } => {
                fs::DirBuilder::new().mode(0o700).create(&pin)?;
                mount_in_memory(&pin, &mount.options)?;
            }
            MountContent::File(text) => {
                fs::write(&pin, text)?;
                // Less what the process's mask took away.
                fs::set_permissions(&pin, fs::Permissions::from_mode(0o644))?;
            }
            MountContent::Bind(source) => self.bind(placed, source, &pin, is_inside)?,
        }
        let is_bind = |number: usize| matches!(self.mounts[number].content, MountContent::Bind(_));
        match &placed.place {
            Place::Within { top, path, .. } if is_inside => {
                let point = open_mount_point(&self.paths.pinned(*top), path, self.kind(placed))?;
                let point = PathBuf::from(format!("/proc/self/fd/{}", point.as_raw_fd()));
                let flags = match mount.content {
                    MountContent::File(_) => MsFlags::MS_BIND,
                    MountContent::Bind(_) | MountContent::FileSystem { .. } => MsFlags::MS_MOVE,
                };
                Ok(nix::mount::mount(Some(&pin), &point, None::<&str>, flags, None::<&str>)?)
            }
            // The runtime mounts it later; that no link is on the way is seen to now.
            Place::Within { holder, below, .. } if is_bind(*holder) => {
                open_mount_point(&self.paths.pinned(*holder), below, self.kind(placed)).map(drop)
            }
            Place::Within { .. } | Place::Runtime => Ok(()),
        }
    }

    /// What a mount's place has to be.
    fn kind(&self, placed: &Placed) -> SFlag {
        if is_directory(self.mount(placed)) { SFlag::S_IFDIR } else { SFlag::S_IFREG }
    }

    fn bind(&self, placed: &Placed, source: &Source, pin: &Path, is_inside: bool) -> io::Result<()> {
        let options = &self.mount(placed).options;
        let has = |wanted: &str| options.iter().any(|option| option == wanted);
        if source.is_directory() {
            fs::DirBuilder::new().mode(0o700).create(pin)?;
        } else {
            fs::File::options().write(true).create_new(true).mode(0o600).open(pin)?;
        }
        let (recursion, depth) =
            if has("rbind") { (MsFlags::MS_REC, Depth::Tree) } else { (MsFlags::empty(), Depth::Top) };
        mount(Some(&source.by_descriptor()), pin, None::<&str>, MsFlags::MS_BIND | recursion, None::<&str>)?;
        // Before the source may become read-only: mount points that it lacks are made in it, as crun makes them.
        for other in self.placed {
            if let Place::Within { holder, below, .. } = &other.place
                && *holder == placed.number
            {
                // What can't be made is refused under its own name, when that mount is put in its place.
                if let Err(error) = open_mount_point(pin, below, self.kind(other)) {
                    tracing::debug!(target = %other.target, %error, "a mount point can't be made");
                }
            }
        }
        if has("ro") {
            // Runtimes would make the topmost mount read-only, and leave those below it writable.
            Attributes::read_only().set(pin, depth)?;
        }
        if is_inside || self.holds_others(placed) {
            // Now, and not by the runtime: a mount that is put into a shared one would appear on the host as well.
            mount(None::<&str>, pin, None::<&str>, propagation(options) | MsFlags::MS_REC, None::<&str>)?;
        }
        let attributes = Attributes::of_options(options);
        if is_inside && !attributes.is_empty() {
            attributes.set(pin, Depth::Top)?;
        }
        Ok(())
    }

    /// A mount as the runtime takes it.
    fn for_runtime(&self, placed: &Placed) -> Result<Mount, RootfsError> {
        let mount = self.mount(placed);
        let mut options = mount.options.clone();
        let (kind, source) = match &mount.content {
            MountContent::FileSystem { kind, source } => (kind.as_str(), PathBuf::from(source)),
            MountContent::Bind(_) | MountContent::File(_) => ("bind", self.paths.pinned(placed.number)),
        };
        if self.holds_others(placed) {
            // The tree as it is: how its mounts spread has been set for each.
            options.retain(|option| option != "bind" && option != "rbind" && !PROPAGATION.contains(&option.as_str()));
            options.insert(0, "rbind".to_owned());
        }
        let built = MountBuilder::default().destination(placed.target.path()).typ(kind).source(source).options(options);
        Ok(built.build()?)
    }
}

fn is_directory(mount: &TaskMount) -> bool {
    match &mount.content {
        MountContent::File(_) => false,
        MountContent::FileSystem { .. } => true,
        MountContent::Bind(source) => source.is_directory(),
    }
}

/// Returns the propagation that the options name. Without one it is slave, as in runtimes: mounts that the host makes below
/// the source later reach the task.
fn propagation(options: &[String]) -> MsFlags {
    match options.iter().rev().map(String::as_str).find(|option| PROPAGATION.contains(option)) {
        Some("private" | "rprivate") => MsFlags::MS_PRIVATE,
        Some("shared" | "rshared") => MsFlags::MS_SHARED,
        _ => MsFlags::MS_SLAVE,
    }
}

/// Mounts a file system in memory with a job's options.
fn mount_in_memory(at: &Path, options: &[String]) -> io::Result<()> {
    let attributes = |option: &&String| !Attributes::of_options(std::slice::from_ref(*option)).is_empty();
    let is_data = |option: &&String| {
        let name = option.as_str();
        !attributes(option) && !WITHOUT_EFFECT.contains(&name) && !PROPAGATION.contains(&name)
    };
    let data: Vec<&str> = options.iter().filter(is_data).map(String::as_str).collect();
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(data.join(",").as_str()))?;
    mount(None::<&str>, at, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    let attributes = Attributes::of_options(options);
    if attributes.is_empty() { Ok(()) } else { attributes.set(at, Depth::Top) }
}

/// Opens the place of a mount in the tree at `top`, and makes it where it is missing, without ever following a link.
fn open_mount_point(top: &Path, path: &Path, wanted: SFlag) -> io::Result<OwnedFd> {
    let top = open_path(top)?;
    let opened = match open_plain(&top, path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => make_mount_point(top, path, wanted)?,
        other => other?,
    };
    match kind_of(&opened)? == SFlag::S_IFDIR {
        is_directory if is_directory == (wanted == SFlag::S_IFDIR) => Ok(opened),
        true => Err(io::Error::new(io::ErrorKind::IsADirectory, "the target is a directory, but the source is a file")),
        false => {
            Err(io::Error::new(io::ErrorKind::NotADirectory, "the target is not a directory, but the source is one"))
        }
    }
}

fn make_mount_point(top: OwnedFd, path: &Path, wanted: SFlag) -> io::Result<OwnedFd> {
    let mut at = top;
    let mut names = path.components().peekable();
    while let Some(name) = names.next() {
        let name = Path::new(name.as_os_str());
        if names.peek().is_none() && wanted == SFlag::S_IFREG {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
            match openat(&at, name, flags, Mode::from_bits_truncate(0o644)) {
                Ok(_) | Err(nix::Error::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
        } else {
            match mkdirat(&at, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(nix::Error::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        at = open_plain(&at, name)?;
    }
    Ok(at)
}

fn file(doing: &'static str, path: &Path, source: io::Error) -> RootfsError {
    RootfsError::File { doing, path: path.to_owned(), source }
}
