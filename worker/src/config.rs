//! The settings of `worker`.

use clap::{Args, Parser};
use shared::settings::{DbSettings, KafkaSettings, Listen};

/// Moves orders along their lifecycle and answers those who wait.
#[derive(Debug, Parser)]
#[command(name = "worker", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    pub config: Config,
}

const EXAMPLES: &str = "\
Every setting is a flag and an environment variable; a .env file in the working directory serves too.

Examples:
  worker --postgres-dsn 'postgres://shop:…@db/orders?sslmode=verify-full' --kafka-brokers k1:9092,k2:9092
  WORKER_PORT=off LOG_FORMAT=json worker";

#[derive(Args, Clone, Debug)]
pub struct Config {
    #[command(flatten)]
    pub worker: WorkerSettings,
    #[command(flatten)]
    pub db: DbSettings,
    #[command(flatten)]
    pub kafka: KafkaSettings,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Worker")]
pub struct WorkerSettings {
    /// Port of /health, /ready and /metrics, or address and port; 0 takes a free one, off none
    #[arg(long, env = "WORKER_PORT", value_name = "WORKER_PORT", default_value = "9081")]
    pub worker_port: Listen,
    /// Consumer group; workers of one group share the work
    #[arg(long, env = "WORKER_GROUP", value_name = "WORKER_GROUP", default_value = "order-workers", value_parser = group)]
    pub worker_group: String,
}

fn group(text: &str) -> Result<String, String> {
    if text.trim().is_empty() { Err("must not be empty".to_owned()) } else { Ok(text.to_owned()) }
}
