//! `config check`: reports what a plugin would refuse in agent and job files, before they are submitted to Nomad.

mod hcl;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use ::hcl::{Body, eval::Context};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::{Value as Json, json};

use self::hcl::Content;
use super::{CliError, print_data, print_message};
use crate::{
    host,
    ids::{CONTAINERD_DRIVER_NAME, DriverName},
    plugin::{GroupNetwork, OptionRow, PLUGIN_OPTIONS, Presence, TASK_OPTIONS, hclspec, settings, task_options},
    task::Settings,
};

/// The driver's names, unless an operator has given it another one.
const DEFAULT_DRIVER_NAMES: [&str; 2] = ["shim", CONTAINERD_DRIVER_NAME];
/// The attribute with a task's driver. Where its value is not known, the task may be another driver's.
const DRIVER_ATTRIBUTE: &str = "driver";
/// The value that is checked instead of a required option's value, such as the image's name, that is not known.
const PLACEHOLDER: &str = "unknown";

/// Check configuration files
#[derive(Args, Debug)]
pub(crate) struct Config {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Subcommand, Debug)]
enum ConfigCommand {
    /// Check agent and job files (HCL) against the options of this driver
    Check(Check),
}

#[derive(Args, Debug)]
struct Check {
    /// Agent and job files. Jobs are checked against what the agent files given with them allow
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// An additional name of the driver
    #[arg(long, value_name = "NAME")]
    driver: Vec<String>,
    /// The value of a variable in the job files
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    var: Vec<(String, String)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it has no =")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// The result for the configuration of one plugin or task.
#[derive(Debug, Serialize)]
struct Finding {
    file: PathBuf,
    place: String,
    fault: Option<String>,
    /// What the plugin accepts, but is probably not meant.
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<String>,
    /// The options that were not checked, since their values are not known here.
    unknown: Vec<String>,
}

impl Config {
    /// Prints a verdict for each plugin and task. Returns 1 if a configuration has a fault.
    ///
    /// # Errors
    /// Fails when a file can't be read, or no file has anything for this driver.
    pub(crate) fn execute(self) -> Result<u8, CliError> {
        let ConfigCommand::Check(check) = self.command;
        let mut names: Vec<String> = DEFAULT_DRIVER_NAMES.map(str::to_owned).to_vec();
        names.extend(check.driver.clone());
        let mut checker = Checker { names, agents: BTreeMap::new(), findings: Vec::new() };
        let mut bodies = Vec::new();
        for file in &check.files {
            let text = std::fs::read_to_string(file)
                .map_err(|error| CliError::Usage(format!("could not read {}: {error}", file.display())))?;
            match ::hcl::parse(&text) {
                Ok(body) => bodies.push((file, body)),
                Err(error) => {
                    // Agents read HCL 1, in which line breaks have no meaning.
                    let hint =
                        "this command needs nested blocks and arguments on lines of their own, also in agent files";
                    let fault = format!("{}\n({hint})", error.to_string().trim());
                    checker.add(file, "HCL".to_owned(), Some(fault), Vec::new());
                }
            }
        }
        let declared = |name: &str| {
            bodies.iter().any(|(_, body)| hcl::labelled_blocks(body, "variable").any(|(own, _)| own == name))
        };
        let unknown = check.var.iter().find(|(name, _)| !declared(name));
        // A file that can't be parsed may declare the variable.
        if let Some((name, _)) = unknown.filter(|_| checker.findings.is_empty()) {
            return Err(CliError::Usage(format!("--var {name}: none of these files declares this variable")));
        }
        bodies.iter().for_each(|(file, body)| checker.check_agent_file(file, body));
        bodies.iter().for_each(|(file, body)| checker.check_jobs(file, body, &check.var));
        if checker.findings.is_empty() {
            let names = checker.names.join(", ");
            let problem =
                format!("nothing in these files is for this driver ({names}); give another name with --driver NAME");
            return Err(CliError::Usage(problem));
        }
        report(&checker.findings, check.json)?;
        Ok(u8::from(checker.findings.iter().any(|finding| finding.fault.is_some())))
    }
}

fn report(findings: &[Finding], as_json: bool) -> Result<(), CliError> {
    if as_json {
        return Ok(print_data(&format!("{}\n", json!(findings)))?);
    }
    for Finding { file, place, fault, warning, unknown } in findings {
        let skipped = if unknown.iter().any(|name| name == DRIVER_ATTRIBUTE) { "not checked" } else { "fine" };
        let verdict = fault.as_deref().unwrap_or(skipped);
        print_data(&format!("{}: {place}: {verdict}\n", file.display()))?;
        if let Some(warning) = warning {
            print_message(&format!("{}: {place}: warning: {warning}", file.display()));
        }
        for name in unknown {
            print_message(&format!("{}: {place}: {name} was not checked: its value is not known here", file.display()));
        }
    }
    Ok(())
}

/// The state of a check.
struct Checker {
    /// The driver's names.
    names: Vec<String>,
    /// The settings in agent files, by driver name; `None` where a driver's settings have a fault.
    agents: BTreeMap<String, Option<Settings>>,
    findings: Vec<Finding>,
}

impl Checker {
    fn add(&mut self, file: &Path, place: String, fault: Option<String>, unknown: Vec<String>) {
        self.findings.push(Finding { file: file.to_owned(), place, fault, warning: None, unknown });
    }

