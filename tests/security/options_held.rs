//! Options of a job that ask for more than the operator allows, and text that has a meaning for the program that
//! receives it: all of them are refused with the option's name before anything is made.

use std::{fs, os::unix::fs::symlink, time::Instant};

use serde_json::{Value, json};

use crate::{
    attack,
    decoy::{Decoy, SECRET},
    probe::{Outcome, outcome, refusal, refusal_of},
    runtimes,
    support::{Entry, Env, Image, Layer, Packing, each_case, patience, services, with_options},
};

/// Each option that removes a confinement, and the setting by which an operator would permit it.
fn openings() -> Vec<(Value, &'static str)> {
    let mut openings = vec![
        (json!({"privileged": true}), "allow_privileged"),
        (json!({"host_network": true}), "allow_host_namespaces"),
        (json!({"pid_mode": "host"}), "allow_host_namespaces"),
        (json!({"ipc_mode": "host"}), "allow_host_namespaces"),
        (json!({"uts_mode": "host"}), "allow_host_namespaces"),
        (json!({"cgroupns": "host"}), "allow_host_namespaces"),
        (json!({"pid_mode": "HOST"}), "allow_host_namespaces"),
        (json!({"seccomp": false}), "allow_seccomp_override"),
        (json!({"seccomp_profile": "local/p.json"}), "allow_seccomp_override"),
    ];
    for mode in ["container:other", "host ", " host", "hosts", "\0host", "/proc/1/ns/pid", "private\0"] {
        openings.push((json!({"pid_mode": mode}), "pid_mode"));
        openings.push((json!({"ipc_mode": mode}), "ipc_mode"));
    }
    for (option, named) in [
        ("seccomp=unconfined", "allow_seccomp_override"),
        ("seccomp:unconfined", "allow_seccomp_override"),
        ("seccomp=/etc/p.json", "allow_seccomp_override"),
        ("no-new-privileges=false", "allow_new_privileges"),
        ("no-new-privileges:false", "allow_new_privileges"),
        ("apparmor=unconfined", "security_opt"),
        ("apparmor:unconfined", "security_opt"),
        ("label=types:spc_t", "security_opt"),
        ("systempaths=unconfined", "security_opt"),
        ("SECCOMP=unconfined", "security_opt"),
        ("no-new-privileges=0", "security_opt"),
        ("", "security_opt"),
    ] {
        openings.push((json!({"security_opt": [option]}), named));
    }
    for device in [
        "/dev/vda",
        "/dev/kmsg",
        "/dev/mem",
        "/dev/null",
        "/dev/../dev/vda",
        "/dev/vda\0",
        "dev/vda",
        "/proc/kcore",
        "/",
    ] {
        openings.push((json!({"devices": [device]}), "device"));
    }
    for name in [
        "SYS_ADMIN",
        "cap_sys_admin",
        "CAP_SYS_ADMIN",
        " SYS_ADMIN ",
        "ALL",
        "all",
        "CAP_ALL",
        "NET_RAW",
        "SYS_ADMIN\0",
        "63",
        "",
    ] {
        openings.push((json!({"cap_add": [name]}), "cap_add"));
    }
    openings
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_operator_does_not_allow_is_refused() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let with = |options: &Value| with_options(json!({"image": image, "command": "/bin/true"}), options.clone());
    each_case(openings(), async |(options, named)| {
        let reason = refusal(&mut env, with(&options)).await;
        assert!(reason.contains(named), "{options}: {reason}");
    })
    .await;
    env.finish().await;
    // Control test: the task starts when the operator permits all of these options.
    let security = json!({"allow_host_namespaces": true, "allow_caps": ["ALL"], "allow_seccomp_override": true});
    let mut env = Env::configured(json!({"allow_privileged": true, "security": security})).await;
    let options = json!({
        "pid_mode": "host", "ipc_mode": "host", "uts_mode": "host", "cgroupns": "host", "cap_add": ["SYS_ADMIN"],
        "security_opt": ["seccomp=unconfined", "no-new-privileges=false"],
    });
    assert_eq!(env.run(with(&options)).await.0, 0);
    env.finish().await;
}

/// Where tasks have SELinux labels, no job takes its own off or chooses another one.
#[tokio::test(flavor = "multi_thread")]
async fn no_job_changes_its_labels() {
    let mut env = Env::configured(json!({"security": {"selinux": true}})).await;
    let image = env.busybox().await;
    for option in
        ["label=disable", "label:disable", "label=type:spc_t", "label=level:s0", "label=user:x", "label=role:x"]
    {
        let reason = refusal(&mut env, json!({"image": image, "command": "/bin/true", "security_opt": [option]})).await;
        assert!(reason.contains(&format!("{option:?}")) && reason.contains("allow_label_override"), "{reason}");
    }
    env.finish().await;
}

/// Names of runtimes.
const RUNTIMES: &[&str] = &[
    "../../tmp/evil",
    "/bin/sh",
    "./crun",
    "crun ",
    "CRUN",
    "io.containerd.evil.v1",
    "io.containerd..v1",
    "crun\0",
    "-x",
];

