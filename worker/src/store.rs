//! SQL as verbs: what the worker reads and writes of orders.

use std::collections::{HashMap, HashSet};

use rust_decimal::Decimal;
use shared::{
    db::{Connection, DbError},
    message::Answer,
    money::Money,
};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    handler::{Handling, Order},
    record::Record,
};

/// A handling to be written, with what it belongs to.
pub(crate) struct Handled {
    pub order_id: Uuid,
    pub event_id: Uuid,
    pub correlation_id: Uuid,
    pub handling: Handling,
}

/// Moves the orders that are still as their event told, and writes the history; which those were.
/// The version is the guard: whoever handled the event before, or changed the order since, has
/// raised it.
pub(crate) async fn move_unchanged(
    connection: &Connection,
    rows: &[Handled],
    at: OffsetDateTime,
) -> Result<HashSet<Uuid>, DbError> {
    const SQL: &str = "
        with i as materialized (
            select * from unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::numeric[], $6::text[],
                $7::text[], $8::text[], $9::uuid[], $10::text[])
            as i(order_id, version, from_status, status, amount, currency, cause, type, correlation_id, answer)
        ), moved as (
            update orders o
            set status = i.status, version = i.version, amount = i.amount, currency = i.currency,
                updated_at = greatest($11::timestamptz, o.updated_at)
            from i
            where o.order_id = i.order_id and o.version = i.version - 1 and o.status = i.from_status
            returning o.order_id, i.version, i.cause, i.type, i.from_status, i.status, i.correlation_id, i.answer
        ), told as (
            insert into order_events
                (order_id, version, cause, type, from_status, to_status, correlation_id, answer, at)
            select order_id, version, cause, type, from_status, status, correlation_id, answer::json, $11::timestamptz
            from moved
        )
        select order_id from moved";
    let statement = connection.prepared(SQL).await?;
    let moved = connection
        .client()
        .query(
            &statement,
            &[
                &column(rows, |row| row.order_id),
                &column(rows, |row| row.handling.answer.order_version),
                &column(rows, |row| row.handling.from_status.as_str()),
                &column(rows, |row| row.handling.answer.order_status.as_str()),
                &column(rows, |row| row.handling.answer.amount.map(Money::decimal)),
                &column(rows, |row| row.handling.answer.currency.as_deref()),
                &column(rows, |row| row.event_id.to_string()),
                &column(rows, |row| row.handling.kind.name()),
                &column(rows, |row| row.correlation_id),
                &column(rows, |row| answer(&row.handling.answer)),
                &at,
            ],
        )
        .await?;
    Ok(moved.iter().map(|row| row.get(0)).collect())
}

/// Locks these orders, in the order of their ids, so that two who want the same ones take turns.
pub(crate) async fn lock_orders(connection: &Connection, ids: &[Uuid]) -> Result<HashMap<Uuid, Order>, DbError> {
    const SQL: &str = "
        select o.order_id, o.lifecycle, o.status, o.version, o.content_version, o.amount, o.currency
        from orders o join unnest($1::uuid[]) as i(order_id) on o.order_id = i.order_id
        order by o.order_id
        for update of o";
    let statement = connection.prepared(SQL).await?;
    let rows = connection.client().query(&statement, &[&ids]).await?;
    let order = |row: &tokio_postgres::Row| Order {
        lifecycle: row.get("lifecycle"),
        status: row.get("status"),
        version: row.get("version"),
        content_version: row.get("content_version"),
        amount: row.get::<_, Option<Decimal>>("amount").and_then(|amount| Money::try_from(amount).ok()),
        currency: row.get("currency"),
    };
    Ok(rows.iter().map(|row| (row.get("order_id"), order(row))).collect())
}

/// What was answered to these events before, if they were handled.
pub(crate) async fn answers(
    connection: &Connection,
    events: &[(Uuid, Uuid)],
) -> Result<HashMap<(Uuid, String), Answer>, DbError> {
    const SQL: &str = "
        select e.order_id, e.cause, e.answer::text
        from order_events e join unnest($1::uuid[], $2::text[]) as i(order_id, cause)
            on e.order_id = i.order_id and e.cause = i.cause
        where e.answer is not null";
    let ids: Vec<_> = events.iter().map(|(order_id, _)| *order_id).collect();
    let causes: Vec<_> = events.iter().map(|(_, event_id)| event_id.to_string()).collect();
    let statement = connection.prepared(SQL).await?;
    let rows = connection.client().query(&statement, &[&ids, &causes]).await?;
    Ok(rows
        .iter()
        .filter_map(|row| {
            Some(((row.get("order_id"), row.get("cause")), serde_json::from_str(row.get("answer")).ok()?))
        })
        .collect())
}

