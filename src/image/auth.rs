//! Who we are to a registry: credentials, `WWW-Authenticate` challenges, and tokens.

use std::{collections::HashMap, fmt};

use serde::Deserialize;

/// A name and a password for a registry. Never printed.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// User name.
    pub username: String,
    /// Password or token.
    pub password: String,
    /// The only registry they are for; None offers them to whichever registry the image names.
    pub server: Option<String>,
}

impl Credentials {
    /// Are they for this registry?
    pub fn are_for(&self, registry: &str) -> bool {
        self.server.as_deref().is_none_or(|server| {
            let server = server.trim_start_matches("https://").trim_start_matches("http://");
            let host = server.split('/').next().unwrap_or(server);
            host == registry || (registry == "docker.io" && matches!(host, "index.docker.io" | "registry-1.docker.io"))
        })
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("server", &self.server).finish_non_exhaustive()
    }
}

/// What a registry asks for in `WWW-Authenticate` (RFC 9110, section 11.6.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    /// Name and password with every request.
    Basic,
    /// A token from elsewhere (distribution spec, "token authentication").
    Bearer {
        /// Where tokens are had.
        realm: String,
        /// Sent along to it.
        parameters: Vec<(String, String)>,
    },
}

/// Reads one `WWW-Authenticate` header; None when it asks for something we can't do.
pub fn parse_challenge(header: &str) -> Option<Challenge> {
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
            // Quoted: to the next bare quote, with backslash escapes.
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

/// A token server's answer; the two names mean the same.
#[derive(Deserialize)]
pub struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl TokenAnswer {
    /// The token, if there is one.
    pub fn token(self) -> Option<String> {
        self.token.or(self.access_token).filter(|token| !token.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
    fn credentials_stay_with_their_registry_and_out_of_logs() {
        let bound = Credentials {
            username: "u".into(),
            password: "hidden".into(),
            server: Some("https://registry.example/v1/".into()),
        };
        assert!(bound.are_for("registry.example"));
        assert!(!bound.are_for("evil.example"));
        assert!(!format!("{bound:?}").contains("hidden"));
    }

    proptest! {
        #[test]
        fn no_header_panics(header in ".*") {
            let _ = parse_challenge(&header);
        }
    }
}
