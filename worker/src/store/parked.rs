//! SQL as verbs: messages that wait for another attempt, or for an operator.

use std::collections::{BTreeMap, HashSet};

use shared::{
    db::{Connection, DbError},
    message::{Headers, Message},
    parked::{Kind, State, short},
};
use time::OffsetDateTime;
use tokio_postgres::Row;
use uuid::Uuid;

use crate::record::Record;

/// A record to be set aside.
#[derive(Clone, Debug)]
pub(crate) struct Park<'a> {
    pub record: &'a Record,
    pub order_id: Option<Uuid>,
    pub kind: Kind,
    pub state: State,
    pub reason: String,
    pub next_attempt_at: Option<OffsetDateTime>,
}

/// A message that is tried again.
#[derive(Debug)]
pub(crate) struct Parked {
    pub order_id: Option<Uuid>,
    pub kind: Kind,
    pub attempts: u32,
    pub record: Record,
    /// Of one that the broker had refused: where it lay in the outbox.
    pub version: Option<i64>,
    pub seq: Option<i16>,
}

/// What became of an attempt.
#[derive(Debug)]
pub(crate) struct Attempt<'a> {
    /// Whose message it is, if that is known by now.
    pub order_id: Option<Uuid>,
    pub kind: Kind,
    pub state: State,
    pub attempts: u32,
    pub error: Option<&'a str>,
    pub next_attempt_at: Option<OffsetDateTime>,
}

