//! SQL as verbs: what the worker reads and writes of orders.

pub(crate) mod parked;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use rust_decimal::Decimal;
use serde_json::value::RawValue;
use shared::{
    db::{Connection, DbError},
    lifecycle::Lifecycles,
    message::{Answer, Message},
    money::Money,
    outbox::{Columns, Placed, placed},
};
use time::OffsetDateTime;
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use crate::handler::{Handling, Order};

/// A handling to be written, with what it belongs to.
pub(crate) struct Handled {
    pub order_id: Uuid,
    pub cause: String,
    pub correlation_id: Option<Uuid>,
    pub handling: Handling,
}

/// An order whose row is locked.
pub(crate) struct Locked {
    pub order: Order,
    pub user_id: String,
    pub external_id: Option<String>,
    pub items: Option<Box<RawValue>>,
    pub payload: Option<Box<RawValue>>,
}

/// An order to be made of a message that knows little of it.
pub(crate) struct Found<'a> {
    pub order_id: Uuid,
    pub user_id: &'a str,
    pub external_id: Option<&'a str>,
    pub lifecycle: &'a str,
    pub status: &'a str,
    pub cause: String,
}

/// Moves the orders that are still as their event told, and writes the history and the messages;
/// which those were. The version is the guard: whoever handled the event before, or changed the
/// order since, has raised it. Orders with something parked are left alone.
pub(crate) async fn move_unchanged(
    connection: &Connection,
    rows: &[Handled],
    messages: Vec<Arc<Message>>,
    at: OffsetDateTime,
) -> Result<(HashSet<Uuid>, Vec<Placed>), DbError> {
    const SQL: &str = "
        with i as materialized (
            select * from unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::numeric[], $6::text[],
                $7::text[], $8::text[], $9::uuid[], $10::text[], $11::timestamptz[])
            as i(order_id, version, from_status, status, amount, currency, cause, type, correlation_id, answer, due_at)
        ), moved as (
            update orders o
            set status = i.status, version = i.version, amount = i.amount, currency = i.currency, due_at = i.due_at,
                updated_at = greatest($12::timestamptz, o.updated_at)
            from i
            where o.order_id = i.order_id and o.version = i.version - 1 and o.status = i.from_status
              and (select true from parked_messages p
                   where p.order_id = i.order_id and p.state <> 'done' limit 1) is null
            returning o.order_id, i.version, i.cause, i.type, i.from_status, i.status, i.correlation_id, i.answer
        ), told as (
            insert into order_events
                (order_id, version, cause, type, from_status, to_status, correlation_id, answer, at)
            select order_id, version, cause, type, from_status, status, correlation_id, answer::json, $12::timestamptz
            from moved
        ), sent as (
            insert into outbox (order_id, version, seq, topic, key, headers, body)
            select m.order_id, m.version, m.seq, m.topic, m.key, m.headers::json, m.body
            from unnest($13::uuid[], $14::bigint[], $15::smallint[], $16::text[], $17::text[], $18::text[], $19::text[])
                as m(order_id, version, seq, topic, key, headers, body)
            where m.order_id in (select order_id from moved)
            returning order_id, version, seq, ctid::text as place
        )
        select order_id, version, null::smallint as seq, null as place from moved
        union all
        select order_id, version, seq, place from sent";
    let columns = Columns::of(&messages);
    let [ids, versions, seqs, topics, keys, headers, bodies] = columns.params();
    let statement = connection.prepared(SQL).await?;
    let written = connection
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
                &column(rows, |row| row.cause.as_str()),
                &column(rows, |row| row.handling.name.as_str()),
                &column(rows, |row| row.correlation_id),
                &column(rows, |row| answer(&row.handling.answer)),
                &column(rows, |row| row.handling.due_at),
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
    let (mut moved, mut places) = (HashSet::with_capacity(rows.len()), HashMap::new());
    for row in &written {
        match (row.get::<_, Option<i16>>("seq"), row.get::<_, Option<String>>("place")) {
            (Some(seq), Some(place)) => {
                places.insert((row.get(0), row.get(1), seq), place);
            }
            _ => {
                moved.insert(row.get(0));
            }
        }
    }
    Ok((moved, placed(messages, places)))
}

macro_rules! locked_columns {
    () => {
        "o.order_id, o.lifecycle, o.status, o.version, o.content_version, o.amount, o.currency, o.due_at,
         o.user_id, o.external_id,
         case when o.lifecycle = any ($2::text[]) then o.items::text end as items,
         case when o.lifecycle = any ($2::text[]) then o.payload::text end as payload"
    };
}

