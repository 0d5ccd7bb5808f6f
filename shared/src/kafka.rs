//! The way to Kafka: client settings, topics, and a producer that survives its own fatal errors.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use rdkafka::{
    ClientConfig, ClientContext, Statistics,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    config::RDKafkaLogLevel,
    consumer::ConsumerContext,
    error::{KafkaError, RDKafkaErrorCode},
    metadata::MetadataTopic,
    producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _},
};

use tokio::time::Instant;

use crate::{backoff::Backoff, message::Headers, settings::KafkaSettings};

/// How long a message may wait in memory for the broker. Below the sweeper's grace, so that it
/// never sends what is still on its way from here.
pub const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// For metadata and administration; the broker answers in milliseconds or not at all.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Logs what librdkafka says, and remembers whether any broker is to be reached.
#[derive(Clone, Debug, Default)]
pub struct Context {
    away: Arc<AtomicBool>,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // While a broker is away librdkafka says so for each attempt and broker: once per outage
        // is enough, and `error` below says it.
        // And a broker that has just started knows its coordinators a moment later (GETPID).
        if facility == "GETPID" || (self.away.load(Ordering::Relaxed) && facility == "FAIL") {
            tracing::debug!(facility, "librdkafka: {message}");
            return;
        }
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error => {
                tracing::warn!(facility, "librdkafka: {message}");
            }
            RDKafkaLogLevel::Warning | RDKafkaLogLevel::Notice => tracing::info!(facility, "librdkafka: {message}"),
            RDKafkaLogLevel::Info | RDKafkaLogLevel::Debug => tracing::debug!(facility, "librdkafka: {message}"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            if !self.away.swap(true, Ordering::Relaxed) {
                tracing::warn!(reason, "Kafka is away");
            }
        } else {
            tracing::debug!(error = %error, reason, "librdkafka");
        }
    }

    fn stats(&self, statistics: Statistics) {
        for topic in statistics.topics.values() {
            for partition in topic.partitions.values().filter(|p| p.partition >= 0 && p.consumer_lag >= 0) {
                metrics::gauge!("orderstream_consumer_lag", "topic" => topic.topic.clone(), "partition" => partition.partition.to_string())
                    .set(partition.consumer_lag as f64);
            }
        }
    }
}

impl ConsumerContext for Context {}

impl Context {
    /// No broker has been reached since all of them were lost.
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// A broker has answered.
    pub fn is_back(&self) {
        if self.away.swap(false, Ordering::Relaxed) {
            tracing::info!("Kafka is back");
        }
    }
}

/// What all clients share; `KAFKA_CONFIG` comes last and wins.
#[must_use]
pub fn client_config(settings: &KafkaSettings, own: &[(&str, &str)]) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &settings.kafka_brokers)
        .set("client.id", &settings.service.service_name)
        // Quick to notice that a broker is back; the default waits up to 10 s.
        .set("reconnect.backoff.ms", "100")
        .set("reconnect.backoff.max.ms", "1000")
        .set("socket.nagle.disable", "true")
        .set_log_level(RDKafkaLogLevel::Notice);
    for (key, value) in own {
        config.set(*key, *value);
    }
    for (key, value) in &settings.kafka_config.0 {
        config.set(key, value);
    }
    config
}

/// How long a message may wait for others that go to the same partition. Each partition that is written
/// takes a request, and wakes those who read it: under load fewer and larger ones are worth waiting for.
///
/// A message may overtake one that was sent before it with another pace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Not at all: even 0.2 ms costs a lone order more than a millisecond, for its event and again for
    /// its answer.
    Prompt,
    /// 2 ms: until those that are sent with it have followed.
    Gathered,
    /// 20 ms: until the next few batches have followed.
    Patient,
}

impl Pace {
    const ALL: [Self; 3] = [Self::Prompt, Self::Gathered, Self::Patient];

    /// For messages that are sent together; does a client wait for what becomes of one of them?
    #[must_use]
    pub const fn of(messages: usize, is_awaited: bool) -> Self {
        match (messages, is_awaited) {
            (32.., true) => Self::Gathered,
            (8.., false) => Self::Patient,
            _ => Self::Prompt,
        }
    }

    const fn linger_ms(self) -> &'static str {
        match self {
            Self::Prompt => "0",
            Self::Gathered => "2",
            Self::Patient => "20",
        }
    }
}

/// Sends without ever waiting, by one client of librdkafka for each [`Pace`].
#[derive(Clone)]
pub struct Producer {
    context: Context,
    /// In the order of [`Pace::ALL`].
    clients: Arc<[Client]>,
}

/// Made anew when librdkafka gives up on it for good.
struct Client {
    config: ClientConfig,
    current: RwLock<FutureProducer<Context>>,
}

