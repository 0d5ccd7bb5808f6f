//! Callers that watch orders. One task per process asks the database once per tick for all of
//! them; nobody is told by anybody but the history, so any replica can tell it, and what a caller
//! has not taken yet waits there and not in memory.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use shared::{
    backoff::Backoff,
    db::{Db, DbError},
    lifecycle::Lifecycles,
    message::now,
    order::DELETED,
};
use time::OffsetDateTime;
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    error::Problem,
    store::watch::{self, Told},
};

/// Of one order in one answer of the database; a watcher has room for so much, and is asked for
/// again when it has taken all of it.
const CHUNK: usize = 32;
/// Of all orders in one answer.
const ROWS: usize = 5_000;
/// Between two questions there is at least so many times what the first one took: with very many
/// watchers they hear later, and the database stays for those who write.
const REST: u32 = 3;

/// A handle to all who watch.
#[derive(Clone)]
pub(crate) struct Watchers(Arc<Inner>);

struct Inner {
    lifecycles: &'static Lifecycles,
    limit: usize,
    next: AtomicU64,
    /// `None` when the process is about to end.
    table: Mutex<Option<HashMap<u64, Watcher>>>,
    came: Notify,
}

struct Watcher {
    order_id: Uuid,
    /// The version that it was told last.
    after: i64,
    since: OffsetDateTime,
    sender: mpsc::Sender<Bytes>,
}

/// A place in the table, and what is told to it. Dropping it gives the place up.
pub(crate) struct Watch {
    id: u64,
    watchers: Watchers,
    told: mpsc::Receiver<Bytes>,
}

impl Watchers {
    pub(crate) fn new(limit: usize, lifecycles: &'static Lifecycles) -> Self {
        metrics::gauge!("orderstream_watchers").set(0.0);
        Self(Arc::new(Inner {
            lifecycles,
            limit,
            next: AtomicU64::new(0),
            table: Mutex::new(Some(HashMap::new())),
            came: Notify::new(),
        }))
    }

    /// Takes a place for somebody who knows this order up to that version.
    pub(crate) fn register(&self, order_id: Uuid, after: i64) -> Result<Watch, Problem> {
        let mut table = self.table();
        let Some(watchers) = table.as_mut() else { return Err(Problem::Unavailable("shutting down")) };
        if watchers.len() >= self.0.limit {
            return Err(Problem::Unavailable("too many watch already (MAX_WATCHERS)"));
        }
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let (sender, told) = mpsc::channel(CHUNK);
        watchers.insert(id, Watcher { order_id, after, since: now(), sender });
        metrics::gauge!("orderstream_watchers").set(watchers.len() as f64);
        drop(table);
        self.0.came.notify_one();
        Ok(Watch { id, watchers: self.clone(), told })
    }

    /// Does nothing more happen to an order that is in this state?
    pub(crate) fn is_final(&self, lifecycle: &str, state: &str) -> bool {
        match self.0.lifecycles.find(lifecycle) {
            Some(lifecycle) => lifecycle.is_terminal(state),
            None => state == DELETED,
        }
    }

    /// Tells all who watch until the process is leaving; then lets all of them go.
    pub(crate) async fn tell(self, db: Db, interval: Duration, leaving: CancellationToken) {
        leaving.run_until_cancelled(self.go_on_telling(&db, interval)).await;
        *self.table() = None;
        metrics::gauge!("orderstream_watchers").set(0.0);
    }

    async fn go_on_telling(&self, db: &Db, interval: Duration) {
        let mut backoff = Backoff::RECONNECT;
        loop {
            if self.table().as_ref().is_none_or(HashMap::is_empty) {
                self.0.came.notified().await;
            }
            let began = Instant::now();
            match self.run_once(db).await {
                Ok(ROWS..) => backoff.reset(),
                Ok(_) => {
                    backoff.reset();
                    tokio::time::sleep(interval.max(began.elapsed() * REST)).await;
                }
                Err(error) => {
                    tracing::warn!(error = error.chain(), "cannot ask for those who watch orders; they wait");
                    tokio::time::sleep(backoff.delay().max(interval)).await;
                }
            }
        }
    }

    /// Asks once for all, and tells each what is new to it. How many rows that were; [`ROWS`] when
    /// there are more.
    async fn run_once(&self, db: &Db) -> Result<usize, DbError> {
        let asked = self.asked();
        if asked.is_empty() {
            return Ok(0);
        }
        let (orders, afters): (Vec<_>, Vec<_>) = asked.keys().copied().unzip();
        let rows = watch::told_since(db, &orders, &afters, CHUNK, ROWS).await?;
        let now = now();
        for row in &rows {
            if let Some(ids) = asked.get(&(row.order_id, row.after)) {
                self.hand_out(row, ids, now);
            }
        }
        Ok(rows.len())
    }

    /// What is to be asked for, and by whom; those who have not taken all that they were told have
    /// it still before them.
    fn asked(&self) -> HashMap<(Uuid, i64), Vec<u64>> {
        let mut asked: HashMap<_, Vec<u64>> = HashMap::new();
        for (id, watcher) in self.table().iter().flatten() {
            if watcher.sender.capacity() == CHUNK {
                asked.entry((watcher.order_id, watcher.after)).or_default().push(*id);
            }
        }
        asked
    }