/// Writes handlings of locked orders: the history of each event, and each order as the last of
/// its handlings leaves it.
pub(crate) async fn write_handlings(
    connection: &Connection,
    rows: &[Handled],
    orders: &[(Uuid, i64, Order)],
    at: OffsetDateTime,
) -> Result<(), DbError> {
    const HISTORY: &str = "
        insert into order_events
            (order_id, version, cause, type, from_status, to_status, ignored, correlation_id, answer, at)
        select i.order_id, i.version, i.cause, i.type, i.from_status, i.status, i.ignored, i.correlation_id,
            i.answer::json, $10::timestamptz
        from unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::boolean[],
            $8::uuid[], $9::text[])
            as i(order_id, version, cause, type, from_status, status, ignored, correlation_id, answer)";
    const ORDERS: &str = "
        update orders o
        set status = i.status, version = i.version, amount = i.amount, currency = i.currency,
            updated_at = greatest($7::timestamptz, o.updated_at)
        from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $5::numeric[], $6::text[])
            as i(order_id, found, version, status, amount, currency)
        where o.order_id = i.order_id and o.version = i.found";
    let history = connection.prepared(HISTORY).await?;
    let update = connection.prepared(ORDERS).await?;
    connection
        .client()
        .execute(
            &history,
            &[
                &column(rows, |row| row.order_id),
                &column(rows, |row| row.handling.answer.order_version),
                &column(rows, |row| row.event_id.to_string()),
                &column(rows, |row| row.handling.kind.name()),
                &column(rows, |row| row.handling.from_status.as_str()),
                &column(rows, |row| row.handling.answer.order_status.as_str()),
                &column(rows, |row| row.handling.kind.is_ignored()),
                &column(rows, |row| row.correlation_id),
                &column(rows, |row| answer(&row.handling.answer)),
                &at,
            ],
        )
        .await?;
    if !orders.is_empty() {
        connection
            .client()
            .execute(
                &update,
                &[
                    &column(orders, |(id, ..)| *id),
                    &column(orders, |(_, found, _)| *found),
                    &column(orders, |(.., order)| order.version),
                    &column(orders, |(.., order)| order.status.as_str()),
                    &column(orders, |(.., order)| order.amount.map(Money::decimal)),
                    &column(orders, |(.., order)| order.currency.as_deref()),
                    &at,
                ],
            )
            .await?;
    }
    Ok(())
}

/// Keeps a record that nobody will ever be able to handle, with the reason. Once per record.
pub(crate) async fn park_dead(
    connection: &Connection,
    record: &Record,
    order_id: Option<Uuid>,
    reason: &str,
) -> Result<(), DbError> {
    const SQL: &str = "
        insert into parked_messages
            (order_id, topic, partition, kafka_offset, kafka_timestamp, key, headers, body, state, attempts, reason)
        values ($1, $2, $3, $4, $5, $6, $7::text::json, $8, 'dead', 1, $9)
        on conflict do nothing";
    let statement = connection.prepared(SQL).await?;
    connection
        .client()
        .execute(
            &statement,
            &[
                &order_id,
                &record.topic,
                &record.partition,
                &record.offset,
                &record.timestamp,
                &record.key,
                &record.headers.to_json(),
                &record.body,
                &reason,
            ],
        )
        .await?;
    Ok(())
}

/// How many messages are parked, by state.
pub(crate) async fn count_parked(connection: &Connection) -> Result<Vec<(String, i64)>, DbError> {
    const SQL: &str = "select state, count(*) from parked_messages group by state";
    let statement = connection.prepared(SQL).await?;
    let rows = connection.client().query(&statement, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

fn answer(answer: &Answer) -> String {
    // Our own type always serializes.
    serde_json::to_string(answer).unwrap_or_default()
}

fn column<'a, T, R>(rows: &'a [R], of: impl Fn(&'a R) -> T) -> Vec<T> {
    rows.iter().map(of).collect()
}
