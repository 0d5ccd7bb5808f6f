//! A record as it came: what it says and to which order, or why it cannot be read.

use std::fmt::Display;

use rdkafka::{Message as _, message::BorrowedMessage};
use shared::{
    lifecycle::Lifecycles,
    message::{Event, Headers, is_object, unmarked},
    order,
};
use uuid::Uuid;

use crate::received::{self, Received};

/// Beyond what any order reaches, and safe to count on from.
const MAX_VERSION: i64 = 1 << 53;

/// A record, taken out of librdkafka's memory.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    /// Milliseconds; tells the record from one at the same place of a topic that was made anew.
    pub timestamp: i64,
    pub key: Option<Vec<u8>>,
    /// `None` where they cannot be read.
    pub headers: Option<Headers>,
    pub body: Option<Vec<u8>>,
}

/// What a record says.
#[derive(Debug)]
pub(crate) enum Said<'a> {
    /// What a client did, from our own API.
    Event(Event<'a>),
    /// Something from elsewhere.
    Received(Received),
}

impl Said<'_> {
    pub(crate) fn order_id(&self) -> Uuid {
        match self {
            Self::Event(event) => event.order_id,
            Self::Received(received) => received.order_id,
        }
    }

    /// Unique within its order's history: the same cause changes nothing twice.
    pub(crate) fn cause(&self) -> String {
        match self {
            Self::Event(event) => event.event_id.to_string(),
            Self::Received(received) => received.cause.clone(),
        }
    }
}

impl Record {
    pub(crate) fn of(message: &BorrowedMessage<'_>) -> Self {
        Self {
            topic: message.topic().to_owned(),
            partition: message.partition(),
            offset: message.offset(),
            timestamp: message.timestamp().to_millis().unwrap_or(-1),
            key: message.key().map(<[u8]>::to_vec),
            headers: Headers::of_record(message.headers()),
            body: message.payload().map(<[u8]>::to_vec),
        }
    }

    /// Has it no body? Then it says nothing: whoever deletes by key leaves such records, and so does a
    /// topic that is compacted. An empty body is one that cannot be read.
    pub(crate) fn is_tombstone(&self) -> bool {
        self.body.is_none()
    }

    /// What it says; topics that no lifecycle receives hold events.
    ///
    /// # Errors
    /// Why nobody can tell.
    pub(crate) fn read(&self, lifecycles: &'static Lifecycles) -> Result<Said<'_>, String> {
        if self.headers.is_none() {
            return Err("a header's name is not UTF-8".to_owned());
        }
        let body = unmarked(self.body.as_deref().ok_or("the record has no body")?);
        match lifecycles.received(&self.topic) {
            Some((lifecycle, receive)) => received::read(lifecycle, receive, self.headers(), body).map(Said::Received),
            None => event(body).map(Said::Event),
        }
    }

    pub(crate) fn headers(&self) -> &Headers {
        const NONE: &Headers = &Headers::NONE;
        self.headers.as_ref().unwrap_or(NONE)
    }

    /// Where it lies, for people.
    pub(crate) fn place(&self) -> impl Display + '_ {
        format!("{}/{}@{}", self.topic, self.partition, self.offset)
    }
}

fn event(body: &[u8]) -> Result<Event<'_>, String> {
    if !is_object(body) {
        return Err("not an event: no JSON object".to_owned());
    }
    let event: Event<'_> = serde_json::from_slice(body).map_err(|error| format!("not an event: {error}"))?;
    if !(1..MAX_VERSION).contains(&event.version) {
        return Err(format!("not an event: version {} is none", event.version));
    }
    // PostgreSQL's text cannot hold it; the rest of an event is not written as text.
    if [&event.lifecycle, &event.status].iter().any(|text| text.contains('\0'))
        || event.currency.as_deref().is_some_and(|currency| order::currency(currency).is_err())
    {
        return Err("not an event: a lifecycle, status or currency that is none".to_owned());
    }
    Ok(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_before_a_body_is_passed_over() {
        let event = r#"{"event_id":"0198f2a0-0000-7000-8000-000000000001","type":"order.created","order_id":"0198f2a0-0000-7000-8000-000000000002","external_id":null,"user_id":"u","lifecycle":"marketplace","status":"new","version":1,"amount":null,"currency":"USD","items":null,"payload":null,"correlation_id":"0198f2a0-0000-7000-8000-000000000003","timestamp":"2026-01-02T03:04:05Z"}"#;
        for (topic, body) in [("orders.events", event), ("payment-results", r#"{"order_id":"a","status":"success"}"#)] {
            let record = |body: String| Record {
                topic: topic.to_owned(),
                partition: 0,
                offset: 0,
                timestamp: 0,
                key: None,
                headers: Some(Headers::NONE),
                body: Some(body.into_bytes()),
            };
            let read = |body| {
                let record = record(body);
                record.read(Lifecycles::embedded().unwrap()).map(|said| (said.order_id(), said.cause()))
            };
            assert_eq!(read(format!("\u{feff}{body}")).unwrap(), read(body.to_owned()).unwrap());
            assert!(read(format!("\u{feff}\u{feff}{body}")).is_err());
        }
    }
}
