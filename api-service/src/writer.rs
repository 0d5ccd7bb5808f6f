//! Makes changes durable, many in one transaction: takes what is queued, writes it, commits,
//! answers each; the next batch gathers meanwhile. No timer.
//!
//! A batch holds at most one change per order and per external id; what would be the second waits
//! for the next batch. One bad change does not harm the others of its batch: when PostgreSQL
//! refuses the rows, they are tried in halves. When the connection is lost nothing is tried
//! again, since the commit may have been made: the caller hears so, and may safely repeat.

mod together;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use shared::{
    db::{Connection, Db, DbError, Fault},
    lifecycle::Lifecycles,
    message::{Headers, ReplyTo, now},
    outbox::{Outbox, Placed},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::JoinSet,
    time::Instant,
};
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    change::{self, Context, Decided},
    error::Problem,
    request::{Change, Target},
    store::{
        change as store_change, insert,
        insert::NewRow,
        read::{self, Reference},
    },
};

/// Most changes in one transaction. Beyond this nothing is won, and one bad one costs more.
const BATCH: usize = 256;
/// Writers of new orders and writers of changes, so many of each, each with a connection while it
/// writes: one commits while the other gathers. Changes may have to wait for the locks of others;
/// new orders never do, and must not wait for changes.
const WRITERS: usize = 2;
/// Changes that may wait for each writer: some tenths of a second. Beyond that a client had
/// better hear at once that we are full.
const QUEUE: usize = 4_096;
/// What all that waits may come to, in KiB: thousands of the largest bodies would not fit.
const QUEUE_KIB: usize = 64 * 1024;
/// What those who bring many at once have in the queues, in KiB and all together, and what each
/// change counts at least: 1,024 changes, which keep the writers busy and leave room for others.
const BULK_KIB: usize = 16 * 1024;
const BULK_LINE_KIB: u32 = 16;
/// So often others may be quicker, or in the way, before the caller is told to try again.
const CONTENTION_RETRIES: usize = 5;

const SHUTTING_DOWN: Problem = Problem::Unavailable("shutting down");

/// What is to be made durable.
#[derive(Debug)]
pub(crate) enum Work {
    Create(Box<NewRow>),
    Update(Box<Change>),
    Delete(Target),
    Move(Move),
}

/// An order to be put in another state, by somebody's hand.
#[derive(Debug)]
pub(crate) struct Move {
    pub target: Target,
    pub to: Destination,
}

#[derive(Debug)]
pub(crate) enum Destination {
    State(String),
    /// Whatever state its lifecycle has for that.
    Cancelled,
}

impl Work {
    /// About how much memory it holds, at least 1.
    fn kib(&self) -> u32 {
        let bytes = match self {
            Self::Create(row) => 2 * row.event.body.len(),
            Self::Update(change) => change.fields.bytes(),
            Self::Delete(_) | Self::Move(_) => 0,
        };
        u32::try_from(bytes / 1024).unwrap_or(u32::MAX).saturating_add(1)
    }
}

/// Who asked, and where the worker's answer is awaited.
#[derive(Debug)]
pub(crate) struct Origin {
    pub correlation_id: Uuid,
    pub reply_to: Option<ReplyTo>,
    /// Trace context of the request.
    pub trace: Headers,
}

/// A change that is durable now.
#[derive(Debug)]
pub(crate) enum Written {
    /// Done, and told by this event.
    Now { order_id: Uuid, state: Box<change::State> },
    /// The same order was created before, by this request.
    Before { order_id: Uuid, correlation_id: Uuid },
    /// There was nothing left to do.
    Nothing { order_id: Uuid, state: Box<change::State> },
}

struct Command {
    work: Work,
    origin: Origin,
    reply: oneshot::Sender<Result<Written, Problem>>,
    _room: OwnedSemaphorePermit,
    /// Of those who want to know when all that they have queued is done.
    _queued: Option<TaskTrackerToken>,
}

/// A change that has its place in the queue.
pub(crate) struct Queued(oneshot::Receiver<Result<Written, Problem>>);

impl Queued {
    /// Returns once the change is durable.
    pub(crate) async fn written(self) -> Result<Written, Problem> {
        self.0.await.unwrap_or(Err(Problem::Unavailable(
            "the writer failed; whether the order was stored is not known, and repeating is safe with external_id",
        )))
    }
}

