use std::fs::{File, Metadata};
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};
use toml::{Table, Value};

use super::{Error, Permission, Reloading, ReloadingTokens, Result};

/// Characters of the shortest token.
pub const MIN_TOKEN_LEN: usize = 16;

/// The keys of the file, and what they give.
const KEYS: [(&str, Permission); 3] =
    [("read", Permission::Read), ("write", Permission::Write), ("admin", Permission::Admin)];

/// The bearer tokens that a server knows, each with its permission. Holds their SHA-256 only.
#[derive(Clone)]
pub struct Tokens(Vec<Entry>);

#[derive(Clone)]
struct Entry {
    digest: [u8; 32],
    permission: Permission,
    /// Where it stands in the file.
    key: &'static str,
    place: usize,
}

impl Tokens {
    /// Reads a file such as
    ///
    /// ```toml
    /// read = ["…"]
    /// write = ["…", "…"]
    /// admin = ["…"]
    /// ```
    ///
    /// A file that others may read is refused, or its group, unless it belongs to root.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(&read_private(path)?).map_err(Error::inside(path))
    }

    /// The same, read again whenever the file changes.
    pub fn reloading(path: &Path) -> Result<ReloadingTokens> {
        let file = path.to_owned();
        Reloading::new(vec![path.to_owned()], move || Self::read(&file))
    }

    /// The text of a file of tokens. The messages of the TOML library quote the text, so they are not
    /// passed on.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let table: Table = text.parse().map_err(|e: toml::de::Error| {
            let end = e.span().map_or(0, |span| span.start);
            Error::TokensSyntax { line: 1 + text.bytes().take(end).filter(|&byte| byte == b'\n').count() }
        })?;
        if let Some(found) = table.keys().find(|key| KEYS.iter().all(|(known, _)| known != key)) {
            return Err(Error::TokensKey { found: found.chars().take(80).collect() });
        }
        let mut entries: Vec<Entry> = Vec::new();
        for (key, permission) in KEYS {
            for (i, token) in list(&table, key)?.into_iter().enumerate() {
                let place = i + 1;
                if token.len() < MIN_TOKEN_LEN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
                    return Err(Error::Token { key, place, found: token.chars().count() });
                }
                let digest = Sha256::digest(token).into();
                if let Some(first) = entries.iter().find(|entry| entry.digest == digest) {
                    let (other_key, other_place) = (first.key, first.place);
                    return Err(Error::RepeatedToken { key, place, other_key, other_place });
                }
                entries.push(Entry { digest, permission, key, place });
            }
        }
        if entries.is_empty() { Err(Error::NoTokens) } else { Ok(Self(entries)) }
    }

    /// What a token permits; `None` for one that is not known. Takes the same time whichever token is
    /// right, and however much of one.
    pub fn permission_of(&self, token: &[u8]) -> Option<Permission> {
        let digest: [u8; 32] = Sha256::digest(token).into();
        let mut found = 0u8;
        for entry in &self.0 {
            let code = 1 + entry.permission as u8;
            found.conditional_assign(&code, entry.digest.ct_eq(&digest));
        }
        KEYS.into_iter().map(|(_, permission)| permission).find(|p| 1 + *p as u8 == found)
    }
}

/// The text of a file that is its owner's alone.
pub(super) fn read_private(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let metadata = file.metadata().map_err(Error::io(path))?;
    check_private(&metadata).map_err(Error::inside(path))?;
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(Error::io(path))?;
    Ok(text)
}

/// The list under a key, empty when the key is not there.
fn list<'a>(table: &'a Table, key: &str) -> Result<Vec<&'a str>> {
    let wrong = |value: &Value| Error::TokensValue { key: key.to_owned(), found: value.type_str() };
    match table.get(key) {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) => {
            items.iter().map(|item| item.as_str().ok_or_else(|| wrong(item))).collect()
        }
        Some(other) => Err(wrong(other)),
    }
}

#[cfg(unix)]
pub(super) fn check_private(metadata: &Metadata) -> Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let mode = metadata.permissions().mode() & 0o7777;
    if is_private(mode, metadata.uid()) { Ok(()) } else { Err(Error::Readable { mode }) }
}

/// Whether a file of a mode and an owner is one's own. What root hands out, such as a Secret of Kubernetes, a
/// process that is not root can only read by its group.
pub(super) fn is_private(mode: u32, owner: u32) -> bool {
    let others = if owner == 0 { 0o037 } else { 0o077 };
    mode & others == 0
}

/// Other systems have no such mode.
#[cfg(not(unix))]
pub(super) fn check_private(_: &Metadata) -> Result<()> {
    Ok(())
}
