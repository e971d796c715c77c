//! The state that the plugin's services share: the driver's name, the settings, and the engine, which is opened by the
//! first call that needs it.

use std::{fmt, sync::Arc};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;
use tonic::Status;

use super::{
    config,
    connections::{Connections, ShutdownMode},
    control::ControlServer,
    metrics, sockets, status,
};
use crate::{
    ids::DriverName,
    rootfs::ceilings::HostLimits,
    task::{Engine, EventHub, Settings},
};

/// The driver service. Cheap to clone.
#[derive(Clone)]
pub(crate) struct DriverService(Arc<Inner>);

/// The refusal of a configuration that differs from the one in use. The plugin keeps the one in use.
#[derive(Debug, thiserror::Error)]
#[error(
    "plugin config: process {pid} of this driver runs with another configuration and keeps it; nothing of the new one is applied (options that differ: {}); to apply it, stop that process with kill {pid}: the agent starts it again, and its tasks keep running",
    .options.join(", ")
)]
pub(crate) struct ConfigurationRefused {
    pid: u32,
    options: Vec<&'static str>,
}

/// The agent's configuration, as it was sent and as it takes effect.
#[derive(Clone)]
struct Configured {
    /// The settings as the agent has sent them, to compare them with later ones.
    received: Settings,
    /// The same settings, with ceilings bounded by what this host has.
    effective: Settings,
}

impl Configured {
    fn new(received: Settings) -> Self {
        let mut effective = received.clone();
        effective.security.ceilings = effective.security.ceilings.clone().on_host(HostLimits::read());
        Self { received, effective }
    }
}

struct Inner {
    name: DriverName,
    /// The settings; `None` before the first use. They are not changed once the engine is open, because requests are
    /// checked against these settings and executed with the engine's copy.
    settings: Mutex<Option<Configured>>,
    /// The engine. The first call that needs it opens it; if that fails, the next call tries again.
    engine: tokio::sync::Mutex<Option<Engine>>,
    events: EventHub,
    shutdown_mode: watch::Sender<ShutdownMode>,
    clients: Connections,
}

impl fmt::Debug for DriverService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverService").field("name", &self.0.name).finish_non_exhaustive()
    }
}

impl DriverService {
    /// Creates the service, without settings or an engine.
    pub(crate) fn new(name: DriverName, shutdown_mode: watch::Sender<ShutdownMode>, clients: Connections) -> Self {
        Self(Arc::new(Inner {
            name,
            settings: Mutex::default(),
            engine: tokio::sync::Mutex::default(),
            events: EventHub::default(),
            shutdown_mode,
            clients,
        }))
    }

    /// The driver's name in job files.
    pub(crate) fn name(&self) -> &DriverName {
        &self.0.name
    }

    /// Stores the settings with which the engine will be opened. Later settings replace earlier ones. Once the engine
    /// is open, only equal settings are accepted: tasks are checked, started and torn down with one set of settings.
    /// Nomad itself configures only processes that it has just started, and none that it reattaches to
    /// (hashicorp/nomad, helper/pluginutils/loader/loader.go, Dispense and Reattach).
    ///
    /// # Errors
    /// When other settings are in use already; they stay in use.
    pub(crate) async fn configure(&self, settings: Settings) -> Result<(), ConfigurationRefused> {
        // A call that opens the engine holds this lock, and has read the settings that the engine will use.
        let engine = self.0.engine.lock().await;
        let mut configured = self.configured();
        if let (Some(_), Some(in_use)) = (&*engine, &*configured) {
            let options = in_use.received.differences(&settings);
            if options.is_empty() {
                return Ok(());
            }
            let refusal = ConfigurationRefused { pid: std::process::id(), options };
            tracing::error!(error = %refusal, "refused a configuration that differs from the one in use");
            return Err(refusal);
        }
        *configured = Some(Configured::new(settings));
        Ok(())
    }

    /// Returns the settings; the defaults if Nomad has sent none.
    ///
    /// # Errors
    /// When the defaults are needed and are not valid.
    pub(crate) fn settings(&self) -> Result<Settings, Status> {
        let mut settings = self.configured();
        if let Some(configured) = &*settings {
            return Ok(configured.effective.clone());
        }
        let defaults = config::settings(&self.0.name, &[]).map_err(|error| status::from_config_error(&error))?;
        Ok(settings.insert(Configured::new(defaults)).effective.clone())
    }

    fn configured(&self) -> MutexGuard<'_, Option<Configured>> {
        self.0.settings.lock()
    }

    /// Returns the engine, and opens it first if it is not open yet.
    ///
    /// # Errors
    /// When the engine can't be opened.
    pub(crate) async fn engine(&self) -> Result<Engine, Status> {
        let mut engine = self.0.engine.lock().await;
        if let Some(engine) = &*engine {
            return Ok(engine.clone());
        }
        let settings = self.settings()?;
        if !settings.enabled {
            return Err(Status::failed_precondition("the driver is disabled (plugin option enabled = false)"));
        }
        let opened = Engine::open(settings, self.0.events.clone()).await.map_err(|error| {
            tracing::error!(error = %crate::error_chain(&error), "could not open the driver's engine");
            status::from_task_error(&error)
        })?;
        let clients = self.0.clients.clone();
        opened.set_agent_connected_for(move || clients.connected_for());
        // No call has to wait for the removal.
        drop(tokio::task::spawn_blocking(sockets::remove_abandoned));
        let control_server = ControlServer {
            engine: opened.clone(),
            shutdown_mode: self.0.shutdown_mode.clone(),
            clients: self.0.clients.clone(),
        };
        if let Err(error) = control_server.listen() {
            // Nomad's calls work without the control socket.
            tracing::error!(%error, "could not open the control socket");
        }
        if let Some(address) = &opened.settings().metrics
            && let Err(error) = metrics::serve(opened.clone(), address).await
        {
            tracing::error!(%address, %error, "could not open the metrics endpoint");
        }
        Ok(engine.insert(opened).clone())
    }

    /// Waits for calls of runtimes in progress. Then removes what only this plugin uses, such as idle shims, unless
    /// another plugin takes it over. Tasks keep running.
    pub(crate) async fn shut_down(&self, mode: ShutdownMode) {
        // An engine that is being opened right now has no shims yet.
        let engine = self.0.engine.try_lock().ok().and_then(|engine| engine.clone());
        match engine {
            Some(engine) if mode == ShutdownMode::HandOver => engine.finish_runtime_calls().await,
            Some(engine) => engine.close().await,
            None => {}
        }
    }

    /// Returns a receiver for task events from now on.
    pub(crate) fn subscribe(&self) -> tokio::sync::broadcast::Receiver<crate::task::TaskEvent> {
        self.0.events.subscribe()
    }
}
