//! Files with one JSON object per line.

use std::borrow::Cow;
use std::fmt;
use std::io::BufRead;

use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::lines::Lines;
use super::{Document, SourceOptions, file_name};
use crate::{Error, Result};

/// The documents of a jsonl file. Blank lines are passed over.
pub(super) struct JsonlDocuments<R> {
    lines: Lines<R>,
    keys: Keys,
}

/// The keys looked for.
struct Keys {
    text: String,
    id: Option<String>,
    label: Option<String>,
}

/// The values found under them; of a key given twice the last counts, as for every JSON reader.
#[derive(Default)]
struct Values {
    text: Option<Value>,
    id: Option<Value>,
    label: Option<Value>,
}

impl<R: BufRead> JsonlDocuments<R> {
    /// The documents of `lines`, with the keys of `options`.
    pub(super) fn new(lines: Lines<R>, options: &SourceOptions) -> Self {
        let keys = Keys {
            text: options.text_key.clone(),
            id: options.id_key.clone(),
            label: options.label_key.clone(),
        };
        Self { lines, keys }
    }

    fn next_document(&mut self) -> Result<Option<Document>> {
        // The borrow of a line ends with its loop turn, so the file name is found beforehand.
        let url = self.lines.url().to_owned();
        while let Some((number, line)) = self.lines.next_line()? {
            if line.trim().is_empty() {
                continue;
            }
            return parse(line, &self.keys, &Place { url: &url, line: number }).map(Some);
        }
        Ok(None)
    }
}

impl<R: BufRead> Iterator for JsonlDocuments<R> {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_document().transpose()
    }
}

/// Where a record stands, for its errors.
struct Place<'a> {
    url: &'a str,
    line: u64,
}

impl Place<'_> {
    fn invalid(&self, source: serde_json::Error) -> Error {
        Error::Json { url: self.url.to_owned(), line: self.line, source }
    }

    /// A missing key. Parses the line once more, for the keys that it does have.
    fn missing(&self, key: &str, line: &str) -> Error {
        let found = match serde_json::from_str::<serde_json::Map<String, Value>>(line) {
            Ok(map) => map.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", "),
            Err(source) => return self.invalid(source),
        };
        let found = if found.is_empty() { "no keys".to_owned() } else { found };
        Error::MissingKey { url: self.url.to_owned(), record: self.line, key: key.to_owned(), found }
    }

    fn wrong_type(&self, key: &str, expected: &'static str, found: &Value) -> Error {
        Error::WrongType {
            url: self.url.to_owned(),
            record: self.line,
            key: key.to_owned(),
            expected,
            found: type_name(found).to_owned(),
        }
    }
}

fn parse(line: &str, keys: &Keys, place: &Place) -> Result<Document> {
    let mut deserializer = serde_json::Deserializer::from_str(line);
    let values = keys
        .deserialize(&mut deserializer)
        .and_then(|values| deserializer.end().map(|()| values))
        .map_err(|source| place.invalid(source))?;
    let text = match values.text {
        Some(Value::String(text)) => text,
        Some(other) => return Err(place.wrong_type(&keys.text, "a string", &other)),
        None => return Err(place.missing(&keys.text, line)),
    };
    let id = match (&keys.id, values.id) {
        (None, _) => format!("{}:{}", file_name(place.url), place.line),
        (Some(_), Some(Value::String(id))) => id,
        (Some(_), Some(Value::Number(id))) => id.to_string(),
        (Some(key), Some(other)) => return Err(place.wrong_type(key, "a string or a number", &other)),
        (Some(key), None) => return Err(place.missing(key, line)),
    };
    let label = match (&keys.label, values.label) {
        (_, None | Some(Value::Null)) => None,
        (_, Some(Value::String(label))) => Some(label),
        (_, Some(Value::Number(label))) => Some(label.to_string()),
        (_, Some(Value::Bool(label))) => Some(label.to_string()),
        (key, Some(other)) => {
            let key = key.as_deref().unwrap_or_default();
            return Err(place.wrong_type(key, "a string, a number or a boolean", &other));
        }
    };
    Ok(Document { id, label, text })
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Takes the values of the keys and passes over the rest without building it: metadata often
/// outweighs the text.
impl<'de> DeserializeSeed<'de> for &Keys {
    type Value = Values;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Values, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &Keys {
    type Value = Values;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a json object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Values, A::Error> {
        let mut values = Values::default();
        while let Some(Key(key)) = map.next_key::<Key>()? {
            let is = |wanted: &Option<String>| wanted.as_deref() == Some(key.as_ref());
            // One key may serve twice, e.g. as id and as label.
            let (text, id, label) = (key == self.text.as_str(), is(&self.id), is(&self.label));
            if !(text || id || label) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value: Value = map.next_value()?;
            if id {
                values.id = Some(value.clone());
            }
            if label {
                values.label = Some(value.clone());
            }
            if text {
                values.text = Some(value);
            }
        }
        Ok(values)
    }
}

/// A key that borrows from the line unless it holds escapes.
#[derive(serde::Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);
