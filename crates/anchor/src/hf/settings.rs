//! config.json as typed settings, each with the file and the key in its error.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Settings of a file, over the defaults of its family.
pub(super) struct Settings<'a> {
    path: &'a Path,
    values: Map<String, Value>,
}

impl<'a> Settings<'a> {
    /// The settings of a JSON file.
    pub(super) fn read(path: &'a Path) -> Result<Self> {
        let problem = |problem: String| Error::File { path: path.into(), problem };
        let bytes = std::fs::read(path).map_err(|e| problem(e.to_string()))?;
        match serde_json::from_slice(&bytes).map_err(|e| problem(e.to_string()))? {
            Value::Object(values) => Ok(Self { path, values }),
            _ => Err(problem("expected an object".into())),
        }
    }

    /// Of these values, as if they were in the file.
    pub(super) fn of(path: &'a Path, values: Map<String, Value>) -> Self {
        Self { path, values }
    }

    /// The settings under a key, if it is there.
    pub(super) fn within(&self, key: &str) -> Option<Self> {
        let values = self.values.get(key)?.as_object()?.clone();
        Some(Self { path: self.path, values })
    }

    /// With defaults for what is not there.
    pub(super) fn over(mut self, defaults: &Value) -> Self {
        for (key, value) in defaults.as_object().into_iter().flatten() {
            self.values.entry(key).or_insert_with(|| value.clone());
        }
        self
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.values.get(key).is_some_and(|value| !value.is_null())
    }

    fn value(&self, key: &str) -> &Value {
        self.values.get(key).unwrap_or(&Value::Null)
    }

    /// The error of a key whose value is another than expected.
    pub(super) fn unexpected<T>(&self, key: &str, expected: impl ToString) -> Result<T> {
        let found = match self.values.get(key) {
            None => "nothing".into(),
            Some(value) => value.to_string(),
        };
        Err(Error::Setting { path: self.path.into(), key: key.into(), expected: expected.to_string(), found })
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        match self.value(key).as_u64() {
            Some(size) if size > 0 => Ok(size as usize),
            _ => self.unexpected(key, "a whole number above 0"),
        }
    }

    /// None where it is null or not there.
    pub(super) fn maybe_size(&self, key: &str) -> Result<Option<usize>> {
        self.has(key).then(|| self.size(key)).transpose()
    }

    pub(super) fn sizes(&self, key: &str) -> Result<Vec<usize>> {
        let sizes =
            self.value(key).as_array().map(|all| all.iter().map(|size| size.as_u64().map(|x| x as usize)));
        match sizes.and_then(|sizes| sizes.collect()) {
            Some(sizes) => Ok(sizes),
            None => self.unexpected(key, "a list of whole numbers"),
        }
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let numbers = self.value(key).as_array().map(|all| all.iter().map(Value::as_f64));
        match numbers.and_then(|numbers| numbers.collect()) {
            Some(numbers) => Ok(numbers),
            None => self.unexpected(key, "a list of numbers"),
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<f64> {
        match self.value(key).as_f64() {
            Some(number) if number.is_finite() => Ok(number),
            _ => self.unexpected(key, "a number"),
        }
    }

    pub(super) fn maybe_number(&self, key: &str) -> Result<Option<f64>> {
        self.has(key).then(|| self.number(key)).transpose()
    }

    /// False where it is null or not there.
    pub(super) fn flag(&self, key: &str) -> Result<bool> {
        match self.value(key) {
            Value::Null => Ok(false),
            Value::Bool(flag) => Ok(*flag),
            _ => self.unexpected(key, "true or false"),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<&str> {
        match self.value(key).as_str() {
            Some(text) => Ok(text),
            None => self.unexpected(key, "a name"),
        }
    }

    pub(super) fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let texts = self.value(key).as_array().map(|all| all.iter().map(Value::as_str));
        match texts.and_then(|texts| texts.collect()) {
            Some(texts) => Ok(texts),
            None => self.unexpected(key, "a list of names"),
        }
    }

    /// One id, a list of them, or none; old files have −1 for none.
    pub(super) fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: Option<Vec<u32>> = match self.value(key) {
            Value::Null => Some(vec![]),
            none if none.as_i64().is_some_and(|id| id < 0) => Some(vec![]),
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        match ids {
            Some(ids) => Ok(ids),
            None => self.unexpected(key, "ids of tokens"),
        }
    }

    /// Fails unless the value is this one, null or not there: what another one asks for is not supported.
    pub(super) fn only(&self, key: &str, supported: &Value) -> Result<()> {
        match self.value(key) {
            Value::Null => Ok(()),
            found if found == supported => Ok(()),
            _ => self.unexpected(key, supported),
        }
    }
}
