use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use generate::engine::Refused;
use serde_json::{Value, json};

use super::body::Json;
use crate::memory;

/// What a request is answered with when it fails: a status and OpenAI's body
/// `{"error": {"message", "type", "param", "code"}}`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// The field that is wrong.
    pub(super) param: Option<String>,
    pub(super) code: Option<&'static str>,
    /// When to come back.
    pub(super) retry_after: Option<Duration>,
    /// Whether the connection ends: what the client still sends is not read.
    pub(super) closes: bool,
}

pub(super) type Answer<T> = std::result::Result<T, ApiError>;

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, message, param: None, code: None, retry_after: None, closes: false }
    }

    /// 400: the field `param` is wrong.
    pub(super) fn field(param: &str, message: impl std::fmt::Display) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, format!("{param}: {message}"));
        Self { param: Some(param.to_owned()), ..error }
    }

    pub(super) fn busy(message: impl Into<String>, retry_after: Duration) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, message);
        Self { code: Some("rate_limit_exceeded"), retry_after: Some(retry_after), ..error }
    }

    pub(super) fn not_found(message: impl Into<String>, code: &'static str) -> Self {
        Self { code: Some(code), ..Self::new(StatusCode::NOT_FOUND, message) }
    }

    pub(super) fn unauthorized(message: &str) -> Self {
        Self { code: Some("invalid_api_key"), ..Self::new(StatusCode::UNAUTHORIZED, message) }
    }

    pub(super) fn forbidden(message: impl Into<String>, code: &'static str) -> Self {
        Self { code: Some(code), ..Self::new(StatusCode::FORBIDDEN, message) }
    }

    pub(super) fn internal(message: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message.to_string())
    }

    /// The same, and the connection is not used again.
    pub(super) fn closing(self) -> Self {
        Self { closes: true, ..self }
    }

    /// OpenAI's names of kinds of errors.
    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    pub(super) fn body(&self) -> Value {
        let Self { message, param, code, .. } = self;
        json!({"error": {"message": message, "type": self.kind(), "param": param, "code": code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds(after)));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.closes {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// Whole seconds, at least 1.
fn seconds(after: Duration) -> u64 {
    after.as_secs() + u64::from(after.subsec_nanos() > 0 || after.is_zero())
}

impl From<memory::Error> for ApiError {
    fn from(error: memory::Error) -> Self {
        use memory::Error as E;
        let field = |param| Self::field(param, &error);
        match &error {
            E::Shared(_) => of_shared(error),
            E::UnknownBank { .. } => {
                Self { param: Some("bank".into()), ..Self::not_found(error.to_string(), "bank_not_found") }
            }
            E::BlockedPath { .. } => {
                let refused = Self::forbidden(error.to_string(), "memory_blocked");
                Self { param: Some("memory".into()), ..refused }
            }
            E::UnknownPath { .. } => field("memory"),
            E::Dimension { .. } => field("embeddings"),
            E::BankName { .. } => field("name"),
            E::OtherBank { .. }
            | E::NoBank { .. }
            | E::OtherStep { .. }
            | E::Io { .. }
            | E::Setting { .. } => field("source"),
            E::Retrieve(retrieve::Error::EmptyText { .. }) => field("texts"),
            E::Bank(_) => Self {
                code: Some("memory_unavailable"),
                retry_after: Some(Duration::from_secs(1)),
                ..Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
            },
            _ => Self::internal(&error),
        }
    }
}

/// An error that several requests wait for is told to each as its own.
fn of_shared(error: memory::Error) -> ApiError {
    match error {
        memory::Error::Shared(inner) => match std::sync::Arc::try_unwrap(inner) {
            Ok(inner) => inner.into(),
            Err(inner) if matches!(*inner, memory::Error::Bank(_)) => ApiError {
                code: Some("memory_unavailable"),
                retry_after: Some(Duration::from_secs(1)),
                ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, inner.to_string())
            },
            Err(inner) => ApiError::internal(inner),
        },
        other => ApiError::internal(other),
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let message = refused.to_string();
        match refused {
            Refused::Busy { retry_after, .. } => Self::busy(message, retry_after),
            Refused::TooLong { .. } => {
                let error = Self::new(StatusCode::BAD_REQUEST, message);
                Self { param: Some("prompt".into()), code: Some("context_length_exceeded"), ..error }
            }
            Refused::Invalid(_) => Self::new(StatusCode::BAD_REQUEST, message),
            Refused::Stopped => Self::new(StatusCode::SERVICE_UNAVAILABLE, message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_its_kind_and_its_headers() {
        let table = [
            (ApiError::field("n", "expected 1"), 400, "invalid_request_error"),
            (ApiError::unauthorized("no"), 401, "authentication_error"),
            (ApiError::forbidden("no", "x"), 403, "permission_error"),
            (ApiError::not_found("no", "x"), 404, "not_found_error"),
            (ApiError::busy("no", Duration::from_millis(1500)), 429, "rate_limit_error"),
            (ApiError::internal("no"), 500, "server_error"),
        ];
        for (error, status, kind) in table {
            assert_eq!(error.body()["error"]["type"], kind);
            assert_eq!(error.clone().into_response().status().as_u16(), status);
        }
        assert_eq!(ApiError::field("n", "expected 1").body()["error"]["param"], "n");
        let busy = ApiError::busy("no", Duration::from_millis(1500)).into_response();
        assert_eq!(busy.headers()["retry-after"], "2");
        assert_eq!(ApiError::internal("x").closing().into_response().headers()["connection"], "close");
    }

    #[test]
    fn errors_of_memory_are_the_callers_or_ours() {
        let unknown = memory::Error::UnknownBank { name: "x".into(), loaded: vec!["default".into()] };
        let error = ApiError::from(unknown);
        assert_eq!((error.status.as_u16(), error.param.as_deref()), (404, Some("bank")));
        let shared = memory::Error::Shared(std::sync::Arc::new(memory::Error::Task("x".into())));
        assert_eq!(ApiError::from(shared).status.as_u16(), 500);
    }
}
