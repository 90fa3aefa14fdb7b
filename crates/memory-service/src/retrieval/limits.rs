use serde::{Deserialize, Serialize};

/// A bound on everything that a server of memory by text does at once. What is beyond is refused at once, with a hint
/// when to come back.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetrievalLimits {
    /// Requests that are routed, fetched or sent.
    pub requests: usize,
    /// MiB of blocks that are held to be sent.
    pub send_mib: usize,
    /// Texts or embeddings of one request.
    pub inputs_per_request: usize,
    /// Bytes of one text.
    pub text_bytes: usize,
    /// Blocks of one request.
    pub blocks_per_request: usize,
    /// MiB of the blocks of one request, as they are sent.
    pub request_mib: usize,
    /// MiB of a message that comes in.
    pub message_mib: usize,
    /// Connections.
    pub connections: usize,
    /// Seconds until a request's blocks are on their way, or it is answered.
    pub request_s: u64,
    /// Seconds that a connection may be silent in the middle of a request.
    pub idle_s: u64,
}

impl Default for RetrievalLimits {
    fn default() -> Self {
        Self {
            requests: 64,
            send_mib: 2048,
            inputs_per_request: 1024,
            text_bytes: 1 << 20,
            blocks_per_request: 4096,
            request_mib: 1024,
            message_mib: 16,
            connections: 1024,
            request_s: 60,
            idle_s: 30,
        }
    }
}

impl RetrievalLimits {
    pub(crate) fn message_bytes(&self) -> usize {
        self.message_mib.saturating_mul(1 << 20)
    }
}
