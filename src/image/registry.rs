//! A client of the part of a registry's HTTP API that a pull needs (OCI distribution spec 1.1).

use std::{error::Error as _, sync::OnceLock, time::Duration};

use parking_lot::Mutex;
use reqwest::{Method, Response, StatusCode, header};

use super::{
    CredentialScope, Credentials, ImageError, Reference, RegistryImage,
    auth::{Challenge, TokenAnswer, parse_challenge, token_url},
    credentials::Transport,
    reference::is_loopback,
};
use crate::{ids::Digest, text};

/// The media types of manifests and indexes that this driver understands, preferred ones first.
const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json";
/// The time limit for establishing a connection to a registry.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The time after which a download that receives no byte has failed.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// The largest manifest that is read. It is the limit of distribution, the reference registry.
const MANIFEST_MAX: usize = 4 << 20;
/// The largest part of an error's body that is read. Usually the body is a line of JSON.
const ERROR_MAX: usize = 64 << 10;
/// The largest answer of a token server that is read. Usually a token has a few kilobytes.
const TOKEN_MAX: usize = 1 << 20;
/// The largest part of a registry's error text that an error message of this driver quotes.
const DETAIL_MAX: usize = 300;
/// The maximum number of retries when a registry is busy (429) or fails (5xx).
const RETRIES_MAX: u32 = 2;

/// The HTTP clients for all registries, with the system's trust store or `SSL_CERT_FILE`, and proxies from the
/// environment. Each client is made when it is first needed, because reading the trust store takes milliseconds.
#[derive(Debug, Default)]
pub(crate) struct HttpClients {
    proxied: OnceLock<reqwest::Client>,
    direct: OnceLock<reqwest::Client>,
}

impl HttpClients {
    /// Returns the client for a server on this host or elsewhere.
    ///
    /// # Errors
    /// Fails when the trust store can't be loaded.
    fn client(&self, location: ServerLocation) -> Result<&reqwest::Client, ImageError> {
        let (slot, builder) = match location {
            ServerLocation::Elsewhere => (&self.proxied, reqwest::Client::builder()),
            // A proxy would read passwords that are sent without TLS, and a loopback address means another host there.
            // Go's clients, docker among them, use no proxy for loopback either (golang/net, http/httpproxy/proxy.go,
            // `useProxy`).
            ServerLocation::ThisHost => (&self.direct, reqwest::Client::builder().no_proxy()),
        };
        if let Some(client) = slot.get() {
            return Ok(client);
        }
        let client = builder
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            // The target of a redirect must not learn the URL that led to it. reqwest itself removes credentials when
            // a redirect leads to another origin.
            .referer(false)
            .user_agent(concat!("nomad-driver-shim/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|source| ImageError::Client { source })?;
        Ok(slot.get_or_init(|| client))
    }
}

/// Whether a server is on this host. Such a server is not reached through a proxy.
#[derive(Debug, Clone, Copy)]
enum ServerLocation {
    ThisHost,
    Elsewhere,
}

impl ServerLocation {
    fn of(is_loopback: bool) -> Self {
        if is_loopback { Self::ThisHost } else { Self::Elsewhere }
    }
}

/// A client of one repository of a registry. It stores the transport and the authorization that the registry requires.
#[derive(Debug)]
pub(crate) struct Registry<'a> {
    http: &'a HttpClients,
    reference: &'a Reference,
    image_name: &'a RegistryImage,
    credentials: Option<&'a Credentials>,
    session: Mutex<SessionState>,
}

/// The transport and the `Authorization` header that the answers to earlier requests have determined.
#[derive(Debug, Default, Clone)]
struct SessionState {
    transport: Transport,
    authorization: Option<String>,
}

impl<'a> Registry<'a> {
    /// Makes a client of a repository. It tries TLS without authorization first.
    pub(crate) fn new(
        http: &'a HttpClients,
        reference: &'a Reference,
        image_name: &'a RegistryImage,
        credentials: Option<&'a Credentials>,
    ) -> Self {
        Self { http, reference, image_name, credentials, session: Mutex::default() }
    }

