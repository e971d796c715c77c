//! Parses the `WWW-Authenticate` challenges of registries, checks the token realms that they name, and reads the
//! answers of token servers.

use std::collections::HashMap;

use reqwest::Url;
use serde::Deserialize;

use super::{RegistryImage, reference::is_loopback};

/// The authentication that a registry asks for in `WWW-Authenticate` (RFC 9110, section 11.6.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User name and password with every request.
    Basic,
    /// A token of a token server (distribution spec, "token authentication").
    Bearer {
        /// The token server's URL.
        realm: String,
        /// The parameters of the request to the token server.
        parameters: Vec<(String, String)>,
    },
}

/// Parses one `WWW-Authenticate` header; `None` for a scheme other than Basic and Bearer.
pub(crate) fn parse_challenge(header: &str) -> Option<Challenge> {
    let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let mut parameters: HashMap<String, String> = HashMap::new();
    let mut rest = rest.trim_start();
    while let Some((key, after)) = rest.split_once('=') {
        let (value, after) = match after.strip_prefix('"') {
            // A quoted value ends at the next quote without a backslash before it.
            Some(quoted) => {
                let mut value = String::new();
                let mut chars = quoted.char_indices();
                let mut end = quoted.len();
                while let Some((at, c)) = chars.next() {
                    match c {
                        '"' => {
                            end = at + 1;
                            break;
                        }
                        '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
                        other => value.push(other),
                    }
                }
                (value, &quoted[end..])
            }
            None => {
                let end = after.find(',').unwrap_or(after.len());
                (after[..end].trim().to_owned(), &after[end..])
            }
        };
        parameters.insert(key.trim().to_ascii_lowercase(), value);
        rest = after.trim_start_matches([',', ' ']);
    }
    let realm = parameters.remove("realm")?;
    parameters.remove("error");
    parameters.remove("error_description");
    let mut parameters: Vec<_> = parameters.into_iter().collect();
    parameters.sort();
    Some(Challenge::Bearer { realm, parameters })
}

/// Why no token is requested from a realm.
#[derive(Debug, thiserror::Error)]
pub enum RealmError {
    /// The realm is not a URL.
    #[error("it is not a URL")]
    NotUrl,
    /// The realm has a user name before the host, which an HTTP client would send as credentials of its own.
    #[error("it contains a user name")]
    UserInfo,
    /// The realm does not use TLS, so that others could read the password and the token.
    #[error("it does not use TLS, which is allowed only where the registry and the realm are both on this host")]
    NoTls,
}

/// Returns the URL from which a token for the registry of `image_name` must be requested. The realm may be on any host,
/// as Docker Hub's is (`auth.docker.io`): the registry sees the same credentials and could pass them on anyway. But the
/// realm must use TLS.
///
/// # Errors
/// Fails when no token may be requested from the realm.
pub(crate) fn token_url(
    realm: &str,
    query: &[(String, String)],
    image_name: &RegistryImage,
) -> Result<Url, RealmError> {
    let address = Url::parse_with_params(realm, query).map_err(|_| RealmError::NotUrl)?;
    if !address.username().is_empty() || address.password().is_some() {
        return Err(RealmError::UserInfo);
    }
    let on_this_host = image_name.is_loopback() && address.host_str().is_some_and(is_loopback);
    match address.scheme() {
        "https" => Ok(address),
        "http" if on_this_host => Ok(address),
        _ => Err(RealmError::NoTls),
    }
}

/// A token server's answer. `token` and `access_token` have the same meaning.
#[derive(Deserialize)]
pub(crate) struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl TokenAnswer {
    /// Returns the token, if the answer has one.
    pub(crate) fn token(self) -> Option<String> {
        self.token.or(self.access_token).filter(|token| !token.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Reference;
    use proptest::prelude::*;

    #[test]
    fn challenges_are_read() {
        assert_eq!(parse_challenge("Basic realm=\"x\""), Some(Challenge::Basic));
        assert_eq!(
            parse_challenge(
                r#"Bearer realm="https://auth.example/token",service="reg, istry",scope="repository:a/b:pull""#
            ),
            Some(Challenge::Bearer {
                realm: "https://auth.example/token".to_owned(),
                parameters: vec![
                    ("scope".to_owned(), "repository:a/b:pull".to_owned()),
                    ("service".to_owned(), "reg, istry".to_owned())
                ],
            })
        );
        assert_eq!(parse_challenge("Bearer service=x"), None);
        assert_eq!(parse_challenge("Negotiate abc"), None);
    }

    #[test]
    fn realms_without_tls_are_used_only_on_this_host() {
        let checked = |realm: &str, image: &str| {
            let Ok(Reference::Registry(place)) = Reference::parse(image) else { panic!("{image}") };
            token_url(realm, &[], &place)
        };
        for (realm, image) in [
            ("https://auth.docker.io/token", "redis:7"),
            ("https://auth.example/token", "registry.example/a"),
            ("https://auth.example/token", "127.0.0.1:5000/a"),
            ("http://127.0.0.1:5001/token", "127.0.0.1:5000/a"),
            ("http://localhost:5001/token", "127.0.0.1:5000/a"),
            ("http://[::1]:5001/token", "localhost:5000/a"),
        ] {
            assert!(checked(realm, image).is_ok(), "{realm} {image}");
        }
        for (realm, image) in [
            ("http://auth.example/token", "registry.example/a"),
            ("http://auth.example/token", "127.0.0.1:5000/a"),
            ("http://127.0.0.1:5001/token", "registry.example/a"),
            ("http://localhost.example/token", "localhost:5000/a"),
            ("http://127.0.0.1.example/token", "localhost:5000/a"),
            ("http://0.0.0.0:5001/token", "localhost:5000/a"),
            ("http://[::ffff:127.0.0.1]:5001/token", "localhost:5000/a"),
            ("ftp://localhost/token", "localhost:5000/a"),
        ] {
            assert!(matches!(checked(realm, image), Err(RealmError::NoTls)), "{realm} {image}");
        }
        for realm in ["https://u:p@auth.example/token", "https://registry.example@evil.example/", "http://u@localhost/"]
        {
            assert!(matches!(checked(realm, "localhost:5000/a"), Err(RealmError::UserInfo)), "{realm}");
        }
        assert!(matches!(checked("/token", "localhost:5000/a"), Err(RealmError::NotUrl)));
    }

    proptest! {
        #[test]
        fn no_header_panics(header in ".*") {
            let _ = parse_challenge(&header);
        }
    }
}
