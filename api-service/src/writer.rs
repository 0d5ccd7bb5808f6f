//! Makes changes durable, many in one transaction: takes what is queued, writes it, commits,
//! answers each; the next batch gathers meanwhile. No timer.
//!
//! A batch holds at most one change per order and per external id; what would be the second waits
//! for the next batch. One bad change does not harm the others of its batch: when PostgreSQL
//! refuses the rows, they are tried in halves. When the connection is lost nothing is tried
//! again, since the commit may have been made: the caller hears so, and may safely repeat.

mod changes;
mod claims;
mod creates;
mod together;
mod work;

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    sync::Arc,
};

use shared::{
    cache::Cache,
    db::{Connection, Db, DbError, Fault, Presence},
    lifecycle::Lifecycles,
    outbox::Outbox,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::Instant,
};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::{
    error::{DATABASE_AWAY, DATABASE_READ_ONLY, Problem},
    orders::Operation,
    waiters::Wake,
};

/// Most changes in one transaction. Beyond a few hundred little is won while all keep up; but when
/// thousands of connections have something to say, the processors are theirs for most of the time,
/// and what goes through with one transaction is what is stored at all: of twice the peak, with
/// 256 three quarters of the peak are answered, with 1,024 nine tenths.
const BATCH: usize = 1024;
/// Writers of changes, which may have to wait for the locks of others; new orders must not wait for
/// these, and have one writer of their own. More would not help: a statement costs as much as twenty
/// orders in it, and two writers would gather half as many each.
const CHANGE_WRITERS: usize = 2;
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

const FULL: Problem = Problem::Unavailable("too many requests are waiting to be stored");
const SHUTTING_DOWN: Problem = Problem::Unavailable("shutting down");

struct Command {
    work: Work,
    origin: Origin,
    reply: oneshot::Sender<Result<Written, Problem>>,
    _room: OwnedSemaphorePermit,
    /// Of those who want to know when all that they have queued is done.
    _queued: Option<TaskTrackerToken>,
    /// Last, as it is dropped last: the caller who is woken finds the reply.
    wake: Option<Wake>,
}

/// A change that has its place in the queue.
pub(crate) struct Queued(oneshot::Receiver<Result<Written, Problem>>);

impl Queued {
    /// Returns once the change is durable.
    pub(crate) async fn written(self) -> Result<Written, Problem> {
        self.0.await.unwrap_or(Err(Problem::Unavailable(
            "the service ended before the database answered; whether the order was stored is not known, and repeating is safe with external_id",
        )))
    }
}

pub(crate) use together::Stored;
pub(crate) use work::{Destination, Move, Origin, Work, Written};

/// A handle to the writers.
#[derive(Clone)]
pub(crate) struct Writer {
    creates: mpsc::Sender<Command>,
    changes: Vec<mpsc::Sender<Command>>,
    room: Arc<Semaphore>,
    bulk_room: Arc<Semaphore>,
    /// For what is written together, on a connection of its own.
    db: Db,
    cache: Cache,
    outbox: Outbox,
    topic: Arc<str>,
}

impl Writer {
    /// With what the writers do until the last handle is dropped. At `hurry` they end with a refusal to
    /// all whose changes they have not written.
    pub(crate) fn new(
        db: &Db,
        cache: &Cache,
        outbox: &Outbox,
        lifecycles: &'static Lifecycles,
        topic: &str,
        hurry: &CancellationToken,
    ) -> (Self, Vec<impl Future<Output = ()> + use<>>) {
        let mut writing = Vec::new();
        let mut add = || {
            let (sender, queue) = mpsc::channel(QUEUE);
            let (db, cache, outbox, topic) = (db.clone(), cache.clone(), outbox.clone(), topic.to_owned());
            let task = Task { db, cache, outbox, lifecycles, topic, queue, later: VecDeque::new() };
            writing.push(task.run(hurry.clone()));
            sender
        };
        let writer = Self {
            creates: add(),
            changes: (0..CHANGE_WRITERS).map(|_| add()).collect(),
            room: Arc::new(Semaphore::new(QUEUE_KIB)),
            bulk_room: Arc::new(Semaphore::new(BULK_KIB)),
            db: db.clone(),
            cache: cache.clone(),
            outbox: outbox.clone(),
            topic: topic.into(),
        };
        (writer, writing)
    }

