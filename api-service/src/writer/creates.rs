//! Writes new orders, many in one statement, and finds out what those are that were not new.

use std::collections::{HashMap, HashSet};

use shared::{
    db::{Connection, DbError},
    message::now,
    order::Violation,
    outbox::Placed,
};
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    CONTENTION_RETRIES, Command, Task, Work, Written,
    claims::{key_row, note_key, replay},
};
use crate::{
    change,
    error::Problem,
    idempotency::Claim,
    store::{
        insert::{self, NewRow},
        keys::{self, KeyRow},
        read::{self, Reference, Same},
    },
};

impl Task {
    pub(super) async fn create(
        &self,
        connection: &Connection,
        part: &[Command],
    ) -> Result<Vec<Result<Written, Problem>>, DbError> {
        let deadline = self.db.settings.write_timeout;
        let rows: Vec<(&NewRow, Option<&Claim>)> = part
            .iter()
            .filter_map(|command| match &command.work {
                Work::Create(row) => Some((&**row, command.origin.claim.as_ref())),
                Work::Update(_) | Work::Delete(_) | Work::Move(_) => None,
            })
            .collect();
        let began = Instant::now();
        let (stored, claimed) = if rows.iter().any(|(_, claim)| claim.is_some()) {
            connection.transaction(deadline, self.insert_claimed(connection, &rows)).await?
        } else {
            let rows: Vec<&NewRow> = rows.iter().map(|(row, _)| *row).collect();
            let stored = insert::insert_orders(connection, &rows, &self.topic);
            (connection.within(deadline, stored).await?, HashSet::new())
        };
        let placed = rows.iter().filter_map(|(row, _)| Some(placed(row, stored.get(&row.order_id)?)));
        self.outbox.publish(placed.collect(), began);
        let new = rows.iter().filter(|(row, _)| stored.contains_key(&row.order_id));
        self.cache.forget(new.map(|(row, _)| (row.order_id, row.user_id.as_str()))).await;
        // Many are lost where a client sends again what broke off: looked for all at once.
        let lost = rows.iter().filter(|(row, claim)| claim.is_none() && !stored.contains_key(&row.order_id));
        let lost: Vec<&NewRow> = lost.map(|(row, _)| *row).collect();
        let holders = connection.within(deadline, holders(connection, &lost)).await.unwrap_or_default();
        let mut results = Vec::with_capacity(rows.len());
        for (row, claim) in rows {
            // Its neighbours are stored: what goes wrong from here on is this one's alone.
            let known = holders.get(&row.order_id).filter(|_| claim.is_none()).map(|holder| holder.outcome(row));
            let result = match (known.and_then(Result::transpose), claim) {
                _ if stored.contains_key(&row.order_id) => Ok(Ok(written(row))),
                (_, Some(claim)) if !claimed.contains(&row.correlation_id) => {
                    connection.within(deadline, replay(connection, claim)).await
                }
                (Some(outcome), _) => Ok(outcome),
                (None, claim) => self.create_again(connection, row, claim).await,
            };
            results.push(result.unwrap_or_else(|error| Err(error.into())));
        }
        Ok(results)
    }

    /// Takes the rows' keys first, and stores those whose key was free, or that have none. Where
    /// their events lie, and whose keys were free.
    async fn insert_claimed(
        &self,
        connection: &Connection,
        rows: &[(&NewRow, Option<&Claim>)],
    ) -> Result<(HashMap<Uuid, String>, HashSet<Uuid>), DbError> {
        let keys: Vec<KeyRow<'_>> = rows.iter().filter_map(|(row, claim)| Some(key_row(row, (*claim)?))).collect();
        let claimed = keys::claim_keys(connection, &keys, now()).await?;
        let is_free =
            |(row, claim): &&(&NewRow, Option<&Claim>)| claim.is_none() || claimed.contains(&row.correlation_id);
        let fresh: Vec<&NewRow> = rows.iter().filter(is_free).map(|(row, _)| *row).collect();
        let stored = match fresh.as_slice() {
            [] => HashMap::new(),
            fresh => insert::insert_orders(connection, fresh, &self.topic).await?,
        };
        // Somebody has their external id: what their key has done is not decided yet.
        let in_vain: Vec<&Claim> = rows
            .iter()
            .filter(is_free)
            .filter(|(row, _)| !stored.contains_key(&row.order_id))
            .filter_map(|(_, claim)| *claim)
            .collect();
        if !in_vain.is_empty() {
            keys::free_keys(connection, &in_vain).await?;
        }
        Ok((stored, claimed))
    }

