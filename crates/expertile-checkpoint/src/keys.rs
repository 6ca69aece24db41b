//! The entries of a JSON object, with errors that name the file, the key, its value and what was expected.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// The entries of an object of `config.json`. An entry that is `null` counts as absent.
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    pub(crate) file: &'a Path,
    /// What stands before a key in messages.
    pub(crate) path: &'a str,
    pub(crate) entries: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.entries.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn wrong(&self, key: &str, actual: &str, expected: &str) -> Error {
        // A hostile value may be megabytes long, and so may a key.
        let [key, actual] = [key, actual].map(|text| match text.char_indices().nth(100) {
            Some((cut, _)) => format!("{}...", &text[..cut]),
            None => text.to_owned(),
        });
        let key = format!("{}{key}", self.path);
        Error::Config { file: self.file.to_owned(), key, actual, expected: expected.into() }
    }

    pub(crate) fn required(&self, key: &str, expected: &str) -> Result<&'a Value> {
        self.get(key).ok_or_else(|| self.wrong(key, "missing", expected))
    }

    /// A number that may be zero, if it is there.
    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>> {
        self.get(key).map(|value| self.whole(key, value)).transpose()
    }

    fn whole(&self, key: &str, value: &Value) -> Result<usize> {
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        number.ok_or_else(|| self.wrong(key, &value.to_string(), "a whole number"))
    }

    /// As [`Keys::count`], where the value may be a list with one number per layer.
    pub(crate) fn layer_count(&self, key: &str, layer: usize) -> Result<Option<usize>> {
        match self.get(key) {
            Some(value @ Value::Array(list)) => {
                let entry = list.get(layer).ok_or_else(|| {
                    self.wrong(key, &value.to_string(), &format!("a number, or one for each layer up to {layer}"))
                })?;
                self.whole(key, entry).map(Some)
            }
            _ => self.count(key),
        }
    }

    /// A positive number.
    pub(crate) fn size(&self, key: &str) -> Result<usize> {
        const EXPECTED: &str = "a positive whole number";
        let value = self.required(key, EXPECTED)?;
        self.count(key)?.filter(|&size| size > 0).ok_or_else(|| self.wrong(key, &value.to_string(), EXPECTED))
    }

    pub(crate) fn size_or(&self, key: &str, absent: usize) -> Result<usize> {
        if self.get(key).is_some() { self.size(key) } else { Ok(absent) }
    }

    /// The positive number that these keys agree on, one of which has to be there; each may be a list with one number
    /// per layer.
    pub(crate) fn agreed_size(&self, names: &[&str], layer: usize) -> Result<usize> {
        const EXPECTED: &str = "a positive whole number";
        let mut found: Option<(&str, usize)> = None;
        for &key in names {
            let Some(size) = self.layer_count(key, layer)? else { continue };
            if size == 0 {
                return Err(self.wrong(key, "0", EXPECTED));
            }
            match found {
                Some((other, earlier)) if earlier != size => {
                    return Err(self.wrong(key, &size.to_string(), &format!("{earlier}, as {other}")));
                }
                Some(_) => {}
                None => found = Some((key, size)),
            }
        }
        let names = || match names {
            [rest @ .., last] if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
            _ => names.concat(),
        };
        found.map(|(_, size)| size).ok_or_else(|| self.wrong(&names(), "missing", EXPECTED))
    }

    pub(crate) fn flag(&self, key: &str) -> Result<bool> {
        let value = self.required(key, "true or false")?;
        value.as_bool().ok_or_else(|| self.wrong(key, &value.to_string(), "true or false"))
    }

    pub(crate) fn number(&self, key: &str) -> Result<f32> {
        let value = self.required(key, "a finite number")?;
        let number = value.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
        number.ok_or_else(|| self.wrong(key, &value.to_string(), "a finite number"))
    }

    pub(crate) fn name(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key)
            .map(|value| value.as_str().ok_or_else(|| self.wrong(key, &value.to_string(), "a name")))
            .transpose()
    }

    pub(crate) fn list(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || self.wrong(key, &value.to_string(), "a list of whole numbers");
        let entries = value.as_array().ok_or_else(wrong)?;
        let number = |entry: &Value| entry.as_u64().and_then(|number| usize::try_from(number).ok()).ok_or_else(wrong);
        entries.iter().map(number).collect::<Result<_>>().map(Some)
    }
}
