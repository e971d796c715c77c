//! Reads the agent's runtimes: the `runtime "NAME" {}` blocks, the built-in runtimes, and which of them tasks use.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    str::FromStr,
};

use super::faults::Faults;
use crate::{
    gvisor::{FileAccess, GvisorSettings, check_flag},
    plugin::decode::Values,
    task::{OwnShim, RUNC_SHIM_NAMES, RuntimeSettings},
};

/// The options that only a gVisor runtime has.
const GVISOR_OPTIONS: [&str; 7] = ["platform", "network", "overlay", "file_access", "cgroups", "debug_log", "flags"];

/// The settings of runtimes.
pub(super) struct Runtimes {
    pub(super) runtimes: BTreeMap<String, RuntimeSettings>,
    pub(super) default_runtime: Option<String>,
    pub(super) allow_runtimes: Option<Vec<String>>,
}

/// Reads the runtimes, the default runtime, and the runtimes that jobs are allowed to name.
pub(super) fn runtimes(values: &Values, faults: &mut Faults) -> Runtimes {
    let runtimes = all_runtimes(values, faults);
    let known_runtimes = runtimes.keys().cloned().collect::<Vec<_>>().join(", ");
    // This is nomad-driver-containerd's option for the runtime of all tasks. The names of runc's shim choose no
    // runtime.
    let old_runtime =
        values.non_empty_text("containerd_runtime").filter(|old| !RUNC_SHIM_NAMES.contains(old)).map(str::to_owned);
    if let Some(old) = old_runtime.as_ref().filter(|old| !runtimes.contains_key(*old)) {
        faults.push(format!(
            "containerd_runtime = {old:?} is not configured; the runtimes are {}, {known_runtimes}, and those of runtime blocks",
            RUNC_SHIM_NAMES.join(", ")
        ));
    }
    let default_runtime = match (values.non_empty_text("default_runtime").map(str::to_owned), old_runtime) {
        (Some(new), Some(old)) if new != old => {
            faults.push(format!(
                "default_runtime = {new:?} and containerd_runtime = {old:?} exclude each other; remove one of them"
            ));
            None
        }
        (new, old) => new.or(old),
    };
    let allow_runtimes = values.list("allow_runtimes").map(<[String]>::to_vec);
    let default = default_runtime.iter().map(|name| ("default_runtime", name));
    let allowed = allow_runtimes.iter().flatten().map(|name| ("allow_runtimes", name));
    for (option, runtime) in default.chain(allowed).filter(|(_, name)| !runtimes.contains_key(*name)) {
        faults.push(format!("{option}: runtime {runtime:?} is not configured; the runtimes are {known_runtimes}"));
    }
    Runtimes { runtimes, default_runtime, allow_runtimes }
}

/// Returns all runtimes that jobs can name: the built-in runtimes and those of the blocks.
fn all_runtimes(values: &Values, faults: &mut Faults) -> BTreeMap<String, RuntimeSettings> {
    let empty = Values::default();
    let built_in = ["crun", "runc", "runsc", "io.containerd.runsc.v1"];
    let mut runtimes: BTreeMap<String, RuntimeSettings> =
        built_in.iter().map(|name| ((*name).to_owned(), runtime(name, &empty, faults))).collect();
    for (name, block) in values.labelled("runtime") {
        if name.is_empty()
            || name.len() > 64
            || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        {
            // The name becomes part of paths.
            faults
                .push(format!("runtime {name:?}: a name has up to 64 letters, digits, dots, underscores and hyphens"));
            continue;
        }
        runtimes.insert(name.clone(), runtime(name, block, faults));
    }
    runtimes
}

fn runtime(name: &str, block: &Values, faults: &mut Faults) -> RuntimeSettings {
    let shim = block.non_empty_text("shim").map(PathBuf::from).or_else(|| shim_for_runtime(name));
    let config = block.non_empty_text("config").map(PathBuf::from);
    for (option, path) in
        [("config", config.as_deref()), ("debug_log", block.non_empty_text("debug_log").map(Path::new))]
    {
        if let Some(path) = path.filter(|path| !path.is_absolute()) {
            faults.push(format!("runtime {name:?}: {option} = {:?} is not an absolute path", path.display()));
        }
    }
    if config.is_some() && shim.is_none() {
        faults.push(format!("runtime {name:?}: config needs a shim of its own; runc's shim has no configuration file"));
    }
    let own_name = shim.is_some() && name.ends_with("runsc.v1");
    let default = if own_name { "runsc" } else { name };
    let binary = PathBuf::from(block.non_empty_text("binary").unwrap_or(default));
    let file = binary.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let is_gvisor = match block.non_empty_text("type") {
        None => file.starts_with("runsc"),
        Some("gvisor") => true,
        Some("oci") => false,
        Some(other) => {
            faults.push(format!("runtime {name:?}: type = {other:?} is not oci or gvisor"));
            false
        }
    };
    if config.is_some() && is_gvisor {
        faults
            .push(format!("runtime {name:?}: config is not for gVisor's shim; its settings are options of this block"));
    }
    if shim.is_some() && !is_gvisor && block.non_empty_text("binary").is_some() {
        faults.push(format!("runtime {name:?}: binary and shim exclude each other; such a shim has its own binary"));
    }
    let gvisor_option = GVISOR_OPTIONS.iter().find(|option| block.is_set(option));
    let gvisor = match (is_gvisor, gvisor_option) {
        (true, _) => Some(gvisor(name, block, faults)),
        (false, None) => None,
        (false, Some(option)) => {
            faults.push(format!("runtime {name:?}: {option} is an option of gVisor's runsc (type = \"gvisor\")"));
            None
        }
    };
    let shim = shim.map(|program| OwnShim { program, config });
    // A shim for another kind of container chooses its runtime itself.
    let binary = match &shim {
        Some(shim) if gvisor.is_none() && block.non_empty_text("binary").is_none() => shim.program.clone(),
        _ => binary,
    };
    RuntimeSettings { binary, shim, gvisor }
}

