//! What PostgreSQL and everybody after it can hold of a client's JSON, and a digest of what it
//! says, whatever the order of its keys and the blanks between them.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;
use shared::order::{Text, escape, text};
use xxhash_rust::xxh3::xxh3_128;

/// Deeper than any order; shallower than what a reader with a stack can follow.
const MAX_DEPTH: usize = 64;

/// What a JSON text says: equal for equal content, and wide enough that nobody meets another's
/// by accident.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest(pub u128);

impl Digest {
    /// Of several values under their names, in this order.
    #[must_use]
    pub fn of_fields(fields: &[(&str, Option<Digest>)]) -> Self {
        let mut bytes = Vec::with_capacity(fields.len() * 40);
        for (name, digest) in fields {
            let Some(digest) = digest else { continue };
            bytes.extend(name.as_bytes());
            bytes.push(0);
            bytes.extend(digest.0.to_le_bytes());
        }
        Self::of_bytes(&bytes)
    }

    #[must_use]
    pub fn of_text(text: &str) -> Self {
        Self::of_bytes(text.as_bytes())
    }

    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self(xxh3_128(bytes))
    }
}

/// Where a JSON text holds what cannot be stored, and why.
#[derive(Debug, PartialEq, Eq)]
pub struct Unstorable {
    pub pointer: String,
    pub reason: &'static str,
}

/// Digests `raw`; refuses what cannot be stored: `\u0000`, lone surrogates, numbers beyond a
/// double's range, nesting without end.
pub fn digest(raw: &RawValue) -> Result<Digest, Unstorable> {
    walk(raw, 0, &mut Vec::with_capacity(1024))
}

/// `parts` ends with what has been digested of the values around this one. One buffer for all of
/// them: a hash that takes its input in parts costs more than a small object.
fn walk(raw: &RawValue, depth: usize, parts: &mut Vec<u8>) -> Result<Digest, Unstorable> {
    let here = |reason| Unstorable { pointer: String::new(), reason };
    let json = raw.get();
    let (tag, digest) = match json.as_bytes()[0] {
        b'{' | b'[' if depth == MAX_DEPTH => return Err(here("is nested too deeply (at most 64 levels)")),
        b'{' => {
            let Pairs(mut pairs) =
                serde_json::from_str(json).map_err(|_| here("has a key that is no text (a lone surrogate?)"))?;
            pairs.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
            let own = parts.len();
            for (key, value) in &pairs {
                if key.contains('\0') {
                    return Err(here("has a key with \\u0000 in it"));
                }
                let value = walk(value, depth + 1, parts).map_err(|error| error.below(key))?;
                parts.extend(xxh3_128(key.as_bytes()).to_le_bytes());
                parts.extend(value.0.to_le_bytes());
            }
            (b'{', taken(parts, own))
        }
        b'[' => {
            let values: Vec<&RawValue> = serde_json::from_str(json).map_err(|_| here("is not an array"))?;
            let own = parts.len();
            for (index, value) in values.iter().enumerate() {
                let value = walk(value, depth + 1, parts).map_err(|error| error.below(&index.to_string()))?;
                parts.extend(value.0.to_le_bytes());
            }
            (b'[', taken(parts, own))
        }
        b'"' => {
            let text = text(raw).ok_or_else(|| here("is no text (a lone surrogate?)"))?;
            if text.contains('\0') {
                return Err(here("must not contain \\u0000"));
            }
            (b'"', xxh3_128(text.as_bytes()))
        }
        b't' | b'f' | b'n' => (b'l', xxh3_128(json.as_bytes())),
        _ if json.parse::<f64>().is_ok_and(f64::is_finite) => (b'0', xxh3_128(json.as_bytes())),
        _ => return Err(here("is out of range")),
    };
    // Without the tag, `"1"` and `1`, `[]` and `{}` would say the same.
    let mut tagged = [0; 17];
    tagged[0] = tag;
    tagged[1..].copy_from_slice(&digest.to_le_bytes());
    Ok(Digest(xxh3_128(&tagged)))
}

