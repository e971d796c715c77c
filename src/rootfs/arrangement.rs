//! Finds out which mounts lie below which others: a pure function of their targets.
//!
//! A runtime looks up a target by name in the file systems that it has mounted so far. Below a bind mount, those
//! contain files of the task or of another task of the allocation, and either task may put a link there at any moment.
//! So the runtime gets only those mounts whose target lies in the image or in a fresh file system. The driver itself
//! puts all other mounts into the tree of the bind mount that they lie below.

use std::path::{Path, PathBuf};

use super::{
    mounts::{MountContent, TaskMount},
    same_target::SameTarget,
    target::MountTarget,
};

/// The component that puts a mount at its target: the runtime or the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Placement {
    /// The runtime mounts it.
    ByRuntime,
    /// The driver mounts it into the tree of another mount, before the runtime takes that tree.
    InTree {
        /// The index of the outermost mount, which the runtime mounts.
        outermost: usize,
        /// The path below the outermost mount's target.
        path_in_outermost: PathBuf,
        /// The index of the mount in which this one lies directly.
        parent: usize,
        /// The path below the target of that direct parent.
        path_in_parent: PathBuf,
    },
}

/// A mount for which a placement was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlacedMount {
    /// The mount's index in the list of mounts.
    pub(super) number: usize,
    /// The mount's target, without links on the way.
    pub(super) target: MountTarget,
    /// How the mount gets to its target.
    pub(super) place: Placement,
}

/// A mount that can't be placed, with its index and the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Misplaced {
    pub(super) number: usize,
    pub(super) problem: String,
}

/// Orders mounts so that each one comes after the mounts that it lies below, and decides how each gets to its target.
/// Of several mounts with the same target one is mounted, by the rule `same_target`.
///
/// # Errors
/// Fails when a mount lies below another one in which nothing can be mounted, or when two mounts have the same target.
pub(super) fn arrange(
    mounts: &[TaskMount],
    targets: &[MountTarget],
    same_target: SameTarget,
) -> Result<Vec<PlacedMount>, Misplaced> {
    let visible = same_target.visible(mounts, targets);
    let mut order = visible.map_err(|(number, problem)| Misplaced { number, problem })?;
    order.sort_by_key(|number| targets[*number].depth());
    let mut placed: Vec<PlacedMount> = Vec::with_capacity(order.len());
    for number in order {
        let target = targets[number].clone();
        // The mounts are sorted by depth, so the last match is the deepest.
        let parent = placed.iter().rfind(|other| target.path().starts_with(other.target.path()));
        let place = match parent {
            // The target lies in the image, or in a fresh file system that every container has.
            None => Placement::ByRuntime,
            Some(parent) => place_below(parent, &mounts[parent.number], &mounts[number], target.path())
                .map_err(|problem| Misplaced { number, problem })?,
        };
        placed.push(PlacedMount { number, target, place });
    }
    Ok(placed)
}

