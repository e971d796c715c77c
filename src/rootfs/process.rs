//! The process's arguments and environment.

use std::collections::BTreeMap;

use super::RootfsError;
use crate::ids::Flavor;

/// What containerd and docker give an image that sets none.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a job says about the command. `command` and `entrypoint` exclude each other, which is checked before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Command {
    /// Replaces the image's CMD.
    pub command: Option<String>,
    /// Follows `command` or `entrypoint`; alone it replaces CMD.
    pub args: Vec<String>,
    /// Replaces the image's ENTRYPOINT and CMD. One whose first element is empty only clears them.
    pub entrypoint: Vec<String>,
}

/// The argument vector, by docker's rules.
///
/// # Errors
/// When nothing is left to run.
pub fn arguments(job: &Command, entrypoint: &[String], cmd: &[String]) -> Result<Vec<String>, RootfsError> {
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

/// The environment: the image's, then the task's on top. Under the old driver's name the image's `PATH` stays.
pub fn environment(image: &[String], task: &BTreeMap<String, String>, flavor: Flavor) -> Vec<String> {
    let key = |entry: &str| entry.split('=').next().unwrap_or(entry).to_owned();
    let mut merged: Vec<String> = Vec::with_capacity(image.len() + task.len() + 1);
    if !image.iter().any(|entry| entry.starts_with("PATH=")) {
        merged.push(DEFAULT_PATH.to_owned());
    }
    merged.extend(image.iter().cloned());
    for (name, value) in task {
        if name == "PATH" && flavor == Flavor::DropIn {
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
    fn the_task_wins_but_the_old_name_keeps_the_images_path() {
        let task = BTreeMap::from([("PATH".to_owned(), "/job".to_owned()), ("A".to_owned(), "2".to_owned())]);
        let image = ["PATH=/image".to_owned(), "A=1".to_owned(), "B=1".to_owned()];
        assert_eq!(environment(&image, &task, Flavor::Secure), ["PATH=/job", "A=2", "B=1"]);
        assert_eq!(environment(&image, &task, Flavor::DropIn), ["PATH=/image", "A=2", "B=1"]);
        assert_eq!(environment(&[], &BTreeMap::new(), Flavor::Secure), [DEFAULT_PATH]);
    }
}
