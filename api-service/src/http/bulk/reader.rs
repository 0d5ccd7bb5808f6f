//! Reads the lines of a bulk request and queues each with the writer.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::Stream;
use shared::message::Headers;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::{
    super::{App, orders::DRAIN_LIMIT},
    Item, WINDOW,
    lines::{Cut, Line, Lines},
    parse, size,
};
use crate::{
    error::Problem,
    identity::Caller,
    request::{NewOrder, Upsert},
    writer::Origin,
};

/// What refusals that nobody has taken yet may come to, in KiB: a line of a few bytes can break
/// many rules.
const REFUSALS_KIB: usize = 1_024;
/// After the last line of an answer that comes early, as long as this the client is listened to.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Lines of which one kind must not overtake the other: a deleted order's external id may be used
/// again, and the writer keeps the order of each kind only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Deletes,
    TakesExternalId,
    Other,
}

impl Kind {
    fn of(upsert: &Upsert) -> Self {
        match upsert {
            Upsert::Delete(_) => Self::Deletes,
            Upsert::Create(NewOrder { external_id: Some(_), .. }) => Self::TakesExternalId,
            Upsert::Create(_) | Upsert::Update(_) => Self::Other,
        }
    }
}

/// The reading half of a request; the answering half takes its items.
pub(super) struct Reader<S> {
    lines: Lines<S>,
    app: App,
    caller: Caller,
    trace: Headers,
    items: mpsc::Sender<Item>,
    /// Nothing can be stored any more.
    hopeless: CancellationToken,
    refusals: Arc<Semaphore>,
    /// Those that the writer is not done with.
    queued: TaskTracker,
    recent: Recent,
    last: Kind,
}

/// Which orders and external ids the last lines were about. A second change of one is not queued
/// before the first is done: thousands of one order would keep the writer from the orders of others.
#[derive(Default)]
struct Recent {
    lines: HashMap<u128, u64>,
    line: u64,
}

impl Recent {
    /// More lines than can be queued at the same time.
    const KEPT: u64 = 2 * WINDOW as u64;

    /// Was one of the last lines about the same?
    fn has(&mut self, key: Option<u128>) -> bool {
        self.line += 1;
        let oldest = self.line.saturating_sub(Self::KEPT);
        if self.lines.len() as u64 > 2 * Self::KEPT {
            self.lines.retain(|_, line| *line >= oldest);
        }
        let before = key.and_then(|key| self.lines.insert(key, self.line));
        before.is_some_and(|line| line >= oldest)
    }
}

impl<S, E> Reader<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    pub(super) fn new(
        app: App,
        caller: Caller,
        trace: Headers,
        lines: Lines<S>,
        items: mpsc::Sender<Item>,
        hopeless: CancellationToken,
    ) -> Self {
        Self {
            lines,
            app,
            caller,
            trace,
            items,
            hopeless,
            refusals: Arc::new(Semaphore::new(REFUSALS_KIB)),
            queued: TaskTracker::new(),
            recent: Recent::default(),
            last: Kind::Other,
        }
    }

    /// Until there are no more lines, or no more can be stored.
    pub(super) async fn run(mut self) {
        let (leaving, hopeless) = (self.app.leaving.clone(), self.hopeless.clone());
        let reason = tokio::select! {
            biased;
            () = leaving.cancelled() => Some("shutting down; send the rest again"),
            () = hopeless.cancelled() => Some("nothing can be stored now; send all again later"),
            reason = self.read() => reason,
        };
        if self.items.send(Item::End(reason)).await.is_ok() && reason.is_some() {
            self.lines.drain(DRAIN_LIMIT, LAST_WORDS).await;
        }
    }

    /// Until there are no more lines; says why, if that is not the end of the body.
    async fn read(&mut self) -> Option<&'static str> {
        loop {
            let (line, upsert) = match self.lines.next().await {
                Ok(None) => return None,
                Err(Cut::TooSlow) => return Some("no line arrived whole in time"),
                Err(Cut::BrokenOff) => return Some("the body broke off"),
                Ok(Some(Line::TooLong(line))) => (line, Err(Problem::TooLarge { limit: self.app.max_body_bytes })),
                Ok(Some(Line::Whole(line, bytes))) => (line, parse(&bytes, &self.caller, &self.app)),
            };
            let item = match upsert {
                Ok(upsert) => self.queue(line, upsert).await,
                Err(problem) => refuse(self.refusals.clone(), line, problem).await,
            };
            if self.items.send(item).await.is_err() {
                return Some("nobody listens any more");
            }
        }
    }

    async fn queue(&mut self, line: u64, upsert: Upsert) -> Item {
        let kind = Kind::of(&upsert);
        let changes_kind = kind != Kind::Other && kind != self.last;
        let overtakes = changes_kind && self.last != Kind::Other;
        if changes_kind {
            self.last = kind;
        }
        if self.recent.has(key(&upsert)) || overtakes {
            self.queued.close();
            self.queued.wait().await;
            self.queued.reopen();
            self.recent = Recent::default();
            self.recent.has(key(&upsert));
        }
        let correlation_id = Uuid::now_v7();
        let origin = Origin { correlation_id, reply_to: None, trace: self.trace.clone(), expected: None, claim: None };
        let work = self.app.orders.work(upsert, &origin);
        let operation = work.operation();
        match self.app.orders.writer.queue(work, origin, &self.queued).await {
            Ok(queued) => Item::Queued { line, operation, correlation_id, queued },
            Err(problem) => Item::Refused { line, problem, _room: None },
        }
    }
}

/// The order, or the external id of a new one.
fn key(upsert: &Upsert) -> Option<u128> {
    match upsert {
        Upsert::Create(order) => order.external_id.as_deref().map(|id| xxh3_128(id.as_bytes())),
        Upsert::Update(change) => Some(change.target.order_id.as_u128()),
        Upsert::Delete(target) => Some(target.order_id.as_u128()),
    }
}

async fn refuse(room: Arc<Semaphore>, line: u64, problem: Problem) -> Item {
    let kib = u32::try_from((size(&problem) / 1024).clamp(1, REFUSALS_KIB)).unwrap_or(1);
    Item::Refused { line, problem, _room: room.acquire_many_owned(kib).await.ok() }
}