impl Producer {
    /// # Errors
    /// When a property in `KAFKA_CONFIG` is unknown or wrong.
    pub fn new(settings: &KafkaSettings) -> anyhow::Result<Self> {
        let context = Context::default();
        let clients = Pace::ALL.into_iter().map(|pace| Client::new(settings, pace, &context));
        Ok(Self { clients: clients.collect::<anyhow::Result<_>>()?, context })
    }

    /// Was the broker there when we last looked?
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.context.is_away()
    }

    /// Queues a record. The result is the future of its delivery, or why it was not queued.
    ///
    /// # Errors
    /// [`RDKafkaErrorCode::QueueFull`] while the broker takes less than we send, and what
    /// librdkafka refuses at once, such as a record that is too large.
    pub fn send(
        &self,
        pace: Pace,
        topic: &str,
        partition: Option<i32>,
        key: &str,
        headers: &Headers,
        body: &str,
    ) -> Result<DeliveryFuture, KafkaError> {
        let mut record = FutureRecord::to(topic).key(key).payload(body).headers(headers.to_record());
        record.partition = partition;
        self.clients[pace as usize].current().send_result(record).map_err(|(error, _)| error)
    }

    /// Waits for one delivery. After a fatal error the next message goes out by a new client.
    ///
    /// # Errors
    /// Why the broker does not have it, as far as we know.
    pub async fn delivered(&self, delivery: DeliveryFuture) -> Result<(), KafkaError> {
        let result = match delivery.await {
            Ok(Ok(place)) if place.offset >= 0 => Ok(()),
            // librdkafka concludes from a later message's success that this one is there, too. It
            // may not be: a broker that knows nothing of a producer takes any first sequence, so
            // the later one passes though this one was refused. Only a place in the log counts.
            Ok(Ok(_)) => Err(KafkaError::MessageProduction(RDKafkaErrorCode::Fail)),
            Ok(Err((error, _))) => Err(error),
            Err(_) => Err(KafkaError::Canceled),
        };
        match &result {
            Ok(()) => self.context.is_back(),
            Err(_) => self.clients.iter().for_each(|client| client.replace_if_fatal(&self.context)),
        }
        result
    }

    /// Asks the broker for a topic's metadata, which also opens the connections. From then on messages
    /// reach each of its partitions.
    ///
    /// # Errors
    /// When no broker answers, or it does not know the topic.
    pub async fn partitions(&self, topic: &str) -> anyhow::Result<i32> {
        let clients: Vec<_> = self.clients.iter().map(Client::current).collect();
        let name = topic.to_owned();
        let count = tokio::task::spawn_blocking(move || -> anyhow::Result<i32> {
            let mut count = 0;
            for client in clients {
                let metadata = client.client().fetch_metadata(Some(&name), ADMIN_TIMEOUT)?;
                count = metadata.topics().first().map_or(0, |topic| topic.partitions().len());
            }
            Ok(i32::try_from(count).unwrap_or(0))
        });
        match count.await?.with_context(|| format!("asking Kafka for topic {topic}"))? {
            0 => bail!("Kafka does not know topic {topic}"),
            count => {
                self.context.is_back();
                Ok(count)
            }
        }
    }
}

impl Client {
    fn new(settings: &KafkaSettings, pace: Pace, context: &Context) -> anyhow::Result<Self> {
        let message_timeout = MESSAGE_TIMEOUT.as_millis().to_string();
        let config = client_config(
            settings,
            &[
                ("enable.idempotence", "true"),
                ("acks", "all"),
                ("message.timeout.ms", &message_timeout),
                ("linger.ms", pace.linger_ms()),
                // Topics are made by `ensure_topics`, with as many partitions as they should have.
                ("allow.auto.create.topics", "false"),
                // So that all who write to a topic soon know of partitions that it is given later.
                ("topic.metadata.refresh.interval.ms", "10000"),
                // So that a message for one that is not there fails for that reason, rather than by
                // running out of time like those of a broker that is away.
                ("topic.metadata.propagation.max.ms", "3000"),
                // What does not fit stays in the outbox. Bounds the memory of an outage, for each client.
                ("queue.buffering.max.kbytes", "32768"),
            ],
        );
        let producer =
            config.create_with_context(context.clone()).map_err(|error| settings.kafka_config.refusal(error))?;
        Ok(Self { config, current: RwLock::new(producer) })
    }

    fn current(&self) -> FutureProducer<Context> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace_if_fatal(&self, context: &Context) {
        let Some((code, reason)) = self.current().client().fatal_error() else { return };
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if current.client().fatal_error().is_none() {
            return; // somebody else was quicker
        }
        tracing::error!(code = %code, reason, "the Kafka producer failed for good; making a new one");
        metrics::counter!("orderstream_producer_replaced_total").increment(1);
        match self.config.create_with_context(context.clone()) {
            Ok(producer) => {
                let old = std::mem::replace(&mut *current, producer);
                // Its end purges and waits.
                tokio::task::spawn_blocking(move || drop(old));
            }
            Err(error) => tracing::error!(error = %error, "cannot make a Kafka producer"),
        }
    }
}

