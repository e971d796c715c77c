//! System calls that the filter forbids, in forms that the filter might miss: with bits that the kernel drops, in the
//! ways of 32-bit x86, and through the single call that 32-bit x86 has for all socket operations. An attack is a row of
//! a table; a program that makes all calls of a table runs in a task.

use std::{collections::BTreeMap, fs, process::Command};

use serde_json::{Value, json};

use crate::{
    image_with_program, runtimes,
    support::{Entry, Env, EnvOptions, Image, Layer, Packing, services},
};

const EPERM: i32 = 1;
const ENOSYS: i32 = 38;
/// The errno of the test's own profile. No other cause in these tests returns it.
const EROFS: i32 = 30;

/// A system call as a C expression.
struct Attack {
    name: &'static str,
    call: &'static str,
}

const fn attack(name: &'static str, call: &'static str) -> Attack {
    Attack { name, call }
}

/// The common part of the programs: system calls in the kernel's form, with all 64 bits of each register.
const PRELUDE: &str = r#"
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>
#define BIT32 (1UL << 32)
#define BIT63 (1UL << 63)
#define SIGN (~0UL << 32)
#define X32 0x40000000UL
#define NEWNS 0x00020000UL
#define NEWUSER 0x10000000UL
#define NEWNET 0x40000000UL
typedef unsigned long word;

static long native(word n, word a, word b, word c, word d) {
    long result;
    register word fourth __asm__("r10") = d;
    __asm__ volatile("syscall" : "=a"(result) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(fourth) : "rcx", "r11", "memory");
    return result;
}

/* Pointers must lie below 4 GiB, where a static program's variables are. */
static long ia32(word n, word a, word b, word c) {
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(n), "b"(a), "c"(b), "d"(c)
                     : "memory", "r8", "r9", "r10", "r11");
    return (int)result;
}

static unsigned words[4];
static long socketcall(word call, unsigned a, unsigned b, unsigned c) {
    static unsigned pair[2];
    words[0] = a, words[1] = b, words[2] = c, words[3] = (unsigned)(word)pair;
    return ia32(102, call, (word)words, 0);
}

static long process(long child) {
    if (child == 0) _exit(0);
    if (child > 0) waitpid(child, 0, 0);
    return child;
}

static void show(const char *name, long result) {
    printf("%s=%ld\n", name, result < 0 ? -result : 0);
    fflush(stdout);
    if (result > 2) close(result);
}
"#;

/// The source of a program that makes the calls one after the other, and prints how each ended.
fn program(attacks: &[&[Attack]]) -> String {
    let mut text =
        format!("{PRELUDE}\nint main(void) {{\n    (void)native, (void)ia32, (void)socketcall, (void)process;\n");
    for Attack { name, call } in attacks.iter().copied().flatten() {
        text += &format!("    show(\"{name}\", {call});\n");
    }
    text + "    return 0;\n}\n"
}

/// Runs the program and returns how each call ended: 0 or an errno.
async fn results(env: &mut Env, config: Value, profile: Option<&Value>) -> BTreeMap<String, i32> {
    let mut task = env.prepare(config).await;
    if let Some(profile) = profile {
        fs::write(task.dirs.alloc_dir.join(&task.dirs.name).join("local/p.json"), profile.to_string()).unwrap();
    }
    env.try_start(&mut task).await.unwrap();
    let (code, out, err) = env.finish_task(task).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let parsed = out.lines().map(|line| line.rsplit_once('=').unwrap());
    parsed.map(|(name, errno)| (name.to_owned(), errno.parse().unwrap())).collect()
}

/// The rows with another result than the expected one.
fn unexpected(
    attacks: &[Attack],
    found: &BTreeMap<String, i32>,
    should: impl Fn(i32) -> bool,
    scene: &str,
) -> Vec<String> {
    let ended = attacks.iter().map(|attack| (attack.name, found[attack.name])).filter(|(_, errno)| !should(*errno));
    ended.map(|(name, errno)| format!("{scene}: {name} = {errno}")).collect()
}

