//! Links in an image at the paths where runtimes mount and write: none of them leads to the host.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::{
    runtimes,
    support::{Entry, Env, Image, Layer, Packing, services},
};

/// A directory of the host with a file that runc 1.1 replaced in such an attack.
fn bait(env: &Env) -> PathBuf {
    let dir = env.dir.join("bait");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("ptmx"), "of the host").unwrap();
    dir
}

fn is_untouched(bait: &Path, what: &str) {
    assert_eq!(crate::support::leak::entries(bait), ["ptmx"], "{what}: entries were made or removed");
    assert_eq!(fs::read_to_string(bait.join("ptmx")).unwrap(), "of the host", "{what}");
}

/// Pushes busybox with these entries on top.
async fn image(env: &Env, name: &str, entries: &[Entry]) -> String {
    let layer = Layer::new(entries, Packing::None);
    let name = format!("links/{}-{name}:1", env.namespace);
    Image::busybox().with_layer(layer).push(&services().registry, &name).await
}

fn task(image: &str, script: &str) -> Value {
    json!({"image": image, "command": "/bin/busybox", "args": ["sh", "-c", script]})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_where_runtimes_write_is_replaced() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let bait = bait(&env);
        let host = bait.to_str().unwrap();
        for (name, leads_to) in [
            ("dev", host),
            ("dev", "/bin"),
            ("dev", "../../../../../../../../tmp"),
            ("proc", host),
            ("sys", host),
            ("etc", host),
            ("etc", "/proc/1/root/etc"),
        ] {
            let image = image(&env, &format!("{name}-{}", leads_to.len()), &[Entry::symlink(name, leads_to)]).await;
            let script = format!(
                "[ -d /{name} ] && [ ! -L /{name} ] && [ -c /dev/null ] && [ -r /proc/self/stat ] &&
                [ -d /sys/kernel ] && grep -q localhost /etc/hosts && echo right"
            );
            let mut prepared = env.prepare(task(&image, &script)).await;
            let started = env.try_start(&mut prepared).await;
            is_untouched(&bait, &format!("{runtime}: {name} -> {leads_to}"));
            started.unwrap_or_else(|status| panic!("{runtime}: {name} -> {leads_to}: {}", status.message()));
            let (_, out, err) = env.finish_task(prepared).await;
            assert_eq!(out, "right\n", "{runtime}: {name} -> {leads_to}: {err}");
            is_untouched(&bait, &format!("{runtime}: {name} -> {leads_to}"));
        }
        env.finish().await;
    }
}

