//! Two builds of the service in one run, in turn: what a change costs or gains, whatever else the
//! machine does meanwhile.

use std::path::{Path, PathBuf};

use anyhow::Context;
use uuid::Uuid;

use crate::database::Database;
use crate::process;
use crate::product::{self, Product};
use crate::report::{LedgerFigures, Mode};
use crate::run::{Bench, Options, step};
use crate::table;
use crate::topics::Topics;

/// A build with a database and topics of its own.
struct Side<'a> {
    label: &'static str,
    database: Database,
    topics: Topics,
    product: Product,
    bench: Bench<'a>,
    /// Of each point, by round.
    seen: Vec<Vec<Seen>>,
}

/// One measurement.
#[derive(Clone, Copy)]
struct Seen {
    /// Orders per second.
    rate: f64,
    /// Processor time per order, in microseconds: API, worker, PostgreSQL, and all of the machine.
    cost: [f64; 4],
}

/// Measures ours and the binaries in the folder `other` in turn, so many rounds. The table of both
/// and their ratios.
///
/// # Errors
/// When one of them does not run, or does not account for what it accepted.
pub async fn run(
    options: &Options,
    other: &Path,
    rounds: usize,
    interrupted: impl Future<Output = ()>,
) -> anyhow::Result<String> {
    let own = process::own_folder()?;
    // The binaries run elsewhere.
    let other = &other.canonicalize().with_context(|| format!("looking for {}", other.display()))?;
    for binaries in [&own, other] {
        product::ensure_built(binaries)?;
    }
    let mut sides = Vec::new();
    let result = tokio::select! {
        result = measure(options, [&own, other], rounds, &mut sides) => result,
        () = interrupted => Err(anyhow::anyhow!("interrupted")),
    };
    for side in sides {
        let Side { database, topics, product, .. } = side;
        drop(product);
        if let Err(error) = database.remove().await {
            eprintln!("tidying up: {error:#}");
        }
        if let Err(error) = topics.remove(&options.kafka_brokers, &options.kafka_config).await {
            eprintln!("tidying up: {error:#}");
        }
    }
    result
}

async fn measure<'a>(
    options: &'a Options,
    binaries: [&Path; 2],
    rounds: usize,
    sides: &mut Vec<Side<'a>>,
) -> anyhow::Result<String> {
    for (label, binaries) in ["ours", "other"].into_iter().zip(binaries) {
        let name = format!("bench_{}", Uuid::now_v7().simple());
        let (topics, database) = (Topics::named(&name), Database::create(&options.postgres_dsn, &name).await?);
        let folder: PathBuf = options.folder.join(label);
        std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let product = Product::start(binaries, &database, &topics, &folder).await?;
        let bench = Bench { options, ledger: LedgerFigures::default() };
        sides.push(Side { label, database, topics, product, bench, seen: Vec::new() });
    }
    let points: Vec<(Mode, usize)> =
        options.callers.iter().flat_map(|callers| [(Mode::Accepted, *callers), (Mode::Answered, *callers)]).collect();
    for round in 1..=rounds {
        for (place, (mode, callers)) in points.iter().enumerate() {
            // Each is the first of a pair as often as the other.
            if round.is_multiple_of(2) {
                sides.reverse();
            }
            for side in sides.iter_mut() {
                let point = side.bench.point(&mut side.product, *mode, *callers).await?;
                let rate = point.load.per_second;
                step(&format!("round {round}, {callers} callers, {}, {}: {rate:.0}/s", mode.label(), side.label));
                let cpu = [point.cpu.api, point.cpu.worker, point.cpu.postgres.unwrap_or_default(), point.cpu.machine];
                side.seen.resize_with(points.len(), Vec::new);
                side.seen[place].push(Seen { rate, cost: cpu.map(|share| share * 1e6 / rate) });
            }
            if round.is_multiple_of(2) {
                sides.reverse();
            }
        }
    }
    for side in sides.iter_mut() {
        side.bench.check(&side.database).await?;
    }
    Ok(table(&points, &sides[0].seen, &sides[1].seen))
}

fn table(points: &[(Mode, usize)], ours: &[Vec<Seen>], others: &[Vec<Seen>]) -> String {
    let (mut rates, mut costs) = (Vec::new(), Vec::new());
    for ((mode, callers), (ours, others)) in points.iter().zip(ours.iter().zip(others)) {
        let label = format!("{}, {callers}", mode.label());
        let rate = |seen: &[Seen]| seen.iter().map(|seen| seen.rate).collect::<Vec<_>>();
        let ratios: Vec<f64> = ours.iter().zip(others).map(|(ours, other)| ours.rate / other.rate).collect();
        let (least, most) = (ratios.iter().copied().reduce(f64::min), ratios.iter().copied().reduce(f64::max));
        rates.push(vec![
            label.clone(),
            format!("{:.0}", median(&rate(ours))),
            format!("{:.0}", median(&rate(others))),
            format!("{:.2}", median(&ratios)),
            format!("{:.2}–{:.2}", least.unwrap_or_default(), most.unwrap_or_default()),
        ]);
        let cost = |seen: &[Seen], part: usize| median(&seen.iter().map(|seen| seen.cost[part]).collect::<Vec<_>>());
        let both = |part: usize| format!("{:.0} / {:.0}", cost(ours, part), cost(others, part));
        costs.push([vec![label], (0..4).map(both).collect()].concat());
    }
    let rates = table::markdown(&["orders, callers", "ours per s", "other per s", "ratio", "by round"], &rates);
    let costs =
        table::markdown(&["µs per order, ours / other", "api-service", "worker", "PostgreSQL", "machine"], &costs);
    format!("{rates}\n{costs}")
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_one_round_and_their_median_is_told() {
        let seen = |rates: [f64; 3]| vec![rates.map(|rate| Seen { rate, cost: [rate; 4] }).to_vec()];
        let text = table(&[(Mode::Answered, 64)], &seen([100.0, 300.0, 220.0]), &seen([100.0, 200.0, 200.0]));
        assert!(text.contains("| answered, 64    |        220 |         200 |  1.10 | 1.00–1.50 |"), "{text}");
    }
}
