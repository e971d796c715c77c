//! Images in files, and the garbage collection of unused images.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nomad_driver_shim::{
    containerd::Client,
    control::{ANSWER_TIMEOUT as CONTROL, Answer, Request, send_request},
    ids::Digest,
};
use serde_json::{Value, json};

use crate::support::{
    Entry, Env, Image, Layer, Packing, each_case, eventually, leak, services, services::run, shell_in,
};

/// Writes an image to a directory in OCI's layout.
pub(crate) fn layout(image: &Image, directory: &Path) -> PathBuf {
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let manifest = image.manifest_bytes();
    for blob in image.blobs().iter().chain([&manifest]) {
        fs::write(blobs.join(&Digest::of(blob).as_str()[7..]), blob).unwrap();
    }
    let index = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": Digest::of(&manifest).to_string(), "size": manifest.len(),
        "annotations": {"org.opencontainers.image.ref.name": "one"},
    }]});
    fs::write(directory.join("index.json"), index.to_string()).unwrap();
    fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).unwrap();
    directory.to_owned()
}

/// Converts a layout with skopeo.
pub(crate) fn skopeo(directory: &Path, target: &str) {
    run(Command::new("skopeo").args([
        "copy",
        "--insecure-policy",
        &format!("oci:{}:one", directory.display()),
        target,
    ]));
}

/// A plugin with a directory in `allow_paths`, so that jobs may use the images in it.
async fn environment() -> Env {
    let files = services().root.join(nomad_driver_shim::ids::random_hex(4));
    fs::create_dir_all(&files).unwrap();
    let config = json!({"security": {"allow_paths": [files]}});
    Env::configured(config).await
}

fn files(env: &Env) -> PathBuf {
    env.config["security"]["allow_paths"][0].as_str().unwrap().into()
}

fn marked(text: &str) -> Image {
    let mark = Layer::new(&[Entry::file("mark", text)], Packing::Gzip);
    Image::busybox().with_layer(mark)
}

