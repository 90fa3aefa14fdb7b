use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};
use toml::{Table, Value};

use super::tokens::read_private;
use super::{Error, MIN_TOKEN_LEN, Reloading, Result, names};

/// API keys that follow their file.
pub type ReloadingApiKeys = Reloading<ApiKeys>;

/// What the holder of an API key may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyRole {
    /// Ask.
    User,
    /// Change what is served too.
    Admin,
}

/// One key without its token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// Whose it is: as messages and logs name it.
    pub name: String,
    /// What its holder may.
    pub role: KeyRole,
    /// Prefixes of cluster paths, such as `3` or `3/49`, whose memory its holder does not get.
    pub blocked: Vec<Vec<u32>>,
    /// Requests in a minute at most; `None` is no bound.
    pub requests_per_minute: Option<u32>,
    /// Requests at the same time at most; `None` is no bound.
    pub max_concurrent: Option<u32>,
}

/// The keys of those who ask over HTTP. Holds the SHA-256 of their tokens only.
#[derive(Clone)]
pub struct ApiKeys(Vec<([u8; 32], Arc<ApiKey>)>);

/// The keys of an entry of the file.
const KEYS: [&str; 6] = ["name", "token", "role", "blocked", "requests_per_minute", "max_concurrent"];

impl ApiKeys {
    /// Reads a file such as
    ///
    /// ```toml
    /// [[key]]
    /// name = "lab"
    /// token = "…"
    /// role = "user"                # or "admin"; "user" without it
    /// blocked = ["3", "5/81"]      # none without it
    /// requests_per_minute = 600    # no bound without it
    /// max_concurrent = 8           # no bound without it
    /// ```
    ///
    /// A file that others may read is refused, or its group, unless it belongs to root. No message quotes
    /// what may be a token.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(&read_private(path)?).map_err(Error::inside(path))
    }

    /// The same, read again whenever the file changes.
    pub fn reloading(path: &Path) -> Result<ReloadingApiKeys> {
        let file = path.to_owned();
        Reloading::new(vec![path.to_owned()], move || Self::read(&file))
    }

    /// The text of a file of keys.
    pub fn parse(text: &str) -> Result<Self> {
        let table: Table = text.parse().map_err(|e: toml::de::Error| {
            let end = e.span().map_or(0, |span| span.start);
            Error::TokensSyntax { line: 1 + text.bytes().take(end).filter(|&byte| byte == b'\n').count() }
        })?;
        let wrong = |expected| Error::ApiKey { place: 0, key: "key", expected };
        let entries = match table.get("key") {
            Some(Value::Array(entries)) if table.len() == 1 && !entries.is_empty() => entries,
            _ => return Err(wrong("entries [[key]], one at least, and nothing else")),
        };
        let mut found: Vec<([u8; 32], Arc<ApiKey>)> = vec![];
        for (entry, place) in entries.iter().zip(1..) {
            let entry = entry.as_table().ok_or(wrong("entries [[key]], each a table"))?;
            let (digest, key) = Entry { entry, place }.read()?;
            let is_again = |what| Error::ApiKey { place, key: what, expected: "one that no other key has" };
            if found.iter().any(|(other, _)| *other == digest) {
                return Err(is_again("token"));
            }
            if found.iter().any(|(_, other)| other.name == key.name) {
                return Err(is_again("name"));
            }
            found.push((digest, Arc::new(key)));
        }
        Ok(Self(found))
    }

    /// All of them, in the order of the file.
    pub fn all(&self) -> impl Iterator<Item = &ApiKey> {
        self.0.iter().map(|(_, key)| &**key)
    }

    /// Whose token it is; `None` for one that is not known. Takes the same time whichever token is right,
    /// and however much of one.
    pub fn holder_of(&self, token: &[u8]) -> Option<Arc<ApiKey>> {
        let digest: [u8; 32] = Sha256::digest(token).into();
        let mut found = 0u32;
        for ((known, _), code) in self.0.iter().zip(1u32..) {
            found.conditional_assign(&code, known.ct_eq(&digest));
        }
        let place = (found as usize).checked_sub(1)?;
        self.0.get(place).map(|(_, key)| Arc::clone(key))
    }
}

/// An entry of the file, and its place in it from 1.
struct Entry<'a> {
    entry: &'a Table,
    place: usize,
}