    /// Checks the plugin blocks of a file.
    fn check_agent_file(&mut self, file: &Path, body: &Body) {
        // Agent files have no variables.
        let scope = Context::new();
        for plugin in hcl::blocks(body, "plugin") {
            let label = hcl::label(plugin).unwrap_or_default();
            let Ok(of_label) = DriverName::from_argv0(label) else { continue };
            if !self.names.iter().any(|own| own == of_label.as_str()) {
                continue;
            }
            let place = format!("plugin {label:?}");
            let content = config(plugin.body(), PLUGIN_OPTIONS, &scope);
            let name = arguments(plugin.body(), &scope)
                .and_then(|args| DriverName::from_command_line(label, &args).map_err(|error| error.to_string()));
            let settings = name.clone().and_then(|name| read_settings(&name, content.known));
            let fault = settings.as_ref().err().cloned();
            let name = name.unwrap_or(of_label).to_string();
            self.names.push(name.clone());
            self.agents.insert(name, settings.ok());
            self.add(file, place, fault, content.unknown);
        }
    }

    /// Checks the tasks of a file.
    fn check_jobs(&mut self, file: &Path, body: &Body, variables: &[(String, String)]) {
        let scope = hcl::scope(body, variables);
        for kind in ["group", "task"] {
            for (name, _) in hcl::labelled_blocks(body, kind) {
                let fault = format!("Nomad accepts a {kind} block only inside of a job block");
                self.add(file, format!("{kind} {name:?}"), Some(fault), Vec::new());
            }
        }
        for (job, body) in hcl::labelled_blocks(body, "job") {
            // Nomad makes a group of the same name for a task that is directly in the job.
            for (task, body) in hcl::labelled_blocks(body, "task") {
                if let Some((fault, unknown)) = self.check_task(body, GroupNetwork::None, &scope) {
                    self.add(file, format!("task {job}/{task}"), fault, unknown);
                }
            }
            for (group, body) in hcl::labelled_blocks(body, "group") {
                let network = group_network(body, &scope);
                let unserved = unserved_request(body, network, &scope);
                for (task, body) in hcl::labelled_blocks(body, "task") {
                    if let Some((fault, unknown)) = self.check_task(body, network, &scope) {
                        let warning = unserved.filter(|_| !may_have_host_network(body, &scope)).map(|asked_for| {
                            format!("the task will have loopback only, although its group asks for {asked_for}; set network {{ mode = \"bridge\" }} in the group, or host_network = true in the task's config")
                        });
                        let place = format!("task {job}/{group}/{task}");
                        self.findings.push(Finding { file: file.to_owned(), place, fault, warning, unknown });
                    }
                }
            }
        }
    }

    /// Returns the fault of a task, if it has one, and the options whose values are not known. Returns `None` for
    /// another driver's task.
    fn check_task(
        &self,
        task: &Body,
        network: GroupNetwork,
        scope: &Context<'_>,
    ) -> Option<(Option<String>, Vec<String>)> {
        let Some(driver) = hcl::json(hcl::attribute(task, DRIVER_ATTRIBUTE)?, scope) else {
            return Some((None, vec![DRIVER_ATTRIBUTE.to_owned()]));
        };
        let driver = self.names.iter().find(|name| driver == name.as_str())?;
        let content = config(task, TASK_OPTIONS, scope);
        let checked = self.settings(driver).and_then(|settings| {
            let bytes = encoded(TASK_OPTIONS, content.known)?;
            task_options(&settings, network, &bytes).map_err(|error| error.to_string())
        });
        Some((checked.err(), content.unknown))
    }

