//! Switches by which tests take out a step or end the plugin in the middle of one, to see that the checks notice and
//! that the next plugin copes. Compiled out of release builds.

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

/// The boot id that this process is to believe in: `NOMAD_DRIVER_SHIM_BOOT_ID` stands for a restart of the host.
#[cfg(debug_assertions)]
pub fn boot_id() -> Option<String> {
    std::env::var("NOMAD_DRIVER_SHIM_BOOT_ID").ok()
}

/// None, in a release build: the kernel's own holds.
#[cfg(not(debug_assertions))]
pub const fn boot_id() -> Option<String> {
    None
}

/// Ends this process with SIGKILL when `NOMAD_DRIVER_SHIM_KILL_AT` names this point, and panics here, the first time, when
/// `NOMAD_DRIVER_SHIM_PANIC_AT` does.
#[cfg(debug_assertions)]
#[allow(clippy::print_stderr, clippy::panic, reason = "the last word, which a test looks for")]
pub fn point(name: &str) {
    static PANICKED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    if std::env::var("NOMAD_DRIVER_SHIM_PANIC_AT").is_ok_and(|point| point == name)
        && !PANICKED.swap(true, std::sync::atomic::Ordering::SeqCst)
    {
        panic!("at {name} by the fault switch");
    }
    if std::env::var("NOMAD_DRIVER_SHIM_KILL_AT").is_ok_and(|point| point == name) {
        eprintln!("killed at {name} by the fault switch");
        // SAFETY: a signal to ourselves; no memory is passed.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
pub const fn point(_name: &str) {}

/// As `point`, a moment later, while the caller goes on: in the middle of what it does next.
#[cfg(debug_assertions)]
#[allow(clippy::disallowed_methods, reason = "a thread of its own")]
pub fn point_within(name: &'static str, delay: std::time::Duration) {
    if std::env::var("NOMAD_DRIVER_SHIM_KILL_AT").is_ok_and(|point| point == name) {
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            point(name);
        });
    }
}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
pub const fn point_within(_name: &'static str, _delay: std::time::Duration) {}

/// Waits for the end that `point_within` has promised, where the caller was quicker than the thread that brings it.
#[cfg(debug_assertions)]
#[allow(clippy::disallowed_methods, reason = "a process that is about to be killed")]
pub fn await_point(name: &str) {
    while std::env::var("NOMAD_DRIVER_SHIM_KILL_AT").is_ok_and(|point| point == name) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
pub const fn await_point(_name: &str) {}

/// Fails as in a process without free descriptors, when `NOMAD_DRIVER_SHIM_BLIND` has this look in its comma-separated
/// list.
///
/// # Errors
/// When it is in the list.
#[cfg(debug_assertions)]
pub fn look(name: &str) -> std::io::Result<()> {
    if std::env::var("NOMAD_DRIVER_SHIM_BLIND").is_ok_and(|list| list.split(',').any(|entry| entry == name)) {
        tracing::warn!(look = name, "refused by the fault switch");
        return Err(std::io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok(())
}

/// Nothing, in a release build.
///
/// # Errors
/// Never.
#[cfg(not(debug_assertions))]
pub const fn look(_name: &str) -> std::io::Result<()> {
    Ok(())
}

/// Does on the start path what must never be done there, when `NOMAD_DRIVER_SHIM_INTRUDE` says so: `fsync`, `connect` or
/// `process`.
#[cfg(debug_assertions)]
pub fn intrude(containerd: &std::path::Path) {
    let outcome = match std::env::var("NOMAD_DRIVER_SHIM_INTRUDE").as_deref() {
        Ok("fsync") => std::fs::File::open("/").and_then(|root| root.sync_all()),
        Ok("connect") => std::os::unix::net::UnixStream::connect(containerd).map(drop),
        Ok("process") => std::process::Command::new("true").status().map(drop),
        _ => return,
    };
    tracing::warn!(?outcome, "an intrusion by the fault switch");
}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
pub const fn intrude(_containerd: &std::path::Path) {}
