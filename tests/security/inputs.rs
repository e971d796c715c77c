//! Values of jobs and images that the kernel, the runtimes or the files can't take are refused at once with the
//! option's name, and nothing of the task remains. The tables also contain cases close to each finding.

use std::time::{Duration, Instant};

use nomad_driver_shim::pb::driver::{DnsConfig, Mount, TaskConfig};
use serde_json::{Value, json};

use crate::{
    runtimes,
    support::{Entry, Env, Image, Layer, Packing, each_case, services, shell_in},
};

/// A refusal takes milliseconds, and some come after a pull. The faults that these tests look for took a minute.
const PROMPT: Duration = Duration::from_secs(25);

/// Starts a task that must be refused, and returns the driver's error text.
async fn refused(env: &mut Env, what: &str, config: Value, change: impl FnOnce(&mut TaskConfig)) -> String {
    let mut task = env.prepare(config).await;
    change(&mut task.config);
    let began = Instant::now();
    let answer = env.try_start(&mut task).await;
    let took = began.elapsed();
    if answer.is_ok() {
        env.destroy(&task).await.unwrap();
        panic!("{what}: it runs");
    }
    let status = answer.expect_err("just seen");
    let text = status.message().to_owned();
    assert!(took < PROMPT, "{what}: took {took:?}: {text}");
    assert!(text.chars().count() < 3000 && !text.contains(char::is_control), "{what}: {text:?}");
    text
}

async fn must_say(env: &mut Env, what: &str, config: Value, parts: &[&str]) {
    let text = refused(env, what, config, |_| {}).await;
    assert!(parts.iter().all(|part| text.contains(part)), "{what}: {parts:?} in {text}");
}

/// Pushes a separate image for each case, and returns its name.
async fn push(name: &str, image: Image) -> String {
    image.push(&services().registry, &format!("inputs/{name}:1")).await
}

fn special(path: &str, kind: tar::EntryType, link: &str) -> Layer {
    Layer::new(&[Entry { kind, link: link.to_owned(), ..Entry::file(path, "") }], Packing::None)
}

/// A layer with the device node of `/dev/zero` at another path.
fn device(path: &str) -> Layer {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Char);
    header.set_path(path).unwrap();
    header.set_mode(0o666);
    header.set_size(0);
    header.set_device_major(1).unwrap();
    header.set_device_minor(5).unwrap();
    header.set_cksum();
    builder.append(&header, &[][..]).unwrap();
    let bytes = builder.into_inner().unwrap();
    let diff_id = nomad_driver_shim::ids::Digest::of(&bytes);
    Layer { diff_id, bytes, media_type: "application/vnd.oci.image.layer.v1.tar" }
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_files_are_plain_files() {
    use tar::EntryType::{Directory, Fifo, Symlink};
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let cases = [
            ("passwd-fifo", "etc/passwd", Fifo, "", "/etc/passwd is a FIFO"),
            ("group-fifo", "etc/group", Fifo, "", "/etc/group is a FIFO"),
            ("passwd-directory", "etc/passwd", Directory, "", "/etc/passwd is a directory"),
            ("passwd-link-out", "etc/passwd", Symlink, "/proc/1/root/etc/passwd", "/etc/passwd is a link"),
            ("group-link-to-device", "etc/group", Symlink, "/dev/zero", "/etc/group is a link"),
            ("passwd-link-loop", "etc/passwd", Symlink, "passwd", "/etc/passwd is a link"),
            ("group-link-to-fifo", "etc/group", Symlink, "../fifo", "/etc/group is a FIFO"),
        ];
        each_case(cases, async |(name, path, kind, link, words)| {
            let image = Image::busybox().with_layer(special("fifo", Fifo, "")).with_layer(special(path, kind, link));
            let image = push(name, image).await;
            let config = shell_in(&image, "id");
            must_say(&mut env, &format!("{runtime}, {name}"), config, &[words]).await;
        })
        .await;
        let image = push("passwd-device", Image::busybox().with_layer(device("etc/passwd"))).await;
        let config = json!({"image": image, "command": "/bin/sh"});
        must_say(&mut env, &format!("{runtime}, device"), config, &["/etc/passwd is a device"]).await;
        env.finish().await;
    }
}

