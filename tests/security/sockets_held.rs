//! The plugin's sockets: which users may connect, and how the plugin treats a client that should not be there.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    os::unix::{
        fs::PermissionsExt as _,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Instant,
};

use nomad_driver_shim::{
    control::{Answer, Request, send_request},
    host::Plugin,
};
use serde_json::json;

use crate::support::{Env, leak::entries, patience, resident};

/// The memory that a client may cost, whatever it sends.
const GROWTH: u64 = 48 << 20;
/// The number of connections that a hostile client has open at a time.
const CONNECTIONS: usize = 2000;

/// Sends a text and reads the answer, to the end of the connection. A missing answer and a closed connection give an
/// empty text.
fn say(socket: &Path, text: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(patience())).unwrap();
    stream.set_write_timeout(Some(patience())).unwrap();
    // The plugin may close the connection in the middle of the text, so the result of the write is ignored.
    let _ = stream.write_all(text).and_then(|()| stream.shutdown(std::net::Shutdown::Write));
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("no end of the answer: {answer:?}"),
        _ => String::from_utf8_lossy(&answer).into_owned(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_socket_does_nothing_that_is_not_a_request() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let (plugin, control) = (env.plugin().pid().unwrap(), env.dir.join("run/control.sock"));
    let before = resident(plugin);
    let deep = format!("{}{}", "[".repeat(30_000), "]".repeat(30_000));
    let traversal = ["../../../etc/passwd", "/etc/passwd", "..", "", "\0", "oci:/etc", "docker-archive:/etc/shadow"];
    let removals = traversal.map(|image| json!({"remove_image": {"image": image}}).to_string());
    let kills = traversal.map(|task| json!({"kill": {"task": task, "signal": null}}).to_string());
    let id = &task.id;
    let own = [
        json!({"kill": {"task": id, "signal": "SIGNOTHING"}}).to_string(),
        json!({"kill": {"task": id, "signal": "99999"}}).to_string(),
        json!({"kill": {"task": format!("{id}\0"), "signal": "KILL"}}).to_string(),
        json!({"kill": {"task": id}}).to_string().replace(id, &format!("{id}/")),
        "\"leave\"".to_owned(),
        "\"Leave\"".to_owned(),
        "{\"leave\":null,\"gc\":{\"dry_run\":false}}".to_owned(),
    ];
    let long = "x".repeat(1 << 20);
    let plain = [
        "",
        "\n\n",
        "{}",
        "[]",
        "null",
        "0",
        "\"events",
        "{\"gc\":{\"dry_run\":\"yes\"}}",
        "GET / HTTP/1.1\r\n",
        &deep,
        &long,
    ];
    let texts = plain.map(str::to_owned).into_iter().chain(own).chain(removals).chain(kills);
    let mut requests: Vec<Vec<u8>> = texts.map(|text| format!("{text}\n").into_bytes()).collect();
    requests.extend([
        vec![0xff, 0xfe, b'\n'],
        vec![0; 4096],
        vec![0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0],
        b"\"leave\"".to_vec(),
    ]);
    for request in requests {
        let shown = String::from_utf8_lossy(&request[..request.len().min(80)]).into_owned();
        let control = control.clone();
        let answer = tokio::task::spawn_blocking(move || say(&control, &request)).await.unwrap();
        let refused = answer.is_empty() || answer.starts_with("{\"refused\":") || answer == "\"not_here\"\n";
        assert!(refused, "{shown:?}: {answer}");
        assert!(answer.len() < 4096, "{shown:?}: {} bytes", answer.len());
    }
    let grown = resident(plugin).saturating_sub(before);
    assert!(grown < GROWTH, "{} MiB more", grown >> 20);
    // The same plugin still serves its agent and its command line, and the task is unharmed.
    assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n");
    let answer = send_request(&control, &Request::Gc { dry_run: true }, patience()).await.unwrap();
    assert_eq!(answer, Answer::Removed(Vec::new()));
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_say_nothing_keep_nobody_out() {
    // This process holds the other ends of the connections.
    nomad_driver_shim::process::raise_descriptor_limit();
    let mut env = Env::new().await;
    let warm = env.sh("true").await;
    env.finish_task(warm).await;
    let (plugin, control) = (env.plugin().pid().unwrap(), env.dir.join("run/control.sock"));
    let before = resident(plugin);
    let socket = env.plugin().socket().to_owned();
    let idle: Vec<UnixStream> =
        (0..CONNECTIONS).map(|n| UnixStream::connect(if n % 10 == 0 { &socket } else { &control }).unwrap()).collect();
    let began = Instant::now();
    let task = env.sh("echo served").await;
    assert!(began.elapsed() < patience() / 4, "a start took {:?}", began.elapsed());
    assert_eq!(env.finish_task(task).await.1, "served\n");
    send_request(&control, &Request::Gc { dry_run: true }, patience()).await.unwrap();
    let grown = resident(plugin).saturating_sub(before);
    assert!(grown < GROWTH, "{} MiB more", grown >> 20);
    drop(idle);
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plugins_socket_closes_what_is_no_http2() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let (plugin, socket) = (env.plugin().pid().unwrap(), env.plugin().socket().to_owned());
    let before = resident(plugin);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let frame = |head: [u8; 9], body: &[u8]| [&preface[..], &head, body].concat();
    for (name, text) in [
        ("garbage", vec![0xa5; 1 << 20]),
        ("HTTP/1", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()),
        ("a TLS hello", vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]),
        ("a broken preface", b"PRI * HTTP/2.0\r\n\r\nSN\r\n\r\n".to_vec()),
        ("a frame of 16 MiB", frame([0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1], &[0; 1 << 20])),
        ("data of no stream", frame([0, 0, 1, 0, 0, 0, 0, 0, 99], b"x")),
        ("settings of a bad length", frame([0, 0, 5, 4, 0, 0, 0, 0, 0], &[0; 5])),
        ("headers that are none", frame([0, 0, 4, 1, 4, 0, 0, 0, 1], &[0xff; 4])),
        ("a window of nothing", frame([0, 0, 4, 8, 0, 0, 0, 0, 0], &[0; 4])),
        ("a push to a server", frame([0, 0, 4, 5, 4, 0, 0, 0, 1], &[0; 4])),
        (
            "headers without an end",
            frame([0, 0, 1, 1, 0, 0, 0, 0, 1], &[[0x88; 1].as_slice(), &[0, 0x40, 0, 9, 0, 0, 0, 0, 1]].concat()),
        ),
        ("nothing", Vec::new()),
    ] {
        let path = socket.clone();
        tokio::task::spawn_blocking(move || say(&path, &text)).await.unwrap();
        assert_eq!(env.plugin().info().await.unwrap().name, "shim", "{name}");
        let another = Plugin::reattach(&socket).await.unwrap();
        assert_eq!(another.info().await.unwrap().name, "shim", "{name}");
    }
    let grown = resident(plugin).saturating_sub(before);
    assert!(grown < GROWTH, "{} MiB more", grown >> 20);
    assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// Connects as a user of the host that is not root.
fn connect_as_nobody(path: PathBuf) -> std::io::Result<()> {
    // Only this thread changes its user, and it ends afterwards. It also loses its capabilities over files
    // (setfsuid(2), capabilities(7)).
    let connecting = std::thread::spawn(move || {
        nix::unistd::setfsgid(nix::unistd::Gid::from_raw(65534));
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65534));
        UnixStream::connect(path).map(drop)
    });
    connecting.join().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_other_user_connects() {
    let mut env = Env::new().await;
    let config = env.shell("sleep 600", json!({})).await;
    let task = env.start(config).await;
    let shims = env.dir.join("run/shims");
    let mut sockets = vec![env.plugin().socket().to_owned(), env.dir.join("run/control.sock")];
    sockets.extend(entries(&shims).into_iter().map(|shim| shims.join(shim).join("sock")));
    assert!(sockets.len() >= 3, "{sockets:?}");
    for socket in sockets {
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{}", socket.display());
        let refused = connect_as_nobody(socket.clone()).expect_err(&socket.display().to_string());
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{}", socket.display());
        // Control test: root connects.
        assert!(UnixStream::connect(&socket).is_ok(), "{}", socket.display());
    }
    // Control test: another user connects where the mode permits it.
    let open = env.dir.join("open.sock");
    let _listener = UnixListener::bind(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o666)).unwrap();
    connect_as_nobody(open).unwrap();
    env.destroy(&task).await.unwrap();
    env.finish().await;
}
