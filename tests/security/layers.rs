//! An image gets a layer of containerd's store only if its own registry or archive has that layer. Digests are no
//! secret: they are in manifests, logs and reports, and a job's author who knows one can name it in their own image.

use std::fs;

use nomad_driver_shim::ids::{Digest, random_hex};
use serde_json::{Value, json};

use crate::{
    runtimes,
    support::{
        Entry, Env, Image, Layer, Packing,
        fake_registry::{Answer, FakeRegistry, MANIFEST},
        services,
        services::run,
        shell_in,
    },
};

const SECRET: &str = "contents of a private layer";

/// A layer that is only in its owner's registry.
fn private_layer() -> Layer {
    let entries = [Entry::file("private", SECRET), Entry::file("unique", random_hex(16))];
    Layer::new(&entries, Packing::Gzip)
}

fn image_of(layer: &Layer) -> Image {
    Image::busybox().with_layer(layer.clone())
}

fn reads(image: &str) -> Value {
    shell_in(image, "cat /private")
}

/// Pulls an image with this layer from its owner's registry.
async fn pulled(env: &mut Env, layer: &Layer) -> FakeRegistry {
    let owner = FakeRegistry::start().await;
    let image = owner.serve_as("team/private:1", &image_of(layer), |_, answer| answer);
    assert_eq!(env.run(reads(&image)).await.1, SECRET);
    owner
}

/// A registry that serves an image which names `layer`. It serves everything but that layer.
async fn thief(layer: &Layer) -> (FakeRegistry, String) {
    thief_as("app", layer).await
}

async fn thief_as(repository: &str, layer: &Layer) -> (FakeRegistry, String) {
    let registry = FakeRegistry::start().await;
    let image = registry.serve_as(&format!("{repository}:1"), &image_of(layer), |_, answer| answer);
    registry.forget_blob(repository, &Digest::of(&layer.bytes));
    (registry, image)
}

/// Returns the error message of a start that must fail.
async fn refusal(env: &mut Env, image: &str) -> String {
    let mut task = env.prepare(reads(image)).await;
    match env.try_start(&mut task).await {
        Err(status) => status.message().to_owned(),
        Ok(()) => panic!("{image} was given the layer: {:?}", env.finish_task(task).await),
    }
}

/// The attack: the two digests of a private layer would be enough to read it.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_a_layer_by_its_digests() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let layer = private_layer();
        pulled(&mut env, &layer).await;
        let (_registry, image) = thief(&layer).await;
        for _ in 0..2 {
            let message = refusal(&mut env, &image).await;
            assert!(message.contains("was not found"), "{runtime}: {message}");
        }
        env.finish().await;
    }
}

/// The thief's registry claims whatever the thief wants; only the bytes themselves prove that it has a layer.
#[tokio::test(flavor = "multi_thread")]
async fn the_word_of_a_registry_that_never_had_the_layer_is_worth_nothing() {
    let mut env = Env::with_runtime(&runtimes()[0], json!({})).await;
    let layer = private_layer();
    pulled(&mut env, &layer).await;
    let path = format!("/v2/app/blobs/{}", Digest::of(&layer.bytes));
    let size = layer.bytes.len();
    let other = Answer::ok("application/octet-stream", vec![0; size]);
    let short = Answer { announced: size, ..Answer::ok("application/octet-stream", vec![0; size / 2]) };
    for (lie, expected) in [
        (Answer { status: 405, ..Answer::ok("", vec![]) }, "405"),
        (other, "has digest"),
        (short, "was interrupted"),
        (Answer::ok("", vec![]), "was interrupted"),
    ] {
        let (registry, image) = thief(&layer).await;
        registry.set(&format!("HEAD {path}"), Answer { announced: size, ..Answer::ok("", vec![]) });
        registry.set(&path, lie);
        let message = refusal(&mut env, &image).await;
        assert!(message.contains(expected), "{message}");
    }
    env.finish().await;
}

