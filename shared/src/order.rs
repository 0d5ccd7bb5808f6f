//! What is in an order, and what it comes to: items, amount, currency. The door checks an
//! order's own fields with this, the worker computes the amount with it.

use std::{borrow::Cow, fmt};

use iso_currency::Currency;
use rust_decimal::Decimal;
use serde::{
    Deserialize, Serialize,
    de::{Deserializer, IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::money::{Money, MoneyError, Price, is_json_number};

/// Exists in every lifecycle and is final.
pub const DELETED: &str = "deleted";

/// Longest user id, external id and product id, in characters.
pub const MAX_ID: usize = 255;

/// Namespace of the ids that stand for other systems' texts.
const ORDERS_OF_OTHERS: Uuid = Uuid::NAMESPACE_OID;

/// The order that an id from elsewhere stands for: a UUID for itself, other text for the UUIDv5 of
/// it (RFC 9562, section 5.5, in the OID namespace). Only the form with hyphens is a UUID: another
/// system's id of 32 hexadecimal digits is to be told to it as it was.
#[must_use]
pub fn order_id_of(text: &str) -> Uuid {
    const HYPHENATED: usize = uuid::fmt::Hyphenated::LENGTH;
    let uuid = if text.len() == HYPHENATED { Uuid::try_parse(text).ok() } else { None };
    uuid.unwrap_or_else(|| Uuid::new_v5(&ORDERS_OF_OTHERS, text.as_bytes()))
}

/// The id under which others know an order: their own text, where the order's id stands for it.
#[must_use]
pub fn public_id<'a>(order_id: Uuid, external_id: Option<&'a str>) -> Cow<'a, str> {
    match external_id {
        Some(text) if order_id == Uuid::new_v5(&ORDERS_OF_OTHERS, text.as_bytes()) => text.into(),
        _ => order_id.hyphenated().to_string().into(),
    }
}

const QUANTITIES: std::ops::RangeInclusive<u32> = 1..=1_000_000;

/// One position of an order, as it is stored and told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Item<'a> {
    pub product_id: Cow<'a, str>,
    pub quantity: u32,
    pub unit_price: Price,
}

/// A rule that a value breaks, and where: a JSON pointer (RFC 6901) and a reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Violation {
    pub pointer: String,
    pub reason: String,
}

impl Violation {
    pub fn new(pointer: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), reason: reason.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let blank = if self.pointer.is_empty() { "" } else { " " };
        write!(f, "{}{blank}{}", self.pointer, self.reason)
    }
}

/// Where items stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In a request's own field. A field that we do not know is an error, since it may be a misspelt one.
    Own,
    /// In a marketplace's payload, which tells all that became of an order. It has fields of its own. A line
    /// of quantity 0 was cancelled there: it counts nothing, whatever else is in it, and is left out. A line
    /// with a negative price takes something off (a coupon, a discount).
    Payload,
}

/// Reads a JSON array of items found at `pointer`; all that is wrong with it, not just the first.
pub fn parse_items<'a>(raw: &'a RawValue, pointer: &str, source: Source) -> Result<Vec<Item<'a>>, Vec<Violation>> {
    let Ok(entries) = serde_json::from_str::<Vec<&RawValue>>(raw.get()) else {
        return Err(vec![Violation::new(pointer, "must be an array of items")]);
    };
    if entries.is_empty() {
        return Err(vec![Violation::new(pointer, "must not be empty")]);
    }
    let mut violations = Vec::new();
    let mut items = Vec::with_capacity(entries.len());
    for (index, entry) in entries.into_iter().enumerate() {
        items.extend(parse_item(entry, &format_args!("{pointer}/{index}"), source, &mut violations));
    }
    if violations.is_empty() { Ok(items) } else { Err(violations) }
}

