//! Topics of its own for each test, and Kafka as an outsider sees it: any record in, all of them
//! out again.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, Headers as _, Message as _, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;
use serde_json::Value;
use uuid::Uuid;

use crate::wait::wait_for;

/// For one call to the broker. Generous, since a broker may be starting.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// For a broker that has come back to have what it missed.
const CATCHES_UP_WITHIN: Duration = Duration::from_secs(90);

/// In the order they were set; a value may be absent.
pub type Headers = Vec<(String, Option<Vec<u8>>)>;

/// The names that one test uses, so that tests share a broker and never meet.
#[derive(Clone, Debug)]
pub struct Topics {
    prefix: String,
    pub events: String,
    pub acks: String,
    pub group: String,
}

impl Topics {
    fn unique() -> Self {
        let prefix = format!("test-{}", Uuid::now_v7().simple());
        Self {
            events: format!("{prefix}.orders.events"),
            acks: format!("{prefix}.orders.ack"),
            group: format!("{prefix}.order-workers"),
            prefix,
        }
    }
}

/// A record to be sent exactly as given: no key, no body and odd headers included.
#[derive(Clone, Debug, Default)]
pub struct Record {
    pub key: Option<Vec<u8>>,
    pub body: Option<Vec<u8>>,
    pub headers: Headers,
    pub partition: Option<i32>,
}

impl Record {
    pub fn new(key: &str, body: impl Into<Vec<u8>>) -> Self {
        Self { key: Some(key.as_bytes().to_vec()), body: Some(body.into()), ..Self::default() }
    }

    pub fn header(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name.to_owned(), Some(value.into())));
        self
    }

    pub fn to_partition(mut self, partition: i32) -> Self {
        self.partition = Some(partition);
        self
    }
}

/// The copies of one partition.
#[derive(Clone, Debug)]
pub struct Copies {
    pub topic: String,
    pub partition: i32,
    /// That it has, dead ones too.
    pub wanted: usize,
    /// That have all of it; none when nobody leads it.
    pub whole: usize,
}

/// A record as it lies on its topic.
#[derive(Clone, Debug)]
pub struct Message {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    pub body: Option<Vec<u8>>,
    pub headers: Headers,
}

impl Message {
    pub fn key_text(&self) -> String {
        String::from_utf8_lossy(self.key.as_deref().unwrap_or_default()).into_owned()
    }

    /// `Null` for anything that is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(self.body.as_deref().unwrap_or_default()).unwrap_or(Value::Null)
    }

    pub fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers.iter().find(|(header, _)| header == name).and_then(|(_, value)| value.as_deref())
    }

    pub fn header_text(&self, name: &str) -> Option<String> {
        self.header(name).map(|value| String::from_utf8_lossy(value).into_owned())
    }

    /// The same record again, as a redelivery sends it.
    pub fn again(&self) -> Record {
        Record {
            key: self.key.clone(),
            body: self.body.clone(),
            headers: self.headers.clone(),
            partition: Some(self.partition),
        }
    }
}

impl From<OwnedMessage> for Message {
    fn from(message: OwnedMessage) -> Self {
        Self {
            partition: message.partition(),
            offset: message.offset(),
            key: message.key().map(<[u8]>::to_vec),
            body: message.payload().map(<[u8]>::to_vec),
            headers: message
                .headers()
                .map(|headers| {
                    headers.iter().map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec))).collect()
                })
                .unwrap_or_default(),
        }
    }
}

/// One test's view of a broker. Its topics are deleted at the end.
pub struct TestKafka {
    brokers: String,
    config: ClientConfig,
    topics: Topics,
}

impl TestKafka {
    /// The broker that `make test` provides.
    pub fn new() -> Self {
        let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_default();
        assert!(!brokers.is_empty(), "KAFKA_BROKERS is not set, so there is no Kafka to test on: run `make test`");
        Self::at(&brokers, &[])
    }

    /// A private broker, with the librdkafka properties that it asks for.
    pub fn at(brokers: &str, properties: &[(&str, &str)]) -> Self {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", brokers);
        // A broker that the test stops is no news.
        config.set_log_level(rdkafka::config::RDKafkaLogLevel::Emerg);
        for (key, value) in properties {
            config.set(*key, *value);
        }
        Self { brokers: brokers.to_owned(), config, topics: Topics::unique() }
    }

