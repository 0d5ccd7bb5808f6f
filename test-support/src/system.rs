//! One system under test: a database, topics, and as many processes on them as a test starts.

use crate::database::TestDb;
use crate::kafka::TestKafka;
use crate::ledger::Ledger;
use crate::process::{Api, Settings, Worker};

/// Fewer than in production: a test starts and ends with its topics.
const PARTITIONS: &str = "4";

pub struct System {
    pub db: TestDb,
    pub kafka: TestKafka,
    settings: Settings,
}

impl System {
    /// On the servers that `make test` provides.
    pub async fn new() -> Self {
        Self::on(TestDb::new().await, TestKafka::new())
    }

    /// On servers of the test's own.
    pub fn on(db: TestDb, kafka: TestKafka) -> Self {
        let mut settings = Settings::default();
        settings.set("POSTGRES_DSN", db.dsn());
        settings.set("KAFKA_BROKERS", kafka.brokers());
        settings.set("KAFKA_PARTITIONS", PARTITIONS);
        settings.set("ORDERS_EVENTS_TOPIC", &kafka.topics().events);
        settings.set("ORDERS_ACK_TOPIC", &kafka.topics().acks);
        settings.set("WORKER_GROUP", &kafka.topics().group);
        Self { db, kafka, settings }
    }

    /// For all processes started from now on.
    pub fn set(&mut self, key: &str, value: impl ToString) {
        self.settings.set(key, value);
    }

    /// What the processes get, to be changed for one of them.
    pub fn settings(&self) -> Settings {
        self.settings.clone()
    }

    pub async fn api(&self) -> Api {
        self.api_with(&[]).await
    }

    pub async fn api_with(&self, changes: &[(&str, &str)]) -> Api {
        Api::start(&self.settings().with(changes)).await
    }

    pub async fn worker(&self) -> Worker {
        self.worker_with(&[]).await
    }

    pub async fn worker_with(&self, changes: &[(&str, &str)]) -> Worker {
        Worker::start(&self.settings().with(changes)).await
    }

    pub fn events(&self) -> &str {
        &self.kafka.topics().events
    }

    pub fn acks(&self) -> &str {
        &self.kafka.topics().acks
    }

    pub fn ledger(&self) -> Ledger<'_> {
        Ledger::new(self.db.client(), &self.kafka, self.events())
    }
}
