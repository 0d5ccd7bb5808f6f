//! The producer, with a broker that does what no real one can be made to do.

use std::{ffi::OsString, time::Duration};

use clap::Parser;
use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer as _},
    mocking::MockCluster,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use shared::{
    kafka::{Pace, Producer},
    message::Headers,
    settings::{KafkaSettings, parse_from},
};
use test_support::wait_for;

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    kafka: KafkaSettings,
}

/// Two messages in two requests at once; the broker, which has just become the leader and knows
/// nothing of this producer, refuses the first and takes the second.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_librdkafka_only_believes_delivered_does_not_count() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("events", 1, 1).unwrap();
    let brokers = format!("--kafka-brokers={}", cluster.bootstrap_servers());
    let args = ["test", &brokers, "--kafka-config=batch.num.messages=1"].map(OsString::from);
    let settings: Settings = parse_from(args, |_| None, &Default::default()).unwrap();
    let producer = Producer::new(&settings.kafka).unwrap();
    producer.partitions("events").await.unwrap();
    cluster.broker_round_trip_time(1, Duration::from_millis(200)).unwrap();
    cluster.request_errors(RDKafkaApiKey::Produce, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION]);
    let send = |body: &str| producer.send(Pace::Prompt, "events", None, "key", &Headers::default(), body).unwrap();
    let (first, second) = (send("first"), send("second"));
    let delivered = [producer.delivered(first).await.is_ok(), producer.delivered(second).await.is_ok()];
    let counted = i64::try_from(delivered.iter().filter(|delivered| **delivered).count()).unwrap();

    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", cluster.bootstrap_servers())
        .set("group.id", "reader")
        .create()
        .unwrap();
    let (_, stored) = reader.fetch_watermarks("events", 0, Duration::from_secs(10)).unwrap();
    assert!(counted <= stored, "{delivered:?} were counted, and {stored} are stored");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_fatal_error_the_next_message_goes_out_by_a_new_producer() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("events", 1, 1).unwrap();
    let args = ["test", &format!("--kafka-brokers={}", cluster.bootstrap_servers())].map(OsString::from);
    let settings: Settings = parse_from(args, |_| None, &Default::default()).unwrap();
    let producer = Producer::new(&settings.kafka).unwrap();
    for pace in [Pace::Prompt, Pace::Gathered, Pace::Patient] {
        let send = async |body: &str| {
            let delivery = producer.send(pace, "events", None, "key", &Headers::default(), body);
            producer.delivered(delivery.map_err(|e| e.to_string())?).await.map_err(|error| error.to_string())
        };
        send("before").await.unwrap();

        // The broker lost the sequence of an idempotent producer: librdkafka gives up for good.
        let fatal = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER];
        cluster.request_errors(RDKafkaApiKey::Produce, &fatal);
        send("lost").await.unwrap_err();
        wait_for("a delivery by the new producer", Duration::from_secs(20), || send("after")).await;
    }
}
