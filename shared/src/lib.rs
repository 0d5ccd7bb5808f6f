//! What both binaries use: the order and its money, lifecycles, messages, the outbox, and the ways
//! to PostgreSQL, Kafka and HTTP clients.

#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod backoff;
pub mod cache;
pub mod db;
mod dsn;
pub mod emission;
pub mod kafka;
pub mod lifecycle;
pub mod message;
pub mod money;
pub mod order;
pub mod outbox;
pub mod output;
pub mod parked;
pub mod server;
pub mod settings;
pub mod shutdown;
pub mod telemetry;
mod tls;
pub mod vacuum;
