//! SQL as verbs: one function per question or change.

pub(crate) mod change;
pub(crate) mod insert;
pub(crate) mod keys;
pub(crate) mod list;
pub(crate) mod pages;
pub(crate) mod read;
pub(crate) mod tickets;
pub(crate) mod watch;

use serde_json::value::RawValue;
use tokio_postgres::Row;

/// A JSON column that was selected as text.
fn json(row: &Row, column: &str) -> Option<Box<RawValue>> {
    row.get::<_, Option<String>>(column).and_then(|text| RawValue::from_string(text).ok())
}
