//! Hostile registries: a pull ends in time, costs little memory, and reveals to no one what another service answered.

use std::time::{Duration, Instant};

use nomad_driver_shim::ids::Digest;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::{
    probe::refusal_of,
    support::{
        Entry, Env, Image, Layer, Packing,
        fake_registry::{Answer, FakeRegistry, MANIFEST},
        patience, resident,
    },
};

/// The time in which the plugin must refuse a pull: a few seconds, and more on a busy machine.
const IN_TIME: Duration = Duration::from_secs(30);
/// The memory that all pulls of a test together may take.
const GROWTH: u64 = 48 << 20;
/// The maximum length of a reason for a failure, as text for a person.
const REASON_MAX: usize = 2000;
/// The answer of a service that the job has nothing to do with.
const PRIVATE: &str = "an answer that is nobody else's business";

/// A registry with one repository for each attack. The repository's name selects the behaviour.
#[derive(Clone)]
struct Attacker {
    address: String,
    /// A service on the same host that answers every client.
    private: FakeRegistry,
    image: Image,
}

/// An attacker's answer: `head`, and then `endless` again and again for as long as the client reads.
struct Sent {
    head: String,
    endless: Vec<u8>,
    pause: Duration,
}

impl Sent {
    fn once(head: String) -> Self {
        Self { head, endless: Vec::new(), pause: Duration::ZERO }
    }

    fn endless(head: &str, repeated: &str) -> Self {
        // The pause leaves processor time to the other tests.
        Self { head: head.to_owned(), endless: repeated.repeat(4096).into_bytes(), pause: Duration::from_millis(1) }
    }

    fn slow(head: &str) -> Self {
        Self { head: head.to_owned(), endless: b"x".to_vec(), pause: Duration::from_millis(200) }
    }

    fn answer(status: &str, headers: &str, body: &str) -> Self {
        let length = body.len();
        Self::once(format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}"))
    }

    fn challenge(realm: &str) -> Self {
        Self::answer("401 X", &format!("www-authenticate: Bearer realm=\"{realm}\",service=\"x\"\r\n"), "")
    }

    fn redirect(location: &str) -> Self {
        Self::answer("307 X", &format!("location: {location}\r\n"), "")
    }
}

/// Attacks that a limit of the plugin ends, by the names of their repositories.
const LIMITED: [&str; 22] = [
    "endless-manifest",
    "endless-chunk-line",
    "endless-config",
    "endless-layer",
    "endless-token",
    "endless-error",
    "endless-headers",
    "endless-header",
    "endless-status",
    "redirect-self",
    "redirect-grows",
    "redirect-file",
    "redirect-data",
    "redirect-private",
    "redirect-nowhere",
    "location-escapes",
    "realm-file",
    "realm-self",
    "realm-private",
    "realm-gopher",
    "realm-none",
    "token-injects",
];
/// Attacks that only the job's own timeout ends.
const UNLIMITED: [&str; 7] =
    ["endless-chunks", "endless-interim", "silent", "slow-headers", "slow-manifest", "slow-layer", "retry-after"];
/// Refusals with a text that the attacker chooses.
const TEXTS: [&str; 2] = ["error-escapes", "error-private"];

