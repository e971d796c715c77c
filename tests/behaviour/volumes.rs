//! VOLUMEs of images: each task has a directory of its own there, as with docker.

use std::{fs, time::Duration};

use serde_json::{Value, json};
use tar::EntryType;

use crate::support::{Entry, Env, EnvOptions, Image, Layer, Packing, services};

const RUNTIMES: [&str; 2] = ["crun", "runc"];

/// Pushes an image with these volumes and, at `/srv`, files of all kinds.
async fn image(volumes: &[&str], tag: &str) -> String {
    let volumes: serde_json::Map<String, Value> = volumes.iter().map(|path| ((*path).to_owned(), json!({}))).collect();
    let srv = [
        Entry { mode: 0o2750, owner: 1000, ..Entry::dir("srv") },
        Entry { mode: 0o4755, owner: 1000, ..Entry::file("srv/program", "#!/bin/sh\necho hello\n") },
        Entry { kind: EntryType::Link, ..Entry::symlink("srv/second-name", "srv/program") },
        Entry::symlink("srv/link", "/etc/passwd"),
        Entry { kind: EntryType::Fifo, mode: 0o600, ..Entry::file("srv/fifo", "") },
        Entry::dir("srv/inner"),
        Entry { mode: 0o600, ..Entry::file("srv/inner/file", "inner\n") },
        Entry::file("file", "a file"),
    ];
    let image = Image::busybox().with_layer(Layer::new(&srv, Packing::None));
    image.with_config("Volumes", Value::Object(volumes)).push(&services().registry, &format!("test/{tag}:1")).await
}

fn shell(image: &str, script: &str, options: &Value) -> Value {
    let mut config = json!({"image": image, "command": "/bin/sh", "args": ["-c", script]});
    config.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    config
}

