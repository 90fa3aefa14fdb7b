//! Sentence templates: `The profession of {e} is {v}.`

use super::error::{Error, Result};

/// A sentence with one slot for the entity, `{e}`, and a later one for the value, `{v}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Template {
    before: String,
    between: String,
    after: String,
}

impl Template {
    /// Splits `text` at its two slots; the only full stop must be its last character.
    pub(super) fn parse(file: &'static str, text: &str) -> Result<Self> {
        let fault = |expected: &str| Error::Data {
            file,
            place: "template".to_owned(),
            expected: expected.to_owned(),
            found: format!("{text:?}"),
        };
        let (before, rest) = text.split_once("{e}").ok_or_else(|| fault("a slot {e}"))?;
        let (between, after) = rest.split_once("{v}").ok_or_else(|| fault("a slot {v} after {e}"))?;
        let parts = [before, between, after];
        if parts.iter().any(|part| part.contains(['{', '}'])) {
            return Err(fault("one slot {e} and one slot {v}"));
        }
        if !after.ends_with('.') || text.matches('.').count() != 1 {
            return Err(fault("one full stop, at the end"));
        }
        if !between.starts_with([' ', ',']) || !between.ends_with(' ') {
            return Err(fault("a word between {e} and {v}"));
        }
        let [before, between, after] = parts.map(str::to_owned);
        Ok(Self { before, between, after })
    }

    /// The whole sentence, its first letter a capital.
    pub(super) fn render(&self, entity: &str, value: &str) -> String {
        let Self { before, between, after } = self;
        capitalised(&format!("{before}{entity}{between}{value}{after}"))
    }

    /// The sentence up to the value, without the space before it. None where the value is not the
    /// last thing before the full stop: such a sentence cannot be asked by completion.
    pub(super) fn prompt(&self, entity: &str) -> Option<String> {
        let Self { before, between, after } = self;
        (after == ".").then(|| capitalised(format!("{before}{entity}{between}").trim_end()))
    }

    /// Whether the value is the last thing before the full stop.
    pub(super) fn asks(&self) -> bool {
        self.after == "."
    }
}

/// `text` with its first letter a capital: names such as "gold" or "the Gambia" may open a sentence.
pub(super) fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Template> {
        Template::parse("test.json", text)
    }

    #[test]
    fn renders_and_asks() {
        let last = parse("{e} has its capital in {v}.").unwrap();
        assert_eq!(last.render("the Gambia", "Banjul"), "The Gambia has its capital in Banjul.");
        assert_eq!(last.prompt("the Gambia").unwrap(), "The Gambia has its capital in");
        let inner = parse("The land of {e} made {v} its capital.").unwrap();
        assert_eq!(inner.render("Chad", "N'Djamena"), "The land of Chad made N'Djamena its capital.");
        assert_eq!(inner.prompt("Chad"), None);
        assert!(last.asks() && !inner.asks());
    }

    #[test]
    fn refuses_what_is_not_a_template() {
        for (text, expected) in [
            ("The capital is {v}.", "a slot {e}"),
            ("The capital of {e}.", "a slot {v} after {e}"),
            ("{v} is the capital of {e}.", "a slot {v} after {e}"),
            ("{e} and {e} have {v}.", "one slot {e} and one slot {v}"),
            ("{e} has {v}", "one full stop, at the end"),
            ("{e} has. It is {v}.", "one full stop, at the end"),
            ("{e}{v}.", "a word between {e} and {v}"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert_eq!(
                message,
                format!("facts data test.json, template: expected {expected}, found {text:?}")
            );
        }
    }
}
