//! The callers that wait for the worker's answer: a table of oneshot senders by correlation id.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use dashmap::DashMap;
use metrics::Gauge;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::heard::Heard;

/// A handle to the table.
#[derive(Clone)]
pub(crate) struct Waiters(Arc<Table>);

struct Table {
    senders: DashMap<Uuid, oneshot::Sender<Heard>>,
    count: AtomicUsize,
    limit: usize,
    /// Looked up once: each look for it costs as much as a place in the table.
    gauge: Gauge,
}

/// A place in the table. Dropping it gives the place up, whatever ends the wait: the answer, the
/// deadline, a client that left, a panic.
pub(crate) struct Waiter {
    id: Uuid,
    waiters: Waiters,
    answer: oneshot::Receiver<Heard>,
}

/// Held by the change whose answer is awaited. Dropped, it wakes the caller, for whom there will be no
/// answer.
pub(crate) struct Wake {
    id: Uuid,
    waiters: Option<Waiters>,
}

impl Waiters {
    pub(crate) fn new(limit: usize) -> Self {
        let gauge = metrics::gauge!("orderstream_waiters");
        Self(Arc::new(Table { senders: DashMap::new(), count: AtomicUsize::new(0), limit, gauge }))
    }

    /// Takes a place. Before the event can be seen: an answer that comes first would find nobody.
    /// `None` when there are too many already.
    pub(crate) fn register(&self, id: Uuid) -> Option<Waiter> {
        let before = self.0.count.fetch_add(1, Ordering::Relaxed);
        if before >= self.0.limit {
            self.0.count.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        self.0.gauge.increment(1.0);
        let (sender, answer) = oneshot::channel();
        self.0.senders.insert(id, sender);
        Some(Waiter { id, waiters: self.clone(), answer })
    }

    /// Gives the answer to whoever waits for it here. `read` is called only if somebody does.
    pub(crate) fn answer(&self, id: Uuid, read: impl FnOnce() -> Heard) {
        // The guard of the table is gone before anything is read or sent.
        if self.0.senders.contains_key(&id) {
            let heard = read();
            if let Some((_, sender)) = self.0.senders.remove(&id) {
                let _ = sender.send(heard);
            }
        }
    }
}

impl Waiter {
    pub(crate) fn wake(&self) -> Wake {
        Wake { id: self.id, waiters: Some(self.waiters.clone()) }
    }

    /// The answer, or `None` when there will be none. Ask no more after either, unless you wait on.
    pub(crate) async fn answered(&mut self) -> Option<Heard> {
        (&mut self.answer).await.ok()
    }

    /// For the next answer: this one was another's. One that came before this call is not heard.
    pub(crate) fn wait_on(&mut self) {
        let (sender, answer) = oneshot::channel();
        self.answer = answer;
        self.waiters.0.senders.insert(self.id, sender);
    }
}

impl Wake {
    /// The answer is on its way, and wakes the caller when it comes.
    pub(crate) fn leave_to_answer(mut self) {
        self.waiters = None;
    }
}

impl Drop for Wake {
    fn drop(&mut self) {
        if let Some(waiters) = &self.waiters {
            waiters.0.senders.remove(&self.id);
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.waiters.0.senders.remove(&self.id);
        self.waiters.0.count.fetch_sub(1, Ordering::Relaxed);
        self.waiters.0.gauge.decrement(1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heard::Told;

    fn answer(version: i64) -> Heard {
        let body = format!(r#"{{"status":"processed","order_status":"done","order_version":{version}}}"#);
        Heard::read(Some(body.as_bytes()))
    }

    fn version(heard: &Heard) -> i64 {
        match &heard.told {
            Told::Part(part) => part.order_version.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn each_waiter_gets_its_own_answer() {
        let waiters = Waiters::new(100);
        let mut all: Vec<_> = (0..100).map(|version| (version, waiters.register(Uuid::now_v7()).unwrap())).collect();
        for (version, waiter) in all.iter().rev() {
            waiters.answer(waiter.id, || answer(*version));
        }
        for (own, waiter) in &mut all {
            assert_eq!(version(&waiter.answered().await.unwrap()), *own);
        }
    }

    #[tokio::test]
    async fn who_gets_no_answer_is_woken_and_who_gets_one_only_by_that() {
        let waiters = Waiters::new(2);
        let mut waiter = waiters.register(Uuid::now_v7()).unwrap();
        drop(waiter.wake());
        assert!(waiter.answered().await.is_none());
        let mut waiter = waiters.register(Uuid::now_v7()).unwrap();
        waiter.wake().leave_to_answer();
        assert!(futures_util::poll!(std::pin::pin!(waiter.answered())).is_pending());
        waiters.answer(waiter.id, || answer(7));
        assert_eq!(version(&waiter.answered().await.unwrap()), 7);
        // It was another's.
        waiter.wait_on();
        waiters.answer(waiter.id, || answer(8));
        assert_eq!(version(&waiter.answered().await.unwrap()), 8);
    }

    #[tokio::test]
    async fn a_late_answer_finds_nobody_and_is_not_even_read() {
        let waiters = Waiters::new(1);
        let mut waiter = waiters.register(Uuid::now_v7()).unwrap();
        let id = waiter.id;
        assert!(futures_util::poll!(std::pin::pin!(waiter.answered())).is_pending());
        drop(waiter);
        waiters.answer(id, || panic!("nobody waits"));
        assert!(waiters.0.senders.is_empty());
    }

    #[test]
    fn a_full_table_takes_nobody_until_somebody_leaves() {
        let waiters = Waiters::new(2);
        let first = waiters.register(Uuid::now_v7());
        let second = waiters.register(Uuid::now_v7());
        assert!(first.is_some() && second.is_some() && waiters.register(Uuid::now_v7()).is_none());
        drop(first);
        assert!(waiters.register(Uuid::now_v7()).is_some());
    }
}
