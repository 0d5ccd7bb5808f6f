//! The outbox: messages that a committed transaction left to be sent (DESIGN 6.2). The process
//! that wrote them sends them at once from memory; a sweeper sends what a crash or an outage left.
//!
//! One rule keeps the messages of an order in version order, whoever sends them: **a message goes
//! out only when no earlier one of its order and topic is in the table**, looked up in a statement
//! begun after the commit that wrote it. A row leaves the table only when the broker has its
//! message. Between topics Kafka knows no order, so one that cannot be written holds no other up.

mod sweep;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use rdkafka::error::KafkaError;
use tokio::{
    sync::{Notify, Semaphore, mpsc},
    time::Instant,
};
use tokio_postgres::types::ToSql;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::{
    backoff::Backoff,
    db::{Connection, Db, DbError},
    kafka::{MESSAGE_TIMEOUT, Pace, Producer, is_refused},
    message::Message,
};

/// Delivered batches that wait to be deleted; beyond that they stay and are sent once more.
const DELIVERED_QUEUE: usize = 4_096;
/// Most rows in one delete.
const DELETE_LIMIT: usize = 4_096;
/// So long a delivered row waits for others, unless a later message of its order waits for it to
/// be gone. Nobody else waits for that, and a lone order would pay for a statement of its own.
const GATHER: Duration = Duration::from_millis(50);
/// Batches whose messages wait for earlier ones; beyond that the sweeper has them.
const HOLDERS: usize = 64;
/// How often a held-back message looks whether the earlier one is gone: soon at first, since that
/// is on its way; seldom later, since then the broker is away and nothing goes.
const HOLD: Backoff = Backoff::new(Duration::from_millis(3), Duration::from_millis(250));

/// The rows of these keys, each found by the index. The table is nearly always empty when the
/// planner learns of it, so it would rather read it whole, as joins do; after an outage there may
/// be a hundred thousand rows in it. Subqueries leave it no choice, here and above.
macro_rules! these_rows {
    () => {
        "outbox.ctid = any (array(
            select (select o.ctid from outbox o
                    where o.order_id = i.order_id and o.version = i.version and o.seq = i.seq)
            from unnest($1::uuid[], $2::bigint[], $3::smallint[]) as i(order_id, version, seq)))"
    };
}

/// The primary key of a row: order, version, and place among the messages of that version.
pub type RowId = (Uuid, i64, i16);

/// A message and where its row lies (`ctid`, as text): found again without an index. Rows of the
/// outbox are never updated, so they stay where they were written.
#[derive(Clone, Debug)]
pub struct Placed {
    pub message: Arc<Message>,
    pub place: String,
}

/// Messages with where their rows lie, as the statement that wrote them has returned it.
#[must_use]
pub fn placed(messages: Vec<Arc<Message>>, mut places: HashMap<RowId, String>) -> Vec<Placed> {
    let placed = |message: Arc<Message>| {
        let place = places.remove(&(message.order_id, message.version, message.seq))?;
        Some(Placed { message, place })
    };
    messages.into_iter().filter_map(placed).collect()
}

/// Messages as columns, for the `unnest` of a statement that writes them.
#[derive(Debug)]
pub struct Columns<'a> {
    ids: Vec<Uuid>,
    versions: Vec<i64>,
    seqs: Vec<i16>,
    topics: Vec<&'a str>,
    keys: Vec<&'a str>,
    headers: Vec<String>,
    bodies: Vec<&'a str>,
}

impl<'a> Columns<'a> {
    #[must_use]
    pub fn of(messages: &'a [Arc<Message>]) -> Self {
        let messages = || messages.iter();
        Self {
            ids: messages().map(|message| message.order_id).collect(),
            versions: messages().map(|message| message.version).collect(),
            seqs: messages().map(|message| message.seq).collect(),
            topics: messages().map(|message| message.topic.as_str()).collect(),
            keys: messages().map(|message| message.key.as_str()).collect(),
            headers: messages().map(|message| message.headers.to_json()).collect(),
            bodies: messages().map(|message| message.body.as_str()).collect(),
        }
    }

