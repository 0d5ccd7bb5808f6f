//! What happened to orders since somebody looked.

use shared::db::{Db, DbError};
use uuid::Uuid;

use super::read::{HistoryRow, history_row, query};

/// A row of the history that is new to those who know the order up to `after`.
#[derive(Debug)]
pub(crate) struct Told {
    pub order_id: Uuid,
    pub after: i64,
    pub lifecycle: String,
    /// Which version the order has by now.
    pub newest: i64,
    pub row: HistoryRow,
}

// First the order, by its id, and only where its version is a later one its history. A planner that
// is free to choose has tried all others: a limit keeps a subquery where it is, and what depends on
// another comes after it.
pub(super) const TOLD_SINCE: &str = "
    select w.order_id, w.after, o.lifecycle, o.version as newest, e.version, e.from_status, e.to_status, e.type, e.cause, e.ignored, e.at
    from unnest($1::uuid[], $2::bigint[]) as w(order_id, after)
    cross join lateral (
        select lifecycle, version from orders where order_id = w.order_id and version > w.after limit 1
    ) o
    cross join lateral (
        select version, from_status, to_status, type, cause, ignored, at
        from order_events h
        where h.order_id = w.order_id and h.version > w.after and h.version <= o.version and not h.ignored
        order by h.version limit $3::bigint
    ) e
    order by w.order_id, w.after, e.version
    limit $4::bigint";

/// What made these orders' later versions, in their order; of each order at most `chunk` rows, of
/// all together `limit`. Most orders have none: of those only the version is looked up.
pub(crate) async fn told_since(
    db: &Db,
    orders: &[Uuid],
    afters: &[i64],
    chunk: usize,
    limit: usize,
) -> Result<Vec<Told>, DbError> {
    let [chunk, limit] = [chunk, limit].map(|count| i64::try_from(count).unwrap_or(i64::MAX));
    let rows = query(db, TOLD_SINCE, &[&orders, &afters, &chunk, &limit]).await?;
    Ok(rows
        .iter()
        .map(|row| Told {
            order_id: row.get("order_id"),
            after: row.get("after"),
            lifecycle: row.get("lifecycle"),
            newest: row.get("newest"),
            row: history_row(row),
        })
        .collect())
}
