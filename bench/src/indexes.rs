//! What each index that lists need costs whoever writes: the same load with all of them and without
//! one, in turn, on a database that has many orders.

use std::time::Duration;

use anyhow::Context;
use tokio_postgres::Client;

use client::table;

use crate::database::Database;
use crate::product::Product;
use crate::report::Mode;
use crate::run::{Bench, median, step};

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
    measure(bench, product, "to warm up").await?;
    let mut seen = vec![Vec::new(); INDEXES.len() + 1];
    for round in 0..rounds {
        for turn in 0..seen.len() {
            let variant = (round + turn) % seen.len();
            let label = |what: &str| format!("round {} of {rounds}, {what}", round + 1);
            let one = match INDEXES.get(variant) {
                None => measure(bench, product, &label("all indexes")).await?,
                Some((name, index)) => {
                    let again = remove(&client, index).await?;
                    let one = measure(bench, product, &label(&format!("none {name}"))).await?;
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

async fn measure(bench: &mut Bench, product: &mut Product, label: &str) -> anyhow::Result<Seen> {
    let point = bench.point(product, Mode::Accepted, CALLERS).await?;
    let per_second = point.load.per_second;
    let postgres = point.cpu.postgres.context("PostgreSQL's processes cannot be seen from here")? * 1e6 / per_second;
    step(&format!("{label}: {per_second:.0} accepted per s, {postgres:.1} µs of PostgreSQL each"));
    Ok(Seen { per_second, postgres })
}

fn render(seen: &[Vec<Seen>]) -> String {
    let (all, without) = seen.split_last().map_or((&[][..], &[][..]), |(all, without)| (all.as_slice(), without));
    let mut rows = Vec::new();
    for ((name, _), without) in INDEXES.iter().zip(without) {
        let pairs = || all.iter().zip(without);
        let costs: Vec<f64> = pairs().map(|(all, without)| all.postgres - without.postgres).collect();
        let ratios: Vec<f64> = pairs().map(|(all, without)| all.per_second / without.per_second).collect();
        let (least, most) =
            (costs.iter().copied().fold(f64::MAX, f64::min), costs.iter().copied().fold(f64::MIN, f64::max));
        rows.push(vec![
            (*name).to_owned(),
            format!("{:.1}", median(&costs)),
            format!("{least:.1} to {most:.1}"),
            format!("{:.2}", median(&ratios)),
        ]);
    }
    let cost = median(&all.iter().map(|seen| seen.postgres).collect::<Vec<_>>());
    let rate = median(&all.iter().map(|seen| seen.per_second).collect::<Vec<_>>());
    let header = ["list", "µs of PostgreSQL per order", "by round", "accepted, with it / without"];
    format!(
        "What each list's index costs an order, from its creation to done; with all of them {rate:.0} orders per s \
         are accepted, for {cost:.1} µs of PostgreSQL each:\n\n{}",
        table::markdown(&header, &rows)
    )
}

/// Of each measurement.
pub const WARM_UP: Duration = Duration::from_secs(2);
pub const MEASURE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_costs_what_is_spared_without_it() {
        let seen = |cost: [f64; 3]| cost.map(|postgres| Seen { per_second: 1000.0 / postgres, postgres }).to_vec();
        let text =
            render(&[seen([29.0, 30.0, 31.0]), seen([24.0, 25.0, 23.0]), seen([20.0; 3]), seen([30.0, 31.0, 30.0])]);
        assert!(text.contains("| by time  |                        1.0 | -1.0 to 1.0 "), "{text}");
        assert!(text.contains("| by user  |                        6.0 |  6.0 to 7.0 "), "{text}");
    }
}
