use serde_json::Value;

use crate::{Error, Result};

/// A place in a manifest.
#[derive(Clone)]
pub(super) struct Node<'a> {
    /// Kind and name of the manifest.
    object: &'a str,
    /// Such as `spec.ports[0].port`.
    path: String,
    pub(super) value: &'a Value,
}

impl<'a> Node<'a> {
    pub(super) fn root(object: &'a str, value: &'a Value) -> Self {
        Self { object, path: String::new(), value }
    }

    /// What is under a key, or under keys with dots between them; null where nothing is.
    pub(super) fn get(&self, keys: &str) -> Self {
        keys.split('.').fold(self.clone(), |node, key| node.entry(key))
    }

    fn entry(&self, key: &str) -> Self {
        let path = match self.path.as_str() {
            "" => key.to_owned(),
            path => format!("{path}.{key}"),
        };
        Self { path, value: &self.value[key], ..*self }
    }

    pub(super) fn is_there(&self) -> bool {
        !self.value.is_null()
    }

    /// The items of a list; none where nothing is.
    pub(super) fn items(&self) -> Vec<Self> {
        let items = self.value.as_array().into_iter().flatten().enumerate();
        items.map(|(i, value)| Self { path: format!("{}[{i}]", self.path), value, ..*self }).collect()
    }

    /// The entries of a map; none where nothing is.
    pub(super) fn entries(&self) -> Vec<(&'a str, Self)> {
        let entries = self.value.as_object().into_iter().flatten();
        entries.map(|(key, _)| (key.as_str(), self.entry(key))).collect()
    }

    pub(super) fn text(&self) -> Result<&'a str> {
        self.value.as_str().ok_or_else(|| self.wrong("a text"))
    }

    pub(super) fn number(&self, least: i64, most: i64) -> Result<i64> {
        let number = self.value.as_i64().filter(|number| (least..=most).contains(number));
        number.ok_or_else(|| self.wrong(format!("a whole number from {least} to {most}")))
    }

    /// A text that a rule holds for.
    pub(super) fn is(&self, expected: &str, rule: impl Fn(&str) -> bool) -> Result<&'a str> {
        let text = self.text()?;
        if rule(text) { Ok(text) } else { Err(self.wrong(expected)) }
    }

    /// One of a few words.
    pub(super) fn one_of(&self, words: &[&str]) -> Result<()> {
        self.is(&format!("one of {}", words.join(", ")), |text| words.contains(&text)).map(|_| ())
    }

    /// What is wrong here.
    pub(super) fn wrong(&self, expected: impl Into<String>) -> Error {
        let found = if self.is_there() { self.value.to_string() } else { "nothing".to_owned() };
        // What stands here may be a whole pod.
        let found = match found.char_indices().nth(80) {
            Some((end, _)) => format!("{}…", &found[..end]),
            None => found,
        };
        Error::Manifest {
            object: self.object.into(),
            path: self.path.clone(),
            expected: expected.into(),
            found,
        }
    }

    /// Fails where two of these are the same.
    pub(super) fn all_differ(nodes: impl IntoIterator<Item = Self>) -> Result<()> {
        let mut seen: Vec<Self> = vec![];
        for node in nodes {
            if let Some(first) = seen.iter().find(|first| first.value == node.value) {
                return Err(node.wrong(format!("another than that of {}", first.path)));
            }
            seen.push(node);
        }
        Ok(())
    }
}
