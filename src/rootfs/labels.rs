//! The SELinux labels of a task's processes and files, by docker's rules (opencontainers/selinux, `go-selinux/label`):
//! the policy's file `lxc_contexts` names them, a task has two categories of its own, and `security_opt = ["label=..."]`
//! changes them.

use std::{fs, path::Path};

use super::selinux;

/// The parts of a label that a job can set, by docker's names.
const PARTS: [&str; 5] = ["user", "role", "type", "level", "filetype"];
/// The categories of the files of tasks without a process label, as docker's: no task with a label has them.
const UNLABELLED_LEVEL: &str = "s0:c1022,c1023";
/// The file system through which SELinux is controlled.
const CONTROL: &str = "/sys/fs/selinux/enforce";
/// The label of this process.
const OWN_LABEL: &str = "/proc/self/attr/current";
const CONFIG: &str = "/etc/selinux/config";

/// What a job's `security_opt = ["label=..."]` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelRequest {
    /// `label=disable`: the task's processes have no label of their own.
    pub is_disabled: bool,
    /// The parts that the job sets, each with its name.
    parts: Vec<(&'static str, String)>,
}

impl LabelRequest {
    /// Returns the request for no process label.
    pub fn disabled() -> Self {
        Self { is_disabled: true, ..Self::default() }
    }

    /// Adds one option: the text behind `label=`.
    ///
    /// # Errors
    /// Returns a description of what is wrong with it.
    pub fn add(&mut self, text: &str) -> Result<(), String> {
        if text == "disable" {
            self.is_disabled = true;
            return Ok(());
        }
        let (name, value) = text.split_once(':').unwrap_or((text, ""));
        let known = PARTS.iter().find(|part| **part == name);
        // A label is a list of words with colons, which only the level may have.
        let is_fine = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c) || name == "level" && ":,".contains(c);
        match known {
            Some(part) if !value.is_empty() && value.chars().all(is_fine) => {
                self.parts.retain(|(other, _)| other != part);
                self.parts.push((part, value.to_owned()));
                Ok(())
            }
            Some(part) => Err(format!("{value:?} is not a {part} of a SELinux label")),
            None => Err("the SELinux options are label=disable, and label=user:, role:, type:, level: or filetype: with a value".to_owned()),
        }
    }

    /// Tells whether the job asks for other labels than the policy's.
    pub fn is_set(&self) -> bool {
        self.is_disabled || !self.parts.is_empty()
    }

    fn part(&self, name: &str) -> Option<&str> {
        self.parts.iter().find(|(part, _)| *part == name).map(|(_, value)| value.as_str())
    }
}

/// The labels of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// The label of the task's processes; `None` leaves them the runtime's.
    pub process: Option<String>,
    /// The label of the task's files.
    pub files: String,
}

/// The labels that the policy has for containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyLabels {
    process: Label,
    files: Label,
}

/// A label's parts: user, role, type and level.
type Label = [String; 4];

impl PolicyLabels {
    /// Reads them from the policy of this host. `None` if SELinux is not enabled or the policy has none; as in docker,
    /// SELinux without a policy does not count.
    pub fn of_this_host() -> Option<Self> {
        let own = fs::read_to_string(OWN_LABEL).unwrap_or_default();
        let is_enabled = Path::new(CONTROL).exists() && !own.trim_end_matches(['\0', '\n']).is_empty();
        if !is_enabled || own.trim_end_matches(['\0', '\n']) == "kernel" {
            return None;
        }
        let config = fs::read_to_string(CONFIG).ok()?;
        let policy = assigned(&config, "SELINUXTYPE")?;
        Self::parse(&fs::read_to_string(format!("/etc/selinux/{policy}/contexts/lxc_contexts")).ok()?)
    }

    /// Parses `lxc_contexts`: lines such as `process = "system_u:system_r:container_t:s0"`.
    fn parse(text: &str) -> Option<Self> {
        Some(Self { process: label(&assigned(text, "process")?)?, files: label(&assigned(text, "file")?)? })
    }

