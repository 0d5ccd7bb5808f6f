//! Answers for those who wait: on the topic and partition that they have named.

use shared::message::{Ack, AckStatus, Answer, CORRELATION_ID, Headers, ReplyTo, now};
use uuid::Uuid;

use crate::{
    handler::Order,
    record::{Record, Said},
};

/// Who sends our answers and messages (CloudEvents `source`).
pub(crate) const SOURCE: &str = "/orderstream/worker";
/// The type of our answers (CloudEvents `type`).
const ACK_TYPE: &str = "order.ack";

/// An answer for somebody who waits.
#[derive(Debug)]
pub(crate) struct Reply {
    pub to: ReplyTo,
    pub key: String,
    pub headers: Headers,
    pub body: String,
}

/// Who asked, and for what.
pub(crate) struct Asked<'a> {
    record: &'a Record,
    correlation_id: Uuid,
    event_id: Uuid,
    order_id: Uuid,
    version: Option<i64>,
}

impl<'a> Asked<'a> {
    pub(crate) fn of(record: &'a Record, said: &Said<'_>) -> Self {
        match said {
            Said::Event(event) => Self {
                record,
                correlation_id: event.correlation_id,
                event_id: event.event_id,
                order_id: event.order_id,
                version: Some(event.version),
            },
            // A stranger's correlation id is in the headers alone.
            Said::Received(received) => Self {
                record,
                correlation_id: Uuid::nil(),
                event_id: Uuid::new_v5(&Uuid::NAMESPACE_OID, received.cause.as_bytes()),
                order_id: received.order_id,
                version: None,
            },
        }
    }
}

/// The answer for whoever asked to be told; none where nobody did.
pub(crate) fn reply(asked: &Asked<'_>, answer: Answer) -> Option<Reply> {
    let record = asked.record;
    let to = record.headers().reply_to()?;
    let at = now();
    let mut headers = Headers::cloud_event(Uuid::now_v7(), ACK_TYPE, SOURCE, at);
    headers.push(CORRELATION_ID, to.correlation.clone());
    for (name, value) in record.headers().trace() {
        headers.push(name, value);
    }
    let ack = Ack {
        correlation_id: asked.correlation_id,
        event_id: asked.event_id,
        order_id: asked.order_id,
        version: asked.version.unwrap_or(answer.order_version),
        answer,
        processed_at: at,
    };
    // Our own types always serialize.
    let body = serde_json::to_string(&ack).unwrap_or_default();
    Some(Reply { to, key: asked.order_id.to_string(), headers, body })
}

/// The answer to a message that is set aside: nobody knows when.
pub(crate) fn put_off(order: &Order) -> Answer {
    Answer {
        status: AckStatus::Failed,
        order_status: order.status.clone(),
        order_version: order.version,
        amount: order.amount,
        currency: order.currency.clone(),
        error: None,
        superseded_by: None,
    }
}
