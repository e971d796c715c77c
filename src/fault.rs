//! Switches by which tests take out a step, to see that the checks notice. Compiled out of release builds.

/// Is the step `name` to be left out? Set `NOMAD_DRIVER_SHIM_SKIP` to a comma-separated list of step names.
#[cfg(debug_assertions)]
pub fn skipped(name: &str) -> bool {
    let skipped = std::env::var("NOMAD_DRIVER_SHIM_SKIP").is_ok_and(|list| list.split(',').any(|entry| entry == name));
    if skipped {
        tracing::warn!(step = name, "left out by the fault switch");
    }
    skipped
}

/// Never, in a release build.
#[cfg(not(debug_assertions))]
pub const fn skipped(_name: &str) -> bool {
    false
}
