//! The keys of tickets.

use shared::db::{Db, DbError};
use uuid::Uuid;

use super::read::query;

/// A key's id, and its secret.
pub(crate) type Key = (Uuid, Vec<u8>);

/// All keys, the newest first.
pub(crate) async fn keys(db: &Db) -> Result<Vec<Key>, DbError> {
    let rows = query(db, "select id, secret from ticket_keys order by created_at desc, id", &[]).await?;
    Ok(rows.iter().map(|row| (row.get("id"), row.get("secret"))).collect())
}
