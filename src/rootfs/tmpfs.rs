//! Checks and completes the options of file systems in memory (tmpfs(5)) that a job asks for.

use super::{
    ceilings::{CeilingError, Ceilings},
    tmpfs_size::TmpfsSize,
};
use crate::ids::Flavor;

/// Options without a value.
const FLAGS: [&str; 10] = ["ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "noatime", "relatime"];
/// Options with a value.
const KEYS: [&str; 6] = ["size", "mode", "uid", "gid", "nr_inodes", "nr_blocks"];

/// Why a job's tmpfs is refused.
#[derive(Debug, thiserror::Error)]
pub enum TmpfsError {
    /// The option is not known, or a job may not set it.
    #[error("options: {option:?} is not one of {}", known())]
    Unknown {
        /// The option, as the job has it.
        option: String,
    },
    /// The option has no value, or a value that the kernel may read as another number than its author means.
    #[error("options: {option:?} has no value such as size=64m, size=10%, nr_inodes=10k, mode=1777 or uid=1000")]
    Value {
        /// The option, as the job has it.
        option: String,
    },
    /// The file system would be larger than the operator allows.
    #[error("options: {0}")]
    Ceiling(#[from] CeilingError),
}

fn known() -> String {
    let keys = KEYS.iter().map(|key| format!("{key}="));
    FLAGS.iter().map(|flag| (*flag).to_owned()).chain(keys).collect::<Vec<_>>().join(", ")
}

/// Checks the options of a job's tmpfs, and returns the complete options for the runtime.
///
/// With `Flavor::Strict`, the file system allows no set-user-id programs, no devices and no programs at all unless the
/// job asks for them, as with docker, and unknown options are refused. Runtimes join the options with commas, so an item of the list that contains commas
/// is several options.
///
/// # Errors
/// Fails with the first option that is refused.
pub fn complete_options(given: &[String], flavor: Flavor, ceilings: &Ceilings) -> Result<Vec<String>, TmpfsError> {
    let single: Vec<&str> = given.iter().flat_map(|option| option.split(',')).filter(|one| !one.is_empty()).collect();
    let mut has_size = false;
    for option in &single {
        let (key, value) = option.split_once('=').map_or((*option, None), |(key, value)| (key, Some(value)));
        has_size |= matches!(key, "size" | "nr_blocks");
        if flavor == Flavor::Strict {
            check_form(option, key, value)?;
        }
        check_size(option, key, value, ceilings)?;
    }
    let mut options: Vec<String> = match flavor {
        // The options are passed on as the job has them, without a check.
        Flavor::ContainerdDriver => given.to_vec(),
        Flavor::Strict => {
            let said = |names: [&str; 2]| single.iter().any(|option| names.contains(option));
            let closed = [
                ("nosuid", said(["suid", "nosuid"])),
                ("nodev", said(["dev", "nodev"])),
                ("noexec", said(["exec", "noexec"])),
            ];
            let closed = closed.iter().filter(|(_, said)| !said).map(|(option, _)| *option);
            closed.chain(single.iter().copied()).map(str::to_owned).collect()
        }
    };
    // A tmpfs without a size may grow to half of the host's memory, which may be above the ceiling.
    if let Some(bytes) = ceilings.below_kernel_default().filter(|_| !has_size) {
        options.push(format!("size={bytes}"));
    }
    Ok(options)
}

fn check_form(option: &str, key: &str, value: Option<&str>) -> Result<(), TmpfsError> {
    let number = |radix| move |text: &str| u32::from_str_radix(text, radix).is_ok() && !text.starts_with('+');
    let fits = match (key, value) {
        (flag, None) if FLAGS.contains(&flag) => true,
        ("size", Some(text)) => TmpfsSize::parse(text).is_some(),
        ("nr_blocks" | "nr_inodes", Some(text)) => !text.ends_with('%') && TmpfsSize::parse(text).is_some(),
        ("mode", Some(text)) => number(8)(text),
        ("uid" | "gid", Some(text)) => number(10)(text),
        _ => return Err(TmpfsError::Unknown { option: option.to_owned() }),
    };
    if fits { Ok(()) } else { Err(TmpfsError::Value { option: option.to_owned() }) }
}

/// Checks the size that the file system may grow to against the operator's ceiling. The kernel counts `nr_blocks` in
/// pages. By default it allows one inode for every two pages of the host's memory (linux, `mm/shmem.c`,
/// `shmem_default_max_inodes`), so a ceiling of half of the memory allows one inode for each page of the ceiling.
fn check_size(option: &str, key: &str, value: Option<&str>, ceilings: &Ceilings) -> Result<(), TmpfsError> {
    let unit = match key {
        "size" => 1,
        "nr_blocks" | "nr_inodes" => ceilings.page(),
        _ => return Ok(()),
    };
    if !ceilings.bounds_memory() {
        return Ok(());
    }
    let Some(size) = value.and_then(TmpfsSize::parse) else {
        return Err(TmpfsError::Value { option: option.to_owned() });
    };
    let size = match size {
        TmpfsSize::Count(count) => TmpfsSize::Count(count.saturating_mul(unit)),
        other => other,
    };
    Ok(ceilings.check_memory(option, size)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::ceilings::HostLimits;

    const GIB: u64 = 1 << 30;

    fn checked(given: &[&str], flavor: Flavor, max: Option<TmpfsSize>) -> Result<Vec<String>, String> {
        let ceilings = Ceilings::new(flavor, [].into(), max).on_host(HostLimits::of_memory(8 * GIB));
        let given: Vec<String> = given.iter().map(|option| (*option).to_owned()).collect();
        complete_options(&given, flavor, &ceilings).map_err(|error| error.to_string())
    }

    #[test]
    fn set_user_id_programs_and_devices_are_off_by_default() {
        let with = |given: &[&str]| checked(given, Flavor::Strict, None).expect("allowed");
        assert_eq!(with(&[]), ["nosuid", "nodev", "noexec"]);
        assert_eq!(with(&["size=64m"]), ["nosuid", "nodev", "noexec", "size=64m"]);
        assert_eq!(with(&["suid", "exec"]), ["nodev", "suid", "exec"]);
        assert_eq!(
            with(&["dev,mode=700", "ro"]),
            ["nosuid", "noexec", "dev", "mode=700", "ro"],
            "an item may contain several options"
        );
        assert_eq!(checked(&["size=1m,rw"], Flavor::ContainerdDriver, None).expect("allowed"), ["size=1m,rw"]);
    }

    #[test]
    fn no_tmpfs_is_larger_than_the_ceiling() {
        for option in ["size=100%", "size=51%", "size=900t", "size=5g", "size=0", "nr_blocks=0", "nr_blocks=2m"] {
            let error = checked(&["mode=700", option], Flavor::Strict, None).expect_err("refused");
            assert!(error.contains(&format!("{option:?} is above 4096 MiB")), "{error}");
            assert!(error.contains("security { tmpfs_max }"), "{error}");
        }
        for option in ["nr_inodes=0", "nr_inodes=2m", "size=1m,size=5g", "mode=700,size=100%"] {
            assert!(checked(&[option], Flavor::Strict, None).is_err(), "{option}");
        }
        for option in ["size=50%", "size=4g", "nr_blocks=1m", "nr_inodes=1m"] {
            assert!(checked(&[option], Flavor::Strict, None).is_ok(), "{option}");
            assert!(checked(&[option], Flavor::ContainerdDriver, None).is_ok(), "{option}");
        }
        let small = Some(TmpfsSize::Count(32 << 20));
        for flavor in [Flavor::Strict, Flavor::ContainerdDriver] {
            assert!(checked(&["size=33m"], flavor, small).is_err(), "{flavor:?}");
            assert!(
                checked(&["size=what"], flavor, small).is_err(),
                "{flavor:?}: a size that can't be read is refused"
            );
            let unsized_one = checked(&["mode=700"], flavor, small).expect("allowed");
            assert_eq!(unsized_one.last().map(String::as_str), Some("size=33554432"), "{flavor:?}");
        }
        assert!(checked(&["size=900t"], Flavor::Strict, Some(TmpfsSize::Unlimited)).is_ok());
        assert!(checked(&["size=900t"], Flavor::ContainerdDriver, None).is_ok());
    }

    #[test]
    fn other_options_are_refused() {
        for option in ["lowerdir=/", "size=1m,context=x", "mpol=bind:0", "huge=always", "remount", "mode=9", "uid=-1"] {
            assert!(checked(&[option], Flavor::Strict, Some(TmpfsSize::Unlimited)).is_err(), "{option}");
        }
    }
}