    /// Is there a place for a new order? For those who would make it in vain: when there is none,
    /// what a refusal costs comes out of what others are waiting for.
    pub(crate) fn check_room_for_new(&self) -> Result<(), Problem> {
        if self.creates.capacity() > 0 { Ok(()) } else { Err(FULL) }
    }

    /// Returns once the change is durable.
    pub(crate) async fn write(&self, work: Work, origin: Origin) -> Result<Written, Problem> {
        self.try_queue(work, origin, None)?.written().await
    }

    /// While the database is known to take nothing, nobody waits for its refusal.
    fn check_database(&self) -> Result<(), Problem> {
        match self.db.presence() {
            Presence::There => Ok(()),
            Presence::ReadOnly => Err(DATABASE_READ_ONLY),
            Presence::Away => Err(DATABASE_AWAY),
        }
    }

    /// Queues a change if there is room. A caller who waits for the worker's answer is not woken by
    /// the commit, only to wait on, but by `wake` when no answer will come.
    pub(crate) fn try_queue(&self, work: Work, origin: Origin, wake: Option<Wake>) -> Result<Queued, Problem> {
        self.check_database()?;
        let Ok(room) = self.room.clone().try_acquire_many_owned(work.kib()) else { return Err(FULL) };
        let (reply, written) = oneshot::channel();
        let command = Command { work, origin, reply, _room: room, _queued: None, wake };
        self.queue_of(&command.work).try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => FULL,
            mpsc::error::TrySendError::Closed(_) => SHUTTING_DOWN,
        })?;
        Ok(Queued(written))
    }

    /// Queues one of many changes that a client brings at once, when there is room for it: such a
    /// client is held up instead of being refused, and leaves most of the queue to others. What is
    /// queued first takes effect first, if it concerns the same order or the same external id.
    pub(crate) async fn queue(&self, work: Work, origin: Origin, queued: &TaskTracker) -> Result<Queued, Problem> {
        self.check_database()?;
        let kib = work.kib().clamp(BULK_LINE_KIB, BULK_KIB as u32);
        let room = self.bulk_room.clone().acquire_many_owned(kib).await.map_err(|_| Problem::Internal)?;
        let (reply, written) = oneshot::channel();
        let command = Command { work, origin, reply, _room: room, _queued: Some(queued.token()), wake: None };
        self.queue_of(&command.work).send(command).await.map_err(|_| SHUTTING_DOWN)?;
        Ok(Queued(written))
    }

    /// Changes of one order go to one writer: two would only wait for each other's locks.
    fn queue_of(&self, work: &Work) -> &mpsc::Sender<Command> {
        work.target().map_or(&self.creates, |target| {
            let hash = xxh3_64(target.order_id.as_bytes());
            &self.changes[usize::try_from(hash % self.changes.len() as u64).unwrap_or(0)]
        })
    }
}

impl Command {
    fn answer(self, result: Result<Written, Problem>) {
        let Self { reply, wake, .. } = self;
        let will_be_answered = matches!(result, Ok(Written::Now { .. }));
        // Nobody there any more: the change stands all the same.
        let _ = reply.send(result);
        if let Some(wake) = wake.filter(|_| will_be_answered) {
            wake.leave_to_answer();
        }
    }

    /// What a batch may hold only once: the order, the external id, the idempotency key. As hashes;
    /// two that are alike by chance only wait for the next batch.
    fn keys(&self) -> impl Iterator<Item = u128> {
        let pair = |one: &str, other: &str| xxh3_128(one.as_bytes()).rotate_left(1) ^ xxh3_128(other.as_bytes());
        let own = match &self.work {
            Work::Create(row) => row.external_id.as_deref().map(|id| pair(&row.user_id, id)),
            Work::Update(_) | Work::Delete(_) | Work::Move(_) => self.work.target().map(|to| to.order_id.as_u128()),
        };
        own.into_iter().chain(self.origin.claim.as_ref().map(|claim| !pair(&claim.scope, &claim.key)))
    }
}

struct Task {
    db: Db,
    cache: Cache,
    outbox: Outbox,
    lifecycles: &'static Lifecycles,
    topic: String,
    queue: mpsc::Receiver<Command>,
    /// Second changes of an order or external id that the last batch had already.
    later: VecDeque<Command>,
}

impl Task {
    async fn run(mut self, hurry: CancellationToken) {
        // A batch that the database keeps is dropped: whether it is stored is not known.
        if hurry.run_until_cancelled(self.write_what_comes()).await.is_none() {
            self.queue.close();
            while let Some(command) = self.next_command() {
                command.answer(Err(SHUTTING_DOWN));
            }
        }
    }

