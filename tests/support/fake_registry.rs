//! A registry that lies, for what a real one can't be made to do. Plain HTTP/1.1, one answer per request and closed.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use nomad_driver_shim::ids::Digest;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::Image;

/// One answer.
#[derive(Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Announced in `Content-Length`; more than the body makes a truncated download.
    pub announced: usize,
    pub delay: Duration,
    /// Wanted in `Authorization`, else 401 with `challenge`.
    pub wants: Option<String>,
}

impl Answer {
    pub fn ok(content_type: &str, body: Vec<u8>) -> Self {
        let headers = vec![("content-type".to_owned(), content_type.to_owned())];
        Self { status: 200, headers, announced: body.len(), body, delay: Duration::ZERO, wants: None }
    }
}

#[derive(Default)]
struct State {
    answers: HashMap<String, Answer>,
    requests: Vec<String>,
    challenge: String,
}

/// The registry. Paths without an answer get a 404.
#[derive(Clone)]
pub struct FakeRegistry {
    pub address: String,
    state: Arc<Mutex<State>>,
}

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

impl FakeRegistry {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let this = Self { address: listener.local_addr().unwrap().to_string(), state: Arc::default() };
        let state = this.state.clone();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let state = state.clone();
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    let mut byte = [0; 1];
                    while !head.ends_with(b"\r\n\r\n") {
                        // A TLS hello is no request line; like real servers, we answer 400 in plain text.
                        if stream.read(&mut byte).await.unwrap_or(0) == 0 {
                            return;
                        }
                        head.push(byte[0]);
                        if head.len() == 1 && head[0] == 0x16 {
                            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n").await;
                            return;
                        }
                    }
                    let head = String::from_utf8_lossy(&head).into_owned();
                    let path = head.split_whitespace().nth(1).unwrap_or_default().to_owned();
                    let authorization = head
                        .lines()
                        .find_map(|line| {
                            line.split_once(": ").filter(|(name, _)| name.eq_ignore_ascii_case("authorization"))
                        })
                        .map(|(_, value)| value.to_owned());
                    let (answer, challenge) = {
                        let mut state = state.lock().unwrap();
                        state.requests.push(path.clone());
                        let bare = path.split('?').next().unwrap_or_default().to_owned();
                        (state.answers.get(&bare).cloned(), state.challenge.clone())
                    };
                    let mut answer = answer.unwrap_or_else(|| Answer {
                        status: 404,
                        ..Answer::ok(
                            "application/json",
                            br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#.to_vec(),
                        )
                    });
                    tokio::time::sleep(answer.delay).await;
                    if answer.wants.is_some() && answer.wants != authorization {
                        answer = Answer {
                            status: 401,
                            headers: vec![("www-authenticate".to_owned(), challenge)],
                            ..Answer::ok("", vec![])
                        };
                    }
                    let mut text = format!(
                        "HTTP/1.1 {} X\r\nconnection: close\r\ncontent-length: {}\r\n",
                        answer.status, answer.announced
                    );
                    for (name, value) in &answer.headers {
                        text.push_str(&format!("{name}: {value}\r\n"));
                    }
                    text.push_str("\r\n");
                    let _ = stream.write_all(text.as_bytes()).await;
                    let _ = stream.write_all(&answer.body).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        this
    }

    pub fn set(&self, path: &str, answer: Answer) {
        self.state.lock().unwrap().answers.insert(path.to_owned(), answer);
    }

    pub fn challenge(&self, text: &str) {
        self.state.lock().unwrap().challenge = text.to_owned();
    }

    /// Serves an image as `app:1`, each part changed by `change` first: its name.
    pub fn serve(&self, image: &Image, change: impl Fn(&str, Answer) -> Answer) -> String {
        let manifest = image.manifest_bytes();
        let answer = Answer::ok(MANIFEST, manifest);
        self.set("/v2/app/manifests/1", change("manifest", answer));
        let kinds = std::iter::once("config").chain(std::iter::repeat("layer"));
        for (kind, blob) in kinds.zip(image.blobs()) {
            let path = format!("/v2/app/blobs/{}", Digest::of(&blob));
            self.set(&path, change(kind, Answer::ok("application/octet-stream", blob)));
        }
        format!("{}/app:1", self.address)
    }

    /// Paths asked for so far.
    pub fn requests(&self) -> Vec<String> {
        self.state.lock().unwrap().requests.clone()
    }
}