pub(crate) use together::Stored;

/// A handle to the writers.
#[derive(Clone)]
pub(crate) struct Writer {
    creates: Vec<mpsc::Sender<Command>>,
    changes: Vec<mpsc::Sender<Command>>,
    next: Arc<AtomicUsize>,
    room: Arc<Semaphore>,
    bulk_room: Arc<Semaphore>,
    /// For what is written together, on a connection of its own.
    db: Db,
    outbox: Outbox,
    topic: Arc<str>,
}

impl Writer {
    /// Starts the writers among `tasks`; they end when the last handle is dropped.
    pub(crate) fn start(
        db: &Db,
        outbox: &Outbox,
        lifecycles: &'static Lifecycles,
        topic: &str,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let mut start = || {
            let (sender, queue) = mpsc::channel(QUEUE);
            let (db, outbox, topic) = (db.clone(), outbox.clone(), topic.to_owned());
            tasks.spawn(Task { db, outbox, lifecycles, topic, queue, later: VecDeque::new() }.run());
            sender
        };
        Self {
            creates: (0..WRITERS).map(|_| start()).collect(),
            changes: (0..WRITERS).map(|_| start()).collect(),
            next: Arc::default(),
            room: Arc::new(Semaphore::new(QUEUE_KIB)),
            bulk_room: Arc::new(Semaphore::new(BULK_KIB)),
            db: db.clone(),
            outbox: outbox.clone(),
            topic: topic.into(),
        }
    }

    /// Returns once the change is durable.
    pub(crate) async fn write(&self, work: Work, origin: Origin) -> Result<Written, Problem> {
        const FULL: Problem = Problem::Unavailable("too many requests are waiting to be stored");
        let Ok(room) = self.room.clone().try_acquire_many_owned(work.kib()) else { return Err(FULL) };
        let (reply, written) = oneshot::channel();
        let command = Command { work, origin, reply, _room: room, _queued: None };
        self.lane(&command.work).try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => FULL,
            mpsc::error::TrySendError::Closed(_) => SHUTTING_DOWN,
        })?;
        Queued(written).written().await
    }

    /// Queues one of many changes that a client brings at once, when there is room for it: such a
    /// client is held up instead of being refused, and leaves most of the queue to others. What is
    /// queued first takes effect first, if it concerns the same order or the same external id.
    pub(crate) async fn queue(&self, work: Work, origin: Origin, queued: &TaskTracker) -> Result<Queued, Problem> {
        let kib = work.kib().clamp(BULK_LINE_KIB, BULK_KIB as u32);
        let room = self.bulk_room.clone().acquire_many_owned(kib).await.map_err(|_| Problem::Internal)?;
        let (reply, written) = oneshot::channel();
        let command = Command { work, origin, reply, _room: room, _queued: Some(queued.token()) };
        self.lane(&command.work).send(command).await.map_err(|_| SHUTTING_DOWN)?;
        Ok(Queued(written))
    }

    /// What concerns one order or one external id goes to one writer: two would only wait for
    /// each other's locks.
    fn lane(&self, work: &Work) -> &mpsc::Sender<Command> {
        let (hash, queues) = match Key::of(work) {
            Some(Key::Order(id)) => (xxh3_64(id.as_bytes()), &self.changes),
            Some(Key::External(user_id, external_id)) => {
                (xxh3_64(user_id.as_bytes()) ^ xxh3_64(external_id.as_bytes()), &self.creates)
            }
            None => (self.next.fetch_add(1, Ordering::Relaxed) as u64, &self.creates),
        };
        &queues[usize::try_from(hash % queues.len() as u64).unwrap_or(0)]
    }
}

/// What a batch may hold only once.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Order(Uuid),
    External(String, String),
}

impl Key {
    fn of(work: &Work) -> Option<Self> {
        match work {
            Work::Create(row) => {
                row.external_id.clone().map(|external_id| Self::External(row.user_id.clone(), external_id))
            }
            Work::Update(change) => Some(Self::Order(change.target.order_id)),
            Work::Delete(target) => Some(Self::Order(target.order_id)),
            Work::Move(change) => Some(Self::Order(change.target.order_id)),
        }
    }
}

struct Task {
    db: Db,
    outbox: Outbox,
    lifecycles: &'static Lifecycles,
    topic: String,
    queue: mpsc::Receiver<Command>,
    /// Second changes of an order or external id that the last batch had already.
    later: VecDeque<Command>,
}

