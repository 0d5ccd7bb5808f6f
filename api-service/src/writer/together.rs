//! Writes many new orders in one transaction: all of them, or none.

use std::collections::HashMap;

use shared::{
    db::{Connection, DbError, Fault},
    outbox::Placed,
};
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    BATCH, CONTENTION_RETRIES, Writer, Written, count_accepted,
    creates::{placed, written},
};
use crate::{
    error::Problem,
    orders::Operation,
    store::{
        insert::{self, NewRow},
        read,
    },
};

/// A new order that is durable now, or was before.
#[derive(Debug)]
pub(crate) struct Stored {
    pub correlation_id: Uuid,
    pub written: Written,
}

/// What became of the rows by their places; where there is a problem, nothing was stored.
type Results = Vec<Result<Written, Problem>>;

impl Writer {
    /// Stores all these orders, or none: then each has its own problem, or another's
    /// ([`Problem::AnotherRefused`]).
    pub(crate) async fn write_together(&self, rows: &[NewRow]) -> Result<Vec<Result<Stored, Problem>>, Problem> {
        let connection = self.db.connection().await?;
        for _ in 0..CONTENTION_RETRIES {
            let began = Instant::now();
            match connection.transaction(self.db.settings.write_timeout, self.all_or_none(&connection, rows)).await {
                Ok((results, sent)) => {
                    self.outbox.publish(sent, began);
                    self.cache.forget(rows.iter().map(|row| (row.order_id, row.user_id.as_str()))).await;
                    count_accepted(results.iter().map(|result| (Operation::Created, result)));
                    let of_row = |(row, result): (&NewRow, Result<Written, Problem>)| {
                        result.map(|written| Stored { correlation_id: row.correlation_id, written })
                    };
                    return Ok(rows.iter().zip(results).map(of_row).collect());
                }
                Err(error) if error.fault() == Fault::Contention => {
                    metrics::counter!("orderstream_write_contention_total").increment(1);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Problem::Unavailable("too many changes at once to the same orders"))
    }

    async fn all_or_none(&self, connection: &Connection, rows: &[NewRow]) -> Result<(Results, Vec<Placed>), DbError> {
        let client = connection.client();
        client.batch_execute("savepoint nothing").await?;
        let (mut results, sent) = self.insert_all(connection, rows).await?;
        if results.iter().any(Result::is_err) {
            client.batch_execute("rollback to savepoint nothing").await?;
            for result in results.iter_mut().filter(|result| result.is_ok()) {
                *result = Err(Problem::AnotherRefused);
            }
            return Ok((results, Vec::new()));
        }
        Ok((results, sent))
    }

    async fn insert_all(&self, connection: &Connection, rows: &[NewRow]) -> Result<(Results, Vec<Placed>), DbError> {
        let client = connection.client();
        // As all writers do: two that take the same ones in another order would wait for each other.
        let mut places: Vec<usize> = (0..rows.len()).collect();
        places.sort_by_key(|place| (&rows[*place].user_id, &rows[*place].external_id));
        let mut parts: Vec<&[usize]> = places.chunks(BATCH).rev().collect();
        let mut stored: HashMap<usize, String> = HashMap::new();
        let mut refused: HashMap<usize, Problem> = HashMap::new();
        while let Some(part) = parts.pop() {
            let batch: Vec<&NewRow> = part.iter().map(|place| &rows[*place]).collect();
            client.batch_execute("savepoint part").await?;
            match insert::insert_orders(connection, &batch, &self.topic).await {
                Ok(mut inserted) => {
                    client.batch_execute("release savepoint part").await?;
                    let found = part.iter().filter_map(|at| Some((*at, inserted.remove(&rows[*at].order_id)?)));
                    stored.extend(found);
                }
                // All that is bad is to be named.
                Err(error) if error.fault().is_of_rows() => {
                    client.batch_execute("rollback to savepoint part").await?;
                    match part {
                        [place] => {
                            refused.insert(*place, error.into());
                        }
                        _ => {
                            let (first, second) = part.split_at(part.len() / 2);
                            parts.extend([second, first]);
                        }
                    }
                }
                Err(error) => return Err(error),
            }
        }

        let lost: Vec<usize> =
            places.iter().copied().filter(|at| !stored.contains_key(at) && !refused.contains_key(at)).collect();
        let mut before = self.taken(connection, rows, &lost, &mut stored, &mut refused).await?;
        let mut sent = Vec::with_capacity(stored.len());
        let results = rows.iter().enumerate().map(|(at, row)| {
            if let Some(place) = stored.get(&at) {
                sent.push(placed(row, place));
                return Ok(written(row));
            }
            before.remove(&at).ok_or_else(|| refused.remove(&at).unwrap_or(Problem::Internal))
        });
        let results = results.collect();
        Ok((results, sent))
    }

    /// Those whose external id was taken: by the same order, which is as good, by a deleted one,
    /// which gives it up to another, or by another one.
    async fn taken(
        &self,
        connection: &Connection,
        rows: &[NewRow],
        lost: &[usize],
        stored: &mut HashMap<usize, String>,
        refused: &mut HashMap<usize, Problem>,
    ) -> Result<HashMap<usize, Written>, DbError> {
        let mut before = HashMap::new();
        for part in lost.chunks(BATCH) {
            let part_rows: Vec<&NewRow> = part.iter().map(|at| &rows[*at]).collect();
            let mut found = read::references(connection, &part_rows).await?;
            for (index, at) in part.iter().enumerate() {
                let row = &rows[*at];
                let mut outcome = found.remove(&index).map(|holder| holder.outcome(row));
                if matches!(outcome, Some(Ok(None))) {
                    if let Some(place) = insert::insert_in_place_of_deleted(connection, row, &self.topic).await? {
                        stored.insert(*at, place);
                        continue;
                    }
                    // Another line has it now, or somebody quicker.
                    outcome = read::references(connection, &[row]).await?.remove(&0).map(|holder| holder.outcome(row));
                }
                match outcome {
                    Some(Ok(Some(written))) => {
                        before.insert(*at, written);
                    }
                    Some(Err(problem)) => {
                        refused.insert(*at, problem);
                    }
                    Some(Ok(None)) | None => {
                        refused.insert(*at, Problem::Unavailable("this external id is being taken by others"));
                    }
                }
            }
        }
        Ok(before)
    }
}
