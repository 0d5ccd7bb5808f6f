//! What goes over Kafka: events to `orders.events`, answers to `orders.ack`, and their headers.

use std::{borrow::Cow, collections::BTreeMap, panic::AssertUnwindSafe};

use rdkafka::message::{BorrowedHeaders, Header, Headers as _, OwnedHeaders};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::money::Money;

/// A body without the byte order mark that some writers begin it with. JSON has none; who reads it may pass
/// one over (RFC 8259, section 8.1).
#[must_use]
pub fn unmarked(body: &[u8]) -> &[u8] {
    body.strip_prefix("\u{feff}".as_bytes()).unwrap_or(body)
}

/// Would this be a JSON object, and not a list of what belongs in one? Serde takes either.
#[must_use]
pub fn is_object(body: &[u8]) -> bool {
    body.trim_ascii_start().starts_with(b"{")
}

/// What a client did to an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventType {
    #[serde(rename = "order.created")]
    Created,
    #[serde(rename = "order.updated")]
    Updated,
    #[serde(rename = "order.deleted")]
    Deleted,
    #[serde(rename = "order.status_changed")]
    StatusChanged,
}

impl EventType {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Created => "order.created",
            Self::Updated => "order.updated",
            Self::Deleted => "order.deleted",
            Self::StatusChanged => "order.status_changed",
        }
    }
}

/// A body on `orders.events`: the order as this change left it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(expecting = "an object")]
pub struct Event<'a> {
    pub event_id: Uuid,
    #[serde(rename = "type")]
    pub kind: EventType,
    pub order_id: Uuid,
    #[serde(borrow)]
    pub external_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub user_id: Cow<'a, str>,
    #[serde(borrow)]
    pub lifecycle: Cow<'a, str>,
    #[serde(borrow)]
    pub status: Cow<'a, str>,
    pub version: i64,
    pub amount: Option<Money>,
    #[serde(borrow)]
    pub currency: Option<Cow<'a, str>>,
    /// The order's own items; those of a payload stay in `payload`.
    #[serde(borrow)]
    pub items: Option<&'a RawValue>,
    #[serde(borrow)]
    pub payload: Option<&'a RawValue>,
    pub correlation_id: Uuid,
    #[serde(with = "time::serde::rfc3339")]
    pub timestamp: OffsetDateTime,
}

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AckStatus {
    /// A create or update was handled.
    Processed,
    /// A delete or a change of status was noted.
    Updated,
    /// The content was refused for good.
    Rejected,
    /// Set aside to be tried again; nobody knows when.
    Failed,
}

/// The worker's answer to one event: kept in the history, told again on redelivery.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    pub status: AckStatus,
    pub order_status: String,
    pub order_version: i64,
    pub amount: Option<Money>,
    pub currency: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The later change of content, or delete, that made this one's content moot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub superseded_by: Option<i64>,
}

/// A body on `orders.ack`. Read back as an [`Answer`]: who is meant, the headers say.
#[derive(Debug, Serialize)]
pub struct Ack {
    pub correlation_id: Uuid,
    pub event_id: Uuid,
    pub order_id: Uuid,
    /// The version of the change that is answered.
    pub version: i64,
    #[serde(flatten)]
    pub answer: Answer,
    #[serde(with = "time::serde::rfc3339")]
    pub processed_at: OffsetDateTime,
}

/// Header names that Spring's `ReplyingKafkaTemplate` uses, so that either side can be Spring.
pub const CORRELATION_ID: &str = "kafka_correlationId";
pub const REPLY_TOPIC: &str = "kafka_replyTopic";
pub const REPLY_PARTITION: &str = "kafka_replyPartition";

/// W3C Trace Context, passed on unchanged from the request to the event and its answer.
pub const TRACE_HEADERS: [&str; 2] = ["traceparent", "tracestate"];

/// A record's headers in the order they are sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(Cow<'static, str>, Vec<u8>)>);

/// Where an answer is awaited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// 16 bytes of a UUID from us; a foreign caller's may be anything and comes back as it was.
    pub correlation: Vec<u8>,
    pub topic: String,
    /// A foreign caller need not name one; then the key decides.
    pub partition: Option<i32>,
}

impl Headers {
    pub const NONE: Self = Self(Vec::new());