/// Which of these orders have a failed message that later ones wait behind?
pub(crate) async fn blocked(connection: &Connection, ids: &[Uuid]) -> Result<HashSet<Uuid>, DbError> {
    const SQL: &str = "
        select i.order_id from unnest($1::uuid[]) as i(order_id)
        where (select true from parked_messages p
               where p.order_id = i.order_id and p.kind = 'failed' and p.state in ('waiting', 'retrying', 'dead')
               limit 1)";
    let statement = connection.prepared(SQL).await?;
    let rows = connection.client().query(&statement, &[&ids]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Which of these records were parked before, by their place in this list? They are looked after,
/// or were given up by an operator.
pub(crate) async fn known(connection: &Connection, records: &[&Record]) -> Result<HashSet<usize>, DbError> {
    const SQL: &str = "
        select i.place from unnest($1::text[], $2::integer[], $3::bigint[], $4::bigint[]) with ordinality
            as i(topic, partition, kafka_offset, kafka_timestamp, place)
        where (select true from parked_messages p
               where p.topic = i.topic and p.partition = i.partition and p.kafka_offset = i.kafka_offset
                 and p.kafka_timestamp = i.kafka_timestamp limit 1)";
    let statement = connection.prepared(SQL).await?;
    let rows = connection
        .client()
        .query(
            &statement,
            &[
                &records.iter().map(|record| record.topic.as_str()).collect::<Vec<_>>(),
                &records.iter().map(|record| record.partition).collect::<Vec<_>>(),
                &records.iter().map(|record| record.offset).collect::<Vec<_>>(),
                &records.iter().map(|record| record.timestamp).collect::<Vec<_>>(),
            ],
        )
        .await?;
    Ok(rows.iter().filter_map(|row| usize::try_from(row.get::<_, i64>(0) - 1).ok()).collect())
}

/// Sets a record aside, once.
pub(crate) async fn insert(connection: &Connection, park: &Park<'_>, at: OffsetDateTime) -> Result<(), DbError> {
    const SQL: &str = "
        insert into parked_messages
            (order_id, topic, partition, kafka_offset, kafka_timestamp, key, headers, body, state, kind, attempts,
             reason, errors, next_attempt_at, created_at, updated_at)
        values ($1, $2, $3, $4, $5, $6, $7::text::json, $8, $9, $10, $11, $12, $13::text::jsonb, $14, $15, $15)
        on conflict do nothing";
    let Park { record, order_id, kind, state, reason, next_attempt_at } = park;
    // One that waits behind another has not been tried.
    let is_tried = !(*kind == Kind::Failed && *state == State::Waiting);
    let errors = if is_tried { format!("[{}]", error_json(reason, at)) } else { "[]".to_owned() };
    let statement = connection.prepared(SQL).await?;
    connection
        .client()
        .execute(
            &statement,
            &[
                order_id,
                &record.topic,
                &record.partition,
                &record.offset,
                &record.timestamp,
                &record.key,
                &record.headers().to_json(),
                &record.body,
                &state.name(),
                &kind.name(),
                &i32::from(is_tried),
                &short(reason),
                &errors,
                next_attempt_at,
                &at,
            ],
        )
        .await?;
    Ok(())
}

/// Messages whose next attempt is due, the longest due first; only those of these topics and our
/// own unsent ones: what another release knows how to read is that one's.
pub(crate) async fn due(
    connection: &Connection,
    at: OffsetDateTime,
    limit: i64,
    topics: &[String],
) -> Result<Vec<i64>, DbError> {
    const SQL: &str = "
        select id from parked_messages
        where next_attempt_at <= $1 and state in ('waiting', 'retrying')
          and (kind = 'unsent' or topic = any ($3::text[]))
        order by next_attempt_at, id limit $2";
    let statement = connection.prepared(SQL).await?;
    let rows = connection.client().query(&statement, &[&at, &limit, &topics]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Lets messages be tried that wait behind none: whoever was to let them go has missed them.
pub(crate) async fn release_forgotten(connection: &Connection) -> Result<u64, DbError> {
    const SQL: &str = "
        update parked_messages p
        set state = 'retrying', next_attempt_at = clock_timestamp(), updated_at = clock_timestamp()
        where p.kind = 'failed' and p.state = 'waiting'
          and (select true from parked_messages before
               where before.order_id = p.order_id and before.id < p.id and before.kind = 'failed'
                 and before.state in ('waiting', 'retrying', 'dead') limit 1) is null";
    let statement = connection.prepared(SQL).await?;
    Ok(connection.client().execute(&statement, &[]).await?)
}

macro_rules! parked_columns {
    () => {
        "order_id, topic, partition, kafka_offset, kafka_timestamp, key, headers::text, body, kind, attempts, version, seq"
    };
}

/// A message as it is now, not locked: whose it is must be known first, since the order's lock
/// comes before the message's.
pub(crate) async fn read(connection: &Connection, id: i64) -> Result<Option<Parked>, DbError> {
    const SQL: &str = concat!("select ", parked_columns!(), " from parked_messages where id = $1");
    let statement = connection.prepared(SQL).await?;
    Ok(connection.client().query_opt(&statement, &[&id]).await?.as_ref().map(parked))
}

/// Locks a message that is still due; none when somebody else has tried it, or has it in hand.
pub(crate) async fn lock_due(connection: &Connection, id: i64, at: OffsetDateTime) -> Result<Option<Parked>, DbError> {
    const SQL: &str = concat!(
        "select ",
        parked_columns!(),
        " from parked_messages
         where id = $1 and next_attempt_at <= $2 and state in ('waiting', 'retrying')
         for update skip locked"
    );
    let statement = connection.prepared(SQL).await?;
    Ok(connection.client().query_opt(&statement, &[&id, &at]).await?.as_ref().map(parked))
}

fn parked(row: &Row) -> Parked {
    let record = Record {
        topic: row.get("topic"),
        partition: row.get::<_, Option<i32>>("partition").unwrap_or(-1),
        offset: row.get::<_, Option<i64>>("kafka_offset").unwrap_or(-1),
        timestamp: row.get::<_, Option<i64>>("kafka_timestamp").unwrap_or(-1),
        key: row.get("key"),
        headers: Headers::from_json(row.get("headers")).ok(),
        body: row.get("body"),
    };
    Parked {
        order_id: row.get("order_id"),
        kind: Kind::of(row.get("kind")),
        attempts: u32::try_from(row.get::<_, i32>("attempts")).unwrap_or(0),
        record,
        version: row.get("version"),
        seq: row.get("seq"),
    }
}

/// Is there a failed message of this order before this one? Under the order's lock.
pub(crate) async fn is_behind(connection: &Connection, order_id: Uuid, id: i64) -> Result<bool, DbError> {
    const SQL: &str = "
        select 1 from parked_messages
        where order_id = $1 and id < $2 and kind = 'failed' and state in ('waiting', 'retrying', 'dead') limit 1";
    let statement = connection.prepared(SQL).await?;
    Ok(connection.client().query_opt(&statement, &[&order_id, &id]).await?.is_some())
}

/// Lets a message wait for its turn behind an earlier one of its order.
pub(crate) async fn put_behind(connection: &Connection, id: i64, order_id: Uuid) -> Result<(), DbError> {
    const SQL: &str = "
        update parked_messages
        set order_id = $2, kind = 'failed', state = 'waiting', next_attempt_at = null, updated_at = clock_timestamp()
        where id = $1";
    let statement = connection.prepared(SQL).await?;
    connection.client().execute(&statement, &[&id, &order_id]).await?;
    Ok(())
}

/// Keeps what became of an attempt; its error is added to those before.
pub(crate) async fn record_attempt(
    connection: &Connection,
    id: i64,
    attempt: &Attempt<'_>,
    at: OffsetDateTime,
) -> Result<(), DbError> {
    // So many errors are enough to see what is the matter.
    const SQL: &str = "
        update parked_messages
        set kind = $2, state = $3, attempts = $4, reason = coalesce($5, reason), next_attempt_at = $6, updated_at = $7,
            order_id = coalesce(order_id, $9),
            errors = case
                when $8::text is null then errors
                when jsonb_array_length(errors) >= 20 then (errors - 0) || $8::text::jsonb
                else errors || $8::text::jsonb
            end
        where id = $1";
    let statement = connection.prepared(SQL).await?;
    let reason = attempt.error.map(short);
    let json = attempt.error.map(|error| error_json(error, at));
    connection
        .client()
        .execute(
            &statement,
            &[
                &id,
                &attempt.kind.name(),
                &attempt.state.name(),
                &i32::try_from(attempt.attempts).unwrap_or(i32::MAX),
                &reason,
                &attempt.next_attempt_at,
                &at,
                &json,
                &attempt.order_id,
            ],
        )
        .await?;
    Ok(())
}

/// Lets a message be tried later, without counting that as an attempt.
pub(crate) async fn postpone(connection: &Connection, id: i64, later: OffsetDateTime) -> Result<(), DbError> {
    const SQL: &str = "
        update parked_messages set next_attempt_at = $2 where id = $1 and state in ('waiting', 'retrying')";
    let statement = connection.prepared(SQL).await?;
    connection.client().execute(&statement, &[&id, &later]).await?;
    Ok(())
}

/// Lets messages that came too early to these orders be tried again now, those that were given up
/// before there was an order included; how many.
pub(crate) async fn wake_early(connection: &Connection, ids: &[Uuid], at: OffsetDateTime) -> Result<u64, DbError> {
    const SQL: &str = "
        update parked_messages p set state = 'waiting', next_attempt_at = $2
        from unnest($1::uuid[]) as i(order_id)
        where p.order_id = i.order_id and p.kind = 'early' and p.state in ('waiting', 'dead')
          and (p.next_attempt_at is null or p.next_attempt_at > $2)";
    let statement = connection.prepared(SQL).await?;
    Ok(connection.client().execute(&statement, &[&ids, &at]).await?)
}

/// Puts a message that the broker had refused back into the outbox, as it was.
pub(crate) async fn send_again(connection: &Connection, message: &Message) -> Result<(), DbError> {
    const SQL: &str = "
        insert into outbox (order_id, version, seq, topic, key, headers, body)
        values ($1, $2, $3, $4, $5, $6::text::json, $7)
        on conflict do nothing";
    let Message { order_id, version, seq, topic, key, headers, body } = message;
    let statement = connection.prepared(SQL).await?;
    connection.client().execute(&statement, &[order_id, version, seq, topic, key, &headers.to_json(), body]).await?;
    Ok(())
}

/// How many messages are parked, by state and kind.
pub(crate) async fn count(connection: &Connection) -> Result<BTreeMap<(String, String), i64>, DbError> {
    const SQL: &str = "
        select state, kind, count(*) from parked_messages where state not in ('done', 'discarded') group by state, kind";
    let statement = connection.prepared(SQL).await?;
    let rows = connection.client().query(&statement, &[]).await?;
    Ok(rows.iter().map(|row| ((row.get(0), row.get(1)), row.get(2))).collect())
}

fn error_json(error: &str, at: OffsetDateTime) -> String {
    let at = at.format(&time::format_description::well_known::Rfc3339).unwrap_or_default();
    serde_json::json!({ "at": at, "error": short(error) }).to_string()
}
