//! What the node can do, told to Nomad at once and again whenever it may have changed. The stream never ends: a clean
//! end would make the agent reopen it without a pause.

use std::{collections::HashMap, time::Duration};

use tokio::sync::mpsc;
use tonic::Status;

use super::service::DriverService;
use crate::{
    containerd::Client,
    ids::{DROP_IN_NAME, DriverName},
    pb::{
        driver::{FingerprintResponse, fingerprint_response::HealthState},
        structs::{Attribute, attribute::Value},
    },
    task::Settings,
};

/// Upstream's drivers look every 30 s.
const PERIOD: Duration = Duration::from_secs(30);
/// Trouble is looked at more often, so that its end shows soon.
const PERIOD_IN_TROUBLE: Duration = Duration::from_secs(5);

/// Sends fingerprints until the agent goes.
pub async fn run(driver: DriverService, send: mpsc::Sender<Result<FingerprintResponse, Status>>) {
    loop {
        let fingerprint = look(&driver).await;
        let healthy = fingerprint.health == i32::from(HealthState::Healthy);
        if send.send(Ok(fingerprint)).await.is_err() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(if healthy { PERIOD } else { PERIOD_IN_TROUBLE }) => {}
            () = send.closed() => return,
        }
    }
}

async fn look(driver: &DriverService) -> FingerprintResponse {
    let settings = match driver.settings() {
        Ok(settings) => settings,
        Err(status) => return state(HealthState::Unhealthy, status.message(), HashMap::new()),
    };
    if !settings.enabled {
        return state(HealthState::Undetected, "disabled", HashMap::new());
    }
    let engine = match driver.engine().await {
        Ok(engine) => engine,
        Err(status) => return state(HealthState::Unhealthy, status.message(), HashMap::new()),
    };
    let runtimes = engine.runtimes();
    let default = match runtimes.default_runtime() {
        Ok(default) => default.name.clone(),
        Err(problem) => return state(HealthState::Undetected, problem, HashMap::new()),
    };
    if !engine.shim_is_installed() {
        let problem = format!("shim {} is not installed; it comes with containerd", settings.shim.binary.display());
        return state(HealthState::Undetected, &problem, HashMap::new());
    }
    let installed: Vec<String> = runtimes.installed().into_iter().map(|runtime| runtime.name).collect();
    let mut attributes = HashMap::new();
    let mut put =
        |key: String, value: Value| drop(attributes.insert(key, Attribute { value: Some(value), unit: String::new() }));
    let prefix = format!("driver.{}", settings.name);
    put(format!("{prefix}.version"), Value::StringVal(env!("CARGO_PKG_VERSION").to_owned()));
    put(format!("{prefix}.default_runtime"), Value::StringVal(default));
    put(format!("{prefix}.runtimes"), Value::StringVal(installed.join(",")));
    put(format!("{prefix}.privileged"), Value::BoolVal(settings.security.allow_privileged));
    let answer = containerd(&settings).await;
    // A key that is left out stays on the node as it was; an empty value takes it off.
    let (version, revision) = answer.as_ref().map_or((String::new(), String::new()), Clone::clone);
    for key in containerd_keys(&settings.name) {
        put(format!("{key}_version"), Value::StringVal(version.clone()));
        put(format!("{key}_revision"), Value::StringVal(revision.clone()));
    }
    match answer {
        Ok(_) => state(HealthState::Healthy, "Healthy", attributes),
        Err(problem) => state(HealthState::Unhealthy, &problem, attributes),
    }
}

/// The old driver's constraint keys had a prefix of their own.
fn containerd_keys(name: &DriverName) -> Vec<String> {
    if name.as_str() == DROP_IN_NAME {
        vec!["driver.containerd.containerd".to_owned()]
    } else {
        vec![format!("driver.{name}.containerd")]
    }
}

async fn containerd(settings: &Settings) -> Result<(String, String), String> {
    let at = &settings.containerd;
    let client = Client::new(&at.address, &at.namespace, &at.snapshotter);
    client.version().await.map_err(|error| crate::chain(&error))
}

fn state(health: HealthState, description: &str, attributes: HashMap<String, Attribute>) -> FingerprintResponse {
    FingerprintResponse {
        attributes,
        health: health.into(),
        health_description: description.to_owned(),
        err: String::new(),
    }
}
