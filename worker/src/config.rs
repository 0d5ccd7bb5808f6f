//! The settings of `worker`.

use std::time::Duration;

use clap::{Args, Parser};
use shared::{
    backoff::Backoff,
    lifecycle::Lifecycles,
    settings::{self, CacheSettings, DbSettings, KafkaSettings, Listen},
};

use crate::cli::Command;

/// Moves orders along their lifecycle and answers those who wait.
#[derive(Debug, Parser)]
#[command(name = "worker", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub config: Config,
}

const EXAMPLES: &str = "\
Every setting is a flag and an environment variable; a .env file in the working directory serves too.

Examples:
  worker --postgres-dsn 'postgres://shop:…@db/orders?sslmode=verify-full' --kafka-brokers k1:9092,k2:9092
  WORKER_PORT=off LOG_FORMAT=json worker
  worker parked list --state dead
  worker parked redrive --topic payment-results
  worker stuck
  worker lifecycle check my.toml && LIFECYCLES_DIR=. worker lifecycle graph my";

#[derive(Args, Clone, Debug)]
pub struct Config {
    #[command(flatten)]
    pub worker: WorkerSettings,
    #[command(flatten)]
    pub clock: ClockSettings,
    #[command(flatten)]
    pub retries: RetrySettings,
    #[command(flatten)]
    pub db: DbSettings,
    #[command(flatten)]
    pub cache: CacheSettings,
    #[command(flatten)]
    pub kafka: KafkaSettings,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Worker")]
pub struct WorkerSettings {
    /// Port of /health, /ready and /metrics, or address and port; 0 takes a free one, off none
    #[arg(long, env = "WORKER_PORT", value_name = "WORKER_PORT", default_value = "9081")]
    pub worker_port: Listen,
    /// Consumer group; workers of one group share the work. What lifecycles receive is read by a second group, with
    /// .received behind this name
    #[arg(long, env = "WORKER_GROUP", value_name = "WORKER_GROUP", default_value = "order-workers", value_parser = group)]
    pub worker_group: String,
}

fn group(text: &str) -> Result<String, String> {
    if text.trim().is_empty() { Err("must not be empty".to_owned()) } else { Ok(text.to_owned()) }
}

impl Config {
    /// What no single setting shows, and the lifecycles' files.
    ///
    /// # Errors
    /// Naming the setting or the file that is to be changed.
    pub fn check(&self) -> anyhow::Result<&'static Lifecycles> {
        self.db.check()?;
        self.retries.check()?;
        self.kafka.check()?;
        self.kafka.lifecycles()
    }
}

/// How orders are moved whose time has come.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Clock")]
pub struct ClockSettings {
    /// How often each clock looks for orders that are due
    #[arg(long, env = "SCHEDULER_INTERVAL", value_name = "SCHEDULER_INTERVAL", default_value = "1s", value_parser = settings::duration)]
    pub scheduler_interval: Duration,
    /// Most orders that a clock moves at a time; with the interval, how fast it catches up
    #[arg(long, env = "SCHEDULER_BATCH_SIZE", value_name = "SCHEDULER_BATCH_SIZE", default_value = "500", value_parser = clap::value_parser!(i64).range(1..=10_000))]
    pub scheduler_batch_size: i64,
    /// Clocks in this process; 0: none
    #[arg(long, env = "SCHEDULER_WORKER_COUNT", value_name = "SCHEDULER_WORKER_COUNT", default_value = "1", value_parser = clap::value_parser!(u32).range(0..=64))]
    pub scheduler_worker_count: u32,
}

/// How messages that failed are tried again.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Failures")]
pub struct RetrySettings {
    /// Attempts in all before a message is dead
    #[arg(long, env = "RETRY_ATTEMPTS", value_name = "RETRY_ATTEMPTS", default_value = "8", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub retry_attempts: u32,
    /// Delay before the second attempt; each one is twice the last, and up to half of it is left to chance
    #[arg(long, env = "RETRY_DELAY", value_name = "RETRY_DELAY", default_value = "1s", value_parser = settings::duration)]
    pub retry_delay: Duration,
    /// Longest delay
    #[arg(long, env = "RETRY_DELAY_MAX", value_name = "RETRY_DELAY_MAX", default_value = "5m", value_parser = settings::duration)]
    pub retry_delay_max: Duration,
}

impl RetrySettings {
    /// How long to wait after so many attempts.
    pub(crate) fn delay(&self, attempts: u32) -> Duration {
        Backoff::new(self.retry_delay, self.retry_delay_max).after(attempts)
    }

    fn check(&self) -> anyhow::Result<()> {
        if self.retry_delay > self.retry_delay_max {
            let (delay, max) = (self.retry_delay, self.retry_delay_max);
            anyhow::bail!("RETRY_DELAY={delay:?} is more than RETRY_DELAY_MAX={max:?}");
        }
        Ok(())
    }
}
