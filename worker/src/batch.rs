//! Handles one batch of records: most in a single statement, the rest under their orders' locks.

use std::collections::{HashMap, HashSet};

use shared::{
    db::{Connection, Db, DbError},
    message::{Ack, Answer, Event, Headers, ReplyTo, now},
};
use uuid::Uuid;

use crate::{
    handler::{Handling, Order, after, as_told, handle},
    record::Record,
    store::{self, Handled},
};

/// Who sends our answers (CloudEvents `source`).
const SOURCE: &str = "/orderstream/worker";
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

/// A record that can be read.
struct Told<'a> {
    record: &'a Record,
    event: Event<'a>,
}

/// Handles these records, all of them or, when it fails, as many as were committed before: doing
/// it again does nothing twice. The answers that are awaited come back.
pub(crate) async fn handle_batch(db: &Db, records: &[Record]) -> Result<Vec<Reply>, DbError> {
    let connection = db.connection().await?;
    let deadline = db.settings.write_timeout;
    let mut told = Vec::with_capacity(records.len());
    for record in records {
        match record.event() {
            Ok(event) => told.push(Told { record, event }),
            Err(reason) => connection.within(deadline, park(&connection, record, None, &reason)).await?,
        }
    }
    let mut replies = Vec::with_capacity(told.len());
    let rest = connection.within(deadline, move_unchanged(&connection, told, &mut replies)).await?;
    if !rest.is_empty() {
        let dead = connection.transaction(deadline, under_locks(&connection, &rest, &mut replies)).await?;
        for (told, reason) in dead {
            let order_id = Some(told.event.order_id);
            connection.within(deadline, park(&connection, told.record, order_id, &reason)).await?;
        }
    }
    Ok(replies)
}

/// The way of nearly all: orders that are still as their event tells. Returns the others.
async fn move_unchanged<'a>(
    connection: &Connection,
    told: Vec<Told<'a>>,
    replies: &mut Vec<Reply>,
) -> Result<Vec<Told<'a>>, DbError> {
    let mut times: HashMap<Uuid, usize> = HashMap::with_capacity(told.len());
    for Told { event, .. } in &told {
        *times.entry(event.order_id).or_default() += 1;
    }
    let (mut rows, mut candidates, mut rest) = (Vec::new(), Vec::new(), Vec::new());
    for told in told {
        let handling = handle(&as_told(&told.event), &told.event);
        match handling {
            // Two events of one order are handled one after the other.
            Ok(handling) if !handling.kind.is_ignored() && times[&told.event.order_id] == 1 => {
                rows.push(handled(&told.event, handling));
                candidates.push(told);
            }
            _ => rest.push(told),
        }
    }
    if rows.is_empty() {
        return Ok(rest);
    }
    let moved = store::move_unchanged(connection, &rows, now()).await?;
    for (told, row) in candidates.into_iter().zip(rows) {
        if moved.contains(&told.event.order_id) {
            count(&row.handling);
            replies.extend(reply(&told, row.handling.answer));
        } else {
            rest.push(told);
        }
    }
    Ok(rest)
}

/// Handles what is left in sequence, each on what the last made of the order. Returns those whose
/// order is not there, or cannot be.
async fn under_locks<'t, 'a>(
    connection: &Connection,
    told: &'t [Told<'a>],
    replies: &mut Vec<Reply>,
) -> Result<Vec<(&'t Told<'a>, String)>, DbError> {
    let mut ids: Vec<Uuid> = told.iter().map(|told| told.event.order_id).collect();
    ids.sort_unstable();
    ids.dedup();
    let found = store::lock_orders(connection, &ids).await?;
    let causes: Vec<_> = told.iter().map(|told| (told.event.order_id, told.event.event_id)).collect();
    let mut answers = store::answers(connection, &causes).await?;
    let mut orders = found.clone();
    let (mut rows, mut dead, mut changed) = (Vec::new(), Vec::new(), HashSet::new());
    for told in told {
        let event = &told.event;
        let cause = (event.order_id, event.event_id.to_string());
        if let Some(answer) = answers.get(&cause) {
            metrics::counter!("orderstream_worker_handled_total", "result" => "repeated").increment(1);
            replies.extend(reply(told, answer.clone()));
            continue;
        }
        let Some(order) = orders.get_mut(&event.order_id) else {
            dead.push((told, "there is no such order".to_owned()));
            continue;
        };
        match handle(order, event) {
            Err(reason) => dead.push((told, reason)),
            Ok(handling) => {
                *order = after(order, &handling);
                if !handling.kind.is_ignored() {
                    changed.insert(event.order_id);
                }
                count(&handling);
                answers.insert(cause, handling.answer.clone());
                replies.extend(reply(told, handling.answer.clone()));
                rows.push(handled(event, handling));
            }
        }
    }
    if !rows.is_empty() {
        let changed: Vec<(Uuid, i64, Order)> =
            changed.into_iter().map(|id| (id, found[&id].version, orders[&id].clone())).collect();
        store::write_handlings(connection, &rows, &changed, now()).await?;
    }
    Ok(dead)
}

fn handled(event: &Event<'_>, handling: Handling) -> Handled {
    Handled { order_id: event.order_id, event_id: event.event_id, correlation_id: event.correlation_id, handling }
}

fn count(handling: &Handling) {
    metrics::counter!("orderstream_worker_handled_total", "result" => handling.kind.name()).increment(1);
}

fn reply(told: &Told<'_>, answer: Answer) -> Option<Reply> {
    let to = told.record.headers.reply_to()?;
    let event = &told.event;
    let at = now();
    let mut headers = Headers::cloud_event(Uuid::now_v7(), ACK_TYPE, SOURCE, at);
    headers.push(shared::message::CORRELATION_ID, to.correlation.clone());
    for (name, value) in told.record.headers.trace() {
        headers.push(name, value);
    }
    let ack = Ack {
        correlation_id: event.correlation_id,
        event_id: event.event_id,
        order_id: event.order_id,
        version: event.version,
        answer,
        processed_at: at,
    };
    // Our own types always serialize.
    let body = serde_json::to_string(&ack).unwrap_or_default();
    Some(Reply { to, key: event.order_id.to_string(), headers, body })
}

async fn park(connection: &Connection, record: &Record, order_id: Option<Uuid>, reason: &str) -> Result<(), DbError> {
    tracing::error!(
        kafka.topic = record.topic,
        kafka.partition = record.partition,
        kafka.offset = record.offset,
        order.id = order_id.map(tracing::field::display),
        reason,
        "parked a record that cannot be handled"
    );
    metrics::counter!("orderstream_worker_handled_total", "result" => "dead").increment(1);
    // The one character that PostgreSQL's text cannot hold.
    store::park_dead(connection, record, order_id, &reason.replace('\0', "\\0")).await
}