/// The runtime also reads files that a job mounts over the account files.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_but_plain_files_is_mounted_over_accounts_files() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        for (source, target) in [("local/fifo", "/etc/passwd"), ("local/etc", "/etc"), ("local/fifo", "//etc/./group")]
        {
            let mounts = json!([{"type": "bind", "source": source, "target": target, "options": ["rbind", "rw"]}]);
            let config = env.shell("id", json!({"mounts": mounts})).await;
            let mut task = env.prepare(config).await;
            let local = task.dirs.alloc_dir.join(&task.dirs.name).join("local");
            std::fs::create_dir_all(local.join("etc")).unwrap();
            for fifo in ["fifo", "etc/group"] {
                nix::unistd::mkfifo(&local.join(fifo), nix::sys::stat::Mode::S_IRWXU).unwrap();
            }
            let began = Instant::now();
            let status = env.try_start(&mut task).await.expect_err("refused");
            assert!(began.elapsed() < PROMPT, "{runtime}, {target}: took {:?}", began.elapsed());
            assert!(status.message().contains("is a FIFO"), "{runtime}, {target}: {}", status.message());
        }
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn strings_and_paths_are_within_the_kernels_limits() {
    let long = "x".repeat(1 << 20);
    let path = format!("/{long}");
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let many: Vec<String> = (0..24).map(|_| "y".repeat(100_000)).collect();
        let cases = [
            ("command", json!({"command": path}), "the command has 1048577 bytes"),
            // An argument of this length is permitted, but runc hangs on a command path of this length.
            ("command", json!({"command": &path[..120_000]}), "the command has 120000 bytes"),
            ("argument", json!({"args": ["-c", "true", long]}), "argument 3 of the command has 1048576 bytes"),
            ("all arguments", json!({"args": many}), "a quarter of the stack's limit"),
            ("cwd", json!({"cwd": path}), "cwd has 1048577 bytes"),
            (
                "mount",
                json!({"mounts": [{"type": "tmpfs", "target": path}]}),
                "the target of a mount has 1048577 bytes",
            ),
        ];
        each_case(cases, async |(what, options, words)| {
            let config = env.shell("true", options).await;
            must_say(&mut env, &format!("{runtime}, {what}"), config, &[words]).await;
        })
        .await;
        let config = env.shell("true", json!({})).await;
        let text =
            refused(&mut env, "variable", config, |task| drop(task.env.insert("BIG".into(), long.clone()))).await;
        assert!(text.contains("environment variable \"BIG\" has 1048580 bytes"), "{text}");
        // An image's configuration may have up to 4 MiB.
        for (name, key, value, words) in [
            (
                "cmd",
                "Cmd",
                json!(["/bin/sh", "-c", "true", "x".repeat(3 << 20)]),
                "argument 3 of the command has 3145728",
            ),
            ("env", "Env", json!([format!("IMAGES={long}")]), "environment variable \"IMAGES\" has 1048583"),
            ("workdir", "WorkingDir", json!(path), "cwd has 1048577 bytes"),
        ] {
            let image = push(&format!("long-{name}"), Image::busybox().with_config(key, value)).await;
            must_say(&mut env, &format!("{runtime}, image's {name}"), json!({"image": image}), &[words]).await;
        }
        // Values within the kernel's limits run.
        let script = format!("echo $# ${{#1}} #{}", "x".repeat(131_000));
        let config = json!({"image": env.busybox().await, "command": "/bin/sh", "args": ["-c", script, "-", "z".repeat(131_071)]});
        assert_eq!(env.run(config).await.1, "1 131071\n", "{runtime}");
        let mut task = env.prepare(env.shell("env | wc -c", json!({})).await).await;
        task.config.env.extend((0..19).map(|n| (format!("V{n}"), "e".repeat(100_000))));
        env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
        let (_, out, _) = env.finish_task(task).await;
        assert!(out.trim().parse::<u32>().unwrap() > 1_900_000, "{runtime}: {out}");
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_run_in_a_task_is_within_the_kernels_limits() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let config = env.shell("sleep 600", json!({})).await;
        let task = env.start(config).await;
        let long = "x".repeat(200_000);
        let cases = [
            (["/bin/echo", long.as_str()], "argument 1 of the command has 200000 bytes"),
            (["/bin/echo", "a\0b"], "argument 1 of the command contains a NUL byte"),
            (["/bin/echo\0x", ""], "the command contains a NUL byte"),
        ];
        each_case(cases, async |(command, words)| {
            let began = Instant::now();
            let error = env.exec(&task, &command, 0).await.expect_err(words);
            assert!(began.elapsed() < PROMPT, "{runtime}: {:?}", began.elapsed());
            assert!(error.message().contains(words), "{runtime}: {}", error.message());
        })
        .await;
        // The message in an interactive session.
        let outcome = env.talk(&task, &["/bin/echo", "a\0b"], false).await.unwrap().end().await;
        assert_eq!(outcome.code, Some(126), "{runtime}: {outcome:?}");
        assert!(outcome.stderr.contains("NUL byte"), "{runtime}: {outcome:?}");
        assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nul_bytes_are_refused_by_the_options_name() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"security": {"allow_devices": ["/dev/*"]}})).await;
        let cases = [
            ("command", json!({"command": "/bin/sh\0x"})),
            ("args", json!({"args": ["-c", "true\0x"]})),
            ("entrypoint", json!({"command": null, "entrypoint": ["/bin/sh", "-c", "true\0"]})),
            ("cwd", json!({"cwd": "/tmp\0/x"})),
            ("hostname", json!({"hostname": "a\0b"})),
            ("mounts[0].target", json!({"mounts": [{"type": "tmpfs", "target": "/t\0x"}]})),
            ("mounts[0].source", json!({"mounts": [{"source": "local\0x", "target": "/t"}]})),
            ("mounts[0].options", json!({"mounts": [{"type": "tmpfs", "target": "/t", "options": ["size=1m\0,x"]}]})),
            ("sysctl", json!({"sysctl": {"fs.mqueue.msg_max\0": "5"}})),
            ("sysctl", json!({"sysctl": {"fs.mqueue.msg_max": "5\x005"}})),
            ("annotations", json!({"annotations": {"run\0x": "1"}})),
            ("labels", json!({"labels": {"a": "\0"}})),
            ("group_add", json!({"group_add": ["extra\0x"]})),
            ("devices", json!({"devices": ["/dev/null\0x"]})),
            ("ulimit", json!({"ulimit": {"nofile": "10\0"}})),
            ("extra_hosts", json!({"extra_hosts": ["a\0b:1.2.3.4"]})),
            ("runtime", json!({"runtime": "crun\0x"})),
        ];
        each_case(cases, async |(option, options)| {
            let config = env.shell("true", options).await;
            let words = format!("{option} contains a NUL byte");
            must_say(&mut env, &format!("{runtime}, {option}"), config, &[&words]).await;
        })
        .await;
        type Change = fn(&mut TaskConfig);
        let sent: [(&str, Change); 5] = [
            ("env: \"A\" contains", |task| drop(task.env.insert("A".into(), "1\0B=2".into()))),
            ("env: the name \"A\\u{0}\" contains", |task| drop(task.env.insert("A\0".into(), "1".into()))),
            ("user contains", |task| task.user = "user\0:0".into()),
            ("volume_mount: destination contains", |task| {
                task.mounts.push(Mount { task_path: "/v\0x".into(), host_path: "/tmp".into(), ..Default::default() });
            }),
            ("dns: servers: \"1.1.1.1\\nnameserver 6.6.6.6\" contains a control character", |task| {
                let servers = vec!["1.1.1.1\nnameserver 6.6.6.6".into()];
                task.dns = Some(DnsConfig { servers, ..Default::default() });
            }),
        ];
        for (words, change) in sent {
            let config = env.shell("true", json!({})).await;
            let text = refused(&mut env, words, config, change).await;
            assert!(text.contains(words), "{runtime}: {words:?} in {text}");
        }
        for (name, key, value, words) in [
            ("env", "Env", json!(["A=1\0B=2"]), "environment variable \"A\" contains a NUL byte"),
            ("workdir", "WorkingDir", json!("/tmp\0/x"), "cwd contains a NUL byte"),
            ("cmd", "Cmd", json!(["/bin/sh", "-c", "true", "x\0y"]), "argument 3 of the command contains a NUL byte"),
            ("entrypoint", "Entrypoint", json!(["/bin/sh\0x"]), "the command contains a NUL byte"),
            ("user", "User", json!("user\0x"), "user \"user\\u{0}x\" is not in the image's /etc/passwd"),
        ] {
            let image = push(&format!("nul-{name}"), Image::busybox().with_config(key, value)).await;
            must_say(&mut env, &format!("{runtime}, image's {name}"), json!({"image": image}), &[words]).await;
        }
        env.finish().await;
    }
}

