//! JSON as checkpoints hold it: no key twice, and what Python writes beside the standard.
//!
//! A key that stands twice is an error, because readers disagree about which one counts. A byte order mark is skipped.
//! `Infinity`, `-Infinity` and `NaN`, which Python's `json` writes for such floats, are read as strings of that name:
//! code that reads the key gets an error (the value is no number), and code that ignores the key does not.

use crate::error::{Error, Result};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::path::Path;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// The value of a whole file; `part` is what it is, in messages.
pub(crate) fn parse(file: &Path, part: &'static str, bytes: &[u8]) -> Result<Value> {
    refuse_lfs_pointer(file, part, bytes)?;
    let text = name_special_floats(bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes));
    refuse_duplicate_keys(file, part, &text)?;
    serde_json::from_slice(&text).map_err(|source| Error::json(file, part, source))
}

/// Fails for the few lines that Git keeps in place of a large file that was not fetched.
pub(crate) fn refuse_lfs_pointer(file: &Path, part: &'static str, bytes: &[u8]) -> Result<()> {
    if bytes.starts_with(LFS_POINTER) {
        return Err(Error::format(file, part, "a Git LFS pointer", "the file itself (git lfs pull fetches it)"));
    }
    Ok(())
}

/// Fails for text that is not JSON, or in which an object has a key twice.
pub(crate) fn refuse_duplicate_keys(file: &Path, part: &'static str, bytes: &[u8]) -> Result<()> {
    serde_json::from_slice::<UniqueKeys>(bytes).map(|_| ()).map_err(|source| Error::json(file, part, source))
}

/// The same text with quotes around special floats.
fn name_special_floats(text: &[u8]) -> Cow<'_, [u8]> {
    const NAMES: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];
    let mut named: Option<Vec<u8>> = None;
    let (mut at, mut copied, mut in_string) = (0, 0, false);
    while let Some(&byte) = text.get(at) {
        let name = if in_string { None } else { NAMES.into_iter().find(|name| text[at..].starts_with(name)) };
        match (byte, name) {
            (_, Some(name)) => {
                let named = named.get_or_insert_default();
                named.extend_from_slice(&text[copied..at]);
                named.extend([b"\"", name, b"\""].concat());
                at += name.len();
                copied = at;
                continue;
            }
            (b'\\', None) if in_string => at += 1,
            (b'"', None) => in_string = !in_string,
            _ => {}
        }
        at += 1;
    }
    match named {
        None => Cow::Borrowed(text),
        Some(mut named) => {
            named.extend_from_slice(&text[copied..]);
            Cow::Owned(named)
        }
    }
}

/// Any JSON value in which no object has a key twice; nothing of it is kept.
struct UniqueKeys;

impl<'de> Deserialize<'de> for UniqueKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueKeysVisitor)
    }
}

struct UniqueKeysVisitor;

impl<'de> Visitor<'de> for UniqueKeysVisitor {
    type Value = UniqueKeys;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, _: bool) -> std::result::Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_i64<E>(self, _: i64) -> std::result::Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_u64<E>(self, _: u64) -> std::result::Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_f64<E>(self, _: f64) -> std::result::Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_str<E>(self, _: &str) -> std::result::Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_unit<E>(self) -> std::result::Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<UniqueKeys, A::Error> {
        while list.next_element::<UniqueKeys>()?.is_some() {}
        Ok(UniqueKeys)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<UniqueKeys, A::Error> {
        let mut keys: HashSet<String> = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if keys.contains(&key) {
                return Err(A::Error::custom(format_args!("key {key:?} stands twice")));
            }
            keys.insert(key);
            map.next_value::<UniqueKeys>()?;
        }
        Ok(UniqueKeys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &[u8]) -> std::result::Result<Value, String> {
        parse(Path::new("x.json"), "config", text).map_err(|error| match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        })
    }

    #[test]
    fn a_byte_order_mark_and_pythons_floats_are_read() {
        let text = "\u{feff}{\"a\": [0, Infinity, -Infinity,NaN], \"Infinity\": \"NaN \\\" Infinity\", \"b\": -1}";
        let value = json!({"a": [0, "Infinity", "-Infinity", "NaN"], "Infinity": "NaN \" Infinity", "b": -1});
        assert_eq!(read(text.as_bytes()).unwrap(), value);
        assert_eq!(read(b"NaN").unwrap(), json!("NaN"));
        for bad in ["Infinityx", "[NaN NaN]", "{NaN: 1", "\"\\", "\u{feff}\u{feff}1", "[1, Inf]"] {
            assert!(read(bad.as_bytes()).unwrap_err().contains("config is not valid"), "{bad}");
        }
    }

    #[test]
    fn a_key_that_stands_twice_is_named_wherever_it_is() {
        for text in [r#"{"k": 1, "k": 1}"#, r#"{"a": [{"k": {}, "b": 2, "k": []}]}"#, r#"{"k": 1, "\u006b": 2}"#] {
            let error = read(text.as_bytes()).unwrap_err();
            assert!(error.contains("key \"k\" stands twice"), "{error}");
        }
        assert!(read(br#"{"k": {"k": [{"k": 1}, {"k": 1}]}}"#).is_ok());
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_overflow_of_the_stack() {
        assert!(read(&[b'['; 100_000]).is_err());
    }

    #[test]
    fn a_pointer_of_git_lfs_is_called_one() {
        let error = read(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n").unwrap_err();
        assert_eq!(error, "x.json: config is a Git LFS pointer, expected the file itself (git lfs pull fetches it)");
    }
}
