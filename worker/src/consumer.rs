//! Reads `orders.events` and what the lifecycles receive: a batch of what is there, handled,
//! answered, and only then marked as read (`answers.rs`). A database that is away stops the reading; a record
//! that the database refuses is parked; one whose order somebody else keeps locked stops its
//! partition for a while. Nothing is skipped.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use futures_util::FutureExt as _;
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::KafkaError,
};
use shared::{
    backoff::Backoff,
    db::{DbError, Fault},
    kafka::{Context, Producer, client_config},
    settings::KafkaSettings,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    answers::{Answers, PartitionId},
    batch::Handler,
    record::Record,
    reply::Reply,
};

/// Most records in one batch: a transaction of some milliseconds.
const BATCH: usize = 512;
/// So often a batch may fail for a reason that is no message's before one of them is suspected.
const PATIENCE: u32 = 3;
/// For moving a partition back to a record.
const SEEK_TIMEOUT: Duration = Duration::from_secs(5);
/// How often stopped partitions are looked after while nothing else arrives.
const TICK: Duration = Duration::from_millis(100);

/// A partition that waits for somebody to let go of its orders.
struct Stopped {
    offset: i64,
    retry_at: Instant,
    backoff: Backoff,
    /// Being read again from `offset` on; removed when that is handled.
    resumed: bool,
}

pub(crate) struct Worker {
    handler: Handler,
    answers: Answers,
    consumer: Arc<StreamConsumer<Context>>,
    stopped: HashMap<PartitionId, Stopped>,
}

/// Reads these topics until `stop`; then finishes its batch, delivers its answers, and leaves the
/// group. Whoever reads several sets of topics, each by itself, spares the broker: librdkafka asks
/// for all its partitions with every fetch, and the events are asked for thousands of times a
/// second.
///
/// # Errors
/// When the settings for Kafka make no sense, or a part of this died.
pub(crate) async fn run(
    handler: Handler,
    producer: Producer,
    settings: &KafkaSettings,
    group: &str,
    topics: &[&str],
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let consumer = Arc::new(consumer(settings, group)?);
    consumer.subscribe(topics).context("subscribing")?;
    let (answers, settling) = Answers::new(producer, consumer.clone(), stop.clone());
    let settling = tokio::spawn(settling);
    let mut worker = Worker { handler, answers, consumer: consumer.clone(), stopped: HashMap::new() };
    while !stop.is_cancelled() {
        let Some(batch) = stop.run_until_cancelled(worker.next_batch()).await else { break };
        let batch = batch?;
        metrics::histogram!("orderstream_worker_batch_size").record(batch.len() as f64);
        worker.handle(batch, &stop).await?;
    }
    drop(worker);
    settling.await.context("marking records as read")?;
    // Blocks for as long as the broker takes to hear it: the others have our partitions at once.
    let leaving = tokio::task::spawn_blocking(move || {
        if let Err(error) = consumer.commit_consumer_state(CommitMode::Sync) {
            tracing::debug!(%error, "committing offsets at the end");
        }
        drop(consumer);
    });
    leaving.await.context("leaving the group")
}

fn consumer(settings: &KafkaSettings, group: &str) -> anyhow::Result<StreamConsumer<Context>> {
    client_config(
        settings,
        &[
            ("group.id", group),
            ("partition.assignment.strategy", "cooperative-sticky"),
            // A killed worker's partitions are served by others after this time. The broker's own
            // lower limit (group.min.session.timeout.ms) is 6 s.
            ("session.timeout.ms", "6000"),
            // What a member learns of another that joins, leaves or dies, it learns by its heartbeat;
            // and one that dies before all have joined again counts as alive until then.
            ("heartbeat.interval.ms", "500"),
            ("enable.auto.offset.store", "false"),
            ("auto.commit.interval.ms", "1000"),
            // A new group begins with what was accepted before it existed.
            ("auto.offset.reset", "earliest"),
            ("fetch.wait.max.ms", "500"),
            // Bounds what is read ahead, here and below; a low limit needs a low pause with it.
            ("queued.min.messages", "5000"),
            ("queued.max.messages.kbytes", "16384"),
            ("fetch.queue.backoff.ms", "5"),
            // A partition that the topic is given later is read that soon; callers wait for what is in it.
            ("topic.metadata.refresh.interval.ms", "1000"),
            ("statistics.interval.ms", "5000"),
        ],
    )
    .create_with_context(Context::default())
    .map_err(|error| settings.kafka_config.refusal(error))
}

