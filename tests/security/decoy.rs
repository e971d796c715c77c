//! A directory of the host that attacks try to read or change. No attack may leave it changed.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use crate::support::Env;

/// The content of the decoy's files. No task may ever print it.
pub(crate) const SECRET: &str = "known to the host only\n";

/// The directory, and a listing of its contents at the beginning.
pub(crate) struct Decoy {
    pub dir: PathBuf,
    before: Vec<String>,
}

impl Decoy {
    /// Makes a decoy in the environment's directory, with the names that runtimes write to in a root file system.
    pub(crate) fn new(env: &Env) -> Self {
        let dir = env.dir.join("decoy");
        for below in ["", "logs", "data", "bin"] {
            fs::create_dir_all(dir.join(below)).unwrap();
        }
        for name in ["secret", "hosts", "resolv.conf", "passwd", "data/file", "bin/sh"] {
            fs::write(dir.join(name), SECRET).unwrap();
            fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o600)).unwrap();
        }
        let before = contents(&dir);
        Self { dir, before }
    }

    /// The decoy's path, as a job or an image would name it.
    pub(crate) fn path(&self) -> &str {
        self.dir.to_str().unwrap()
    }

    /// The differences from the beginning. There are none unless an attack succeeded.
    pub(crate) fn changes(&self) -> Vec<String> {
        let now = contents(&self.dir);
        let gone = self.before.iter().filter(|line| !now.contains(line)).map(|line| format!("- {line}"));
        let new = now.iter().filter(|line| !self.before.contains(line)).map(|line| format!("+ {line}"));
        gone.chain(new).collect()
    }

    /// Fails if an attack has changed or mounted anything in the decoy.
    pub(crate) fn assert_untouched(&self, attack: &str) {
        assert_eq!(self.changes(), Vec::<String>::new(), "{attack} changed a directory of the host");
    }
}

/// Every file below `dir` with its kind, mode, owner, inode and text, and every mount point.
fn contents(dir: &Path) -> Vec<String> {
    let mut lines = mounts_below(dir);
    collect(dir, &mut lines);
    lines.sort();
    lines
}

fn collect(path: &Path, lines: &mut Vec<String>) {
    let metadata = fs::symlink_metadata(path).unwrap();
    let (mode, owner, inode) = (metadata.mode(), (metadata.uid(), metadata.gid()), metadata.ino());
    let text = if metadata.is_file() { fs::read(path).unwrap() } else { Vec::new() };
    let text = String::from_utf8_lossy(&text[..text.len().min(200)]).into_owned();
    lines.push(format!("{} {mode:o} {owner:?} {inode} {text:?}", path.display()));
    if metadata.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| collect(&entry.unwrap().path(), lines));
    }
}

/// The mount points at and below a directory, in this process's mount namespace, which is the host's.
pub(crate) fn mounts_below(dir: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let point = |line: &&str| line.split(' ').nth(4).is_some_and(|point| Path::new(point).starts_with(dir));
    mounts.lines().filter(point).map(|line| format!("mount: {line}")).collect()
}
