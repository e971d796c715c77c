//! A program in the place of an OCI runtime that takes longer: a kill that would have to be lucky to fall into a call of some
//! milliseconds finds its place.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::{
    step::Call,
    support::{self, services::run},
};

/// The programs, and how long their calls take.
pub(crate) struct Wrappers(PathBuf);

impl Wrappers {
    /// Writes them below `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        let this = Self(dir.join("wrappers"));
        fs::create_dir_all(&this.0).unwrap();
        for runtime in ["crun", "runc"] {
            let found = run(std::process::Command::new("sh").args(["-c", &format!("command -v {runtime}")]));
            // A runtime ends with the program that has called it, as with the shim itself, whose go-runc sets
            // PdeathSignal (containerd/go-runc: command_linux.go). What follows the call is the wrapper's.
            let text = format!(
                "before=0; after=0\n\
                 for word; do case $word in create|start|kill|delete|exec)\n\
                 [ -e {dir}/$word ] && read before after < {dir}/$word; break;; esac; done\n\
                 [ $before$after = 00 ] && exec {runtime} \"$@\"\n\
                 [ $before = 0 ] || sleep $before\n\
                 setpriv --pdeathsig KILL {runtime} \"$@\"\n\
                 code=$?\n\
                 [ $after = 0 ] || sleep $after\n\
                 exit $code",
                dir = this.0.display(),
                runtime = found.trim(),
            );
            support::script(&this.0.join(runtime), &text);
        }
        this
    }

    /// The plugin's configuration that has them used.
    pub(crate) fn config(&self) -> Value {
        let of = |runtime: &str| json!({"binary": self.0.join(runtime)});
        json!({"crun": of("crun"), "runc": of("runc")})
    }

    /// From now on these calls take longer.
    pub(crate) fn stretch(&self, call: Call, before_ms: u64, after_ms: u64) {
        let seconds = |ms: u64| if ms == 0 { "0".to_owned() } else { format!("{}.{:03}", ms / 1000, ms % 1000) };
        let path = self.0.join(call.word());
        let draft = path.with_extension("draft");
        fs::write(&draft, format!("{} {}\n", seconds(before_ms), seconds(after_ms))).unwrap();
        fs::rename(draft, path).unwrap();
    }
}