    /// Returns the settings in an agent file, else the defaults.
    fn settings(&self, driver: &str) -> Result<Settings, String> {
        if let Some(settings) = self.agents.get(driver) {
            let refused = || format!("not checked: the agent's plugin block for {driver:?} has a fault");
            return settings.clone().ok_or_else(refused);
        }
        let name = DriverName::new(driver).map_err(|error| error.to_string())?;
        read_settings(&name, serde_json::Map::new())
    }
}

/// Returns the arguments with which the agent starts a plugin.
fn arguments(plugin: &Body, scope: &Context<'_>) -> Result<Vec<String>, String> {
    let Some(args) = hcl::attribute(plugin, "args") else { return Ok(Vec::new()) };
    let value = hcl::json(args, scope).unwrap_or_else(|| Json::from(args.to_string()));
    let list = serde_json::from_value(value.clone());
    list.map_err(|_| format!("args must be a list of texts, as in [\"--name\", \"NAME\"], not {value}"))
}

fn read_settings(name: &DriverName, known: serde_json::Map<String, Json>) -> Result<Settings, String> {
    settings(name, &encoded(PLUGIN_OPTIONS, known)?).map_err(|error| error.to_string())
}

/// Returns the content of the `config` block, with a placeholder for required options whose values are not known.
fn config(body: &Body, rows: &[OptionRow], scope: &Context<'_>) -> Content {
    let block = hcl::blocks(body, "config").next();
    let mut content = block.map(|block| Content::of(block.body(), scope)).unwrap_or_default();
    let required = rows.iter().filter(|row| row.presence == Presence::Required).map(|row| row.name);
    for name in required.filter(|name| content.unknown.iter().any(|unknown| unknown == name)) {
        content.known.insert(name.to_owned(), Json::from(PLACEHOLDER));
    }
    content
}

/// Encodes options as Nomad sends them.
fn encoded(rows: &[OptionRow], known: serde_json::Map<String, Json>) -> Result<Vec<u8>, String> {
    host::encode(Some(&hclspec(rows)), &Json::Object(known)).map_err(|error| error.to_string())
}

/// Returns whether Nomad makes a network namespace for a group: it does for every network mode other than `host`.
fn group_network(group: &Body, scope: &Context<'_>) -> GroupNetwork {
    let network = hcl::blocks(group, "network").next();
    let mode = network.and_then(|network| hcl::json(hcl::attribute(network.body(), "mode")?, scope));
    match mode.as_ref().and_then(Json::as_str) {
        None | Some("" | "host") => GroupNetwork::None,
        Some(_) => GroupNetwork::Namespace,
    }
}

/// Returns what a group asks for that needs a network, if its tasks have none of the group's own. Nothing is said where
/// the mode of the network is not known.
fn unserved_request(group: &Body, network: GroupNetwork, scope: &Context<'_>) -> Option<&'static str> {
    let networks = || hcl::blocks(group, "network").map(::hcl::Block::body);
    let is_known = |body: &Body| hcl::attribute(body, "mode").is_none_or(|mode| hcl::json(mode, scope).is_some());
    if network == GroupNetwork::Namespace || !networks().all(is_known) {
        return None;
    }
    if networks().any(|body| hcl::labelled_blocks(body, "port").next().is_some()) {
        return Some("ports");
    }
    let has_connect = |service: &::hcl::Block| hcl::blocks(service.body(), "connect").next().is_some();
    hcl::blocks(group, "service").any(has_connect).then_some("Consul Connect")
}

/// Whether a task has, or may have, the host's network: the option may have a value that is not known here.
fn may_have_host_network(task: &Body, scope: &Context<'_>) -> bool {
    let options = hcl::blocks(task, "config").filter_map(|config| hcl::attribute(config.body(), "host_network"));
    options.into_iter().any(|value| hcl::json(value, scope).is_none_or(|value| value != Json::Bool(false)))
}
