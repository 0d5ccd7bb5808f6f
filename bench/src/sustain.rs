//! Load for long, and more load than the service can take: what piles up, what is refused, and how
//! soon all is well again.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_postgres::Client;

use client::money::grouped_count;
use client::table::markdown;

use crate::ground::{self, Ground, Servers, step};
use crate::load::Second;
use crate::measure::{Bench, Ledger, Load, Mode, Point, Started, median, spread};
use crate::plot::{self, Axis, Line, Panel};
use crate::process;
use crate::product::Product;
use crate::report::mib;

/// At these the peak is looked for. The first ones find new servers, which are slow for half a minute: a
/// peak that is too low would make light of what is offered.
const CALLERS: [usize; 3] = [256, 512, 1024];
const PEAK_WARM_UP: Duration = Duration::from_secs(5);
const PEAK_MEASURE: Duration = Duration::from_secs(10);
/// Of an open loop: enough for all that may be under way, and in an overload for more than the
/// service has places for, or it would be the generator that holds the callers up.
const CONNECTIONS: usize = 1024;
const OVERLOAD_CONNECTIONS: usize = 8192;
const LOOK: Duration = Duration::from_secs(1);
/// After an overload: half of the peak, for so long.
const RECOVERY: Duration = Duration::from_secs(15);
/// In an answered order's second, on a service that is well.
const WELL_MS: f64 = 1000.0;

pub struct Options {
    pub servers: Servers,
    /// Of the peak.
    pub share: f64,
    pub time: Duration,
}

impl Options {
    fn connections(&self) -> usize {
        if self.share > 1.0 { OVERLOAD_CONNECTIONS } else { CONNECTIONS }
    }
}

/// What one look at the service found.
#[derive(Clone, Serialize)]
struct Look {
    second: f64,
    outbox_rows: i64,
    outbox_mib: f64,
    /// Rows that vacuum has to clear: of the outbox, of the states, of all others.
    dead: [i64; 3],
    /// Accepted and not yet handled.
    unhandled: u64,
    api_mib: f64,
    worker_mib: f64,
}

#[derive(Serialize)]
struct Sustained {
    share: f64,
    peak: f64,
    point: Point,
    looks: Vec<Look>,
}

#[derive(Serialize)]
struct Overloaded {
    peak: f64,
    overload: Sustained,
    after: Point,
    well_after_seconds: Option<usize>,
}

/// The table of a load that the service can take.
///
/// # Errors
/// When an order failed or the account does not balance.
pub async fn run(options: &Options, interrupted: impl Future<Output = ()>) -> anyhow::Result<String> {
    let work = async |ground: &Ground| {
        let mut product = ground.start(&process::own_folder()?, &[]).await?;
        let text = on(options, ground, &mut product, Ledger::default(), 0).await?;
        product.stop().await?;
        Ok(text)
    };
    ground::used(&options.servers, false, interrupted, work).await
}

/// The same on a service that runs and has that account; so many orders, handled too, were stored by
/// others.
pub(crate) async fn on(
    options: &Options,
    ground: &Ground,
    product: &mut Product,
    ledger: Ledger,
    stored: u64,
) -> anyhow::Result<String> {
    let (mut bench, peak) = peak(product, ledger).await?;
    let long = Bench::new(Duration::ZERO, options.time);
    let (started, looks) = watch(&long, product, ground, peak, options).await?;
    let point = bench.end(product, started).await?;
    bench.check_beside(&ground.database, stored).await?;
    let sustained = Sustained { share: options.share, peak, point, looks };
    let paths = save(ground, "sustained", &sustained, &sustained.looks, &sustained.point)?;
    Ok(format!("{}\n{paths}", sustained.markdown()))
}

/// The table of a load beyond what the service can take, and of what follows.
///
/// # Errors
/// When an order failed or the account does not balance.
pub async fn overload(options: &Options, interrupted: impl Future<Output = ()>) -> anyhow::Result<String> {
    let work = async |ground: &Ground| {
        let mut product = ground.start(&process::own_folder()?, &[]).await?;
        let (mut bench, peak) = peak(&mut product, Ledger::default()).await?;
        // Not waiting for what is unhandled: its end is part of the recovery.
        let (started, looks) =
            watch(&Bench::new(Duration::ZERO, options.time), &product, ground, peak, options).await?;
        let mut calm = Bench::new(Duration::ZERO, RECOVERY);
        let after = calm.start(&product, Load::open(Mode::Answered, 0.5 * peak, CONNECTIONS)).await?;
        let point = bench.end(&mut product, started).await?;
        calm.ledger = std::mem::take(&mut bench.ledger);
        let after = calm.end(&mut product, after).await?;
        calm.check(&ground.database).await?;
        product.stop().await?;
        let well_after_seconds = after.load.seconds.iter().position(is_well);
        let overload = Sustained { share: options.share, peak, point, looks };
        let overloaded = Overloaded { peak, overload, after, well_after_seconds };
        let seen = &overloaded.overload;
        let paths = save(ground, "overload", &overloaded, &seen.looks, &seen.point)?;
        Ok(format!("{}\n{paths}", overloaded.markdown()))
    };
    ground::used(&options.servers, false, interrupted, work).await
}

