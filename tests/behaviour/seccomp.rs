//! Which seccomp filter a task runs under, seen from inside: what the kernel reports, and what system calls return.

use std::fs;

use serde_json::{Value, json};

use crate::support::{Env, shell_in, with_options};

/// Prints the filter's mode (2: a program), then tries two calls that nothing but the profile would deny.
const LOOK: &str = "grep ^Seccomp: /proc/self/status; unshare -U true; mkdir /tmp/x && echo made";

fn look(image: &str, more: &Value) -> Value {
    with_options(shell_in(image, LOOK), more.clone())
}

fn is_filtered(out: &str, err: &str) -> bool {
    assert!(out.contains("made"), "{out} {err}");
    let filtered = out.contains("Seccomp:\t2");
    assert!(filtered || out.contains("Seccomp:\t0"), "{out} {err}");
    // Without the filter an unprivileged task may make user namespaces.
    assert_eq!(filtered, err.contains("Operation not permitted"), "{out} {err}");
    filtered
}

#[tokio::test(flavor = "multi_thread")]
async fn every_task_has_dockers_filter_unless_the_operator_says_otherwise() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    for runtime in ["crun", "runc"] {
        let (code, out, err) = env.run(look(&image, &json!({"runtime": runtime}))).await;
        assert_eq!(code, 0, "{runtime}: {err}");
        assert!(is_filtered(&out, &err), "{runtime}");
    }
    for (options, named) in
        [(json!({"seccomp": false}), "seccomp = false"), (json!({"seccomp_profile": "p.json"}), "\"p.json\"")]
    {
        let mut task = env.prepare(look(&image, &options)).await;
        let error = env.try_start(&mut task).await.expect_err("refused");
        assert!(error.message().contains(named) && error.message().contains("allow_seccomp_override"), "{error}");
    }
    env.finish().await;

    let mut env =
        Env::configured(json!({"security": {"allow_seccomp_override": true}, "allow_privileged": true})).await;
    for (options, filtered) in [
        (json!({}), true),
        (json!({"seccomp": false}), false),
        (json!({"privileged": true}), false),
        (json!({"seccomp": true}), true),
    ] {
        let (_, out, err) = env.run(look(&image, &options)).await;
        assert_eq!(is_filtered(&out, &err), filtered, "{options}");
    }
    // `privileged` does not remove the filter that a job asks for explicitly.
    let (_, out, _) = env.run(look(&image, &json!({"privileged": true, "seccomp": true}))).await;
    assert!(out.contains("Seccomp:\t2"), "{out}");
    env.finish().await;

    let mut env = Env::configured(json!({"security": {"seccomp": "unconfined"}})).await;
    let (_, out, err) = env.run(look(&image, &json!({}))).await;
    assert!(!is_filtered(&out, &err));
    let (_, out, err) = env.run(look(&image, &json!({"seccomp": true}))).await;
    assert!(is_filtered(&out, &err));
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn under_the_old_name_the_filter_is_asked_for() {
    let mut env = Env::drop_in(json!({})).await;
    let image = env.busybox().await;
    for (options, filtered) in [(json!({}), false), (json!({"seccomp": true}), true)] {
        let (_, out, err) = env.run(look(&image, &options)).await;
        assert_eq!(is_filtered(&out, &err), filtered, "{options}");
    }
    let mut task = env.prepare(look(&image, &json!({"seccomp_profile": "/etc/p.json"}))).await;
    let error = env.try_start(&mut task).await.expect_err("refused");
    assert!(error.message().contains("needs seccomp = true"), "{error}");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn profiles_from_files_hold_with_each_runtime() {
    let mut env = Env::configured(json!({"security": {"allow_seccomp_override": true}})).await;
    let image = env.busybox().await;
    let deny_mkdir = |action: Value| {
        let mut rule = json!({"names": ["mkdir", "mkdirat"]});
        rule.as_object_mut().expect("a map").extend(action.as_object().expect("a map").clone());
        json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}).to_string()
    };
    // The driver can't compile the second profile: libseccomp does it (runc 1.1 refuses flags).
    let plain = deny_mkdir(json!({"action": "SCMP_ACT_ERRNO", "errnoRet": 30}));
    let flagged = plain.replacen('{', r#"{"flags": ["SECCOMP_FILTER_FLAG_LOG"], "#, 1);
    for (runtime, profile) in [("crun", &plain), ("runc", &plain), ("crun", &flagged)] {
        let config = json!({
            "image": image, "runtime": runtime, "seccomp_profile": "local/p.json",
            "command": "/bin/sh", "args": ["-c", "grep ^Seccomp: /proc/self/status; mkdir /tmp/x"],
        });
        let mut task = env.prepare(config).await;
        fs::write(task.dirs.alloc_dir.join(&task.dirs.name).join("local/p.json"), profile).expect("written");
        env.try_start(&mut task).await.expect("started");
        let (code, out, err) = env.finish_task(task).await;
        assert!(code != 0 && out.contains("Seccomp:\t2") && err.contains("Read-only file system"), "{out} {err}");
    }
    for (content, part) in [
        (None, "No such file"),
        (Some("{".to_owned()), "neither docker's form nor the OCI spec's"),
        (Some(json!({"defaultAction": "SCMP_ACT_PERHAPS"}).to_string()), "SCMP_ACT_PERHAPS"),
        (Some(" ".repeat(2 << 20)), "larger than"),
    ] {
        let mut task = env.prepare(look(&image, &json!({"seccomp_profile": "local/p.json"}))).await;
        if let Some(content) = content {
            fs::write(task.dirs.alloc_dir.join(&task.dirs.name).join("local/p.json"), content).expect("written");
        }
        let error = env.try_start(&mut task).await.expect_err("refused");
        assert!(error.message().contains("local/p.json") && error.message().contains(part), "{part}: {error}");
    }
    env.finish().await;
}

/// Older versions of crun ignore annotations that they don't know: a task would run with no filter at all, and without
/// any message.
#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_ignores_compiled_filters_gets_the_profile() {
    let directory = tempfile::tempdir().expect("a directory");
    let deaf = directory.path().join("crun-deaf");
    let script = "previous=; for word in \"$@\"; do [ \"$previous\" != --bundle ] || bundle=$word; previous=$word; done\n\
        if [ -n \"${bundle:-}\" ]; then\n\
          config=$(jq 'del(.annotations[\"run.oci.seccomp_bpf_data\"])' \"$bundle/config.json\")\n\
          printf %s \"$config\" > \"$bundle/config.json\"\n\
        fi\n\
        exec crun \"$@\"";
    crate::support::script(&deaf, script);
    let mut env = Env::configured(json!({"runtime": {"deaf": {"binary": deaf}}})).await;
    let image = env.busybox().await;
    let (_, out, err) = env.run(look(&image, &json!({"runtime": "deaf"}))).await;
    assert!(is_filtered(&out, &err));
    env.finish().await;
}
