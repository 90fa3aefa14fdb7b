use std::fmt;
use std::str::FromStr;

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Error, Result, names};

/// What a call needs. Each permission implies those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Permission {
    /// Fetch blocks, ask where the bank stands.
    Read,
    /// Push gradients, save, commit, and go back to a checkpoint.
    Write,
    /// Everything.
    Admin,
}

impl Permission {
    /// Whether who has this has `other` too.
    pub fn implies(self, other: Permission) -> bool {
        self >= other
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Admin => "admin",
        })
    }
}

/// What the holder of a certificate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// A rank that trains: reads and writes. It may go back to a checkpoint, as it must when another fails; one that
    /// pushes wrong gradients could spoil a bank anyway.
    Worker,
    /// A server of blocks: reads from others. Only a shard's certificate makes a server.
    Shard,
    /// Who generates or looks: reads.
    Reader,
    /// Who runs the bank: everything.
    Admin,
}

impl Role {
    /// All roles.
    pub const ALL: [Role; 4] = [Role::Worker, Role::Shard, Role::Reader, Role::Admin];

    /// The most that the role may do.
    pub fn permission(self) -> Permission {
        match self {
            Self::Reader | Self::Shard => Permission::Read,
            Self::Worker => Permission::Write,
            Self::Admin => Permission::Admin,
        }
    }

    /// Whether the role may do what needs `permission`.
    pub fn may(self, permission: Permission) -> bool {
        self.permission().implies(permission)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Worker => "worker",
            Self::Shard => "shard",
            Self::Reader => "reader",
            Self::Admin => "admin",
        })
    }
}

impl FromStr for Role {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let named = Self::ALL.into_iter().find(|role| role.to_string() == text);
        named.ok_or_else(|| Error::Role { found: text.chars().take(80).collect() })
    }
}

/// Where the SPIFFE id of a certificate begins; `ROLE/NAME` follows.
const PREFIX: &str = "spiffe://anchorage/role/";

/// Whose certificate it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    role: Role,
    name: String,
}

impl Identity {
    /// An identity with a name by the rule of [`super::BankName`].
    pub fn new(role: Role, name: &str) -> Result<Self> {
        names::check("name in the certificate", name)?;
        Ok(Self { role, name: name.to_owned() })
    }

    /// What the holder is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The holder's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The SPIFFE id that stands in the certificate, among its alternative names.
    pub fn uri(&self) -> String {
        format!("{PREFIX}{}/{}", self.role, self.name)
    }

    /// Reads the identity in a certificate (DER), which must have been verified. As the standard of
    /// SPIFFE (X509-SVID, section 2) asks, a certificate with no URI or with two is refused.
    pub fn of_certificate(der: &[u8]) -> Result<Self> {
        let certificate = parse(der)?;
        let names = certificate.subject_alternative_name().map_err(Error::malformed)?;
        let names = names.map_or(&[][..], |extension| &extension.value.general_names);
        let uris: Vec<&str> = names
            .iter()
            .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
            .collect();
        let [uri] = uris[..] else { return Err(Error::UriCount { found: uris.len() }) };
        let Some((role, name)) = uri.strip_prefix(PREFIX).and_then(|rest| rest.split_once('/')) else {
            return Err(Error::Uri { found: uri.chars().take(200).collect() });
        };
        Self::new(role.parse()?, name)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.role, self.name)
    }
}

/// A certificate as its parts.
pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>> {
    Ok(X509Certificate::from_der(der).map_err(Error::malformed)?.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_has_its_permissions_and_no_other() {
        use Permission::{Admin, Read, Write};
        let table = [
            (Role::Reader, vec![Read]),
            (Role::Shard, vec![Read]),
            (Role::Worker, vec![Read, Write]),
            (Role::Admin, vec![Read, Write, Admin]),
        ];
        assert_eq!(table.len(), Role::ALL.len());
        for (role, expected) in table {
            let found: Vec<_> = [Read, Write, Admin].into_iter().filter(|p| role.may(*p)).collect();
            assert_eq!(found, expected, "{role}");
            assert_eq!(role.to_string().parse::<Role>().unwrap(), role);
        }
    }

    #[test]
    fn a_role_that_is_none_is_named() {
        let message = "root".parse::<Role>().unwrap_err().to_string();
        assert_eq!(message, r#"role is "root", expected worker, shard, reader or admin"#);
        assert!("Admin".parse::<Role>().is_err() && "".parse::<Role>().is_err());
    }

    #[test]
    fn an_identity_is_one_line_and_a_uri() {
        let identity = Identity::new(Role::Worker, "w-0").unwrap();
        assert_eq!(identity.to_string(), "worker/w-0");
        assert_eq!(identity.uri(), "spiffe://anchorage/role/worker/w-0");
        assert!(Identity::new(Role::Worker, "a/b").is_err() && Identity::new(Role::Worker, "").is_err());
    }
}
