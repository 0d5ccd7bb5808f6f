//! What is there at the end: the tables, and the topic of events. Kept as files too, so that it can be judged
//! again.

use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use test_support::HttpClient;
use tokio_postgres::Client;

use crate::schedule::PROCESSES;
use crate::stage::{Stage, log_file};

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Evidence {
    pub orders: Vec<Order>,
    pub rows: Vec<Row>,
    /// Each partition in its order.
    pub events: Vec<Event>,
    /// What should not be left, each with what it is of.
    pub left: Vec<String>,
    pub panics: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    pub order: String,
    pub lifecycle: String,
    pub status: String,
    pub version: i64,
    pub mark: Option<String>,
}

/// Of the history that the service keeps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub order: String,
    pub version: i64,
    pub event: Option<String>,
    pub cause: String,
    pub kind: String,
    pub from: Option<String>,
    pub to: String,
    pub ignored: bool,
    pub at: String,
}

/// A record of `orders.events`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    pub partition: i32,
    pub offset: i64,
    pub key: String,
    pub event: String,
    pub order: String,
    pub kind: String,
    pub version: i64,
    pub mark: Option<String>,
}

const ORDERS: &str = "
    select order_id::text, lifecycle, status, version, items -> 0 ->> 'product_id' from orders";

const ROWS: &str = "
    select order_id::text, version, event_id::text, cause, type, from_status, to_status, ignored, at::text
    from order_events order by order_id, version, at";

/// Messages that were not sent, messages that are set aside, events that no worker has decided, and orders
/// that wait for one.
const LEFT: &str = "
    select 'unsent: ' || order_id || ' version ' || version || ' on ' || topic from outbox
    union all
    select 'parked: ' || coalesce(order_id::text, 'no order') || ' ' || kind || ', ' || state || ', from ' || topic
        || ': ' || coalesce(reason, '')
    from parked_messages where state not in ('done', 'discarded')
    union all
    select 'undecided: ' || e.order_id || ' version ' || e.version || ' ' || e.type
    from order_events e
    where e.type like 'order.%' and not e.ignored and not exists (
        select from order_events w where w.order_id = e.order_id and w.cause = e.event_id::text)
    union all
    select 'unhandled: ' || order_id from orders where lifecycle = 'marketplace' and status = 'new'";

/// What is left now.
pub async fn left(client: &Client) -> anyhow::Result<Vec<String>> {
    Ok(client.query(LEFT, &[]).await?.iter().map(|row| row.get(0)).collect())
}

pub async fn gather(stage: &Stage, folder: &Path, mut left: Vec<String>) -> anyhow::Result<Evidence> {
    let client = stage.database().await;
    let orders = client.query(ORDERS, &[]).await.context("reading the orders")?;
    let orders = orders.iter().map(|row| Order {
        order: row.get(0),
        lifecycle: row.get(1),
        status: row.get(2),
        version: row.get(3),
        mark: row.get(4),
    });
    let rows = client.query(ROWS, &[]).await.context("reading the history")?;
    let rows = rows.iter().map(|row| Row {
        order: row.get(0),
        version: row.get(1),
        event: row.get(2),
        cause: row.get(3),
        kind: row.get(4),
        from: row.get(5),
        to: row.get(6),
        ignored: row.get(7),
        at: row.get(8),
    });
    let messages = stage.system.kafka.read(stage.system.events()).await;
    let events = messages.iter().map(|message| {
        let body = message.json();
        let text = |field: &str| body[field].as_str().unwrap_or_default().to_owned();
        Event {
            partition: message.partition,
            offset: message.offset,
            key: message.key_text(),
            event: text("event_id"),
            order: text("order_id"),
            kind: text("type"),
            version: body["version"].as_i64().unwrap_or_default(),
            mark: body["items"][0]["product_id"].as_str().map(str::to_owned),
        }
    });
    for (index, api) in stage.apis.iter().enumerate() {
        left.extend(waiters(api.lock().await.http(), index).await);
    }
    let panics = (0..PROCESSES.len()).flat_map(|process| panics(&log_file(folder, process))).collect();
    Ok(Evidence { orders: orders.collect(), rows: rows.collect(), events: events.collect(), left, panics })
}

/// Nobody asks any more, so nobody may wait.
async fn waiters(http: &HttpClient, index: usize) -> Option<String> {
    let waiting = http.metric("orderstream_waiters").await;
    (waiting != 0.0).then(|| format!("waiters: {waiting} at {}", PROCESSES[index]))
}

fn panics(log: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().filter(|line| line.contains("panicked at")).map(|line| format!("{}: {line}", log.display())).collect()
}

impl Evidence {
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string(self)?;
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }

    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no evidence", path.display()))
    }
}
