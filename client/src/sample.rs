//! The file of marketplace orders: what is sent of each line, and what the amounts must come to.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, ensure};
use bytes::Bytes;
use rust_decimal::Decimal;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// What the service takes when an order names none (`DEFAULT_CURRENCY`).
const DEFAULT_CURRENCY: &str = "USD";

/// Exact sums, each under its currency.
pub type Sums = BTreeMap<String, Decimal>;

pub struct SampleOrder {
    /// Where it stands in the file, from 1.
    pub line: usize,
    pub currency: String,
    /// Σ unit price × quantity, or the line's own amount where it has no items.
    pub amount: Decimal,
    /// The whole request. The line is its payload, byte for byte.
    pub body: Bytes,
}

/// Every order of the file, or an error that names the first bad line: nothing is sent of a file
/// that is not good throughout.
pub fn read(path: &Path) -> anyhow::Result<Vec<SampleOrder>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let orders = parse(unmarked(&text)).with_context(|| path.display().to_string())?;
    ensure!(!orders.is_empty(), "{} holds no order", path.display());
    Ok(orders)
}

/// A file without the byte order mark that some editors begin it with.
#[must_use]
pub fn unmarked(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

pub fn sums<'a>(amounts: impl IntoIterator<Item = (&'a str, Decimal)>) -> Sums {
    let mut sums = Sums::new();
    for (currency, amount) in amounts {
        *sums.entry(currency.to_owned()).or_default() += amount;
    }
    sums
}

#[derive(Deserialize)]
struct Line<'a> {
    /// Required, since it is what makes sending a line twice harmless.
    #[serde(borrow)]
    id: &'a RawValue,
    #[serde(borrow)]
    customer_id: &'a RawValue,
    currency: Option<String>,
    #[serde(borrow)]
    amount: Option<&'a RawValue>,
    #[serde(borrow, default)]
    items: Vec<Item<'a>>,
}

#[derive(Deserialize)]
struct Item<'a> {
    #[serde(borrow)]
    quantity: &'a RawValue,
    #[serde(borrow, alias = "price")]
    unit_price: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct Request<'a> {
    user_id: &'a str,
    payload: &'a RawValue,
}

/// What is sent of one order of a file: the line itself, or, where it is a marketplace's own order
/// (it names a `customer_id` and no `user_id`), that as the payload of an order of that customer's.
/// What makes no sense is the service's to refuse.
#[must_use]
pub fn request(line: &str) -> Cow<'_, str> {
    #[derive(Deserialize)]
    struct Customers<'a> {
        user_id: Option<IgnoredAny>,
        order_id: Option<IgnoredAny>,
        #[serde(borrow)]
        customer_id: Option<&'a RawValue>,
    }
    let request = match serde_json::from_str(line) {
        Ok(Customers { user_id: None, order_id: None, customer_id: Some(customer) }) => {
            let payload = serde_json::from_str(line).ok();
            payload.zip(text_of(customer).ok()).and_then(|(payload, user_id): (&RawValue, String)| {
                serde_json::to_string(&Request { user_id: &user_id, payload }).ok()
            })
        }
        _ => None,
    };
    request.map_or(Cow::Borrowed(line), Cow::Owned)
}

fn parse(text: &str) -> anyhow::Result<Vec<SampleOrder>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| {
            order(index + 1, line.trim()).with_context(|| format!("line {} is not an order", index + 1))
        })
        .collect()
}

fn order(number: usize, line: &str) -> anyhow::Result<SampleOrder> {
    let fields: Line<'_> = serde_json::from_str(line).map_err(plainly)?;
    ensure!(!text_of(fields.id)?.is_empty(), "its id is empty");
    let user_id = text_of(fields.customer_id)?;
    ensure!(!user_id.is_empty(), "its customer_id is empty");

    let mut amount = Decimal::ZERO;
    for item in &fields.items {
        let quantity = decimal(item.quantity)?;
        // Such a line was cancelled, and counts nothing.
        if quantity.is_zero() {
            continue;
        }
        let line_total = decimal(item.unit_price.context("missing field `unit_price`")?)?.checked_mul(quantity);
        amount = line_total.and_then(|total| amount.checked_add(total)).context("its amount is too large")?;
    }
    if let (true, Some(own)) = (fields.items.is_empty(), fields.amount) {
        amount = decimal(own)?;
    }

    let payload: &RawValue = serde_json::from_str(line)?;
    let body = serde_json::to_vec(&Request { user_id: &user_id, payload })?;
    Ok(SampleOrder {
        line: number,
        currency: fields.currency.unwrap_or_else(|| DEFAULT_CURRENCY.to_owned()),
        amount,
        body: body.into(),
    })
}