/// Locks these orders, in the order of their ids, so that two who want the same ones take turns.
/// What was ordered, which may be much, is read only of orders of these lifecycles.
pub(crate) async fn lock_orders(
    connection: &Connection,
    ids: &[Uuid],
    telling: &[&str],
) -> Result<HashMap<Uuid, Locked>, DbError> {
    const SQL: &str = concat!(
        "select ",
        locked_columns!(),
        " from orders o join unnest($1::uuid[]) as i(order_id) on o.order_id = i.order_id
         order by o.order_id
         for update of o"
    );
    let statement = connection.prepared(SQL).await?;
    let rows = connection.client().query(&statement, &[&ids, &telling]).await?;
    Ok(rows.iter().map(locked).collect())
}

/// Which of these orders does somebody else keep locked now?
pub(crate) async fn locked_by_others(connection: &Connection, ids: &[Uuid]) -> Result<HashSet<Uuid>, DbError> {
    const ALL: &str = "
        select o.order_id from unnest($1::uuid[]) as i(order_id) join orders o on o.order_id = i.order_id";
    const FREE: &str = "
        select o.order_id from orders o join unnest($1::uuid[]) as i(order_id) on o.order_id = i.order_id
        for update of o skip locked";
    let statement = connection.prepared(ALL).await?;
    let mut locked: HashSet<Uuid> =
        connection.client().query(&statement, &[&ids]).await?.iter().map(|row| row.get(0)).collect();
    let statement = connection.prepared(FREE).await?;
    for row in connection.client().query(&statement, &[&ids]).await? {
        locked.remove(&row.get(0));
    }
    Ok(locked)
}

/// Locks orders whose time has come, the longest due first; not those that another clock or a
/// client has in hand, nor those with a failed message, nor these; only those after this time and
/// id, and where a lifecycle of ours has the clock move orders.
pub(crate) async fn lock_due(
    connection: &Connection,
    at: OffsetDateTime,
    limit: i64,
    after: Option<(OffsetDateTime, Uuid)>,
    except: &[Uuid],
    lifecycles: &Lifecycles,
) -> Result<HashMap<Uuid, Locked>, DbError> {
    const SQL: &str = concat!(
        "select ",
        locked_columns!(),
        " from orders o
         where o.due_at <= $1 and (o.due_at, o.order_id) > ($6::timestamptz, $7::uuid)
           and o.order_id <> all ($4::uuid[])
           and o.lifecycle || ' ' || o.status = any ($5::text[])
           and (select true from parked_messages p
                where p.order_id = o.order_id and p.kind = 'failed' and p.state in ('waiting', 'retrying', 'dead')
                limit 1) is null
         order by o.due_at, o.order_id
         limit $3
         for update of o skip locked"
    );
    let statement = connection.prepared(SQL).await?;
    let (after_at, after_id) = after.unwrap_or((OffsetDateTime::UNIX_EPOCH, Uuid::nil()));
    let (telling, timed) = (lifecycles.telling_content(), lifecycles.timed());
    let params: [&(dyn ToSql + Sync); 7] = [&at, &telling, &limit, &except, &timed, &after_at, &after_id];
    let rows = connection.client().query(&statement, &params).await?;
    Ok(rows.iter().map(locked).collect())
}

fn locked(row: &Row) -> (Uuid, Locked) {
    let json = |column: &str| row.get::<_, Option<String>>(column).and_then(|text| RawValue::from_string(text).ok());
    let order = Order {
        lifecycle: row.get("lifecycle"),
        status: row.get("status"),
        version: row.get("version"),
        content_version: row.get("content_version"),
        amount: row.get::<_, Option<Decimal>>("amount").and_then(|amount| Money::try_from(amount).ok()),
        currency: row.get("currency"),
        due_at: row.get("due_at"),
    };
    let locked = Locked {
        order,
        user_id: row.get("user_id"),
        external_id: row.get("external_id"),
        items: json("items"),
        payload: json("payload"),
    };
    (row.get("order_id"), locked)
}

