//! Messages that a lifecycle sends to others: a body whose texts may be placeholders, filled in
//! from the order.

use serde_json::value::RawValue;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use uuid::Uuid;

use crate::{
    money::Money,
    order::{Item, PayloadFields, Source, parse_items, public_id, whole},
};

/// A message to be sent when an order moves.
#[derive(Clone, Debug)]
pub struct Emit {
    /// On entering this state; `None`: on every change of state.
    pub entering: Option<String>,
    pub topic: String,
    pub key: Template,
    pub body: Template,
}

/// A JSON value with placeholders in it.
#[derive(Clone, Debug, PartialEq)]
pub enum Template {
    /// JSON as it is.
    Literal(String),
    Field(Field),
    Object(Vec<(String, Template)>),
    Array(Vec<Template>),
    /// Once for each item of the order.
    EachItem(Box<Template>),
}

/// A placeholder, and whether its value must be a whole number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    name: &'static str,
    whole: bool,
}

const FIELDS: &[&str] = &[
    "message_id",
    "order_id",
    "user_id",
    "external_id",
    "lifecycle",
    "version",
    "from",
    "to",
    "from_code",
    "to_code",
    "amount",
    "currency",
    "items",
    "payload",
    "reason",
    "timestamp",
];
const ITEM_FIELDS: &[&str] = &["item.product_id", "item.quantity", "item.unit_price"];

/// What placeholders are filled in from.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    pub message_id: Uuid,
    pub order_id: Uuid,
    pub user_id: &'a str,
    pub external_id: Option<&'a str>,
    pub lifecycle: &'a str,
    pub version: i64,
    pub from: &'a str,
    pub to: &'a str,
    pub from_code: Option<i64>,
    pub to_code: Option<i64>,
    pub amount: Option<Money>,
    pub currency: Option<&'a str>,
    pub items: Option<&'a RawValue>,
    pub payload: Option<&'a RawValue>,
    pub reason: Option<&'a str>,
    pub at: OffsetDateTime,
}

impl Template {
    /// Reads a template from a file's value.
    ///
    /// # Errors
    /// With the place within the template and what is wrong there.
    pub fn read(value: &toml::Value) -> Result<Self, (String, String)> {
        Self::read_at(value, false)
    }

    fn read_at(value: &toml::Value, in_item: bool) -> Result<Self, (String, String)> {
        let within = |name: &dyn std::fmt::Display, (place, problem): (String, String)| {
            let dot = if place.is_empty() || place.starts_with('[') { "" } else { "." };
            (format!("{name}{dot}{place}"), problem)
        };
        match value {
            toml::Value::String(text) => match text.strip_prefix('{').and_then(|text| text.strip_suffix('}')) {
                Some(name) => Field::read(name, in_item).map(Self::Field).map_err(|problem| (String::new(), problem)),
                // It would be sent as it stands.
                None if text.contains(['{', '}']) => {
                    Err((String::new(), format!("{text:?} is no placeholder, nor plain text")))
                }
                None => Ok(Self::Literal(json_text(text))),
            },
            toml::Value::Integer(number) => Ok(Self::Literal(number.to_string())),
            toml::Value::Float(number) if number.is_finite() => Ok(Self::Literal(number.to_string())),
            toml::Value::Float(number) => Err((String::new(), format!("{number} is no number of JSON"))),
            toml::Value::Boolean(truth) => Ok(Self::Literal(truth.to_string())),
            toml::Value::Datetime(time) => Ok(Self::Literal(json_text(&time.to_string()))),
            toml::Value::Table(table) => table
                .iter()
                .map(|(name, value)| {
                    let value = Self::read_at(value, in_item).map_err(|error| within(name, error))?;
                    Ok((name.clone(), value))
                })
                .collect::<Result<_, _>>()
                .map(Self::Object),
            toml::Value::Array(values) => {
                if let ([value], false) = (values.as_slice(), in_item)
                    && mentions_item(value)
                {
                    let each = Self::read_at(value, true).map_err(|error| within(&"[0]", error))?;
                    return Ok(Self::EachItem(Box::new(each)));
                }
                let read = |(index, value)| {
                    Self::read_at(value, in_item).map_err(|error| within(&format!("[{index}]"), error))
                };
                values.iter().enumerate().map(read).collect::<Result<_, _>>().map(Self::Array)
            }
        }
    }

    /// The key that messages have unless their file says otherwise: the order's id.
    #[must_use]
    pub fn order_id() -> Self {
        Self::Field(Field { name: "order_id", whole: false })
    }

    /// As JSON.
    ///
    /// # Errors
    /// When the order has not what a placeholder needs.
    pub fn json(&self, subject: &Subject<'_>) -> Result<String, String> {
        let mut out = String::with_capacity(256);
        let items = if self.needs_items() { subject.parsed_items()? } else { Vec::new() };
        self.write(subject, &items, None, &mut out)?;
        Ok(out)
    }

