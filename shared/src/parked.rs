//! Messages that could not be handled, or not be sent, as operators see them and mend them
//! (DESIGN 6.4): list, show, redrive, discard.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use crate::{
    db::{Connection, Db, DbError},
    order::order_id_of,
};

/// Most messages in one list.
pub const MAX_LIMIT: i64 = 1_000;

/// Why a message was set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Its handling failed, or it waits behind one of its order whose did.
    Failed,
    /// Its order is not yet where it moves that, or not there.
    Early,
    /// It contradicts the final state of its order.
    Conflict,
    /// Nobody can tell what it means.
    Unreadable,
    /// Ours, and refused by the broker for good.
    Unsent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// For an earlier message of its order, or for its order to move.
    Waiting,
    /// Tried again by and by.
    Retrying,
    /// Not tried again until an operator says so.
    Dead,
    Done,
    Discarded,
}

impl Kind {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Early => "early",
            Self::Conflict => "conflict",
            Self::Unreadable => "unreadable",
            Self::Unsent => "unsent",
        }
    }

    /// From the table, whose check knows no other name.
    #[must_use]
    pub fn of(name: &str) -> Self {
        [Self::Failed, Self::Early, Self::Conflict, Self::Unsent]
            .into_iter()
            .find(|kind| kind.name() == name)
            .unwrap_or(Self::Unreadable)
    }
}

impl State {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Retrying => "retrying",
            Self::Dead => "dead",
            Self::Done => "done",
            Self::Discarded => "discarded",
        }
    }
}

/// A reason as it is kept: it may quote what somebody sent, however long, with the one character
/// that PostgreSQL's text cannot hold.
#[must_use]
pub fn short(reason: &str) -> String {
    const LONGEST: usize = 1_000;
    let mut short: String = reason.replace('\0', "\\0").chars().take(LONGEST + 1).collect();
    if short.chars().count() > LONGEST {
        short.pop();
        short.push('…');
    }
    short
}

/// Which messages are meant: those to which all that is given applies.
#[derive(Clone, Debug, Default, Deserialize, clap::Args)]
pub struct Filter {
    /// One message
    #[arg(long)]
    pub id: Option<i64>,
    /// Those of one order: its id, or the text under which others know it
    #[arg(long, value_parser = order)]
    #[serde(default, deserialize_with = "order_of")]
    pub order_id: Option<Uuid>,
    /// Those of one topic
    #[arg(long, value_parser = some_text)]
    #[serde(default, deserialize_with = "some_text_of")]
    pub topic: Option<String>,
    /// Those whose reason contains this text
    #[arg(long, value_parser = some_text)]
    #[serde(default, deserialize_with = "some_text_of")]
    pub reason: Option<String>,
    /// Those in one state
    #[arg(long)]
    pub state: Option<State>,
    /// Those of one kind
    #[arg(long)]
    pub kind: Option<Kind>,
}

/// An empty text is in every text: whoever forgot to say which would mean them all.
fn some_text(text: &str) -> Result<String, &'static str> {
    match text {
        "" => Err("must not be empty"),
        text if text.contains('\0') => Err("must not contain \\u0000"),
        text => Ok(text.to_owned()),
    }
}

/// An order's own id, or the text under which others know it.
fn order(text: &str) -> Result<Uuid, &'static str> {
    some_text(text).map(|text| order_id_of(&text))
}

fn order_of<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Uuid>, D::Error> {
    let text = String::deserialize(deserializer)?;
    order(&text).map(Some).map_err(serde::de::Error::custom)
}

fn some_text_of<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(deserializer)?;
    some_text(&text).map(Some).map_err(serde::de::Error::custom)
}

impl Filter {
    /// Does it mean everything?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.id.is_none()
            && self.order_id.is_none()
            && self.topic.is_none()
            && self.reason.is_none()
            && self.state.is_none()
            && self.kind.is_none()
    }
}

/// A message in a list.
#[derive(Debug, Serialize)]
pub struct Entry {
    pub id: i64,
    pub order_id: Option<Uuid>,
    pub topic: String,
    pub partition: Option<i32>,
    pub offset: Option<i64>,
    pub kind: String,
    pub state: String,
    pub attempts: i32,
    pub reason: Option<String>,
    #[serde(with = "time::serde::rfc3339::option")]
    pub next_attempt_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
}

/// A message with all that is known of it.
#[derive(Debug, Serialize)]
pub struct Details {
    #[serde(flatten)]
    pub entry: Entry,
    pub key: Option<String>,
    /// Pairs of name and value.
    pub headers: serde_json::Value,
    /// As text; what is no UTF-8 is replaced.
    pub body: Option<String>,
    /// Every attempt's: `{"at", "error"}`, oldest first.
    pub errors: serde_json::Value,
}