    /// CloudEvents 1.0, Kafka binding, binary mode.
    #[must_use]
    pub fn cloud_event(id: Uuid, kind: &str, source: &str, at: OffsetDateTime) -> Self {
        let at = at.format(&time::format_description::well_known::Rfc3339).unwrap_or_default();
        let mut headers = Self(Vec::with_capacity(9));
        headers.push("ce_specversion", "1.0");
        headers.push("ce_id", id.hyphenated().to_string());
        headers.push("ce_type", kind);
        headers.push("ce_source", source);
        headers.push("ce_time", at);
        headers.push("content-type", "application/json");
        headers
    }

    pub fn push(&mut self, name: impl Into<Cow<'static, str>>, value: impl Into<Vec<u8>>) {
        self.0.push((name.into(), value.into()));
    }

    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_slice())
    }

    pub fn push_reply_to(&mut self, reply: &ReplyTo) {
        self.push(CORRELATION_ID, reply.correlation.clone());
        self.push(REPLY_TOPIC, reply.topic.clone());
        if let Some(partition) = reply.partition {
            self.push(REPLY_PARTITION, partition.to_be_bytes());
        }
    }

    /// `None` where nobody waits, or where the names do not say where.
    #[must_use]
    pub fn reply_to(&self) -> Option<ReplyTo> {
        let topic = std::str::from_utf8(self.get(REPLY_TOPIC)?).ok()?;
        let partition = match self.get(REPLY_PARTITION) {
            Some(bytes) => Some(i32::from_be_bytes(bytes.try_into().ok()?)),
            None => None,
        };
        let correlation = self.get(CORRELATION_ID)?.to_vec();
        (partition.is_none_or(|partition| partition >= 0) && !topic.is_empty()).then(|| ReplyTo {
            correlation,
            topic: topic.to_owned(),
            partition,
        })
    }

    /// The trace context in these headers, to be passed on.
    pub fn trace(&self) -> impl Iterator<Item = (&'static str, &[u8])> {
        TRACE_HEADERS.into_iter().filter_map(|name| Some((name, self.get(name)?)))
    }

    /// What `read` makes of the first header of this name, without a copy of the others.
    pub fn find<T>(headers: Option<&BorrowedHeaders>, name: &str, read: impl FnOnce(&[u8]) -> Option<T>) -> Option<T> {
        // As in `of_record`.
        std::panic::catch_unwind(AssertUnwindSafe(|| read(headers?.iter().find(|header| header.key == name)?.value?)))
            .ok()
            .flatten()
    }

    /// `None` where a name is no text; Kafka itself takes any bytes.
    #[must_use]
    pub fn of_record(headers: Option<&BorrowedHeaders>) -> Option<Self> {
        // rdkafka unwraps the name's UTF-8, and has no other way to it.
        std::panic::catch_unwind(AssertUnwindSafe(|| {
            let headers = headers.into_iter().flat_map(|headers| headers.iter());
            Self(headers.map(|h| (name_of(h.key), h.value.unwrap_or_default().to_vec())).collect())
        }))
        .ok()
    }

    #[must_use]
    pub fn to_record(&self) -> OwnedHeaders {
        self.0.iter().fold(OwnedHeaders::new_with_capacity(self.0.len()), |headers, (key, value)| {
            headers.insert(Header { key, value: Some(value) })
        })
    }

    /// As JSON for a table: text as it is, bytes that are no text in hexadecimal, and PostgreSQL's
    /// one impossible character with them.
    #[must_use]
    pub fn to_json(&self) -> String {
        let stored: Vec<(&str, Stored<'_>)> = self.0.iter().map(|(key, value)| (&**key, Stored::of(value))).collect();
        serde_json::to_string(&stored).unwrap_or_default()
    }

    /// # Errors
    /// When the JSON is not what [`Self::to_json`] writes.
    pub fn from_json(json: &str) -> Result<Self, serde_json::Error> {
        let stored: Vec<(String, Stored<'_>)> = serde_json::from_str(json)?;
        Ok(Self(stored.into_iter().map(|(key, value)| (key.into(), value.bytes())).collect()))
    }
}

/// A header's name; those that we send ourselves, which is nearly all, without a copy.
fn name_of(name: &str) -> Cow<'static, str> {
    const OURS: [&str; 11] = [
        "ce_specversion",
        "ce_id",
        "ce_type",
        "ce_source",
        "ce_time",
        "content-type",
        CORRELATION_ID,
        REPLY_TOPIC,
        REPLY_PARTITION,
        TRACE_HEADERS[0],
        TRACE_HEADERS[1],
    ];
    OURS.into_iter().find(|ours| *ours == name).map_or_else(|| name.to_owned().into(), Cow::Borrowed)
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Stored<'a> {
    Text(Cow<'a, str>),
    Bytes(BTreeMap<Cow<'a, str>, String>),
}

impl<'a> Stored<'a> {
    fn of(value: &'a [u8]) -> Self {
        match std::str::from_utf8(value) {
            Ok(text) if !text.contains('\0') => Self::Text(text.into()),
            _ => {
                const DIGITS: [char; 16] =
                    ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
                let hex = value.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| DIGITS[usize::from(digit)]);
                Self::Bytes(BTreeMap::from([("hex".into(), hex.collect())]))
            }
        }
    }

    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Text(text) => text.into_owned().into_bytes(),
            Self::Bytes(fields) => fields
                .get("hex")
                .map(|hex| {
                    hex.as_bytes()
                        .chunks(2)
                        .filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
                        .collect()
                })
                .unwrap_or_default(),
        }
    }
}

