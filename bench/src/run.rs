//! One run of the benchmark, in the order of its steps.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use clap::Args;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::database::{self, Counts, Database};
use crate::load::{self, Plan};
use crate::pgbench;
use crate::process;
use crate::procfs;
use crate::product::{self, Product, WAIT_MAX_SECONDS};
use crate::report::{CpuShares, LedgerFigures, Machine, MemoryFigures, Mode, Point, Report};
use crate::topics::Topics;

/// Longer than the sweeper's grace, after which whatever was left is sent as well.
const LEDGER_TIMEOUT: Duration = Duration::from_secs(30);

/// Before the start, at what else the machine does.
const QUIET_LOOK: Duration = Duration::from_secs(3);

/// What the service runs on.
#[derive(Args, Clone)]
pub struct Servers {
    /// A PostgreSQL on which databases may be created.
    #[arg(long, env = "POSTGRES_DSN", hide_env_values = true, default_value = "")]
    pub postgres_dsn: String,

    #[arg(long, env = "KAFKA_BROKERS", default_value = "")]
    pub kafka_brokers: String,

    /// librdkafka properties, as key=value,key=value.
    #[arg(long, env = "KAFKA_CONFIG", hide_env_values = true, default_value = "")]
    pub kafka_config: String,
}

impl Servers {
    /// # Errors
    /// When one is not named.
    pub fn check(&self) -> anyhow::Result<()> {
        for (value, key) in [(&self.postgres_dsn, "POSTGRES_DSN"), (&self.kafka_brokers, "KAFKA_BROKERS")] {
            ensure!(!value.is_empty(), "{key} is not set; `make bench` provides it");
        }
        Ok(())
    }
}

/// A database and topics of a run's own.
pub struct Ground {
    pub database: Database,
    pub topics: Topics,
}

impl Ground {
    pub async fn create(servers: &Servers) -> anyhow::Result<Self> {
        // Time-ordered and random: says when it was made, and two runs do not meet.
        let name = format!("bench_{}", Uuid::now_v7().simple());
        Ok(Self { topics: Topics::named(&name), database: Database::create(&servers.postgres_dsn, &name).await? })
    }

    pub async fn remove(self, servers: &Servers) -> anyhow::Result<()> {
        self.database.remove().await?;
        self.topics.remove(&servers.kafka_brokers, &servers.kafka_config).await
    }

