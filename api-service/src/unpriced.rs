//! Orders whose items say no price: found, checked as far as they can be, and priced.

use serde::{Deserialize, Deserializer, de::IgnoredAny};
use serde_json::value::{RawValue, to_raw_value};
use shared::{
    money::Money,
    order::{self, MAX_ID, Violation},
};

use crate::{
    body::Body,
    error::Problem,
    identity::Caller,
    prices::Prices,
    request::{self, BadRequest, Defaults, Upsert},
};

/// As [`request::parse`], with prices looked up for items that have none.
pub(crate) async fn parse(
    body: &[u8],
    caller: &Caller,
    defaults: &Defaults,
    prices: Option<&Prices>,
) -> Result<Upsert, Problem> {
    let Some(unpriced) = Unpriced::of(body) else { return Ok(request::parse(body, caller, defaults)?) };
    // All else first: nobody is asked for the prices of an order that is refused in any case.
    let free = unpriced.with(|_| Some(Money::ZERO));
    match request::parse_with_items(body, Some(&free), caller, defaults) {
        Ok(_) => {}
        Err(BadRequest::Invalid(mut violations)) => {
            // Of what it comes to nothing is known yet.
            violations.retain(|violation| violation.pointer != "/amount");
            if !violations.is_empty() {
                return Err(Problem::Invalid(violations));
            }
        }
        Err(error) => return Err(error.into()),
    }
    let Some(prices) = prices else {
        let reason = "is missing: give it, or have PRODUCT_SERVICE_URL set so that prices can be looked up";
        let missing = unpriced.missing.iter();
        let violations = missing.map(|(index, _)| Violation::new(format!("/items/{index}/unit_price"), reason));
        return Err(Problem::Invalid(violations.collect()));
    };
    let found = prices.of(&unpriced.missing).await?;
    let items = unpriced.with(|product_id| found.get(product_id).copied());
    Ok(request::parse_with_items(body, Some(&items), caller, defaults)?)
}

/// Items some of which have no price.
struct Unpriced<'a> {
    items: Vec<&'a RawValue>,
    /// Which, and of what product.
    missing: Vec<(usize, String)>,
}

#[derive(Deserialize)]
struct Item<'a> {
    #[serde(borrow)]
    product_id: &'a RawValue,
    #[serde(default, deserialize_with = "present")]
    unit_price: bool,
    #[serde(default, deserialize_with = "present")]
    price: bool,
}

/// Whatever it is, `null` too, it is there.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| true)
}

impl<'a> Unpriced<'a> {
    /// `None` where no item lacks just its price; what else is wrong is for others to say.
    fn of(body: &'a [u8]) -> Option<Self> {
        let body: Body<'a> = serde_json::from_slice(body).ok()?;
        let items: Vec<&RawValue> = serde_json::from_str(body.get("items")?.get()).ok()?;
        let product_of = |raw: &RawValue| {
            let item: Item<'_> = serde_json::from_str(raw.get()).ok()?;
            let product_id = order::id(item.product_id).filter(|_| !item.unit_price && !item.price)?;
            let is_one = (1..=MAX_ID).contains(&product_id.chars().count()) && !product_id.contains('\0');
            is_one.then(|| product_id.into_owned())
        };
        let missing = items.iter().enumerate().filter_map(|(index, raw)| Some((index, product_of(raw)?)));
        let missing: Vec<_> = missing.collect();
        (!missing.is_empty()).then_some(Self { items, missing })
    }

    /// The items, those that lacked one with a price.
    fn with(&self, price: impl Fn(&str) -> Option<Money>) -> Box<RawValue> {
        let mut items: Vec<_> = self.items.iter().map(|raw| (*raw).to_owned()).collect();
        for (index, product_id) in &self.missing {
            let Some(price) = price(product_id) else { continue };
            // As text, so that nothing of what was sent gets lost before it is checked; it is an
            // object with a field.
            let rest = items[*index].get().trim_start_matches('{');
            if let Ok(item) = RawValue::from_string(format!("{{\"unit_price\":{price},{rest}")) {
                items[*index] = item;
            }
        }
        to_raw_value(&items).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn priced(items: &str) -> Option<String> {
        let body = format!(r#"{{"order_items":{items}}}"#);
        let unpriced = Unpriced::of(body.as_bytes())?;
        Some(unpriced.with(|_| Money::parse("29.90").ok()).get().to_owned())
    }

    #[test]
    fn only_items_that_lack_their_price_are_given_one() {
        assert_eq!(
            priced(r#"[ {"product_id":"p","quantity":2},{ "product_id":7, "price":1 }]"#).as_deref(),
            Some(r#"[{"unit_price":29.90,"product_id":"p","quantity":2},{ "product_id":7, "price":1 }]"#)
        );
        for others in [
            "[]",
            "{}",
            "7",
            r#"[{"product_id":"p","unit_price":1}]"#,
            r#"[{"product_id":"p","price":null}]"#,
            r#"[{"product_id":""}]"#,
            r#"[{"product_id":"\u0000"}]"#,
            r#"[{"product_id":[]}]"#,
            r#"[{"quantity":1}]"#,
            r#"[{"product_id":"p","product_id":"q"}]"#,
        ] {
            assert_eq!(priced(others), None, "{others}");
        }
    }

    #[tokio::test]
    async fn a_price_that_nobody_can_look_up_names_both_remedies() {
        let lifecycles = shared::lifecycle::Lifecycles::embedded().unwrap();
        let defaults =
            Defaults { lifecycles, lifecycle: lifecycles.find("retail").unwrap(), currency: "USD".to_owned() };
        let parse = async |body: &str| match parse(body.as_bytes(), &Caller::known_as(None), &defaults, None).await {
            Err(Problem::Invalid(violations)) => order::sentence(&violations),
            other => panic!("{body}: {other:?}"),
        };
        let said = parse(r#"{"user_id":"u","order_items":[{"product_id":"p","quantity":1}]}"#).await;
        assert!(said.contains("/items/0/unit_price") && said.contains("PRODUCT_SERVICE_URL"), "{said}");
        // What is wrong in any case is said first.
        let said = parse(r#"{"user_id":"u","order_items":[{"product_id":"p","quantity":0}]}"#).await;
        assert_eq!(said, "/items/0/quantity must be from 1 to 1000000");
    }

    #[test]
    fn a_repeat_with_other_prices_is_the_same_order() {
        let lifecycles = shared::lifecycle::Lifecycles::embedded().unwrap();
        let defaults =
            Defaults { lifecycles, lifecycle: lifecycles.find("retail").unwrap(), currency: "USD".to_owned() };
        let fingerprint = |items: &str, price: &str| {
            let body = format!(r#"{{"user_id":"u","items":{items}}}"#);
            let unpriced = Unpriced::of(body.as_bytes()).unwrap();
            let items = unpriced.with(|_| Money::parse(price).ok());
            match request::parse_with_items(body.as_bytes(), Some(&items), &Caller::known_as(None), &defaults) {
                Ok(Upsert::Create(order)) => order.fingerprint,
                other => panic!("{other:?}"),
            }
        };
        let first = fingerprint(r#"[{"product_id":"p","quantity":1}]"#, "1.00");
        assert_eq!(first, fingerprint(r#"[{"quantity":1, "product_id":"p"}]"#, "2.00"));
        assert_ne!(first, fingerprint(r#"[{"product_id":"p","quantity":2}]"#, "1.00"));
    }

    proptest! {
        #[test]
        fn no_items_panic(items in r#"(\{|\[|"product_id":|"price":|"x"|,|:|[0-9]|\}|\]){0,40}"#) {
            let _ = priced(&items);
        }
    }
}
