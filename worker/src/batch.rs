//! Handles one batch of records: most in a single statement, the rest under their orders' locks.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use shared::{
    cache::Cache,
    db::{Connection, Db, DbError},
    emission::{self, Sender},
    lifecycle::{Lifecycles, template::Subject},
    message::{Event, EventType, Headers, Message, now},
    order::order_id_of,
    outbox::{Outbox, Placed},
    parked::{Kind as ParkedKind, State},
};
use time::OffsetDateTime;
use tokio::{sync::Notify, time::Instant};
use uuid::Uuid;

use crate::{
    config::RetrySettings,
    handler::{Handling, Kind, Trouble, after, as_told, handle, receive},
    record::{Record, Said},
    reply::{Asked, Reply, SOURCE, put_off, reply},
    store::{
        self, Found, Handled, Locked,
        parked::{self, Park},
    },
};

/// What handling needs.
#[derive(Clone)]
pub(crate) struct Handler {
    pub db: Db,
    pub cache: Cache,
    pub outbox: Outbox,
    pub lifecycles: &'static Lifecycles,
    pub retries: RetrySettings,
    /// Something parked may be tried now.
    pub wake: Arc<Notify>,
}

/// A record that can be read.
pub(crate) struct Told<'a> {
    pub record: &'a Record,
    pub said: Said<'a>,
}

/// What handling under locks came to.
#[derive(Default)]
pub(crate) struct Outcome<'a> {
    pub replies: Vec<Reply>,
    /// To be published once it is committed.
    pub sent: Vec<Placed>,
    /// What could not be handled now.
    pub parks: Vec<Park<'a>>,
    /// Orders that have moved: what came too early for them may be tried now.
    pub touched: Vec<Uuid>,
    /// Orders that are not as they were, with their users.
    pub changed: Vec<(Uuid, String)>,
    /// There is such.
    pub woke: bool,
}

/// Who a message of a lifecycle is about.
pub(crate) struct Parties<'a> {
    pub user_id: &'a str,
    pub external_id: Option<&'a str>,
    pub items: Option<&'a serde_json::value::RawValue>,
    pub payload: Option<&'a serde_json::value::RawValue>,
}

impl Handler {
    /// Handles these records, all of them or, when it fails, as many as were committed before:
    /// doing it again does nothing twice. The answers that are awaited come back.
    pub(crate) async fn handle_batch(&self, records: &[Record]) -> Result<Vec<Reply>, DbError> {
        let connection = self.db.connection().await?;
        let deadline = self.db.settings.write_timeout;
        let (mut told, mut unreadable) = (Vec::with_capacity(records.len()), Vec::new());
        for record in records.iter().filter(|record| !record.is_tombstone()) {
            match record.read(self.lifecycles) {
                Ok(said) => told.push(Told { record, said }),
                Err(reason) => {
                    unreadable.push(park(record, None, &Trouble::Hopeless(reason), now(), &self.retries));
                }
            }
        }
        let mut replies = Vec::with_capacity(told.len());
        let began = Instant::now();
        let (rest, moved, sent) =
            connection.within(deadline, self.move_unchanged(&connection, told, &mut replies)).await?;
        self.outbox.publish(sent, began);
        self.cache.forget(moved.iter().map(|(order_id, user_id)| (*order_id, user_id.as_str()))).await;
        if !rest.is_empty() || !unreadable.is_empty() {
            let began = Instant::now();
            let work = async {
                let mut outcome = self.under_locks(&connection, &rest, false).await?;
                outcome.parks.append(&mut unreadable);
                // As they came, whatever topic they are of: an order's messages keep their sequence.
                outcome.parks.sort_by_key(|park| records.iter().position(|record| std::ptr::eq(record, park.record)));
                for park in &outcome.parks {
                    parked::insert(&connection, park, now()).await?;
                }
                outcome.woke = parked::wake_early(&connection, &outcome.touched, now()).await? > 0;
                Ok(outcome)
            };
            let outcome = connection.transaction(deadline, work).await?;
            self.committed(&outcome, began).await;
            replies.extend(outcome.replies);
        }
        let tombstones = records.iter().filter(|record| record.is_tombstone()).count();
        if tombstones > 0 {
            metrics::counter!("orderstream_worker_handled_total", "result" => "tombstone").increment(tombstones as u64);
        }
        Ok(replies)
    }

