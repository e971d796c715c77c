//! `doctor`: shows what this host supports, what is missing, and how to fix it.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use clap::Args;
use serde_json::json;

use super::{
    CliError, CommonArgs,
    advisories::{self, Program},
    print_data,
};
use crate::{
    cgroup::{CgroupMode, Cgroups},
    containerd::Client,
    process::{async_command, bounded_output},
    task::{
        APPARMOR_PREFIX, AppArmorHost, AppArmorSupport, FilterForm, PARSER_PACKAGE, probe_crun, probe_runsc, which,
    },
};

/// How long a program may take to print its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(5);

/// Show what this host supports
#[derive(Args, Debug)]
pub(crate) struct Doctor {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One finding about this host: a subject, such as a program, with a verdict.
struct Finding {
    what: &'static str,
    verdict: Verdict,
    detail: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The host has it.
    Good,
    /// The host lacks it, or there is something to know about it. The driver works nevertheless.
    Note,
    /// The host lacks it, and the driver does not work without it.
    Bad,
}

impl Verdict {
    fn label(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Note => "note",
            Self::Bad => "MISSING",
        }
    }
}

impl Doctor {
    /// Prints the findings; returns 1 if something is missing that every start needs.
    ///
    /// # Errors
    /// Fails when output fails.
    pub(crate) async fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        let findings = examine(common).await;
        let bad = findings.iter().any(|finding| finding.verdict == Verdict::Bad);
        if self.json {
            let list: Vec<_> = findings
                .iter()
                .map(|finding| json!({ "what": finding.what, "verdict": finding.verdict.label(), "detail": finding.detail }))
                .collect();
            print_data(&format!("{}\n", json!(list)))?;
        } else {
            let line =
                |finding: &Finding| format!("{:8} {:12} {}\n", finding.verdict.label(), finding.what, finding.detail);
            print_data(&findings.iter().map(line).collect::<String>())?;
        }
        Ok(u8::from(bad))
    }
}

/// All findings, in the order in which they are printed.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, what: &'static str, (verdict, detail): (Verdict, String)) {
        self.0.push(Finding { what, verdict, detail });
    }

    /// Adds a note about the known vulnerabilities of this version of a program, if it has any.
    fn advise(&mut self, program: Program, version: &str) {
        if let Some(note) = advisories::note(program, version) {
            self.add("advisories", (Verdict::Note, note));
        }
    }
}

async fn examine(common: &CommonArgs) -> Vec<Finding> {
    let mut findings = Findings::default();
    findings.add("root", root());
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    findings.add("kernel", (Verdict::Good, kernel.trim().to_owned()));
    findings.add("cgroups", cgroups());
    findings.add("overlayfs", overlayfs());
    findings.add("AppArmor", apparmor(&AppArmorHost::default()));
    findings.add("shim", shim().await);
    let runc = which(Path::new("runc"));
    examine_runc(runc.as_deref(), &mut findings).await;
    examine_crun(runc.is_some(), &mut findings).await;
    // youki is never the default runtime, but an operator may have configured it.
    if let Some(path) = which(Path::new("youki")) {
        findings.advise(Program::Youki, &version(&path, "--version").await);
    }
    findings.add("runsc", runsc().await);
    examine_containerd(common, &mut findings).await;
    findings.0
}

fn root() -> (Verdict, String) {
    match nix::unistd::geteuid().is_root() {
        true => (Verdict::Good, "yes".into()),
        false => (Verdict::Bad, "no: containers, mounts and cgroups need root; use sudo".into()),
    }
}

fn cgroups() -> (Verdict, String) {
    match Cgroups::detect() {
        Ok(cgroups) if cgroups.mode() == CgroupMode::V2 => (Verdict::Good, "version 2".into()),
        Ok(cgroups) if !cgroups.hierarchies().is_empty() => (
            Verdict::Note,
            "version 1 or hybrid: works; the first start after a pause may take 8 to 16 ms longer than on version 2"
                .into(),
        ),
        Ok(_) => (Verdict::Bad, "none mounted below /sys/fs/cgroup".into()),
        Err(error) => (Verdict::Bad, crate::error_chain(&error)),
    }
}

fn overlayfs() -> (Verdict, String) {
    match std::fs::read_to_string("/proc/filesystems").unwrap_or_default().contains("\toverlay\n") {
        true => (Verdict::Good, "yes".into()),
        false => (Verdict::Bad, "not in /proc/filesystems; load the module: modprobe overlay".into()),
    }
}

async fn shim() -> (Verdict, String) {
    match which(Path::new("containerd-shim-runc-v2")) {
        Some(path) => (Verdict::Good, format!("{} {}", path.display(), version(&path, "-v").await)),
        None => (Verdict::Bad, "containerd-shim-runc-v2 is not in PATH; install containerd".into()),
    }
}

async fn examine_runc(path: Option<&Path>, findings: &mut Findings) {
    let Some(path) = path else { return findings.add("runc", (Verdict::Note, "not in PATH".into())) };
    let version = version(path, "--version").await;
    findings.add("runc", (Verdict::Good, format!("{} {version}", path.display())));
    findings.advise(Program::Runc, &version);
}

