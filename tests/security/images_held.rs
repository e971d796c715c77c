//! Images with links at the places where runtimes mount and write, or with working directories and commands that lead
//! to the host. Such images are refused, or their paths end inside the image's own root.

use std::{fs, path::Path};

use nomad_driver_shim::process::which;
use serde_json::{Value, json};

use crate::{
    decoy::{Decoy, SECRET},
    probe::{Outcome, outcome},
    runtimes,
    support::{Entry, Env, Image, Layer, Packing, script, services},
};

/// The paths at which a runtime mounts or writes while it creates a container; each group is one image. `/dev` has
/// tests of its own.
const PLACES: [&[&str]; 4] = [
    &["etc"],
    &["etc/hosts", "etc/resolv.conf", "etc/hostname", "etc/mtab", "alloc", "local", "secrets"],
    &["proc"],
    &["sys"],
];

/// Reads the decoy's files at every such path.
const LOOK: &str = "for at in /etc /etc/hosts /alloc /local /secrets /proc /sys /dev/shm /m .; do \
     cat $at $at/secret $at/data/file; done 2>/dev/null; echo looked";

async fn push(name: &str, entries: &[Entry]) -> String {
    let image = Image::busybox().with_layer(Layer::new(entries, Packing::Gzip));
    image.push(&services().registry, &format!("images/{name}:1")).await
}

fn look(image: &str, runtime: &str) -> Value {
    json!({"image": image, "runtime": runtime, "command": "/bin/busybox", "args": ["sh", "-c", LOOK]})
}

/// Runs a job that must neither see nor change the decoy, and returns the outcome.
async fn harmless(env: &mut Env, decoy: &Decoy, attack: &str, config: Value) -> Outcome {
    let seen = outcome(env, config).await;
    assert!(!seen.text().contains(SECRET.trim()), "{attack}: {seen:?}");
    decoy.assert_untouched(attack);
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn links_of_an_image_stay_in_it() {
    let mut env = Env::new().await;
    let decoy = Decoy::new(&env);
    for places in PLACES {
        for (form, target) in [
            ("absolute", decoy.path().to_owned()),
            ("magic", format!("/proc/1/root{}", decoy.path())),
            ("parents", format!("{}{}", "../".repeat(12), &decoy.path()[1..])),
        ] {
            // A path of a file gets a link to a file.
            let links = places.iter().map(|place| {
                let file = if place.starts_with("etc/") { "/hosts" } else { "" };
                Entry::symlink(place, &format!("{target}{file}"))
            });
            let name = format!("{}-{form}", places[0].replace('/', "-"));
            let image = push(&name, &links.collect::<Vec<_>>()).await;
            for runtime in runtimes() {
                let attack = format!("{runtime}, {places:?} -> {target}");
                harmless(&mut env, &decoy, &attack, look(&image, &runtime)).await;
            }
        }
    }
    env.finish().await;
}

/// Control test: a runtime that follows links on the host changes the decoy at the places without a mount.
#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_follows_links_is_noticed() {
    let programs = tempfile::tempdir().unwrap();
    let naive = programs.path().join("naive");
    let bundle =
        "previous=; for word in \"$@\"; do [ \"$previous\" != --bundle ] || bundle=$word; previous=$word; done";
    script(&naive, &format!("{bundle}\n[ -z \"$bundle\" ] || echo > \"$bundle/rootfs/opt/made\"\nexec crun \"$@\""));
    let mut env = Env::configured(json!({"runtime": {"naive": {"binary": naive}}})).await;
    let decoy = Decoy::new(&env);
    let image = push("opt", &[Entry::symlink("opt", decoy.path())]).await;
    outcome(&mut env, look(&image, "naive")).await;
    assert!(decoy.changes().iter().any(|change| change.contains("/made")), "{:?}", decoy.changes());
    env.finish().await;
}

/// The job's own mounts, at a target that is a link in the image.
#[tokio::test(flavor = "multi_thread")]
async fn targets_of_mounts_stay_in_the_image() {
    let mut env = Env::new().await;
    let decoy = Decoy::new(&env);
    let up = format!("{}{}", "../".repeat(12), &decoy.path()[1..]);
    for (name, target) in [("absolute", decoy.path()), ("parents", &up), ("root", "/"), ("magic", "/proc/self/root")] {
        let links = [Entry::symlink("m", target), Entry::dir("n"), Entry::symlink("n/link", target)];
        let image = push(&format!("target-{name}"), &links).await;
        for (kind, at) in [("tmpfs", "/m/data"), ("bind", "/n/link/data"), ("bind", "/m"), ("tmpfs", "/n/link")] {
            for runtime in runtimes() {
                let mut config = look(&image, &runtime);
                config["mounts"] = json!([{"type": kind, "source": "local", "target": at, "options": ["rw"]}]);
                harmless(&mut env, &decoy, &format!("{runtime}, {kind} at {at} -> {target}"), config).await;
            }
        }
    }
    env.finish().await;
}

