//! Permissions of a driver's files on disk: everything below its run and state directory must be accessible to root
//! only.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::Env;

/// Directories with files that runtimes or the kernel make, or that containers see. They are below a directory that is
/// closed to other users, so their contents are not checked.
const OTHERS: [&str; 8] = [
    "run/bundles/*/rootfs",
    "run/bundles/*/mounts",
    "run/runtimes/*",
    "state/uppers/*/*/upper",
    "state/uppers/*/*/work",
    "state/ahead/*/*/layer/upper",
    "state/ahead/*/*/layer/work",
    "state/images/empty",
];
/// Shims and runtimes make files in a bundle, with modes of their own.
const BUNDLE: &str = "run/bundles/*";
/// The directory of programs that shims call, and of the plugin's notes about them.
const WRAPPERS: &str = "state/wrappers";

/// Returns each path that does not belong to root, or that is open to its group or to everyone, as one line.
pub(crate) fn open_to_others(env: &Env) -> Vec<String> {
    if env.foreign {
        return Vec::new();
    }
    let mut found = Vec::new();
    for top in ["run", "state"] {
        look(&env.dir, Path::new(top), &mut found);
    }
    found
}

fn look(base: &Path, path: &Path, found: &mut Vec<String>) {
    // A path may disappear during the check.
    let Ok(meta) = fs::symlink_metadata(base.join(path)) else { return };
    let is_others = OTHERS.iter().any(|pattern| matches(pattern, path));
    let made_by_others = |parent: &Path| matches(BUNDLE, parent) || parent.starts_with(WRAPPERS);
    let may_be_open = is_others || !meta.is_dir() && path.parent().is_some_and(made_by_others);
    if meta.uid() != 0 && !is_others {
        found.push(format!("{} belongs to user {}", path.display(), meta.uid()));
    }
    if meta.mode() & 0o077 != 0 && !may_be_open && !meta.is_symlink() {
        found.push(format!("{} has the mode {:o}", path.display(), meta.mode() & 0o7777));
    }
    if meta.is_dir() && !is_others {
        let names = super::leak::entries(&base.join(path));
        names.iter().for_each(|name| look(base, &path.join(name), found));
    }
}

/// Returns whether a path has the pattern's form. A `*` stands for any one component.
fn matches(pattern: &str, path: &Path) -> bool {
    let pattern = PathBuf::from(pattern);
    pattern.components().count() == path.components().count()
        && pattern.components().zip(path.components()).all(|(wanted, name)| wanted.as_os_str() == "*" || wanted == name)
}
