//! Sends the answers, and marks records as read once theirs are with the broker. An answer that the
//! broker did not take in time, or whose partition is newer than what we know of its topic, is sent again,
//! apart from the others, which it must not hold up.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use rdkafka::{
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    producer::DeliveryFuture,
};
use shared::{
    backoff::Backoff,
    kafka::{Context, Pace, Producer, is_unknown},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::reply::Reply;

/// Batches whose answers are on their way to the broker.
const UNSETTLED: usize = 64;
/// Answers that wait to be sent again: as many as callers may wait at one replica (MAX_WAITERS).
const LATE: usize = 10_000;
/// So long an answer is worth sending: twice the longest time that a caller waits (ACK_WAIT_MAX_MS).
const WORTH: Duration = Duration::from_secs(60);
/// So long one whose partition is not there, which we may not know yet: whoever asks may name any.
const WORTH_LOOKING: Duration = Duration::from_secs(10);

/// Topic and partition.
pub(crate) type PartitionId = (String, i32);

/// An answer that the broker does not have yet.
struct Pending {
    reply: Reply,
    first_sent_at: Instant,
    /// Its partition was not there, as far as we knew.
    is_lost: bool,
}

impl Pending {
    fn new(reply: Reply, first_sent_at: Instant) -> Self {
        Self { reply, first_sent_at, is_lost: false }
    }

    fn worth(&self) -> Duration {
        if self.is_lost { WORTH_LOOKING } else { WORTH }
    }
}

/// One on its way, or why it could not be queued.
struct Sent {
    answer: Pending,
    delivery: Result<DeliveryFuture, KafkaError>,
}

/// What may be marked as read once these answers are delivered.
struct Settled {
    offsets: Vec<(PartitionId, i64)>,
    answers: Vec<Sent>,
}

/// Takes the answers of one batch after the other.
pub(crate) struct Answers {
    producer: Producer,
    settled: mpsc::Sender<Settled>,
}

impl Answers {
    /// The future marks records as read, until what sends is dropped. From `stop` on nothing is sent again.
    pub(crate) fn new(
        producer: Producer,
        consumer: Arc<StreamConsumer<Context>>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()>) {
        let (settled, queue) = mpsc::channel(UNSETTLED);
        let (late, again) = mpsc::channel(LATE);
        let settling = settle(consumer, producer.clone(), queue, late);
        let sending_again = send_again(producer.clone(), again);
        let both = async move {
            tokio::join!(settling, stop.run_until_cancelled(sending_again));
        };
        (Self { producer, settled }, both)
    }

    /// Sends a batch's answers. When they are delivered, its records up to these offsets are marked as read.
    ///
    /// # Errors
    /// When the task that marks them died.
    pub(crate) async fn send(&self, replies: Vec<Reply>, offsets: Vec<(PartitionId, i64)>) -> anyhow::Result<()> {
        let first_sent_at = Instant::now();
        let answers = replies.into_iter().map(|reply| Pending::new(reply, first_sent_at)).collect();
        let settled = Settled { offsets, answers: send(&self.producer, answers) };
        self.settled.send(settled).await.context("the task that marks records as read died")
    }
}

fn send(producer: &Producer, answers: Vec<Pending>) -> Vec<Sent> {
    let pace = Pace::of(answers.len(), true);
    let sent = answers.into_iter().map(|answer| {
        let Reply { to, key, headers, body } = &answer.reply;
        let delivery = producer.send(pace, &to.topic, to.partition, key, headers, body);
        Sent { answer, delivery }
    });
    sent.collect()
}

async fn settle(
    consumer: Arc<StreamConsumer<Context>>,
    producer: Producer,
    mut queue: mpsc::Receiver<Settled>,
    late: mpsc::Sender<Pending>,
) {
    while let Some(Settled { offsets, answers }) = queue.recv().await {
        let mut lost = 0;
        for answer in undelivered(&producer, answers).await {
            lost += usize::from(late.try_send(answer).is_err());
        }
        not_answered(lost, "nor sent again: too many are, or the worker ends");
        for ((topic, partition), offset) in offsets {
            if let Err(error) = consumer.store_offset(&topic, partition, offset) {
                // The partition has left us: whoever has it handles the record again, to no effect.
                tracing::debug!(%error, kafka.partition = partition, "marking as read");
            }
        }
    }
}

/// A broker that stood still for longer than a message waits for it is often back while the callers
/// still wait. One that took an answer and could not say so takes it twice; the first is told. Each batch
/// is tried by itself, and those apart whose partitions are looked for: what one waits for holds no other up.
async fn send_again(producer: Producer, mut queue: mpsc::Receiver<Pending>) {
    let (mut late, mut batches, mut waiting) = (Vec::new(), FuturesUnordered::new(), 0);
    loop {
        tokio::select! {
            more = queue.recv_many(&mut late, LATE - waiting), if waiting < LATE => {
                if more == 0 {
                    return;
                }
                waiting += more;
                let (lost, slow): (Vec<_>, Vec<_>) = late.drain(..).partition(|answer| answer.is_lost);
                for batch in [lost, slow].into_iter().filter(|batch| !batch.is_empty()) {
                    batches.push(until_delivered(&producer, batch));
                }
            }
            Some(done) = batches.next() => waiting -= done,
        }
    }
}

/// Returns how many there were.
async fn until_delivered(producer: &Producer, mut late: Vec<Pending>) -> usize {
    let (count, mut backoff) = (late.len(), Backoff::RECONNECT);
    loop {
        let all = late.len();
        late.retain(|answer| answer.first_sent_at.elapsed() < answer.worth());
        not_answered(all - late.len(), "the broker did not take it, or its partition was not there, for too long");
        if late.is_empty() {
            return count;
        }
        let lost: BTreeSet<_> =
            late.iter().filter(|answer| answer.is_lost).map(|answer| &answer.reply.to.topic).collect();
        for topic in lost {
            if let Err(error) = producer.partitions(topic).await {
                tracing::debug!(error = format!("{error:#}"), "looking for the partitions of a reply topic");
            }
        }
        metrics::counter!("orderstream_acks_sent_again_total").increment(late.len() as u64);
        late = undelivered(producer, send(producer, late)).await;
        if !late.is_empty() {
            sleep(backoff.delay()).await;
        }
    }
}

/// Waits for these deliveries. Which were not made, and may be yet?
async fn undelivered(producer: &Producer, answers: Vec<Sent>) -> Vec<Pending> {
    use RDKafkaErrorCode::{MessageTimedOut, QueueFull};
    let mut late = Vec::new();
    for Sent { mut answer, delivery } in answers {
        let delivered = match delivery {
            Ok(delivery) => producer.delivered(delivery).await,
            Err(error) => Err(error),
        };
        match delivered {
            Ok(()) => metrics::counter!("orderstream_acks_sent_total").increment(1),
            Err(error) if matches!(error.rdkafka_error_code(), Some(MessageTimedOut | QueueFull)) => late.push(answer),
            Err(error) if is_unknown(&error) => {
                answer.is_lost = true;
                late.push(answer);
            }
            Err(error) => not_answered(1, &error.to_string()),
        }
    }
    late
}

fn not_answered(answers: usize, reason: &str) {
    if answers > 0 {
        metrics::counter!("orderstream_acks_unsent_total").increment(answers as u64);
        tracing::warn!(answers, reason, "not answered; who waits finds the answer in the history");
    }
}