/// Makes orders that so far only a message knows of, unless somebody else was quicker.
pub(crate) async fn create_orders(
    connection: &Connection,
    orders: &[Found<'_>],
    at: OffsetDateTime,
) -> Result<(), DbError> {
    const SQL: &str = "
        with i as materialized (
            select * from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
            as i(order_id, user_id, external_id, lifecycle, status, cause)
        ), stored as (
            insert into orders (order_id, user_id, external_id, lifecycle, status, version, content_version,
                created_at, updated_at)
            select order_id, user_id, external_id, lifecycle, status, 1, 1, $7::timestamptz, $7::timestamptz
            from i order by order_id
            on conflict do nothing
            returning order_id
        ), fresh as materialized (
            select i.* from i where order_id in (select order_id from stored)
        ), refs as (
            insert into order_refs (user_id, external_id, order_id, fingerprint)
            select user_id, external_id, order_id, ''::bytea from fresh where external_id is not null
            order by user_id, external_id
            on conflict do nothing
        )
        insert into order_events (order_id, version, cause, type, to_status, at)
        select order_id, 1, cause, 'order.created', status, $7::timestamptz from fresh";
    let statement = connection.prepared(SQL).await?;
    connection
        .client()
        .execute(
            &statement,
            &[
                &column(orders, |order| order.order_id),
                &column(orders, |order| order.user_id),
                &column(orders, |order| order.external_id),
                &column(orders, |order| order.lifecycle),
                &column(orders, |order| order.status),
                &column(orders, |order| order.cause.as_str()),
                &at,
            ],
        )
        .await?;
    Ok(())
}

/// What was answered to these causes before, if they were handled.
pub(crate) async fn answers(
    connection: &Connection,
    causes: &[(Uuid, String)],
) -> Result<HashMap<(Uuid, String), Answer>, DbError> {
    const SQL: &str = "
        select e.order_id, e.cause, e.answer::text
        from order_events e join unnest($1::uuid[], $2::text[]) as i(order_id, cause)
            on e.order_id = i.order_id and e.cause = i.cause
        where e.answer is not null";
    let ids: Vec<_> = causes.iter().map(|(order_id, _)| *order_id).collect();
    let causes: Vec<_> = causes.iter().map(|(_, cause)| cause.as_str()).collect();
    let statement = connection.prepared(SQL).await?;
    let rows = connection.client().query(&statement, &[&ids, &causes]).await?;
    Ok(rows
        .iter()
        .filter_map(|row| {
            Some(((row.get("order_id"), row.get("cause")), serde_json::from_str(row.get("answer")).ok()?))
        })
        .collect())
}

/// Writes handlings of locked orders: the history of each, each order as the last of its handlings
/// leaves it, and the messages, which come back with where they lie.
pub(crate) async fn write_handlings(
    connection: &Connection,
    rows: &[Handled],
    orders: &[(Uuid, i64, &Order)],
    messages: Vec<Arc<Message>>,
    at: OffsetDateTime,
) -> Result<Vec<Placed>, DbError> {
    const SQL: &str = "
        with told as (
            insert into order_events
                (order_id, version, cause, type, from_status, to_status, ignored, correlation_id, answer, at)
            select i.order_id, i.version, i.cause, i.type, i.from_status, i.status, i.ignored, i.correlation_id,
                i.answer::json, $10::timestamptz
            from unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::boolean[],
                $8::uuid[], $9::text[])
                as i(order_id, version, cause, type, from_status, status, ignored, correlation_id, answer)
        ), changed as (
            update orders o
            set status = i.status, version = i.version, amount = i.amount, currency = i.currency, due_at = i.due_at,
                updated_at = greatest($10::timestamptz, o.updated_at)
            from unnest($11::uuid[], $12::bigint[], $13::bigint[], $14::text[], $15::numeric[], $16::text[],
                $17::timestamptz[])
                as i(order_id, found, version, status, amount, currency, due_at)
            where o.order_id = i.order_id and o.version = i.found
        )
        insert into outbox (order_id, version, seq, topic, key, headers, body)
        select m.order_id, m.version, m.seq, m.topic, m.key, m.headers::json, m.body
        from unnest($18::uuid[], $19::bigint[], $20::smallint[], $21::text[], $22::text[], $23::text[], $24::text[])
            as m(order_id, version, seq, topic, key, headers, body)
        returning order_id, version, seq, ctid::text";
    let columns = Columns::of(&messages);
    let [ids, versions, seqs, topics, keys, headers, bodies] = columns.params();
    let statement = connection.prepared(SQL).await?;
    let sent = connection
        .client()
        .query(
            &statement,
            &[
                &column(rows, |row| row.order_id),
                &column(rows, |row| row.handling.answer.order_version),
                &column(rows, |row| row.cause.as_str()),
                &column(rows, |row| row.handling.name.as_str()),
                &column(rows, |row| row.handling.from_status.as_str()),
                &column(rows, |row| row.handling.answer.order_status.as_str()),
                &column(rows, |row| row.handling.kind.is_ignored()),
                &column(rows, |row| row.correlation_id),
                &column(rows, |row| answer(&row.handling.answer)),
                &at,
                &column(orders, |(id, ..)| *id),
                &column(orders, |(_, found, _)| *found),
                &column(orders, |(.., order)| order.version),
                &column(orders, |(.., order)| order.status.as_str()),
                &column(orders, |(.., order)| order.amount.map(Money::decimal)),
                &column(orders, |(.., order)| order.currency.as_deref()),
                &column(orders, |(.., order)| order.due_at),
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

fn answer(answer: &Answer) -> String {
    // Our own type always serializes.
    serde_json::to_string(answer).unwrap_or_default()
}

fn column<'a, T, R>(rows: &'a [R], of: impl Fn(&'a R) -> T) -> Vec<T> {
    rows.iter().map(of).collect()
}
