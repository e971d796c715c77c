//! The arguments and the environment of a task's process.

use std::collections::BTreeMap;

use super::RootfsError;
use crate::ids::Flavor;

/// The `PATH` of images that set none, as in containerd and docker.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Whether a task has a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Terminal {
    /// The task has a terminal, which the shim holds open.
    Yes,
    /// The task has no terminal.
    No,
}

/// The `TERM` of processes with a terminal, as in docker.
pub(crate) const DEFAULT_TERM: &str = "TERM=xterm";

/// The job's options for the command. `command` and `entrypoint` exclude each other, which has been checked before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Command {
    /// The option `command`, which replaces the image's CMD.
    pub command: Option<String>,
    /// The option `args`. The arguments follow `command` or `entrypoint`; without either they replace the image's CMD.
    pub args: Vec<String>,
    /// The option `entrypoint`, which replaces the image's ENTRYPOINT and CMD. An empty first element only clears both.
    pub entrypoint: Vec<String>,
}

/// Returns the argument vector, by docker's rules.
///
/// # Errors
/// Fails when no command results.
pub(crate) fn arguments(job: &Command, entrypoint: &[String], cmd: &[String]) -> Result<Vec<String>, RootfsError> {
    let mut arguments = Vec::new();
    if let Some(first) = job.entrypoint.first() {
        if !first.is_empty() {
            arguments.extend_from_slice(&job.entrypoint);
        }
        arguments.extend_from_slice(&job.args);
    } else {
        arguments.extend_from_slice(entrypoint);
        match &job.command {
            Some(command) => {
                arguments.push(command.clone());
                arguments.extend_from_slice(&job.args);
            }
            None if !job.args.is_empty() => arguments.extend_from_slice(&job.args),
            None => arguments.extend_from_slice(cmd),
        }
    }
    if arguments.first().is_none_or(String::is_empty) { Err(RootfsError::NoCommand) } else { Ok(arguments) }
}

/// Variables that a process has if neither the image nor the task sets them, as with docker.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EnvironmentDefaults<'a> {
    /// `HOSTNAME`.
    pub hostname: &'a str,
    /// `HOME`: the user's home directory.
    pub home: &'a str,
    /// Whether the process has a terminal, whose type is `TERM`.
    pub terminal: Terminal,
}

impl EnvironmentDefaults<'_> {
    fn entries(self) -> impl Iterator<Item = String> {
        let own = [("HOSTNAME", self.hostname), ("HOME", self.home)].map(|(name, value)| format!("{name}={value}"));
        let term = (self.terminal == Terminal::Yes).then(|| DEFAULT_TERM.to_owned());
        [DEFAULT_PATH.to_owned()].into_iter().chain(own).chain(term)
    }
}

/// Returns the environment: the defaults, overridden by the image's variables, and these by the task's. With
/// `Flavor::ContainerdDriver` the image's `PATH` is kept.
pub(crate) fn environment(
    defaults: EnvironmentDefaults<'_>,
    image: &[String],
    task: &BTreeMap<String, String>,
    flavor: Flavor,
) -> Vec<String> {
    let key = |entry: &str| entry.split('=').next().unwrap_or(entry).to_owned();
    let is_of_image = |default: &String| image.iter().any(|entry| key(entry) == key(default));
    let mut merged: Vec<String> = defaults.entries().filter(|default| !is_of_image(default)).collect();
    merged.extend(image.iter().cloned());
    for (name, value) in task {
        if name == "PATH" && flavor == Flavor::ContainerdDriver {
            continue;
        }
        let entry = format!("{name}={value}");
        match merged.iter_mut().find(|existing| key(existing) == *name) {
            Some(existing) => *existing = entry,
            None => merged.push(entry),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn arguments_follow_dockers_matrix() {
        let run = |command: Option<&str>, args: &str, entrypoint: &str| {
            let job = Command { command: command.map(str::to_owned), args: words(args), entrypoint: words(entrypoint) };
            arguments(&job, &words("/entry -e"), &words("cmd -c")).expect("something to run").join(" ")
        };
        assert_eq!(run(None, "", ""), "/entry -e cmd -c");
        assert_eq!(run(None, "a b", ""), "/entry -e a b");
        assert_eq!(run(Some("x"), "", ""), "/entry -e x");
        assert_eq!(run(Some("x"), "a", ""), "/entry -e x a");
        assert_eq!(run(None, "a", "/other"), "/other a");
        assert_eq!(run(None, "", "/other o"), "/other o");
        let cleared = Command { entrypoint: vec![String::new()], args: words("only args"), command: None };
        assert_eq!(arguments(&cleared, &words("/entry"), &words("cmd")).expect("args"), words("only args"));
        assert!(matches!(arguments(&Command::default(), &[], &[]), Err(RootfsError::NoCommand)));
    }

    #[test]
    fn the_task_overrides_the_image_except_for_path_under_the_name_containerd_driver() {
        let task = BTreeMap::from([("PATH".to_owned(), "/job".to_owned()), ("A".to_owned(), "2".to_owned())]);
        let image = ["PATH=/image".to_owned(), "A=1".to_owned(), "B=1".to_owned()];
        let defaults = EnvironmentDefaults { hostname: "name", home: "/", terminal: Terminal::No };
        let merged = |flavor| environment(defaults, &image, &task, flavor).join(" ");
        assert_eq!(merged(Flavor::Strict), "HOSTNAME=name HOME=/ PATH=/job A=2 B=1");
        assert_eq!(merged(Flavor::ContainerdDriver), "HOSTNAME=name HOME=/ PATH=/image A=2 B=1");
    }

    #[test]
    fn dockers_variables_are_set_unless_the_image_or_the_task_sets_them() {
        let defaults = EnvironmentDefaults { hostname: "name", home: "/home/user", terminal: Terminal::Yes };
        let merged = |image: &str, task: &[(&str, &str)]| {
            let task = task.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            environment(defaults, &words(image), &task, Flavor::Strict).join(" ")
        };
        assert_eq!(merged("", &[]), format!("{DEFAULT_PATH} HOSTNAME=name HOME=/home/user TERM=xterm"));
        assert_eq!(merged("HOSTNAME=a HOME=/b PATH=/c TERM=d", &[]), "HOSTNAME=a HOME=/b PATH=/c TERM=d");
        let task = [("HOSTNAME", "x"), ("TERM", "vt100"), ("HOME", "/y")];
        assert_eq!(merged("PATH=/c", &task), "HOSTNAME=x HOME=/y TERM=vt100 PATH=/c");
    }
}
