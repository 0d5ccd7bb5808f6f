//! `bench`: the service beside pgbench, in one run.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use bench::bulk;
use bench::compare;
use bench::load::{self, Plan};
use bench::run::{self, Options, Servers};
use bench::stored;
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// Measures the service beside pgbench on the same PostgreSQL, in one run on one machine.
///
/// Starts the release binaries that stand beside this program, on a database, topics and ports of
/// their own, and stops and removes all of it at the end. Prints tables in Markdown and keeps the
/// figures as JSON in target/bench. Ends with 1 when an order that was accepted is not stored and
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
  bench --parked 5000 --keep
  bench stored --orders 10000,1000000
  bench stored --redis 127.0.0.1:6379 --rounds 0
  bench bulk --lines 1000000"
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
    /// What reading costs with few and with many orders stored, and what each list's index costs
    /// whoever writes.
    Stored(StoredArgs),
    /// Many orders in one request, beside as many requests.
    Bulk(BulkArgs),
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
    #[arg(long, default_value = "5s", value_name = "TIME", value_parser = humantime::parse_duration)]
    measure: Duration,

    /// Of pgbench, before the first measurement and after both of each number of callers.
    #[arg(long, default_value = "5s", value_name = "TIME", value_parser = humantime::parse_duration)]
    pgbench: Duration,

    /// Requests parked while memory is measured.
    #[arg(long, default_value_t = 1000)]
    parked: usize,

    /// Leaves the database and the topics there at the end.
    #[arg(long, conflicts_with = "beside")]
    keep: bool,

    /// A folder with the binaries of another build: both are measured in turn, and the table shows
    /// their ratios. No pgbench, no parked requests.
    #[arg(long, value_name = "FOLDER")]
    beside: Option<PathBuf>,

    /// With --beside: how often each measurement is made.
    #[arg(long, default_value_t = 3, requires = "beside", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match args.command {
        Some(Command::Load(plan)) => offer(&plan),
        Some(Command::Stored(args)) => read(args),
        Some(Command::Bulk(args)) => send(args),
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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    println!("{}", runtime.block_on(stored::run(&options, interrupted()))?);
    Ok(())
}

fn send(args: BulkArgs) -> anyhow::Result<()> {
    args.servers.check()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    println!("{}", runtime.block_on(bulk::run(&args.servers, args.lines, interrupted()))?);
    Ok(())
}

fn measure(args: RunArgs) -> anyhow::Result<()> {
    args.servers.check()?;
    ensure!(!args.callers.contains(&0), "--callers: 0 callers measure nothing");
    if cfg!(debug_assertions) {
        eprintln!("bench: this is a debug build: its figures mean nothing");
    }
    let options = Options {
        servers: args.servers,
        callers: args.callers,
        warm_up: args.warm_up,
        measure: args.measure,
        pgbench: args.pgbench,
        parked: args.parked,
        keep: args.keep,
        folder: run::default_folder()?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    if let Some(other) = &args.beside {
        let table = runtime.block_on(compare::run(&options, other, args.rounds.into(), interrupted()))?;
        println!("{table}");
        return Ok(());
    }
    let report = runtime.block_on(run::run(&options, interrupted()))?;
    println!("{}", report.markdown()?);
    eprintln!("bench: kept as {}", report.save(&options.folder)?.display());
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
