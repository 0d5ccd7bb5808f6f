//! Listens on this process's partition of `orders.ack` and hands the answers to those who wait.

use std::{convert::Infallible, sync::Arc, time::Duration};

use anyhow::Context as _;
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
};
use shared::{
    backoff::Backoff,
    kafka::{Context, Producer, client_config, ensure_topics},
    message::{CORRELATION_ID, Headers, ReplyTo},
    settings::KafkaSettings,
};
use tokio::sync::watch;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    heard::{self, Heard},
    waiters::Waiters,
};

/// For one question to the broker at the start.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Where answers reach this process, once that is known.
#[derive(Clone, Debug)]
pub(crate) struct ReplyAddress {
    topic: Arc<str>,
    partition: Arc<watch::Sender<Option<i32>>>,
}

impl ReplyAddress {
    pub(crate) fn new(topic: &str) -> Self {
        Self { topic: topic.into(), partition: Arc::new(watch::Sender::new(None)) }
    }

    /// Where the answer to this request is to be sent.
    pub(crate) fn for_request(&self, correlation_id: Uuid) -> Option<ReplyTo> {
        let partition = (*self.partition.borrow())?;
        Some(ReplyTo {
            correlation: correlation_id.as_bytes().to_vec(),
            topic: self.topic.to_string(),
            partition: Some(partition),
        })
    }

    pub(crate) fn is_known(&self) -> bool {
        self.partition.borrow().is_some()
    }

    /// Resolves when the address is known.
    pub(crate) async fn known(&self) {
        // The sender is ours, so this cannot fail.
        let _ = self.partition.subscribe().wait_for(Option::is_some).await;
    }
}

/// Listens for as long as the process lives; begins again when Kafka makes it stop.
pub(crate) async fn listen(settings: KafkaSettings, producer: Producer, address: ReplyAddress, waiters: Waiters) {
    let instance = Uuid::now_v7();
    let mut backoff = Backoff::RECONNECT;
    loop {
        let Err(error) = listen_once(&settings, &producer, &address, &waiters, instance, &mut backoff).await;
        // Until the new position is known, an answer could pass us by.
        let error = format!("{error:#}");
        if address.partition.send_replace(None).is_some() {
            tracing::warn!(error, "not listening for answers; callers are told 202 instead of waiting");
        } else {
            // A topic that was made a moment ago has no leader yet; and the start tells of an outage.
            tracing::info!(error, "not yet listening for answers");
        }
        tokio::time::sleep(backoff.delay()).await;
    }
}

async fn listen_once(
    settings: &KafkaSettings,
    producer: &Producer,
    address: &ReplyAddress,
    waiters: &Waiters,
    instance: Uuid,
    backoff: &mut Backoff,
) -> anyhow::Result<Infallible> {
    ensure_topics(settings, &[&settings.orders_events_topic, &settings.orders_ack_topic]).await?;
    // Also opens the producer's connections, before the first caller needs them.
    producer.partitions(&settings.orders_events_topic).await?;
    let partitions = producer.partitions(&settings.orders_ack_topic).await?;
    let hash = i32::try_from(xxh3_64(instance.as_bytes()) >> 33).unwrap_or(0);
    let partition = hash % partitions;

    // A group's name is demanded, but no group is joined and no offset committed.
    let group = format!("orderstream-replies-{instance}");
    let config = client_config(
        settings,
        &[
            ("group.id", &group),
            ("enable.auto.commit", "false"),
            ("auto.offset.reset", "latest"),
            // An answer goes on as soon as it is there.
            ("fetch.min.bytes", "1"),
            ("fetch.wait.max.ms", "500"),
            // Answers are small and read at once; this bounds what a hostile record could hold.
            ("queued.max.messages.kbytes", "16384"),
            ("fetch.queue.backoff.ms", "5"),
        ],
    );
    let consumer: StreamConsumer<Context> =
        config.create_with_context(Context::default()).map_err(|error| settings.kafka_config.refusal(error))?;
    let consumer = Arc::new(consumer);
    let topic = address.topic.clone();
    // The end is asked for now, not found later by the consumer: answers to requests that are
    // parked from here on lie behind it.
    let (_, end) = {
        let (consumer, topic) = (consumer.clone(), topic.clone());
        tokio::task::spawn_blocking(move || consumer.fetch_watermarks(&topic, partition, TIMEOUT)).await?
    }
    .context("asking for the end of the reply partition")?;
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset(&topic, partition, Offset::Offset(end))?;
    consumer.assign(&assignment).context("assigning the reply partition")?;
    address.partition.send_replace(Some(partition));
    backoff.reset();
    tracing::info!(kafka.topic = &*topic, kafka.partition = partition, kafka.offset = end, "listening for answers");

    loop {
        match consumer.recv().await {
            Ok(record) => {
                // Only this header, and without a copy: this is done for every answer.
                match Headers::find(record.headers(), CORRELATION_ID, heard::correlation_id) {
                    Some(id) => waiters.answer(id, || Heard::read(record.payload())),
                    // Somebody else's worker may say it in the body alone.
                    None => {
                        let heard = Heard::read(record.payload());
                        if let Some(id) = heard.correlation_id {
                            waiters.answer(id, || heard);
                        }
                    }
                }
            }
            Err(error @ KafkaError::MessageConsumptionFatal(_)) => return Err(error.into()),
            Err(error) => match error.rdkafka_error_code() {
                Some(
                    RDKafkaErrorCode::UnknownTopicOrPartition
                    | RDKafkaErrorCode::UnknownTopic
                    | RDKafkaErrorCode::UnknownPartition,
                ) => return Err(error.into()),
                // Brokers come and go; librdkafka connects again and goes on where it was.
                _ => tracing::debug!(%error, "listening for answers"),
            },
        }
    }
}
