//! What the tests of this workspace share: a database and topics of their own, handles on the
//! real binaries, an HTTP client that can also misbehave, and ways to break the network.
//!
//! It is written for tests: infrastructure that is not there, and conditions that do not come
//! true, panic with a message that says what to do or what was last seen.

mod cluster;
mod database;
mod events;
mod gate;
mod http;
mod instances;
mod kafka;
mod ledger;
mod orders;
mod pair;
mod pgbouncer;
mod process;
mod proxy;
mod redis;
pub mod stand_in;
mod system;
mod turn;
mod wait;

pub use cluster::KafkaCluster;
pub use database::{Dsn, TestDb};
pub use events::{Event, EventStream};
pub use gate::CommitGate;
pub use http::{HttpClient, Reply};
pub use hyper::Method;
pub use instances::{PrivateKafka, PrivatePostgres};
pub use kafka::{Copies, Headers, Message, Record, TestKafka, Topics};
pub use ledger::{Accepted, Ledger};
pub use orders::{item, marketplace_event, marketplace_order, order, shop_order};
pub use pair::PostgresPair;
pub use pgbouncer::PgBouncer;
pub use process::{Api, Service, Settings, Worker, memory_kib, refused_at_start, run_to_end, run_without_a_reader};
pub use proxy::{Mode, Proxy};
pub use redis::PrivateRedis;
pub use system::System;
pub use turn::{Turn, alone, beside_few, beside_others, long_beside_few, long_beside_others};
pub use wait::{eventually, wait_for};
