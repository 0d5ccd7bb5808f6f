//! Reads orders, their history, and what became of a request.

use std::collections::HashMap;

use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use shared::{
    cache::{Cache, Key},
    db::{Connection, Db, DbError},
    message::Answer,
    money::Money,
    order::{PayloadFields, Source, parse_items},
};
use time::OffsetDateTime;
use tokio_postgres::{Row, types::ToSql};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{insert::NewRow, json};
use crate::{
    change::State,
    http::openapi::{Amount, AnyObject, Item, Time},
};

/// An order as it reads.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
pub(crate) struct Order {
    pub order_id: Uuid,
    pub id: Uuid,
    pub user_id: String,
    pub external_id: Option<String>,
    pub lifecycle: String,
    pub status: String,
    #[schema(value_type = Option<Amount>)]
    pub amount: Option<Money>,
    pub currency: Option<String>,
    #[schema(value_type = Option<Vec<Item>>)]
    pub items: Option<Box<RawValue>>,
    #[schema(value_type = Option<AnyObject>)]
    pub payload: Option<Box<RawValue>>,
    pub shipping_address: Option<String>,
    pub billing_address: Option<String>,
    pub notes: Option<String>,
    pub version: i64,
    pub content_version: i64,
    /// PostgreSQL's own hash partition, 0 to 3.
    pub bucket: i32,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = Time)]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = Time)]
    pub updated_at: OffsetDateTime,
}

impl Order {
    /// About how many bytes it has as JSON.
    pub(super) fn size(&self) -> usize {
        const REST: usize = 512;
        let texts = [&self.external_id, &self.shipping_address, &self.billing_address, &self.notes];
        let json = [&self.items, &self.payload];
        REST + self.user_id.len()
            + texts.iter().filter_map(|text| text.as_deref()).map(str::len).sum::<usize>()
            + json.iter().filter_map(|json| json.as_deref()).map(|json| json.get().len()).sum::<usize>()
    }
}

/// One line of an order's history.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct HistoryRow {
    pub version: i64,
    pub from: Option<String>,
    pub to: String,
    pub event: String,
    pub cause: String,
    pub ignored: bool,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = Time)]
    pub at: OffsetDateTime,
}

/// What is known of a request: what it did, and the worker's answer once there is one.
#[derive(Debug)]
pub(crate) struct Request {
    pub version: i64,
    pub status: String,
    pub ignored: bool,
    pub answer: Option<Answer>,
}

/// Who has an external id.
#[derive(Debug)]
pub(crate) struct Reference {
    pub order_id: Uuid,
    pub deleted: bool,
    /// The order that was created under it with the same content: this one, or a deleted one that had it before.
    pub same: Option<Same>,
}

#[derive(Debug)]
pub(crate) struct Same {
    pub order_id: Uuid,
    /// Of the request that created it.
    pub correlation_id: Uuid,
    pub deleted: bool,
}

macro_rules! order_columns {
    () => {
        "o.order_id, o.user_id, o.external_id, o.lifecycle, o.status, o.amount, o.currency, o.items::text,
         o.payload::text, o.shipping_address, o.billing_address, o.notes, o.version, o.content_version,
         right(o.tableoid::regclass::text, 1)::int as bucket, o.created_at, o.updated_at"
    };
}
pub(super) use order_columns;

/// One statement on a connection of its own, under the deadline for reading.
pub(super) async fn query(db: &Db, sql: &'static str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, DbError> {
    let connection = db.connection().await?;
    connection.within(db.settings.query_timeout, query_on(&connection, sql, params)).await
}

pub(super) async fn query_on(
    connection: &Connection,
    sql: &'static str,
    params: &[&(dyn ToSql + Sync)],
) -> Result<Vec<Row>, DbError> {
    let statement = connection.prepared(sql).await?;
    Ok(connection.client().query(&statement, params).await?)
}

pub(super) const BY_ID: &str = concat!("select ", order_columns!(), " from orders o where o.order_id = $1");
pub(super) const BY_EXTERNAL: &str = concat!(
    "select ",
    order_columns!(),
    " from order_refs r join orders o on o.order_id = r.order_id where r.user_id = $1 and r.external_id = $2"
);

/// The order of this id.
pub(crate) async fn order(db: &Db, order_id: Uuid) -> Result<Option<Order>, DbError> {
    Ok(query(db, BY_ID, &[&order_id]).await?.first().map(order_of))
}

/// Where the order of this id is, without what is in it.
pub(crate) async fn state(db: &Db, order_id: Uuid) -> Result<Option<State>, DbError> {
    const SQL: &str = "select status, version, amount, currency from orders where order_id = $1";
    Ok(query(db, SQL, &[&order_id]).await?.first().map(|row| State {
        status: row.get("status"),
        version: row.get("version"),
        amount: amount(row),
        currency: row.get("currency"),
    }))
}

/// The same, perhaps as it was kept a moment ago.
pub(crate) async fn order_kept(cache: &Cache, db: &Db, order_id: Uuid) -> Result<Option<Order>, DbError> {
    cache.through(Key::Order(order_id), |kept: &Order| kept.order_id == order_id, order(db, order_id)).await
}

/// The order that has this external id of this user now, deleted or not.
pub(crate) async fn order_by_external(db: &Db, user_id: &str, external_id: &str) -> Result<Option<Order>, DbError> {
    Ok(query(db, BY_EXTERNAL, &[&user_id, &external_id]).await?.first().map(order_of))
}