impl Attacker {
    async fn start() -> Self {
        let private = FakeRegistry::start().await;
        private.set("/private", Answer::ok("application/json", format!("{{\"secret\":\"{PRIVATE}\"}}").into_bytes()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let layer = Layer::new(&[Entry::file("slowly", vec![7; 3000])], Packing::None);
        let image = Image { layers: vec![layer], ..Image::busybox() };
        let this = Self { address: listener.local_addr().unwrap().to_string(), private, image };
        let server = this.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let server = server.clone();
                // Ends when the plugin closes the connection.
                tokio::spawn(async move { server.serve(stream).await });
            }
        });
        this
    }

    async fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
            // A TLS client hello: this registry has no TLS.
            if head[0] == 0x16 {
                return stream.write_all(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n").await;
            }
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let path = head.split(' ').nth(1).unwrap_or_default();
        let Sent { head, endless, pause } = self.sent(path.split('/').nth(2).unwrap_or_default(), path);
        stream.write_all(head.as_bytes()).await?;
        while !endless.is_empty() {
            stream.write_all(&endless).await?;
            tokio::time::sleep(pause).await;
        }
        stream.shutdown().await
    }

    /// The answer for a path of an attack's repository.
    fn sent(&self, attack: &str, path: &str) -> Sent {
        let (own, private) =
            (format!("http://{}{path}", self.address), format!("http://{}/private", self.private.address));
        let open = "HTTP/1.1 200 X\r\ncontent-type: application/json\r\n\r\n";
        let chunked = "HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n";
        let is_config = path.ends_with(Digest::of(&self.image.config_bytes()).as_str());
        let escapes = "\\u001b[31mred\\u001b]0;title\\u0007\\r\\nINJECTED";
        match attack {
            // These attacks use the valid parts of an image as well.
            "endless-config" | "endless-layer" | "slow-layer" if path.contains("/manifests/") => {
                let manifest = String::from_utf8(self.image.manifest_bytes()).unwrap();
                Sent::answer("200 X", &format!("content-type: {MANIFEST}\r\n"), &manifest)
            }
            "endless-layer" | "slow-layer" if is_config => {
                Sent::answer("200 X", "", &String::from_utf8(self.image.config_bytes()).unwrap())
            }
            "endless-token" | "token-injects" if !path.contains("/token?") => Sent::challenge(&format!("{own}/token")),
            "endless-manifest" | "endless-config" | "endless-layer" | "endless-token" => Sent::endless(open, "x"),
            "endless-error" => Sent::endless("HTTP/1.1 404 X\r\n\r\n", "x"),
            "endless-chunks" => Sent::endless(chunked, "1\r\nx\r\n"),
            "endless-chunk-line" => Sent::endless(&format!("{chunked}1;"), "x"),
            "endless-headers" => Sent::endless("HTTP/1.1 200 X\r\n", "a: b\r\n"),
            "endless-header" => Sent::endless("HTTP/1.1 200 X\r\na: ", "x"),
            "endless-status" => Sent::endless("HTTP/1.1 200 ", "x"),
            "endless-interim" => Sent::endless("", "HTTP/1.1 100 Continue\r\n\r\n"),
            "slow-headers" => Sent::slow("HTTP/1.1 200 X\r\na: "),
            "slow-manifest" | "slow-layer" => Sent::slow(open),
            "silent" => Sent { endless: b"H".to_vec(), pause: Duration::from_secs(60), ..Sent::slow("") },
            "redirect-self" => Sent::redirect(&own),
            "redirect-grows" => Sent::redirect(&format!("{own}/x")),
            "redirect-file" => Sent::redirect("file:///etc/passwd"),
            "redirect-data" => Sent::redirect("data:application/json,{}"),
            "redirect-private" => Sent::redirect(&private),
            "redirect-nowhere" => Sent::redirect("http://127.0.0.1:1/"),
            "location-escapes" => Sent::redirect("http://127.0.0.1:1/\u{1b}[31m\u{9b}"),
            "realm-file" => Sent::challenge("file:///etc/passwd"),
            "realm-gopher" => Sent::challenge("gopher://127.0.0.1:70/"),
            "realm-self" => Sent::challenge(&own),
            "realm-none" => Sent::challenge(""),
            "realm-private" => Sent::challenge(&private),
            "token-injects" => Sent::answer("200 X", "", &format!("{{\"token\":\"a{escapes}\"}}")),
            "error-escapes" => Sent::answer(
                "404 X",
                "",
                &format!("{{\"errors\":[{{\"code\":\"{escapes}\",\"message\":\"{escapes}\"}}]}}"),
            ),
            // This answer does not have the form of a registry's error, just as a service's own answer would not.
            "error-private" => Sent::answer("403 X", "", &format!("{{\"secret\":\"{PRIVATE}\"}}")),
            "retry-after" => Sent::answer("429 X", "retry-after: 99999999999999999\r\n", ""),
            other => panic!("no attack is called {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_ends_in_time_and_with_little_memory() {
    let mut env = Env::new().await;
    let attacker = Attacker::start().await;
    // This start keeps the memory of a first pull out of the measurement.
    env.busybox().await;
    let warm = env.sh("true").await;
    env.finish_task(warm).await;
    let (plugin, before) = (env.plugin().pid().unwrap(), resident(env.plugin().pid().unwrap()));
    let mut tasks = Vec::new();
    for attack in LIMITED.iter().chain(&UNLIMITED).chain(&TEXTS) {
        let image = format!("{}/{attack}:1", attacker.address);
        let timeout = if UNLIMITED.contains(attack) { "3s" } else { "60s" };
        let task = env.prepare(json!({"image": image, "command": "/bin/true", "image_pull_timeout": timeout})).await;
        tasks.push((*attack, task));
    }
    let all = &env;
    let pulls = tasks.iter_mut().map(|(attack, task)| async move {
        let began = Instant::now();
        let reason = refusal_of(all, task, attack).await;
        let (took, by_time) = (began.elapsed(), reason.contains("image_pull_timeout = 3s"));
        assert!(took < IN_TIME.max(patience() / 4), "{attack} took {took:?}: {reason}");
        assert_eq!(by_time, UNLIMITED.contains(attack), "{attack}: {reason}");
        assert!(!reason.contains(PRIVATE) && !reason.contains("root:x:0"), "{attack}: {reason}");
        assert!(!reason.contains(char::is_control), "{attack}: {reason:?}");
        assert!(reason.len() < REASON_MAX, "{attack}: {} bytes", reason.len());
    });
    futures_util::future::join_all(pulls).await;
    assert_eq!(env.plugin().pid(), Some(plugin));
    let grown = resident(plugin).saturating_sub(before);
    assert!(grown < GROWTH, "{} MiB more", grown >> 20);
    let logged = env.plugin().stderr();
    assert!(!logged.contains(PRIVATE), "{logged}");
    // Control test: the service received a request and answered it.
    assert!(attacker.private.requests().iter().any(|path| path.starts_with("/private")));
    env.finish().await;
}
