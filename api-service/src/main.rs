//! Reads the settings and runs.

use std::process::ExitCode;

use anyhow::Context as _;
use api_service::{
    Listeners,
    config::{Cli, Command, Config},
};
use shared::{
    db,
    output::say,
    server::bind,
    settings::{self, Listen},
    shutdown, telemetry,
};

/// Under load about a third of the API's time went into the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli: Cli = settings::parse();
    // Besides the write path, which has a thread of its own.
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get() - 1);
    shutdown::run_to_end(threads, async {
        match cli.command {
            Some(Command::Migrate) => migrate(cli.config).await,
            None => serve(cli.config).await,
        }
    })
}

async fn serve(config: Config) -> anyhow::Result<()> {
    config.check()?;
    telemetry::log(&config.kafka.service)?;
    let metrics = telemetry::metrics()?;
    let shutdown = shutdown::requested().context("listening for signals")?;
    let Config { api, .. } = &config;
    if api.api_port == Listen::Off {
        anyhow::bail!("API_PORT=off: orders come in there, so it cannot be off; 0 takes a free port");
    }
    let listeners = Listeners {
        grpc: bind("grpc", "GRPC_PORT", api.grpc_port).await?,
        http: bind("http", "API_PORT", api.api_port).await?,
        admin: bind("admin", "ADMIN_PORT", api.admin_port).await?,
    };
    api_service::run(config, listeners, metrics, shutdown).await
}

async fn migrate(config: Config) -> anyhow::Result<()> {
    telemetry::log(&config.kafka.service)?;
    let database = api_service::open(&config, &tokio::runtime::Handle::current())?;
    db::migrate(&database.pool).await?;
    say("the schema is up to date")
}
