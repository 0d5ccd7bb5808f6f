//! An answer as it was heard. Our own worker's is whole. Somebody else's may lack what its worker does not
//! know, and may be of another order.

use std::{borrow::Cow, collections::HashMap};

use serde::{
    Deserialize,
    de::{IntoDeserializer, value},
};
use serde_json::value::RawValue;
use shared::{
    lifecycle::file::is_name,
    message::{AckStatus, Answer, is_object, unmarked},
    money::Money,
    order::{Amounts, currency, id, money, order_id_of, text, unquoted, whole_number},
    parked::short,
};
use uuid::Uuid;

use crate::change::State;

/// The request that an answer is awaited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub correlation_id: Uuid,
    pub order_id: Uuid,
    pub event_id: Uuid,
    pub version: i64,
}

/// An answer: which request it says that it answers, and what it tells.
#[derive(Debug)]
pub(crate) struct Heard {
    pub correlation_id: Option<Uuid>,
    order_id: Option<Uuid>,
    event_id: Option<Uuid>,
    version: Option<i64>,
    pub told: Told,
}

#[derive(Debug)]
pub(crate) enum Told {
    Whole(Answer),
    /// Something is missing.
    Part(Box<Part>),
    /// It has no status that we know.
    Nothing,
}

#[derive(Debug)]
pub(crate) struct Part {
    pub status: AckStatus,
    order_status: Option<String>,
    pub order_version: Option<i64>,
    amount: Option<Money>,
    currency: Option<String>,
    error: Option<String>,
    superseded_by: Option<i64>,
}

/// A body as our own worker sends it.
#[derive(Deserialize)]
struct Whole {
    correlation_id: Uuid,
    event_id: Uuid,
    order_id: Uuid,
    version: i64,
    status: AckStatus,
    order_status: String,
    order_version: i64,
    // Null is an answer, too; absent is not.
    #[serde(deserialize_with = "Option::deserialize")]
    amount: Option<Money>,
    #[serde(deserialize_with = "Option::deserialize")]
    currency: Option<String>,
    error: Option<String>,
    superseded_by: Option<i64>,
}

/// A correlation id as it comes back to us: the bytes that we sent, or their text.
pub(crate) fn correlation_id(header: &[u8]) -> Option<Uuid> {
    Uuid::from_slice(header).ok().or_else(|| Uuid::try_parse_ascii(header.trim_ascii()).ok())
}

impl Heard {
    pub(crate) fn read(body: Option<&[u8]>) -> Self {
        let body = body.unwrap_or_default();
        let whole = serde_json::from_slice::<Whole>(body).ok();
        let whole = whole.filter(|whole| is_object(body) && is_name(&whole.order_status));
        let Some(whole) = whole else { return Self::read_foreign(body) };
        let Whole { correlation_id, event_id, order_id, version, .. } = whole;
        Self {
            correlation_id: Some(correlation_id),
            order_id: Some(order_id),
            event_id: Some(event_id),
            version: Some(version),
            told: Told::Whole(Answer {
                status: whole.status,
                order_status: whole.order_status,
                order_version: whole.order_version,
                amount: whole.amount,
                currency: whole.currency,
                error: whole.error,
                superseded_by: whole.superseded_by,
            }),
        }
    }

    /// Field by field. What is told in a form that is of no use counts as missing; an id or a version in
    /// such a form is there, and is not ours.
    fn read_foreign(body: &[u8]) -> Self {
        let fields: HashMap<String, &RawValue> = serde_json::from_slice(unmarked(body)).unwrap_or_default();
        let there = |name: &str| {
            let value = fields.get(name).or_else(|| fields.get(&camel_case(name))).copied();
            value.filter(|value| !matches!(value.get(), "null" | "\"\""))
        };
        let ours = |value| text(value).and_then(|text| Uuid::try_parse(text.trim()).ok());
        let order = |value| ours(value).or_else(|| Some(order_id_of(&id(value)?)));
        let told = there("status").and_then(status).map_or(Told::Nothing, |status| {
            Told::Part(Box::new(Part {
                status,
                order_status: there("order_status").and_then(text).map(Cow::into_owned).filter(|text| is_name(text)),
                order_version: there("order_version").and_then(number),
                amount: there("amount").and_then(|value| money(value).ok()),
                currency: there("currency").and_then(text).filter(|code| currency(code).is_ok()).map(Cow::into_owned),
                error: there("error").and_then(text).map(|text| short(&text)),
                superseded_by: there("superseded_by").and_then(number),
            }))
        });
        Self {
            correlation_id: there("correlation_id").map(|value| ours(value).unwrap_or_default()),
            order_id: there("order_id").map(|value| order(value).unwrap_or_default()),
            event_id: there("event_id").map(|value| ours(value).unwrap_or_default()),
            version: there("version").map(|value| number(value).unwrap_or_default()),
            told,
        }
    }

