//! What does not get on by itself: orders that nobody moves, messages that are not sent.

use std::time::Duration;

use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Entry, entry};
use crate::{
    db::{Db, DbError},
    lifecycle::Lifecycles,
};

/// Most entries of each kind among those that are stuck.
const STUCK_LIMIT: i64 = 100;
/// What should have moved so long ago is stuck.
const STUCK_AFTER: Duration = Duration::from_secs(60);

/// What does not get on by itself; of each kind the oldest.
#[derive(Debug, Serialize)]
pub struct Stuck {
    /// Orders that the clock should have moved.
    pub overdue: Vec<Overdue>,
    /// New orders that no worker has handled, though their events were sent.
    pub unhandled: Vec<Unhandled>,
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
pub struct Unhandled {
    pub order_id: Uuid,
    pub lifecycle: String,
    pub status: String,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
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

/// What is stuck: what should have moved a minute ago, and what waits for an operator.
///
/// # Errors
/// When PostgreSQL is away.
pub async fn stuck(db: &Db, lifecycles: &Lifecycles) -> Result<Stuck, DbError> {
    const OVERDUE: &str = "
        select order_id, lifecycle, status, due_at from orders
        where due_at < clock_timestamp() - $1::float8 * interval '1 second'
          and (lifecycle || ' ' || status = any ($3::text[]) or lifecycle <> all ($4::text[]))
        order by due_at limit $2";
    // A first version that an event told of is handled, which makes the second. Of those whose event is in the
    // outbox, or was parked, it is known why not. The limit comes first: after an outage there may be millions.
    const UNHANDLED: &str = "
        select o.order_id, o.lifecycle, o.status, o.created_at
        from (select order_id, created_at from order_states_first
              where created_at < clock_timestamp() - $1::float8 * interval '1 second'
              order by created_at limit $2) s
        join orders o on o.order_id = s.order_id
        where exists (select from order_events e where e.order_id = s.order_id and e.version = 1 and e.event_id is not null)
          and not exists (select from outbox b where b.order_id = s.order_id)
          and not exists (select from parked_messages p where p.order_id = s.order_id and p.state <> 'done')
        order by s.created_at";
    const CONFLICTS: &str = concat!(
        "select ",
        entry_columns!(),
        " from parked_messages p where p.kind = 'conflict' and p.state = 'dead' and p.id > 0 order by p.id limit $1"
    );
    const UNSENT: &str = "
        select order_id, version, topic, created_at from outbox
        where created_at < clock_timestamp() - $1::float8 * interval '1 second' order by created_at limit $2";
    const BLOCKED: &str = "
        select p.order_id, p.id, p.reason,
            (select count(*) from parked_messages w
             where w.order_id = p.order_id and w.kind = 'failed' and w.state = 'waiting') as waiting
        from parked_messages p
        where p.kind = 'failed' and p.state = 'dead' and p.order_id is not null and p.id > 0
        order by p.id limit $1";
    let connection = db.connection().await?;
    let seconds = STUCK_AFTER.as_secs_f64();
    // One that is not known here may be known to the clock.
    let (timed, names) = (lifecycles.timed(), lifecycles.iter().map(|lifecycle| &*lifecycle.name).collect::<Vec<_>>());
    let work = async {
        let client = connection.client();
        let overdue =
            client.query(&connection.prepared(OVERDUE).await?, &[&seconds, &STUCK_LIMIT, &timed, &names]).await?;
        let unhandled = client.query(&connection.prepared(UNHANDLED).await?, &[&seconds, &STUCK_LIMIT]).await?;
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
            unhandled: unhandled
                .iter()
                .map(|row| Unhandled {
                    order_id: row.get(0),
                    lifecycle: row.get(1),
                    status: row.get(2),
                    created_at: row.get(3),
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