    /// `uuid[], bigint[], smallint[], text[], text[], text[], text[]`: the order's id, version,
    /// seq, topic, key, headers (JSON) and body.
    #[must_use]
    pub fn params(&self) -> [&(dyn ToSql + Sync); 7] {
        let Self { ids, versions, seqs, topics, keys, headers, bodies } = self;
        [ids, versions, seqs, topics, keys, headers, bodies]
    }
}

/// Sends the messages of committed transactions and forgets those that the broker has.
#[derive(Clone)]
pub struct Outbox {
    db: Db,
    producer: Producer,
    grace: Duration,
    delivered: mpsc::Sender<Vec<Placed>>,
    /// Somebody waits for rows to be gone.
    awaited: Arc<Notify>,
    holders: Arc<Semaphore>,
    sending: TaskTracker,
    /// Until when sweeps leave these topics alone.
    unwritable: Arc<Mutex<HashMap<String, Instant>>>,
}

impl Outbox {
    /// `grace` is the age at which the sweeper sends a row; more than [`MESSAGE_TIMEOUT`]. The
    /// returned future deletes what was delivered, and ends when the last clone is dropped.
    pub fn new(db: Db, producer: Producer, grace: Duration) -> (Self, impl Future<Output = ()> + Send) {
        let (delivered, queue) = mpsc::channel(DELIVERED_QUEUE);
        let awaited = Arc::new(Notify::new());
        let deleter = delete_delivered(db.clone(), queue, awaited.clone());
        let holders = Arc::new(Semaphore::new(HOLDERS));
        let (sending, unwritable) = (TaskTracker::new(), Arc::default());
        (Self { db, producer, grace, delivered, awaited, holders, sending, unwritable }, deleter)
    }

    /// Is a message of this age one that should have been sent long ago?
    #[must_use]
    pub fn is_stuck(&self, age: Duration) -> bool {
        age > 2 * self.grace
    }

    #[must_use]
    pub fn producer(&self) -> &Producer {
        &self.producer
    }

    /// Sends messages whose transaction has committed; returns at once. `written` is when that
    /// transaction began to write.
    pub fn publish(&self, messages: Vec<Placed>, written: Instant) {
        // A first version has no earlier one, and needs no look.
        let (first, later): (Vec<_>, Vec<_>) =
            messages.into_iter().partition(|placed: &Placed| placed.message.version == 1);
        if !first.is_empty() && self.is_fresh(written) {
            self.send(first);
        }
        if later.is_empty() {
            return;
        }
        if let Ok(permit) = self.holders.clone().try_acquire_owned() {
            let outbox = self.clone();
            self.sending.spawn(async move {
                outbox.hold_back(later, written).await;
                drop(permit);
            });
        }
    }

    /// Would a message queued now be delivered or dropped before the sweeper sends it? Not after
    /// this process was stopped for a while, for instance.
    fn is_fresh(&self, written: Instant) -> bool {
        written.elapsed() + MESSAGE_TIMEOUT < self.grace
    }

