//! The service with none, with a million and with ten million orders stored: what it takes, what
//! reading costs, how large the tables are; and then for ten minutes what a load leaves behind.

use anyhow::Context;
use tokio_postgres::Client;

use client::money::grouped_count;
use client::table::markdown;

use crate::ground::{self, Ground, Servers, step};
use crate::http::Connection;
use crate::indexes::{MEASURE, WARM_UP};
use crate::measure::{Bench, Load, Mode, median, spread};
use crate::pgbench;
use crate::process;
use crate::product::Product;
use crate::stored::{self, Asked, FLAT};
use crate::sustain;

const CALLERS: usize = 512;
const ROUNDS: usize = 3;
const PGBENCH_SECONDS: u64 = 5;
/// Where reading is measured first: of none there is nothing to read.
const FEW: u64 = 10_000;
/// Of the rate at none.
const RATE_KEPT: f64 = 0.8;

pub struct Options {
    pub servers: Servers,
    /// Ascending.
    pub sizes: Vec<u64>,
    /// Of each question.
    pub requests: usize,
    /// The load at the end.
    pub sustain: sustain::Options,
}

/// What one number of stored orders came to.
struct Size {
    stored: u64,
    /// Orders per second, and of pgbench's at that time, of each round: accepted, answered.
    rates: [Vec<f64>; 2],
    ratios: [Vec<f64>; 2],
    reads: Vec<(&'static str, Asked)>,
    /// Table, MiB of its rows, MiB of its indexes.
    tables: Vec<(String, f64, f64)>,
}

/// The tables of all that.
///
/// # Errors
/// When an order failed or the account does not balance.
pub async fn run(options: &Options, interrupted: impl Future<Output = ()>) -> anyhow::Result<String> {
    ground::used(&options.servers, false, interrupted, async |ground| measure(options, ground).await).await
}

async fn measure(options: &Options, ground: &Ground) -> anyhow::Result<String> {
    let client = ground.database.connect().await?;
    let mut product = ground.start(&process::own_folder()?, &[]).await?;
    let mut bench = Bench::new(WARM_UP, MEASURE);
    bench.point(&mut product, Load::closed(Mode::Answered, CALLERS)).await?; // to warm up
    let mut sizes = vec![rates(ground, &mut bench, &mut product, 0).await?];
    let mut filled = 0;
    for stored in [FEW].iter().chain(&options.sizes) {
        stored::fill(&client, filled, *stored).await?;
        filled = *stored;
        let mut size = match *stored {
            FEW => Size {
                stored: FEW,
                rates: Default::default(),
                ratios: Default::default(),
                reads: Vec::new(),
                tables: Vec::new(),
            },
            stored => rates(ground, &mut bench, &mut product, stored).await?,
        };
        step(&format!("{stored} orders stored: reading"));
        let mut connection = Connection::open(product.address()).await?;
        for question in stored::questions(&client, &mut connection, product.address(), filled).await? {
            let asked = stored::ask(&mut connection, product.address(), &question, options.requests).await?;
            size.reads.push((question.name, asked));
        }
        size.tables = tables(&client).await?;
        sizes.push(size);
    }
    bench.check_beside(&ground.database, filled).await?;
    let ends = sustain::on(&options.sustain, ground, &mut product, bench.ledger, filled).await?;
    product.stop().await?;
    Ok(format!("{}\n\nWith all of them stored:\n\n{ends}", render(&sizes)))
}

async fn rates(ground: &Ground, bench: &mut Bench, product: &mut Product, stored: u64) -> anyhow::Result<Size> {
    let mut size =
        Size { stored, rates: Default::default(), ratios: Default::default(), reads: Vec::new(), tables: Vec::new() };
    for round in 1..=ROUNDS {
        let ceiling = pgbench::run(&ground.database, PGBENCH_SECONDS).await?.transactions_per_second;
        for (place, mode) in [Mode::Accepted, Mode::Answered].into_iter().enumerate() {
            let rate = bench.point(product, Load::closed(mode, CALLERS)).await?.load.per_second;
            step(&format!(
                "{stored} orders stored, round {round}: {rate:.0}/s {}; pgbench {ceiling:.0}/s",
                mode.label()
            ));
            size.rates[place].push(rate);
            size.ratios[place].push(rate / ceiling);
        }
    }
    Ok(size)
}

async fn tables(client: &Client) -> anyhow::Result<Vec<(String, f64, f64)>> {
    let sql = "
        select regexp_replace(relname, '_(p[0-3]|first|later)$', '') as name, sum(pg_table_size(relid))::float8 / 1048576,
               sum(pg_indexes_size(relid))::float8 / 1048576
        from pg_stat_user_tables
        where relname ~ '^(orders|order_refs|order_events)_p[0-3]$|^order_states_' or relname = 'outbox'
        group by 1 order by 2 desc";
    let rows = client.query(sql, &[]).await.context("asking for the tables' sizes")?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
}

fn render(sizes: &[Size]) -> String {
    let rate = |values: &[f64]| {
        let [least, most] = spread(values);
        format!(
            "{} ({} to {})",
            grouped_count(median(values) as u64),
            grouped_count(least as u64),
            grouped_count(most as u64)
        )
    };
    let measured: Vec<&Size> = sizes.iter().filter(|size| !size.rates[0].is_empty()).collect();
    let first = measured.first().map_or([0.0; 2], |size| size.ratios.each_ref().map(|ratios| median(ratios)));
    let rows: Vec<_> = measured
        .iter()
        .map(|size| {
            let kept = [0, 1].map(|mode| median(&size.ratios[mode]) / first[mode]);
            vec![
                grouped_count(size.stored),
                rate(&size.rates[0]),
                format!("{:.2}", median(&size.ratios[0])),
                format!("{:.2}", kept[0]),
                rate(&size.rates[1]),
                format!("{:.2}", median(&size.ratios[1])),
                format!("{:.2}{}", kept[1], if kept.iter().all(|kept| *kept >= RATE_KEPT) { "" } else { " **BELOW**" }),
            ]
        })
        .collect();
    let header = ["stored", "accepted per s", "× pgbench", "of none's", "answered per s", "× pgbench", "of none's"];
    let mut text = format!("{}\n", markdown(&header, &rows));

    let read: Vec<&Size> = sizes.iter().filter(|size| !size.reads.is_empty()).collect();
    let mut header = vec!["p50 / p99 ms (p50 when first asked)".to_owned()];
    header.extend(read.iter().map(|size| grouped_count(size.stored)));
    header.push("p50, last / first".to_owned());
    let questions = read.first().map_or(0, |size| size.reads.len());
    let rows: Vec<_> = (0..questions)
        .map(|place| {
            let all: Vec<&Asked> = read.iter().filter_map(|size| Some(&size.reads.get(place)?.1)).collect();
            let again = |asked: &Asked, part| asked.again.percentile_ms(part).unwrap_or_default();
            let mut row = vec![read[0].reads[place].0.to_owned()];
            row.extend(all.iter().map(|asked| {
                let first = asked.first.percentile_ms(50.0).unwrap_or_default();
                format!("{:.2} / {:.2} ({first:.2})", again(asked, 50.0), again(asked, 99.0))
            }));
            let ratio = all.last().zip(all.first()).map_or(0.0, |(last, first)| again(last, 50.0) / again(first, 50.0));
            row.push(format!("{ratio:.2}{}", if ratio <= FLAT { "" } else { " **ABOVE**" }));
            row
        })
        .collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    text.push_str(&format!("{}\n", markdown(&header, &rows)));

    for size in read {
        let rows: Vec<_> = size
            .tables
            .iter()
            .map(|(name, rows, indexes)| vec![name.clone(), format!("{rows:.0}"), format!("{indexes:.0}")])
            .collect();
        let title = format!("{} orders", grouped_count(size.stored));
        text.push_str(&format!("{}\n", markdown(&[&title, "MiB of rows", "MiB of indexes"], &rows)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_measured_by_pgbench_at_that_time() {
        let size = |stored, rate: f64, ceiling: f64, p50: u64| {
            let asked = Asked::of(std::time::Duration::from_micros(p50)).expect("histograms");
            Size {
                stored,
                rates: [vec![rate; 3], vec![rate / 2.0; 3]],
                ratios: [vec![rate / ceiling; 3], vec![rate / 2.0 / ceiling; 3]],
                reads: if stored > 0 { vec![("by id", asked)] } else { Vec::new() },
                tables: vec![("orders".to_owned(), 10.0, 5.0)],
            }
        };
        let all = [size(0, 1000.0, 1000.0, 0), size(1000, 900.0, 1000.0, 200), size(9000, 350.0, 500.0, 340)];
        let text = render(&all);
        let row = |begin: &str| {
            let line =
                text.lines().find(|line| line.starts_with(begin)).unwrap_or_else(|| panic!("no {begin}: {text}"));
            line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(row("| 1,000")[4], "0.90");
        assert_eq!(row("| 9,000")[7], "0.70 **BELOW**");
        assert_eq!(row("| by id")[4], "1.70 **ABOVE**");
    }
}