    /// Returns the labels of a task. `task` is a number of its own, from which its categories follow.
    pub fn of_task(&self, request: &LabelRequest, task: u64) -> Labels {
        let (mut process, mut files) = (self.process.clone(), self.files.clone());
        if request.is_disabled {
            UNLABELLED_LEVEL.clone_into(&mut files[3]);
            return Labels { process: None, files: files.join(":") };
        }
        let level = selinux::level_of_task(task);
        (process[3], files[3]) = (level.clone(), level);
        for (at, name) in ["user", "role", "type", "level"].into_iter().enumerate() {
            if let Some(value) = request.part(name) {
                value.clone_into(&mut process[at]);
                // As in docker, the files have the job's user and level, too, but a role and a type of their own.
                if name == "user" || name == "level" {
                    value.clone_into(&mut files[at]);
                }
            }
        }
        if let Some(kind) = request.part("filetype") {
            kind.clone_into(&mut files[2]);
        }
        Labels { process: Some(process.join(":")), files: files.join(":") }
    }
}

/// Returns the value of `NAME=value` or `name = "value"`; lines that begin with `#` are comments.
fn assigned(text: &str, name: &str) -> Option<String> {
    let pairs = text.lines().filter(|line| !line.trim_start().starts_with('#')).filter_map(|line| line.split_once('='));
    let mut values = pairs.filter(|(key, _)| key.trim() == name);
    values.next_back().map(|(_, value)| value.trim().trim_matches('"').to_owned())
}

fn label(text: &str) -> Option<Label> {
    let mut parts = text.splitn(4, ':').map(str::to_owned);
    Some([parts.next()?, parts.next()?, parts.next()?, parts.next()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXTS: &str = "process = \"system_u:system_r:container_t:s0\"\ncontent = \"system_u:object_r:virt_var_lib_t:s0\"\n\
        # file = \"none\"\nfile = \"system_u:object_r:container_file_t:s0\"\n";

    fn labels(options: &[&str]) -> Labels {
        let mut request = LabelRequest::default();
        options.iter().for_each(|option| request.add(option).expect("an option"));
        PolicyLabels::parse(CONTEXTS).expect("labels").of_task(&request, 5 + 9 * 1024)
    }

    #[test]
    fn a_task_has_the_policys_labels_with_categories_of_its_own() {
        let own = labels(&[]);
        assert_eq!(own.process.as_deref(), Some("system_u:system_r:container_t:s0:c5,c10"));
        assert_eq!(own.files, "system_u:object_r:container_file_t:s0:c5,c10");
    }

    #[test]
    fn a_job_sets_parts_of_its_labels() {
        let own = labels(&["type:spc_t", "level:s0:c1,c2", "user:u", "role:r"]);
        assert_eq!(own.process.as_deref(), Some("u:r:spc_t:s0:c1,c2"));
        assert_eq!(own.files, "u:object_r:container_file_t:s0:c1,c2");
        assert_eq!(labels(&["filetype:usr_t"]).files, "system_u:object_r:usr_t:s0:c5,c10");
        // The last of several options counts.
        assert_eq!(labels(&["level:s1", "level:s2"]).files, "system_u:object_r:container_file_t:s2");
    }

    #[test]
    fn without_a_process_label_the_files_belong_to_no_other_task() {
        let own = labels(&["type:spc_t", "disable"]);
        assert_eq!((own.process, own.files.as_str()), (None, "system_u:object_r:container_file_t:s0:c1022,c1023"));
    }

    #[test]
    fn other_options_are_refused() {
        for (option, words) in [
            ("", "label=disable"),
            ("types:x", "label=disable"),
            ("type:", "is not a type"),
            ("type:a:b", "is not a type"),
            ("level:s0 x", "is not a level"),
            ("user:a\"b", "is not a user"),
        ] {
            let problem = LabelRequest::default().add(option).expect_err(option);
            assert!(problem.contains(words), "{option}: {problem}");
        }
    }

    #[test]
    fn a_policy_without_labels_for_containers_has_none() {
        for text in ["", "process = \"a:b:c:s0\"", "process = \"a:b\"\nfile = \"a:b:c:s0\""] {
            assert_eq!(PolicyLabels::parse(text), None, "{text}");
        }
        assert_eq!(assigned("# SELINUXTYPE=a\nSELINUXTYPE=targeted\n", "SELINUXTYPE").as_deref(), Some("targeted"));
    }
}