async fn says(env: &mut Env, image: &str) -> String {
    let (code, out, err) = env.run(json!({"image": image, "command": "/bin/cat", "args": ["/mark"]})).await;
    assert_eq!(code, 0, "{image}: {err}");
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_archive_runs() {
    let mut env = environment().await;
    let files = files(&env);
    let directory = layout(&marked("from files\n"), &files.join("layout"));
    let (oci, docker) = (files.join("app.oci.tar"), files.join("app.docker.tar"));
    skopeo(&directory, &format!("oci-archive:{}:two", oci.display()));
    skopeo(&directory, &format!("docker-archive:{}:team/app:3", docker.display()));
    for image in [
        format!("oci:{}", directory.display()),
        format!("oci:{}:one", directory.display()),
        format!("oci-archive:{}", oci.display()),
        format!("docker-archive:{}", docker.display()),
        format!("docker-archive:{}:docker.io/team/app:3", docker.display()),
    ] {
        assert_eq!(says(&mut env, &image).await, "from files\n", "{image}");
    }
    // The image is an artifact that Nomad has put into the task's own directory.
    let image = "docker-archive:local/app.tar";
    let mut task = env.prepare(json!({"image": image, "command": "/bin/cat", "args": ["/mark"]})).await;
    fs::copy(&docker, task.dirs.alloc_dir.join("web/local/app.tar")).unwrap();
    env.try_start(&mut task).await.unwrap();
    assert_eq!(env.finish_task(task).await.1, "from files\n");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changed_is_another_image() {
    let mut env = environment().await;
    let files = files(&env);
    let path = files.join("app.tar");
    let image = format!("oci-archive:{}", path.display());
    let mut running = Vec::new();
    for text in ["one\n", "two\n"] {
        let _ = fs::remove_file(&path);
        let directory = layout(&marked(text), &files.join(text.trim()));
        skopeo(&directory, &format!("oci-archive:{}", path.display()));
        assert_eq!(says(&mut env, &image).await, text);
        assert_eq!(says(&mut env, &image).await, text, "the second time without reading it");
        let script = "until [ -e /alloc/data/go ]; do sleep 0.05; done; cat /mark";
        running.push(env.start(shell_in(&image, script)).await);
    }
    // The image of a running task stays until the task ends, even when the image's name stands for another image by
    // now.
    let swept =
        send_request(&env.dir.join("run/control.sock"), &Request::Gc { dry_run: false }, CONTROL).await.unwrap();
    assert_eq!(swept, Answer::Removed(Vec::new()));
    for (task, text) in running.into_iter().zip(["one\n", "two\n"]) {
        fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
        assert_eq!(env.finish_task(task).await.1, text);
    }
    let swept =
        send_request(&env.dir.join("run/control.sock"), &Request::Gc { dry_run: false }, CONTROL).await.unwrap();
    let Answer::Removed(swept) = swept else { panic!("{swept:?}") };
    assert_eq!(swept.iter().map(|one| one.kind.as_str()).collect::<Vec<_>>(), ["lease"], "the first one's: {swept:?}");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_archives_are_refused_with_a_reason() {
    let mut env = environment().await;
    let files = files(&env);
    let good = layout(&marked("x"), &files.join("good"));
    let tar = files.join("good.tar");
    skopeo(&good, &format!("docker-archive:{}", tar.display()));
    let bytes = fs::read(&tar).unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = files.join(name);
        fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let climbing = Layer::new(&[Entry::file("../../escaped", "x")], Packing::Gzip);
    let climbs = layout(&Image::busybox().with_layer(climbing), &files.join("climbs"));
    let tampered = layout(&marked("y"), &files.join("tampered"));
    let layer = tampered.join("blobs/sha256").join(&Digest::of(&marked("y").layers[1].bytes).as_str()[7..]);
    let mut bytes_of = fs::read(&layer).unwrap();
    *bytes_of.last_mut().unwrap() ^= 1;
    fs::write(&layer, bytes_of).unwrap();
    let short = layout(&marked("s"), &files.join("short"));
    let cut = short.join("blobs/sha256").join(&Digest::of(&marked("s").layers[1].bytes).as_str()[7..]);
    fs::write(&cut, b"something else").unwrap();
    let linked = layout(&marked("z"), &files.join("linked"));
    let layer = linked.join("blobs/sha256").join(&Digest::of(&marked("z").layers[1].bytes).as_str()[7..]);
    fs::remove_file(&layer).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &layer).unwrap();
    let bomb = layout(&marked("w"), &files.join("bomb"));
    fs::File::options().write(true).open(bomb.join("index.json")).unwrap().set_len(1 << 40).unwrap();
    let empty = files.join("empty-layout");
    fs::create_dir_all(&empty).unwrap();
    fs::write(empty.join("index.json"), r#"{"schemaVersion": 2, "manifests": []}"#).unwrap();
    let gzip = {
        use std::io::Write as _;
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&bytes).unwrap();
        encoder.finish().unwrap()
    };
    nix::unistd::mkfifo(&files.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    // A "long name" entry of 64 GiB in a sparse file.
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNULongName);
    header.set_size(64 << 30);
    header.set_cksum();
    let long_name = file("long-name.tar", header.as_bytes());
    fs::File::options().write(true).open(&long_name).unwrap().set_len(65 << 30).unwrap();
    let cases = [
        (format!("docker-archive:{long_name}"), "more than 1 MiB"),
        (format!("docker-archive:{}", files.join("fifo").display()), "not a regular file"),
        (format!("oci-archive:{}", files.display()), "not a regular file"),
        ("oci-archive:/dev/zero".to_owned(), "allow_paths"),
        (format!("docker-archive:{}", file("half.tar", &bytes[..bytes.len() / 2])), "cut off"),
        (format!("docker-archive:{}", file("head.tar", &bytes[..100])), "not a tar archive"),
        (format!("docker-archive:{}", file("zip.tar.gz", &gzip)), "compressed"),
        (format!("docker-archive:{}", file("nothing.tar", b"")), "empty"),
        (format!("docker-archive:{}:other:1", tar.display()), "name exactly one"),
        (format!("oci-archive:{}", tar.display()), "index.json"),
        (format!("oci:{}", files.join("missing").display()), "No such file"),
        (format!("oci:{}:two", good.display()), "no image called \"two\""),
        (format!("oci:{}", empty.display()), "contains no image"),
        (format!("oci:{}", climbs.display()), "escapes"),
        (format!("oci:{}", tampered.display()), "digest"),
        (format!("oci:{}", short.display()), "it has 14 bytes"),
        (format!("oci:{}", linked.display()), "blob sha256:"),
        (format!("oci:{}", bomb.display()), "larger than"),
        ("oci:/etc".to_owned(), "allow_paths"),
        ("docker-archive:local/../../../x.tar".to_owned(), "leads out"),
    ];
    each_case(cases, async |(image, told)| {
        let mut task = env.prepare(json!({"image": image, "command": "/bin/true"})).await;
        let error = env.try_start(&mut task).await.expect_err(&image);
        assert!(error.message().contains(told), "{image}: {told:?} not in {:?}", error.message());
    })
    .await;
    assert!(!Path::new("/escaped").exists());
    env.finish().await;
}

pub(crate) async fn gc(env: &Env, dry_run: bool) -> Vec<(String, String)> {
    let answer = send_request(&env.dir.join("run/control.sock"), &Request::Gc { dry_run }, CONTROL).await.unwrap();
    let Answer::Removed(removed) = answer else { panic!("{answer:?}") };
    assert!(removed.iter().all(|one| one.problem.is_none()), "{removed:?}");
    removed.into_iter().map(|one| (one.kind, one.name)).collect()
}

/// The traces of an image in containerd and on disk.
async fn traces(env: &Env) -> (Vec<String>, Vec<String>, usize) {
    let client = Client::new(&services().containerd, &env.namespace, "overlayfs");
    let images = client.images().await.unwrap().into_iter().map(|(name, _)| name).collect();
    (
        images,
        client.leases().await.unwrap().into_iter().map(|lease| lease.0).collect(),
        leak::entries(&env.dir.join("state/images")).len(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_nobody_uses_goes() {
    let mut env = Env::configured(json!({"image": {"keep": "0s"}})).await;
    let image = env.busybox().await;
    let task = env.sh("sleep 600").await;
    assert_eq!(gc(&env, false).await, [], "a task uses it");
    let request = Request::RemoveImage { image: image.clone() };
    let refused = send_request(&env.dir.join("run/control.sock"), &request, CONTROL).await;
    assert!(refused.unwrap_err().to_string().contains("in use"));
    // A task that the next plugin has recovered uses the image, too.
    env.kill_plugin().await;
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(gc(&env, false).await, [], "a recovered task uses it");
    env.destroy(&task).await.unwrap();
    assert_eq!(gc(&env, true).await, [("image".to_owned(), image.clone())]);
    assert_eq!(gc(&env, false).await, [("image".to_owned(), image.clone())]);
    assert_eq!(traces(&env).await, (vec![], vec![], 0));
    let client = Client::new(&services().containerd, &env.namespace, "overlayfs");
    eventually("containerd's own collector has taken the layers", async || {
        let left = client.snapshot_keys().await.unwrap();
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    // The image can be pulled again.
    let again = env.sh("echo again").await;
    assert_eq!(env.finish_task(again).await.1, "again\n");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_others_made_in_containerd_stays_there() {
    let mut env = Env::configured(json!({"image": {"keep": "0s"}})).await;
    let image = env.busybox().await;
    let address = services().containerd.to_str().unwrap();
    let ctr = ["-a", address, "-n", &env.namespace, "images", "pull", "--plain-http", &image];
    run(Command::new("ctr").args(ctr));
    let task = env.sh("echo theirs").await;
    assert_eq!(env.finish_task(task).await.1, "theirs\n");
    // The teardown of the task, which runs in the background, uses the image.
    eventually("the image is collected", async || {
        let removed = gc(&env, false).await;
        if removed == [("image".to_owned(), image.clone())] { Ok(()) } else { Err(removed) }
    })
    .await;
    assert_eq!(traces(&env).await, (vec![image], vec![], 0));
    env.finish().await;
}

/// A pull whose plugin died before the pull ended.
#[tokio::test(flavor = "multi_thread")]
async fn leases_of_a_dead_pull_go_at_the_next_opening() {
    let mut env = Env::new().await;
    let client = Client::new(&services().containerd, &env.namespace, "overlayfs");
    let task = env.sh("echo x").await;
    let own = client.leases().await.unwrap();
    let prefix = own[0].0.rsplit_once('-').unwrap().0;
    let stale = nomad_driver_shim::containerd::LeaseId(format!("{prefix}-pull-0123456789abcdef"));
    client.create_lease(&stale, None).await.unwrap();
    let somebody_elses = nomad_driver_shim::containerd::LeaseId("somebody-elses".to_owned());
    client.create_lease(&somebody_elses, None).await.unwrap();
    env.finish_task(task).await;
    env.kill_plugin().await;
    env.start_plugin().await;
    eventually("the stale lease is gone", async || {
        let leases = client.leases().await.unwrap();
        if leases.contains(&stale) { Err(leases) } else { Ok(()) }
    })
    .await;
    assert!(client.leases().await.unwrap().contains(&own[0]), "the image's own stays");
    assert!(client.leases().await.unwrap().contains(&somebody_elses));
    client.delete_lease(&somebody_elses).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_of_the_last_use_counts() {
    let mut env = Env::configured(json!({"image": {"keep": "1h"}})).await;
    let task = env.sh("sleep 600").await;
    let record = env.dir.join("state/images").join(&leak::entries(&env.dir.join("state/images"))[0]);
    let old = std::time::SystemTime::now() - Duration::from_secs(7200);
    let age = |path: &Path| fs::File::options().append(true).open(path).unwrap().set_modified(old).unwrap();
    age(&record);
    env.destroy(&task).await.unwrap();
    assert_eq!(gc(&env, true).await, [], "its task has only just gone");
    // The teardown goes on in the background, and the time of the image's last use is written when it is done.
    eventually("the task's record is gone", async || {
        let left = leak::entries(&env.dir.join("run/tasks"));
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    age(&record);
    assert_eq!(gc(&env, true).await.len(), 1);
    let kept: Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    assert!(kept["lease"].is_string());
    env.finish().await;
}
