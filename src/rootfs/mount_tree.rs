//! Pins the sources of a task's mounts below the bundle's `mounts/`, from where the runtime mounts them.
//!
//! `mounts` is a small file system in memory of its own. The task's own files (hosts, resolv.conf) lie in it, so a task
//! that writes to them can't fill a directory of the host. One unmount removes everything in it.

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
    arrangement::{Misplaced, PlacedMount, Placement, arrange},
    bundle::BundlePaths,
    copy_tree::copy_tree,
    image_links::{self, EntryKind, kind_of},
    mount_attributes::{Attributes, Depth},
    mounts::{MountContent, MountSource, TaskMount, open_path, open_without_links, try_open_without_links},
    pins::{Pins, PreparedPins},
    same_target::SameTarget,
    selinux,
    target::{MountTarget, SysTargets},
};

/// Options that set how mounts propagate between mount namespaces (mount_namespaces(7)).
const PROPAGATION_OPTIONS: [&str; 6] = ["private", "rprivate", "slave", "rslave", "shared", "rshared"];
/// Options of file systems in memory that need no action: they are the default, or the opposite of an attribute.
const NO_OP_TMPFS_OPTIONS: [&str; 9] =
    ["rw", "suid", "dev", "exec", "relatime", "norelatime", "atime", "diratime", "strictatime"];
/// Directories of every container in which runtimes mount file systems or create files.
const DIRECTORIES: [&str; 4] = ["dev", "proc", "sys", "etc"];

/// Whether the driver or the runtime mounts a mount whose target lies below another bind mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nesting {
    /// The driver mounts it, into the tree that the runtime takes as a whole.
    ByDriver,
    /// The runtime mounts it, as it mounts all others. A gVisor sandbox needs this: only the mounts of its own kernel
    /// are mount points for its tasks, and it looks up targets only inside of the sandbox. The driver still makes sure
    /// that no link is on the way.
    ByRuntime,
}

/// The rules by which a task's mounts are placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacementRules {
    /// Whether mounts may cover parts of /sys.
    pub sys: SysTargets,
    /// Who mounts what lies below another bind mount.
    pub nesting: Nesting,
    /// What happens to several mounts with one target.
    pub same_target: SameTarget,
    /// The SELinux label of the files and file systems that the driver makes for the task.
    pub label: Option<String>,
}

/// Prepares the mounts of a task. It removes links at the targets of `base` and of the task's mounts in the root file
/// system, and pins the sources of all mounts below the bundle's `mounts/`. It puts each mount that lies below a bind
/// mount into that bind mount's tree. It leaves out a volume of the image (VOLUME) that a link of the image leads to
/// where the task may have no mount. Returns the mounts that the runtime must make, to follow those of `base`, and the
/// file system in which the sources are pinned.
///
/// # Errors
/// Fails when a mount can't be put at its target; the error names its option and target. What has been mounted by then
/// is removed with the bundle.
pub fn place_mounts(
    paths: &BundlePaths,
    base: &[Mount],
    mounts: &[TaskMount],
    rules: &PlacementRules,
    prepared: Option<PreparedPins>,
) -> Result<(Vec<Mount>, Pins), RootfsError> {
    let PlacementRules { sys, nesting, same_target, ref label } = *rules;
    let base: Vec<PathBuf> = base.iter().map(|mount| mount.destination().clone()).collect();
    let pins = attach_pins(paths, mounts, prepared)?;
    let root = paths.rootfs();
    let root = image_links::open_root(&root).map_err(|source| file("open", &root, source))?;
    let is_base = |path: &Path| base.iter().any(|base| base == path);
    for directory in DIRECTORIES {
        let path = Path::new(directory);
        // /etc may be a link to a directory: nothing is written there, and the targets of mounts in it are resolved.
        // Docker replaces such a link by an empty directory, which would hide the image's own files.
        if directory != "etc" || !image_links::leads_to_directory(root.as_fd(), Path::new("/etc"), is_base) {
            ensure_plain(root.as_fd(), path, EntryKind::Directory)?;
        }
    }
    let mut mounts = mounts.to_vec();
    let mut targets = resolve_targets(root.as_fd(), &base, &mounts)?;
    let placed = loop {
        match check_targets(&mounts, &targets, sys).and_then(|()| arrange(&mounts, &targets, same_target)) {
            Err(Misplaced { number, problem }) if matches!(mounts[number].content, MountContent::Volume) => {
                let volume = mounts.remove(number);
                let (target, leads_to) = (&volume.target, targets.remove(number));
                tracing::info!(%target, %leads_to, problem, "left out a VOLUME of the image");
            }
            Err(Misplaced { number, problem }) => return Err(mounts[number].target_error(problem)),
            Ok(placed) => break placed,
        }
    };
    let tree = MountTree { paths, placed: &placed, mounts: &mounts, nesting, label: label.as_deref() };
    let mut left = Vec::with_capacity(placed.len());
    for one in &placed {
        tree.pin_and_place(one).map_err(|source| {
            let mount = tree.mount(one);
            RootfsError::MountAtTarget { origin: mount.origin.clone(), target: mount.target.to_string(), source }
        })?;
        if one.place == Placement::ByRuntime || nesting == Nesting::ByRuntime {
            left.push(tree.for_runtime(one)?);
        }
    }
    Ok((left, pins))
}

