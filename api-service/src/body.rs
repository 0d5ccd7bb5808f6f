//! The fields of an order's JSON object, as they stand there: one table of names, checked for what
//! nobody knows and for what is given twice. What they mean is [`crate::request`]'s.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;
use shared::order::{self, Text, Violation};

/// The fields we know, each as it stands in the body.
#[derive(Default)]
pub(crate) struct Body<'a> {
    values: [Option<&'a RawValue>; FIELDS.len()],
    unknown: Vec<String>,
    twice: Vec<&'static str>,
}

pub(crate) const FIELDS: [&str; 13] = [
    "order_id",
    "user_id",
    "external_id",
    "lifecycle",
    "items",
    "amount",
    "currency",
    "shipping_address",
    "billing_address",
    "notes",
    "payload",
    "status",
    "replaces",
];
const ALIASES: [(&str, &str); 2] = [("order_items", "items"), ("payload_json", "payload")];

impl<'de> Deserialize<'de> for Body<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Body<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut body = Body::default();
                while let Some(Text(key)) = map.next_key()? {
                    let name = ALIASES.iter().find(|(alias, _)| *alias == key).map_or(&*key, |(_, name)| name);
                    let Some(index) = FIELDS.iter().position(|field| *field == name) else {
                        map.next_value::<IgnoredAny>()?;
                        body.unknown.push(key.into_owned());
                        continue;
                    };
                    let value = map.next_value::<&RawValue>()?;
                    if body.values[index].replace(value).is_some() {
                        body.twice.push(FIELDS[index]);
                    }
                }
                Ok(body)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

impl<'a> Body<'a> {
    /// `null` is as good as absent.
    pub(crate) fn get(&self, name: &str) -> Option<&'a RawValue> {
        let index = FIELDS.iter().position(|field| *field == name)?;
        self.values[index].filter(|raw| raw.get() != "null")
    }

    pub(crate) fn violations(&self) -> Vec<Violation> {
        let unknown = self.unknown.iter().map(|name| {
            let reason = format!("is not a field of an order ({})", FIELDS.join(", "));
            Violation::new(format!("/{}", order::escape(name)), reason)
        });
        let twice = self.twice.iter().map(|name| Violation::new(format!("/{name}"), "is given twice"));
        unknown.chain(twice).collect()
    }
}