/// Keys of annotations and labels.
const ANNOTATION_KEYS: &[&str] = &[
    "run.oci.seccomp_bpf_data",
    "run.oci.handler",
    "run.oci.delegate-cgroup",
    "run.oci.mount_context_type",
    "org.systemd.property.CPUQuota",
    "org.criu.config",
    "io.katacontainers.config.hypervisor.path",
    "io.kubernetes.cri.sandbox-id",
    "module.wasm.image/variant",
    "krun.vm",
    "dev.gvisor.flag.debug",
    "cdi.k8s.io/vendor",
    "io.containerd.runc.v2",
    "com.hashicorp.nomad.alloc_id",
    "",
];

/// Kernel parameters.
const SYSCTLS: &[&str] = &[
    "kernel.core_pattern",
    "kernel/core_pattern",
    "kernel.hostname",
    "kernel.modprobe",
    "kernel.shm",
    "vm.overcommit_memory",
    "user.max_user_namespaces",
    "fs.suid_dumpable",
    "fs.mqueue",
    "dev.raid.speed_limit_max",
    "",
    ".",
    "/",
    " net.core.somaxconn",
];

/// Lines for /etc/hosts.
const EXTRA_HOSTS: &[&str] = &[
    "a\nb:127.0.0.1",
    "a:127.0.0.1\n1.2.3.4 b",
    "a b:127.0.0.1",
    "#:127.0.0.1",
    ":127.0.0.1",
    "a\0:127.0.0.1",
    "a:",
    "a:127.0.0.1 b",
];

/// Names of images.
const IMAGES: &[&str] = &[
    "file:/etc/passwd",
    "file:///etc",
    "docker://busybox",
    "dir:/etc",
    "http://169.254.169.254/x",
    "user:pw@127.0.0.1:1/x",
    "127.0.0.1:1/../x",
    "127.0.0.1:1/x/../../y",
    "127.0.0.1:1/x\ny",
    "127.0.0.1:1/x y",
    "-x",
    "--help",
    "127.0.0.1:1/x\0",
    "127.0.0.1:1/x?y=z",
    "127.0.0.1:1/x#y",
    "127.0.0.1:99999999/x y",
    "@",
    ":",
    "/",
    "127.0.0.1:1/X",
    "",
    "127.0.0.1:1/x@sha256:../../../etc",
];

/// Users and groups, which Nomad sends outside the driver's options.
const USERS: &[&str] = &[
    "root\n",
    "user\0",
    "user:root:x",
    "../root",
    "4294967295",
    "4294967296",
    "-1",
    "0x0",
    "1e3",
    " user",
    "user:",
    "user:ghost",
    "nobody",
    "%s",
    "user\nroot",
];

/// Text that the program which receives it would read as a path, a line or an option.
#[tokio::test(flavor = "multi_thread")]
async fn text_that_means_something_elsewhere_is_refused() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let of = |option: &'static str, texts: &[&str], value: fn(&str) -> Value| -> Vec<(Value, &'static str)> {
        texts.iter().map(|text| (json!({option: value(text)}), option)).collect()
    };
    let attacks = [
        of("runtime", RUNTIMES, |name| json!(name)),
        of("annotations", ANNOTATION_KEYS, |key| json!({key: "x"})),
        of("labels", ANNOTATION_KEYS, |key| json!({key: "x"})),
        of("sysctl", SYSCTLS, |name| json!({name: "1"})),
        of("extra_hosts", EXTRA_HOSTS, |host| json!([host])),
        of("image", IMAGES, |name| json!(name)),
    ];
    each_case(attacks.into_iter().flatten(), async |(options, named)| {
        let config = with_options(json!({"image": image, "command": "/bin/true"}), options.clone());
        let reason = refusal(&mut env, config).await;
        assert!(reason.contains(named), "{options}: {reason}");
    })
    .await;
    // Users and groups, which Nomad sends outside the driver's options.
    each_case(USERS, async |user| {
        let mut task = env.prepare(json!({"image": image, "command": "/bin/id"})).await;
        task.config.user = (*user).to_owned();
        if *user == "user:" {
            // An empty group means no group.
            env.try_start(&mut task).await.unwrap();
            assert_eq!(env.finish_task(task).await.1, "uid=1000(user) gid=1001(user) groups=1001(user),2000(extra)\n");
            return;
        }
        let reason = refusal_of(&env, &mut task, user).await;
        assert!(reason.contains("user") || reason.contains("group"), "{user:?}: {reason}");
    })
    .await;
    env.finish().await;
}