/// A working directory that the runtime has open would lie outside the root (CVE-2024-21626).
#[tokio::test(flavor = "multi_thread")]
async fn working_directories_lie_in_the_image() {
    let mut env = Env::new().await;
    let decoy = Decoy::new(&env);
    let links = [Entry::symlink("w", decoy.path()), Entry::symlink("fd", "/proc/self/fd/7")];
    let image = push("directories", &links).await;
    let mut directories: Vec<String> = (3..=10).map(|fd| format!("/proc/self/fd/{fd}")).collect();
    let others = ["/w", "/fd", "/proc/1/root", "/proc/1/cwd", "/proc/self/cwd", "/proc/thread-self/fd/7", decoy.path()];
    directories.extend(others.map(str::to_owned));
    let out = format!("{}{}/secret", "../".repeat(12), &decoy.path()[1..]);
    for runtime in runtimes() {
        for directory in &directories {
            let mut config = look(&image, &runtime);
            config["cwd"] = json!(directory);
            config["args"] = json!(["sh", "-c", format!("{LOOK}; cat {out} ./{out}; cd ..; cat decoy/secret; pwd -P")]);
            let seen = harmless(&mut env, &decoy, &format!("{runtime}, cwd {directory}"), config).await;
            let inside = matches!(&seen, Outcome::Ran(_, out, _) if out.contains("looked\n"));
            assert!(inside || matches!(seen, Outcome::Refused(_)), "{runtime}, {directory}: {seen:?}");
        }
        // The same working directory in the image's configuration.
        let image = Image::busybox().with_config("WorkingDir", json!("/proc/self/fd/7"));
        let image = image.push(&services().registry, "images/workdir:1").await;
        harmless(&mut env, &decoy, &format!("{runtime}, WORKDIR"), look(&image, &runtime)).await;
    }
    env.finish().await;
}

/// The inode, length and modification time of a program of the host.
fn identity(program: &Path) -> (u64, u64, i64) {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = fs::metadata(program).unwrap();
    (metadata.ino(), metadata.len(), metadata.mtime())
}

/// A command that is the runtime itself, by the path under which a process finds its own program (CVE-2019-5736).
#[tokio::test(flavor = "multi_thread")]
async fn commands_lie_in_the_image() {
    let mut env = Env::new().await;
    let decoy = Decoy::new(&env);
    let image = push(
        "commands",
        &[
            Entry::file("script", "#!/proc/self/exe\n"),
            Entry::file("other-script", "#!/proc/1/root/bin/sh\necho looked\n"),
            Entry::symlink("itself", "/proc/self/exe"),
            Entry::symlink("host", &format!("/proc/1/root{}/bin/sh", decoy.path())),
            Entry::symlink("up", &format!("{}{}/bin/sh", "../".repeat(12), &decoy.path()[1..])),
            Entry { kind: tar::EntryType::Fifo, ..Entry::file("fifo", "") },
            Entry { kind: tar::EntryType::Char, ..Entry::file("device", "") },
            Entry::symlink("loop", "loop"),
        ],
    )
    .await;
    for runtime in runtimes() {
        let program = which(Path::new(&runtime)).unwrap();
        let before = identity(&program);
        for command in [
            "/script",
            "/other-script",
            "/itself",
            "/host",
            "/up",
            "/fifo",
            "/device",
            "/loop",
            "/proc/self/exe",
            "/proc/1/exe",
            "/proc/self/fd/4",
            "/",
            "/bin",
            "bin/../../../../bin/sh",
            "",
        ] {
            let config = json!({"image": image, "runtime": runtime, "command": command, "args": ["-c", LOOK]});
            let seen = harmless(&mut env, &decoy, &format!("{runtime}, command {command}"), config).await;
            // The program that runs is the image's own: busybox, which prints this.
            if let Outcome::Ran(code, out, _) = &seen {
                assert!(out.ends_with("looked\n") || *code != 0, "{runtime}, {command}: {seen:?}");
            }
            assert_eq!(identity(&program), before, "{runtime}, {command}");
        }
    }
    env.finish().await;
}
