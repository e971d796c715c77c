//! `inspect`: prints everything that is known about a task, as JSON.

use clap::Args;
use serde_json::{Value, json};

use super::{CliError, CommonArgs, print_data, ps, tasks};

/// Show everything that is known about a task
#[derive(Args, Debug)]
pub(crate) struct Inspect {
    /// The task: its id, its name, its container's id, or the beginning of its allocation's id
    task: String,
    /// Show the values of environment variables as well; they may be secrets
    #[arg(long)]
    env: bool,
}

impl Inspect {
    /// Prints the task.
    ///
    /// # Errors
    /// Fails when the task does not exist, or output fails.
    pub(crate) fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        let tasks::FoundTask { driver, places, record } = tasks::find_task(common, &self.task)?;
        let bundle = places.bundle(&record.intent.container_id);
        let spec = std::fs::read(bundle.join("config.json")).unwrap_or_default();
        let mut spec: Value = serde_json::from_slice(&spec).unwrap_or_default();
        if let (false, Some(env)) = (self.env, spec.pointer_mut("/process/env").and_then(Value::as_array_mut)) {
            for entry in env {
                let name = entry.as_str().and_then(|entry| entry.split('=').next()).unwrap_or_default();
                *entry = json!(format!("{name}=..."));
            }
        }
        let text = json!({
            "driver": driver,
            "state": ps::state(&record),
            "record": record,
            "shim": places.shim(&record.intent.shim),
            "bundle": bundle,
            "rootfs": places.rootfs(&record.intent.container_id),
            "spec": spec,
        });
        print_data(&format!("{}\n", serde_json::to_string_pretty(&text).unwrap_or_default()))?;
        Ok(0)
    }
}
