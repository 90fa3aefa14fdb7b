use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, ServerConfig, SignatureScheme,
};

use super::{Error, Identity, Result, Role, TlsFiles, tls};

/// What workers speak among themselves, as TLS names it.
const ALPN: &str = "anchorage-workers/1";

/// Both sides' configurations of connections between workers, made of one set of files.
///
/// A worker listens wherever its job is placed, so its certificate has no names of hosts. What counts on
/// either side is that an authority of the files vouches for the other one and that it is a worker.
pub struct WorkerTls {
    /// For the one who listens.
    pub server: Arc<ServerConfig>,
    /// For the one who connects; the server's name is not looked at.
    pub client: Arc<ClientConfig>,
}

impl WorkerTls {
    /// Reads the files. The error names the one that is missing, expired, of the wrong kind or role, or of
    /// another certificate.
    pub fn read(files: &TlsFiles) -> Result<Self> {
        let chain = tls::certificates(&files.cert, SystemTime::now())?;
        check_role(&chain[0]).map_err(Error::inside(&files.cert))?;
        Self::of(files, chain)
    }

    /// The same of a certificate of any role, which the other side will not accept.
    pub(super) fn of(files: &TlsFiles, chain: Vec<CertificateDer<'static>>) -> Result<Self> {
        let now = SystemTime::now();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let own = tls::own(files, chain, &provider)?;
        let roots = Arc::new(tls::roots(&files.ca, now)?);
        let what = "TLS between workers";
        let chains = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| Error::Tls { what, reason: e.to_string() })?;
        let verifier = Arc::new(OfWorkers(chains));
        let mut server = tls::server(own.clone(), verifier.clone(), provider.clone())?;
        let mut client = tls::client(own, roots, provider)?;
        client.dangerous().set_certificate_verifier(verifier);
        server.alpn_protocols = vec![ALPN.into()];
        client.alpn_protocols = vec![ALPN.into()];
        Ok(Self { server: Arc::new(server), client: Arc::new(client) })
    }
}

fn check_role(certificate: &[u8]) -> Result<()> {
    match Identity::of_certificate(certificate)? {
        found if found.role() == Role::Worker => Ok(()),
        found => Err(Error::NotAWorker { found }),
    }
}

/// Lets workers pass, whichever side they are on. That chains lead to an authority, and that the other one
/// has the key, is left to the verifier inside.
#[derive(Debug)]
struct OfWorkers(Arc<dyn ClientCertVerifier>);

type Verified<T> = std::result::Result<T, rustls::Error>;

impl ClientCertVerifier for OfWorkers {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Verified<ClientCertVerified> {
        let verified = self.0.verify_client_cert(own, between, now)?;
        check_role(own).map_err(|error| rustls::Error::Other(OtherError(Arc::new(error))))?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        self.0.verify_tls12_signature(message, own, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        self.0.verify_tls13_signature(message, own, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

impl ServerCertVerifier for OfWorkers {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Verified<ServerCertVerified> {
        self.verify_client_cert(own, between, now).map(|_| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        self.0.verify_tls12_signature(message, own, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        self.0.verify_tls13_signature(message, own, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