    /// As text, for a key: a JSON string without its quotes.
    ///
    /// # Errors
    /// As [`Self::json`].
    pub fn text(&self, subject: &Subject<'_>) -> Result<String, String> {
        let json = self.json(subject)?;
        Ok(serde_json::from_str::<String>(&json).unwrap_or(json))
    }

    /// Does it tell what was ordered, or what that comes to?
    #[must_use]
    pub fn tells_content(&self) -> bool {
        match self {
            Self::Literal(_) => false,
            Self::Field(field) => matches!(field.name, "amount" | "items" | "payload"),
            Self::Object(fields) => fields.iter().any(|(_, value)| value.tells_content()),
            Self::Array(values) => values.iter().any(Self::tells_content),
            Self::EachItem(_) => true,
        }
    }

    fn needs_items(&self) -> bool {
        match self {
            Self::Literal(_) => false,
            Self::Field(field) => field.name == "items",
            Self::Object(fields) => fields.iter().any(|(_, value)| value.needs_items()),
            Self::Array(values) => values.iter().any(Self::needs_items),
            Self::EachItem(_) => true,
        }
    }

    fn write(
        &self,
        subject: &Subject<'_>,
        items: &[Item<'_>],
        item: Option<&Item<'_>>,
        out: &mut String,
    ) -> Result<(), String> {
        match self {
            Self::Literal(json) => out.push_str(json),
            Self::Field(field) => out.push_str(&field.json(subject, items, item)?),
            Self::Object(fields) => {
                out.push('{');
                for (index, (name, value)) in fields.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    out.push_str(&json_text(name));
                    out.push(':');
                    value.write(subject, items, item, out)?;
                }
                out.push('}');
            }
            Self::Array(values) => {
                out.push('[');
                for (index, value) in values.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    value.write(subject, items, item, out)?;
                }
                out.push(']');
            }
            Self::EachItem(value) => {
                out.push('[');
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    value.write(subject, items, Some(item), out)?;
                }
                out.push(']');
            }
        }
        Ok(())
    }
}

impl Field {
    fn read(name: &str, in_item: bool) -> Result<Self, String> {
        let (name, whole) = match name.strip_suffix(":whole") {
            Some(name) => (name, true),
            None => (name, false),
        };
        let mut known = FIELDS.iter().chain(if in_item { ITEM_FIELDS } else { &[] });
        match known.find(|known| **known == name) {
            Some(name) => Ok(Self { name, whole }),
            None if ITEM_FIELDS.contains(&name) => {
                Err(format!("{{{name}}} stands for one item; put it in an array: [{{ … = \"{{{name}}}\" }}]"))
            }
            None => Err(format!(
                "{{{name}}} is no placeholder; there are {}, and for each item {}",
                FIELDS.join(", "),
                ITEM_FIELDS.join(", ")
            )),
        }
    }

    fn json(&self, subject: &Subject<'_>, items: &[Item<'_>], item: Option<&Item<'_>>) -> Result<String, String> {
        let text = |text: Option<&str>| text.map_or_else(|| "null".to_owned(), json_text);
        let number = |number: Option<i64>| number.map_or_else(|| "null".to_owned(), |number| number.to_string());
        let json = match self.name {
            "message_id" => json_text(&subject.message_id.hyphenated().to_string()),
            "order_id" => json_text(&public_id(subject.order_id, subject.external_id)),
            "user_id" if self.whole => subject.user_id.to_owned(),
            "user_id" => json_text(subject.user_id),
            "external_id" => text(subject.external_id),
            "lifecycle" => json_text(subject.lifecycle),
            "version" => subject.version.to_string(),
            "from" => json_text(subject.from),
            "to" => json_text(subject.to),
            "from_code" => number(subject.from_code),
            "to_code" => number(subject.to_code),
            "amount" => match subject.amount {
                Some(amount) if self.whole => amount.decimal().normalize().to_string(),
                Some(amount) => amount.to_string(),
                None => "null".to_owned(),
            },
            "currency" => text(subject.currency),
            "items" => serde_json::to_string(items).map_err(|error| error.to_string())?,
            "payload" => subject.payload.map_or_else(|| "null".to_owned(), |payload| payload.get().to_owned()),
            "reason" => text(subject.reason),
            "timestamp" => json_text(&subject.at.format(&Rfc3339).unwrap_or_default()),
            name => {
                let item = item.ok_or_else(|| format!("{{{name}}} outside of an item"))?;
                match name {
                    "item.product_id" => json_text(&item.product_id),
                    "item.quantity" => item.quantity.to_string(),
                    _ => item.unit_price.to_string(),
                }
            }
        };
        if !self.whole {
            return Ok(json);
        }
        whole(&json).map(|number| number.to_string()).ok_or_else(|| {
            format!("{} must be a whole number in a message of this lifecycle, and is {json}", self.name)
        })
    }
}

