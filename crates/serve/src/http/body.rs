//! Bodies of requests: read within bounds of size and time, and parsed with errors that name the field.

use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::HttpLimits;
use super::error::{Answer, ApiError};

/// A value as the body of an answer.
pub(super) struct Json<T>(pub(super) T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(bytes) => ([(header::CONTENT_TYPE, "application/json")], bytes).into_response(),
            // Only a value of other keys than texts, which none of ours has.
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    }
}

/// The whole body.
pub(super) async fn read(headers: &HeaderMap, body: Body, limits: &HttpLimits) -> Answer<Bytes> {
    let most = limits.body_kib << 10;
    let too_large = || {
        let message = format!("the body has more than {most} bytes, which is the most");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).closing()
    };
    let told = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if told.is_some_and(|told| told > most as u64) {
        return Err(too_large());
    }
    match timeout(Duration::from_secs(limits.body_s), to_bytes(body, most)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if is_length(&error) => Err(too_large()),
        Ok(Err(error)) => {
            let message = format!("the body cannot be read: {error}");
            Err(ApiError::new(StatusCode::BAD_REQUEST, message).closing())
        }
        Err(_) => {
            let message = format!("the body was not there after {} s", limits.body_s);
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message).closing())
        }
    }
}

fn is_length(error: &axum::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(found) = cause {
        // The type is one of a crate that is not named here otherwise.
        if found.to_string().contains("length limit exceeded") {
            return true;
        }
        cause = found.source();
    }
    false
}

/// The body as a value, whose fields are all known: an unknown one names the nearest.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Answer<T> {
    // A list would be read as the values of the fields in their order.
    let first = body.iter().find(|byte| !byte.is_ascii_whitespace());
    if first.is_some_and(|byte| *byte != b'{') {
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "the body is not JSON of an object: expected {\"…\": …}",
        ));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut deserializer);
    let value = parsed.map_err(|error| {
        let path = error.path().to_string();
        explain(&path, error.inner())
    })?;
    deserializer.end().map_err(|error| explain(".", &error))?;
    Ok(value)
}

fn explain(path: &str, error: &serde_json::Error) -> ApiError {
    let message = shortened(&error.to_string());
    if !error.is_data() {
        return ApiError::new(StatusCode::BAD_REQUEST, format!("the body is not JSON: {message}"));
    }
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    if message.starts_with("unknown field") && quoted.len() > 1 {
        let (unknown, known) = (quoted[0], &quoted[1..]);
        let nearness = |name: &&&str| (strsim::jaro_winkler(unknown, name) * 1e6) as u64;
        let nearest = known.iter().max_by_key(nearness).unwrap_or(&unknown);
        let error = ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("unknown field `{unknown}`, did you mean `{nearest}`?"),
        );
        return ApiError { param: Some(unknown.to_owned()), ..error };
    }
    match path {
        "." | "?" | "" => ApiError::new(StatusCode::BAD_REQUEST, message),
        path => ApiError::field(&shortened(path), message),
    }
}

/// What may hold a text of the request, at most 300 characters; the list of known fields, which the nearest is
/// looked for in, stays whole.
fn shortened(text: &str) -> String {
    match text.starts_with("unknown field") && text.len() < 10_000 {
        true => text.to_owned(),
        false if text.chars().count() > 300 => text.chars().take(299).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Asked {
        #[serde(rename = "temperature")]
        _temperature: Option<f64>,
        #[serde(rename = "max_tokens")]
        _max_tokens: Option<u32>,
    }

    #[test]
    fn errors_name_the_field_and_the_nearest_known_one() {
        let of = |text: &str| parse::<Asked>(text.as_bytes()).unwrap_err();
        assert_eq!(
            of("{\"temprature\": 1}").message,
            "unknown field `temprature`, did you mean `temperature`?"
        );
        let error = of("{\"max_tokens\": \"many\"}");
        assert_eq!(error.param.as_deref(), Some("max_tokens"));
        assert!(
            error.message.starts_with("max_tokens: invalid type: string \"many\", expected u32"),
            "{error:?}"
        );
        assert!(of("{\"max_tokens\": 1").message.starts_with("the body is not JSON: EOF"));
        assert!(of("{} x").message.starts_with("the body is not JSON: trailing characters"));
        assert!(of(&"[".repeat(100_000)).status == StatusCode::BAD_REQUEST);
        let long = of(&format!("{{\"max_tokens\": \"{}\"}}", "x".repeat(100_000)));
        assert!(long.message.len() < 400, "{}", long.message.len());
        let unknown = of(&format!("{{\"{}\": 1}}", "x".repeat(100_000)));
        assert!(unknown.message.len() < 1000, "{}", unknown.message.len());
    }
}