macro_rules! entry_columns {
    () => {
        "p.id, p.order_id, p.topic, p.partition, p.kafka_offset, p.kind, p.state, p.attempts, p.reason,
         p.next_attempt_at, p.created_at, p.updated_at"
    };
}

// Below the macro that it uses.
mod stuck;

pub use stuck::{Blocked, Overdue, Stuck, Unhandled, Unsent, stuck};

macro_rules! matches_filter {
    () => {
        "($1::bigint is null or p.id = $1) and ($2::uuid is null or p.order_id = $2)
         and ($3::text is null or p.topic = $3) and ($4::text is null or strpos(p.reason, $4) > 0)
         and ($5::text is null or p.state = $5) and ($6::text is null or p.kind = $6) and p.id > 0"
    };
}

/// Messages by their ids, from `after` on; those that are done only when they are asked for.
///
/// # Errors
/// When PostgreSQL is away.
pub async fn list(db: &Db, filter: &Filter, after: i64, limit: i64) -> Result<Vec<Entry>, DbError> {
    const ALL: &str = concat!(
        "select ",
        entry_columns!(),
        " from parked_messages p where ",
        matches_filter!(),
        " and p.id > $7 order by p.id limit $8"
    );
    const OPEN: &str = concat!(
        "select ",
        entry_columns!(),
        " from parked_messages p where ",
        matches_filter!(),
        " and p.id > $7 and p.state not in ('done', 'discarded') order by p.id limit $8"
    );
    let Filter { id, order_id, topic, reason, state, kind } = filter;
    let names_closed = id.is_some() || matches!(state, Some(State::Done | State::Discarded));
    let connection = db.connection().await?;
    let work = async {
        let statement = connection.prepared(if names_closed { ALL } else { OPEN }).await?;
        let (state, kind) = (state.map(State::name), kind.map(Kind::name));
        let limit = limit.clamp(1, MAX_LIMIT);
        Ok(connection.client().query(&statement, &[id, order_id, topic, reason, &state, &kind, &after, &limit]).await?)
    };
    let rows = connection.within(db.settings.query_timeout, work).await?;
    Ok(rows.iter().map(entry).collect())
}

/// One message.
///
/// # Errors
/// When PostgreSQL is away.
pub async fn show(db: &Db, id: i64) -> Result<Option<Details>, DbError> {
    const SQL: &str = concat!(
        "select ",
        entry_columns!(),
        ", p.key, p.headers::text, p.body, p.errors::text from parked_messages p where p.id = $1"
    );
    let connection = db.connection().await?;
    let work = async {
        let statement = connection.prepared(SQL).await?;
        Ok(connection.client().query_opt(&statement, &[&id]).await?)
    };
    let row = connection.within(db.settings.query_timeout, work).await?;
    let text = |bytes: Option<Vec<u8>>| bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let json = |text: &str| serde_json::from_str(text).unwrap_or_default();
    Ok(row.map(|row| Details {
        entry: entry(&row),
        key: text(row.get("key")),
        headers: json(row.get("headers")),
        body: text(row.get("body")),
        errors: json(row.get("errors")),
    }))
}

/// So many messages are redriven or discarded in one transaction.
const CHUNK: i64 = 1_000;

/// Lets dead messages be tried again from the beginning; how many. Those that wait behind them
/// follow in their sequence. A conflict is not: there is nothing that another attempt could mend.
///
/// # Errors
/// When PostgreSQL is away; some may have been redriven.
pub async fn redrive(db: &Db, filter: &Filter) -> Result<u64, DbError> {
    const SQL: &str = concat!(
        "update parked_messages p
         set state = 'retrying', attempts = 0, next_attempt_at = clock_timestamp(), updated_at = clock_timestamp()
         where p.id in (
             select p.id from parked_messages p where ",
        matches_filter!(),
        "    and p.state = 'dead' and p.kind <> 'conflict' and (p.kind <> 'unsent' or p.version is not null)
               and p.id > $7
             order by p.id limit $8)
           and p.state = 'dead'
         returning p.id"
    );
    let Filter { id, order_id, topic, reason, state, kind } = filter;
    let (state, kind) = (state.map(State::name), kind.map(Kind::name));
    let connection = db.connection().await?;
    let (mut count, mut after) = (0, 0);
    loop {
        let work = async {
            let statement = connection.prepared(SQL).await?;
            let params: [&(dyn ToSql + Sync); 8] = [id, order_id, topic, reason, &state, &kind, &after, &CHUNK];
            Ok(connection.client().query(&statement, &params).await?)
        };
        let rows = connection.within(db.settings.write_timeout, work).await?;
        let Some(last) = rows.iter().map(|row| row.get::<_, i64>(0)).max() else { break };
        (count, after) = (count + rows.len() as u64, last);
    }
    tracing::info!(?filter, count, "parked messages are tried again, as an operator wishes");
    metrics::counter!("orderstream_parked_redriven_total").increment(count);
    Ok(count)
}