/// Annotation keys that are on none of the driver's lists are passed to the runtimes, which must not act on them.
#[tokio::test(flavor = "multi_thread")]
async fn annotations_of_other_spellings_change_nothing() {
    let mut env = Env::new().await;
    let (look, long) = ("grep -E '^(Seccomp|CapEff|NoNewPrivs):' /proc/self/status", "k".repeat(100 << 10));
    for runtime in runtimes() {
        let plain = env.shell(look, json!({"runtime": runtime})).await;
        let expected = env.run(plain).await.1;
        assert!(expected.contains("Seccomp:\t2"), "{expected}");
        let keys = [
            "Run.oci.seccomp_bpf_data",
            " run.oci.handler",
            "RUN.OCI.HANDLER",
            "run.oci",
            "run\u{2024}oci.handler",
            &long,
        ];
        for key in keys {
            let config = env.shell(look, json!({"runtime": runtime, "annotations": {key: "AAAA"}})).await;
            match outcome(&mut env, config).await {
                Outcome::Refused(_) => {}
                Outcome::Ran(_, out, _) => assert_eq!(out, expected, "{runtime}, {:?}", &key[..key.len().min(40)]),
            }
        }
    }
    env.finish().await;
}

/// Images in files with parts that refer to other files, in a directory that the job may use.
#[tokio::test(flavor = "multi_thread")]
async fn archives_read_no_file_of_the_host() {
    let mut env = Env::new().await;
    let decoy = Decoy::new(&env);
    for image in [
        "oci:/etc",
        "oci-archive:/etc/shadow",
        "docker-archive:/etc/passwd",
        "docker-archive:/dev/zero",
        "docker-archive:/dev/vda",
        "oci-archive:/proc/self/mem",
        "oci:local/layout",
        "oci:local/fifo-layout",
        "oci:local/blobs",
        "oci-archive:local/link",
        "docker-archive:local/link",
        "docker-archive:local/fifo",
        "docker-archive:local/device",
        "oci-archive:local/../private/x",
        "oci-archive:alloc/../other/x",
        "docker-archive:local/link/..",
    ] {
        let mut task = env.prepare(json!({"image": image, "command": "/bin/true", "image_pull_timeout": "10s"})).await;
        let local = task.dirs.alloc_dir.join("web/local");
        for layout in ["layout", "fifo-layout", "blobs"] {
            fs::create_dir_all(local.join(layout)).unwrap();
            fs::write(local.join(layout).join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).unwrap();
        }
        symlink(decoy.dir.join("secret"), local.join("layout/index.json")).unwrap();
        symlink(decoy.dir.join("secret"), local.join("link")).unwrap();
        symlink(&decoy.dir, local.join("blobs/blobs")).unwrap();
        let index = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": format!("sha256:{}", "0".repeat(64)), "size": 23,
        }]});
        fs::write(local.join("blobs/index.json"), index.to_string()).unwrap();
        for fifo in ["fifo", "fifo-layout/index.json"] {
            nix::unistd::mkfifo(&local.join(fifo), nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        let zero = nix::sys::stat::makedev(1, 5);
        let mode = nix::sys::stat::Mode::S_IRWXU;
        nix::sys::stat::mknod(&local.join("device"), nix::sys::stat::SFlag::S_IFCHR, mode, zero).unwrap();
        let began = Instant::now();
        let reason = refusal_of(&env, &mut task, image).await;
        assert!(began.elapsed() < patience() / 8, "{image} took {:?}", began.elapsed());
        assert!(!reason.contains(SECRET.trim()) && !reason.contains("root:"), "{image}: {reason}");
        assert!(!reason.contains("image_pull_timeout"), "{image}: {reason}");
    }
    decoy.assert_untouched("an archive");
    env.finish().await;
}

/// sudo and su gain privileges only where the operator and the job let them.
#[tokio::test(flavor = "multi_thread")]
async fn set_user_id_programs_work_where_the_operator_lets_them() {
    let source = r#"#include <stdio.h>
        #include <unistd.h>
        int main(void) { printf("%d\n", geteuid()); return 0; }"#;
    let program = Entry { mode: 0o4755, ..Entry::file("program", attack::compile("set-user-id", source)) };
    let image = Image::busybox().with_layer(Layer::new(&[program], Packing::Gzip));
    let image = image.push(&services().registry, "test/set-user-id:1").await;
    let gains = json!({"security_opt": ["no-new-privileges=false"]});
    for runtime in runtimes() {
        for allowed in [false, true] {
            let mut env = Env::with_runtime(&runtime, json!({"security": {"allow_new_privileges": allowed}})).await;
            for (options, uid) in [(json!({}), "1000"), (gains.clone(), "0")] {
                let config = with_options(json!({"image": image, "command": "/program"}), options.clone());
                let mut task = env.prepare(config).await;
                "1000".clone_into(&mut task.config.user);
                match env.try_start(&mut task).await {
                    Ok(()) => assert_eq!(env.finish_task(task).await.1.trim_end(), uid, "{runtime}, {options}"),
                    Err(error) => {
                        assert!(!allowed && uid == "0", "{runtime}, {options}: {error:?}");
                        assert!(error.message().contains("allow_new_privileges"), "{error:?}");
                    }
                }
            }
            env.finish().await;
        }
    }
}
