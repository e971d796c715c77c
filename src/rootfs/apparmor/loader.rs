//! Loads the driver's own profile with `apparmor_parser`, outside of the start path.
//!
//! A plugin gives its profile to the kernel each time the plugin starts. The kernel skips a profile that is identical
//! to the loaded one ("same as current profile, skipping", security/apparmor/policy.c `aa_replace_profiles`). A
//! different one replaces it, for running tasks as well. Docker does the same since moby/moby#52537: changes to a
//! profile are fixes.
//!
//! A task's start reads the kernel's list of profiles. It waits for the parser only if the profile is missing: before
//! the first load after a boot, and after the profile was unloaded, which an upgrade of the apparmor package may do.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use parking_lot::Mutex;
use tokio::io::AsyncWriteExt as _;

use super::{AppArmorError, AppArmorHost, DriverProfile, ProfileName, Support};
use crate::process::async_command;

/// The time after which the parser is killed. It needs a few milliseconds for this profile, so it hangs if it takes
/// this long.
const PARSER_TIMEOUT: Duration = Duration::from_secs(30);
/// The time from the beginning of a failed load to the next one. It is longer than the parser's timeout, so that a
/// parser that hangs does not delay every start.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);
/// The largest part of the parser's error message that an error of this driver quotes, in characters.
const PARSER_ERROR_MAX: usize = 300;

/// Loads the driver's own profile on this host.
#[derive(Debug, Clone)]
pub struct Loader(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    host: AppArmorHost,
    profile: DriverProfile,
    parser_timeout: Duration,
    /// The latest load, which may still be running.
    last: Mutex<Option<ParserRun>>,
}

/// One call of the parser, shared by all callers that need the profile while it runs.
#[derive(Clone)]
struct ParserRun {
    began: Instant,
    outcome: Shared<BoxFuture<'static, Result<(), AppArmorError>>>,
}

impl std::fmt::Debug for ParserRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParserRun").field("began", &self.began).finish_non_exhaustive()
    }
}

impl Loader {
    /// Returns a loader for this profile. It loads nothing yet.
    pub fn new(host: AppArmorHost, profile: DriverProfile) -> Self {
        Self::with_parser_timeout(host, profile, PARSER_TIMEOUT)
    }

    fn with_parser_timeout(host: AppArmorHost, profile: DriverProfile, timeout: Duration) -> Self {
        Self(Arc::new(Inner { host, profile, parser_timeout: timeout, last: Mutex::default() }))
    }

    /// Returns the host that the profile is for.
    pub fn host(&self) -> &AppArmorHost {
        &self.0.host
    }

    /// Returns the profile's name.
    pub fn name(&self) -> &ProfileName {
        self.0.profile.name()
    }

    /// Gives the profile to the kernel, whether or not a profile of this name is loaded.
    ///
    /// # Errors
    /// Fails when the host has no AppArmor or no parser, and when the parser fails or hangs.
    pub async fn refresh(&self) -> Result<(), AppArmorError> {
        self.current_or_new_run().await
    }

    /// Makes sure that the profile is loaded. Starts no process if it is loaded already.
    ///
    /// # Errors
    /// Fails when the profile is missing and can't be loaded.
    pub async fn ensure(&self) -> Result<(), AppArmorError> {
        let support = self.host().support();
        if support != Support::Enabled {
            return Err(AppArmorError::Unsupported { profile: self.name().to_string(), support });
        }
        // The loop has two rounds, because the first may return the result of a load that ended before the profile was
        // unloaded.
        for _ in 0..2 {
            if self.host().is_loaded(self.name())? {
                return Ok(());
            }
            self.current_or_new_run().await?;
        }
        Ok(())
    }

