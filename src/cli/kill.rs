//! `kill`: sends a signal to a task. If the driver has a live plugin, the plugin sends the signal, and so knows that
//! the task was stopped. Otherwise this command sends the signal through the task's shim.

use clap::Args;

use super::{CliError, CommonArgs, tasks};
use crate::{
    control::{ANSWER_TIMEOUT, Request, send_request},
    task::{parse_signal, signal_without_engine},
};

/// Send a signal to a task, or kill the whole task
#[derive(Args, Debug)]
pub(crate) struct Kill {
    /// The task: its id, its name, its container's id, or the beginning of its allocation's id
    task: String,
    /// The signal, which goes to the task's first process; without this option the whole task is killed
    #[arg(long, short)]
    signal: Option<String>,
}

impl Kill {
    /// Sends the signal.
    ///
    /// # Errors
    /// Fails when the task does not exist or can't be reached, or the signal does not exist.
    pub(crate) async fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        let tasks::FoundTask { places, record, .. } = tasks::find_task(common, &self.task)?;
        let number = self.signal.as_deref().map(parse_signal).transpose()?;
        let request = Request::Kill { task: record.intent.task_id.0.clone(), signal: self.signal };
        match send_request(&places.control(), &request, ANSWER_TIMEOUT).await {
            Err(error) if error.no_plugin_listens() => signal_without_engine(&places, &record, number).await?,
            other => drop(other?),
        }
        Ok(0)
    }
}