    async fn write_what_comes(&mut self) {
        while let Some(batch) = self.next_batch().await {
            metrics::histogram!("orderstream_write_batch_size").record(batch.len() as f64);
            self.write_all(batch).await;
        }
    }

    fn next_command(&mut self) -> Option<Command> {
        self.later.pop_front().or_else(|| self.queue.try_recv().ok())
    }

    async fn next_batch(&mut self) -> Option<Vec<Command>> {
        let mut keys = HashSet::new();
        let mut batch = Vec::new();
        let mut again = VecDeque::new();
        if self.later.is_empty() {
            self.later.push_back(self.queue.recv().await?);
        }
        while batch.len() < BATCH {
            let Some(command) = self.next_command() else { break };
            if command.keys().any(|key| keys.contains(&key)) {
                again.push_back(command);
            } else {
                keys.extend(command.keys());
                batch.push(command);
            }
            // One order changed again and again must not grow this beyond all bounds; and as long as it
            // does not, all other orders go past it.
            if again.len() >= QUEUE {
                break;
            }
        }
        again.append(&mut self.later);
        self.later = again;
        Some(batch)
    }

    /// Writes a batch, of new orders or of changes, and answers everyone in it.
    async fn write_all(&self, mut batch: Vec<Command>) {
        batch.sort_by(|one, other| one.work.reference().cmp(&other.work.reference()));
        let mut parts = vec![batch];
        let mut is_patient = true;
        while let Some(part) = parts.pop() {
            let started = Instant::now();
            let result = self.write_part(&part, is_patient).await;
            metrics::histogram!("orderstream_commit_seconds").record(started.elapsed().as_secs_f64());
            match result {
                Ok(results) => {
                    count_accepted(part.iter().map(|command| command.work.operation()).zip(&results));
                    for (command, result) in part.into_iter().zip(results) {
                        command.answer(result);
                    }
                }
                Err(error)
                    if matches!(error.fault(), Fault::Data | Fault::Internal | Fault::Locked) && part.len() > 1 =>
                {
                    // The others have waited long enough for what somebody keeps locked.
                    is_patient &= error.fault() != Fault::Locked;
                    let mut first = part;
                    let second = first.split_off(first.len() / 2);
                    parts.extend([second, first]);
                }
                Err(error) => {
                    let problem = Problem::from(error);
                    for command in part {
                        command.answer(Err(problem.clone()));
                    }
                }
            }
        }
    }

    async fn write_part(&self, part: &[Command], is_patient: bool) -> Result<Vec<Result<Written, Problem>>, DbError> {
        match self.try_part(part, is_patient).await {
            // Of a server that is another by now. Nothing was done, and that session is gone.
            Err(error) if error.is_of_session() => self.try_part(part, is_patient).await,
            result => result,
        }
    }

    async fn try_part(&self, part: &[Command], is_patient: bool) -> Result<Vec<Result<Written, Problem>>, DbError> {
        let connection = self.db.connection().await?;
        let writing = self.write_on(&connection, part);
        if is_patient { writing.await } else { connection.impatiently(self.db.settings.write_timeout, writing).await }
    }

    async fn write_on(
        &self,
        connection: &Connection,
        part: &[Command],
    ) -> Result<Vec<Result<Written, Problem>>, DbError> {
        let creates = matches!(part.first().map(|command| &command.work), Some(Work::Create(_)));
        for _ in 0..CONTENTION_RETRIES {
            let result =
                if creates { self.create(connection, part).await } else { self.change(connection, part).await };
            match result {
                Err(error) if error.fault() == Fault::Contention => {
                    metrics::counter!("orderstream_write_contention_total").increment(1);
                }
                result => return result,
            }
        }
        Ok(part.iter().map(|_| Err(Problem::Unavailable("too many changes at once to the same orders"))).collect())
    }
}

/// Tells how many changes are durable now, at once for all of a batch.
fn count_accepted<'a>(results: impl Iterator<Item = (Operation, &'a Result<Written, Problem>)>) {
    let mut counts: BTreeMap<&'static str, u64> = BTreeMap::new();
    for (operation, _) in results.filter(|(_, result)| matches!(result, Ok(Written::Now { .. }))) {
        *counts.entry(operation.name()).or_default() += 1;
    }
    for (operation, count) in counts {
        metrics::counter!("orderstream_orders_accepted_total", "op" => operation).increment(count);
    }
}