    /// Returns the load that is running or has failed recently, or begins a new one. A load continues when its callers
    /// are cancelled.
    fn current_or_new_run(&self) -> impl Future<Output = Result<(), AppArmorError>> + use<> {
        let mut last = self.0.last.lock();
        let current = last.clone().filter(|run| match run.outcome.peek() {
            None => true,
            Some(outcome) => outcome.is_err() && run.began.elapsed() < RETRY_INTERVAL,
        });
        let run = current.unwrap_or_else(|| {
            let inner = self.0.clone();
            let profile = self.name().to_string();
            let load = tokio::spawn(async move { inner.load().await });
            let outcome = load.map(move |outcome| match outcome {
                Ok(outcome) => outcome,
                Err(error) => Err(AppArmorError::Load {
                    profile,
                    parser: PathBuf::from("apparmor_parser"),
                    problem: error.to_string(),
                }),
            });
            ParserRun { began: Instant::now(), outcome: outcome.boxed().shared() }
        });
        *last = Some(run.clone());
        run.outcome
    }
}

impl Inner {
    async fn load(&self) -> Result<(), AppArmorError> {
        let name = self.profile.name();
        let support = self.host.support();
        if support != Support::Enabled {
            return Err(AppArmorError::Unsupported { profile: name.to_string(), support });
        }
        let parser = self.host.parser().ok_or_else(|| AppArmorError::NoParser(name.to_string()))?;
        let text = self.profile.text(self.host.plugin_peer().as_ref(), self.host.abi());
        let failed =
            |problem: String| AppArmorError::Load { profile: name.to_string(), parser: parser.clone(), problem };
        match tokio::time::timeout(self.parser_timeout, run_parser(&parser, &text)).await {
            Err(_) => {
                return Err(failed(format!(
                    "it was killed because it had not ended after {} s",
                    self.parser_timeout.as_secs()
                )));
            }
            Ok(outcome) => outcome.map_err(failed)?,
        }
        if self.host.is_loaded(name)? {
            tracing::info!(profile = %name, "the AppArmor profile of this driver's tasks is loaded");
            Ok(())
        } else {
            Err(failed("it reported success, but the kernel does not list the profile".to_owned()))
        }
    }
}

