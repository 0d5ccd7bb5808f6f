//! The whole, over its real binaries, a real PostgreSQL and a real Kafka, seen from outside.

mod answers;
mod bad_input;
mod bad_records;
mod batches;
mod bulk;
mod cache;
mod clock;
#[cfg(feature = "compose")]
mod compose;
mod contract;
mod deletes;
mod documents;
mod features;
mod foreign;
mod grpc;
mod idempotency;
mod identity;
mod kills;
mod lifecycles;
mod limits;
mod lists;
mod load;
mod operators;
mod orders;
mod outages;
mod outbox;
mod parking;
mod retail_api;
mod scenarios;
mod schema;
mod secure;
mod seeds;
mod settings;
mod shutdown;
mod waiting;
mod watch;