impl<'a> Subject<'a> {
    /// The order's own items, else those of its payload.
    fn parsed_items(&self) -> Result<Vec<Item<'a>>, String> {
        let parse = |raw, pointer, source| {
            parse_items(raw, pointer, source).map_err(|violations| crate::order::sentence(&violations))
        };
        if let Some(items) = self.items {
            return parse(items, "/items", Source::Own);
        }
        let of_payload = self.payload.and_then(|payload| PayloadFields::of(payload).ok()).and_then(|f| f.items);
        of_payload.map_or(Ok(Vec::new()), |items| parse(items, "/payload/items", Source::Payload))
    }
}

fn mentions_item(value: &toml::Value) -> bool {
    match value {
        toml::Value::String(text) => text.starts_with("{item."),
        toml::Value::Table(table) => table.values().any(mentions_item),
        toml::Value::Array(values) => values.iter().any(mentions_item),
        _ => false,
    }
}

fn json_text(text: &str) -> String {
    // Text always serializes.
    serde_json::to_string(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject<'a>(items: Option<&'a RawValue>, payload: Option<&'a RawValue>) -> Subject<'a> {
        Subject {
            message_id: Uuid::nil(),
            order_id: Uuid::nil(),
            user_id: "42",
            external_id: None,
            lifecycle: "payment",
            version: 2,
            from: "PENDING",
            to: "PENDING",
            from_code: None,
            to_code: Some(7),
            amount: Some(Money::parse("100.00").unwrap()),
            currency: Some("USD"),
            items,
            payload,
            reason: None,
            at: OffsetDateTime::UNIX_EPOCH,
        }
    }

    fn read(toml: &str) -> Result<Template, (String, String)> {
        let table: toml::Table = toml.parse().unwrap();
        Template::read(&toml::Value::Table(table))
    }

    #[test]
    fn placeholders_keep_their_types() {
        let template = read(
            r#"
            user = "{user_id:whole}"
            name = "{user_id}"
            amount = "{amount}"
            whole = "{amount:whole}"
            code = "{to_code}"
            none = "{from_code}"
            fixed = ["a", 1, true]
            at = "{timestamp}"
            "#,
        );
        assert_eq!(
            template.unwrap().json(&subject(None, None)).unwrap(),
            r#"{"amount":100.00,"at":"1970-01-01T00:00:00Z","code":7,"fixed":["a",1,true],"name":"42","none":null,"user":42,"whole":100}"#
        );
    }

    #[test]
    fn an_array_with_an_item_in_it_is_one_entry_for_each_item() {
        let template =
            read(r#"items = [{ id = "{item.product_id}", n = "{item.quantity}", p = "{item.unit_price}" }]"#);
        let raw = |json: &str| RawValue::from_string(json.to_owned()).unwrap();
        let own = raw(r#"[{"product_id":"a\"","quantity":2,"unit_price":1.50}]"#);
        let payload = raw(r#"{"items":[{"product_id":7,"quantity":1,"price":"2","seller":"s"}]}"#);
        let template = template.unwrap();
        let json = |items, payload| template.json(&subject(items, payload)).unwrap();
        assert_eq!(json(Some(&own), Some(&payload)), r#"{"items":[{"id":"a\"","n":2,"p":1.50}]}"#);
        assert_eq!(json(None, Some(&payload)), r#"{"items":[{"id":"7","n":1,"p":2}]}"#);
        assert_eq!(json(None, None), r#"{"items":[]}"#);
        // What was cancelled is not told, what is taken off is.
        let payload = raw(
            r#"{"items":[{"product_id":"c","quantity":0},{"product_id":"b","quantity":"2.0","price":9},{"product_id":"o","quantity":1,"price":-1.5}]}"#,
        );
        assert_eq!(json(None, Some(&payload)), r#"{"items":[{"id":"b","n":2,"p":9},{"id":"o","n":1,"p":-1.5}]}"#);
    }

    #[test]
    fn what_is_no_placeholder_is_refused_with_its_place() {
        let (place, problem) = read(r#"a = { b = ["x", "{colour}"] }"#).unwrap_err();
        assert_eq!(place, "a.b[1]");
        assert!(problem.contains("{colour} is no placeholder") && problem.contains("order_id"), "{problem}");
        assert!(read(r#"a = "{item.quantity}""#).unwrap_err().1.contains("in an array"));
    }

    #[test]
    fn what_must_be_whole_and_is_not_is_an_error() {
        let template = read(r#"amount = "{amount:whole}""#).unwrap();
        let user = read(r#"user = "{user_id:whole}""#).unwrap();
        for other in ["+7", "007", "-0", "7.0", " 7", ""] {
            let of_other = Subject { user_id: other, ..subject(None, None) };
            assert!(user.json(&of_other).unwrap_err().contains("whole number"), "{other:?} is another user than 7");
        }
        let broken = Subject { amount: Some(Money::parse("1.5").unwrap()), ..subject(None, None) };
        assert!(template.json(&broken).unwrap_err().contains("whole number"));
    }
}