    /// Downloads a manifest or index by tag or digest, and returns its media type and bytes. The caller must check the
    /// digest.
    ///
    /// # Errors
    /// Fails when the registry can't be reached or refuses the request, or the document is too large.
    pub(crate) async fn manifest(&self, target: &str) -> Result<(String, Vec<u8>), ImageError> {
        let mut response = self.send(Method::GET, &format!("manifests/{target}"), Some(ACCEPT)).await?;
        let media_type = response
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .map(|value| value.split(';').next().unwrap_or(value).trim().to_owned())
            .unwrap_or_default();
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|source| self.unreachable(source))? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MANIFEST_MAX {
                return Err(ImageError::Malformed {
                    image: self.reference.to_string(),
                    what: "manifest",
                    digest: Digest::of(&bytes),
                    problem: format!("larger than {MANIFEST_MAX} bytes"),
                });
            }
        }
        Ok((media_type, bytes))
    }

    /// Requests a blob, and returns the response with the blob's bytes as a stream.
    ///
    /// # Errors
    /// Fails when the registry can't be reached or refuses the request.
    pub(crate) async fn blob(&self, digest: &Digest) -> Result<Response, ImageError> {
        self.send(Method::GET, &format!("blobs/{digest}"), None).await
    }

    /// Asks the registry whether the repository has a blob. Returns false also where a registry does not support
    /// `HEAD`.
    pub(crate) async fn has_blob(&self, digest: &Digest) -> bool {
        match self.send(Method::HEAD, &format!("blobs/{digest}"), None).await {
            Ok(_) => true,
            Err(error) => {
                tracing::debug!(
                    %digest,
                    error = %crate::error_chain(&error),
                    "the registry does not confirm that the repository has a blob"
                );
                false
            }
        }
    }

    /// Returns the registry's name for messages.
    pub(crate) fn name(&self) -> &str {
        self.image_name.registry()
    }

    /// Sends a request for `path` below the repository, and repeats it without TLS, with authorization or after a delay
    /// where the registry's answer demands that.
    async fn send(&self, method: Method, path: &str, accept: Option<&str>) -> Result<Response, ImageError> {
        let mut authorized = false;
        let mut tries = 0;
        loop {
            let session = self.session();
            let scheme = session.transport.scheme();
            let (host, repository) = (self.image_name.api_host(), self.image_name.repository());
            let client = self.http.client(ServerLocation::of(self.image_name.is_loopback()))?;
            let mut request = client.request(method.clone(), format!("{scheme}://{host}/v2/{repository}/{path}"));
            if let Some(accept) = accept {
                request = request.header(header::ACCEPT, accept);
            }
            if let Some(authorization) = &session.authorization {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            let response = match request.send().await {
                Ok(response) => response,
                // A registry on this host may use plain HTTP: then its answer to the TLS hello is no TLS message.
                Err(error)
                    if session.transport == Transport::Tls
                        && self.image_name.is_loopback()
                        && is_plaintext_answer(&error) =>
                {
                    self.update_session(|session| session.transport = Transport::Plain);
                    continue;
                }
                Err(source) => return Err(self.unreachable(source)),
            };
            match response.status() {
                status if status.is_success() => return Ok(response),
                // Only the registry itself gets credentials: a redirect may lead to another server.
                StatusCode::UNAUTHORIZED if !authorized && self.is_from_registry(&response, scheme) => {
                    authorized = true;
                    let authorization = self.authorize(&response).await?;
                    self.update_session(|session| session.authorization = authorization);
                }
                status
                    if (status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error()) && tries < RETRIES_MAX =>
                {
                    tries += 1;
                    tokio::time::sleep(retry_after(&response).unwrap_or(Duration::from_millis(300) * tries)).await;
                }
                status => return Err(self.status_error(path, status, response).await),
            }
        }
    }

    /// Returns whether the registry itself has answered, and not the target of a redirect to another origin.
    fn is_from_registry(&self, response: &Response, scheme: &str) -> bool {
        let expected = reqwest::Url::parse(&format!("{scheme}://{}/", self.image_name.api_host()));
        expected.is_ok_and(|expected| expected.origin() == response.url().origin())
    }

    fn session(&self) -> SessionState {
        self.session.lock().clone()
    }

    fn update_session(&self, change: impl FnOnce(&mut SessionState)) {
        change(&mut self.session.lock());
    }

    /// Returns the credentials if they may be sent to this registry.
    fn permitted_credentials(&self) -> Option<&'a Credentials> {
        self.credentials.filter(|credentials| credentials.may_be_sent_to(self.image_name, self.session().transport))
    }

    /// Returns the `Authorization` header that a response with status 401 asks for, if it asks for one.
    async fn authorize(&self, response: &Response) -> Result<Option<String>, ImageError> {
        let challenges = response.headers().get_all(header::WWW_AUTHENTICATE);
        let challenge = challenges.iter().filter_map(|value| value.to_str().ok()).find_map(parse_challenge);
        match challenge {
            Some(Challenge::Basic) => Ok(self.permitted_credentials().map(basic_authorization)),
            Some(Challenge::Bearer { realm, parameters }) => {
                let token = self.request_token(&realm, parameters).await?;
                Ok(Some(format!("Bearer {token}")))
            }
            None => Ok(None),
        }
    }

    /// Requests a token from the realm that the registry names.
    async fn request_token(&self, realm: &str, mut query: Vec<(String, String)>) -> Result<String, ImageError> {
        // A token without a scope permits nothing, but some registries leave the scope out of the challenge.
        if !query.iter().any(|(key, _)| key == "scope") {
            query.push(("scope".to_owned(), format!("repository:{}:pull", self.image_name.repository())));
        }
        let address = token_url(realm, &query, self.image_name).map_err(|source| ImageError::Realm {
            registry: self.name().to_owned(),
            realm: realm.to_owned(),
            source,
        })?;
        let location = ServerLocation::of(address.host_str().is_some_and(is_loopback));
        let mut request = self.http.client(location)?.get(address);
        if let Some(credentials) = self.permitted_credentials() {
            request = request.header(header::AUTHORIZATION, basic_authorization(credentials));
        }
        let response = request.send().await.map_err(|source| self.unreachable(source))?;
        let status = response.status();
        if !status.is_success() {
            return Err(self.status_error("token", status, response).await);
        }
        let body = read_body(response, TOKEN_MAX).await.map_err(|source| self.unreachable(source))?;
        let token = serde_json::from_slice::<TokenAnswer>(&body).ok().and_then(TokenAnswer::token);
        token.ok_or_else(|| ImageError::UnexpectedAnswer {
            registry: self.name().to_owned(),
            request: "authentication".to_owned(),
            status: status.as_u16(),
            detail: "no token in the token server's answer".to_owned(),
        })
    }

    fn access_denied(&self, image: String, detail: String) -> ImageError {
        let registry = self.name().to_owned();
        match self.credentials.map(|credentials| &credentials.scope) {
            Some(CredentialScope::Registry(scope)) if self.permitted_credentials().is_none() => {
                ImageError::CredentialsWithheld { image, registry, detail, scope: scope.clone() }
            }
            _ => ImageError::AccessDenied { image, registry, detail },
        }
    }

    async fn status_error(&self, request: &str, status: StatusCode, response: Response) -> ImageError {
        let body = read_body(response, ERROR_MAX).await.unwrap_or_default();
        let detail = error_detail(&body).unwrap_or_else(|| status.to_string());
        let (image, registry) = (self.reference.to_string(), self.name().to_owned());
        match status {
            StatusCode::NOT_FOUND => ImageError::NotFound { image, registry, detail },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => self.access_denied(image, detail),
            _ => {
                ImageError::UnexpectedAnswer { registry, request: request.to_owned(), status: status.as_u16(), detail }
            }
        }
    }

    fn unreachable(&self, source: reqwest::Error) -> ImageError {
        ImageError::Unreachable { registry: self.name().to_owned(), source: source.without_url() }
    }
}