/// A row of the outbox: the message as it will be sent, early or late.
#[derive(Clone, Debug)]
pub struct Message {
    pub order_id: Uuid,
    pub version: i64,
    /// Tells the messages of one version apart.
    pub seq: i16,
    pub topic: String,
    pub key: String,
    pub headers: Headers,
    pub body: String,
}

/// The clock for everything that is stored and told: microseconds, as PostgreSQL keeps them.
#[must_use]
pub fn now() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    now.replace_nanosecond(now.microsecond() * 1_000).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_event_keeps_the_digits_and_the_payload_it_was_given() {
        let json = r#"{"event_id":"0198f2a0-0000-7000-8000-000000000001","type":"order.created","order_id":"0198f2a0-0000-7000-8000-000000000002","external_id":"e\"1","user_id":"u","lifecycle":"marketplace","status":"new","version":1,"amount":59.980,"currency":null,"items":null,"payload":{"b":1e2,"a":[ 1 ]},"correlation_id":"0198f2a0-0000-7000-8000-000000000003","timestamp":"2026-01-02T03:04:05.678901Z"}"#;
        let event: Event<'_> = serde_json::from_str(json).unwrap();
        assert_eq!(event.external_id.as_deref(), Some("e\"1"));
        assert_eq!(serde_json::to_string(&event).unwrap(), json);
    }

    #[test]
    fn an_ack_reads_as_one_flat_object() {
        let answer = Answer {
            status: AckStatus::Processed,
            order_status: "done".into(),
            order_version: 2,
            amount: Some(Money::parse("59.98").unwrap()),
            currency: Some("USD".into()),
            error: None,
            superseded_by: None,
        };
        let id = Uuid::nil();
        let at = OffsetDateTime::UNIX_EPOCH;
        let ack = Ack {
            correlation_id: id,
            event_id: id,
            order_id: id,
            version: 1,
            answer: answer.clone(),
            processed_at: at,
        };
        let json = serde_json::to_string(&ack).unwrap();
        assert!(
            json.contains(r#""version":1,"status":"processed","order_status":"done","order_version":2,"amount":59.98"#),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<Answer>(&serde_json::to_string(&answer).unwrap()).unwrap(), answer);
    }

    #[test]
    fn a_reply_address_survives_the_headers() {
        let reply = ReplyTo { correlation: vec![0, 255, 7], topic: "orders.ack".into(), partition: Some(258) };
        let mut headers = Headers::default();
        headers.push_reply_to(&reply);
        assert_eq!(headers.get(REPLY_PARTITION), Some(&[0, 0, 1, 2][..]));
        assert_eq!(headers.reply_to(), Some(reply));
        assert_eq!(Headers::default().reply_to(), None);
        // As Spring has it where any partition will do.
        let reply = ReplyTo { partition: None, ..headers.reply_to().unwrap() };
        let mut headers = Headers::default();
        headers.push_reply_to(&reply);
        assert_eq!(headers.get(REPLY_PARTITION), None);
        assert_eq!(headers.reply_to(), Some(reply));
        headers.push(REPLY_PARTITION, "x");
        assert_eq!(headers.reply_to(), None);
    }

    proptest! {
        #[test]
        fn any_headers_survive_the_table(pairs in proptest::collection::vec(("[a-z_-]{1,9}", proptest::collection::vec(any::<u8>(), 0..20)), 0..6)) {
            let mut headers = Headers::default();
            for (key, value) in pairs {
                headers.push(key, value);
            }
            prop_assert_eq!(Headers::from_json(&headers.to_json()).unwrap(), headers);
        }
    }
}
