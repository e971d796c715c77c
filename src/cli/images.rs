//! `images`: lists the images in the store, and which of them can be started without a call to containerd or a
//! registry.

use std::collections::HashMap;

use clap::Args;
use serde_json::json;

use super::{CliError, CommonArgs, ContainerdSession, print_data, table};

/// List images
#[derive(Args, Debug)]
pub(crate) struct Images {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Images {
    /// Prints the list.
    ///
    /// # Errors
    /// Fails when containerd does not answer, or output fails.
    pub(crate) async fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        let store = ContainerdSession::open(common).await?;
        let outcome = self.list(&store, common).await;
        store.close().await;
        outcome
    }

    async fn list(&self, store: &ContainerdSession, common: &CommonArgs) -> Result<u8, CliError> {
        let ready: HashMap<String, u64> =
            store.images(common)?.records().iter().map(|record| (record.reference.clone(), record.size)).collect();
        let mut images = store.client.images().await?;
        images.sort_by(|a, b| a.0.cmp(&b.0));
        if self.json {
            let list: Vec<_> = images
                .iter()
                .map(|(name, target)| {
                    json!({
                        "name": name, "digest": target.digest, "media_type": target.media_type,
                        "size": ready.get(name), "ready": ready.contains_key(name),
                    })
                })
                .collect();
            print_data(&format!("{}\n", json!(list)))?;
            return Ok(0);
        }
        let rows: Vec<Vec<String>> = images
            .iter()
            .map(|(name, target)| {
                let digest = target.digest.trim_start_matches("sha256:");
                let size =
                    ready.get(name).map_or_else(|| "-".to_owned(), |size| indicatif::HumanBytes(*size).to_string());
                let is_ready = if ready.contains_key(name) { "yes" } else { "no" };
                vec![name.clone(), digest.chars().take(12).collect(), size, is_ready.to_owned()]
            })
            .collect();
        print_data(&table::render(&["IMAGE", "DIGEST", "SIZE", "READY"], &rows))?;
        Ok(0)
    }
}
