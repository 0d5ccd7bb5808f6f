//! Reads the settings and runs.

use std::process::ExitCode;

use anyhow::Context as _;
use shared::{settings, shutdown, telemetry};
use worker::config::{Cli, Config};

/// As in `api-service`: many small, short-lived allocations on several threads.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// It does one thing after the other: what one thread wakes on another only costs time.
const THREADS: usize = 1;

fn main() -> ExitCode {
    let cli: Cli = settings::parse();
    shutdown::run_to_end(THREADS, async {
        match cli.command {
            Some(command) => worker::cli::run(cli.config, command).await,
            None => work(cli.config).await,
        }
    })
}

async fn work(config: Config) -> anyhow::Result<()> {
    config.check()?;
    telemetry::log(&config.kafka.service)?;
    let metrics = telemetry::metrics()?;
    let shutdown = shutdown::requested().context("listening for signals")?;
    let listeners = shared::server::bind("http", "WORKER_PORT", config.worker.worker_port).await?;
    worker::run(config, listeners, metrics, shutdown).await
}