/// Gives messages up that nobody works on; how many. Those that wait behind them go on. The history
/// of their orders says so.
///
/// # Errors
/// When PostgreSQL is away; some may have been discarded.
pub async fn discard(db: &Db, filter: &Filter) -> Result<u64, DbError> {
    let connection = db.connection().await?;
    let (mut count, mut after) = (0, 0);
    while let Some((discarded, last)) =
        connection.transaction(db.settings.write_timeout, discard_some(&connection, filter, after)).await?
    {
        (count, after) = (count + discarded, last);
    }
    tracing::info!(?filter, count, "parked messages are given up, as an operator wishes");
    metrics::counter!("orderstream_parked_discarded_total").increment(count);
    Ok(count)
}

/// Of those after this id the first; how many were discarded, and the last id that was looked at.
async fn discard_some(connection: &Connection, filter: &Filter, after: i64) -> Result<Option<(u64, i64)>, DbError> {
    const WHICH: &str = concat!(
        "select p.id, p.order_id from parked_messages p where ",
        matches_filter!(),
        " and p.id > $7 and p.state not in ('done', 'discarded') order by p.id limit $8"
    );
    // The orders' locks first, as everybody takes them: who parks a message behind one of these
    // at this moment must see it as it was, or as it will be.
    const ORDERS: &str = "
        select o.order_id from unnest($1::uuid[]) as i(order_id) join orders o on o.order_id = i.order_id
        order by o.order_id for update of o";
    // And the filter once more: what was meant may have gone on while we waited for the locks.
    const DISCARD: &str = concat!(
        "with gone as (
             update parked_messages p
             set state = 'discarded', next_attempt_at = null, updated_at = clock_timestamp()
             where ",
        matches_filter!(),
        "      and p.id = any ($7::bigint[]) and p.state not in ('done', 'discarded')
             returning p.id, p.order_id
         ), told as (
             insert into order_events (order_id, version, cause, type, from_status, to_status, ignored, at)
             select o.order_id, o.version, 'parked message ' || gone.id, 'discarded', o.status, o.status, true,
                 clock_timestamp()
             from gone join orders o on o.order_id = gone.order_id
             on conflict do nothing
         )
         select count(*) from gone"
    );
    let client = connection.client();
    let Filter { id, order_id, topic, reason, state, kind } = filter;
    let (state, kind) = (state.map(State::name), kind.map(Kind::name));
    let params: [&(dyn ToSql + Sync); 8] = [id, order_id, topic, reason, &state, &kind, &after, &CHUNK];
    let which = client.query(&connection.prepared(WHICH).await?, &params).await?;
    let ids: Vec<i64> = which.iter().map(|row| row.get(0)).collect();
    let Some(last) = ids.last().copied() else { return Ok(None) };
    let mut orders: Vec<Uuid> = which.iter().filter_map(|row| row.get(1)).collect();
    orders.sort_unstable();
    orders.dedup();
    client.query(&connection.prepared(ORDERS).await?, &[&orders]).await?;
    let params: [&(dyn ToSql + Sync); 7] = [id, order_id, topic, reason, &state, &kind, &ids];
    let discarded: i64 = client.query_one(&connection.prepared(DISCARD).await?, &params).await?.get(0);
    release_next(connection, &orders).await?;
    Ok(Some((u64::try_from(discarded).unwrap_or(0), last)))
}

/// Lets the first of these orders' waiting messages be tried, where no other is before it. Under
/// the orders' locks. How many there are.
///
/// # Errors
/// When PostgreSQL is away.
pub async fn release_next(connection: &Connection, orders: &[Uuid]) -> Result<u64, DbError> {
    const SQL: &str = "
        update parked_messages p
        set state = 'retrying', next_attempt_at = clock_timestamp(), updated_at = clock_timestamp()
        from unnest($1::uuid[]) as i(order_id)
        where p.state = 'waiting' and p.id = (
            select first.id from parked_messages first
            where first.order_id = i.order_id and first.kind = 'failed'
              and first.state in ('waiting', 'retrying', 'dead')
            order by first.id limit 1)";
    let statement = connection.prepared(SQL).await?;
    Ok(connection.client().execute(&statement, &[&orders]).await?)
}

fn entry(row: &Row) -> Entry {
    Entry {
        id: row.get("id"),
        order_id: row.get("order_id"),
        topic: row.get("topic"),
        partition: row.get("partition"),
        offset: row.get("kafka_offset"),
        kind: row.get("kind"),
        state: row.get("state"),
        attempts: row.get("attempts"),
        reason: row.get("reason"),
        next_attempt_at: row.get("next_attempt_at"),
        created_at: row.get("created_at"),
        updated_at: row.get("updated_at"),
    }
}
