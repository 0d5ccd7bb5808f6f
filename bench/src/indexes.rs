//! What each index that lists need costs whoever writes: the same load with all of them and without
//! one, in turn, on a database that has many orders.

use std::time::Duration;

use anyhow::Context;
use tokio_postgres::Client;

use client::table;

use crate::database::Database;
use crate::ground::step;
use crate::measure::{Bench, Load, Mode, median, spread};
use crate::product::Product;

/// What lists are answered from (V4 of the migrations).
enum Index {
    Named(&'static str),
    /// Kept by triggers, in a table of its own.
    States,
}

const INDEXES: [(&str, Index); 3] = [
    ("by time", Index::Named("orders_by_time")),
    ("by user", Index::Named("orders_by_user")),
    ("by state", Index::States),
];

const TRIGGERS: [&str; 2] = ["order_states_of_new", "order_states_of_changed"];
const CALLERS: usize = 256;

#[derive(Clone, Copy)]
struct Seen {
    per_second: f64,
    /// Processor time per order, in microseconds.
    postgres: f64,
    /// Write-ahead log per order, in bytes.
    wal: f64,
}

/// So many rounds of each; the table. The database has all its indexes again at the end, but does
/// not know the state of the orders of this measurement.
///
/// # Errors
/// When a load fails.
pub async fn run(
    bench: &mut Bench,
    product: &mut Product,
    database: &Database,
    rounds: usize,
) -> anyhow::Result<String> {
    let client = database.connect().await?;
    measure(bench, product, &client, "to warm up").await?;
    let mut seen = vec![Vec::new(); INDEXES.len() + 1];
    for round in 0..rounds {
        for turn in 0..seen.len() {
            let variant = (round + turn) % seen.len();
            let label = |what: &str| format!("round {} of {rounds}, {what}", round + 1);
            let one = match INDEXES.get(variant) {
                None => measure(bench, product, &client, &label("all indexes")).await?,
                Some((name, index)) => {
                    let again = remove(&client, index).await?;
                    let one = measure(bench, product, &client, &label(&format!("none {name}"))).await?;
                    client.batch_execute(&again).await.context("making an index again")?;
                    one
                }
            };
            seen[variant].push(one);
        }
    }
    Ok(render(&seen))
}

/// The statements that bring it back.
async fn remove(client: &Client, index: &Index) -> anyhow::Result<String> {
    let (remove, again) = match index {
        Index::Named(name) => {
            let sql = "select pg_get_indexdef($1::text::regclass)";
            let again: String = client.query_one(sql, &[name]).await.context("asking for an index")?.try_get(0)?;
            // On the partitions too, not on the empty table above them alone.
            (format!("drop index {name}"), again.replace(" ON ONLY ", " ON "))
        }
        Index::States => {
            let all =
                |verb: &str| TRIGGERS.map(|trigger| format!("alter table orders {verb} trigger {trigger}")).join("; ");
            (all("disable"), all("enable"))
        }
    };
    client.batch_execute(&remove).await.context("removing an index")?;
    Ok(again)
}

async fn measure(bench: &mut Bench, product: &mut Product, client: &Client, label: &str) -> anyhow::Result<Seen> {
    let before = written(client).await?;
    let point = bench.point(product, Load::closed(Mode::Accepted, CALLERS)).await?;
    let wal = (written(client).await? - before) / (point.load.created + point.load.not_yet) as f64;
    let per_second = point.load.per_second;
    let postgres = point.cpu.postgres.context("PostgreSQL's processes cannot be seen from here")? * 1e6 / per_second;
    step(&format!("{label}: {per_second:.0} accepted per s, {postgres:.1} µs of PostgreSQL and {wal:.0} bytes each"));
    Ok(Seen { per_second, postgres, wal })
}

/// Bytes of write-ahead log so far.
async fn written(client: &Client) -> anyhow::Result<f64> {
    let sql = "select (pg_current_wal_insert_lsn() - '0/0')::float8";
    Ok(client.query_one(sql, &[]).await.context("asking for the place in the log")?.try_get(0)?)
}

fn render(seen: &[Vec<Seen>]) -> String {
    let (all, without) = seen.split_last().map_or((&[][..], &[][..]), |(all, without)| (all.as_slice(), without));
    let mut rows = Vec::new();
    for ((name, _), without) in INDEXES.iter().zip(without) {
        let by_round = |what: fn(&Seen, &Seen) -> f64| -> Vec<f64> {
            all.iter().zip(without).map(|(all, without)| what(all, without)).collect()
        };
        let costs = by_round(|all, without| all.postgres - without.postgres);
        rows.push(vec![
            (*name).to_owned(),
            format!("{:.1}", median(&costs)),
            format!("{:.1} to {:.1}", spread(&costs)[0], spread(&costs)[1]),
            format!("{:.0}", median(&by_round(|all, without| all.wal - without.wal))),
            format!("{:.2}", median(&by_round(|all, without| all.per_second / without.per_second))),
        ]);
    }
    let of_all = |what: fn(&Seen) -> f64| median(&all.iter().map(what).collect::<Vec<_>>());
    let header =
        ["list", "µs of PostgreSQL per order", "by round", "bytes of log per order", "accepted, with it / without"];
    format!(
        "What each list's index costs an order, from its creation to done; with all of them {:.0} orders per s are \
         accepted, for {:.1} µs of PostgreSQL and {:.0} bytes of write-ahead log each:\n\n{}",
        of_all(|seen| seen.per_second),
        of_all(|seen| seen.postgres),
        of_all(|seen| seen.wal),
        table::markdown(&header, &rows)
    )
}

/// Of each measurement.
pub const WARM_UP: Duration = Duration::from_secs(2);
pub const MEASURE: Duration = Duration::from_secs(8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_costs_what_is_spared_without_it() {
        let seen = |cost: [f64; 3]| {
            cost.map(|postgres| Seen { per_second: 1000.0 / postgres, postgres, wal: 10.0 * postgres }).to_vec()
        };
        let all = [seen([29.0, 30.0, 31.0]), seen([24.0, 25.0, 23.0]), seen([20.0; 3]), seen([30.0, 31.0, 30.0])];
        let text = render(&all);
        for (list, costs) in [("by time", ["1.0", "-1.0 to 1.0", "10"]), ("by user", ["6.0", "6.0 to 7.0", "60"])] {
            let row = text.lines().find(|line| line.contains(list)).unwrap_or_else(|| panic!("no {list}: {text}"));
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            assert_eq!(cells[2..5], costs, "{text}");
        }
    }
}