    /// What is to be done when a transaction under locks has committed, but for the answers.
    pub(crate) async fn committed(&self, outcome: &Outcome<'_>, began: Instant) {
        self.outbox.publish(outcome.sent.clone(), began);
        self.cache.forget(outcome.changed.iter().map(|(order_id, user_id)| (*order_id, user_id.as_str()))).await;
        if outcome.woke {
            self.wake.notify_one();
        }
    }

    /// Which of these records, by place, are of orders that somebody else keeps locked?
    pub(crate) async fn locked_by_others(&self, records: &[Record]) -> Result<HashSet<usize>, DbError> {
        let connection = self.db.connection().await?;
        let orders: Vec<Option<Uuid>> =
            records.iter().map(|record| record.read(self.lifecycles).ok().map(|said| said.order_id())).collect();
        let ids: Vec<Uuid> = orders.iter().flatten().copied().collect();
        let work = store::locked_by_others(&connection, &ids);
        let locked = connection.transaction(self.db.settings.query_timeout, work).await?;
        let places = orders.iter().enumerate().filter(|(_, id)| id.is_some_and(|id| locked.contains(&id)));
        Ok(places.map(|(place, _)| place).collect())
    }

    /// Sets aside the one record that the database refuses, under its order's lock. Its caller
    /// is told at once.
    pub(crate) async fn park_refused(&self, record: &Record, error: &str) -> Result<Vec<Reply>, DbError> {
        let connection = self.db.connection().await?;
        let said = record.read(self.lifecycles);
        let at = now();
        let work = async {
            let mut replies = Vec::new();
            let order_id = said.as_ref().ok().map(Said::order_id);
            let mut park = park(record, order_id, &Trouble::Failed(error.to_owned()), at, &self.retries);
            if let (Ok(said), Some(order_id)) = (&said, order_id) {
                let locked = store::lock_orders(&connection, &[order_id], &[]).await?;
                let cause = (order_id, said.cause());
                if store::answers(&connection, std::slice::from_ref(&cause)).await?.contains_key(&cause) {
                    return Ok(replies); // another worker has handled it meanwhile
                }
                if parked::blocked(&connection, &[order_id]).await?.contains(&order_id) {
                    behind(&mut park);
                }
                let order = locked.get(&order_id).map(|locked| &locked.order);
                replies.extend(order.and_then(|order| reply(&Asked::of(record, said), put_off(order))));
            }
            parked::insert(&connection, &park, at).await?;
            Ok(replies)
        };
        let replies = connection.transaction(self.db.settings.write_timeout, work).await?;
        tell_parked(record, said.as_ref().ok().map(Said::order_id), error);
        Ok(replies)
    }

