//! Writes new orders: many in one statement, which is one round trip and one commit.

use std::{collections::HashMap, sync::Arc};

use rust_decimal::Decimal;
use shared::{
    db::{Connection, DbError},
    message::Message,
};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::json::Digest;

/// An order as it is first stored, with the event that tells of it.
#[derive(Debug)]
pub(crate) struct NewRow {
    pub order_id: Uuid,
    pub user_id: String,
    pub external_id: Option<String>,
    /// The deleted order that has its external id, if the client says so.
    pub replaces: Option<Uuid>,
    pub lifecycle: &'static str,
    pub status: &'static str,
    pub amount: Option<Decimal>,
    pub currency: Option<String>,
    pub items: Option<Box<str>>,
    pub payload: Option<Box<str>>,
    pub shipping_address: Option<String>,
    pub billing_address: Option<String>,
    pub notes: Option<String>,
    pub at: OffsetDateTime,
    pub fingerprint: Digest,
    pub event_id: Uuid,
    pub correlation_id: Uuid,
    pub event: Arc<Message>,
}

/// One place for the columns of the statement's input.
macro_rules! insert_sql {
    ($refs:literal) => {
        concat!(
            "with i as materialized (
                select * from unnest(
                    $1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::numeric[], $7::text[],
                    $8::text[], $9::text[], $10::text[], $11::text[], $12::text[], $13::timestamptz[],
                    $14::bytea[], $15::uuid[], $16::uuid[], $17::text[], $18::text[])
                as i(order_id, user_id, external_id, lifecycle, status, amount, currency,
                    items, payload, shipping_address, billing_address, notes, at,
                    fingerprint, event_id, correlation_id, headers, body)
            ), ",
            $refs,
            ", fresh as materialized (
                select i.* from i where i.external_id is null or i.order_id in (select order_id from refs)
            ), stored as (
                insert into orders (order_id, user_id, external_id, lifecycle, status, version, content_version,
                    amount, currency, items, payload, shipping_address, billing_address, notes, created_at, updated_at)
                select order_id, user_id, external_id, lifecycle, status, 1, 1, amount, currency, items::json,
                    payload::json, shipping_address, billing_address, notes, at, at
                from fresh
            ), told as (
                insert into order_events (order_id, version, event_id, cause, type, to_status, correlation_id, at)
                select order_id, 1, event_id, correlation_id::text, 'order.created', status, correlation_id, at
                from fresh
            ), sent as (
                insert into outbox (order_id, version, topic, key, headers, body)
                select order_id, 1, $19, order_id::text, headers::json, body from fresh
                returning order_id, ctid::text as place
            )
            select order_id, place from sent"
        )
    };
}

/// Stores those whose external id is still free; which those are, and where their events lie in
/// the outbox. Sort by user and external id:
/// two writers that take the same ones in another order would wait for each other.
pub(crate) async fn insert_orders(
    connection: &Connection,
    rows: &[&NewRow],
    topic: &str,
) -> Result<HashMap<Uuid, String>, DbError> {
    const SQL: &str = insert_sql!(
        "refs as (
             insert into order_refs (user_id, external_id, order_id, fingerprint)
             select user_id, external_id, order_id, fingerprint from i where external_id is not null
             on conflict do nothing
             returning order_id
         )"
    );
    insert(connection, SQL, rows, topic).await
}

/// Stores one order whose external id belongs to a deleted one, if it still does; what that was created
/// with is kept. Where its event lies in the outbox.
pub(crate) async fn insert_in_place_of_deleted(
    connection: &Connection,
    row: &NewRow,
    topic: &str,
) -> Result<Option<String>, DbError> {
    // A deleted order stays deleted, so what is seen without a lock holds; of two that come at
    // once, the second finds the order of the first, which is not deleted.
    const SQL: &str = insert_sql!(
        "deleted as materialized (
             select r.user_id, r.external_id, r.fingerprint, r.order_id
             from i
             join order_refs r on r.user_id = i.user_id and r.external_id = i.external_id
             join orders o on o.order_id = r.order_id and o.status = 'deleted'
             where r.fingerprint <> i.fingerprint
             for update of r
         ), kept as (
             insert into deleted_refs (user_id, external_id, fingerprint, order_id)
             select user_id, external_id, fingerprint, order_id from deleted
             on conflict do nothing
         ), refs as (
             update order_refs r
             set order_id = i.order_id, fingerprint = i.fingerprint
             from i
             join deleted d on d.user_id = i.user_id and d.external_id = i.external_id
             where r.user_id = i.user_id and r.external_id = i.external_id
             returning i.order_id
         )"
    );
    Ok(insert(connection, SQL, &[row], topic).await?.remove(&row.order_id))
}

async fn insert(
    connection: &Connection,
    sql: &'static str,
    rows: &[&NewRow],
    topic: &str,
) -> Result<HashMap<Uuid, String>, DbError> {
    fn column<'a, T>(rows: &[&'a NewRow], of: impl Fn(&'a NewRow) -> T) -> Vec<T> {
        rows.iter().map(|row| of(row)).collect()
    }
    let statement = connection.prepared(sql).await?;
    let stored = connection
        .client()
        .query(
            &statement,
            &[
                &column(rows, |row| row.order_id),
                &column(rows, |row| row.user_id.as_str()),
                &column(rows, |row| row.external_id.as_deref()),
                &column(rows, |row| row.lifecycle),
                &column(rows, |row| row.status),
                &column(rows, |row| row.amount),
                &column(rows, |row| row.currency.as_deref()),
                &column(rows, |row| row.items.as_deref()),
                &column(rows, |row| row.payload.as_deref()),
                &column(rows, |row| row.shipping_address.as_deref()),
                &column(rows, |row| row.billing_address.as_deref()),
                &column(rows, |row| row.notes.as_deref()),
                &column(rows, |row| row.at),
                &column(rows, |row| row.fingerprint.0.to_be_bytes().to_vec()),
                &column(rows, |row| row.event_id),
                &column(rows, |row| row.correlation_id),
                &column(rows, |row| row.event.headers.to_json()),
                &column(rows, |row| row.event.body.as_str()),
                &topic,
            ],
        )
        .await?;
    Ok(stored.iter().map(|row| (row.get(0), row.get(1))).collect())
}
