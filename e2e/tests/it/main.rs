//! The whole, over its real binaries, a real PostgreSQL and a real Kafka, seen from outside.

mod answers;
mod bad_input;
mod bad_records;
mod batches;
#[cfg(feature = "compose")]
mod compose;
mod deletes;
mod kills;
mod load;
mod orders;
mod outages;
mod outbox;
mod scenarios;
mod schema;
mod secure;
mod settings;
mod shutdown;
mod waiting;