    /// Sends each message as soon as no earlier one of its order and topic is in the table. Those
    /// that wait too long are the sweeper's.
    async fn hold_back(&self, mut waiting: Vec<Placed>, written: Instant) {
        let mut pause = HOLD;
        while !waiting.is_empty() && self.is_fresh(written) {
            match self.have_earlier(&waiting).await {
                Ok(behind) => {
                    let mut free = Vec::with_capacity(waiting.len());
                    let mut held = Vec::new();
                    for (place, message) in waiting.into_iter().enumerate() {
                        if behind.contains(&place) { &mut held } else { &mut free }.push(message);
                    }
                    waiting = held;
                    if self.is_fresh(written) {
                        self.send(free);
                    }
                    if !waiting.is_empty() {
                        self.awaited.notify_one();
                        tokio::time::sleep(pause.delay()).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(error = error.chain(), "looking for earlier messages; the sweeper sends these");
                    return;
                }
            }
        }
    }

    /// Which of these, by place, have an earlier message of their order and topic in the table?
    async fn have_earlier(&self, messages: &[Placed]) -> Result<HashSet<usize>, DbError> {
        const SQL: &str = "
            select i.place
            from unnest($1::uuid[], $2::bigint[], $3::text[]) with ordinality as i(order_id, version, topic, place)
            where (select true from outbox o
                   where o.order_id = i.order_id and o.version < i.version and o.topic = i.topic limit 1)";
        let ids: Vec<_> = messages.iter().map(|placed| placed.message.order_id).collect();
        let versions: Vec<_> = messages.iter().map(|placed| placed.message.version).collect();
        let topics: Vec<_> = messages.iter().map(|placed| placed.message.topic.as_str()).collect();
        let connection = self.db.connection().await?;
        let work = async {
            let statement = connection.prepared(SQL).await?;
            Ok(connection.client().query(&statement, &[&ids, &versions, &topics]).await?)
        };
        let rows = connection.within(self.db.settings.query_timeout, work).await?;
        Ok(rows.iter().filter_map(|row| usize::try_from(row.get::<_, i64>(0) - 1).ok()).collect())
    }

    fn send(&self, messages: Vec<Placed>) {
        let is_awaited = messages.iter().any(|placed| placed.message.headers.reply_to().is_some());
        let pace = Pace::of(messages.len(), is_awaited);
        let mut deliveries = Vec::with_capacity(messages.len());
        for placed in messages {
            let Message { topic, key, headers, body, .. } = &*placed.message;
            match self.producer.send(pace, topic, None, key, headers, body) {
                Ok(delivery) => deliveries.push((placed, delivery)),
                Err(error) => self.not_sent(placed.message, &error),
            }
        }
        let outbox = self.clone();
        self.sending.spawn(async move {
            let mut rows = Vec::with_capacity(deliveries.len());
            for (placed, delivery) in deliveries {
                match outbox.producer.delivered(delivery).await {
                    Ok(()) => rows.push(placed),
                    Err(error) => outbox.not_sent(placed.message, &error),
                }
            }
            // A full queue means that PostgreSQL is away: the rows stay, the sweeper repeats them.
            if !rows.is_empty() && outbox.delivered.try_send(rows).is_err() {
                tracing::warn!("too many delivered messages wait to be deleted; these will be sent again");
            }
        });
    }

    fn not_sent(&self, message: Arc<Message>, error: &KafkaError) {
        metrics::counter!("orderstream_outbox_unsent_total").increment(1);
        if is_refused(error) {
            let (db, reason) = (self.db.clone(), error.to_string());
            self.sending.spawn(async move {
                if let Err(error) = park(&db, &message, &reason).await {
                    // It stays in the outbox, where the sweeper meets the same refusal.
                    tracing::warn!(order.id = %message.order_id, error = error.chain(), "cannot park a message");
                }
            });
        } else {
            tracing::debug!(order.id = %message.order_id, error = %error, "not sent; the sweeper will");
        }
    }

    /// Waits until all that was published is delivered or given up.
    pub async fn drain(&self, deadline: Instant) {
        self.sending.close();
        if tokio::time::timeout_at(deadline, self.sending.wait()).await.is_err() {
            tracing::warn!("not all messages were delivered before the end; the sweeper sends the rest");
        }
    }

    /// Tells how many rows there are and how old the oldest is, which is returned too.
    ///
    /// # Errors
    /// When PostgreSQL is away.
    pub async fn measure(&self) -> Result<Duration, DbError> {
        const SQL: &str = "
            select count(*), coalesce(extract(epoch from clock_timestamp() - min(created_at)), 0)::float8 from outbox";
        let connection = self.db.connection().await?;
        let work = async {
            let statement = connection.prepared(SQL).await?;
            Ok(connection.client().query_one(&statement, &[]).await?)
        };
        let row = connection.within(self.db.settings.query_timeout, work).await?;
        metrics::gauge!("orderstream_outbox_rows").set(row.get::<_, i64>(0) as f64);
        let oldest = row.get::<_, f64>(1).max(0.0);
        metrics::gauge!("orderstream_outbox_oldest_seconds").set(oldest);
        Ok(Duration::from_secs_f64(oldest))
    }
}

/// Deletes delivered rows, as many at once as there are. Ends with the last sender.
async fn delete_delivered(db: Db, mut queue: mpsc::Receiver<Vec<Placed>>, awaited: Arc<Notify>) {
    let mut backoff = Backoff::RECONNECT;
    while let Some(mut rows) = queue.recv().await {
        let _ = tokio::time::timeout(GATHER, awaited.notified()).await;
        while rows.len() < DELETE_LIMIT
            && let Ok(more) = queue.try_recv()
        {
            rows.extend(more);
        }
        // The broker has these messages. Until the rows are gone the sweeper would repeat them,
        // so this tries again for as long as it takes.
        let since = SystemTime::now();
        while let Err(error) = delete_rows(&db, &rows).await {
            if queue.is_closed() {
                return;
            }
            tracing::warn!(error = error.chain(), rows = rows.len(), ?since, "deleting sent messages");
            tokio::time::sleep(backoff.delay()).await;
        }
        backoff.reset();
    }
}

async fn delete_rows(db: &Db, rows: &[Placed]) -> Result<(), DbError> {
    // Nothing is lost when this commit is: the messages would only be sent again. So it does not
    // wait for the disk. The key beside the place: the sweeper may have deleted the row, and
    // another one may lie there now.
    // Subqueries, as in `these_rows!`: by a join the planner may compare each row with each.
    const SQL: &str = "
        with lazily as materialized (select set_config('synchronous_commit', 'off', true))
        delete from outbox
        using lazily
        where outbox.ctid = any (array(
            select (select o.ctid from outbox o
                    where o.ctid = i.place::tid and o.order_id = i.order_id and o.version = i.version and o.seq = i.seq)
            from unnest($1::text[], $2::uuid[], $3::bigint[], $4::smallint[]) as i(place, order_id, version, seq)))";
    let places: Vec<_> = rows.iter().map(|row| row.place.as_str()).collect();
    let ids: Vec<_> = rows.iter().map(|row| row.message.order_id).collect();
    let versions: Vec<_> = rows.iter().map(|row| row.message.version).collect();
    let seqs: Vec<_> = rows.iter().map(|row| row.message.seq).collect();
    let connection = db.connection().await?;
    let work = async {
        let statement = connection.prepared(SQL).await?;
        Ok(connection.client().execute(&statement, &[&places, &ids, &versions, &seqs]).await?)
    };
    connection.within(db.settings.write_timeout, work).await.map(drop)
}

/// Moves a row that the broker refuses for good out of the way, to where operators look.
async fn park(db: &Db, message: &Message, reason: &str) -> Result<(), DbError> {
    let connection = db.connection().await?;
    let work = async {
        insert_parked(&connection, message, reason).await?;
        delete_in(&connection, &[(message.order_id, message.version, message.seq)]).await
    };
    connection.transaction(db.settings.write_timeout, work).await
}

async fn insert_parked(connection: &Connection, message: &Message, reason: &str) -> Result<(), DbError> {
    const SQL: &str = "
        insert into parked_messages
            (order_id, topic, key, headers, body, state, kind, attempts, reason, version, seq, errors)
        values ($1, $2, $3, $4::text::json, $5, 'dead', 'unsent', 1, $6, $7, $8,
            jsonb_build_array(jsonb_build_object('at', clock_timestamp(), 'error', $6::text)))";
    tracing::error!(order.id = %message.order_id, topic = message.topic, reason, "Kafka refuses a message for good; parked");
    let (key, body) = (message.key.as_bytes(), message.body.as_bytes());
    let statement = connection.prepared(SQL).await?;
    connection
        .client()
        .execute(
            &statement,
            &[
                &message.order_id,
                &message.topic,
                &key,
                &message.headers.to_json(),
                &body,
                &reason,
                &message.version,
                &message.seq,
            ],
        )
        .await?;
    Ok(())
}

async fn delete_in(connection: &Connection, rows: &[RowId]) -> Result<(), DbError> {
    const SQL: &str = concat!("delete from outbox where ", these_rows!());
    let (ids, versions, seqs) = columns(rows);
    let statement = connection.prepared(SQL).await?;
    connection.client().execute(&statement, &[&ids, &versions, &seqs]).await?;
    Ok(())
}

fn columns(rows: &[RowId]) -> (Vec<Uuid>, Vec<i64>, Vec<i16>) {
    let mut columns = (Vec::with_capacity(rows.len()), Vec::with_capacity(rows.len()), Vec::with_capacity(rows.len()));
    for (id, version, seq) in rows {
        columns.0.push(*id);
        columns.1.push(*version);
        columns.2.push(*seq);
    }
    columns
}
