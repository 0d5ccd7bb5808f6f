//! Writes changes of orders that exist: under their locks, decided purely (`change.rs`), all of them together.

use std::collections::HashMap;

use shared::{
    db::{Connection, DbError},
    message::now,
};
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    Command, Task, Written,
    claims::{KEY_CONTENDED, known_keys, replayed},
};
use crate::{
    change::{self, Context, Decided},
    error::Problem,
    store::{
        change as store,
        change::ChangedRow,
        keys::{self, KeyRow},
    },
};

impl Task {
    pub(super) async fn change(
        &self,
        connection: &Connection,
        part: &[Command],
    ) -> Result<Vec<Result<Written, Problem>>, DbError> {
        let ids: Vec<Uuid> =
            part.iter().map(|command| command.work.target().map_or(Uuid::nil(), |target| target.order_id)).collect();
        let work = async {
            let locked = store::lock_orders(connection, &ids).await?;
            // After the locks: what happened before us has an earlier time than we.
            let (at, began) = (now(), Instant::now());
            let mut locked: HashMap<_, _> = locked.into_iter().map(|order| (order.order_id, order)).collect();
            let known = known_keys(connection, part.iter()).await?;
            let mut rows = Vec::with_capacity(part.len());
            let mut results = Vec::with_capacity(part.len());
            for (index, (command, order_id)) in part.iter().zip(&ids).enumerate() {
                let (lifecycles, topic) = (self.lifecycles, self.topic.as_str());
                let context = Context { lifecycles, origin: &command.origin, at, topic };
                let decided = match (replayed(command, &known), locked.remove(order_id)) {
                    (Some(replayed), _) => {
                        results.push(replayed);
                        continue;
                    }
                    (None, Some(order)) => change::decide(order, &command.work, context),
                    (None, None) => Err(Problem::UnknownOrder),
                };
                results.push(decided.map(|Decided { row, written }| {
                    rows.push((index, row));
                    written
                }));
            }
            let claims: Vec<KeyRow<'_>> = rows
                .iter()
                .filter_map(|(index, row)| {
                    let (order_id, version, correlation_id) =
                        (row.order.order_id, row.order.version, row.correlation_id);
                    Some(KeyRow { claim: part[*index].origin.claim.as_ref()?, order_id, version, correlation_id })
                })
                .collect();
            if !claims.is_empty() {
                // Who has the same key for another order, and was quicker.
                let claimed = keys::claim_keys(connection, &claims, at).await?;
                let is_lost = |row: &ChangedRow, index: usize| {
                    part[index].origin.claim.is_some() && !claimed.contains(&row.correlation_id)
                };
                if claimed.len() < claims.len() {
                    let lost: Vec<usize> =
                        rows.iter().filter(|(index, row)| is_lost(row, *index)).map(|(index, _)| *index).collect();
                    rows.retain(|(index, _)| !lost.contains(index));
                    let known = known_keys(connection, lost.iter().map(|index| &part[*index])).await?;
                    for index in lost {
                        results[index] = replayed(&part[index], &known).unwrap_or(Err(KEY_CONTENDED));
                    }
                }
            }
            let rows: Vec<ChangedRow> = rows.into_iter().map(|(_, row)| row).collect();
            let sent = match rows.as_slice() {
                [] => Vec::new(),
                rows => store::write_changes(connection, rows, at).await?,
            };
            let changed: Vec<(Uuid, String)> =
                rows.into_iter().map(|row| (row.order.order_id, row.order.user_id)).collect();
            Ok((sent, changed, results, began))
        };
        let (sent, changed, results, began) = connection.transaction(self.db.settings.write_timeout, work).await?;
        self.outbox.publish(sent, began);
        self.cache.forget(changed.iter().map(|(order_id, user_id)| (*order_id, user_id.as_str()))).await;
        Ok(results)
    }
}
