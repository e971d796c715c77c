//! `events`: prints the task events of live plugins as they happen.

use clap::Args;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use serde_json::json;

use super::{CliError, CommonArgs, print_data, print_message, tasks};
use crate::control::{Answer, Connection, ControlError, Request};

/// Print what happens to tasks, as it happens
#[derive(Args, Debug)]
pub(crate) struct Events {
    /// Print JSON, one object a line
    #[arg(long)]
    json: bool,
}

/// Formats a time by RFC 3339 in UTC.
fn format_time(millis: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(millis);
    prost_types::Timestamp::from(at).to_string()
}

impl Events {
    /// Prints events until interrupted, or until no plugin is left. The exit code is 1 if a plugin failed to send them.
    ///
    /// # Errors
    /// Fails when no plugin runs on this host, or output fails.
    pub(crate) async fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        let mut open = Vec::new();
        for (driver, places) in tasks::drivers(common)? {
            match Connection::open(&places.control(), &Request::Events).await {
                Ok(connection) => open.push((driver, connection)),
                Err(error) if error.no_plugin_listens() => {}
                Err(error) => print_message(&format!("nomad-driver-shim: {driver}: {}", crate::error_chain(&error))),
            }
        }
        if open.is_empty() {
            return Err(CliError::Usage("no plugin is running on this host".to_owned()));
        }
        print_message(&format!("nomad-driver-shim: listening to {} plugin(s)", open.len()));
        let next = |(driver, mut connection): (String, Connection)| async move {
            let answer = connection.next_answer().await;
            (driver, connection, answer)
        };
        let mut waiting: FuturesUnordered<_> = open.into_iter().map(next).collect();
        let mut exit_code = 0;
        while let Some((driver, connection, answer)) = waiting.next().await {
            let event = match answer {
                Ok(Some(Answer::Event(event))) => event,
                Ok(None) => {
                    print_message(&format!("nomad-driver-shim: {driver}: its plugin has ended"));
                    continue;
                }
                Ok(Some(other)) => {
                    let error = ControlError::unexpected(connection.path(), &other);
                    print_message(&format!("nomad-driver-shim: {driver}: {}", crate::error_chain(&error)));
                    exit_code = 1;
                    continue;
                }
                Err(error) => {
                    print_message(&format!("nomad-driver-shim: {driver}: {}", crate::error_chain(&error)));
                    exit_code = 1;
                    continue;
                }
            };
            if self.json {
                let mut line = json!(event);
                line["driver"] = json!(driver);
                print_data(&format!("{line}\n"))?;
            } else {
                let at = format_time(event.at);
                let alloc: String = event.alloc_id.chars().take(8).collect();
                print_data(&format!("{at}  {driver}  {alloc}  {}  {}\n", event.task_name, event.message))?;
            }
            waiting.push(next((driver, connection)));
        }
        Ok(exit_code)
    }
}