/// Refuses targets at which a mount would remove a part of the task's confinement.
///
/// # Errors
/// Returns the reason why the mount may not be there, with its option and target.
pub fn check_target(mount: &TaskMount, target: &MountTarget, sys: SysTargets) -> Result<(), RootfsError> {
    target_problem(mount, target, sys).map_or(Ok(()), |problem| Err(mount.target_error(problem)))
}

/// Applies the rules of [`check_target`] to the resolved targets of all mounts.
fn check_targets(mounts: &[TaskMount], targets: &[MountTarget], sys: SysTargets) -> Result<(), Misplaced> {
    let mut pairs = mounts.iter().zip(targets).enumerate();
    let misplaced = pairs.find_map(|(number, (mount, target))| {
        target_problem(mount, target, sys).map(|problem| Misplaced { number, problem })
    });
    misplaced.map_or(Ok(()), Err)
}

/// Returns why a mount may not be at a target; `None` if it may be there.
fn target_problem(mount: &TaskMount, target: &MountTarget, sys: SysTargets) -> Option<String> {
    if let Err(problem) = target.check(sys) {
        return Some(problem);
    }
    // runc masks parts of /proc and /sys with the container's own /dev/null (CVE-2025-31133), so nothing else may be
    // there. The host's own /dev is allowed: Nomad mounts it in CSI plugins.
    let covers_null = ["/dev", "/dev/null"].into_iter().find(|path| target.path() == Path::new(path));
    let is_the_hosts = |path: &str| matches!(&mount.content, MountContent::Bind(source) if source.is_host_path(path));
    covers_null.filter(|path| sys == SysTargets::Refused && !is_the_hosts(path)).map(|path| {
        format!(
            "only privileged tasks may mount over {path}, except for the host's own {path}; mount below /dev, or elsewhere"
        )
    })
}

/// Returns the propagation that the root of the container's mounts must have for its mounts to propagate; `None` leaves
/// it to the runtime. Runtimes set it before they make bind mounts, and a bind mount below a private root loses its
/// peers (mount_namespaces(7)). Docker has the same rule.
pub fn root_propagation(mounts: &[TaskMount]) -> Option<&'static str> {
    let has = |wanted: [&str; 2]| {
        mounts.iter().flat_map(|mount| &mount.options).any(|option| wanted.contains(&option.as_str()))
    };
    match (has(["rshared", "shared"]), has(["rslave", "slave"])) {
        // Not "rshared": only the root itself is shared, and not the container's /proc, /sys and /dev.
        (true, _) => Some("shared"),
        (false, true) => Some("rslave"),
        (false, false) => None,
    }
}

/// Mounts the file system in which the sources are pinned.
fn attach_pins(paths: &BundlePaths, mounts: &[TaskMount], prepared: Option<PreparedPins>) -> Result<Pins, RootfsError> {
    let length = |mount: &TaskMount| if let MountContent::File(text) = &mount.content { text.len() } else { 0 };
    let pins = paths.pins();
    Pins::attach(&pins, mounts.iter().map(length).sum(), prepared)
        .map_err(|source| file("mount a file system at", &pins, source))
}

fn ensure_plain(root: BorrowedFd<'_>, path: &Path, wanted: EntryKind) -> Result<(), RootfsError> {
    image_links::ensure_plain(root, path, wanted).map_err(|source| RootfsError::Image { path: path.to_owned(), source })
}

/// Resolves the mounts' targets in the image. The outermost targets come first: what lies below one of them does not
/// belong to the image.
fn resolve_targets(
    root: BorrowedFd<'_>,
    base: &[PathBuf],
    mounts: &[TaskMount],
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
            // The driver's own file (such as /etc/hosts) replaces any entry that the image has there, as in docker.
            (MountContent::File(_), Some(parent), Some(name)) if !target.ancestors().any(is_mount) => {
                let found = resolve(parent)?.join(name);
                ensure_plain(root, found.strip_prefix("/").unwrap_or(&found), EntryKind::File)?;
                found
            }
            _ => resolve(target)?,
        };
        targets[number] = MountTarget::found(found);
    }
    Ok(targets)
}

