//! What the plugin's services share: who we are, the settings, and the engine, which is opened at the first real work.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;
use tonic::Status;

use super::{
    config,
    control::Doorkeeper,
    metrics,
    presence::{Clients, Leave},
    sockets, status,
};
use crate::{
    ids::DriverName,
    rootfs::ceilings::HostLimits,
    task::{Engine, EventHub, Settings},
};

/// The driver service. Cheap to clone.
#[derive(Clone)]
pub struct DriverService(Arc<Inner>);

/// Why a plugin keeps the settings that it has.
#[derive(Debug, thiserror::Error)]
#[error(
    "plugin config: process {pid} of this driver works with another configuration and keeps it; nothing of the new one is applied (what differs: {}); to apply it, end that process with kill {pid}: the agent starts it again, and its tasks go on",
    .options.join(", ")
)]
pub struct ConfigurationKept {
    pid: u32,
    options: Vec<&'static str>,
}

/// What the agent has configured.
#[derive(Clone)]
struct Configured {
    /// As the agent has it, to be compared.
    given: Settings,
    /// The same, bounded by what this host has.
    bounded: Settings,
}

impl Configured {
    fn new(given: Settings) -> Self {
        let mut bounded = given.clone();
        bounded.security.ceilings = bounded.security.ceilings.clone().on_host(HostLimits::read());
        Self { given, bounded }
    }
}

struct Inner {
    name: DriverName,
    /// Never changed once the engine is open: requests are checked by these, and executed by the engine's copy.
    settings: Mutex<Option<Configured>>,
    /// Opened at the first real work; an opening that failed is tried again by the next call.
    engine: tokio::sync::Mutex<Option<Engine>>,
    events: EventHub,
    leave: watch::Sender<Leave>,
    clients: Clients,
}

impl fmt::Debug for DriverService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverService").field("name", &self.0.name).finish_non_exhaustive()
    }
}

impl DriverService {
    /// A driver that has done nothing yet.
    pub fn new(name: DriverName, leave: watch::Sender<Leave>, clients: Clients) -> Self {
        Self(Arc::new(Inner {
            name,
            settings: Mutex::default(),
            engine: tokio::sync::Mutex::default(),
            events: EventHub::default(),
            leave,
            clients,
        }))
    }

    /// Its name in job files.
    pub fn name(&self) -> &DriverName {
        &self.0.name
    }

    /// Keeps settings for the first real work; the last ones before it win. From then on only equal ones are taken: tasks
    /// are checked, made and undone by one set of settings. Nomad itself configures only processes that it has just
    /// started, and none that it reattaches to (hashicorp/nomad, helper/pluginutils/loader/loader.go, Dispense and
    /// Reattach).
    ///
    /// # Errors
    /// When others are in use already; they stay in use.
    pub async fn configure(&self, settings: Settings) -> Result<(), ConfigurationKept> {
        // Whoever opens the engine holds this, and has read the settings that it will work with.
        let engine = self.0.engine.lock().await;
        let mut known = self.configured();
        if let (Some(_), Some(in_use)) = (&*engine, &*known) {
            let options = in_use.given.differences(&settings);
            if options.is_empty() {
                return Ok(());
            }
            let kept = ConfigurationKept { pid: std::process::id(), options };
            tracing::error!(error = %kept, "another configuration is refused");
            return Err(kept);
        }
        *known = Some(Configured::new(settings));
        Ok(())
    }

    /// The settings; the defaults when Nomad set none.
    ///
    /// # Errors
    /// Never for a host that calls `SetConfig`.
    pub fn settings(&self) -> Result<Settings, Status> {
        let mut known = self.configured();
        if let Some(configured) = &*known {
            return Ok(configured.bounded.clone());
        }
        let defaults = config::settings(&self.0.name, &[]).map_err(|error| status::of_config(&error))?;
        Ok(known.insert(Configured::new(defaults)).bounded.clone())
    }

    fn configured(&self) -> MutexGuard<'_, Option<Configured>> {
        self.0.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine, opened now if it is not yet.
    ///
    /// # Errors
    /// When it can't be opened.
    pub async fn engine(&self) -> Result<Engine, Status> {
        let mut engine = self.0.engine.lock().await;
        if let Some(engine) = &*engine {
            return Ok(engine.clone());
        }
        let settings = self.settings()?;
        if !settings.enabled {
            return Err(Status::failed_precondition("the driver is disabled (plugin option enabled = false)"));
        }
        let opened = Engine::open(settings, self.0.events.clone()).await.map_err(|error| {
            tracing::error!(error = %crate::chain(&error), "the driver can't work");
            status::of(&error)
        })?;
        let clients = self.0.clients.clone();
        opened.watch_attendance(move || clients.attended_for());
        // Nobody waits for it, and it ends by itself.
        drop(tokio::task::spawn_blocking(sockets::clear));
        let doorkeeper =
            Doorkeeper { engine: opened.clone(), leave: self.0.leave.clone(), clients: self.0.clients.clone() };
        if let Err(error) = doorkeeper.open() {
            // Nomad's side works without it.
            tracing::error!(%error, "no control socket");
        }
        if let Some(address) = &opened.settings().metrics
            && let Err(error) = metrics::serve(opened.clone(), address).await
        {
            tracing::error!(%address, %error, "no metrics endpoint");
        }
        Ok(engine.insert(opened).clone())
    }

    /// Lets runtimes that are at work finish, and ends what only we use, unless a successor is to have that. Tasks go on.
    pub async fn leave(&self, how: Leave) {
        // Whoever is opening the engine right now has no shims yet.
        let engine = self.0.engine.try_lock().ok().and_then(|engine| engine.clone());
        match engine {
            Some(engine) if how == Leave::GivingWay => engine.finish_calls().await,
            Some(engine) => engine.close().await,
            None => {}
        }
    }

    /// Task events from now on.
    pub fn listen(&self) -> tokio::sync::broadcast::Receiver<crate::task::TaskEvent> {
        self.0.events.listen()
    }
}
