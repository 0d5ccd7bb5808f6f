//! Changes orders that are there: locks them, and writes what was decided.

use std::sync::Arc;

use rust_decimal::Decimal;
use serde_json::value::RawValue;
use shared::{
    db::{Connection, DbError},
    message::{EventType, Message},
    money::Money,
    outbox::{Columns, Placed, placed},
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::json;

/// An order whose row is locked.
#[derive(Debug)]
pub(crate) struct Locked {
    pub order_id: Uuid,
    pub user_id: String,
    pub external_id: Option<String>,
    pub lifecycle: String,
    pub status: String,
    pub version: i64,
    pub content_version: i64,
    pub amount: Option<Money>,
    pub currency: Option<String>,
    pub items: Option<Box<RawValue>>,
    pub payload: Option<Box<RawValue>>,
    pub shipping_address: Option<String>,
    pub billing_address: Option<String>,
    pub notes: Option<String>,
    pub due_at: Option<OffsetDateTime>,
}

/// An order as a change leaves it, and the row of its history. One that is `ignored` changes
/// nothing and sends nothing.
#[derive(Debug)]
pub(crate) struct ChangedRow {
    pub order: Locked,
    pub from_status: String,
    pub kind: EventType,
    pub ignored: bool,
    pub correlation_id: Uuid,
    pub event_id: Uuid,
    /// The event, and what the lifecycle tells others.
    pub messages: Vec<Arc<Message>>,
}

/// Locks these orders, in the order of their ids, so that two who want the same ones take turns.
pub(crate) async fn lock_orders(connection: &Connection, ids: &[Uuid]) -> Result<Vec<Locked>, DbError> {
    const SQL: &str = "
        select o.order_id, o.user_id, o.external_id, o.lifecycle, o.status, o.version, o.content_version, o.amount,
            o.currency, o.items::text, o.payload::text, o.shipping_address, o.billing_address, o.notes, o.due_at
        from orders o join unnest($1::uuid[]) as i(order_id) on o.order_id = i.order_id
        order by o.order_id
        for update of o";
    let statement = connection.prepared(SQL).await?;
    let rows = connection.client().query(&statement, &[&ids]).await?;
    Ok(rows
        .iter()
        .map(|row| Locked {
            order_id: row.get("order_id"),
            user_id: row.get("user_id"),
            external_id: row.get("external_id"),
            lifecycle: row.get("lifecycle"),
            status: row.get("status"),
            version: row.get("version"),
            content_version: row.get("content_version"),
            amount: row.get::<_, Option<Decimal>>("amount").and_then(|amount| Money::try_from(amount).ok()),
            currency: row.get("currency"),
            items: json(row, "items"),
            payload: json(row, "payload"),
            shipping_address: row.get("shipping_address"),
            billing_address: row.get("billing_address"),
            notes: row.get("notes"),
            due_at: row.get("due_at"),
        })
        .collect())
}

/// Writes changes of locked orders with their history and messages; those with where they lie in
/// the outbox.
pub(crate) async fn write_changes(
    connection: &Connection,
    rows: &[ChangedRow],
    at: OffsetDateTime,
) -> Result<Vec<Placed>, DbError> {
    const SQL: &str = "
        with i as materialized (
            select * from unnest(
                $1::uuid[], $2::text[], $3::bigint[], $4::bigint[], $5::numeric[], $6::text[], $7::text[], $8::text[],
                $9::text[], $10::text[], $11::text[], $12::text[], $13::text[], $14::boolean[], $15::uuid[],
                $16::uuid[], $17::timestamptz[])
            as i(order_id, status, version, content_version, amount, currency, items, payload,
                shipping_address, billing_address, notes, from_status, type, ignored, correlation_id,
                event_id, due_at)
        ), changed as (
            update orders o
            set status = i.status, version = i.version, content_version = i.content_version, amount = i.amount,
                currency = i.currency, items = i.items::json, payload = i.payload::json,
                shipping_address = i.shipping_address, billing_address = i.billing_address, notes = i.notes,
                due_at = i.due_at, updated_at = greatest($18::timestamptz, o.updated_at)
            from i
            where o.order_id = i.order_id and o.version = i.version - 1 and not i.ignored
        ), told as (
            insert into order_events
                (order_id, version, event_id, cause, type, from_status, to_status, ignored, correlation_id, at)
            select order_id, version, case when not ignored then event_id end, correlation_id::text, type,
                from_status, status, ignored, correlation_id, $18::timestamptz
            from i
        )
        insert into outbox (order_id, version, seq, topic, key, headers, body)
        select order_id, version, seq, topic, key, headers::json, body
        from unnest($19::uuid[], $20::bigint[], $21::smallint[], $22::text[], $23::text[], $24::text[], $25::text[])
            as m(order_id, version, seq, topic, key, headers, body)
        returning order_id, version, seq, ctid::text";
    fn column<'a, R, T>(rows: &'a [R], of: impl Fn(&'a R) -> T) -> Vec<T> {
        rows.iter().map(of).collect()
    }
    let messages: Vec<Arc<Message>> = rows.iter().flat_map(|row| row.messages.iter().cloned()).collect();
    let columns = Columns::of(&messages);
    let [ids, versions, seqs, topics, keys, headers, bodies] = columns.params();
    let statement = connection.prepared(SQL).await?;
    let sent = connection
        .client()
        .query(
            &statement,
            &[
                &column(rows, |row| row.order.order_id),
                &column(rows, |row| row.order.status.as_str()),
                &column(rows, |row| row.order.version),
                &column(rows, |row| row.order.content_version),
                &column(rows, |row| row.order.amount.map(Money::decimal)),
                &column(rows, |row| row.order.currency.as_deref()),
                &column(rows, |row| row.order.items.as_deref().map(RawValue::get)),
                &column(rows, |row| row.order.payload.as_deref().map(RawValue::get)),
                &column(rows, |row| row.order.shipping_address.as_deref()),
                &column(rows, |row| row.order.billing_address.as_deref()),
                &column(rows, |row| row.order.notes.as_deref()),
                &column(rows, |row| row.from_status.as_str()),
                &column(rows, |row| row.kind.name()),
                &column(rows, |row| row.ignored),
                &column(rows, |row| row.correlation_id),
                &column(rows, |row| row.event_id),
                &column(rows, |row| row.order.due_at),
                &at,
                ids,
                versions,
                seqs,
                topics,
                keys,
                headers,
                bodies,
            ],
        )
        .await?;
    Ok(placed(messages, sent.iter().map(|row| ((row.get(0), row.get(1), row.get(2)), row.get(3))).collect()))
}
