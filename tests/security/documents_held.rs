//! Manifests, configurations and layers that are too large, too deep, or differ from their description are refused with
//! a reason, in bounded memory.

use std::io::Write as _;

use nomad_driver_shim::ids::Digest;
use serde_json::{Value, json};

use crate::{
    probe::{peak, refusal},
    support::{
        Entry, Env, Image, Layer, Packing,
        fake_registry::{Answer, FakeRegistry, MANIFEST},
        resident,
    },
};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
/// The memory that one of these images may take: its largest document has 8 MiB, and there are several copies of it.
const GROWTH: u64 = 80 << 20;
/// The memory that a layer may take that is small and unpacks to a large size.
const BOMB_GROWTH: u64 = 16 << 20;

/// An image as a registry offers it: its manifest, and blobs that are named by their digests.
struct Offer {
    manifest: Vec<u8>,
    media_type: &'static str,
    blobs: Vec<Vec<u8>>,
}

/// The parts of a valid image, to be changed. No other image has its layer, since layers that containerd already has
/// are not downloaded.
fn good() -> (Image, Value, Value) {
    let noise = nomad_driver_shim::ids::random_hex(500);
    let image = Image { layers: vec![Layer::new(&[Entry::file("noise", noise)], Packing::Gzip)], ..Image::busybox() };
    let manifest = serde_json::from_slice(&image.manifest_bytes()).unwrap();
    let config = serde_json::from_slice(&image.config_bytes()).unwrap();
    (image, manifest, config)
}

/// A valid image with a changed manifest.
fn manifest(change: impl FnOnce(&mut Value)) -> Offer {
    let (image, mut manifest, _) = good();
    change(&mut manifest);
    Offer { manifest: manifest.to_string().into_bytes(), media_type: MANIFEST, blobs: image.blobs() }
}

/// A valid image with this text in place of its manifest.
fn document(media_type: &'static str, text: impl Into<Vec<u8>>) -> Offer {
    Offer { manifest: text.into(), media_type, blobs: Image::busybox().blobs() }
}

/// A valid image with another configuration.
fn config(text: impl Into<Vec<u8>>) -> Offer {
    let text = text.into();
    let descriptor = json!({"mediaType": CONFIG_TYPE, "digest": Digest::of(&text).to_string(), "size": text.len()});
    let mut offer = manifest(|manifest| manifest["config"] = descriptor);
    offer.blobs.push(text);
    offer
}

/// A valid image with this layer on top of its own.
fn layer(bytes: Vec<u8>, media_type: &'static str) -> Offer {
    let image = Image::busybox().with_layer(Layer { diff_id: Digest::of(b"another"), bytes, media_type });
    Offer { manifest: image.manifest_bytes(), media_type: MANIFEST, blobs: image.blobs() }
}

/// Deeply nested JSON arrays.
fn deep() -> String {
    format!("{}{}", "[".repeat(100_000), "]".repeat(100_000))
}

fn with_key(value: &Value, key: &str, text: &str) -> String {
    let whole = value.to_string();
    format!("{{{key:?}:{text},{}", &whole[1..])
}

fn gzip(bytes: &[u8], times: usize) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    (0..times).for_each(|_| encoder.write_all(bytes).unwrap());
    encoder.finish().unwrap()
}

/// A header of a tar archive that announces a file of this size.
fn header(kind: tar::EntryType, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.as_old_mut().name[..4].copy_from_slice(b"file");
    header.set_cksum();
    header.as_bytes().to_vec()
}

/// A name, what a registry offers, and the words with which it is refused.
type Refused = (&'static str, Offer, &'static str);

fn documents() -> Vec<Refused> {
    [manifests(), layer_lists(), configs_and_layers()].into_iter().flatten().collect()
}

