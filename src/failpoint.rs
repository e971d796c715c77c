//! Failpoints: environment variables by which tests skip a step of the driver, let a step fail, or end the plugin in
//! the middle of one. Tests check by these that the leak checker notices a missing step, and that the next plugin
//! recovers from a crash. Release builds contain none of this.

/// Returns whether the step `name` is to be skipped: whether it is in `NOMAD_DRIVER_SHIM_SKIP`, a comma-separated list.
#[cfg(debug_assertions)]
pub fn skip(name: &str) -> bool {
    let skipped = std::env::var("NOMAD_DRIVER_SHIM_SKIP").is_ok_and(|list| list.split(',').any(|entry| entry == name));
    if skipped {
        tracing::warn!(step = name, "a failpoint skipped a step");
    }
    skipped
}

/// Always returns false in a release build.
#[cfg(not(debug_assertions))]
pub const fn skip(_name: &str) -> bool {
    false
}

/// Returns the boot id in `NOMAD_DRIVER_SHIM_BOOT_ID`, which this process uses instead of the kernel's. Tests simulate
/// a restart of the host by it.
#[cfg(debug_assertions)]
pub fn boot_id() -> Option<String> {
    std::env::var("NOMAD_DRIVER_SHIM_BOOT_ID").ok()
}

/// Always returns `None` in a release build: the kernel's boot id is used.
#[cfg(not(debug_assertions))]
pub const fn boot_id() -> Option<String> {
    None
}

/// Kills this process with SIGKILL if `NOMAD_DRIVER_SHIM_KILL_AT` names this failpoint. If `NOMAD_DRIVER_SHIM_PANIC_AT`
/// names it, the first call panics.
#[cfg(debug_assertions)]
#[allow(clippy::print_stderr, clippy::panic, reason = "tests look for these messages")]
pub fn kill_at(name: &str) {
    static PANICKED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    if std::env::var("NOMAD_DRIVER_SHIM_PANIC_AT").is_ok_and(|point| point == name)
        && !PANICKED.swap(true, std::sync::atomic::Ordering::SeqCst)
    {
        panic!("at {name} by a failpoint");
    }
    if std::env::var("NOMAD_DRIVER_SHIM_KILL_AT").is_ok_and(|point| point == name) {
        eprintln!("killed at {name} by a failpoint");
        // SAFETY: sends a signal to this process; no memory is passed.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
pub const fn kill_at(_name: &str) {}

/// Kills this process as `kill_at` does, but from another thread and after `delay`, so that the caller is in the middle
/// of its next step.
#[cfg(debug_assertions)]
#[allow(clippy::disallowed_methods, reason = "a thread of its own sleeps")]
pub fn kill_after(name: &'static str, delay: std::time::Duration) {
    if std::env::var("NOMAD_DRIVER_SHIM_KILL_AT").is_ok_and(|point| point == name) {
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            kill_at(name);
        });
    }
}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
pub const fn kill_after(_name: &'static str, _delay: std::time::Duration) {}

/// Waits to be killed by the thread of `kill_after`, in case the caller was quicker than that thread.
#[cfg(debug_assertions)]
#[allow(clippy::disallowed_methods, reason = "this process is about to be killed")]
pub fn wait_for_kill(name: &str) {
    while std::env::var("NOMAD_DRIVER_SHIM_KILL_AT").is_ok_and(|point| point == name) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
pub const fn wait_for_kill(_name: &str) {}

/// Lets a look-up of the system's state (a directory's listing, `/proc`) fail as in a process without free descriptors,
/// if `NOMAD_DRIVER_SHIM_BLIND`, a comma-separated list, contains `name`.
///
/// # Errors
/// Fails with EMFILE when the list contains `name`.
#[cfg(debug_assertions)]
pub fn fail_lookup(name: &str) -> std::io::Result<()> {
    if std::env::var("NOMAD_DRIVER_SHIM_BLIND").is_ok_and(|list| list.split(',').any(|entry| entry == name)) {
        tracing::warn!(look = name, "a failpoint let a look-up fail");
        return Err(std::io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok(())
}

/// Does nothing in a release build.
///
/// # Errors
/// Never fails.
#[cfg(not(debug_assertions))]
pub const fn fail_lookup(_name: &str) -> std::io::Result<()> {
    Ok(())
}

/// Breaks a rule of the start path, which has to do without fsync, connections to containerd and further processes, if
/// `NOMAD_DRIVER_SHIM_INTRUDE` says so: `fsync`, `connect` or `process`. Tests check by this that the trace of a start
/// notices such a violation.
#[cfg(debug_assertions)]
pub fn violate(containerd: &std::path::Path) {
    let outcome = match std::env::var("NOMAD_DRIVER_SHIM_INTRUDE").as_deref() {
        Ok("fsync") => std::fs::File::open("/").and_then(|root| root.sync_all()),
        Ok("connect") => std::os::unix::net::UnixStream::connect(containerd).map(drop),
        Ok("process") => std::process::Command::new("true").status().map(drop),
        _ => return,
    };
    tracing::warn!(?outcome, "a failpoint broke a rule of the start path");
}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
pub const fn violate(_containerd: &std::path::Path) {}