#[derive(Default)]
struct RawItem<'a> {
    product_id: Option<&'a RawValue>,
    quantity: Option<&'a RawValue>,
    unit_price: Option<&'a RawValue>,
    unknown: Vec<Cow<'a, str>>,
    twice: Vec<&'static str>,
}

impl<'de> Deserialize<'de> for RawItem<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = RawItem<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an item object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut item = RawItem::default();
                while let Some(Text(key)) = map.next_key()? {
                    let (field, name) = match &*key {
                        "product_id" => (&mut item.product_id, "product_id"),
                        "quantity" => (&mut item.quantity, "quantity"),
                        "unit_price" | "price" => (&mut item.unit_price, "unit_price"),
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                            item.unknown.push(key);
                            continue;
                        }
                    };
                    if field.replace(map.next_value()?).is_some() {
                        item.twice.push(name);
                    }
                }
                Ok(item)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

fn parse_item<'a>(
    raw: &'a RawValue,
    pointer: &fmt::Arguments<'_>,
    source: Source,
    violations: &mut Vec<Violation>,
) -> Option<Item<'a>> {
    let mut broken = |field: &str, reason: &dyn fmt::Display| {
        let slash = if field.is_empty() { "" } else { "/" };
        violations.push(Violation::new(format!("{pointer}{slash}{}", escape(field)), reason.to_string()));
    };
    let Ok(item) = serde_json::from_str::<RawItem<'a>>(raw.get()) else {
        broken("", &"must be an object");
        return None;
    };
    let quantity = item.quantity.ok_or("is missing").and_then(|raw| quantity(raw, source));
    if (quantity, source) == (Ok(0), Source::Payload) {
        return None;
    }
    if source == Source::Own {
        for name in &item.unknown {
            broken(name, &"is not a field of an item (product_id, quantity, unit_price)");
        }
    }
    for name in &item.twice {
        broken(name, &"is given twice");
    }
    let product_id = match item.product_id.map(id) {
        None => Err("is missing"),
        Some(None) => Err("must be text or a whole number"),
        Some(Some(id)) if id.is_empty() || id.chars().count() > MAX_ID => Err("must have 1 to 255 characters"),
        Some(Some(id)) if id.contains('\0') => Err("must not contain \\u0000"),
        Some(Some(id)) => Ok(id),
    };
    let unit_price = item.unit_price.map(|raw| match price(raw) {
        Ok(price) if source == Source::Own && price.is_negative() => Err(MoneyError::Negative),
        read => read,
    });
    if let Err(reason) = &product_id {
        broken("product_id", reason);
    }
    if let Err(reason) = &quantity {
        broken("quantity", reason);
    }
    match &unit_price {
        None => broken("unit_price", &"is missing"),
        Some(Err(error)) => broken("unit_price", error),
        Some(Ok(_)) => {}
    }
    Some(Item { product_id: product_id.ok()?, quantity: quantity.ok()?, unit_price: unit_price?.ok()? })
}

fn quantity(raw: &RawValue, source: Source) -> Result<u32, &'static str> {
    let whole = whole_number(unquoted(raw)).ok_or("must be a whole number from 1 to 1000000")?;
    match whole.parse() {
        Ok(0) if source == Source::Payload => Ok(0),
        Ok(quantity) if QUANTITIES.contains(&quantity) => Ok(quantity),
        _ if source == Source::Payload => Err("must be from 1 to 1000000, or 0 where the line was cancelled"),
        _ => Err("must be from 1 to 1000000"),
    }
}

