use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Identity, MIN_TOKEN_LEN};

/// The result of every fallible function of [`super`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with certificates, tokens, names and connections. No message shows a secret.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, with what is wrong in it.
    #[error("{}: {source}", path.display())]
    In {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<Error>,
    },
    /// A file or folder cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file that would have to be overwritten.
    #[error("{}: is already there, and is not overwritten", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A folder in which another process makes certificates.
    #[error("{}: another process makes certificates here", path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// A file without what it should hold.
    #[error("expected a {expected} in PEM: {source}")]
    Pem {
        /// What it should hold.
        expected: &'static str,
        /// What was found.
        source: rustls::pki_types::pem::Error,
    },
    /// A certificate that cannot be read.
    #[error("not a certificate: {reason}")]
    Certificate {
        /// Why.
        reason: String,
    },
    /// A private key that cannot be used.
    #[error("not a private key that can be used: {reason}")]
    Key {
        /// Why.
        reason: String,
    },
    /// A certificate outside its time.
    #[error("the certificate is valid from {from} to {to}, and it is {now}")]
    Validity {
        /// Its begin.
        from: String,
        /// Its end.
        to: String,
        /// The time it is.
        now: String,
    },
    /// A certificate that signs no others, in a file of authorities.
    #[error("the certificate is not one of an authority")]
    NotAnAuthority,
    /// A key of another certificate.
    #[error("{} is not the key of {}", key.display(), cert.display())]
    KeyMismatch {
        /// The file of the certificate.
        cert: PathBuf,
        /// The file of the key.
        key: PathBuf,
    },
    /// The TLS library refuses a configuration, or cannot make a certificate.
    #[error("{what}: {reason}")]
    Tls {
        /// What could not be made.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// A certificate with no identity or several.
    #[error("the certificate has {found} URIs, expected one: spiffe://anchorage/role/ROLE/NAME")]
    UriCount {
        /// URIs among its alternative names.
        found: usize,
    },
    /// A certificate with the identity of something else.
    #[error("the certificate's URI is {found:?}, expected spiffe://anchorage/role/ROLE/NAME")]
    Uri {
        /// Its URI.
        found: String,
    },
    /// A role that is none.
    #[error("role is {found:?}, expected worker, shard, reader or admin")]
    Role {
        /// What was found in its place.
        found: String,
    },
    /// A name that cannot be one.
    #[error("{what} is {found:?}, expected 1 to 64 of a-z, 0-9, '.', '_' and '-', and not '.' or '..'")]
    Name {
        /// Whose name.
        what: &'static str,
        /// The name, shortened.
        found: String,
    },
    /// A host that is neither a DNS name nor an address.
    #[error("host is {found:?}, expected a DNS name or an IP address")]
    Host {
        /// The host.
        found: String,
    },
    /// A certificate of a shard that no client could verify.
    #[error("{identity} has no hosts, expected the names and addresses that clients will use")]
    NoHosts {
        /// Whose certificate.
        identity: Identity,
    },
    /// A certificate for too long, or for no time.
    #[error("days is {found}, expected 1 to {limit}")]
    Days {
        /// Days asked for.
        found: u32,
        /// The most: [`super::certs::MAX_DAYS`], or what the authority has left.
        limit: u32,
    },
    /// Secrets that others can read.
    #[error("others may read it (mode {mode:04o}), expected 0600 or 0400 (of root, 0640 or 0440 too)")]
    Readable {
        /// The mode of the file.
        mode: u32,
    },
    /// A file of tokens that is not one. What stands in the file is not shown.
    #[error("line {line}: not TOML")]
    TokensSyntax {
        /// The line, from 1.
        line: usize,
    },
    /// A key that a file of tokens does not have.
    #[error("unknown key {found:?}, expected read, write or admin")]
    TokensKey {
        /// The key.
        found: String,
    },
    /// A value that is not a list of strings.
    #[error("{key} has a value of type {found}, expected a list of strings")]
    TokensValue {
        /// The key.
        key: String,
        /// The type of what was found.
        found: &'static str,
    },
    /// A file of tokens without any.
    #[error("lists no token, expected one at least under read, write or admin")]
    NoTokens,
    /// A token that could be guessed, or could not be sent.
    #[error(
        "token {place} of {key} has {found} characters, expected {MIN_TOKEN_LEN} at least, all visible ASCII"
    )]
    Token {
        /// The key it is under.
        key: &'static str,
        /// Its place, from 1.
        place: usize,
        /// Its characters.
        found: usize,
    },
    /// An entry of a file of API keys that is not one. What stands in the file is not shown.
    #[error("key {place}: {key}: expected {expected}")]
    ApiKey {
        /// Its place in the file, from 1; 0 is the file as a whole.
        place: usize,
        /// Which of its keys.
        key: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// A token that stands twice.
    #[error("token {place} of {key} is token {other_place} of {other_key} again")]
    RepeatedToken {
        /// The key it is under.
        key: &'static str,
        /// Its place, from 1.
        place: usize,
        /// The key of the first.
        other_key: &'static str,
        /// The place of the first, from 1.
        other_place: usize,
    },
    /// An address that others reach, without TLS.
    #[error("{addr} can be reached by others, expected TLS, a loopback address, or --insecure")]
    Bind {
        /// The address.
        addr: SocketAddr,
    },
    /// A connection that could not be made.
    #[error("{peer}: {source}")]
    Connection {
        /// The other side.
        peer: String,
        /// What the system or TLS says.
        source: io::Error,
    },
    /// A peer that is silent, or too slow.
    #[error("{peer}: no connection after {limit:?}")]
    Timeout {
        /// The other side.
        peer: String,
        /// The time it had.
        limit: Duration,
    },
    /// A peer whose certificate is genuine and yet not accepted.
    #[error("{peer}: {source}")]
    Peer {
        /// The other side.
        peer: String,
        /// What is wrong with its certificate.
        source: Box<Error>,
    },
    /// A server that is none of the bank's.
    #[error("{peer}: the server is {found}, expected a shard")]
    NotAShard {
        /// The other side.
        peer: String,
        /// What its certificate says.
        found: Identity,
    },
    /// A certificate of one who is no worker, where only workers meet.
    #[error("the certificate is that of {found}, expected a worker")]
    NotAWorker {
        /// Whose it is.
        found: Identity,
    },
    /// A peer that speaks something else.
    #[error("{peer}: speaks {found:?}, expected {expected:?}")]
    Protocol {
        /// The other side.
        peer: String,
        /// What both sides should speak.
        expected: String,
        /// What was agreed on; empty when nothing was.
        found: String,
    },
}

impl Error {
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }

    pub(super) fn inside(path: &Path) -> impl FnOnce(Self) -> Self {
        move |source| Self::In { path: path.to_owned(), source: Box::new(source) }
    }

    pub(super) fn malformed(reason: impl std::fmt::Display) -> Self {
        Self::Certificate { reason: reason.to_string() }
    }

    pub(super) fn tls(what: &'static str) -> impl FnOnce(rustls::Error) -> Self {
        move |e| Self::Tls { what, reason: e.to_string() }
    }

    pub(super) fn connection(peer: impl ToString) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Connection { peer: peer.to_string(), source }
    }
}
