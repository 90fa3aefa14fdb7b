use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, ServerConfig};
use x509_parser::time::ASN1Time;

use super::{Error, Identity, Reloading, ReloadingTls, Result, identity};

/// Where one side's certificates are, all in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The own certificate, and those between it and the authority if there are any.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities whose certificates are accepted from the other side.
    pub ca: PathBuf,
}

/// What a connection speaks once it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2, for gRPC.
    Grpc,
    /// The bulk stream.
    Bulk,
}

impl Protocol {
    /// Its name in TLS (ALPN, RFC 7301).
    pub fn alpn(self) -> &'static str {
        match self {
            Self::Grpc => "h2",
            Self::Bulk => "anchorage-bulk/1",
        }
    }
}

/// Both sides' configurations, made of one set of files: TLS 1.2 and 1.3, both sides verified.
///
/// Sessions are not resumed: that would let a client in by a certificate that was verified before the
/// files changed, or before it expired.
pub struct Tls {
    identity: Identity,
    grpc: Configs,
    bulk: Configs,
}

struct Configs {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Tls {
    /// Reads the files. The error names the one that is missing, expired, of the wrong kind, or of
    /// another certificate.
    pub fn read(files: &TlsFiles) -> Result<Self> {
        Self::read_at(files, SystemTime::now())
    }

    /// The same, read again whenever a file changes.
    pub fn reloading(files: TlsFiles) -> Result<ReloadingTls> {
        let paths = vec![files.cert.clone(), files.key.clone(), files.ca.clone()];
        Reloading::new(paths, move || Self::read(&files))
    }

    /// The same, at the time `now`.
    pub(super) fn read_at(files: &TlsFiles, now: SystemTime) -> Result<Self> {
        let chain = certificates(&files.cert, now)?;
        let identity = Identity::of_certificate(&chain[0]).map_err(Error::inside(&files.cert))?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let own = own(files, chain, &provider)?;
        let roots = Arc::new(roots(&files.ca, now)?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| Error::Tls { what: SERVER, reason: e.to_string() })?;
        let server = server(own.clone(), verifier, provider.clone())?;
        let client = client(own, roots, provider)?;
        let of = |protocol: Protocol| {
            let (mut server, mut client) = (server.clone(), client.clone());
            server.alpn_protocols = vec![protocol.alpn().into()];
            client.alpn_protocols = vec![protocol.alpn().into()];
            Configs { server: Arc::new(server), client: Arc::new(client) }
        };
        Ok(Self { identity, grpc: of(Protocol::Grpc), bulk: of(Protocol::Bulk) })
    }

    /// Whose certificate it is. Clients accept a server only if it is a shard.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// For the side that listens: clients must show a certificate of the authorities.
    pub fn server(&self, protocol: Protocol) -> Arc<ServerConfig> {
        self.configs(protocol).server.clone()
    }

    /// For the side that connects: the server must show a certificate of the authorities for its host.
    pub fn client(&self, protocol: Protocol) -> Arc<ClientConfig> {
        self.configs(protocol).client.clone()
    }

    fn configs(&self, protocol: Protocol) -> &Configs {
        match protocol {
            Protocol::Grpc => &self.grpc,
            Protocol::Bulk => &self.bulk,
        }
    }
}

const SERVER: &str = "TLS of the server";

pub(super) fn server(
    own: Arc<CertifiedKey>,
    verifier: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
) -> Result<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(Error::tls(SERVER))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(own)));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

pub(super) fn client(
    own: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
) -> Result<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(Error::tls("TLS of the client"))?
        .with_root_certificates(roots)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own)));
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The own certificate with its key.
pub(super) fn own(
    files: &TlsFiles,
    chain: Vec<CertificateDer<'static>>,
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>> {
    let text = fs::read(&files.key).map_err(Error::io(&files.key))?;
    let key = PrivateKeyDer::from_pem_slice(&text)
        .map_err(|source| Error::Pem { expected: "private key", source })
        .map_err(Error::inside(&files.key))?;
    let own = CertifiedKey::from_der(chain, key, provider).map_err(|e| match e {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            Error::KeyMismatch { cert: files.cert.clone(), key: files.key.clone() }
        }
        other => Error::inside(&files.key)(Error::Key { reason: other.to_string() }),
    })?;
    Ok(Arc::new(own))
}

/// The authorities of a file. That none has expired is checked here: a verifier of TLS does not.
pub(super) fn roots(path: &Path, now: SystemTime) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, now)? {
        let is_ca = identity::parse(&certificate).map(|parsed| parsed.is_ca());
        if !is_ca.map_err(Error::inside(path))? {
            return Err(Error::inside(path)(Error::NotAnAuthority));
        }
        roots.add(certificate).map_err(|e| Error::inside(path)(Error::malformed(e)))?;
    }
    Ok(roots)
}

/// The certificates of a file, one at least, all valid now.
pub(super) fn certificates(path: &Path, now: SystemTime) -> Result<Vec<CertificateDer<'static>>> {
    let text = fs::read(path).map_err(Error::io(path))?;
    let pem = |source| Error::Pem { expected: "certificate", source };
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(pem).map_err(Error::inside(path))?;
    if found.is_empty() {
        return Err(Error::inside(path)(pem(rustls::pki_types::pem::Error::NoItemsFound)));
    }
    for certificate in &found {
        check_validity(certificate, now).map_err(Error::inside(path))?;
    }
    Ok(found)
}

fn check_validity(der: &[u8], now: SystemTime) -> Result<()> {
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).map_err(Error::malformed)?.as_secs();
    let now = ASN1Time::from_timestamp(seconds as i64).map_err(Error::malformed)?;
    let certificate = identity::parse(der)?;
    let validity = certificate.validity();
    if validity.is_valid_at(now) {
        return Ok(());
    }
    let [from, to, now] = [validity.not_before, validity.not_after, now].map(|time| time.to_string());
    Err(Error::Validity { from, to, now })
}