/// Why a part of a batch was not handled.
enum Obstacle {
    /// Somebody else keeps orders of these partitions locked.
    Locked(HashSet<PartitionId>),
    Failed(DbError),
}

impl From<DbError> for Obstacle {
    fn from(error: DbError) -> Self {
        Self::Failed(error)
    }
}

impl Worker {
    /// What is there, at least one record.
    ///
    /// # Errors
    /// When librdkafka will never read again.
    async fn next_batch(&mut self) -> anyhow::Result<Vec<Record>> {
        let consumer = self.consumer.clone();
        let mut batch = Vec::new();
        while batch.is_empty() {
            self.resume_due().await;
            let received = if self.stopped.is_empty() {
                consumer.recv().await
            } else {
                match tokio::time::timeout(TICK, consumer.recv()).await {
                    Ok(received) => received,
                    Err(_) => continue,
                }
            };
            let mut next = Some(received);
            while let Some(received) = next {
                match received {
                    Ok(message) => batch.push(Record::of(&message)),
                    Err(KafkaError::MessageConsumptionFatal(code)) => {
                        let reason = consumer.client().fatal_error().map(|(_, reason)| reason).unwrap_or_default();
                        bail!("Kafka has shut this worker out of its group for good: {code}: {reason}");
                    }
                    // librdkafka mends what can be mended; the log has it.
                    Err(error) => tracing::debug!(%error, "reading"),
                }
                next = if batch.len() < BATCH { consumer.recv().now_or_never() } else { None };
            }
        }
        Ok(batch)
    }

    /// Records of a stopped partition come again, in their order: what of it is still here does
    /// not count.
    fn is_stopped(&self, partition: &PartitionId) -> bool {
        self.stopped.get(partition).is_some_and(|stopped| !stopped.resumed)
    }

    async fn handle(&mut self, batch: Vec<Record>, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut backoff = Backoff::RECONNECT;
        // What somebody kept locked may be so still: to try it would hold the others up.
        let (doubtful, free): (Vec<_>, Vec<_>) = batch.into_iter().partition(|r| self.stopped.contains_key(&id(r)));
        let mut parts = vec![(doubtful, true), (free, false)];
        let mut failures = 0;
        while let Some((mut part, is_doubtful)) = parts.pop() {
            part.retain(|record| !self.is_stopped(&id(record)));
            if part.is_empty() {
                continue;
            }
            match self.attempt(&part, is_doubtful).await {
                Ok(replies) => {
                    backoff.reset();
                    self.settle(&part, replies).await?;
                }
                Err(Obstacle::Locked(partitions)) => {
                    self.stop_partitions(&part, &partitions);
                    parts.push((part, is_doubtful));
                }
                Err(Obstacle::Failed(error)) if error.fault().is_of_rows() && part.len() > 1 => {
                    let second = part.split_off(part.len() / 2);
                    parts.extend([(second, is_doubtful), (part, is_doubtful)]);
                }
                // One message may be the cause all the same, where the others' would be handled:
                // fewer and fewer, as above.
                Err(Obstacle::Failed(error))
                    if error.may_be_of_rows() && failures >= PATIENCE && self.is_well().await =>
                {
                    if part.len() > 1 {
                        let second = part.split_off(part.len() / 2);
                        parts.extend([(second, is_doubtful), (part, is_doubtful)]);
                    } else if let Some(record) = part.first() {
                        match self.handler.park_refused(record, &error.chain()).await {
                            Ok(replies) => self.settle(&part, replies).await?,
                            Err(_) => {
                                failures = 0; // to wait again
                                parts.push((part, is_doubtful));
                            }
                        }
                    }
                }
                // Nobody's message is at fault: the same again, for as long as it takes.
                Err(Obstacle::Failed(error)) => {
                    failures += 1;
                    let delay = backoff.delay();
                    tracing::warn!(error = error.chain(), records = part.len(), ?delay, "waiting for the database");
                    metrics::counter!("orderstream_worker_waits_total").increment(1);
                    parts.push((part, is_doubtful));
                    if stop.run_until_cancelled(tokio::time::sleep(delay)).await.is_none() {
                        return Ok(()); // not marked as read: somebody else has them now
                    }
                }
            }
        }
        Ok(())
    }

