use std::fmt;
use std::str::FromStr;

use super::{Error, Result};

/// The name of a bank: 1 to 64 of `a-z`, `0-9`, `.`, `_` and `-`, and neither `.` nor `..`. So a name
/// is one part of a path, the same on every file system, and safe to print.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BankName(String);

impl BankName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for BankName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        check("bank name", text).map(|()| Self(text.to_owned()))
    }
}

impl TryFrom<&str> for BankName {
    type Error = Error;

    fn try_from(text: &str) -> Result<Self> {
        text.parse()
    }
}

impl fmt::Display for BankName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks a name of `what` by the rule of [`BankName`], which holds for the names in certificates too.
pub(crate) fn check(what: &'static str, text: &str) -> Result<()> {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
    let fits = (1..=64).contains(&text.len()) && text.bytes().all(allowed);
    if fits && !matches!(text, "." | "..") {
        return Ok(());
    }
    Err(Error::Name { what, found: text.chars().take(80).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_names_that_are_one_part_of_a_path() {
        let longest = "a".repeat(64);
        for name in ["a", "facts", "v1.2_x-3", "...", "-", ".hidden", &longest] {
            assert_eq!(name.parse::<BankName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn refuses_every_other_name_and_shows_it_escaped() {
        let longer = "a".repeat(65);
        for name in ["", ".", "..", "A", "a/b", "a\\b", "a b", "a\0", "ä", "a\n", "../a", &longer] {
            let message = BankName::try_from(name).unwrap_err().to_string();
            assert!(message.starts_with(&format!("bank name is {name:?}, expected 1 to 64 of")), "{message}");
            assert!(!message.contains('\n'));
        }
        let huge = "x".repeat(1 << 20);
        assert!(BankName::try_from(huge.as_str()).unwrap_err().to_string().len() < 200);
    }
}