    /// The way of nearly all: orders that are still as their event tells. Returns the others.
    async fn move_unchanged<'a>(
        &self,
        connection: &Connection,
        told: Vec<Told<'a>>,
        replies: &mut Vec<Reply>,
    ) -> Result<(Vec<Told<'a>>, Vec<(Uuid, String)>, Vec<Placed>), DbError> {
        let at = now();
        let mut times: HashMap<Uuid, usize> = HashMap::with_capacity(told.len());
        for Told { said, .. } in &told {
            *times.entry(said.order_id()).or_default() += 1;
        }
        let (mut candidates, mut rest) = (Vec::new(), Vec::new());
        for told in told {
            // Two messages of one order are handled one after the other.
            let handled = match &told.said {
                Said::Event(event) if times[&event.order_id] == 1 => self.as_it_was_told(event, told.record, at),
                _ => None,
            };
            match handled {
                Some(handled) => candidates.push((told, handled)),
                None => rest.push(told),
            }
        }
        // In the order of their ids, as everybody locks them.
        candidates.sort_by_key(|(told, _)| told.said.order_id());
        let (mut rows, mut messages, mut taken) = (Vec::new(), Vec::new(), Vec::with_capacity(candidates.len()));
        for (told, (handling, emitted)) in candidates {
            rows.push(row(&told.said, handling));
            messages.extend(emitted);
            taken.push(told);
        }
        if rows.is_empty() {
            return Ok((rest, Vec::new(), Vec::new()));
        }
        let (moved, sent) = store::move_unchanged(connection, &rows, messages, at).await?;
        let mut changed = Vec::new();
        for (told, row) in taken.into_iter().zip(rows) {
            if moved.contains(&row.order_id) {
                count(row.handling.kind);
                if let Said::Event(event) = &told.said {
                    changed.push((row.order_id, event.user_id.to_string()));
                }
                replies.extend(reply(&Asked::of(told.record, &told.said), row.handling.answer));
            } else {
                rest.push(told);
            }
        }
        Ok((rest, changed, sent))
    }

    /// What an event comes to if nothing has happened to its order since.
    fn as_it_was_told(
        &self,
        event: &Event<'_>,
        record: &Record,
        at: OffsetDateTime,
    ) -> Option<(Handling, Vec<Arc<Message>>)> {
        let handling = handle(self.lifecycles, &as_told(event), event, at).ok()?;
        if handling.kind.is_ignored() {
            return None;
        }
        let parties = Parties {
            user_id: &event.user_id,
            external_id: event.external_id.as_deref(),
            items: event.items,
            payload: event.payload,
        };
        let messages =
            self.emitted(&event.lifecycle, event.order_id, &parties, &handling, None, record.headers(), at).ok()?;
        Some((handling, messages))
    }

    /// What a step tells others.
    #[expect(clippy::too_many_arguments, reason = "all of a message's parts, from as many places")]
    pub(crate) fn emitted(
        &self,
        lifecycle: &str,
        order_id: Uuid,
        parties: &Parties<'_>,
        handling: &Handling,
        reason: Option<&str>,
        trace: &Headers,
        at: OffsetDateTime,
    ) -> Result<Vec<Arc<Message>>, String> {
        let Some(lifecycle) = self.lifecycles.find(lifecycle).filter(|_| !handling.emits.is_empty()) else {
            return Ok(Vec::new());
        };
        let answer = &handling.answer;
        let subject = Subject {
            message_id: Uuid::nil(),
            order_id,
            user_id: parties.user_id,
            external_id: parties.external_id,
            lifecycle: &lifecycle.name,
            version: answer.order_version,
            from: &handling.from_status,
            to: &answer.order_status,
            from_code: None,
            to_code: None,
            amount: answer.amount,
            currency: answer.currency.as_deref(),
            items: parties.items,
            payload: parties.payload,
            reason,
            at,
        };
        emission::messages(lifecycle, &handling.emits, subject, Sender { source: SOURCE, trace, first_seq: 0 })
    }

    /// Handles messages in sequence, each on what the last made of its order. `again`: these are
    /// parked already, and it is their turn.
    pub(crate) async fn under_locks<'t>(
        &self,
        connection: &Connection,
        told: &'t [Told<'t>],
        again: bool,
    ) -> Result<Outcome<'t>, DbError> {
        let mut ids: Vec<Uuid> = told.iter().map(|told| told.said.order_id()).collect();
        ids.sort_unstable();
        ids.dedup();
        let telling = self.lifecycles.telling_content();
        let mut orders = store::lock_orders(connection, &ids, &telling).await?;
        let (mut blocked, known) = if again {
            (HashSet::new(), HashSet::new())
        } else {
            let records: Vec<_> = told.iter().map(|told| told.record).collect();
            (parked::blocked(connection, &ids).await?, parked::known(connection, &records).await?)
        };
        let is_set_aside =
            |place: usize, told: &Told<'_>| known.contains(&place) || blocked.contains(&told.said.order_id());
        let free = told.iter().enumerate().filter(|(place, told)| !is_set_aside(*place, told)).map(|(_, told)| told);
        let there: HashSet<Uuid> = orders.keys().copied().collect();
        self.create_missing(connection, free, &mut orders).await?;
        // After the locks: what happened before us has an earlier time than we.
        let at = now();
        let causes: Vec<_> = told.iter().map(|told| (told.said.order_id(), told.said.cause())).collect();
        let mut answers = store::answers(connection, &causes).await?;
        let found: HashMap<Uuid, i64> = orders.iter().map(|(id, locked)| (*id, locked.order.version)).collect();
        let (mut rows, mut messages, mut touched) = (Vec::new(), Vec::new(), HashSet::new());
        let mut outcome = Outcome::default();
        let new = orders.iter().filter(|(id, _)| !there.contains(*id));
        outcome.changed.extend(new.map(|(id, locked)| (*id, locked.user_id.clone())));
        for (place, (told, cause)) in told.iter().zip(causes).enumerate() {
            let (Told { record, said }, order_id) = (told, cause.0);
            if let Some(answer) = answers.get(&cause) {
                metrics::counter!("orderstream_worker_handled_total", "result" => "repeated").increment(1);
                outcome.replies.extend(reply(&Asked::of(record, said), answer.clone()));
                continue;
            }
            if known.contains(&place) {
                continue; // it has its place among those that wait, or an operator gave it up
            }
            let locked = orders.get_mut(&order_id);
            let is_missing = locked.is_none();
            if blocked.contains(&order_id) {
                let trouble = Trouble::Failed("waits behind an earlier message of its order that failed".to_owned());
                let mut park = park(record, Some(order_id), &trouble, at, &self.retries);
                behind(&mut park);
                outcome.replies.extend(locked.and_then(|l| reply(&Asked::of(record, said), put_off(&l.order))));
                outcome.parks.push(park);
                continue;
            }
            match self.handle_one(locked.as_deref(), told, at) {
                Ok((handling, emitted)) => {
                    count(handling.kind);
                    if handling.kind == Kind::Conflict {
                        outcome.parks.push(conflict(record, order_id, &handling));
                    }
                    if let Some(locked) = locked {
                        locked.order = after(&locked.order, &handling);
                    }
                    if !handling.kind.is_ignored() || is_status_change(said) {
                        touched.insert(order_id);
                    }
                    messages.extend(emitted);
                    outcome.replies.extend(reply(&Asked::of(record, said), handling.answer.clone()));
                    answers.insert(cause, handling.answer.clone());
                    rows.push(row(said, handling));
                }
                Err(trouble) => {
                    if matches!(trouble, Trouble::Failed(_)) {
                        blocked.insert(order_id);
                    }
                    if let (Some(locked), Trouble::Failed(_)) = (locked, &trouble) {
                        outcome.replies.extend(reply(&Asked::of(record, said), put_off(&locked.order)));
                    }
                    let mut park = park(record, Some(order_id), &trouble, at, &self.retries);
                    if matches!(trouble, Trouble::Early(_)) && is_missing && self.retries.retry_attempts <= 1 {
                        (park.state, park.next_attempt_at) = (State::Dead, None);
                    }
                    outcome.parks.push(park);
                }
            }
        }
        if !rows.is_empty() {
            let changed: Vec<_> = orders
                .iter()
                .filter(|(id, locked)| found.get(id).is_some_and(|version| *version != locked.order.version))
                .map(|(id, locked)| (*id, found[id], &locked.order))
                .collect();
            outcome.changed.extend(changed.iter().map(|(id, ..)| (*id, orders[id].user_id.clone())));
            outcome.sent = store::write_handlings(connection, &rows, &changed, messages, at).await?;
        }
        outcome.touched = touched.into_iter().collect();
        Ok(outcome)
    }

    fn handle_one(
        &self,
        locked: Option<&Locked>,
        told: &Told<'_>,
        at: OffsetDateTime,
    ) -> Result<(Handling, Vec<Arc<Message>>), Trouble> {
        let Some(locked) = locked else {
            let reason = "there is no such order".to_owned();
            return Err(match told.said {
                Said::Event(_) => Trouble::Hopeless(reason),
                Said::Received(_) => Trouble::Early(reason),
            });
        };
        let (handling, reason) = match &told.said {
            Said::Event(event) => (handle(self.lifecycles, &locked.order, event, at)?, None),
            Said::Received(received) => {
                (receive(self.lifecycles, &locked.order, received, at)?, received.reason.as_deref())
            }
        };
        let (lifecycle, order_id) = (&locked.order.lifecycle, told.said.order_id());
        let messages =
            self.emitted(lifecycle, order_id, &locked.parties(), &handling, reason, told.record.headers(), at);
        Ok((handling, messages.map_err(Trouble::Failed)?))
    }

    /// Makes the orders that messages which may do so are the first to tell of.
    async fn create_missing<'t>(
        &self,
        connection: &Connection,
        told: impl Iterator<Item = &'t Told<'t>>,
        orders: &mut HashMap<Uuid, Locked>,
    ) -> Result<(), DbError> {
        let mut found: Vec<Found<'_>> = Vec::new();
        for told in told {
            let Said::Received(received) = &told.said else { continue };
            let Some(lifecycle) = self.lifecycles.find(received.lifecycle).filter(|_| received.creates) else {
                continue;
            };
            if orders.contains_key(&received.order_id) || found.iter().any(|f| f.order_id == received.order_id) {
                continue;
            }
            found.push(Found {
                order_id: received.order_id,
                user_id: received.user_id.as_deref().unwrap_or("unknown"),
                // A UUID stands for itself.
                external_id: (order_id_of(&received.order_text).to_string() != received.order_text.to_lowercase())
                    .then_some(received.order_text.as_str()),
                lifecycle: &lifecycle.name,
                status: &lifecycle.initial,
                cause: format!("created by {}", received.cause),
            });
        }
        if found.is_empty() {
            return Ok(());
        }
        found.sort_by_key(|found| found.order_id);
        store::create_orders(connection, &found, now()).await?;
        let ids: Vec<Uuid> = found.iter().map(|found| found.order_id).collect();
        orders.extend(store::lock_orders(connection, &ids, &[]).await?);
        Ok(())
    }
}