impl Task {
    async fn run(mut self) {
        while let Some(batch) = self.next_batch().await {
            metrics::histogram!("orderstream_write_batch_size").record(batch.len() as f64);
            self.write_all(batch).await;
        }
    }

    async fn next_batch(&mut self) -> Option<Vec<Command>> {
        let mut keys = HashSet::new();
        let mut batch = Vec::new();
        let mut again = VecDeque::new();
        if self.later.is_empty() {
            self.later.push_back(self.queue.recv().await?);
        }
        while batch.len() < BATCH {
            let Some(command) = self.later.pop_front().or_else(|| self.queue.try_recv().ok()) else { break };
            match Key::of(&command.work) {
                Some(key) if !keys.insert(key.clone()) => again.push_back(command),
                _ => batch.push(command),
            }
            // One order changed again and again must not grow this beyond all bounds.
            if again.len() >= BATCH {
                break;
            }
        }
        again.append(&mut self.later);
        self.later = again;
        Some(batch)
    }

    /// Writes a batch, of new orders or of changes, and answers everyone in it.
    async fn write_all(&self, mut batch: Vec<Command>) {
        batch.sort_by_cached_key(|command| match &command.work {
            Work::Create(row) => (row.user_id.clone(), row.external_id.clone()),
            Work::Update(_) | Work::Delete(_) | Work::Move(_) => Default::default(),
        });
        let mut parts = vec![batch];
        while let Some(part) = parts.pop() {
            let started = Instant::now();
            let result = self.write_part(&part).await;
            metrics::histogram!("orderstream_commit_seconds").record(started.elapsed().as_secs_f64());
            match result {
                Ok(results) => {
                    for (command, result) in part.into_iter().zip(results) {
                        // Nobody there any more: the change stands all the same.
                        let _ = command.reply.send(result);
                    }
                }
                Err(error)
                    if matches!(error.fault(), Fault::Data | Fault::Internal | Fault::Locked) && part.len() > 1 =>
                {
                    let mut first = part;
                    let second = first.split_off(first.len() / 2);
                    parts.extend([second, first]);
                }
                Err(error) => {
                    let problem = Problem::from(error);
                    for command in part {
                        let _ = command.reply.send(Err(problem.clone()));
                    }
                }
            }
        }
    }

    async fn write_part(&self, part: &[Command]) -> Result<Vec<Result<Written, Problem>>, DbError> {
        let connection = self.db.connection().await?;
        let creates = matches!(part.first().map(|command| &command.work), Some(Work::Create(_)));
        for _ in 0..CONTENTION_RETRIES {
            let result =
                if creates { self.create(&connection, part).await } else { self.change(&connection, part).await };
            match result {
                Err(error) if error.fault() == Fault::Contention => {
                    metrics::counter!("orderstream_write_contention_total").increment(1);
                }
                result => return result,
            }
        }
        Ok(part.iter().map(|_| Err(Problem::Unavailable("too many changes at once to the same orders"))).collect())
    }

    async fn create(
        &self,
        connection: &Connection,
        part: &[Command],
    ) -> Result<Vec<Result<Written, Problem>>, DbError> {
        let deadline = self.db.settings.write_timeout;
        let rows: Vec<&NewRow> = part
            .iter()
            .filter_map(|command| if let Work::Create(row) = &command.work { Some(&**row) } else { None })
            .collect();
        let began = Instant::now();
        let stored = connection.within(deadline, insert::insert_orders(connection, &rows, &self.topic)).await?;
        let placed = rows.iter().filter_map(|row| Some(placed(row, stored.get(&row.order_id)?)));
        self.outbox.publish(placed.collect(), began);
        // Many are lost where a client sends again what broke off: looked for all at once.
        let lost = rows.iter().filter(|row| !stored.contains_key(&row.order_id));
        let lost: Vec<&NewRow> = lost.copied().collect();
        let holders = connection.within(deadline, holders(connection, &lost)).await.unwrap_or_default();
        let mut results = Vec::with_capacity(rows.len());
        for row in rows {
            results.push(match holders.get(&row.order_id) {
                _ if stored.contains_key(&row.order_id) => Ok(written(row)),
                Some(holder) if !holder.deleted => holder.before(row),
                // Its neighbours are stored: what goes wrong from here on is this one's alone.
                _ => connection
                    .within(deadline, self.create_again(connection, row))
                    .await
                    .unwrap_or_else(|e| Err(e.into())),
            });
        }
        Ok(results)
    }

