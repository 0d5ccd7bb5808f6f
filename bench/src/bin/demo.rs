//! `demo`: a file of marketplace orders through the running service, with waiting on.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use bench::demo::{self, Options};
use bench::sample;
use clap::Parser;

/// Sends marketplace orders to a running service, waits for each answer, and compares the sums.
///
/// FILE holds one order a line, as JSON. Each becomes POST /orders with its customer_id as user_id
/// and the line as payload; its id is the external id, so sending the file again repeats nothing.
///
/// Ends with 0 when no order failed and the amounts answered come to the file's own (unit price ×
/// quantity, freight not counted), with 1 otherwise.
#[derive(Parser)]
#[command(
    name = "demo",
    version,
    after_help = "\
Examples:
  demo bench/demo-orders.ndjson
  demo --url http://127.0.0.1:9000 --concurrency 64 orders.ndjson
  demo --wait 30 orders.ndjson      # a slow worker: wait longer before \"not yet answered\""
)]
struct Args {
    /// The orders, one JSON object a line.
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Where the service is.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,

    /// How many orders are under way at once.
    #[arg(long, default_value = "16", value_name = "N")]
    concurrency: NonZeroUsize,

    /// How long each order waits for the worker's answer.
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    wait: u32,
}

#[tokio::main]
async fn main() -> ExitCode {
    match send(Args::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn send(args: Args) -> anyhow::Result<bool> {
    let orders = sample::read(&args.file)?;
    let options = Options { url: args.url, concurrency: args.concurrency.get(), wait: args.wait };
    let summary = demo::run(&options, orders).await?;
    println!("{summary}");
    Ok(summary.is_good())
}
