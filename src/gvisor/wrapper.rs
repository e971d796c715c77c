//! The wrapper script that adds runsc's flags, and the configuration file of gVisor's own shim.

use std::path::Path;

use super::supervisor;

/// The shim that calls a wrapper script.
#[derive(Debug, Clone, Copy)]
pub enum Caller<'a> {
    /// runc's shim, which has no sandbox supervisor.
    Runc {
        /// Whether `runsc delete` has to be called for a sandbox that has ended, because it does more than the task's
        /// teardown: it runs hooks, or removes files that are not the task's own.
        needs_delete: bool,
    },
    /// gVisor's own shim, for which a sandbox supervisor saves the exit codes of sandboxes.
    Own {
        /// The path of this program, which contains the sandbox supervisor.
        supervisor: &'a Path,
    },
}

/// Returns the text of the script that a shim calls instead of runsc.
pub fn wrapper(binary: &Path, flags: &[String], caller: Caller<'_>) -> String {
    let flags: String = flags.iter().map(|word| format!(" {}", quoted(word))).collect();
    let runsc = quoted(&binary.to_string_lossy());
    let cases = match caller {
        Caller::Own { supervisor: path } => {
            let path = quoted(&path.to_string_lossy());
            let supervised = format!("[ -x {path} ] && exec {path} {} {runsc}{flags} -- \"$@\"", supervisor::COMMAND);
            format!("for word; do case $word in create|wait|delete) {supervised};; esac; done\n")
        }
        Caller::Runc { needs_delete } => {
            let delete = if needs_delete { "" } else { DELETE_CASE };
            format!(
                "file= log= last= run=\n\
                 for word; do case $last in --pid-file) file=$word;; --log) log=$word;; esac; last=$word; done\n\
                 case \" $* \" in\n{delete}{CREATE_CASE}{EXEC_CASE}esac\n"
            )
        }
    };
    format!(
        "#!/bin/sh\n# Made by nomad-driver-shim; runsc with the flags of its runtime block.\n\
         # Shims have few processors; sandboxes would inherit that.\n\
         unset GOMAXPROCS\n{cases}exec {runsc}{flags} \"$@\"\n"
    )
}

/// Skips `runsc delete` for a sandbox that has ended. The task's teardown removes everything that it would remove, and
/// without it a destroy takes 15 ms less CPU time.
const DELETE_CASE: &str = "*\" --force \"*) ;;\n\
    *\" delete \"*) [ -n \"$log\" ] && { read -r pid < \"${log%/*}/init.pid\" || [ -n \"$pid\" ]; } && ! kill -0 \"$pid\" && exit 0 ;;\n";

/// Replaces `create` by `run --detach`, so that one call creates a sandbox and starts its process. This driver would
/// call `start` as soon as `create` is done, and each call costs 10 ms of CPU time before it does anything.
const CREATE_CASE: &str = "*\" create \"*)\n\
    for word; do shift; [ \"$word\" = create ] && [ -z \"$run\" ] && run=--detach && set -- \"$@\" run \"$run\" || set -- \"$@\" \"$word\"\n\
    done ;;\n";

/// Makes runsc write the pid that an exec'd process has in its sandbox to a file for this driver. runc's shim has only
/// the pid of the runsc that waits for the process, and would kill that runsc.
const EXEC_CASE: &str = "*\" exec \"*)\n\
    for word; do shift; set -- \"$@\" \"$word\"\n\
    [ \"$word\" = exec ] && [ -n \"$file\" ] && set -- \"$@\" --internal-pid-file \"$file.inside\"\n\
    done ;;\n";

/// Returns the configuration of gVisor's own shim, which calls the wrapper script as its runsc. The flags are in the
/// script.
///
/// # Errors
/// Fails when a path can't be written in TOML.
pub fn shim_config(wrapper: &Path, root: &Path) -> Result<String, toml::ser::Error> {
    #[derive(serde::Serialize)]
    struct Config<'a> {
        binary_name: &'a Path,
        root: &'a Path,
    }
    toml::to_string(&Config { binary_name: wrapper, root })
}

/// Quotes a word for sh(1).
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNC: Caller<'_> = Caller::Runc { needs_delete: false };

    #[test]
    fn a_wrapper_passes_all_arguments_on_unchanged() {
        let odd = ["a b", "it's", "$HOME", "`id`", "\"", "\\"].map(str::to_owned);
        let script = wrapper(Path::new("/usr/bin/printf"), &["%s|".to_owned()], RUNC);
        let output = std::process::Command::new("sh").arg("-c").arg(&script).arg("sh").args(&odd).output();
        assert_eq!(String::from_utf8_lossy(&output.expect("runs").stdout), odd.map(|word| word + "|").concat());
    }

    #[test]
    fn an_exec_writes_its_pid_in_the_sandbox() {
        let script = wrapper(Path::new("/bin/echo"), &["-n".to_owned()], RUNC);
        let run = |words: &str| {
            let words = words.split(' ');
            let output = std::process::Command::new("sh").arg("-c").arg(&script).arg("sh").args(words).output();
            String::from_utf8_lossy(&output.expect("runs").stdout).into_owned()
        };
        let asked = "--root /r exec --process /p --detach --pid-file /b/x.pid c1";
        assert_eq!(run(asked), asked.replace("exec ", "exec --internal-pid-file /b/x.pid.inside "));
        assert_eq!(run("--root /r delete c1"), "--root /r delete c1");
        // `create` becomes `run --detach`.
        let created = "--root /r create --bundle /create --pid-file /b/init.pid create";
        assert_eq!(run(created), created.replacen("create", "run --detach", 1));
    }

    #[test]
    fn runsc_is_not_called_to_delete_an_ended_sandbox() {
        let directory = tempfile::tempdir().expect("a directory");
        let run = |deletes: bool, force: &str| {
            let script = wrapper(Path::new("/bin/echo"), &["-n".to_owned()], Caller::Runc { needs_delete: deletes });
            let log = directory.path().join("log.json");
            let words = format!("--root /r --log {} delete{force} c1", log.display());
            let output =
                std::process::Command::new("sh").arg("-c").arg(&script).arg("sh").args(words.split(' ')).output();
            let output = output.expect("runs");
            assert!(output.status.success());
            String::from_utf8_lossy(&output.stdout).contains("delete")
        };
        assert!(run(false, ""), "without a pid file the sandbox may live");
        std::fs::write(directory.path().join("init.pid"), std::process::id().to_string()).expect("written");
        assert!(run(false, ""), "the sandbox lives");
        let mut child = std::process::Command::new("true").spawn().expect("runs");
        child.wait().expect("reaped");
        // runsc writes the pid without a line break.
        std::fs::write(directory.path().join("init.pid"), child.id().to_string()).expect("written");
        assert!(!run(false, ""));
        assert!(run(true, "") && run(false, " --force"), "hooks and forced deletes need runsc");
    }
}
