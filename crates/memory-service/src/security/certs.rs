//! A certificate authority for development, and the certificates it signs. Its key lies in a file
//! beside them: whoever can read the folder can make certificates of every role.

use std::fs::{self, OpenOptions};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::DnsName;

use super::{Error, Identity, Result, Role, TlsFiles, identity, tls};

/// The longest that a certificate can be valid.
pub const MAX_DAYS: u32 = 825;

/// Days that an authority is valid.
const CA_DAYS: u32 = 3650;

/// A certificate is valid a little before it is made, for hosts whose clocks are behind.
const BACKDATED: Duration = Duration::from_secs(300);

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A certificate to be made.
#[derive(Debug, Clone)]
pub struct Issue {
    /// What its holder will be.
    pub role: Role,
    /// The holder's name, which its files have too.
    pub name: String,
    /// DNS names (`*.` may stand for one more label) and IP addresses that a shard is reached by, one
    /// at least. The other roles need none.
    pub hosts: Vec<String>,
    /// Days that it will be valid, [`MAX_DAYS`] at most.
    pub days: u32,
}

/// Makes an authority in a folder: `ca.pem`, and `ca.key` for its owner's eyes. It is valid for ten
/// years. No file is overwritten.
pub fn make_ca(dir: &Path) -> Result<()> {
    make_ca_at(dir, SystemTime::now())
}

/// Makes a certificate by the authority of a folder, `NAME.pem` and `NAME.key`, and says where the
/// files are. A shard can serve with it, and connect; the others can only connect. No file is
/// overwritten.
pub fn issue(dir: &Path, issue: &Issue) -> Result<TlsFiles> {
    issue_at(dir, issue, SystemTime::now())
}

pub(super) fn make_ca_at(dir: &Path, now: SystemTime) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let files = CaFiles::of(dir);
    let mut id = [0; 4];
    random(&mut id)?;
    // Two authorities are told apart by their names.
    let mut params = params(&format!("Anchorage development CA {:08x}", u32::from_be_bytes(id)))?;
    valid(&mut params, now, CA_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(rcgen_failed)?;
    let certificate = params.self_signed(&key).map_err(rcgen_failed)?;
    write_pair(dir, [(&files.cert, certificate.pem()), (&files.key, key.serialize_pem())])
}

pub(super) fn issue_at(dir: &Path, issue: &Issue, now: SystemTime) -> Result<TlsFiles> {
    let identity = Identity::new(issue.role, &issue.name)?;
    if issue.role == Role::Shard && issue.hosts.is_empty() {
        return Err(Error::NoHosts { identity });
    }
    let authority = Authority::read(dir, now)?;
    let limit = MAX_DAYS.min(authority.days_left);
    if !(1..=limit).contains(&issue.days) {
        return Err(Error::Days { found: issue.days, limit });
    }
    let mut params = params(&issue.name)?;
    valid(&mut params, now, issue.days);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = match issue.role {
        Role::Shard => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        Role::Worker | Role::Reader | Role::Admin => vec![ExtendedKeyUsagePurpose::ClientAuth],
    };
    let uri = identity.uri().try_into().map_err(rcgen_failed)?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    for host in &issue.hosts {
        params.subject_alt_names.push(alt_name(host)?);
    }
    let (cert, key) = authority.sign(params)?;
    let path = |extension: &str| dir.join(format!("{}.{extension}", issue.name));
    let files = TlsFiles { cert: path("pem"), key: path("key"), ca: authority.files.cert };
    write_pair(dir, [(&files.cert, cert), (&files.key, key)])?;
    Ok(files)
}

struct CaFiles {
    cert: PathBuf,
    key: PathBuf,
}

impl CaFiles {
    fn of(dir: &Path) -> Self {
        Self { cert: dir.join("ca.pem"), key: dir.join("ca.key") }
    }
}

/// Who signs.
pub(super) struct Authority {
    files: CaFiles,
    issuer: Issuer<'static, KeyPair>,
    days_left: u32,
}

impl Authority {
    pub(super) fn read(dir: &Path, now: SystemTime) -> Result<Self> {
        let files = CaFiles::of(dir);
        let der = tls::certificates(&files.cert, now)?.swap_remove(0);
        let certificate = identity::parse(&der).map_err(Error::inside(&files.cert))?;
        let text = fs::read_to_string(&files.key).map_err(Error::io(&files.key))?;
        let key = KeyPair::from_pem(&text)
            .map_err(|e| Error::inside(&files.key)(Error::Key { reason: e.to_string() }))?;
        if certificate.public_key().raw != key.subject_public_key_info() {
            return Err(Error::KeyMismatch { cert: files.cert, key: files.key });
        }
        let end = Duration::from_secs(certificate.validity().not_after.timestamp().max(0) as u64);
        let left = end.saturating_sub(since_epoch(now));
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(rcgen_failed)?;
        Ok(Self { files, issuer, days_left: (left.as_secs() / DAY.as_secs()) as u32 })
    }

    /// A new certificate and its key, in PEM.
    pub(super) fn sign(&self, params: CertificateParams) -> Result<(String, String)> {
        let key = KeyPair::generate().map_err(rcgen_failed)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(rcgen_failed)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

/// What all certificates have.
pub(super) fn params(common_name: &str) -> Result<CertificateParams> {
    let mut serial = [0; 16];
    random(&mut serial)?;
    // Positive, and of one length (RFC 5280, section 4.1.2.2).
    serial[0] = serial[0] & 0x3f | 0x40;
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// Bounds a certificate's time.
pub(super) fn valid(params: &mut CertificateParams, now: SystemTime, days: u32) {
    let now = rcgen::date_time_ymd(1970, 1, 1) + since_epoch(now);
    params.not_before = now - BACKDATED;
    params.not_after = now + DAY * days;
}

fn alt_name(host: &str) -> Result<SanType> {
    let wrong = || Error::Host { found: host.chars().take(300).collect() };
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(ip));
    }
    DnsName::try_from(host.strip_prefix("*.").unwrap_or(host)).map_err(|_| wrong())?;
    Ok(SanType::DnsName(host.try_into().map_err(|_| wrong())?))
}

/// Writes a certificate and then its key, both or, when a file is there already, none.
fn write_pair(dir: &Path, [cert, key]: [(&PathBuf, String); 2]) -> Result<()> {
    let held = atomic_file::lock(dir).map_err(Error::io(dir))?;
    let _held = held.ok_or_else(|| Error::Busy { path: dir.to_owned() })?;
    for path in [cert.0, key.0] {
        if fs::symlink_metadata(path).is_ok() {
            return Err(Error::Exists { path: path.clone() });
        }
    }
    write(cert.0, &cert.1, 0o644).map_err(Error::io(cert.0))?;
    write(key.0, &key.1, 0o600).map_err(Error::io(key.0))
}

/// Writes a file of a mode. The temporary file has it before it has content, so nobody else can have
/// opened it; `atomic_file` writes into the one that is there.
fn write(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let temporary = atomic_file::temporary(path);
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
    #[cfg(not(unix))]
    let _ = mode;
    options.open(&temporary)?;
    atomic_file::write(path, text.as_bytes())
}

fn since_epoch(now: SystemTime) -> Duration {
    now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn random(bytes: &mut [u8]) -> Result<()> {
    let provider = aws_lc_rs::default_provider();
    provider
        .secure_random
        .fill(bytes)
        .map_err(|_| Error::Tls { what: "random numbers", reason: "the system gives none".to_owned() })
}

fn rcgen_failed(e: rcgen::Error) -> Error {
    Error::Tls { what: "certificate", reason: e.to_string() }
}
