//! A program that takes the place of an OCI runtime and takes longer. A runtime's call takes some milliseconds, so that
//! a kill would fall into it only by luck. With the wrapper it falls into the call reliably.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::{
    step::Call,
    support::{self, services::run},
};

/// The directory with the wrapper programs, and with the files that say how long their calls take.
pub(crate) struct Wrappers(PathBuf);

impl Wrappers {
    /// Writes the wrapper programs below `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        let this = Self(dir.join("wrappers"));
        fs::create_dir_all(&this.0).unwrap();
        for runtime in ["crun", "runc"] {
            let found = run(std::process::Command::new("sh").args(["-c", &format!("command -v {runtime}")]));
            // The runtime dies with the wrapper that has called it, as it dies with the shim otherwise, whose go-runc
            // sets PdeathSignal (containerd/go-runc: command_linux.go). The wrapper itself only waits after the call.
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

    /// The part of the plugin's configuration that makes it use the wrappers.
    pub(crate) fn config(&self) -> Value {
        let of = |runtime: &str| json!({"binary": self.0.join(runtime)});
        json!({"crun": of("crun"), "runc": of("runc")})
    }

    /// Makes calls of this kind take longer from now on.
    pub(crate) fn stretch(&self, call: Call, before_ms: u64, after_ms: u64) {
        let seconds = |ms: u64| if ms == 0 { "0".to_owned() } else { format!("{}.{:03}", ms / 1000, ms % 1000) };
        let path = self.0.join(call.word());
        let draft = path.with_extension("draft");
        fs::write(&draft, format!("{} {}\n", seconds(before_ms), seconds(after_ms))).unwrap();
        fs::rename(draft, path).unwrap();
    }
}