/// Runs the parser. `-r` replaces a profile of the same name. `-K` bypasses the distribution's cache, which may be on a
/// read-only file system.
async fn run_parser(parser: &Path, text: &str) -> Result<(), String> {
    let mut command = async_command(parser);
    command.arg("-Kr").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    // The agent's environment may hold secrets, and the parser needs none of it.
    command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    let mut child = command.spawn().map_err(|error| format!("it can't be run: {error}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // If the parser ends before it has read everything, its own error message explains it.
        let _ = stdin.write_all(text.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{}: {}", output.status, parser_error_text(&output.stderr)))
}

/// Returns the beginning of the parser's error message, as one line without control characters.
fn parser_error_text(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ").chars().take(PARSER_ERROR_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::host::tests::host, *};
    use crate::ids::DriverName;
    use std::{fs, io::Write as _};

    const OWN: &str = "nomad-driver-shim-shim";
    /// A parser that works: the kernel's list then contains the profile from its input.
    const WORKS: &str = r#"sed -n 's/^profile "\([^"]*\)".*/\1 (enforce)/p' >> $LIST"#;

    struct Fake {
        directory: tempfile::TempDir,
        loader: Loader,
    }

    impl Fake {
        /// Makes a host whose parser is this shell script. Each call appends its pid to `calls`.
        fn new(parser: Option<&str>, loaded: &[&str], deadline: Duration) -> Self {
            let directory = tempfile::tempdir().expect("made");
            let path = directory.path();
            let host = host(path, loaded).expect("made");
            if let Some(script) = parser {
                let list = path.join("policy/profiles");
                let calls = path.join("calls");
                let text = format!("#!/bin/sh\nLIST={}\necho $$ >> {}\n{script}\n", list.display(), calls.display());
                install(&host.parser, &text);
            }
            let profile = DriverProfile::of(&DriverName::new("shim").expect("a name"));
            Self { loader: Loader::with_parser_timeout(host, profile, deadline), directory }
        }

        fn calls(&self) -> Vec<String> {
            let text = fs::read_to_string(self.directory.path().join("calls")).unwrap_or_default();
            text.lines().map(str::to_owned).collect()
        }
    }

    /// Writes a program with the help of another process. If this process had the file open for writing, a child
    /// process that another test forks at that moment would inherit the descriptor, and executing the file would fail
    /// (ETXTBSY).
    fn install(path: &Path, text: &str) {
        let mut command = std::process::Command::new("install");
        command.args(["-m", "755", "/dev/stdin"]).arg(path).stdin(Stdio::piped());
        let mut child = command.spawn().expect("started");
        child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("written");
        assert!(child.wait().expect("ended").success());
    }

    async fn refused(fake: &Fake) -> String {
        crate::error_chain(&fake.loader.ensure().await.expect_err("refused"))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_profile_is_loaded_once_and_again_when_it_is_gone() {
        let fake = Fake::new(Some(WORKS), &["other"], PARSER_TIMEOUT);
        let all = (0..8).map(|_| fake.loader.ensure());
        for outcome in futures_util::future::join_all(all).await {
            outcome.expect("loaded");
        }
        fake.loader.ensure().await.expect("it is loaded");
        assert_eq!(fake.calls().len(), 1);
        // All profiles are unloaded.
        let list = fake.directory.path().join("policy/profiles");
        fs::write(&list, "").expect("written");
        fake.loader.ensure().await.expect("loaded again");
        assert_eq!(fake.calls().len(), 2);
        // A cancelled start does not wait for its load. The success of that load must not count for the next start.
        fs::write(&list, "").expect("written");
        drop(fake.loader.current_or_new_run());
        let ended = async {
            // The load has a reference of its own.
            while Arc::strong_count(&fake.loader.0) > 1 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PARSER_TIMEOUT, ended).await.expect("the load continues without a caller");
        assert!(fake.loader.host().is_loaded(fake.loader.name()).expect("read"));
        fs::write(&list, "").expect("written");
        fake.loader.ensure().await.expect("loaded again");
        assert!(fake.loader.host().is_loaded(fake.loader.name()).expect("read"));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_loaded_profile_is_used_although_its_refresh_fails() {
        let fake = Fake::new(Some("exit 1"), &[OWN], PARSER_TIMEOUT);
        fake.loader.ensure().await.expect("it is loaded");
        assert_eq!(fake.calls().len(), 0, "no process for a loaded profile");
        assert!(fake.loader.refresh().await.is_err());
        fake.loader.ensure().await.expect("it is still loaded");
        assert_eq!(fake.calls().len(), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_failing_parser_is_quoted_and_not_called_again_at_once() {
        let script = r"printf 'syntax\terror \033[31m\nat line 7' >&2; exit 3";
        let fake = Fake::new(Some(script), &[], PARSER_TIMEOUT);
        let message = refused(&fake).await;
        for part in [OWN, "exit status: 3", "syntax error [31m at line 7", "security { apparmor = \"unconfined\" }"] {
            assert!(message.contains(part), "{part:?} in {message:?}");
        }
        assert!(!message.contains(char::is_control), "{message:?}");
        assert_eq!(refused(&fake).await, message);
        assert_eq!(fake.calls().len(), 1);
        let long = parser_error_text("x".repeat(100_000).as_bytes());
        assert_eq!(long.len(), PARSER_ERROR_MAX);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_parser_that_hangs_is_killed() {
        let fake = Fake::new(Some("exec sleep 600"), &[], Duration::from_millis(300));
        let message = refused(&fake).await;
        assert!(message.contains("killed because it had not ended after 0 s"), "{message}");
        let calls = fake.calls();
        let [pid] = &calls[..] else { panic!("{calls:?}") };
        let deadline = Instant::now() + Duration::from_secs(10);
        while Path::new("/proc").join(pid).exists() {
            assert!(Instant::now() < deadline, "the parser is still running");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn success_is_what_the_kernel_lists() {
        let message = refused(&Fake::new(Some("exit 0"), &["other"], PARSER_TIMEOUT)).await;
        assert!(message.contains("the kernel does not list the profile"), "{message}");
        let message = refused(&Fake::new(None, &[], PARSER_TIMEOUT)).await;
        assert!(message.contains("apparmor_parser is not in the plugin's PATH"), "{message}");
        let fake = Fake::new(Some(WORKS), &[], PARSER_TIMEOUT);
        fs::write(fake.directory.path().join("enabled"), "N").expect("written");
        let message = refused(&fake).await;
        assert!(message.contains("AppArmor is not enabled") && fake.calls().is_empty(), "{message}");
    }
}