impl Locked {
    pub(crate) fn parties(&self) -> Parties<'_> {
        Parties {
            user_id: &self.user_id,
            external_id: self.external_id.as_deref(),
            items: self.items.as_deref(),
            payload: self.payload.as_deref(),
        }
    }
}

fn is_status_change(said: &Said<'_>) -> bool {
    matches!(said, Said::Event(event) if matches!(event.kind, EventType::StatusChanged | EventType::Deleted))
}

fn row(said: &Said<'_>, handling: Handling) -> Handled {
    let correlation_id = match said {
        Said::Event(event) => Some(event.correlation_id),
        Said::Received(_) => None,
    };
    Handled { order_id: said.order_id(), cause: said.cause(), correlation_id, handling }
}

fn count(kind: Kind) {
    metrics::counter!("orderstream_worker_handled_total", "result" => kind.name()).increment(1);
}

fn park<'a>(
    record: &'a Record,
    order_id: Option<Uuid>,
    trouble: &Trouble,
    at: OffsetDateTime,
    retries: &RetrySettings,
) -> Park<'a> {
    let next = Some(at + retries.delay(1));
    let (kind, state, reason, next_attempt_at) = match trouble {
        Trouble::Early(reason) => (ParkedKind::Early, State::Waiting, reason, next),
        Trouble::Failed(reason) if retries.retry_attempts <= 1 => (ParkedKind::Failed, State::Dead, reason, None),
        Trouble::Failed(reason) => (ParkedKind::Failed, State::Retrying, reason, next),
        Trouble::Hopeless(reason) => (ParkedKind::Unreadable, State::Dead, reason, None),
    };
    if state == State::Dead {
        tell_parked(record, order_id, reason);
        metrics::counter!("orderstream_worker_handled_total", "result" => "dead").increment(1);
    } else {
        metrics::counter!("orderstream_worker_handled_total", "result" => kind.name()).increment(1);
    }
    Park { record, order_id, kind, state, reason: reason.clone(), next_attempt_at }
}

/// Behind a failed message of its order: its turn comes when that is done.
fn behind(park: &mut Park<'_>) {
    (park.state, park.next_attempt_at) = (State::Waiting, None);
}

fn conflict<'a>(record: &'a Record, order_id: Uuid, handling: &Handling) -> Park<'a> {
    let reason =
        format!("{} contradicts the final state of its order: {}", handling.name, handling.answer.order_status);
    tell_parked(record, Some(order_id), &reason);
    Park {
        record,
        order_id: Some(order_id),
        kind: ParkedKind::Conflict,
        state: State::Dead,
        reason,
        next_attempt_at: None,
    }
}

fn tell_parked(record: &Record, order_id: Option<Uuid>, reason: &str) {
    tracing::error!(
        kafka.topic = record.topic,
        kafka.partition = record.partition,
        kafka.offset = record.offset,
        order.id = order_id.map(tracing::field::display),
        reason,
        "parked a record that cannot be handled"
    );
}