/// Reads at most the first `limit` bytes of a response's body.
async fn read_body(mut response: Response, limit: usize) -> Result<Vec<u8>, reqwest::Error> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        bytes.extend_from_slice(&chunk[..chunk.len().min(limit - bytes.len())]);
        if bytes.len() == limit {
            break;
        }
    }
    Ok(bytes)
}

fn basic_authorization(credentials: &Credentials) -> String {
    use base64::Engine as _;
    let pair = format!("{}:{}", credentials.username, credentials.password);
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
}

fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    // A registry may ask for a delay of minutes. There is no limit here, because the pull has a time limit of its own.
    Some(Duration::from_secs(seconds))
}

/// Returns whether the server answered the TLS hello with bytes that are no TLS message. A bad certificate does not
/// count.
fn is_plaintext_answer(error: &reqwest::Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        // A rustls error is wrapped in an `io::Error`, whose `source` skips the error that it wraps.
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let tls = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()).or_else(|| error.downcast_ref());
        if let Some(tls) = tls {
            return matches!(tls, rustls::Error::InvalidMessage(_));
        }
        cause = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    false
}

/// Returns the first error of a registry's error body (distribution spec, "error codes") as `CODE: message`.
fn error_detail(body: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    let first = value.get("errors")?.get(0)?;
    let code = first.get("code")?.as_str()?;
    let message = first.get("message").and_then(serde_json::Value::as_str).unwrap_or_default();
    let detail = if message.is_empty() { code.to_owned() } else { format!("{code}: {message}") };
    Some(text::sanitize(&detail, DETAIL_MAX))
}
