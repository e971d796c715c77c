//! Fingerprints: what the node supports, sent to Nomad at once and again whenever it may have changed. The stream never
//! ends: after a clean end the agent would reopen it without a pause.

use std::{collections::HashMap, time::Duration};

use tokio::sync::mpsc;
use tonic::Status;

use super::service::DriverService;
use crate::{
    containerd::Client,
    ids::{CONTAINERD_DRIVER_NAME, DriverName},
    pb::{
        driver::{FingerprintResponse, fingerprint_response::HealthState},
        structs::{Attribute, attribute::Value},
    },
    task::Settings,
    text::{self, MESSAGE_MAX},
};

/// The interval of fingerprints; Nomad's own drivers send one every 30 s.
const HEALTHY_INTERVAL: Duration = Duration::from_secs(30);
/// The interval while the driver is not healthy. It is shorter, so that Nomad soon sees when the driver is healthy
/// again.
const UNHEALTHY_INTERVAL: Duration = Duration::from_secs(5);

/// Sends fingerprints until the agent disconnects.
pub(crate) async fn run(driver: DriverService, send: mpsc::Sender<Result<FingerprintResponse, Status>>) {
    loop {
        let fingerprint = take_fingerprint(&driver).await;
        let healthy = fingerprint.health == i32::from(HealthState::Healthy);
        if send.send(Ok(fingerprint)).await.is_err() {
            return;
        }
        // Sandboxes are probed concurrently, since a runtime may hang; a changed result is sent at once.
        let changed_probe = async {
            match driver.engine().await {
                Ok(engine) if engine.runtimes().refresh_probes().await => {}
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            () = tokio::time::sleep(if healthy { HEALTHY_INTERVAL } else { UNHEALTHY_INTERVAL }) => {}
            () = changed_probe => {}
            () = send.closed() => return,
        }
    }
}

/// Finds out what the node supports.
async fn take_fingerprint(driver: &DriverService) -> FingerprintResponse {
    let settings = match driver.settings() {
        Ok(settings) => settings,
        Err(status) => return response(HealthState::Unhealthy, status.message(), HashMap::new()),
    };
    if !settings.enabled {
        return response(HealthState::Undetected, "disabled", HashMap::new());
    }
    let engine = match driver.engine().await {
        Ok(engine) => engine,
        Err(status) => return response(HealthState::Unhealthy, status.message(), HashMap::new()),
    };
    let runtimes = engine.runtimes();
    let default = match runtimes.default_runtime() {
        Ok(default) => default,
        Err(problem) => return response(HealthState::Undetected, problem, HashMap::new()),
    };
    if let Err(problem) = default.probe().await {
        return response(HealthState::Undetected, &problem.to_string(), HashMap::new());
    }
    let default = default.name.clone();
    if !engine.shim_is_installed() {
        let problem = format!("shim {} is not installed; it comes with containerd", settings.shim.binary.display());
        return response(HealthState::Undetected, &problem, HashMap::new());
    }
    let apparmor = match engine.default_apparmor_profile().await {
        Ok(profile) => profile,
        Err(problem) => return response(HealthState::Unhealthy, &problem, HashMap::new()),
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
    let answer = containerd_version(&settings).await;
    // A key that is left out keeps its old value on the node; an empty value removes it.
    let (version, revision) = answer.as_ref().map_or((String::new(), String::new()), Clone::clone);
    for key in containerd_keys(&settings.name) {
        put(format!("{key}_version"), Value::StringVal(version.clone()));
        put(format!("{key}_revision"), Value::StringVal(revision.clone()));
    }
    match answer {
        Ok(_) => response(HealthState::Healthy, "Healthy", attributes),
        Err(problem) => response(HealthState::Unhealthy, &problem, attributes),
    }
}

/// Returns the prefixes of the attributes about containerd. Under nomad-driver-containerd's name it is that driver's
/// prefix, which jobs use in constraints.
fn containerd_keys(name: &DriverName) -> Vec<String> {
    if name.as_str() == CONTAINERD_DRIVER_NAME {
        vec!["driver.containerd.containerd".to_owned()]
    } else {
        vec![format!("driver.{name}.containerd")]
    }
}

/// Returns containerd's version and revision.
async fn containerd_version(settings: &Settings) -> Result<(String, String), String> {
    let containerd = &settings.containerd;
    let client = Client::new(&containerd.address, &containerd.namespace, &containerd.snapshotter);
    client.version().await.map_err(|error| crate::error_chain(&error))
}

fn response(health: HealthState, description: &str, attributes: HashMap<String, Attribute>) -> FingerprintResponse {
    FingerprintResponse {
        attributes,
        health: health.into(),
        health_description: text::sanitize(description, MESSAGE_MAX),
        err: String::new(),
    }
}
