//! `pull`: pulls an image into the store, with a progress bar for each layer on a terminal.

use std::{collections::HashMap, time::Duration};

use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use super::{CliError, CommonArgs, ContainerdSession, gc::StoreLock, is_interactive, parse_image, print_data};
use crate::{
    ids::Digest,
    image::{CredentialScope, Credentials, Progress, PullEvent, PullPolicy, PullRequest},
};

/// Pull an image
#[derive(Args, Debug)]
pub(crate) struct Pull {
    /// The image's name
    image: String,
    /// Registry credentials, USER:PASSWORD
    #[arg(long, value_name = "USER:PASSWORD", env = "NOMAD_DRIVER_SHIM_AUTH", hide_env_values = true)]
    auth: Option<String>,
    /// Give up after this many seconds
    #[arg(long, default_value_t = 1800)]
    timeout: u64,
}

impl Pull {
    /// Pulls the image, and prints its name and digest.
    ///
    /// # Errors
    /// Fails when the image can't be pulled.
    pub(crate) async fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        let reference = parse_image(&self.image)?;
        let _lock = StoreLock::shared(common)?;
        let credentials = match self.auth.as_deref().map(|pair| pair.split_once(':')) {
            None => None,
            Some(Some((username, password))) => {
                // The user chooses the image as well, so the image's registry may see the password.
                let scope = CredentialScope::ImageRegistry;
                Some(Credentials { username: username.to_owned(), password: password.to_owned(), scope })
            }
            Some(None) => return Err(CliError::Usage("--auth needs USER:PASSWORD".to_owned())),
        };
        let store = ContainerdSession::open(common).await?;
        let outcome = async {
            let images = store.images(common)?;
            let progress = if is_interactive() { bars() } else { Progress::default() };
            let request = PullRequest {
                reference,
                credentials,
                opened: None,
                policy: PullPolicy::default(),
                timeout: Duration::from_secs(self.timeout),
                progress,
            };
            let record = images.pull(request).await.map_err(CliError::Image)?;
            print_data(&format!("{}@{}\n", record.reference, record.digest))?;
            Ok(0)
        };
        let outcome = outcome.await;
        store.close().await;
        outcome
    }
}

/// Shows a progress bar for each layer, and a line for the unpacking.
fn bars() -> Progress {
    let all = MultiProgress::new();
    let style = ProgressStyle::with_template("{prefix:12} {wide_bar} {bytes:>10} / {total_bytes:10}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    let layers: Mutex<HashMap<Digest, ProgressBar>> = Mutex::default();
    let unpacking = all.add(ProgressBar::new_spinner());
    Progress::with_listener(move |event| match event {
        PullEvent::Resolved(digest) => unpacking.set_message(format!("{digest}")),
        PullEvent::Layer { digest, done, size } => {
            let mut layers = layers.lock();
            let bar = layers.entry(digest).or_insert_with_key(|digest| {
                let bar = all.insert_before(&unpacking, ProgressBar::new(size).with_style(style.clone()));
                bar.set_prefix(digest.short().to_owned());
                bar
            });
            bar.set_position(done);
            if done >= size {
                bar.finish();
            }
        }
        PullEvent::Unpacked(done, all) => {
            unpacking.set_message(format!("unpacked {done} of {all}"));
            if done == all {
                unpacking.finish();
            }
        }
    })
}
