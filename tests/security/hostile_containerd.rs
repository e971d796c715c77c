//! A hostile server at containerd's socket makes the node unhealthy with a reason, costs the plugin little memory, and
//! gives no directory of the host to a container.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use nomad_driver_shim::{
    ids::random_hex,
    pb::{
        driver::{FingerprintRequest, fingerprint_response::HealthState},
        services::snapshots::v1::ViewSnapshotResponse,
        types::Mount,
    },
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
};
use tonic::codegen::Bytes;

use crate::{
    decoy::{Decoy, SECRET},
    false_containerd::{self, framed},
    probe::{Outcome, outcome, refusal},
    support::{Entry, Env, Image, Layer, Packing, patience, resident, services},
};

/// The memory by which a plugin may grow because of a hostile peer.
const GROWTH: u64 = 24 << 20;

/// How a peer behaves on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Closes,
    Silent,
    Http1,
    Garbage,
    /// Endless HTTP/2 frames, each of which requires an answer (CVE-2019-9512, CVE-2019-9515).
    Pings,
    Settings,
    /// Endless headers (CVE-2024-27316).
    Continuations,
    /// A frame of 16 MiB on a connection that permits 16 KiB.
    LargeFrame,
}

/// A frame of HTTP/2 (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

async fn serve(peer: Peer, mut stream: UnixStream) -> std::io::Result<()> {
    let (settings, ping, setting) = (frame(4, 0, 0, &[]), frame(6, 0, 0, &[7; 8]), frame(4, 0, 0, &[0, 3, 0, 0, 0, 9]));
    let repeated = match peer {
        Peer::Closes => return Ok(()),
        Peer::Silent => {
            let mut buffer = [0; 1024];
            while stream.read(&mut buffer).await? > 0 {}
            return Ok(());
        }
        Peer::Http1 => {
            let answer = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 3\r\n\r\n400";
            stream.write_all(answer).await?;
            return stream.shutdown().await;
        }
        Peer::Garbage => (0..=255).collect::<Vec<u8>>().repeat(64),
        Peer::Pings => {
            stream.write_all(&settings).await?;
            ping.repeat(1000)
        }
        Peer::Settings => {
            stream.write_all(&settings).await?;
            setting.repeat(1000)
        }
        Peer::Continuations => {
            stream.write_all(&settings).await?;
            // ":status: 200", and then literal fields that are never indexed (RFC 7541).
            stream.write_all(&frame(1, 0, 1, &[0x88])).await?;
            frame(9, 0, 1, b"\x10\x01a\x01b".repeat(2000).as_slice())
        }
        Peer::LargeFrame => {
            stream.write_all(&settings).await?;
            stream.write_all(&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]).await?;
            vec![b'x'; 16 << 10]
        }
    };
    loop {
        stream.write_all(&repeated).await?;
        // The flood is slow enough to leave the machine to the other tests.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Starts a peer of this kind and returns its socket.
fn listen(peer: Peer) -> PathBuf {
    let socket = services().root.join(format!("peer-{}", random_hex(3)));
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(peer, stream));
        }
    });
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_no_containerd_makes_the_node_unhealthy() {
    let peers = [
        Peer::Closes,
        Peer::Silent,
        Peer::Http1,
        Peer::Garbage,
        Peer::Pings,
        Peer::Settings,
        Peer::Continuations,
        Peer::LargeFrame,
    ];
    futures_util::future::join_all(peers.map(|peer| async move {
        let mut env = Env::configured(json!({"containerd": {"address": listen(peer)}, "shim": {"pool": 0}})).await;
        let before = resident(env.plugin().pid().unwrap());
        let mut fingerprints = env.driver().fingerprint(FingerprintRequest {}).await.unwrap().into_inner();
        let first = tokio::time::timeout(patience(), fingerprints.message()).await.expect("no fingerprint");
        let seen = first.unwrap().unwrap();
        assert_eq!(seen.health, i32::from(HealthState::Unhealthy), "{peer:?}: {seen:?}");
        let reason = &seen.health_description;
        assert!(reason.contains("containerd") && reason.len() < 500, "{peer:?}: {reason}");
        // A pull also ends in time, and with a reason.
        let image = format!("{}/never/pulled:1", services().registry);
        let reason = refusal(&mut env, json!({"image": image, "image_pull_timeout": "2s"})).await;
        assert!(reason.contains("containerd") || reason.contains("image_pull_timeout"), "{peer:?}: {reason}");
        let grown = resident(env.plugin().pid().unwrap()).saturating_sub(before);
        assert!(grown < GROWTH, "{peer:?}: {} MiB more", grown >> 20);
        assert_eq!(env.plugin().info().await.unwrap().name, "shim", "{peer:?}");
        drop(fingerprints);
        env.finish().await;
    }))
    .await;
    // Control test: with the real containerd the node is healthy.
    let env = Env::new().await;
    let mut fingerprints = env.driver().fingerprint(FingerprintRequest {}).await.unwrap().into_inner();
    let seen = fingerprints.message().await.unwrap().unwrap();
    assert_eq!(seen.health, i32::from(HealthState::Healthy), "{seen:?}");
    drop(fingerprints);
    env.finish().await;
}

