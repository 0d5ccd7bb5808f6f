//! The clock: moves orders whose time has come, each by what its lifecycle fires then. Any number
//! of workers may run one: each order is moved by whoever locks it first.

use std::{collections::HashMap, time::Duration};

use shared::{
    backoff::Backoff,
    db::{DbError, Fault},
    message::{Headers, now},
    outbox::Placed,
};
use time::OffsetDateTime;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    batch::Handler,
    config::ClockSettings,
    handler::{Order, Trouble, after, time_out},
    store::{self, Handled},
};

/// How long an order that cannot be moved is left alone.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most of those; beyond that they are only tried more often.
const MAX_TROUBLED: usize = 1_000;
/// How long one look may go on past orders that cannot be moved.
const ROUND: Duration = Duration::from_secs(10);
/// So often in a row it may fail for no order's sake before one of them is suspected.
const FAILURES: u32 = 3;

pub(crate) struct Clock {
    handler: Handler,
    settings: ClockSettings,
    /// Orders that could not be moved, and when they are looked at again.
    troubled: HashMap<Uuid, Instant>,
    /// Where the last batch ended, while there is more: however many cannot be moved, the others
    /// have their turn.
    after: Option<(OffsetDateTime, Uuid)>,
    /// Most orders in the next batch: fewer while one of them is in the way.
    limit: i64,
    /// So often in a row it failed for a reason that may be an order's.
    failures: u32,
}

impl Clock {
    pub(crate) fn new(handler: Handler, settings: ClockSettings) -> Self {
        let limit = settings.scheduler_batch_size;
        Self { handler, settings, troubled: HashMap::new(), after: None, limit, failures: 0 }
    }

    /// Moves what is due, at most a batch in each interval, until `stop`: after a time of standing
    /// still it catches up no faster than that.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut backoff = Backoff::RECONNECT;
        let mut next = Instant::now();
        loop {
            next = (next + self.settings.scheduler_interval).max(Instant::now());
            match self.run_once(now(), &stop).await {
                Ok(_) => backoff.reset(),
                Err(error) => {
                    tracing::warn!(error = error.chain(), "the clock waits");
                    next = next.max(Instant::now() + backoff.delay());
                }
            }
            if stop.run_until_cancelled(tokio::time::sleep_until(next)).await.is_none() {
                return;
            }
        }
    }

    /// Moves orders that are due at this time, at most a batch, each by one step. How many.
    ///
    /// # Errors
    /// When the database is away.
    async fn run_once(&mut self, at: OffsetDateTime, stop: &CancellationToken) -> Result<usize, DbError> {
        let began = Instant::now();
        self.troubled.retain(|_, until| *until > began);
        let mut backoff = Backoff::RECONNECT;
        loop {
            let mut claimed = Vec::new();
            let is_over = began.elapsed() > ROUND || stop.is_cancelled();
            let error = match self.step(at, self.limit, &mut claimed).await {
                // None of them could be moved: that must not cost the others their turn.
                Ok(0) if self.after.is_some() && !is_over => continue,
                Ok(moved) => {
                    (self.failures, self.limit) = (0, self.settings.scheduler_batch_size);
                    return Ok(moved);
                }
                Err(error) => error,
            };
            // One order may be the cause even of what tells of none, if it goes on.
            self.failures += u32::from(error.may_be_of_rows());
            if error.fault().is_of_rows() || (error.may_be_of_rows() && self.failures > FAILURES) {
                // Fewer and fewer, until it is alone.
                match claimed.as_slice() {
                    [] => return Err(error),
                    [order_id] => {
                        self.leave_alone(*order_id, &error.chain());
                        self.limit = self.settings.scheduler_batch_size;
                    }
                    several => self.limit = i64::try_from(several.len() / 2).unwrap_or(1),
                }
            } else if error.fault() == Fault::Contention {
                tokio::time::sleep(backoff.delay()).await;
            } else {
                return Err(error);
            }
            if is_over {
                return Ok(0);
            }
        }
    }

    async fn step(&mut self, at: OffsetDateTime, limit: i64, claimed: &mut Vec<Uuid>) -> Result<usize, DbError> {
        let handler = self.handler.clone();
        let connection = handler.db.connection().await?;
        let except: Vec<Uuid> = self.troubled.keys().copied().collect();
        let began = Instant::now();
        let mut refused: Vec<(Uuid, String)> = Vec::new();
        let after_last = self.after;
        let work = async {
            // What another release knows how to move is that one's.
            let due = store::lock_due(&connection, at, limit, after_last, &except, handler.lifecycles).await?;
            claimed.extend(due.keys());
            let last = due.iter().filter_map(|(id, locked)| locked.order.due_at.map(|at| (at, *id))).max();
            let last = last.filter(|_| i64::try_from(due.len()).is_ok_and(|count| count == limit));
            let (mut rows, mut messages, mut orders) = (Vec::new(), Vec::new(), Vec::<(Uuid, i64, Order)>::new());
            for (order_id, locked) in &due {
                let order = &locked.order;
                let moved = time_out(handler.lifecycles, order, at).and_then(|handling| {
                    let reason = Some(handling.name.as_str());
                    let (lifecycle, parties) = (&order.lifecycle, locked.parties());
                    let trace = Headers::default();
                    let messages = handler.emitted(lifecycle, *order_id, &parties, &handling, reason, &trace, at);
                    Ok((messages.map_err(Trouble::Failed)?, handling))
                });
                match moved {
                    Ok((emitted, handling)) => {
                        orders.push((*order_id, order.version, after(order, &handling)));
                        messages.extend(emitted);
                        let cause = format!("timeout in {} at version {}", order.status, order.version);
                        rows.push(Handled { order_id: *order_id, cause, correlation_id: None, handling });
                    }
                    Err(Trouble::Early(reason) | Trouble::Failed(reason) | Trouble::Hopeless(reason)) => {
                        refused.push((*order_id, reason));
                    }
                }
            }
            let orders: Vec<_> = orders.iter().map(|(id, found, order)| (*id, *found, order)).collect();
            let sent: Vec<Placed> = match rows.as_slice() {
                [] => Vec::new(),
                rows => store::write_handlings(&connection, rows, &orders, messages, at).await?,
            };
            let ids: Vec<Uuid> = orders.iter().map(|(id, ..)| *id).collect();
            let woke = !ids.is_empty() && store::parked::wake_early(&connection, &ids, at).await? > 0;
            let users: Vec<(Uuid, String)> = ids.iter().map(|id| (*id, due[id].user_id.clone())).collect();
            Ok((users, sent, woke, last))
        };
        let (moved, sent, woke, last) = connection.transaction(handler.db.settings.write_timeout, work).await?;
        handler.outbox.publish(sent, began);
        handler.cache.forget(moved.iter().map(|(order_id, user_id)| (*order_id, user_id.as_str()))).await;
        if woke {
            handler.wake.notify_one();
        }
        // From the beginning again, unless some of these are still there to be passed over.
        self.after = last.filter(|_| !refused.is_empty() || after_last.is_some());
        for (order_id, reason) in refused {
            self.leave_alone(order_id, &reason);
        }
        metrics::counter!("orderstream_clock_moved_total").increment(moved.len() as u64);
        Ok(moved.len())
    }

    fn leave_alone(&mut self, order_id: Uuid, reason: &str) {
        tracing::error!(order.id = %order_id, reason, "the clock cannot move an order; /admin/stuck lists it");
        metrics::counter!("orderstream_clock_refused_total").increment(1);
        if self.troubled.len() < MAX_TROUBLED {
            self.troubled.insert(order_id, Instant::now() + PATIENCE);
        }
    }
}
