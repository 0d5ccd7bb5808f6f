//! The outbox: messages that a committed transaction left to be sent (DESIGN 6.2). The process
//! that wrote them sends them at once from memory; a sweeper sends what a crash or an outage left.
//!
//! One rule keeps the messages of an order in version order, whoever sends them: **a message goes
//! out only when no earlier one of its order is in the table**, looked up in a statement begun
//! after the commit that wrote it. A row leaves the table only when the broker has its message.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::future::join_all;
use rdkafka::error::KafkaError;
use tokio::{
    sync::{Semaphore, mpsc},
    time::Instant,
};
use tokio_postgres::{Row, SimpleQueryMessage};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use crate::{
    backoff::Backoff,
    db::{Connection, Db, DbError},
    kafka::{MESSAGE_TIMEOUT, Producer, is_refused},
    message::{Headers, Message},
};

/// Most rows that one sweep reads, and most bytes of bodies: they are in memory all at once.
const SWEEP_LIMIT: i64 = 2_000;
const SWEEP_BYTES: i64 = 8 * 1024 * 1024;
/// Once a sweep has sent for so long, what it has not sent is the next one's.
const SWEEP_TIME: Duration = Duration::from_secs(5);
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Longer than a message may take to be given up, and the statements around it.
const SWEEP_TIMEOUT: Duration = Duration::from_secs(20);
/// Delivered batches that wait to be deleted; beyond that they stay and are sent once more.
const DELIVERED_QUEUE: usize = 4_096;
/// Most rows in one delete.
const DELETE_LIMIT: usize = 4_096;
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

/// Sends the messages of committed transactions and forgets those that the broker has.
#[derive(Clone)]
pub struct Outbox {
    db: Db,
    producer: Producer,
    grace: Duration,
    delivered: mpsc::Sender<Vec<Placed>>,
    holders: Arc<Semaphore>,
    sending: TaskTracker,
}

