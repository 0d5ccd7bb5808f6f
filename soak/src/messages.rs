//! What others tell our orders over Kafka.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::{Value, json};

use crate::history::{Asked, Heard, Operation, Recorder};
use crate::stage::Stage;

/// Longer than any fault. What is not there by then may still come: nobody knows.
const SENT_WITHIN: Duration = Duration::from_secs(40);

pub const PAYMENTS: &str = "payment-results";
pub const SHIPMENTS: &str = "order.state.update";

pub struct Messages(FutureProducer);

impl Messages {
    pub fn new(stage: &Stage) -> Self {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", stage.system.kafka.brokers())
            .set("enable.idempotence", "true")
            .set("message.timeout.ms", SENT_WITHIN.as_millis().to_string())
            .set("reconnect.backoff.max.ms", "1000")
            .set_log_level(RDKafkaLogLevel::Emerg);
        Self(config.create().expect("a producer"))
    }

    pub async fn paid(&self, recorder: &Recorder, client: usize, order: &str, id: &str, status: &str) -> bool {
        let body = json!({ "order_id": order, "user_id": client + 1, "status": status });
        self.send(recorder, client, PAYMENTS, order, id, status, &body).await
    }

    pub async fn shipped(&self, recorder: &Recorder, client: usize, order: &str, id: &str, step: &str) -> bool {
        let body = json!({ "orderId": order, "eventType": step, "timestamp": "2026-01-02T03:04:05Z" });
        self.send(recorder, client, SHIPMENTS, order, id, step, &body).await
    }

    #[expect(clippy::too_many_arguments, reason = "each is a part of one record")]
    async fn send(
        &self,
        recorder: &Recorder,
        client: usize,
        topic: &str,
        order: &str,
        id: &str,
        says: &str,
        body: &Value,
    ) -> bool {
        let key = Some(format!("{topic}/{id}"));
        let asked = Asked { key, to: Some(says.to_owned()), ..Asked::of(Operation::Message, order) };
        let headers = OwnedHeaders::new().insert(Header { key: "ce_id", value: Some(id) });
        let body = body.to_string();
        let begun = recorder.now();
        let sent = self.0.send(FutureRecord::to(topic).key(order).payload(&body).headers(headers), SENT_WITHIN).await;
        let heard = match sent {
            Ok(place) => Heard::Sent(place.partition, place.offset),
            Err((error, _)) => Heard::Unclear(error.to_string()),
        };
        let is_sent = matches!(heard, Heard::Sent(..));
        recorder.record(client, "kafka", asked, begun, heard);
        is_sent
    }
}
