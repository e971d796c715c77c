//! The images of the programs: one layer with Debian's packages, one with entry points and configuration files, and a
//! configuration for each program.

use std::{
    fs::{self, File},
    io::Read as _,
    path::Path,
    sync::OnceLock,
};

use nomad_driver_shim::ids::Digest;
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use super::Program;
use crate::{
    docker::docker,
    support::{Entry, Image, Layer, Packing, services},
};

/// The layer with Debian's packages, which `scripts/setup.sh programs` makes.
const LAYER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/programs/layer.tar.gz");

/// Files of the second layer: entry points as upstream's images have them, and configuration.
const FILES: [(&str, &str); 4] = [
    ("entry/postgres", include_str!("entry/postgres.sh")),
    ("entry/redis", include_str!("entry/redis.sh")),
    ("entry/sshd", include_str!("entry/sshd.sh")),
    ("entry/nginx.conf", include_str!("entry/nginx.conf")),
];

/// The image of all programs, without a configuration.
fn base() -> &'static Image {
    static BASE: OnceLock<Image> = OnceLock::new();
    BASE.get_or_init(|| {
        let bytes = fs::read(LAYER).expect("scripts/setup.sh programs unpacks the packages");
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(&bytes[..]).read_to_end(&mut plain).unwrap();
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        let packages = Layer { diff_id: Digest::of(&plain), bytes, media_type };
        let mut entries = vec![Entry::dir("entry")];
        entries.extend(FILES.map(|(path, text)| Entry::file(path, text)));
        // A program that containers inside of a container run.
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
        entries.push(Entry::file("entry/busybox", fs::read(busybox.expect("busybox-static")).unwrap()));
        Image { layers: vec![packages, Layer::new(&entries, Packing::None)], config: Value::Null }
    })
}

/// Returns the name of a program's image, without what names of images may not contain.
fn name(program: &Program) -> String {
    let letters = program.name.chars().filter(char::is_ascii_alphanumeric);
    format!("programs/{}:1", letters.map(|letter| letter.to_ascii_lowercase()).collect::<String>())
}

/// Gives dockerd the images of all programs, once, and returns the name of this program's image.
pub(super) async fn in_docker(program: &Program) -> String {
    static LOADED: OnceCell<()> = OnceCell::const_new();
    let load = async || {
        let path = docker().dir().join("programs.tar");
        tokio::task::block_in_place(|| write_archive(&path));
        docker().load_archive(&path).await;
        fs::remove_file(&path).unwrap();
    };
    LOADED.get_or_init(load).await;
    name(program)
}

/// Writes the images of all programs as `docker save` does, with the layers that they share.
fn write_archive(path: &Path) {
    let mut archive = tar::Builder::new(File::create(path).unwrap());
    let mut add = |name: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, content).unwrap();
    };
    let layers: Vec<String> = (0..base().layers.len()).map(|number| format!("{number}.tar")).collect();
    for (name, layer) in layers.iter().zip(&base().layers) {
        add(name, &layer.bytes);
    }
    let mut manifest = Vec::new();
    for (number, program) in super::programs().enumerate() {
        let config = format!("config-{number}.json");
        add(&config, &with_config(&program).config_bytes());
        manifest.push(json!({"Config": config, "RepoTags": [name(&program)], "Layers": layers}));
    }
    add("manifest.json", Value::from(manifest).to_string().as_bytes());
    archive.finish().unwrap();
}

fn with_config(program: &Program) -> Image {
    Image { config: program.config.clone(), ..base().clone() }
}

/// Pushes the program's image to the registry and returns the image's whole name.
pub(super) async fn in_registry(program: &Program) -> String {
    // The layers are large, so that one image is made at a time.
    static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _turn = ONE.lock().await;
    with_config(program).push(&services().registry, &name(program)).await
}