/// Returns the placement of a mount whose target lies directly below the target of `parent`. `parent_mount` is the
/// mount that has the placement `parent`.
fn place_below(
    parent: &PlacedMount,
    parent_mount: &TaskMount,
    mount: &TaskMount,
    target: &Path,
) -> Result<Placement, String> {
    if let (Placement::ByRuntime, MountContent::FileSystem { .. }) = (&parent.place, &parent_mount.content) {
        return Ok(Placement::ByRuntime);
    }
    let parent_target = &parent.target;
    if matches!(parent_mount.content, MountContent::File(_)) {
        return Err(format!("it lies below {parent_target}, which is a file"));
    }
    if parent_mount.options.iter().any(|option| option == "shared" || option == "rshared") {
        return Err(format!(
            "it lies below {parent_target}, whose mounts reach the host (rshared, \"bidirectional\"); use a target outside of it"
        ));
    }
    if let MountContent::FileSystem { kind, .. } = &mount.content
        && kind != "tmpfs"
    {
        return Err(format!("a file system of type {kind:?} can't be mounted below the bind mount at {parent_target}"));
    }
    let (top, above) = match &parent.place {
        Placement::ByRuntime => (parent.number, Path::new("")),
        Placement::InTree { outermost: top, path_in_outermost: path, .. } => (*top, path.as_path()),
    };
    let below = target.strip_prefix(parent_target.path()).unwrap_or(target).to_owned();
    Ok(Placement::InTree {
        outermost: top,
        path_in_outermost: above.join(&below),
        parent: parent.number,
        path_in_parent: below,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::{mount_origin::MountOrigin, mounts::MountSource};
    use proptest::prelude::*;

    fn bind(target: &str, options: &[&str]) -> TaskMount {
        let source = std::fs::File::open("/").expect("the root can be opened");
        mount(target, MountContent::Bind(MountSource::of(source.into()).expect("fstat")), options)
    }

    fn tmpfs(target: &str) -> TaskMount {
        mount(target, MountContent::FileSystem { kind: "tmpfs".to_owned(), source: "tmpfs".to_owned() }, &[])
    }

    fn mount(target: &str, content: MountContent, options: &[&str]) -> TaskMount {
        TaskMount {
            origin: MountOrigin::Job(0),
            target: MountTarget::parse(target).expect("a target"),
            content,
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    /// A target; for a mount in another one's tree also the outermost mount's index, and the path in its tree.
    type Arranged = (String, Option<(usize, String)>);

    /// Returns all targets in the order in which they are mounted.
    fn arranged(mounts: &[TaskMount]) -> Result<Vec<Arranged>, String> {
        let targets: Vec<_> = mounts.iter().map(|mount| mount.target.clone()).collect();
        let placed = arrange(mounts, &targets, SameTarget::LastWins).map_err(|misplaced| misplaced.problem)?;
        let text = |placed: &PlacedMount| match &placed.place {
            Placement::ByRuntime => (placed.target.to_string(), None),
            Placement::InTree { outermost: top, path_in_outermost: path, .. } => {
                (placed.target.to_string(), Some((*top, path.display().to_string())))
            }
        };
        Ok(placed.iter().map(text).collect())
    }

    fn own(target: &str) -> Arranged {
        (target.to_owned(), None)
    }

    fn below(target: &str, top: usize, path: &str) -> Arranged {
        (target.to_owned(), Some((top, path.to_owned())))
    }

    #[test]
    fn mounts_below_a_bind_mount_are_put_into_its_tree() {
        let mounts = [
            bind("/alloc/logs", &["ro"]),
            bind("/alloc", &["rslave"]),
            tmpfs("/alloc/data/cache"),
            bind("/alloc/data/cache/deep", &[]),
            bind("/local", &[]),
        ];
        assert_eq!(
            arranged(&mounts),
            Ok(vec![
                own("/alloc"),
                own("/local"),
                below("/alloc/logs", 1, "logs"),
                below("/alloc/data/cache", 1, "data/cache"),
                below("/alloc/data/cache/deep", 1, "data/cache/deep"),
            ])
        );
    }

    #[test]
    fn mounts_below_a_fresh_file_system_are_left_to_the_runtime() {
        let mounts = [tmpfs("/scratch"), bind("/scratch/in", &[]), bind("/dev/fuse", &[]), bind("/dev/shm/x", &[])];
        assert_eq!(
            arranged(&mounts),
            Ok(vec![own("/scratch"), own("/scratch/in"), own("/dev/fuse"), own("/dev/shm/x")])
        );
        // The host's /dev covers the container's fresh one.
        let mounts = [bind("/dev", &[]), bind("/dev/shm/x", &[])];
        assert_eq!(arranged(&mounts), Ok(vec![own("/dev"), below("/dev/shm/x", 0, "shm/x")]));
    }

    #[test]
    fn of_several_mounts_with_one_target_only_the_last_is_mounted() {
        let mounts = [bind("/secrets", &[]), tmpfs("/secrets"), bind("/secrets/a", &[]), bind("/secrets", &["ro"])];
        assert_eq!(arranged(&mounts), Ok(vec![own("/secrets"), below("/secrets/a", 3, "a")]));
    }

    #[test]
    fn mounts_that_nothing_may_be_put_into_are_named() {
        let file = mount("/etc/hosts", MountContent::File(String::new()), &[]);
        let proc = mount("/a/p", MountContent::FileSystem { kind: "proc".to_owned(), source: "proc".to_owned() }, &[]);
        for (mounts, part) in [
            (vec![file, bind("/etc/hosts/x", &[])], "which is a file"),
            (vec![bind("/csi", &["rbind", "rshared"]), bind("/csi/x", &[])], "reach the host"),
            (vec![bind("/a", &[]), proc], "type \"proc\""),
        ] {
            let problem = arranged(&mounts).expect_err("refused");
            assert!(problem.contains(part), "{part:?} in {problem}");
        }
    }

    proptest! {
        /// For any targets, no mount that is left to the runtime lies below a bind.
        #[test]
        fn nothing_below_a_bind_is_left_to_the_runtime(
            list in proptest::collection::vec((proptest::collection::vec(0..3_u8, 1..4), any::<bool>()), 0..8)
        ) {
            let path = |parts: &[u8]| parts.iter().fold(String::new(), |path, part| format!("{path}/{part}"));
            let mounts: Vec<_> =
                list.iter().map(|(parts, is_bind)| if *is_bind { bind(&path(parts), &[]) } else { tmpfs(&path(parts)) }).collect();
            let targets: Vec<_> = mounts.iter().map(|mount| mount.target.clone()).collect();
            let placed = arrange(&mounts, &targets, SameTarget::LastWins).expect("all can be placed");
            let left: Vec<_> = placed.iter().filter(|placed| placed.place == Placement::ByRuntime).collect();
            for mount in &left {
                let is_bind = |other: &&&PlacedMount| matches!(mounts[other.number].content, MountContent::Bind(_));
                let above = left.iter().filter(is_bind).any(|other| {
                    other.target != mount.target && mount.target.path().starts_with(other.target.path())
                        // With a fresh file system in between, the mount may be left to the runtime.
                        && !left.iter().any(|fresh| matches!(mounts[fresh.number].content, MountContent::FileSystem { .. })
                            && fresh.target != mount.target
                            && mount.target.path().starts_with(fresh.target.path())
                            && fresh.target.path().starts_with(other.target.path()))
                });
                prop_assert!(!above, "{:?}", mount.target);
            }
        }
    }
}
