//! What the plugin's services share: who we are, the settings, and the engine, which is opened at the first real work.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
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

struct Inner {
    name: DriverName,
    settings: Mutex<Option<Settings>>,
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

    /// Keeps settings for the first real work; the last ones before it win.
    pub fn configure(&self, mut settings: Settings) {
        bound_by_this_host(&mut settings);
        *self.0.settings.lock().unwrap_or_else(PoisonError::into_inner) = Some(settings);
    }

    /// The settings; the defaults when Nomad set none.
    ///
    /// # Errors
    /// Never for a host that calls `SetConfig`.
    pub fn settings(&self) -> Result<Settings, Status> {
        let set = self.0.settings.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match set {
            Some(settings) => Ok(settings),
            None => {
                let mut settings = config::settings(&self.0.name, &[]).map_err(|error| status::of_config(&error))?;
                bound_by_this_host(&mut settings);
                Ok(settings)
            }
        }
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

/// Completes the ceilings with this process's own limits and this host's memory.
fn bound_by_this_host(settings: &mut Settings) {
    settings.security.ceilings = settings.security.ceilings.clone().on_host(HostLimits::read());
}
