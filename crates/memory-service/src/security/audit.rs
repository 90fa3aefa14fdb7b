use std::fmt;

use super::{Caller, Token};

/// Characters of the longest field.
const MAX_FIELD_LEN: usize = 256;

/// Logs a call that changes a bank as a whole: one event of level info and target `audit`, with fields
/// `call`, `bank`, `identity`, `token` (its permission, never itself), `peer` and `outcome`. `bank`
/// and `outcome` may come from anywhere: they are escaped, so that an event stays one line.
pub fn audit(caller: &Caller, call: &'static str, bank: &str, outcome: impl fmt::Display) {
    let identity = caller.identity.as_ref().map_or("none".to_owned(), |identity| identity.to_string());
    let token = match caller.token {
        Token::NotRead => "not read".to_owned(),
        Token::NotAsked => "not asked".to_owned(),
        Token::Missing => "missing".to_owned(),
        Token::Unknown => "unknown".to_owned(),
        Token::Grants(permission) => permission.to_string(),
    };
    let (bank, outcome) = (safe(bank), safe(&outcome.to_string()));
    let peer = caller.peer;
    tracing::info!(target: "audit", call, %bank, %identity, %token, %peer, %outcome);
}

/// Visible ASCII and blanks as they are, all else (and quotes) escaped, and not too much of it.
fn safe(text: &str) -> String {
    text.chars().flat_map(char::escape_default).take(MAX_FIELD_LEN).collect()
}
