//! A fake registry, for behaviour that a real one can't be made to show. It speaks HTTP/1.1 with or without TLS, and
//! closes each connection after one answer.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use nomad_driver_shim::ids::Digest;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
    sync::Barrier,
};
use tokio_rustls::TlsAcceptor;

use super::Image;

/// An answer of the registry.
#[derive(Clone)]
pub(crate) struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// The value of `Content-Length`. A value above the body's length makes a truncated download.
    pub announced: usize,
    pub delay: Duration,
    /// The required value of `Authorization`. Without it the answer is 401 with `challenge`.
    pub wants: Option<String>,
}

impl Answer {
    pub(crate) fn ok(content_type: &str, body: Vec<u8>) -> Self {
        let headers = vec![("content-type".to_owned(), content_type.to_owned())];
        Self { status: 200, headers, announced: body.len(), body, delay: Duration::ZERO, wants: None }
    }
}

/// A request as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub method: String,
    pub host: String,
    pub path: String,
    pub authorization: Option<String>,
}

impl Request {
    fn read(head: &str) -> Self {
        let mut words = head.split_whitespace().map(str::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let header = |wanted: &str| {
            let mut lines = head.lines().filter_map(|line| line.split_once(": "));
            lines.find(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.to_owned())
        };
        Self { method, path, host: header("host").unwrap_or_default(), authorization: header("authorization") }
    }
}

#[derive(Default)]
struct State {
    answers: HashMap<String, Answer>,
    requests: Vec<Request>,
    challenge: String,
    together: Vec<String>,
    barrier: Option<Arc<Barrier>>,
}

/// The fake registry. It answers 404 for a path without an answer.
#[derive(Clone)]
pub(crate) struct FakeRegistry {
    pub address: String,
    state: Arc<Mutex<State>>,
}

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

impl FakeRegistry {
    pub(crate) async fn start() -> Self {
        Self::start_with(None).await
    }

    /// Starts a registry that speaks TLS only.
    pub(crate) async fn start_tls(acceptor: TlsAcceptor) -> Self {
        Self::start_with(Some(acceptor)).await
    }

    async fn start_with(acceptor: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let this = Self { address: listener.local_addr().unwrap().to_string(), state: Arc::default() };
        let state = this.state.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (state, acceptor) = (state.clone(), acceptor.clone());
                tokio::spawn(async move {
                    match acceptor {
                        None => answer(stream, &state).await,
                        Some(acceptor) => {
                            if let Ok(stream) = acceptor.accept(stream).await {
                                answer(stream, &state).await;
                            }
                        }
                    }
                });
            }
        });
        this
    }

    /// Sets the answer to `path`, or, for one method only, to `METHOD path`.
    pub(crate) fn set(&self, path: &str, answer: Answer) {
        self.state.lock().unwrap().answers.insert(path.to_owned(), answer);
    }

    /// Holds back the answers to these requests (`METHOD path`) until all of them have arrived.
    pub(crate) fn answer_together(&self, requests: Vec<String>) {
        let mut state = self.state.lock().unwrap();
        state.barrier = Some(Arc::new(Barrier::new(requests.len())));
        state.together = requests;
    }

    pub(crate) fn challenge(&self, text: &str) {
        self.state.lock().unwrap().challenge = text.to_owned();
    }

    /// Serves an image as `app:1`, with each part changed by `change` first. Returns the image's whole name.
    pub(crate) fn serve(&self, image: &Image, change: impl Fn(&str, Answer) -> Answer) -> String {
        self.serve_as("app:1", image, change)
    }

    /// Serves an image as `REPOSITORY:TAG`, like [`Self::serve`].
    pub(crate) fn serve_as(&self, name: &str, image: &Image, change: impl Fn(&str, Answer) -> Answer) -> String {
        let (repository, tag) = name.split_once(':').unwrap();
        let manifest = image.manifest_bytes();
        let answer = Answer::ok(MANIFEST, manifest);
        self.set(&format!("/v2/{repository}/manifests/{tag}"), change("manifest", answer));
        let kinds = std::iter::once("config").chain(std::iter::repeat("layer"));
        for (kind, blob) in kinds.zip(image.blobs()) {
            let path = format!("/v2/{repository}/blobs/{}", Digest::of(&blob));
            self.set(&path, change(kind, Answer::ok("application/octet-stream", blob)));
        }
        format!("{}/{name}", self.address)
    }

    /// Removes a blob of a repository, so that its path gets a 404 from now on.
    pub(crate) fn forget_blob(&self, repository: &str, digest: &Digest) {
        self.state.lock().unwrap().answers.remove(&format!("/v2/{repository}/blobs/{digest}"));
    }

    /// Returns the paths of all requests so far.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.seen().into_iter().map(|request| request.path).collect()
    }

    /// Returns all requests so far.
    pub(crate) fn seen(&self) -> Vec<Request> {
        self.state.lock().unwrap().requests.clone()
    }

    /// Returns the `Authorization` values of all requests so far.
    pub(crate) fn authorizations(&self) -> Vec<String> {
        self.seen().into_iter().filter_map(|request| request.authorization).collect()
    }

    /// Returns the methods of all requests for a blob so far.
    pub(crate) fn asked_for(&self, digest: &Digest) -> Vec<String> {
        let of_blob = |request: &Request| request.path.ends_with(digest.as_str());
        self.seen().into_iter().filter(of_blob).map(|request| request.method).collect()
    }
}

async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, state: &Mutex<State>) {
    let mut head = Vec::new();
    let mut byte = [0; 1];
    while !head.ends_with(b"\r\n\r\n") {
        // A TLS hello is no request line. Like real servers, the fake registry answers it with 400 in plain text.
        if stream.read(&mut byte).await.unwrap_or(0) == 0 {
            return;
        }
        head.push(byte[0]);
        if head.len() == 1 && head[0] == 0x16 {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n").await;
            return;
        }
    }
    let request = Request::read(&String::from_utf8_lossy(&head));
    let (answer, challenge, barrier) = {
        let mut state = state.lock().unwrap();
        state.requests.push(request.clone());
        let bare = request.path.split('?').next().unwrap_or_default();
        let of_method = format!("{} {bare}", request.method);
        let answer = state.answers.get(&of_method).or_else(|| state.answers.get(bare)).cloned();
        let barrier = state.barrier.clone().filter(|_| state.together.contains(&of_method));
        (answer, state.challenge.clone(), barrier)
    };
    if let Some(barrier) = barrier {
        barrier.wait().await;
    }
    let mut answer = answer.unwrap_or_else(|| Answer {
        status: 404,
        ..Answer::ok(
            "application/json",
            br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#.to_vec(),
        )
    });
    tokio::time::sleep(answer.delay).await;
    if answer.wants.is_some() && answer.wants != request.authorization {
        answer =
            Answer { status: 401, headers: vec![("www-authenticate".to_owned(), challenge)], ..Answer::ok("", vec![]) };
    }
    let mut text =
        format!("HTTP/1.1 {} X\r\nconnection: close\r\ncontent-length: {}\r\n", answer.status, answer.announced);
    for (name, value) in &answer.headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    let _ = stream.write_all(text.as_bytes()).await;
    if request.method != "HEAD" {
        let _ = stream.write_all(&answer.body).await;
    }
    let _ = stream.shutdown().await;
}