/// The whole number that a JSON number is, however it is written: `2`, `2.0` and `1e1` are, `2.5` is not. One
/// that is longer than any id is none.
#[must_use]
pub fn whole_number(text: &str) -> Option<Cow<'_, str>> {
    let unsigned = text.strip_prefix('-').unwrap_or(text);
    if text == "-0" {
        return Some("0".into());
    }
    if unsigned.bytes().all(|byte| byte.is_ascii_digit()) && (unsigned == "0" || !unsigned.starts_with('0')) {
        return Some(text.into()).filter(|_| !unsigned.is_empty());
    }
    if text.len() > MAX_ID || !is_json_number(text) {
        return None;
    }
    let (mantissa, exponent) = unsigned.split_once(['e', 'E']).unwrap_or((unsigned, "0"));
    let (before, behind) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = [before, behind].concat();
    let significant = digits.trim_start_matches('0');
    if significant.is_empty() {
        return Some("0".into());
    }
    // Of the significant digits, so many stand before the point.
    let point = i64::try_from(before.len()).ok()?.checked_add(exponent.parse().ok()?)?;
    let point = usize::try_from(point.checked_sub(i64::try_from(digits.len() - significant.len()).ok()?)?).ok()?;
    let zeros = point.saturating_sub(significant.len());
    let (whole, rest) = significant.split_at_checked(point).unwrap_or((significant, ""));
    if point > MAX_ID || rest.bytes().any(|byte| byte != b'0') {
        return None;
    }
    let sign = if text.len() > unsigned.len() { "-" } else { "" };
    Some(format!("{sign}{whole}{}", "0".repeat(zeros)).into())
}

/// The text of a JSON string. `Cow` alone would always copy: serde borrows only where it is told to.
#[derive(Debug, Deserialize)]
pub struct Text<'a>(#[serde(borrow)] pub Cow<'a, str>);

/// The text of a JSON string; a lone surrogate or another type is `None`.
#[must_use]
pub fn text(raw: &RawValue) -> Option<Cow<'_, str>> {
    let inner = raw.get().strip_prefix('"')?.strip_suffix('"')?;
    // It is JSON already: without an escape, what stands there is the text.
    if inner.contains('\\') {
        serde_json::from_str::<Text<'_>>(raw.get()).ok().map(|text| text.0)
    } else {
        Some(inner.into())
    }
}

/// An id from elsewhere: text, or a whole number, which is as good.
#[must_use]
pub fn id(raw: &RawValue) -> Option<Cow<'_, str>> {
    if raw.get().starts_with('"') { text(raw) } else { whole_number(raw.get()) }
}

/// A whole number in the one spelling that JSON has for it: whoever compares ids as text must not take
/// `+7` and `7` for two where others, who are sent a number, see one.
#[must_use]
pub fn whole(text: &str) -> Option<i64> {
    text.parse::<i64>().ok().filter(|number| number.to_string() == text)
}

/// Money from a JSON number or string.
pub fn money(raw: &RawValue) -> Result<Money, MoneyError> {
    Money::parse(unquoted(raw))
}

fn price(raw: &RawValue) -> Result<Price, MoneyError> {
    Price::parse(unquoted(raw))
}

/// A number, or the text of a string that should be one.
#[must_use]
pub fn unquoted(raw: &RawValue) -> &str {
    raw.get().strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(raw.get())
}

/// An ISO 4217 code, such as `BRL`.
pub fn currency(code: &str) -> Result<&str, &'static str> {
    match Currency::from_code(code) {
        Some(_) => Ok(code),
        None => Err("must be an ISO 4217 code such as USD"),
    }
}

/// Which sums of money an order may come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Amounts {
    /// Those that can be paid: multiples of their currency's smallest unit. A unit price may be finer.
    #[default]
    Payable,
    /// Any, as they are.
    Exact,
}

impl Amounts {
    /// # Errors
    /// Why an order may not come to this. Currencies without a smallest unit (XAU, XTS, …) take all.
    pub fn check(self, amount: Money, currency: &str) -> Result<(), String> {
        let exponent = Currency::from_code(currency).and_then(Currency::exponent).map(u32::from);
        match exponent {
            Some(decimals) if self == Self::Payable && !amount.fits(decimals) => Err(format!(
                "comes to {amount}, which cannot be paid in {currency}: the smallest unit is {}",
                Decimal::new(1, decimals)
            )),
            _ => Ok(()),
        }
    }
}

