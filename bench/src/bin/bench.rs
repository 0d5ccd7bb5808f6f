//! `bench`: the service beside pgbench, in one run.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use bench::bare;
use bench::bulk;
use bench::compare;
use bench::echo;
use bench::ground::{self, Servers};
use bench::load::{self, Plan};
use bench::run::{self, Options};
use bench::scale;
use bench::stored;
use bench::sustain;
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// What the load generator needs of the machine is not the service's to have.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures the service beside pgbench on the same PostgreSQL, in one run on one machine.
///
/// Starts the release binaries that stand beside this program, on a database, topics and ports of
/// their own, and stops and removes all of it at the end. Prints tables in Markdown and keeps the
/// figures as JSON and a plot in target/bench. Ends with 1 when an order that was accepted is not stored and
/// handled exactly once.
#[derive(Parser)]
#[command(
    name = "bench",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  bench
  bench --callers 64,512 --measure 10s
  bench --beside ../before/target/release --rounds 5 --callers 256
  bench --rounds 1 --callers 1,64 --parked 5000 --keep
  bench stored --orders 10000,1000000
  bench stored --redis 127.0.0.1:6379 --rounds 0
  bench bulk --lines 1000000
  bench sustain --share 0.5 --for 5m
  bench overload --times 2 --for 1m
  bench scale --orders 1000000 --for 1m"
)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Subcommand)]
enum Command {
    /// The load generator alone, as the benchmark starts it.
    #[command(hide = true)]
    Load(Plan),
    /// The other side of Kafka's request and reply, as the benchmark starts it.
    #[command(hide = true)]
    Echo(echo::Pair),
    /// The server of the bare HTTP, as the benchmark starts it.
    #[command(hide = true)]
    BareHttp,
    /// What reading costs with few and with many orders stored, and what each list's index costs
    /// whoever writes.
    Stored(StoredArgs),
    /// Many orders in one request, beside as many requests.
    Bulk(BulkArgs),
    /// A share of the peak for long: what piles up, what grows.
    Sustain(SustainArgs),
    /// More than the service can take: what it still answers, what it refuses, how it recovers.
    Overload(OverloadArgs),
    /// With none and with up to millions of orders stored: rates, reading, sizes, and a sustained load.
    Scale(ScaleArgs),
}

#[derive(clap::Args)]
struct StoredArgs {
    #[command(flatten)]
    servers: Servers,

    /// How many orders are stored, ascending; each at least 10000.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "10000,1000000", value_parser = clap::value_parser!(u64).range(10_000..))]
    orders: Vec<u64>,

    /// Of each question.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests: u32,

    /// Of the load with and without each index; 0 leaves it out.
    #[arg(long, default_value_t = 5)]
    rounds: u8,

    /// A Redis, as host:port: what reading through it gains.
    #[arg(long, value_name = "ADDRESS")]
    redis: Option<String>,
}

#[derive(clap::Args)]
struct BulkArgs {
    #[command(flatten)]
    servers: Servers,

    /// Of each request.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1000..))]
    lines: u64,
}

#[derive(clap::Args)]
struct SustainArgs {
    #[command(flatten)]
    servers: Servers,

    /// Of the peak of answered orders.
    #[arg(long, default_value_t = 0.8)]
    share: f64,

    #[arg(long = "for", default_value = "10m", value_name = "TIME", value_parser = humantime::parse_duration)]
    time: Duration,
}

#[derive(clap::Args)]
struct OverloadArgs {
    #[command(flatten)]
    servers: Servers,

    /// Of the peak of answered orders.
    #[arg(long, default_value_t = 2.0)]
    times: f64,

    #[arg(long = "for", default_value = "1m", value_name = "TIME", value_parser = humantime::parse_duration)]
    time: Duration,
}

#[derive(clap::Args)]
struct ScaleArgs {
    /// How many orders are stored, ascending; beside none.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1000000,10000000", value_parser = clap::value_parser!(u64).range(10_001..))]
    orders: Vec<u64>,

    /// Of each question.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests: u32,

    #[command(flatten)]
    sustain: SustainArgs,
}

#[derive(clap::Args)]
struct RunArgs {
    #[command(flatten)]
    servers: Servers,

    /// How many callers at once, one measurement each.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,16,64,256,512")]
    callers: Vec<usize>,

    /// Before each measurement.
    #[arg(long, default_value = "2s", value_name = "TIME", value_parser = humantime::parse_duration)]
    warm_up: Duration,

    /// Of each measurement.
    #[arg(long, default_value = "4s", value_name = "TIME", value_parser = humantime::parse_duration)]
    measure: Duration,

    /// Of each thing that the machine does without the service.
    #[arg(long, default_value = "4s", value_name = "TIME", value_parser = humantime::parse_duration)]
    ceiling: Duration,

