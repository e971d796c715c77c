//! `kill`: a signal to a task. Its live plugin is asked, so that it knows; without one the shim is.

use clap::Args;

use super::{CliError, Common, tasks};
use crate::{
    control::{PATIENCE, Request, ask},
    task::{kill_alone, parse_signal},
};

/// Send a signal to a task, or kill all of it
#[derive(Args, Debug)]
pub struct Kill {
    /// The task: its id or name, its container's id, or the beginning of its allocation's
    task: String,
    /// The signal, for its first process; without it the whole task is killed
    #[arg(long, short)]
    signal: Option<String>,
}

impl Kill {
    /// Sends it.
    ///
    /// # Errors
    /// When the task is not there or can't be reached, or no such signal is.
    pub async fn execute(self, common: &Common) -> Result<u8, CliError> {
        let tasks::Found { places, record, .. } = tasks::one(common, &self.task)?;
        let number = self.signal.as_deref().map(parse_signal).transpose()?;
        let request = Request::Kill { task: record.task_id.0.clone(), signal: self.signal };
        match ask(&places.control(), &request, PATIENCE).await {
            Err(error) if error.is_nobody() => kill_alone(&places, &record, number).await?,
            other => drop(other?),
        }
        Ok(0)
    }
}