/// An image with odd users, some with ids that the kernel reads as "leave as it is".
fn odd_users() -> Image {
    Image::busybox()
        .with_file(
            "etc/passwd",
            "root:x:0:0::/:/bin/sh\nevil:x:4294967295:0::/:/bin/sh\ngid:x:5:4294967295::/:/bin/sh\n\
             neg:x:-1:0::/:/bin/sh\n4294967295:x:0:0::/:/bin/sh\n99999999999999999999:x:0:0::/:/bin/sh\n\
             text:x:zero:0::/:/bin/sh\nmember:x:70:70::/:/bin/sh\nseven:x:007:+8::/:/bin/sh\n",
        )
        .with_file("etc/group", "root:x:0:\nbig:x:4294967295:member\n4294967295:x:0:\nfine:x:9:\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_becomes_root_by_an_id_out_of_range() {
    let range = "in range 0-2147483647";
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let id = |image: &str| json!({"image": image, "command": "/bin/id"});
        let plain = push("users", odd_users()).await;
        for (user, words) in [
            ("evil", "entry \"evil:x:4294967295:0::/:/bin/sh\" of the image's /etc/passwd"),
            ("gid", "entry \"gid:x:5:4294967295::/:/bin/sh\" of the image's /etc/passwd"),
            ("5", "entry \"gid:x:5:4294967295::/:/bin/sh\" of the image's /etc/passwd"),
            ("neg", "entry \"neg:x:-1:0::/:/bin/sh\" of the image's /etc/passwd"),
            ("member", "entry \"big:x:4294967295:member\" of the image's /etc/group"),
            ("root:big", "entry \"big:x:4294967295:member\" of the image's /etc/group"),
            ("4294967295", "user \"4294967295\""),
            ("99999999999999999999", "user \"99999999999999999999\""),
            ("-1", "user \"-1\""),
            ("0:4294967295", "group \"4294967295\""),
        ] {
            let text = refused(&mut env, user, id(&plain), |task| task.user = user.into()).await;
            assert!(text.contains(words) && text.contains(range), "{runtime}, user {user}: {text}");
            // The same value in the image's own USER.
            let name = format!("users-{}", user.replace(':', ".").replace('-', "minus"));
            let image = push(&name, odd_users().with_config("User", json!(user))).await;
            must_say(&mut env, &format!("{runtime}, USER {user}"), id(&image), &[words, range]).await;
        }
        for group in ["big", "4294967295", "-1"] {
            let mut config = id(&plain);
            config["group_add"] = json!([group]);
            must_say(&mut env, &format!("{runtime}, group_add {group}"), config, &[range]).await;
        }
        let text = refused(&mut env, "text", id(&plain), |task| task.user = "text".into()).await;
        assert!(text.contains("user \"text\" is not in the image's /etc/passwd"), "{text}");
        // docker parses numbers as Go does.
        for (user, ids) in
            [("+5", None), ("007", Some((7, 8))), ("seven", Some((7, 8))), ("2147483647", Some((2_147_483_647, 0)))]
        {
            let mut task = env.prepare(id(&plain)).await;
            task.config.user = user.to_owned();
            match ids {
                // User 5 has an entry, but its group is out of range.
                None => assert!(env.try_start(&mut task).await.is_err(), "{runtime}, {user}"),
                Some((uid, gid)) => {
                    env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{user}: {}", status.message()));
                    let (_, out, _) = env.finish_task(task).await;
                    assert!(
                        out.starts_with(&format!("uid={uid}")) && out.contains(&format!(" gid={gid}")),
                        "{user}: {out}"
                    );
                }
            }
        }
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hostnames_are_names() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        for name in
            ["a\nb", "-x;$(id)", "a b", "\u{1b}[31mred", "a\u{202e}b", ".hidden", "h\u{f6}st", "a/b", &"x".repeat(65)]
        {
            let config = env.shell("hostname", json!({"hostname": name})).await;
            must_say(&mut env, &format!("{runtime}, {name:?}"), config, &["hostname = "]).await;
        }
        for name in ["web_1.example-2", "9", &"x".repeat(64)] {
            let config = env.shell("hostname", json!({"hostname": name})).await;
            assert_eq!(env.run(config).await.1, format!("{name}\n"), "{runtime}");
        }
        env.finish().await;
    }
    // nomad-driver-containerd accepted any value. Under the name `containerd-driver`, too, a value that is not plain
    // text is refused.
    let mut env = Env::drop_in(json!({})).await;
    for name in ["a\nb", "\u{1b}[31mred", "\u{9b}2J"] {
        let config = env.shell("hostname", json!({"hostname": name})).await;
        must_say(&mut env, name, config, &["hostname = "]).await;
    }
    let config = env.shell("hostname", json!({"hostname": "-x;$(id) b"})).await;
    assert_eq!(env.run(config).await.1, "-x;$(id) b\n");
    env.finish().await;
}
