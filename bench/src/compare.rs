//! Two builds of the service in one run, in turn: what a change costs or gains, whatever else the
//! machine does meanwhile.

use std::path::Path;

use anyhow::Context;

use crate::ground::{Ground, step};
use crate::measure::{Bench, Load, Mode, median, spread};
use crate::process;
use crate::product;
use crate::run::Options;
use client::table;

/// One measurement.
#[derive(Clone, Copy)]
struct Seen {
    /// Orders per second.
    rate: f64,
    /// Processor time per order, in microseconds: API, worker, PostgreSQL, and all of the machine.
    cost: [f64; 4],
}

/// Measures ours and the binaries in the folder `other` in turn; each time with a
/// database and topics of its own, and while the other is not there. The table of both and their
/// ratios.
///
/// # Errors
/// When one of them does not run, or does not account for what it accepted.
pub async fn run(options: &Options, other: &Path, interrupted: impl Future<Output = ()>) -> anyhow::Result<String> {
    let own = process::own_folder()?;
    // The binaries run elsewhere.
    let other = &other.canonicalize().with_context(|| format!("looking for {}", other.display()))?;
    for binaries in [&own, other] {
        product::ensure_built(binaries)?;
    }
    let sides = [("ours", own.as_path()), ("other", other.as_path())];
    let points: Vec<(Mode, usize)> =
        options.callers.iter().flat_map(|callers| [(Mode::Accepted, *callers), (Mode::Answered, *callers)]).collect();
    let mut seen = [vec![Vec::new(); points.len()], vec![Vec::new(); points.len()]];
    let all = async {
        // Whoever is the first on new servers is slow.
        measure(options, &own, "to warm up", points.get(..1).unwrap_or_default()).await?;
        for round in 0..options.rounds {
            // Each goes first as often as the other.
            for turn in 0..sides.len() {
                let side = (round + turn) % sides.len();
                let (label, binaries) = sides[side];
                let label = format!("round {}, {label}", round + 1);
                for (place, one) in measure(options, binaries, &label, &points).await?.into_iter().enumerate() {
                    seen[side][place].push(one);
                }
            }
        }
        anyhow::Ok(())
    };
    tokio::select! {
        result = all => result?,
        () = interrupted => anyhow::bail!("interrupted"),
    }
    Ok(table(&points, &seen[0], &seen[1]))
}

/// Each point once, from an empty database.
async fn measure(
    options: &Options,
    binaries: &Path,
    label: &str,
    points: &[(Mode, usize)],
) -> anyhow::Result<Vec<Seen>> {
    let ground = Ground::create(&options.servers).await?;
    let mut product = ground.start(binaries, &[]).await?;
    let mut bench = Bench::new(options.warm_up, options.measure);
    let mut seen = Vec::with_capacity(points.len());
    for (mode, callers) in points {
        let point = bench.point(&mut product, Load::closed(*mode, *callers)).await?;
        let rate = point.load.per_second;
        step(&format!("{label}, {callers} callers, {}: {rate:.0}/s", mode.label()));
        let cpu = [point.cpu.api, point.cpu.worker, point.cpu.postgres.unwrap_or_default(), point.cpu.machine];
        seen.push(Seen { rate, cost: cpu.map(|share| share * 1e6 / rate) });
    }
    bench.check(&ground.database).await?;
    product.stop().await?;
    ground.remove().await?;
    Ok(seen)
}

fn table(points: &[(Mode, usize)], ours: &[Vec<Seen>], others: &[Vec<Seen>]) -> String {
    let (mut rates, mut costs) = (Vec::new(), Vec::new());
    for ((mode, callers), (ours, others)) in points.iter().zip(ours.iter().zip(others)) {
        let label = format!("{}, {callers}", mode.label());
        let rate = |seen: &[Seen]| seen.iter().map(|seen| seen.rate).collect::<Vec<_>>();
        let ratios: Vec<f64> = ours.iter().zip(others).map(|(ours, other)| ours.rate / other.rate).collect();
        let [least, most] = spread(&ratios);
        rates.push(vec![
            label.clone(),
            format!("{:.0}", median(&rate(ours))),
            format!("{:.0}", median(&rate(others))),
            format!("{:.2}", median(&ratios)),
            format!("{least:.2}–{most:.2}"),
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