/// A client that knows one of the two digests must not learn the other.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_layer_unpacks_to_is_not_told() {
    let mut env = Env::with_runtime(&runtimes()[0], json!({})).await;
    let layer = private_layer();
    pulled(&mut env, &layer).await;
    let guess = Layer { diff_id: Digest::of(b"a guess"), ..layer.clone() };
    let (_registry, image) = thief(&guess).await;
    let message = refusal(&mut env, &image).await;
    assert!(!message.contains(layer.diff_id.as_str()), "{message}");
    env.finish().await;
}

/// containerd shares the contents of its store between its namespaces.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_a_layer_of_another_namespace() {
    let (mut owner, mut env) =
        (Env::with_runtime(&runtimes()[0], json!({})).await, Env::with_runtime(&runtimes()[0], json!({})).await);
    let layer = private_layer();
    pulled(&mut owner, &layer).await;
    let (registry, image) = thief(&layer).await;
    assert!(refusal(&mut env, &image).await.contains("was not found"));
    // An image of a registry that has the layer is given the layer.
    let image = registry.serve(&image_of(&layer), |_, answer| answer);
    assert_eq!(env.run(reads(&image)).await.1, SECRET);
    owner.finish().await;
    env.finish().await;
}

/// An archive in a job's own directory proves nothing either, since the thief has written it.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_a_layer_by_an_archive() {
    let mut env = Env::with_runtime(&runtimes()[0], json!({})).await;
    let layer = private_layer();
    pulled(&mut env, &layer).await;
    let whole = image_of(&layer);
    for (stolen, runs) in [(None, false), (Some(vec![0; layer.bytes.len()]), false), (Some(layer.bytes.clone()), true)]
    {
        let mut task = env.prepare(reads("oci:local/image")).await;
        let directory = task.dirs.alloc_dir.join("web/local/image");
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        let write = |digest: &Digest, bytes: &[u8]| fs::write(blobs.join(&digest.as_str()[7..]), bytes).unwrap();
        let manifest = whole.manifest_bytes();
        let own = [whole.config_bytes(), Layer::busybox().bytes.clone(), manifest.clone()];
        own.iter().for_each(|blob| write(&Digest::of(blob), blob));
        stolen.iter().for_each(|bytes| write(&Digest::of(&layer.bytes), bytes));
        let index = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": MANIFEST, "digest": Digest::of(&manifest).to_string(), "size": manifest.len(),
        }]});
        fs::write(directory.join("index.json"), index.to_string()).unwrap();
        fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        match env.try_start(&mut task).await {
            Ok(()) => {
                let (_, out, _) = env.finish_task(task).await;
                assert!(runs, "it was given the layer: {out}");
                assert_eq!(out, SECRET);
            }
            Err(status) => assert!(!runs, "{}", status.message()),
        }
    }
    env.finish().await;
}

/// Neither a configuration nor a manifest is taken from the store: the driver asks the image's registry for each.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_a_configuration_or_a_manifest_by_its_digest() {
    let mut env = Env::with_runtime(&runtimes()[0], json!({})).await;
    let layer = private_layer();
    let private = image_of(&layer).with_config("Env", json!(["PATH=/bin", "SECRET=s3cret"]));
    let owner = FakeRegistry::start().await;
    let image = owner.serve(&private, |_, answer| answer);
    assert_eq!(env.run(reads(&image)).await.1, SECRET);
    let manifest = private.manifest_bytes();
    let digest = Digest::of(&manifest);

    // The registry has the image's manifest, and nothing else.
    let registry = FakeRegistry::start().await;
    registry.set("/v2/app/manifests/1", Answer::ok(MANIFEST, manifest.clone()));
    assert!(refusal(&mut env, &format!("{}/app:1", registry.address)).await.contains("was not found"));
    // The image's name has the manifest's digest, and the registry has nothing.
    assert!(refusal(&mut env, &format!("{}/app@{digest}", registry.address)).await.contains("was not found"));
    // The registry has an index that names the manifest.
    let arch = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [{
        "mediaType": MANIFEST, "digest": digest.to_string(), "size": manifest.len(),
        "platform": {"os": "linux", "architecture": arch},
    }]});
    let answer = Answer::ok("application/vnd.oci.image.index.v1+json", index.to_string().into_bytes());
    registry.set("/v2/app/manifests/index", answer);
    assert!(refusal(&mut env, &format!("{}/app:index", registry.address)).await.contains("was not found"));
    env.finish().await;
}

