//! `gc` and `rmi`: what nobody needs goes. Live plugins look after their own; the command line's own images are looked
//! after here.

use std::{fs::File, time::Duration};

use clap::Args;
use nix::fcntl::{Flock, FlockArg};

use super::{CliError, Common, Store, image_named, print, runs, table, tasks};
use crate::{
    control::{Answer, Garbage, PATIENCE, Request, ask},
    image::ImageError,
    places::make_dir,
};

/// Remove what nobody needs: remains of tasks, idle images
#[derive(Args, Debug)]
pub struct Gc {
    /// Only tell what would go
    #[arg(long)]
    dry_run: bool,
    /// Keep images of `run` and `pull` that were used within this time
    #[arg(long, default_value = "24h", value_name = "DURATION")]
    keep: String,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Remove images
#[derive(Args, Debug)]
pub struct Rmi {
    /// Their names
    #[arg(required = true)]
    images: Vec<String>,
}

/// Commands that use the command line's image store hold this together; those that take from it hold it alone.
pub struct StoreLock(#[allow(dead_code, reason = "held until it is dropped")] Flock<File>);

impl StoreLock {
    /// Together with others.
    ///
    /// # Errors
    /// When somebody takes from it just now, or the file can't be made.
    pub fn shared(common: &Common) -> Result<Self, CliError> {
        Self::take(common, FlockArg::LockSharedNonblock)
    }

    fn alone(common: &Common) -> Result<Self, CliError> {
        Self::take(common, FlockArg::LockExclusiveNonblock)
    }

    fn take(common: &Common, how: FlockArg) -> Result<Self, CliError> {
        let directory = common.places("cli").state().to_owned();
        make_dir(&directory)?;
        let path = directory.join("lock");
        let file = File::options().create(true).append(true).open(&path)?;
        Flock::lock(file, how).map(Self).map_err(|(_, errno)| match errno {
            nix::Error::EWOULDBLOCK => CliError::Usage(format!(
                "another command uses the images of this command line ({}); try again when it has ended",
                path.display()
            )),
            other => CliError::Output(other.into()),
        })
    }
}

fn failed(error: &dyn std::error::Error) -> Garbage {
    Garbage::new("-", "-", Some(crate::chain(error)))
}

impl Gc {
    /// Removes it, and says what it was.
    ///
    /// # Errors
    /// When a plugin refuses, or output fails.
    pub async fn execute(self, common: &Common) -> Result<u8, CliError> {
        let keep = crate::duration::parse(&self.keep).map_err(|error| CliError::Usage(format!("--keep: {error}")))?;
        let mut found: Vec<(String, Garbage)> = Vec::new();
        for (driver, places) in tasks::drivers(common) {
            match ask(&places.control(), &Request::Gc { dry_run: self.dry_run }, PATIENCE).await {
                Ok(Answer::Removed(garbage)) => found.extend(garbage.into_iter().map(|one| (driver.clone(), one))),
                Ok(_) => {}
                Err(error) if error.is_nobody() => {}
                // What others have removed is told all the same.
                Err(error) => found.push((driver.clone(), failed(&error))),
            }
        }
        found.extend(self.runs(common).await?);
        match self.own(common, keep).await {
            Ok(garbage) => found.extend(garbage.into_iter().map(|one| ("cli".to_owned(), one))),
            Err(error) => found.push(("cli".to_owned(), failed(&error))),
        }
        if self.json {
            print(&format!("{}\n", serde_json::json!(found)))?;
        } else {
            let rows: Vec<Vec<String>> = found
                .iter()
                .map(|(driver, one)| {
                    let what = match (&one.problem, self.dry_run) {
                        (Some(problem), _) => problem.as_str(),
                        (None, true) => "would go",
                        (None, false) => "removed",
                    };
                    vec![driver.clone(), one.kind.clone(), one.name.clone(), what.to_owned()]
                })
                .collect();
            print(&table::render(&["DRIVER", "KIND", "NAME", "OUTCOME"], &rows))?;
        }
        Ok(u8::from(found.iter().any(|(_, one)| one.problem.is_some())))
    }

    /// What is left of `run`s that were killed.
    async fn runs(&self, common: &Common) -> Result<Vec<(String, Garbage)>, CliError> {
        let mut abandoned = Vec::new();
        for (id, _) in tasks::drivers(common).into_iter().filter(|(driver, _)| tasks::is_run(driver)) {
            if !self.dry_run && runs::is_abandoned(common, &id).await {
                abandoned.push(id);
            }
        }
        if abandoned.is_empty() {
            return Ok(Vec::new());
        }
        let store = Store::open(common).await?;
        let mut found = Vec::new();
        for id in abandoned {
            runs::clear_up(common, &store.address, &id).await;
            let problem = common.places(&id).run().exists().then(|| "something of it stays".to_owned());
            found.push((id.clone(), Garbage::new("run", &id, problem)));
        }
        store.close().await;
        Ok(found)
    }

    /// The images of `run` and `pull`; not while one of them is at work.
    async fn own(&self, common: &Common, keep: Duration) -> Result<Vec<Garbage>, CliError> {
        if !common.places("cli").images().is_dir() {
            return Ok(Vec::new());
        }
        let _lock = match StoreLock::alone(common) {
            Ok(lock) => lock,
            Err(CliError::Usage(why)) => {
                super::say(&format!("nomad-driver-shim: {why}"));
                return Ok(Vec::new());
            }
            Err(error) => return Err(error),
        };
        let store = Store::open(common).await?;
        let outcome =
            async { Ok(store.images(common)?.collect(keep, &tasks::in_use_by_runs(common), self.dry_run).await) };
        let outcome = outcome.await;
        store.close().await;
        outcome
    }
}

impl Rmi {
    /// Removes them: from live plugins that have them, and from the command line's own.
    ///
    /// # Errors
    /// When one is in use, or nobody has it.
    pub async fn execute(self, common: &Common) -> Result<u8, CliError> {
        for image in &self.images {
            let name = image_named(image)?.to_string();
            let mut removed = false;
            for (_, places) in tasks::drivers(common).into_iter().filter(|(driver, _)| !tasks::is_run(driver)) {
                match ask(&places.control(), &Request::RemoveImage { image: name.clone() }, PATIENCE).await {
                    Ok(answer) => removed |= answer == Answer::Done,
                    Err(error) if error.is_nobody() => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let store = Store::open(common).await?;
            let outcome = match store.images(common) {
                Ok(images) if removed && images.by_name(&name).is_none() => Ok(()),
                // A `run` that goes on keeps us out.
                Ok(images) => match StoreLock::alone(common) {
                    Ok(_lock) => images.remove(&name, &tasks::in_use_by_runs(common)).await.map_err(CliError::Records),
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            };
            store.close().await;
            match outcome {
                Err(CliError::Records(ImageError::NotHere { .. })) if removed => {}
                other => other?,
            }
            print(&format!("{name}\n"))?;
        }
        Ok(0)
    }
}
