//! An OCI runtime that does something else first, or instead, in one of its calls.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nomad_driver_shim::task::which;
use serde_json::{Value, json};

use super::{eventually, script, services::root};

/// Sets the variables `root` and `id` from a runtime's arguments.
const ARGUMENTS: &str = r#"root=; id=; for word; do [ "$id" = --root ] && root=$word; id=$word; done"#;

/// What a wrapper does, as shell code, in its call `verb`: it runs `first`, creates the file `called`, runs `then`, and
/// executes the real runtime. In the code, `REAL` is the real runtime, `$root` and `$id` are from the call's arguments,
/// and `$dir` is the wrapper's directory.
pub(crate) struct Detour<'a> {
    pub(crate) verb: &'a str,
    pub(crate) first: &'a str,
    pub(crate) then: &'a str,
}

/// A wrapper around a runtime. It behaves like the real one unless it is armed.
pub(crate) struct WrappedRuntime {
    dir: PathBuf,
    name: String,
}

impl WrappedRuntime {
    /// Wraps a runtime under a name that the driver does not know. The shim starts containers' processes then.
    pub(crate) fn new(real: &str, detour: &Detour<'_>) -> Self {
        Self::named("wrapped", real, detour)
    }

    /// Wraps a runtime under its own name. The driver itself starts the processes of containers whose runtime it knows
    /// by name.
    pub(crate) fn under_its_own_name(real: &str, detour: &Detour<'_>) -> Self {
        Self::named(real, real, detour)
    }

    fn named(name: &str, real: &str, Detour { verb, first, then }: &Detour<'_>) -> Self {
        let dir = tempfile::tempdir_in(root()).unwrap().keep();
        let real = which(Path::new(real)).unwrap().display().to_string();
        let text = format!(
            "dir={dir}\n\
             case \" $* \" in *' {verb} '*) if [ -e $dir/armed ]; then {ARGUMENTS}\n{first}\ntouch $dir/called\n{then}\nfi;; esac\n\
             exec {real} \"$@\"",
            dir = dir.display(),
            first = first.replace("REAL", &real),
        );
        script(&dir.join(name), &text);
        Self { dir, name: name.to_owned() }
    }

    /// Adds the runtime to a plugin's configuration, as the default.
    pub(crate) fn configure(&self, mut config: Value) -> Value {
        config["default_runtime"] = json!(self.name);
        config["runtime"] = json!({self.name.as_str(): {"binary": self.dir.join(&self.name)}});
        config
    }

    /// The directory of the wrapper, in which its code may leave files.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the following calls take the detour.
    pub(crate) fn arm(&self) {
        fs::write(self.dir.join("armed"), "").unwrap();
    }

    /// Makes the following calls behave like those of the real runtime again.
    pub(crate) fn disarm(&self) {
        fs::remove_file(self.dir.join("armed")).unwrap();
    }

    /// Waits until the first part of a detour has been run.
    pub(crate) async fn called(&self) {
        let called = self.dir.join("called");
        eventually("the runtime is called", async || if called.exists() { Ok(()) } else { Err("not called") }).await;
    }

    /// Forgets that a detour has been taken.
    pub(crate) fn forget_call(&self) {
        fs::remove_file(self.dir.join("called")).unwrap();
    }
}

impl Drop for WrappedRuntime {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}