/// Escapes a field's name for a JSON pointer (RFC 6901, section 3).
#[must_use]
pub fn escape(name: &str) -> Cow<'_, str> {
    if name.contains(['~', '/']) { name.replace('~', "~0").replace('/', "~1").into() } else { name.into() }
}

/// Σ unit price × quantity; `None` where it leaves the range of money.
#[must_use]
pub fn total(items: &[Item<'_>]) -> Option<Money> {
    sum(items).ok()
}

fn sum(items: &[Item<'_>]) -> Result<Money, MoneyError> {
    let sum = items.iter().try_fold(Price::ZERO, |sum, item| sum.plus(item.unit_price.times(item.quantity)?));
    sum.ok_or(MoneyError::TooLarge)?.try_into()
}

/// The fields that say what an order comes to. Its own fields count before those of `payload`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Content<'a> {
    pub items: Option<&'a RawValue>,
    pub amount: Option<Money>,
    /// `None` only where `payload` has one that the door could not read.
    pub currency: Option<&'a str>,
    pub payload: Option<&'a RawValue>,
}

/// What an order comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worth {
    /// `None` where neither the order nor its payload says anything of money.
    pub amount: Option<Money>,
    pub currency: String,
}

/// Fields of a marketplace's payload that serve when the order's own are absent.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct PayloadFields<'a> {
    #[serde(borrow)]
    pub id: Option<&'a RawValue>,
    #[serde(borrow)]
    pub items: Option<&'a RawValue>,
    #[serde(borrow)]
    pub amount: Option<&'a RawValue>,
    #[serde(borrow)]
    pub currency: Option<&'a RawValue>,
}

impl<'a> PayloadFields<'a> {
    /// `payload` is a JSON object; of a field given twice nothing is known, so none is.
    pub fn of(payload: &'a RawValue) -> Result<Self, Violation> {
        serde_json::from_str(payload.get())
            .map_err(|_| Violation::new("/payload", "gives id, items, amount or currency twice"))
    }
}

/// What the content comes to, or every reason why that cannot be said. Whether the amount of its own
/// fields can be paid was seen at the door; that of a payload is looked at here.
pub fn worth(content: &Content<'_>, amounts: Amounts) -> Result<Worth, Vec<Violation>> {
    let payload = match content.payload {
        Some(payload) => PayloadFields::of(payload).map_err(|violation| vec![violation])?,
        None => PayloadFields::default(),
    };
    let amount = amount_of(content, &payload);
    let currency = match (content.currency, payload.currency.map(text)) {
        (Some(own), _) => Ok(own.to_owned()),
        (None, None) => Err(Violation::new("/currency", "is missing")),
        (None, Some(None)) => Err(Violation::new("/payload/currency", "must be text")),
        (None, Some(Some(code))) => {
            currency(&code).map(str::to_owned).map_err(|reason| Violation::new("/payload/currency", reason))
        }
    };
    match (amount, currency) {
        (Ok(amount), Ok(currency)) => {
            let is_own = content.items.is_some() || content.amount.is_some();
            if let Some(amount) = amount.filter(|_| !is_own) {
                let field = if payload.items.is_some() { "items" } else { "amount" };
                let unpayable = |reason| vec![Violation::new(format!("/payload/{field}"), reason)];
                amounts.check(amount, &currency).map_err(unpayable)?;
            }
            Ok(Worth { amount, currency })
        }
        (amount, currency) => {
            let mut violations = amount.err().unwrap_or_default();
            violations.extend(currency.err());
            Err(violations)
        }
    }
}