/// Sockets without network namespaces (AF_VSOCK, 40) or with access to the kernel's cryptography (AF_ALG, 38),
/// processes with their own namespaces, and personalities that make other attacks easier.
const FORBIDDEN: &[Attack] = &[
    attack("vsock", "native(41, 40, 1, 0, 0)"),
    attack("vsock, bit 32", "native(41, BIT32 | 40, 1, 0, 0)"),
    attack("vsock, bit 63", "native(41, BIT63 | 40, 1, 0, 0)"),
    attack("vsock, sign", "native(41, SIGN | 40, 1, 0, 0)"),
    attack("vsock, noise in the type", "native(41, BIT32 | 40, BIT32 | 1, BIT32, 0)"),
    attack("alg", "native(41, 38, 5, 0, 0)"),
    attack("alg, bit 32", "native(41, BIT32 | 38, 5, 0, 0)"),
    attack("alg, bit 63", "native(41, BIT63 | 38, 5, 0, 0)"),
    attack("alg, sign", "native(41, SIGN | 38, 5, 0, 0)"),
    attack("ia32 vsock", "ia32(359, 40, 1, 0)"),
    attack("ia32 vsock, bit 32", "ia32(359, BIT32 | 40, 1, 0)"),
    attack("ia32 alg, bit 63", "ia32(359, BIT63 | 38, 5, 0)"),
    attack("x32 vsock", "native(X32 | 41, 40, 1, 0, 0)"),
    attack("x32 vsock, bit 32", "native(X32 | 41, BIT32 | 40, 1, 0, 0)"),
    attack("clone user", "process(native(56, NEWUSER | 17, 0, 0, 0))"),
    attack("clone user, bit 32", "process(native(56, BIT32 | NEWUSER | 17, 0, 0, 0))"),
    attack("clone user, sign", "process(native(56, SIGN | NEWUSER | 17, 0, 0, 0))"),
    attack("ia32 clone user, bit 32", "process(ia32(120, BIT32 | NEWUSER | 17, 0, 0))"),
    attack("unshare user", "native(272, NEWUSER, 0, 0, 0)"),
    attack("unshare user, bit 32", "native(272, BIT32 | NEWUSER, 0, 0, 0)"),
    attack("setns user, bit 32", "native(308, -1UL, BIT32 | NEWUSER, 0, 0)"),
    attack("no randomization", "native(135, 0x40000, 0, 0, 0)"),
    attack("no randomization, bit 32", "native(135, BIT32 | 0x40000, 0, 0, 0)"),
    attack("no randomization, sign", "native(135, SIGN | 0x40000, 0, 0, 0)"),
    attack("ia32 no randomization, bit 32", "ia32(136, BIT32 | 0x40000, 0, 0)"),
];

/// The kernel itself refuses these calls as well, but only after it has examined them.
const FORBIDDEN_TWICE: &[Attack] = &[
    attack("clone mounts, bit 32", "process(native(56, BIT32 | NEWNS | 17, 0, 0, 0))"),
    attack("clone network, bit 63", "process(native(56, BIT63 | NEWNET | 17, 0, 0, 0))"),
];

/// A filter can't see the purpose of these calls.
const HIDDEN: &[Attack] = &[
    attack("socketcall vsock", "socketcall(1, 40, 1, 0)"),
    attack("socketcall alg", "socketcall(1, 38, 5, 0)"),
    attack("socketcall vsock, bit 32", "socketcall(BIT32 | 1, 40, 1, 0)"),
    attack("socketcall inet", "socketcall(1, 2, 1, 0)"),
    attack("socketcall pair", "socketcall(8, 1, 1, 0)"),
    attack("socketcall bind", "socketcall(2, -1U, 0, 0)"),
    attack("socketcall unheard", "socketcall(21, 0, 0, 0)"),
    attack("clone3", "native(435, 0, 0, 0, 0)"),
];

/// These calls need no filter: the kernel has no such socket pair.
const NO_PAIR: &[Attack] = &[
    attack("vsock pair", "native(53, 40, 1, 0, (word)words)"),
    attack("vsock pair, bit 32", "native(53, BIT32 | 40, 1, 0, (word)words)"),
    attack("alg pair, bit 63", "native(53, BIT63 | 38, 5, 0, (word)words)"),
];

