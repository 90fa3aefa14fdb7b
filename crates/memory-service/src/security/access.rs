use std::fmt;
use std::net::{IpAddr, SocketAddr};

use super::{Error, Identity, Permission, Result, Tokens};

/// What a request's bearer token is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// Nobody has looked at the request: nothing is allowed.
    NotRead,
    /// The server has no tokens.
    NotAsked,
    /// The server has tokens, and the request shows none.
    Missing,
    /// The server does not know the token.
    Unknown,
    /// The server knows the token.
    Grants(Permission),
}

/// Who asks. As a [`super::Stream`] makes it, it says nothing of tokens yet, and may nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Where the connection comes from.
    pub peer: SocketAddr,
    /// Of the certificate; `None` on a connection without TLS.
    pub identity: Option<Identity>,
    /// Of the request.
    pub token: Token,
}

impl Caller {
    /// The caller, with what its request shows: the value of the header `authorization`, if there is
    /// one. `tokens` are the server's, if it has any.
    pub fn with_token(self, tokens: Option<&Tokens>, authorization: Option<&[u8]>) -> Self {
        let token = match (tokens, authorization.map(bearer)) {
            (None, _) => Token::NotAsked,
            (Some(_), None) => Token::Missing,
            (Some(tokens), Some(shown)) => {
                shown.and_then(|token| tokens.permission_of(token)).map_or(Token::Unknown, Token::Grants)
            }
        };
        Self { token, ..self }
    }

    /// Who makes a gRPC request; `None` if its connection is not a [`super::Stream`].
    pub fn of_request<T>(request: &tonic::Request<T>, tokens: Option<&Tokens>) -> Option<Self> {
        let caller = request.extensions().get::<Caller>()?.clone();
        let authorization = request.metadata().get("authorization");
        Some(caller.with_token(tokens, authorization.map(|value| value.as_encoded_bytes())))
    }
}

/// One line, safe to log: names have few characters, and tokens are not shown.
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.identity {
            Some(identity) => write!(f, "{identity} at {}", self.peer),
            None => write!(f, "{}", self.peer),
        }
    }
}

