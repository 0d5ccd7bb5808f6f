//! The books, checked after everything that can go wrong went wrong: what was accepted exists
//! once, was handled once, and was told to Kafka in order.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use tokio_postgres::Client;

use crate::http::Reply;
use crate::kafka::TestKafka;
use crate::wait::wait_for;

/// Longer than the sweeper's grace and a rebalance together.
const SETTLE_DEADLINE: Duration = Duration::from_secs(90);

/// Enough to see a pattern in a failure.
const SHOWN: usize = 10;

/// What must not be found in the database, as questions that name the offenders.
const FAULTS: &[(&str, &str)] = &[
    (
        "histories with a gap, a double, or no beginning",
        "select order_id::text || ': ' || array_agg(version order by version)::text
         from order_events where not ignored
         group by order_id
         having min(version) <> 1 or max(version) <> count(*) or count(distinct version) <> count(*)",
    ),
    (
        "orders whose version is not their history's last",
        "select o.order_id::text || ': ' || o.version || ' but ' || coalesce(max(e.version)::text, 'no history')
         from orders o left join order_events e on e.order_id = o.order_id and not e.ignored
         group by o.order_id, o.version
         having max(e.version) is distinct from o.version",
    ),
    (
        "histories without an order",
        "select distinct e.order_id::text from order_events e
         where not exists (select 1 from orders o where o.order_id = e.order_id)",
    ),
    (
        "orders that were not created exactly once",
        "select o.order_id::text || ': ' || count(e.order_id)
         from orders o left join order_events e on e.order_id = o.order_id and e.type = 'order.created'
         group by o.order_id having count(e.order_id) <> 1",
    ),
    (
        "events handled in effect more than once",
        "select order_id::text || ' by ' || cause || ': ' || count(*)
         from order_events where type = 'handled' and not ignored
         group by order_id, cause having count(*) > 1",
    ),
    (
        "causes recorded twice",
        "select order_id::text || ' by ' || cause || ': ' || count(*)
         from order_events group by order_id, cause having count(*) > 1",
    ),
    (
        "handled rows that changed nothing",
        "select order_id::text || ' by ' || cause from order_events where type = 'handled' and ignored",
    ),
    (
        "handled rows without their event",
        "select w.order_id::text || ' by ' || w.cause from order_events w
         where w.type in ('handled', 'rejected', 'noted', 'superseded')
           and not exists (select 1 from order_events e
                           where e.order_id = w.order_id and e.event_id::text = w.cause
                             and e.type like 'order.%')",
    ),
    (
        "external ids held by two living orders",
        "select user_id || '/' || external_id || ': ' || count(*)
         from orders where external_id is not null and status <> 'deleted'
         group by user_id, external_id having count(*) > 1",
    ),
    (
        "orders listed in a state that they are not in, or in none",
        "select coalesce(o.order_id, s.order_id)::text || ': ' || coalesce(o.status, 'no order')
             || ' but ' || coalesce(s.status, 'not listed')
         from orders o full join order_states s
             on s.order_id = o.order_id and s.status = o.status and s.created_at = o.created_at
         where o.order_id is null or s.order_id is null",
    ),
    ("orders left unhandled", "select order_id::text from orders where status = 'new'"),
    (
        "messages parked and not handled since",
        "select id::text || ': ' || coalesce(reason, '') from parked_messages where state <> 'done'",
    ),
];

/// The events that clients caused and the worker has not decided yet.
const UNDECIDED: &str = "
    select e.order_id::text || ' version ' || e.version || ' ' || e.type
    from order_events e
    where e.type like 'order.%' and not e.ignored
      and not exists (select 1 from order_events w
                      where w.order_id = e.order_id and w.cause = e.event_id::text
                        and w.type in ('handled', 'rejected', 'noted', 'superseded'))";

/// A change that a client was told is stored: any 2xx.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Accepted {
    pub order_id: String,
    pub version: i64,
}

impl From<&Reply> for Accepted {
    fn from(reply: &Reply) -> Self {
        Self { order_id: reply.text("order_id"), version: reply.number("version") }
    }
}

pub struct Ledger<'a> {
    database: &'a Client,
    kafka: &'a TestKafka,
    events: &'a str,
    /// An order's events went to another partition in the middle of the test.
    has_grown: bool,
}

impl<'a> Ledger<'a> {
    pub fn new(database: &'a Client, kafka: &'a TestKafka, events: &'a str) -> Self {
        Self { database, kafka, events, has_grown: false }
    }

    /// The topic was given more partitions: an order is on one of them before that, and on another after it.
    pub fn of_a_topic_that_has_grown(self) -> Self {
        Self { has_grown: true, ..self }
    }

