//! The producer, with a broker that does what no real one can be made to do.

use std::{ffi::OsString, time::Duration};

use clap::Parser;
use rdkafka::{mocking::MockCluster, types::RDKafkaApiKey, types::RDKafkaRespErr};
use shared::{
    kafka::Producer,
    message::Headers,
    settings::{KafkaSettings, parse_from},
};
use test_support::wait_for;

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    kafka: KafkaSettings,
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_fatal_error_the_next_message_goes_out_by_a_new_producer() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("events", 1, 1).unwrap();
    let args = ["test", &format!("--kafka-brokers={}", cluster.bootstrap_servers())].map(OsString::from);
    let settings: Settings = parse_from(args, |_| None, &Default::default()).unwrap();
    let producer = Producer::new(&settings.kafka).unwrap();
    let send = async |body: &str| {
        let delivery = producer.send("events", None, "key", &Headers::default(), body).map_err(|e| e.to_string())?;
        producer.delivered(delivery).await.map_err(|error| error.to_string())
    };
    send("before").await.unwrap();

    // The broker lost the sequence of an idempotent producer: librdkafka gives up for good.
    let fatal = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER];
    cluster.request_errors(RDKafkaApiKey::Produce, &fatal);
    send("lost").await.unwrap_err();
    wait_for("a delivery by the new producer", Duration::from_secs(20), || send("after")).await;
}