/// An image may have its /etc elsewhere: the link stays, and leads only to paths below the root.
#[tokio::test(flavor = "multi_thread")]
async fn an_etc_that_is_a_link_within_the_image_stays() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let entries = [Entry::dir("usr"), Entry::dir("usr/etc"), Entry::file("usr/etc/app.conf", "configured\n")];
        let passwd = Entry::file("usr/etc/passwd", "app:x:1000:1000::/:/bin/sh\n");
        let link = Entry::symlink("etc", "usr/etc");
        let entries: Vec<Entry> = entries.into_iter().chain([passwd, link]).collect();
        let image = image(&env, "etc-inside", &entries).await;
        let script = "cat /etc/app.conf && grep -c localhost /usr/etc/hosts /etc/hosts";
        let mut config = task(&image, script);
        config["cwd"] = json!("/");
        let mut prepared = env.prepare(config).await;
        // The image's own accounts apply.
        prepared.config.user = "app".to_owned();
        env.try_start(&mut prepared).await.unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
        let (_, out, err) = env.finish_task(prepared).await;
        assert_eq!(out.lines().next(), Some("configured"), "{runtime}: {out}{err}");
        assert!(out.contains("/usr/etc/hosts:2") && out.contains("/etc/hosts:2"), "{runtime}: {out}{err}");
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_image_has_at_hosts_and_resolv_conf_is_replaced() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let bait = bait(&env);
        let file = bait.join("ptmx");
        let fifo = |path: &str| Entry { kind: tar::EntryType::Fifo, ..Entry::file(path, "") };
        let cases = [
            ("link", Entry::symlink("etc/hosts", file.to_str().unwrap())),
            ("relative", Entry::symlink("etc/hosts", "../../../../../../../../../etc/passwd")),
            ("dangling", Entry::symlink("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")),
            ("fifo", fifo("etc/hosts")),
            ("fifo-resolv", fifo("etc/resolv.conf")),
        ];
        for (name, entry) in cases {
            let image = image(&env, name, &[entry]).await;
            let script =
                "[ -f /etc/hosts ] && [ ! -L /etc/hosts ] && [ -f /etc/resolv.conf ] && [ ! -L /etc/resolv.conf ] &&
                echo 127.0.0.9 added >>/etc/hosts && grep -c localhost /etc/hosts && grep -c added /etc/hosts";
            let (_, out, err) = env.run(task(&image, script)).await;
            assert_eq!(out, "2\n1\n", "{runtime}: {name}: {err}");
            is_untouched(&bait, &format!("{runtime}: {name}"));
        }
        // A file can't be mounted over a directory: docker can't do it either.
        let image = image(&env, "directory", &[Entry::dir("etc/hosts"), Entry::file("etc/hosts/x", "")]).await;
        let mut prepared = env.prepare(task(&image, "true")).await;
        let refused = env.try_start(&mut prepared).await.expect_err("a file over a directory");
        assert!(refused.message().contains("etc/hosts"), "{}", refused.message());
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_of_mounts_are_found_below_the_images_root() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let bait = bait(&env);
        let host = bait.to_str().unwrap();
        let entries = [
            Entry::dir("var"),
            Entry::dir("run"),
            Entry::symlink("var/run", "/run"),
            Entry::symlink("out", host),
            Entry::symlink("up", &format!("../../../../../../..{host}")),
            Entry::symlink("local", host),
            Entry::symlink("secrets", "/proc/1/root/tmp"),
            Entry::symlink("loop", "/loop"),
            Entry::symlink("kernel", "/proc/sys"),
            Entry::symlink("top", "/"),
        ];
        let image = image(&env, "targets", &entries).await;
        let run = |target: &str, script: &str| {
            let mounts =
                json!([{"type": "bind", "source": "alloc/data", "target": target, "options": ["rbind", "rw"]}]);
            let mut config = task(&image, script);
            config["mounts"] = mounts;
            config
        };
        // Nomad's own environment variables name targets that are links.
        for (target, seen) in [("/var/run/app", "/run/app"), ("/out/new", host), ("/up/new", host), ("/m", "/m")] {
            let script = format!("echo x >{target}/made; grep -c ' {seen}' /proc/self/mountinfo");
            let mut prepared = env.prepare(run(target, &script)).await;
            // A link into /proc is refused below.
            prepared.config.env.insert("NOMAD_SECRETS_DIR".to_owned(), "/s".to_owned());
            let alloc_dir = prepared.dirs.alloc_dir.clone();
            env.try_start(&mut prepared).await.unwrap_or_else(|status| panic!("{target}: {}", status.message()));
            let (_, out, err) = env.finish_task(prepared).await;
            is_untouched(&bait, &format!("{runtime}: {target}"));
            assert_ne!(out, "0\n", "{runtime}: {target}: {err}");
            assert_eq!(fs::read_to_string(alloc_dir.join("alloc/data/made")).unwrap(), "x\n", "{runtime}: {target}");
        }
        for (target, part) in [("/loop/x", "links"), ("/kernel/x", "/proc"), ("/top", "root"), ("/m", "/proc")] {
            let mut prepared = env.prepare(run(target, "mount")).await;
            if target != "/m" {
                prepared.config.env.insert("NOMAD_SECRETS_DIR".to_owned(), "/s".to_owned());
            }
            let refused = env.try_start(&mut prepared).await.expect_err(target);
            assert!(refused.message().contains(part), "{runtime}: {target}: {}", refused.message());
            is_untouched(&bait, &format!("{runtime}: {target}"));
        }
        env.finish().await;
    }
}
