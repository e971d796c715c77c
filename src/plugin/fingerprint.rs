//! Fingerprints: what the node supports, sent to Nomad at once and again whenever it may have changed. The stream never
//! ends: after a clean end the agent would reopen it without a pause.

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
    text::{self, MESSAGE_MAX},
};

/// The interval of fingerprints; Nomad's own drivers send one every 30 s.
const PERIOD: Duration = Duration::from_secs(30);
/// The interval while the driver is not healthy: shorter, so that a recovery shows soon.
const PERIOD_IN_TROUBLE: Duration = Duration::from_secs(5);

/// Sends fingerprints until the agent disconnects.
pub async fn run(driver: DriverService, send: mpsc::Sender<Result<FingerprintResponse, Status>>) {
    loop {
        let fingerprint = look(&driver).await;
        let healthy = fingerprint.health == i32::from(HealthState::Healthy);
        if send.send(Ok(fingerprint)).await.is_err() {
            return;
        }
        // Sandboxes are probed concurrently, since a runtime may hang; a changed result is sent at once.
        let news = async {
            match driver.engine().await {
                Ok(engine) if engine.runtimes().look().await => {}
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            () = tokio::time::sleep(if healthy { PERIOD } else { PERIOD_IN_TROUBLE }) => {}
            () = news => {}
            () = send.closed() => return,
        }
    }
}

/// Finds out what the node supports.
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
        Ok(default) => default,
        Err(problem) => return state(HealthState::Undetected, problem, HashMap::new()),
    };
    if let Err(problem) = default.works().await {
        return state(HealthState::Undetected, &problem.to_string(), HashMap::new());
    }
    let default = default.name.clone();
    if !engine.shim_is_installed() {
        let problem = format!("shim {} is not installed; it comes with containerd", settings.shim.binary.display());
        return state(HealthState::Undetected, &problem, HashMap::new());
    }
    let apparmor = match engine.apparmor().await {
        Ok(profile) => profile,
        Err(problem) => return state(HealthState::Unhealthy, &problem, HashMap::new()),
    };
    let installed = runtimes.usable();
    let mut attributes = HashMap::new();
    let mut put =
        |key: String, value: Value| drop(attributes.insert(key, Attribute { value: Some(value), unit: String::new() }));
    let prefix = format!("driver.{}", settings.name);
    put(format!("{prefix}.version"), Value::StringVal(env!("CARGO_PKG_VERSION").to_owned()));
    put(format!("{prefix}.default_runtime"), Value::StringVal(default));
    let names: Vec<&str> = installed.iter().map(|(runtime, _)| runtime.name.as_str()).collect();
    put(format!("{prefix}.runtimes"), Value::StringVal(names.join(",")));
    for name in runtimes.names() {
        let usable = installed.iter().find(|(runtime, _)| runtime.name == name);
        // A key that is left out would keep its old value on the node.
        let probed = usable.and_then(|(_, probed)| probed.clone());
        put(format!("{prefix}.runtime.{name}"), Value::BoolVal(usable.is_some()));
        if runtimes.is_gvisor(name) {
            let (platform, version) = probed.map(|probed| (probed.platform, probed.version)).unwrap_or_default();
            put(format!("{prefix}.runtime.{name}.platform"), Value::StringVal(platform));
            put(format!("{prefix}.runtime.{name}.version"), Value::StringVal(version));
        }
    }
    put(format!("{prefix}.apparmor"), Value::StringVal(apparmor));
    put(format!("{prefix}.privileged"), Value::BoolVal(settings.security.allow_privileged));
    let answer = containerd(&settings).await;
    // A key that is left out keeps its old value on the node; an empty value removes it.
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

/// Returns the prefixes of the attributes about containerd. Under nomad-driver-containerd's name it is that driver's
/// prefix, which jobs use in constraints.
fn containerd_keys(name: &DriverName) -> Vec<String> {
    if name.as_str() == DROP_IN_NAME {
        vec!["driver.containerd.containerd".to_owned()]
    } else {
        vec![format!("driver.{name}.containerd")]
    }
}

/// Returns containerd's version and revision.
async fn containerd(settings: &Settings) -> Result<(String, String), String> {
    let at = &settings.containerd;
    let client = Client::new(&at.address, &at.namespace, &at.snapshotter);
    client.version().await.map_err(|error| crate::chain(&error))
}

fn state(health: HealthState, description: &str, attributes: HashMap<String, Attribute>) -> FingerprintResponse {
    FingerprintResponse {
        attributes,
        health: health.into(),
        health_description: text::shown(description, MESSAGE_MAX),
        err: String::new(),
    }
}
