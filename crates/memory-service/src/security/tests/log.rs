//! What is logged, and that it is one line each.

use std::fmt::{Debug, Write};
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::security::{Caller, Identity, Permission, Role, Token, audit};

/// Keeps events as lines: level, target and fields.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Subscriber for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        if metadata.module_path().is_some_and(|path| path.starts_with("memory_service")) {
            let mut line = Line(format!("{} {}", metadata.level(), metadata.target()));
            event.record(&mut line);
            self.0.lock().unwrap().push(line.0);
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Line(String);

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        write!(self.0, " {}={value}", field.name()).unwrap();
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        write!(self.0, " {}={value:?}", field.name()).unwrap();
    }
}

/// The events of this crate while `work` runs, on this thread.
pub(super) fn lines(work: impl FnOnce()) -> Vec<String> {
    let lines = Lines::default();
    tracing::subscriber::with_default(lines.clone(), work);
    let lines = lines.0.lock().unwrap();
    lines.clone()
}

#[test]
fn an_audit_is_one_line_that_says_who_did_what_and_how_it_ended() {
    let identity = Some(Identity::new(Role::Admin, "alice").unwrap());
    let mut caller = Caller { peer: "[::1]:9".parse().unwrap(), identity, token: Token::NotAsked };
    let found = lines(|| audit(&caller, "save", "facts", "ok"));
    let expected =
        "INFO audit call=save bank=facts identity=admin/alice token=not asked peer=[::1]:9 outcome=ok";
    assert_eq!(found, [expected]);

    caller.identity = None;
    for (token, text) in [
        (Token::Missing, "missing"),
        (Token::Unknown, "unknown"),
        (Token::Grants(Permission::Write), "write"),
    ] {
        caller.token = token;
        let found = lines(|| audit(&caller, "restore", "facts", "denied"));
        let expected = format!(
            "INFO audit call=restore bank=facts identity=none token={text} peer=[::1]:9 outcome=denied"
        );
        assert_eq!(found, [expected]);
    }
}

#[test]
fn an_audit_stays_one_line_whatever_the_bank_is_called() {
    let caller = Caller { peer: "127.0.0.1:9".parse().unwrap(), identity: None, token: Token::NotAsked };
    let bank = "x\nINFO audit call=\"save\"\r\u{1b}[31m\u{202e}ä\u{2028}";
    let found = lines(|| audit(&caller, "save", bank, "no bank\n\0"));
    assert_eq!(found.len(), 1);
    assert!(found[0].bytes().all(|byte| matches!(byte, b' '..=b'~')), "{found:?}");
    assert!(found[0].contains(r#"bank=x\nINFO audit call=\"save\"\r\u{1b}[31m\u{202e}\u{e4}\u{2028} "#));
    assert!(found[0].ends_with(r"outcome=no bank\n\u{0}"));

    let long = lines(|| audit(&caller, "save", &"b".repeat(1 << 20), "c".repeat(1 << 20)));
    assert!(long[0].len() < 800);
}