/// The token in a header; the scheme's case does not count (RFC 9110, section 11.1).
fn bearer(authorization: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = authorization.split_at_checked(b"Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

/// Why a caller may not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The role is not enough.
    #[error("{identity} may not: {needs} is needed, and its role may {has}")]
    Role {
        /// Who asks.
        identity: Identity,
        /// What the call needs.
        needs: Permission,
        /// What the role gives.
        has: Permission,
    },
    /// The server has not looked for a token, which is its mistake.
    #[error("{needs} is needed, and the server has not looked for a bearer token")]
    TokenNotRead {
        /// What the call needs.
        needs: Permission,
    },
    /// There is no token.
    #[error("{needs} is needed, and the request has no bearer token")]
    NoToken {
        /// What the call needs.
        needs: Permission,
    },
    /// The token is wrong.
    #[error("{needs} is needed, and the bearer token is not known")]
    UnknownToken {
        /// What the call needs.
        needs: Permission,
    },
    /// The token is not enough.
    #[error("{needs} is needed, and the bearer token gives {has}")]
    Token {
        /// What the call needs.
        needs: Permission,
        /// What the token gives.
        has: Permission,
    },
}

impl Denied {
    /// Whether the server does not know who asks, rather than knowing that it may not.
    pub fn is_unauthenticated(&self) -> bool {
        matches!(self, Self::TokenNotRead { .. } | Self::NoToken { .. } | Self::UnknownToken { .. })
    }
}

impl From<Denied> for tonic::Status {
    fn from(denied: Denied) -> Self {
        let code = match denied.is_unauthenticated() {
            true => tonic::Code::Unauthenticated,
            false => tonic::Code::PermissionDenied,
        };
        Self::new(code, denied.to_string())
    }
}

/// Decides whether a caller may do what needs `needs`: whatever it shows, its certificate and its
/// token, must allow it.
pub fn authorize(caller: &Caller, needs: Permission) -> std::result::Result<(), Denied> {
    if let Some(identity) = caller.identity.as_ref().filter(|identity| !identity.role().may(needs)) {
        let has = identity.role().permission();
        return Err(Denied::Role { identity: identity.clone(), needs, has });
    }
    match caller.token {
        Token::NotRead => Err(Denied::TokenNotRead { needs }),
        Token::NotAsked => Ok(()),
        Token::Missing => Err(Denied::NoToken { needs }),
        Token::Unknown => Err(Denied::UnknownToken { needs }),
        Token::Grants(has) if has.implies(needs) => Ok(()),
        Token::Grants(has) => Err(Denied::Token { needs, has }),
    }
}

/// Refuses to listen without TLS where others reach the port, unless told to be `insecure`.
pub fn check_bind(addr: SocketAddr, has_tls: bool, insecure: bool) -> Result<()> {
    let ip: IpAddr = addr.ip().to_canonical();
    if ip.is_loopback() || has_tls || insecure { Ok(()) } else { Err(Error::Bind { addr }) }
}

#[cfg(test)]
mod tests {
    use super::Permission::{Admin, Read, Write};
    use super::*;
    use crate::security::Role;

    const ALL: [Permission; 3] = [Read, Write, Admin];

    fn caller(role: Option<Role>, token: Token) -> Caller {
        let identity = role.map(|role| Identity::new(role, "x").unwrap());
        Caller { peer: "127.0.0.1:1".parse().unwrap(), identity, token }
    }

    fn allowed(role: Option<Role>, token: Token) -> Vec<Permission> {
        ALL.into_iter().filter(|needs| authorize(&caller(role, token), *needs).is_ok()).collect()
    }

    #[test]
    fn without_certificate_and_tokens_everything_is_allowed() {
        assert_eq!(allowed(None, Token::NotAsked), ALL);
    }

    #[test]
    fn a_certificate_alone_decides_by_its_role() {
        for role in Role::ALL {
            let expected: Vec<_> = ALL.into_iter().filter(|needs| role.may(*needs)).collect();
            assert_eq!(allowed(Some(role), Token::NotAsked), expected, "{role}");
        }
    }

    #[test]
    fn a_token_alone_decides() {
        assert_eq!(allowed(None, Token::Grants(Read)), [Read]);
        assert_eq!(allowed(None, Token::Grants(Write)), [Read, Write]);
        assert_eq!(allowed(None, Token::Grants(Admin)), ALL);
        assert_eq!(allowed(None, Token::Missing), []);
        assert_eq!(allowed(None, Token::Unknown), []);
    }

    #[test]
    fn nothing_is_allowed_before_the_token_is_looked_for() {
        for role in [None, Some(Role::Admin)] {
            assert_eq!(allowed(role, Token::NotRead), []);
        }
        let connected = caller(None, Token::NotRead);
        assert_eq!(connected.clone().with_token(None, None), caller(None, Token::NotAsked));
        let mut request = tonic::Request::new(());
        assert_eq!(Caller::of_request(&request, None), None);
        request.extensions_mut().insert(connected);
        assert_eq!(Caller::of_request(&request, None), Some(caller(None, Token::NotAsked)));
    }

    #[test]
    fn with_both_both_must_allow() {
        assert_eq!(allowed(Some(Role::Admin), Token::Grants(Read)), [Read]);
        assert_eq!(allowed(Some(Role::Reader), Token::Grants(Admin)), [Read]);
        assert_eq!(allowed(Some(Role::Worker), Token::Grants(Admin)), [Read, Write]);
        assert_eq!(allowed(Some(Role::Admin), Token::Missing), []);
        assert_eq!(allowed(Some(Role::Admin), Token::Unknown), []);
        assert_eq!(allowed(Some(Role::Admin), Token::Grants(Admin)), ALL);
    }

    #[test]
    fn a_denial_says_what_is_needed_and_what_is_there() {
        let of = |role, token, needs| authorize(&caller(role, token), needs).unwrap_err();
        let table = [
            (
                of(Some(Role::Reader), Token::NotAsked, Write),
                "reader/x may not: write is needed, and its role may read",
                tonic::Code::PermissionDenied,
            ),
            (
                of(None, Token::Grants(Write), Admin),
                "admin is needed, and the bearer token gives write",
                tonic::Code::PermissionDenied,
            ),
            (
                of(None, Token::Missing, Read),
                "read is needed, and the request has no bearer token",
                tonic::Code::Unauthenticated,
            ),
            (
                of(None, Token::NotRead, Read),
                "read is needed, and the server has not looked for a bearer token",
                tonic::Code::Unauthenticated,
            ),
            (
                of(None, Token::Unknown, Read),
                "read is needed, and the bearer token is not known",
                tonic::Code::Unauthenticated,
            ),
        ];
        for (denied, message, code) in table {
            let status = tonic::Status::from(denied);
            assert_eq!((status.message(), status.code()), (message, code));
        }
    }

    #[test]
    fn binds_to_loopback_or_with_tls_or_when_told() {
        let loopback = ["127.0.0.1:7700", "127.9.9.9:0", "[::1]:7700", "[::ffff:127.0.0.1]:7700"];
        let open = ["0.0.0.0:7700", "[::]:7700", "10.1.2.3:7700", "[::ffff:10.1.2.3]:7700", "128.0.0.1:1"];
        for addr in loopback {
            check_bind(addr.parse().unwrap(), false, false).unwrap();
        }
        for addr in open {
            let message = check_bind(addr.parse().unwrap(), false, false).unwrap_err().to_string();
            assert!(message.starts_with(addr) && message.contains("--insecure"), "{message}");
            check_bind(addr.parse().unwrap(), true, false).unwrap();
            check_bind(addr.parse().unwrap(), false, true).unwrap();
        }
    }

    #[test]
    fn a_bearer_token_is_found_in_its_header_only() {
        assert_eq!(bearer(b"Bearer abc"), Some(&b"abc"[..]));
        assert_eq!(bearer(b"bearer  abc "), Some(&b"abc"[..]));
        for other in [&b"Basic abc"[..], b"Bearerabc", b"Bearer", b"", b"abc"] {
            assert_eq!(bearer(other), None);
        }
    }
}