/// Calls that ordinary programs make, with their usual arguments. `syscall(2)` passes `-1` as a long.
const ORDINARY: &[Attack] = &[
    attack("inet", "native(41, 2, 1, 0, 0)"),
    attack("inet6", "native(41, 10, 2, 0, 0)"),
    attack("unix", "native(41, 1, 1, 0, 0)"),
    attack("netlink", "native(41, 16, 3, 0, 0)"),
    attack("inet, bit 32", "native(41, BIT32 | 2, 1, 0, 0)"),
    attack("unix pair", "native(53, 1, 1, 0, (word)words)"),
    attack("ia32 inet", "ia32(359, 2, 1, 0)"),
    attack("which personality", "native(135, 0xffffffffUL, 0, 0, 0)"),
    attack("which personality, sign", "native(135, -1UL, 0, 0, 0)"),
    attack("linux personality", "native(135, 0, 0, 0, 0)"),
    attack("fork", "process(native(56, 17, 0, 0, 0))"),
];

#[tokio::test(flavor = "multi_thread")]
async fn no_bit_and_no_other_way_of_calling_gets_past_dockers_filter() {
    let mut surprises = Vec::new();
    let text = program(&[FORBIDDEN, FORBIDDEN_TWICE, HIDDEN, NO_PAIR]);
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let image = image_with_program("bits", &text).await;
        let found = results(&mut env, json!({"image": image, "command": "/attack"}), None).await;
        surprises.extend(unexpected(FORBIDDEN, &found, |errno| errno == EPERM, &runtime));
        surprises.extend(unexpected(FORBIDDEN_TWICE, &found, |errno| errno == EPERM, &runtime));
        surprises.extend(unexpected(HIDDEN, &found, |errno| errno == ENOSYS, &runtime));
        surprises.extend(unexpected(NO_PAIR, &found, |errno| errno != 0, &runtime));
        env.finish().await;

        // Control test: the answers come from the filter, and not from the kernel.
        let mut env = Env::with_runtime(&runtime, json!({"security": {"allow_seccomp_override": true}})).await;
        let config = json!({"image": image, "command": "/attack", "seccomp": false});
        let found = results(&mut env, config, None).await;
        surprises.extend(unexpected(FORBIDDEN, &found, |errno| errno != EPERM, &format!("{runtime} without a filter")));
        surprises.extend(unexpected(HIDDEN, &found, |errno| errno != ENOSYS, &format!("{runtime} without a filter")));
        env.finish().await;
    }
    assert!(surprises.is_empty(), "{surprises:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ordinary_calls_pass_dockers_filter() {
    let mut surprises = Vec::new();
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let image = image_with_program("ordinary", &program(&[ORDINARY])).await;
        let found = results(&mut env, json!({"image": image, "command": "/attack"}), None).await;
        surprises.extend(unexpected(ORDINARY, &found, |errno| errno == 0, &runtime));
        env.finish().await;
    }
    assert!(surprises.is_empty(), "{surprises:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn threads_and_32_bit_programs_run_under_dockers_filter() {
    let threads = r#"
        #include <pthread.h>
        #include <stdio.h>
        static int made;
        static void *one(void *nothing) { __atomic_add_fetch(&made, 1, __ATOMIC_SEQ_CST); return nothing; }
        int main(void) {
            pthread_t threads[8];
            for (int n = 0; n < 8; n++) if (pthread_create(&threads[n], 0, one, 0)) return 1;
            for (int n = 0; n < 8; n++) pthread_join(threads[n], 0);
            printf("%d threads\n", made);
            return 0;
        }"#;
    let entries = [Entry::file("ia32", ia32_program())];
    let ia32 = Image::busybox().with_layer(Layer::new(&entries, Packing::Gzip));
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let image = image_with_program("threads", threads).await;
        let (code, out, err) = env.run(json!({"image": image, "command": "/attack"})).await;
        assert_eq!((code, out.as_str()), (0, "8 threads\n"), "{runtime}: {err}");
        let image = ia32.push(&services().registry, "attack/ia32:1").await;
        let (code, out, err) = env.run(json!({"image": image, "command": "/ia32"})).await;
        assert_eq!((code, out.as_str()), (7, "a socket\n"), "{runtime}: {err}");
        env.finish().await;
    }
}