/// Returns what a script prints in a task.
async fn printed(env: &mut Env, config: Value) -> String {
    let (code, out, err) = env.run(config.clone()).await;
    assert_eq!(code, 0, "{config}: {out}{err}");
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_has_the_images_content_and_can_be_written() {
    let mut env = Env::new().await;
    let image = image(&["/srv", "/not/in/the/image"], "volume-content").await;
    let look = "cd /srv; stat -c '%n %F %a %u %g %h %Y' . program link fifo inner/file; cat inner/file; readlink link";
    for runtime in RUNTIMES {
        let in_image = printed(&mut env, {
            let without = self::image(&[], "volume-without").await;
            shell(&without, look, &json!({"runtime": runtime}))
        })
        .await;
        let options = json!({"runtime": runtime, "readonly_rootfs": true});
        assert_eq!(printed(&mut env, shell(&image, look, &options)).await, in_image, "{runtime}");
        let script = "touch /srv/new /not/in/the/image/new && ls /srv/new; ls -ld /not/in/the/image | cut -c1-10; \
            awk '$2 == \"/srv\" { print ($3 == \"overlay\") ? \"an overlay\" : \"no overlay\" }' /proc/mounts; \
            touch /x 2>/dev/null || echo read-only";
        let expected = "/srv/new\ndrwxr-xr-x\nno overlay\nread-only\n";
        assert_eq!(printed(&mut env, shell(&image, script, &options)).await, expected, "{runtime}");
    }
    env.finish().await;
}

/// The content lives as long as the task, also across plugins, and no longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_lives_as_long_as_its_task() {
    for config in [json!({}), json!({"state": {"upper": "tmpfs"}})] {
        let mut env = Env::with(EnvOptions { config: config.clone(), ..EnvOptions::default() }).await;
        let image = image(&["/srv"], "volume-life").await;
        let task = env.start(shell(&image, "echo mine > /srv/data; echo ready; sleep 600", &json!({}))).await;
        task.says("ready").await;
        let other = env.start(shell(&image, "echo ready; sleep 600", &json!({}))).await;
        assert_eq!(env.exec_text(&other, "ls /srv/data 2>/dev/null | wc -l").await, "0\n", "{config}");
        env.kill_plugin().await;
        env.start_plugin().await;
        env.recover(&task).await.unwrap();
        env.recover(&other).await.unwrap();
        assert_eq!(env.exec_text(&task, "cat /srv/data").await, "mine\n", "{config}");
        for task in [&task, &other] {
            env.stop(task, Duration::ZERO, "").await.unwrap();
            env.destroy(task).await.unwrap();
        }
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_job_mounts_comes_before_a_volume() {
    let security = json!({"allow_paths": ["/"]});
    let mut env = Env::with(EnvOptions { config: json!({"security": security}), ..EnvOptions::default() }).await;
    let host = env.dir.join("host");
    fs::create_dir_all(&host).unwrap();
    fs::write(host.join("jobs"), "").unwrap();
    let bind = |target: &str| json!([{"type": "bind", "source": host, "target": target}]);
    for runtime in RUNTIMES {
        // The job's mount is at the volume.
        let volume = image(&["/srv", "/srv/inner"], "volume-jobs").await;
        let options = json!({"runtime": runtime, "mounts": bind("/srv")});
        // The second volume is in the job's mount, with the image's content.
        assert_eq!(
            printed(&mut env, shell(&volume, "ls /srv /srv/inner", &options)).await,
            "/srv:\ninner\njobs\n\n/srv/inner:\nfile\n"
        );
        fs::remove_dir(host.join("inner")).unwrap();
        // The job's mount is in the volume.
        let options = json!({"runtime": runtime, "mounts": bind("/srv/inner/host")});
        assert_eq!(
            printed(&mut env, shell(&volume, "ls /srv/inner /srv/inner/host", &options)).await,
            "/srv/inner:\nfile\nhost\n\n/srv/inner/host:\njobs\n"
        );
        // A volume in another one.
        assert_eq!(
            printed(&mut env, shell(&volume, "cat /srv/inner/file; touch /srv/inner/x", &json!({"runtime": runtime})))
                .await,
            "inner\n"
        );
    }
    env.finish().await;
}

/// Images name paths that no task may cover, paths of files, relative ones, and ones that links lead out of.
#[tokio::test(flavor = "multi_thread")]
async fn odd_volumes_do_not_prevent_a_start() {
    let mut env = Env::new().await;
    let paths = ["/sys/fs/cgroup", "/proc", "/dev", "/", "relative", "/local/volume", "/secrets", "/etc/hosts/x"];
    let image = image(&paths, "volume-odd").await;
    for runtime in RUNTIMES {
        let script = "touch /relative/x /local/volume/x && ls -d /proc/self/status /dev/null && echo fine";
        let out = printed(&mut env, shell(&image, script, &json!({"runtime": runtime}))).await;
        assert_eq!(out, "/dev/null\n/proc/self/status\nfine\n", "{runtime}");
    }
    // A file where a volume should be is an error of the image, as with docker.
    let file = self::image(&["/file"], "volume-file").await;
    let mut task = env.prepare(shell(&file, "true", &json!({}))).await;
    let error = env.try_start(&mut task).await.expect_err("refused");
    assert!(error.message().contains("VOLUME") && error.message().contains("/file"), "{error:?}");
    env.finish().await;
}

/// No content comes from outside of the image, wherever its links lead.
#[tokio::test(flavor = "multi_thread")]
async fn links_of_the_image_lead_no_volume_to_the_host() {
    let mut env = Env::new().await;
    let secret = env.dir.join("secret");
    fs::create_dir_all(&secret).unwrap();
    fs::write(secret.join("of-the-host"), "").unwrap();
    let links = [
        Entry::symlink("direct", secret.to_str().unwrap()),
        Entry::dir("real"),
        Entry { mode: 0o644, ..Entry::file("real/of-the-image", "") },
        Entry::symlink("inside", "/real"),
    ];
    let volumes = json!({"/direct": {}, "/inside": {}});
    let image = Image::busybox().with_layer(Layer::new(&links, Packing::None)).with_config("Volumes", volumes);
    let image = image.push(&services().registry, "test/volume-links:1").await;
    for runtime in RUNTIMES {
        let script = "ls /direct /inside; touch /inside/new && ls /real";
        let out = printed(&mut env, shell(&image, script, &json!({"runtime": runtime}))).await;
        assert!(!out.contains("of-the-host"), "{runtime}: {out}");
        assert!(out.ends_with("/inside:\nof-the-image\nnew\nof-the-image\n"), "{runtime}: {out}");
    }
    assert_eq!(fs::read_dir(&secret).unwrap().count(), 1);
    env.finish().await;
}

/// Links of the image lead a volume to where no mount may be, or a mount of the job hides the link.
#[tokio::test(flavor = "multi_thread")]
async fn volumes_behind_links_do_not_prevent_a_start() {
    let mut env = Env::configured(json!({"allow_privileged": true, "security": {"allow_paths": ["/"]}})).await;
    let links = [
        Entry::symlink("to-proc", "/proc/sys"),
        Entry::symlink("to-dev", "/dev"),
        Entry::symlink("to-shared", "/shared/volume"),
        Entry::dir("job"),
        Entry::symlink("job/link", "/etc"),
    ];
    let image = async |volumes: Value, name: &str| {
        let image = Image::busybox().with_layer(Layer::new(&links, Packing::None)).with_config("Volumes", volumes);
        image.push(&services().registry, &format!("test/{name}:1")).await
    };
    let hiding = image(json!({"/to-proc/volume": {}, "/to-dev": {}, "/job/link": {}}), "volume-hiding").await;
    let shared = image(json!({"/to-shared": {}}), "volume-shared").await;
    let host = env.dir.join("host");
    fs::create_dir_all(&host).unwrap();
    for runtime in RUNTIMES {
        let mounts = json!([{"type": "bind", "source": host, "target": "/job"}]);
        let script = "ls -A /job /job/link; touch /job/link/x && ls /job/link; ls -d /dev/null";
        let options = json!({"runtime": runtime, "mounts": mounts});
        let out = printed(&mut env, shell(&hiding, script, &options)).await;
        assert_eq!(out, "/job:\nlink\n\n/job/link:\nx\n/dev/null\n", "{runtime}");
        fs::remove_dir(host.join("link")).unwrap();
        let mounts = json!([{"type": "bind", "source": host, "target": "/shared", "options": ["rbind", "rshared"]}]);
        let options = json!({"runtime": runtime, "privileged": true, "mounts": mounts});
        let out = printed(&mut env, shell(&shared, "ls -A /shared; echo fine", &options)).await;
        assert_eq!(out, "fine\n", "{runtime}");
    }
    env.finish().await;
}
