//! What idempotency keys have done before, and what a batch leaves under them.

use shared::{
    db::{Connection, DbError},
    message::now,
};

use super::{Command, Written};
use crate::{
    error::Problem,
    idempotency::Claim,
    store::{
        insert::NewRow,
        keys::{self, KeyRow, Known},
    },
};

pub(super) const KEY_CONTENDED: Problem = Problem::Unavailable("this Idempotency-Key is being used by others");

/// What is known of the keys of these commands.
pub(super) async fn known_keys<'a>(
    connection: &Connection,
    commands: impl Iterator<Item = &'a Command>,
) -> Result<Vec<Known>, DbError> {
    let claims: Vec<&Claim> = commands.filter_map(|command| command.origin.claim.as_ref()).collect();
    if claims.is_empty() { Ok(Vec::new()) } else { keys::find_keys(connection, &claims).await }
}

/// What the command's key has done before, if it did.
pub(super) fn replayed(command: &Command, known: &[Known]) -> Option<Result<Written, Problem>> {
    let claim = command.origin.claim.as_ref()?;
    let known = known.iter().find(|known| known.scope == claim.scope && known.key == claim.key)?;
    Some(claim.replay(known.clone()).map(|known| Written::Repeated(Box::new(known))))
}

/// What this key has done, that somebody else has taken.
pub(super) async fn replay(connection: &Connection, claim: &Claim) -> Result<Result<Written, Problem>, DbError> {
    let known = keys::find_keys(connection, &[claim]).await?.pop();
    Ok(known.ok_or(KEY_CONTENDED).and_then(|known| claim.replay(known)).map(|known| Written::Repeated(Box::new(known))))
}

/// Keeps what the key's request has found done before, unless the key has done something itself.
pub(super) async fn note_key(
    connection: &Connection,
    key: KeyRow<'_>,
    before: Written,
) -> Result<Result<Written, Problem>, DbError> {
    if keys::claim_keys(connection, std::slice::from_ref(&key), now()).await?.is_empty() {
        return replay(connection, key.claim).await;
    }
    Ok(Ok(before))
}

pub(super) fn key_row<'a>(row: &NewRow, claim: &'a Claim) -> KeyRow<'a> {
    KeyRow { claim, order_id: row.order_id, version: 1, correlation_id: row.correlation_id }
}
