//! The metrics endpoint, as Prometheus reads it.

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::{Env, eventually, services::free_address};

/// Returns the value of the metric `name` in the text of the endpoint.
fn value(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} is not in\n{text}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_is_counted() {
    let address = free_address();
    let mut env = Env::configured(json!({"metrics": {"address": address}})).await;
    let scrape = async || reqwest::get(format!("http://{address}/metrics")).await.unwrap().text().await.unwrap();
    let before = scrape().await;
    assert!(value(&before, "nomad_driver_shim_starts_total").abs() < f64::EPSILON);
    let running = env.sh("sleep 600").await;
    let ended = env.sh("exit 3").await;
    assert_eq!(env.wait(&ended).await.exit_code, 3);
    let mut missing = env.prepare(json!({"image": env.busybox().await, "command": "/no/such"})).await;
    env.try_start(&mut missing).await.unwrap_err();
    eventually("a shim waits again", async || {
        let idle = value(&scrape().await, "nomad_driver_shim_idle_shims");
        if (idle - 1.0).abs() < f64::EPSILON { Ok(()) } else { Err(idle) }
    })
    .await;
    let text = scrape().await;
    for (name, expected) in [
        ("starts_total", 2.0),
        ("starts_failed_total{cause=\"shim\"}", 1.0),
        ("starts_failed_total{cause=\"image\"}", 0.0),
        ("pulls_total", 1.0),
        ("exits_total", 1.0),
        ("images", 1.0),
        ("tasks{state=\"running\"}", 1.0),
        ("tasks{state=\"exited\"}", 1.0),
        ("start_phase_seconds_count{phase=\"create\"}", 2.0),
        ("start_phase_seconds_bucket{phase=\"total\",le=\"+Inf\"}", 2.0),
    ] {
        let name = format!("nomad_driver_shim_{name}");
        assert!((value(&text, &name) - expected).abs() < f64::EPSILON, "{name}: {text}");
    }
    let (hits, misses) = ("nomad_driver_shim_pool_hits_total", "nomad_driver_shim_pool_misses_total");
    assert!((value(&text, hits) + value(&text, misses) - 2.0).abs() < f64::EPSILON, "{text}");
    let total = value(&text, "nomad_driver_shim_start_phase_seconds_sum{phase=\"total\"}");
    assert!(total > 0.0 && total < 600.0, "{total} s");
    let elsewhere = reqwest::get(format!("http://{address}/other")).await.unwrap();
    assert_eq!(elsewhere.status(), reqwest::StatusCode::NOT_FOUND);
    for task in [&running, &ended] {
        env.destroy(task).await.unwrap();
    }
    assert!(value(&scrape().await, "nomad_driver_shim_tasks{state=\"running\"}").abs() < f64::EPSILON);
    env.finish().await;
}

/// The metrics are served on a socket that only root can open, and the next plugin serves them there again.
#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_serves_too() {
    let path = crate::support::services().root.join(format!("{}.sock", nomad_driver_shim::ids::random_hex(4)));
    let mut env = Env::configured(json!({"metrics": {"address": format!("unix:{}", path.display())}})).await;
    for _ in 0..2 {
        let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("text/plain; version=0.0.4"), "{answer}");
        assert!(answer.contains("nomad_driver_shim_starts_total 0"), "{answer}");
        env.kill_plugin().await;
        env.start_plugin().await;
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    env.finish().await;
}