/// The hash of the parts from here on, which are dropped.
fn taken(parts: &mut Vec<u8>, from: usize) -> u128 {
    let hash = xxh3_128(&parts[from..]);
    parts.truncate(from);
    hash
}

impl Unstorable {
    fn below(mut self, name: &str) -> Self {
        self.pointer.insert_str(0, &format!("/{}", escape(name)));
        self
    }
}

/// An object's keys and values, each as often as it is given.
struct Pairs<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Pairs<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each;
        impl<'de> Visitor<'de> for Each {
            type Value = Pairs<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                // Room for most objects.
                let mut pairs = Vec::with_capacity(12);
                while let Some((Text(key), value)) = map.next_entry()? {
                    pairs.push((key, value));
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Each)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn of(json: &str) -> Result<Digest, Unstorable> {
        digest(&RawValue::from_string(json.to_owned()).unwrap())
    }

    #[test]
    fn the_order_of_keys_and_blanks_say_nothing() {
        assert_eq!(of(r#"{"a":1,"b":[true,null]}"#), of("{ \"b\" : [ true , null ],\n\"a\":1}"));
        assert_eq!(of(r#"{"\u0061":"\u00e9"}"#), of(r#"{"a":"é"}"#));
    }

    #[test]
    fn different_content_has_a_different_digest() {
        let texts = [
            "1",
            "\"1\"",
            "[]",
            "{}",
            "[[]]",
            "[1]",
            "1.0",
            "true",
            "\"true\"",
            "null",
            r#"{"a":1}"#,
            r#"{"a":"1"}"#,
            "[1,2]",
            "[2,1]",
        ];
        for (index, a) in texts.iter().enumerate() {
            for b in &texts[index + 1..] {
                assert_ne!(of(a).unwrap(), of(b).unwrap(), "{a} {b}");
            }
        }
    }

    #[test]
    fn a_digest_stays_what_is_stored() {
        // With another, no repeat would be known as one.
        let json =
            r#"{"id":"a\u00e9","n":1.50,"ok":true,"none":null,"items":[{"p":"x","q":2},{"p":"y","q":[]}],"o":{}}"#;
        assert_eq!(of(json).unwrap(), Digest(318_251_661_109_648_038_877_232_071_730_511_096_777));
        let fields = [("a", Some(Digest(1))), ("b", None), ("c", Some(Digest(2)))];
        assert_eq!(Digest::of_fields(&fields), Digest(176_595_543_123_398_855_241_183_512_436_423_042_935));
    }

    #[test]
    fn what_cannot_be_stored_is_named_with_its_place() {
        for (json, pointer, reason) in [
            (r#"{"a":[1,"x\u0000"]}"#, "/a/1", "must not contain"),
            (r#"{"a/b":"\ud800"}"#, "/a~1b", "no text"),
            (r#"{"\udfff":1}"#, "", "no text"),
            (r#"{"a\u0000":1}"#, "", "a key with"),
            ("[1e999]", "/0", "out of range"),
        ] {
            let error = of(json).unwrap_err();
            assert_eq!(error.pointer, pointer, "{json}");
            assert!(error.reason.contains(reason), "{json}: {}", error.reason);
        }
        assert!(of(&"[".repeat(64).chars().chain("]".repeat(64).chars()).collect::<String>()).is_ok());
        assert!(of(&"[".repeat(65).chars().chain("]".repeat(65).chars()).collect::<String>()).is_err());
    }

    proptest! {
        #[test]
        fn a_value_has_one_digest_however_it_is_printed(entries in proptest::collection::btree_map("[a-z]{1,3}", any::<i64>(), 0..6)) {
            let value: Value = entries.iter().map(|(k, v)| (k.clone(), Value::from(*v))).collect();
            prop_assert_eq!(of(&value.to_string()), of(&serde_json::to_string_pretty(&value).unwrap()));
        }
    }
}