/// Will this message never be taken, however often it is sent?
#[must_use]
pub fn is_refused(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        error.rdkafka_error_code(),
        Some(
            Code::MessageSizeTooLarge
                | Code::InvalidMessage
                | Code::InvalidMessageSize
                | Code::InvalidRecord
                | Code::InvalidTopic
                | Code::InvalidTimestamp
        )
    )
}

/// Is the place unknown that a message was sent to? As far as the client knew: it may be newer than that.
#[must_use]
pub fn is_unknown(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        error.rdkafka_error_code(),
        Some(Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition)
    )
}

/// Is it this topic alone that cannot be written now, while others may be?
#[must_use]
pub fn is_of_topic(error: &KafkaError) -> bool {
    is_unknown(error) || error.rdkafka_error_code() == Some(RDKafkaErrorCode::TopicAuthorizationFailed)
}

/// Makes the topics that are not there. Warns where one copy is all there is.
///
/// # Errors
/// When no broker answers, or it refuses to make a topic.
pub async fn ensure_topics(settings: &KafkaSettings, topics: &[&str]) -> anyhow::Result<()> {
    let config = client_config(settings, &[]);
    let admin: AdminClient<Context> =
        config.create_with_context(Context::default()).map_err(|error| settings.kafka_config.refusal(error))?;
    let admin = Arc::new(admin);
    let known = copies_by_topic(&admin).await?;
    let missing: Vec<_> = topics.iter().filter(|topic| !known.contains_key(**topic)).collect();
    let new: Vec<_> = missing
        .iter()
        .map(|name| {
            let replication = TopicReplication::Fixed(settings.kafka_replication_factor);
            NewTopic::new(name, settings.kafka_partitions, replication)
        })
        .collect();
    if !new.is_empty() {
        let options = AdminOptions::new().operation_timeout(Some(ADMIN_TIMEOUT)).request_timeout(Some(ADMIN_TIMEOUT));
        for result in admin.create_topics(&new, &options).await.context("creating topics")? {
            match result {
                Ok(topic) => tracing::info!(topic, partitions = settings.kafka_partitions, "created topic"),
                Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
            }
        }
    }
    let copies = if new.is_empty() { known } else { wait_until_known(&admin, topics).await? };
    for topic in topics.iter().filter(|topic| copies.get(**topic) == Some(&1) && !settings.is_development()) {
        tracing::warn!(
            topic,
            "has a single copy: a lost disk is a lost message. Set KAFKA_REPLICATION_FACTOR, or make the topic with 3"
        );
    }
    Ok(())
}

/// A broker hears of new topics a moment after they are made. Whoever subscribes before that reads
/// nothing of them until it next asks what there is.
async fn wait_until_known(
    admin: &Arc<AdminClient<Context>>,
    topics: &[&str],
) -> anyhow::Result<HashMap<String, usize>> {
    let mut pause = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
    let end = Instant::now() + ADMIN_TIMEOUT;
    loop {
        let copies = copies_by_topic(admin).await?;
        let unknown: Vec<_> = topics.iter().filter(|topic| copies.get(**topic).is_none_or(|n| *n == 0)).collect();
        if unknown.is_empty() {
            return Ok(copies);
        }
        if Instant::now() > end {
            bail!("the broker does not know of topics that it has made: {unknown:?}");
        }
        tokio::time::sleep(pause.delay()).await;
    }
}

async fn copies_by_topic(admin: &Arc<AdminClient<Context>>) -> anyhow::Result<HashMap<String, usize>> {
    let admin = admin.clone();
    tokio::task::spawn_blocking(move || {
        let metadata = admin.inner().fetch_metadata(None, ADMIN_TIMEOUT).context("asking Kafka for its topics")?;
        let copies = |topic: &MetadataTopic| topic.partitions().iter().map(|p| p.replicas().len()).min().unwrap_or(0);
        Ok(metadata.topics().iter().map(|topic| (topic.name().to_owned(), copies(topic))).collect())
    })
    .await?
}

#[cfg(test)]
mod tests {
    use super::Pace;

    #[test]
    fn a_few_messages_are_sent_at_once_and_many_with_others_the_later_if_nobody_waits() {
        let paces = |is_awaited| [1, 7, 8, 31, 32, 1_000].map(|messages| Pace::of(messages, is_awaited));
        use Pace::{Gathered, Patient, Prompt};
        assert_eq!(paces(true), [Prompt, Prompt, Prompt, Prompt, Gathered, Gathered]);
        assert_eq!(paces(false), [Prompt, Prompt, Patient, Patient, Patient, Patient]);
    }
}