    pub fn brokers(&self) -> &str {
        &self.brokers
    }

    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    /// `settings` are the topic's own: `max.message.bytes` and the like. It gets as many copies as the broker
    /// gives one that asks for nothing.
    pub async fn create_topic(&self, topic: &str, partitions: i32, settings: &[(&str, &str)]) {
        let mut new = NewTopic::new(topic, partitions, TopicReplication::Fixed(-1));
        for (key, value) in settings {
            new = new.set(key, value);
        }
        let results = self
            .admin()
            .create_topics([&new], &AdminOptions::new().operation_timeout(Some(CALL_TIMEOUT)))
            .await
            .unwrap_or_else(|error| panic!("creating topic {topic}: {error}"));
        for result in results {
            result.unwrap_or_else(|(topic, code)| panic!("creating topic {topic}: {code}"));
        }
        wait_for(&format!("topic {topic}"), CALL_TIMEOUT, || async {
            match self.partitions(topic).await {
                Ok(seen) if seen.len() == partitions as usize => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }

    /// Gives a topic more partitions: `partitions` in all.
    pub async fn grow_topic(&self, topic: &str, partitions: usize) {
        let wanted = NewPartitions::new(topic, partitions);
        let options = AdminOptions::new().operation_timeout(Some(CALL_TIMEOUT));
        let results = self
            .admin()
            .create_partitions([&wanted], &options)
            .await
            .unwrap_or_else(|error| panic!("growing topic {topic}: {error}"));
        for result in results {
            result.unwrap_or_else(|(topic, code)| panic!("growing topic {topic}: {code}"));
        }
    }

    /// How it stands with the copies of each partition of each topic.
    ///
    /// # Errors
    /// When no broker answers.
    pub async fn copies(&self) -> Result<Vec<Copies>, KafkaError> {
        let config = self.reader();
        blocking(move || {
            let consumer: BaseConsumer = config.create()?;
            let metadata = consumer.fetch_metadata(None, CALL_TIMEOUT)?;
            let copies = metadata.topics().iter().flat_map(|topic| {
                topic.partitions().iter().map(|partition| Copies {
                    topic: topic.name().to_owned(),
                    partition: partition.id(),
                    wanted: partition.replicas().len(),
                    whole: if partition.leader() < 0 { 0 } else { partition.isr().len() },
                })
            });
            Ok(copies.collect())
        })
        .await
    }

    /// Until each partition of each topic has all of its copies, and each of them has all of it.
    pub async fn wait_for_whole_copies(&self) {
        wait_for("all copies of all topics to be whole", CATCHES_UP_WITHIN, || async {
            let copies = self.copies().await.map_err(|error| error.to_string())?;
            let missing: Vec<_> = copies.into_iter().filter(|copies| copies.whole < copies.wanted).collect();
            if missing.is_empty() { Ok(()) } else { Err(format!("{missing:?}")) }
        })
        .await;
    }

    /// Sends one record and waits until the broker has it; gives its partition and offset.
    pub async fn produce(&self, topic: &str, record: Record) -> (i32, i64) {
        self.produce_all(topic, vec![record]).await[0]
    }

    /// Sends records, in this order per partition, and waits until the broker has them all.
    pub async fn produce_all(&self, topic: &str, records: Vec<Record>) -> Vec<(i32, i64)> {
        let mut config = self.config.clone();
        config.set("enable.idempotence", "true").set("linger.ms", "1");
        // The test's hostile records are as large as the broker takes.
        config.set("message.max.bytes", "20000000");
        let producer: FutureProducer = config.create().expect("creating a producer");
        let mut deliveries = Vec::new();
        for record in records {
            let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
            for (key, value) in &record.headers {
                headers = headers.insert(Header { key, value: value.as_ref() });
            }
            let mut outgoing = FutureRecord::<Vec<u8>, Vec<u8>>::to(topic).headers(headers);
            outgoing.key = record.key.as_ref();
            outgoing.payload = record.body.as_ref();
            outgoing.partition = record.partition;
            deliveries.push(
                producer.send_result(outgoing).unwrap_or_else(|(error, _)| panic!("sending to {topic}: {error}")),
            );
        }
        let mut places = Vec::new();
        for delivery in deliveries {
            let delivered = delivery
                .await
                .expect("the producer outlives its deliveries")
                .unwrap_or_else(|(error, _)| panic!("sending to {topic}: {error}"));
            places.push((delivered.partition, delivered.offset));
        }
        places
    }

    /// All that lies on a topic now, each partition in its order. A topic that nobody has
    /// created holds nothing.
    pub async fn read(&self, topic: &str) -> Vec<Message> {
        let partitions =
            self.partitions(topic).await.unwrap_or_else(|error| panic!("looking for topic {topic}: {error}"));
        if partitions.is_empty() {
            return Vec::new();
        }
        let (config, topic) = (self.reader(), topic.to_owned());
        blocking(move || read_to_the_end(&config, &topic, &partitions)).await
    }

    /// How many records of the topic the test's workers have not yet committed.
    pub async fn lag(&self, topic: &str) -> i64 {
        let partitions =
            self.partitions(topic).await.unwrap_or_else(|error| panic!("looking for topic {topic}: {error}"));
        let mut config = self.reader();
        let group = &self.topics.group;
        // What lifecycles receive has a group of its own.
        let group = if topic == self.topics.events { group.clone() } else { format!("{group}.received") };
        config.set("group.id", group);
        let topic = topic.to_owned();
        blocking(move || lag_of_group(&config, &topic, &partitions)).await
    }

    /// The topic's partitions; none when it does not exist.
    async fn partitions(&self, topic: &str) -> Result<Vec<i32>, KafkaError> {
        let (config, topic) = (self.reader(), topic.to_owned());
        blocking(move || {
            let consumer: BaseConsumer = config.create()?;
            let metadata = consumer.fetch_metadata(Some(&topic), CALL_TIMEOUT)?;
            Ok(metadata
                .topics()
                .iter()
                .filter(|found| found.name() == topic)
                .flat_map(|found| found.partitions().iter().map(|partition| partition.id()))
                .collect())
        })
        .await
    }

    fn reader(&self) -> ClientConfig {
        let mut config = self.config.clone();
        config
            .set("group.id", "test-reader")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .set("allow.auto.create.topics", "false")
            .set("fetch.message.max.bytes", "20000000");
        config
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.config.create().expect("creating an admin client")
    }
}

impl Default for TestKafka {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TestKafka {
    fn drop(&mut self) {
        let (admin, topics) = (self.admin(), self.topics.clone());
        // A thread of its own: this runs inside the test's runtime, perhaps while it unwinds. The
        // broker may be gone by now, so nothing waits for the outcome for long.
        let deleting = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let options = AdminOptions::new()
                .request_timeout(Some(Duration::from_secs(3)))
                .operation_timeout(Some(Duration::from_secs(1)));
            // The topics of lifecycles begin with the test's prefix too.
            let metadata = admin.inner().fetch_metadata(None, Duration::from_secs(3))?;
            let names = metadata.topics().iter().map(|topic| topic.name());
            let names: Vec<&str> = names.filter(|name| name.starts_with(&topics.prefix)).collect();
            if !names.is_empty() {
                runtime.block_on(admin.delete_topics(&names, &options))?;
            }
            anyhow::Ok(())
        });
        let _ = deleting.join();
    }
}

fn read_to_the_end(config: &ClientConfig, topic: &str, partitions: &[i32]) -> Vec<Message> {
    let consumer: BaseConsumer = config.create().expect("creating a consumer");
    let mut assignment = TopicPartitionList::new();
    for partition in partitions {
        assignment.add_partition_offset(topic, *partition, Offset::Beginning).expect("a valid offset");
    }
    consumer.assign(&assignment).expect("assigning partitions");

    let mut at_end = vec![false; partitions.len()];
    let mut messages = Vec::new();
    while at_end.contains(&false) {
        match consumer.poll(CALL_TIMEOUT) {
            Some(Ok(message)) => messages.push(Message::from(message.detach())),
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                let index = partitions.iter().position(|other| *other == partition);
                at_end[index.expect("only assigned partitions are read")] = true;
            }
            Some(Err(KafkaError::MessageConsumption(
                RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::AllBrokersDown,
            ))) => {}
            Some(Err(error)) => panic!("reading {topic}: {error}"),
            None => panic!("reading {topic}: nothing for {CALL_TIMEOUT:?}, ends seen: {at_end:?}"),
        }
    }
    messages.sort_by_key(|message| (message.partition, message.offset));
    messages
}

fn lag_of_group(config: &ClientConfig, topic: &str, partitions: &[i32]) -> i64 {
    let consumer: BaseConsumer = config.create().expect("creating a consumer");
    let mut asked = TopicPartitionList::new();
    for partition in partitions {
        asked.add_partition(topic, *partition);
    }
    let committed = consumer
        .committed_offsets(asked, CALL_TIMEOUT)
        .unwrap_or_else(|error| panic!("committed offsets of {topic}: {error}"));
    partitions
        .iter()
        .map(|partition| {
            let (low, high) = consumer
                .fetch_watermarks(topic, *partition, CALL_TIMEOUT)
                .unwrap_or_else(|error| panic!("watermarks of {topic}: {error}"));
            match committed.find_partition(topic, *partition).map(|found| found.offset()) {
                Some(Offset::Offset(next)) => high - next,
                _ => high - low,
            }
        })
        .sum()
}

/// librdkafka's own calls block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[ignore = "needs Kafka"]
    async fn records_come_back_as_they_were_sent() {
        let kafka = TestKafka::new();
        let topic = kafka.topics().events.clone();
        kafka.create_topic(&topic, 3, &[]).await;
        let whole = Record::new("order-1", r#"{"n":1}"#).header("ce_id", "e-1").to_partition(2);
        let empty = Record { headers: vec![("odd".to_owned(), None)], ..Record::default() };
        kafka.produce_all(&topic, vec![whole, empty.to_partition(2)]).await;

        let read = kafka.read(&topic).await;
        assert_eq!(read.len(), 2);
        assert_eq!((read[0].partition, read[0].offset), (2, 0));
        assert_eq!(read[0].key_text(), "order-1");
        assert_eq!(read[0].json()["n"], 1);
        assert_eq!(read[0].header_text("ce_id").as_deref(), Some("e-1"));
        assert_eq!(read[1].key, None);
        assert_eq!(read[1].body, None);
        assert_eq!(read[1].headers, [("odd".to_owned(), None)]);
        assert_eq!(kafka.lag(&topic).await, 2);
    }

    #[tokio::test]
    #[ignore = "needs Kafka"]
    async fn a_topic_that_nobody_created_holds_nothing() {
        let kafka = TestKafka::new();
        assert!(kafka.read(&kafka.topics().events).await.is_empty());
    }
}
