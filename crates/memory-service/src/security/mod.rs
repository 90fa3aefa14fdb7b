//! Who may do what: certificates, tokens and roles.
//!
//! A connection is a [`Stream`], made by an [`Acceptor`] or a [`Connector`]. With [`Tls`] both sides
//! show a certificate of one authority, and its [`Identity`] says the peer's [`Role`]. A file of
//! [`Tokens`] asks every request for a bearer token too. What a request shows makes a [`Caller`], and
//! [`authorize`] decides, as a pure function, whether it has the [`Permission`] that a call needs:
//!
//! | TLS | tokens | who decides |
//! |---|---|---|
//! | yes | no | the role of the certificate |
//! | yes | yes | the role and the token: both must allow |
//! | no | yes | the token |
//! | no | no | nobody, everything is allowed: [`check_bind`] keeps this to loopback unless told |
//!
//! Certificates and tokens are [`Reloading`]: a file that changes counts for the next connection or
//! request. [`certs`] makes an authority and certificates for development. [`WorkerTls`] is for the
//! connections of workers to each other, which are made elsewhere.
//!
//! What is served over HTTP has [`ApiKeys`], a name, a role and bounds for each, and [`Https`].

mod access;
mod audit;
pub mod certs;
mod connect;
mod error;
mod https;
mod identity;
mod keys;
mod names;
mod reload;
mod stream;
mod tls;
mod tokens;
mod workers;

#[cfg(test)]
mod tests;

pub use access::{Caller, Denied, Token, authorize, check_bind};
pub use audit::audit;
pub use connect::{Acceptor, Connector};
pub use error::{Error, Result};
pub use https::{HttpStream, Https, ReloadingHttps};
pub use identity::{Identity, Permission, Role};
pub use keys::{ApiKey, ApiKeys, KeyRole, ReloadingApiKeys};
pub use names::BankName;
pub use reload::{Reloading, ReloadingTls, ReloadingTokens};
pub use stream::Stream;
pub use tls::{Protocol, Tls, TlsFiles};
pub use tokens::{MIN_TOKEN_LEN, Tokens};
pub use workers::WorkerTls;
