//! `gc` and `rmi`: remove what is no longer needed. Live plugins clean up their own directories; these commands clean
//! up the directories of drivers without a live plugin, and the command line's own images.

use std::{fs::File, time::Duration};

use clap::Args;
use nix::fcntl::{Flock, FlockArg};

use super::{CliError, CommonArgs, ContainerdSession, parse_image, print_data, runs, table, tasks};
use crate::{
    control::{ANSWER_TIMEOUT, Answer, ControlError, Garbage, Request, send_request},
    files::create_private_dir,
    ids::DriverName,
    image::ImageError,
    places::Places,
    plugin,
    task::{AppArmorDefault, Settings, gc_offline},
};

/// Remove what is no longer needed: remains of tasks, unused images
#[derive(Args, Debug)]
pub(crate) struct Gc {
    /// Only show what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Keep images of `run` and `pull` that were used within this time
    #[arg(long, default_value = "24h", value_name = "DURATION")]
    keep: String,
    /// Without a live plugin: keep tasks that ended within this time, since their agent may come back and ask how they
    /// ended
    #[arg(long, default_value = "1h", value_name = "DURATION")]
    keep_ended: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Remove images
#[derive(Args, Debug)]
pub(crate) struct Rmi {
    /// The images' names
    #[arg(required = true)]
    images: Vec<String>,
}

/// The lock of the command line's image store: shared by commands that use images, exclusive for those that remove
/// images.
pub(crate) struct StoreLock(#[allow(dead_code, reason = "held until it is dropped")] Flock<File>);

impl StoreLock {
    /// Takes the lock together with other commands that use images.
    ///
    /// # Errors
    /// Fails when another command is removing images, or the file can't be created.
    pub(crate) fn shared(common: &CommonArgs) -> Result<Self, CliError> {
        Self::acquire(common, FlockArg::LockSharedNonblock)
    }

    fn exclusive(common: &CommonArgs) -> Result<Self, CliError> {
        Self::acquire(common, FlockArg::LockExclusiveNonblock)
    }

    fn acquire(common: &CommonArgs, how: FlockArg) -> Result<Self, CliError> {
        let directory = common.places("cli").state().to_owned();
        create_private_dir(&directory)?;
        let path = directory.join("lock");
        let file = File::options().create(true).append(true).open(&path)?;
        Flock::lock(file, how).map(Self).map_err(|(_, errno)| match errno {
            nix::Error::EWOULDBLOCK => CliError::Usage(format!(
                "another command uses the images of this command line ({}); try again when it has ended",
                path.display()
            )),
            other => CliError::Io(other.into()),
        })
    }
}

/// Makes an entry for a failure that concerns no single item.
fn failure_entry(error: &dyn std::error::Error) -> Garbage {
    Garbage::new("-", "-", Some(crate::error_chain(error)))
}

/// Cleans up the directories of a driver without a live plugin. The settings are those of the driver's last plugin, if
/// it has saved them, else this command's own.
async fn gc_without_plugin(
    common: &CommonArgs,
    driver: &str,
    places: Places,
    keep_ended: Duration,
    dry_run: bool,
) -> Vec<Garbage> {
    match settings(common, driver, places).map(|settings| gc_offline(settings, keep_ended, dry_run)) {
        Ok(removal) => match removal.await {
            Ok(Some(garbage)) => garbage,
            Ok(None) => {
                let why = "it holds the driver's lock and does not listen: it is just starting, or ending";
                vec![Garbage::kept("plugin", driver, why)]
            }
            Err(error) => vec![failure_entry(&error)],
        },
        Err(error) => vec![failure_entry(&error)],
    }
}

fn settings(common: &CommonArgs, driver: &str, places: Places) -> Result<Settings, CliError> {
    // The name only selects defaults that have an effect on starts.
    let name = DriverName::new(driver).or_else(|_| DriverName::new("shim"));
    let name = name.map_err(|error| CliError::Usage(error.to_string()))?;
    let mut settings = plugin::settings(&name, &[]).map_err(|error| CliError::Usage(error.to_string()))?;
    settings.places = places;
    settings.containerd.namespace.clone_from(&common.namespace);
    if let Some(address) = &common.address {
        settings.containerd.address.clone_from(address);
    }
    // Nothing is started, so no profile needs to be loaded.
    settings.security.apparmor = AppArmorDefault::Unconfined;
    Ok(settings)
}

/// Removes the sockets of plugins that were killed, from the directory that plugins with this command's environment
/// use.
fn gc_sockets(dry_run: bool) -> Vec<Garbage> {
    let abandoned = plugin::abandoned_sockets(&plugin::socket_directory()).into_iter();
    let removed = abandoned.map(|path| {
        let outcome = if dry_run { Ok(()) } else { plugin::remove_socket(&path) };
        let why = "the plugin that listened at it has ended";
        Garbage::removed("socket", &path.display().to_string(), &outcome).with_reason(why)
    });
    removed.collect()
}

impl Gc {
    /// Removes what is no longer needed, and prints what was removed.
    ///
    /// # Errors
    /// Fails when a plugin refuses, or output fails.
    pub(crate) async fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        let duration = |name: &str, text: &str| {
            crate::duration::parse(text).map_err(|error| CliError::Usage(format!("--{name}: {error}")))
        };
        let (keep, keep_ended) = (duration("keep", &self.keep)?, duration("keep-ended", &self.keep_ended)?);
        let mut found: Vec<(String, Garbage)> = Vec::new();
        let mut has_driver_without_plugin = false;
        for (driver, places) in tasks::drivers(common)? {
            let garbage =
                match send_request(&places.control(), &Request::Gc { dry_run: self.dry_run }, ANSWER_TIMEOUT).await {
                    Ok(Answer::Removed(garbage)) => garbage,
                    Ok(other) => vec![failure_entry(&ControlError::unexpected(&places.control(), &other))],
                    // If the lock is free, the plugin has ended during the request.
                    Err(error) if error.no_plugin_listens() || runs::has_ended(common, &driver) => {
                        // The remains of runs are removed below.
                        if tasks::is_run(&driver) {
                            continue;
                        }
                        has_driver_without_plugin = true;
                        Box::pin(gc_without_plugin(common, &driver, places, keep_ended, self.dry_run)).await
                    }
                    // The items that the other plugins have removed are printed nevertheless.
                    Err(error) => vec![failure_entry(&error)],
                };
            found.extend(garbage.into_iter().map(|one| (driver.clone(), one)));
        }
        if has_driver_without_plugin {
            // Plugins remove these sockets when they start. So this is necessary only where a driver has no live
            // plugin.
            found.extend(gc_sockets(self.dry_run).into_iter().map(|one| ("-".to_owned(), one)));
        }
        found.extend(self.gc_runs(common).await?);
        match self.gc_images(common, keep).await {
            Ok(garbage) => found.extend(garbage.into_iter().map(|one| ("cli".to_owned(), one))),
            Err(error) => found.push(("cli".to_owned(), failure_entry(&error))),
        }
        if self.json {
            print_data(&format!("{}\n", serde_json::json!(found)))?;
        } else {
            let rows: Vec<Vec<String>> = found
                .iter()
                .map(|(driver, one)| {
                    let what = match (&one.problem, self.dry_run) {
                        (Some(problem), _) => problem.as_str(),
                        (None, _) if one.stays => "kept",
                        (None, true) => "would be removed",
                        (None, false) => "removed",
                    };
                    let cells = [driver, &one.kind, &one.name, what, &one.why];
                    cells.map(str::to_owned).to_vec()
                })
                .collect();
            print_data(&table::render(&["DRIVER", "KIND", "NAME", "OUTCOME", "WHY"], &rows))?;
        }
        Ok(u8::from(found.iter().any(|(_, one)| one.problem.is_some())))
    }

    /// Removes the remains of `run`s that were killed.
    async fn gc_runs(&self, common: &CommonArgs) -> Result<Vec<(String, Garbage)>, CliError> {
        const WHY: &str = "the command that it belongs to has ended";
        let mut abandoned = Vec::new();
        let runs = tasks::drivers(common)?.into_iter().filter(|(driver, _)| tasks::is_run(driver)).map(|(id, _)| id);
        if self.dry_run {
            // A run whose plugin still lives is left out: only a request to shut down would show whether the run has
            // ended.
            let ended = runs.filter(|id| runs::has_ended(common, id));
            return Ok(ended.map(|id| (id.clone(), Garbage::new("run", &id, None).with_reason(WHY))).collect());
        }
        for id in runs {
            if runs::is_abandoned(common, &id).await {
                abandoned.push(id);
            }
        }
        if abandoned.is_empty() {
            return Ok(Vec::new());
        }
        let store = ContainerdSession::open(common).await?;
        let mut found = Vec::new();
        for id in abandoned {
            runs::clean_up(common, &store.address, &id).await;
            let problem =
                common.places(&id).run().exists().then(|| "a part of its files could not be removed".to_owned());
            found.push((id.clone(), Garbage::new("run", &id, problem).with_reason(WHY)));
        }
        store.close().await;
        Ok(found)
    }

    /// Removes unused images of `run` and `pull`, unless one of these commands is running.
    async fn gc_images(&self, common: &CommonArgs, keep: Duration) -> Result<Vec<Garbage>, CliError> {
        if !common.places("cli").images().is_dir() {
            return Ok(Vec::new());
        }
        let _lock = match StoreLock::exclusive(common) {
            Ok(lock) => lock,
            Err(CliError::Usage(why)) => {
                super::print_message(&format!("nomad-driver-shim: {why}"));
                return Ok(Vec::new());
            }
            Err(error) => return Err(error),
        };
        let store = ContainerdSession::open(common).await?;
        let outcome = async {
            Ok(store.images(common)?.collect_garbage(keep, &tasks::in_use_by_runs(common)?, self.dry_run).await)
        };
        let outcome = outcome.await;
        store.close().await;
        outcome
    }
}

impl Rmi {
    /// Removes the images: from live plugins that have them, and from the command line's own store.
    ///
    /// # Errors
    /// Fails when an image is in use, or neither a plugin nor the command line has it.
    pub(crate) async fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        for image in &self.images {
            let name = parse_image(image)?.to_string();
            let mut removed = false;
            for (_, places) in tasks::drivers(common)?.into_iter().filter(|(driver, _)| !tasks::is_run(driver)) {
                match send_request(&places.control(), &Request::RemoveImage { image: name.clone() }, ANSWER_TIMEOUT)
                    .await
                {
                    Ok(Answer::Done) => removed = true,
                    Ok(Answer::NotHere) => {}
                    Ok(other) => return Err(ControlError::unexpected(&places.control(), &other).into()),
                    Err(error) if error.no_plugin_listens() => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let store = ContainerdSession::open(common).await?;
            let outcome = match store.images(common) {
                Ok(images) if removed && images.by_name(&name).is_none() => Ok(()),
                // A `run` in progress holds the lock, so this fails.
                Ok(images) => match StoreLock::exclusive(common) {
                    Ok(_lock) => match tasks::in_use_by_runs(common) {
                        Ok(in_use) => images.remove(&name, &in_use).await.map_err(CliError::Records),
                        Err(error) => Err(error),
                    },
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            };
            store.close().await;
            match outcome {
                Err(CliError::Records(ImageError::NotStored { .. })) if removed => {}
                other => other?,
            }
            print_data(&format!("{name}\n"))?;
        }
        Ok(0)
    }
}