/// A JSON number or string, exactly: a float in between would not return the digits given.
pub fn decimal(value: &RawValue) -> anyhow::Result<Decimal> {
    let text = text_of(value)?;
    let parsed = text.parse::<Decimal>().or_else(|_| Decimal::from_scientific(&text));
    parsed.with_context(|| format!("{} is not an amount", value.get()))
}

/// Ids and amounts come as a JSON string or as a number.
fn text_of(value: &RawValue) -> anyhow::Result<String> {
    let json = value.get();
    if json.starts_with('"') {
        return Ok(serde_json::from_str(json)?);
    }
    ensure!(
        json.starts_with(|first: char| first == '-' || first.is_ascii_digit()),
        "{json} is neither text nor a number"
    );
    Ok(json.to_owned())
}

/// Every line is one line to its parser, so "at line 1" would point to the wrong place.
fn plainly(error: serde_json::Error) -> anyhow::Error {
    let message = error.to_string();
    match message.rsplit_once(" at line ") {
        Some((what, _)) => anyhow::anyhow!("{what} (column {})", error.column()),
        None => anyhow::anyhow!(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"id":"a1","customer_id":"c1","currency":"BRL","items":[{"quantity":3,"unit_price":"0.10","freight":"9.00"},{"quantity":1,"unit_price":20.05}]}"#;

    #[test]
    fn amounts_are_exact_and_freight_is_not_counted() {
        let orders =
            parse(&format!("{GOOD}\n\n{}\n", r#"{"id":7,"customer_id":8,"amount":"1.5"}"#)).expect("good lines");
        let amounts: Vec<_> = orders.iter().map(|o| (o.line, o.currency.as_str(), o.amount.to_string())).collect();
        assert_eq!(amounts, [(1, "BRL", "20.35".to_owned()), (3, "USD", "1.5".to_owned())]);
    }

    #[test]
    fn lines_count_as_the_service_counts_them() {
        let items = r#"[{"quantity":2.0,"price":"19.99"},{"quantity":"1e0","price":-10},{"quantity":0}]"#;
        let text = format!("\u{feff}{{\"id\":1,\"customer_id\":2,\"items\":{items}}}\n");
        let orders = parse(unmarked(&text)).expect("a good line");
        assert_eq!(orders[0].amount.normalize().to_string(), "29.98");
        assert!(!orders[0].body.starts_with("\u{feff}".as_bytes()));
    }

    #[test]
    fn the_line_is_sent_as_the_payload_byte_for_byte() {
        let orders = parse(GOOD).expect("a good line");
        assert_eq!(orders[0].body, format!(r#"{{"user_id":"c1","payload":{GOOD}}}"#));
    }

    #[test]
    fn a_marketplaces_own_order_becomes_a_payload_and_all_else_is_sent_as_it_is() {
        assert_eq!(request(GOOD), format!(r#"{{"user_id":"c1","payload":{GOOD}}}"#));
        for line in [r#"{"user_id":"u","customer_id":"c"}"#, r#"{"customer_id":null}"#, "{", "", "[1]"] {
            assert_eq!(request(line), line);
        }
    }

    #[test]
    fn a_bad_line_is_named_by_its_number() {
        let bad = [
            ("{", "EOF"),
            (r#"{"customer_id":"c"}"#, "missing field `id`"),
            (r#"{"id":"a","customer_id":null}"#, "neither text nor a number"),
            (r#"{"id":"a","customer_id":"c","items":[{"quantity":1,"unit_price":"x"}]}"#, "not an amount"),
            (r#"{"id":"a","customer_id":"c","items":[{"quantity":"x","unit_price":"1"}]}"#, "not an amount"),
            (r#"{"id":"a","customer_id":"c","items":[{"quantity":1}]}"#, "missing field `unit_price`"),
            (r#"{"id":"a","customer_id":""}"#, "customer_id is empty"),
        ];
        for (line, says) in bad {
            let error = format!("{:#}", parse(&format!("{GOOD}\n{line}\n")).err().expect(line));
            assert!(error.contains("line 2") && error.contains(says), "{line} gave: {error}");
        }
    }

    #[test]
    fn the_projects_own_demo_orders_are_good() {
        let orders = read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/demo-orders.ndjson"))).expect("the file");
        let sums = sums(orders.iter().map(|order| (order.currency.as_str(), order.amount)));
        assert!(orders.len() >= 10 && sums.len() > 1 && sums.values().all(|sum| *sum > Decimal::ZERO));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read(Path::new("no-such-file.ndjson")).err().expect("an error");
        assert!(format!("{error:#}").contains("no-such-file.ndjson"));
    }
}