/// The mounts of a task with their placements, from which the tree of mounts is built.
struct MountTree<'a> {
    paths: &'a BundlePaths,
    placed: &'a [PlacedMount],
    mounts: &'a [TaskMount],
    nesting: Nesting,
    label: Option<&'a str>,
}

impl MountTree<'_> {
    fn mount(&self, placed: &PlacedMount) -> &TaskMount {
        &self.mounts[placed.number]
    }

    /// Returns whether other mounts are put into this one's tree.
    fn holds_others(&self, placed: &PlacedMount) -> bool {
        self.nesting == Nesting::ByDriver
            && self
                .placed
                .iter()
                .any(|other| matches!(&other.place, Placement::InTree { outermost, .. } if *outermost == placed.number))
    }

    /// Pins a mount's source, and mounts it at its target if the target lies in another mount's tree.
    fn pin_and_place(&self, placed: &PlacedMount) -> io::Result<()> {
        let mount = self.mount(placed);
        let pin = self.paths.pin_path(placed.number);
        let is_inside = placed.place != Placement::ByRuntime && self.nesting == Nesting::ByDriver;
        match &mount.content {
            MountContent::FileSystem { .. } if !is_inside => {}
            MountContent::FileSystem { .. } => {
                fs::DirBuilder::new().mode(0o700).create(&pin)?;
                mount_in_memory(&pin, &mount.options, self.label)?;
            }
            MountContent::File(text) => {
                fs::write(&pin, text)?;
                // The process's umask may have cleared some bits of the mode.
                fs::set_permissions(&pin, fs::Permissions::from_mode(0o644))?;
                self.label_tree(&pin)?;
            }
            MountContent::Bind(source) => self.bind(placed, source, &pin, is_inside)?,
            MountContent::Volume => self.bind(placed, &self.make_volume(placed)?, &pin, is_inside)?,
        }
        let is_bind =
            |number: usize| matches!(self.mounts[number].content, MountContent::Bind(_) | MountContent::Volume);
        match &placed.place {
            Placement::InTree { outermost: top, path_in_outermost: path, .. } if is_inside => {
                let point = open_mount_point(&self.paths.pin_path(*top), path, self.kind(placed))?;
                let point = PathBuf::from(format!("/proc/self/fd/{}", point.as_raw_fd()));
                let flags = match mount.content {
                    MountContent::File(_) => MsFlags::MS_BIND,
                    MountContent::Bind(_) | MountContent::Volume | MountContent::FileSystem { .. } => MsFlags::MS_MOVE,
                };
                Ok(nix::mount::mount(Some(&pin), &point, None::<&str>, flags, None::<&str>)?)
            }
            // The runtime mounts it later. The mount point is opened now, to make sure that no link is on the way.
            Placement::InTree { parent, path_in_parent: below, .. } if is_bind(*parent) => {
                open_mount_point(&self.paths.pin_path(*parent), below, self.kind(placed)).map(drop)
            }
            Placement::InTree { .. } | Placement::ByRuntime => Ok(()),
        }
    }

    /// Returns the file type that a mount's mount point must have.
    fn kind(&self, placed: &PlacedMount) -> SFlag {
        if is_directory(self.mount(placed)) { SFlag::S_IFDIR } else { SFlag::S_IFREG }
    }

    /// Makes the directory of a volume, with the content that the image has at the volume's target.
    fn make_volume(&self, placed: &PlacedMount) -> io::Result<MountSource> {
        let path = self.paths.volume(placed.number);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path.parent().unwrap_or(&path))?;
        // This is docker's mode of a volume for which the image has no directory.
        fs::DirBuilder::new().mode(0o755).create(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        let root = image_links::open_root(&self.paths.rootfs())?;
        let target = placed.target.path();
        match try_open_without_links(&root, target.strip_prefix("/").unwrap_or(target)) {
            Ok(content) if kind_of(&content)? == SFlag::S_IFDIR => {
                copy_tree(Path::new(&format!("/proc/self/fd/{}/.", content.as_raw_fd())), &path)?;
            }
            Ok(_) => return Err(io::Error::new(io::ErrorKind::NotADirectory, "the image has a file there")),
            // The target contains no links, except below another mount, where the image's content is not the task's.
            Err(nix::Error::ENOENT | nix::Error::ELOOP) => {}
            Err(error) => return Err(error.into()),
        }
        self.label_tree(&path)?;
        open_path(&path).and_then(MountSource::of)
    }

    /// Gives the task's label to a file or directory that the driver has made for the task.
    fn label_tree(&self, path: &Path) -> io::Result<()> {
        self.label.map_or(Ok(()), |label| selinux::relabel_tree(path, label))
    }

    fn bind(&self, placed: &PlacedMount, source: &MountSource, pin: &Path, is_inside: bool) -> io::Result<()> {
        let options = &self.mount(placed).options;
        let has = |wanted: &str| options.iter().any(|option| option == wanted);
        if source.is_directory() {
            fs::DirBuilder::new().mode(0o700).create(pin)?;
        } else {
            fs::File::options().write(true).create_new(true).mode(0o600).open(pin)?;
        }
        let (recursion, depth) =
            if has("rbind") { (MsFlags::MS_REC, Depth::Tree) } else { (MsFlags::empty(), Depth::Top) };
        mount(Some(&source.fd_path()), pin, None::<&str>, MsFlags::MS_BIND | recursion, None::<&str>)?;
        // Missing mount points of other mounts are created in the source, as crun does, before it may become read-only.
        for other in self.placed {
            if let Placement::InTree { parent, path_in_parent: below, .. } = &other.place
                && *parent == placed.number
            {
                // If a mount point can't be created, the placement of its own mount fails later and reports it.
                if let Err(error) = open_mount_point(pin, below, self.kind(other)) {
                    tracing::debug!(
                        target = %other.target,
                        %error,
                        "could not create the mount point of a mount in the source of another mount"
                    );
                }
            }
        }
        if has("ro") {
            // Runtimes would make only the topmost mount read-only and leave the mounts below it writable.
            Attributes::read_only().set(pin, depth)?;
        }
        if is_inside || self.holds_others(placed) {
            // The propagation must be set now, and not later by the runtime: a mount that is put into a shared mount
            // would appear on the host as well.
            mount(None::<&str>, pin, None::<&str>, propagation(options) | MsFlags::MS_REC, None::<&str>)?;
        }
        let attributes = Attributes::of_options(options);
        if is_inside && !attributes.is_empty() {
            attributes.set(pin, Depth::Top)?;
        }
        Ok(())
    }

    /// Returns a mount in the form of the OCI spec, for the runtime.
    fn for_runtime(&self, placed: &PlacedMount) -> Result<Mount, RootfsError> {
        let mount = self.mount(placed);
        let mut options = mount.options.clone();
        let (kind, source) = match &mount.content {
            MountContent::FileSystem { kind, source } => (kind.as_str(), PathBuf::from(source)),
            MountContent::Bind(_) | MountContent::Volume | MountContent::File(_) => {
                ("bind", self.paths.pin_path(placed.number))
            }
        };
        if self.holds_others(placed) {
            // The runtime takes the tree as it is: the propagation of each of its mounts has been set already.
            options.retain(|option| {
                option != "bind" && option != "rbind" && !PROPAGATION_OPTIONS.contains(&option.as_str())
            });
            options.insert(0, "rbind".to_owned());
        }
        let built = MountBuilder::default().destination(placed.target.path()).typ(kind).source(source).options(options);
        Ok(built.build()?)
    }
}