    fn hand_out(&self, row: &Told, ids: &[u64], now: OffsetDateTime) {
        let event = event(row);
        // It may have been brought back since, where its lifecycle allows that.
        let is_last = row.row.version >= row.newest && self.is_final(&row.lifecycle, &row.row.to);
        let mut table = self.table();
        let Some(watchers) = table.as_mut() else { return };
        for id in ids {
            let Some(watcher) = watchers.get_mut(id) else { continue };
            // There is room for all of a chunk. Who is gone leaves the table by itself.
            let _ = watcher.sender.try_send(event.clone());
            watcher.after = row.row.version;
            if row.row.at > watcher.since {
                let delay = (now - row.row.at).as_seconds_f64();
                metrics::histogram!("orderstream_watch_delay_seconds").record(delay.max(0.0));
            }
            if is_last {
                // What it was told it still gets; then its stream ends.
                watchers.remove(id);
            }
        }
        metrics::gauge!("orderstream_watchers").set(watchers.len() as f64);
    }

    fn table(&self) -> MutexGuard<'_, Option<HashMap<u64, Watcher>>> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch {
    /// The next event as it is sent; `None` after the last, and when the process is leaving.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        self.told.recv().await
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(watchers) = self.watchers.table().as_mut() {
            watchers.remove(&self.id);
            metrics::gauge!("orderstream_watchers").set(watchers.len() as f64);
        }
    }
}

/// A row of the history as a server-sent event (HTML, section 9.2).
fn event(row: &Told) -> Bytes {
    // A lifecycle's own names may be anything.
    let kind: String = row.row.event.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    // Our own types always serialize.
    let data = serde_json::to_string(&row.row).unwrap_or_default();
    format!("id: {}\nevent: {kind}\ndata: {data}\n\n", row.row.version).into()
}

#[cfg(test)]
mod tests {
    use shared::lifecycle::Lifecycles;

    use super::*;
    use crate::store::read::HistoryRow;

    fn told(order_id: Uuid, after: i64, version: i64, to: &str, newest: i64) -> Told {
        let row = HistoryRow {
            version,
            from: None,
            to: to.to_owned(),
            event: "order.\nupdated".to_owned(),
            cause: "\r\n".to_owned(),
            ignored: false,
            at: now(),
        };
        Told { order_id, after, lifecycle: "retail".to_owned(), newest, row }
    }

    fn hand_out(watchers: &Watchers, row: &Told) {
        let asked = watchers.asked();
        watchers.hand_out(row, asked.get(&(row.order_id, row.after)).map_or(&[][..], Vec::as_slice), now());
    }

    #[tokio::test]
    async fn each_hears_of_its_order_what_it_does_not_know_and_no_more_after_the_end() {
        let watchers = Watchers::new(10, Lifecycles::embedded().unwrap());
        let (one, other) = (Uuid::now_v7(), Uuid::now_v7());
        let mut all = [(one, 0), (one, 0), (one, 1), (other, 0)].map(|(id, at)| watchers.register(id, at).unwrap());
        hand_out(&watchers, &told(one, 0, 1, "pending", 1));
        for watch in &mut all[..2] {
            let text = watch.next().await.unwrap();
            let text = std::str::from_utf8(&text).unwrap();
            assert!(text.starts_with("id: 1\nevent: order. updated\ndata: {") && text.ends_with("}\n\n"), "{text}");
            assert_eq!(text.lines().count(), 4, "{text}");
        }
        hand_out(&watchers, &told(one, 1, 2, "cancelled", 2));
        for watch in &mut all[..3] {
            assert!(watch.next().await.unwrap().starts_with(b"id: 2\n"));
            assert!(watch.next().await.is_none());
        }
        assert_eq!(watchers.asked().into_keys().collect::<Vec<_>>(), [(other, 0)]);
    }

    #[tokio::test]
    async fn a_final_state_that_the_order_has_left_since_ends_nothing() {
        let watchers = Watchers::new(10, Lifecycles::embedded().unwrap());
        let order_id = Uuid::now_v7();
        let mut watch = watchers.register(order_id, 0).unwrap();
        for (after, state) in [(0, "pending"), (1, "cancelled"), (2, "deleted")] {
            hand_out(&watchers, &told(order_id, after, after + 1, state, 3));
            assert!(watch.next().await.is_some(), "{state}");
        }
        assert!(watch.next().await.is_none());
    }

    #[tokio::test]
    async fn who_has_not_taken_what_it_was_told_is_not_asked_for() {
        let watchers = Watchers::new(10, Lifecycles::embedded().unwrap());
        let order_id = Uuid::now_v7();
        let mut slow = watchers.register(order_id, 0).unwrap();
        hand_out(&watchers, &told(order_id, 0, 1, "pending", 1));
        assert!(watchers.asked().is_empty());
        slow.next().await.unwrap();
        assert_eq!(watchers.asked().into_keys().collect::<Vec<_>>(), [(order_id, 1)]);
    }

    #[tokio::test]
    async fn places_are_bounded_and_given_up_with_the_stream() {
        let watchers = Watchers::new(2, Lifecycles::embedded().unwrap());
        let order_id = Uuid::now_v7();
        let first = watchers.register(order_id, 0).unwrap();
        let _second = watchers.register(order_id, 0).unwrap();
        assert!(matches!(watchers.register(order_id, 0), Err(Problem::Unavailable(_))));
        drop(first);
        watchers.register(order_id, 0).unwrap();
    }

    #[tokio::test]
    async fn when_the_process_leaves_all_streams_end_and_none_begins() {
        let watchers = Watchers::new(2, Lifecycles::embedded().unwrap());
        let mut watch = watchers.register(Uuid::now_v7(), 0).unwrap();
        *watchers.table() = None;
        assert!(watch.next().await.is_none());
        assert!(matches!(watchers.register(Uuid::now_v7(), 0), Err(Problem::Unavailable(_))));
    }
}
