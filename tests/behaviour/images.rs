//! Images are pulled from registries into containerd's store, and tasks run from them.

use std::{process::Command, time::Duration};

use nomad_driver_shim::ids::Digest;
use serde_json::json;

use crate::support::{
    Entry, Env, EnvOptions, Image, Layer, Packing,
    fake_registry::{Answer, FakeRegistry},
    services, shell_in,
};

async fn prints(env: &mut Env, image: &str, script: &str) -> String {
    let (code, out, err) = env.run(shell_in(image, script)).await;
    assert_eq!(code, 0, "{err}");
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn every_packing_and_way_of_naming() {
    let mut env = Env::new().await;
    let registry = &services().registry;
    for (name, packing) in [("gzip", Packing::Gzip), ("zstd", Packing::Zstd), ("plain", Packing::None)] {
        let layer = Layer::new(&[Entry::file("packed", name)], packing);
        let image = Image::busybox().with_layer(layer).push(registry, &format!("test/{name}:1")).await;
        assert_eq!(prints(&mut env, &image, "cat /packed").await, name);
    }
    let layered = Image::busybox().with_layer(Layer::new(&[Entry::file("by", "digest")], Packing::Gzip));
    let (whole, index) = layered.push_index(registry, "test/index:1").await;
    assert_eq!(prints(&mut env, &whole, "cat /by").await, "digest");
    let bare = format!("{registry}/test/index");
    assert_eq!(prints(&mut env, &format!("{bare}@{index}"), "cat /by").await, "digest");
    let manifest = Digest::of(&layered.manifest_bytes());
    assert_eq!(prints(&mut env, &format!("{bare}:1@{manifest}"), "cat /by").await, "digest");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whiteouts_hide_and_later_layers_win() {
    let mut env = Env::new().await;
    let image = Image::busybox()
        .with_layer(Layer::new(
            &[Entry::dir("d"), Entry::file("d/gone", "1"), Entry::file("d/stays", "old")],
            Packing::Gzip,
        ))
        .with_layer(Layer::new(&[Entry::file("d/.wh.gone", ""), Entry::file("d/stays", "new")], Packing::Gzip))
        .push(&services().registry, "test/whiteout:1")
        .await;
    assert_eq!(prints(&mut env, &image, "ls /d; cat /d/stays").await, "stays\nnew");
    env.finish().await;
}

/// One page of mount options has room for some fifty absolute paths; 127 layers need relative paths.
#[tokio::test(flavor = "multi_thread")]
async fn from_one_layer_to_a_hundred_and_twenty_seven() {
    let mut env = Env::new().await;
    let mut image = Image::busybox();
    for n in 1..127 {
        image = image.with_layer(Layer::new(&[Entry::file(&format!("layer-{n}"), n.to_string())], Packing::Gzip));
    }
    let name = image.clone().push(&services().registry, "test/layers:127").await;
    assert_eq!(prints(&mut env, &name, "ls / | grep -c layer-; cat /layer-126; echo x > /layer-1").await, "126\n126");
    let too_many = image
        .with_layer(Layer::new(&[Entry::file("one-more", "x")], Packing::Gzip))
        .push(&services().registry, "test/layers:128")
        .await;
    let mut task = env.prepare(json!({"image": too_many})).await;
    let error = env.try_start(&mut task).await.unwrap_err();
    assert!(error.message().contains("128 layers"), "{error:?}");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_pulls_of_one_image_are_one() {
    let mut env = Env::new().await;
    let registry = FakeRegistry::start().await;
    let name = registry.serve(&Image::busybox(), |_, answer| Answer { delay: Duration::from_millis(100), ..answer });
    let config = shell_in(&name, "exit 0");
    let mut tasks = Vec::new();
    for _ in 0..6 {
        tasks.push(env.prepare(config.clone()).await);
    }
    let started = futures_util::future::join_all(tasks.iter_mut().map(|task| env.try_start(task))).await;
    started.into_iter().for_each(|outcome| outcome.unwrap());
    let mut requests = registry.requests();
    requests.sort();
    let all = requests.len();
    requests.dedup();
    assert_eq!(all, requests.len(), "each part was asked for once: {:?}", registry.requests());
    for task in tasks {
        assert_eq!(env.finish_task(task).await.0, 0);
    }
    env.finish().await;
}

/// A caller that gives up (its allocation was stopped, or its time is over) does not end the pull for the other
/// callers.
#[tokio::test(flavor = "multi_thread")]
async fn one_puller_can_leave() {
    let mut env = Env::new().await;
    let registry = FakeRegistry::start().await;
    let name = registry.serve(&Image::busybox(), |_, answer| Answer { delay: Duration::from_millis(400), ..answer });
    let patient = shell_in(&name, "exit 0");
    let mut hasty = patient.clone();
    hasty["image_pull_timeout"] = json!("200ms");
    let (mut first, mut second) = (env.prepare(hasty).await, env.prepare(patient).await);
    let (gave_up, waited) = tokio::join!(env.try_start(&mut first), env.try_start(&mut second));
    let error = gave_up.unwrap_err();
    assert!(error.message().contains("image_pull_timeout = 200ms"), "{error:?}");
    assert!(nomad_driver_shim::host::is_recoverable(&error));
    waited.unwrap();
    assert_eq!(env.finish_task(second).await.0, 0);
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_ctr_pulled_is_used_as_it_is() {
    let mut env = Env::new().await;
    let registry = FakeRegistry::start().await;
    let name =
        Image::busybox().with_config("Labels", json!({"by": "ctr"})).push(&services().registry, "test/ctr:1").await;
    let socket = services().containerd.to_str().unwrap();
    let ctr = ["-a", socket, "-n", &env.namespace];
    crate::support::services::run(Command::new("ctr").args(ctr).args(["images", "pull", "--plain-http", &name]));
    // The registry in this name does not know the image, so only the local image can serve.
    let alias = format!("{}/never/pushed:1", registry.address);
    crate::support::services::run(Command::new("ctr").args(ctr).args(["images", "tag", &name, &alias]));
    assert_eq!(prints(&mut env, &alias, "echo $FROM_IMAGE").await, "yes\n");
    assert_eq!(registry.requests(), Vec::<String>::new());
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn https_with_the_trust_store_of_ssl_cert_file() {
    let services = services();
    let mut env = EnvOptions::default().var("SSL_CERT_FILE", services.ca.to_str().unwrap()).start().await;
    // The TLS registry does not share its storage with the open one. The image is pushed through a client that trusts
    // the same authority.
    let name = push_with_tls(&Image::busybox(), "test/tls:1").await;
    assert_eq!(prints(&mut env, &name, "echo over TLS").await, "over TLS\n");
    env.finish().await;

    let mut env = Env::new().await;
    let mut task = env.prepare(json!({"image": name})).await;
    let error = env.try_start(&mut task).await.unwrap_err();
    assert!(error.message().contains("certificate"), "not silently over plain HTTP: {error:?}");
    env.finish().await;
}

async fn push_with_tls(image: &Image, name: &str) -> String {
    let services = services();
    let layout = services.root.join("tls-layout");
    let (repository, tag) = name.split_once(':').unwrap();
    // skopeo is an independent client, so this also checks the images that the test suite makes.
    let blobs = layout.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    for blob in image.blobs().into_iter().chain([image.manifest_bytes()]) {
        std::fs::write(blobs.join(&Digest::of(&blob).as_str()[7..]), &blob).unwrap();
    }
    let manifest = image.manifest_bytes();
    let index = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": Digest::of(&manifest).to_string(), "size": manifest.len(),
        "annotations": {"org.opencontainers.image.ref.name": tag},
    }]});
    std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let target = format!("docker://{}/{repository}:{tag}", services.tls_registry);
    let source = format!("oci:{}:{tag}", layout.display());
    crate::support::services::run(Command::new("skopeo").args([
        "copy",
        "--quiet",
        "--dest-tls-verify=false",
        &source,
        &target,
    ]));
    format!("{}/{name}", services.tls_registry)
}

#[tokio::test(flavor = "multi_thread")]
async fn basic_authentication_by_job_and_by_plugin() {
    let services = services();
    Image::busybox().push(&services.basic_backdoor, "private/app:1").await;
    let name = format!("{}/private/app:1", services.basic_registry);
    let right = json!({"username": "tester", "password": "secret"});
    let command =
        |auth: serde_json::Value| json!({"image": name, "command": "/bin/sh", "args": ["-c", "exit 0"], "auth": auth});

    let mut env = Env::new().await;
    for wrong in [json!(null), json!({"username": "tester", "password": "hunter2"})] {
        let mut task = env.prepare(command(wrong)).await;
        let error = env.try_start(&mut task).await.unwrap_err();
        assert!(error.message().contains("pull access denied") && !error.message().contains("hunter2"), "{error:?}");
        assert!(!nomad_driver_shim::host::is_recoverable(&error));
    }
    assert_eq!(env.run(command(right.clone())).await.0, 0);
    assert!(!env.plugin().stderr().contains("hunter2") && !env.plugin().stderr().contains("secret"), "never logged");
    env.finish().await;

    let of_plugin =
        json!({"auth": {"username": "tester", "password": "secret", "server_address": services.basic_registry}});
    let mut env = Env::configured(of_plugin).await;
    assert_eq!(env.run(command(json!(null))).await.0, 0);
    env.finish().await;

    let mut env = Env::configured(
        json!({"auth": {"username": "tester", "password": "secret", "server_address": "registry.example"}}),
    )
    .await;
    let mut task = env.prepare(command(json!(null))).await;
    env.try_start(&mut task).await.unwrap_err();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn token_authentication() {
    let mut env = Env::new().await;
    let registry = FakeRegistry::start().await;
    registry.challenge(&format!(r#"Bearer realm="http://{}/token",service="test""#, registry.address));
    let credentials = "Basic dGVzdGVyOnNlY3JldA==";
    let token = Answer::ok("application/json", br#"{"token":"t0ken","expires_in":60}"#.to_vec());
    registry.set("/token", Answer { wants: Some(credentials.to_owned()), ..token });
    let name =
        registry.serve(&Image::busybox(), |_, answer| Answer { wants: Some("Bearer t0ken".to_owned()), ..answer });
    let config = json!({"image": name, "command": "/bin/sh", "args": ["-c", "exit 0"], "auth": {"username": "tester", "password": "secret"}});
    assert_eq!(env.run(config).await.0, 0);
    let asked = registry.requests().into_iter().find(|path| path.starts_with("/token")).unwrap();
    assert!(asked.contains("service=test") && asked.contains("scope=repository%3Aapp%3Apull"), "{asked}");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_store_is_pulled_again() {
    let mut env = Env::new().await;
    let name = Image::busybox()
        .with_layer(Layer::new(&[Entry::file("wiped", "x")], Packing::Gzip))
        .push(&services().registry, "test/wiped:1")
        .await;
    assert_eq!(prints(&mut env, &name, "cat /wiped").await, "x");
    let client = nomad_driver_shim::containerd::Client::new(&services().containerd, &env.namespace, "overlayfs");
    let socket = services().containerd.to_str().unwrap();
    crate::support::services::run(Command::new("ctr").args([
        "-a",
        socket,
        "-n",
        &env.namespace,
        "images",
        "rm",
        "--sync",
        &name,
    ]));
    for lease in client.leases().await.unwrap() {
        crate::support::services::run(Command::new("ctr").args([
            "-a",
            socket,
            "-n",
            &env.namespace,
            "leases",
            "rm",
            "--sync",
            &lease.0,
        ]));
    }
    assert_eq!(client.snapshot_keys().await.unwrap(), Vec::<String>::new());
    assert_eq!(prints(&mut env, &name, "cat /wiped").await, "x");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_native_snapshotter_works_too() {
    let mut env = Env::configured(json!({"containerd": {"snapshotter": "native"}})).await;
    let name = env.busybox().await;
    assert_eq!(prints(&mut env, &name, "echo native").await, "native\n");
    env.finish().await;
}

/// A password is sent to the registry that it is for, not to a host that the registry's answers lead to.
#[tokio::test(flavor = "multi_thread")]
async fn credentials_do_not_follow_a_redirect() {
    let mut env = Env::new().await;
    let (registry, thief) = (FakeRegistry::start().await, FakeRegistry::start().await);
    thief.challenge(&format!(r#"Bearer realm="http://{}/token""#, thief.address));
    thief.set("/elsewhere", Answer { wants: Some("Bearer x".to_owned()), ..Answer::ok("", vec![]) });
    let location = ("location".to_owned(), format!("http://{}/elsewhere", thief.address));
    registry.set("/v2/app/manifests/1", Answer { status: 307, headers: vec![location], ..Answer::ok("", vec![]) });
    let auth = json!({"username": "tester", "password": "secret"});
    let mut task = env.prepare(json!({"image": format!("{}/app:1", registry.address), "auth": auth})).await;
    let error = env.try_start(&mut task).await.unwrap_err();
    assert!(error.message().contains("pull access denied"), "{error:?}");
    assert_eq!(thief.requests(), ["/elsewhere"], "no token was asked for");
    env.finish().await;
}

/// An image whose configuration claims another image's layers must not be given these layers.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_layers_by_claiming_them() {
    let mut env = Env::new().await;
    let registry = &services().registry;
    let secret = Layer::new(&[Entry::file("secret", "s3cret")], Packing::Gzip);
    let private = Image { layers: vec![secret.clone()], ..Image::busybox() }.push(registry, "test/private:1").await;
    let mut task = env.prepare(json!({"image": private, "command": "/none"})).await;
    env.try_start(&mut task).await.unwrap_err();
    // This layer has public bytes, and the private layer's name.
    let public = Layer { diff_id: secret.diff_id, ..Layer::busybox().clone() };
    let claiming = Image { layers: vec![public], ..Image::busybox() }.push(registry, "test/claiming:1").await;
    for _ in 0..2 {
        let mut task = env.prepare(json!({"image": claiming})).await;
        let error = env.try_start(&mut task).await.unwrap_err();
        assert!(error.message().contains("uncompressed digest"), "{error:?}");
    }
    assert_eq!(
        prints(&mut env, &Image::busybox().push(registry, "test/busybox:1").await, "echo unharmed").await,
        "unharmed\n"
    );
    env.finish().await;
}

/// The files of an image with one layer are read without overlayfs. Overlayfs's mark for a removed file (a device 0:0)
/// counts as no file here, too. Every other file that is not a regular one is refused (`tests/security/inputs.rs`).
#[tokio::test(flavor = "multi_thread")]
async fn an_accounts_file_that_is_marked_as_removed_is_passed_over() {
    let mut env = Env::new().await;
    let device = |path| Entry { kind: tar::EntryType::Char, ..Entry::file(path, "") };
    let busybox =
        ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| std::path::Path::new(path).exists()).unwrap();
    let layer = Layer::new(
        &[
            Entry::dir("bin"),
            Entry::file("bin/sh", std::fs::read(busybox).unwrap()),
            Entry::dir("etc"),
            device("etc/passwd"),
            device("etc/group"),
        ],
        Packing::Gzip,
    );
    let name = Image { layers: vec![layer], ..Image::busybox() }.push(&services().registry, "test/devices:1").await;
    assert_eq!(prints(&mut env, &name, "echo fine").await, "fine\n");
    env.finish().await;
}