/// Manifests and indexes of a wrong form.
fn manifests() -> Vec<Refused> {
    let (_, plain, _) = good();
    let own = |manifest: &Value| {
        let digest = Digest::of(manifest.to_string().as_bytes()).to_string();
        json!({"schemaVersion": 2, "manifests": [{"mediaType": INDEX, "digest": digest, "size": 1}]})
    };
    let index = own(&plain);
    let many = json!({"mediaType": MANIFEST, "digest": format!("sha256:{}", "0".repeat(64)), "size": 1,
        "platform": {"os": "linux", "architecture": "s390x"}});
    let mut both = plain.clone();
    both["manifests"] = json!([]);
    vec![
        (
            "manifest of 4 MiB",
            document(MANIFEST, with_key(&plain, "x", &format!("{:?}", "x".repeat(4 << 20)))),
            "larger than",
        ),
        ("manifest that is deep", document(MANIFEST, with_key(&plain, "x", &deep())), "recursion limit"),
        ("manifest of nothing", document(MANIFEST, ""), "not JSON"),
        ("manifest that is a list", document(MANIFEST, "[]"), "malformed"),
        ("manifest of zeroes", document(MANIFEST, vec![0; 1000]), "not JSON"),
        ("manifest and index", document(MANIFEST, both.to_string()), "both an index and a manifest"),
        ("index of an index", document(INDEX, index.to_string()), "not found"),
        ("index of nothing", document(INDEX, r#"{"schemaVersion":2,"manifests":[]}"#), "no manifest for"),
        (
            "index of 20 000",
            document(INDEX, json!({"schemaVersion": 2, "manifests": vec![many; 20_000]}).to_string()),
            "no manifest for",
        ),
    ]
}

/// Manifests whose lists of layers are wrong.
fn layer_lists() -> Vec<Refused> {
    let layer_of = |change: fn(&mut Value)| manifest(|manifest| change(&mut manifest["layers"][0]));
    let layers = |count: usize| {
        manifest(|manifest| manifest["layers"] = Value::Array(vec![manifest["layers"][0].clone(); count]))
    };
    vec![
        ("128 layers", layers(128), "at most 127"),
        ("501 layers", layers(501), "at most 127"),
        ("10 000 layers", layers(10_000), "at most 127"),
        ("no layer of one", layers(0), "diff_ids for 0 layers"),
        ("two layers of one", layers(2), "1 diff_ids for 2 layers"),
        ("size of -1", layer_of(|layer| layer["size"] = json!(-1)), "malformed"),
        ("size of 2^63", layer_of(|layer| layer["size"] = json!(1_u64 << 63)), ""),
        ("size of 1", layer_of(|layer| layer["size"] = json!(1)), "of 1 bytes"),
        ("size of a byte more", layer_of(|layer| layer["size"] = json!(layer["size"].as_u64().unwrap() + 1)), ""),
        ("size in words", layer_of(|layer| layer["size"] = json!("1")), "malformed"),
        ("sha512", layer_of(|layer| layer["digest"] = json!(format!("sha512:{}", "0".repeat(128)))), "malformed"),
        ("md5", layer_of(|layer| layer["digest"] = json!("md5:d41d8cd98f00b204e9800998ecf8427e")), "malformed"),
        ("digest that climbs", layer_of(|layer| layer["digest"] = json!("sha256:../../../../etc/passwd")), "malformed"),
        ("digest that is short", layer_of(|layer| layer["digest"] = json!("sha256:00")), "malformed"),
        (
            "digest in capitals",
            layer_of(|layer| layer["digest"] = json!(format!("sha256:{}", "A".repeat(64)))),
            "malformed",
        ),
        (
            "foreign layer",
            layer_of(|layer| layer["mediaType"] = json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")),
            "foreign.diff",
        ),
        (
            "encrypted layer",
            layer_of(|layer| layer["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar+gzip+encrypted")),
            "encrypted",
        ),
        ("layer of no type", layer_of(|layer| layer["mediaType"] = json!("")), "malformed"),
    ]
}

/// Configurations and layers that are not what the manifest says, or not of their form.
fn configs_and_layers() -> Vec<Refused> {
    let (image, _, plain_config) = good();
    vec![
        (
            "layer as config",
            manifest(|manifest| manifest["config"]["digest"] = manifest["layers"][0]["digest"].clone()),
            "config",
        ),
        (
            "config as layer",
            manifest(|manifest| manifest["layers"][0]["digest"] = manifest["config"]["digest"].clone()),
            "",
        ),
        ("config of 8 MiB", config(with_key(&plain_config, "x", &format!("{:?}", "x".repeat(8 << 20)))), "larger than"),
        ("config that is deep", config(with_key(&plain_config, "config", &deep())), "malformed"),
        ("config that is none", config("null"), "malformed"),
        (
            "layer of a long name",
            layer(gzip(&header(tar::EntryType::GNULongName, 2 << 20), 1), image.layers[0].media_type),
            "more than 1 MiB",
        ),
        (
            "layer of a long record",
            layer(gzip(&header(tar::EntryType::XHeader, 1 << 40), 1), image.layers[0].media_type),
            "more than 1 MiB",
        ),
        (
            "layer of a cut file",
            layer(gzip(&header(tar::EntryType::Regular, 1 << 50), 1), image.layers[0].media_type),
            "is refused",
        ),
        // A window of 2 GiB (RFC 8878, section 3.1.1.1.2), which the decoder would have to hold in memory.
        (
            "layer of a wide window",
            layer([&b"\x28\xb5\x2f\xfd\x00\xa8"[..], &[0; 64]].concat(), "application/vnd.oci.image.layer.v1.tar+zstd"),
            "can't be unpacked",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_or_not_what_it_says_is_refused_by_name() {
    let mut env = Env::new().await;
    // This start keeps the memory of a first pull out of the measurement.
    let task = env.sh("true").await;
    env.finish_task(task).await;
    let plugin = env.plugin().pid().unwrap();
    for (name, offer, words) in documents() {
        let before = resident(plugin);
        let image = offered(offer).await;
        let reason = refusal(&mut env, json!({"image": image, "image_pull_timeout": "30s"})).await;
        let shown = &reason[..reason.len().min(600)];
        assert!(reason.contains(words) && !reason.contains("image_pull_timeout"), "{name}: {shown}");
        let grown = resident(plugin).saturating_sub(before);
        assert!(grown < GROWTH, "{name}: {} MiB more", grown >> 20);
    }
    env.finish().await;
}

/// A layer that is a thousand times as large when it is unpacked. Its digest is not the one in its configuration, so
/// containerd never sees it; the reader has to read through all of it first.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_unpacks_to_much_takes_no_memory() {
    let mut env = Env::new().await;
    let task = env.sh("true").await;
    env.finish_task(task).await;
    let plugin = env.plugin().pid().unwrap();
    let before = peak(plugin);
    let megabytes = 192;
    let bytes = [gzip(&header(tar::EntryType::Regular, megabytes << 20), 1), gzip(&[0; 1 << 20], 192)].concat();
    assert!(bytes.len() < 2 << 20, "{}", bytes.len());
    let image = offered(layer(bytes, "application/vnd.oci.image.layer.v1.tar+gzip")).await;
    let reason = refusal(&mut env, json!({"image": image})).await;
    assert!(reason.contains("uncompressed digest"), "{reason}");
    let grown = peak(plugin) - before;
    assert!(grown < BOMB_GROWTH, "{} MiB more", grown >> 20);
    env.finish().await;
}

/// Control test: the same images run when nothing is wrong with them, and a field that the driver does not use is
/// skipped.
#[tokio::test(flavor = "multi_thread")]
async fn a_good_image_of_the_same_making_runs() {
    let mut env = Env::new().await;
    let image = Image::busybox();
    let plain: Value = serde_json::from_slice(&image.config_bytes()).unwrap();
    let mut manifest: Value = serde_json::from_slice(&image.manifest_bytes()).unwrap();
    let deep = with_key(&plain, "x", &deep());
    manifest["config"]["digest"] = json!(Digest::of(deep.as_bytes()).to_string());
    let blobs = [image.blobs(), vec![deep.into_bytes()]].concat();
    let image = offered(Offer { manifest: manifest.to_string().into_bytes(), media_type: MANIFEST, blobs }).await;
    let (code, out, _) = env.run(json!({"image": image, "command": "/bin/busybox", "args": ["echo", "ran"]})).await;
    assert_eq!((code, out.as_str()), (0, "ran\n"));
    env.finish().await;
}

/// Serves an image and returns its name.
async fn offered(offer: Offer) -> String {
    let registry = FakeRegistry::start().await;
    registry.set("/v2/app/manifests/1", Answer::ok(offer.media_type, offer.manifest));
    for blob in offer.blobs {
        registry.set(&format!("/v2/app/blobs/{}", Digest::of(&blob)), Answer::ok("application/octet-stream", blob));
    }
    format!("{}/app:1", registry.address)
}
