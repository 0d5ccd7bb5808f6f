//! The sweeper: sends what a crash or an outage left in the outbox; one at a time, however many
//! processes run it.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::PoisonError,
    time::Duration,
};

use futures_util::future::join_all;
use rdkafka::error::KafkaError;
use tokio::time::Instant;
use tokio_postgres::SimpleQueryMessage;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Outbox, delete_in, insert_parked};
use crate::{
    backoff::Backoff,
    db::{Connection, DbError},
    kafka::{Pace, is_of_topic, is_refused},
    message::{Headers, Message},
};

/// Most rows that one sweep reads, and most bytes of bodies: they are in memory all at once.
const SWEEP_LIMIT: i64 = 2_000;
const SWEEP_BYTES: i64 = 8 * 1024 * 1024;
/// Once a sweep has sent for so long, what it has not sent is the next one's.
const SWEEP_TIME: Duration = Duration::from_secs(5);
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// So long sweeps leave a topic alone that cannot be written.
const UNWRITABLE: Duration = Duration::from_secs(30);
/// Longer than a message may take to be given up, and the statements around it.
const SWEEP_TIMEOUT: Duration = Duration::from_secs(20);

impl Outbox {
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
    /// messages of one order and topic go one after the other, so that none overtakes another that
    /// fails. How many the broker took; 0 also when somebody else is sweeping.
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
        let connection = self.db.connection().await?;
        let work = async {
            let lock = connection.client().simple_query(LOCK).await?;
            if !lock.iter().any(|m| matches!(m, SimpleQueryMessage::Row(row) if row.get(0) == Some("true"))) {
                metrics::counter!("orderstream_outbox_sweeps_left_total").increment(1);
                return Ok((0, 0, None));
            }
            let mut lanes = old_messages(&connection, self.grace, &self.unwritable()).await?;
            let found = lanes.iter().map(VecDeque::len).sum::<usize>();
            let (mut sent, mut failed) = (Vec::with_capacity(found), None);
            let mut unwritable = HashSet::new();
            let end = Instant::now() + SWEEP_TIME;
            // The first of each lane, then the second of each, …
            while !lanes.is_empty() && failed.is_none() && Instant::now() < end {
                let wave = lanes.iter_mut().filter_map(VecDeque::pop_front).map(|message| self.resend(message));
                for (message, result) in join_all(wave).await {
                    match result {
                        Err(error) if is_of_topic(&error) => {
                            if unwritable.insert(message.topic.clone()) {
                                self.leave_alone(message.topic, &error);
                            }
                        }
                        Err(error) if !is_refused(&error) => failed = Some(error),
                        refused_or_sent => {
                            if let Err(error) = refused_or_sent {
                                insert_parked(&connection, &message, &error.to_string()).await?;
                            }
                            sent.push((message.order_id, message.version, message.seq));
                        }
                    }
                }
                lanes.retain(|lane| lane.front().is_some_and(|message| !unwritable.contains(&message.topic)));
            }
            delete_in(&connection, &sent).await?;
            Ok((found, sent.len(), failed))
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

    /// The topics that sweeps leave alone now. Without this, the rows of one that is not there
    /// would sooner or later be all that a sweep reads.
    fn unwritable(&self) -> Vec<String> {
        let mut topics = self.unwritable.lock().unwrap_or_else(PoisonError::into_inner);
        topics.retain(|_, until| *until > Instant::now());
        topics.keys().cloned().collect()
    }

    fn leave_alone(&self, topic: String, error: &KafkaError) {
        tracing::error!(
            topic,
            %error,
            "a topic cannot be written: make it, or allow us to write it. Until then its messages stay in the outbox"
        );
        metrics::counter!("orderstream_outbox_unwritable_total", "topic" => topic.clone()).increment(1);
        let mut topics = self.unwritable.lock().unwrap_or_else(PoisonError::into_inner);
        topics.insert(topic, Instant::now() + UNWRITABLE);
    }

    async fn resend(&self, message: Message) -> (Message, Result<(), KafkaError>) {
        let queued =
            self.producer.send(Pace::Prompt, &message.topic, None, &message.key, &message.headers, &message.body);
        let result = match queued {
            Ok(delivery) => self.producer.delivered(delivery).await,
            Err(error) => Err(error),
        };
        (message, result)
    }
}

/// What is older than the grace, but for these topics: for each order and topic its messages in
/// their sequence, as far as none before them is younger: a later one may look older, where a clock
/// was set back.
async fn old_messages(
    connection: &Connection,
    grace: Duration,
    except: &[String],
) -> Result<Vec<VecDeque<Message>>, DbError> {
    // Most of the time there is nothing old, and that must cost no more than to look.
    const OLD: &str = "
        select order_id, version, seq, topic, key, headers::text, body
        from (
            select o.*, sum(octet_length(body)) over (order by order_id, version, seq) - octet_length(body) as before
            from (
                select order_id, version, seq, topic, key, headers, body from outbox
                where created_at < clock_timestamp() - $1::float8 * interval '1 second' and topic <> all ($4::text[])
                order by order_id, version, seq
                limit $2
            ) o
        ) o
        where before < $3
        order by order_id, version, seq";
    const FIRST_FRESH: &str = "
        select order_id, topic, version from (
            select i.order_id, i.topic, (
                select o.version from outbox o
                where o.order_id = i.order_id and o.topic = i.topic
                  and o.created_at >= clock_timestamp() - $3::float8 * interval '1 second'
                order by o.version limit 1) as version
            from unnest($1::uuid[], $2::text[]) as i(order_id, topic)) i
        where version is not null";
    let (client, grace) = (connection.client(), grace.as_secs_f64());
    let rows = client.query(&connection.prepared(OLD).await?, &[&grace, &SWEEP_LIMIT, &SWEEP_BYTES, &except]).await?;
    let mut lanes: HashMap<(Uuid, String), VecDeque<Message>> = HashMap::new();
    for row in &rows {
        let message = Message {
            order_id: row.get(0),
            version: row.get(1),
            seq: row.get(2),
            topic: row.get(3),
            key: row.get(4),
            headers: Headers::from_json(row.get(5)).unwrap_or_default(),
            body: row.get(6),
        };
        lanes.entry((message.order_id, message.topic.clone())).or_default().push_back(message);
    }
    if lanes.is_empty() {
        return Ok(Vec::new());
    }
    let (ids, topics): (Vec<Uuid>, Vec<&str>) = lanes.keys().map(|(id, topic)| (*id, topic.as_str())).unzip();
    for row in client.query(&connection.prepared(FIRST_FRESH).await?, &[&ids, &topics, &grace]).await? {
        let fresh: i64 = row.get(2);
        if let Some(lane) = lanes.get_mut(&(row.get(0), row.get(1))) {
            lane.retain(|message| message.version < fresh);
        }
    }
    Ok(lanes.into_values().filter(|lane| !lane.is_empty()).collect())
}
