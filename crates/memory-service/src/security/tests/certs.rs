//! The development authority and its files.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use x509_parser::pem::parse_x509_pem;

use super::*;
use crate::security::certs::{MAX_DAYS, issue_at};
use crate::security::identity::parse;

const DAY: u64 = 24 * 3600;

fn der(path: &Path) -> Vec<u8> {
    parse_x509_pem(&fs::read(path).unwrap()).unwrap().1.contents
}

fn refused<T>(result: Result<T>) -> String {
    let message = result.err().expect("must be refused").to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn keys_are_for_their_owner_and_no_other_file_is_left() {
    let dir = authority();
    files(dir.path(), Role::Shard, "s0");
    let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("ca.key"), mode("s0.key")), (0o600, 0o600));
    // The umask may take from the others, but not from the owner.
    assert_eq!((mode("ca.pem") & 0o600, mode("s0.pem") & 0o600), (0o600, 0o600));
    let mut found: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, [".lock", "ca.key", "ca.pem", "s0.key", "s0.pem"]);
}

#[test]
fn a_key_is_not_written_into_a_file_that_someone_left_open_to_others() {
    let dir = authority();
    let left = dir.path().join("s0.key.tmp");
    fs::write(&left, "").unwrap();
    fs::set_permissions(&left, fs::Permissions::from_mode(0o666)).unwrap();
    let mut opened = fs::File::open(&left).unwrap();
    let files = files(dir.path(), Role::Shard, "s0");
    assert_eq!(fs::metadata(&files.key).unwrap().permissions().mode() & 0o777, 0o600);
    let mut seen = String::new();
    std::io::Read::read_to_string(&mut opened, &mut seen).unwrap();
    assert_eq!(seen, "");
}

#[test]
fn no_file_is_overwritten() {
    let dir = authority();
    let files = files(dir.path(), Role::Worker, "w0");
    let before = |name: &Path| fs::read(name).unwrap();
    let (ca, cert, key) = (before(&files.ca), before(&files.cert), before(&files.key));
    let message = refused(make_ca(dir.path()));
    assert_eq!(message, format!("{}: is already there, and is not overwritten", files.ca.display()));
    let again = to_issue(Role::Worker, "w0");
    let message = refused(issue(dir.path(), &again));
    assert_eq!(message, format!("{}: is already there, and is not overwritten", files.cert.display()));
    assert_eq!((before(&files.ca), before(&files.cert), before(&files.key)), (ca, cert, key.clone()));

    // One of the two is enough, and then the other is not made.
    fs::remove_file(&files.cert).unwrap();
    assert!(refused(issue(dir.path(), &again)).starts_with(files.key.to_str().unwrap()));
    assert!(!files.cert.exists() && before(&files.key) == key);
    // The authority's own name is taken.
    assert!(refused(issue(dir.path(), &to_issue(Role::Worker, "ca"))).contains("is already there"));

    let held = atomic_file::lock(dir.path()).unwrap();
    let message = refused(issue(dir.path(), &to_issue(Role::Worker, "w1")));
    assert_eq!(message, format!("{}: another process makes certificates here", dir.path().display()));
    drop(held);
    issue(dir.path(), &to_issue(Role::Worker, "w1")).unwrap();
}

