//! The shared parts on a real PostgreSQL and a real Kafka.

mod locks;
mod migrations;
mod outbox;
mod producer;
mod vacuum;

use std::ffi::OsString;

use clap::Parser;
use shared::{
    db::Db,
    settings::{DbSettings, parse_from},
};
use test_support::Dsn;

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    db: DbSettings,
}

/// As a binary has it.
fn db_at(dsn: &Dsn) -> Db {
    let args = ["test".to_owned(), format!("--postgres-dsn={dsn}")].map(OsString::from);
    let settings: Settings = parse_from(args, |_| None, &Default::default()).unwrap();
    Db::open(&settings.db.postgres_dsn, "test", settings.db.pool(), &tokio::runtime::Handle::current()).unwrap()
}