fn amount_of(content: &Content<'_>, payload: &PayloadFields<'_>) -> Result<Option<Money>, Vec<Violation>> {
    let of_items = |raw, pointer, source| {
        let items = parse_items(raw, pointer, source)?;
        let reason = match sum(&items) {
            Ok(total) => return Ok(Some(total)),
            Err(MoneyError::Negative) => "come to less than 0: more is taken off than there is",
            Err(_) => "come to 10^14 or more",
        };
        Err(vec![Violation::new(pointer, reason)])
    };
    if let Some(items) = content.items {
        of_items(items, "/items", Source::Own)
    } else if content.amount.is_some() {
        Ok(content.amount)
    } else if let Some(items) = payload.items {
        of_items(items, "/payload/items", Source::Payload)
    } else if let Some(amount) = payload.amount {
        money(amount).map(Some).map_err(|error| vec![Violation::new("/payload/amount", error.to_string())])
    } else {
        Ok(None)
    }
}

/// Violations in one sentence, for people.
#[must_use]
pub fn sentence(violations: &[Violation]) -> String {
    // A payload may break a rule ten thousand times; a reason is read by a person.
    const SHOWN: usize = 5;
    let mut text = violations.iter().take(SHOWN).map(ToString::to_string).collect::<Vec<_>>().join("; ");
    if violations.len() > SHOWN {
        text.push_str(&format!("; and {} more", violations.len() - SHOWN));
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.to_owned()).unwrap()
    }

    fn worth_of(items: Option<&str>, amount: Option<&str>, payload: Option<&str>) -> Result<Option<Money>, String> {
        let (items, payload) = (items.map(raw), payload.map(raw));
        let content = Content {
            items: items.as_deref(),
            amount: amount.map(|a| Money::parse(a).unwrap()),
            currency: Some("USD"),
            payload: payload.as_deref(),
        };
        worth(&content, Amounts::Payable).map(|worth| worth.amount).map_err(|violations| sentence(&violations))
    }

    #[test]
    fn an_orders_own_fields_count_before_those_of_its_payload() {
        let payload = r#"{"items":[{"product_id":"p","quantity":3,"price":"2.50","seller":"s"}],"amount":1}"#;
        let money = |text| Ok(Some(Money::parse(text).unwrap()));
        let own = r#"[{"product_id":"p","quantity":2,"unit_price":29.99}]"#;
        assert_eq!(worth_of(Some(own), None, Some(payload)), money("59.98"));
        assert_eq!(worth_of(None, Some("7"), Some(payload)), money("7"));
        assert_eq!(worth_of(None, None, Some(payload)), money("7.50"));
        assert_eq!(worth_of(None, None, Some(r#"{"amount":"1.10"}"#)), money("1.10"));
        assert_eq!(worth_of(None, None, Some("{}")), Ok(None));
    }

    #[test]
    fn only_the_form_with_hyphens_is_a_uuid_and_other_text_is_told_as_it_was() {
        let text = "0198f2a0-0000-7000-8000-00000000000a";
        assert_eq!(order_id_of(text).to_string(), text);
        assert_eq!(order_id_of(&text.to_uppercase()), order_id_of(text));
        for other in [text.replace('-', ""), format!("{{{text}}}"), format!("urn:uuid:{text}"), "A-1".to_owned()] {
            let id = order_id_of(&other);
            assert_ne!(id, order_id_of(text));
            assert_eq!(public_id(id, Some(&other)), other);
        }
    }

    #[test]
    fn a_refusal_names_each_place_and_reason() {
        let items = r#"[{"product_id":"","quantity":0,"unit_price":-1},{"quantity":1.5,"a/b":1},7]"#;
        let reasons = worth_of(Some(items), None, None).unwrap_err();
        for part in [
            "/items/0/product_id must have 1",
            "/items/0/quantity must be from 1",
            "/items/0/unit_price must not be neg",
            "/items/1/a~1b is not a field",
            "/items/1/product_id is missing",
            "and 3 more",
        ] {
            assert!(reasons.contains(part), "{part} in {reasons}");
        }
        let most = r#"[{"product_id":"p","quantity":1000000,"unit_price":99999999999999}]"#;
        assert_eq!(worth_of(Some(most), None, None).unwrap_err(), "/items come to 10^14 or more");
    }

    #[test]
    fn a_currency_that_only_the_payload_has_is_checked_here() {
        let payload = raw(r#"{"currency":"XXQ"}"#);
        let content = Content { currency: None, payload: Some(&payload), ..Content::default() };
        assert_eq!(
            sentence(&worth(&content, Amounts::Exact).unwrap_err()),
            "/payload/currency must be an ISO 4217 code such as USD"
        );
        let own = Content { currency: Some("BRL"), ..content };
        assert_eq!(worth(&own, Amounts::Exact).unwrap().currency, "BRL");
    }

    #[test]
    fn a_sum_is_payable_when_it_is_a_multiple_of_its_currencys_smallest_unit() {
        for (amount, currency, is_payable) in [
            ("1234", "JPY", true),
            ("1234.00", "JPY", true),
            ("1234.99", "JPY", false),
            ("1234.5", "KRW", false),
            ("12.34", "USD", true),
            ("12.3400", "USD", true),
            ("12.345", "USD", false),
            ("1.234", "KWD", true),
            ("1.2345", "KWD", false),
            ("1.2345", "CLF", true),
            ("0", "JPY", true),
            ("99999999999999", "ISK", true),
            ("99999999999999.9999", "ISK", false),
            // Gold has no smallest unit, and what we do not know has none that we know.
            ("1.2345", "XAU", true),
            ("1.2345", "QQQ", true),
        ] {
            let amount = Money::parse(amount).unwrap();
            assert_eq!(Amounts::Payable.check(amount, currency).is_ok(), is_payable, "{amount} {currency}");
            assert_eq!(Amounts::Exact.check(amount, currency), Ok(()));
        }
        let reason = Amounts::Payable.check(Money::parse("1.2345").unwrap(), "KWD").unwrap_err();
        assert_eq!(reason, "comes to 1.2345, which cannot be paid in KWD: the smallest unit is 0.001");
    }

    #[test]
    fn only_what_a_payload_comes_to_is_looked_at_by_whoever_computes_it() {
        let payload = |price| format!(r#"{{"items":[{{"product_id":"p","quantity":3,"unit_price":{price}}}]}}"#);
        assert_eq!(
            worth_of(None, None, Some(&payload("0.005"))).unwrap_err(),
            "/payload/items comes to 0.015, which cannot be paid in USD: the smallest unit is 0.01"
        );
        assert!(worth_of(None, None, Some(r#"{"amount":0.001}"#)).unwrap_err().starts_with("/payload/amount comes to"));
        assert!(worth_of(None, None, Some(&payload("0.0100"))).is_ok());
        assert!(worth_of(None, Some("0.001"), Some(&payload("0.005"))).is_ok());
    }

    #[test]
    fn a_quantity_is_a_whole_number_however_it_is_written() {
        let of = |quantity: &str, source| {
            let items = raw(&format!(r#"[{{"product_id":"p","quantity":{quantity},"unit_price":1}}]"#));
            parse_items(&items, "/items", source)
                .map(|items| items.first().map(|item| item.quantity))
                .map_err(|v| sentence(&v))
        };
        for source in [Source::Own, Source::Payload] {
            for (written, quantity) in [
                ("2", 2),
                ("2.0", 2),
                ("2.00", 2),
                ("1e1", 10),
                ("1E+1", 10),
                ("0.1e1", 1),
                ("0.0200e2", 2),
                ("20e-1", 2),
                ("1.000000e6", 1_000_000),
                ("\"2\"", 2),
                ("\"2.0\"", 2),
            ] {
                assert_eq!(of(written, source), Ok(Some(quantity)), "{written}");
            }
            for refused in [
                "2.5",
                "1e-1",
                "-1",
                "1000001",
                "1e7",
                "1e400",
                "1e-400",
                "1e99999999999999999999",
                "\"two\"",
                "\"\"",
                "\" 2\"",
                "\"+2\"",
                "\"02\"",
                "\"0x2\"",
                "true",
                "null",
                "[2]",
                "\"\\u0032\"",
            ] {
                assert!(of(refused, source).is_err_and(|said| said.contains("/items/0/quantity must be")), "{refused}");
            }
            let long = "9".repeat(100_000);
            assert!(of(&long, source).is_err() && of(&format!("0.{long}"), source).is_err());
        }
    }

    #[test]
    fn an_id_that_is_a_whole_number_is_its_digits() {
        let of = |json: &str| id(&raw(json)).map(Cow::into_owned);
        for (json, id) in
            [("7", "7"), ("7.0", "7"), ("1e2", "100"), ("-7.0", "-7"), ("\"7.0\"", "7.0"), ("-0", "0"), ("-0.0", "0")]
        {
            assert_eq!(of(json).as_deref(), Some(id), "{json}");
        }
        for none in ["7.5", "1e-1", "1e300", "true", "null", "{}"] {
            assert_eq!(of(none), None, "{none}");
        }
    }

    #[test]
    fn a_payloads_cancelled_lines_count_nothing_and_its_discounts_are_taken_off() {
        let of = |items: &str| worth_of(None, None, Some(&format!(r#"{{"items":{items}}}"#)));
        let book = r#"{"product_id":"book","quantity":2,"unit_price":"19.99"}"#;
        let coupon = r#"{"product_id":"TEN-OFF","quantity":1,"price":-10}"#;
        let money = |text| Ok(Some(Money::parse(text).unwrap()));
        assert_eq!(of(&format!(r#"[{book},{{"product_id":"pen","quantity":0,"price":"1.25"}}]"#)), money("39.98"));
        assert_eq!(of(&format!(r#"[{book},{{"product_id":"pen","quantity":"0.0"}}]"#)), money("39.98"));
        assert_eq!(of(r#"[{"quantity":0}]"#), money("0"));
        assert_eq!(of(&format!("[{coupon},{book}]")), money("29.98"));
        assert_eq!(of(&format!("[{coupon},{coupon},{book},{coupon}]")), money("9.98"));
        let less = of(&format!("[{coupon}]")).unwrap_err();
        assert_eq!(less, "/payload/items come to less than 0: more is taken off than there is");
        let negative = of(&format!(r#"[{book},{{"product_id":"pen","quantity":-1,"price":1}}]"#)).unwrap_err();
        assert!(negative.contains("/payload/items/1/quantity must be") && negative.contains("cancelled"), "{negative}");
        // At the door both are mistakes.
        let own = worth_of(Some(&format!(r#"[{coupon},{{"product_id":"pen","quantity":0,"price":1}}]"#)), None, None);
        let said = own.unwrap_err();
        assert_eq!(said, "/items/0/unit_price must not be negative; /items/1/quantity must be from 1 to 1000000");
    }

    proptest! {
        #[test]
        fn a_whole_number_is_what_its_digits_say(number: i32, zeros in 0_usize..4, exponent in 0_i32..6) {
            let shifted = format!("{number}{}e-{exponent}", "0".repeat(exponent as usize));
            prop_assert_eq!(whole_number(&shifted).map(Cow::into_owned), Some(number.to_string()));
            let decimals = format!("{number}.0{}", "0".repeat(zeros));
            prop_assert_eq!(whole_number(&decimals).map(Cow::into_owned), Some(number.to_string()));
        }

        #[test]
        fn no_json_panics(json in r#"[\[\]{}",:0-9a-z\\.eE+-]{0,60}"#) {
            if let Ok(raw) = RawValue::from_string(json) {
                let _ = parse_items(&raw, "/items", Source::Payload);
                let content = Content { currency: Some("USD"), payload: Some(&raw), ..Content::default() };
                let _ = worth(&content, Amounts::Payable);
            }
        }
    }
}