/// A program for 32-bit x86 without a C library. It opens a socket by the direct call, prints the result, and exits
/// with 7.
fn ia32_program() -> Vec<u8> {
    let directory = services::root().join("attacks");
    fs::create_dir_all(&directory).unwrap();
    let unique = nomad_driver_shim::ids::random_hex(4);
    let (text, program) = (directory.join(format!("ia32-{unique}.c")), directory.join(format!("ia32-{unique}")));
    let source = r#"
        static int call(int n, int a, const void *b, int c) {
            int result;
            __asm__ volatile("int $0x80" : "=a"(result) : "a"(n), "b"(a), "c"(b), "d"(c) : "memory");
            return result;
        }
        void _start(void) {
            if (call(359, 2, (void *)1, 0) < 0) call(1, 1, 0, 0);
            call(4, 1, "a socket\n", 9);
            call(1, 7, 0, 0);
        }"#;
    fs::write(&text, source).unwrap();
    let options = ["-m32", "-static", "-nostdlib", "-no-pie", "-fno-pie", "-O1", "-Wall", "-Werror", "-o"];
    services::run(Command::new("cc").args(options).arg(&program).arg(&text));
    fs::read(program).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn socketcall_works_where_the_operator_allows_it_and_under_the_old_name() {
    let mut surprises = Vec::new();
    let sub_calls: &[Attack] = &[
        attack("inet", "socketcall(1, 2, 1, 0)"),
        attack("pair", "socketcall(8, 1, 1, 0)"),
        attack("vsock", "socketcall(1, 40, 1, 0)"),
    ];
    let direct: &[Attack] = &[attack("direct vsock, bit 32", "native(41, BIT32 | 40, 1, 0, 0)")];
    for runtime in runtimes() {
        for (name, security) in [("shim", json!({"allow_socketcall": true})), ("containerd-driver", json!({}))] {
            let config = json!({"default_runtime": runtime, "security": security});
            let mut env = Env::with(EnvOptions { config, name, ..EnvOptions::default() }).await;
            let image = image_with_program("socketcall", &program(&[sub_calls, direct])).await;
            let config = json!({"image": image, "command": "/attack", "seccomp": true});
            let found = results(&mut env, config, None).await;
            surprises.extend(unexpected(sub_calls, &found, |errno| errno == 0, &format!("{name} {runtime}")));
            surprises.extend(unexpected(direct, &found, |errno| errno == EPERM, &format!("{name} {runtime}")));
            env.finish().await;
        }
        let config = json!({"default_runtime": runtime, "security": {"allow_socketcall": false}});
        let mut env = Env::drop_in(config).await;
        let image = image_with_program("socketcall", &program(&[sub_calls])).await;
        let config = json!({"image": image, "command": "/attack", "seccomp": true});
        let found = results(&mut env, config, None).await;
        surprises.extend(unexpected(sub_calls, &found, |errno| errno == ENOSYS, &runtime));
        env.finish().await;
    }
    assert!(surprises.is_empty(), "{surprises:#?}");
}

/// A profile that forbids calls by their arguments, with every comparison operator.
fn forbidding() -> Value {
    let on =
        |index: usize, op: &str, value: u64| json!({"index": index, "op": format!("SCMP_CMP_{op}"), "value": value});
    let rule = |name: &str, args: &[Value]| json!({"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": EROFS, "args": args});
    let creating = json!({"index": 2, "op": "SCMP_CMP_MASKED_EQ", "value": 0o100, "valueTwo": 0o100});
    json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        rule("ioctl", &[on(1, "EQ", 0x5412)]),
        rule("prctl", &[on(0, "EQ", 4)]),
        rule("setns", &[on(1, "EQ", 0x1000_0000)]),
        rule("clone", &[on(0, "EQ", 0x1000_0011)]),
        rule("socket", &[on(0, "NE", 1)]),
        rule("socketpair", &[on(0, "LT", 2)]),
        rule("personality", &[on(0, "GT", 8), on(0, "EQ", 2)]),
        rule("kill", &[on(1, "GE", 65)]),
        rule("getpriority", &[on(0, "LE", 1)]),
        rule("fchmod", &[on(1, "EQ", 0o4755)]),
        rule("openat", &[creating, on(3, "EQ", 0o4777)]),
        rule("unshare", &[on(0, "EQ", 0x1000_0000)]),
    ]})
}

