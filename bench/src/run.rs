//! The benchmark, in the order of its steps. Each round measures what the machine can do (pgbench,
//! single commits, Kafka, HTTP) and then the service, so that the ratios are taken within minutes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::{Instant, sleep};

use crate::bare::Bare;
use crate::database;
use crate::echo::Echo;
use crate::ground::{self, Ground, Servers, step};
use crate::load::{Figures, Plan};
use crate::measure::{self, Bench, Load, Mode, Point};
use crate::pgbench;
use crate::process;
use crate::procfs;
use crate::product::{MAX_WAITERS, Product};
use crate::report::{Ceilings, Machine, MemoryFigures, Report, Round, StartFigures};

/// Before the start, at what else the machine does.
const QUIET_LOOK: Duration = Duration::from_secs(3);
/// Of the requests that Kafka and HTTP are asked to carry at once.
const MANY: usize = 512;
/// Of an open loop: more than are ever under way while the service keeps up.
const CONNECTIONS: usize = 512;

/// What is measured without the service.
struct Ceiling {
    echo: Echo,
    chain: Echo,
    http: Bare,
}

pub struct Options {
    pub servers: Servers,
    pub rounds: usize,
    pub callers: Vec<usize>,
    /// Of the round's peak, what is offered in an open loop.
    pub shares: Vec<f64>,
    pub warm_up: Duration,
    pub measure: Duration,
    /// Of each ceiling.
    pub ceiling: Duration,
    pub parked: Vec<usize>,
    /// Leaves the database and the topics for a look at them.
    pub keep: bool,
}

/// Leaves nothing behind but the report and the logs, however it ends.
pub async fn run(options: &Options, interrupted: impl Future<Output = ()>) -> anyhow::Result<Report> {
    ground::used(&options.servers, options.keep, interrupted, async |ground| measure(options, ground).await).await
}

async fn measure(options: &Options, ground: &Ground) -> anyhow::Result<Report> {
    let database = &ground.database;
    let machine = Machine {
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        busy_before: busy_cores(QUIET_LOOK).await?,
        postgres: database::describe_server(&database.connect().await?).await?,
    };
    step("starting the service");
    let waiters = options.parked.iter().copied().max().unwrap_or_default().max(MAX_WAITERS);
    let settings = [("MAX_WAITERS", waiters.to_string())];
    // The first start makes the tables and the topics, which is not what a start costs.
    ground.start(&process::own_folder()?, &settings).await?.stop().await?;
    let mut product = ground.start(&process::own_folder()?, &settings).await?;
    let start = StartFigures { api_ms: product.api.ready_after_ms, worker_ms: product.worker.ready_after_ms };
    let idle = product.memory()?;
    let mut bench = Bench::new(options.warm_up, options.measure);
    pgbench::make_tables(database).await?;
    let servers = Servers { postgres_dsn: database.dsn().to_owned(), ..ground.servers.clone() };
    let bare = Ceiling {
        echo: Echo::start(&servers, ground.topics.echo.clone(), false).await?,
        chain: Echo::start(&servers, ground.topics.chain.clone(), true).await?,
        http: Bare::start().await?,
    };

    // Kafka on new servers is still being compiled: it took half a core where it takes a sixth soon
    // after. What is measured is a service that has been running.
    for mode in [Mode::Accepted, Mode::Answered] {
        let callers = options.callers.iter().copied().max().unwrap_or(1);
        let point = bench.point(&mut product, Load::closed(mode, callers)).await?;
        step(&format!("not counted, to warm up: {callers} callers, {}: {:.0}/s", mode.label(), point.load.per_second));
    }
    bare.echo.measure(MANY as u64, options.ceiling).await?;
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        let label = format!("round {number} of {}", options.rounds);
        rounds.push(round(options, ground, &mut product, &mut bench, &bare, &label).await?);
    }
    bare.echo.stop().await?;
    bare.chain.stop().await?;
    drop(bare.http);

    let after_load = product.memory()?;
    let mut parked = Vec::new();
    for requests in &options.parked {
        step(&format!("{requests} parked requests"));
        parked.push(bench.parked(&mut product, *requests).await?);
    }
    step("ledger");
    bench.check(database).await?;
    product.stop().await?;
    let at_unix = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let memory = MemoryFigures { idle, after_load, parked };
    Ok(Report { at_unix, machine, start, rounds, memory, ledger: bench.ledger })
}

async fn round(
    options: &Options,
    ground: &Ground,
    product: &mut Product,
    bench: &mut Bench,
    bare: &Ceiling,
    label: &str,
) -> anyhow::Result<Round> {
    let (database, seconds) = (&ground.database, options.ceiling.as_secs().max(1));
    let pgbench = async || -> anyhow::Result<_> {
        let figures = pgbench::run(database, seconds).await?;
        step(&format!("{label}, pgbench: {:.0}/s", figures.transactions_per_second));
        Ok(figures)
    };
    let before = pgbench().await?;
    let single_commits = pgbench::single_commits(database, seconds, &ground.folder).await?;
    let kafka_single = bare.echo.measure(1, options.ceiling).await?;
    pgbench::make_tables(database).await?;
    let chain = bare.chain.measure(1, options.ceiling).await?;
    step(&format!(
        "{label}, p50 of single commits: {:.2} ms, of Kafka's request and reply: {:.2} ms, with two commits: {:.2} ms",
        single_commits.p50_ms, kafka_single.p50_ms, chain.p50_ms
    ));

    let (mut closed, mut open) = (Vec::new(), Vec::new());
    for callers in &options.callers {
        for mode in [Mode::Answered, Mode::Accepted] {
            closed.push(point(bench, product, Load::closed(mode, *callers), label).await?);
        }
    }
    let middle = pgbench().await?;
    let rates = closed.iter().filter(|point| point.mode == Mode::Answered).map(|point| point.load.per_second);
    let peak = rates.fold(0.0, f64::max);
    for share in &options.shares {
        let load = Load::open(Mode::Answered, (share * peak).max(1.0), CONNECTIONS);
        open.push(point(bench, product, load, label).await?);
    }
    let kafka_many = bare.echo.measure(MANY as u64, options.ceiling).await?;
    let http = over_http(options, &bare.http).await?;
    step(&format!("{label}, Kafka: {:.0}/s, HTTP: {:.0}/s", kafka_many.per_second, http.per_second));
    let after = pgbench().await?;
    let pgbench = vec![before, middle, after];
    let ceilings = Ceilings { pgbench, single_commits, kafka_single, chain, kafka_many, http };
    Ok(Round { ceilings, closed, open })
}

async fn point(bench: &mut Bench, product: &mut Product, load: Load, label: &str) -> anyhow::Result<Point> {
    let point = bench.point(product, load).await?;
    let p50 = point.load.p50_ms.unwrap_or_default();
    step(&format!("{label}, {}: {:.0}/s, p50 {p50:.2} ms", load.label(), point.load.per_second));
    Ok(point)
}

async fn over_http(options: &Options, bare: &Bare) -> anyhow::Result<Figures> {
    measure::figures(measure::start_load(&Plan::accepted(bare.url.clone(), MANY, options.ceiling))?).await
}

/// How much of the machine others use.
async fn busy_cores(look: Duration) -> anyhow::Result<f64> {
    let (before, began) = (procfs::machine_busy()?, Instant::now());
    sleep(look).await;
    Ok((procfs::machine_busy()? - before).as_secs_f64() / began.elapsed().as_secs_f64())
}
