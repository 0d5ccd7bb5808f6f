//! The whole, over its real binaries, a real PostgreSQL and a real Kafka, seen from outside.

mod answers;
mod bad_input;
mod bad_records;
mod batches;
mod bulk;
mod clock;
#[cfg(feature = "compose")]
mod compose;
mod deletes;
mod features;
mod kills;
mod lifecycles;
mod load;
mod operators;
mod orders;
mod outages;
mod outbox;
mod parking;
mod scenarios;
mod schema;
mod secure;
mod settings;
mod shutdown;
mod waiting;