/// Mounts that would give files of the host to a container. Each entry has a name and the mounts that replace the real
/// ones.
fn lies(env: &Env, decoy: &Decoy) -> Vec<(String, Vec<Mount>)> {
    let real = services().root.join("containerd/root/io.containerd.snapshotter.v1.overlayfs/snapshots/1");
    let out = format!("{}/../../../../..{}", real.display(), decoy.path());
    // Paths of the expected form, but in a directory that other users than root may write to, or through a link.
    let (open, linked) = (env.dir.join("open/snapshots"), env.dir.join("linked/snapshots"));
    fs::create_dir_all(open.join("1/fs")).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    fs::create_dir_all(&linked).unwrap();
    symlink(&decoy.dir, linked.join("1")).unwrap();
    let (open, linked) = (open.join("1/fs").display().to_string(), linked.join("1").display().to_string());
    let mut lies = Vec::new();
    for path in [decoy.path(), "/etc", "/proc/1/root", "decoy", "", &out, &open, &linked] {
        let bind = Mount { r#type: "bind".into(), source: path.into(), ..Mount::default() };
        lies.push((format!("bind of {path:?}"), vec![bind]));
        lies.push((format!("lowerdir {path:?}"), overlay(&[&format!("lowerdir={path}:{}/fs", real.display())])));
    }
    let (lower, dir) = (format!("lowerdir={0}/fs:{0}/fs", real.display()), decoy.path());
    for option in [
        format!("upperdir={dir}"),
        format!("workdir={dir}"),
        format!("ro,upperdir={dir}"),
        format!("index=off,upperdir={dir}/data,workdir={dir}/logs"),
        format!("lowerdir+={dir}"),
        format!("datadir+={dir}"),
        format!("userxattr,lowerdir={dir}"),
    ] {
        lies.push((format!("option {option:?} last"), overlay(&[&lower, &option])));
        lies.push((format!("option {option:?} first"), overlay(&[&option, &lower])));
    }
    let other = |kind: &str| Mount { r#type: kind.into(), source: kind.into(), ..Mount::default() };
    lies.push(("proc".to_owned(), vec![other("proc")]));
    lies.push(("tmpfs".to_owned(), vec![other("tmpfs")]));
    lies.push(("none".to_owned(), vec![]));
    lies
}

fn overlay(options: &[&str]) -> Vec<Mount> {
    let options = options.iter().map(|option| (*option).to_owned()).collect();
    vec![Mount { r#type: "overlay".into(), source: "overlay".into(), options, ..Mount::default() }]
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_snapshotters_own_directories_become_layers() {
    let told: Arc<Mutex<Option<Vec<Mount>>>> = Arc::default();
    let lie = told.clone();
    let socket = false_containerd::start(Arc::new(move |path, real| match (path, lie.lock().unwrap().clone()) {
        (_, Some(mounts)) if !path.ends_with("/Version") => framed(&ViewSnapshotResponse { mounts }),
        _ => real,
    }));
    let mut env = Env::configured(json!({"containerd": {"address": socket}})).await;
    let decoy = Decoy::new(&env);
    let layer = Layer::new(&[Entry::file("of-the-image", "x")], Packing::Gzip);
    let image = Image::busybox().with_layer(layer).push(&services().registry, "attack/layers:1").await;
    // The image is resolved at each start. Otherwise the first accepted answer would serve all later starts.
    let always = json!({"image": image, "image_pull_policy": "always"});
    let config = env.shell("cat /secret /data/file; echo written > /by-the-task; ls /", always).await;
    let mut taken = Vec::new();
    for (name, mounts) in lies(&env, &decoy) {
        *told.lock().unwrap() = Some(mounts);
        let seen = outcome(&mut env, config.clone()).await;
        match &seen {
            Outcome::Refused(reason) if reason.contains("snapshotter overlayfs returned mounts") => {}
            other => taken.push(format!("{name}: {other:?}")),
        }
        taken.extend(decoy.changes().into_iter().map(|change| format!("{name}: {change}")));
        taken.extend(seen.text().contains(SECRET.trim()).then(|| format!("{name}: the secret was read")));
    }
    assert_eq!(taken, Vec::<String>::new());
    // Control test: through the same proxy, the real answer starts a task.
    *told.lock().unwrap() = None;
    assert!(outcome(&mut env, config).await.text().contains("of-the-image"));
    env.finish().await;
}

/// Answers that are valid gRPC, but are too large or not a valid message.
#[tokio::test(flavor = "multi_thread")]
async fn a_version_of_any_size_makes_the_node_unhealthy() {
    for body in [Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff, 1]), Bytes::from(vec![0xff; 64]), Bytes::new()] {
        let shown = format!("{body:?}");
        let socket = false_containerd::start(Arc::new(
            move |path, real| {
                if path.ends_with("/Version") { body.clone() } else { real }
            },
        ));
        let env = Env::configured(json!({"containerd": {"address": socket}, "shim": {"pool": 0}})).await;
        let mut fingerprints = env.driver().fingerprint(FingerprintRequest {}).await.unwrap().into_inner();
        let seen = fingerprints.message().await.unwrap().unwrap();
        assert_eq!(seen.health, i32::from(HealthState::Unhealthy), "{shown}: {seen:?}");
        drop(fingerprints);
        env.finish().await;
    }
}