/// All that happened to an order, oldest first.
pub(crate) async fn history(db: &Db, order_id: Uuid) -> Result<Vec<HistoryRow>, DbError> {
    const SQL: &str = "
        select version, from_status, to_status, type, cause, ignored, at
        from order_events where order_id = $1 order by version, ignored, at, cause";
    Ok(query(db, SQL, &[&order_id]).await?.iter().map(history_row).collect())
}

/// What became of a request, wherever it was made.
pub(crate) async fn request(db: &Db, order_id: Uuid, correlation_id: Uuid) -> Result<Option<Request>, DbError> {
    const SQL: &str = "
        select r.version, r.to_status, r.ignored, h.answer::text
        from order_events r
        left join order_events h on h.order_id = r.order_id and h.cause = r.event_id::text
        where r.order_id = $1 and r.cause = $2 and r.correlation_id = $3";
    // A handling has its event for a cause, and is no request.
    let rows = query(db, SQL, &[&order_id, &correlation_id.to_string(), &correlation_id]).await?;
    Ok(rows.first().map(|row| Request {
        version: row.get("version"),
        status: row.get("to_status"),
        ignored: row.get("ignored"),
        answer: row.get::<_, Option<&str>>("answer").and_then(|json| serde_json::from_str(json).ok()),
    }))
}

/// Who has these external ids of new orders, by the place of each order that finds its own taken. On a given
/// connection: the writer asks in a second statement, since the first does not see what it lost to.
pub(crate) async fn references(
    connection: &Connection,
    rows: &[&NewRow],
) -> Result<HashMap<usize, Reference>, DbError> {
    // Messages of others create orders, too, and by no request.
    const SQL: &str = "
        select i.place, r.order_id, o.status = 'deleted' as deleted, r.fingerprint = i.fingerprint as is_same,
            e.correlation_id, d.order_id as before_id, b.correlation_id as before_correlation_id
        from unnest($1::text[], $2::text[], $3::bytea[]) with ordinality
            as i(user_id, external_id, fingerprint, place)
        join order_refs r on r.user_id = i.user_id and r.external_id = i.external_id
        join orders o on o.order_id = r.order_id
        join order_events e on e.order_id = r.order_id and e.version = 1 and e.type = 'order.created'
        left join deleted_refs d
            on d.user_id = i.user_id and d.external_id = i.external_id and d.fingerprint = i.fingerprint
        left join order_events b on b.order_id = d.order_id and b.version = 1 and b.type = 'order.created'";
    let users: Vec<&str> = rows.iter().map(|row| row.user_id.as_str()).collect();
    let externals: Vec<&str> = rows.iter().map(|row| row.external_id.as_deref().unwrap_or_default()).collect();
    let fingerprints: Vec<_> = rows.iter().map(|row| row.fingerprint.0.to_be_bytes().to_vec()).collect();
    let found = query_on(connection, SQL, &[&users, &externals, &fingerprints]).await?;
    let place = |row: &Row| usize::try_from(row.get::<_, i64>("place") - 1).unwrap_or_default();
    Ok(found.iter().map(|row| (place(row), reference_of(row))).collect())
}

fn reference_of(row: &Row) -> Reference {
    let (order_id, deleted) = (row.get("order_id"), row.get("deleted"));
    let now = row.get::<_, Option<Uuid>>("correlation_id").filter(|_| row.get("is_same"));
    let before = row.get::<_, Option<Uuid>>("before_id").zip(row.get("before_correlation_id"));
    let now = now.map(|correlation_id| Same { order_id, correlation_id, deleted });
    let before = before.map(|(order_id, correlation_id)| Same { order_id, correlation_id, deleted: true });
    Reference { order_id, deleted, same: now.or(before) }
}

pub(super) fn history_row(row: &Row) -> HistoryRow {
    HistoryRow {
        version: row.get("version"),
        from: row.get("from_status"),
        to: row.get("to_status"),
        event: row.get("type"),
        cause: row.get("cause"),
        ignored: row.get("ignored"),
        at: row.get("at"),
    }
}

fn amount(row: &Row) -> Option<Money> {
    row.get::<_, Option<Decimal>>("amount").and_then(|amount| Money::try_from(amount).ok())
}

pub(super) fn order_of(row: &Row) -> Order {
    let order_id = row.get("order_id");
    let payload = json(row, "payload");
    // Items that came inside the payload are stored once, there; perhaps the worker refuses them.
    let of_payload = || {
        let items = PayloadFields::of(payload.as_deref()?).ok()?.items?;
        parse_items(items, "", Source::Payload).is_ok().then(|| items.to_owned())
    };
    Order {
        order_id,
        id: order_id,
        user_id: row.get("user_id"),
        external_id: row.get("external_id"),
        lifecycle: row.get("lifecycle"),
        status: row.get("status"),
        amount: amount(row),
        currency: row.get("currency"),
        items: json(row, "items").or_else(of_payload),
        payload,
        shipping_address: row.get("shipping_address"),
        billing_address: row.get("billing_address"),
        notes: row.get("notes"),
        version: row.get("version"),
        content_version: row.get("content_version"),
        bucket: row.get("bucket"),
        created_at: row.get("created_at"),
        updated_at: row.get("updated_at"),
    }
}
