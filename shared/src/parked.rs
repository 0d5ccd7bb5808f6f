//! Messages that could not be handled, or not be sent, as operators see them and mend them
//! (DESIGN 6.4): list, show, redrive, discard, and what is stuck.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio_postgres::Row;
use uuid::Uuid;

use crate::db::{Connection, Db, DbError};

/// Most messages in one list.
pub const MAX_LIMIT: i64 = 1_000;
/// Most entries of each kind among those that are stuck.
const STUCK_LIMIT: i64 = 100;

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

/// Which messages are meant: those to which all that is given applies.
#[derive(Clone, Debug, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// One message
    #[arg(long)]
    pub id: Option<i64>,
    /// Those of one order
    #[arg(long)]
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
    if text.is_empty() { Err("must not be empty") } else { Ok(text.to_owned()) }
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

macro_rules! matches_filter {
    () => {
        "($1::bigint is null or p.id = $1) and ($2::uuid is null or p.order_id = $2)
         and ($3::text is null or p.topic = $3) and ($4::text is null or strpos(p.reason, $4) > 0)
         and ($5::text is null or p.state = $5) and ($6::text is null or p.kind = $6)"
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

/// Lets dead messages be tried again from the beginning; how many. Those that wait behind them
/// follow in their sequence. A conflict is not: there is nothing that another attempt could mend.
///
/// # Errors
/// When PostgreSQL is away.
pub async fn redrive(db: &Db, filter: &Filter) -> Result<u64, DbError> {
    const SQL: &str = concat!(
        "update parked_messages p
         set state = 'retrying', attempts = 0, next_attempt_at = clock_timestamp(), updated_at = clock_timestamp()
         where ",
        matches_filter!(),
        " and p.state = 'dead' and p.kind <> 'conflict' and (p.kind <> 'unsent' or p.version is not null)"
    );
    let connection = db.connection().await?;
    connection.within(db.settings.write_timeout, update(&connection, SQL, filter)).await
}

/// Gives messages up that nobody works on; how many. Those that wait behind them go on.
///
/// # Errors
/// When PostgreSQL is away.
pub async fn discard(db: &Db, filter: &Filter) -> Result<u64, DbError> {
    const WHICH: &str = concat!(
        "select p.id, p.order_id from parked_messages p where ",
        matches_filter!(),
        " and p.state not in ('done', 'discarded')"
    );
    // The orders' locks first, as everybody takes them: who parks a message behind one of these
    // at this moment must see it as it was, or as it will be.
    const ORDERS: &str = "
        select o.order_id from unnest($1::uuid[]) as i(order_id) join orders o on o.order_id = i.order_id
        order by o.order_id for update of o";
    const DISCARD: &str = "
        update parked_messages p
        set state = 'discarded', next_attempt_at = null, updated_at = clock_timestamp()
        from unnest($1::bigint[]) as i(id)
        where p.id = i.id and p.state not in ('done', 'discarded')";
    let connection = db.connection().await?;
    let work = async {
        let client = connection.client();
        let Filter { id, order_id, topic, reason, state, kind } = filter;
        let (state, kind) = (state.map(State::name), kind.map(Kind::name));
        let which =
            client.query(&connection.prepared(WHICH).await?, &[id, order_id, topic, reason, &state, &kind]).await?;
        let ids: Vec<i64> = which.iter().map(|row| row.get(0)).collect();
        let mut orders: Vec<Uuid> = which.iter().filter_map(|row| row.get(1)).collect();
        orders.sort_unstable();
        orders.dedup();
        client.query(&connection.prepared(ORDERS).await?, &[&orders]).await?;
        let discarded = client.execute(&connection.prepared(DISCARD).await?, &[&ids]).await?;
        release_next(&connection, &orders).await?;
        Ok(discarded)
    };
    connection.transaction(db.settings.write_timeout, work).await
}

async fn update(connection: &Connection, sql: &'static str, filter: &Filter) -> Result<u64, DbError> {
    let Filter { id, order_id, topic, reason, state, kind } = filter;
    let (state, kind) = (state.map(State::name), kind.map(Kind::name));
    let statement = connection.prepared(sql).await?;
    Ok(connection.client().execute(&statement, &[id, order_id, topic, reason, &state, &kind]).await?)
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

/// What does not get on by itself; of each kind the oldest.
#[derive(Debug, Serialize)]
pub struct Stuck {
    /// Orders that the clock should have moved.
    pub overdue: Vec<Overdue>,
    /// Messages that contradict their order's final state.
    pub conflicts: Vec<Entry>,
    /// Messages that should have been sent.
    pub unsent: Vec<Unsent>,
    /// Orders whose messages wait behind a dead one.
    pub blocked: Vec<Blocked>,
}

#[derive(Debug, Serialize)]
pub struct Overdue {
    pub order_id: Uuid,
    pub lifecycle: String,
    pub status: String,
    #[serde(with = "time::serde::rfc3339")]
    pub due_at: OffsetDateTime,
}

#[derive(Debug, Serialize)]
pub struct Unsent {
    pub order_id: Uuid,
    pub version: i64,
    pub topic: String,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

#[derive(Debug, Serialize)]
pub struct Blocked {
    pub order_id: Uuid,
    /// The dead message.
    pub parked_id: i64,
    pub reason: Option<String>,
    pub waiting: i64,
}

/// What is stuck, where `patience` is the age from which something should have moved.
///
/// # Errors
/// When PostgreSQL is away.
pub async fn stuck(db: &Db, patience: std::time::Duration) -> Result<Stuck, DbError> {
    const OVERDUE: &str = "
        select order_id, lifecycle, status, due_at from orders
        where due_at < clock_timestamp() - $1::float8 * interval '1 second' order by due_at limit $2";
    const CONFLICTS: &str = concat!(
        "select ",
        entry_columns!(),
        " from parked_messages p where p.kind = 'conflict' and p.state = 'dead' order by p.id limit $1"
    );
    const UNSENT: &str = "
        select order_id, version, topic, created_at from outbox
        where created_at < clock_timestamp() - $1::float8 * interval '1 second' order by created_at limit $2";
    const BLOCKED: &str = "
        select p.order_id, p.id, p.reason,
            (select count(*) from parked_messages w
             where w.order_id = p.order_id and w.kind = 'failed' and w.state = 'waiting') as waiting
        from parked_messages p
        where p.kind = 'failed' and p.state = 'dead' and p.order_id is not null order by p.id limit $1";
    let connection = db.connection().await?;
    let seconds = patience.as_secs_f64();
    let work = async {
        let client = connection.client();
        let overdue = client.query(&connection.prepared(OVERDUE).await?, &[&seconds, &STUCK_LIMIT]).await?;
        let conflicts = client.query(&connection.prepared(CONFLICTS).await?, &[&STUCK_LIMIT]).await?;
        let unsent = client.query(&connection.prepared(UNSENT).await?, &[&seconds, &STUCK_LIMIT]).await?;
        let blocked = client.query(&connection.prepared(BLOCKED).await?, &[&STUCK_LIMIT]).await?;
        Ok(Stuck {
            overdue: overdue
                .iter()
                .map(|row| Overdue {
                    order_id: row.get(0),
                    lifecycle: row.get(1),
                    status: row.get(2),
                    due_at: row.get(3),
                })
                .collect(),
            conflicts: conflicts.iter().map(entry).collect(),
            unsent: unsent
                .iter()
                .map(|row| Unsent {
                    order_id: row.get(0),
                    version: row.get(1),
                    topic: row.get(2),
                    created_at: row.get(3),
                })
                .collect(),
            blocked: blocked
                .iter()
                .map(|row| Blocked {
                    order_id: row.get(0),
                    parked_id: row.get(1),
                    reason: row.get(2),
                    waiting: row.get(3),
                })
                .collect(),
        })
    };
    connection.within(db.settings.query_timeout, work).await
}
