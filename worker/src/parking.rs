//! Tries parked messages again when their time has come, each under its order's lock; what waits
//! behind one follows in its sequence (DESIGN 6.4).

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use shared::{
    backoff::Backoff,
    db::{Connection, DbError, Fault},
    kafka::{Pace, is_unknown},
    message::{Message, now},
    outbox::Placed,
    parked::{Kind, State, release_next},
};
use time::OffsetDateTime;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    batch::{Handler, Told},
    reply::Reply,
    store::{
        self,
        parked::{self, Attempt, Parked},
    },
};

/// Most messages in one round.
const LIMIT: i64 = 256;
/// So many are tried side by side; those of one order never are.
const AT_ONCE: usize = 4;
/// How often we look when nobody wakes us.
const INTERVAL: Duration = Duration::from_millis(500);
/// How often for those that wait behind none.
const FORGOTTEN_INTERVAL: Duration = Duration::from_secs(15);

/// Retries parked messages.
#[derive(Clone)]
pub(crate) struct Parking {
    pub handler: Handler,
    /// Those that this worker reads.
    pub topics: Vec<String>,
}

impl Parking {
    /// Tries what is due, round after round, until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut backoff = Backoff::RECONNECT;
        let mut look_for_forgotten = Instant::now() + FORGOTTEN_INTERVAL;
        loop {
            if Instant::now() > look_for_forgotten {
                look_for_forgotten = Instant::now() + FORGOTTEN_INTERVAL;
                self.release_forgotten().await;
            }
            let pause = match self.run_once(now(), LIMIT, &stop).await {
                Ok(tried) if tried > 0 => {
                    backoff.reset();
                    Duration::ZERO
                }
                Ok(_) => {
                    backoff.reset();
                    INTERVAL
                }
                Err(error) => {
                    tracing::warn!(error = error.chain(), "trying parked messages again");
                    backoff.delay()
                }
            };
            let woken = tokio::time::timeout(pause, self.handler.wake.notified());
            if stop.run_until_cancelled(woken).await.is_none() {
                return;
            }
        }
    }

    async fn release_forgotten(&self) {
        let release = async {
            let connection = self.handler.db.connection().await?;
            let deadline = self.handler.db.settings.write_timeout;
            connection.within(deadline, parked::release_forgotten(&connection)).await
        };
        match release.await {
            Ok(0) => {}
            Ok(released) => tracing::warn!(released, "parked messages waited behind none; trying them"),
            Err(error) => tracing::debug!(error = error.chain(), "looking for forgotten messages"),
        }
    }

    /// Tries the messages that are due at this time, at most so many, none any more after `stop`.
    /// How many there were.
    ///
    /// # Errors
    /// When the database is away.
    async fn run_once(&self, at: OffsetDateTime, limit: i64, stop: &CancellationToken) -> Result<usize, DbError> {
        let due = {
            let connection = self.handler.db.connection().await?;
            let due = parked::due(&connection, at, limit, &self.topics);
            connection.within(self.handler.db.settings.query_timeout, due).await?
        };
        let count = due.len();
        let due = due.into_iter().take_while(|_| !stop.is_cancelled());
        let mut tries = stream::iter(due).map(|id| self.try_again(id, at)).buffer_unordered(AT_ONCE);
        let mut result = Ok(count);
        while let Some(tried) = tries.next().await {
            if let Err(error) = tried {
                result = Err(error);
            }
        }
        result
    }

    async fn try_again(&self, id: i64, at: OffsetDateTime) -> Result<(), DbError> {
        let connection = self.handler.db.connection().await?;
        let deadline = self.handler.db.settings.write_timeout;
        let began = Instant::now();
        match connection.transaction(deadline, self.attempt(&connection, id, at)).await {
            Ok(tried) => {
                self.handler.outbox.publish(tried.sent, began);
                self.handler.cache.forget(tried.changed.iter().map(|(id, user_id)| (*id, user_id.as_str()))).await;
                if tried.woke {
                    self.handler.wake.notify_one();
                }
                self.answer(tried.replies).await;
                Ok(())
            }
            // Its own fault again; whatever it had begun is undone.
            Err(error) if error.fault().is_of_rows() => {
                let error = error.chain();
                connection.transaction(deadline, self.note_failure(&connection, id, at, error)).await
            }
            // Somebody has its order; the others need not wait for that.
            Err(error) if matches!(error.fault(), Fault::Locked | Fault::Contention) => {
                let later = now() + self.handler.retries.delay(1);
                connection.within(deadline, parked::postpone(&connection, id, later)).await
            }
            Err(error) => Err(error),
        }
    }

    /// For senders who may still want to know. Sent and forgotten: nobody here waits for it.
    async fn answer(&self, replies: Vec<Reply>) {
        let producer = self.handler.outbox.producer();
        for Reply { to, key, headers, body } in replies {
            let send = || producer.send(Pace::Prompt, &to.topic, to.partition, &key, &headers, &body).map(drop);
            let sent = match send() {
                // Its partition may be newer than what we know of the topic.
                Err(error) if is_unknown(&error) && producer.partitions(&to.topic).await.is_ok() => send(),
                sent => sent,
            };
            if let Err(error) = sent {
                tracing::debug!(%error, "an answer was not sent");
            }
        }
    }

    /// The order's lock first, then the message's: everybody takes them so. One that nobody could
    /// read may be readable by now, and then is its order's.
    async fn lock(&self, connection: &Connection, id: i64, at: OffsetDateTime) -> Result<Option<Parked>, DbError> {
        let Some(message) = parked::read(connection, id).await? else { return Ok(None) };
        let read = || message.record.read(self.handler.lifecycles).ok().map(|said| said.order_id());
        let order_id = message.order_id.or_else(read);
        if let Some(order_id) = order_id {
            store::lock_orders(connection, &[order_id], &[]).await?;
        }
        let locked = parked::lock_due(connection, id, at).await?;
        Ok(locked.map(|message| Parked { order_id: message.order_id.or(order_id), ..message }))
    }

    async fn attempt(&self, connection: &Connection, id: i64, at: OffsetDateTime) -> Result<Tried, DbError> {
        let Some(message) = self.lock(connection, id, at).await? else { return Ok(Tried::default()) };
        if message.kind == Kind::Unsent {
            send_again(connection, &message).await?;
            self.end(connection, id, &message, Verdict::Done, at).await?;
            return Ok(Tried::default());
        }
        if let Some(order_id) = message.order_id
            && parked::is_behind(connection, order_id, id).await?
        {
            parked::put_behind(connection, id, order_id).await?;
            return Ok(Tried::default());
        }
        if message.record.is_tombstone() {
            let woke = self.end(connection, id, &message, Verdict::Done, at).await?;
            return Ok(Tried { woke, ..Tried::default() });
        }
        let said = match message.record.read(self.handler.lifecycles) {
            Ok(said) => said,
            Err(reason) => {
                let verdict = Verdict::Again { kind: Kind::Unreadable, reason, is_hopeless: true };
                self.end(connection, id, &message, verdict, at).await?;
                return Ok(Tried::default());
            }
        };
        let told = [Told { record: &message.record, said }];
        let mut outcome = self.handler.under_locks(connection, &told, true).await?;
        outcome.woke = parked::wake_early(connection, &outcome.touched, at).await? > 0;
        let (verdict, is_answered) = match outcome.parks.first() {
            Some(park) => {
                // Early, and there is an order that may still come to where this moves it.
                let is_hopeless = park.state == State::Dead;
                let verdict = Verdict::Again { kind: park.kind, reason: park.reason.clone(), is_hopeless };
                (verdict, park.kind == Kind::Conflict)
            }
            None => (Verdict::Done, true),
        };
        let is_way_free = self.end(connection, id, &message, verdict, at).await?;
        // Whoever sent it was told that it is put off; now there is an answer.
        let replies = if is_answered { outcome.replies } else { Vec::new() };
        Ok(Tried { replies, sent: outcome.sent, changed: outcome.changed, woke: outcome.woke || is_way_free })
    }

    /// Keeps what became of an attempt, and lets the next one go where this is no longer in its
    /// way; whether there is one.
    async fn end(
        &self,
        connection: &Connection,
        id: i64,
        message: &Parked,
        verdict: Verdict,
        at: OffsetDateTime,
    ) -> Result<bool, DbError> {
        let retries = &self.handler.retries;
        let attempts = message.attempts.saturating_add(1);
        let next = Some(at + retries.delay(attempts));
        let (kind, state, error, next_attempt_at) = match verdict {
            Verdict::Done => (message.kind, State::Done, None, None),
            Verdict::Again { kind, reason, is_hopeless } => {
                let waits_for_order = kind == Kind::Early && self.has_order(connection, message.order_id).await?;
                let is_last = is_hopeless || (attempts >= retries.retry_attempts && !waits_for_order);
                let state = match kind {
                    _ if is_last => State::Dead,
                    Kind::Early => State::Waiting,
                    _ => State::Retrying,
                };
                (kind, state, Some(reason), next.filter(|_| !is_last))
            }
        };
        let order_id = message.order_id;
        let attempt = Attempt { order_id, kind, state, attempts, error: error.as_deref(), next_attempt_at };
        parked::record_attempt(connection, id, &attempt, at).await?;
        metrics::counter!("orderstream_parked_attempts_total", "result" => state.name()).increment(1);
        let place = message.record.place();
        match (&error, state) {
            (None, _) => tracing::info!(message.id = id, %place, attempts, "handled a parked message"),
            (Some(error), State::Dead) => {
                tracing::error!(message.id = id, %place, attempts, error, "gave a parked message up");
            }
            (Some(error), _) => tracing::warn!(message.id = id, %place, attempts, error, "tried a parked message"),
        }
        let is_in_the_way = kind == Kind::Failed && state != State::Done;
        if is_in_the_way {
            return Ok(false);
        }
        match order_id {
            Some(order_id) => Ok(release_next(connection, &[order_id]).await? > 0),
            None => Ok(false),
        }
    }

    async fn has_order(&self, connection: &Connection, order_id: Option<Uuid>) -> Result<bool, DbError> {
        let Some(order_id) = order_id else { return Ok(false) };
        Ok(!store::lock_orders(connection, &[order_id], &[]).await?.is_empty())
    }

    async fn note_failure(
        &self,
        connection: &Connection,
        id: i64,
        at: OffsetDateTime,
        reason: String,
    ) -> Result<(), DbError> {
        let Some(message) = self.lock(connection, id, at).await? else { return Ok(()) };
        // A failure of the database's is no verdict on an early message's time.
        let kind = if message.kind == Kind::Unsent { Kind::Unsent } else { Kind::Failed };
        let verdict = Verdict::Again { kind, reason, is_hopeless: false };
        self.end(connection, id, &message, verdict, at).await.map(drop)
    }
}

/// What an attempt came to.
enum Verdict {
    Done,
    Again { kind: Kind, reason: String, is_hopeless: bool },
}

/// What is to be done when an attempt has committed.
#[derive(Default)]
struct Tried {
    replies: Vec<Reply>,
    sent: Vec<Placed>,
    changed: Vec<(Uuid, String)>,
    woke: bool,
}

/// Back into the outbox, where the sweeper finds it.
async fn send_again(connection: &Connection, message: &Parked) -> Result<(), DbError> {
    let (Some(order_id), Some(version), Some(seq)) = (message.order_id, message.version, message.seq) else {
        return Ok(());
    };
    let text = |bytes: &Option<Vec<u8>>| String::from_utf8_lossy(bytes.as_deref().unwrap_or_default()).into_owned();
    let record = &message.record;
    let message = Message {
        order_id,
        version,
        seq,
        topic: record.topic.clone(),
        key: text(&record.key),
        headers: record.headers().clone(),
        body: text(&record.body),
    };
    parked::send_again(connection, &message).await
}