fn is_well(second: &Second) -> bool {
    second.created > 0 && second.refused == 0 && second.not_yet == 0 && second.worst_ms < WELL_MS
}

/// What the service answers at most, and who measured it.
async fn peak(product: &mut Product, ledger: Ledger) -> anyhow::Result<(Bench, f64)> {
    let mut bench = Bench::new(PEAK_WARM_UP, PEAK_MEASURE);
    bench.ledger = ledger;
    let mut peak = 0.0_f64;
    for callers in CALLERS {
        let point = bench.point(product, Load::closed(Mode::Answered, callers)).await?;
        step(&format!("{callers} callers: {:.0}/s answered", point.load.per_second));
        peak = peak.max(point.load.per_second);
    }
    Ok((bench, peak))
}

/// Looks at the service once a second for as long as the load lasts.
async fn watch(
    bench: &Bench,
    product: &Product,
    ground: &Ground,
    peak: f64,
    options: &Options,
) -> anyhow::Result<(Started, Vec<Look>)> {
    let client = ground.database.connect().await?;
    let rate = options.share * peak;
    step(&format!("{rate:.0} orders per s for {}", humantime::format_duration(options.time)));
    let load = Load::open(Mode::Answered, rate, options.connections());
    let started = bench.start(product, load).await?;
    let (began, mut looks, mut turn) = (Instant::now(), Vec::new(), interval(LOOK));
    let mut metrics = product.metrics().await?;
    turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !started.is_over() {
        turn.tick().await;
        let second = began.elapsed().as_secs_f64();
        let (accepted, handled) = (metrics.accepted().await?, metrics.handled().await?);
        let memory = product.memory()?;
        let (outbox_rows, outbox_mib, dead) = tables(&client).await?;
        let (api_mib, worker_mib) = (mib(memory.api), mib(memory.worker));
        let unhandled = accepted.saturating_sub(handled);
        if looks.len() % 30 == 0 {
            step(&format!(
                "{second:.0} s: outbox {outbox_rows}, unhandled {unhandled}, {api_mib:.0} + {worker_mib:.0} MiB"
            ));
        }
        looks.push(Look { second, outbox_rows, outbox_mib, dead, unhandled, api_mib, worker_mib });
    }
    ensure!(!looks.is_empty(), "the load was over at once");
    Ok((started, looks))
}

async fn tables(client: &Client) -> anyhow::Result<(i64, f64, [i64; 3])> {
    let sql = "
        select (select count(*) from outbox),
               pg_total_relation_size('outbox')::float8 / 1048576,
               coalesce(sum(n_dead_tup) filter (where relname = 'outbox'), 0)::bigint,
               coalesce(sum(n_dead_tup) filter (where relname like 'order_states%'), 0)::bigint,
               coalesce(sum(n_dead_tup) filter (where relname <> 'outbox' and relname not like 'order_states%'), 0)::bigint
        from pg_stat_user_tables";
    let row = client.query_one(sql, &[]).await.context("looking at the tables")?;
    Ok((row.try_get(0)?, row.try_get(1)?, [row.try_get(2)?, row.try_get(3)?, row.try_get(4)?]))
}

impl Sustained {
    /// Of the first and the last fifth, and the most.
    fn row(&self, what: &str, of: impl Fn(&Look) -> f64) -> Vec<String> {
        let all: Vec<f64> = self.looks.iter().map(of).collect();
        let part = all.len().div_ceil(5);
        let of = |values: &[f64]| grouped_count(median(values) as u64);
        vec![what.to_owned(), of(&all[..part]), of(&all[all.len() - part..]), grouped_count(spread(&all)[1] as u64)]
    }