const FORBIDDEN_BY_PROFILE: &[Attack] = &[
    attack("push a character", "native(16, 0, 0x5412, 0, 0)"),
    attack("push a character, bit 32", "native(16, 0, BIT32 | 0x5412, 0, 0)"),
    attack("undumpable, sign", "native(157, SIGN | 4, 1, 0, 0)"),
    attack("setns user, bit 63", "native(308, -1UL, BIT63 | NEWUSER, 0, 0)"),
    attack("clone user, bit 32", "process(native(56, BIT32 | NEWUSER | 17, 0, 0, 0))"),
    attack("inet", "native(41, 2, 1, 0, 0)"),
    attack("inet, bit 32", "native(41, BIT32 | 2, 1, 0, 0)"),
    attack("unix pair, bit 32", "native(53, BIT32 | 1, 1, 0, (word)words)"),
    attack("personality 2, bit 63", "native(135, BIT63 | 2, 0, 0, 0)"),
    attack("personality 9", "native(135, 9, 0, 0, 0)"),
    attack("no such signal, sign", "native(62, -5000UL, SIGN | 70, 0, 0)"),
    attack("priority, bit 32", "native(140, BIT32 | 1, 0, 0, 0)"),
    attack("set-uid", "native(91, -1UL, 04755, 0, 0)"),
    attack("set-uid, bit 16", "native(91, -1UL, 0x10000 | 04755, 0, 0)"),
    attack("set-uid, bit 32", "native(91, -1UL, BIT32 | 04755, 0, 0)"),
    attack("create set-uid, bits 16 and 32", "native(257, -1UL, (word)\"x\", BIT32 | 0100, 0x10000 | 04777)"),
    attack("unshare user", "native(272, NEWUSER, 0, 0, 0)"),
];

const ALLOWED_BY_PROFILE: &[Attack] = &[
    attack("another ioctl, bit 32", "native(16, 0, BIT32 | 0x5413, 0, 0)"),
    attack("unix, bit 32", "native(41, BIT32 | 1, 1, 0, 0)"),
    attack("inet pair", "native(53, 2, 1, 0, (word)words)"),
    attack("personality 8, sign", "native(135, SIGN | 8, 0, 0, 0)"),
    attack("signal 0, bit 32", "native(62, 1, BIT32, 0, 0)"),
    attack("priority of a user", "native(140, 2, 0, 0, 0)"),
    attack("another mode", "native(91, -1UL, 0755, 0, 0)"),
    // The kernel checks all bits of these flags, and has no such flag.
    attack("unshare user, bit 32", "native(272, BIT32 | NEWUSER, 0, 0, 0)"),
];

#[tokio::test(flavor = "multi_thread")]
async fn no_bit_gets_past_a_profile_from_a_file() {
    let mut surprises = Vec::new();
    let config = json!({"security": {"allow_seccomp_override": true}});
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, config.clone()).await;
        let image = image_with_program("profile", &program(&[FORBIDDEN_BY_PROFILE, ALLOWED_BY_PROFILE])).await;
        let mut profiles = vec![("as it is", forbidding())];
        if runtime == "crun" {
            // The driver does not compile a profile with flags: crun's libseccomp does.
            let mut flagged = forbidding();
            flagged["flags"] = json!(["SECCOMP_FILTER_FLAG_LOG"]);
            profiles.push(("by libseccomp", flagged));
        }
        for (form, profile) in profiles {
            let config = json!({"image": image, "command": "/attack", "seccomp_profile": "local/p.json"});
            let found = results(&mut env, config, Some(&profile)).await;
            surprises.extend(unexpected(
                FORBIDDEN_BY_PROFILE,
                &found,
                |errno| errno == EROFS,
                &format!("{runtime} {form}"),
            ));
            surprises.extend(unexpected(
                ALLOWED_BY_PROFILE,
                &found,
                |errno| errno != EROFS,
                &format!("{runtime} {form}"),
            ));
        }
        env.finish().await;
    }
    assert!(surprises.is_empty(), "{surprises:#?}");
}