    /// Of the peak of answered orders, what an open loop offers; ascending.
    #[arg(long, value_name = "SHARE,…", value_delimiter = ',', default_value = "0.1,0.25,0.5,0.75,0.9")]
    shares: Vec<f64>,

    /// Requests parked while memory is measured.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1000,10000")]
    parked: Vec<usize>,

    /// Leaves the database and the topics there at the end.
    #[arg(long, conflicts_with = "beside")]
    keep: bool,

    /// A folder with the binaries of another build: both are measured in turn, and the table shows
    /// their ratios. No pgbench, no parked requests.
    #[arg(long, value_name = "FOLDER")]
    beside: Option<PathBuf>,

    /// How often each measurement is made; the tables have the medians.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match args.command {
        Some(Command::Load(plan)) => offer(&plan),
        Some(Command::Echo(pair)) => echo::answer(&pair),
        Some(Command::BareHttp) => on_all_cores(bare::serve()),
        Some(Command::Stored(args)) => read(args),
        Some(Command::Bulk(args)) => send(args),
        Some(Command::Sustain(args)) => sustain(args),
        Some(Command::Overload(args)) => overload(args),
        Some(Command::Scale(args)) => scale(args),
        None => measure(args.run),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn offer(plan: &Plan) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(&load::run(plan)?)?);
    Ok(())
}

fn read(args: StoredArgs) -> anyhow::Result<()> {
    args.servers.check()?;
    ensure!(args.orders.is_sorted_by(|fewer, more| fewer < more), "--orders: must be ascending");
    let options = stored::Options {
        servers: args.servers,
        sizes: args.orders,
        requests: usize::try_from(args.requests)?,
        rounds: args.rounds.into(),
        redis: args.redis,
    };
    let runtime = runtime()?;
    println!("{}", runtime.block_on(stored::run(&options, interrupted()))?);
    Ok(())
}

fn send(args: BulkArgs) -> anyhow::Result<()> {
    args.servers.check()?;
    let runtime = runtime()?;
    println!("{}", runtime.block_on(bulk::run(&args.servers, args.lines, interrupted()))?);
    Ok(())
}

fn sustain(args: SustainArgs) -> anyhow::Result<()> {
    let options = args.options()?;
    println!("{}", runtime()?.block_on(sustain::run(&options, interrupted()))?);
    Ok(())
}

impl SustainArgs {
    fn options(self) -> anyhow::Result<sustain::Options> {
        self.servers.check()?;
        Ok(sustain::Options { servers: self.servers, share: self.share, time: self.time })
    }
}

fn overload(args: OverloadArgs) -> anyhow::Result<()> {
    let OverloadArgs { servers, times, time } = args;
    let options = SustainArgs { servers, share: times, time }.options()?;
    println!("{}", runtime()?.block_on(sustain::overload(&options, interrupted()))?);
    Ok(())
}

fn scale(args: ScaleArgs) -> anyhow::Result<()> {
    ensure!(args.orders.is_sorted_by(|fewer, more| fewer < more), "--orders: must be ascending");
    let sustain = args.sustain.options()?;
    let options = scale::Options {
        servers: sustain.servers.clone(),
        sizes: args.orders,
        requests: usize::try_from(args.requests)?,
        sustain,
    };
    println!("{}", runtime()?.block_on(scale::run(&options, interrupted()))?);
    Ok(())
}

/// One thread: what measures must not be in the way of what it measures.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")
}

fn on_all_cores(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting a runtime")?.block_on(work)
}

fn measure(args: RunArgs) -> anyhow::Result<()> {
    args.servers.check()?;
    ensure!(!args.callers.contains(&0), "--callers: 0 callers measure nothing");
    if cfg!(debug_assertions) {
        eprintln!("bench: this is a debug build: its figures mean nothing");
    }
    let options = Options {
        servers: args.servers,
        rounds: args.rounds.into(),
        callers: args.callers,
        shares: args.shares,
        warm_up: args.warm_up,
        measure: args.measure,
        ceiling: args.ceiling,
        parked: args.parked,
        keep: args.keep,
    };
    let runtime = runtime()?;
    if let Some(other) = &args.beside {
        let table = runtime.block_on(compare::run(&options, other, interrupted()))?;
        println!("{table}");
        return Ok(());
    }
    let report = runtime.block_on(run::run(&options, interrupted()))?;
    println!("{}", report.markdown()?);
    let [json, svg] = report.save(&ground::default_folder()?)?;
    eprintln!("bench: kept as {} and {}", json.display(), svg.display());
    Ok(())
}

/// Ctrl-C, or SIGTERM from whoever started this: both leave nothing running.
async fn interrupted() {
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}
