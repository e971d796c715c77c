//! The agent's HTTP API, as far as jobs and their allocations need it.

use std::time::Duration;

use serde_json::Value;

/// Time limit of an answer.
const ANSWER: Duration = Duration::from_secs(10);

/// A client of one agent's API.
#[derive(Clone)]
pub(super) struct Api {
    client: reqwest::Client,
    base: String,
}

impl Api {
    pub(super) fn new(address: &str) -> Self {
        let client = reqwest::Client::builder().no_proxy().timeout(ANSWER).build().expect("a client without TLS");
        Self { client, base: format!("http://{address}/v1") }
    }

    /// Reads a resource.
    ///
    /// # Errors
    /// When the agent does not answer, or refuses.
    pub(super) async fn get(&self, path: &str) -> Result<Value, String> {
        Self::answer(self.client.get(format!("{}/{path}", self.base))).await
    }

    /// Registers a job, or requests an action.
    ///
    /// # Errors
    /// As `get`.
    pub(super) async fn put(&self, path: &str, body: &Value) -> Result<Value, String> {
        Self::answer(self.client.put(format!("{}/{path}", self.base)).body(body.to_string())).await
    }

    /// Deletes a resource.
    ///
    /// # Errors
    /// As `get`.
    pub(super) async fn delete(&self, path: &str) -> Result<Value, String> {
        Self::answer(self.client.delete(format!("{}/{path}", self.base))).await
    }

    async fn answer(request: reqwest::RequestBuilder) -> Result<Value, String> {
        let response = request.send().await.map_err(|error| error.to_string())?;
        let status = response.status();
        let text = response.text().await.map_err(|error| error.to_string())?;
        if !status.is_success() {
            return Err(format!("{status}: {text}"));
        }
        Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
    }
}