    /// The service of these binaries, on it; `more` are settings beside the service's defaults.
    pub async fn start(
        &self,
        binaries: &Path,
        more: &[(&'static str, String)],
        folder: &Path,
    ) -> anyhow::Result<Product> {
        Product::start(binaries, &self.database, &self.topics, more, folder).await
    }
}

pub struct Options {
    pub servers: Servers,
    pub callers: Vec<usize>,
    pub warm_up: Duration,
    pub measure: Duration,
    /// Of pgbench, each time.
    pub pgbench: Duration,
    pub parked: usize,
    /// Leaves the database and the topics for a look at them.
    pub keep: bool,
    /// Of the logs and the results.
    pub folder: PathBuf,
}

/// Leaves nothing behind but the report and the logs, however it ends.
pub async fn run(options: &Options, interrupted: impl Future<Output = ()>) -> anyhow::Result<Report> {
    product::ensure_built(&process::own_folder()?)?;
    std::fs::create_dir_all(&options.folder).with_context(|| format!("creating {}", options.folder.display()))?;
    let ground = Ground::create(&options.servers).await?;
    let result = tokio::select! {
        result = measure(options, &ground) => result,
        () = interrupted => Err(anyhow::anyhow!("interrupted")),
    };
    if options.keep {
        let Ground { database, topics } = ground;
        eprintln!("kept: database {}, topics {} and {}", database.name(), topics.events, topics.acks);
    } else if let Err(error) = ground.remove(&options.servers).await {
        eprintln!("tidying up: {error:#}");
    }
    result
}

async fn measure(options: &Options, ground: &Ground) -> anyhow::Result<Report> {
    let database = &ground.database;
    let machine = Machine {
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        busy_before: busy_cores(QUIET_LOOK).await?,
        postgres: database::describe_server(&database.connect().await?).await?,
    };
    step("starting the service");
    let mut product = ground.start(&process::own_folder()?, &[], &options.folder).await?;
    let idle = product.memory()?;
    let mut bench = Bench::new(options.warm_up, options.measure);

    // Kafka on new servers is still being compiled: it took half a core where it takes a sixth soon
    // after. What is measured is a service that has been running.
    for mode in [Mode::Accepted, Mode::Answered] {
        let callers = options.callers.iter().copied().max().unwrap_or(1);
        let point = bench.point(&mut product, mode, callers).await?;
        step(&format!("not counted, to warm up: {callers} callers, {}: {:.0}/s", mode.label(), point.load.per_second));
    }
    let mut ceilings = vec![ceiling(options, database).await?];
    let mut points = Vec::new();
    for callers in &options.callers {
        for mode in [Mode::Accepted, Mode::Answered] {
            let point = bench.point(&mut product, mode, *callers).await?;
            step(&format!("{callers} callers, {}: {:.0}/s", mode.label(), point.load.per_second));
            points.push(point);
        }
        // Between them and not at the ends alone: what else runs on this machine comes and goes.
        ceilings.push(ceiling(options, database).await?);
    }
    step(&format!("{} parked requests", options.parked));
    let memory = bench.parked(&mut product, idle, options.parked).await?;

    step("ledger");
    bench.check(database).await?;
    product.stop().await?;
    let at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    Ok(Report { at_unix: at, machine, pgbench: ceilings, points, memory, ledger: bench.ledger })
}

/// How much of the machine others use.
async fn busy_cores(look: Duration) -> anyhow::Result<f64> {
    let before = procfs::machine_busy()?;
    sleep(look).await;
    Ok((procfs::machine_busy()? - before).as_secs_f64() / look.as_secs_f64())
}

async fn ceiling(options: &Options, database: &Database) -> anyhow::Result<pgbench::Figures> {
    let figures = pgbench::run(database, options.pgbench.as_secs().max(1)).await?;
    step(&format!("pgbench: {:.0}/s", figures.transactions_per_second));
    Ok(figures)
}

/// The measurements that go through the service, and the account they add up to.
pub struct Bench {
    warm_up: Duration,
    measure: Duration,
    pub ledger: LedgerFigures,
}

impl Bench {
    #[must_use]
    pub fn new(warm_up: Duration, measure: Duration) -> Self {
        Self { warm_up, measure, ledger: LedgerFigures::default() }
    }

    /// One measurement. Waits until all is handled.
    pub async fn point(&mut self, product: &mut Product, mode: Mode, callers: usize) -> anyhow::Result<Point> {
        let wait = match mode {
            Mode::Accepted => 0,
            Mode::Answered => WAIT_MAX_SECONDS,
        };
        let plan = Plan {
            url: product.address().url(),
            callers,
            wait,
            warm_up_ms: u64::try_from(self.warm_up.as_millis())?,
            measure_ms: u64::try_from(self.measure.as_millis())?,
            each: 0,
        };
        let (cpu_before, begun) = (product.cpu_times()?, Instant::now());
        let load = figures(start_load(&plan)?).await?;
        let (handled, cpu_after, elapsed) = (product.handled().await?, product.cpu_times()?, begun.elapsed());
        self.ledger.add(&load)?;

        product.wait_until_handled(self.ledger.accepted).await?;
        let now = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
        let share = |before: Duration, after: Duration| (after - before).as_secs_f64() / elapsed.as_secs_f64();
        Ok(Point {
            mode,
            callers,
            unhandled_at_end: self.ledger.accepted.saturating_sub(handled),
            caught_up_after_ms: now.saturating_sub(load.ended_at_unix_ms),
            cpu: CpuShares {
                api: share(cpu_before.api, cpu_after.api),
                worker: share(cpu_before.worker, cpu_after.worker),
                postgres: cpu_before.postgres.zip(cpu_after.postgres).map(|(before, after)| share(before, after)),
                load: load.cpu_share,
                machine: share(cpu_before.machine, cpu_after.machine),
            },
            load,
        })
    }

    /// The worker stands still, so that every request parks; then it goes on and all are answered.
    async fn parked(
        &mut self,
        product: &mut Product,
        idle: product::Memory,
        requests: usize,
    ) -> anyhow::Result<MemoryFigures> {
        let after_load = product.memory()?;
        let plan = Plan {
            url: product.address().url(),
            callers: requests,
            wait: WAIT_MAX_SECONDS,
            warm_up_ms: 0,
            measure_ms: 0,
            each: 1,
        };
        product.worker.signal("STOP").await?;
        let load = start_load(&plan);
        let parked = match &load {
            Ok(_) => product.wait_until_parked(requests as u64).await,
            Err(_) => Ok(()),
        };
        let memory = product.memory();
        // Before any error is returned: nothing may be left standing still.
        product.worker.signal("CONT").await?;
        parked?;
        let load = figures(load?).await?;
        self.ledger.add(&load)?;
        let answered = load.created;
        ensure!(answered == requests as u64, "{answered} of {} parked requests were answered", plan.callers);
        product.wait_until_handled(self.ledger.accepted).await?;
        Ok(MemoryFigures { requests: plan.callers, idle, after_load, parked: memory? })
    }

    /// What was accepted is stored, and handled once; nothing is left anywhere.
    pub async fn check(&mut self, database: &Database) -> anyhow::Result<()> {
        let client = database.connect().await?;
        let accepted = self.ledger.accepted;
        let expected = Counts { orders: accepted, handled: accepted, orders_handled: accepted, outbox: 0, parked: 0 };
        let deadline = Instant::now() + LEDGER_TIMEOUT;
        loop {
            let counts = database::counts(&client).await?;
            if counts == expected {
                (self.ledger.stored, self.ledger.handled) = (counts.orders, counts.handled);
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the ledger does not balance: expected {expected:?}, the database has {counts:?}");
            }
            sleep(Duration::from_millis(500)).await;
        }
    }
}

/// This program again, as the load generator.
pub fn start_load(plan: &Plan) -> anyhow::Result<Child> {
    let own = std::env::current_exe().context("finding this program")?;
    let values = [
        ("--url", plan.url.clone()),
        ("--callers", plan.callers.to_string()),
        ("--wait", plan.wait.to_string()),
        ("--warm-up-ms", plan.warm_up_ms.to_string()),
        ("--measure-ms", plan.measure_ms.to_string()),
        ("--each", plan.each.to_string()),
    ];
    let mut command = Command::new("sh");
    // As many connections as callers are more files than many systems grant unasked.
    command.args(["-c", r#"ulimit -n "$(ulimit -Hn)" || :; exec "$0" "$@""#]).arg(own).arg("load");
    for (flag, value) in values {
        command.arg(flag).arg(value);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    command.spawn().context("starting the load generator")
}

async fn figures(load: Child) -> anyhow::Result<load::Figures> {
    let output = load.wait_with_output().await.context("waiting for the load generator")?;
    ensure!(output.status.success(), "the load generator ended with {}", output.status);
    serde_json::from_slice(&output.stdout).context("reading the load generator's figures")
}

pub fn step(what: &str) {
    eprintln!("bench: {what}");
}

/// Of few values; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// `target/bench`, from `target/release/bench`.
pub fn default_folder() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program")?;
    let target = own.parent().and_then(Path::parent).context("this program stands in no target folder")?;
    Ok(target.join("bench"))
}