    /// Handles a part of a batch; a single record that the database refuses is parked.
    async fn attempt(&self, part: &[Record], is_doubtful: bool) -> Result<Vec<Reply>, Obstacle> {
        if is_doubtful {
            self.look_for_locks(part).await?;
        }
        let error = match self.handler.handle_batch(part).await {
            Ok(replies) => return Ok(replies),
            Err(error) => error,
        };
        match (error.fault(), part) {
            (Fault::Data | Fault::Internal, [record]) => Ok(self.handler.park_refused(record, &error.chain()).await?),
            (Fault::Locked, _) => {
                self.look_for_locks(part).await?;
                Err(error.into()) // it is free by now
            }
            _ => Err(error.into()),
        }
    }

    /// Does the database do other work?
    async fn is_well(&self) -> bool {
        self.handler.db.is_writable().await.is_ok_and(|is_writable| is_writable)
    }

    async fn look_for_locks(&self, part: &[Record]) -> Result<(), Obstacle> {
        let locked = self.handler.locked_by_others(part).await?;
        if locked.is_empty() {
            return Ok(());
        }
        Err(Obstacle::Locked(locked.into_iter().map(|place| id(&part[place])).collect()))
    }

    /// Sends the answers; when they are delivered the records are marked as read.
    async fn settle(&mut self, part: &[Record], replies: Vec<Reply>) -> anyhow::Result<()> {
        let mut last = HashMap::new();
        for record in part {
            last.insert(id(record), record.offset);
            if self.stopped.remove(&id(record)).is_some() {
                tracing::info!(
                    kafka.partition = record.partition,
                    kafka.offset = record.offset,
                    "the partition goes on"
                );
                metrics::gauge!("orderstream_partitions_stopped").set(self.stopped.len() as f64);
            }
        }
        self.answers.send(replies, last.into_iter().collect()).await
    }

    /// Stops these partitions at their first record in this part: all of theirs comes again.
    fn stop_partitions(&mut self, part: &[Record], partitions: &HashSet<PartitionId>) {
        for record in part {
            let partition = id(record);
            if !partitions.contains(&partition) || self.is_stopped(&partition) {
                continue;
            }
            let mut backoff = self.stopped.remove(&partition).map_or(Backoff::RECONNECT, |stopped| stopped.backoff);
            let delay = backoff.delay();
            tracing::warn!(
                kafka.topic = record.topic,
                kafka.partition = record.partition,
                kafka.offset = record.offset,
                ?delay,
                "somebody keeps orders of this partition locked; it waits"
            );
            if let Err(error) = self.consumer.pause(&list(&partition)) {
                tracing::debug!(%error, "pausing");
            }
            let retry_at = Instant::now() + delay;
            self.stopped.insert(partition, Stopped { offset: record.offset, retry_at, backoff, resumed: false });
            metrics::counter!("orderstream_partition_stops_total").increment(1);
        }
        metrics::gauge!("orderstream_partitions_stopped").set(self.stopped.len() as f64);
    }

    async fn resume_due(&mut self) {
        if self.stopped.is_empty() {
            return;
        }
        let now = Instant::now();
        let is_due = |stopped: &Stopped| !stopped.resumed && stopped.retry_at <= now;
        let due = self.stopped.extract_if(|_, stopped| is_due(stopped)).collect::<Vec<_>>();
        for (partition, stopped) in due {
            if let Err(error) = self.consumer.resume(&list(&partition)) {
                tracing::debug!(%error, "resuming");
            }
            // Last, so that nothing that librdkafka had read before comes after it. Asks the
            // broker nothing, but may wait for librdkafka's own thread.
            let (consumer, (topic, number), offset) = (self.consumer.clone(), partition.clone(), stopped.offset);
            let seek = move || consumer.seek(&topic, number, Offset::Offset(offset), SEEK_TIMEOUT);
            let sought = tokio::task::spawn_blocking(seek).await.map_err(anyhow::Error::from);
            match sought.and_then(|sought| Ok(sought?)) {
                Ok(()) => {
                    self.stopped.insert(partition, Stopped { resumed: true, ..stopped });
                }
                // Another worker has the partition now, and meets the record itself.
                Err(error) => {
                    tracing::info!(
                        error = format!("{error:#}"),
                        kafka.partition = partition.1,
                        "a stopped partition has left us"
                    );
                }
            }
        }
        metrics::gauge!("orderstream_partitions_stopped").set(self.stopped.len() as f64);
    }
}

fn id(record: &Record) -> PartitionId {
    (record.topic.clone(), record.partition)
}

fn list(partition: &PartitionId) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    list.add_partition(&partition.0, partition.1);
    list
}