    /// An order whose external id was taken: by the same order, another one, or a deleted one.
    async fn create_again(
        &self,
        connection: &Connection,
        row: &NewRow,
        claim: Option<&Claim>,
    ) -> Result<Result<Written, Problem>, DbError> {
        let deadline = self.db.settings.write_timeout;
        // When a deleted order's id was taken by somebody quicker, that one has it; unless it is
        // deleted, too, by the time we look.
        for _ in 0..CONTENTION_RETRIES {
            let found = connection.within(deadline, read::references(connection, &[row])).await?.remove(&0);
            let Some(found) = found else { break };
            match (found.outcome(row), claim) {
                (Ok(None), _) => {}
                (Ok(Some(before @ Written::Before { order_id, correlation_id })), Some(claim)) => {
                    let key = KeyRow { order_id, correlation_id, ..key_row(row, claim) };
                    return connection.within(deadline, note_key(connection, key, before)).await;
                }
                // The key of one that is deleted stays free: whoever uses it again is told the same.
                (outcome, _) => return Ok(outcome.and_then(|written| written.ok_or(Problem::Internal))),
            }
            let began = Instant::now();
            let work = async {
                if let Some(claim) = claim
                    && keys::claim_keys(connection, &[key_row(row, claim)], now()).await?.is_empty()
                {
                    return Ok(Err(replay(connection, claim).await?));
                }
                let place = insert::insert_in_place_of_deleted(connection, row, &self.topic).await?;
                if let (None, Some(claim)) = (&place, claim) {
                    keys::free_keys(connection, &[claim]).await?;
                }
                Ok(Ok(place))
            };
            match connection.transaction(deadline, work).await? {
                Ok(Some(place)) => {
                    self.outbox.publish(vec![placed(row, &place)], began);
                    self.cache.forget([(row.order_id, row.user_id.as_str())]).await;
                    return Ok(Ok(written(row)));
                }
                Ok(None) => {}
                Err(replayed) => return Ok(replayed),
            }
        }
        Ok(Err(Problem::Unavailable("this external id is being taken by others")))
    }
}

/// Who has the external ids of these, by the order that wanted one.
async fn holders(connection: &Connection, rows: &[&NewRow]) -> Result<HashMap<Uuid, Reference>, DbError> {
    if rows.len() < 2 {
        return Ok(HashMap::new());
    }
    let found = read::references(connection, rows).await?;
    Ok(found.into_iter().filter_map(|(place, holder)| Some((rows.get(place)?.order_id, holder))).collect())
}

impl Reference {
    /// What becomes of a new order that finds its external id with this one. `None`: this one is deleted, and
    /// gives it up. But not to the very order that was deleted, or to one that was before: what is deleted is
    /// not brought back by its create being delivered again.
    pub(super) fn outcome(&self, row: &NewRow) -> Result<Option<Written>, Problem> {
        match (&self.same, row.replaces) {
            (Some(Same { order_id, correlation_id, deleted }), _) => {
                let (order_id, correlation_id) = (*order_id, *correlation_id);
                Ok(Some(match deleted {
                    true => Written::Gone { order_id, correlation_id },
                    false => Written::Before { order_id, correlation_id },
                }))
            }
            (None, _) if !self.deleted => Err(Problem::ExternalIdTaken { order_id: self.order_id }),
            (None, Some(replaced)) if replaced != self.order_id => {
                let reason = format!("is not the deleted order that has this external id, {}", self.order_id);
                Err(Problem::Invalid(vec![Violation::new("/replaces", reason)]))
            }
            (None, _) => Ok(None),
        }
    }
}

pub(super) fn placed(row: &NewRow, place: &str) -> Placed {
    Placed { message: row.event.clone(), place: place.to_owned() }
}

pub(super) fn written(row: &NewRow) -> Written {
    Written::Now {
        order_id: row.order_id,
        event_id: row.event_id,
        state: Box::new(change::State {
            status: row.status.to_owned(),
            version: 1,
            amount: row.amount.and_then(|amount| amount.try_into().ok()),
            currency: row.currency.clone(),
        }),
    }
}
