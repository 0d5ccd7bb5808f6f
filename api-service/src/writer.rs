//! Makes changes durable, many in one transaction: takes what is queued, writes it, commits,
//! answers each; the next batch gathers meanwhile. No timer.
//!
//! A batch holds at most one change per order and per external id; what would be the second waits
//! for the next batch. One bad change does not harm the others of its batch: when PostgreSQL
//! refuses the rows, they are tried in halves. When the connection is lost nothing is tried
//! again, since the commit may have been made: the caller hears so, and may safely repeat.

mod together;
mod work;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::Arc,
};

use shared::{
    cache::Cache,
    db::{Connection, Db, DbError, Fault},
    lifecycle::Lifecycles,
    message::now,
    outbox::{Outbox, Placed},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::Instant,
};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use uuid::Uuid;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::{
    change::{self, Context, Decided},
    error::Problem,
    idempotency::Claim,
    orders::Operation,
    store::{
        change as store_change,
        change::ChangedRow,
        insert,
        insert::NewRow,
        keys::{self, KeyRow, Known},
        read::{self, Reference},
    },
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

    /// Queues a change if there is room. A caller who waits for the worker's answer is not woken by
    /// the commit, only to wait on, but by `wake` when no answer will come.
    pub(crate) fn try_queue(&self, work: Work, origin: Origin, wake: Option<Wake>) -> Result<Queued, Problem> {
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

    async fn create(
        &self,
        connection: &Connection,
        part: &[Command],
    ) -> Result<Vec<Result<Written, Problem>>, DbError> {
        let deadline = self.db.settings.write_timeout;
        let rows: Vec<(&NewRow, Option<&Claim>)> = part
            .iter()
            .filter_map(|command| match &command.work {
                Work::Create(row) => Some((&**row, command.origin.claim.as_ref())),
                Work::Update(_) | Work::Delete(_) | Work::Move(_) => None,
            })
            .collect();
        let began = Instant::now();
        let (stored, claimed) = if rows.iter().any(|(_, claim)| claim.is_some()) {
            connection.transaction(deadline, self.insert_claimed(connection, &rows)).await?
        } else {
            let rows: Vec<&NewRow> = rows.iter().map(|(row, _)| *row).collect();
            let stored = insert::insert_orders(connection, &rows, &self.topic);
            (connection.within(deadline, stored).await?, HashSet::new())
        };
        let placed = rows.iter().filter_map(|(row, _)| Some(placed(row, stored.get(&row.order_id)?)));
        self.outbox.publish(placed.collect(), began);
        let new = rows.iter().filter(|(row, _)| stored.contains_key(&row.order_id));
        self.cache.forget(new.map(|(row, _)| (row.order_id, row.user_id.as_str()))).await;
        // Many are lost where a client sends again what broke off: looked for all at once.
        let lost = rows.iter().filter(|(row, claim)| claim.is_none() && !stored.contains_key(&row.order_id));
        let lost: Vec<&NewRow> = lost.map(|(row, _)| *row).collect();
        let holders = connection.within(deadline, holders(connection, &lost)).await.unwrap_or_default();
        let mut results = Vec::with_capacity(rows.len());
        for (row, claim) in rows {
            // Its neighbours are stored: what goes wrong from here on is this one's alone.
            let result = match (holders.get(&row.order_id), claim) {
                _ if stored.contains_key(&row.order_id) => Ok(Ok(written(row))),
                (_, Some(claim)) if !claimed.contains(&row.correlation_id) => {
                    connection.within(deadline, replay(connection, claim)).await
                }
                (Some(holder), None) if !holder.deleted => Ok(holder.before(row)),
                (_, claim) => self.create_again(connection, row, claim).await,
            };
            results.push(result.unwrap_or_else(|error| Err(error.into())));
        }
        Ok(results)
    }

    /// Takes the rows' keys first, and stores those whose key was free, or that have none. Where
    /// their events lie, and whose keys were free.
    async fn insert_claimed(
        &self,
        connection: &Connection,
        rows: &[(&NewRow, Option<&Claim>)],
    ) -> Result<(HashMap<Uuid, String>, HashSet<Uuid>), DbError> {
        let keys: Vec<KeyRow<'_>> = rows.iter().filter_map(|(row, claim)| Some(key_row(row, (*claim)?))).collect();
        let claimed = keys::claim_keys(connection, &keys, now()).await?;
        let is_free =
            |(row, claim): &&(&NewRow, Option<&Claim>)| claim.is_none() || claimed.contains(&row.correlation_id);
        let fresh: Vec<&NewRow> = rows.iter().filter(is_free).map(|(row, _)| *row).collect();
        let stored = match fresh.as_slice() {
            [] => HashMap::new(),
            fresh => insert::insert_orders(connection, fresh, &self.topic).await?,
        };
        // Somebody has their external id: what their key has done is not decided yet.
        let in_vain: Vec<&Claim> = rows
            .iter()
            .filter(is_free)
            .filter(|(row, _)| !stored.contains_key(&row.order_id))
            .filter_map(|(_, claim)| *claim)
            .collect();
        if !in_vain.is_empty() {
            keys::free_keys(connection, &in_vain).await?;
        }
        Ok((stored, claimed))
    }

    /// An order whose external id was taken: by the same order, another one, or a deleted one.
    async fn create_again(
        &self,
        connection: &Connection,
        row: &NewRow,
        claim: Option<&Claim>,
    ) -> Result<Result<Written, Problem>, DbError> {
        let deadline = self.db.settings.write_timeout;
        let external_id = row.external_id.as_deref().unwrap_or_default();
        // When a deleted order's id was taken by somebody quicker, that one has it; unless it is
        // deleted, too, by the time we look.
        for _ in 0..CONTENTION_RETRIES {
            let found = connection.within(deadline, read::reference(connection, &row.user_id, external_id)).await?;
            let Some(found) = found else { break };
            if !found.deleted {
                let before = found.before(row);
                return match (before, claim) {
                    (Ok(before @ Written::Before { order_id, correlation_id }), Some(claim)) => {
                        let key = KeyRow { order_id, correlation_id, ..key_row(row, claim) };
                        connection.within(deadline, note_key(connection, key, before)).await
                    }
                    (before, _) => Ok(before),
                };
            }
            let began = Instant::now();
            let work = async {
                if let Some(claim) = claim
                    && keys::claim_keys(connection, &[key_row(row, claim)], now()).await?.is_empty()
                {
                    return Ok(Err(replay(connection, claim).await?));
                }
                let place = insert::insert_in_place_of_deleted(connection, row, &self.topic).await?;
                if let (None, Some(claim)) = (&place, claim) {
                    keys::free_keys(connection, &[claim]).await?;
                }
                Ok(Ok(place))
            };
            match connection.transaction(deadline, work).await? {
                Ok(Some(place)) => {
                    self.outbox.publish(vec![placed(row, &place)], began);
                    self.cache.forget([(row.order_id, row.user_id.as_str())]).await;
                    return Ok(Ok(written(row)));
                }
                Ok(None) => {}
                Err(replayed) => return Ok(replayed),
            }
        }
        Ok(Err(Problem::Unavailable("this external id is being taken by others")))
    }

    async fn change(
        &self,
        connection: &Connection,
        part: &[Command],
    ) -> Result<Vec<Result<Written, Problem>>, DbError> {
        let ids: Vec<Uuid> =
            part.iter().map(|command| command.work.target().map_or(Uuid::nil(), |target| target.order_id)).collect();
        let work = async {
            let locked = store_change::lock_orders(connection, &ids).await?;
            // After the locks: what happened before us has an earlier time than we.
            let (at, began) = (now(), Instant::now());
            let mut locked: HashMap<_, _> = locked.into_iter().map(|order| (order.order_id, order)).collect();
            let known = known_keys(connection, part.iter()).await?;
            let mut rows = Vec::with_capacity(part.len());
            let mut results = Vec::with_capacity(part.len());
            for (index, (command, order_id)) in part.iter().zip(&ids).enumerate() {
                let (lifecycles, topic) = (self.lifecycles, self.topic.as_str());
                let context = Context { lifecycles, origin: &command.origin, at, topic };
                let decided = match (replayed(command, &known), locked.remove(order_id)) {
                    (Some(replayed), _) => {
                        results.push(replayed);
                        continue;
                    }
                    (None, Some(order)) => change::decide(order, &command.work, context),
                    (None, None) => Err(Problem::UnknownOrder),
                };
                results.push(decided.map(|Decided { row, written }| {
                    rows.push((index, row));
                    written
                }));
            }
            let claims: Vec<KeyRow<'_>> = rows
                .iter()
                .filter_map(|(index, row)| {
                    let (order_id, version, correlation_id) =
                        (row.order.order_id, row.order.version, row.correlation_id);
                    Some(KeyRow { claim: part[*index].origin.claim.as_ref()?, order_id, version, correlation_id })
                })
                .collect();
            if !claims.is_empty() {
                // Who has the same key for another order, and was quicker.
                let claimed = keys::claim_keys(connection, &claims, at).await?;
                let is_lost = |row: &ChangedRow, index: usize| {
                    part[index].origin.claim.is_some() && !claimed.contains(&row.correlation_id)
                };
                if claimed.len() < claims.len() {
                    let lost: Vec<usize> =
                        rows.iter().filter(|(index, row)| is_lost(row, *index)).map(|(index, _)| *index).collect();
                    rows.retain(|(index, _)| !lost.contains(index));
                    let known = known_keys(connection, lost.iter().map(|index| &part[*index])).await?;
                    for index in lost {
                        results[index] = replayed(&part[index], &known).unwrap_or(Err(KEY_CONTENDED));
                    }
                }
            }
            let rows: Vec<ChangedRow> = rows.into_iter().map(|(_, row)| row).collect();
            let sent = match rows.as_slice() {
                [] => Vec::new(),
                rows => store_change::write_changes(connection, rows, at).await?,
            };
            let changed: Vec<(Uuid, String)> =
                rows.into_iter().map(|row| (row.order.order_id, row.order.user_id)).collect();
            Ok((sent, changed, results, began))
        };
        let (sent, changed, results, began) = connection.transaction(self.db.settings.write_timeout, work).await?;
        self.outbox.publish(sent, began);
        self.cache.forget(changed.iter().map(|(order_id, user_id)| (*order_id, user_id.as_str()))).await;
        Ok(results)
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

const KEY_CONTENDED: Problem = Problem::Unavailable("this Idempotency-Key is being used by others");

/// What is known of the keys of these commands.
async fn known_keys<'a>(
    connection: &Connection,
    commands: impl Iterator<Item = &'a Command>,
) -> Result<Vec<Known>, DbError> {
    let claims: Vec<&Claim> = commands.filter_map(|command| command.origin.claim.as_ref()).collect();
    if claims.is_empty() { Ok(Vec::new()) } else { keys::find_keys(connection, &claims).await }
}

/// What the command's key has done before, if it did.
fn replayed(command: &Command, known: &[Known]) -> Option<Result<Written, Problem>> {
    let claim = command.origin.claim.as_ref()?;
    let known = known.iter().find(|known| known.scope == claim.scope && known.key == claim.key)?;
    Some(claim.replay(known.clone()).map(|known| Written::Repeated(Box::new(known))))
}

/// What this key has done, that somebody else has taken.
async fn replay(connection: &Connection, claim: &Claim) -> Result<Result<Written, Problem>, DbError> {
    let known = keys::find_keys(connection, &[claim]).await?.pop();
    Ok(known.ok_or(KEY_CONTENDED).and_then(|known| claim.replay(known)).map(|known| Written::Repeated(Box::new(known))))
}

/// Keeps what the key's request has found done before, unless the key has done something itself.
async fn note_key(
    connection: &Connection,
    key: KeyRow<'_>,
    before: Written,
) -> Result<Result<Written, Problem>, DbError> {
    if keys::claim_keys(connection, std::slice::from_ref(&key), now()).await?.is_empty() {
        return replay(connection, key.claim).await;
    }
    Ok(Ok(before))
}

fn key_row<'a>(row: &NewRow, claim: &'a Claim) -> KeyRow<'a> {
    KeyRow { claim, order_id: row.order_id, version: 1, correlation_id: row.correlation_id }
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
