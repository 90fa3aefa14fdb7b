//! What is said of files that are not as they should be, and tokens that are.

use std::fs;

use super::*;
use crate::security::{Caller, MIN_TOKEN_LEN, Permission, Token, Tokens};

/// Writes a file that only its owner can read.
pub(super) fn write_private(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn refused(files: &TlsFiles) -> String {
    let message = Tls::read(files).err().expect("must be refused").to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn a_file_of_tls_that_is_not_as_it_should_be_is_named() {
    let dir = authority();
    let good = files(dir.path(), Role::Worker, "w0");
    let other = files(dir.path(), Role::Worker, "w1");
    assert_eq!(Tls::read(&good).unwrap().identity().to_string(), "worker/w0");
    let garbage = dir.path().join("garbage");
    fs::write(&garbage, "-----BEGIN CERTIFICATE-----\nMTIz\n-----END CERTIFICATE-----\n").unwrap();
    let cut = dir.path().join("cut");
    fs::write(&cut, &fs::read(&good.cert).unwrap()[..100]).unwrap();
    let missing = dir.path().join("missing");

    let with_cert = |cert: &PathBuf| refused(&TlsFiles { cert: cert.clone(), ..good.clone() });
    let with_key = |key: &PathBuf| refused(&TlsFiles { key: key.clone(), ..good.clone() });
    let with_ca = |ca: &PathBuf| refused(&TlsFiles { ca: ca.clone(), ..good.clone() });
    for (message, file, expected) in [
        (with_cert(&missing), &missing, "No such file"),
        (with_key(&missing), &missing, "No such file"),
        (with_ca(&missing), &missing, "No such file"),
        (with_cert(&good.key), &good.key, "expected a certificate in PEM: no items found"),
        (with_key(&good.cert), &good.cert, "expected a private key in PEM: no items found"),
        (with_ca(&good.key), &good.key, "expected a certificate in PEM: no items found"),
        (with_cert(&garbage), &garbage, "not a certificate: "),
        (with_ca(&garbage), &garbage, "not a certificate: "),
        (with_cert(&cut), &cut, "expected a certificate in PEM: missing section end"),
        (with_cert(&good.ca), &good.ca, "the certificate has 0 URIs, expected one"),
        (with_ca(&other.cert), &other.cert, "the certificate is not one of an authority"),
    ] {
        assert!(message.starts_with(&format!("{}: {expected}", file.display())), "{message}");
    }
    let expected = format!("{} is not the key of {}", other.key.display(), good.cert.display());
    assert_eq!(with_key(&other.key), expected);
}

#[test]
fn an_authority_that_has_expired_is_refused() {
    let dir = authority();
    let good = files(dir.path(), Role::Worker, "w0");
    let later = SystemTime::now() + Duration::from_secs(3651 * 24 * 3600);
    let message = crate::security::tls::certificates(&good.ca, later).unwrap_err().to_string();
    let expected = format!("{}: the certificate is valid from ", good.ca.display());
    assert!(message.starts_with(&expected), "{message}");
}

fn tokens(text: &str) -> Result<Tokens> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.toml");
    write_private(&path, text);
    Tokens::read(&path)
}

const R: &str = "reader-0123456789";
const W: &str = "writer-0123456789";
const A: &str = "administrator-0123456789";

#[test]
fn a_token_gives_its_permission_and_what_that_implies() {
    let text = format!("read = ['{R}', 'another-0123456789']\nwrite = ['{W}']\nadmin = ['{A}']");
    let tokens = tokens(&text).unwrap();
    assert_eq!(tokens.permission_of(R.as_bytes()), Some(Permission::Read));
    assert_eq!(tokens.permission_of(b"another-0123456789"), Some(Permission::Read));
    assert_eq!(tokens.permission_of(W.as_bytes()), Some(Permission::Write));
    assert_eq!(tokens.permission_of(A.as_bytes()), Some(Permission::Admin));
    for wrong in ["", "reader-012345678", "reader-0123456789 ", "Reader-0123456789", "0"] {
        assert_eq!(tokens.permission_of(wrong.as_bytes()), None, "{wrong:?}");
    }
    assert_eq!(tokens.permission_of(b"\xff\xfe"), None);

    let caller = Caller { peer: "127.0.0.1:1".parse().unwrap(), identity: None, token: Token::NotAsked };
    let with =
        |header: Option<&str>| caller.clone().with_token(Some(&tokens), header.map(str::as_bytes)).token;
    assert_eq!(with(Some(&format!("Bearer {W}"))), Token::Grants(Permission::Write));
    assert_eq!(with(Some(&format!("Basic {W}"))), Token::Unknown);
    assert_eq!(with(Some("Bearer wrong")), Token::Unknown);
    assert_eq!(with(None), Token::Missing);
    assert_eq!(caller.with_token(None, Some(b"Bearer x")).token, Token::NotAsked);
}

#[test]
fn the_comparison_in_constant_time_finds_what_a_plain_one_does() {
    let all: Vec<(String, Permission)> = (0..60)
        .map(|i| {
            let permission = [Permission::Read, Permission::Write, Permission::Admin][i % 3];
            (format!("token-{i:02}-{}", "x".repeat(MIN_TOKEN_LEN + i)), permission)
        })
        .collect();
    let of = |wanted: Permission| {
        let list: Vec<_> =
            all.iter().filter(|(_, p)| *p == wanted).map(|(token, _)| format!("{token:?}")).collect();
        list.join(",")
    };
    let [read, write, admin] = [Permission::Read, Permission::Write, Permission::Admin].map(of);
    let tokens = tokens(&format!("read = [{read}]\nwrite = [{write}]\nadmin = [{admin}]")).unwrap();
    let plain = |token: &str| all.iter().find(|(known, _)| known == token).map(|(_, p)| *p);
    for (token, permission) in &all {
        assert_eq!(plain(token), Some(*permission));
        let mut first = token.clone();
        first.replace_range(0..1, "u");
        for candidate in [token.clone(), first, format!("{token}x"), token[..token.len() - 1].to_owned()] {
            assert_eq!(tokens.permission_of(candidate.as_bytes()), plain(&candidate), "{candidate}");
        }
    }
}

#[test]
fn a_file_of_tokens_that_is_not_one_is_named_and_shows_no_token() {
    let secret = "secret-0123456789";
    let cases = [
        (format!("reed = ['{secret}']"), r#"unknown key "reed", expected read, write or admin"#),
        ("read = ['0123456789abcde']".to_owned(), "token 1 of read has 15 characters, expected 16 at least"),
        (format!("read = ['{secret}', 'blank {secret}']"), "token 2 of read has 23 characters, expected 16"),
        ("write = ['ääääääääääääääääää']".to_owned(), "token 1 of write has 18 characters, expected 16"),
        (format!("read = ['{secret}', '{secret}']"), "token 2 of read is token 1 of read again"),
        (
            format!("read = ['{R}', '{secret}']\nadmin = ['{secret}']"),
            "token 1 of admin is token 2 of read again",
        ),
        (format!("read = '{secret}'"), "read has a value of type string, expected a list of strings"),
        (format!("read = ['{secret}', 16]"), "read has a value of type integer, expected a list of strings"),
        (format!("read = ['{R}']\nwrite = ['{secret}"), "line 2: not TOML"),
        (format!("read = ['{R}']\n\nread = ['{secret}']"), "line 3: not TOML"),
        (String::new(), "lists no token"),
        ("read = []".to_owned(), "lists no token"),
    ];
    for (text, expected) in cases {
        let message = tokens(&text).err().expect("must be refused").to_string();
        assert!(message.contains(&format!("tokens.toml: {expected}")), "{message}");
        assert!(!message.contains(secret) && !message.contains(R) && !message.contains('\n'), "{message}");
    }
    let missing = Tokens::read(Path::new("/nowhere/tokens.toml")).err().unwrap().to_string();
    assert!(missing.starts_with("/nowhere/tokens.toml: No such file"), "{missing}");
}

#[test]
fn a_file_of_tokens_that_others_can_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.toml");
    write_private(&path, &format!("read = ['{R}']"));
    for mode in [0o604, 0o644, 0o620, 0o601] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let message = Tokens::read(&path).err().unwrap().to_string();
        let expected = format!("tokens.toml: others may read it (mode {mode:04o}), expected 0600 or 0400");
        assert!(message.contains(&expected), "{message}");
    }
    for mode in [0o600, 0o400] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        Tokens::read(&path).unwrap();
    }
    // By the group: what root hands out, and nothing else.
    let (root, user) = (0, 1000);
    for (mode, owner, expected) in [
        (0o440, root, true),
        (0o640, root, true),
        (0o440, user, false),
        (0o660, root, false),
        (0o444, root, false),
    ] {
        assert_eq!(super::super::tokens::is_private(mode, owner), expected, "{mode:o} {owner}");
    }
}
