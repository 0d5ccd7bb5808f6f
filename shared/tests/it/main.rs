//! The shared parts on a real PostgreSQL and a real Kafka.

mod connections;
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

fn settings_of(dsn: &Dsn) -> DbSettings {
    let args = ["test".to_owned(), format!("--postgres-dsn={dsn}")].map(OsString::from);
    parse_from::<Settings>(args, |_| None, &Default::default()).unwrap().db
}

/// As a binary has it.
fn db_at(dsn: &Dsn) -> Db {
    let settings = settings_of(dsn);
    Db::open(&settings.postgres_dsn, "test", settings.pool(), &tokio::runtime::Handle::current()).unwrap()
}