/// Adds what is found about crun. Without runc, no task starts unless crun works.
async fn examine_crun(has_runc: bool, findings: &mut Findings) {
    let Some(path) = which(Path::new("crun")) else {
        let finding = match has_runc {
            true => (Verdict::Note, "not in PATH; with crun, starts take half the time of starts with runc".into()),
            false => (Verdict::Bad, "neither crun nor runc is in PATH; install crun".into()),
        };
        return findings.add("crun", finding);
    };
    let version = version(&path, "--version").await;
    let works = match Cgroups::detect() {
        Ok(cgroups) => probe_crun(&path, &std::env::temp_dir(), &cgroups).await,
        Err(error) => Err(crate::error_chain(&error)),
    };
    let finding = match works {
        Ok(form) => {
            let filters = match form {
                FilterForm::Program => "takes compiled seccomp filters",
                FilterForm::Profile => "does not take compiled seccomp filters: starts take some 10 ms longer",
            };
            (Verdict::Good, format!("{} {version}; the default runtime; {filters}", path.display()))
        }
        Err(problem) => {
            let verdict = if has_runc { Verdict::Note } else { Verdict::Bad };
            (verdict, format!("installed, but does not work on this host: {problem}"))
        }
    };
    findings.add("crun", finding);
    findings.advise(Program::Crun, &version);
}

async fn runsc() -> (Verdict, String) {
    let Some(path) = which(Path::new("runsc")) else {
        return (Verdict::Note, "not in PATH; with runsc, tasks can run in gVisor sandboxes".into());
    };
    match probe_runsc(&path).await {
        Ok(probed) => {
            let detail =
                format!("{} {}; sandboxes run with platform {}", path.display(), probed.version, probed.platform);
            (Verdict::Good, detail)
        }
        Err(problem) => (Verdict::Note, format!("installed, but no sandbox runs on this host: {problem}")),
    }
}

async fn examine_containerd(common: &CommonArgs, findings: &mut Findings) {
    let address = common.address.clone().unwrap_or_else(|| PathBuf::from("/run/containerd/containerd.sock"));
    if let Ok((version, _)) = Client::new(&address, &common.namespace, "overlayfs").version().await {
        findings.add("containerd", (Verdict::Good, format!("{version} at {}", address.display())));
        findings.advise(Program::Containerd, &version);
        return;
    }
    let finding = match which(Path::new("containerd")) {
        Some(path) => (
            Verdict::Note,
            format!(
                "no containerd answers at {}; run and pull start a private one ({}), but the plugin needs one that runs",
                address.display(),
                path.display()
            ),
        ),
        None => (
            Verdict::Bad,
            format!("no containerd answers at {}, and none is in PATH; install containerd", address.display()),
        ),
    };
    findings.add("containerd", finding);
}

/// Returns whether tasks get an AppArmor profile on this host, and what to do if they get none.
fn apparmor(host: &AppArmorHost) -> (Verdict, String) {
    let without = "tasks run without a profile";
    let (parser, loaded) = match (host.support(), host.parser(), host.loaded()) {
        (support @ AppArmorSupport::Disabled, ..) => return (Verdict::Note, format!("{support}; {without}")),
        (support @ AppArmorSupport::NoSecurityFs, ..) => {
            let remedy = "mount -t securityfs securityfs /sys/kernel/security";
            return (Verdict::Note, format!("enabled, but {support}: {without}; {remedy}"));
        }
        (AppArmorSupport::Enabled, _, Err(error)) => {
            return (
                Verdict::Note,
                format!("enabled; the list of loaded profiles can't be read: {}", crate::error_chain(&error)),
            );
        }
        (AppArmorSupport::Enabled, parser, Ok(loaded)) => (parser, loaded),
    };
    let own: Vec<_> = loaded.into_iter().filter(|name| name.starts_with(APPARMOR_PREFIX)).collect();
    let own = if own.is_empty() { "none of this driver's yet".to_owned() } else { own.join(", ") };
    match parser {
        Some(parser) => (Verdict::Good, format!("enabled; {} loads profiles; loaded: {own}", parser.display())),
        None => (
            Verdict::Note,
            format!(
                "enabled, but apparmor_parser is not in PATH: {without} unless their profile is loaded already (loaded: {own}); install {PARSER_PACKAGE}"
            ),
        ),
    }
}

/// Returns the first word of a program's output that looks like a version; an empty text for a program that prints none or
/// does not end in time.
async fn version(program: &Path, flag: &str) -> String {
    let mut command = async_command(program);
    command.arg(flag).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(VERSION_TIMEOUT, bounded_output(&mut command)).await;
    let text = match output {
        Ok(Ok(output)) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Ok(Err(_)) | Err(_) => String::new(),
    };
    let is_version = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.');
    text.split_whitespace().map(|word| word.trim_start_matches('v')).find(is_version).unwrap_or_default().to_owned()
}