fn is_directory(mount: &TaskMount) -> bool {
    match &mount.content {
        MountContent::File(_) => false,
        MountContent::FileSystem { .. } | MountContent::Volume => true,
        MountContent::Bind(source) => source.is_directory(),
    }
}

/// Returns the propagation that the options name. The default is slave, as in runtimes: mounts that the host makes
/// below the source later appear in the task, too.
fn propagation(options: &[String]) -> MsFlags {
    match options.iter().rev().map(String::as_str).find(|option| PROPAGATION_OPTIONS.contains(option)) {
        Some("private" | "rprivate") => MsFlags::MS_PRIVATE,
        Some("shared" | "rshared") => MsFlags::MS_SHARED,
        _ => MsFlags::MS_SLAVE,
    }
}

/// Mounts a file system in memory with a job's options.
fn mount_in_memory(at: &Path, options: &[String], label: Option<&str>) -> io::Result<()> {
    let attributes = |option: &&String| !Attributes::of_options(std::slice::from_ref(*option)).is_empty();
    let is_data = |option: &&String| {
        let name = option.as_str();
        !attributes(option) && !NO_OP_TMPFS_OPTIONS.contains(&name) && !PROPAGATION_OPTIONS.contains(&name)
    };
    let label = label.map(selinux::mount_option);
    let data: Vec<&str> = options.iter().filter(is_data).chain(&label).map(String::as_str).collect();
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(data.join(",").as_str()))?;
    mount(None::<&str>, at, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    let attributes = Attributes::of_options(options);
    if attributes.is_empty() { Ok(()) } else { attributes.set(at, Depth::Top) }
}

/// Opens the mount point `path` in the tree at `top`, and creates it if it is missing. Never follows a link.
fn open_mount_point(top: &Path, path: &Path, wanted: SFlag) -> io::Result<OwnedFd> {
    let top = open_path(top)?;
    let opened = match open_without_links(&top, path) {
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
        at = open_without_links(&at, name)?;
    }
    Ok(at)
}

fn file(doing: &'static str, path: &Path, source: io::Error) -> RootfsError {
    RootfsError::File { doing, path: path.to_owned(), source }
}