    /// Until the outbox is empty and the worker has decided every event.
    pub async fn settle(&self) {
        let what = "an empty outbox and every event decided";
        wait_for(what, SETTLE_DEADLINE, || async {
            let outbox = self.lines("select seq::text from outbox").await;
            let undecided = self.lines(UNDECIDED).await;
            if outbox.is_empty() && undecided.is_empty() {
                Ok(())
            } else {
                Err(format!("outbox: {}; undecided: {}", shown(&outbox), shown(&undecided)))
            }
        })
        .await;
    }

    /// Settles, then checks database and topic against each other and against what clients were
    /// told.
    pub async fn check(&self, accepted: impl IntoIterator<Item = Accepted>) {
        self.settle().await;
        let mut faults = Vec::new();
        for (fault, sql) in FAULTS {
            let found = self.lines(sql).await;
            if !found.is_empty() {
                faults.push(format!("{fault}: {}", shown(&found)));
            }
        }
        faults.extend(self.lost(accepted).await);
        faults.extend(self.topic_faults().await);
        assert!(faults.is_empty(), "the ledger does not add up:\n- {}", faults.join("\n- "));
    }

    async fn lost(&self, accepted: impl IntoIterator<Item = Accepted>) -> Option<String> {
        let sql = "select order_id::text || ' version ' || version from order_events where not ignored";
        let stored: HashSet<String> = self.lines(sql).await.into_iter().collect();
        let lost: Vec<String> = accepted
            .into_iter()
            .map(|change| format!("{} version {}", change.order_id, change.version))
            .filter(|change| !stored.contains(change))
            .collect();
        (!lost.is_empty()).then(|| format!("accepted changes that are not stored: {}", shown(&lost)))
    }

    async fn lines(&self, sql: &str) -> Vec<String> {
        let rows = self.database.query(sql, &[]).await;
        rows.unwrap_or_else(|error| panic!("{sql}: {error:?}"))
            .iter()
            .map(|row| row.get::<_, Option<String>>(0).unwrap_or_default())
            .collect()
    }

    /// Every event of the history is on the topic, no other is, and per order the first
    /// appearances rise.
    async fn topic_faults(&self) -> Vec<String> {
        let rows = self
            .database
            .query(
                "select event_id::text, order_id::text, version::bigint from order_events
                 where type like 'order.%' and not ignored",
                &[],
            )
            .await
            .expect("reading the history");
        let expected: HashMap<String, (String, i64)> =
            rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect();

        let mut seen = HashSet::new();
        let mut last_version: BTreeMap<String, i64> = BTreeMap::new();
        let mut partition_of: HashMap<String, i32> = HashMap::new();
        let (mut unknown, mut disordered, mut scattered) = (Vec::new(), Vec::new(), Vec::new());
        for message in self.kafka.read(self.events).await {
            let event = message.json();
            let event_id = event["event_id"].as_str().unwrap_or_default().to_owned();
            let place = format!("{event_id} at {}/{}", message.partition, message.offset);
            let Some((order_id, version)) = expected.get(&event_id) else {
                unknown.push(place);
                continue;
            };
            if message.key_text() != *order_id || event["version"].as_i64() != Some(*version) {
                unknown.push(format!("{place}: key {}, {event}", message.key_text()));
            }
            if *partition_of.entry(order_id.clone()).or_insert(message.partition) != message.partition {
                scattered.push(order_id.clone());
            }
            if seen.insert(event_id) {
                let last = last_version.entry(order_id.clone()).or_default();
                if *version <= *last {
                    disordered.push(format!("{place}: {order_id} version {version} after {last}"));
                }
                *last = *version;
            }
        }
        let missing: Vec<String> = expected
            .iter()
            .filter(|(event_id, _)| !seen.contains(*event_id))
            .map(|(event_id, (order_id, version))| format!("{event_id}: {order_id} version {version}"))
            .collect();

        if self.has_grown {
            // Between two partitions there is no order.
            disordered.clear();
            scattered.clear();
        }
        [
            ("events on the topic that the history does not know", unknown),
            ("first appearances out of version order", disordered),
            ("orders on several partitions", scattered),
            ("events that never reached the topic", missing),
        ]
        .into_iter()
        .filter(|(_, found)| !found.is_empty())
        .map(|(fault, found)| format!("{fault}: {}", shown(&found)))
        .collect()
    }
}

fn shown(lines: &[String]) -> String {
    let first: Vec<&str> = lines.iter().take(SHOWN).map(String::as_str).collect();
    format!("{} ({})", lines.len(), first.join("; "))
}