#[test]
fn a_certificate_is_for_what_its_role_does_and_for_its_time() {
    let dir = authority();
    let now = SystemTime::now();
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64;
    for role in Role::ALL {
        let files = issue_at(dir.path(), &to_issue(role, &role.to_string()), now).unwrap();
        let der = der(&files.cert);
        let certificate = parse(&der).unwrap();
        let eku = certificate.extended_key_usage().unwrap().unwrap().value.clone();
        assert!(eku.client_auth && eku.server_auth == (role == Role::Shard), "{role}");
        let usage = certificate.key_usage().unwrap().unwrap().value;
        assert!(usage.digital_signature() && !usage.key_cert_sign());
        assert!(!certificate.is_ca());
        assert_eq!(certificate.validity().not_before.timestamp(), seconds - 300);
        assert_eq!(certificate.validity().not_after.timestamp(), seconds + 7 * DAY as i64);
        assert_eq!(certificate.subject().to_string(), format!("CN={role}"));
        let sans = certificate.subject_alternative_name().unwrap().unwrap().value;
        assert_eq!(sans.general_names.len(), 4, "{sans:?}");
    }
    let der = der(&dir.path().join("ca.pem"));
    let ca = parse(&der).unwrap();
    let usage = ca.key_usage().unwrap().unwrap().value;
    assert!(ca.is_ca() && usage.key_cert_sign() && !usage.digital_signature());
    let years = ca.validity().not_after.timestamp() - seconds;
    assert!((3649 * DAY as i64..=3650 * DAY as i64).contains(&years));
}

#[test]
fn serial_numbers_are_random_and_of_one_length() {
    let dir = authority();
    let mut serials = HashSet::new();
    for i in 0..8 {
        let der = der(&files(dir.path(), Role::Worker, &format!("w{i}")).cert);
        let serial = parse(&der).unwrap().raw_serial().to_vec();
        assert!(serial.len() == 16 && serial[0] & 0xc0 == 0x40, "{serial:?}");
        serials.insert(serial);
    }
    assert_eq!(serials.len(), 8);
}

#[test]
fn what_cannot_be_issued_is_said() {
    let dir = authority();
    let good = to_issue(Role::Shard, "s0");
    let refuse = |issue: Issue| refused(crate::security::certs::issue(dir.path(), &issue));
    let with_host = |host: &str| refuse(Issue { hosts: vec![host.to_owned()], ..good.clone() });
    assert!(refuse(Issue { hosts: vec![], ..good.clone() }).starts_with("shard/s0 has no hosts, expected"));
    for host in ["", "a b", "a/b", "-", "*", "*.", "ä.example", "host:7700", "a\n"] {
        let expected = format!("host is {host:?}, expected a DNS name or an IP address");
        assert_eq!(with_host(host), expected);
    }
    for days in [0, MAX_DAYS + 1, u32::MAX] {
        let message = refuse(Issue { days, ..good.clone() });
        assert_eq!(message, format!("days is {days}, expected 1 to 825"));
    }
    for name in ["", "A", "../x", "a/b", "."] {
        let message = refuse(Issue { name: name.to_owned(), ..good.clone() });
        assert!(message.starts_with(&format!("name in the certificate is {name:?}, expected")), "{message}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing is written");
    let hosts = ["*.bank.default.svc", "node-1", "10.0.0.1", "fd00::1"].map(str::to_owned).to_vec();
    issue(dir.path(), &Issue { hosts, ..good }).unwrap();
    issue(dir.path(), &Issue { hosts: vec![], ..to_issue(Role::Reader, "r0") }).unwrap();
}

#[test]
fn an_authority_signs_only_with_its_key_and_in_its_time() {
    let (dir, other) = (authority(), authority());
    let good = to_issue(Role::Worker, "w0");
    let after = |days: u64| SystemTime::now() + Duration::from_secs(days * DAY);
    // A certificate does not outlive its authority.
    assert_eq!(refused(issue_at(dir.path(), &good, after(3645))), "days is 7, expected 1 to 4");
    assert!(
        refused(issue_at(dir.path(), &good, after(3651))).contains("ca.pem: the certificate is valid from")
    );

    fs::copy(other.path().join("ca.key"), dir.path().join("ca.key")).unwrap();
    assert!(refused(issue(dir.path(), &good)).contains("ca.key is not the key of"));
    fs::write(dir.path().join("ca.key"), "none").unwrap();
    assert!(refused(issue(dir.path(), &good)).contains("ca.key: not a private key that can be used"));
    let empty = tempfile::tempdir().unwrap();
    assert!(refused(issue(empty.path(), &good)).contains("ca.pem: No such file"));
}
