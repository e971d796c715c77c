//! The history of a run, line by line, and the warnings of its plugins.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How many of the plugins' last log lines are shown after a failure.
const WARNINGS: usize = 40;

/// The lines of the history, each with the time since the beginning of the run.
pub(crate) struct History {
    began: Instant,
    lines: Mutex<Vec<String>>,
    /// Warnings and errors of all plugins, each once.
    warnings: Mutex<Vec<String>>,
}

impl History {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now(), lines: Mutex::default(), warnings: Mutex::default() }
    }

    /// The time since the beginning of the run.
    pub(crate) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    pub(crate) fn note(&self, what: &str) {
        let line = format!("{:8.3} {what}", self.now().as_secs_f64());
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps those lines of a plugin's log that are warnings.
    pub(crate) fn listen_to(&self, log: &str) {
        let mut warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        for line in log.lines() {
            if let Some(warning) = warning(line).filter(|warning| !warnings.contains(warning)) {
                warnings.push(warning);
            }
        }
    }

    /// The plugins' last warnings and errors.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        warnings[warnings.len().saturating_sub(WARNINGS)..].to_vec()
    }
}

/// The text of a warning or error, if this line of a plugin's log is one.
fn warning(line: &str) -> Option<String> {
    let Ok(entry) = serde_json::from_str::<serde_json::Value>(line) else {
        return line.contains("panicked").then(|| line.to_owned());
    };
    let of = |key: &str| entry[key].as_str().unwrap_or_default();
    let is_severe = matches!(of("@level"), "warn" | "error") && !of("@message").contains("failpoint");
    is_severe.then(|| format!("{} {} {} {}{}", of("@level"), of("@message"), of("task"), of("error"), of("problem")))
}