    fn markdown(&self) -> String {
        let load = &self.point.load;
        let ms = |ms: Option<f64>| ms.map_or("–".to_owned(), |ms| format!("{ms:.2}"));
        let rows = [
            self.row("rows in the outbox", |look| look.outbox_rows as f64),
            self.row("MiB of the outbox, with its index", |look| look.outbox_mib),
            self.row("accepted and not yet handled", |look| look.unhandled as f64),
            self.row("resident MiB of api-service", |look| look.api_mib),
            self.row("resident MiB of worker", |look| look.worker_mib),
            self.row("dead rows of the outbox", |look| look.dead[0] as f64),
            self.row("dead rows of the states", |look| look.dead[1] as f64),
            self.row("dead rows of all other tables", |look| look.dead[2] as f64),
        ];
        format!(
            "{:.0} orders per s offered, {:.2} of the peak ({:.0}/s answered), for {:.0} s: {:.0}/s answered, \
             p50 {} ms, p99 {} ms, p99.9 {} ms; {} × 202, {} × 503, no error. Load generator: {:.2} cores.\n\n{}",
            self.share * self.peak,
            self.share,
            self.peak,
            self.looks.last().map_or(0.0, |look| look.second),
            load.per_second,
            ms(load.p50_ms),
            ms(load.p99_ms),
            ms(load.p999_ms),
            load.not_yet,
            load.refused,
            load.cpu_share,
            markdown(&["median of", "the first fifth", "the last fifth", "most at any time"], &rows)
        )
    }
}

impl Overloaded {
    fn markdown(&self) -> String {
        let load = &self.overload.point.load;
        let ms = |ms: Option<f64>| ms.map_or("–".to_owned(), |ms| format!("{ms:.1}"));
        let rows = [
            vec!["answered, × peak".to_owned(), format!("{:.2}", load.per_second / self.peak)],
            vec!["503, p99 ms after the order was due".to_owned(), ms(load.refused_p99_ms)],
            vec!["503, p99 ms after it was sent".to_owned(), ms(load.refused_after_sent_p99_ms)],
            vec!["503 without Retry-After".to_owned(), load.refused_without_retry_after.to_string()],
            vec!["202 (stored, and not answered in time)".to_owned(), grouped_count(load.not_yet)],
            vec!["cores of the load generator".to_owned(), format!("{:.2}", load.cpu_share)],
            vec![
                "seconds until half of the peak was answered well again".to_owned(),
                self.well_after_seconds.map_or("never".to_owned(), |seconds| seconds.to_string()),
            ],
            vec!["p99 ms of the 15 s after it".to_owned(), ms(self.after.load.p99_ms)],
        ];
        format!("{}\n{}", self.overload.markdown(), markdown(&["overload", ""], &rows))
    }
}

/// The JSON and the plot, and a sentence that says where they are.
fn save(
    ground: &Ground,
    what: &str,
    figures: &impl Serialize,
    looks: &[Look],
    point: &Point,
) -> anyhow::Result<String> {
    let at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let [json, svg]: [PathBuf; 2] = ["json", "svg"].map(|kind| ground.folder.join(format!("{at}-{what}.{kind}")));
    std::fs::write(&json, serde_json::to_vec_pretty(figures)?)
        .with_context(|| format!("writing {}", json.display()))?;
    plot::draw(&svg, &panels(looks, &point.load.seconds))?;
    Ok(format!("kept as {} and {}", json.display(), svg.display()))
}

fn panels(looks: &[Look], seconds: &[Second]) -> Vec<Panel> {
    let panel = |title: &str, y: &'static str, lines: Vec<Line>| Panel {
        title: title.to_owned(),
        x: Axis { name: "s", is_log: false },
        y: Axis { name: y, is_log: false },
        lines,
    };
    let look = |name: &str, of: fn(&Look) -> f64| Line {
        name: name.to_owned(),
        points: looks.iter().map(|look| (look.second, of(look))).collect(),
    };
    let second = |name: &str, of: fn(&Second) -> f64| Line {
        name: name.to_owned(),
        points: seconds.iter().enumerate().map(|(place, second)| (place as f64, of(second))).collect(),
    };
    vec![
        panel(
            "Answers",
            "per s",
            vec![
                second("201", |second| second.created as f64),
                second("202", |second| second.not_yet as f64),
                second("503", |second| second.refused as f64),
            ],
        ),
        panel("The longest wait of each second", "ms", vec![second("201", |second| second.worst_ms)]),
        panel(
            "What waits",
            "orders",
            vec![
                look("rows in the outbox", |look| look.outbox_rows as f64),
                look("accepted and not yet handled", |look| look.unhandled as f64),
            ],
        ),
        panel(
            "Resident memory",
            "MiB",
            vec![look("api-service", |look| look.api_mib), look("worker", |look| look.worker_mib)],
        ),
        panel(
            "Dead rows",
            "rows",
            vec![
                look("outbox", |look| look.dead[0] as f64),
                look("states", |look| look.dead[1] as f64),
                look("all other tables", |look| look.dead[2] as f64),
            ],
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_is_well_when_all_were_answered_soon() {
        let second = Second { created: 10, worst_ms: 20.0, ..Second::default() };
        assert!(is_well(&second));
        for ill in [
            Second { refused: 1, ..second.clone() },
            Second { not_yet: 1, ..second.clone() },
            Second { worst_ms: 1500.0, ..second.clone() },
            Second { created: 0, ..second },
        ] {
            assert!(!is_well(&ill), "{ill:?}");
        }
    }
}