/// Returns the shim that a runtime's name stands for, by containerd's rule: `io.containerd.NAME.VERSION` means
/// `containerd-shim-NAME-VERSION`. `None` for runc's shim, which all other runtimes use.
fn shim_for_runtime(name: &str) -> Option<PathBuf> {
    let (kind, version) = name.strip_prefix("io.containerd.")?.rsplit_once('.')?;
    (kind != "runc").then(|| format!("containerd-shim-{kind}-{version}").into())
}

fn gvisor(name: &str, block: &Values, faults: &mut Faults) -> GvisorSettings {
    fn parse_option<T: FromStr<Err = &'static str>>(
        (name, block): (&str, &Values),
        option: &str,
        faults: &mut Faults,
    ) -> Option<T> {
        let text = block.non_empty_text(option)?;
        let parsed = text.parse();
        parsed.map_err(|problem| faults.push(format!("runtime {name:?}: {option} = {text:?} {problem}"))).ok()
    }
    let runtime = (name, block);
    let overlay = block.non_empty_text("overlay").map(str::to_owned);
    if let Some(overlay) = overlay.as_ref().filter(|text| *text != "none" && !is_overlay(text)) {
        faults.push(format!(
            "runtime {name:?}: overlay = {overlay:?} is not none, or root: or all: with memory, self or dir=/PATH"
        ));
    }
    let file_access = parse_option(runtime, "file_access", faults);
    // With shared file access, runsc requires that there is no overlay, which would hide changes of the files below it.
    let overlay = match (file_access, overlay) {
        (Some(FileAccess::Shared), None) => Some("none".to_owned()),
        (Some(FileAccess::Shared), Some(overlay)) if overlay != "none" => {
            faults.push(format!(
                "runtime {name:?}: overlay = {overlay:?} and file_access = \"shared\" exclude each other; remove one of them"
            ));
            None
        }
        (_, overlay) => overlay,
    };
    let flags = block.list("flags").unwrap_or_default().to_vec();
    for problem in flags.iter().filter_map(|flag| check_flag(flag).err()) {
        faults.push(format!("runtime {name:?}: flags: {problem}"));
    }
    GvisorSettings {
        platform: parse_option(runtime, "platform", faults),
        network: parse_option(runtime, "network", faults).unwrap_or_default(),
        overlay,
        file_access,
        cgroups: block.flag("cgroups").unwrap_or(true),
        debug_log: block.non_empty_text("debug_log").map(PathBuf::from),
        flags,
    }
}

/// Says whether runsc's `--overlay2` accepts this text, which may end with `,size=`.
fn is_overlay(text: &str) -> bool {
    let Some((mounts, medium)) = text.split_once(':') else { return false };
    let medium = medium.split(",size=").next().unwrap_or_default();
    matches!(mounts, "root" | "all") && (matches!(medium, "memory" | "self") || medium.starts_with("dir=/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shims_are_found_by_containerds_rule() {
        assert_eq!(shim_for_runtime("io.containerd.runsc.v1"), Some("containerd-shim-runsc-v1".into()));
        assert_eq!(shim_for_runtime("io.containerd.kata.v2"), Some("containerd-shim-kata-v2".into()));
        assert_eq!((shim_for_runtime("io.containerd.runc.v2"), shim_for_runtime("runsc")), (None, None));
    }

    #[test]
    fn overlays_have_runscs_format() {
        for good in ["root:self", "all:memory", "root:dir=/var/tmp", "root:self,size=2g"] {
            assert!(is_overlay(good), "{good}");
        }
        for bad in ["", "self", "root:", "some:self", "root:dir=x"] {
            assert!(!is_overlay(bad), "{bad}");
        }
    }
}