    /// The field by which it answers another request than this, if one does.
    pub(crate) fn mistake(&self, asked: &Asked) -> Option<&'static str> {
        let is_other = |said: Option<Uuid>, own: Uuid| said.is_some_and(|said| said != own);
        let (order_version, superseded_by) = self.versions();
        let mistakes = [
            ("correlation_id", is_other(self.correlation_id, asked.correlation_id)),
            ("order_id", is_other(self.order_id, asked.order_id)),
            ("event_id", is_other(self.event_id, asked.event_id)),
            ("version", self.version.is_some_and(|said| said != asked.version)),
            // The order as it was before this change.
            ("order_version", order_version.is_some_and(|said| said < asked.version)),
            ("superseded_by", superseded_by.is_some_and(|said| said <= asked.version)),
        ];
        mistakes.into_iter().find(|(_, is_one)| *is_one).map(|(field, _)| field)
    }

    /// Does the answer tell of a version that an order at this one has not come to? A worker that handles one
    /// event makes one more at most.
    pub(crate) fn is_ahead_of(&self, version: i64) -> bool {
        let (order_version, superseded_by) = self.versions();
        [order_version, superseded_by].into_iter().flatten().any(|said| said > version.saturating_add(1))
    }

    /// The order's versions, as the answer tells them: `order_version` and `superseded_by`.
    fn versions(&self) -> (Option<i64>, Option<i64>) {
        match &self.told {
            Told::Whole(answer) => (Some(answer.order_version), answer.superseded_by),
            Told::Part(part) => (part.order_version, part.superseded_by),
            Told::Nothing => (None, None),
        }
    }
}

impl Part {
    /// With what is missing, from the order. An amount that cannot be paid in the order's currency is missing.
    pub(crate) fn filled_in(self, order: State) -> Answer {
        let is_payable = |amount: &Money| match (&self.currency, &order.currency) {
            (Some(told), Some(own)) if told != own => false,
            (_, Some(own)) => Amounts::Payable.check(*amount, own).is_ok(),
            (_, None) => true,
        };
        Answer {
            status: self.status,
            order_status: self.order_status.unwrap_or(order.status),
            order_version: self.order_version.unwrap_or(order.version),
            amount: self.amount.filter(is_payable).or(order.amount),
            currency: order.currency.or(self.currency),
            error: self.error,
            superseded_by: self.superseded_by,
        }
    }
}

/// One of the four words, however it is spelled.
fn status(value: &RawValue) -> Option<AckStatus> {
    let word = text(value)?.trim().to_ascii_lowercase();
    AckStatus::deserialize(IntoDeserializer::<value::Error>::into_deserializer(word)).ok()
}

/// A number without a fraction, or the text of one.
fn number(value: &RawValue) -> Option<i64> {
    whole_number(unquoted(value))?.parse().ok().filter(|number| *number >= 0)
}