    /// An order whose external id was taken: by the same order, another one, or a deleted one.
    async fn create_again(&self, connection: &Connection, row: &NewRow) -> Result<Result<Written, Problem>, DbError> {
        let external_id = row.external_id.as_deref().unwrap_or_default();
        // When a deleted order's id was taken by somebody quicker, that one has it; unless it is
        // deleted, too, by the time we look.
        for _ in 0..CONTENTION_RETRIES {
            let Some(found) = read::reference(connection, &row.user_id, external_id).await? else { break };
            if !found.deleted {
                return Ok(found.before(row));
            }
            let began = Instant::now();
            if let Some(place) = insert::insert_in_place_of_deleted(connection, row, &self.topic).await? {
                self.outbox.publish(vec![placed(row, &place)], began);
                return Ok(Ok(written(row)));
            }
        }
        Ok(Err(Problem::Unavailable("this external id is being taken by others")))
    }

    async fn change(
        &self,
        connection: &Connection,
        part: &[Command],
    ) -> Result<Vec<Result<Written, Problem>>, DbError> {
        let targets = part.iter().map(|command| match &command.work {
            Work::Update(change) => change.target.order_id,
            Work::Delete(target) => target.order_id,
            Work::Move(change) => change.target.order_id,
            Work::Create(row) => row.order_id,
        });
        let ids: Vec<Uuid> = targets.collect();
        let work = async {
            let locked = store_change::lock_orders(connection, &ids).await?;
            // After the locks: what happened before us has an earlier time than we.
            let (at, began) = (now(), Instant::now());
            let mut locked: HashMap<_, _> = locked.into_iter().map(|order| (order.order_id, order)).collect();
            let mut rows = Vec::with_capacity(part.len());
            let mut results = Vec::with_capacity(part.len());
            for (command, order_id) in part.iter().zip(&ids) {
                let (lifecycles, topic) = (self.lifecycles, self.topic.as_str());
                let context = Context { lifecycles, origin: &command.origin, at, topic };
                let decided = match locked.remove(order_id) {
                    Some(order) => change::decide(order, &command.work, context),
                    None => Err(Problem::UnknownOrder),
                };
                results.push(decided.map(|Decided { row, written }| {
                    rows.push(row);
                    written
                }));
            }
            let sent = match rows.as_slice() {
                [] => Vec::new(),
                rows => store_change::write_changes(connection, rows, at).await?,
            };
            Ok((sent, results, began))
        };
        let (sent, results, began) = connection.transaction(self.db.settings.write_timeout, work).await?;
        self.outbox.publish(sent, began);
        Ok(results)
    }
}

/// Who has the external ids of these, by the order that wanted one.
async fn holders(connection: &Connection, rows: &[&NewRow]) -> Result<HashMap<Uuid, Reference>, DbError> {
    if rows.len() < 2 {
        return Ok(HashMap::new());
    }
    let ids = rows.iter().map(|row| (row.user_id.as_str(), row.external_id.as_deref().unwrap_or_default()));
    let found = read::references(connection, &ids.collect::<Vec<_>>()).await?;
    Ok(found.into_iter().filter_map(|(place, holder)| Some((rows.get(place)?.order_id, holder))).collect())
}

impl Reference {
    /// Is the order that has the external id of this one the same?
    fn before(&self, row: &NewRow) -> Result<Written, Problem> {
        match self.correlation_id {
            Some(correlation_id) if self.fingerprint == row.fingerprint.0.to_be_bytes() => {
                Ok(Written::Before { order_id: self.order_id, correlation_id })
            }
            _ => Err(Problem::ExternalIdTaken { order_id: self.order_id }),
        }
    }
}

fn placed(row: &NewRow, place: &str) -> Placed {
    Placed { message: row.event.clone(), place: place.to_owned() }
}

fn written(row: &NewRow) -> Written {
    Written::Now {
        order_id: row.order_id,
        state: Box::new(change::State {
            status: row.status.to_owned(),
            version: 1,
            amount: row.amount.and_then(|amount| amount.try_into().ok()),
            currency: row.currency.clone(),
        }),
    }
}