/// When a layer costs a download and when only a request: a registry that has delivered a layer once is trusted under
/// any repository name, and a repository that has delivered it is not even asked again.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_has_given_a_layer_is_believed() {
    let mut env = Env::with_runtime(&runtimes()[0], json!({})).await;
    let layer = private_layer();
    let digest = Digest::of(&layer.bytes);
    let owner = pulled(&mut env, &layer).await;
    assert_eq!(owner.asked_for(&digest), ["GET"]);
    for (name, asked) in [
        // Another image of the same repository.
        ("team/private:2", &["GET"][..]),
        // Another repository, which has the layer as well. From then on the driver remembers the layer under this name,
        // too.
        ("team/shared:1", &["GET", "HEAD"]),
        ("team/shared:2", &["GET", "HEAD"]),
    ] {
        let image = owner.serve_as(name, &image_of(&layer).with_file("name", name), |_, answer| answer);
        assert_eq!(env.run(reads(&image)).await.1, SECRET);
        assert_eq!(owner.asked_for(&digest), asked, "{name}");
    }
    // A repository that does not have the layer.
    let image = owner.serve_as("team/other:1", &image_of(&layer), |_, answer| answer);
    owner.forget_blob("team/other", &digest);
    assert!(refusal(&mut env, &image).await.contains("was not found"));
    // The driver requests the layer itself from a registry that does not answer HEAD.
    let image = owner.serve_as("team/old:1", &image_of(&layer), |_, answer| answer);
    let path = format!("HEAD /v2/team/old/blobs/{digest}");
    owner.set(&path, Answer { status: 405, ..Answer::ok("", vec![]) });
    assert_eq!(env.run(reads(&image)).await.1, SECRET);
    assert_eq!(owner.asked_for(&digest)[2..], ["HEAD", "GET", "HEAD", "GET"]);
    env.finish().await;
}

/// containerd's own label has no port, so it proves nothing about a registry at another port of this host.
#[tokio::test(flavor = "multi_thread")]
async fn a_label_without_a_port_is_no_other_registrys() {
    let mut env = Env::with_runtime(&runtimes()[0], json!({})).await;
    let layer = private_layer();
    let image = image_of(&layer).push(&services().registry, "attack/label:1").await;
    let socket = services().containerd.to_str().unwrap();
    let ctr = ["-a", socket, "-n", &env.namespace];
    run(std::process::Command::new("ctr").args(ctr).args(["images", "pull", "--plain-http", &image]));
    let labels = run(std::process::Command::new("ctr").args(ctr).args(["content", "ls"]));
    assert!(labels.contains("containerd.io/distribution.source.127.0.0.1=attack/label"), "{labels}");
    let (_registry, image) = thief_as("attack/label", &layer).await;
    assert!(refusal(&mut env, &image).await.contains("was not found"));
    env.finish().await;
}

/// Layers in the store already cost one request each, and these requests run concurrently.
#[tokio::test(flavor = "multi_thread")]
async fn layers_that_are_here_are_asked_for_side_by_side() {
    let mut env = Env::with_runtime(&runtimes()[0], json!({})).await;
    let layers: Vec<Layer> = (0..8).map(|_| private_layer()).collect();
    let image = layers.iter().fold(Image::busybox(), |image, layer| image.with_layer(layer.clone()));
    let owner = FakeRegistry::start().await;
    let first = owner.serve_as("team/first:1", &image, |_, answer| answer);
    assert_eq!(env.run(reads(&first)).await.1, SECRET);
    let second = owner.serve_as("team/second:1", &image, |_, answer| answer);
    let questions = layers.iter().map(|layer| format!("HEAD /v2/team/second/blobs/{}", Digest::of(&layer.bytes)));
    owner.answer_together(questions.take(7).collect());
    let mut config = reads(&second);
    config["image_pull_timeout"] = json!("20s");
    assert_eq!(env.run(config).await.1, SECRET);
    env.finish().await;
}