/// `order_version` is `orderVersion` to others.
fn camel_case(name: &str) -> String {
    let mut words = name.split('_');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |said, word| said + &word[..1].to_ascii_uppercase() + &word[1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    const CORRELATION: &str = "0198f2a0-0000-7000-8000-00000000000c";
    const EVENT: &str = "0198f2a0-0000-7000-8000-00000000000e";
    const ORDER: &str = "0198f2a0-0000-7000-8000-00000000000a";

    fn asked() -> Asked {
        let [correlation_id, order_id, event_id] = [CORRELATION, ORDER, EVENT].map(|id| id.parse().unwrap());
        Asked { correlation_id, order_id, event_id, version: 3 }
    }

    fn whole() -> String {
        format!(
            r#"{{"correlation_id":"{CORRELATION}","event_id":"{EVENT}","order_id":"{ORDER}","version":3,
            "status":"processed","order_status":"done","order_version":4,"amount":59.980,"currency":null,
            "processed_at":"2026-01-02T03:04:05Z"}}"#
        )
    }

    fn heard(body: &str) -> Heard {
        Heard::read(Some(body.as_bytes()))
    }

    fn mistake(body: &str) -> Option<&'static str> {
        heard(body).mistake(&asked())
    }

    /// What is told where the order itself is "new" at version 3.
    fn answer(body: &str) -> Option<Answer> {
        let amount = Money::parse("7.5").ok();
        match heard(body).told {
            Told::Whole(answer) => Some(answer),
            Told::Part(part) => {
                Some(part.filled_in(State { status: "new".into(), version: 3, amount, currency: Some("EUR".into()) }))
            }
            Told::Nothing => None,
        }
    }

    #[test]
    fn what_our_own_worker_sends_is_whole_though_the_order_has_no_amount() {
        for body in [whole(), whole().replace("59.980", "null")] {
            assert!(matches!(heard(&body).told, Told::Whole(_)), "{body}");
            assert_eq!(mistake(&body), None);
        }
        assert_eq!(answer(&whole()).unwrap().amount.unwrap().to_string(), "59.980");
    }

    #[test]
    fn what_is_missing_comes_from_the_order_and_what_is_there_stands() {
        for (body, status, version, amount, currency) in [
            (r#"{"status":"processed"}"#.to_owned(), "new", 3, "7.5", "EUR"),
            (whole().replace(r#""order_version":4,"#, ""), "done", 3, "59.980", "EUR"),
            (whole().replace(r#""order_status":"done","#, ""), "new", 4, "59.980", "EUR"),
            (whole().replace(r#""amount":59.980,"#, ""), "done", 4, "7.5", "EUR"),
            (
                whole().replace(r#""done""#, r#""""#).replace("null", r#""BRL""#).replace("59.980", "-1"),
                "new",
                4,
                "7.5",
                "EUR",
            ),
            (whole().replace("4,", r#""4","#).replace("59.980", r#""59.98""#), "done", 4, "59.98", "EUR"),
            (whole().replace("4,", "4.0,"), "done", 4, "59.980", "EUR"),
            (whole().replace("4,", r#""4","#).replace("null", r#""JPY""#), "done", 4, "7.5", "EUR"),
            (whole().replace("4,", r#""4","#).replace("59.980", "1.234"), "done", 4, "7.5", "EUR"),
            (whole().replace("done", "<b>done\\n"), "new", 4, "59.980", "EUR"),
            (whole().replace("order_status", "orderStatus").replace("order_v", "orderV"), "done", 4, "59.980", "EUR"),
            (whole().replace("4,", r#""soon","#), "done", 3, "59.980", "EUR"),
            (whole().replace("done", &"x".repeat(256)), "new", 4, "59.980", "EUR"),
        ] {
            assert_eq!(mistake(&body), None, "{body}");
            let told = answer(&body).unwrap();
            let money = (told.amount.unwrap().to_string(), told.currency.unwrap());
            assert_eq!((told.order_status.as_str(), told.order_version), (status, version), "{body}");
            assert_eq!(money, (amount.to_owned(), currency.to_owned()), "{body}");
        }
    }

    #[test]
    fn an_id_is_ours_in_any_of_its_forms() {
        let simple = ORDER.replace('-', "");
        for form in [ORDER.to_uppercase(), format!("{{{ORDER}}}"), format!("urn:uuid:{ORDER}"), simple] {
            assert_eq!(mistake(&format!(r#"{{"order_id":"{form}","status":"PROCESSED"}}"#)), None, "{form}");
        }
        // An order that others know by a text of their own.
        let asked = Asked { order_id: order_id_of("A-1"), ..asked() };
        assert_eq!(heard(r#"{"order_id":"A-1","status":"processed"}"#).mistake(&asked), None);
        for header in [CORRELATION.to_owned(), CORRELATION.to_uppercase(), CORRELATION.replace('-', "")] {
            assert_eq!(correlation_id(header.as_bytes()), Some(asked.correlation_id));
        }
        assert_eq!(correlation_id(asked.correlation_id.as_bytes()), Some(asked.correlation_id));
        assert_eq!(correlation_id(b"short"), None);
    }

    #[test]
    fn what_is_of_another_request_is_named() {
        let other = "0198f2a0-0000-7000-8000-0000000000ff";
        for (body, field) in [
            (whole().replace(CORRELATION, other), "correlation_id"),
            (whole().replace(ORDER, other), "order_id"),
            (whole().replace(EVENT, other), "event_id"),
            (whole().replace(r#""version":3"#, r#""version":2"#), "version"),
            (whole().replace(r#""order_version":4"#, r#""order_version":2"#), "order_version"),
            (whole().replace(r#""currency""#, r#""superseded_by":3,"currency""#), "superseded_by"),
            (r#"{"order_id":"17","status":"processed"}"#.to_owned(), "order_id"),
            (r#"{"order_id":{},"status":"processed"}"#.to_owned(), "order_id"),
            (r#"{"event_id":"x","status":"processed"}"#.to_owned(), "event_id"),
            (r#"{"version":0,"status":"processed"}"#.to_owned(), "version"),
            (r#"{"version":"three","status":"processed"}"#.to_owned(), "version"),
            (r#"{"order_id":"17"}"#.to_owned(), "order_id"),
            (r#"{"orderId":"17","status":"processed"}"#.to_owned(), "order_id"),
        ] {
            assert_eq!(mistake(&body), Some(field), "{body}");
        }
    }

    #[test]
    fn what_has_no_status_that_we_know_is_no_answer() {
        let list = format!(r#"["{CORRELATION}","{EVENT}","{ORDER}",3,"processed","done",4,1.5,"EUR",null,null]"#);
        for body in [&list, "", "garbage", "[]", "null", "{}", r#"{"status":"exploded"}"#, r#"{"status":7}"#, "[[[[[["]
        {
            assert_eq!(answer(body), None, "{body}");
            assert_eq!(mistake(body), None, "{body}");
        }
        assert!(matches!(Heard::read(None).told, Told::Nothing));
        assert!(matches!(Heard::read(Some(b"{\"status\":\"\xff\"}")).told, Told::Nothing));
        for body in ["\u{feff}{\"status\":\" Updated \"}", r#"{"status":"processed","status":"updated"}"#] {
            assert_eq!(answer(body).unwrap().status, AckStatus::Updated, "{body}");
        }
    }
}
