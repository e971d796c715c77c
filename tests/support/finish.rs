//! The end of each environment. A test ends its environment with `Env::finish`; if the test panics or forgets that, the
//! environment's drop does the rest. Either way the leak check runs, and a failure shows the plugin's last log lines.

use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    thread::panicking,
};

use nomad_driver_shim::pb::driver::DestroyTaskRequest;
use tokio::{runtime::Handle, task::block_in_place};

use super::{Env, leak, modes, patience};

/// The number of log lines that a failure shows.
const LAST_LINES: usize = 40;

impl Env {
    /// Checks that nothing is left, shuts the plugin down, and checks again.
    pub(crate) async fn finish(mut self) {
        self.check_and_shut_down().await;
        self.is_finished = true;
    }

    /// Leaves the leak check out, for a test that leaves something on purpose and removes it itself.
    pub(crate) fn skip_leak_check(&mut self) {
        self.is_finished = true;
    }

    async fn check_and_shut_down(&mut self) {
        if self.plugin.is_some() {
            let leaks = leak::while_alive(self).await;
            assert!(leaks.is_empty(), "left while the plugin lives: {leaks:#?}");
            let open = modes::open_to_others(self);
            assert!(open.is_empty(), "open to other users: {open:#?}");
        }
        if let Some(plugin) = self.plugin.take() {
            let left = plugin.shut_down_within(patience() / 30).await;
            self.earlier_log.push_str(&left.stderr);
            let succeeded = left.status.is_some_and(|status| status.success());
            assert!(succeeded, "the plugin's end: {:?} after {:?}", left.status, left.took);
        }
        let leaks = leak::afterwards(self).await;
        assert!(leaks.is_empty(), "left after the plugin: {leaks:#?}");
    }

    /// Destroys all tasks for which StartTask was called, as far as the plugin still does that.
    pub(crate) async fn destroy_all(&self) {
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        let Some(plugin) = &self.plugin else { return };
        let destroyed = async {
            for task_id in asked {
                let _ = plugin.driver().destroy_task(DestroyTaskRequest { task_id, force: true }).await;
            }
        };
        // A plugin that hangs would hang for each task.
        let _ = tokio::time::timeout(patience(), destroyed).await;
    }

    /// Removes what a failed test has left. Returns what a developer needs to see of it: the plugin's last log lines,
    /// and what was still there after all tasks were destroyed and the plugin was shut down.
    async fn clean_up_after_failure(&mut self) -> String {
        // The lines of the clean-up itself are not shown.
        let log = self.log();
        self.destroy_all().await;
        if let Some(plugin) = self.plugin.take() {
            plugin.shut_down().await;
        }
        let leaks = leak::afterwards(self).await;
        leak::remove(self).await;
        let directory = self.dir.display();
        format!(
            "the plugin's last log lines ({directory}):\n{}\nleft by the failed test ({directory}): {leaks:#?}",
            last_lines(&log, LAST_LINES)
        )
    }

    /// What all plugins of this environment have logged so far.
    fn log(&self) -> String {
        let current = self.plugin.as_ref().map(nomad_driver_shim::host::Plugin::stderr).unwrap_or_default();
        format!("{}{current}", self.earlier_log)
    }
}

impl Drop for Env {
    fn drop(&mut self) {
        // The leak checker does not know where another driver keeps its files.
        if self.is_finished || self.foreign {
            return;
        }
        let checked = if panicking() {
            Ok(())
        } else {
            let checked = wait_for(self.check_and_shut_down());
            if checked.is_ok() {
                return;
            }
            checked
        };
        match wait_for(self.clean_up_after_failure()) {
            Ok(report) => eprintln!("{report}"),
            Err(_) => eprintln!("the clean-up after the failed test has panicked ({})", self.dir.display()),
        }
        if let Err(panic) = checked {
            resume_unwind(panic);
        }
    }
}

/// Blocks this thread for as long as the future needs, and catches the future's panic.
fn wait_for<T>(future: impl Future<Output = T>) -> std::thread::Result<T> {
    catch_unwind(AssertUnwindSafe(|| block_in_place(|| Handle::current().block_on(future))))
}

/// Returns the last `count` lines of a text.
fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