impl Outbox {
    /// `grace` is the age at which the sweeper sends a row; more than [`MESSAGE_TIMEOUT`]. The
    /// returned future deletes what was delivered, and ends when the last clone is dropped.
    pub fn new(db: Db, producer: Producer, grace: Duration) -> (Self, impl Future<Output = ()> + Send) {
        let (delivered, queue) = mpsc::channel(DELIVERED_QUEUE);
        let deleter = delete_delivered(db.clone(), queue);
        let holders = Arc::new(Semaphore::new(HOLDERS));
        (Self { db, producer, grace, delivered, holders, sending: TaskTracker::new() }, deleter)
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

    /// Sends each message as soon as no earlier one of its order is in the table. Those that wait
    /// too long are the sweeper's.
    async fn hold_back(&self, mut waiting: Vec<Placed>, written: Instant) {
        let mut pause = HOLD;
        while !waiting.is_empty() && self.is_fresh(written) {
            match self.have_earlier(&waiting).await {
                Ok(held) => {
                    let (held, free) = waiting
                        .into_iter()
                        .partition(|p: &Placed| held.contains(&(p.message.order_id, p.message.version)));
                    waiting = held;
                    if self.is_fresh(written) {
                        self.send(free);
                    }
                    if !waiting.is_empty() {
                        tokio::time::sleep(pause.delay()).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(
                        error = format!("{:#}", anyhow::Error::from(error)),
                        "looking for earlier messages; the sweeper sends these"
                    );
                    return;
                }
            }
        }
    }

    /// Which of these have an earlier message of their order in the table?
    async fn have_earlier(&self, messages: &[Placed]) -> Result<Vec<(Uuid, i64)>, DbError> {
        const SQL: &str = "
            select i.order_id, i.version
            from unnest($1::uuid[], $2::bigint[]) as i(order_id, version)
            where (select true from outbox o where o.order_id = i.order_id and o.version < i.version limit 1)";
        let ids: Vec<_> = messages.iter().map(|placed| placed.message.order_id).collect();
        let versions: Vec<_> = messages.iter().map(|placed| placed.message.version).collect();
        let connection = self.db.connection().await?;
        let work = async {
            let statement = connection.prepared(SQL).await?;
            Ok(connection.client().query(&statement, &[&ids, &versions]).await?)
        };
        let rows = connection.within(self.db.settings.query_timeout, work).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    fn send(&self, messages: Vec<Placed>) {
        let mut deliveries = Vec::with_capacity(messages.len());
        for placed in messages {
            let Message { topic, key, headers, body, .. } = &*placed.message;
            match self.producer.send(topic, None, key, headers, body) {
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
                    tracing::warn!(order.id = %message.order_id, error = format!("{:#}", anyhow::Error::from(error)), "cannot park a message");
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

    /// Sends what others left behind, until `stop`; any number of processes may run this: one at
    /// a time sweeps.
    pub async fn sweep(&self, stop: CancellationToken) {
        let mut backoff = Backoff::RECONNECT;
        loop {
            let pause = match self.sweep_once().await {
                Ok(sent) if sent > 0 => Duration::ZERO,
                Ok(_) => {
                    backoff.reset();
                    SWEEP_INTERVAL
                }
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "sweeping the outbox");
                    backoff.delay().max(SWEEP_INTERVAL)
                }
            };
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// Sends the rows that are older than the grace and have none before them that is not. The
    /// messages of one order go one after the other, so that none overtakes another that fails.
    /// How many the broker took; 0 also when somebody else is sweeping.
    ///
    /// # Errors
    /// When PostgreSQL is away or the broker took nothing.
    pub async fn sweep_once(&self) -> anyhow::Result<usize> {
        // The lock is the transaction's, so that it ends with the connection, or after a while in
        // which this process was stopped. And whoever has a row in hand is waited for as long as
        // the statement may take: what is sent and not deleted would be sent again.
        const LOCK: &str = "
            set local idle_in_transaction_session_timeout = '20s';
            set local lock_timeout = 0;
            select pg_try_advisory_xact_lock(hashtext('orderstream.outbox'), hashtext(current_schema()))::text";
        // Most of the time there is nothing old, and that must cost no more than to look.
        const OLD: &str = "
            select order_id, version, seq, topic, key, headers::text, body
            from (
                select o.*, sum(octet_length(body)) over (order by order_id, version, seq) - octet_length(body) as before
                from (
                    select order_id, version, seq, topic, key, headers, body from outbox
                    where created_at < clock_timestamp() - $1::float8 * interval '1 second'
                    order by order_id, version, seq
                    limit $2
                ) o
            ) o
            where before < $3
            order by order_id, version, seq";
        let connection = self.db.connection().await?;
        let work = async {
            let lock = connection.client().simple_query(LOCK).await?;
            if !lock.iter().any(|m| matches!(m, SimpleQueryMessage::Row(row) if row.get(0) == Some("true"))) {
                metrics::counter!("orderstream_outbox_sweeps_left_total").increment(1);
                return Ok((0, 0, None));
            }
            let old = connection.prepared(OLD).await?;
            let grace = self.grace.as_secs_f64();
            let rows = connection.client().query(&old, &[&grace, &SWEEP_LIMIT, &SWEEP_BYTES]).await?;
            let held = if rows.is_empty() { HashMap::new() } else { first_fresh(&connection, &rows, grace).await? };
            let rows: Vec<Row> = rows
                .into_iter()
                .filter(|row| held.get(&row.get::<_, Uuid>(0)).is_none_or(|first| row.get::<_, i64>(1) < *first))
                .collect();
            let (mut sent, mut failed) = (Vec::with_capacity(rows.len()), None);
            let mut orders: Vec<_> = rows.chunk_by(|a, b| a.get::<_, Uuid>(0) == b.get::<_, Uuid>(0)).collect();
            let end = Instant::now() + SWEEP_TIME;
            // The first of each order, then the second of each, …
            while !orders.is_empty() && failed.is_none() && Instant::now() < end {
                for (message, result) in join_all(orders.iter().map(|rows| self.resend(&rows[0]))).await {
                    match result {
                        Err(error) if !is_refused(&error) => failed = Some(error),
                        refused_or_sent => {
                            if let Err(error) = refused_or_sent {
                                insert_parked(&connection, &message, &error.to_string()).await?;
                            }
                            sent.push((message.order_id, message.version, message.seq));
                        }
                    }
                }
                orders.retain_mut(|rows| {
                    *rows = &rows[1..];
                    !rows.is_empty()
                });
            }
            delete_in(&connection, &sent).await?;
            Ok((rows.len(), sent.len(), failed))
        };
        let (found, sent, failed) = connection.transaction(SWEEP_TIMEOUT, work).await?;
        if found > 0 {
            metrics::counter!("orderstream_outbox_swept_total").increment(sent as u64);
            tracing::info!(found, sent, "swept the outbox");
        }
        match failed {
            Some(error) if sent == 0 => Err(anyhow::Error::from(error).context("Kafka took nothing")),
            _ => Ok(sent),
        }
    }

    async fn resend(&self, row: &Row) -> (Message, Result<(), KafkaError>) {
        let message = Message {
            order_id: row.get(0),
            version: row.get(1),
            seq: row.get(2),
            topic: row.get(3),
            key: row.get(4),
            headers: Headers::from_json(row.get(5)).unwrap_or_default(),
            body: row.get(6),
        };
        let queued = self.producer.send(&message.topic, None, &message.key, &message.headers, &message.body);
        let result = match queued {
            Ok(delivery) => self.producer.delivered(delivery).await,
            Err(error) => Err(error),
        };
        (message, result)
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

/// The first message of each of these rows' orders that is not old yet: a later one may look older,
/// where a clock was set back.
async fn first_fresh(connection: &Connection, rows: &[Row], grace: f64) -> Result<HashMap<Uuid, i64>, DbError> {
    const SQL: &str = "
        select order_id, version from (
            select i.order_id, (
                select o.version from outbox o
                where o.order_id = i.order_id and o.created_at >= clock_timestamp() - $2::float8 * interval '1 second'
                order by o.version limit 1) as version
            from unnest($1::uuid[]) as i(order_id)) i
        where version is not null";
    let mut ids: Vec<Uuid> = rows.iter().map(|row| row.get(0)).collect();
    ids.dedup();
    let statement = connection.prepared(SQL).await?;
    let rows = connection.client().query(&statement, &[&ids, &grace]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Deletes delivered rows, as many at once as there are. Ends with the last sender.
async fn delete_delivered(db: Db, mut queue: mpsc::Receiver<Vec<Placed>>) {
    let mut backoff = Backoff::RECONNECT;
    while let Some(mut rows) = queue.recv().await {
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
            tracing::warn!(
                error = format!("{:#}", anyhow::Error::from(error)),
                rows = rows.len(),
                ?since,
                "deleting sent messages"
            );
            tokio::time::sleep(backoff.delay()).await;
        }
        backoff.reset();
    }
}

async fn delete_rows(db: &Db, rows: &[Placed]) -> Result<(), DbError> {
    // Nothing is lost when this commit is: the messages would only be sent again. So it does not
    // wait for the disk. The key beside the place: the sweeper may have deleted the row, and
    // another one may lie there now.
    const SQL: &str = "
        with lazily as materialized (select set_config('synchronous_commit', 'off', true))
        delete from outbox o
        using lazily, unnest($1::text[], $2::uuid[], $3::bigint[], $4::smallint[]) as i(place, order_id, version, seq)
        where o.ctid = i.place::tid and o.order_id = i.order_id and o.version = i.version and o.seq = i.seq";
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
