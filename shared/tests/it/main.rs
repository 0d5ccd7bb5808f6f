//! The shared parts on a real PostgreSQL and a real Kafka.

mod outbox;
mod producer;
mod vacuum;
