//! Which of several mounts with one target a task gets.

use super::{RootfsError, mount_origin::Strength, mounts::TaskMount, target::MountTarget};
use crate::ids::Flavor;

/// What happens to several mounts with one target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SameTarget {
    /// As with docker: the job's own mount takes the place of one that the driver or the image would make, and two that
    /// the job or Nomad asks for are refused.
    Refused,
    /// As with nomad-driver-containerd: the last one is visible.
    LastWins,
}

impl SameTarget {
    /// Returns the rule of a driver with this flavor.
    pub fn of(flavor: Flavor) -> Self {
        match flavor {
            Flavor::Strict => Self::Refused,
            Flavor::ContainerdDriver => Self::LastWins,
        }
    }

    /// Returns the numbers of the mounts that are made, one for each target, in ascending order. `targets` has the
    /// mounts' targets, which may be other paths than the mounts' own where the image has links.
    ///
    /// # Errors
    /// Fails when two mounts exclude each other; the error has the number of the second one and the reason.
    pub(super) fn visible(self, mounts: &[TaskMount], targets: &[MountTarget]) -> Result<Vec<usize>, (usize, String)> {
        let mut visible: Vec<usize> = Vec::with_capacity(mounts.len());
        for (number, mount) in mounts.iter().enumerate() {
            let Some(at) = visible.iter().position(|other| targets[*other] == targets[number]) else {
                visible.push(number);
                continue;
            };
            let other = &mounts[visible[at]];
            let (strength, others) = (mount.origin.strength(), other.origin.strength());
            match self {
                Self::Refused if strength == Strength::Demanded && others == Strength::Demanded => {
                    return Err((number, same_target(mount, other)));
                }
                Self::Refused if strength < others => {}
                Self::Refused | Self::LastWins => visible[at] = number,
            }
        }
        visible.sort_unstable();
        Ok(visible)
    }

    /// Leaves out mounts in whose place another mount with the same target is made.
    ///
    /// # Errors
    /// Fails when two mounts exclude each other.
    pub fn retain_visible(self, mounts: &mut Vec<TaskMount>) -> Result<(), RootfsError> {
        let targets: Vec<MountTarget> = mounts.iter().map(|mount| mount.target.clone()).collect();
        let visible =
            self.visible(mounts, &targets).map_err(|(number, problem)| mounts[number].target_error(problem))?;
        let mut number = 0;
        mounts.retain(|mount| {
            let is_visible = visible.binary_search(&number).is_ok();
            number += 1;
            if !is_visible {
                tracing::info!(target = %mount.target, origin = %mount.origin, "left out a mount: another one has its target");
            }
            is_visible
        });
        Ok(())
    }
}

fn same_target(mount: &TaskMount, other: &TaskMount) -> String {
    let way_out = "remove one of the two, or give it another target";
    if mount.target == other.target {
        format!("{} has the same target; {way_out}", other.origin)
    } else {
        format!("{} has the same target by the image's links, {}; {way_out}", other.origin, other.target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::{mount_origin::MountOrigin, mounts::MountContent};

    fn mounts(list: &[(&MountOrigin, &str)]) -> Vec<TaskMount> {
        let mount = |(origin, target): &(&MountOrigin, &str)| TaskMount {
            origin: (*origin).clone(),
            target: MountTarget::parse(target).expect("a target"),
            content: MountContent::File(String::new()),
            options: Vec::new(),
        };
        list.iter().map(mount).collect()
    }

    /// Returns the origins of the mounts that stay, or the error.
    fn retained(rule: SameTarget, list: &[(&MountOrigin, &str)]) -> Result<Vec<String>, String> {
        let mut mounts = mounts(list);
        rule.retain_visible(&mut mounts).map_err(|error| error.to_string())?;
        Ok(mounts.iter().map(|mount| mount.origin.to_string()).collect())
    }

    const FILE: MountOrigin = MountOrigin::Default("extra_hosts");
    const NOMADS: MountOrigin = MountOrigin::Required("NOMAD_SECRETS_DIR");
    const FIRST: MountOrigin = MountOrigin::Job(0);
    const SECOND: MountOrigin = MountOrigin::Job(1);

    #[test]
    fn the_jobs_mount_takes_the_place_of_a_default() {
        let image = MountOrigin::Image;
        for list in [[(&FIRST, "/a"), (&FILE, "/a")], [(&FILE, "/a"), (&FIRST, "/a")], [(&image, "/a"), (&FIRST, "/a")]]
        {
            assert_eq!(retained(SameTarget::Refused, &list), Ok(vec!["mounts[0]".to_owned()]), "{list:?}");
        }
        let list = [(&image, "/a"), (&FILE, "/a"), (&image, "/a"), (&image, "/b")];
        let kept = ["extra_hosts", "VOLUME"].map(str::to_owned).to_vec();
        assert_eq!(retained(SameTarget::Refused, &list), Ok(kept));
    }

    #[test]
    fn two_mounts_of_the_job_are_refused_by_name() {
        let volume = MountOrigin::Volume("/srv/v".into());
        for (list, both) in [
            ([(&FIRST, "/a"), (&SECOND, "/a")], "mounts[1]: target \"/a\": mounts[0] has the same target"),
            ([(&FIRST, "/a/"), (&volume, "/a")], "volume_mount of \"/srv/v\": target \"/a\": mounts[0] has the"),
            ([(&FIRST, "/secrets"), (&NOMADS, "/secrets")], "NOMAD_SECRETS_DIR: target \"/secrets\": mounts[0] has"),
        ] {
            let error = retained(SameTarget::Refused, &list).expect_err("refused");
            assert!(error.starts_with(both) && error.contains("another target"), "{error}");
        }
    }

    #[test]
    fn a_target_behind_a_link_of_the_image_is_the_same_target() {
        let mounts = mounts(&[(&FIRST, "/run/a"), (&SECOND, "/var/run/a")]);
        let targets = vec![mounts[0].target.clone(); 2];
        let (number, problem) = SameTarget::Refused.visible(&mounts, &targets).expect_err("refused");
        assert_eq!(number, 1);
        assert!(problem.contains("mounts[0]") && problem.contains("links, /run/a"), "{problem}");
    }

    #[test]
    fn the_last_one_is_visible_under_the_old_name() {
        let list = [(&FIRST, "/a"), (&SECOND, "/a"), (&FIRST, "/etc/hosts"), (&FILE, "/etc/hosts")];
        let kept = ["mounts[1]", "extra_hosts"].map(str::to_owned).to_vec();
        assert_eq!(retained(SameTarget::LastWins, &list), Ok(kept));
    }
}