impl Entry<'_> {
    fn wrong(&self, key: &'static str, expected: &'static str) -> Error {
        Error::ApiKey { place: self.place, key, expected }
    }

    fn read(&self) -> Result<([u8; 32], ApiKey)> {
        if self.entry.keys().any(|key| !KEYS.contains(&key.as_str())) {
            let expected = "no others than name, token, role, blocked, requests_per_minute, max_concurrent";
            return Err(self.wrong("keys", expected));
        }
        let name = self.text("name")?.ok_or(self.wrong("name", "a name"))?;
        names::check("name of a key", name)?;
        let token = self.text("token")?.ok_or(self.wrong("token", "a token"))?;
        if token.len() < MIN_TOKEN_LEN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(self.wrong("token", "16 characters at least, all visible ASCII"));
        }
        let role = match self.text("role")? {
            None | Some("user") => KeyRole::User,
            Some("admin") => KeyRole::Admin,
            Some(_) => return Err(self.wrong("role", "\"user\" or \"admin\"")),
        };
        let key = ApiKey {
            name: name.to_owned(),
            role,
            blocked: self.blocked()?,
            requests_per_minute: self.number("requests_per_minute")?,
            max_concurrent: self.number("max_concurrent")?,
        };
        Ok((Sha256::digest(token).into(), key))
    }

    fn text(&self, key: &'static str) -> Result<Option<&str>> {
        let text = self.entry.get(key).map(|value| value.as_str().ok_or(self.wrong(key, "a string")));
        text.transpose()
    }

    fn number(&self, key: &'static str) -> Result<Option<u32>> {
        let number = |value: &Value| {
            let number = value.as_integer().and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
            number.ok_or(self.wrong(key, "a whole number above 0"))
        };
        self.entry.get(key).map(number).transpose()
    }

    fn blocked(&self) -> Result<Vec<Vec<u32>>> {
        let wrong = || self.wrong("blocked", "a list of prefixes of paths, such as [\"3\", \"5/81\"]");
        let Some(value) = self.entry.get("blocked") else { return Ok(vec![]) };
        let prefix = |item: &Value| -> Result<Vec<u32>> {
            let text = item.as_str().ok_or_else(wrong)?;
            text.split('/').map(|part| part.parse().map_err(|_| wrong())).collect()
        };
        value.as_array().ok_or_else(wrong)?.iter().map(prefix).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = r#"
[[key]]
name = "lab"
token = "0123456789abcdef-lab"
blocked = ["3", "5/81"]
requests_per_minute = 600
[[key]]
name = "ops"
token = "0123456789abcdef-ops"
role = "admin"
max_concurrent = 2
"#;

    #[test]
    fn a_token_is_worth_what_its_entry_says() {
        let keys = ApiKeys::parse(TWO).unwrap();
        let lab = keys.holder_of(b"0123456789abcdef-lab").unwrap();
        assert_eq!((lab.name.as_str(), lab.role), ("lab", KeyRole::User));
        assert_eq!(lab.blocked, [vec![3], vec![5, 81]]);
        assert_eq!((lab.requests_per_minute, lab.max_concurrent), (Some(600), None));
        let ops = keys.holder_of(b"0123456789abcdef-ops").unwrap();
        assert_eq!((ops.role, ops.max_concurrent), (KeyRole::Admin, Some(2)));
        for other in ["", "lab", "0123456789abcdef", "0123456789abcdef-op", "0123456789abcdef-opsx"] {
            assert!(keys.holder_of(other.as_bytes()).is_none(), "{other}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_without_a_token() {
        let secret = "very-secret-token-1";
        let entry = |rest: &str| format!("[[key]]\nname = \"a\"\ntoken = \"{secret}\"\n{rest}");
        let table = [
            (String::new(), "expected entries [[key]]"),
            (entry("role = \"very-secret-token-1\""), "key 1: role: expected \"user\" or \"admin\""),
            (entry("very-secret-token-1 = 3"), "key 1: keys: expected no others"),
            (entry("blocked = [\"a\"]"), "key 1: blocked: expected a list"),
            (entry("max_concurrent = 0"), "key 1: max_concurrent: expected a whole number above 0"),
            (entry("requests_per_minute = \"x\""), "key 1: requests_per_minute: expected"),
            (entry(&entry("")), "key 2: token: expected one that no other key has"),
            ("[[key]]\nname = \"a\"\ntoken = \"short\"".to_owned(), "key 1: token: expected 16"),
            (format!("[[key]]\ntoken = \"{secret}\""), "key 1: name: expected a name"),
            (format!("[[key]]\nname = \"A b\"\ntoken = \"{secret}\""), "name of a key is \"A b\""),
            (format!("key = \"{secret}"), "line 1: not TOML"),
        ];
        for (text, expected) in table {
            let message = ApiKeys::parse(&text).err().unwrap().to_string();
            assert!(message.contains(expected) && !message.contains(secret), "{message}");
        }
    }
}
