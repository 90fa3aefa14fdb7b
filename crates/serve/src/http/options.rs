use serde::{Deserialize, Serialize};

use crate::http::Error;

/// A bound on everything that a server of a run takes, each at least 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpLimits {
    /// Open connections; beyond, the next wait to be accepted.
    pub connections: usize,
    /// Requests at once, those that wait in the queue included; more are refused.
    pub requests: usize,
    /// KiB of a request's body.
    pub body_kib: usize,
    /// Prompts of a request times the completions of each.
    pub sequences: usize,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Texts or embeddings of a request that are routed or embedded.
    pub texts: usize,
    /// Seconds for the head of a request, for the handshake of TLS too, and for which an idle connection stays.
    pub header_s: u64,
    /// Seconds for the body of a request.
    pub body_s: u64,
    /// Seconds that a client may take none of what it is sent.
    pub write_s: u64,
    /// Seconds for a request as a whole.
    pub request_s: u64,
    /// Seconds that requests have to finish once the server is told to stop.
    pub grace_s: u64,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            requests: 512,
            body_kib: 4096,
            sequences: 128,
            prompt_tokens: 1 << 20,
            texts: 256,
            header_s: 30,
            body_s: 30,
            write_s: 30,
            request_s: 600,
            grace_s: 30,
        }
    }
}

impl HttpLimits {
    /// Fails on a bound of 0.
    ///
    /// # Errors
    /// [`Error::Limit`], naming it.
    pub fn check(&self) -> Result<(), Error> {
        let bounds = [
            ("connections", self.connections as u64),
            ("requests", self.requests as u64),
            ("body_kib", self.body_kib as u64),
            ("sequences", self.sequences as u64),
            ("prompt_tokens", self.prompt_tokens as u64),
            ("texts", self.texts as u64),
            ("header_s", self.header_s),
            ("body_s", self.body_s),
            ("write_s", self.write_s),
            ("request_s", self.request_s),
            ("grace_s", self.grace_s),
        ];
        match bounds.into_iter().find(|(_, found)| *found == 0) {
            Some((key, _)) => Err(Error::Limit { key }),
            None => Ok(()),
        }
    }
}
